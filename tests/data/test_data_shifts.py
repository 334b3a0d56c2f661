import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from support.helpers import accepts_law, accepts_variance, same
from torch import Tensor

from fedpriv.data.dataset import Dataset
from fedpriv.data.datasets import Digits
from fedpriv.data.federation import Federation, federate, shifted, spread
from fedpriv.data.partitions import Dirichlet, Natural, Resampled
from fedpriv.data.shifts import SHIFTS, NoiseLevels, Rotation, Shift, Style, turned
from fedpriv.errors import UserError
from fedpriv.streams import Purpose, SeededStreams

STREAMS = SeededStreams(5)
NOTHING: list[Shift] = [
    Rotation(shift_angle=0.0),
    NoiseLevels(shift_noise=0.0),
    Style(shift_contrast=0.0, shift_brightness=0.0),
]


@pytest.fixture(scope="module")
def federation() -> Federation:
    return federate(Digits().load(None), Dirichlet(concentration=0.5), 20, np.random.default_rng(0))


def own(federation: Federation, client: int) -> tuple[Tensor, Tensor]:
    rows = torch.from_numpy(federation.rows_of(client))
    return federation.dataset.train_inputs[rows], federation.dataset.train_labels[rows]


def made(examples: int, *shape: int, groups: np.ndarray | None = None) -> Dataset:
    inputs = torch.rand(examples, *shape, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(examples) % 2
    return Dataset(
        name="made",
        train_inputs=inputs,
        train_labels=labels,
        test_inputs=inputs[:1],
        test_labels=labels[:1],
        classes=2,
        groups=groups,
    )


@pytest.mark.parametrize("name", SHIFTS)
def test_inputs_of_a_client_change_and_nothing_else_does(federation, name):
    before = federation.dataset.train_inputs.clone()
    moved = shifted(federation, SHIFTS[name](), STREAMS)
    assert np.array_equal(moved.offsets, federation.offsets)
    assert np.array_equal(moved.label_counts(), federation.label_counts())
    assert same(moved.dataset.test_inputs, federation.dataset.test_inputs)
    assert same(federation.dataset.train_inputs, before)
    for client in range(federation.population):
        (inputs, labels), (were, labels_were) = own(moved, client), own(federation, client)
        assert torch.equal(labels, labels_were)
        assert not torch.equal(inputs, were)
    assert moved.fingerprint != federation.fingerprint


@pytest.mark.parametrize("name", SHIFTS)
def test_what_a_clients_inputs_undergo_follows_from_seed_and_client_alone(federation, name):
    """Also on another number of threads, with fewer clients, and with other examples of the client before."""
    shift = SHIFTS[name]()
    moved = shifted(federation, shift, STREAMS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        assert same(shifted(federation, shift, STREAMS).dataset.train_inputs, moved.dataset.train_inputs)
    finally:
        torch.set_num_threads(threads)
    few = Federation(
        dataset=federation.dataset, offsets=federation.offsets[:4], rows=federation.rows[: federation.offsets[3]]
    )
    for client in range(3):
        rng = STREAMS.source(Purpose.SHIFT, client=client).rng
        expected = shift.apply(own(federation, client)[0], rng)
        assert same(own(moved, client)[0], expected)
        assert same(own(shifted(few, shift, STREAMS), client)[0], expected)
    assert not torch.equal(
        shifted(federation, shift, SeededStreams(6)).dataset.train_inputs, moved.dataset.train_inputs
    )


@pytest.mark.parametrize("shift", NOTHING, ids=repr)
def test_a_shift_of_no_size_leaves_inputs_as_they_are(federation, shift):
    moved = shifted(federation, shift, STREAMS)
    assert torch.allclose(moved.dataset.train_inputs, federation.dataset.train_inputs[federation.rows], atol=1e-6)


def test_data_are_in_the_clients_order_and_unheld_examples_are_left_out():
    groups = np.array([2, 0, 1, 1, 0, 2, 2])
    federation = federate(made(7, 1, 4, 4, groups=groups), Natural(), 2, np.random.default_rng(0))
    moved = shifted(federation, NoiseLevels(), STREAMS)
    assert moved.rows.tolist() == [0, 1, 2, 3]
    assert moved.dataset.examples == 4
    assert moved.dataset.train_labels.tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize("quarters", [1, 2, 3])
@pytest.mark.parametrize("sides", [(8, 8), (5, 5)])
def test_quarter_turns_are_exact(sides, quarters):
    images = torch.rand(3, 2, *sides, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(turned(images, 90.0 * quarters), torch.rot90(images, quarters, (2, 3)), atol=1e-5)


def test_a_turn_keeps_distances_also_on_oblong_images():
    """A dot on the long axis of a 9 by 17 image lands on the short axis at the same distance."""
    image = torch.zeros(1, 1, 9, 17)
    image[0, 0, 4, 8 + 3] = 1.0
    found = turned(image, 90.0)
    assert found[0, 0, 4 - 3, 8] == pytest.approx(1.0, abs=1e-4)
    assert float(found.sum()) == pytest.approx(1.0, abs=1e-3)


def test_a_turn_there_and_back_is_nearly_nothing_inside():
    smooth = torch.linspace(0, 1, 28)[:, None] * torch.linspace(0, 1, 28)[None, :]
    back = turned(turned(smooth[None, None], 20.0), -20.0)[0, 0]
    assert torch.allclose(back[8:-8, 8:-8], smooth[8:-8, 8:-8], atol=1e-2)


def test_angles_are_uniform_over_clients():
    """Each client's angle, from the sine by which a linear image is rotated."""
    ramp = torch.linspace(-1, 1, 9).expand(9, 9)[None, None]
    angles = []
    for client in range(2000):
        out = Rotation(shift_angle=60.0).apply(ramp, STREAMS.source(Purpose.SHIFT, client=client).rng)[0, 0]
        right, down = float(out[4, 5] - out[4, 3]), float(out[5, 4] - out[3, 4])
        angles.append(math.degrees(math.atan2(-down, right)))
    cdf = stats.uniform(-60.0, 120.0).cdf
    assert accepts_law(np.array(angles), cdf)
    assert not accepts_law(np.array(angles), stats.uniform(-50.0, 100.0).cdf)


def test_noise_is_gaussian_with_a_deviation_of_the_clients_own():
    levels = []
    for client in range(40):
        rng = STREAMS.source(Purpose.SHIFT, client=client).rng
        level = 2.0 * STREAMS.source(Purpose.SHIFT, client=client).rng.uniform()
        added = NoiseLevels(shift_noise=2.0).apply(torch.zeros(50, 30), rng).numpy()
        assert accepts_variance(added, level**2)
        assert not accepts_variance(added, (1.4 * level) ** 2)
        levels.append(level)
    assert max(levels) < 2.0
    assert min(levels) < 0.5 < 1.5 < max(levels)


def test_style_is_a_gain_and_an_offset_for_each_channel():
    images = torch.rand(6, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    logs, offsets = [], []
    for client in range(400):
        out = Style().apply(images, STREAMS.source(Purpose.SHIFT, client=client).rng)
        for channel in range(3):
            x, y = images[:, channel].flatten().numpy(), out[:, channel].flatten().numpy()
            gain, offset = np.polyfit(x, y, 1)
            assert np.allclose(gain * x + offset, y, atol=1e-4)
            logs.append(np.log(gain))
            offsets.append(offset)
    assert accepts_variance(np.array(logs), 0.3**2)
    assert accepts_variance(np.array(offsets), 0.3**2)
    assert abs(np.corrcoef(logs, offsets)[0, 1]) < 0.2


def test_inputs_that_are_no_images_have_one_gain():
    inputs = torch.rand(4, 7, generator=torch.Generator().manual_seed(0))
    out = Style(shift_brightness=0.0).apply(inputs, STREAMS.source(Purpose.SHIFT).rng)
    assert torch.allclose(out / inputs, (out / inputs)[0, 0].expand(4, 7))


def test_rotation_refuses_inputs_that_are_no_images():
    federation = federate(made(6, 5), Dirichlet(), 2, np.random.default_rng(0))
    with pytest.raises(UserError, match=r"^data\.shift: expected images .* got inputs of shape \[5\]"):
        shifted(federation, Rotation(), STREAMS)


def test_clients_that_share_examples_cannot_be_shifted():
    federation = spread(made(6, 1, 4, 4), Resampled(examples=3), 4, np.random.default_rng(0))
    with pytest.raises(UserError, match=r"^data\.shift: expected a partition that assigns each example to one client"):
        shifted(federation, Rotation(), STREAMS)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (Rotation, {"shift_angle": 181}),
        (Rotation, {"shift_angle": float("nan")}),
        (Rotation, {"shift_angle": True}),
        (NoiseLevels, {"shift_noise": -0.1}),
        (NoiseLevels, {"shift_noise": float("inf")}),
        (Style, {"shift_contrast": 2.1}),
        (Style, {"shift_brightness": "1"}),
    ],
)
def test_a_size_without_meaning_is_refused_by_its_key(kind: Any, fields: dict[str, Any]):
    with pytest.raises(UserError, match=rf"^data\.{next(iter(fields))}: expected a number from 0 to "):
        kind(**fields)

"""Noise: of the right size, on both sides, on the grid, and never the same twice."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from support.helpers import accepts_law, accepts_variance
from torch import Tensor

from fedpriv.mechanisms.gaussian import release_grid
from fedpriv.mechanisms.noise import max_level, release_clients_sum, release_message, release_rows, release_sum
from fedpriv.streams import SeededStreams, Streams, SystemStreams

SIZE = 200_000
LEVEL = 2**62


def server_noise(streams: Streams, stddev: float, size: int, round: int) -> Tensor:
    """Return the noise on a sum of zero."""
    return release_sum(streams, stddev, torch.zeros(size, dtype=torch.float64), round)


def client_noise(streams: Streams, stddev: float, size: int, round: int, client: int) -> Tensor:
    """Return the noise on a message of zero."""
    return release_message(streams, stddev, LEVEL, torch.zeros(size), round, client)


KINDS: dict[str, Streams] = {"seeded": SeededStreams(4), "system": SystemStreams()}
SIDES: dict[str, Callable[[Streams, float], Tensor]] = {
    "server": lambda streams, stddev: server_noise(streams, stddev, SIZE, 1),
    "client": lambda streams, stddev: client_noise(streams, stddev, SIZE, 1, 3),
}
every_kind = pytest.mark.parametrize("streams", KINDS.values(), ids=KINDS.keys())
every_side = pytest.mark.parametrize("draw", SIDES.values(), ids=SIDES.keys())


def variance(stddev: float) -> float:
    """Return the variance of Gaussian noise rounded to its grid: plus G^2 / 12, up to exp(-2 (pi stddev / G)^2)."""
    return stddev**2 + release_grid(stddev) ** 2 / 12.0


@every_kind
@every_side
@pytest.mark.parametrize("stddev", [1e-6, 0.3, 1.0, 250.0])
def test_noise_is_normal_with_the_standard_deviation_asked_for(
    draw: Callable[[Streams, float], Tensor], streams: Streams, stddev: float
) -> None:
    noise = draw(streams, stddev)
    assert noise.shape == (SIZE,)
    assert noise.device.type == "cpu"
    samples = noise.numpy().astype(np.float64)
    assert accepts_variance(samples, variance(stddev))
    spread = np.random.default_rng(5).uniform(-0.5, 0.5, SIZE) * release_grid(stddev)  # fills the steps of the grid
    assert accepts_law((samples + spread) / stddev, lambda x: stats.norm.cdf(x, scale=variance(stddev) ** 0.5 / stddev))


@every_kind
@every_side
def test_noise_of_another_scale_would_be_noticed(draw: Callable[[Streams, float], Tensor], streams: Streams) -> None:
    noise = draw(streams, 0.7).numpy()
    for wrong in (0.7 * 1.05, 0.7 / 1.05, 0.7**2, 0.7**0.5):
        assert not accepts_variance(noise, variance(wrong))


@every_side
@pytest.mark.parametrize("kind", ["seeded", "system"])
def test_without_standard_deviation_noise_is_exactly_zero(draw: Callable[[Streams, float], Tensor], kind: str) -> None:
    assert not draw(KINDS[kind], 0.0).any()


@every_kind
@every_side
@pytest.mark.parametrize("stddev", [1e-6, 0.3, 0.5, 1.0, 250.0])
def test_every_released_number_is_a_multiple_of_the_grid(
    draw: Callable[[Streams, float], Tensor], streams: Streams, stddev: float
) -> None:
    levels = draw(streams, stddev).double() / release_grid(stddev)
    assert torch.equal(levels, levels.round())
    assert levels.unique().numel() > 20


@every_kind
def test_what_is_released_is_the_value_and_noise(streams: Streams) -> None:
    """Values of all sizes, also between the points of the grid, equal the mean of their releases."""
    values = torch.tensor([0.0, 1e-9, 0.01, -0.26, 3.0, 1e6 + 0.3], dtype=torch.float64).repeat_interleave(SIZE)
    released = release_sum(streams, 1.0, values, 1)
    error = (released - values).reshape(6, SIZE).mean(dim=1)
    assert float(error.abs().max()) < 6.2 * variance(1.0) ** 0.5 / SIZE**0.5
    assert accepts_variance((released - values).numpy(), variance(1.0))


def test_a_message_keeps_its_number_format_and_is_left_alone() -> None:
    for dtype in (torch.float32, torch.float64):
        message = torch.linspace(-1.0, 1.0, 9, dtype=dtype)
        released = release_message(SeededStreams(1), 0.5, LEVEL, message, 1, 0)
        assert released.dtype == dtype
        assert torch.equal(message, torch.linspace(-1.0, 1.0, 9, dtype=dtype))
        assert torch.equal(release_message(SeededStreams(1), 0.0, LEVEL, message, 1, 0), message)


def test_rows_are_released_as_each_client_would() -> None:
    streams, messages = SeededStreams(1), torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    rows = release_rows(streams, 0.5, LEVEL, messages, 4, [7, 2, 5])
    for row, message, client in zip(rows, messages, [7, 2, 5], strict=True):
        assert torch.equal(row, release_message(streams, 0.5, LEVEL, message, 4, client))


def test_a_level_is_clamped_and_an_honest_one_never_is() -> None:
    level, far = max_level(1.0, 0.5), torch.tensor([1e9, -1e9])
    assert (release_message(SeededStreams(1), 0.5, level, far, 1, 0) / release_grid(0.5)).tolist() == [level, -level]
    assert (level - 1) * release_grid(0.5) >= 1.0 + 16 * 0.5
    assert level * release_grid(0.5) <= 1.0 + 16 * 0.5 + 2 * release_grid(0.5)


def test_every_round_every_client_and_the_server_have_noise_of_their_own() -> None:
    streams = SeededStreams(0)
    rounds = range(1, 6)
    found = [server_noise(streams, 1.0, 64, round).float() for round in rounds]
    found += [client_noise(streams, 1.0, 64, round, client) for round, client in itertools.product(rounds, range(6))]
    assert len({tuple(noise.tolist()) for noise in found}) == len(found)
    alike = np.corrcoef(torch.stack(found).numpy()) - np.eye(len(found))
    assert np.abs(alike).max() < 0.75


def test_seeded_noise_depends_on_its_address_alone() -> None:
    for draw in SIDES.values():
        assert torch.equal(draw(SeededStreams(9), 0.5), draw(SeededStreams(9), 0.5))
        assert not torch.equal(draw(SeededStreams(9), 0.5), draw(SeededStreams(10), 0.5))


def test_experiments_with_one_seed_share_no_noise() -> None:
    for draw in SIDES.values():
        one, other = draw(SeededStreams(9, "one"), 0.5).double(), draw(SeededStreams(9, "other"), 0.5).double()
        assert accepts_variance((one - other).numpy(), 2.0 * variance(0.5))


def test_noise_scales_with_its_standard_deviation_and_no_other_law() -> None:
    for draw in SIDES.values():
        assert torch.equal(draw(SeededStreams(9), 4.0), 4.0 * draw(SeededStreams(9), 1.0))


def test_the_sum_of_client_noises_has_the_sum_of_their_variances() -> None:
    streams, clients = SeededStreams(3), 16
    total = sum((client_noise(streams, 0.5, 20_000, 2, client) for client in range(clients)), torch.zeros(20_000))
    assert accepts_variance(total.numpy(), variance(0.5) * clients)
    assert not accepts_variance(total.numpy(), variance(0.5) * clients * 1.1)


def test_one_draw_for_all_clients_has_the_sum_of_their_variances_on_the_grid_of_one() -> None:
    zero = torch.zeros(20_000, dtype=torch.float64)
    released = release_clients_sum(SeededStreams(3), 0.5, zero, 2, 16)
    assert accepts_variance(released.numpy(), 16 * 0.25 + release_grid(0.5) ** 2 / 12)
    assert not accepts_variance(released.numpy(), 16 * 0.25 * 1.1)
    levels = released / release_grid(0.5)
    assert torch.equal(levels, levels.round())
    assert (levels % 2 != 0).any()
    assert not torch.equal(released, release_clients_sum(SeededStreams(3), 0.5, zero, 2, 16, part=1))
    assert torch.equal(release_clients_sum(SeededStreams(3), 0.5, zero + 0.3, 2, 0), zero + 0.3)


def test_system_noise_never_repeats() -> None:
    streams = SystemStreams()
    assert not torch.equal(server_noise(streams, 1.0, 64, 1), server_noise(streams, 1.0, 64, 1))
    assert not torch.equal(client_noise(streams, 1.0, 64, 1, 1), client_noise(streams, 1.0, 64, 1, 1))

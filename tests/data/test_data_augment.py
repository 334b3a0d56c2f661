"""Augmentations: the draws for an example depend on round, client and example alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import fedpriv
from fedpriv import load_config
from fedpriv.data.augment import ImageVariants, augmented, draws_of
from fedpriv.data.shifts import turned
from fedpriv.engines import LoopEngine, VectorizedEngine
from fedpriv.errors import UserError
from fedpriv.experiment.build import assemble
from fedpriv.experiment.config import Config
from fedpriv.rounds import begin_round
from fedpriv.streams import SeededStreams

IMAGES = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).reshape(2, 3, 4, 5)

OWN = """
import numpy as np
import torch


def jitter(width: float = 0.1):
    return lambda image: image + width * torch.rand(())


def other():
    return lambda image: image + np.random.rand()


def doubles():
    return lambda image: image.double()


def grows():
    return lambda image: image[:, 1:]


def fails():
    return lambda image: image.absent


broken = 3
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    sizes = np.repeat(np.arange(6), [1, 3, 5, 7, 9, 15])
    np.savez(tmp_path / "images.npz", inputs=rng.normal(size=(40, 2, 6, 6)), labels=np.arange(40) % 3, client_ids=sizes)
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path


def experiment(augment: dict[str, Any] | None, **changes: Any) -> Config:
    tables = {
        "name": "augmented",
        "seed": 2,
        "data": {"name": "npz", "file": "images.npz", "partition": "natural", "test": "within"},
        "model": {"name": "mlp", "hidden": [4]},
        "method": {"name": "dp-fedavg", "clip_norm": 1.0},
        "training": {"rounds": 2},
    }
    return load_config(tables | ({} if augment is None else {"augment": augment}) | changes)


def drawn(number: int, *columns: float) -> np.ndarray:
    return np.tile(np.array(columns), (number, 1))


def test_a_flip_is_from_left_to_right_for_half_of_the_images():
    uniform = np.array([[0.4, 0, 0, 0], [0.6, 0, 0, 0]])
    made = ImageVariants(flip=True).apply(IMAGES, uniform)
    assert torch.equal(made[0], IMAGES[0].flip(-1))
    assert torch.equal(made[1], IMAGES[1])


@pytest.mark.parametrize("up", range(5))
def test_a_crop_moves_an_image_and_fills_with_zeros(up):
    made = ImageVariants(crop=2).apply(IMAGES, drawn(2, 0.0, (up + 0.5) / 5, 0.5, 0.0))
    expected = torch.zeros_like(IMAGES)
    for row in range(4):
        if 0 <= row + up - 2 < 4:
            expected[:, :, row] = IMAGES[:, :, row + up - 2]
    assert torch.equal(made, expected)


def test_rotations_are_those_of_shifts_up_to_rounding():
    images = torch.randn(3, 2, 6, 9)
    uniform = np.array([[0, 0, 0, 0.0], [0, 0, 0, 0.5], [0, 0, 0, 0.75]])
    made = ImageVariants(rotate=40.0).apply(images, uniform)
    for one, image, angle in zip(made, images, (-40.0, 0.0, 20.0), strict=True):
        torch.testing.assert_close(one, turned(image[None], angle)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [{"flip": True, "crop": 2, "rotate": 30.0}, {"flip": True}, {"crop": 1}])
def test_a_variant_does_not_depend_on_the_batch_or_on_the_other_steps(kind):
    augment, inputs = ImageVariants(**kind), torch.randn(9, 2, 6, 6)
    before, draws = inputs.clone(), draws_of(augment, SeededStreams(1), 9, 4, 7)
    whole = augmented(augment, inputs, draws, [None])
    some = augmented(augment, inputs, draws, [np.array([1, 4]), np.array([4, 8])])
    assert torch.equal(inputs, before)
    assert torch.equal(some[[1, 4, 8]], whole[[1, 4, 8]])
    assert torch.equal(some[[0, 2]], inputs[[0, 2]])
    assert not torch.equal(whole, augmented(augment, inputs, draws_of(augment, SeededStreams(1), 9, 5, 7), [None]))
    assert not torch.equal(whole, augmented(augment, inputs, draws_of(augment, SeededStreams(1), 9, 4, 8), [None]))


IMAGE = {"name": "images", "flip": True, "crop": 2, "rotate": 20.0}
STEPS = {"work": "local-steps", "steps": 3, "client_lr": 0.1, "batch_size": 4}
EPOCHS = {"work": "local-epochs", "epochs": 2, "client_lr": 0.1, "batch_size": 4}


@pytest.mark.parametrize("local", [{"work": "full-gradient"}, STEPS, EPOCHS])
@pytest.mark.parametrize("augment", [IMAGE, "own"])
def test_engines_see_the_same_variants(folder, augment, local):
    table = {"name": f"{folder}/own.py:jitter", "width": 0.5} if augment == "own" else augment
    built = assemble(experiment(table, local=local), data_root=folder)
    state = built.server.method.init_server(built.initial_model)
    sums = []
    for engine in (LoopEngine(built.population), VectorizedEngine(built.population, batched=True, chunk=4)):
        sums += [engine.sum_messages(begin_round(built.server, state, round)).sum for round in (1, 2)]
    torch.testing.assert_close(sums[0], sums[2])
    torch.testing.assert_close(sums[1], sums[3])
    assert not torch.equal(sums[0], sums[1])
    plain = assemble(experiment(None, local=local), data_root=folder)
    assert not torch.allclose(
        LoopEngine(plain.population).sum_messages(begin_round(plain.server, state, 1)).sum, sums[0]
    )


def test_scores_are_on_inputs_as_they_are(folder):
    one, other = (assemble(experiment(table), data_root=folder) for table in (None, IMAGE))
    assert one.evaluate(one.initial_model) == other.evaluate(other.initial_model)


def test_a_run_resumes_with_the_same_variants_and_another_augmentation_is_another_experiment(folder):
    config = experiment(IMAGE)
    fedpriv.run_experiment(config, folder / "whole", engine="loop", data_root=folder)
    fedpriv.run_experiment(folder / "whole" / "config.toml", folder / "again", engine="loop", data_root=folder)
    models = [load_file(folder / name / "model.safetensors") for name in ("whole", "again")]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert load_config(config.tables).digest == config.digest
    assert len({config.noise_id, experiment(None).noise_id, experiment(IMAGE | {"crop": 1}).noise_id}) == 3


def test_a_transform_of_torchvision_is_seeded_for_each_example_and_leaves_other_randomness_alone():
    table = {"name": "torchvision.transforms.v2:RandomErasing", "p": 1.0}
    augment = experiment(table).augment
    assert augment is not None
    augment.check((2, 6, 6))
    state = torch.random.get_rng_state()
    inputs, uniform = torch.ones(5, 2, 6, 6), np.random.default_rng(0).random((5, 1))
    made = augment.apply(inputs, uniform)
    assert torch.equal(made[3:], augment.apply(inputs[3:], uniform[3:]))
    assert len({str(image) for image in made}) >= 3
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("table", "line"),
    [
        ({"name": "images"}, r"^\[augment\]: expected at least one change"),
        ({"name": "images", "crop": -1}, r"^augment\.crop: expected a whole number from 0 to 10"),
        ({"name": "images", "crop": 6}, r"^augment\.crop: expected fewer pixels than images have, 6, got 6"),
        ({"name": "images", "rotate": 181.0}, r"^augment\.rotate: expected a number from 0 to 180"),
        ({"name": "image"}, r"^augment\.name: expected a known name, got 'image'. Did you mean 'images'"),
        ({"name": "own.py:jitter", "depth": 3}, r"^augment\.depth: expected a known key"),
        ({"name": "own.py:doubles"}, None),
        ({"name": "own.py:grows"}, r"^augment\.name: expected a transform that returns floats of shape \[2, 6, 6\]"),
        ({"name": "own.py:fails"}, r"^augment\.name: expected a transform of .*AttributeError: .*own\.py, line 23"),
        ({"name": "own.py:other"}, r"^augment\.name: expected a transform that draws from torch's generator alone"),
        ({"name": "own.py:broken"}, r"^augment\.name: expected a class or a function"),
        ({"name": "torchvision.transforms.v2:RandomErasing", "p": 3.0}, "expected a transform that can be made"),
    ],
)
def test_an_augmentation_that_does_not_fit_is_one_line(folder, monkeypatch, table, line):
    monkeypatch.chdir(folder)
    if line is None:
        assemble(experiment(table), data_root=folder)
        return
    with pytest.raises(UserError, match=line) as caught:
        assemble(experiment(table), data_root=folder)
    assert "\n" not in str(caught.value)


def test_inputs_that_are_no_images_are_refused():
    with pytest.raises(UserError, match=r"^augment\.name: expected images \[channels, height, width\], got inputs of"):
        ImageVariants(flip=True).check((7,))

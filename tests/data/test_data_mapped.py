"""Inputs that stay on the disk."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import fedpriv
from fedpriv import load_config
from fedpriv.data.dataset import Dataset
from fedpriv.data.mapped import MappedInputs
from fedpriv.data.own import dataset_of
from fedpriv.errors import UserError
from fedpriv.experiment.build import assemble, make_federation
from fedpriv.experiment.execution import EngineName

ROWS, PEOPLE = 200, 10
CONFIG: dict[str, Any] = {
    "name": "mapped",
    "seed": 2,
    "model": {"name": "softmax"},
    "method": {"name": "dp-fedavg", "clip_norm": 1.0},
    "training": {"rounds": 2},
}
SCALED: dict[str, Any] = {"scale": 2.0, "mean": [0.1, 0.0, 0.2, 0.0], "std": [1.0, 2.0, 0.5, 1.0]}
MAPPED = {"name": "npy", "inputs": "inputs.npy", "labels": "labels.npy", "client_ids": "people.npy"} | SCALED
WHOLE = {"name": "npz", "file": "all.npz"} | SCALED


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(ROWS, 4)).astype(np.float32)
    labels, people = inputs[:, :3].argmax(axis=1), rng.permutation(np.arange(ROWS) % PEOPLE)
    for name, array in (("inputs", inputs), ("labels", labels), ("people", people)):
        np.save(tmp_path / f"{name}.npy", array)
    np.savez(tmp_path / "all.npz", inputs=inputs, labels=labels, client_ids=people)
    return tmp_path


def experiment(data: dict[str, Any], **more: Any):
    return load_config(CONFIG | {"data": data | more})


@pytest.mark.parametrize(
    "more",
    [
        {"partition": "natural", "test": "within", "validation": 0.2},
        {"partition": "natural", "test": "clients", "validation": 0.2},
        {"partition": "dirichlet", "clients": 5, "validation": 0.2},
        {"partition": "resampled", "clients": 30, "examples": 5},
    ],
)
def test_a_run_on_mapped_inputs_is_the_run_on_inputs_in_memory(folder, more):
    found: dict[str, Any] = {}
    cases: list[tuple[str, dict[str, Any], EngineName]]
    cases = [("npz", WHOLE, "loop"), ("npy", MAPPED, "loop"), ("batched", MAPPED, "vectorized")]
    for kind, data, engine in cases:
        out = folder / kind
        config = experiment(data, **more)
        summary = fedpriv.run_experiment(config, out, engine=engine, data_root=folder)
        assert summary is not None
        found[kind] = summary["test_loss"], *load_file(out / "model.safetensors").values()
    assert found["npz"][0] == found["npy"][0]
    assert all(torch.equal(one, other) for one, other in zip(found["npz"][1:], found["npy"][1:], strict=True))
    for one, other in zip(found["npz"][1:], found["batched"][1:], strict=True):
        torch.testing.assert_close(one, other)


def test_no_more_rows_are_read_at_once_than_one_access_needs(folder, monkeypatch):
    read = []
    of_rows = MappedInputs.__getitem__
    monkeypatch.setattr(MappedInputs, "__getitem__", lambda self, at: read.append(of_rows(self, at)) or read[-1])
    monkeypatch.setattr("fedpriv.tasks.task.MAX_PIECE_FLOATS", 40)
    built = assemble(experiment(MAPPED, partition="natural", test="within", validation=0.2), data_root=folder)
    population, dataset = built.population, built.population.federation.dataset
    assert not read
    for inputs in (dataset.train_inputs, dataset.test_inputs, dataset.validation_inputs, population.inputs):
        assert isinstance(inputs, MappedInputs)
    for client in range(PEOPLE):
        population.signal(client, built.initial_model, 1)
    assert max(map(len, read)) <= max(population.federation.sizes)
    assert sum(map(len, read)) == dataset.examples
    read.clear()
    built.evaluate(built.initial_model)
    assert max(map(len, read)) <= 10
    assert sum(map(len, read)) == len(dataset.test_labels)


def test_bytes_are_read_with_a_scale_and_a_functions_mapped_array_stays_on_the_disk(folder):
    pixels = np.arange(ROWS * 4, dtype=np.uint8).reshape(ROWS, 1, 2, 2)
    np.save(folder / "inputs.npy", pixels)
    data = MAPPED | {"mean": [0.0], "std": [1.0]}
    with pytest.raises(UserError, match=r"^data\.scale: expected a scale for inputs that are bytes"):
        make_federation(experiment(data, scale=1.0, clients=3), folder)
    dataset = make_federation(experiment(data, scale=255.0, partition="natural", test="clients"), folder).dataset
    assert dataset.input_shape == (1, 2, 2)
    assert float(dataset.train_inputs[:].max()) <= 1.0
    labels = np.arange(ROWS) % 2
    mine = dataset_of({"inputs": np.load(folder / "inputs.npy", mmap_mode="r"), "labels": labels}, "mine")
    assert isinstance(mine.train_inputs, MappedInputs)
    both = torch.cat([mine.train_inputs[:], mine.test_inputs[:]]).long().flatten().bincount(minlength=256)
    assert torch.equal(both, torch.from_numpy(pixels).long().flatten().bincount(minlength=256))


def test_another_process_opens_the_file_itself(folder):
    dataset: Dataset = make_federation(experiment(MAPPED, clients=3), folder).dataset
    sent = pickle.dumps(dataset.train_inputs)
    assert len(sent) < 4000
    assert torch.equal(pickle.loads(sent)[:], dataset.train_inputs[:])


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"inputs": "absent.npy"}, r"^data\.inputs: expected an existing file"),
        ({"labels": "all.npz"}, r"^data\.labels: expected a file of numpy\.save, got .*all\.npz"),
        ({"labels": "objects.npy"}, r"objects\.npy: expected a file of numpy\.save without objects"),
        ({"labels": "few.npy"}, "expected labels for 200 examples, got 3"),
        ({"inputs": "texts.npy"}, "expected inputs that are numbers"),
        ({"scale": 0.0}, r"^data\.scale: expected a number from"),
        ({"mean": [0.5]}, r"^data\.mean: expected 4 numbers, one per channel, got \[0\.5\]"),
        ({"std": [0.0] * 4}, r"^data\.std: expected numbers from"),
        ({"label_count": 2}, "expected classes of at least 3, got 2"),
        ({"shift": "noise"}, r"^data\.shift: expected inputs in memory"),
        ({"inputs": "nan.npy"}, r"nan\.npy: expected finite numbers, got NaN or infinity in row 7\."),
    ],
)
def test_files_that_do_not_fit_are_one_line(folder, changes, line):
    np.save(folder / "objects.npy", np.array([{}, {}]), allow_pickle=True)
    np.save(folder / "few.npy", np.arange(3))
    np.save(folder / "texts.npy", np.array([["a"]] * ROWS))
    wrong = np.load(folder / "inputs.npy")
    wrong[7, 2] = np.nan
    np.save(folder / "nan.npy", wrong)
    with pytest.raises(UserError, match=line) as caught:
        make_federation(experiment(MAPPED | changes, clients=3), folder).dataset.train_inputs[:]
    assert "\n" not in str(caught.value)

"""Experiments on a program's own objects: fedpriv.Experiment."""

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset

import fedpriv
from fedpriv.cli import main
from fedpriv.data.datasets import Digits
from fedpriv.data.partitions import Dirichlet
from fedpriv.data.tables import Columns, arrays_of
from fedpriv.errors import UserError
from fedpriv.methods import AlphaNormEC, DPFedAvg, FedAlphaNormEC, PrivateMetrics, SideValues
from fedpriv.privacy import Poisson
from fedpriv.tasks.local_work import LocalSteps
from fedpriv.tasks.models import Mlp

METRICS = PrivateMetrics(share=0.1, max_loss=4.0)
"""Named by the method alone: no table of an experiment would tell."""


def clients(number=6, examples=20):
    rng = np.random.default_rng(0)
    made = []
    for _ in range(number):
        inputs = rng.normal(size=(examples, 5))
        made.append((inputs, inputs[:, :3].argmax(axis=1)))
    return made


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def experiment(**changes):
    method = DPFedAvg(clip_norm=1.0, server_lr=1.0)
    chosen = {"model": net(), "data": clients(), "method": method, "rounds": 3, "privacy": fedpriv.Privacy(epsilon=8.0)}
    return fedpriv.Experiment(**(chosen | changes))


def test_a_module_and_a_list_of_clients_are_an_experiment(tmp_path):
    module, summary = net(), experiment().run(tmp_path / "out")
    assert summary["epsilon"] <= 8.0
    (first,) = load_file(tmp_path / "out" / "initial.safetensors").values()
    assert torch.equal(first, nn.utils.parameters_to_vector(module.parameters()))
    assert fedpriv.load_results(tmp_path / "out")["epsilon"].max() <= 8.0
    plan = experiment().plan()
    assert plan is not None
    assert plan.epsilon == pytest.approx(summary["epsilon"])


def test_the_callers_module_stays_as_it_is(tmp_path):
    module = net()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    experiment(model=module).run(tmp_path / "out", engine="loop")
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_arrays_torch_datasets_and_a_mapping_are_the_same_data(tmp_path):
    arrays = clients()
    sets = [TensorDataset(torch.tensor(x, dtype=torch.float32), torch.tensor(y)) for x, y in arrays]
    whole = {"inputs": np.concatenate([x for x, _ in arrays]), "labels": np.concatenate([y for _, y in arrays])}
    whole["client_ids"] = np.repeat(np.arange(6), 20)
    models = []
    for i, data in enumerate((arrays, sets, whole)):
        experiment(data=data).run(tmp_path / str(i), engine="vectorized")
        models.append(load_file(tmp_path / str(i) / "model.safetensors"))
    assert all(torch.equal(models[0][name], model[name]) for model in models for name in models[0])


def test_it_is_the_same_as_from_a_file(tmp_path):
    """Built-in parts have names, so that the config is one that can be loaded."""
    made = fedpriv.Experiment(
        model=Mlp(hidden=(4,)),
        data=Digits(),
        partition=Dirichlet(concentration=0.3),
        clients=10,
        method=AlphaNormEC(),
        privacy=fedpriv.Privacy(noise_multiplier=1.0),
        cohort=Poisson(population=10, probability=0.5),
        local=LocalSteps(steps=2, client_lr=0.1),
        rounds=2,
        seed=4,
    )
    assert fedpriv.load_config(made.config.tables).digest == made.config.digest
    made.run(tmp_path / "python", engine="loop")
    fedpriv.run_experiment(tmp_path / "python" / "config.toml", tmp_path / "file", engine="loop")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("python", "file"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_its_run_directory_says_that_the_objects_were_in_memory(tmp_path, capsys):
    experiment().run(tmp_path / "out")
    text = (tmp_path / "out" / "config.toml").read_text()
    assert 'name = "memory:Sequential"' in text
    assert 'module = "memory"' in text
    with pytest.raises(SystemExit) as ended:
        main(["run", str(tmp_path / "out" / "config.toml"), "--out", str(tmp_path / "again")])
    assert ended.value.code == 2
    assert "'memory:data', an object of a Python program" in capsys.readouterr().err


def test_the_same_objects_can_be_resumed_and_others_cannot(tmp_path):
    experiment().run(tmp_path / "out")
    assert experiment().run(tmp_path / "out", resume=True)["epsilon"] <= 8.0
    other = net()
    with torch.no_grad():
        next(other.parameters()).add_(1.0)
    with pytest.raises(UserError, match=r"a different experiment \(sources\.model\.name is"):
        experiment(model=other).run(tmp_path / "out", resume=True)


def test_a_function_that_makes_a_model_is_asked_with_the_seed():
    def made(classes: int, width: int = 3):
        return nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, classes))

    found = experiment(model=made).check()
    assert (found.parameters, found.clients, found.classes) == (5 * 3 + 3 + 9 + 3, 6, 3)


def frame(**changes):
    arrays = clients()
    table = pd.DataFrame(np.concatenate([x for x, _ in arrays]), columns=list("abcde"))
    table["disease"] = np.concatenate([y for _, y in arrays])
    table["hospital"] = np.repeat([f"h{i}" for i in range(6)], 20)
    return table.assign(**changes)


def test_a_data_frame_and_a_hugging_face_data_set_are_the_same_data(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = frame()
    names = {"label": "disease", "client": "hospital"}
    kinds = datasets.Features(
        dict.fromkeys("abcde", datasets.Value("float64"))
        | {"disease": datasets.ClassLabel(names=["no", "mild", "ill"]), "hospital": datasets.Value("string")}
    )
    rows = datasets.Dataset.from_dict({name: table[name].tolist() for name in table}, features=kinds)
    apart = datasets.Dataset.from_dict(
        {"x": table[list("abcde")].to_numpy(), "disease": table["disease"], "hospital": table["hospital"]}
    )
    plain = {"data": clients()}
    given = [plain, {"data": table, **names}, {"data": rows, **names}, {"data": apart, "inputs": "x", **names}]
    given += [{"data": [table[table.hospital == f"h{i}"] for i in range(6)], "inputs": list("abcde"), **names}]
    models = []
    for i, changes in enumerate(given):
        experiment(**changes).run(tmp_path / str(i), engine="vectorized")
        models.append(load_file(tmp_path / str(i) / "model.safetensors"))
    assert all(torch.equal(models[0][name], model[name]) for model in models for name in models[0])


def test_categories_of_a_data_frame_number_labels_and_clients():
    texts = frame(disease=lambda table: table["disease"].map({0: "no", 1: "mild", 2: "ill"}))
    labels = pd.CategoricalDtype(["no", "mild", "ill", "unknown"])
    people = pd.CategoricalDtype([f"h{i}" for i in range(8)])
    table = texts.astype({"disease": labels, "hospital": people})
    data = {"train": table, "test": table[:30]}
    found = experiment(data=data, label="disease", client="hospital", model=Mlp(hidden=(4,))).check()
    assert (found.clients, found.fewest, found.classes, found.test_examples, found.examples) == (8, 0, 4, 30, 120)


def test_images_of_a_hugging_face_data_set_have_channels_and_values_from_0_to_1():
    datasets = pytest.importorskip("datasets")
    pixels = np.random.default_rng(0).integers(0, 256, (20, 4, 5, 3)).astype(np.uint8)
    rows = datasets.Dataset.from_dict({"image": [Image.fromarray(image) for image in pixels], "label": [0, 1] * 10})
    made = arrays_of(rows, Columns(label="label"))
    assert np.array_equal(np.asarray(made["inputs"]), pixels.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"label": None}, "^label: expected one of the columns a, b, c, d, e, disease, hospital, got a call without"),
        ({"label": "diseases"}, "^label: expected a column of the data, got 'diseases'. Did you mean 'disease'"),
        ({"client": "ward"}, "^client: expected a column of the data, got 'ward'"),
        ({"inputs": ["a", "z"]}, "^inputs: expected a column of the data, got 'z'"),
        ({"inputs": []}, "^inputs: expected at least one column"),
        ({"client": None}, r"^column 'hospital': expected numbers of one shape, got texts such as \['h0'\]"),
        ({"data": frame(a=np.nan)}, "^column 'a': expected finite numbers, got a missing or infinite value in row 0"),
        ({"data": frame(disease="ill")}, "labels that are whole numbers from 0"),
        ({"data": frame(hospital=None)}, "a client for each example, got row 0: None"),
        ({"data": {"train": frame(), "tests": frame()}}, "^data: expected parts 'train' and 'test', got 'tests'"),
        ({"data": {"test": frame()}}, "^data: expected a part 'train'"),
        ({"data": clients()}, "^label: expected no value, because the data are no table, got 'disease'"),
        ({"data": [[{"x": 1.0, "y": 0}]], "label": None, "client": None}, "^data of client 0: expected examples that"),
    ],
)
def test_a_table_that_does_not_fit_is_one_line(changes, line):
    with pytest.raises(UserError, match=line) as caught:
        experiment(**({"data": frame(), "label": "disease", "client": "hospital"} | changes)).check()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"data": []}, "^data: expected a list of clients"),
        ({"data": "digits"}, "^data: expected a list of clients"),
        ({"data": [3]}, "^data of client 0: expected inputs and labels, got a int"),
        ({"data": [(np.ones((3, 5)), np.zeros(2))]}, "^data of client 0: expected as many inputs as labels"),
        ({"data": [(np.ones((3, 5)), np.zeros(3)), (np.ones((3, 4)), np.zeros(3))]}, "inputs of one shape"),
        ({"data": [(np.full((9, 5), np.nan), np.arange(9) % 3)]}, "NaN or infinity in row 0"),
        ({"model": nn.Linear(4, 3)}, r"^model\.name: expected a model that takes float32 inputs \[batch, 5\]"),
        ({"model": nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))}, "running_mean"),
        ({"model": 3}, "^model: expected a class or a function"),
        ({"data": (np.ones((9, 5)), np.arange(9) % 3)}, "^data: expected a list of clients, got one pair of arrays"),
        ({"method": DPFedAvg}, "^method: expected an object such as .*, got the class DPFedAvg"),
        ({"method": "dp-fedavg"}, "^method: expected an object such as .*, got 'dp-fedavg'"),
        ({"privacy": 8.0}, "^privacy: expected an object such as .*, got 8.0"),
        ({"adapter": "lora"}, "^adapter: expected an object such as .*, got 'lora'"),
        ({"local": LocalSteps}, "^local: expected an object such as"),
        ({"cohort": 10}, "^cohort: expected an object such as"),
        ({"rounds": -1}, r"^training\.rounds"),
        ({"privacy": fedpriv.Privacy(epsilon=-1.0)}, r"^privacy\.epsilon"),
        ({"method": SideValues(method=DPFedAvg(), metrics=METRICS)}, "^method: expected private metrics as privacy"),
        ({"method": FedAlphaNormEC(), "local": LocalSteps(steps=2, client_lr=0.1)}, r"^local\.signal"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, changes, line):
    with pytest.raises(UserError, match=line) as caught:
        experiment(**changes).run(tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_engines_of_other_processes_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"^engine: expected auto, loop, vectorized for objects in memory, got 'ray'"):
        experiment().run(tmp_path / "out", engine="ray")  # type: ignore[arg-type]


def test_shown_it_names_its_parts_and_no_ones_data():
    shown = repr(experiment())
    assert "DPFedAvg" in shown
    assert "array" not in shown
    assert len(shown) < 600

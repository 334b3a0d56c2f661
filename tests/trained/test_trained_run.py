"""A finished run is a ready module, scores, predictions and files of other programs, each with a true card."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.own_classes import OWN as OWN_CLASSES
from support.own_folder import NET
from torch import Tensor, nn

import fedpriv
from fedpriv.cli import main
from fedpriv.data.dataset import DATASETS, declared_by
from fedpriv.data.datasets import Digits
from fedpriv.data.user_files import Csv, ImageFolder, Npz
from fedpriv.errors import UserError
from fedpriv.experiment.results import load_model
from fedpriv.experiment.run_directory import model_facts
from fedpriv.methods import DPFedAvg
from fedpriv.privacy import rounded_up
from fedpriv.tasks.task import Task
from fedpriv.trained.card import model_card
from fedpriv.trained.inputs import read_inputs
from fedpriv.trained.module import load_trained
from fedpriv.trained.use import evaluate, outputs_of, predictions

CONFIG = """
name = "small"
seed = 3
data = { name = "npz", file = "data.npz", scale = 4.0, mean = [0.5], std = [2.0], partition = "iid", clients = 4 }
model = { name = "./net.py:Net", width = 6 }
method = { name = "dp-fedavg", clip_norm = 1.0, server_lr = 0.5 }
privacy = { trust = "central", adjacency = "add-or-remove", epsilon = 8.0, delta = 1e-5 }
training = { rounds = 2 }
"""
TABLE = """
name = "table"
seed = 3
[data]
name = "csv"
file = "rows.csv"
target = "ill"
client = "who"
partition = "natural"
test = "within"
labels = ["no", ["some", "much"]]
numeric = { age = [40.0, 10.0] }
categories = { sex = ["f", "m"] }
[model]
name = "softmax"
[method]
name = "dp-fedavg"
clip_norm = 1.0
[privacy]
trust = "local"
noise_multiplier = 2.0
delta = 1e-5
[training]
rounds = 1
"""


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 60)
    return {"inputs": rng.normal(size=(60, 1, 6, 6)) + labels[:, None, None, None], "labels": labels}


def write_arrays(folder: Path) -> None:
    found = arrays()
    np.savez(folder / "data.npz", inputs=found["inputs"], labels=found["labels"])


def copied(folder: Path, target: Path) -> Path:
    """Return a copy of a run with a config that names the copy of its model."""
    shutil.copytree(folder, target)
    config = target / "run" / "config.toml"
    config.write_text(config.read_text().replace(str(folder), str(target)))
    return target / "run"


def trained_in(folder: Path, config: str, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    (folder / "c.toml").write_text(config)
    fedpriv.run_experiment(folder / "c.toml", folder / "run", data_root=folder, engine="loop")
    return folder / "run"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("small")
    write_arrays(made)
    trained_in(made, CONFIG, net=NET)
    return made


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("table")
    rows = [f"{20 + i},{'fm'[i % 2]},{('no', 'some', 'much')[i % 3]},{i % 4}" for i in range(40)]
    (made / "rows.csv").write_text("\n".join(["age,sex,ill,who", *rows]) + "\n")
    trained_in(made, TABLE)
    return made


def prepared() -> Tensor:
    raw = arrays()["inputs"].astype(np.float32)
    return torch.from_numpy((raw / np.float32(4) - np.float32(0.5)) / np.float32(2))


def failing(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_the_module_has_the_trained_weights_and_is_in_evaluation_mode(folder: Path) -> None:
    module, first = fedpriv.load_module(folder / "run"), load_model(folder / "run", "initial.safetensors")
    for name, weight in load_model(folder / "run").items():
        assert torch.equal(dict(module.named_parameters())[name], weight)
        assert not torch.equal(first[name], weight)
    assert not any(part.training for part in module.modules())


def test_the_runs_own_scores_come_out_again(folder: Path, table: Path) -> None:
    for place in (folder, table):
        summary = json.loads((place / "run" / "summary.json").read_text())
        found = evaluate(load_trained(place / "run"), data_root=place)
        assert found == {key: summary[f"test_{key}"] for key in ("accuracy", "loss")}


def test_inputs_are_scaled_by_the_declared_constants(folder: Path, tmp_path: Path) -> None:
    trained, raw = load_trained(folder / "run"), arrays()["inputs"]
    np.save(tmp_path / "raw.npy", raw)
    np.savez(tmp_path / "raw.npz", inputs=raw)
    np.savetxt(tmp_path / "raw.csv", raw.reshape(60, -1), delimiter=",", header="a," * 35 + "b", comments="")
    np.save(tmp_path / "ready.npy", prepared().numpy())
    np.savetxt(tmp_path / "other.csv", raw.reshape(60, -1), delimiter=";")
    with pytest.raises(UserError, match='columns separated by ",", got ";"'):
        read_inputs(trained, tmp_path / "other.csv")
    for name in ("raw.npy", "raw.npz", "raw.csv"):
        torch.testing.assert_close(read_inputs(trained, tmp_path / name), prepared())
    assert torch.equal(read_inputs(trained, tmp_path / "ready.npy", prepared=True), prepared())


def test_predictions_and_scores_of_a_file(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module, run = fedpriv.load_module(folder / "run"), str(folder / "run")
    with torch.no_grad():
        label = module(prepared()).argmax(1)
    with pytest.raises(SystemExit):
        main(["predict", run, "--inputs", str(folder / "data.npz"), "--out", str(tmp_path / "p.csv")])
    rows = np.genfromtxt(tmp_path / "p.csv", delimiter=",", names=True)
    assert rows["label"].tolist() == label.tolist()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["evaluate", run, "--data", str(folder / "data.npz"), "--json"])
    right = float((label.numpy() == arrays()["labels"]).mean())
    assert json.loads(capsys.readouterr().out)["accuracy"] == pytest.approx(right)


def test_a_table_names_its_classes_and_is_read_again(table: Path, tmp_path: Path) -> None:
    trained = load_trained(table / "run")
    (tmp_path / "new.csv").write_text("sex,age\nm,60\nf,40\n")
    inputs = read_inputs(trained, tmp_path / "new.csv")
    assert inputs.tolist() == [[2.0, 0.0, 1.0], [0.0, 1.0, 0.0]]
    (tmp_path / "other.csv").write_text("sex;age\nm;60\nf;40\n")
    assert torch.equal(read_inputs(trained, tmp_path / "other.csv"), inputs)
    found = predictions(trained, inputs)
    assert found["name"].tolist() == [("no", "some or much")[label] for label in found["label"]]
    assert found["probability"].tolist() == pytest.approx(outputs_of(trained, inputs).softmax(1).amax(1).tolist())
    scores = evaluate(trained, table / "rows.csv")
    assert 0.0 <= scores["accuracy"] <= 1.0


def test_model_json_holds_what_is_declared_and_nothing_else(folder: Path, table: Path) -> None:
    small = json.loads((folder / "run" / "model.json").read_text())
    assert small == {
        "input_shape": [1, 6, 6],
        "classes": 3,
        "outputs": 3,
        "class_names": None,
        "inputs": {"scale": 4.0, "mean": [0.5], "std": [2.0], "columns": None},
    }
    rows = json.loads((table / "run" / "model.json").read_text())
    assert rows["class_names"] == ["no", "some or much"]
    assert rows["inputs"]["columns"]["numeric"] == {"age": [40.0, 10.0]}


@pytest.mark.parametrize("name", ["digits", "mnist", "fashion-mnist", "mnist-by-writer", "cifar10"])
def test_the_built_in_images_declare_ten_names_and_their_constants(name: str) -> None:
    declared = declared_by(DATASETS[name]())
    assert len(set(declared.class_names or ())) == 10
    assert len(declared.mean) == len(declared.std) == {"digits": 0, "cifar10": 3}.get(name, 1)


def test_digits_are_scaled_as_their_loader_does(folder: Path, tmp_path: Path) -> None:
    facts = model_facts(Digits(), dataset := Digits().load(None), 10)
    np.save(tmp_path / "raw.npy", dataset.test_inputs.numpy() * 16)
    trained = replace(load_trained(folder / "run"), facts=facts)
    assert torch.equal(read_inputs(trained, tmp_path / "raw.npy"), dataset.test_inputs)
    assert facts["class_names"] == list("0123456789")


def test_names_of_labels_are_declared_or_absent() -> None:
    columns: Any = {"file": "x", "target": "y", "numeric": {"x": (0.0, 1.0)}}
    for source in (ImageFolder(file="x"), Csv(**columns), Npz(file="x"), object()):
        assert declared_by(source).class_names is None
    for source in (ImageFolder(file="x", labels=["a", "b"]), Csv(**columns, labels=["a", "b"])):
        assert declared_by(source).class_names == ("a", "b")


def test_what_a_clients_data_decide_is_not_in_model_json(tmp_path: Path) -> None:
    """Categories that pandas finds, and folders of images, are names that one client may bring alone."""
    import pandas as pd

    frame = pd.DataFrame({"x": [0.0, 1.0] * 20, "y": ["common", "rare"] * 20, "who": [0, 1] * 20})
    frame["y"] = frame["y"].astype("category")
    data: Any = frame
    experiment = fedpriv.Experiment(
        model=nn.Linear(1, 2), data=data, label="y", client="who", method=DPFedAvg(clip_norm=1.0), rounds=0
    )
    experiment.run(tmp_path / "run", engine="loop")
    assert "rare" not in (tmp_path / "run" / "model.json").read_text()


@pytest.mark.parametrize("to", ["state-dict", "safetensors", "hf"])
def test_exported_weights_give_the_same_outputs(folder: Path, tmp_path: Path, to: str) -> None:
    written = fedpriv.export_model(folder / "run", to, tmp_path / to)  # pyright: ignore[reportArgumentType]
    state = torch.load(written, weights_only=True) if to == "state-dict" else load_file(written)
    module = fedpriv.load_module(folder / "run")
    fresh = load_trained(folder / "run").module
    for parameter in fresh.parameters():
        parameter.data.zero_()
    fresh.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(fresh(prepared()), module(prepared()))
    names = {"README.md", "model.json", written.name} | ({"config.json"} if to == "hf" else set())
    assert {path.name for path in (tmp_path / to).iterdir()} == names


@pytest.mark.slow
def test_an_exported_program_gives_the_same_outputs(folder: Path, tmp_path: Path) -> None:
    written = fedpriv.export_model(folder / "run", "torch-export", tmp_path / "out")
    program = torch.export.load(written).module()
    with torch.no_grad():
        for size in (1, 7, 60):
            inputs = prepared()[:size]
            torch.testing.assert_close(program(inputs), fedpriv.load_module(folder / "run")(inputs))


@pytest.mark.slow
def test_an_onnx_file_gives_the_same_outputs(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    written = fedpriv.export_model(folder / "run", "onnx", tmp_path / "out")
    session = runtime.InferenceSession(written)
    for size in (1, 7):
        (found,) = session.run(None, {"inputs": prepared()[:size].numpy()})
        with torch.no_grad():
            expected = fedpriv.load_module(folder / "run")(prepared()[:size])
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


def test_onnx_without_its_packages_names_the_extra(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert failing(["export", str(folder / "run"), "--to", "onnx"], capsys).endswith("pip install 'fedpriv[onnx]'.")


def test_the_card_says_epsilon_adversary_data_method_metrics_and_limits(folder: Path, table: Path) -> None:
    for place in (folder, table):
        trained = load_trained(place / "run")
        card, promise = model_card(trained, "model.pt", "code"), json.loads((place / "run/privacy.json").read_text())
        tops = [line for line in card.splitlines() if line.startswith("## ")]
        words = ("Model", "Data", "Method", "Privacy", "Metrics", "Limits", "Privacy statement")
        assert tops == [f"## {word}" for word in words]
        assert f"| epsilon | {rounded_up(promise['epsilon'])} at delta = 1e-05 |" in card
        assert f"| adversary | {promise['adversary']} |" in card
        assert promise["statement"].strip() in card
        assert f"`{'npz' if place == folder else 'csv'}`, divided among 4 clients" in card
        assert "dp-fedavg(" in card
        assert "`test_accuracy`" in card
        assert card.startswith("---\nlibrary_name: pytorch\n")
    assert "no: computed on protected clients' examples, without noise" in card
    assert "Net(width=6)" in model_card(load_trained(folder / "run"), "model.pt", "code")


def test_the_card_of_a_run_without_privacy_promises_nothing(tmp_path: Path) -> None:
    write_arrays(tmp_path)
    trained_in(tmp_path, "\n".join(line for line in CONFIG.splitlines() if "privacy" not in line), net=NET)
    card = model_card(load_trained(tmp_path / "run"), "model.pt", "code")
    assert "None: this model was trained without differential privacy." in card
    assert "| epsilon |" not in card


def in_memory(tmp_path: Path, module: nn.Module) -> Path:
    clients = [(arrays()["inputs"][i::3], arrays()["labels"][i::3]) for i in range(3)]
    experiment = fedpriv.Experiment(model=module, data=clients, method=DPFedAvg(clip_norm=1.0), rounds=1)
    experiment.run(tmp_path / "run", engine="loop")
    return tmp_path / "run"


def network() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.Linear(4, 3))


def test_a_model_in_memory_is_given_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = network()
    before = {name: weight.clone() for name, weight in net.state_dict().items()}
    run = in_memory(tmp_path, net)
    line = failing(["export", str(run), "--to", "safetensors"], capsys)
    assert "load_module" in line
    assert "memory:Sequential" in line
    again = fedpriv.load_module(run, module=network())
    assert all(torch.equal(again.state_dict()[name], weight) for name, weight in load_model(run).items())
    assert all(torch.equal(net.state_dict()[name], weight) for name, weight in before.items())
    assert fedpriv.export_model(run, "hf", module=net) == Path(f"{run}-hf") / "model.safetensors"
    with pytest.raises(UserError, match=r"1.weight \(4, 36\).*1.weight \(5, 36\)"):
        fedpriv.load_module(run, module=nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.Linear(5, 3)))
    with pytest.raises(UserError, match="a file with examples"):
        evaluate(load_trained(run, module=net))


def test_other_frozen_weights_are_refused(tmp_path: Path) -> None:
    net = network()
    net[1].requires_grad_(False)
    run = in_memory(tmp_path, net)
    assert torch.equal(fedpriv.load_module(run, module=net).state_dict()["1.weight"], net.state_dict()["1.weight"])
    other = network()
    other[1].requires_grad_(False)
    with pytest.raises(UserError, match="with its frozen weights"):
        fedpriv.load_module(run, module=other)


FROZEN = """
import torch
from torch import nn


def net(input_shape, classes: int):
    body = nn.Linear(input_shape[0], 4)
    body.weight.requires_grad_(False)
    return nn.Sequential(body, nn.Linear(4, classes))
"""


def test_frozen_weights_are_those_of_the_run_or_refused(tmp_path: Path) -> None:
    config = CONFIG.replace(
        'name = "npz", file = "data.npz", scale = 4.0, mean = [0.5], std = [2.0]', 'name = "./own.py:Stripes"'
    )
    config = config.replace('"./net.py:Net", width = 6', '"./body.py:net"')
    run = trained_in(tmp_path, config, own=OWN_CLASSES, body=FROZEN)
    trained = load_trained(run)
    found = evaluate(trained)
    assert "`own.py:Stripes`" in model_card(trained, "model.pt", "code")
    assert found["loss"] == json.loads((run / "summary.json").read_text())["test_loss"]
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(text.replace("seed = 3", "seed = 4"))
    with pytest.raises(UserError, match="the frozen weights of the run"):
        fedpriv.load_module(run)


def test_an_edited_model_file_is_refused(folder: Path, tmp_path: Path) -> None:
    run = copied(folder, tmp_path / "copy")
    (run.parent / "net.py").write_text(NET.replace("ReLU", "Tanh"))
    with pytest.raises(UserError, match=r"the source of the run.*Restore the file"):
        fedpriv.load_module(run)


def test_a_run_of_an_older_version_is_built_from_its_config(folder: Path, tmp_path: Path) -> None:
    run = copied(folder, tmp_path / "copy")
    with torch.no_grad():
        expected = fedpriv.load_module(run)(prepared())
    facts = load_trained(run).facts
    (run / "model.json").unlink()
    assert load_trained(run, data_root=folder).facts == facts
    with torch.no_grad():
        assert torch.equal(fedpriv.load_module(run, data_root=folder)(prepared()), expected)
    with pytest.raises(UserError, match="a run of an older version"):
        fedpriv.load_module(run, data_root=tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["export", "RUN", "--to", "zip"], "'zip'"),
        (["export", "nowhere", "--to", "hf"], "nowhere: expected the folder of a finished run"),
        (["export", "RUN", "--to", "hf", "--out", "RUN"], "--out: expected a new or empty folder"),
        (["predict", "RUN", "--inputs", "absent.npz"], "absent.npz"),
        (["predict", "RUN", "--inputs", "inputs.txt"], "inputs.txt"),
        (["predict", "RUN", "--inputs", "wrong.npy"], "[examples, 1, 6, 6], got [2, 5]"),
        (["predict", "RUN", "--inputs", "words.csv"], "expected 2 numbers in each row, got row 1: 3, b"),
        (["predict", "RUN", "--inputs", "nan.npy"], "row 1"),
        (["evaluate", "RUN", "--data", "wrong.npy"], "a .npz file with inputs and labels"),
        (["evaluate", "RUN", "--data", "labels.npz"], "labels from 0 to 2, got 7"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    words: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("wrong.npy", np.zeros((2, 5)))
    np.save("nan.npy", np.stack([np.zeros((1, 6, 6)), np.full((1, 6, 6), np.nan)]))
    np.savez("labels.npz", inputs=np.zeros((2, 1, 6, 6)), labels=[0, 7])
    Path("words.csv").write_text("1,2\n3,b\n")
    Path("inputs.txt").write_text("1")
    line = failing([str(folder / "run") if word == "RUN" else word for word in arguments], capsys)
    assert words in line


def test_a_task_of_the_loaded_module_is_that_of_the_run(folder: Path) -> None:
    trained = load_trained(folder / "run")
    task = Task(trained.module, kind=trained.task)
    weights = load_model(folder / "run")
    assert torch.equal(task.initial_model(), task.layout.flatten(weights))


@pytest.mark.slow
def test_a_model_of_transformers_is_saved_as_one(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=9,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        num_labels=3,
        max_position_embeddings=36,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = transformers.BertForSequenceClassification(config)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.inner(input_ids=inputs.flatten(1).abs().long().clamp(max=8)).logits

    run = in_memory(tmp_path, net := Reader())
    written = fedpriv.export_model(run, "hf", tmp_path / "hf", module=net)
    again = transformers.BertForSequenceClassification.from_pretrained(written.parent).eval()
    ids = torch.arange(9)[None]
    with torch.no_grad():
        expected = fedpriv.load_module(run, module=net).inner(input_ids=ids).logits  # pyright: ignore
        torch.testing.assert_close(again(input_ids=ids).logits, expected)
    assert "differential-privacy" in (written.parent / "README.md").read_text()


def test_the_front_matter_is_what_hubs_read(folder: Path, tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    written = fedpriv.export_model(folder / "run", "hf", tmp_path / "hf")
    _, front, _ = (written.parent / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "pytorch",
        "model_name": "small",
        "tags": ["federated-learning", "differential-privacy", "fedpriv"],
    }
    config = json.loads((written.parent / "config.json").read_text())
    assert config["architectures"] == ["Net"]
    assert config["model"] == {"name": "net.py:Net", "width": 6}
    assert not any(str(folder).encode() in path.read_bytes() for path in written.parent.iterdir())

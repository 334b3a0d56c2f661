"""Tasks in experiments: data of every kind of label, user losses, policies of devices, and single clients' scores."""

import json
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.own_classes import own_config
from torch import nn

from fedpriv import Experiment, load_config, load_results
from fedpriv.deploy.device.own_data import _signal_of_file
from fedpriv.deploy.device.policy import Accepts, Limits, Policy
from fedpriv.errors import UserError
from fedpriv.experiment.build import assemble
from fedpriv.experiment.config import Config, parse_config
from fedpriv.experiment.run import run_experiment
from fedpriv.flower.refusals import Refusal
from fedpriv.methods import DPFedAvg
from fedpriv.report.study import load_study
from fedpriv.rounds import ClientRules
from fedpriv.streams import SeededStreams
from fedpriv.tasks.kinds import MultiLabel, NextToken, Regression
from fedpriv.tasks.local_work import LocalSteps
from fedpriv.tasks.models import Mlp, Softmax
from fedpriv.tasks.own_task import own_loss
from fedpriv.tasks.per_client import PerClient, distribution


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedpriv.experiment.recorder.plot_curves", lambda *_, **__: None)


def drawn(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


class Reader(nn.Module):
    """A model of the next token."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(5, 6), nn.Linear(6, 5)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.out(self.table(inputs.long()))


def pinball(outputs: torch.Tensor, labels: torch.Tensor, quantile: float = 0.9) -> torch.Tensor:
    """Return the loss of a quantile."""
    off = labels - outputs[:, 0]
    return torch.maximum(quantile * off, (quantile - 1.0) * off)


def experiment_of(name: str) -> Experiment:
    rng, inputs = np.random.default_rng(1), drawn(4, 20, 3)
    common: dict[str, Any] = {
        "method": DPFedAvg(),
        "rounds": 8,
        "local": LocalSteps(steps=4, client_lr=0.3),
        "evaluate_every": 8,
    }
    if name == "regression":
        data = [(x, x @ np.array([1.0, -1.0, 2.0]) + 5.0) for x in inputs]
        return Experiment(model=Softmax(), data=data, task=Regression(center=5.0, scale=2.0), **common)
    if name == "several numbers":
        data = [(x, x[:, :2]) for x in inputs]
        return Experiment(model=Mlp(), data=data, task=Regression(loss="huber", metrics=("mae",)), **common)
    if name == "multi-label":
        data = [(x, (x[:, :2] > 0).astype(np.int64)) for x in inputs]
        return Experiment(model=Softmax(), data=data, task=MultiLabel(metrics=("accuracy",)), **common)
    if name == "next-token":
        texts = rng.integers(5, size=(4, 20, 1)) + np.arange(7)
        data = [(x[:, :-1] % 5, np.where(x[:, 1:] > 8, -100, x[:, 1:] % 5)) for x in texts]
        torch.manual_seed(0)
        return Experiment(model=Reader(), data=data, task=NextToken(), **common)
    data = [(x, x[:, 0]) for x in inputs]
    return Experiment(model=Softmax(), data=data, task=own_loss(pinball, labels="numbers", quantile=0.7), **common)


@pytest.mark.parametrize("name", ["regression", "several numbers", "multi-label", "next-token", "own"])
def test_every_task_learns_and_engines_agree(name: str, tmp_path: Path) -> None:
    made, found = experiment_of(name), []
    for engine in ("loop", "vectorized"):
        summary = made.run(tmp_path / engine, engine=engine)
        found.append(summary["test_loss"])
        rows = [json.loads(line) for line in (tmp_path / engine / "rounds.jsonl").read_text().splitlines()]
        assert rows[-1]["test_loss"] < 0.75 * rows[0]["test_loss"]
        assert set(made.config.task.scores) == {key.removeprefix("test_") for key in rows[0] if key[:5] == "test_"}
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert "label_tv" not in json.loads((tmp_path / "loop" / "heterogeneity.json").read_text())


def test_a_model_with_other_outputs_than_the_task_needs_is_refused() -> None:
    made = experiment_of("next-token")
    with pytest.raises(UserError, match=r"outputs \[batch, 6, 5\] of the model"):
        Experiment(model=Mlp(), data=made.data, task=NextToken(), method=DPFedAvg(), rounds=1).check()


def test_a_csv_file_may_have_numbers_as_its_target(tmp_path: Path) -> None:
    rows = [f"{x:.3f},{2 * x:.3f},c{i % 3}" for i, x in enumerate(np.linspace(-1, 1, 30))]
    (tmp_path / "d.csv").write_text("\n".join(["x,y,who", *rows]))
    data = {"name": "csv", "file": str(tmp_path / "d.csv"), "target": "y", "client": "who", "numeric": {"x": [0, 1]}}
    data["test"] = "within"
    tables = {"name": "t", "seed": 1, "data": {**data, "partition": "natural"}, "model": {"name": "softmax"}}
    tables |= {"method": {"name": "dp-fedavg"}, "training": {"rounds": 1}, "task": {"name": "regression"}}
    dataset = assemble(parse_config(tables)).population.federation.dataset
    assert dataset.train_labels.dtype == torch.float32
    assert torch.allclose(dataset.train_labels, 2 * dataset.train_inputs[:, 0], atol=2e-3)
    (tmp_path / "d.csv").write_text("\n".join(["x,y,who", *rows, "0.5,much,c1"]))
    with pytest.raises(UserError, match=r"a number in column 'y', got 'much' in line 32"):
        assemble(parse_config(tables))
    del data["test"]
    split = {**data, "partition": "dirichlet", "concentration": 0.5, "clients": 3}
    (tmp_path / "d.csv").write_text("\n".join(["x,y,who", *rows]))
    with pytest.raises(UserError, match=r"data\.partition: expected a partition without classes"):
        assemble(parse_config(tables | {"data": split}))


def test_a_loss_in_a_file_is_part_of_the_experiment(tmp_path: Path) -> None:
    toml = own_config(tmp_path)
    config = load_config(toml)
    assert config.sources["task.name"]["module"] == "own.py"
    run_experiment(config, tmp_path / "run", engine="loop")
    again = load_config(tmp_path / "run" / "config.toml")
    assert again.digest == config.digest
    assert load_config(toml, ["task.power=1.0"]).digest != config.digest
    text = (tmp_path / "own.py").read_text()
    (tmp_path / "own.py").write_text(text.replace("1.0 - torch.exp", "1.1 - torch.exp"))
    with pytest.raises(UserError, match="the source of the first run"):
        load_config(tmp_path / "run" / "config.toml")
    (tmp_path / "own.py").write_text(text.replace("losses\n\n", "missing\n\n", 1))
    words = r"task\.name: expected a loss that can be computed, got NameError.*own\.py, line"
    with pytest.raises(UserError, match=words):
        assemble(load_config(toml))


TASK = """
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedpriv.tasks.kinds import TaskKind
from fedpriv.tasks.metrics import Metric


@dataclass(frozen=True, kw_only=True)
class Spread(TaskKind):
    \"\"\"A mean and the logarithm of a deviation.\"\"\"

    labels: ClassVar[str] = "numbers"
    own_metrics: ClassVar[tuple[Metric, ...]] = (
        Metric(name="miss", better="lower", measure=lambda means, labels: float((means - labels).abs().max())),
    )
    default_metrics: ClassVar[tuple[str, ...]] = ("miss",)
    floor: float = 0.1

    def width(self, classes):
        return 2 * classes

    def losses(self, outputs, labels):
        scale = outputs[:, 1].exp() + self.floor
        return 0.5 * ((outputs[:, 0] - labels) / scale) ** 2 + scale.log()

    def predictions(self, outputs):
        return outputs[:, 0]
"""


def test_a_task_of_ones_own_has_its_outputs_and_its_metric(tmp_path: Path) -> None:
    (tmp_path / "spread.py").write_text(TASK)
    labels = drawn(200, 3)[:, 0]
    config = with_clients(tmp_path, task={"name": f"{tmp_path / 'spread.py'}:Spread", "floor": 0.2}, evaluation=None)
    np.savez(tmp_path / "d.npz", inputs=drawn(200, 3), labels=labels, client_ids=np.arange(200) % 10)
    summary = run_experiment(config, tmp_path / "run", engine="vectorized")
    assert summary["metrics"] == {"miss": "lower"}
    assert summary["parameters"] == 2 * (3 + 1)
    assert load_study(tmp_path / "run").metric.better == "lower"
    assert load_study(tmp_path / "run").scores[:2] == ("test_miss", "test_loss")


def test_a_deployment_tests_no_single_clients(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such table in a deployment"):
        with_clients(tmp_path).check_deployable()


def test_a_policy_names_the_tasks_that_a_device_accepts(tmp_path: Path) -> None:
    config = with_clients(tmp_path, data={"name": "digits", "partition": "iid", "clients": 3}, evaluation=None)
    limits = Limits(epsilon=1.0, delta=1e-5)
    Policy(accepts=Accepts(tasks=("classification",)), limits=limits).check_experiment(config)
    with pytest.raises(Refusal, match=r"accepts\.tasks: expected regression"):
        Policy(accepts=Accepts(tasks=("regression",)), limits=limits).check_experiment(config)


def test_a_device_learns_numbers_of_a_file_of_its_own(tmp_path: Path) -> None:
    task: dict[str, Any] = {"name": "regression", "loss": "poisson"}
    config = with_clients(tmp_path, task=task, evaluation=None)
    inputs, labels = torch.from_numpy(drawn(20, 3)), torch.arange(20.0) / 2
    rules = ClientRules(method=config.method, noise_stddev=0.0, streams=SeededStreams(1))
    facts: list[Any] = [SimpleNamespace(device="cpu"), config, rules, (1, 3), (torch.zeros(4), None, None)]
    np.savez(tmp_path / "mine.npz", inputs=inputs, labels=labels, classes=1)
    signal = _signal_of_file(tmp_path / "mine.npz", *facts)
    slope = (1.0 - labels) / 20
    assert torch.allclose(signal, torch.cat([slope @ inputs, slope.sum()[None]]), atol=1e-5)
    np.savez(tmp_path / "mine.npz", inputs=inputs, labels=labels - 1.0, classes=1)
    with pytest.raises(UserError, match=r"counts from 0 with poisson, got row 0: -1\.0"):
        _signal_of_file(tmp_path / "mine.npz", *facts)


def with_clients(folder: Path, **more: Any) -> Config:
    inputs = drawn(200, 3)
    arrays = {"inputs": inputs, "labels": (inputs[:, 0] > 0).astype(np.int64), "client_ids": np.arange(200) % 10}
    arrays["labels"][arrays["client_ids"] == 7] ^= 1  # the opposite of all others
    np.savez(folder / "d.npz", **arrays)
    tables: dict[str, Any] = {
        "name": "fair",
        "seed": 1,
        "data": {"name": "npz", "file": str(folder / "d.npz"), "partition": "natural", "test": "within"},
        "model": {"name": "softmax"},
        "method": {"name": "dp-fedavg", "server_lr": 5.0},
        "training": {"rounds": 4},
        "evaluation": {"clients": True, "steps": 20, "client_lr": 2.0},
    }
    return parse_config({key: table for key, table in (tables | more).items() if table is not None})


def test_single_clients_scores_show_the_worst_decile_and_what_own_steps_gain(tmp_path: Path) -> None:
    summary = run_experiment(with_clients(tmp_path), tmp_path / "run", engine="loop")
    found = json.loads((tmp_path / "run" / "clients.json").read_text())
    assert found["clients"] == list(range(10))
    assert sum(found["test_examples"]) + sum(found["examples"]) == 200
    spread = found["distribution"]["accuracy"]
    assert spread["worst_decile"] == spread["min"] == found["accuracy"][7] < 0.5 < spread["median"]
    assert found["personalized_accuracy"][7] > found["accuracy"][7] + 0.4
    total = np.average(found["accuracy"], weights=found["test_examples"])
    assert summary["test_accuracy"] == pytest.approx(total)
    assert stat.S_IMODE((tmp_path / "run" / "clients.json").stat().st_mode) == 0o600
    table = load_results(tmp_path / "run")
    assert table["clients.accuracy.worst_decile"].unique().tolist() == [spread["worst_decile"]]
    diagnostics = json.loads((tmp_path / "run" / "diagnostics.json").read_text())
    assert diagnostics["clients"] == found["distribution"]


def test_the_worst_clients_are_those_with_the_largest_loss() -> None:
    found = distribution({"loss": [1.0, 2.0, 9.0], "f1": [0.1, 0.5, float("nan")], "examples": [1]}, {"f1": "higher"})
    assert found["loss"]["worst_decile"] == 9.0
    assert found["f1"]["worst_decile"] == 0.1
    assert list(found) == ["loss", "f1"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"privacy": {"noise_multiplier": 1.0}}, "expected no private run"),
        ({"evaluation": {"clients": True, "steps": 3}}, r"evaluation\.client_lr"),
        ({"data": {"name": "digits", "partition": "iid", "clients": 3}}, "own test examples"),
    ],
)
def test_single_clients_scores_are_refused_in_private_runs_and_without_own_tests(
    tmp_path: Path, more: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        with_clients(tmp_path, **more)
    assert PerClient().steps == 0

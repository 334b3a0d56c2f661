"""Tasks: the loss of each example, their gradients in every engine, checks of labels, and metrics."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.federations import models_of, setting
from torch import Tensor, nn

from fedpriv import Experiment
from fedpriv.data.dataset import Dataset
from fedpriv.data.federation import Federation
from fedpriv.engines import LoopEngine, VectorizedEngine
from fedpriv.errors import UserError
from fedpriv.experiment.build import assemble
from fedpriv.experiment.config import parse_config
from fedpriv.methods import AlphaNormEC
from fedpriv.tasks.kinds import Classification, MultiLabel, NextToken, Regression, TaskKind, check_losses
from fedpriv.tasks.local_work import LocalSteps
from fedpriv.tasks.models import Mlp
from fedpriv.tasks.own_task import own_loss
from fedpriv.tasks.task import Task

N, T, V = 9, 5, 7


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def whole(high: int, *shape: int, seed: int = 1) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


TOKENS = whole(V, N, T).masked_fill(whole(3, N, T, seed=5) == 0, -100)
FLAGS = whole(2, N, V).float()


def absolute(outputs: Tensor, labels: Tensor, power: float = 1.0) -> Tensor:
    """Return an own loss."""
    return (outputs[:, 0] - labels).abs() ** power


KINDS: dict[str, tuple[TaskKind, Tensor]] = {
    "classification": (Classification(), whole(V, N)),
    "weighted": (Classification(class_weights=(1.0, 2, 3, 4, 5, 6, 7), label_smoothing=0.1), whole(V, N)),
    "squared": (Regression(center=1.0, scale=2.0), drawn(N)),
    "absolute": (Regression(loss="absolute"), drawn(N, V)),
    "huber": (Regression(loss="huber", delta=0.5), drawn(N)),
    "poisson": (Regression(loss="poisson"), whole(9, N).float()),
    "multi-label": (MultiLabel(positive_weights=(1.0, 2, 3, 4, 5, 6, 7)), FLAGS),
    "own": (own_loss(absolute, labels="numbers", power=1.5), drawn(N)),
}


def width_of(kind: TaskKind, labels: Tensor) -> int:
    return V if kind.labels == "classes" or labels.dim() == 2 else 1


def dataset_for(kind: TaskKind, inputs: Tensor, labels: Tensor, classes: int) -> Dataset:
    parts: dict[str, Any] = {"train_inputs": inputs, "train_labels": labels}
    parts |= {"test_inputs": inputs[:2], "test_labels": labels[:2]}
    return Dataset(name="made", classes=classes, kind=kind.labels, **parts)


class Tokens(nn.Module):
    """A model of the next token, with an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(V, 4)
        self.out = nn.Linear(4, V)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.out(self.table(inputs.long()).cumsum(dim=1))


def test_the_losses_are_those_of_the_formulas() -> None:
    out, y = drawn(N, V), whole(V, N)
    found = Classification(class_weights=tuple(range(1, V + 1))).losses(out, y)
    assert torch.allclose(found, -(y + 1) * out.log_softmax(1)[torch.arange(N), y])
    one, target = drawn(N, 1), drawn(N, seed=3)
    error = one[:, 0] - (target - 1.0) / 2.0
    assert torch.allclose(Regression(center=1.0, scale=2.0).losses(one, target), 0.5 * error**2)
    assert torch.allclose(Regression(loss="absolute").losses(out, out + 2.0), torch.full((N,), 2.0))
    assert torch.allclose(Regression(loss="huber", delta=0.5).losses(one, one[:, 0] + 2.0), torch.tensor(0.875))
    counts = whole(9, N).float()
    assert torch.allclose(Regression(loss="poisson").losses(one, counts), one[:, 0].exp() - counts * one[:, 0])
    flags = MultiLabel().losses(out, FLAGS)
    assert torch.allclose(flags, F.binary_cross_entropy_with_logits(out, FLAGS, reduction="none").mean(1))


def test_positions_are_averaged_within_their_example_alone() -> None:
    out = drawn(N, T, V)
    found = NextToken().losses(out, TOKENS)
    for row in range(N):
        kept = TOKENS[row] != -100
        expected = F.cross_entropy(out[row][kept], TOKENS[row][kept]) if kept.any() else torch.tensor(0.0)
        assert float(found[row]) == pytest.approx(float(expected), rel=1e-5)
    nothing = NextToken().losses(out, torch.full((N, T), -100))
    assert not nothing.any()


@pytest.mark.parametrize("name", KINDS)
def test_no_loss_depends_on_another_example(name: str) -> None:
    kind, labels = KINDS[name]
    check_losses(kind, (width_of(kind, labels),), labels, V)
    check_losses(NextToken(), (T, V), TOKENS, V)


def mean_of_batch(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs, labels)


def mixed(outputs: Tensor, labels: Tensor) -> Tensor:
    losses = F.cross_entropy(outputs, labels, reduction="none")
    return losses / losses.detach().sum()


def without_gradient(outputs: Tensor, labels: Tensor) -> Tensor:
    return (outputs.argmax(1) != labels).float()


@pytest.mark.parametrize(
    ("loss", "words"),
    [(mean_of_batch, r"losses \[examples\]"), (mixed, "in any batch"), (without_gradient, "losses with a gradient")],
)
def test_a_loss_that_is_not_per_example_is_refused(loss: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_losses(own_loss(loss), (V,), whole(V, 1), V)
    clients = [(np.random.default_rng(i).random((6, 3), np.float32), np.arange(6) % 3) for i in range(3)]
    made = Experiment(model=Mlp(), data=clients, method=AlphaNormEC(), rounds=1, task=loss)
    with pytest.raises(UserError, match=words):
        made.check()


@pytest.mark.parametrize("name", [name for name in KINDS if name != "classification"])
@pytest.mark.parametrize("dense", [True, False])
def test_batched_gradients_are_the_single_ones(name: str, dense: bool) -> None:
    kind, labels = KINDS[name]
    layers = [nn.Flatten(), nn.Linear(3, 8), nn.ReLU() if dense else nn.Tanh(), nn.Linear(8, width_of(kind, labels))]
    torch.manual_seed(0)
    task = Task(nn.Sequential(*layers), kind=kind)
    assert (task.dense is not None) == dense
    model, x = task.initial_model(), drawn(2, N, 3)
    y = torch.stack([labels, labels.flip(0)])
    counts = torch.tensor([N, 4])
    weights = (torch.arange(N) < counts[:, None]) / counts[:, None]
    together = task.gradients(model, x, y, weights)
    own = torch.stack([model, model])
    for row, count in enumerate(counts.tolist()):
        alone = task.gradient(model, x[row, :count], y[row, :count])
        assert alone.any()
        assert torch.allclose(together[row], alone, atol=1e-5)
        assert torch.allclose(task.gradients(own, x, y, weights)[row], alone, atol=1e-5)


@pytest.mark.parametrize("name", ["squared", "multi-label", "next-token"])
def test_engines_agree(name: str) -> None:
    torch.manual_seed(0)
    if name == "next-token":
        kind, inputs, labels, module = NextToken(), whole(V, N, T).float(), TOKENS, Tokens()
    else:
        kind, labels = KINDS[name]
        inputs, module = drawn(N, 3), Mlp(hidden=(4,)).build((3,), width_of(kind, labels), 0)
    classes = V if labels.dim() == 2 else 1
    data = dataset_for(kind, inputs, labels, classes)
    held = Federation(dataset=data, offsets=np.array([0, 4, 5, 9]), rows=np.arange(9))
    made = setting(AlphaNormEC(), federation=held, module=module, work=LocalSteps(steps=2, client_lr=0.1))
    population = dataclasses.replace(made.population, task=Task(module, kind=kind))
    made = dataclasses.replace(made, population=population)
    one = models_of(made, LoopEngine, 2)[-1]
    other = models_of(made, lambda people: VectorizedEngine(people, batched=True), 2)[-1]
    assert not torch.equal(one, made.initial_model)
    assert torch.allclose(one, other, atol=1e-5)


def test_a_half_precision_backbone_stays_so() -> None:
    torch.manual_seed(0)
    frozen = nn.Linear(3, 4).to(torch.bfloat16).requires_grad_(False)

    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = frozen, nn.Linear(4, V)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.head(self.body(inputs.to(torch.bfloat16)).float())

    module = Adapted()
    before = module.body.weight.clone()
    task = Task(module)
    x, y = drawn(2, N, 3), torch.stack([whole(V, N)] * 2)
    together = task.gradients(task.initial_model(), x, y, torch.full((2, N), 1 / N))
    alone = task.gradient(task.initial_model(), x[0], y[0])
    assert torch.allclose(together[0], alone, atol=3e-3)  # bfloat16 has 8 bits
    task.evaluate(task.initial_model() + together[0], x[0], y[0])
    assert task.layout.size == 4 * V + V
    held = dict(task.on(torch.device("cpu"))._module.named_parameters())["body.weight"]
    assert held.dtype == torch.bfloat16
    assert torch.equal(held, before)


@pytest.mark.parametrize(
    ("kind", "labels", "words"),
    [
        (Regression(loss="poisson"), torch.tensor([1.0, -2.0]), "counts from 0.*row 1: -2.0"),
        (Regression(), torch.tensor([1.0, math.nan]), "finite numbers.*row 1"),
        (MultiLabel(), torch.tensor([[0.0], [2.0]]), r"0 or 1.*row 1: \[2.0\]"),
        (NextToken(), torch.tensor([[1, 2], [-1, 0]]), r"-100 for ignored positions.*row 1: \[-1, 0\]"),
        (Classification(class_weights=(1.0, 2.0)), torch.tensor([0, 1, 2]), "3 weights"),
    ],
)
def test_labels_that_do_not_fit_are_named_by_their_row(kind: TaskKind, labels: Tensor, words: str) -> None:
    classes = {"numbers": 1, "flags": 1}.get(kind.labels, 3)
    with pytest.raises(UserError, match=words):
        kind.check_labels("data", labels, classes)


def config_of(folder: Path, labels: Any, task: dict[str, Any], **more: Any) -> Any:
    inputs = np.random.default_rng(0).random((len(labels), 3), np.float32)
    np.savez(folder / "data.npz", inputs=inputs, labels=labels, client_ids=np.arange(len(labels)) % 3)
    tables = {
        "name": "own",
        "seed": 1,
        "data": {"name": "npz", "file": str(folder / "data.npz"), "partition": "natural", "test": "within"},
        "model": {"name": "mlp", "hidden": [4]},
        "method": {"name": "alpha-normec"},
        "training": {"rounds": 2},
        "task": task,
    }
    return parse_config(tables | more)


def test_a_task_is_part_of_an_experiment_and_plain_classification_is_not(tmp_path: Path) -> None:
    labels = np.arange(30) % 3
    plain = config_of(tmp_path, labels, {})
    assert "task" not in plain.tables
    assert plain.digest == config_of(tmp_path, labels, {"name": "classification"}).digest
    smooth = config_of(tmp_path, labels, {"label_smoothing": 0.1})
    assert smooth.tables["task"] == {"name": "classification", "label_smoothing": 0.1}
    assert smooth.digest != plain.digest
    assert smooth.noise_id != plain.noise_id
    assert parse_config(smooth.tables) == smooth


def test_data_without_the_labels_of_the_task_are_refused(tmp_path: Path) -> None:
    made = config_of(tmp_path, np.linspace(0, 1, 30), {})
    with pytest.raises(UserError, match="whole numbers"):
        assemble(made)
    made = config_of(tmp_path, np.arange(30), {"name": "multi-label"})
    with pytest.raises(UserError, match=r"\[examples, labels\]"):
        assemble(made)
    digits = {"name": "digits", "partition": "iid", "clients": 3}
    with pytest.raises(UserError, match="dataset digits: expected labels that are numbers"):
        assemble(config_of(tmp_path, np.arange(30), {"name": "regression"}, data=digits))


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ({"metrics": ["rmse"]}, "task.metrics"),
        ({"name": "regression", "metrics": ["accuracy"]}, "task.metrics"),
        ({"name": "regression", "loss": "cubic"}, "task.loss"),
        ({"name": "regression", "delta": 2.0}, "task.delta"),
        ({"name": "regression", "loss": "poisson", "scale": 2.0}, "task.scale"),
        ({"label_smoothing": 1.0}, "task.label_smoothing"),
        ({"class_weights": [1.0, 0.0]}, "task.class_weights"),
        ({"name": "segmentation"}, "task.name"),
    ],
)
def test_keys_that_do_not_fit_are_refused(tmp_path: Path, task: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        config_of(tmp_path, np.arange(6) % 2, task)

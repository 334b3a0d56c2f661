"""Evaluation of a model on each client's own held-out examples, before and after steps on the client's own data.

For simulations without privacy: these numbers are computed from single clients' examples without noise.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from fedpriv.checks import is_whole, require_representable, shown
from fedpriv.errors import UserError
from fedpriv.tasks.local_work import MAX_STEPS
from fedpriv.tasks.metrics import Better, known_metric
from fedpriv.tasks.task import Task

__all__ = ["ClientExamples", "PerClient", "distribution", "evaluate_clients"]

_NOTE = "Not private: computed from single clients' examples. For simulations only."


class ClientExamples(NamedTuple):
    """The examples of one client: inputs and labels to train on, and those held out to test on."""

    client: int
    inputs: Tensor
    labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor


@dataclass(frozen=True, kw_only=True)
class PerClient:
    """The table `[evaluation]`: test the last model on each client's held-out examples.

    Args:
        clients: True to do so.
        steps: Steps of gradient descent on all of the client's training examples before a second test, of a
            personalized model; 0 for none.
        client_lr: Length of each step.

    Raises:
        UserError: If the number of steps or their length is out of range.
    """

    clients: bool = True
    steps: int = 0
    client_lr: float | None = None

    def __post_init__(self) -> None:
        if not is_whole(self.steps, 0, MAX_STEPS):
            got = shown(self.steps)
            raise UserError("evaluation.steps", f"from 0 to {MAX_STEPS:,}", got, "Give a number such as 5")
        if (self.steps > 0) != (self.client_lr is not None):
            got = "a missing key" if self.client_lr is None else self.client_lr
            raise UserError("evaluation.client_lr", "a length with evaluation.steps", got, "Set both, or neither")
        if self.client_lr is not None:
            require_representable("evaluation.client_lr", self.client_lr)


def evaluate_clients(
    task: Task, model: Tensor, clients: Iterable[ClientExamples], choice: PerClient
) -> dict[str, object]:
    """Return each client's scores, and their distribution.

    Args:
        task: Evaluates models.
        model: `[params]`, on the task's device.
        clients: Their examples, on the task's device. Those without test examples are left out.
        choice: The number of steps of personalization.

    Returns:
        A dict for JSON: the lists `clients` (their numbers), `examples` (to train on), `test_examples` and each score
        by name; the same scores as `personalized_NAME`; and `distribution`.
    """
    rows: list[dict[str, float]] = []
    for one in clients:
        if not len(one.test_labels):
            continue
        row: dict[str, float] = {
            "clients": one.client,
            "examples": len(one.labels),
            "test_examples": len(one.test_labels),
        }
        row |= task.evaluate(model, one.test_inputs, one.test_labels)
        if choice.client_lr is not None:
            own = model
            for _ in range(choice.steps):
                own = own - choice.client_lr * task.gradient(own, one.inputs, one.labels)
            found = task.evaluate(own, one.test_inputs, one.test_labels)
            row |= {f"personalized_{name}": value for name, value in found.items()}
        rows.append(row)
    lists = {key: [row[key] for row in rows] for key in rows[0]} if rows else {}
    better: dict[str, Better] = {metric.name: metric.better for metric in task.kind.measured}
    return {"note": _NOTE, **lists, "distribution": distribution(lists, better)}


def distribution(lists: Mapping[str, Sequence[float]], better: Mapping[str, Better]) -> dict[str, dict[str, float]]:
    """Return mean, standard deviation, quantiles and the mean of the worst decile of clients, for each score.

    Args:
        lists: See `evaluate_clients`. Values that are not finite are left out.
        better: The direction in which each metric is better.
    """
    made: dict[str, dict[str, float]] = {}
    for key, values in lists.items():
        name = key.removeprefix("personalized_")
        if name not in better and name != "loss":
            continue
        finite = np.array([value for value in values if math.isfinite(value)], dtype=np.float64)
        if not len(finite):
            continue
        ordered = np.sort(known_metric(name, better).sign * finite)
        worst = ordered[: -(-len(finite) // 10)].mean() * known_metric(name, better).sign
        quantiles = dict(zip(("min", "median", "max"), np.quantile(finite, (0.0, 0.5, 1.0)).tolist(), strict=True))
        made[key] = {
            "mean": float(finite.mean()),
            "std": float(finite.std()),
            "worst_decile": float(worst),
            **quantiles,
        }
    return made

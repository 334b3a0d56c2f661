"""Kinds of tasks: the loss of each example, the labels it needs, and the metrics of a model.

Every loss is per example: that of one example depends on no other. Positions of a sequence and targets are averaged
within their example alone, never over a batch. Otherwise one example could change the weights of others, and a bound on
each example's gradient would not bound its influence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fedpriv.checks import is_real, is_whole, real_within, require_fraction, shown
from fedpriv.data.labels import LabelKind, fault_of
from fedpriv.errors import UserError, nearest
from fedpriv.plugins import Registry
from fedpriv.tasks.metrics import METRICS, Metric

__all__ = ["TASKS", "Classification", "MultiLabel", "NextToken", "Regression", "TaskKind", "check_losses"]


@dataclass(frozen=True, kw_only=True)
class TaskKind:
    """Base of the settings of a task; filled from the table `[task]`.

    A subclass has `labels`, `losses`, and members that differ from the defaults here.

    Args:
        metrics: Names of the metrics beside the loss. The first one selects among trials. None for the defaults.

    Raises:
        UserError: If a metric is unknown, or does not suit the task.
    """

    labels: ClassVar[LabelKind]
    default_metrics: ClassVar[tuple[str, ...]] = ()
    always: ClassVar[tuple[str, ...]] = ()
    """Metrics that are recorded even if `metrics` lacks them."""
    own_metrics: ClassVar[tuple[Metric, ...]] = ()
    loss_unit: ClassVar[str] = ""
    metrics: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.metrics is not None and (isinstance(self.metrics, str) or not isinstance(self.metrics, Sequence)):
            raise UserError("task.metrics", "a list of names", repr(self.metrics), 'Write it as ["auroc"]')
        known = self.known
        for name in self.metrics or ():
            if name not in known:
                raise UserError("task.metrics", f"some of {', '.join(known)}", repr(name), nearest(name, known))
        if self.metrics is not None:
            if len(set(self.metrics)) < len(self.metrics):
                raise UserError("task.metrics", "different names", list(self.metrics), "List each once")
            object.__setattr__(self, "metrics", tuple(self.metrics))

    @property
    def known(self) -> dict[str, Metric]:
        """The metrics that suit the task, by name."""
        built_in = {name: metric for name, metric in METRICS.items() if self.labels in metric.labels}
        return built_in | {metric.name: metric for metric in self.own_metrics}

    @property
    def measured(self) -> tuple[Metric, ...]:
        """The metrics of every evaluation beside the loss; the first one selects."""
        names = self.default_metrics if self.metrics is None else self.metrics
        return tuple(self.known[name] for name in dict.fromkeys((*names, *self.always)))

    @property
    def usual(self) -> bool:
        """True if accuracy alone is measured, as in all records of older versions."""
        return [metric.name for metric in self.measured] == ["accuracy"]

    @property
    def selects(self) -> Metric:
        """The metric that selects among trials: the first one, or the loss without metrics."""
        return (*self.measured, METRICS["loss"])[0]

    @property
    def scores(self) -> tuple[str, ...]:
        """Names of all numbers of an evaluation: the metrics, then `loss`."""
        return (*(metric.name for metric in self.measured), "loss")

    def chance(self, classes: int) -> float | None:
        """Return the expected accuracy of uniform guesses among labels; None for other labels or metrics."""
        one_of_them = self.labels in ("classes", "tokens")
        return 1.0 / classes if one_of_them and self.selects is METRICS["accuracy"] else None

    @property
    def plain(self) -> bool:
        """True for the plain cross entropy of classification, which has a closed form of its slope."""
        return False

    def width(self, classes: int) -> int:
        """Return the width of the model's outputs, from the data set's number of labels, targets or tokens."""
        return classes

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of each example `[examples]`, of outputs `[examples, ...]` and labels `[examples, ...]`."""
        raise NotImplementedError

    def predictions(self, outputs: Tensor) -> Tensor:
        """Return the predictions that metrics compare with labels: probabilities or numbers, from the outputs."""
        return outputs

    def check_labels(self, where: str, labels: Tensor, classes: int) -> None:
        """Raise UserError, naming the row, unless the labels suit the task.

        Args:
            where: Name of the data, for the error.
            labels: Labels of the kind `labels`.
            classes: Number of labels, targets or tokens.
        """
        fault = fault_of(self.labels, "the", labels, classes)
        if fault is not None:
            raise UserError(where, *fault, "Correct the labels, or choose another [task]")

    def output_shape(self, labels: Tensor, classes: int) -> tuple[int, ...]:
        """Return the shape of one example's outputs; `labels` are those of some examples."""
        del labels
        return (self.width(classes),)


@dataclass(frozen=True, kw_only=True)
class Classification(TaskKind):
    """Cross entropy of one label per example; inputs may be images, numbers or sequences of tokens.

    Args:
        class_weights: The factor of each label's loss, public constants; None for 1. Losses are not divided by the sum
            of weights, which would mix examples.
        label_smoothing: Share of each label spread evenly over all labels, 0 to below 1.

    Raises:
        UserError: If a weight is not positive, or the share is out of range.
    """

    labels: ClassVar[LabelKind] = "classes"
    default_metrics: ClassVar[tuple[str, ...]] = ("accuracy",)
    always: ClassVar[tuple[str, ...]] = ("accuracy",)
    loss_unit: ClassVar[str] = "nats"
    class_weights: tuple[float, ...] | None = None
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_fraction("task.label_smoothing", self.label_smoothing)
        if self.class_weights is not None:
            _positive_weights("task.class_weights", self.class_weights)
            object.__setattr__(self, "class_weights", tuple(self.class_weights))

    @property
    def plain(self) -> bool:
        """See `TaskKind.plain`."""
        return self.class_weights is None and self.label_smoothing == 0.0

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """See `TaskKind.losses`; in nats."""
        weights = None if self.class_weights is None else outputs.new_tensor(self.class_weights)
        return F.cross_entropy(outputs, labels, weight=weights, label_smoothing=self.label_smoothing, reduction="none")

    def predictions(self, outputs: Tensor) -> Tensor:
        """Return the probabilities of the labels."""
        return outputs.softmax(dim=-1)

    def check_labels(self, where: str, labels: Tensor, classes: int) -> None:
        """See `TaskKind.check_labels`."""
        super().check_labels(where, labels, classes)
        if self.class_weights is not None and len(self.class_weights) != classes:
            got, remedy = len(self.class_weights), "Give one weight for each label"
            raise UserError("task.class_weights", f"{classes} weights, one for each label", got, remedy)


@dataclass(frozen=True, kw_only=True)
class Regression(TaskKind):
    """Prediction of one or several numbers; several are averaged within the example.

    Args:
        loss: `squared`: half the square of the error. `absolute`. `huber`: half the square up to `delta`, linear
            beyond. `poisson`: the model's output is the logarithm of the expected count; labels are from 0.
        delta: Where `huber` becomes linear.
        center: A public constant that is subtracted from labels before the loss.
        scale: A public constant that labels are then divided by. Metrics are in the labels' own unit.

    Raises:
        UserError: If a constant is out of range, or belongs to another loss.
    """

    labels: ClassVar[LabelKind] = "numbers"
    default_metrics: ClassVar[tuple[str, ...]] = ("rmse",)
    loss: Literal["squared", "absolute", "huber", "poisson"] = "squared"
    delta: float = 1.0
    center: float = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss not in ("squared", "absolute", "huber", "poisson"):
            expected = "squared, absolute, huber or poisson"
            raise UserError("task.loss", expected, repr(self.loss), "Choose one of these")
        for key, value in (("delta", self.delta), ("scale", self.scale)):
            real_within(f"task.{key}", value, 1e-20, 1e20, "Give a public constant")
        real_within("task.center", self.center, -1e20, 1e20, "Give a public constant")
        if self.loss != "huber" and self.delta != 1.0:
            raise UserError("task.delta", "no value without huber", self.delta, 'Set task.loss = "huber", or remove it')
        if self.loss == "poisson" and (self.center, self.scale) != (0.0, 1.0):
            got, remedy = [self.center, self.scale], "Remove task.center and task.scale"
            raise UserError("task.scale", "unchanged counts with poisson", got, remedy)

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """See `TaskKind.losses`."""
        wanted = labels.reshape(outputs.shape)
        if self.loss == "poisson":
            return F.poisson_nll_loss(outputs, wanted, reduction="none").flatten(1).mean(dim=1)
        wanted = (wanted - self.center) / self.scale
        if self.loss == "squared":
            found = 0.5 * (outputs - wanted).square()
        elif self.loss == "absolute":
            found = (outputs - wanted).abs()
        else:
            found = F.huber_loss(outputs, wanted, reduction="none", delta=self.delta)
        return found.flatten(1).mean(dim=1)

    def predictions(self, outputs: Tensor) -> Tensor:
        """Return predicted numbers in the unit of the labels."""
        return outputs.exp() if self.loss == "poisson" else outputs * self.scale + self.center

    def check_labels(self, where: str, labels: Tensor, classes: int) -> None:
        """See `TaskKind.check_labels`."""
        super().check_labels(where, labels, classes)
        wrong = labels < 0
        if self.loss == "poisson" and bool(wrong.any()):
            row = int(wrong.reshape(len(labels), -1).any(dim=1).int().argmax())
            raise UserError(
                where, "counts from 0 with poisson", f"row {row}: {labels[row].tolist()}", "Choose another task.loss"
            )


@dataclass(frozen=True, kw_only=True)
class MultiLabel(TaskKind):
    """Any number of labels per example: the binary cross entropies, averaged over the labels of the example.

    Args:
        positive_weights: The factor of the loss of each label where it is 1, public constants; None for 1.

    Raises:
        UserError: If a weight is not positive.
    """

    labels: ClassVar[LabelKind] = "flags"
    default_metrics: ClassVar[tuple[str, ...]] = ("f1",)
    loss_unit: ClassVar[str] = "nats"
    positive_weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.positive_weights is not None:
            _positive_weights("task.positive_weights", self.positive_weights)
            object.__setattr__(self, "positive_weights", tuple(self.positive_weights))

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """See `TaskKind.losses`; in nats."""
        weights = None if self.positive_weights is None else outputs.new_tensor(self.positive_weights)
        found = F.binary_cross_entropy_with_logits(outputs, labels, reduction="none", pos_weight=weights)
        return found.mean(dim=1)

    def predictions(self, outputs: Tensor) -> Tensor:
        """Return the probability of each label."""
        return outputs.sigmoid()

    def check_labels(self, where: str, labels: Tensor, classes: int) -> None:
        """See `TaskKind.check_labels`."""
        super().check_labels(where, labels, classes)
        if self.positive_weights is not None and len(self.positive_weights) != classes:
            got, remedy = len(self.positive_weights), "Give one weight for each label"
            raise UserError("task.positive_weights", f"{classes} weights, one for each label", got, remedy)


@dataclass(frozen=True, kw_only=True)
class NextToken(TaskKind):
    """Prediction of a token at every position: the mean cross entropy over the positions of the example that count.

    Args:
        ignore_index: The label of positions that do not count, such as padding. An example without others has loss 0.

    Raises:
        UserError: If it has more than 32 bits.
    """

    labels: ClassVar[LabelKind] = "tokens"
    default_metrics: ClassVar[tuple[str, ...]] = ("perplexity",)
    loss_unit: ClassVar[str] = "nats"
    ignore_index: int = -100

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_whole(self.ignore_index, 1 - 2**31, 2**31 - 1):
            got = shown(self.ignore_index)
            raise UserError("task.ignore_index", "a whole number of 32 bits", got, "Give one such as -100")

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """See `TaskKind.losses`; in nats. Outputs are `[examples, positions, tokens]`."""
        found = F.cross_entropy(outputs.movedim(-1, 1), labels, reduction="none", ignore_index=self.ignore_index)
        return found.sum(dim=1) / (labels != self.ignore_index).sum(dim=1).clamp(min=1)

    def predictions(self, outputs: Tensor) -> Tensor:
        """Return the probabilities of tokens."""
        return outputs.softmax(dim=-1)

    def check_labels(self, where: str, labels: Tensor, classes: int) -> None:
        """See `TaskKind.check_labels`."""
        super().check_labels(where, labels, classes)
        wrong = (labels < 0) & (labels != self.ignore_index)
        if bool(wrong.any()):
            row = int(wrong.any(dim=1).int().argmax())
            remedy = "Set task.ignore_index to the label of padding"
            got = f"row {row}: {labels[row].tolist()}"[:80]
            raise UserError(where, f"tokens from 0, or {self.ignore_index} for ignored positions", got, remedy)

    def output_shape(self, labels: Tensor, classes: int) -> tuple[int, ...]:
        """See `TaskKind.output_shape`."""
        return (labels.shape[1], classes)


TASKS: Registry[TaskKind] = Registry(
    "task",
    {
        "classification": Classification,
        "regression": Regression,
        "multi-label": MultiLabel,
        "next-token": NextToken,
        "statistics": "fedpriv.analytics.statistics:StatisticsTask",
    },
    protocol=TaskKind,
    group="fedpriv.tasks",
    wrap="fedpriv.tasks.own_task:OwnTask",
    hidden=("statistics",),
)


def check_losses(kind: TaskKind, outputs: tuple[int, ...], labels: Tensor, classes: int) -> None:
    """Raise UserError unless a task's losses are one per example, have a gradient, and depend on no other example.

    The trial uses made-up outputs and labels: nothing here depends on anyone's data but the labels' shape.

    Args:
        kind: The task.
        outputs: Shape of one example's outputs.
        labels: Some labels, for their shape.
        classes: Number of labels, targets or tokens.
    """
    draw = torch.Generator().manual_seed(0)
    given = torch.randn(6, *outputs, generator=draw, requires_grad=True)
    shape = (6, *labels.shape[1:])
    if kind.labels == "numbers":
        wanted = torch.rand(shape, generator=draw)
    else:
        wanted = torch.randint(2 if kind.labels == "flags" else classes, shape, generator=draw).to(labels.dtype)
    key = "task.name"
    found = kind.losses(given, wanted)
    shown = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
    if shown != [6]:
        remedy = "Return the loss of each example, without averaging over them"
        raise UserError(key, "losses [examples]", f"{shown} for 6 examples", remedy)
    if not found.requires_grad or not found.is_floating_point():
        raise UserError(key, "losses with a gradient", found.dtype, "Compute them from the outputs, by torch")
    changed = given.detach().clone()
    changed[1:] = 3.0 * changed[1:].flip(0)
    others = torch.cat([wanted[:1], wanted[1:].flip(0)])
    again = kind.losses(changed, others)
    alone = kind.losses(given.detach()[:1], wanted[:1])
    for first in (again[0], alone[0]):
        if not torch.allclose(first, found.detach()[0], rtol=1e-4, atol=1e-6, equal_nan=True):
            got, remedy = "one that changes with the other examples", "Compute each example's loss from it alone"
            raise UserError(key, "the same loss of an example in any batch", got, remedy)


def _positive_weights(key: str, weights: Sequence[float]) -> None:
    listed = isinstance(weights, list | tuple) and weights
    if not listed or not all(is_real(weight, 1e-20, 1e20) for weight in weights):
        remedy = "Give one public constant for each label"
        raise UserError(key, "a list of numbers from 1e-20 to 1e20", shown(weights), remedy)

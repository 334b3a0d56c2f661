"""Metrics of a model on labeled examples, and the direction in which each is better.

AUC, F1 and the calibration error come from torchmetrics, which is imported on first use, because it takes seconds.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    import torchmetrics

    from fedpriv.tasks.kinds import TaskKind

__all__ = ["METRICS", "Meter", "Metric", "known_metric", "meter_of", "recorded_metrics"]

Better = Literal["higher", "lower"]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A number that says how good a model is.

    Args:
        name: Its name in `[task] metrics`; columns of results are `test_NAME` and `validation_NAME`.
        better: The direction in which it is better.
        bounded: True if it is in [0, 1] for every model and all data.
        labels: The kinds of labels that it suits.
        words: Its name in reports; empty for `name`.
        measure: For the metric of an own task: returns it from all predictions and all labels. None for built-in ones.
    """

    name: str
    better: Better = "higher"
    bounded: bool = False
    labels: tuple[str, ...] = ()
    words: str = ""
    measure: Callable[[Tensor, Tensor], float] | None = None

    @property
    def label(self) -> str:
        """Its name in reports."""
        return self.words or self.name

    @property
    def sign(self) -> float:
        """1 if higher is better, otherwise -1: the product with a value is better if higher."""
        return 1.0 if self.better == "higher" else -1.0


_ALL = ("classes", "numbers", "flags", "tokens")
_SHARES = ("classes", "flags")

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(name="accuracy", bounded=True, labels=("classes", "flags", "tokens")),
        Metric(name="auroc", bounded=True, labels=_SHARES, words="AUC"),
        Metric(name="f1", bounded=True, labels=_SHARES, words="F1"),
        Metric(name="ece", better="lower", bounded=True, labels=_SHARES, words="calibration error"),
        Metric(name="rmse", better="lower", labels=("numbers",), words="RMSE"),
        Metric(name="mae", better="lower", labels=("numbers",), words="mean absolute error"),
        Metric(name="perplexity", better="lower", labels=("tokens",)),
        Metric(name="loss", better="lower", labels=()),
    )
}
"""Built-in metrics by name. `loss` is always recorded."""


def known_metric(name: str, better: Mapping[str, Better] | None = None) -> Metric:
    """Return a built-in metric, or one of an own task by its recorded direction; higher is better by default."""
    return METRICS.get(name) or Metric(name=name, better=(better or {}).get(name, "higher"))


def recorded_metrics(summary: Mapping[str, Any]) -> list[Metric]:
    """Return the metrics of a run, from its summary: the one that selects comes first."""
    better: dict[str, Better] = summary.get("metrics") or {"accuracy": "higher"}
    return [known_metric(name, better) for name in better] or [METRICS["loss"]]


class Meter(Protocol):
    """Collects outputs and labels of a model, piece by piece."""

    def update(self, outputs: Tensor, labels: Tensor) -> None:
        """Add examples: the model's outputs, and their labels, on one device."""
        ...

    def value(self) -> float:
        """Return the metric of all examples; NaN if it is undefined for them or an output is not finite."""
        ...


def meter_of(metric: Metric, kind: "TaskKind") -> Meter:
    """Return an empty meter of a metric for a task."""
    if metric.measure is not None:
        return _Whole(metric.measure, kind)
    if metric.name == "accuracy":
        return _Accuracy(kind)
    if metric.name in _MEANS:
        return _Mean(metric.name, kind)
    return _OfTorchmetrics(metric.name, kind)


class _Accuracy:
    """Share of right labels, flags, or tokens at positions that count."""

    def __init__(self, kind: "TaskKind") -> None:
        self._kind, self._right, self._count = kind, 0, 0

    def update(self, outputs: Tensor, labels: Tensor) -> None:
        if self._kind.labels == "flags":
            right, counted = (outputs > 0) == (labels > 0.5), torch.ones_like(labels, dtype=torch.bool)
        else:
            right, counted = outputs.argmax(dim=-1) == labels, labels != getattr(self._kind, "ignore_index", -1)
        self._right += int((right & counted).sum())
        self._count += int(counted.sum())

    def value(self) -> float:
        return self._right / self._count if self._count else math.nan


_MEANS = ("rmse", "mae", "perplexity")


class _Mean:
    """A function of the mean of an error: over all numbers, or over all tokens at positions that count."""

    def __init__(self, name: str, kind: "TaskKind") -> None:
        self._name, self._kind, self._sum, self._count = name, kind, 0.0, 0

    def update(self, outputs: Tensor, labels: Tensor) -> None:
        if self._name == "perplexity":
            ignored: int = getattr(self._kind, "ignore_index", -100)
            self._count += int((labels != ignored).sum())
            found = torch.nn.functional.cross_entropy(
                outputs.movedim(-1, 1), labels, reduction="none", ignore_index=ignored
            )
        else:
            predictions = self._kind.predictions(outputs)
            found = (predictions - labels.reshape(predictions.shape)).abs()
            self._count += found.numel()
        found = found.double()
        self._sum += float((found.square() if self._name == "rmse" else found).sum())

    def value(self) -> float:
        if not self._count or not math.isfinite(self._sum):
            return math.nan
        mean = self._sum / self._count
        if self._name == "perplexity":
            return math.exp(mean) if mean < 700.0 else math.inf
        return math.sqrt(mean) if self._name == "rmse" else mean


class _Whole:
    """A metric computed from all predictions at once."""

    def __init__(self, measure: Callable[[Tensor, Tensor], float], kind: "TaskKind") -> None:
        self._measure, self._kind = measure, kind
        self._parts: list[tuple[Tensor, Tensor]] = []

    def update(self, outputs: Tensor, labels: Tensor) -> None:
        self._parts.append((self._kind.predictions(outputs).cpu(), labels.cpu()))

    def value(self) -> float:
        predictions, labels = (torch.cat(parts) for parts in zip(*self._parts, strict=True))
        return float(self._measure(predictions, labels))


class _OfTorchmetrics:
    """A metric of torchmetrics. Means over labels leave out those that no, or every, example has."""

    def __init__(self, name: str, kind: "TaskKind") -> None:
        self._name, self._kind = name, kind
        self._meter: torchmetrics.Metric | None = None  # made by the first outputs, which have its width
        self._positive = torch.zeros(0)
        self._examples, self._finite = 0, True

    def update(self, outputs: Tensor, labels: Tensor) -> None:
        outputs, labels = outputs.detach().cpu(), labels.cpu()
        self._finite &= bool(torch.isfinite(outputs).all())
        if not self._finite:
            return
        meter = self._meter = self._made(outputs.shape[-1]) if self._meter is None else self._meter
        flags = torch.nn.functional.one_hot(labels, outputs.shape[-1]) if labels.dim() == 1 else labels
        self._positive = flags.sum(dim=0) + (self._positive if len(self._positive) else 0)
        self._examples += len(labels)
        given = self._kind.predictions(outputs)
        if self._kind.labels == "flags":
            labels = labels.long()
            if self._name == "ece":
                given, labels = given.flatten(), labels.flatten()
        meter.update(given.contiguous(), labels.contiguous())

    def value(self) -> float:
        if self._meter is None or not self._finite:
            return math.nan
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about labels that are left out below
            found = torch.as_tensor(self._meter.compute()).double()
        if found.dim() == 0:
            return float(found)
        kept = self._positive > 0
        if self._name == "auroc":
            kept &= self._positive < self._examples
        return float(found[kept].mean()) if bool(kept.any()) else math.nan

    def _made(self, width: int) -> "torchmetrics.Metric":
        """Return an empty metric of torchmetrics for outputs of this width."""
        classification = _torchmetrics()
        options: dict[str, Any] = {"average": None} if self._name in ("auroc", "f1") else {}
        names = {"auroc": "AUROC", "f1": "F1Score", "ece": "CalibrationError"}
        if self._kind.labels == "classes":
            return getattr(classification, f"Multiclass{names[self._name]}")(num_classes=width, **options)
        if self._name == "ece":
            return classification.BinaryCalibrationError()
        return getattr(classification, f"Multilabel{names[self._name]}")(num_labels=width, **options)


def _torchmetrics() -> ModuleType:
    """Return `torchmetrics.classification`; it imports every installed package that any of its metrics needs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torchmetrics.classification
    return torchmetrics.classification

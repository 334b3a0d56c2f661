"""User losses: a function `loss(outputs, labels) -> [examples]`, such as `"./loss.py:quantile"`."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import Tensor

from fedpriv.data.labels import LABEL_KINDS, LabelKind
from fedpriv.errors import UserError, nearest
from fedpriv.plugins import MEMORY, line_of, settings_of
from fedpriv.tasks.kinds import TaskKind
from fedpriv.tasks.metrics import METRICS, Metric

__all__ = ["OwnTask", "own_loss"]

_KEY = "task.name"


@dataclass(frozen=True, kw_only=True)
class OwnTask(TaskKind):
    """Base of the settings of a user loss. The class that `of` returns has the function's other parameters as fields.

    The function takes the model's outputs and the labels of some examples, and returns the loss of each example alone.

    Args:
        labels: The kind of labels that it takes: `classes`, `numbers`, `flags` or `tokens`.
        outputs: Width of the model's outputs; None for one per class, number, flag or token.

    Raises:
        UserError: If the kind of labels is unknown, or the width is not positive.
    """

    called: ClassVar[Callable[..., Tensor]]
    asked: ClassVar[tuple[str, ...]]
    labels: LabelKind = "classes"  # pyright: ignore[reportIncompatibleVariableOverride]
    outputs: int | None = None

    def __post_init__(self) -> None:
        if self.labels not in LABEL_KINDS:
            raise UserError(
                "task.labels", " or ".join(LABEL_KINDS), repr(self.labels), nearest(self.labels, LABEL_KINDS)
            )
        if self.outputs is not None and not 1 <= self.outputs <= 10**6:
            raise UserError("task.outputs", "a whole number from 1 to 1,000,000", self.outputs, "Give the width")
        super().__post_init__()

    @staticmethod
    def of(found: object, where: str, name: str) -> "type[OwnTask]":
        """Return the settings of a loss function; see `fedpriv.plugins.Registry`."""
        if not callable(found) or isinstance(found, type):
            remedy = "Name a function loss(outputs, labels), or a dataclass that inherits fedpriv.tasks.kinds.TaskKind"
            raise UserError(where, "a loss function", f"{name!r}, which is a {type(found).__name__}", remedy)
        made = settings_of(OwnTask, found, where, given=_GIVEN, reserved=_RESERVED)
        if set(made.asked) != set(_GIVEN):
            remedy = "Define it as def loss(outputs, labels)"
            raise UserError(where, "a loss with parameters outputs and labels", f"{name!r} without", remedy)
        return made

    @property
    def known(self) -> dict[str, Metric]:
        """See `TaskKind.known`."""
        if self.outputs is not None:  # its outputs are neither classes nor numbers
            return {}
        return {name: metric for name, metric in METRICS.items() if self.labels in metric.labels}

    def width(self, classes: int) -> int:
        """See `TaskKind.width`."""
        return classes if self.outputs is None else self.outputs

    def output_shape(self, labels: Tensor, classes: int) -> tuple[int, ...]:
        """See `TaskKind.output_shape`."""
        width = self.width(classes)
        return (labels.shape[1], width) if self.labels == "tokens" else (width,)

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Call the function; see `TaskKind.losses`.

        Raises:
            UserError: If it raises an exception.
        """
        called, base = type(self).called, {field.name for field in fields(OwnTask)}
        options = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in base}
        try:
            return called(outputs=outputs, labels=labels, **options)
        except (UserError, MemoryError):
            raise
        except Exception as error:
            remedy = "Correct the function, or its keys in [task]"
            raise UserError(_KEY, "a loss that can be computed", line_of(error, called), remedy) from error


def own_loss(loss: Callable[..., Tensor], **settings: Any) -> OwnTask:
    """Return the task of a function in memory.

    Args:
        loss: Takes `outputs` and `labels` by name, and returns the loss of each example.
        settings: Fields of `OwnTask`, such as `labels="numbers"`, and other parameters of the function.

    Raises:
        UserError: If the function or a setting does not fit.
    """
    name = getattr(loss, "__name__", "loss")
    made = OwnTask.of(loss, "task", name)
    made.reference = f"{MEMORY}:{name}"  # pyright: ignore[reportAttributeAccessIssue]
    return made(**settings)


_GIVEN = ("outputs", "labels")
_RESERVED = ("name", "metrics")

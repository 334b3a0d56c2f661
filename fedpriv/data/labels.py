"""Kinds of labels, from which a task learns. Readers of user files ask here which kind the task expects."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = ["LABEL_KINDS", "LabelKind", "expected_labels", "fault_of", "labels_as"]

LabelKind = Literal["classes", "numbers", "flags", "tokens"]
"""`classes`: int64 `[examples]` from 0. `numbers`: float32 `[examples]` or `[examples, targets]`. `flags`: float32
`[examples, labels]` of 0 and 1. `tokens`: int64 `[examples, positions]`; negative ones are ignored by tasks."""

LABEL_KINDS: tuple[LabelKind, ...] = get_args(LabelKind)

_EXPECTED: ContextVar[LabelKind] = ContextVar("labels", default="classes")

_TYPES = {"classes": torch.int64, "numbers": torch.float32, "flags": torch.float32, "tokens": torch.int64}
_AXES = {"classes": (1,), "numbers": (1, 2), "flags": (2,), "tokens": (2,)}


@contextmanager
def labels_as(kind: LabelKind) -> Iterator[None]:
    """Read the labels of data sets as this kind within the context."""
    token = _EXPECTED.set(kind)
    try:
        yield
    finally:
        _EXPECTED.reset(token)


def expected_labels() -> LabelKind:
    """Return the kind of labels that the experiment's task expects; `classes` by default."""
    return _EXPECTED.get()


def fault_of(kind: LabelKind, split: str, labels: Tensor, classes: int) -> tuple[str, object] | None:
    """Return the expected labels and the wrong ones that were found; None if nothing is wrong.

    Args:
        kind: The kind of labels.
        split: The part of the data set, for the words.
        labels: Labels of at least one example.
        classes: Number of labels, targets or tokens.
    """
    if labels.dtype != _TYPES[kind] or labels.dim() not in _AXES[kind]:
        shape = ", ".join(["examples", "..."][: max(_AXES[kind])])
        return f"{split} labels {_TYPES[kind]} [{shape}] that are {kind}", (labels.dtype, list(labels.shape))
    if kind in ("classes", "tokens"):
        low, high = int(labels.min()), int(labels.max())
        if classes < 2 or high >= classes or (kind == "classes" and low < 0):
            return f"{split} labels 0 to classes - 1", f"{low} to {high} of {classes} classes"
        return None
    width = labels.shape[1] if labels.dim() == 2 else 1
    if width != classes:
        return f"{classes} {kind} in each {split} label", width
    wrong = ~(torch.isfinite(labels) if kind == "numbers" else (labels == 0) | (labels == 1))
    if bool(wrong.any()):
        row = int(wrong.reshape(len(labels), -1).any(dim=1).int().argmax())
        words = "finite numbers" if kind == "numbers" else "0 or 1"
        return f"{split} labels that are {words}", f"row {row}: {labels[row].tolist()}"[:80]
    return None

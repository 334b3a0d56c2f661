"""Local work: how a client makes its signal from the model and its data. The method does not care which."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from fedpriv.bounding import require_positive
from fedpriv.errors import UserError
from fedpriv.learning.tasks import Task
from fedpriv.streams import Purpose, SeededStreams

__all__ = ["LOCAL_WORKS", "FullGradient", "LocalSteps", "LocalWork", "MinibatchGradient", "make_signal"]


class LocalWork(Protocol):
    """A frozen dataclass that says which examples each step uses and how long each step is.

    `client_lr` None means one gradient, sent as it is. Otherwise the client walks x_{t+1} = x_t - client_lr grad_t
    over its steps and sends the pseudo-gradient x_0 - x_T.
    """

    @property
    def client_lr(self) -> float | None:
        """Length of a local step, or None for a gradient."""
        ...

    def batches(self, examples: int, rng: np.random.Generator) -> list[np.ndarray | None]:
        """The examples of each step as positions in the client's data; None for all of them."""
        ...


@dataclass(frozen=True, kw_only=True)
class FullGradient:
    """The gradient of the client's mean loss over all its examples, exact on ragged clients."""

    @property
    def client_lr(self) -> None:
        """One gradient."""
        return

    def batches(self, examples: int, rng: np.random.Generator) -> list[np.ndarray | None]:  # noqa: ARG002
        """All examples, once."""
        return [None]


@dataclass(frozen=True, kw_only=True)
class MinibatchGradient:
    """The gradient of the mean loss over a fresh batch, drawn without replacement.

    Args:
        batch_size: Examples in the batch; a client that has fewer uses all.
    """

    batch_size: int

    def __post_init__(self) -> None:
        _require_count("local.batch_size", self.batch_size)

    @property
    def client_lr(self) -> None:
        """One gradient."""
        return

    def batches(self, examples: int, rng: np.random.Generator) -> list[np.ndarray | None]:
        """One batch."""
        return [_draw(examples, self.batch_size, rng)]


@dataclass(frozen=True, kw_only=True)
class LocalSteps:
    """Steps of (stochastic) gradient descent; the signal is the pseudo-gradient x_0 - x_T.

    Args:
        steps: Number of local steps.
        client_lr: Length of each.
        batch_size: Examples of each step, drawn without replacement; None for all.
    """

    steps: int
    client_lr: float
    batch_size: int | None = None

    def __post_init__(self) -> None:
        _require_count("local.steps", self.steps)
        require_positive("local.client_lr", self.client_lr)
        if self.batch_size is not None:
            _require_count("local.batch_size", self.batch_size)

    def batches(self, examples: int, rng: np.random.Generator) -> list[np.ndarray | None]:
        """One batch a step."""
        return [_draw(examples, self.batch_size, rng) for _ in range(self.steps)]


LOCAL_WORKS: dict[str, type] = {
    "full-gradient": FullGradient,
    "minibatch-gradient": MinibatchGradient,
    "local-steps": LocalSteps,
}


# Where a client uses all its examples, nothing is drawn, and making a generator costs more than asking for none.
_UNUSED = np.random.default_rng(0)


def batches_of(
    work: LocalWork,
    streams: SeededStreams,
    examples: int,
    round: int,  # noqa: A002
    client: int,
) -> list[np.ndarray | None]:
    """The examples of each of the client's steps in this round: the same in every engine."""
    batch_size = getattr(work, "batch_size", None)
    if batch_size is None or batch_size >= examples:
        return work.batches(examples, _UNUSED)
    return work.batches(examples, streams.source(Purpose.LOCAL_WORK, round, client).rng)


def make_signal(
    task: Task,
    model: Tensor,
    inputs: Tensor,
    labels: Tensor,
    client_lr: float | None,
    batches: list[np.ndarray | None],
) -> Tensor:
    """One client's signal `[params]`; the reference that batched engines are tested against.

    Args:
        task: Gives gradients.
        model: x, `[params]`.
        inputs: The client's inputs `[examples, *input_shape]`.
        labels: Its labels `[examples]`.
        client_lr: See `LocalWork.client_lr`.
        batches: See `LocalWork.batches`.
    """
    local = model
    for batch in batches:
        gradient = task.gradient(local, *_select(inputs, labels, batch))
        if client_lr is None:
            return gradient
        local = local - client_lr * gradient
    return model - local


def _select(inputs: Tensor, labels: Tensor, batch: np.ndarray | None) -> tuple[Tensor, Tensor]:
    return (inputs, labels) if batch is None else (inputs[batch], labels[batch])


def _draw(examples: int, size: int | None, rng: np.random.Generator) -> np.ndarray | None:
    if size is None or size >= examples:
        return None
    return np.sort(rng.choice(examples, size, replace=False))


def _require_count(key: str, value: int) -> None:
    if value < 1:
        raise UserError(key, "a whole number of at least 1", value, "Give a larger number")

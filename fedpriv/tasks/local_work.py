"""Local work: how a client makes its signal from the model and its data. The method does not care which."""

from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

import numpy as np
from torch import Tensor

from fedpriv.checks import positive_int, require_representable
from fedpriv.errors import UserError
from fedpriv.plugins import Registry
from fedpriv.streams import Purpose, SeededStreams
from fedpriv.tasks.task import Task

__all__ = [
    "LOCAL_WORKS",
    "FullGradient",
    "LocalEpochs",
    "LocalSteps",
    "LocalWork",
    "MinibatchGradient",
    "Walk",
    "make_signal",
]

MAX_STEPS = 100_000
MAX_EPOCHS = 10_000
"""More than anybody waits for; the batches of all steps of a round are drawn at once."""

# The examples of each step as positions in the client's data; None for all of them.
Batches = list[np.ndarray | None]
Signal = Literal["move", "gradient-sum", "gradient-mean"]


class LocalWork(Protocol):
    """A frozen dataclass that says which examples each step uses and how long each step is.

    `client_lr` None means one gradient, sent as it is. Otherwise the client walks x_{t+1} = x_t - client_lr grad_t
    over its steps and sends a pseudo-gradient, the one that `signal` says:

    * `move`: x_0 - x_T;
    * `gradient-sum`: (x_0 - x_T) / client_lr, the sum of the gradients on its way;
    * `gradient-mean`: (x_0 - x_T) / (client_lr T), their mean, as long as one gradient however many steps there are.
    """

    @property
    def client_lr(self) -> float | None:
        """Length of a local step, or None for a gradient."""
        ...

    @property
    def batch_size(self) -> int | None:
        """Examples of a step; a client that has no more draws nothing, and all do where it is None."""
        ...

    @property
    def signal(self) -> Signal | None:
        """Which pseudo-gradient is sent; None where `client_lr` is None."""
        ...

    def walked(self, examples: np.ndarray) -> np.ndarray:
        """How many examples clients go through in a round, `[clients]`, from how many they have."""
        ...

    def batches(self, examples: int, rng: np.random.Generator) -> Batches:
        """The examples of each step, of at least one; a client with more examples may take more steps."""
        ...


class _OneGradient:
    """What local work without steps says of itself."""

    @property
    def client_lr(self) -> None:
        """One gradient."""
        return

    @property
    def signal(self) -> None:
        """The gradient itself."""
        return


@dataclass(frozen=True, kw_only=True)
class FullGradient(_OneGradient):
    """The gradient of the client's mean loss over all its examples, exact on ragged clients."""

    @property
    def batch_size(self) -> None:
        """All examples."""
        return

    def walked(self, examples: np.ndarray) -> np.ndarray:
        """All examples."""
        return examples

    def batches(self, examples: int, rng: np.random.Generator) -> Batches:
        """All examples, once."""
        return [None]


@dataclass(frozen=True, kw_only=True)
class MinibatchGradient(_OneGradient):
    """The gradient of the mean loss over a fresh batch, drawn without replacement.

    Args:
        batch_size: Examples in the batch; a client that has fewer uses all.
    """

    batch_size: int

    def __post_init__(self) -> None:
        _require_count("local.batch_size", self.batch_size)

    def walked(self, examples: np.ndarray) -> np.ndarray:
        """A batch at most."""
        return np.minimum(examples, self.batch_size)

    def batches(self, examples: int, rng: np.random.Generator) -> Batches:
        """One batch."""
        return [_draw(examples, self.batch_size, rng)]


@dataclass(frozen=True, kw_only=True)
class LocalSteps:
    """Steps of (stochastic) gradient descent; the signal is the pseudo-gradient x_0 - x_T.

    Args:
        steps: Number of local steps, at most `MAX_STEPS`.
        client_lr: Length of each.
        batch_size: Examples of each step, drawn without replacement; None for all.
        signal: See `LocalWork`. `move` is left out of resolved configs: it was all there was.
    """

    steps: int
    client_lr: float
    batch_size: int | None = None
    signal: Signal = field(default="move", metadata={"absent_by_default": True})

    def __post_init__(self) -> None:
        _require_count("local.steps", self.steps, MAX_STEPS)
        require_representable("local.client_lr", self.client_lr)
        if self.batch_size is not None:
            _require_count("local.batch_size", self.batch_size)
        _require_signal(self.signal)

    def walked(self, examples: np.ndarray) -> np.ndarray:
        """A batch at most in every step."""
        return self.steps * (examples if self.batch_size is None else np.minimum(examples, self.batch_size))

    def batches(self, examples: int, rng: np.random.Generator) -> Batches:
        """One batch a step."""
        return [_draw(examples, self.batch_size, rng) for _ in range(self.steps)]


@dataclass(frozen=True, kw_only=True)
class LocalEpochs:
    """Incremental gradient: passes over all of the client's examples, one step a batch.

    Each pass uses every example once, so a client with more examples takes more steps. A pass over one batch of all
    examples is a step of gradient descent.

    Args:
        epochs: Number of passes, at most `MAX_EPOCHS`.
        client_lr: Length of each step.
        batch_size: Examples of each step, the last of a pass may have fewer; None for all.
        order: `fixed`, the examples as they lie, in every pass and round; or `reshuffled`, drawn anew for each pass.
        signal: See `LocalWork`.
    """

    epochs: int
    client_lr: float
    batch_size: int | None = None
    order: Literal["fixed", "reshuffled"] = "reshuffled"
    signal: Signal = "move"

    def __post_init__(self) -> None:
        _require_count("local.epochs", self.epochs, MAX_EPOCHS)
        require_representable("local.client_lr", self.client_lr)
        if self.batch_size is not None:
            _require_count("local.batch_size", self.batch_size)
        if self.order not in ("fixed", "reshuffled"):
            raise UserError("local.order", '"fixed" or "reshuffled"', repr(self.order), "Choose one of the two")
        _require_signal(self.signal)

    def walked(self, examples: np.ndarray) -> np.ndarray:
        """All examples in every pass."""
        return self.epochs * examples

    def batches(self, examples: int, rng: np.random.Generator) -> Batches:
        """Pass after pass, the batches that an order of the examples falls into."""
        size = self.batch_size
        if size is None or size >= examples:
            return [None] * self.epochs
        fixed = np.arange(examples)
        orders = (fixed if self.order == "fixed" else rng.permutation(examples) for _ in range(self.epochs))
        return [np.sort(order[start : start + size]) for order in orders for start in range(0, examples, size)]


LOCAL_WORKS: Registry[LocalWork] = Registry(
    "local work",
    {
        "full-gradient": FullGradient,
        "minibatch-gradient": MinibatchGradient,
        "local-steps": LocalSteps,
        "local-epochs": LocalEpochs,
    },
    protocol=LocalWork,
    group="fedpriv.local_works",
)


# Where a client uses all its examples, nothing is drawn, and making a generator costs more than asking for none.
_UNUSED = np.random.default_rng(0)


def batches_of(
    work: LocalWork,
    streams: SeededStreams,
    examples: int,
    round: int,
    client: int,
) -> Batches:
    """The examples of each of the client's steps in this round: the same in every engine."""
    if work.batch_size is None or work.batch_size >= examples:
        return work.batches(examples, _UNUSED)
    return work.batches(examples, streams.source(Purpose.LOCAL_WORK, round, client).rng)


class Walk:
    """The local steps of one client, or of several at once, and the signal that they make.

    Args:
        work: Gives the length of a step and the kind of signal; its `client_lr` is not None.
        start: x_0, `[params]`.

    Attributes:
        model: Where the client stands, `[params]`; `[clients, params]` for several that have taken a step.
    """

    def __init__(self, work: LocalWork, start: Tensor) -> None:
        if work.client_lr is None:
            raise ValueError(f"{work} takes no steps")
        self._lr = work.client_lr
        self._kind = work.signal
        self._start = self.model = start
        self._sum: Tensor | None = None

    def step(self, gradient: Tensor) -> None:
        """A step against `gradient`, `[params]` or `[clients, params]`; zero for a client that has finished."""
        self.model = self.model - self._lr * gradient
        if self._kind != "move":
            self._sum = gradient if self._sum is None else self._sum + gradient

    def signal(self, steps: Tensor | int) -> Tensor:
        """What is sent after `steps` steps, by client `[clients, 1]` for several.

        The sum of gradients is added up, not taken from the models: those are rounded, and a small `client_lr` would
        magnify that. So one step on all examples gives the full gradient, to the bit.
        """
        if self._sum is None:
            return self._start - self.model
        return self._sum if self._kind == "gradient-sum" else self._sum / steps


def make_signal(
    task: Task,
    model: Tensor,
    inputs: Tensor,
    labels: Tensor,
    work: LocalWork,
    batches: Batches,
) -> Tensor:
    """One client's signal `[params]`; the reference that batched engines are tested against.

    Args:
        task: Gives gradients.
        model: x, `[params]`.
        inputs: The client's inputs `[examples, *input_shape]`.
        labels: Its labels `[examples]`.
        work: What it does; see `LocalWork`.
        batches: See `LocalWork.batches`; at least one.
    """
    if work.client_lr is None:
        return task.gradient(model, *_select(inputs, labels, batches[0]))
    walk = Walk(work, model)
    for batch in batches:
        walk.step(task.gradient(walk.model, *_select(inputs, labels, batch)))
    return walk.signal(len(batches))


def _select(inputs: Tensor, labels: Tensor, batch: np.ndarray | None) -> tuple[Tensor, Tensor]:
    return (inputs, labels) if batch is None else (inputs[batch], labels[batch])


def _draw(examples: int, size: int | None, rng: np.random.Generator) -> np.ndarray | None:
    if size is None or size >= examples:
        return None
    return np.sort(rng.choice(examples, size, replace=False))


def _require_count(key: str, value: int, most: int | None = None) -> None:
    positive_int(key, value, "Give a larger number")
    if most is not None and value > most:
        raise UserError(key, f"at most {most:,}", value, "A client does all of them in one round: give less")


def _require_signal(kind: str) -> None:
    if kind not in get_args(Signal):
        expected = " or ".join(f'"{known}"' for known in get_args(Signal))
        raise UserError("local.signal", expected, repr(kind), "Choose one of the three")

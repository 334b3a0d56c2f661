"""Local work: how a client computes its signal from the model and its data. Methods do not depend on it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

import numpy as np
from torch import Tensor

from fedpriv.bounding import Clip
from fedpriv.checks import positive_int, require_representable
from fedpriv.errors import UserError
from fedpriv.mechanisms.noise import StepNoise
from fedpriv.plugins import Registry
from fedpriv.privacy.records import ExampleTerms
from fedpriv.streams import Purpose, SeededSource, Streams
from fedpriv.tasks.task import Task

__all__ = [
    "DPSGD",
    "LOCAL_WORKS",
    "ClientGradients",
    "ClippedGradients",
    "FullGradient",
    "LocalEpochs",
    "LocalSGD",
    "LocalSteps",
    "LocalWork",
    "MinibatchGradient",
    "PoissonGradient",
    "make_signal",
]

MAX_STEPS = 100_000
MAX_EPOCHS = 10_000
"""Largest numbers of steps and passes in a round; the batches of all of them are drawn at once."""

# The examples of each step as positions in the client's data; None for all of them.
Batches = list[np.ndarray | None]
Signal = Literal["pseudo-gradient", "gradient-sum", "gradient-mean"]
_FORMERLY = {"formerly": {"move": "pseudo-gradient"}}


class LocalWork(Protocol):
    """The settings of local work: the examples and the length of each step. A frozen dataclass.

    With `client_lr` None, the client sends one gradient. Otherwise it takes the steps
    x_{t+1} = x_t - client_lr grad_t and sends a pseudo-gradient, chosen by `signal`:

    * `pseudo-gradient`: x_0 - x_T;
    * `gradient-sum`: (x_0 - x_T) / client_lr, the sum of the gradients of its steps;
    * `gradient-mean`: (x_0 - x_T) / (client_lr T), their mean, as long as one gradient however many steps there are.
    """

    @property
    def client_lr(self) -> float | None:
        """Length of a local step; None for one gradient."""
        ...

    @property
    def batch_size(self) -> int | None:
        """Examples of a step. A client with no more than that uses all and draws nothing; so do all clients if None."""
        ...

    @property
    def signal(self) -> Signal | None:
        """The kind of pseudo-gradient; None if `client_lr` is None."""
        ...

    def walked(self, examples: np.ndarray) -> np.ndarray:
        """Return the number of examples that clients process in a round, `[clients]`, from their `examples`."""
        ...

    def batches(self, examples: int, rng: np.random.Generator) -> Batches:
        """Return the examples of each step, at least one step; a client with more examples may take more steps."""
        ...


class _OneGradient:
    """Base of local work without steps."""

    @property
    def client_lr(self) -> None:
        """None: one gradient."""
        return

    @property
    def signal(self) -> None:
        """None: the gradient itself."""
        return


@dataclass(frozen=True, kw_only=True)
class FullGradient(_OneGradient):
    """The gradient of the client's mean loss over all its examples, exact on ragged clients."""

    @property
    def batch_size(self) -> None:
        """None: all examples."""
        return

    def walked(self, examples: np.ndarray) -> np.ndarray:
        """Return the number of all examples; see `LocalWork.walked`."""
        return examples

    def batches(self, examples: int, rng: np.random.Generator) -> Batches:
        """Return one step on all examples."""
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
        """Return the size of one batch; see `LocalWork.walked`."""
        return np.minimum(examples, self.batch_size)

    def batches(self, examples: int, rng: np.random.Generator) -> Batches:
        """Return one batch."""
        return [_draw(examples, self.batch_size, rng)]


@dataclass(frozen=True, kw_only=True)
class LocalSteps:
    """Steps of (stochastic) gradient descent; the signal is the pseudo-gradient x_0 - x_T.

    Args:
        steps: Number of local steps, at most `MAX_STEPS`.
        client_lr: Length of each.
        batch_size: Examples of each step, drawn without replacement; None for all.
        signal: See `LocalWork`. Resolved configs omit `pseudo-gradient`, the only kind of older versions.
    """

    steps: int
    client_lr: float
    batch_size: int | None = None
    signal: Signal = field(default="pseudo-gradient", metadata={**_FORMERLY, "absent_by_default": True})

    def __post_init__(self) -> None:
        _require_count("local.steps", self.steps, MAX_STEPS)
        require_representable("local.client_lr", self.client_lr)
        if self.batch_size is not None:
            _require_count("local.batch_size", self.batch_size)
        _require_signal(self.signal)

    def walked(self, examples: np.ndarray) -> np.ndarray:
        """Return the examples of all steps; see `LocalWork.walked`."""
        return self.steps * (examples if self.batch_size is None else np.minimum(examples, self.batch_size))

    def batches(self, examples: int, rng: np.random.Generator) -> Batches:
        """Return one batch per step."""
        return [_draw(examples, self.batch_size, rng) for _ in range(self.steps)]


@dataclass(frozen=True, kw_only=True)
class LocalEpochs:
    """Incremental gradient: passes over all of the client's examples, one step a batch.

    Each pass uses every example once, so a client with more examples takes more steps. A pass over one batch of all
    examples is a step of gradient descent.

    Args:
        epochs: Number of passes, at most `MAX_EPOCHS`.
        client_lr: Length of each step.
        batch_size: Examples of each step; the last step of a pass may have fewer; None for all.
        order: `fixed`, the order of the data in every pass and round; or `reshuffled`, drawn for each pass.
        signal: See `LocalWork`.
    """

    epochs: int
    client_lr: float
    batch_size: int | None = None
    order: Literal["fixed", "reshuffled"] = "reshuffled"
    signal: Signal = field(default="pseudo-gradient", metadata=_FORMERLY)

    def __post_init__(self) -> None:
        _require_count("local.epochs", self.epochs, MAX_EPOCHS)
        require_representable("local.client_lr", self.client_lr)
        if self.batch_size is not None:
            _require_count("local.batch_size", self.batch_size)
        if self.order not in ("fixed", "reshuffled"):
            raise UserError("local.order", '"fixed" or "reshuffled"', repr(self.order), "Choose one of the two")
        _require_signal(self.signal)

    def walked(self, examples: np.ndarray) -> np.ndarray:
        """Return all examples of every pass; see `LocalWork.walked`."""
        return self.epochs * examples

    def batches(self, examples: int, rng: np.random.Generator) -> Batches:
        """Return the batches of all passes: consecutive pieces of the order of examples in each pass."""
        size = self.batch_size
        if size is None or size >= examples:
            return [None] * self.epochs
        fixed = np.arange(examples)
        orders = (fixed if self.order == "fixed" else rng.permutation(examples) for _ in range(self.epochs))
        return [np.sort(order[start : start + size]) for order in orders for start in range(0, examples, size)]


class _PoissonBatches:
    """Base of local work on batches that contain each example independently with the same probability."""

    rate: float

    @property
    def batch_size(self) -> int:
        """0: every client draws its batches, and a batch may be empty or contain all examples."""
        return 0

    def batches(self, examples: int, rng: np.random.Generator) -> Batches:
        """Return one batch per step."""
        return self.drawn(examples, rng.random)

    def drawn(self, examples: int, uniform: Callable[[int], np.ndarray]) -> Batches:
        """Return the batch of each step from uniform numbers in [0, 1)."""
        return [np.flatnonzero(uniform(examples) < self.rate) for _ in range(self._steps)]

    @property
    def _steps(self) -> int:
        return 1


@dataclass(frozen=True, kw_only=True)
class PoissonGradient(_PoissonBatches, _OneGradient):
    """The sum of the gradients of a random batch over its expected size; every example has its own coin.

    Args:
        rate: Probability with which each example is in the batch, above 0 and at most 1.
    """

    rate: float

    def __post_init__(self) -> None:
        _require_rate(self.rate)

    def walked(self, examples: np.ndarray) -> np.ndarray:
        """Return the expected size of the batch; see `LocalWork.walked`."""
        return np.ceil(examples * self.rate).astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class DPSGD(_PoissonBatches):
    """Local steps of DP-SGD (Abadi et al. 2016): noise on the sum of clipped gradients in every step.

    Only for `privacy.unit = "example"`, which determines clipping and noise. Everything after a step's noise is
    post-processing: the client's messages get no further noise.

    Args:
        rate: Probability with which each example is in a step's batch, above 0 and at most 1.
        steps: Number of local steps, at most `MAX_STEPS`.
        client_lr: Length of each.
        signal: See `LocalWork`.
    """

    rate: float
    steps: int
    client_lr: float
    signal: Signal = field(default="pseudo-gradient", metadata=_FORMERLY)

    def __post_init__(self) -> None:
        _require_rate(self.rate)
        _require_count("local.steps", self.steps, MAX_STEPS)
        require_representable("local.client_lr", self.client_lr)
        _require_signal(self.signal)

    def walked(self, examples: np.ndarray) -> np.ndarray:
        """Return the expected examples of all steps; see `LocalWork.walked`."""
        return self.steps * np.ceil(examples * self.rate).astype(np.int64)

    @property
    def _steps(self) -> int:
        return self.steps


LOCAL_WORKS: Registry[LocalWork] = Registry(
    "local work",
    {
        "full-gradient": FullGradient,
        "minibatch-gradient": MinibatchGradient,
        "local-steps": LocalSteps,
        "local-epochs": LocalEpochs,
        "poisson-gradient": PoissonGradient,
        "dp-sgd": DPSGD,
    },
    protocol=LocalWork,
    group="fedpriv.local_works",
)


# A client that uses all its examples draws nothing; a shared generator saves the cost of making one.
_UNUSED = np.random.default_rng(0)


def batches_of(
    work: LocalWork,
    streams: Streams,
    examples: int,
    round: int,
    client: int,
) -> Batches:
    """Return the examples of each of the client's steps in this round, the same in every engine.

    `streams` may be those of the operating system only for `poisson-gradient` and `dp-sgd`, whose batches are secret.
    """
    if isinstance(work, _PoissonBatches):
        return work.drawn(examples, streams.source(Purpose.LOCAL_WORK, round, client).uniform)
    if work.batch_size is None or work.batch_size >= examples:
        return work.batches(examples, _UNUSED)
    source = streams.source(Purpose.LOCAL_WORK, round, client)
    if not isinstance(source, SeededSource):
        raise ValueError(f"{work} draws its batches from a seed")
    return work.batches(examples, source.rng)


@dataclass(frozen=True, kw_only=True)
class ClippedGradients:
    """The gradients of one client in one round under `privacy.unit = "example"`.

    Args:
        terms: How the gradients of examples are bounded and weighted.
        noise: Noise on the sum of every step, for the route `steps`; None if the message gets the noise.
    """

    terms: ExampleTerms
    noise: StepNoise | None = None

    def gradient(self, task: Task, model: Tensor, inputs: Tensor, labels: Tensor, batch: np.ndarray | None) -> Tensor:
        """Return the sum of the bounded gradients of a batch over the public divisor, float64 `[params]`."""
        total = task.clipped_sum(model.to(task.dtype), *_select(inputs, labels, batch), self.terms.bounded)
        noised = total if self.noise is None else self.noise.release(total)
        return noised / self.terms.divisor(len(labels))


class LocalSGD:
    """The local steps of one client, or of several at once, and their signal.

    Args:
        work: Its `client_lr`, which is not None, is the length of a step; its `signal` the kind of signal.
        start: x_0, `[params]`.
        offset: Added to the gradient of each step, but not to the signal's sum of gradients, `[params]` or
            `[clients, params]`; None for none.

    Attributes:
        model: The local model `[params]`; `[clients, params]` for several clients after the first step.
    """

    def __init__(self, work: LocalWork, start: Tensor, offset: Tensor | None = None) -> None:
        if work.client_lr is None:
            raise ValueError(f"{work} takes no steps")
        self._lr = work.client_lr
        self._kind = work.signal
        self._offset = offset
        self._start = self.model = start
        self._sum: Tensor | None = None

    def step(self, gradient: Tensor, at_work: Tensor | None = None) -> None:
        """Take a step against `gradient`, `[params]` or `[clients, params]`; zero for a client that has finished.

        Args:
            gradient: The gradient of each client.
            at_work: 1 for clients that take this step and 0 for those that have finished, `[clients, 1]`; None if all
                take it.
        """
        direction = gradient
        if self._offset is not None:
            direction = gradient + (self._offset if at_work is None else self._offset * at_work)
        self.model = self.model - self._lr * direction
        if self._kind != "pseudo-gradient":
            self._sum = gradient if self._sum is None else self._sum + gradient

    def signal(self, steps: Tensor | int) -> Tensor:
        """Return the signal after `steps` steps: a number, or `[clients, 1]` for several clients.

        Gradients are added up, not computed from the models: models are rounded, and a small `client_lr` would
        magnify the error. So one step on all examples gives the full gradient, to the bit.
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
    clipped: ClippedGradients | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """Return one client's signal `[params]`; batched engines are tested against this reference.

    Args:
        task: Computes gradients.
        model: x, `[params]`.
        inputs: The client's inputs `[examples, *input_shape]`.
        labels: Its labels `[examples]`.
        work: See `LocalWork`.
        batches: See `LocalWork.batches`; at least one.
        clipped: Bounds the gradient of every example, and makes the signal float64; None for plain means.
        offset: Added to the gradient of each local step, `[params]`; see `Method.step_offset`. None for none.
    """
    if clipped is not None:
        _refuse_unaccounted(work, clipped.terms)

    def gradient(at: Tensor, batch: np.ndarray | None) -> Tensor:
        if clipped is not None:
            return clipped.gradient(task, at, inputs, labels, batch)
        mean = task.gradient(at, *_select(inputs, labels, batch))
        if isinstance(work, _PoissonBatches) and batch is not None and len(labels):
            mean *= len(batch) / (work.rate * len(labels))
        return mean

    if work.client_lr is None:
        return gradient(model, batches[0])
    steps = LocalSGD(work, model if clipped is None else model.double(), offset)
    for batch in batches:
        steps.step(gradient(steps.model, batch))
    return steps.signal(len(batches))


@dataclass(frozen=True)
class ClientGradients:
    """The gradients of one client in one round, for methods with their own signal; see `fedpriv.methods.Gradients`.

    Args:
        task: See `make_signal`.
        inputs: See `make_signal`.
        labels: See `make_signal`.
        work: See `make_signal`.
        batches: See `make_signal`; the same for all models.
        clipped: How the sums are weighted under the unit `example`, without noise; None to bound the whole signal.
    """

    task: Task
    inputs: Tensor
    labels: Tensor
    work: LocalWork
    batches: Batches
    clipped: ClippedGradients | None = None

    def mean(self, at: Tensor, clip_norm: float) -> Tensor:
        """See `fedpriv.methods.Gradients.mean`."""
        bound = Clip(clip_norm=clip_norm)
        if self.clipped is None:
            return bound(self._signal(at))
        examples, divisor = self._examples(self.clipped)
        return self.task.clipped_sum(at.to(self.task.dtype), *examples, bound) / divisor

    def change(self, at: Tensor, before: Tensor, radius: float) -> Tensor:
        """See `fedpriv.methods.Gradients.change`."""
        if self.clipped is None:
            moved = (self._signal(at).double() - self._signal(before).double()) / radius
            return Clip(clip_norm=1.0)(moved).to(at.dtype)
        examples, divisor = self._examples(self.clipped)
        models = at.to(self.task.dtype), before.to(self.task.dtype)
        return self.task.clipped_change(*models, *examples, radius) / divisor

    def _signal(self, at: Tensor) -> Tensor:
        return make_signal(self.task, at, self.inputs, self.labels, self.work, self.batches)

    def _examples(self, clipped: ClippedGradients) -> tuple[tuple[Tensor, Tensor], float]:
        """Return the examples of the only batch, and the number to divide their sum by."""
        _refuse_unaccounted(self.work, clipped.terms)
        if clipped.noise is not None or clipped.terms.steps:
            raise ValueError(f"{clipped} are not gradients at given models")
        return _select(self.inputs, self.labels, self.batches[0]), clipped.terms.divisor(len(self.labels))


def _refuse_unaccounted(work: LocalWork, terms: ExampleTerms) -> None:
    """Raise ValueError unless the batches and steps of `work` are those that the terms account for."""
    steps = work.steps if isinstance(work, DPSGD) else 0
    rate = work.rate if isinstance(work, DPSGD | PoissonGradient) else 1.0
    if not isinstance(work, DPSGD | PoissonGradient | FullGradient) or (rate, steps) != (terms.rate, terms.steps):
        raise ValueError(f"{work} is not the work that {terms} accounts for")


def _select(inputs: Tensor, labels: Tensor, batch: np.ndarray | None) -> tuple[Tensor, Tensor]:
    return (inputs, labels) if batch is None else (inputs[batch], labels[batch])


def _draw(examples: int, size: int | None, rng: np.random.Generator) -> np.ndarray | None:
    if size is None or size >= examples:
        return None
    return np.sort(rng.choice(examples, size, replace=False))


def _require_count(key: str, value: int, maximum: int | None = None) -> None:
    positive_int(key, value, "Give a larger number")
    if maximum is not None and value > maximum:
        raise UserError(key, f"at most {maximum:,}", value, "Give less: a client does all of them in one round")


def _require_rate(rate: float) -> None:
    if not 1e-6 <= rate <= 1.0:
        raise UserError("local.rate", "a probability from 1e-6 to 1", rate, "Give the share of examples in a batch")


def _require_signal(kind: str) -> None:
    if kind not in get_args(Signal):
        expected = " or ".join(f'"{known}"' for known in get_args(Signal))
        raise UserError("local.signal", expected, repr(kind), "Choose one of the three")

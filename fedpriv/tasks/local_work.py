"""Local work: how a client computes its signal from the model and its data. Methods do not depend on it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from fedpriv.bounding import Clip, row_norms
from fedpriv.checks import is_real, positive_int, real_within, require_representable
from fedpriv.data.mapped import rows_at
from fedpriv.errors import UserError
from fedpriv.mechanisms.noise import StepNoise
from fedpriv.plugins import Registry
from fedpriv.privacy.records import ExampleTerms
from fedpriv.streams import Purpose, SeededSource, Streams
from fedpriv.tasks.curricula import Pacing, by_loss, check_pacing, share_of
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
    "RecordSum",
    "make_signal",
]

MAX_STEPS = 100_000
MAX_EPOCHS = 10_000
"""Largest numbers of steps and passes in a round; the batches of all of them are drawn at once."""

# The examples of each step as positions in the client's data; None for all of them.
Batches = list[np.ndarray | None]
Signal = Literal["pseudo-gradient", "gradient-sum", "gradient-mean"]
_FORMERLY = {"formerly": {"move": "pseudo-gradient"}}
_LATER = {"absent_by_default": True}


class LocalWork(Protocol):
    """The settings of local work: the examples and the length of each step. A frozen dataclass.

    With `client_lr` None, the client sends one gradient. Otherwise it takes the steps
    x_{t+1} = x_t - client_lr grad_t and sends a pseudo-gradient, chosen by `signal`:

    * `pseudo-gradient`: x_0 - x_T;
    * `gradient-sum`: (x_0 - x_T) / client_lr, the sum of the gradients of its steps;
    * `gradient-mean`: (x_0 - x_T) / (client_lr T), their mean, as long as one gradient however many steps there are.

    Our works with steps also take `prox` (mu of FedProx, arXiv 1812.06127) and `ascent` (rho of FedSAM, arXiv
    2206.02618, and DP-FedSAM, arXiv 2303.11242). With them, a step's gradient is

        grad_t = grad F(x_t + ascent g / ||g||) + prox (x_t - x_0),     g = grad F(x_t),

    with F the mean loss of the step's examples, the same in both gradients; 0 switches each of them off. The methods
    are `dp-fedavg` with this local work.
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
class RecordSum(FullGradient):
    """The sum of the gradients of all examples over a public number, for analyses that count records.

    Args:
        records: M, the number that sums are divided by.
    """

    records: int

    def __post_init__(self) -> None:
        _require_count("local.records", self.records)


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
        prox: See `LocalWork`.
        ascent: See `LocalWork`.
    """

    steps: int
    client_lr: float
    batch_size: int | None = None
    signal: Signal = field(default="pseudo-gradient", metadata={**_FORMERLY, **_LATER})
    prox: float = field(default=0.0, metadata=_LATER)
    ascent: float = field(default=0.0, metadata=_LATER)

    def __post_init__(self) -> None:
        _require_count("local.steps", self.steps, MAX_STEPS)
        require_representable("local.client_lr", self.client_lr)
        if self.batch_size is not None:
            _require_count("local.batch_size", self.batch_size)
        _require_signal(self.signal)
        _require_changes(self.prox, self.ascent)

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
        order: `fixed`, the order of the data in every pass and round; `reshuffled`, drawn for each pass; or `by-loss`,
            from the smallest to the largest loss that the examples have under the round's model.
        signal: See `LocalWork`.
        prox: See `LocalWork`.
        ascent: See `LocalWork`.
        pacing: Only with `by-loss`: a client begins with the examples of smallest loss, and their share grows to all;
            see `fedpriv.tasks.curricula`. None for all examples in every round.
        pacing_start: The share in the first round, above 0 and at most 1; with `pacing`.
        pacing_rounds: The number of rounds before all examples are used; with `pacing`.
    """

    epochs: int
    client_lr: float
    batch_size: int | None = None
    order: Literal["fixed", "reshuffled", "by-loss"] = "reshuffled"
    signal: Signal = field(default="pseudo-gradient", metadata=_FORMERLY)
    prox: float = field(default=0.0, metadata=_LATER)
    ascent: float = field(default=0.0, metadata=_LATER)
    pacing: Pacing | None = None
    pacing_start: float | None = None
    pacing_rounds: int | None = None

    def __post_init__(self) -> None:
        _require_count("local.epochs", self.epochs, MAX_EPOCHS)
        require_representable("local.client_lr", self.client_lr)
        if self.batch_size is not None:
            _require_count("local.batch_size", self.batch_size)
        if self.order not in ("fixed", "reshuffled", "by-loss"):
            expected = '"fixed" or "reshuffled" or "by-loss"'
            raise UserError("local.order", expected, repr(self.order), "Choose one of the three")
        _require_signal(self.signal)
        _require_changes(self.prox, self.ascent)
        check_pacing(self.pacing, self.pacing_start, self.pacing_rounds, ordered=self.order == "by-loss")

    def walked(self, examples: np.ndarray) -> np.ndarray:
        """Return all examples of every pass, an upper bound with `pacing`; see `LocalWork.walked`."""
        return self.epochs * examples

    def batches(self, examples: int, rng: np.random.Generator) -> Batches:
        """Return the batches of all passes: consecutive pieces of the order of examples in each pass.

        With `by-loss` they are those of `fixed`, for counts that may not depend on losses; clients use `by_loss`.
        """
        size = self.batch_size
        if size is None or size >= examples:
            return [None] * self.epochs
        fixed = np.arange(examples)
        drawn = self.order == "reshuffled"
        orders = np.stack([rng.permutation(examples) if drawn else fixed for _ in range(self.epochs)])
        even = examples // size * size
        pieces = np.sort(orders[:, :even].reshape(self.epochs, -1, size), axis=2)
        if even == examples:
            return list(pieces.reshape(-1, size))
        return [batch for order, pass_ in zip(orders, pieces, strict=True) for batch in (*pass_, np.sort(order[even:]))]

    def by_loss(self, losses: np.ndarray, round: int) -> Batches:
        """Return the batches of all passes with `order = "by-loss"`, from the losses `[examples]` of the examples."""
        share = share_of(self.pacing, self.pacing_start, self.pacing_rounds, round)
        return by_loss(losses, share, self.batch_size) * self.epochs


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
        return [np.flatnonzero(uniform(examples) < self.rate) for _ in range(self.queries)]

    @property
    def queries(self) -> int:
        """Number of batches, and of sums of gradients, in a round."""
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
        prox: See `LocalWork`.
        ascent: See `LocalWork`. The two gradients of a step have independent batches and noise here, and each of them
            is accounted for: a step costs as much as two.
    """

    rate: float
    steps: int
    client_lr: float
    signal: Signal = field(default="pseudo-gradient", metadata=_FORMERLY)
    prox: float = field(default=0.0, metadata=_LATER)
    ascent: float = field(default=0.0, metadata=_LATER)

    def __post_init__(self) -> None:
        _require_rate(self.rate)
        _require_count("local.steps", self.steps, MAX_STEPS)
        require_representable("local.client_lr", self.client_lr)
        _require_signal(self.signal)
        _require_changes(self.prox, self.ascent)

    def walked(self, examples: np.ndarray) -> np.ndarray:
        """Return the expected examples of all steps; see `LocalWork.walked`."""
        return self.queries * np.ceil(examples * self.rate).astype(np.int64)

    @property
    def queries(self) -> int:
        """Number of noised sums of gradients in a round: one for each step, or two with `ascent`."""
        return 2 * self.steps if self.ascent > 0.0 else self.steps


LOCAL_WORKS: Registry[LocalWork] = Registry(
    "local work",
    {
        "full-gradient": FullGradient,
        "record-sum": RecordSum,
        "minibatch-gradient": MinibatchGradient,
        "local-steps": LocalSteps,
        "local-epochs": LocalEpochs,
        "poisson-gradient": PoissonGradient,
        "dp-sgd": DPSGD,
    },
    protocol=LocalWork,
    group="fedpriv.local_works",
    hidden=("record-sum",),
)


# A client that uses all its examples draws nothing; a shared generator saves the cost of making one.
_UNUSED = np.random.default_rng(0)


def batches_of(
    work: LocalWork,
    streams: Streams,
    examples: int,
    round: int,
    client: int,
    losses: Callable[[], Tensor] | None = None,
) -> Batches:
    """Return the examples of each of the client's steps in this round, the same in every engine.

    With `ascent`, `dp-sgd` has two batches for each step.

    Args:
        work: See `LocalWork`.
        streams: Source of the draws; those of the operating system only for `poisson-gradient` and `dp-sgd`, whose
            batches are secret.
        examples: Number of the client's examples.
        round: The round, from 1.
        client: Id of the client.
        losses: Returns the losses `[examples]` of its examples under the round's model; called only for `by-loss`.
    """
    if isinstance(work, LocalEpochs) and work.order == "by-loss":
        if losses is None:
            raise ValueError(f"{work} needs the losses of the examples")
        return work.by_loss(losses().double().cpu().numpy(), round)
    if isinstance(work, _PoissonBatches):
        return work.drawn(examples, streams.source(Purpose.LOCAL_WORK, round, client).uniform)
    if draws_nothing(work, examples):
        return work.batches(examples, _UNUSED)
    source = streams.source(Purpose.LOCAL_WORK, round, client)
    if not isinstance(source, SeededSource):
        raise ValueError(f"{work} draws its batches from a seed")
    return work.batches(examples, source.rng)


def draws_nothing(work: LocalWork, examples: int) -> bool:
    """Return True if the batches of a client depend on its number of examples alone, in all rounds."""
    if isinstance(work, _PoissonBatches) or (isinstance(work, LocalEpochs) and work.order == "by-loss"):
        return False
    return work.batch_size is None or work.batch_size >= examples


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
        prox: Added to the `prox` of the local work.

    Attributes:
        model: The local model `[params]`; `[clients, params]` for several clients after the first step. Further steps
            change it in place.
    """

    def __init__(self, work: LocalWork, start: Tensor, offset: Tensor | None = None, prox: float = 0.0) -> None:
        if work.client_lr is None:
            raise ValueError(f"{work} takes no steps")
        own, self._ascent = changes_of(work)
        self._prox = own + prox
        self._lr = work.client_lr
        self._kind = work.signal
        self._offset = offset
        self._start = self.model = start
        self._sum: Tensor | None = None
        self._way: Tensor | None = None  # the last step, in memory that the next one overwrites

    def step(self, gradient_at: Callable[[Tensor], Tensor], at_work: Tensor | None = None) -> None:
        """Take a step against the gradient.

        Args:
            gradient_at: Returns the gradient of each client, `[params]` or `[clients, params]`, at their models; zero
                for a client that has finished. Called once, or twice with `ascent`.
            at_work: 1 for clients that take this step and 0 for those that have finished, `[clients, 1]`; None if all
                take it.
        """
        gradient = gradient_at(self.model)
        if self._ascent > 0.0:
            gradient = gradient_at(self.model + self._ascent * _directions(gradient))
        if self._prox > 0.0:
            pull = self._prox * (self.model - self._start)
            gradient = gradient + (pull if at_work is None else pull * at_work)
        direction = gradient
        if self._offset is not None:
            direction = gradient + (self._offset if at_work is None else self._offset * at_work)
        if self._way is None:
            self._way = self._lr * direction
            self.model = self.model - self._way
        else:
            self.model.sub_(torch.mul(direction, self._lr, out=self._way))
        if self._kind != "pseudo-gradient":
            self._sum = gradient.clone() if self._sum is None else self._sum.add_(gradient)

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
    prox: float = 0.0,
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
        prox: See `Method.step_prox`.
    """
    if clipped is not None:
        _refuse_unaccounted(work, clipped.terms)

    def gradient(at: Tensor, batch: np.ndarray | None) -> Tensor:
        if clipped is not None:
            return clipped.gradient(task, at, inputs, labels, batch)
        mean = task.gradient(at, *_select(inputs, labels, batch))
        if isinstance(work, _PoissonBatches) and batch is not None and len(labels):
            mean *= len(batch) / (work.rate * len(labels))
        return mean * (len(labels) / work.records) if isinstance(work, RecordSum) else mean

    if work.client_lr is None:
        return gradient(model, batches[0])
    local = LocalSGD(work, model if clipped is None else model.double(), offset, prox)
    steps = work.steps if isinstance(work, DPSGD) else len(batches)
    queries = (batch for batch in batches for _ in range(uses_of_batch(work)))
    for _ in range(steps):
        local.step(lambda at: gradient(at, next(queries)))
    return local.signal(steps)


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
    steps = work.queries if isinstance(work, DPSGD) else 0
    rate = work.rate if isinstance(work, DPSGD | PoissonGradient) else 1.0
    if not isinstance(work, DPSGD | PoissonGradient | FullGradient) or (rate, steps) != (terms.rate, terms.steps):
        raise ValueError(f"{work} is not the work that {terms} accounts for")


def changes_of(work: LocalWork) -> tuple[float, float]:
    """Return `prox` and `ascent` of local work; zeros for works that do not have them."""
    return (work.prox, work.ascent) if isinstance(work, LocalSteps | LocalEpochs | DPSGD) else (0.0, 0.0)


def uses_of_batch(work: LocalWork) -> int:
    """Return the number of gradients that a client computes on each of its batches: 2 for ascents on the same batch."""
    return 2 if changes_of(work)[1] > 0.0 and not isinstance(work, DPSGD) else 1


def _directions(gradients: Tensor) -> Tensor:
    """Return g / ||g|| of each row `[..., params]`; zero if g is zero."""
    exact = gradients.double()
    lengths = row_norms(exact)
    return torch.where(lengths > 0.0, exact / lengths, 0.0).to(gradients.dtype)


def _select(inputs: Tensor, labels: Tensor, batch: np.ndarray | None) -> tuple[Tensor, Tensor]:
    if batch is None:
        return inputs, labels
    at = torch.from_numpy(batch).to(inputs.device)
    return rows_at(inputs, at), labels[at]


def _draw(examples: int, size: int | None, rng: np.random.Generator) -> np.ndarray | None:
    if size is None or size >= examples:
        return None
    return np.sort(rng.choice(examples, size, replace=False))


def _require_count(key: str, value: int, maximum: int | None = None) -> None:
    positive_int(key, value, "Give a larger number")
    if maximum is not None and value > maximum:
        raise UserError(key, f"at most {maximum:,}", value, "Give less: a client does all of them in one round")


def _require_rate(rate: float) -> None:
    real_within("local.rate", rate, 1e-6, 1.0, "Give the share of examples in a batch")


def _require_changes(prox: float, ascent: float) -> None:
    for key, value in (("prox", prox), ("ascent", ascent)):
        if not is_real(value, 0.0, 0.0):
            require_representable(f"local.{key}", value)


def _require_signal(kind: str) -> None:
    if kind not in get_args(Signal):
        expected = " or ".join(f'"{known}"' for known in get_args(Signal))
        raise UserError("local.signal", expected, repr(kind), "Choose one of the three")

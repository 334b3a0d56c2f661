"""Server optimizers: momentum and adaptive steps along the direction of any method.

Reddi, Charles, Zaheer, Garrett, Rush, Konecny, Kumar, McMahan 2021, "Adaptive Federated Optimization", arXiv
2003.00295 (FedAdam, FedYogi, FedAdagrad); Hsu, Qi, Brown 2019, "Measuring the Effects of Non-Identical Data
Distribution for Federated Visual Classification", arXiv 1909.06335 (FedAvgM). A method's own server rule steps from x
to x - gamma d. The optimizer transforms d coordinate by coordinate, and the server steps along the new direction:

    momentum    b <- mu b + d                                           x <- x - gamma b
    adam        m <- b1 m + (1 - b1) d     s <- b2 s + (1 - b2) d^2     x <- x - gamma m' / (sqrt(s') + tau)
    yogi        m as above                 s <- s - (1 - b2) d^2 sign(s - d^2)     x <- x - gamma m / (sqrt(s) + tau)
    adagrad     m as above                 s <- s + d^2                            the same

with m' = m / (1 - b1^t) and s' = s / (1 - b2^t) after t rounds, as in Kingma and Ba; FedAdam has m' = m, s' = s.

| the papers' letter | here | who keeps it |
|---|---|---|
| x | `model` | server |
| gamma (eta) | `server_lr` of the method | server |
| d (minus Delta) | the direction of the method's server rule | not kept |
| b, m | `optimizer_mean` | server |
| s (v) | `optimizer_square` | server |
| t | `optimizer_rounds` | server |
| mu (beta), b1, b2, tau | `momentum`, `beta1`, `beta2`, `tau` | server |

An optimizer acts only on values that the server releases anyway: it changes neither privacy nor messages nor clients'
memories. The squares contain the noise on the mean message. If the noise is larger than the message, every coordinate's
step is near gamma m / (its standard deviation), for any data. Unlike in the papers, s starts at zero, as in
`torch.optim`, not at tau^2.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor
from typing_extensions import TypeVar

from fedpriv.bounding import Bounded
from fedpriv.checks import real_within, require_fraction
from fedpriv.errors import UserError
from fedpriv.feedback import Feedback, Release
from fedpriv.methods.base import AroundMethod, ClientStateT, Constrained, Method, Row, ServerState
from fedpriv.plugins import Registry
from fedpriv.vectors import State, joined, parted, rebuilt

__all__ = [
    "SERVER_OPTIMIZERS",
    "Adagrad",
    "Adam",
    "Momentum",
    "ServerOptimized",
    "ServerOptimizer",
    "Yogi",
    "optimized",
]

MIN_TAU = 1e-12
"""Squares are kept in float32, which loses those of directions below 1e-23; their steps are then direction / tau."""


MAX_TAU = 1e20
"""Above this, steps are too short for float32."""


OptimizerStateT = TypeVar("OptimizerStateT", bound=State, default=Any)


class ServerOptimizer(Protocol[OptimizerStateT]):
    """A frozen dataclass of hyperparameters with one rule, pure and coordinate by coordinate."""

    def init(self, model: Tensor) -> OptimizerStateT:
        """Return the state before the first round: a NamedTuple of zeros, `[params]` or `[1]`, named `optimizer_...`.

        Names must differ from those of all methods' states.
        """
        ...

    def step(self, state: OptimizerStateT, direction: Tensor) -> tuple[Tensor, OptimizerStateT]:
        """Return the new direction `[params]` from a method's, and the new state, both float64."""
        ...


class Velocity(NamedTuple):
    """`b`, `[params]`."""

    optimizer_mean: Tensor


class Moments(NamedTuple):
    """`m` and `s`, `[params]`."""

    optimizer_mean: Tensor
    optimizer_square: Tensor


class CountedMoments(NamedTuple):
    """`m` and `s`, `[params]`, and `t`, `[1]`."""

    optimizer_mean: Tensor
    optimizer_square: Tensor
    optimizer_rounds: Tensor


@dataclass(frozen=True, kw_only=True)
class Momentum:
    """Heavy-ball momentum (FedAvgM), as in `torch.optim.SGD`.

    Args:
        momentum: mu; 0 is the method without momentum.
    """

    momentum: float = 0.9

    def __post_init__(self) -> None:
        require_fraction("server.momentum", self.momentum)

    def init(self, model: Tensor) -> Velocity:
        """Return b = 0."""
        return Velocity(torch.zeros_like(model))

    def step(self, state: Velocity, direction: Tensor) -> tuple[Tensor, Velocity]:
        """See `ServerOptimizer.step`."""
        mean = self.momentum * state.optimizer_mean + direction
        return mean, Velocity(mean)


@dataclass(frozen=True, kw_only=True)
class Adam:
    """Adam (FedAdam): steps divided by the root of the mean square of past directions.

    Args:
        beta1: b1.
        beta2: b2.
        tau: Added to the root; shorter directions give shorter steps.
        bias_correction: Correct means over few rounds for their zero start, as in `torch.optim.Adam` but not FedAdam.
    """

    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3
    bias_correction: bool = True

    def __post_init__(self) -> None:
        _check(self.tau, beta1=self.beta1, beta2=self.beta2)

    def init(self, model: Tensor) -> CountedMoments:
        """Return zeros."""
        return CountedMoments(torch.zeros_like(model), torch.zeros_like(model), model.new_zeros(1))

    def step(self, state: CountedMoments, direction: Tensor) -> tuple[Tensor, CountedMoments]:
        """See `ServerOptimizer.step`."""
        mean = _average(self.beta1, state.optimizer_mean, direction)
        square, rounds = _average(self.beta2, state.optimizer_square, direction**2), state.optimizer_rounds + 1.0
        seen = (1.0 - self.beta1**rounds, 1.0 - self.beta2**rounds) if self.bias_correction else (1.0, 1.0)
        step = mean / seen[0] / ((square / seen[1]).sqrt() + self.tau)
        return step, CountedMoments(mean, square, rounds)


@dataclass(frozen=True, kw_only=True)
class Yogi:
    """Yogi (FedYogi): Adam with a mean square that moves by at most the new square.

    Args:
        beta1: b1.
        beta2: b2.
        tau: Added to the root.
    """

    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        _check(self.tau, beta1=self.beta1, beta2=self.beta2)

    def init(self, model: Tensor) -> Moments:
        """Return zeros."""
        return Moments(torch.zeros_like(model), torch.zeros_like(model))

    def step(self, state: Moments, direction: Tensor) -> tuple[Tensor, Moments]:
        """See `ServerOptimizer.step`."""
        mean, new = _average(self.beta1, state.optimizer_mean, direction), direction**2
        square = state.optimizer_square - (1.0 - self.beta2) * new * torch.sign(state.optimizer_square - new)
        return mean / (square.sqrt() + self.tau), Moments(mean, square)


@dataclass(frozen=True, kw_only=True)
class Adagrad:
    """Adagrad (FedAdagrad): steps divided by the root of the sum of all past squares.

    Args:
        beta1: b1; 0 as in `torch.optim.Adagrad`.
        tau: Added to the root.
    """

    beta1: float = 0.0
    tau: float = 1e-3

    def __post_init__(self) -> None:
        _check(self.tau, beta1=self.beta1)

    def init(self, model: Tensor) -> Moments:
        """Return zeros."""
        return Moments(torch.zeros_like(model), torch.zeros_like(model))

    def step(self, state: Moments, direction: Tensor) -> tuple[Tensor, Moments]:
        """See `ServerOptimizer.step`."""
        mean, square = _average(self.beta1, state.optimizer_mean, direction), state.optimizer_square + direction**2
        return mean / (square.sqrt() + self.tau), Moments(mean, square)


SERVER_OPTIMIZERS: Registry[ServerOptimizer] = Registry(
    "server optimizer",
    {"momentum": Momentum, "adam": Adam, "yogi": Yogi, "adagrad": Adagrad},
    protocol=ServerOptimizer,
    group="fedpriv.server_optimizers",
    wrap="fedpriv.methods.torch_optimizers:TorchOptimizer",
)


@dataclass(frozen=True, kw_only=True)
class ServerOptimized(AroundMethod[ClientStateT]):
    """A method with a server optimizer: the server transforms the method's direction; clients are unaffected.

    Its server state is the method's state followed by the optimizer's.

    Args:
        method: The method; its `server_lr` is the step size.
        optimizer: The optimizer that transforms the method's direction.
    """

    row: ClassVar[Row] = Row("the method's", memory="the method's", server="momentum, Adam, Yogi or Adagrad")

    method: Method[ClientStateT]
    optimizer: ServerOptimizer

    def __post_init__(self) -> None:
        inner = self.method.client_part
        if isinstance(inner, Constrained):
            expected = f"no such table with a method that keeps to {inner.steps_into}"
            remedy = "Remove [server]: an optimizer's steps lead to other models"
            raise UserError("[server]", expected, type(self.optimizer).__name__, remedy)

    @property
    def client_part(self) -> Method[ClientStateT]:
        """The method's client part."""
        return self.method.client_part

    @property
    def feedback(self) -> Feedback | None:
        """The method's."""
        return self.method.feedback

    @property
    def bounded(self) -> Bounded:
        """The method's."""
        return self.method.bounded

    @property
    def needs_shared(self) -> bool:
        """The method's."""
        return self.method.needs_shared

    def init_server(self, model: Tensor) -> ServerState:
        """Return the method's state followed by the optimizer's zeros."""
        return joined(self.method.init_server(model), self.optimizer.init(model))

    def shared(self, state: ServerState) -> Tensor | None:
        """Return the method's."""
        return self.method.shared(self._parts(state)[0])

    def in_round(self, shared: Tensor) -> Method[ClientStateT]:
        """Return the method's, without the optimizer."""
        return self.method.in_round(shared)

    def step_offset(self, state: ClientStateT, shared: Tensor | None) -> Tensor | None:
        """Return the method's."""
        return self.method.step_offset(state, shared)

    def client_rule(
        self,
        state: ClientStateT,
        signal: Tensor,
        release: Release | None,
        round: int,
    ) -> tuple[Tensor, ClientStateT]:
        """See `Method.client_rule`; the method's rule."""
        return self.method.client_rule(state, signal, release, round)

    def server_rule(self, state: ServerState, mean_message: Tensor, sampling_prob: float) -> tuple[Tensor, ServerState]:
        """See `Method.server_rule`. The optimizer computes in float64."""
        own, past = self._parts(state)
        direction, own = self.method.server_rule(own, mean_message, sampling_prob)
        direction, after = self.optimizer.step(rebuilt(past, (each.double() for each in past)), direction.double())
        kept = rebuilt(past, (new.to(old.dtype) for new, old in zip(after, past, strict=True)))
        return direction, joined(own, kept)

    def _parts(self, state: ServerState) -> tuple[ServerState, State]:
        """Return the method's state and the optimizer's."""
        nothing = state.model[:0]
        return parted(state, self.method.init_server(nothing), self.optimizer.init(nothing))


def optimized(method: Method[ClientStateT], optimizer: ServerOptimizer | None) -> Method[ClientStateT]:
    """Return the method with an optimizer at its server; the method itself for None."""
    return method if optimizer is None else ServerOptimized(method=method, optimizer=optimizer)


def _average(beta: float, past: Tensor, new: Tensor) -> Tensor:
    return beta * past + (1.0 - beta) * new


def _check(tau: float, **betas: float) -> None:
    for key, beta in betas.items():
        require_fraction(f"server.{key}", beta)
    remedy = "Set it, usually to 1e-3; below the range, squares too small for float32 give steps of any length"
    real_within("server.tau", tau, MIN_TAU, MAX_TAU, remedy)

"""One round as three pure functions, with the network between them.

    server:  broadcast = begin_round(rules, state, k)
    client:  message, state_i = client_round(rules, client, state_i, signal, k)
    server:  state = finish_round(rules, state, k, total)

Whoever owns the network (a loop, a batch, Ray, Flower) calls the same three. The sum of the messages is all that
the server needs, which makes it the boundary of secure aggregation.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from fedpriv.aggregation.exact import ExactSum, grid_step
from fedpriv.errors import UserError
from fedpriv.feedback import Release
from fedpriv.mechanisms.base import Mechanism, MechanismState
from fedpriv.mechanisms.gaussian import release_grid
from fedpriv.mechanisms.noise import Gaussian, max_level, release_message, release_rows
from fedpriv.methods import ClientState, Method, ServerState, has_memory, server_step
from fedpriv.privacy import PrivacyPlan, Sampling
from fedpriv.streams import Purpose, Streams
from fedpriv.vectors import joined, norm, parted

__all__ = [
    "Agreement",
    "Broadcast",
    "ClientRules",
    "ServerRules",
    "Total",
    "agree",
    "apply_client_rule",
    "begin_round",
    "capacity_of",
    "client_round",
    "counted_norms",
    "finish_round",
    "signal_to_noise",
    "total_of",
]


@dataclass(frozen=True, kw_only=True)
class ClientRules:
    """What a client needs to know of the agreement.

    Args:
        method: Whose client rule it follows.
        noise_stddev: Standard deviation per coordinate of the noise that it adds to its message; 0 for none.
        streams: Where its noise comes from.
    """

    method: Method
    noise_stddev: float
    streams: Streams

    @property
    def release_grid(self) -> float | None:
        """G, of which every coordinate of a message with noise is a multiple; None without noise."""
        return release_grid(self.noise_stddev) if self.noise_stddev > 0.0 else None

    @property
    def message_limit(self) -> float:
        """Largest absolute value of a coordinate of a message: its bound and 16 standard deviations of noise."""
        bound, grid = self.method.bounded.l2_bound, self.release_grid
        return bound if grid is None else max_level(bound, self.noise_stddev) * grid

    def release(self, round: int, client: int) -> Release | None:
        """Return the function that noises the message `[params]` of one client in `round`; None without noise."""
        if self.noise_stddev == 0.0:
            return None
        level = max_level(self.method.bounded.l2_bound, self.noise_stddev)
        return lambda message: release_message(self.streams, self.noise_stddev, level, message, round, client)

    def release_rows(self, round: int, clients: Sequence[int]) -> Release | None:
        """Return the same for the messages `[clients, params]` of several clients."""
        if self.noise_stddev == 0.0:
            return None
        level = max_level(self.method.bounded.l2_bound, self.noise_stddev)
        return lambda messages: release_rows(self.streams, self.noise_stddev, level, messages, round, clients)


@dataclass(frozen=True, kw_only=True)
class ServerRules:
    """What the server needs to know of the agreement.

    Args:
        method: Whose server rule it follows.
        sampling: Who takes part in a round.
        mechanism: Adds its noise to the sum.
        streams: Where cohorts and its noise come from.
    """

    method: Method
    sampling: Sampling
    mechanism: Mechanism
    streams: Streams

    @property
    def noise_stddev(self) -> float:
        """Standard deviation per coordinate of the noise that the server adds to the sum; 0 for none."""
        return self.mechanism.stddev

    def init(self, model: Tensor) -> ServerState:
        """The server's state before the first round, from the model `[params]`: the method's, and the mechanism's."""
        return joined(self.method.init_server(model), self.mechanism.init(len(model)))

    def begin_anew(self, state: ServerState) -> ServerState:
        """The state where all memories begin anew and the model stays; noise goes on from what it remembers."""
        _, noise = self.parts(state)
        return joined(self.method.init_server(state.model), noise)

    def parts(self, state: ServerState) -> tuple[ServerState, MechanismState]:
        """What the method and its optimiser remember, and what the mechanism does."""
        return parted(state, self.method.init_server(state.model[:0]), self.mechanism.init(0))


class Agreement(NamedTuple):
    """What both sides hold to: the server's rules, the clients' rules, and what is promised (None: nothing)."""

    server: ServerRules
    client: ClientRules
    plan: PrivacyPlan | None


# Rounding to the grid may lengthen a message by this share of its bound, which the bounded maps leave free.
_LONGER = 2.0**-22


# By how much a float32 norm may exceed the bound in the rules of other packages, as a share.
_ROUNDED = 1e-6


class Broadcast(NamedTuple):
    """What goes out in a round: its number (from 1), the model `[params]`, and to whom (ascending client ids).

    `capacity` is how many messages the round's sum must hold, the same in every round of a run: it decides the grid
    on which they are added (`fedpriv.aggregation.exact`), and the actual number is a secret. Sums of parts of a cohort,
    with the capacity of the whole, add up to the sum of the whole, to the bit. None stands for the length of `cohort`.

    `part` tells the broadcasts of one round apart, where clients start from different models.
    """

    round: int
    model: Tensor
    cohort: np.ndarray
    capacity: int | None = None
    part: int = 0

    def empty_sum(self, rules: "ClientRules", device: torch.device | str = "cpu") -> ExactSum:
        """Where the round's messages are added, whoever sends them in whatever order."""
        capacity, size = len(self.cohort) if self.capacity is None else self.capacity, self.model.shape[-1]
        step, bound = grid_step(rules.message_limit, capacity), rules.method.bounded.l2_bound
        if rules.noise_stddev == 0.0 and 0.5 * step * math.sqrt(size) > _LONGER * bound:
            expected = f"fewer than {capacity:,} clients a round with {size:,} parameters"
            remedy = "Take a smaller cohort or model: rounding could lengthen a message beyond its bound"
            raise UserError("cohort", expected, f"{capacity:,}", remedy)
        return ExactSum(size, rules.message_limit, capacity, device)


class Total(NamedTuple):
    """What comes back: the sum of the messages `[params]`, float64 on the CPU, and figures that are not private.

    The sum is not rounded before the noise is on it: rounding a sum of many messages to float32 can move it by more
    when one client comes or goes than that client's bound.

    `messages` counts the senders, `non_finite` those whose signal or memory was not finite and whose message was the
    bounded map of nothing; `signal_norm` is the mean l2 norm of the others' signals (NaN if there is none).
    """

    sum: Tensor
    messages: int
    non_finite: int
    signal_norm: float


def agree(method: Method, sampling: Sampling, plan: PrivacyPlan | None, streams: Streams) -> Agreement:
    """The agreement of server and clients: the plan's noise goes to either as its trust says.

    Raises:
        UserError: If the method needs noise at the client and the plan puts it at the server, or if plan and
            method disagree about the bound.
    """
    server_stddev = client_stddev = 0.0
    if plan is not None:
        if plan.l2_bound != method.bounded.l2_bound or plan.sampling != sampling:
            raise ValueError(f"the plan is for another method or cohort: {plan}, {method}, {sampling}")
        if has_memory(method) and not plan.client_memory:
            raise ValueError(f"the plan is for clients without memory, and {method} has one: {plan}")
        if method.needs_client_noise and not plan.trust_rules.clients_add_noise:
            raise UserError(
                "method.memory",
                'privacy.trust = "local" with sent memory',
                f'privacy.trust = "{plan.trust}"',
                "Sent memory remembers each client's own noise; choose trust local or noiseless memory",
            )
        server_stddev, client_stddev = plan.trust_rules.split(plan.noise_stddev, sampling.expected_size)
    return Agreement(
        ServerRules(method=method, sampling=sampling, mechanism=Gaussian(server_stddev), streams=streams),
        ClientRules(method=method.client_part, noise_stddev=client_stddev, streams=streams),
        plan,
    )


def begin_round(rules: ServerRules, state: ServerState, round: int) -> Broadcast:
    """What the server sends in `round`."""
    cohort = rules.sampling.cohort(rules.streams.source(Purpose.COHORT, round))
    return Broadcast(round, state.model, cohort, capacity_of(rules.sampling))


def capacity_of(sampling: Sampling) -> int:
    """More messages than ever come: sixteen standard deviations above the expected number."""
    expected = sampling.expected_size
    return math.ceil(expected + 16.0 * math.sqrt(expected) + 16.0)


def client_round(
    rules: ClientRules,
    client: int,
    state: ClientState,
    signal: Tensor,
    round: int,
    turn: int | None = None,
) -> tuple[Tensor, ClientState]:
    """One client's message `[params]` and its new state.

    Args:
        rules: The client's half of the agreement.
        client: Its id, which addresses its noise.
        state: What it kept from earlier rounds.
        signal: What it would send without privacy, `[params]`.
        round: The current round, from 1.
        turn: What addresses the noise where rounds are tried again, as deployments do; None for the round.
    """
    release = rules.release(round if turn is None else turn, client)
    return apply_client_rule(rules.method, state, signal, release, round)


def apply_client_rule(
    method: Method,
    state: ClientState,
    signal: Tensor,
    release: Release | None,
    round: int,
) -> tuple[Tensor, ClientState]:
    """The method's client rule, for one client or for a cohort; refuses a message that is not shaped like the signal.

    A message of another shape would be spread over the parameters when it is summed, and its bound with it. The
    messages of a method that is not of fedpriv are held to its bound, on which the noise depends.

    Raises:
        UserError: If such a method makes a message longer than `bounded.l2_bound`.
    """
    rule = _checked_client_rule if _is_own(method) else type(method).client_rule
    message, state = rule(method, state, signal, release, round)
    if message.shape != signal.shape:
        raise ValueError(f"{method}: a message of shape {list(message.shape)} for a signal of {list(signal.shape)}")
    return message, state


def _is_own(method: Method) -> bool:
    """Return True if a method, or the map that it bounds with, is not of fedpriv."""
    method = method.client_part
    return any(type(part).__module__.partition(".")[0] != __package__ for part in (method, method.bounded))


def _checked_client_rule(
    method: Method, state: ClientState, signal: Tensor, release: Release | None, round: int
) -> tuple[Tensor, ClientState]:
    """The rule's message and state; each message is held to the bound before it gets noise."""
    bounded: list[Tensor] = []

    def watched(message: Tensor) -> Tensor:
        bounded.append(message)
        return message if release is None else release(message)

    message, state = method.client_rule(state, signal, None if release is None else watched, round)
    if release is not None and len(bounded) != 1:
        remedy = "Call release once, on the bounded message: without it the message has no noise"
        raise UserError("method.name", "a client rule that calls release once", f"{len(bounded)} calls", remedy)
    longest = float(norm(bounded[0] if bounded else message, dim=-1, exact=True).max())
    bound = method.bounded.l2_bound
    if not longest <= bound * (1.0 + _ROUNDED):
        remedy = "Correct client_rule or bounded: the noise hides messages up to the bound, and no longer ones"
        raise UserError("method.name", f"messages of norm at most {bound:g}, its l2_bound", f"{longest:g}", remedy)
    return message, state


def counted_norms(norms: Tensor, decisive: Tensor) -> list[float]:
    """The norms of signals for `total_of`; infinite for those whose message is the bounded map of nothing.

    Args:
        norms: l2 norms of the signals, `[clients]` or one.
        decisive: Figures of the same shape that are finite where signal and memory are: a memory that is not finite
            makes a message of nothing as a signal does, and is counted as one.
    """
    counted = torch.where(torch.isfinite(decisive), norms, math.inf).flatten()
    return cast(list[float], counted.tolist())  # pyright: ignore[reportUnknownMemberType]


def total_of(messages: ExactSum, norms: list[float]) -> Total:
    """What a round's clients sent together.

    Args:
        messages: The sum of their messages.
        norms: A figure of `counted_norms` for each of them.
    """
    finite = [norm for norm in norms if math.isfinite(norm)]
    mean = math.fsum(finite) / len(finite) if finite else math.nan
    return Total(messages.value, len(norms), len(norms) - len(finite), mean)


def finish_round(rules: ServerRules, state: ServerState, round: int, total: Tensor) -> ServerState:
    """The server's next state from the sum of the messages, float64 `[params]`.

    Noise is added exactly, on a grid (`fedpriv.mechanisms.noise`); all that follows is post-processing. The sum is
    divided by the expected cohort size, because the actual one is a secret under add-or-remove adjacency.

    Raises:
        UserError: If the model leaves float32. Bounded messages make that a matter of the hyperparameters.
    """
    own, noise = rules.parts(state)
    noisy, noise = rules.mechanism.noise(noise, total.double(), rules.streams, round)
    mean = (noisy / rules.sampling.expected_size).to(state.model.dtype)
    after = server_step(rules.method, own, mean, rules.sampling.sampling_prob)
    if not bool(torch.isfinite(after.model).all()):
        remedy = (
            "Lower method.server_lr and what it is multiplied with: beta, the bound, the noise over the cohort's size"
        )
        raise UserError(f"the model after round {round}", "finite numbers", "NaN or infinity", remedy)
    return joined(after, noise)


def signal_to_noise(total: Total, server_stddev: float, client_stddev: float) -> float | None:
    """Norm of the sum of the bounded messages over the expected norm of the noise on it; None without noise.

    Where clients add the noise, the sum holds it already, and its expected square is taken off: an estimate that
    uses nothing but what was released.
    """
    size = total.sum.shape[-1]
    squared = float(norm(total.sum, exact=True)) ** 2
    if server_stddev > 0.0:
        return (squared / (server_stddev**2 * size)) ** 0.5
    if client_stddev > 0.0 and total.messages:
        expected = client_stddev**2 * size * total.messages
        return (max(squared - expected, 0.0) / expected) ** 0.5
    return None

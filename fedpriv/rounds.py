"""One round as three pure functions that the network connects.

    server:  broadcast = begin_round(rules, state, k)
    client:  message, state_i = client_round(rules, client, state_i, signal, k)
    server:  state = finish_round(rules, state, k, total)

Every engine (a loop, a batch, Ray, Flower) calls the same three. The server needs only the sum of the messages, which
makes this sum the boundary of secure aggregation.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Generic, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from fedpriv.aggregation.exact import ExactSum, grid_step
from fedpriv.errors import UserError
from fedpriv.feedback import Release, RoundedRelease
from fedpriv.mechanisms.base import Mechanism, MechanismState
from fedpriv.mechanisms.controllers import Controller
from fedpriv.mechanisms.correlated import EarlierNoise
from fedpriv.mechanisms.filtered import Filtered, FilterState
from fedpriv.mechanisms.gaussian import release_grid
from fedpriv.mechanisms.noise import Gaussian, StepNoise, max_level, release_message, release_rows
from fedpriv.mechanisms.shares import IntegerSums, NoServerNoise, Voids
from fedpriv.methods import (
    METHODS,
    ClientStateT,
    ExampleRule,
    Method,
    ServerState,
    bare,
    feedback_of,
    has_memory,
    message_size,
    own_signal_of,
    refuse_for_examples,
    server_step,
    side_values_of,
)
from fedpriv.privacy import PrivacyPlan, Sampling
from fedpriv.privacy.records import ExampleTerms, RecordBound
from fedpriv.streams import Streams
from fedpriv.tasks.local_work import ClippedGradients
from fedpriv.vectors import joined, norm, parted

__all__ = [
    "Agreement",
    "Broadcast",
    "ClientRules",
    "ServerRules",
    "Total",
    "apply_client_rule",
    "begin_round",
    "capacity_of",
    "client_round",
    "counted_norms",
    "counted_total",
    "finish_round",
    "integer_sums",
    "make_agreement",
    "most_messages",
    "record_bound",
    "signal_to_noise",
    "skip_round",
    "total_of",
]


@dataclass(frozen=True, kw_only=True)
class ClientRules(Generic[ClientStateT]):
    """The client's half of the agreement; `ClientRules` alone is one with any states.

    Args:
        method: The method; the client follows its client rule.
        noise_stddev: Standard deviation per coordinate of the noise that the client adds to its message; 0 for none.
        streams: Source of its noise.
        examples: How it bounds the gradients of its examples; None unless the unit of privacy is `example`.
        step_stddev: Standard deviation of the noise on the sum of every local step (`dp-sgd`); 0 for none.
        sums: The rules for sums of integers under secure aggregation; None for other trusts.
    """

    method: Method[ClientStateT]
    noise_stddev: float
    streams: Streams
    examples: ExampleTerms | None = None
    step_stddev: float = 0.0
    sums: IntegerSums | None = None

    @property
    def draws_secrets(self) -> bool:
        """True if the client draws noise, or batches that epsilon relies on."""
        batches = self.examples is not None and self.examples.rate < 1.0
        return batches or self.noise_stddev > 0.0 or self.step_stddev > 0.0

    def in_round(self, shared: Tensor | None) -> "ClientRules[ClientStateT]":
        """Return the rules for a round in which clients receive the vector `shared`, `[params]`; None for none.

        Raises:
            ValueError: If the method then has another bound than the one that the noise is made for.
        """
        if shared is None:
            return self
        method = self.method.in_round(shared)
        if method.bounded.l2_bound != self.method.bounded.l2_bound:
            raise ValueError(f"{self.method}: another l2_bound in a round: {method.bounded.l2_bound:g}")
        return replace(self, method=method)

    def clipped(self, round: int, client: int) -> ClippedGradients | None:
        """Return the gradients of one client in `round` under the unit `example`; None for plain means."""
        if self.examples is None:
            return None
        noise = StepNoise(self.streams, self.step_stddev, round, client) if self.step_stddev > 0.0 else None
        return ClippedGradients(terms=self.examples, noise=noise)

    def init_client(self, size: int) -> ClientStateT:
        """Return the state of a new client, in float64 if single records must not be lost in its rounding."""
        state = self.method.init_client(size)
        return state if self.examples is None else type(state)(*(field.double() for field in state))

    @property
    def release_grid(self) -> float | None:
        """G: every coordinate of a noised message is a multiple of it; None without noise."""
        if self.sums is not None:
            return self.sums.grid
        return release_grid(self.noise_stddev) if self.noise_stddev > 0.0 else None

    @property
    def message_limit(self) -> float:
        """Largest absolute value of a message's coordinate: the bound plus 16 standard deviations of noise."""
        bound, grid = self.method.bounded.l2_bound, self.release_grid
        if self.sums is not None:
            return bound + self.sums.grid + 16.0 * self.noise_stddev
        return bound if grid is None else max_level(bound, self.noise_stddev) * grid

    def release(self, round: int, client: int) -> Release | None:
        """Return the function that noises the message `[params]` of one client in `round`; None without noise."""
        if self.sums is not None:
            sums = self.sums
            return RoundedRelease(
                rounded=sums.rounded,
                noised=lambda message: sums.noised(self.streams, self.noise_stddev, message, round, client),
                step=sums.grid,
            )
        if self.noise_stddev == 0.0:
            return None
        level = max_level(self.method.bounded.l2_bound, self.noise_stddev)
        return lambda message: release_message(self.streams, self.noise_stddev, level, message, round, client)

    def release_rows(self, round: int, clients: Sequence[int]) -> Release | None:
        """Return the same for the messages `[clients, params]` of several clients."""
        if self.sums is not None:
            sums = self.sums
            return RoundedRelease(
                rounded=sums.rounded,
                noised=lambda messages: sums.noised_rows(self.streams, self.noise_stddev, messages, round, clients),
                step=sums.grid,
            )
        if self.noise_stddev == 0.0:
            return None
        level = max_level(self.method.bounded.l2_bound, self.noise_stddev)
        return lambda messages: release_rows(self.streams, self.noise_stddev, level, messages, round, clients)


@dataclass(frozen=True, kw_only=True)
class ServerRules:
    """The server's half of the agreement.

    Args:
        method: The method; the server follows its server rule.
        sampling: The sampling of clients.
        mechanism: The mechanism that adds the server's noise to the sum.
        streams: Source of cohorts and of the server's noise.
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
        """Return the state before the first round for the model `[params]`: the method's and the mechanism's."""
        size = message_size(self.method, len(model))
        return joined(self.method.init_server(model), self.mechanism.init(size))

    def reset_memories(self, state: ServerState) -> ServerState:
        """Return the state with all memories reset; keep the model and the state of the noise mechanism."""
        _, noise = self.parts(state)
        return joined(self.method.init_server(state.model), noise)

    def shared(self, state: ServerState) -> Tensor | None:
        """Return the vector `[params]` that clients receive beside the model; None for the model alone."""
        return self.method.shared(self.parts(state)[0])

    def voids(self, state: ServerState) -> int:
        """Return the number of void rounds so far; 0 unless sums are aggregated securely."""
        noise = self.parts(state)[1]
        return int(noise.voids) if isinstance(noise, Voids) else 0

    def filtered(self, state: ServerState) -> FilterState | None:
        """Return what the privacy filter has spent and charges next; None without one."""
        noise = self.parts(state)[1]
        return noise if isinstance(noise, FilterState) else None

    def last_stddev(self, state: ServerState) -> float:
        """Return the standard deviation of the server's noise on the last sum; 0 for none."""
        spent = self.filtered(state)
        if spent is None or not isinstance(self.mechanism, Filtered):
            return self.noise_stddev
        return self.mechanism.multiplier(int(spent.filter_last)) * self.mechanism.moved

    def parts(self, state: ServerState) -> tuple[ServerState, MechanismState]:
        """Return the state of the method with its optimizer, and that of the mechanism.

        Raises:
            ValueError: If the state is not of these rules; one of `method.init_server` may lack the mechanism's part.
        """
        own, noise = self._empty_parts
        first = joined(own, noise)._fields  # pyright: ignore[reportPrivateUsage]
        if state._fields != first:  # pyright: ignore[reportPrivateUsage]
            expected, got = ", ".join(first), ", ".join(state._fields)  # pyright: ignore[reportPrivateUsage]
            raise ValueError(f"expected a server state with the fields {expected}, got {got}: use ServerRules.init")
        return parted(state, own, noise)

    @cached_property
    def _empty_parts(self) -> tuple[ServerState, MechanismState]:
        """The states of the method and of the mechanism for a model without parameters."""
        return self.method.init_server(torch.zeros(0)), self.mechanism.init(0)


class Agreement(NamedTuple):
    """The rules of server and clients, and the privacy plan (None: no guarantee)."""

    server: ServerRules
    client: ClientRules
    plan: PrivacyPlan | None


# Rounding to the grid may lengthen a message by this share of its bound; the bounded maps keep it in reserve.
_LONGER = 2.0**-22


class Broadcast(NamedTuple):
    """The server's broadcast: the round (from 1), the model `[params]`, and the cohort (ascending client ids).

    `capacity` is the number of messages that the round's sum must hold, the same in every round of a run. It determines
    the grid on which messages are added (`fedpriv.aggregation.exact`); the actual number is a secret. Sums of parts of
    a cohort, with the capacity of the whole, add up to the sum of the whole, bit by bit. None stands for the length of
    `cohort`.

    `part` distinguishes the broadcasts of one round if clients start from different models. `turn` is the address of
    noise if some rounds are void: it counts all of them, and `round` those that count. None stands for `round`.

    `shared` is the vector `[params]` that a method sends beside the model; see `Method.shared`.
    """

    round: int
    model: Tensor
    cohort: np.ndarray
    capacity: int | None = None
    part: int = 0
    turn: int | None = None
    shared: Tensor | None = None

    def offset(self, method: Method[ClientStateT], state: ClientStateT) -> Tensor | None:
        """Return the vector that is added to the gradient of each local step, `[..., params]`; None for none."""
        return method.step_offset(state, self.shared)

    @property
    def address(self) -> int:
        """The address of the clients' noise."""
        return self.round if self.turn is None else self.turn

    def empty_sum(self, rules: "ClientRules", device: torch.device | str = "cpu") -> ExactSum:
        """Return an empty sum for the round's messages, which may arrive in any order.

        Raises:
            UserError: If rounding to the grid could lengthen a message beyond its bound, or change an integer.
            ValueError: If the plan of secure aggregation was made for a model of another size.
        """
        capacity = len(self.cohort) if self.capacity is None else self.capacity
        size = message_size(rules.method, self.model.shape[-1])
        step, bound = grid_step(rules.message_limit, capacity), rules.method.bounded.l2_bound
        if rules.examples is not None:
            own = own_signal_of(rules.method)
            factor = rules.method.bounded.lipschitz if own is None else own.example_rule.least
            bound = min(bound, rules.examples.alone * factor)
        if rules.sums is not None:
            rules.sums.check_size(size)
            if step > rules.sums.grid:
                expected = "integers that float64 can add"
                raise UserError("cohort", expected, f"{capacity:,} clients", "Use a smaller cohort")
        elif rules.noise_stddev == 0.0 and 0.5 * step * math.sqrt(size) > _LONGER * bound:
            expected = f"fewer than {capacity:,} clients per round with {size:,} parameters"
            smaller = "" if rules.examples is None else "method.max_norm or method.alpha, "
            remedy = f"Use a smaller {smaller}cohort or model: rounding could lengthen a message beyond its bound"
            raise UserError("cohort", expected, f"{capacity:,}", remedy)
        return ExactSum(size, rules.message_limit, capacity, device)


class Total(NamedTuple):
    """The result of a round: the sum of the messages `[params]`, float64 on the CPU, and metrics that are not private.

    The sum is not rounded before the noise is added. After rounding a sum of many messages to float32, the presence of
    one client could change it by more than that client's bound.

    `messages` counts the senders. `non_finite` counts those with a signal or memory that was not finite; their message
    was the bounded map of zero. `signal_norm` is the mean l2 norm of the others' signals (NaN if there is none).

    `void` is True if the round does not count, under secure aggregation: the sum is then zero, and no state changes.
    """

    sum: Tensor
    messages: int
    non_finite: int
    signal_norm: float
    void: bool = False


def make_agreement(
    method: Method,
    sampling: Sampling,
    plan: PrivacyPlan | None,
    streams: Streams,
    controller: Controller | None = None,
) -> Agreement:
    """Return the agreement of server and clients; the plan's trust decides which of them adds the noise.

    Args:
        method: The method.
        sampling: The sampling of clients.
        plan: The privacy plan; None for no guarantee.
        streams: Source of cohorts and noise.
        controller: Chooses each round's noise if the plan is filtered; otherwise None.

    Raises:
        UserError: If the method needs noise at the client and the plan puts it at the server, or remembers noise that
            only the sum may contain.
        ValueError: If the plan was made for another bound, sampling, client memory or client rule, or if there is a
            controller without a filter, or the reverse.
    """
    if (plan is not None and plan.filtered) != (controller is not None):
        raise ValueError(f"a controller needs a plan with a filter, and the reverse: {controller}, {plan}")
    server_stddev = client_stddev = 0.0
    if plan is not None:
        if plan.l2_bound != method.bounded.l2_bound or plan.sampling != sampling:
            raise ValueError(f"the plan was made for another method or cohort: {plan}, {method}, {sampling}")
        if has_memory(method) and not plan.client_memory:
            raise ValueError(f"the plan was made for clients without memory, but {method} has one: {plan}")
        if method.needs_client_noise and not plan.trust_rules.clients_add_noise:
            raise UserError(
                "method.memory",
                'privacy.trust = "local" with sent memory',
                f'privacy.trust = "{plan.trust}"',
                "Sent memory contains each client's noise: set privacy.trust to local, or method.memory to noiseless",
            )
        rule = feedback_of(method)
        remembers = method.needs_client_noise or (rule is not None and rule.sent)
        if remembers and plan.trust_rules.secure_sums:
            expected = '"noiseless" with secure aggregation: the next sums would depend on shares of earlier noise'
            raise UserError("method.memory", expected, '"sent"', 'Set it to "noiseless", or privacy.trust to "local"')
        server_stddev, client_stddev = plan.shares
    record = None if plan is None else plan.record
    if record is not None and record != record_bound(method, record.terms):
        raise ValueError(f"the plan was made for another client rule: {record}, {method}")
    in_steps = record is not None and record.route == "steps"
    if plan is not None and in_steps and not plan.trust_rules.clients_add_noise:
        remedy = 'Set privacy.trust = "local": the promise then holds against the server, too'
        raise UserError("local.work", '"dp-sgd" with privacy.trust = "local"', f'trust "{plan.trust}"', remedy)
    sums = None if plan is None else integer_sums(plan)
    mechanism: Mechanism = Gaussian(server_stddev) if sums is None else NoServerNoise()
    if plan is not None and plan.noise is not None:
        mechanism = plan.noise.mechanism(server_stddev, method.bounded.l2_bound, capacity_of(sampling))
    if plan is not None and controller is not None:
        moved, planned = plan.l2_sensitivity, plan.noise_multiplier
        mechanism = Filtered(controller=controller, planned=planned, moved=moved, rounds=plan.rounds)
    return Agreement(
        ServerRules(method=method, sampling=sampling, mechanism=mechanism, streams=streams),
        ClientRules(
            method=method.client_part,
            noise_stddev=client_stddev,
            streams=streams,
            examples=None if record is None else record.terms,
            step_stddev=plan.noise_stddev if plan is not None and in_steps else 0.0,
            sums=sums,
        ),
        plan,
    )


def integer_sums(plan: PrivacyPlan) -> IntegerSums | None:
    """Return the rules for a plan's sums under secure aggregation; None for other trusts."""
    if plan.aggregation is None or plan.sums is None:
        return None
    terms, sums = plan.aggregation, plan.sums
    answering = plan.sampling.population if terms.everyone_answers else None
    least = terms.least_survivors
    return IntegerSums(grid=sums.step, limit=sums.limit, least=least, size=terms.size, answering=answering)


def record_bound(method: Method, terms: ExampleTerms) -> RecordBound:
    """Return how far one record moves the releases of a client with this method.

    Raises:
        UserError: If the method's client rule or its bounded map is not one that can be accounted for.
    """
    refuse_for_examples(method)
    if (own := own_signal_of(method)) is not None:
        return _own_record_bound(own.example_rule, method, terms)
    bounded, rule = method.bounded, feedback_of(method)
    if terms.steps:
        return RecordBound(terms=terms, l2_bound=bounded.l2_bound)
    if rule is None:
        remedy = "Use a built-in method, or dp-sgd as local work: its noise covers everything that follows"
        name = METHODS.name_of(bare(method))
        raise UserError(
            "method.name", 'a method with an accounted client rule for unit = "example"', repr(name), remedy
        )
    noiseless = rule.beta is not None and not rule.sent
    return RecordBound(
        terms=terms,
        l2_bound=bounded.l2_bound,
        lipschitz=bounded.lipschitz,
        cocoercive=getattr(bounded, "cocoercive", None),
        beta=rule.beta if noiseless else None,
        damping=rule.damping if noiseless else 0.0,
    )


def _own_record_bound(rule: ExampleRule, method: Method, terms: ExampleTerms) -> RecordBound:
    """Return the same for a method with its own signal."""
    if _is_own(method):
        remedy = "Use a built-in method: the proof of its signal does not cover other classes"
        got = type(method.client_part).__name__
        raise UserError("method.name", 'a method with an accounted signal for unit = "example"', got, remedy)
    name = METHODS.name_of(bare(method))
    if terms.steps:
        remedy = 'Set local.work = "full-gradient", or choose dp-gd for local steps'
        raise UserError("local.work", f"gradients at given models with {name}", '"dp-sgd"', remedy)
    if terms.clip != rule.example_clip:
        got = f"{rule.example_clip:g} against {'an absent key' if terms.clip is None else format(terms.clip, 'g')}"
        raise UserError(f"method.{rule.key}", "privacy.example_clip", got, "Set both to the same number")
    if terms.rate < 1.0 and rule.restart_weight != 1.0:
        expected = '1 with random batches: rounds of unequal cost are accounted with "full-gradient" alone'
        raise UserError("method.restart_weight", expected, rule.restart_weight, "Set it to 1")
    return RecordBound(
        terms=terms,
        l2_bound=method.bounded.l2_bound,
        lipschitz=rule.lipschitz,
        clip_norm=rule.clip_norm,
        feedback_clip=rule.feedback_clip,
        period=rule.period,
        restart_weight=rule.restart_weight,
    )


def begin_round(rules: ServerRules, state: ServerState, round: int) -> Broadcast:
    """Return the server's broadcast in `round`."""
    cohort = rules.sampling.drawn(rules.streams, round)
    counting = round - rules.voids(state)
    capacity, shared = capacity_of(rules.sampling), rules.shared(state)
    return Broadcast(counting, state.model, cohort, capacity, turn=round, shared=shared)


def capacity_of(sampling: Sampling) -> int:
    """Return a safe maximum of messages per round: sixteen standard deviations above the expected number."""
    expected = sampling.expected_size
    return math.ceil(expected + 16.0 * math.sqrt(expected) + 16.0)


def most_messages(sampling: Sampling) -> int:
    """Return the largest number of messages of sampled clients in a sum under secure aggregation."""
    return sampling.cohort_size or min(capacity_of(sampling), sampling.population)


def client_round(
    rules: ClientRules[ClientStateT],
    client: int,
    state: ClientStateT,
    signal: Tensor,
    round: int,
    turn: int | None = None,
    shared: Tensor | None = None,
) -> tuple[Tensor, ClientStateT]:
    """Return one client's message `[params]` and its new state.

    Args:
        rules: The client's half of the agreement.
        client: The client's id, part of the address of its noise.
        state: Its state from earlier rounds.
        signal: Its message without privacy, `[params]`; longer for a method with its own (`OwnSignal`).
        round: The current round, from 1.
        turn: The address of the noise if rounds may be retried, as in deployments; None for the round.
        shared: The vector that the client received beside the model, `[params]`; None for none.
    """
    rules = rules.in_round(shared)
    release = rules.release(round if turn is None else turn, client)
    return apply_client_rule(rules.method, state, signal, release, round)


def apply_client_rule(
    method: Method[ClientStateT],
    state: ClientStateT,
    signal: Tensor,
    release: Release | None,
    round: int,
) -> tuple[Tensor, ClientStateT]:
    """Apply the method's client rule to one client or a cohort; refuse a message with another shape than the signal.

    In the sum, a message of another shape would be broadcast over the parameters and could exceed its bound. Messages
    of a method from outside fedpriv are checked against its bound, which determines the noise.

    Raises:
        UserError: If such a method makes a message longer than `bounded.l2_bound`, does not call `release` once, or
            remembers its share of the noise under secure aggregation.
    """
    rule = _checked_client_rule if _is_own(method) else type(method).client_rule
    message, state = rule(method, state, signal, release, round)
    alike = message.shape == signal.shape and side_values_of(method) is None
    if not alike and not _is_part(method, message, signal):
        raise ValueError(f"{method}: a message of shape {list(message.shape)} for a signal of {list(signal.shape)}")
    return message, state


def _is_part(method: Method, message: Tensor, signal: Tensor) -> bool:
    """Return True if a message is as long as each vector of a signal that has several, or has its side values."""
    if (side := side_values_of(method)) is not None:
        expected = signal.shape[-1] - side.given + side.count
        return message.shape == (*signal.shape[:-1], expected)
    own = own_signal_of(method)
    return own is not None and (*message.shape[:-1], message.shape[-1] * own.vectors) == signal.shape


def _is_own(method: Method) -> bool:
    """Return True if a method, or the map that it bounds with, is not of fedpriv."""
    method = method.client_part
    return any(type(part).__module__.partition(".")[0] != __package__ for part in (method, method.bounded))


def _checked_client_rule(
    method: Method[ClientStateT], state: ClientStateT, signal: Tensor, release: Release | None, round: int
) -> tuple[Tensor, ClientStateT]:
    """Return the rule's message and state; check each message against the bound before it gets noise."""
    before = state
    bounded: list[Tensor] = []
    released: list[Tensor] = []

    def watched(message: Tensor) -> Tensor:
        bounded.append(message)
        noised = release.noised if isinstance(release, RoundedRelease) else release
        released.append(message if noised is None else noised(message))
        return released[-1]

    own: Release | None = None if release is None else watched
    if isinstance(release, RoundedRelease):
        own = _watched_rounding(method, release, watched)
    message, state = method.client_rule(state, signal, own, round)
    if release is not None and len(bounded) != 1:
        remedy = "Call release once, on the bounded message: without it the message has no noise"
        raise UserError("method.name", "a client rule that calls release once", f"{len(bounded)} calls", remedy)
    if released and not torch.equal(message, released[0]):
        remedy = "Return the result of release: nothing else has noise"
        raise UserError("method.name", "a client rule that sends its released message", "one that changes it", remedy)
    if isinstance(release, RoundedRelease) and has_memory(method):
        _refuse_remembered_noise(method, (before, signal, round), state, release)
    longest = float(norm(bounded[0] if bounded else message, dim=-1, exact=True).max())
    bound = method.bounded.l2_bound
    if isinstance(release, RoundedRelease):
        longest -= 0.5 * release.step * math.sqrt(message.shape[-1])
    if not longest <= bound:
        remedy = "Correct client_rule or bounded: the noise hides messages up to the bound, and no longer ones"
        raise UserError("method.name", f"messages of norm at most {bound:g}, its l2_bound", f"{longest:g}", remedy)
    return message, state


def _refuse_remembered_noise(
    method: Method[ClientStateT], given: tuple[ClientStateT, Tensor, int], after: ClientStateT, release: RoundedRelease
) -> None:
    """Raise UserError if a rule's state depends on its share of the noise: later sums would then reveal earlier shares.

    Rules are pure, so the same rule without noise must have the same state.
    """
    before, signal, round = given
    silent = RoundedRelease(rounded=release.rounded, noised=lambda message: message.double(), step=release.step)
    _, plain = method.client_rule(before, signal, silent, round)
    if not all(torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) for a, b in zip(after, plain, strict=True)):
        remedy = 'Remember on_grid(message, release), not the result of release, or set privacy.trust to "local"'
        expected = "a client rule that remembers no noise, with secure aggregation"
        raise UserError("method.name", expected, "one that remembers its share of the noise", remedy)


def _watched_rounding(method: Method, release: RoundedRelease, noised: Release) -> RoundedRelease:
    """Return the release with other noise; raise UserError if a rule with memory releases an unrounded message."""

    def rounded(message: Tensor) -> Tensor:
        found.append(release.rounded(message))
        return found[-1]

    def checked(message: Tensor) -> Tensor:
        if has_memory(method) and len(found) != 2:
            remedy = (
                "Call on_grid(message, release) of fedpriv.feedback on the bounded message, and remember its result"
            )
            expected = "a client rule that remembers its rounded message, with secure aggregation"
            raise UserError("method.name", expected, "one that does not round it", remedy)
        return noised(message)

    found: list[Tensor] = []
    return RoundedRelease(rounded=rounded, noised=checked, step=release.step)


def counted_norms(norms: Tensor, decisive: Tensor) -> list[float]:
    """Return the norms of signals for `total_of`; infinite if the message is the bounded map of zero.

    Args:
        norms: l2 norms of the signals, `[clients]` or one.
        decisive: Numbers of the same shape, finite if both signal and memory are. A memory that is not finite also
            gives the bounded map of zero, and is counted.
    """
    counted = torch.where(torch.isfinite(decisive), norms, math.inf).flatten()
    return cast(list[float], counted.tolist())  # pyright: ignore[reportUnknownMemberType]


def counted_total(total: Total, sums: IntegerSums | None, answers: int) -> Total:
    """Return the total of a round as the server of secure aggregation sees it.

    Args:
        total: The total of the messages.
        sums: The rules for sums of integers; None without secure aggregation.
        answers: Number of clients that answered; with fewer than the rules require, the round is void.
    """
    if sums is None:
        return total
    found = None if answers < sums.least else sums.total(total.sum)
    return total._replace(sum=torch.zeros_like(total.sum) if found is None else found, void=found is None)


def total_of(messages: ExactSum, norms: list[float]) -> Total:
    """Return the total of a round's messages.

    Args:
        messages: The sum of the messages.
        norms: The value of `counted_norms` for each of them.
    """
    finite = [norm for norm in norms if math.isfinite(norm)]
    mean = math.fsum(finite) / len(finite) if finite else math.nan
    return Total(messages.value, len(norms), len(norms) - len(finite), mean)


def finish_round(rules: ServerRules, state: ServerState, round: int, total: Tensor) -> ServerState:
    """Return the server's next state from the sum of the messages, float64 `[params]`.

    Noise is added exactly, on a grid (`fedpriv.mechanisms.noise`); everything after it is post-processing. The sum is
    divided by the expected cohort size, because the actual size is a secret under add-or-remove adjacency.

    Raises:
        UserError: If the model exceeds the range of float32. Messages are bounded, so hyperparameters cause this.
    """
    own, noise = rules.parts(state)
    noisy, noise = rules.mechanism.noise(noise, total.double(), rules.streams, round)
    mean = (noisy / rules.sampling.expected_size).to(state.model.dtype)
    after = server_step(rules.method, own, mean, rules.sampling.sampling_prob)
    if not bool(torch.isfinite(after.model).all()):
        remedy = "Lower method.server_lr or its factors: beta, the bound, or the noise over the cohort size"
        raise UserError(f"the model after round {round}", "finite numbers", "NaN or infinity", remedy)
    return joined(after, noise)


def skip_round(rules: ServerRules, state: ServerState) -> ServerState:
    """Return the server's state after a round of which nothing is released: model and memories stay.

    A void round of secure aggregation does not count; one of correlated noise keeps its row.
    """
    own, noise = rules.parts(state)
    return joined(own, noise.skipped()) if isinstance(noise, Voids | EarlierNoise) else state


def signal_to_noise(total: Total, server_stddev: float, client_stddev: float) -> float | None:
    """Return the norm of the sum of bounded messages over the expected norm of its noise; None without noise.

    If clients add the noise, the sum already contains it, and its expected square is subtracted. This estimate uses
    only released values.
    """
    size = total.sum.shape[-1]
    squared = float(norm(total.sum, exact=True)) ** 2
    if server_stddev > 0.0:
        return (squared / (server_stddev**2 * size)) ** 0.5
    if client_stddev > 0.0 and total.messages:
        expected = client_stddev**2 * size * total.messages
        return (max(squared - expected, 0.0) / expected) ** 0.5
    return None

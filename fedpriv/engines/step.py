"""The client rule of some clients at once, with their states changed in place and their messages summed.

A method's `client_rule` is the definition. Where it has the form of `fedpriv.feedback.Feedback`, the same operations
run here on the memory that is there already: residual, norm, message, memory and sum, with nothing allocated.
"""

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedpriv.bounding import row_norms
from fedpriv.engines.native import FeedbackInC, feedback_in_c
from fedpriv.feedback import Feedback
from fedpriv.methods import ClientState, feedback_of
from fedpriv.noise import client_noise
from fedpriv.rounds import Broadcast, ClientRules, Total, apply_client_rule
from fedpriv.sums import ExactSum

__all__ = ["ClientStep"]


@dataclass
class ClientStep:
    """Client rules of one round.

    Args:
        rules: The clients' half of the agreement.
        broadcast: The round.
        device: Where signals and states lie.
        native: Whether a client on its own may be done in C: equal but for the rounding of a norm in float64.
    """

    rules: ClientRules
    broadcast: Broadcast
    device: torch.device
    native: bool = False
    _sum: ExactSum = field(init=False)
    _feedback: Feedback | None = field(init=False)
    _in_c: FeedbackInC | None = field(init=False)
    _norms: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._sum = self.broadcast.empty_sum(self.rules, self.device)
        self._feedback = feedback_of(self.rules.method)
        wanted = self.native and self.rules.noise_stddev == 0.0 and self.device.type == "cpu"
        self._in_c = feedback_in_c() if wanted and self._feedback is not None else None
        figures = (1.0, 0.0, 1.0, 1.0) if self._feedback is None else self._feedback.bounded.figures
        self._figures = (ctypes.c_double * 4)(*figures)

    def take(self, clients: Sequence[int], signals: Tensor, state: ClientState) -> None:
        """Adds the messages of `clients` to the sum and moves their states, in place.

        Args:
            clients: Who sends.
            signals: `[clients, params]`; used up.
            state: Fields `[clients, ...]`.
        """
        if self._in_c is not None and len(clients) == 1 and self._take_in_c(signals[0], state):
            return
        norms = row_norms(signals)
        self._norms += norms.flatten().tolist()
        noise = self._noise(clients, signals)
        if len(clients) == 1:  # as a vector: then every bit is that of a client on its own
            signals, noise, norms = signals[0], None if noise is None else noise[0], norms[0]
            state = type(state)(*(part[0] for part in state))
        if self._feedback is None:
            self._by_rule(signals, state, noise)
        else:
            self._sum.add(_feed_back_(self._feedback, signals, norms, state, noise, self.broadcast.round))

    def _take_in_c(self, signal: Tensor, state: ClientState) -> bool:
        """One client's step; False, and nothing done, for what is rare and left to torch."""
        rule, native = self._feedback, self._in_c
        assert rule is not None
        assert native is not None
        vectors = [signal] if rule.beta is None else [signal, state.memory[0]]
        if not all(v.dtype == torch.float32 and v.is_contiguous() and v.shape == signal.shape for v in vectors):
            return False
        total, shift = self._sum.running, self._sum.shift
        if rule.beta is None:
            own = native.add_bounded(signal, total, self._figures, shift)
        else:
            kept = 1.0
            if rule.damping > 0.0:
                kept = float((1.0 - rule.damping) ** (self.broadcast.round - 1 - state.updated))
            forget = 1.0 - rule.damping
            own = native.feed_back(signal, vectors[1], total, kept, forget, rule.beta, self._figures, shift)
            if own is not None and "updated" in state._fields:
                state.updated.fill_(self.broadcast.round)
        if own is not None:
            self._norms.append(own)
        return own is not None

    def total(self) -> Total:
        """What the round's clients sent together."""
        finite = [norm for norm in self._norms if math.isfinite(norm)]
        mean = math.fsum(finite) / len(finite) if finite else math.nan
        return Total(self._sum.value, len(self._norms), len(self._norms) - len(finite), mean)

    def _noise(self, clients: Sequence[int], signals: Tensor) -> Tensor | None:
        if self.rules.noise_stddev == 0.0:
            return None
        streams, stddev, size = self.rules.streams, self.rules.noise_stddev, signals.shape[-1]
        drawn = [client_noise(streams, stddev, size, self.broadcast.round, client) for client in clients]
        return torch.stack(drawn).to(signals.device)

    def _by_rule(self, signals: Tensor, state: ClientState, noise: Tensor | None) -> None:
        """Any rule. Its message and its new state may be made of the old state's own tensors."""
        messages, new = apply_client_rule(self.rules.method, state, signals, noise, self.broadcast.round)
        self._sum.add(messages)
        for target, source in zip(state, [part.clone() for part in new], strict=True):
            target.copy_(source)


def _feed_back_(
    rule: Feedback,
    signals: Tensor,
    norms: Tensor,
    state: ClientState,
    noise: Tensor | None,
    round: int,  # noqa: A002
) -> Tensor:
    """The messages, in place of the signals; memories are moved in place. Operation by operation `client_rule`."""
    if rule.beta is None:
        rule.bounded.bound_(signals, norms)
        return signals if noise is None else signals.add_(noise)
    memory = state.memory
    if rule.damping > 0.0:
        memory.mul_((1.0 - rule.damping) ** (round - 1 - state.updated))
    rule.bounded.bound_(signals.sub_(memory))
    if rule.damping > 0.0:
        memory.mul_(1.0 - rule.damping)
    if noise is not None and rule.sent:
        signals.add_(noise)
    memory.add_(signals, alpha=rule.beta)
    if noise is not None and not rule.sent:
        signals.add_(noise)
    if "updated" in state._fields:
        state.updated.fill_(round)
    return signals

"""The client rule of some clients at once, with their states changed in place and their messages summed.

A method's `client_rule` is the definition. Where it has the form of `fedpriv.feedback.Feedback`, the same operations
run here on the memory that is there already: residual, norm, message, memory and sum, with nothing allocated.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

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
    """

    rules: ClientRules
    broadcast: Broadcast
    device: torch.device
    _sum: ExactSum = field(init=False)
    _feedback: Feedback | None = field(init=False)
    _norms: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._sum = self.broadcast.empty_sum(self.rules, self.device)
        self._feedback = feedback_of(self.rules.method)

    def take(self, clients: Sequence[int], signals: Tensor, state: ClientState) -> None:
        """Adds the messages of `clients` to the sum and moves their states, in place.

        Args:
            clients: Who sends.
            signals: `[clients, params]`; used up.
            state: Fields `[clients, ...]`.
        """
        self._norms.append(_norms(signals))
        noise = self._noise(clients, signals)
        if len(clients) == 1:  # as a vector: then every bit is that of a client on its own
            signals, noise = signals[0], None if noise is None else noise[0]
            state = type(state)(*(part[0] for part in state))
        if self._feedback is None:
            messages = self._by_rule(signals, state, noise)
        else:
            messages = _feed_back_(self._feedback, signals, state, noise, self.broadcast.round)
        self._sum.add(messages)

    def total(self) -> Total:
        """What the round's clients sent together."""
        norms = torch.cat(self._norms) if self._norms else torch.zeros(0, dtype=torch.float64)
        finite = norms[torch.isfinite(norms)]
        mean = float(finite.mean()) if len(finite) else math.nan
        return Total(self._sum.value, len(norms), len(norms) - len(finite), mean)

    def _noise(self, clients: Sequence[int], signals: Tensor) -> Tensor | None:
        if self.rules.noise_stddev == 0.0:
            return None
        streams, stddev, size = self.rules.streams, self.rules.noise_stddev, signals.shape[-1]
        drawn = [client_noise(streams, stddev, size, self.broadcast.round, client) for client in clients]
        return torch.stack(drawn).to(signals.device)

    def _by_rule(self, signals: Tensor, state: ClientState, noise: Tensor | None) -> Tensor:
        messages, new = apply_client_rule(self.rules.method, state, signals, noise, self.broadcast.round)
        for target, source in zip(state, new, strict=True):
            target.copy_(source)
        return messages


def _feed_back_(
    rule: Feedback,
    signals: Tensor,
    state: ClientState,
    noise: Tensor | None,
    round: int,  # noqa: A002
) -> Tensor:
    """The messages, in place of the signals; memories are moved in place. Operation by operation `client_rule`."""
    if rule.beta is None:
        rule.bounded.bound_(signals)
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


def _norms(signals: Tensor) -> Tensor:
    """Norms of rows, float64 `[clients]` on the CPU: diagnostics, so float32 does unless it overflows."""
    norms = torch.linalg.vector_norm(signals, dim=-1)
    if not bool(torch.isfinite(norms).all()):
        norms = torch.linalg.vector_norm(signals, dim=-1, dtype=torch.float64)
    return norms.double().cpu()

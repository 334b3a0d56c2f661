"""The client rule of several clients at once, with states changed in place and messages summed.

A method's `client_rule` is the definition. If it has the form of `fedpriv.feedback.Feedback`, this module does the same
operations in place: residual, norm, message, memory and sum, without allocating memory.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedpriv.aggregation.exact import ExactSum
from fedpriv.bounding import row_norms
from fedpriv.engines.native import FeedbackInC, feedback_in_c
from fedpriv.engines.states import StateStore
from fedpriv.feedback import Feedback, Release, on_grid, sent_message
from fedpriv.methods import ClientState, feedback_of
from fedpriv.rounds import Broadcast, ClientRules, Total, apply_client_rule, counted_norms, total_of

__all__ = ["ClientStep"]


@dataclass
class ClientStep:
    """The client rules of one round.

    Args:
        rules: The clients' half of the agreement.
        broadcast: The round.
        device: The device of signals and states.
        native: Allow C: equal except for the rounding of a norm in float64.
    """

    rules: ClientRules
    broadcast: Broadcast
    device: torch.device
    native: bool = False
    _sum: ExactSum = field(init=False)
    _feedback: Feedback | None = field(init=False)
    _in_c: FeedbackInC | None = field(init=False)
    _without_memory: bool = field(init=False)
    _center: Tensor | None = field(init=False)
    _noisy: bool = field(init=False)
    _norms: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        shared = self.broadcast.shared
        self.rules = self.rules.in_round(None if shared is None else shared.to(self.device))
        self._sum = self.broadcast.empty_sum(self.rules, self.device)
        form = feedback_of(self.rules.method)
        self._feedback = None if form is None or form.weight is not None else form
        self._without_memory = self._feedback is not None and self._feedback.beta is None
        self._in_c, self._center = None, None
        self._noisy = self.rules.noise_stddev > 0.0
        if self.native and self.rules.sums is None and self.device.type == "cpu" and self._feedback is not None:
            library = feedback_in_c()
            if library is not None and self._memories_suit_c():
                center = self._feedback.center
                self._center = None if center is None else center.clone().contiguous()
                self._in_c = FeedbackInC(
                    library, self._sum.running, self._feedback, self._sum.shift, self.broadcast.round
                )

    def take(self, clients: Sequence[int], signals: Tensor, state: ClientState) -> None:
        """Add the messages of `clients` to the sum and update their states in place.

        Args:
            clients: The senders.
            signals: `[clients, params]`, or longer for a method with its own signal; overwritten.
            state: Fields `[clients, ...]`.
        """
        norms = row_norms(signals[..., : len(self.broadcast.model)])
        round, turn = self.broadcast.round, self.broadcast.address
        release = self.rules.release_rows(turn, clients)
        if len(clients) == 1:  # as a vector, for the same bits as a client alone
            signals, norms, release = signals[0], norms[0], self.rules.release(turn, clients[0])
            state = type(state)(*(part[0] for part in state))
        if self._feedback is None:
            decisive = sum((row_norms(part.double()) for part in state), norms)
            self._by_rule(signals, state, release)
        else:
            sent, decisive = _feed_back_(self._feedback, signals, norms, state, release, round)
            self._sum.add(sent)
        self._norms += counted_norms(norms, decisive)

    def take_alone(self, client: int, signal: Tensor, states: StateStore, following: int | None = None) -> None:
        """Do the same as `take` for one client, in C if possible.

        Args:
            client: The sender.
            signal: `[params]`; overwritten.
            states: The store of its state.
            following: The next client, if any; its memory is prefetched.
        """
        if self._in_c is not None and not self._noisy and signal.dtype == torch.float32 and signal.is_contiguous():
            norm = self._take_in_c(self._in_c, client, signal.data_ptr(), states, following)
            if norm >= 0.0:
                self._norms.append(norm)
                return
        with states.borrowed((client,)) as state:
            self.take((client,), signal.unsqueeze(0), state)

    @property
    def in_c(self) -> bool:
        """True if C takes the steps of single clients, except in rare cases."""
        return self._in_c is not None and not self._noisy

    def take_many(self, clients: Sequence[int], signals: Tensor, states: StateStore) -> None:
        """Do the same as `take_alone` for several clients; in one call of C if no state has to move for it.

        Args:
            clients: The senders, each another.
            signals: `[clients, params]`; overwritten.
            states: The store of their states.
        """
        if self._in_c is None or not self._rows_suit_c(signals, states):
            for client, signal, following in zip(clients, signals, [*clients[1:], None], strict=True):
                self.take_alone(client, signal, states, following)
            return
        memories, updated = self._places(clients, states)
        if self._noisy:
            norms = self._send_in_c(self._in_c, clients, signals, memories, updated)
        elif self._without_memory:
            norms = self._in_c.add_bounded_rows(signals.data_ptr(), len(clients))
        else:
            norms = self._in_c.feed_back_rows(signals.data_ptr(), memories, updated)
        self._norms += [norm for norm in norms if norm >= 0.0]
        for client, signal, norm in zip(clients, signals, norms, strict=True) if min(norms, default=0.0) < 0.0 else ():
            if norm < 0.0:
                with states.borrowed((client,)) as state:
                    self.take((client,), signal.unsqueeze(0), state)

    def take_rows(self, clients: Sequence[int], signals: Tensor, states: StateStore) -> None:
        """Do the same as `take_many`, with torch for all clients at once if C does not take several."""
        if self._in_c is not None and self._rows_suit_c(signals, states):
            self.take_many(clients, signals, states)
            return
        with states.borrowed(clients) as state:
            self.take(clients, signals, state)

    def _rows_suit_c(self, signals: Tensor, states: StateStore) -> bool:
        stays = self._without_memory or states.capacity is None
        return stays and self._center is None and signals.dtype == torch.float32 and signals.is_contiguous()

    def _places(self, clients: Sequence[int], states: StateStore) -> tuple[Sequence[int], Sequence[int]]:
        """Return the addresses of the clients' memories, and of the rounds of their last changes; empty for none."""
        if self._without_memory:
            for client in clients:
                states.count(client)
            return (), ()
        memories, *updated = zip(*(states.addresses(client) for client in clients), strict=True)
        return memories, updated[0] if updated else ()

    def _send_in_c(
        self,
        in_c: FeedbackInC,
        clients: Sequence[int],
        signals: Tensor,
        memories: Sequence[int],
        updated: Sequence[int],
    ) -> list[float]:
        """Do the steps of clients that add noise, and return their signals' norms; -1 as in `FeedbackInC`."""
        norms = in_c.bound_rows(signals.data_ptr(), len(clients), memories, updated)
        taken = [k for k, norm in enumerate(norms) if norm >= 0.0]
        if len(taken) < len(norms):
            clients, signals = [clients[k] for k in taken], signals[taken]
            memories, updated = ([places[k] for k in taken if places] for places in (memories, updated))
        release = self.rules.release_rows(self.broadcast.address, clients)
        if release is not None and self._feedback is not None and clients:
            sent = release(signals).contiguous()
            remembered = sent if self._feedback.sent else signals
            in_c.add_sent_rows(sent.data_ptr(), remembered.data_ptr(), len(clients), memories, updated)
        return norms

    def take_with_state(self, client: int, signal: Callable[[ClientState], Tensor], states: StateStore) -> None:
        """Do the same for one client if its signal depends on its state.

        Args:
            client: The sender.
            signal: Returns its signal from its state.
            states: The store of its state.
        """
        with states.borrowed((client,)) as state:
            own = signal(type(state)(*(part[0] for part in state)))
            self.take((client,), own.unsqueeze(0), state)

    def _take_in_c(
        self, in_c: FeedbackInC, client: int, signal: int, states: StateStore, following: int | None
    ) -> float:
        """Do one client's step and return its signal's norm; in rare cases left to torch, do nothing and return -1."""
        if self._center is not None:  # a memory that does not change: beta is 0
            states.count(client)
            return in_c.feed_back(signal, self._center.data_ptr(), 0, self._center.data_ptr())
        if self._without_memory:
            states.count(client)
            return in_c.add_bounded(signal)
        memory, *updated = states.addresses(client)
        ahead = memory if following is None else states.address_of(following) or memory
        return in_c.feed_back(signal, memory, updated[0] if updated else 0, ahead)

    def _memories_suit_c(self) -> bool:
        """Return True if a client's state is at most one float32 vector and the round of its last change."""
        state = self.rules.init_client(1)
        kinds = [(name, field.dtype, field.numel()) for name, field in zip(state._fields, state, strict=True)]
        memory, updated = ("memory", torch.float32, 1), ("updated", torch.float32, 1)
        return kinds in ([], [memory], [memory, updated])

    def total(self) -> Total:
        """Return the sum of the messages of the round's clients, and their norms."""
        return total_of(self._sum, self._norms)

    def _by_rule(self, signals: Tensor, state: ClientState, release: Release | None) -> None:
        """Apply any rule. Its message and its new state may share tensors with the old state."""
        messages, new = apply_client_rule(self.rules.method, state, signals, release, self.broadcast.round)
        self._sum.add(messages)
        for target, source in zip(state, [part.clone() for part in new], strict=True):
            target.copy_(source)


def _feed_back_(
    rule: Feedback,
    signals: Tensor,
    norms: Tensor,
    state: ClientState,
    release: Release | None,
    round: int,
) -> tuple[Tensor, Tensor]:
    """Overwrite signals with messages and update memories in place; return the messages and the residuals' norms.

    The operations are those of `client_rule`, one by one.
    """
    if rule.beta is None:
        if rule.center is not None:
            signals.sub_(rule.center)
        rule.bounded.bound_(signals, norms if rule.center is None else None)
        return sent_message(signals, release), norms
    fields = state._asdict()
    memory = fields["memory"]
    if rule.damping > 0.0:
        memory.mul_((1.0 - rule.damping) ** (round - 1 - fields["updated"]))
    residuals = row_norms(signals.sub_(memory))
    rule.bounded.bound_(signals, residuals)
    if rule.damping > 0.0:
        memory.mul_(1.0 - rule.damping)
    signals = on_grid(signals, release)
    sent = sent_message(signals, release)
    memory.add_(sent if rule.sent else signals, alpha=rule.beta)
    if "updated" in fields:
        fields["updated"].fill_(round)
    return sent, residuals

"""Server of a deployment without the network: turns, counted messages and instructions to clients.

    turn = coordinator.begin()                              cohort and model of the turn
    (save)                                                  before anything is sent
    instructions, terms = coordinator.instructions(i)       for each client of the cohort
    outcome = coordinator.finish(replies, refusals)
    (save)                                                  before anything else is sent or published

A turn is one broadcast. If enough clients answer, the turn counts as a round of the method; otherwise none of its
messages are used. In both cases it is spent: the plan's number of rounds is a number of turns, and each turn is a row
of the matrix of correlated noise (see `fedpriv.mechanisms.correlated`). `save` and `restore` make a crash between any
two lines harmless. An unfinished turn restarts with the same cohort and the same model, so that clients repeat their
earlier answers. A turn's noise is drawn again only if no part of it has been seen.

Under secure aggregation, a turn ends in two steps. `close` fixes U, the clients in the sum. Only the saved U leads to
questions to the helpers: a server that forgot it could ask about another U, which every helper refuses.

    outcome = coordinator.close(messages, refusals)         None if the helpers have to be asked
    (save)                                                  before a helper is asked
    outcome = coordinator.conclude(answers, reason)         no answers: the turn is void
    (save)
"""

import json
import math
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedpriv.deploy.device.heads import Head
from fedpriv.deploy.heads import newer_heads
from fedpriv.deploy.parties import client_in_words, reasons_in_words
from fedpriv.deploy.sums import ClosedTurn, SecureSums
from fedpriv.errors import UserError
from fedpriv.experiment.deployment import DeploymentChoice, LostMemoryRule
from fedpriv.flower.messages import ClientInstructions, RunTerms
from fedpriv.flower.privacy_terms import promised
from fedpriv.flower.server.attendance import believed_losses
from fedpriv.flower.server.faults import message_fault
from fedpriv.methods import ServerState
from fedpriv.privacy import PrivacyPlan
from fedpriv.rounds import (
    Broadcast,
    ClientRules,
    ServerRules,
    Total,
    begin_round,
    capacity_of,
    finish_round,
    skip_round,
)
from fedpriv.secure import Answer, Closed, HelperKey, Masked, RoundFacts
from fedpriv.streams import SeededStreams

__all__ = ["Coordinator", "Outcome"]

Happened = Literal["applied", "too few", "reset", "void", "stopped"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Outcome of a turn.

    Args:
        turn: Number of the turn.
        asked: Clients that were asked, ascending.
        counted: Clients with a message in the sum.
        refused: Kind and reason by client.
        invalid: Fault of the message by client.
        happened: `applied`, `too few`, `reset`, or `void`: the sum could not be unmasked, or left its range;
            `stopped`: the turn ended the run, and resumption asks the same again.
        total: The sum, and metrics about it.
        reason: Reason of a turn that is void or stopped.
    """

    turn: int
    asked: list[int]
    counted: list[int]
    refused: dict[int, tuple[str, str]]
    invalid: dict[int, str]
    happened: Happened
    total: Total

    @property
    def silent(self) -> list[int]:
        """Clients that were asked and did not answer in time."""
        known = {*self.counted, *self.refused, *self.invalid, *self._unused}
        return [client for client in self.asked if client not in known]

    _unused: tuple[int, ...] = ()
    reason: str = ""


@dataclass
class Coordinator:
    """Server of a deployment; see the module.

    Args:
        server: Server's half of the agreement.
        client: Clients' half of the agreement.
        plan: Privacy plan; None without a privacy guarantee.
        choice: Minimum number of answers, and rule for lost memories.
        turns: Number of turns of the run.
        digest: Digest of the experiment.
        state: State of the server.
        run: Name of the run, drawn at random.
        turn: Last finished turn.
        applied: Number of turns that counted.
        epoch: Number of times that all memories were reset.
        last_turn: Last turn in which each client's message counted.
        left_out: Clients that are no longer asked.
        asked_times: Number of requests sent to each client, an upper bound on its messages.
        losses: Number of times that each client reported a lost memory.
        heads: Newest signed head of each client's ledger, sent with its instructions.
        sums: Sums under secure aggregation; None for other trusts.
    """

    server: ServerRules
    client: ClientRules
    plan: PrivacyPlan | None
    choice: DeploymentChoice
    turns: int
    digest: str
    state: ServerState
    run: str = field(default_factory=lambda: secrets.token_hex(16))
    turn: int = 0
    applied: int = 0
    epoch: int = 0
    last_turn: dict[int, int] = field(default_factory=dict)
    left_out: set[int] = field(default_factory=set)
    asked_times: Counter[int] = field(default_factory=Counter)
    losses: Counter[int] = field(default_factory=Counter)
    heads: dict[int, Head] = field(default_factory=dict)
    sums: SecureSums | None = None
    _open: Broadcast | None = None
    _closing: ClosedTurn | None = None

    def __post_init__(self) -> None:
        self.choice.check(self.server.method)
        if self.plan is not None and self.plan.rounds != self.turns:
            raise ValueError(f"the plan is for {self.plan.rounds} turns, and the run has {self.turns}")
        if self.secret_cohorts and self.choice.min_participants > 1:
            remedy = "Set it to 1, or choose another sampling: a round that fails reveals who was absent"
            expected = "1 if epsilon requires secret cohorts"
            raise UserError("deployment.min_participants", expected, self.choice.min_participants, remedy)
        if self.secret_cohorts and self.choice.absent == "leave-out":
            expected, remedy = '"wait" if epsilon requires secret cohorts', "Omit it: a short turn shows who was asked"
            raise UserError("deployment.absent", expected, '"leave-out"', remedy)
        if self.secret_cohorts and self.choice.lost_memory in ("reset-all", "stop"):
            expected = "another rule if epsilon requires secret cohorts"
            remedy = 'Set it to "leave-out" or remove it: a visible reaction to a lost memory reveals who was asked'
            raise UserError("deployment.lost_memory", expected, f'"{self.choice.lost_memory}"', remedy)

    @property
    def closed(self) -> Closed | None:
        """The open turn after U was fixed; None before that, and for other trusts."""
        return None if self._closing is None else self._closing.closed

    @property
    def done(self) -> bool:
        """True if all turns are finished."""
        return self.turn >= self.turns and self._open is None

    @property
    def secret_cohorts(self) -> bool:
        """True if epsilon holds only while the adversary does not know who takes part in a turn."""
        return self.plan is not None and self.plan.private and self.plan.amplification

    @property
    def turn_seconds(self) -> float:
        """Seconds from a broadcast until answers no longer count."""
        return self.choice.seconds(secret_cohorts=self.secret_cohorts)

    @property
    def lost_memory(self) -> LostMemoryRule:
        """Rule for a client that has lost its memory."""
        return self.server.method.lost_memory if self.choice.lost_memory == "method" else self.choice.lost_memory

    def begin(self) -> Broadcast:
        """Begin the next turn, or resume the turn that was interrupted by a crash."""
        if self._open is None:
            self._open = begin_round(self.server, self.state, self.turn + 1)
            self.asked_times.update(self.asked())
        return self._open

    def asked(self) -> list[int]:
        """Return the clients asked in the open turn: its cohort without the clients that are left out."""
        return [client for client in self._broadcast.cohort.tolist() if client not in self.left_out]

    def instructions(self, client: int) -> tuple[ClientInstructions, RunTerms]:
        """Return the instructions and terms for one client in the open turn."""
        rules, plan, sampling = self.client, self.plan, self.server.sampling
        seeded = isinstance(rules.streams, SeededStreams) and rules.draws_secrets
        instructions = ClientInstructions(
            method=rules.method,
            round=self.applied + 1,
            client=client,
            noise_stddev=rules.noise_stddev,
            examples="" if rules.examples is None else rules.examples.as_text(),
            step_stddev=rules.step_stddev,
            seed=rules.streams.seed if seeded else None,  # type: ignore[union-attr]
            noise_id=rules.streams.noise_id if seeded else "",  # type: ignore[union-attr]
            private=plan is not None,
        )
        terms = RunTerms(
            run=self.run,
            turn=self._broadcast.address,
            last_turn=self.last_turn.get(client, 0),
            epoch=self.epoch,
            digest=self.digest,
            helpers=() if self.sums is None else self.sums.shown(),
            **promised(plan, sampling, self.turns),
        )
        return instructions, terms

    def finish(
        self,
        replies: Mapping[int, Tensor],
        refusals: Mapping[int, tuple[str, str]],
        heads: Mapping[int, Head] | None = None,
    ) -> Outcome:
        """End the open turn with the answers that arrived in time.

        The noise is correct for any number of answers. Under central trust, its standard deviation on the sum is the
        plan's for any number of messages: a client that does not answer counts as a client with a zero message, and
        moves the sum by at most the bound. Under local trust, each message carries noise itself. The sum is divided by
        the expected cohort size, never by the actual one.

        Args:
            replies: Messages `[params]` by client.
            refusals: Kind and reason by client.
            heads: Heads of clients' ledgers in any of the answers.

        Raises:
            UserError: If a lost memory, or a lack of answers, stops the run according to its rules.
        """
        broadcast, asked = self._broadcast, self.asked()
        if self.sums is not None:
            raise RuntimeError("bare messages under secure aggregation")
        self.heads = newer_heads(self.heads, heads or {})
        invalid = {i: why for i in asked if i in replies and (why := self._fault(replies[i]))}
        valid = [i for i in asked if i in replies and i not in invalid]
        happened = self._judged(asked, valid, refusals)
        counted = valid if happened == "applied" else []
        total = self._sum(broadcast, replies, counted)
        refused = {i: refusals[i] for i in asked if i in refusals and i not in replies}
        self._end(happened, counted, total)
        return Outcome(
            turn=self.turn,
            asked=asked,
            counted=counted,
            refused=refused,
            invalid=invalid,
            happened=happened,
            total=total,
            _unused=tuple(valid),
        )

    def close(
        self,
        messages: Mapping[int, Masked],
        refusals: Mapping[int, tuple[str, str]],
        heads: Mapping[int, Head] | None = None,
    ) -> Outcome | None:
        """Fix U, the clients in the sum of the open turn, under secure aggregation. A fixed U stays as it is.

        Args:
            messages: Masked messages by client.
            refusals: Kind and reason by client.
            heads: Heads of clients' ledgers in any of the answers.

        Returns:
            The outcome if the turn does not count; None if the helpers have to be asked, after `save`.

        Raises:
            UserError: See `finish`.
        """
        if self._closing is not None:
            return None
        sums, asked = self._sums, self.asked()
        self.heads = newer_heads(self.heads, heads or {})
        collector, invalid = sums.collected(self._facts(), {i: messages[i] for i in asked if i in messages})
        valid = collector.clients
        happened = self._judged(asked, valid, refusals)
        refused = {i: refusals[i] for i in asked if i in refusals and i not in messages}
        if happened == "applied":
            self._closing = ClosedTurn(asked=asked, refused=refused, invalid=invalid, content=collector.close())
            return None
        total = self._nothing(len(valid))
        self._end(happened, [], total)
        return Outcome(
            turn=self.turn,
            asked=asked,
            counted=[],
            refused=refused,
            invalid=invalid,
            happened=happened,
            total=total,
            _unused=tuple(valid),
        )

    def conclude(self, answers: Sequence[Answer], reason: str = "") -> Outcome:
        """End the open turn after U was fixed.

        Args:
            answers: The answers of all helpers; none if one of them did not answer, and the turn is void.
            reason: Why there are no answers.
        """
        closing = self._closing
        if closing is None:
            raise RuntimeError("U is not fixed: call close")
        closed, sum_ = closing.closed, None
        if answers:
            sum_, reason = self._sums.total(closed, answers)
        else:
            self._sums.keys = []  # a helper that has lost its records makes a new key
        happened: Happened = "void" if sum_ is None else "applied"
        total = self._nothing(len(closed.clients))
        total = total if sum_ is None else Total(sum_, len(closed.clients), 0, math.nan)
        counted = [] if sum_ is None else closed.clients
        self._end(happened, counted, total)
        return Outcome(
            turn=self.turn,
            asked=closing.asked,
            counted=counted,
            refused=closing.refused,
            invalid=closing.invalid,
            happened=happened,
            total=total,
            _unused=tuple(closed.clients),
            reason=reason,
        )

    def save(self) -> dict[str, Tensor]:
        """Return everything except the server's state, as tensors; see `restore`."""
        facts: dict[str, object] = {"run": self.run, "turn": self.turn, "applied": self.applied, "epoch": self.epoch}
        facts |= {"last_turn": {str(k): v for k, v in self.last_turn.items()}, "left_out": sorted(self.left_out)}
        facts |= {"asked_times": {str(k): v for k, v in self.asked_times.items()}}
        facts |= {"losses": {str(k): v for k, v in self.losses.items()}}
        facts |= {"heads": {str(k): head.to_json() for k, head in self.heads.items()}}
        facts |= {"open": None if self._open is None else self._open.cohort.tolist()}
        facts |= {"helpers": [] if self.sums is None else self.sums.shown()}
        found = {"coordinator": torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)}
        return found if self._closing is None else {**found, **self._closing.save()}

    def restore(self, state: ServerState, tensors: dict[str, Tensor]) -> None:
        """Restore the saved tensors, together with the server's state from the same time."""
        facts = json.loads(tensors["coordinator"].numpy().tobytes())
        self.state, self.run = state, facts["run"]
        self.turn, self.applied, self.epoch = facts["turn"], facts["applied"], facts["epoch"]
        self.last_turn = {int(k): v for k, v in facts["last_turn"].items()}
        self.left_out = set(facts["left_out"])
        self.asked_times = Counter({int(k): v for k, v in facts["asked_times"].items()})
        self.losses = Counter({int(k): v for k, v in facts["losses"].items()})
        heads = {int(k): Head.of_json(head) for k, head in facts.get("heads", {}).items()}
        self.heads = {k: head for k, head in heads.items() if head is not None}
        if self.sums is not None:
            self.sums.keys = [HelperKey.from_bytes(bytes.fromhex(key)) for key in facts.get("helpers", [])]
        self._open, self._closing = None, ClosedTurn.restored(tensors)
        if facts["open"] is not None:
            cohort, turn = np.array(facts["open"], dtype=np.int64), self.turn + 1
            capacity, shared = capacity_of(self.server.sampling), self.server.shared(state)
            self._open = Broadcast(turn, state.model, cohort, capacity, turn=turn, shared=shared)

    @property
    def _broadcast(self) -> Broadcast:
        if self._open is None:
            raise RuntimeError("no turn is open: call begin")
        return self._open

    @property
    def least_messages(self) -> int:
        """Minimum number of messages for a turn to count.

        If cohorts are secret, every turn counts, including an empty one: the noise is correct in any case, and a turn
        that does not count would reveal who was in it.
        """
        if self.secret_cohorts:
            return 0
        return max(self.choice.min_participants, 0 if self.sums is None else self.sums.least)

    @property
    def _sums(self) -> SecureSums:
        if self.sums is None:
            raise RuntimeError("no secure aggregation")
        return self.sums

    def _facts(self) -> RoundFacts:
        """Return the facts of the open turn."""
        instructions, terms = self.instructions(int(self._broadcast.cohort[0]) if len(self._broadcast.cohort) else 0)
        return self._sums.facts(instructions, terms, self.state.model, self._broadcast.shared)

    def _judged(self, asked: list[int], valid: list[int], refusals: Mapping[int, tuple[str, str]]) -> Happened:
        """Return whether the open turn counts, after the rule for lost memories was applied."""
        lost = [i for i in asked if i in refusals and refusals[i][0] == "lost" and self.last_turn.get(i, 0) > 0]
        if lost and self.lost_memory == "stop":
            raise _stopped(lost)
        if self._memories_are_lost(lost):
            return "reset"
        if len(valid) < self.least_messages:
            if self.choice.too_few == "stop":
                raise self._too_few(valid, refusals)
            return "too few"
        return "applied"

    def _end(self, happened: Happened, counted: list[int], total: Total) -> None:
        """End the open turn."""
        turn = self._broadcast.address
        if happened == "applied":
            self.state = finish_round(self.server, self.state, turn, total.sum)
            self.applied += 1
            self.last_turn |= dict.fromkeys(counted, turn)
        else:
            self.state = skip_round(self.server, self.state)
        self.turn, self._open, self._closing = turn, None, None

    def _nothing(self, messages: int) -> Total:
        """Return the total of a turn under secure aggregation that does not count."""
        return Total(torch.zeros(len(self.state.model), dtype=torch.float64), messages, 0, math.nan, void=True)

    def _memories_are_lost(self, lost: list[int]) -> bool:
        """Apply the rule for lost memories, and return whether all memories are reset.

        If a loss is not believed (`believed_losses`), its client is left out. If cohorts are secret, none is believed:
        a reset would reveal in the model that this client was asked, while a client that is left out looks like a
        client with zero messages. The server's memory keeps the contribution of that client, as does the mean of all.
        """
        self.losses.update(lost)
        if self.lost_memory == "reset-one":
            self.last_turn |= dict.fromkeys(lost, 0)
            return False
        believed = [] if self.secret_cohorts else believed_losses(lost, self.losses, self.epoch, self.turns)
        if self.lost_memory == "leave-out" or not believed:
            self.left_out |= set(lost)
            if len(self.left_out) >= self.server.sampling.population:
                raise _stopped(sorted(self.left_out))
            return False
        self.left_out |= set(lost) - set(believed)
        self._reset_memories()
        return True

    def _too_few(self, valid: list[int], refusals: Mapping[int, tuple[str, str]]) -> UserError:
        expected = f"at least {self.least_messages} valid messages"
        reasons = {i: f"refuses: {why.rstrip('.')}" for i, (_, why) in sorted(refusals.items())}
        lacking = [client for client in self.asked() if client not in valid and client not in refusals]
        reasons |= dict.fromkeys(lacking, "no usable answer")
        got = f"{len(valid)}" + (f" ({reasons_in_words(reasons)})" if reasons else "")
        remedy = "Fix the clients and continue with --resume, or change [deployment]"
        if any(kind == "budget" for kind, _ in refusals.values()):
            remedy = "A used budget never refills: ask these clients' operators, or plan a new run that costs less"
        return UserError(f"turn {self._broadcast.address}", expected, got, remedy)

    def _reset_memories(self) -> None:
        """Reset the memories on both sides; the model stays."""
        self.state = self.server.reset_memories(self.state)
        self.epoch += 1
        self.last_turn = {}

    def _fault(self, message: Tensor) -> str:
        """Return the reason why a message is unusable; empty if it is usable."""
        return message_fault(message, self.client, len(self.state.model))

    def _sum(self, broadcast: Broadcast, replies: Mapping[int, Tensor], counted: list[int]) -> Total:
        summed = broadcast.empty_sum(self.client)
        for client in counted:
            summed.add(replies[client])
        return Total(summed.value, len(counted), 0, math.nan)


def _stopped(lost: list[int]) -> UserError:
    where = ", ".join(map(client_in_words, lost[:3]))
    remedy = 'Restore its state folder, or set deployment.lost_memory = "leave-out" or "reset-all"'
    return UserError(where, "its memory of earlier turns", "a lost memory", remedy)

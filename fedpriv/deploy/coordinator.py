"""The server of a deployment, but for the network: turns, what counted in them, and what is owed to whom.

    turn = coordinator.begin()              cohort and model of the turn
    (save)                                  before anything is sent
    order, terms = coordinator.order(i)     for each client of the cohort
    outcome = coordinator.finish(replies, refusals)
    (save)                                  before anything else is sent or published

A turn is one broadcast. It counts, and is a round of the method, if enough clients answered; else nothing of it is
used, and it is spent all the same: the plan's number of rounds is a number of turns. `save` and `restore` make a crash
between any two lines harmless: an unfinished turn is begun again with the same cohort and the same model, so that
clients answer with what they sent before, and a turn's noise is drawn anew only if nobody has seen anything of it.
"""

import json
import math
import secrets
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedpriv.deploy.device.heads import Head
from fedpriv.deploy.heads import newer_heads
from fedpriv.errors import UserError
from fedpriv.experiment.deployment import DeploymentChoice
from fedpriv.flower.messages import Order, Terms
from fedpriv.flower.promise import promised
from fedpriv.flower.server.attendance import believed_losses
from fedpriv.flower.server.faults import message_fault
from fedpriv.methods import ServerState
from fedpriv.privacy import PrivacyPlan
from fedpriv.rounds import Broadcast, ClientRules, ServerRules, Total, begin_round, capacity_of, finish_round
from fedpriv.streams import SeededStreams

__all__ = ["Coordinator", "Outcome"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a turn.

    Args:
        turn: Its number.
        asked: Who was asked, ascending.
        counted: Whose messages are in the sum.
        refused: By client, kind and reason.
        invalid: By client, what was wrong with the message.
        happened: `applied`, `too few` or `re-based`.
        total: The sum, and figures about it.
    """

    turn: int
    asked: list[int]
    counted: list[int]
    refused: dict[int, tuple[str, str]]
    invalid: dict[int, str]
    happened: str
    total: Total

    @property
    def silent(self) -> list[int]:
        """Who was asked and did not answer in time."""
        known = {*self.counted, *self.refused, *self.invalid, *self._unused}
        return [client for client in self.asked if client not in known]

    _unused: tuple[int, ...] = ()


@dataclass
class Coordinator:
    """See the module.

    Args:
        server: The server's half of the agreement.
        client: The clients' half.
        plan: What is promised; None for nothing.
        choice: How many must answer, and what happens where memories are lost.
        turns: How many turns the run has.
        digest: The experiment.
        state: The server's state.
        run: The run's name; drawn at random.
        turn: The last finished turn.
        applied: How many turns counted.
        epoch: How often all memories began anew.
        last_turn: By client, the last turn in which its message counted.
        left_out: Who is asked no more.
        asked_times: By client, how often it was asked: at most so often did it send a message.
        losses: By client, how often it said that its memory was lost.
        heads: By client, the newest signed head of its ledger, to be shown with its orders.
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
    _open: Broadcast | None = None

    def __post_init__(self) -> None:
        self.choice.check(self.server.method)
        if self.plan is not None and self.plan.rounds != self.turns:
            raise ValueError(f"the plan is for {self.plan.rounds} turns, and the run has {self.turns}")
        if self.secret_cohorts and self.choice.min_participants > 1:
            remedy = (
                "Set it to 1, or choose another sampling: a round that fails for want of answers shows who was away"
            )
            expected = "1 where epsilon relies on nobody knowing who takes part"
            raise UserError("deployment.min_participants", expected, self.choice.min_participants, remedy)
        if self.secret_cohorts and self.choice.lost_memory in ("re-base", "stop"):
            expected = "another rule where epsilon relies on nobody knowing who takes part"
            remedy = 'Choose "leave-out", or leave it out: what all can see when one memory is lost shows who was asked'
            raise UserError("deployment.lost_memory", expected, f'"{self.choice.lost_memory}"', remedy)

    @property
    def done(self) -> bool:
        """Whether all turns are finished."""
        return self.turn >= self.turns and self._open is None

    @property
    def secret_cohorts(self) -> bool:
        """Whether epsilon relies on nobody knowing who takes part in a turn."""
        return self.plan is not None and self.plan.private and self.plan.amplification

    @property
    def turn_seconds(self) -> float:
        """Seconds from a broadcast until answers count no more."""
        return self.choice.seconds(secret_cohorts=self.secret_cohorts)

    @property
    def lost_memory(self) -> str:
        """What happens when a client has lost its memory."""
        return self.server.method.lost_memory if self.choice.lost_memory == "method" else self.choice.lost_memory

    def begin(self) -> Broadcast:
        """The next turn, or the one that was begun before a crash."""
        if self._open is None:
            self._open = begin_round(self.server, self.state, self.turn + 1)
            self.asked_times.update(self.asked())
        return self._open

    def asked(self) -> list[int]:
        """Who is asked in the open turn: its cohort but for those who are left out."""
        return [client for client in self._broadcast.cohort.tolist() if client not in self.left_out]

    def order(self, client: int) -> tuple[Order, Terms]:
        """What one client is told in the open turn."""
        rules, plan, sampling = self.client, self.plan, self.server.sampling
        seeded = isinstance(rules.streams, SeededStreams) and rules.noise_stddev > 0.0
        order = Order(
            method=rules.method,
            round=self.applied + 1,
            client=client,
            noise_stddev=rules.noise_stddev,
            seed=rules.streams.seed if seeded else None,  # type: ignore[union-attr]
            noise_id=rules.streams.noise_id if seeded else "",  # type: ignore[union-attr]
            private=plan is not None,
        )
        terms = Terms(
            run=self.run,
            turn=self._broadcast.round,
            last_turn=self.last_turn.get(client, 0),
            epoch=self.epoch,
            digest=self.digest,
            **promised(plan, sampling, self.turns),
        )
        return order, terms

    def finish(
        self,
        replies: Mapping[int, Tensor],
        refusals: Mapping[int, tuple[str, str]],
        heads: Mapping[int, Head] | None = None,
    ) -> Outcome:
        """Ends the open turn with what came back in time.

        The noise is right however few answer. Where trust is central, its standard deviation on the sum is the plan's,
        for any number of messages: a client that does not answer is one whose message is zero, and moves the sum by at
        most the bound. Where trust is local, each message carries its own noise. The sum is divided by the expected
        cohort size, never by the actual one.

        Args:
            replies: Messages `[params]` by client.
            refusals: Kind and reason by client.
            heads: The heads of clients' ledgers that came, whatever else did.

        Raises:
            UserError: If a memory is lost and the rule is to stop, or too few answered and that stops the run.
        """
        broadcast, asked = self._broadcast, self.asked()
        self.heads = newer_heads(self.heads, heads or {})
        invalid = {i: why for i in asked if i in replies and (why := self._fault(replies[i]))}
        valid = [i for i in asked if i in replies and i not in invalid]
        lost = [i for i in asked if i in refusals and refusals[i][0] == "lost" and self.last_turn.get(i, 0) > 0]
        happened = "applied"
        if lost and self.lost_memory == "stop":
            raise _stopped(lost)
        if self._memories_are_lost(lost):
            happened = "re-based"
        elif len(valid) < self._needed:
            happened = "too few"
            if self.choice.too_few == "stop":
                raise self._too_few(valid, refusals)
        counted = valid if happened == "applied" else []
        total = self._sum(broadcast, replies, counted)
        if happened == "applied":
            self.state = finish_round(self.server, self.state, broadcast.round, total.sum)
            self.applied += 1
            self.last_turn |= dict.fromkeys(counted, broadcast.round)
        self.turn, self._open = broadcast.round, None
        return Outcome(
            turn=broadcast.round,
            asked=asked,
            counted=counted,
            refused={i: refusals[i] for i in asked if i in refusals and i not in replies},
            invalid=invalid,
            happened=happened,
            total=total,
            _unused=tuple(valid),
        )

    def save(self) -> dict[str, Tensor]:
        """All but the server's state, as tensors; see `restore`."""
        facts: dict[str, Any] = {"run": self.run, "turn": self.turn, "applied": self.applied, "epoch": self.epoch}
        facts |= {"last_turn": {str(k): v for k, v in self.last_turn.items()}, "left_out": sorted(self.left_out)}
        facts |= {"asked_times": {str(k): v for k, v in self.asked_times.items()}}
        facts |= {"losses": {str(k): v for k, v in self.losses.items()}}
        facts |= {"heads": {str(k): head.to_json() for k, head in self.heads.items()}}
        facts |= {"open": None if self._open is None else self._open.cohort.tolist()}
        return {"coordinator": torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)}

    def restore(self, state: ServerState, tensors: dict[str, Tensor]) -> None:
        """Goes on from what was saved, with the server's state of then."""
        facts = json.loads(tensors["coordinator"].numpy().tobytes())
        self.state, self.run = state, facts["run"]
        self.turn, self.applied, self.epoch = facts["turn"], facts["applied"], facts["epoch"]
        self.last_turn = {int(k): v for k, v in facts["last_turn"].items()}
        self.left_out = set(facts["left_out"])
        self.asked_times = Counter({int(k): v for k, v in facts["asked_times"].items()})
        self.losses = Counter({int(k): v for k, v in facts["losses"].items()})
        heads = {int(k): Head.of_json(head) for k, head in facts.get("heads", {}).items()}
        self.heads = {k: head for k, head in heads.items() if head is not None}
        self._open = None
        if facts["open"] is not None:
            cohort = np.array(facts["open"], dtype=np.int64)
            self._open = Broadcast(self.turn + 1, state.model, cohort, capacity_of(self.server.sampling))

    @property
    def _broadcast(self) -> Broadcast:
        if self._open is None:
            raise RuntimeError("no turn is open: call begin")
        return self._open

    @property
    def _needed(self) -> int:
        """Without how many messages nothing of a turn is used.

        Where cohorts are secret every turn counts, also an empty one: the noise is right anyway, and whether a turn
        counted must not show who was in it.
        """
        return 0 if self.secret_cohorts else self.choice.min_participants

    def _memories_are_lost(self, lost: list[int]) -> bool:
        """Follows the rule for lost memories; whether all begin anew.

        A client whose loss is not believed (`believed_losses`) is left out. Where cohorts are secret, none is believed:
        that all begin anew would show in the model that this client was asked, and whoever is left out looks like one
        whose messages are zero. The server's memory keeps what it holds of that client, as does the mean of all.
        """
        self.losses.update(lost)
        if self.lost_memory == "start-afresh":
            self.last_turn |= dict.fromkeys(lost, 0)
            return False
        believed = [] if self.secret_cohorts else believed_losses(lost, self.losses, self.epoch, self.turns)
        if self.lost_memory == "leave-out" or not believed:
            self.left_out |= set(lost)
            if len(self.left_out) >= self.server.sampling.population:
                raise _stopped(sorted(self.left_out))
            return False
        self.left_out |= set(lost) - set(believed)
        self._start_anew()
        return True

    def _too_few(self, valid: list[int], refusals: Mapping[int, tuple[str, str]]) -> UserError:
        expected = f"at least {self.choice.min_participants} valid messages"
        reasons = [f"client {i} refuses: {why.rstrip('.')}" for i, (_, why) in sorted(refusals.items())]
        got = f"{len(valid)}" + (f" ({'; '.join(reasons[:2])})" if reasons else "")
        remedy = "Mend the clients and go on with --resume, or change [deployment]"
        return UserError(f"turn {self._broadcast.round}", expected, got, remedy)

    def _start_anew(self) -> None:
        """Fresh memories on both sides; the model stays."""
        self.state = self.server.begin_anew(self.state)
        self.epoch += 1
        self.last_turn = {}

    def _fault(self, message: Tensor) -> str:
        """Return why a message cannot be used; empty if it can."""
        return message_fault(message, self.client, len(self.state.model))

    def _sum(self, broadcast: Broadcast, replies: Mapping[int, Tensor], counted: list[int]) -> Total:
        summed = broadcast.empty_sum(self.client)
        for client in counted:
            summed.add(replies[client].float())
        return Total(summed.value, len(counted), 0, math.nan)


def _stopped(lost: list[int]) -> UserError:
    where = ", ".join(f"client {i}" for i in lost[:3])
    remedy = 'Put back its state folder, or set deployment.lost_memory = "leave-out" or "re-base"'
    return UserError(where, "its memory of earlier turns", "none", remedy)

"""Attendance in a run over Flower's network: clients asked, messages that count, and failures.

A client that does not answer, or sends an unusable message, counts as a client with a zero message. Every round
therefore counts, however few clients answer, and the noise stays correct. Under central trust, the noise has the plan's
standard deviation on the sum of any number of messages. Under local trust, each message carries noise itself. The sum
is divided by the expected cohort size. If a message does not count, its client drops the memory of it
(`fedpriv.flower.state`), so that error feedback also stays correct.

A run ends if more than a given share of a round's clients fail, because the user asked for a run with more clients. If
cohorts are secret, ending the run would reveal who was in them. Such a run ends only while no message has counted at
all, which detects an app that fails on every client. For the same reason a lost memory then never resets all memories.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedpriv.errors import UserError, number_of
from fedpriv.flower.server.nodes import in_words
from fedpriv.methods import LostMemory
from fedpriv.privacy import PrivacyPlan
from fedpriv.rounds import ServerRules, Total

__all__ = ["MAX_FAILURES", "Attendance", "believed_losses"]

MAX_FAILURES = 0.5
"""Default of the largest share of a round's clients that may fail."""

# If cohorts are secret, a run ends if this many different clients fail and none succeeds.
_MIN_FAILED = 10


@dataclass(kw_only=True)
class Attendance:
    """Record of who took part in a run.

    Args:
        population: Number of clients.
        rounds: Number of rounds of the run.
        max_failures: Largest share of a round's clients that may fail; None for no limit.
        secret: True if epsilon holds only while the adversary does not know who is in a cohort.
        lost_memory: Rule for a client that has lost its memory; see `Method.lost_memory`.
        last_round: Last round in which each client's message counted.
        left_out: Clients that are no longer asked, because they lost their memories.
        voids: Number of void rounds under secure aggregation.
        losses: Number of times that each client reported a lost memory.
        resets: Number of times that all memories were reset.
        counted: Number of messages that counted.
        failed: First failure of each client.
        asked_times: How often each client was asked.
        messages: Number of messages in sums, as far as clients report it.
        non_finite: Number of these that were not finite.
        remedy: Remedy for too many failures; empty for the remedy for users of a strategy.
    """

    population: int
    rounds: int
    max_failures: float | None
    secret: bool
    lost_memory: LostMemory
    last_round: dict[int, int] = field(default_factory=dict)
    left_out: set[int] = field(default_factory=set)
    losses: Counter[int] = field(default_factory=Counter)
    resets: int = 0
    counted: int = 0
    failed: dict[int, str] = field(default_factory=dict)
    remedy: str = ""
    voids: int = 0
    asked_times: Counter[int] = field(default_factory=Counter)
    messages: int = 0
    non_finite: int = 0

    @classmethod
    def of(
        cls,
        server: ServerRules,
        plan: PrivacyPlan | None,
        population: int,
        rounds: int,
        limit: float | None,
        *,
        seeded: bool,
    ) -> "Attendance":
        """Return the record of a run before its first round.

        Args:
            server: The server's half of the agreement.
            plan: The privacy plan.
            population: Number of clients.
            rounds: Number of rounds.
            limit: Largest share of a round's clients that may fail; None for the default.
            seeded: True if cohorts follow from a seed, and are no secret.

        Raises:
            UserError: If a limit would reveal secret cohorts.
        """
        secret = plan is not None and plan.private and plan.amplification
        if secret and limit is not None and not seeded:
            expected = "None because epsilon relies on secret cohorts"
            remedy = "Omit it, or choose another cohort: a run that ends for lack of answers shows who was away"
            raise UserError("max_failures", expected, limit, remedy)
        return cls(
            population=population,
            rounds=rounds,
            max_failures=MAX_FAILURES if limit is None and not secret else limit,
            secret=secret,
            lost_memory=server.method.lost_memory,
        )

    def asked(self, cohort: Iterable[int]) -> list[int]:
        """Return the clients of a cohort that are asked, and count them."""
        found = [client for client in cohort if client not in self.left_out]
        self.asked_times.update(found)
        return found

    def times_asked(self) -> np.ndarray:
        """Return how often each client was asked, int64 `[clients]`."""
        return np.array([self.asked_times[client] for client in range(self.population)], dtype=np.int64)

    def save(self) -> dict[str, object]:
        """Return the record of the rounds so far, as values that JSON can represent."""
        counts = {name: _texts(getattr(self, name)) for name in _BY_CLIENT}
        return {**counts, "left_out": sorted(self.left_out), **{name: getattr(self, name) for name in _TOTALS}}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Restore what `save` returned."""
        self.last_round, self.failed = _by_client(saved["last_round"]), _by_client(saved["failed"])
        self.losses, self.asked_times = Counter(_by_client(saved["losses"])), Counter(_by_client(saved["asked_times"]))
        self.left_out = set(saved["left_out"])
        for name in _TOTALS:
            setattr(self, name, saved[name])

    def judge(
        self,
        round: int,
        counted: Collection[int],
        failures: Mapping[int, str],
        lost: Collection[int] = (),
    ) -> bool:
        """Record the answers of a round, and return whether its messages are used; otherwise all memories are reset.

        Args:
            round: Number of the round.
            counted: Clients with a usable message.
            failures: For each other client, one line with the reason.
            lost: Clients among these that report a lost memory.

        Raises:
            UserError: If too many clients failed, or no client is left.
        """
        self.failed = {**failures, **self.failed}
        if self.max_failures != 0.0 and self._reset_by(lost):
            return False
        self._refuse_too_many(round, counted, failures)
        return True

    def count(self, round: int, counted: Collection[int], *, void: bool = False) -> None:
        """Record the clients that count in a round, after `judge`; none if the round is void."""
        if void:
            self.voids += 1
            return
        self.last_round |= dict.fromkeys(counted, round)
        self.counted += len(counted)

    def note(self, total: Total) -> None:
        """Record the messages of a round's sum."""
        self.messages += total.messages
        self.non_finite += total.non_finite

    def refuse_nothing(self) -> None:
        """Raise a `UserError` if no message of the whole run counted, or none is known to be finite."""
        if self.counted == 0 and self.rounds > 0:
            got = f"0 messages in {number_of(self.rounds, 'round')}"
            if self.failed:
                got += f"; the first failures: {in_words(self.failed)}"
            else:
                got += f"; {number_of(self.voids, 'round')} void" if self.voids else "; no client was asked"
            remedy = "Do not use the model: it holds the initial values and at most noise"
            raise UserError("the run", "messages that count", got, remedy)
        if 0 < self.messages == self.non_finite:
            got = f"{number_of(self.messages, 'update')} with values that are not finite, counted as zero"
            raise UserError("the run", "updates of finite numbers", got, "Lower the learning rate of the app")

    def _refuse_too_many(self, round: int, counted: Collection[int], failures: Mapping[int, str]) -> None:
        asked = len(counted) + len(failures)
        expected = f"answers from at least {asked - self._tolerated(asked)} of {number_of(asked, 'client')}"
        if self.secret and self.max_failures is None:
            if self.counted or counted or len(self.failed) < min(_MIN_FAILED, self.population):
                return
            failures, expected = self.failed, "an answer from any client"
        elif len(failures) <= self._tolerated(asked):
            return
        elif self._tolerated(asked) == 0:
            expected = f"an answer from each of {number_of(asked, 'client')}"
        remedy = "Fix these clients and start the run again"
        remedy += ", or raise max_failures" if self.max_failures is not None and self.max_failures < 1.0 else ""
        raise UserError(f"round {round}", expected, in_words(failures), self.remedy or remedy)

    def _tolerated(self, asked: int) -> int:
        return asked if self.max_failures is None else math.floor(self.max_failures * asked + 1e-9)

    def _reset_by(self, lost: Collection[int]) -> bool:
        """Apply the rule for lost memories, and return whether all memories are reset."""
        lost = [client for client in lost if self.last_round.get(client, 0) > 0]
        self.losses.update(lost)
        if self.lost_memory == "reset-one":
            self.last_round |= dict.fromkeys(lost, 0)
            return False
        believed = [] if self.secret else believed_losses(lost, self.losses, self.resets, self.rounds)
        self.left_out |= set(lost) - set(believed)
        if len(self.left_out) >= self.population:
            raise UserError("clients", "memories of earlier rounds", "lost memories on all", "Start the run again")
        if believed:
            self.resets += 1
            self.last_round = {}
        return bool(believed)


_BY_CLIENT = ("last_round", "failed", "losses", "asked_times")
_TOTALS = ("resets", "counted", "voids", "messages", "non_finite")


def _texts(by_client: Mapping[int, object]) -> dict[str, object]:
    return {str(client): value for client, value in by_client.items()}


def _by_client(saved: Mapping[str, Any]) -> dict[int, Any]:
    return {int(client): value for client, value in saved.items()}


def believed_losses(lost: Iterable[int], losses: Mapping[int, int], resets: int, rounds: int) -> list[int]:
    """Return the clients whose lost memory resets all memories.

    The server cannot verify a reported loss, so a client could force resets forever. A second loss of the same client
    therefore never resets all memories, nor does any loss after a tenth of the rounds ended in resets.

    Args:
        lost: Clients that report a lost memory now.
        losses: Number of reports of each client, including this one.
        resets: Number of resets so far.
        rounds: Number of rounds of the run.
    """
    return [client for client in lost if losses[client] == 1 and resets < max(1, rounds // 10)]

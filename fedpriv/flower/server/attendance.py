"""Who is asked, whose message counted, and when too many clients failed, in a run over Flower's network.

A client that does not answer, or whose message cannot be used, is one whose message is zero. So every round counts,
however few answer. The noise is right: where trust is central, it has the plan's standard deviation on the sum of any
number of messages; where trust is local, each message carries its own. The sum is divided by the expected cohort size.
A client whose message does not count drops the memory of it (`fedpriv.flower.state`), so that error feedback stays
right, too.

A run ends if more than a stated share of a round's clients fail, since a run of few clients is not what was asked for.
If cohorts are secret, that would show who was in them: a run then ends only while no message has counted at all, which
is how an app that fails everywhere is found out. For the same reason a lost memory then never resets all memories.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from fedpriv.errors import UserError
from fedpriv.flower.server.nodes import in_words

__all__ = ["MAX_FAILURES", "Attendance", "believed_losses"]

MAX_FAILURES = 0.5
"""Largest share of a round's clients that may fail, if nobody says otherwise."""

# If cohorts are secret: as many different clients must fail, and none succeed, before the run ends.
_ENOUGH_FAILED = 10


@dataclass(kw_only=True)
class Attendance:
    """Record of who took part in a run.

    Args:
        population: Number of clients.
        rounds: Number of rounds of the run.
        max_failures: Largest share of a round's clients that may fail; None for no limit.
        secret: Whether the promise relies on nobody knowing who is in a cohort.
        lost_memory: What happens if a client has lost its memory: see `Method.lost_memory`.
        last_round: By client, the last round in which its message counted.
        left_out: Clients that are asked no more, because their memories were lost.
        losses: By client, how often it said that its memory was lost.
        resets: How often all memories began again.
        counted: Number of messages that counted.
        failed: By client, its first failure.
        remedy: What to do about too many failures; empty for what a strategy's user can do.
    """

    population: int
    rounds: int
    max_failures: float | None
    secret: bool
    lost_memory: str
    last_round: dict[int, int] = field(default_factory=dict)
    left_out: set[int] = field(default_factory=set)
    losses: Counter[int] = field(default_factory=Counter)
    resets: int = 0
    counted: int = 0
    failed: dict[int, str] = field(default_factory=dict)
    remedy: str = ""

    def asked(self, cohort: Iterable[int]) -> list[int]:
        """Return the clients of a cohort that are asked."""
        return [client for client in cohort if client not in self.left_out]

    def finish(
        self,
        round: int,
        counted: Collection[int],
        failures: Mapping[int, str],
        lost: Collection[int] = (),
    ) -> bool:
        """Take note of a round, and return whether its messages are used; otherwise all memories begin again.

        Args:
            round: Its number.
            counted: Clients whose message can be used.
            failures: By client, one line about why its message cannot be used or had.
            lost: The clients among these that say that their memory is lost.

        Raises:
            UserError: If too many failed, or no client is left.
        """
        self.failed = {**failures, **self.failed}
        if self.max_failures != 0.0 and self._reset_by(lost):
            return False
        self._refuse_too_many(round, counted, failures)
        self.last_round |= dict.fromkeys(counted, round)
        self.counted += len(counted)
        return True

    def refuse_nothing(self) -> None:
        """Raise UserError if no message counted in the whole run."""
        if self.counted == 0 and self.rounds > 0:
            got = f"none in {self.rounds} rounds"
            got += f"; the first failures: {in_words(self.failed)}" if self.failed else "; no client was asked"
            raise UserError("the run", "messages that count", got, "The model is the first one, and noise at most")

    def _refuse_too_many(self, round: int, counted: Collection[int], failures: Mapping[int, str]) -> None:
        asked = len(counted) + len(failures)
        expected = f"answers from at least {asked - self._tolerated(asked)} of {asked} clients"
        if self.secret and self.max_failures is None:
            if self.counted or counted or len(self.failed) < min(_ENOUGH_FAILED, self.population):
                return
            failures, expected = self.failed, "an answer from any client"
        elif len(failures) <= self._tolerated(asked):
            return
        elif self._tolerated(asked) == 0:
            expected = f"an answer from each of {asked} clients"
        remedy = "Fix these clients and start the run again"
        remedy += ", or raise max_failures" if self.max_failures is not None and self.max_failures < 1.0 else ""
        raise UserError(f"round {round}", expected, in_words(failures), self.remedy or remedy)

    def _tolerated(self, asked: int) -> int:
        return asked if self.max_failures is None else math.floor(self.max_failures * asked + 1e-9)

    def _reset_by(self, lost: Collection[int]) -> bool:
        """Follow the rule for lost memories, and return whether all memories begin again."""
        lost = [client for client in lost if self.last_round.get(client, 0) > 0]
        self.losses.update(lost)
        if self.lost_memory == "start-afresh":
            self.last_round |= dict.fromkeys(lost, 0)
            return False
        believed = [] if self.secret else believed_losses(lost, self.losses, self.resets, self.rounds)
        self.left_out |= set(lost) - set(believed)
        if len(self.left_out) >= self.population:
            raise UserError("clients", "memories of earlier rounds", "none at any of them", "Start the run again")
        if believed:
            self.resets += 1
            self.last_round = {}
        return bool(believed)


def believed_losses(lost: Iterable[int], losses: Mapping[int, int], resets: int, rounds: int) -> list[int]:
    """Return the clients whose lost memory makes all memories begin again.

    A client whose word must be taken for it could make all begin again for ever. So a second loss of the same client,
    and any once a tenth of the rounds went that way, is not among them.

    Args:
        lost: Clients that say so now.
        losses: By client, how often it said so, this time included.
        resets: How often all memories began again so far.
        rounds: Number of rounds of the run.
    """
    return [client for client in lost if losses[client] == 1 and resets < max(1, rounds // 10)]

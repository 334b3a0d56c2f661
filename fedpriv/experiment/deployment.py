"""The table `[deployment]`: how a run on real devices waits for clients and handles failures."""

from dataclasses import dataclass, field
from typing import Literal

from fedpriv.checks import at_least_one
from fedpriv.errors import UserError
from fedpriv.methods import Method, own_signal_of

__all__ = ["DeploymentChoice"]

_SECONDS = 300.0
# A turn with a secret cohort always takes this long: enough for devices that start a process for each message.
_SECRET_SECONDS = 60.0


_FORMERLY = {"start-afresh": "reset-one", "re-base": "reset-all"}
LostMemoryRule = Literal["method", "reset-one", "reset-all", "leave-out", "stop"]
"""The actions of a deployment when a client has lost its memory; see `DeploymentChoice`."""


@dataclass(frozen=True, kw_only=True)
class DeploymentChoice:
    """Deadlines, the minimum number of clients, and the handling of failures. Simulations ignore this table.

    Args:
        deadline: Seconds from a broadcast to the end of its turn; later answers do not count. A turn ends with its last
            answer. If cohorts are secret, it lasts until the deadline, regardless of which clients were asked. None:
            300, or 60 if cohorts are secret.
        min_participants: Minimum number of valid messages in a turn; with fewer, the turn is discarded.
        too_few: skip: the turn is spent and the next one begins. stop: the run ends, and resumes with --resume.
        lost_memory: The action when a client has lost its memory. method: follow the method, but leave-out instead of
            reset-all if cohorts are secret. reset-one: reset that client's memory; refused if the server would keep
            the lost part forever. reset-all: reset all memories. leave-out: stop asking that client. stop: end the run.
            reset-all and stop are refused if cohorts are secret.
        join_timeout: Seconds to wait at the start for `min_participants` clients.
        absent: wait: a turn lasts until its deadline if it asks a client that has never connected. leave-out: it ends
            when all others have answered; the client is asked as soon as it connects. Refused if cohorts are secret.
    """

    deadline: float | None = None
    min_participants: int = 1
    too_few: Literal["skip", "stop"] = "skip"
    lost_memory: LostMemoryRule = field(default="method", metadata={"formerly": _FORMERLY})
    join_timeout: float = 300.0
    absent: Literal["wait", "leave-out"] = field(default="wait", metadata={"absent_by_default": True})

    def __post_init__(self) -> None:
        for key in ("deadline", "join_timeout"):
            seconds = getattr(self, key)
            if seconds is not None and not 0.0 < seconds < 1e9:
                raise UserError(
                    f"deployment.{key}", "seconds above 0", seconds, f"Set deployment.{key} to some minutes"
                )
        at_least_one("deployment.min_participants", self.min_participants, "Set it to 1 or more")

    def seconds(self, *, secret_cohorts: bool) -> float:
        """Return the seconds from a broadcast to the end of its turn.

        Args:
            secret_cohorts: True if epsilon relies on the cohort being secret.
        """
        if self.deadline is not None:
            return self.deadline
        return _SECRET_SECONDS if secret_cohorts else _SECONDS

    def check(self, method: Method) -> None:
        """Raise UserError unless the rule for lost memories suits this method."""
        if self.lost_memory == "reset-one" and method.lost_memory != "reset-one":
            expected = "another rule, because this method's memory does not fade"
            remedy = 'Choose "reset-all", or set method.damping: the server would keep the lost part forever'
            raise UserError("deployment.lost_memory", expected, '"reset-one"', remedy)
        own = own_signal_of(method)
        if self.lost_memory == "reset-all" and own is not None and own.needs_everyone:
            expected = "another rule, because every client counts the rounds to the next restart"
            remedy = 'Choose "reset-one": the next restart makes up for a lost model'
            raise UserError("deployment.lost_memory", expected, '"reset-all"', remedy)

"""The table `[deployment]`: what a run asks of real devices."""

from dataclasses import dataclass
from typing import Literal

from fedpriv.checks import at_least_one
from fedpriv.errors import UserError
from fedpriv.methods import Method

__all__ = ["DeploymentChoice"]

_SECONDS = 300.0
# A turn with a secret cohort takes all of it: enough for devices that start a process for each message.
_SECRET_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class DeploymentChoice:
    """How long is waited, for how many, and what happens otherwise. Simulations leave it out of account.

    Args:
        deadline: Seconds from a broadcast to the end of its turn; who answers later has not answered. A turn ends when
            the last answer is there, but where cohorts are secret it lasts until then, whoever was asked. None: 300, or
            60 where cohorts are secret.
        min_participants: Valid messages without which nothing of a turn is used.
        too_few: skip: the turn is spent and the next one begins. stop: the run ends, and goes on with --resume.
        lost_memory: What happens when a client has lost its memory. method: what the method says, but leave-out instead
            of re-base where cohorts are secret. start-afresh: that client begins anew; refused where the server would
            hold what was lost for ever. re-base: all memories begin anew. leave-out: that client is asked no more.
            stop: the run ends. re-base and stop are refused where cohorts are secret.
        join_timeout: Seconds to wait at the start until `min_participants` clients are there.
    """

    deadline: float | None = None
    min_participants: int = 1
    too_few: Literal["skip", "stop"] = "skip"
    lost_memory: Literal["method", "start-afresh", "re-base", "leave-out", "stop"] = "method"
    join_timeout: float = 300.0

    def __post_init__(self) -> None:
        for key in ("deadline", "join_timeout"):
            seconds = getattr(self, key)
            if seconds is not None and not 0.0 < seconds < 1e9:
                raise UserError(f"deployment.{key}", "seconds above 0", seconds, "Give some minutes")
        at_least_one("deployment.min_participants", self.min_participants, "Give a number")

    def seconds(self, *, secret_cohorts: bool) -> float:
        """Return the seconds from a broadcast to the end of its turn.

        Args:
            secret_cohorts: Whether epsilon relies on nobody knowing who takes part.
        """
        if self.deadline is not None:
            return self.deadline
        return _SECRET_SECONDS if secret_cohorts else _SECONDS

    def check(self, method: Method) -> None:
        """Raises UserError unless the rule for lost memories is one for this method."""
        if self.lost_memory == "start-afresh" and method.lost_memory != "start-afresh":
            expected = "another rule with a method whose memory does not fade"
            remedy = 'What is lost would stay in the server\'s memory for ever: choose "re-base", or set method.damping'
            raise UserError("deployment.lost_memory", expected, '"start-afresh"', remedy)

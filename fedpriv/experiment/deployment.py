"""The table `[deployment]`: what a run asks of real devices."""

from dataclasses import dataclass
from typing import Literal

from fedpriv.errors import UserError

__all__ = ["DeploymentChoice"]


@dataclass(frozen=True, kw_only=True)
class DeploymentChoice:
    """How long is waited, for how many, and what happens otherwise. Simulations leave it out of account.

    Args:
        deadline: Seconds from a broadcast to the end of its turn; who answers later has not answered.
        min_participants: Valid messages without which nothing of a turn is used.
        too_few: skip: the turn is spent and the next one begins. stop: the run ends, and goes on with --resume.
        lost_memory: What happens when a client has lost its memory. method: what the method says. start-afresh: that
            client begins anew. re-base: all memories begin anew. leave-out: that client is asked no more. stop: the run
            ends.
        join_timeout: Seconds to wait at the start until `min_participants` clients are there.
    """

    deadline: float = 300.0
    min_participants: int = 1
    too_few: Literal["skip", "stop"] = "skip"
    lost_memory: Literal["method", "start-afresh", "re-base", "leave-out", "stop"] = "method"
    join_timeout: float = 300.0

    def __post_init__(self) -> None:
        for key in ("deadline", "join_timeout"):
            if not 0.0 < getattr(self, key) < 1e9:
                raise UserError(f"deployment.{key}", "seconds above 0", getattr(self, key), "Give some minutes")
        if self.min_participants < 1:
            raise UserError("deployment.min_participants", "at least 1", self.min_participants, "Give a number")

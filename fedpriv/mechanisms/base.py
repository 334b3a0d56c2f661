"""The interface of noise mechanisms, which noise the sum of each round and may keep a state between rounds."""

from typing import Any, NamedTuple, Protocol

from torch import Tensor
from typing_extensions import TypeVar

from fedpriv.streams import Streams
from fedpriv.vectors import State

__all__ = ["Mechanism", "MechanismState", "NoState"]

MechanismState = State
"""Its names differ from those of methods' and optimizers' states."""

StateT = TypeVar("StateT", bound=State, default=Any)


class NoState(NamedTuple):
    """The state of a mechanism with independent rounds."""


class Mechanism(Protocol[StateT]):
    """A frozen dataclass that adds noise to the sum of each round's messages, at the server.

    Its state is part of the server's state: it is saved and restored with it, and kept if memories are reset. Noise
    that clients add has no state: see `fedpriv.rounds.ClientRules`.
    """

    @property
    def stddev(self) -> float:
        """Standard deviation of the noise on one round's sum, per coordinate; 0 for none."""
        ...

    def init(self, size: int) -> StateT:
        """Return the state before the first round; `size` is d."""
        ...

    def noise(self, state: StateT, total: Tensor, streams: Streams, round: int) -> tuple[Tensor, StateT]:
        """Return the sum with the round's noise on it, and the new state.

        The noise is not returned separately, because it is rounded together with the sum (`fedpriv.mechanisms.noise`).

        Args:
            state: The state after the previous round.
            total: Sum of the bounded messages, float64 `[params]` on the CPU.
            streams: Source of randomness.
            round: The round, from 1; the address of the draws.
        """
        ...

    def sensitivity(self, moved: float, rounds: float) -> float:
        """Return the l2 sensitivity over all rounds of the values that independent noise of `stddev` hides.

        Args:
            moved: Maximum change of one round's sum due to one client, in l2 norm.
            rounds: Number of rounds in which the client takes part.
        """
        ...

    def event(self, moved: float, rounds: float) -> float:
        """Return mu for which the rounds together are mu-Gaussian-DP, exactly; infinite without noise.

        Args:
            moved: See `sensitivity`.
            rounds: See `sensitivity`.
        """
        ...

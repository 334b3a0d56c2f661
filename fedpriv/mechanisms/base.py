"""What a mechanism of noise is: how noise comes onto the sums of a run's rounds, and what it remembers in between."""

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from fedpriv.streams import Streams

__all__ = ["Mechanism", "MechanismState", "NoState"]

# A NamedTuple of vectors `[params]`, or figures `[1]`, possibly none, whose names no method's or optimiser's state has.
MechanismState = Any


class NoState(NamedTuple):
    """The state of a mechanism whose rounds are independent."""


class Mechanism(Protocol):
    """A frozen dataclass that adds noise to the sum of each round's messages, at the server.

    Its state is part of the server's state: saved and taken up again with it, and kept where memories begin anew.
    Noise that clients add has no state: see `fedpriv.rounds.ClientRules`.
    """

    @property
    def stddev(self) -> float:
        """Standard deviation of the noise on one round's sum, per coordinate; 0 for none."""
        ...

    def init(self, size: int) -> MechanismState:
        """What it remembers before the first round; `size` is d."""
        ...

    def noise(
        self, state: MechanismState, total: Tensor, streams: Streams, round: int
    ) -> tuple[Tensor, MechanismState]:
        """Return the sum with the round's noise on it, and the new state.

        The noise does not come by itself, because it is rounded together with the sum (`fedpriv.mechanisms.noise`).

        Args:
            state: What it remembers.
            total: Sum of the bounded messages, float64 `[params]` on the CPU.
            streams: Source of randomness.
            round: The round, from 1; addresses what is drawn.
        """
        ...

    def sensitivity(self, moved: float, rounds: float) -> float:
        """Most that one client moves what is hidden by independent noise of `stddev`, in l2 norm over all rounds.

        Args:
            moved: Most that it moves one round's sum, in l2 norm.
            rounds: In how many rounds.
        """
        ...

    def event(self, moved: float, rounds: float) -> float:
        """Return mu for which the rounds together are mu-Gaussian-DP, exactly; infinite without noise.

        Args:
            moved: See `sensitivity`.
            rounds: See `sensitivity`.
        """
        ...

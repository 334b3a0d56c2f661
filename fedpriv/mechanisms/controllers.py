"""Controllers choose the noise of each round from released numbers alone; the filter limits what they may spend.

A controller cannot reveal anything: it is handed a `Seen`, which is computed from earlier noised sums and public
constants, and returns a noise multiplier. How much the rounds may cost together does not depend on it: see
`fedpriv.mechanisms.filtered`.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

from fedpriv.checks import plain_numbers, real_within
from fedpriv.plugins import Registry

__all__ = ["CONTROLLERS", "Controller", "LinearDecay", "Seen", "SignalToNoise"]

_BLOCK = 2**20


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Everything that a controller sees before a round: released numbers and public constants.

    Args:
        round: The coming round, from 1.
        rounds: Largest number of rounds.
        planned: The noise multiplier that spends the budget evenly in `rounds` rounds.
        left: The share of the budget that is left, from 0 to 1.
        last: The noise multiplier of the last round; None before the first.
        ratio: The l2 norm of the last noised sum over the expected norm of its noise, about 1 if there is only noise;
            None before the first round.
    """

    round: int
    rounds: int
    planned: float
    left: float
    last: float | None = None
    ratio: float | None = None


class Controller(Protocol):
    """A frozen dataclass that chooses each round's noise. It keeps no state: the same `Seen` gives the same noise."""

    def noise_multiplier(self, seen: Seen) -> float:
        """Return the round's noise standard deviation over the sensitivity, within a factor 1,000 of `seen.planned`.

        A round with it costs (`seen.planned` / result)^2 / `seen.rounds` of the budget. If more than the rest is asked
        for, the run stops before the round.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class LinearDecay:
    """Noise that falls linearly from the first to the last round, and spends the budget in exactly `rounds` rounds.

    Args:
        ratio: The last round's noise over the first round's; 1 for constant noise.
    """

    ratio: float = 0.5

    def __post_init__(self) -> None:
        real_within("controller.ratio", self.ratio, 0.01, 1.0, "Set it, for example to 0.5")
        plain_numbers(self)

    def noise_multiplier(self, seen: Seen) -> float:
        """See `Controller.noise_multiplier`."""
        at = (seen.round - 1) / max(seen.rounds - 1, 1)
        return seen.planned * (1.0 + (self.ratio - 1.0) * at) * _scale(self.ratio, seen.rounds)


@lru_cache(maxsize=64)
def _scale(ratio: float, rounds: int) -> float:
    """Return the factor s for which noises s (1 + (ratio - 1) k / (rounds - 1)) cost as much as constant noise of 1."""
    starts, last = range(0, rounds, _BLOCK), max(rounds - 1, 1)
    blocks = (np.arange(start, min(start + _BLOCK, rounds), dtype=np.float64) for start in starts)
    costs = math.fsum(float(np.sum((1.0 + (ratio - 1.0) * block / last) ** -2.0)) for block in blocks)
    return math.sqrt(costs / rounds)


@dataclass(frozen=True, kw_only=True)
class SignalToNoise:
    """Noise that follows the signal: more where the noised sum stands out from its noise, less where it drowns.

    The signal's norm over the noise's is estimated from the last noised sum. A run in which noise is low may stop
    early, and one in which it is high leaves some of the budget.

    Args:
        target: The ratio of signal to noise to aim at.
        rate: Largest factor by which the noise moves in a round.
        least: Smallest noise, as a multiple of the noise that spends the budget evenly.
        most: Largest noise, as such a multiple.
    """

    target: float = 1.0
    rate: float = 1.1
    least: float = 0.5
    most: float = 2.0

    def __post_init__(self) -> None:
        real_within("controller.target", self.target, 1e-3, 1e3, "Set it, for example to 1")
        real_within("controller.rate", self.rate, 1.001, 10.0, "Set it, for example to 1.1")
        real_within("controller.least", self.least, 0.01, 1.0, "Set it, for example to 0.5")
        real_within("controller.most", self.most, 1.0, 100.0, "Set it, for example to 2")
        plain_numbers(self)

    def noise_multiplier(self, seen: Seen) -> float:
        """See `Controller.noise_multiplier`."""
        if seen.last is None or seen.ratio is None:
            return seen.planned
        signal = math.sqrt(max(seen.ratio**2 - 1.0, 0.0))
        moved = seen.last * min(max(signal / self.target, 1.0 / self.rate), self.rate)
        return min(max(moved, self.least * seen.planned), self.most * seen.planned)


CONTROLLERS: Registry[Controller] = Registry(
    "controller",
    {"linear-decay": LinearDecay, "signal-to-noise": SignalToNoise},
    protocol=Controller,
    group="fedpriv.controllers",
)

"""A privacy filter: noise that a controller chooses round by round, within a budget fixed before the run.

Let mu_k be the sensitivity of round k over the deviation of its noise, chosen as any function of earlier releases. The
filter lets round k begin only if mu_1^2 + ... + mu_k^2 <= mu^2, for every controller. All releases together are
then mu-Gaussian-DP, as if one Gaussian mechanism of that mu had been run. This is fully adaptive composition: Smith and
Thakurta 2022, arXiv 2210.17520; Koskela, Tobaben and Honkela 2023. In terms of zCDP, the costs rho_k = mu_k^2 / 2 may
add up to rho = mu^2 / 2 (Feldman and Zrnic 2021; Whitehouse, Ramdas, Rogers and Wu 2023); the conversion to epsilon by
mu is tighter.

Proof. Given earlier releases, the noised sums of two neighbors differ by a shift s_k <= mu_k, in units of the noise and
in a direction that both know; in other directions the noise is the same. Let W be a Brownian motion with drift 0 for
one neighbor and 1 for the other. An increment of W over a time of s_k^2, divided by s_k, is normal with variance 1 and
mean 0 or s_k. So both neighbors' releases are the same function of consecutive pieces of W, on times that add up to at
most mu^2 and depend only on the pieces before. All releases are thus computed from W up to the time mu^2, and the
sufficient statistic of its drift is W(mu^2): normal with variance mu^2, and mean 0 or mu^2.

The budget is counted in whole units, 2^50 of which are mu^2. The controller's noise is turned into units, rounded down,
and the noise used follows from the units, rounded up. So nothing is lost or gained by floating-point sums.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedpriv.checks import is_real
from fedpriv.errors import UserError
from fedpriv.mechanisms.controllers import Controller, Seen
from fedpriv.mechanisms.noise import release_sum
from fedpriv.streams import Streams

__all__ = ["UNITS", "FilterState", "Filtered"]

UNITS = 2**50
"""The whole budget."""

MAX_FACTOR = 1e3
"""A controller's noise is within this factor of the noise that spends the budget evenly."""

# Covers the rounding of the few operations from units to a standard deviation.
_UP = 1.0 + 2.0**-48
# A request that exceeds the rest by this share of itself gets the rest: rounding must not end a run a round early.
_CLOSE = 2.0**-30


class FilterState(NamedTuple):
    """Units of the budget, int64 `[1]` each.

    `filter_spent` counts those of all rounds so far, `filter_last` those of the last round (0 before the first), and
    `filter_next` those of the next round; 0 stops the run.
    """

    filter_spent: Tensor
    filter_last: Tensor
    filter_next: Tensor

    @property
    def stopped(self) -> bool:
        """True if no round may follow."""
        return int(self.filter_next) == 0

    @property
    def share(self) -> float:
        """The share of the budget that is spent, from 0 to 1."""
        return int(self.filter_spent) / UNITS


@dataclass(frozen=True, kw_only=True)
class Filtered:
    """Gaussian noise of a controller's choice, within a budget; see `Mechanism`.

    Args:
        controller: Chooses each round's noise.
        planned: The noise multiplier with which `rounds` rounds spend the budget; above 0.
        moved: The l2 sensitivity of one round's sum.
        rounds: Largest number of rounds.
    """

    controller: Controller
    planned: float
    moved: float
    rounds: int

    @property
    def stddev(self) -> float:
        """The standard deviation that spends the budget evenly."""
        return self.planned * self.moved

    def init(self, size: int) -> FilterState:
        """Return the state before the first round."""
        nothing = torch.zeros(1, dtype=torch.int64)
        units = self._charge(Seen(round=1, rounds=self.rounds, planned=self.planned, left=1.0), UNITS)
        return FilterState(nothing, nothing, torch.tensor([units]))

    def noise(self, state: FilterState, total: Tensor, streams: Streams, round: int) -> tuple[Tensor, FilterState]:
        """Return the sum with the noise that was chosen after the last round; choose the next round's.

        Raises:
            ValueError: If the filter has stopped the run, or the state is not one of this filter.
        """
        units, spent = int(state.filter_next), int(state.filter_spent) + int(state.filter_next)
        if not 0 < units <= spent <= UNITS:
            raise ValueError(f"round {round}: nothing more may be released, the filter has stopped the run: {state}")
        multiplier = self.multiplier(units)
        noised = release_sum(streams, multiplier * self.moved, total, round)
        expected = multiplier * self.moved * math.sqrt(len(noised))
        seen = Seen(
            round=round + 1,
            rounds=self.rounds,
            planned=self.planned,
            left=(UNITS - spent) / UNITS,
            last=multiplier,
            ratio=_norm(noised) / expected,
        )
        counts = (spent, units, self._charge(seen, UNITS - spent))
        return noised, FilterState(*(torch.tensor([count]) for count in counts))

    def multiplier(self, units: int) -> float:
        """Return the noise multiplier of a round that costs `units`; infinite for 0."""
        return self.planned * math.sqrt(UNITS / (self.rounds * units)) * _UP if units else math.inf

    def sensitivity(self, moved: float, rounds: float) -> float:
        """See `Mechanism.sensitivity`; of all rounds, however many there are."""
        return moved * math.sqrt(self.rounds) if rounds > 0 else 0.0

    def event(self, moved: float, rounds: float) -> float:
        """See `Mechanism.event`: the whole budget, which may be spent in any round."""
        return self.sensitivity(moved, rounds) / self.stddev

    def _charge(self, seen: Seen, left: int) -> int:
        """Return the units of the coming round; 0 if the run stops before it."""
        if seen.round > self.rounds:
            return 0
        asked = self.controller.noise_multiplier(seen)
        if not is_real(asked, self.planned / MAX_FACTOR, self.planned * MAX_FACTOR):
            expected = f"a noise multiplier from {self.planned / MAX_FACTOR:g} to {self.planned * MAX_FACTOR:g}"
            remedy = "Correct its noise_multiplier"
            raise UserError("controller.kind", f"{expected} in round {seen.round}", repr(asked), remedy)
        wanted = max(math.floor(UNITS * ((self.planned / asked) ** 2 / self.rounds)), 1)
        if wanted <= left:
            return wanted
        return left if wanted - left <= 1 + wanted * _CLOSE else 0


def _norm(noised: Tensor) -> float:
    """Return the l2 norm of `[params]`, in float64, with the same bits for any number of threads."""
    return math.sqrt(float(np.sum(np.square(noised.numpy()))))

"""Correlated noise: a round takes back a part of the noise of earlier rounds, so that sums over rounds have less.

Let C be the lower-triangular Toeplitz matrix with first column c, c_0 = 1. Matrix factorization (Denisov, McMahan,
Rush, Smith and Thakurta 2022; Choquette-Choo et al. 2023 for bands) releases the sums s of K rounds with the noise
C^-1 z, z independent Gaussian. It is a function of C s + z, one Gaussian mechanism.

With w_j = r_j - s_j the noise of an earlier release r_j, round k releases

    r_k = s_k - sum_{j >= 1} c_j w_{k-j} + z_k,    rounded to a grid, exactly.

In real numbers, the value before the noise is (C s)_k - sum_j c_j r_{k-j}. The second part is known from earlier
releases. So the round is a Gaussian mechanism on (C s)_k, rounded after the noise, exactly
(`fedpriv.mechanisms.noise`), and rounding needs no allowance. Later rounds take back its error with the rest of the
noise: w includes it, and is itself not on a grid.

In float64, that value has rounding errors, which may differ between neighbors. In all rounds together they move it by
at most `SLACK` of a message's bound, except with a probability below 1e-60. Plans charge that share, and
`Correlated.init` refuses a model for which it might not suffice.

The past noise is a secret: an adversary who has it can take it off the releases.

A round of which nothing is released keeps its row of C, with w_k = 0: there is no noise in it to take back. Let R be
the other rounds, and say that s_k = 0 for all others, since none of their messages are used. Then the releases are a
function of C_R s + z_R, where C_R has the rows of R alone. For any two neighbors, C_R moves s by at most as much as C
does: rows are left out, and a vector without some of its coordinates is no longer. R may depend on earlier releases
and on anything that is public or the same for neighbors, such as who answered where cohorts are no secret: the bound
holds for every path of the run, and fresh noise in R is independent of it. It must not depend on messages otherwise.
Without a row of their own, such rounds would shorten the gap between a client's messages: a client with a message in
rounds k and k + b would have rows b - 1 apart, whose columns overlap.
"""

# pyright: reportMissingTypeStubs=false, reportUnknownVariableType=false

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedpriv.checks import refuse_beyond_memory
from fedpriv.errors import UserError
from fedpriv.mechanisms.base import NoState
from fedpriv.mechanisms.noise import release_sum
from fedpriv.streams import Streams

__all__ = ["SLACK", "Correlated", "EarlierNoise", "Fading", "fading", "filtered", "row_norms", "squared_sensitivity"]

SLACK = 2.0**-16
"""Share of a message's bound by which the arithmetic on earlier noise may move values, over all rounds."""

_UNIT = 2.0**-53
_TAIL = 20.0  # No noise vector is longer than this many times its expected length.


def filtered(values: np.ndarray, ahead: tuple[float, ...], back: tuple[float, ...] = (1.0,)) -> np.ndarray:
    """Return F^-1 G times every row of `[..., rounds]`, with G and F the Toeplitz matrices of `ahead` and `back`."""
    from scipy.signal import lfilter  # takes half a second

    return np.asarray(lfilter(ahead, back, values))


def squared_sensitivity(coefficients: tuple[float, ...], rounds: int, separation: int) -> float:
    """Return the largest squared change of C s in the first rounds by messages of length 1 of one client.

    Source: jax_privacy's `minsep_sensitivity_squared`; tests compare it with every set of rounds.

    Args:
        coefficients: c, not negative and never increasing.
        rounds: Number of rounds counted.
        separation: b, the fewest rounds from one message of a client to its next; 1 if it may be in every round.

    Formal guarantees:
        For such c, the largest change is that of messages in rounds 1, 1 + b, 1 + 2 b, ..., all in one direction. If
        there are at most b coefficients, columns that far apart do not overlap: the result is then at most
        ceil(rounds / b) times the squared norm of c.
    """
    pulses = np.zeros(max(rounds, 0))
    pulses[::separation] = 1.0
    return float(np.square(filtered(pulses, coefficients)).sum()) if rounds > 0 else 0.0


def row_norms(coefficients: tuple[float, ...], workload: np.ndarray) -> np.ndarray:
    """Return the norm of every row of A C^-1, float64 `[rounds]`: the noise on sums that A forms from releases.

    Args:
        coefficients: c.
        workload: The first column of A, a lower-triangular Toeplitz matrix, `[rounds]`.
    """
    return np.sqrt(np.cumsum(np.square(filtered(workload, (1.0,), coefficients))))


class EarlierNoise(NamedTuple):
    """The noise of the last rounds, the newest first, float64 `[bands - 1, params]`; zero before the first round."""

    noise_earlier: Tensor

    def skipped(self) -> "EarlierNoise":
        """Return the state after a round of which nothing is released: a row without noise; see the module."""
        none = torch.zeros_like(self.noise_earlier[:1])
        return EarlierNoise(torch.cat([none, self.noise_earlier])[: len(self.noise_earlier)])


@dataclass(frozen=True, kw_only=True)
class Correlated:
    """Noise C^-1 z; see `Mechanism` and the module.

    Args:
        stddev: Standard deviation of z, the fresh noise of a round, per coordinate; 0 leaves sums as they are.
        coefficients: c, with c_0 = 1: not negative and never increasing.
        rounds: K, the number of rounds for which the matrix is accounted.
        bound: Bound B on the norm of one message.
        messages: Safe maximum of the number of messages in a round.
    """

    stddev: float
    coefficients: tuple[float, ...]
    rounds: int
    bound: float
    messages: int

    def init(self, size: int) -> EarlierNoise:
        """Return no earlier noise.

        Raises:
            UserError: If rounding in float64 could move values by more than the plan charges, or the noise does not fit
                in memory.
        """
        bands = len(self.coefficients)
        spread = float(row_norms(self.coefficients, np.eye(1, max(self.rounds, 1))[0])[-1]) * self.stddev
        longest = self.messages * self.bound + _TAIL * sum(self.coefficients) * spread * math.sqrt(size)
        if 2.0 * (bands + 1) * _UNIT * math.sqrt(self.rounds) * longest > SLACK * self.bound:
            expected = f"a model and noise with a rounding that the plan covers, with {bands} bands"
            remedy = "Use fewer bands, or a smaller model or cohort"
            raise UserError("noise.bands", expected, f"{size:,} parameters", remedy)
        remedy = f"Use fewer bands: the server keeps {bands - 1} vectors of {size:,} numbers"
        refuse_beyond_memory("noise.bands", 8 * bands * size, remedy)
        return EarlierNoise(torch.zeros(bands - 1, size, dtype=torch.float64))

    def noise(self, state: EarlierNoise, total: Tensor, streams: Streams, round: int) -> tuple[Tensor, EarlierNoise]:
        """See `Mechanism.noise`.

        Raises:
            ValueError: If the round is beyond those that are accounted for.
        """
        if not 1 <= round <= self.rounds:
            raise ValueError(f"the noise is accounted for {self.rounds} rounds, not for round {round}")
        shifted = total.clone()
        for share, earlier in zip(self.coefficients[1:], state.noise_earlier, strict=True):
            shifted.sub_(earlier * share)
        released = release_sum(streams, self.stddev, shifted, round)
        drawn = (released - total)[None]
        return released, EarlierNoise(torch.cat([drawn, state.noise_earlier])[: len(state.noise_earlier)])

    def sensitivity(self, moved: float, rounds: float) -> float:
        """See `Mechanism.sensitivity`; for a client that takes part in all of the first rounds."""
        return moved * math.sqrt(squared_sensitivity(self.coefficients, int(rounds), 1))

    def event(self, moved: float, rounds: float) -> float:
        """See `Mechanism.event`."""
        return _shift(self.sensitivity(moved, rounds), self.stddev)


@dataclass(frozen=True, kw_only=True)
class Fading:
    """Independent noise that fades: of deviation `stddev` (1 - lambda)^(-(K - k) / 2) in round k; see `Mechanism`.

    For a memory that fades by (1 - lambda) a round, no other noise of the same cost under full participation leaves
    less on the last memory. Early rounds have much more noise.

    Args:
        stddev: Standard deviation in the last round, per coordinate.
        damping: lambda, in (0, 1).
        rounds: K.
    """

    stddev: float
    damping: float
    rounds: int

    def init(self, size: int) -> NoState:
        """Return no state."""
        return NoState()

    def noise(self, state: NoState, total: Tensor, streams: Streams, round: int) -> tuple[Tensor, NoState]:
        """See `Mechanism.noise`; a round beyond those that are accounted for is a ValueError."""
        if not 1 <= round <= self.rounds:
            raise ValueError(f"the noise is accounted for {self.rounds} rounds, not for round {round}")
        return release_sum(streams, self.stddev * fading(self.damping, self.rounds - round), total, round), state

    def sensitivity(self, moved: float, rounds: float) -> float:
        """See `Mechanism.sensitivity`."""
        left = range(self.rounds - int(rounds), self.rounds)
        return moved * math.sqrt(math.fsum(fading(self.damping, more) ** -2.0 for more in left))

    def event(self, moved: float, rounds: float) -> float:
        """See `Mechanism.event`."""
        return _shift(self.sensitivity(moved, rounds), self.stddev)


def fading(damping: float, more: int) -> float:
    """Return the deviation of `Fading` with `more` rounds left, over that of the last round."""
    return (1.0 - damping) ** (-0.5 * more)


def _shift(sensitivity: float, stddev: float) -> float:
    return sensitivity / stddev if stddev > 0.0 else math.inf if sensitivity > 0.0 else 0.0

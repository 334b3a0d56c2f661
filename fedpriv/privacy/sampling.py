"""Who takes part in a round. The object that draws the cohort is the object that the accountant is asked about."""

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import ClassVar

import numpy as np

from fedpriv.errors import UserError
from fedpriv.streams import Source

__all__ = ["SAMPLINGS", "Everyone", "FixedSize", "Poisson", "Sampling"]

LARGEST_POPULATION = 10**12
"""More clients than people, and still far from where a running sum of gaps between client ids could overflow."""

BLOCK = 2**16
"""Most gaps drawn at once, so that a cohort of millions does not need them all in memory twice."""


@dataclass(frozen=True)
class Everyone:
    """Every client takes part in every round.

    Args:
        population: Number of clients n, at least 1.

    Raises:
        UserError: If the population is no such number.
    """

    population: int
    name: ClassVar[str] = "everyone"

    def __post_init__(self) -> None:
        _check_population(self.population)

    @property
    def sampling_prob(self) -> float:
        """Probability that a given client takes part in a given round: 1."""
        return 1.0

    @property
    def expected_size(self) -> float:
        """Expected number of clients in a round: n."""
        return float(self.population)

    def cohort(self, source: Source) -> np.ndarray:  # noqa: ARG002
        """All client ids, ascending int64, `[n]`; uses no randomness."""
        return np.arange(self.population, dtype=np.int64)


@dataclass(frozen=True)
class Poisson:
    """Each client takes part in each round independently with the same probability; a round may be empty.

    Args:
        population: Number of clients n, at least 1.
        probability: Probability q that a client takes part, in (0, 1].

    Raises:
        UserError: If a field is out of its range.

    Formal guarantees:
        The ids in a cohort are those of n independent trials of probability q, up to the rounding of one double
        (relative 1e-15). Cohorts of different sources are as independent as the sources.
    """

    population: int
    probability: float
    name: ClassVar[str] = "poisson"

    def __post_init__(self) -> None:
        _check_population(self.population)
        _check_probability(self.probability)

    @property
    def sampling_prob(self) -> float:
        """Probability that a given client takes part in a given round: q."""
        return float(self.probability)

    @property
    def expected_size(self) -> float:
        """Expected number of clients in a round: q n. The number by which sums of messages are divided."""
        return self.sampling_prob * self.population

    def cohort(self, source: Source) -> np.ndarray:
        """Client ids of one round, ascending int64, `[cohort]`; work and memory follow the cohort, never n."""
        if self.sampling_prob == 1.0:
            return np.arange(self.population, dtype=np.int64)
        blocks, last = [], -1
        while last < self.population:
            ids = last + np.cumsum(self._steps(source))
            blocks.append(ids)
            last = int(ids[-1])
        ids = np.concatenate(blocks)
        return ids[: np.searchsorted(ids, self.population)]

    def _steps(self, source: Source) -> np.ndarray:
        """Distances from one sampled client to the next: geometric from 1, int64, cut off at n + 1.

        The number of clients passed over before a success is floor(log(1 - U) / log(1 - q)) for uniform U. Two
        draws make one U with 106 bits near zero, so that a q near or below 2^-53 keeps its law.
        """
        size = min(BLOCK, int(self.expected_size + 4.0 * math.sqrt(self.expected_size)) + 4)
        fine = source.uniform(size) + source.uniform(size) * 2.0**-53
        with np.errstate(over="ignore"):
            passed_over = np.log1p(-np.minimum(fine, 1.0 - 2.0**-53)) / math.log1p(-self.sampling_prob)
        return np.minimum(passed_over, float(self.population)).astype(np.int64) + 1


@dataclass(frozen=True)
class FixedSize:
    """A uniformly random set of exactly m of the n clients takes part in each round.

    Args:
        population: Number of clients n, at least 1.
        size: Number of clients m in a round, from 1 to n.

    Raises:
        UserError: If a field is out of its range.

    Formal guarantees:
        Every set of m clients is equally likely. Membership of two clients in one cohort is *not* independent.
    """

    population: int
    size: int
    name: ClassVar[str] = "fixed"

    def __post_init__(self) -> None:
        _check_population(self.population)
        _check_size(self.size, self.population)

    @property
    def sampling_prob(self) -> float:
        """Probability that a given client takes part in a given round: m / n."""
        return self.size / self.population

    @property
    def expected_size(self) -> float:
        """Number of clients in a round: m."""
        return float(self.size)

    def cohort(self, source: Source) -> np.ndarray:
        """Client ids of one round, ascending int64, `[m]`."""
        return source.subset(self.population, self.size)


Sampling = Everyone | Poisson | FixedSize

SAMPLINGS: dict[str, type[Everyone] | type[Poisson] | type[FixedSize]] = {
    "everyone": Everyone,
    "poisson": Poisson,
    "fixed": FixedSize,
}


def _whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _check_population(population: object) -> None:
    if not _whole(population) or not 1 <= population <= LARGEST_POPULATION:  # type: ignore[operator]
        expected = f"a whole number of clients from 1 to {LARGEST_POPULATION}"
        raise UserError("data.clients", expected, repr(population), "Set the number of clients")


def _check_probability(probability: object) -> None:
    real = isinstance(probability, Real) and not isinstance(probability, bool)
    if not real or not 0.0 < float(probability) <= 1.0:  # type: ignore[arg-type]
        expected = "a probability above 0 and at most 1"
        remedy = "It is the chance that one client takes part in one round; cohort size / clients is typical"
        raise UserError("cohort.probability", expected, repr(probability), remedy)


def _check_size(size: object, population: int) -> None:
    if not _whole(size) or not 1 <= size <= population:  # type: ignore[operator]
        expected = f"a whole number of clients from 1 to {population}"
        raise UserError("cohort.size", expected, repr(size), "Lower cohort.size or raise data.clients")

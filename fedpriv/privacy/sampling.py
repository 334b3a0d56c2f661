"""Who takes part in a round. The object that draws the cohort is the object that the accountant is asked about."""

import math
from dataclasses import dataclass
from decimal import Decimal, localcontext
from itertools import count, pairwise
from typing import ClassVar

import numpy as np

from fedpriv.checks import is_real, is_whole
from fedpriv.errors import UserError
from fedpriv.plugins import Registry
from fedpriv.streams import Source

__all__ = ["SAMPLINGS", "Everyone", "FixedSize", "Poisson", "Sampling", "Scheduled"]

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

    def cohort(self, source: Source) -> np.ndarray:
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
        The ids in a cohort are those of n independent trials, each of exactly the probability q (a float64), if the
        source's bits are uniform and independent: what rounding could change is decided in exact arithmetic. The
        accountant needs no allowance. Cohorts of different sources are as independent as the sources.
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
        draws make the first 106 bits of one U.
        """
        size = min(BLOCK, int(self.expected_size + 4.0 * math.sqrt(self.expected_size)) + 4)
        high, low = source.uniform(size), source.uniform(size)
        fine, rate = high + low * 2.0**-53, -math.log1p(-self.sampling_prob)
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            passed_over = -np.log1p(-fine) / rate
            # More than the roundings of `fine`, of the logarithms and of the quotient can move it; without end at 1.
            error = (2.0**-52 * fine + 2.0**-105) / (1.0 - fine) / rate + 2.0**-47 * passed_over
            decided = (np.abs(passed_over - np.rint(passed_over)) > error) | (passed_over - error > self.population)
        steps = np.minimum(passed_over, float(self.population)).astype(np.int64) + 1
        for index in np.flatnonzero(~decided).tolist():
            digits = int(high[index] * 2.0**53) << 53 | int(low[index] * 2.0**53)
            steps[index] = self._passed_over(digits, source) + 1
        return steps

    def _passed_over(self, digits: int, source: Source) -> int:
        """The number of clients passed over, at most n, given the first 106 bits of U; draws more until it is certain.

        `decimal` rounds logarithms and quotients correctly: an allowance of 10^-places covers all roundings here.
        """
        probability = Decimal(self.sampling_prob)
        for bits in count(106, 53):
            places = bits // 3 + 10
            with localcontext(prec=2 * places + 20 - probability.adjusted()):
                rate, allowance = -(1 - probability).ln(), Decimal(10) ** -places
                # 1 - U is between these two over 2^bits; the logarithm of zero has no end.
                most, least = Decimal(2**bits - digits), Decimal(2**bits - digits - 1)
                first = -(most / 2**bits).ln() / rate * (1 - allowance)
                last = -(least / 2**bits).ln() / rate * (1 + allowance) if least else Decimal(self.population)
                if int(first) == int(last) or first >= self.population:
                    return min(int(first), self.population)
            digits = digits << 53 | int(source.uniform(1)[0] * 2.0**53)
        raise AssertionError  # pragma: no cover


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


@dataclass(frozen=True)
class Scheduled:
    """Who counts in which step, and how much, is settled before the run by a public timeline.

    Made of a timeline (`fedpriv.clock`), never of a config: asynchronous servers, and rounds that end with the first
    answers. There whether a client counts depends on the others, so nothing is owed to chance: participation is taken
    as known, and a client pays for what it did.

    Args:
        population: Number of clients n, at least 1.
        expected_size: The public number by which a step's weighted sum is divided.
        scheme: How the timeline came about: `over-selection`, `fedbuff` or `fedfix`.
        squares: After each step, the largest sum that the squared weights of one client's messages have come to.
        sent: After each step, most messages that one client has sent, those included that the server did not use.

    Formal guarantees:
        Under `replace`, and with a timeline that depends on no client's data (it is made of devices, numbers of
        examples and a seed, all public), a client whose message enters step k with weight w_k moves that step's sum by
        at most 2 B w_k, whatever was released before. What the sums of all steps release is then no more than one
        Gaussian mechanism of sensitivity 2 B sqrt(sum_k w_k^2) (adaptive composition; in the privacy loss exact).
        A removed client would make room for others in the buffer and shift their steps: add-or-remove is not offered.
    """

    population: int
    expected_size: float
    scheme: str
    squares: tuple[float, ...]
    sent: tuple[int, ...]
    name: ClassVar[str] = "scheduled"

    def __post_init__(self) -> None:
        _check_population(self.population)
        if not 0.0 < self.expected_size <= self.population or not self.squares or len(self.squares) != len(self.sent):
            raise ValueError(f"not a timeline of at least one step: {self}")
        if any(not 0.0 <= charge < math.inf for charge in (*self.squares, *self.sent)):
            raise ValueError("charges are finite and not negative")
        if any(later < earlier for of in (self.squares, self.sent) for earlier, later in pairwise(of)):
            raise ValueError("what a client has spent never falls")

    @property
    def sampling_prob(self) -> float:
        """Expected messages over clients; no probability that hides anybody."""
        return self.expected_size / self.population

    def charge(self, steps: int, *, each_message: bool) -> float:
        """How many Gaussian releases of a message of weight 1 the first steps cost whoever pays most.

        Args:
            steps: From 0 to as many as there are.
            each_message: Whether the adversary sees every message by itself (local trust): weights come after that, and
                a message that was sent in vain was seen too. Else only weighted sums with their noise are seen.
        """
        if not 0 <= steps <= len(self.squares):
            raise ValueError(f"a timeline of {len(self.squares)} steps does not tell what {steps} cost")
        return float((self.sent if each_message else self.squares)[steps - 1]) if steps else 0.0

    def cohort(self, source: Source) -> np.ndarray:
        """Nobody is drawn.

        Raises:
            ValueError: Always.
        """
        raise ValueError("the timeline says who counts; nobody is drawn")


Sampling = Everyone | Poisson | FixedSize | Scheduled

SAMPLINGS: Registry[Everyone | Poisson | FixedSize] = Registry(
    "sampling",
    {
        "everyone": Everyone,
        "poisson": Poisson,
        "fixed": FixedSize,
    },
)


def _check_population(population: object) -> None:
    if not is_whole(population, 1, LARGEST_POPULATION):
        expected = f"a whole number of clients from 1 to {LARGEST_POPULATION}"
        raise UserError("data.clients", expected, repr(population), "Set the number of clients")


def _check_probability(probability: object) -> None:
    if not is_real(probability, 1e-100, 1.0):
        expected = "a probability above 0 (from 1e-100) and at most 1"
        remedy = "It is the chance that one client takes part in one round; cohort size / clients is typical"
        raise UserError("cohort.probability", expected, repr(probability), remedy)


def _check_size(size: object, population: int) -> None:
    if not is_whole(size, 1, population):
        expected = f"a whole number of clients from 1 to {population}"
        raise UserError("cohort.size", expected, repr(size), "Lower cohort.size or raise data.clients")

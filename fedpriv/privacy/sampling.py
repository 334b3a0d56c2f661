"""Who takes part in a round. The object that draws the cohort is the object that the accountant is asked about.

A sampling answers for itself: what accounting needs, its words in statements and its record. Nobody else asks for its
class.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, localcontext
from itertools import count, pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from fedpriv.checks import is_real, is_whole
from fedpriv.errors import UserError
from fedpriv.plugins import Registry
from fedpriv.privacy.trust import Trust
from fedpriv.privacy.unit import ADJACENCIES
from fedpriv.streams import Source

if TYPE_CHECKING:
    from dp_accounting import DpEvent, NeighboringRelation

__all__ = [
    "SAMPLINGS",
    "Everyone",
    "FixedSize",
    "Poisson",
    "Sampling",
    "Scheduled",
    "gaussian_event",
    "read_sampling",
]

MAX_POPULATION = 10**12
"""More clients than people, and still far from where a running sum of gaps between client ids could overflow."""

BLOCK = 2**16
"""Most gaps drawn at once, so that a cohort of millions does not need them all in memory twice."""

_SCHEMES = {
    "over-selection": "more clients are asked in each round than it has places, and the first to answer count",
    "fedbuff": "the server moves whenever so many messages have arrived as its buffer holds (FedBuff)",
    "fedfix": "the server moves at fixed times, by whatever has arrived (FedFix)",
}


class Sampling(Protocol):
    """Who takes part in a round: a frozen dataclass.

    Attributes:
        name: The word in configs, records, orders and ledgers.
        draws_cohorts: Whether cohorts are drawn by chance; else a timeline has settled who counts.
        by_coins: Whether clients take part independently of each other, so that one's part says nothing of others'.
        stead: Bound, in bounds of a message, of what a round has in the place of a client that is not drawn: 0 for
            nothing, 1 for another client's message.
        adjacencies: Neighbors under which it can be accounted.
        turns: What rounds are called.
        most: Whose epsilon it is where participation is seen; a sentence or two.
    """

    name: ClassVar[str]
    draws_cohorts: ClassVar[bool]
    by_coins: ClassVar[bool]
    stead: ClassVar[float]
    adjacencies: ClassVar[tuple[str, ...]]
    turns: ClassVar[str]
    most: ClassVar[str]

    @property
    def population(self) -> int:
        """Number of clients n."""
        ...

    @property
    def sampling_prob(self) -> float:
        """Probability that a given client takes part in a given round."""
        ...

    @property
    def hiding_prob(self) -> float:
        """The same, never below what is drawn."""
        ...

    @property
    def expected_size(self) -> float:
        """Expected number of clients in a round: what sums of messages are divided by."""
        ...

    @property
    def cohort_size(self) -> int:
        """Number of clients in a round if it is fixed; otherwise 0."""
        ...

    @property
    def how(self) -> str:
        """Who takes part, in words."""
        ...

    @property
    def divisor(self) -> str:
        """What sums are divided by, in words."""
        ...

    def cohort(self, source: Source) -> np.ndarray:
        """Client ids of one round, ascending int64, `[cohort]`."""
        ...

    def charge(self, rounds: int, *, each_message: bool) -> float:
        """How many Gaussian releases of a message of weight 1 the first rounds cost whoever pays most, without credit.

        Args:
            rounds: At least 0.
            each_message: Whether the adversary sees every message by itself.
        """
        ...

    def amplifies(self, *, client_memory: bool) -> bool:
        """Whether a cohort that nobody knows hides its clients, and epsilon may be owed to that.

        Args:
            client_memory: Whether clients remember earlier rounds.
        """
        ...

    def event(self, noise_multiplier: float, *, replace: bool) -> "tuple[DpEvent, NeighboringRelation]":
        """One round with a hidden cohort as dp-accounting sees it; see the units in `fedpriv.privacy.accounting`.

        Args:
            noise_multiplier: Noise std / l2_sensitivity, above 0.
            replace: Whether the neighbors are those of `replace`.
        """
        ...

    def check_neighbors(self, adjacency: str) -> None:
        """Raises UserError if it cannot be accounted under these neighbors."""
        ...

    def as_dict(self) -> dict[str, Any]:
        """Its record, for JSON."""
        ...

    def caveats(self, *, trust: Trust, adjacency: str, client_memory: bool, rounds: int) -> str:
        """What a statement has to say about the cohorts besides; sentences, or nothing.

        Args:
            trust: Of the plan, as are the next three.
            adjacency: Whose neighbors.
            client_memory: Whether clients remember.
            rounds: Number of rounds.
        """
        ...

    def moved(self, trust: Trust) -> str:
        """What the sum is moved by, beyond one message, in words that follow the sensitivity."""
        ...

    def more_clients(self, count: int) -> str:
        """Words for a population of `count` with the same chance to take part."""
        ...


class _Drawn:
    """What samplings have in common that draw a cohort by chance in each round."""

    draws_cohorts: ClassVar[bool] = True
    by_coins: ClassVar[bool] = False
    stead: ClassVar[float] = 0.0
    adjacencies: ClassVar[tuple[str, ...]] = ADJACENCIES
    turns: ClassVar[str] = "rounds"
    most: ClassVar[str] = (
        "Epsilon is that of a client that takes part in every round, the worst case; a client that takes part less "
        "often has spent less."
    )

    @property
    def hiding_prob(self: Sampling) -> float:
        """The sampling probability, which is exactly what is drawn."""
        return self.sampling_prob

    @property
    def cohort_size(self) -> int:
        """0: it is not fixed."""
        return 0

    @property
    def divisor(self: Sampling) -> str:
        """The expected cohort size."""
        return f"the expected cohort size, {self.expected_size:g}, never by the actual one"

    def charge(self, rounds: int, *, each_message: bool) -> float:
        """One release a round: a client may be in all of them."""
        return float(rounds)

    def check_neighbors(self, adjacency: str) -> None:
        """All will do."""

    def as_dict(self: Sampling) -> dict[str, Any]:
        """See `Sampling.as_dict`."""
        return _record(self)

    def caveats(self, *, trust: Trust, adjacency: str, client_memory: bool, rounds: int) -> str:
        """None."""
        return ""

    def moved(self, trust: Trust) -> str:
        """Nothing."""
        return ""

    def more_clients(self, count: int) -> str:
        """So many clients."""
        return f"{count:,} clients"


@dataclass(frozen=True)
class Everyone(_Drawn):
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

    @property
    def how(self) -> str:
        """See `Sampling.how`."""
        return "every client takes part in every round"

    def amplifies(self, *, client_memory: bool) -> bool:
        """Nobody is hidden."""
        return False

    def event(self, noise_multiplier: float, *, replace: bool) -> "tuple[DpEvent, NeighboringRelation]":
        """See `Sampling.event`."""
        return gaussian_event(noise_multiplier)

    @classmethod
    def recorded(cls, record: Mapping[str, Any]) -> "Everyone":
        """What the record was made of."""
        return cls(record["population"])

    def cohort(self, source: Source) -> np.ndarray:
        """All client ids, ascending int64, `[n]`; uses no randomness."""
        return np.arange(self.population, dtype=np.int64)


@dataclass(frozen=True)
class Poisson(_Drawn):
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
    by_coins: ClassVar[bool] = True

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

    @property
    def how(self) -> str:
        """See `Sampling.how`."""
        return f"each client takes part in each round independently with probability {self.sampling_prob:g}"

    def amplifies(self, *, client_memory: bool) -> bool:
        """Whether coins can fall both ways. What others remember of their coins says nothing about a client's own."""
        return self.sampling_prob < 1.0

    def event(self, noise_multiplier: float, *, replace: bool) -> "tuple[DpEvent, NeighboringRelation]":
        """See `Sampling.event`."""
        import dp_accounting as dpa  # takes a second

        noise = dpa.GaussianDpEvent(2.0 * noise_multiplier if replace else noise_multiplier)
        relations = dpa.NeighboringRelation
        relation = relations.REPLACE_ONE if replace else relations.ADD_OR_REMOVE_ONE
        return dpa.PoissonSampledDpEvent(self.sampling_prob, noise), relation

    @classmethod
    def recorded(cls, record: Mapping[str, Any]) -> "Poisson":
        """What the record was made of."""
        return cls(record["population"], record["sampling_prob"])

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
class FixedSize(_Drawn):
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
    stead: ClassVar[float] = 1.0

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

    @property
    def hiding_prob(self) -> float:
        """m / n from above, which floats round."""
        return math.nextafter(self.sampling_prob, 1.0)

    @property
    def cohort_size(self) -> int:
        """Number of clients in a round: m."""
        return self.size

    @property
    def how(self) -> str:
        """See `Sampling.how`."""
        return f"each round takes a uniformly random set of {self.size} clients"

    def amplifies(self, *, client_memory: bool) -> bool:
        """Not where clients remember.

        Who took part decides who else did, the others' memories keep it, and their later messages show it.
        """
        return self.sampling_prob < 1.0 and not client_memory

    def event(self, noise_multiplier: float, *, replace: bool) -> "tuple[DpEvent, NeighboringRelation]":
        """See `Sampling.event`."""
        import dp_accounting as dpa  # takes a second

        noise = dpa.GaussianDpEvent(noise_multiplier if replace else 0.5 * noise_multiplier)
        event = dpa.SampledWithoutReplacementDpEvent(int(self.population), int(self.size), noise)
        return event, dpa.NeighboringRelation.REPLACE_ONE

    def as_dict(self) -> dict[str, Any]:
        """See `Sampling.as_dict`."""
        return {**_record(self), "size": self.size}

    @classmethod
    def recorded(cls, record: Mapping[str, Any]) -> "FixedSize":
        """What the record was made of."""
        return cls(record["population"], record["size"])

    def caveats(self, *, trust: Trust, adjacency: str, client_memory: bool, rounds: int) -> str:
        """What memories and neighbors have to do with it where cohorts are hidden."""
        said = ""
        if trust.hides_cohorts and client_memory:
            said += "No amplification by sampling is claimed, because clients may remember earlier rounds."
        if trust.hides_cohorts and adjacency == "add-or-remove":
            said += " The number of clients is public; a removed client is one whose message is zero."
        return said

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
    draws_cohorts: ClassVar[bool] = False
    by_coins: ClassVar[bool] = False
    stead: ClassVar[float] = 0.0
    adjacencies: ClassVar[tuple[str, ...]] = ("replace",)
    turns: ClassVar[str] = "steps"
    most: ClassVar[str] = (
        "Epsilon is that of the client that sends most messages by this timeline; a client that sends fewer has spent "
        "less."
    )

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

    @property
    def hiding_prob(self) -> float:
        """1: nobody is hidden."""
        return 1.0

    @property
    def cohort_size(self) -> int:
        """0: it is not fixed."""
        return 0

    @property
    def how(self) -> str:
        """See `Sampling.how`."""
        return _SCHEMES[self.scheme]

    @property
    def divisor(self) -> str:
        """See `Sampling.divisor`."""
        return f"a public number, {self.expected_size:g}"

    def charge(self, rounds: int, *, each_message: bool) -> float:
        """How many Gaussian releases of a message of weight 1 the first steps cost whoever pays most.

        Args:
            rounds: Number of steps, from 0 to as many as there are.
            each_message: Whether the adversary sees every message by itself (local trust): weights come after that, and
                a message that was sent in vain was seen too. Else only weighted sums with their noise are seen.
        """
        if not 0 <= rounds <= len(self.squares):
            raise ValueError(f"a timeline of {len(self.squares)} steps does not tell what {rounds} cost")
        return float((self.sent if each_message else self.squares)[rounds - 1]) if rounds else 0.0

    def amplifies(self, *, client_memory: bool) -> bool:
        """Nobody is hidden."""
        return False

    def event(self, noise_multiplier: float, *, replace: bool) -> "tuple[DpEvent, NeighboringRelation]":
        """A message of weight 1."""
        return gaussian_event(noise_multiplier)

    def check_neighbors(self, adjacency: str) -> None:
        """Raises UserError under add-or-remove."""
        if adjacency not in self.adjacencies:
            got = f'"{adjacency}" with {self.scheme}'
            remedy = (
                "A client that is not there would leave its place to others and shift the steps in which they count"
            )
            raise UserError("privacy.adjacency", '"replace"', got, remedy)

    def as_dict(self) -> dict[str, Any]:
        """See `Sampling.as_dict`; of the charges, the last."""
        last = {"most_squared_weights": self.squares[-1], "most_messages_sent": self.sent[-1]}
        return {**_record(self), "scheme": self.scheme, **last}

    @classmethod
    def recorded(cls, record: Mapping[str, Any]) -> "Scheduled":
        """A timeline each of whose steps is charged as the whole, which is never too little."""
        steps = max(record["rounds"], 1)
        return cls(
            population=record["population"],
            expected_size=record["expected_size"],
            scheme=record["scheme"],
            squares=(record["most_squared_weights"],) * steps,
            sent=(record["most_messages_sent"],) * steps,
        )

    def caveats(self, *, trust: Trust, adjacency: str, client_memory: bool, rounds: int) -> str:
        """That participation is known, and who is charged most."""
        most = self.charge(rounds, each_message=trust.shows_messages)
        charged = f"whose messages' squared weights add up to most, {most:g}"
        if trust.shows_messages:
            charged = f"who sends most messages, {most:g}, those included that came too late"
        return (
            "Who counts in which step, and with which weight, is settled before the run by a timeline that is taken as "
            "known to everybody: participation is visible, and no amplification by sampling is claimed. Epsilon is "
            f"that of the client {charged}."
        )

    def moved(self, trust: Trust) -> str:
        """Weights come after the noise on single messages."""
        return ("" if trust.shows_messages else ", times the weight of its message,") + " in a step"

    def more_clients(self, count: int) -> str:
        """A larger population alone would not do."""
        return "more clients at work"

    def cohort(self, source: Source) -> np.ndarray:
        """Nobody is drawn.

        Raises:
            ValueError: Always.
        """
        raise ValueError("the timeline says who counts; nobody is drawn")


SAMPLINGS: Registry[Everyone | Poisson | FixedSize] = Registry(
    "sampling",
    {
        "everyone": Everyone,
        "poisson": Poisson,
        "fixed": FixedSize,
    },
)


_RECORDED = {kind.name: kind for kind in (Everyone, Poisson, FixedSize, Scheduled)}


def read_sampling(record: Mapping[str, Any], rounds: int) -> Sampling:
    """The sampling of which `record` is the `as_dict`, from this version or an earlier one.

    Args:
        record: Its record; KeyError if a value is missing.
        rounds: How many rounds the plan is for.

    Raises:
        ValueError: If no sampling has its name.
    """
    name = record["name"]
    if name not in _RECORDED:
        raise ValueError(f"no sampling is called {name!r}")
    return _RECORDED[name].recorded({**record, "rounds": rounds})


def gaussian_event(noise_multiplier: float) -> "tuple[DpEvent, NeighboringRelation]":
    """One round without a hidden cohort as dp-accounting sees it, whatever the neighbors."""
    import dp_accounting as dpa  # takes a second

    return dpa.GaussianDpEvent(noise_multiplier), dpa.NeighboringRelation.ADD_OR_REMOVE_ONE


def _record(sampling: Sampling) -> dict[str, Any]:
    return {
        "name": sampling.name,
        "population": sampling.population,
        "sampling_prob": sampling.sampling_prob,
        "expected_size": sampling.expected_size,
    }


def _check_population(population: object) -> None:
    if not is_whole(population, 1, MAX_POPULATION):
        expected = f"a whole number of clients from 1 to {MAX_POPULATION}"
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

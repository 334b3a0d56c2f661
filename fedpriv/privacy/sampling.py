"""Client sampling: the object that draws a round's cohort is the object that the accountant accounts for.

Each sampling provides the values for accounting, its words in statements and its record. No other code tests for its
class.
"""

# pyright: reportMissingTypeStubs=false

import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, localcontext
from functools import lru_cache
from itertools import count, pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from fedpriv.checks import is_real, is_whole, plain_numbers
from fedpriv.errors import UserError
from fedpriv.plugins import Registry
from fedpriv.privacy.trust import Trust
from fedpriv.privacy.unit import ADJACENCIES, Adjacency
from fedpriv.streams import Purpose, Source, Streams

if TYPE_CHECKING:
    from dp_accounting import DpEvent, NeighboringRelation

__all__ = [
    "SAMPLINGS",
    "Everyone",
    "FixedSize",
    "Poisson",
    "Sampling",
    "Scheduled",
    "Separated",
    "gaussian_event",
    "read_sampling",
]

MAX_POPULATION = 10**12
"""More than all people, and far below the size at which a running sum of gaps between client ids could overflow."""

MAX_SEPARATION = 10**6

BLOCK = 2**16
"""Maximum gaps per draw, so that a cohort of millions does not need all of them in memory twice."""

_SCHEMES = {
    "over-selection": "each round asks more clients than it has places, and the first to answer count",
    "fedbuff": "the server takes a step whenever its buffer of messages is full (FedBuff)",
    "fedfix": "the server takes a step at fixed times, with the messages that have arrived by then (FedFix)",
    "token": "the model travels along a graph of clients, and the next client sees each message (token walk)",
}

_WITHOUT_SERVER = (
    " No server is needed: each client takes a step itself and hands the model on. The server in this statement stands "
    "for every other client on the graph, which may see all models and, from two of them, the noised message between."
)


class Sampling(Protocol):
    """The rule that decides which clients take part in a round; a frozen dataclass.

    Attributes:
        name: Its name in configs, records, instructions and ledgers.
        draws_cohorts: True if cohorts are drawn at random; otherwise a timeline decides who counts.
        by_coins: True if clients take part independently, so that one client's participation reveals nothing about
            the others.
        stead: Bound of the message that replaces a client that is not drawn, in units of a message's bound: 0 for no
            message, 1 for another client's.
        adjacencies: Adjacencies under which it can be accounted for.
        turns: Its word for rounds.
        most: The client that epsilon belongs to if participation is seen; a sentence or two.
    """

    name: ClassVar[str]
    draws_cohorts: ClassVar[bool]
    by_coins: ClassVar[bool]
    stead: ClassVar[float]
    adjacencies: ClassVar[tuple[Adjacency, ...]]
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
        """The sampling probability, rounded up: never below the true probability."""
        ...

    @property
    def expected_size(self) -> float:
        """Expected number of clients in a round: the divisor of sums of messages."""
        ...

    @property
    def cohort_size(self) -> int:
        """Number of clients in a round if it is fixed; otherwise 0."""
        ...

    @property
    def how(self) -> str:
        """The rule in words, for the statement."""
        ...

    @property
    def divisor(self) -> str:
        """The divisor of sums in words, for the statement."""
        ...

    @property
    def separation(self) -> int:
        """The fewest rounds from one message of a client to its next: 1 if it may be in consecutive rounds."""
        ...

    def cohort(self, source: Source) -> np.ndarray:
        """Return the client ids of one round, ascending int64, `[cohort]`."""
        ...

    def drawn(self, streams: Streams, round: int) -> np.ndarray:
        """Return the client ids of a round (from 1), ascending int64, `[cohort]`."""
        ...

    def charge(self, rounds: int, *, each_message: bool) -> float:
        """Return the charge of the first rounds to the client charged most, without any credit for sampling.

        The unit is one Gaussian release of a message of weight 1.

        Args:
            rounds: At least 0.
            each_message: True if the adversary sees each message separately.
        """
        ...

    def amplifies(self, *, client_memory: bool) -> bool:
        """Return True if a secret cohort hides its clients, so that it lowers epsilon.

        Args:
            client_memory: True if clients remember earlier rounds.
        """
        ...

    def event(self, noise_multiplier: float, *, replace: bool) -> "tuple[DpEvent, NeighboringRelation]":
        """Return one round with a hidden cohort as dp-accounting's event; units: see `fedpriv.privacy.accounting`.

        Args:
            noise_multiplier: Noise std / l2_sensitivity, above 0.
            replace: True for the neighbors of `replace`.
        """
        ...

    def check_neighbors(self, adjacency: Adjacency) -> None:
        """Raise UserError if the sampling cannot be accounted for under this adjacency."""
        ...

    def as_dict(self) -> dict[str, object]:
        """Return the sampling's record, for JSON."""
        ...

    def caveats(self, *, trust: Trust, adjacency: Adjacency, client_memory: bool, rounds: int) -> str:
        """Return further sentences about the cohorts for the statement, possibly none.

        Args:
            trust: The plan's trust.
            adjacency: The plan's adjacency.
            client_memory: True if clients remember earlier rounds.
            rounds: The plan's number of rounds.
        """
        ...

    def moved(self, trust: Trust) -> str:
        """Return words that follow the sensitivity if the change of a sum depends on more than one message's bound."""
        ...

    def more_clients(self, count: int) -> str:
        """Return words for a population of `count` clients with the same sampling probability."""
        ...


class _Drawn:
    """Base of the samplings that draw each round's cohort at random."""

    draws_cohorts: ClassVar[bool] = True
    by_coins: ClassVar[bool] = False
    stead: ClassVar[float] = 0.0
    adjacencies: ClassVar[tuple[Adjacency, ...]] = ADJACENCIES
    turns: ClassVar[str] = "rounds"
    most: ClassVar[str] = (
        "Epsilon is that of a client that takes part in every round, the worst case; a client that takes part less "
        "often has spent less."
    )

    @property
    def hiding_prob(self: Sampling) -> float:
        """The sampling probability, which is the exact probability of the draws."""
        return self.sampling_prob

    @property
    def cohort_size(self) -> int:
        """0: the cohort size is not fixed."""
        return 0

    @property
    def divisor(self: Sampling) -> str:
        """See `Sampling.divisor`."""
        return f"the expected cohort size, {self.expected_size:g}, never by the actual one"

    @property
    def separation(self) -> int:
        """1: a client may be in consecutive rounds."""
        return 1

    def drawn(self: Sampling, streams: Streams, round: int) -> np.ndarray:
        """See `Sampling.drawn`."""
        return self.cohort(streams.source(Purpose.COHORT, round))

    def charge(self, rounds: int, *, each_message: bool) -> float:
        """Return one release per round: a client may be in all of them."""
        return float(rounds)

    def check_neighbors(self, adjacency: Adjacency) -> None:
        """Accept every adjacency."""

    def as_dict(self: Sampling) -> dict[str, object]:
        """See `Sampling.as_dict`."""
        return _record(self)

    def caveats(self, *, trust: Trust, adjacency: Adjacency, client_memory: bool, rounds: int) -> str:
        """Return no sentences."""
        return ""

    def moved(self, trust: Trust) -> str:
        """Return no words."""
        return ""

    def more_clients(self, count: int) -> str:
        """See `Sampling.more_clients`."""
        return f"about {count:,} clients"


@dataclass(frozen=True)
class Everyone(_Drawn):
    """Every client takes part in every round.

    Args:
        population: Number of clients n, at least 1.

    Raises:
        UserError: If the population is not such a number.
    """

    population: int
    name: ClassVar[str] = "everyone"

    def __post_init__(self) -> None:
        plain_numbers(self)
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
        """Return False: no client is hidden."""
        return False

    def event(self, noise_multiplier: float, *, replace: bool) -> "tuple[DpEvent, NeighboringRelation]":
        """See `Sampling.event`."""
        return gaussian_event(noise_multiplier)

    @classmethod
    def recorded(cls, record: Mapping[str, Any]) -> "Everyone":
        """Return the sampling that wrote the record."""
        return cls(record["population"])

    def cohort(self, source: Source) -> np.ndarray:
        """Return all client ids, ascending int64, `[n]`; uses no randomness."""
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
        If the source's bits are uniform and independent, a cohort is the result of n independent trials, each of
        exactly the probability q (a float64). Cases that rounding could change are decided in exact arithmetic, so the
        accountant needs no allowance. Cohorts of different sources are as independent as the sources.
    """

    population: int
    probability: float
    name: ClassVar[str] = "poisson"
    by_coins: ClassVar[bool] = True

    def __post_init__(self) -> None:
        plain_numbers(self)
        _check_population(self.population)
        _check_probability(self.probability)

    @property
    def sampling_prob(self) -> float:
        """Probability that a given client takes part in a given round: q."""
        return float(self.probability)

    @property
    def expected_size(self) -> float:
        """Expected number of clients in a round: q n, the divisor of sums of messages."""
        return self.sampling_prob * self.population

    @property
    def how(self) -> str:
        """See `Sampling.how`."""
        return f"each client takes part in each round independently with probability {self.sampling_prob:g}"

    def amplifies(self, *, client_memory: bool) -> bool:
        """Return True if q < 1. The others' memories of their coins reveal nothing about a client's own coin."""
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
        """Return the sampling that wrote the record."""
        return cls(record["population"], record["sampling_prob"])

    def cohort(self, source: Source) -> np.ndarray:
        """Return the client ids of one round, ascending int64, `[cohort]`; cost scales with the cohort, not with n."""
        if self.sampling_prob == 1.0:
            return np.arange(self.population, dtype=np.int64)
        blocks: list[np.ndarray] = []
        last = -1
        while last < self.population:
            ids = last + np.cumsum(self._steps(source))
            blocks.append(ids)
            last = int(ids[-1])
        ids = np.concatenate(blocks)
        return ids[: np.searchsorted(ids, self.population)]

    def _steps(self, source: Source) -> np.ndarray:
        """Return distances from one sampled client to the next: geometric from 1, int64, capped at n + 1.

        The number of clients skipped before a success is floor(log(1 - U) / log(1 - q)) for uniform U. Two
        draws give the first 106 bits of one U.
        """
        size = min(BLOCK, int(self.expected_size + 4.0 * math.sqrt(self.expected_size)) + 4)
        high, low = source.uniform(size), source.uniform(size)
        fine, rate = high + low * 2.0**-53, -math.log1p(-self.sampling_prob)
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            passed_over = -np.log1p(-fine) / rate
            # Above the rounding error of `fine`, the logarithms and the quotient; infinite at 1.
            error = (2.0**-52 * fine + 2.0**-105) / (1.0 - fine) / rate + 2.0**-47 * passed_over
            decided = (np.abs(passed_over - np.rint(passed_over)) > error) | (passed_over - error > self.population)
        steps = np.minimum(passed_over, float(self.population)).astype(np.int64) + 1
        for index in np.flatnonzero(~decided).tolist():
            digits = int(high[index] * 2.0**53) << 53 | int(low[index] * 2.0**53)
            steps[index] = self._passed_over(digits, source) + 1
        return steps

    def _passed_over(self, digits: int, source: Source) -> int:
        """Return the number of clients skipped, at most n, given the first 106 bits of U; draw bits until certain.

        `decimal` rounds logarithms and quotients correctly: an allowance of 10^-places covers all rounding here.
        """
        probability = Decimal(self.sampling_prob)
        for bits in count(106, 53):
            places = bits // 3 + 10
            with localcontext(prec=2 * places + 20 - probability.adjusted()):
                rate, allowance = -(1 - probability).ln(), Decimal(10) ** -places
                # 1 - U is between these two over 2^bits; the logarithm of zero is infinite.
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
        plain_numbers(self)
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
        """m / n, rounded up."""
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
        """Return False if clients remember earlier rounds.

        One client's participation affects which others take part, the others' memories record that, and their later
        messages reveal it.
        """
        return self.sampling_prob < 1.0 and not client_memory

    def event(self, noise_multiplier: float, *, replace: bool) -> "tuple[DpEvent, NeighboringRelation]":
        """See `Sampling.event`."""
        import dp_accounting as dpa  # takes a second

        noise = dpa.GaussianDpEvent(noise_multiplier if replace else 0.5 * noise_multiplier)
        event = dpa.SampledWithoutReplacementDpEvent(int(self.population), int(self.size), noise)
        return event, dpa.NeighboringRelation.REPLACE_ONE

    def as_dict(self) -> dict[str, object]:
        """See `Sampling.as_dict`."""
        return {**_record(self), "size": self.size}

    @classmethod
    def recorded(cls, record: Mapping[str, Any]) -> "FixedSize":
        """Return the sampling that wrote the record."""
        return cls(record["population"], record["size"])

    def caveats(self, *, trust: Trust, adjacency: Adjacency, client_memory: bool, rounds: int) -> str:
        """Return the effects of memory and adjacency on hidden cohorts."""
        said = ""
        if trust.hides_cohorts and client_memory:
            said += "No amplification by sampling is claimed, because clients may remember earlier rounds."
        if trust.hides_cohorts and adjacency == "add-or-remove":
            said += " The number of clients is public; the message of a removed client is zero."
        return said

    def cohort(self, source: Source) -> np.ndarray:
        """Return the client ids of one round, ascending int64, `[m]`."""
        return source.subset(self.population, self.size)


@dataclass(frozen=True)
class Scheduled:
    """A public timeline that decides before the run which client counts in which step, and with which weight.

    Built from a timeline (`fedpriv.clock`), never from a config, for asynchronous servers and for rounds that end with
    the first answers. There, one client's participation depends on the others', so sampling gives no credit:
    participation is treated as known, and a client is charged for its actual messages.

    Args:
        population: Number of clients n, at least 1.
        expected_size: The public divisor of a step's weighted sum.
        scheme: The origin of the timeline: `over-selection`, `fedbuff`, `fedfix` or `token`.
        squares: After each step, the largest sum of squared weights of one client's messages so far.
        sent: After each step, the largest number of messages that one client has sent, including messages that the
            server did not use.

    Formal guarantees:
        Let the adjacency be `replace`, and let the timeline depend on no client's data (it is built from devices,
        numbers of examples and a seed, all public). A client with a message of weight w_k in step k moves that step's
        sum by at most 2 B w_k, for all earlier releases. The sums of all steps then release no more than one Gaussian
        mechanism of sensitivity 2 B sqrt(sum_k w_k^2) (adaptive composition; exact in the privacy loss). A removed
        client would leave its place in the buffer to others and shift their steps, so add-or-remove is not offered.
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
    adjacencies: ClassVar[tuple[Adjacency, ...]] = ("replace",)
    turns: ClassVar[str] = "steps"
    most: ClassVar[str] = (
        "Epsilon is that of the client that sends the most messages in this timeline; a client that sends fewer has "
        "spent less."
    )

    def __post_init__(self) -> None:
        plain_numbers(self)
        _check_population(self.population)
        if not 0.0 < self.expected_size <= self.population or not self.squares or len(self.squares) != len(self.sent):
            raise ValueError(f"not a timeline of at least one step: {self}")
        if any(not 0.0 <= charge < math.inf for charge in (*self.squares, *self.sent)):
            raise ValueError("charges must be finite and at least 0")
        if any(later < earlier for of in (self.squares, self.sent) for earlier, later in pairwise(of)):
            raise ValueError("a charge never falls from step to step")

    @property
    def sampling_prob(self) -> float:
        """Expected messages over clients; not a probability that hides a client."""
        return self.expected_size / self.population

    @property
    def hiding_prob(self) -> float:
        """1: no client is hidden."""
        return 1.0

    @property
    def cohort_size(self) -> int:
        """0: the cohort size is not fixed."""
        return 0

    @property
    def separation(self) -> int:
        """1: a client may count in consecutive steps."""
        return 1

    @property
    def how(self) -> str:
        """See `Sampling.how`."""
        return _SCHEMES[self.scheme]

    @property
    def divisor(self) -> str:
        """See `Sampling.divisor`."""
        return f"a public number, {self.expected_size:g}"

    def charge(self, rounds: int, *, each_message: bool) -> float:
        """Return the charge of the first steps to the client charged most, in Gaussian releases of weight 1.

        Args:
            rounds: Number of steps, from 0 to the number in the timeline.
            each_message: True if the adversary sees each message separately (local trust). Weights are applied later,
                and the adversary also sees messages that the server does not use. Otherwise it sees only noised
                weighted sums.
        """
        if not 0 <= rounds <= len(self.squares):
            raise ValueError(f"a timeline of {len(self.squares)} steps has no charge for {rounds} steps")
        return float((self.sent if each_message else self.squares)[rounds - 1]) if rounds else 0.0

    def amplifies(self, *, client_memory: bool) -> bool:
        """Return False: no client is hidden."""
        return False

    def event(self, noise_multiplier: float, *, replace: bool) -> "tuple[DpEvent, NeighboringRelation]":
        """Return the event of a message of weight 1."""
        return gaussian_event(noise_multiplier)

    def check_neighbors(self, adjacency: Adjacency) -> None:
        """Raise UserError under add-or-remove."""
        if adjacency not in self.adjacencies:
            got = f'"{adjacency}" with {self.scheme}'
            remedy = "Set it to replace: a removed client would shift the steps in which others count"
            raise UserError("privacy.adjacency", '"replace"', got, remedy)

    def as_dict(self) -> dict[str, object]:
        """See `Sampling.as_dict`; holds only the last charges."""
        last = {"most_squared_weights": self.squares[-1], "most_messages_sent": self.sent[-1]}
        return {**_record(self), "scheme": self.scheme, **last}

    @classmethod
    def recorded(cls, record: Mapping[str, Any]) -> "Scheduled":
        """Return a timeline with the whole charge at every step, which is never too little."""
        steps = max(record["rounds"], 1)
        return cls(
            population=record["population"],
            expected_size=record["expected_size"],
            scheme=record["scheme"],
            squares=(record["most_squared_weights"],) * steps,
            sent=(record["most_messages_sent"],) * steps,
        )

    def caveats(self, *, trust: Trust, adjacency: Adjacency, client_memory: bool, rounds: int) -> str:
        """Return sentences on known participation, and on the client charged most."""
        most = self.charge(rounds, each_message=trust.shows_messages)
        charged = f"with the largest sum of squared message weights, {most:g}"
        if trust.shows_messages:
            charged = f"that sends the most messages, {most:g}, including those that came too late"
        return (
            "Before the run, a timeline decides which clients count in which step, and with which weight. It is "
            "treated as known to everyone: participation is visible, and no amplification by sampling is claimed. "
            f"Epsilon is that of the client {charged}." + (_WITHOUT_SERVER if self.scheme == "token" else "")
        )

    def moved(self, trust: Trust) -> str:
        """See `Sampling.moved`; with noise on single messages, weights are applied after it."""
        return ("" if trust.shows_messages else ", times the weight of its message,") + " in a step"

    def more_clients(self, count: int) -> str:
        """See `Sampling.more_clients`; a larger population alone does not suffice."""
        return "more clients at a time" if self.expected_size > 1.0 else "fewer steps for each client"

    def cohort(self, source: Source) -> np.ndarray:
        """Raise an error: no cohort is drawn.

        Raises:
            ValueError: Always.
        """
        raise ValueError("the timeline decides who counts; no cohort is drawn")

    def drawn(self, streams: Streams, round: int) -> np.ndarray:
        """Raise an error; see `cohort`."""
        return self.cohort(streams.source(Purpose.COHORT, round))


@dataclass(frozen=True)
class Separated(_Drawn):
    """Every client is in one of b groups, and may take part only in every b-th round.

    Group g (from 0) has its turn in rounds g + 1, g + 1 + b, ... Each client's group is drawn independently of all
    others, and is public. In a turn, all of the group take part, or each independently with a secret coin.

    Args:
        population: Number of clients n, at least 1.
        min_separation: b, from 1: the rounds from one turn of a client to its next.
        probability: Probability q that a client takes part in a given round, at most 1 / b; None for 1 / b, with which
            all of a group take part.

    Raises:
        UserError: If a field is out of its range.

    Formal guarantees:
        If the source's bits are uniform and independent, the coins of a turn are as those of `Poisson`, of exactly the
        probability `hiding_prob`. They are independent of the groups. In b consecutive rounds a client takes part at
        most once.
    """

    population: int
    min_separation: int
    probability: float | None = None
    name: ClassVar[str] = "separated"
    most: ClassVar[str] = "Epsilon is that of a client that takes part in every turn of its group."

    def __post_init__(self) -> None:
        plain_numbers(self)
        _check_population(self.population)
        if not is_whole(self.min_separation, 1, MAX_SEPARATION):
            expected = f"a whole number of rounds from 1 to {MAX_SEPARATION:,}"
            remedy = "Set the rounds from one turn of a client to its next"
            raise UserError("cohort.min_separation", expected, repr(self.min_separation), remedy)
        if self.probability is None:
            return
        _check_probability(self.probability)
        if self.probability * self.min_separation > 1.0:
            expected = f"at most 1 / min_separation = {1.0 / self.min_separation:g}"
            remedy = "Lower it or min_separation: a client has only every so many rounds"
            raise UserError("cohort.probability", expected, self.probability, remedy)

    @property
    def sampling_prob(self) -> float:
        """Probability that a given client takes part in a given round: q."""
        return 1.0 / self.min_separation if self.probability is None else float(self.probability)

    @property
    def hiding_prob(self) -> float:
        """Probability that a client takes part in a turn of its group: q b, the exact probability of the draws."""
        return 1.0 if self.probability is None else min(self.probability * self.min_separation, 1.0)

    @property
    def expected_size(self) -> float:
        """Expected number of clients in a round: q n, the divisor of sums of messages."""
        return self.sampling_prob * self.population

    @property
    def separation(self) -> int:
        """b."""
        return self.min_separation

    @property
    def how(self) -> str:
        """See `Sampling.how`."""
        who = "all of it take part"
        if self.hiding_prob < 1.0:
            who = f"each of its clients takes part independently with probability {self.hiding_prob:g}"
        return (
            f"each is in one of {self.min_separation} groups, drawn at random and public; each group has its turn in "
            f"every {self.min_separation}th round, in which {who}"
        )

    def charge(self, rounds: int, *, each_message: bool) -> float:
        """Return one release per turn of a group."""
        return float(math.ceil(rounds / self.min_separation))

    def amplifies(self, *, client_memory: bool) -> bool:
        """Return True if coins decide who of a group takes part; see `Poisson.amplifies`."""
        return self.hiding_prob < 1.0

    def event(self, noise_multiplier: float, *, replace: bool) -> "tuple[DpEvent, NeighboringRelation]":
        """See `Sampling.event`; of b rounds, in which a client has one turn."""
        if self.hiding_prob == 1.0:
            return gaussian_event(noise_multiplier)
        return Poisson(self.population, self.hiding_prob).event(noise_multiplier, replace=replace)

    def as_dict(self) -> dict[str, object]:
        """See `Sampling.as_dict`."""
        return {**_record(self), "min_separation": self.min_separation, "probability": self.probability}

    @classmethod
    def recorded(cls, record: Mapping[str, Any]) -> "Separated":
        """Return the sampling that wrote the record."""
        return cls(record["population"], record["min_separation"], record["probability"])

    def cohort(self, source: Source) -> np.ndarray:
        """Raise an error: a cohort depends on the round, too; see `drawn`.

        Raises:
            ValueError: Always.
        """
        raise ValueError("a cohort of groups depends on the number of the round")

    def drawn(self, streams: Streams, round: int) -> np.ndarray:
        """Return the client ids of a round, ascending int64, `[cohort]`."""
        group = np.flatnonzero(_groups(streams, self.population, self.min_separation) == (round - 1) % self.separation)
        if self.hiding_prob == 1.0 or not len(group):
            return group
        coins = Poisson(len(group), self.hiding_prob)
        return group[coins.cohort(streams.source(Purpose.COHORT, round))]


@lru_cache(maxsize=4)
def _groups(streams: Streams, population: int, groups: int) -> np.ndarray:
    """Return each client's group, int64 `[population]`; its draw depends on no other client, and never on the round.

    Groups are public, so that nothing relies on their probabilities, which are equal to within 2^-53.
    """
    found = np.floor(streams.source(Purpose.GROUP).uniform(population) * groups).astype(np.int64)
    found.setflags(write=False)
    return found


SAMPLINGS: Registry[Everyone | Poisson | FixedSize | Separated] = Registry(
    "sampling",
    {
        "everyone": Everyone,
        "poisson": Poisson,
        "fixed": FixedSize,
        "separated": Separated,
    },
)


_RECORDED = {kind.name: kind for kind in (Everyone, Poisson, FixedSize, Separated, Scheduled)}


def read_sampling(record: Mapping[str, Any], rounds: int) -> Sampling:
    """Return the sampling with the record `record` (`as_dict`), written by this version or an earlier one.

    Args:
        record: The record.
        rounds: The plan's number of rounds.

    Raises:
        KeyError: If a value is missing.
        ValueError: If no sampling has the name in the record.
    """
    name = record["name"]
    if name not in _RECORDED:
        raise ValueError(f"no sampling is called {name!r}")
    return _RECORDED[name].recorded({**record, "rounds": rounds})


def gaussian_event(noise_multiplier: float) -> "tuple[DpEvent, NeighboringRelation]":
    """Return one round without a hidden cohort as dp-accounting's event; the same for all adjacencies."""
    import dp_accounting as dpa  # takes a second

    return dpa.GaussianDpEvent(noise_multiplier), dpa.NeighboringRelation.ADD_OR_REMOVE_ONE


def _record(sampling: Sampling) -> dict[str, object]:
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
        remedy = "Set the probability that one client takes part in one round, usually cohort size / clients"
        raise UserError("cohort.probability", expected, repr(probability), remedy)


def _check_size(size: object, population: int) -> None:
    if not is_whole(size, 1, population):
        expected = f"a whole number of clients from 1 to {population}"
        raise UserError("cohort.size", expected, repr(size), "Lower cohort.size or raise data.clients")

"""Secure aggregation in a privacy plan: the grid of the sums, the clients' shares of the noise, and their proof.

Every client rounds its bounded message to whole steps of a grid G, q = rint(message / G), and adds a share of the
noise, n = rint(s z) with z standard normal and s the share's deviation in steps. It sends q + n modulo 2^32 under masks
that cancel only in the sum. So an adversary sees sums of q + n over the clients that answered.

**Rounding.** d roundings of at most half a step move a message by at most G sqrt(d) / 2. The plan charges the bound
B' = B + G sqrt(d) / 2. Memories keep the rounded message, so that client and server agree on integers.

**Shares.** At least t clients answer, and up to c of them collude with the adversary, are its puppets or leave out
their noise. With share deviations of sigma / sqrt(t - c), the honest shares have at least the variance sigma^2. More
answers give more noise, which is not credited.

**Sums of shares are a Gaussian mechanism.** Let p_m be the distribution of the sum of m shares, and P_m that of
rint(sqrt(m) s z + u_1 + ... + u_(m-1)), the u_i uniform in (-1/2, 1/2) and independent. P_m only post-processes one
Gaussian of deviation sqrt(m) s: it adds numbers that are independent of the data, and rounds. For every integer k,

    p_m(k) = P_m(k) exp(e),  |e| <= tau = 10 sum_{j < m} exp(-2 pi^2 s^2 j / (j + 1)),   if s >= 1.

Proof. p_1 = P_1. Let g be the density of s z + u, which equals p_1 at the integers, and G_m the density of the sum of m
such numbers, which equals P_m at the integers, because the last u is the rounding. Then p_(j+1)(k) = sum_i p_j(i)
g(k - i). Given all u, the i-th term of sum_i G_j(i) g(k - i) is a factor without i times a Gaussian in i of variance
s^2 j / (j + 1). By Poisson's summation formula, the sum of such a Gaussian over all integers differs from its integral,
which gives G_(j+1)(k), by a share of at most 2 sum_l exp(-2 pi^2 l^2 s^2 j / (j + 1)), which is at most 2.1 times its
first term. The logarithms of these factors add up over j. QED.

So K rounds of d coordinates are as private as Gaussian rounds up to 2 tau d K in epsilon, and a factor exp(tau d K) on
delta. A plan is refused unless this is at most 1e-30, which the accountant's own reserve for rounding covers. The
result modulo 2^32 is post-processing. A single share (all helpers collude, or t - 1 puppets) is a rounded Gaussian:
exact.

**Everyone answers.** If clients flip their own coins, and those that are not sampled send a zero message with their
share of the noise, then every round has an answer of each client, and nothing shows who was sampled. A sum is then a
Poisson-sampled Gaussian mechanism, amplified as with a trusted server. Against the server with all helpers, who see
each message, no sampling is credited.

**Guard band.** Sums of honest clients are within n_max (B' / G + 1) + 10 deviations of all shares together, which is
less than 2^31 steps. A sum beyond this limit makes its round void: after a true wrap nothing can be counted.
"""

import json
import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from fedpriv.checks import is_whole, plain_numbers, shown, true_or_false, whole_from
from fedpriv.errors import UserError
from fedpriv.mechanisms.shares import HALF_MODULUS
from fedpriv.privacy.sampling import Everyone, Sampling

__all__ = ["MAX_CLOSENESS", "Aggregation", "AggregationChoice", "SumGrid", "closeness"]

MAX_CLOSENESS = 1e-30
"""Largest difference between sums of shares and a Gaussian mechanism, in epsilon over a whole run."""

_MAX_SHARE_STEPS = 2.0**20
"""Largest deviation of a share in grid steps, up to which it is sampled fast (`fedpriv.mechanisms.gaussian`)."""

_DEVIATIONS = 10.0
_SURVIVING = 0.8
_COIN_DEVIATIONS = 3.0
_MIN_CLIENTS = 2  # clients in a sum; helpers answer about no fewer


class SumGrid(NamedTuple):
    """The grid of a plan's sums.

    Attributes:
        step: G, a power of two.
        l2_bound: B', the bound of a rounded message.
        share_stddev: Standard deviation of one client's share of the noise.
        limit: Largest absolute value of a sum in grid steps; a sum beyond it is void.
    """

    step: float
    l2_bound: float
    share_stddev: float
    limit: int


@dataclass(frozen=True, kw_only=True)
class Aggregation:
    """The public numbers of secure aggregation.

    Args:
        helpers: Number of helpers, of which one is honest.
        least_survivors: t, the fewest answers for which a round counts.
        colluders: c, the number of clients that may collude, be puppets or leave out their noise.
        most: n_max, the largest number of messages in a sum.
        size: d, the number of parameters.
        everyone_answers: True if clients that are not sampled send their share of the noise with a zero message.

    Raises:
        UserError: If a number is out of range.
    """

    helpers: int
    least_survivors: int
    colluders: int
    most: int
    size: int
    everyone_answers: bool = False

    def __post_init__(self) -> None:
        plain_numbers(self)
        whole_from("aggregation.helpers", self.helpers, 1, "Name at least one helper outside the server's organization")
        whole_from("aggregation.colluders", self.colluders, 0, "Give 0 if no client colludes")
        true_or_false("aggregation.everyone_answers", self.everyone_answers)  # a text would count as True
        whole_from("aggregation.most", self.most, 1, "Give the number of messages in a round")
        if not is_whole(self.least_survivors, self.colluders + 1, self.most):
            expected = f"more than the {self.colluders} colluders, and at most the {self.most:,} clients of a round"
            remedy = "Change aggregation.least_survivors or aggregation.colluders"
            raise UserError("aggregation.least_survivors", expected, shown(self.least_survivors), remedy)

    @property
    def honest(self) -> int:
        """t - c, the number of shares that are certain to hide a client."""
        return self.least_survivors - self.colluders

    def grid(self, l2_bound: float, noise: float) -> SumGrid:
        """Return the finest grid that keeps sums within the guard band, and shares within the fast sampler's range.

        Args:
            l2_bound: B, the bound of a message before it is rounded.
            noise: Standard deviation of the noise on the sum over B'.

        Raises:
            UserError: If 32 bits do not suffice.
        """
        root, most = 0.5 * math.sqrt(self.size), float(self.most)
        reach = most + _DEVIATIONS * noise * math.sqrt(self.most / self.honest)
        share = noise / math.sqrt(self.honest)
        room = HALF_MODULUS - most - reach * root
        fine = _MAX_SHARE_STEPS - share * root
        if room <= 0.0 or fine <= 0.0:
            raise self._too_large()
        step = _power_above(max(l2_bound * reach / room, l2_bound * share / fine))
        bound = l2_bound + step * root
        limit = most * (bound / step + 1.0) + (reach - most) * bound / step
        return SumGrid(step, bound, share * bound, min(math.floor(limit), HALF_MODULUS - 1))

    def check(self, sums: SumGrid, rounds: int) -> None:
        """Raise UserError if sums of shares on this grid differ from a Gaussian mechanism by more than is charged."""
        if sums.share_stddev > 0.0 and self.closeness(sums, rounds) > MAX_CLOSENESS:
            raise self._too_large()

    def closeness(self, sums: SumGrid, rounds: int) -> float:
        """Return 2 tau d K: how much a run's epsilon exceeds that of Gaussian rounds, at most."""
        tau = closeness(sums.share_stddev / sums.step, self.most)
        return 2.0 * tau * self.size * max(rounds, 1)

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers for JSON."""
        return asdict(self)

    def as_text(self) -> str:
        """Return the numbers as one line, for terms and ledgers."""
        return json.dumps(asdict(self))

    @classmethod
    def of_text(cls, text: str) -> "Aggregation":
        """Read them again.

        Raises:
            UserError: If the text is not such a line.
        """
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError) as error:
            remedy = "Use one version of fedpriv on both sides"
            raise UserError("aggregation", "the numbers of secure aggregation", repr(error), remedy) from None

    def _too_large(self) -> UserError:
        got = f"{self.most:,} clients and {self.size:,} parameters"
        remedy = "Use smaller cohorts, a smaller model or more noise"
        return UserError("[aggregation]", "sums that fit in 32 bits with their noise", got, remedy)


@dataclass(frozen=True, kw_only=True)
class AggregationChoice:
    """The table `[aggregation]`, for `trust = "aggregator"`.

    Args:
        helpers: Number of helpers outside the server's organization; one honest helper suffices.
        least_survivors: t, the fewest answers for which a round counts. None for four fifths of the expected number; if
            coins decide who answers, at most the expected number minus three standard deviations. At least 2.
        colluders: c, the number of clients that may collude with the server, be its puppets or leave out their noise.
        everyone_answers: True if clients that are not sampled send their share of the noise alone, so that nobody sees
            who is sampled, and sampling is credited; for `sampling = "poisson"` in simulations.
    """

    helpers: int = 1
    least_survivors: int | None = None
    colluders: int = 0
    everyone_answers: bool = False

    def __post_init__(self) -> None:
        plain_numbers(self)
        whole_from("aggregation.helpers", self.helpers, 1, "Name at least one helper outside the server's organization")
        whole_from("aggregation.colluders", self.colluders, 0, "Give 0 if no client colludes")
        true_or_false("aggregation.everyone_answers", self.everyone_answers)  # a text would count as True
        if self.least_survivors is not None:
            remedy = "Remove it for the default: a sum of one message is that message"
            whole_from("aggregation.least_survivors", self.least_survivors, _MIN_CLIENTS, remedy)

    def check_sampling(self, *, by_coins: bool) -> None:
        """Raise UserError if everyone is to answer and clients do not take part by coins."""
        if self.everyone_answers and not by_coins:
            expected = 'false unless cohort.sampling = "poisson": each client flips its own coin'
            remedy = "Remove it, or sample clients by coins"
            raise UserError("aggregation.everyone_answers", expected, "true", remedy)

    def of(self, sampling: Sampling, most: int, size: int) -> Aggregation:
        """Return the numbers for a cohort and a model.

        Args:
            sampling: The sampling of clients.
            most: The largest number of messages in a round, if only sampled clients answer.
            size: Number of parameters.

        Raises:
            UserError: If everyone is to answer and clients are not sampled by coins.
        """
        self.check_sampling(by_coins=sampling.by_coins)
        if self.everyone_answers:
            most, sampling = sampling.population, Everyone(sampling.population)
        return Aggregation(
            helpers=self.helpers,
            least_survivors=self.least_survivors or max(_default_survivors(sampling), self.colluders + 1, _MIN_CLIENTS),
            colluders=self.colluders,
            most=most,
            size=size,
            everyone_answers=self.everyone_answers,
        )


def closeness(steps: float, shares: int) -> float:
    """Return tau: by at most which factor exp(tau) a sum of shares differs from a rounded Gaussian, at every integer.

    Args:
        steps: Standard deviation of one share in grid steps.
        shares: Number of shares.
    """
    if shares < 2:
        return 0.0
    if steps < 1.0:
        return math.inf
    first = [math.exp(-2.0 * (math.pi * steps) ** 2 * j / (j + 1)) for j in range(1, min(shares, 64))]
    return 10.0 * (math.fsum(first) + max(shares - 64, 0) * math.exp(-2.0 * (math.pi * steps) ** 2 * 64 / 65))


def _default_survivors(sampling: Sampling) -> int:
    expected = sampling.expected_size
    spread = math.sqrt(expected * (1.0 - sampling.sampling_prob)) if sampling.by_coins else 0.0
    return math.ceil(min(_SURVIVING * expected, expected - _COIN_DEVIATIONS * spread))


def _power_above(number: float) -> float:
    """Return the smallest power of two above a positive number."""
    return math.ldexp(1.0, math.frexp(number)[1])

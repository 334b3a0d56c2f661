"""Accounting for single records (`unit = "example"`): how far one record moves its client's releases.

A client sums the gradients of its examples, each bounded to the norm C, and divides by a public number: the signal. One
record moves a signal by at most D. The cost depends on the rule that turns signals into messages:

| route | the client | cost of K rounds with noise of standard deviation s on each message |
|---|---|---|
| `memory` | remembers its messages without noise, full gradients | one Gaussian of sensitivity S, below |
| `memory` | remembers the parts cut off by clipping | one Gaussian; the proof is in `fedpriv.methods.dice_sgd` |
| `fresh` | has no memory, or remembers its noised messages | K releases of sensitivity D L, each with secret batches |
| `steps` | adds the noise to the sum of every local step | K T releases of sensitivity C; all else is post-processing |

**Noiseless memory.** Let B be cocoercive with constant a: the gradient of a convex function, with a 1/a-Lipschitz
gradient (clip: 1, N_alpha: alpha). Messages are m_k = B(u_k - v_k), and memories v_{k+1} = (1 - lambda) v_k + beta m_k.
For two data sets that differ in one record, let e_k be the difference of the memories, s_k that of the messages, and
||u_k - u'_k|| <= D. If beta < 2 a (1 - lambda),

    sqrt(sum_k ||s_k||^2) <= S = 2 D sqrt(J) / (2 a - beta / (1 - lambda)),     J the rounds with the record.

Proof. Cocoercivity gives <s, d - e> >= a ||s||^2 with d = u - u'. So <s, e> <= <s, d> - a ||s||^2, and
||(1 - lambda) e + beta s||^2 <= (1 - lambda)^2 ||e||^2 + 2 (1 - lambda) beta <s, d> - beta (2 (1 - lambda) a - beta)
||s||^2. Summing over the rounds, the left side telescopes; ||d|| <= D where the record is used and 0 elsewhere, and
Cauchy-Schwarz bounds the sum of <s, d> by D sqrt(J) sqrt(sum ||s||^2). QED. The sum covers *all* rounds: a memory also
leaks a record in rounds that do not use it. For any other beta, S = 2 B sqrt(K), which holds for every bounded map.

A client may first average its signals (`Feedback.weight`): u_k <- (1 - b) u_{k-1} + b signal_k. The weights b (1 - b)^j
of this filter add up to at most 1. So by Young's inequality the sum of ||u_k - u'_k||^2 is at most J D^2, and the proof
needs nothing else.

**Restarts** of weight w (`fedpriv.methods.difference_estimators`) cost w^2 of the other releases of the route `fresh`.
Between them, changes of gradients count in units of the models' distance, so that the rounding of single gradients may
be long. It is the same in both data sets only if all other examples keep their places: `replace` alone is offered.

**Sampling of clients** lowers the cost of a record only as a count. Other records of the same client reveal whether it
takes part, so a secret cohort does not hide one record. Given who takes part, which the record does not influence, the
cost is that of J rounds, with J binomial: delta(epsilon) <= E[delta_J(epsilon)] (joint convexity). A changed record is
also a changed client, so the client's own guarantee under `replace` holds for its records. The smaller of the two is
reported. The rates of clients and of batches are never multiplied.
"""

# pyright: reportMissingTypeStubs=false

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from scipy.special import bdtrc

from fedpriv.bounding import Clip, SmoothedNormalization
from fedpriv.checks import is_real, is_whole, plain_numbers
from fedpriv.errors import UserError
from fedpriv.privacy.accounting import (
    GAUSSIAN,
    MAX_HIDING_NOISE,
    MAX_TARGET,
    NO_NOISE,
    PLD,
    Bound,
    Direction,
    Releases,
    narrow,
    noise_by_moments,
    sampled_epsilon,
)
from fedpriv.privacy.gaussian import MAX_NOISE, MAX_SHIFT, gaussian_delta, gaussian_epsilon
from fedpriv.privacy.losses import Half
from fedpriv.privacy.sampling import Sampling, gaussian_event
from fedpriv.privacy.trust import Trust
from fedpriv.privacy.unit import Adjacency

if TYPE_CHECKING:
    import dp_accounting

__all__ = ["ROUNDING", "ExampleTerms", "RecordBound", "RecordReleases"]

ROUNDING = 1e-4
"""Share of D charged for rounding: of norms and products of single gradients (`fedpriv.tasks.per_example`), of memories
and residuals in float64, and of messages to the grid of sums. It costs as much of epsilon."""

_MAX_RECORDED = 1e10
"""Largest examples times rounds and bound over C for which float64 memories round by less than their share of D."""

_MAX_COUNTS = 256
_TAILS = (0.5, 0.1, 0.01)
_MIN_NOISE = 1e-9


@dataclass(frozen=True, kw_only=True)
class ExampleTerms:
    """How clients bound and weight the gradients of their examples: public numbers.

    Args:
        clip: C, to which the gradient of each example is clipped; None with `normalization`.
        normalization: alpha of N_alpha on the gradient of each example, bounded by 1 ("automatic clipping"); None with
            `clip`.
        examples: m, the number that sums are divided by; if not `declared`, the examples of the client with the fewest.
        declared: True if all clients divide by `examples`, a public number. Otherwise each divides by its own number of
            examples, which is then public.
        rate: Probability with which each example is in a batch; 1 for full gradients.
        steps: Sums of gradients to which noise is added in the local steps of a round (`dp-sgd`: one for each step, or
            two with `ascent`); 0 if noise is added to the message.

    Raises:
        UserError: If a number is out of range.
    """

    clip: float | None
    normalization: float | None = None
    examples: int
    declared: bool = False
    rate: float = 1.0
    steps: int = 0

    def __post_init__(self) -> None:
        plain_numbers(self)
        if (self.clip is None) == (self.normalization is None):
            got = "a table without them" if self.clip is None else "both"
            remedy = "Set example_clip, the longest gradient of one example, such as 1.0"
            raise UserError("[privacy]", "one of example_clip and example_normalization", got, remedy)
        for name, value in (("example_clip", self.clip), ("example_normalization", self.normalization)):
            if value is not None and not is_real(value, 1e-10, 1e10):
                raise UserError(f"privacy.{name}", "a number from 1e-10 to 1e10", value, "Give a number such as 1.0")
        if not is_whole(self.examples, 1, 10**12):
            remedy = "Give a public number: how many examples a client typically has"
            raise UserError("privacy.examples", "a whole number from 1 to 1e12", self.examples, remedy)
        if not (is_real(self.rate, 1e-6) and self.rate <= 1.0):
            raise UserError("local.rate", "a probability from 1e-6 to 1", self.rate, "Give the share of a batch")
        if not is_whole(self.steps, 0, 10**9):
            raise UserError("local.steps", "a whole number from 0", self.steps, "Give the number of local steps")
        if self.declared is not True and self.declared is not False:
            raise UserError("privacy.examples", "a public number, or none", repr(self.declared), "Correct it")

    def as_text(self) -> str:
        """Return the numbers as one line, for instructions."""
        return json.dumps(asdict(self))

    @classmethod
    def of_text(cls, text: str) -> "ExampleTerms":
        """Read them again.

        Raises:
            UserError: If the text is not such a line.
        """
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError) as error:
            remedy = "Use one version of fedpriv on both sides"
            raise UserError("examples", "how gradients of examples are bounded", repr(error), remedy) from None

    @property
    def bounded(self) -> Clip | SmoothedNormalization:
        """The map of each example's gradient."""
        if self.normalization is not None:
            return SmoothedNormalization(alpha=self.normalization)
        assert self.clip is not None
        return Clip(clip_norm=self.clip)

    @property
    def bound(self) -> float:
        """C: the longest bounded gradient of one example."""
        return self.bounded.l2_bound

    def divisor(self, examples: int) -> float:
        """Return the number by which a client with `examples` examples divides a sum: never the size of the batch."""
        return self.rate * (self.examples if self.declared else max(examples, 1))

    @property
    def alone(self) -> float:
        """Largest part of one example in the signal of the client with the fewest examples: C / (rate m)."""
        return self.bound / (self.rate * self.examples)


@dataclass(frozen=True, kw_only=True)
class RecordBound:
    """How far one record moves the releases of its client; see the module.

    Args:
        terms: The numbers of the signal.
        l2_bound: B, the bound of a message.
        lipschitz: L, by which the method may stretch a change of the signal.
        cocoercive: a, if the method's map is cocoercive.
        beta: The share of a message that a noiseless memory keeps; None without noiseless memory.
        damping: lambda, the share of the memory that is forgotten each round.
        clip_norm: C1, to which gradients of at most C are clipped in messages if a memory keeps the parts cut off;
            None for other rules.
        feedback_clip: C2, the bound of the part that such a memory sends in a round.
        period: Rounds from one restart to the next, if the first round and every `period`-th after it is one; None
            without restarts.
        restart_weight: w, by which restarts are longer than other messages.

    Raises:
        UserError: If there is no route of accounting.
    """

    terms: ExampleTerms
    l2_bound: float
    lipschitz: float = 1.0
    cocoercive: float | None = None
    beta: float | None = None
    damping: float = 0.0
    clip_norm: float | None = None
    feedback_clip: float | None = None
    period: int | None = None
    restart_weight: float = 1.0

    def __post_init__(self) -> None:
        plain_numbers(self)
        if self.route == "memory" and self.terms.rate < 1.0:
            remedy = 'Set local.work = "full-gradient", which needs less noise for the same promise'
            expected = "full gradients with a noiseless memory: it remembers a record long after its batch"
            raise UserError("local.work", expected, '"poisson-gradient"', remedy)

    def as_dict(self) -> dict[str, object]:
        """Return the bound for JSON; see `read`."""
        own = {key: value for key, value in asdict(self).items() if key != "terms"}
        absent = {"clip_norm": None, "feedback_clip": None, "period": None, "restart_weight": 1.0}
        own = {key: value for key, value in own.items() if key not in absent or value != absent[key]}
        return {"route": self.route, **asdict(self.terms), **own}

    def as_text(self) -> str:
        """Return the bound as one line, for terms and ledgers."""
        return json.dumps(self.as_dict())

    @classmethod
    def read(cls, table: Mapping[str, Any] | str) -> "RecordBound":
        """Return the bound with this record.

        Raises:
            UserError: If it is not the record of a bound.
        """
        try:
            found = dict(json.loads(table) if isinstance(table, str) else table)
            terms = ExampleTerms(**{field.name: found.pop(field.name) for field in fields(ExampleTerms)})
            route, bound = found.pop("route"), cls(terms=terms, **found)
        except (ValueError, TypeError, KeyError) as error:
            remedy = "Use one version of fedpriv on both sides"
            raise UserError("record", "how far one record moves releases", repr(error), remedy) from None
        if route != bound.route:
            raise UserError("record", f"the route {bound.route!r}", repr(route), "Restore the record")
        return bound

    @property
    def route(self) -> Literal["memory", "fresh", "steps"]:
        """The route of accounting."""
        if self.terms.steps:
            return "steps"
        return "fresh" if self.beta is None and self.feedback_clip is None else "memory"

    def alone(self) -> float:
        """Largest change of a release by one record that is present or absent: C for a step, D L for a message."""
        if self.route == "steps":
            return self.terms.bound * (1.0 + ROUNDING)
        return min(self.terms.alone * (1.0 + ROUNDING) * self.lipschitz, 2.0 * self.l2_bound)

    def sensitivity(self, adjacency: Adjacency, rounds: int) -> float:
        """Return the sensitivity that noise is measured by: of one release, and on the route `memory` of all rounds.

        Args:
            adjacency: `replace` or `add-or-remove`.
            rounds: Number of rounds with the client, from 1.
        """
        both = 2.0 if adjacency == "replace" else 1.0
        if self.route == "steps":
            return both * self.alone()
        if self.route == "fresh" and self.period is not None:
            return both * self.terms.alone * (1.0 + ROUNDING) * self.lipschitz
        if self.route == "fresh":
            return min(both * self.terms.alone * (1.0 + ROUNDING) * self.lipschitz, 2.0 * self.l2_bound)
        if self.clip_norm is not None and self.feedback_clip is not None:
            return self._of_feedback(both / self.terms.examples, self.clip_norm, self.feedback_clip, rounds)
        return self._of_memory(both * self.terms.alone * (1.0 + ROUNDING), rounds)

    def releases(self, rounds: int) -> float:
        """Return the cost of the first `rounds` rounds on the route `fresh`, in releases that are not restarts."""
        if self.period is None:
            return float(rounds)
        restarts = math.ceil(rounds / self.period)
        return restarts * self.restart_weight**2 + (rounds - restarts)

    def _of_feedback(self, share: float, clip_norm: float, feedback_clip: float, rounds: int) -> float:
        """Return the sensitivity with a memory of the parts cut off; the proof is in `fedpriv.methods.dice_sgd`."""
        direct = share * clip_norm * (1.0 + ROUNDING) * math.sqrt(rounds)
        cut = share * (self.terms.bound * (1.0 + ROUNDING) - clip_norm) * rounds
        fed_back = min(cut, 2.0 * feedback_clip * math.sqrt(rounds))
        return min(direct + fed_back, 2.0 * self.l2_bound * math.sqrt(rounds))

    def _of_memory(self, moved: float, rounds: int) -> float:
        trivial = 2.0 * self.l2_bound * math.sqrt(rounds)
        if self.cocoercive is None or self.beta is None:
            return trivial
        left = 2.0 * self.cocoercive - self.beta / (1.0 - self.damping)
        return trivial if left <= 0.0 else min(2.0 * moved * math.sqrt(rounds) / left, trivial)

    def check_neighbors(self, adjacency: Adjacency, sampling: Sampling) -> None:
        """Raise UserError if restarts have no proof for this adjacency or sampling."""
        if self.period is not None and adjacency != "replace":
            remedy = 'Set it to "replace"'
            expected = '"replace" with differences of gradients: rounding of the others may hide or show an example'
            raise UserError("privacy.adjacency", expected, repr(adjacency), remedy)
        everyone = sampling.draws_cohorts and sampling.sampling_prob >= 1.0
        if self.restart_weight != 1.0 and not everyone:
            expected = "1 unless everyone takes part: a client might take part in the dearer rounds alone"
            raise UserError("method.restart_weight", expected, self.restart_weight, "Set it to 1")

    def most_examples(self, rounds: int) -> float:
        """Return the most examples of a client for which memories round by less than their slack."""
        longest = self.l2_bound if self.feedback_clip is None else max(self.l2_bound, self.terms.bound)
        return _MAX_RECORDED * self.terms.bound / (max(rounds, 1) * longest)

    def check_rounds(self, rounds: int) -> None:
        """Raise UserError if memories could round away the part of one record."""
        if self.terms.examples > self.most_examples(rounds):
            expected = f"rounds times examples times bound over example_clip of at most {_MAX_RECORDED:g}"
            remedy = "Use fewer rounds, or a smaller bound of messages"
            raise UserError("training.rounds", expected, f"{rounds:,} rounds", remedy)


@dataclass(frozen=True, kw_only=True)
class RecordReleases:
    """A run's releases, seen from one record; has the members of `accounting.Releases` that plans use.

    Args:
        trust: See `Releases`.
        adjacency: How neighboring data sets differ in one record of one client; the clients are the same.
        sampling: See `Releases`.
        delta: In (0, 1).
        record: How far one record moves the releases.
        rounds: Number of rounds of the plan, on which the sensitivity depends.
        client_memory: See `Releases`.

    Raises:
        UserError: If a timeline decides who counts, or there is no proof for this adjacency or sampling.
    """

    trust: Trust
    adjacency: Adjacency
    sampling: Sampling
    delta: float
    record: RecordBound
    rounds: int
    client_memory: bool = True

    def __post_init__(self) -> None:
        if not self.sampling.draws_cohorts:
            remedy = 'Remove [schedule], or use privacy.unit = "client"'
            raise UserError("privacy.unit", '"client" with [schedule]', '"example"', remedy)
        self.record.check_neighbors(self.adjacency, self.sampling)

    @property
    def sensitivity(self) -> float:
        """The sensitivity over which noise multipliers are stated."""
        return self.record.sensitivity(self.adjacency, max(self.rounds, 1))

    @property
    def pairs(self) -> tuple[Direction, ...]:
        """The orders of neighbors to compose for a record hidden by secret batches; empty for full gradients."""
        rate = min(self.record.terms.rate + 2.0**-53, 1.0)  # coins are multiples of 2^-53
        if self.record.terms.rate == 1.0 or self.record.route == "memory":
            return ()
        gone, come, other = Half(rate, 1.0, 1.0), Half(rate, 0.0, 1.0), Half(rate, 1.0, 2.0)
        return ((other, other),) if self.adjacency == "replace" else ((gone, come), (come, gone))

    @property
    def credits_sampling(self) -> bool:
        """True if epsilon may rely on secret batches or cohorts; otherwise one exact mu describes the run."""
        return bool(self.pairs) or self._hidden < 1.0

    @property
    def _hidden(self) -> float:
        return self.sampling.hiding_prob if self.trust.hides_cohorts else 1.0

    @property
    def _each(self) -> int:
        """Releases of a round."""
        return max(self.record.terms.steps, 1)

    def charged(self, rounds: int) -> float:
        """Return (mu times the noise multiplier)^2 of the first `rounds` rounds, without credit for any sampling."""
        if self.record.route != "memory":
            return self.record.releases(rounds) * self._each
        return (self.record.sensitivity(self.adjacency, rounds) / self.sensitivity) ** 2 if rounds else 0.0

    def bound(self, noise_multiplier: float, rounds: int, horizon: int | None = None) -> Bound:
        """Return the smallest proven bound; see `Releases.bound`."""
        if rounds == 0:
            return Bound(0.0, GAUSSIAN, False)
        if noise_multiplier == 0.0:
            return Bound(math.inf, NO_NOISE, False)
        stddev, horizon = noise_multiplier * self.sensitivity, horizon or rounds
        found = [self._of_count(stddev, rounds, horizon, self.delta)]
        if self._hidden < 1.0:
            found += [self._of_hidden_count(stddev, rounds, horizon), *self._of_client(stddev, rounds, horizon)]
        return min(found, key=lambda bound: bound.epsilon)

    def epsilon(self, noise_multiplier: float, rounds: int, horizon: int | None = None) -> float:
        """Return the epsilon of `bound`."""
        return self.bound(noise_multiplier, rounds, horizon).epsilon

    def calibrate(self, epsilon: float, rounds: int) -> float:
        """Return the smallest noise multiplier that spends at most `epsilon`; see `Releases.calibrate`."""
        rounds = max(rounds, 1)
        if not 0.0 < epsilon <= MAX_TARGET:
            expected = f"a number above 0 and at most {MAX_TARGET:g}"
            remedy = "Set it, usually below 10. For a non-private run, remove the [privacy] table"
            raise UserError("privacy.epsilon", expected, epsilon, remedy)
        chance = min(1.0, rounds * self._each * self._hidden * self.record.terms.rate)
        if self.delta >= chance:
            expected = f"a delta below {chance:g}, the probability that a given record is ever used"
            raise UserError("privacy.delta", expected, self.delta, "Lower privacy.delta well below 1 / examples")

        def within(noise_multiplier: float) -> float:
            spent = self.epsilon(noise_multiplier, rounds)
            return epsilon / spent if spent > 0.0 else math.inf

        enough = math.sqrt(self.charged(rounds)) / _shift_of(epsilon, self.delta)
        if enough > MAX_NOISE or within(enough) < 1.0:
            remedy = "Raise privacy.epsilon; a smaller value drowns in rounding"
            raise UserError("privacy.epsilon", "a target that the accountant can resolve", epsilon, remedy)
        if not self.credits_sampling:
            return enough
        if self.pairs:
            unit, releases = self.sensitivity / self.record.alone(), rounds * self._each
            fewer = noise_by_moments(self.pairs, unit, self.delta, epsilon, releases, enough)
            enough = fewer if within(fewer) >= 1.0 else enough
        factor = 1.05
        while enough > _MIN_NOISE and within(enough / factor) >= 1.0:
            enough, factor = enough / factor, factor**2
        return narrow(within, enough / factor, enough)

    def event(self, noise_multiplier: float) -> "tuple[dp_accounting.DpEvent, dp_accounting.NeighboringRelation]":
        """Return one round with the client as dp-accounting's event; on the route `memory`, the whole run.

        Args:
            noise_multiplier: Noise std / `sensitivity`, above 0.
        """
        import dp_accounting as dpa  # takes a second

        one, relation = gaussian_event(noise_multiplier)
        if self.pairs:
            one = dpa.GaussianDpEvent(noise_multiplier * self.sensitivity / self.record.alone())
            one = dpa.PoissonSampledDpEvent(self.record.terms.rate, one)
            relation = dpa.NeighboringRelation.REPLACE_ONE if self.adjacency == "replace" else relation
        return (one if self._each == 1 else dpa.SelfComposedDpEvent(one, self._each)), relation

    def _of_count(self, stddev: float, count: int, horizon: int, delta: float) -> Bound:
        """Return the bound for a client that is known to take part in `count` rounds."""
        shift = math.sqrt(self.charged(count)) * self.sensitivity / stddev
        whole = Bound(gaussian_epsilon(shift, delta), GAUSSIAN, False)
        noise = min(stddev / self.record.alone(), MAX_HIDING_NOISE)
        if whole.epsilon == 0.0 or not self.pairs or noise * MAX_SHIFT < 1.0:
            return whole
        releases = count * self._each
        if releases * self.pairs[0][0].prob <= delta:
            return Bound(0.0, PLD, False)
        sampled = sampled_epsilon(self.pairs, noise, releases, delta, max(horizon * self._each, releases))
        return min([whole, Bound(sampled, PLD, False)], key=lambda bound: bound.epsilon)

    def _of_hidden_count(self, stddev: float, rounds: int, horizon: int) -> Bound:
        """Return the bound for a client that takes part in a random number of rounds; see the module."""
        if rounds * self._hidden <= self.delta:
            return Bound(0.0, PLD, True)
        if not self.pairs:
            return Bound(self._of_mixture(stddev, rounds), GAUSSIAN, True)
        found: list[Bound] = []
        for share in _TAILS:
            most = _quantile(rounds, self._hidden, share * self.delta)
            left = self.delta - _tail(most, rounds, self._hidden)
            if 0 < most < rounds and left > 0.0:
                found.append(self._of_count(stddev, most, horizon, left)._replace(amplified=True))
        return min(found, key=lambda bound: bound.epsilon, default=Bound(math.inf, PLD, True))

    def _of_mixture(self, stddev: float, rounds: int) -> float:
        """Return epsilon for a binomial mixture of Gaussians; counts are rounded up to `_MAX_COUNTS` values."""
        most = _quantile(rounds, self._hidden, 1e-6 * self.delta)
        step = max(math.ceil(most / _MAX_COUNTS), 1)
        counts = [min(count, most) for count in range(step, most + step, step)]
        tails = [_tail(count, rounds, self._hidden) for count in (0, *counts)]
        shifts = [math.sqrt(self.charged(count)) * self.sensitivity / stddev for count in counts]

        def delta_at(epsilon: float) -> float:
            masses = (before - after for before, after in pairwise(tails))
            mixed = (mass * gaussian_delta(epsilon, shift) for mass, shift in zip(masses, shifts, strict=True))
            return math.fsum(mixed) * (1.0 + 1e-9) + tails[-1]

        if shifts[-1] > MAX_SHIFT:
            return math.inf
        low, high = 0.0, gaussian_epsilon(shifts[-1], 0.5 * self.delta)
        if delta_at(low) <= self.delta:
            return 0.0
        while high - low > 1e-9 * high:
            middle = 0.5 * (low + high)
            low, high = (low, middle) if delta_at(middle) <= self.delta else (middle, high)
        return high

    def _of_client(self, stddev: float, rounds: int, horizon: int) -> list[Bound]:
        """Return the bound of a client under `replace`, if its messages have noise."""
        if self.record.route == "steps":
            return []
        of_client = Releases(
            trust=self.trust,
            adjacency="replace",
            sampling=self.sampling,
            delta=self.delta,
            client_memory=self.client_memory,
        )
        return [of_client.bound(stddev / (2.0 * self.record.l2_bound), rounds, horizon)]


def _tail(count: int, rounds: int, prob: float) -> float:
    """Return an upper bound on the probability of more than `count` of `rounds` tosses."""
    return 0.0 if count >= rounds else float(bdtrc(count, rounds, prob)) * (1.0 + 1e-9)


def _quantile(rounds: int, prob: float, tail: float) -> int:
    """Return the smallest count that is exceeded with a probability of at most `tail`."""
    low, high = -1, rounds
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _tail(middle, rounds, prob) <= tail else (middle, high)
    return high


def _shift_of(epsilon: float, delta: float) -> float:
    """Return the shift at which one Gaussian costs `epsilon`; from below, to 1e-12."""
    small, large = 0.0, MAX_SHIFT
    while large - small > 1e-12 * large:
        middle = 0.5 * (small + large)
        small, large = (middle, large) if gaussian_epsilon(middle, delta) <= epsilon else (small, middle)
    return max(small, 1e-300)

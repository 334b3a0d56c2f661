"""Accounting: the only module that converts noise into epsilon, and epsilon into noise.

Every epsilon returned here is an upper bound. If two valid bounds are known, the smaller is reported with the name of
the accountant that proved it. `noise_multiplier` is always noise std / l2_sensitivity. If one message is bounded by B,
the sensitivity is B for add-or-remove and 2 B for replace. In `losses`, noise is in units of B instead.

Without sampling, all rounds together are one Gaussian mechanism (`gaussian`). Privacy loss distributions (`losses`)
account for hidden Poisson cohorts, and for hidden cohorts of a fixed size if clients keep no memory.

Nothing here can make epsilon too small:

1. One round is bounded by a dominating pair, proved in `losses`; probabilities are never rounded down.
2. Its losses are put on a grid so that both distributions keep their masses (the pessimistic Connect the Dots), or
   higher if rounding of the special functions could matter. The largest losses count as infinite.
3. Composition adds three terms to delta: the infinite losses, the mass that a transform cuts off (Chernoff's bound,
   from the same losses), and a bound on the rounding of all transforms and powers. Mass that wraps around only adds.
4. Epsilon is found by approaching delta from above. A second bound uses moments alone (Renyi divergence); the smaller
   of two valid bounds is valid.

The tests compare the results with exact Gaussians down to delta = 1e-100, with integrals of one round, with the true
mechanism of few clients over two rounds, and with the pessimistic bounds of dp-accounting. `Releases.event`
describes a round to dp-accounting. Its unit of noise differs from ours, and also between events:

| event, neighboring relation                     | its noise multiplier is | in ours, add-or-remove | replace |
|---|---|---|---|
| Gaussian, ADD_OR_REMOVE_ONE                     | std / sensitivity       | 1                      | 1       |
| PoissonSampled(Gaussian), ADD_OR_REMOVE_ONE     | std / B                 | 1                      |         |
| PoissonSampled(Gaussian), REPLACE_ONE (PLD)     | std / B                 |                        | 2       |
| SampledWithoutReplacement(Gaussian), REPLACE_ONE (RDP) | std / (2 B)      | 1/2                    | 1       |
"""

# pyright: reportMissingTypeStubs=false

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from fedpriv.errors import UserError
from fedpriv.privacy.correlation import NoiseMatrix
from fedpriv.privacy.gaussian import MAX_NOISE, MAX_SHIFT, exceeds_gaussian, gaussian_epsilon
from fedpriv.privacy.losses import Composition, Half, Losses, losses_of_one_round
from fedpriv.privacy.sampling import Sampling, gaussian_event
from fedpriv.privacy.trust import Trust
from fedpriv.privacy.unit import Adjacency
from fedpriv.version import __version__

if TYPE_CHECKING:
    import dp_accounting

__all__ = [
    "GAUSSIAN",
    "MAX_HIDING_NOISE",
    "MAX_TARGET",
    "NO_NOISE",
    "PLD",
    "Bound",
    "Direction",
    "Releases",
    "narrow",
    "noise_by_moments",
    "sampled_epsilon",
]

PLD = f"PLD (fedpriv {__version__})"
GAUSSIAN = f"one Gaussian, exactly (fedpriv {__version__})"
NO_NOISE = "none, there is no noise"

MAX_HIDING_NOISE = 1e6
"""Largest noise over bound used to account for sampled rounds; above it, rounding would hide differences of losses."""

MAX_TARGET = 1e5
"""Largest epsilon to calibrate for."""

MAX_EARLIER_SHIFT = 30.0
"""Largest mu of earlier releases whose losses are put on a grid; beyond it, their epsilon exceeds 400."""

GRID_ERROR = 2e-4
"""Approximate share of epsilon that the grid of losses may add."""

MAX_LOSSES = 2**18
"""Maximum points of one round's grid; a sixteenth of it if epsilon exceeds 1,000, as precision is then of no use."""


class Bound(NamedTuple):
    """An upper bound on epsilon, the accountant that proved it, and whether it relies on the sampling of clients."""

    epsilon: float
    accountant: str
    amplified: bool


Direction = tuple[Half, Half]
"""Larger and smaller losses of neighbors in one order, in units of a message's bound; see `losses`."""


@dataclass(frozen=True, kw_only=True)
class Releases:
    """A run's releases: everything that epsilon depends on except the noise and the number of rounds.

    Args:
        trust: If the adversary sees only noised sums (or results computed from them), hidden cohorts lower epsilon. If
            it sees every message and its sender, a client is charged for all rounds, regardless of the sampling.
        adjacency: add-or-remove: a client's message is present or zero. replace: it is any other bounded message.
        sampling: The sampling of clients; the same object draws the cohorts.
        delta: In (0, 1).
        client_memory: True if clients remember earlier rounds. No amplification is then claimed for fixed-size
            cohorts: one client's participation affects which others take part, the others' memories record that, and
            their later messages reveal it. (Poisson cohorts are safe: participations are independent.)
        noise: The matrix of correlated noise; None for independent rounds.
    """

    trust: Trust
    adjacency: Adjacency
    sampling: Sampling
    delta: float
    client_memory: bool = True
    noise: NoiseMatrix | None = None

    @property
    def sensitivity(self) -> float:
        """Maximum change of a sum of messages due to one client, in units of a message's bound."""
        return 2.0 if self.adjacency == "replace" else 1.0

    @property
    def credits_sampling(self) -> bool:
        """True if epsilon may rely on secret cohorts; otherwise it follows from one exact mu."""
        if self.noise is not None and not self.noise.hidden:
            return False
        return self.trust.hides_cohorts and self.sampling.amplifies(client_memory=self.client_memory)

    @property
    def column(self) -> float:
        """How far a message of norm 1 moves the values that noise hides: 1, or the norm of a column of the matrix."""
        return 1.0 if self.noise is None else self.noise.column

    def turns(self, rounds: int) -> int:
        """Return the number of coins that hide a client in the first `rounds` rounds."""
        return math.ceil(rounds / self.sampling.separation)

    @property
    def pairs(self) -> tuple[Direction, ...]:
        """The orders of neighbors to compose, the worse first; empty if sampling hides no client."""
        if not self.credits_sampling:
            return ()
        q, stead = self.sampling.hiding_prob, self.sampling.stead
        gone, come, other = Half(q, 1.0 + stead, 1.0), Half(q, stead, 1.0), Half(q, 1.0 + stead, 2.0)
        return ((other, other),) if self.adjacency == "replace" else ((gone, come), (come, gone))

    def charged(self, rounds: int) -> float:
        """Return the charge of the first `rounds` rounds to the client charged most, in messages of full weight."""
        if self.noise is not None:
            return self.noise.charge(rounds, self.sampling)
        return self.sampling.charge(rounds, each_message=self.trust.shows_messages)

    def epsilon(self, noise_multiplier: float, rounds: int, horizon: int | None = None) -> float:
        """Return an epsilon for which the first `rounds` rounds are (epsilon, delta)-differentially private.

        Args:
            noise_multiplier: Noise std / l2_sensitivity, at least 0.
            rounds: Number of rounds charged, at least 0.
            horizon: Number of rounds for which the accountant's grid is built (default: `rounds`). Results for several
                `rounds` with the same horizon share one grid and never decrease with `rounds`.

        Returns:
            At least 0; `math.inf` if there were rounds and nothing is guaranteed.

        Formal guarantees:
            An upper bound under adaptive composition. With `Everyone`, and for every local plan, it is the exact
            epsilon of the Gaussian mechanism. For hidden Poisson cohorts it is within 0.1 % of the best bound that the
            composition of single rounds allows, for every delta. Fixed-size sampling under add-or-remove has a public
            n; the message of a removed client becomes zero. The bound never decreases as rounds are added. It
            never increases with noise or delta, except for up to 0.1 %, by which grids of different plans may differ.
        """
        return self.bound(noise_multiplier, rounds, horizon).epsilon

    def bound(self, noise_multiplier: float, rounds: int, horizon: int | None = None) -> Bound:
        """Return the smallest proven bound with its accountant; arguments and guarantees are those of `epsilon`."""
        return _tightest_bound(self, noise_multiplier, rounds, horizon or rounds)

    def epsilon_after(self, mu: float, noise_multiplier: float, rounds: int) -> float:
        """Return epsilon of the rounds together with earlier releases that are one Gaussian mechanism with `mu`.

        Args:
            mu: Sensitivity over standard deviation of the earlier releases, under the same adjacency; at least 0.
            noise_multiplier: See `epsilon`.
            rounds: See `epsilon`.

        Formal guarantees:
            An upper bound under adaptive composition. It is exact if no sampling is credited. Otherwise the losses of
            the sampled rounds and of the Gaussian are added on one grid, unless `mu` exceeds `MAX_EARLIER_SHIFT`: the
            rounds then count without sampling.
        """
        if rounds and noise_multiplier == 0.0:
            return math.inf
        shift = math.sqrt(self.charged(rounds)) / noise_multiplier if rounds else 0.0
        whole = gaussian_epsilon(math.hypot(shift, mu), self.delta)
        noise = min(noise_multiplier * self.sensitivity / self.column, MAX_HIDING_NOISE)
        if not self.pairs or rounds == 0 or noise * MAX_SHIFT < 1.0 or mu > MAX_EARLIER_SHIFT:
            return whole
        turns, earlier, found = self.turns(rounds), Half(1.0, 1.0, 1.0), 0.0
        for sampled in _losses(self.pairs, noise, turns, self.delta)[0]:
            cut = _negligible(self.delta, turns + 1)
            before = losses_of_one_round(earlier, earlier, 1.0 / max(mu, 1e-6), cut, sampled.interval)
            found = max(found, Composition([(sampled, turns), (before, 1)]).epsilon(self.delta))
        return min(whole, found)

    def calibrate(self, epsilon: float, rounds: int) -> float:
        """Return the smallest noise multiplier that spends at most `epsilon`, to within 0.1 % of epsilon.

        Args:
            epsilon: Target, finite and above 0.
            rounds: Number of rounds; 0 is calibrated as 1.

        Raises:
            UserError: If epsilon is above `MAX_TARGET` or too small to be resolved, or if delta is at least the
                probability that a given client ever takes part. Sending some clients' data in the clear would then
                be (0, delta)-private, so no noise would be required.

        Formal guarantees:
            `epsilon` was evaluated at the result and is at most the target. A search that ends early ends with too
            much noise, never with too little.
        """
        rounds = max(rounds, 1)
        charged = self.charged(rounds)
        if charged == 0.0:
            raise ValueError("no client sends a message that counts, so there is nothing to calibrate")
        self._check_target(epsilon, rounds)

        def within(noise_multiplier: float) -> float:
            """Return target over spent: at least 1 is private enough."""
            spent = self.epsilon(noise_multiplier, rounds)
            return epsilon / spent if spent > 0.0 else math.inf

        enough = _noise_of_one_gaussian(charged, self.delta, epsilon)
        if enough > MAX_NOISE or within(enough) < 1.0:
            remedy = "Raise privacy.epsilon; a smaller value drowns in rounding"
            raise UserError("privacy.epsilon", "a target that the accountant can resolve", epsilon, remedy)
        if not self.pairs:
            return enough
        unit = self.sensitivity / self.column
        fewer = noise_by_moments(self.pairs, unit, self.delta, epsilon, self.turns(rounds), enough)
        factor = 1.05
        enough = fewer if within(fewer) >= 1.0 else enough
        while within(enough / factor) >= 1.0:
            enough, factor = enough / factor, factor**2
        return narrow(within, enough / factor, enough)

    def event(self, noise_multiplier: float) -> "tuple[dp_accounting.DpEvent, dp_accounting.NeighboringRelation]":
        """Return one turn as dp-accounting's event and neighboring relation, in the units of the table above.

        A turn is a round, or as many rounds as `Separated` clients wait: see `turns`.

        Useful to check the accountant independently; reports of a run do not use it. If the adversary sees the
        cohorts, there is no sampling event.

        Args:
            noise_multiplier: Noise std / l2_sensitivity, above 0.
        """
        if not self.trust.hides_cohorts:
            return gaussian_event(noise_multiplier)
        return self.sampling.event(noise_multiplier / self.column, replace=self.adjacency == "replace")

    def _check_target(self, epsilon: float, rounds: int) -> None:
        hidden = self.trust.hides_cohorts and self.sampling.draws_cohorts
        chance = min(1.0, rounds * self.sampling.sampling_prob) if hidden else 1.0
        if self.delta >= chance:
            expected = f"a delta below {chance:g}, the probability that a given client ever takes part"
            raise UserError("privacy.delta", expected, self.delta, "Lower privacy.delta well below 1 / clients")
        if not 0.0 < epsilon <= MAX_TARGET:
            expected = f"a number above 0 and at most {MAX_TARGET:g}"
            remedy = "Set it, usually below 10. For a non-private run, remove the [privacy] table"
            raise UserError("privacy.epsilon", expected, epsilon, remedy)


@lru_cache(maxsize=2**15)
def _tightest_bound(releases: Releases, noise_multiplier: float, rounds: int, horizon: int) -> Bound:
    if rounds == 0:
        return Bound(0.0, GAUSSIAN, False)
    if noise_multiplier == 0.0:
        return Bound(math.inf, NO_NOISE, False)
    sampling, delta = releases.sampling, releases.delta
    sampling.check_neighbors(releases.adjacency)
    shift = math.sqrt(releases.charged(rounds)) / noise_multiplier
    if not releases.pairs or exceeds_gaussian(0.0, shift, delta):
        return Bound(gaussian_epsilon(shift, delta), GAUSSIAN, False)
    rounds, horizon = releases.turns(rounds), releases.turns(horizon)
    if rounds * sampling.hiding_prob <= delta:  # an upper bound on the probability that the client ever takes part
        return Bound(0.0, PLD, True)
    noise = min(noise_multiplier * releases.sensitivity / releases.column, MAX_HIDING_NOISE)
    sampled = math.inf
    if noise * MAX_SHIFT >= 1.0:
        sampled = sampled_epsilon(releases.pairs, noise, rounds, delta, horizon)
        if not exceeds_gaussian(sampled, shift, delta):
            return Bound(sampled, PLD, True)
    whole = Bound(gaussian_epsilon(shift, delta), GAUSSIAN, False)
    return min([whole, Bound(sampled, PLD, True)], key=lambda bound: bound.epsilon)


def sampled_epsilon(pairs: tuple[Direction, ...], noise: float, rounds: int, delta: float, horizon: int) -> float:
    """Return epsilon of `rounds` rounds, with noise in the unit of the pairs and a grid built for `horizon` rounds."""
    directions, epsilon = _losses(pairs, noise, horizon, delta)
    return epsilon if rounds == horizon else _composed_epsilon(directions, rounds, delta)


def _composed_epsilon(directions: Iterable[Losses], rounds: int, delta: float) -> float:
    """Return the largest epsilon over the directions; skip a direction if its moments prove a smaller one."""
    epsilon = 0.0
    for losses in directions:
        composed = Composition([(losses, rounds)])
        if composed.renyi_epsilon(delta)[0] > epsilon:
            epsilon = max(epsilon, composed.epsilon(delta))
    return epsilon


@lru_cache(maxsize=16)
def _losses(pairs: tuple[Direction, ...], noise: float, horizon: int, delta: float) -> tuple[tuple[Losses, ...], float]:
    """Return one round's losses in each direction on a grid built for `horizon` rounds, and the epsilon of these.

    A grid's error decreases with the square of its interval, so two grids give an estimate of the error. Intervals are
    powers of two: each grid contains all coarser ones, and a coarser grid never proves a smaller epsilon.
    """
    cut = _negligible(delta, horizon)

    def on_grid(interval: float) -> tuple[tuple[Losses, ...], float]:
        directions = tuple(losses_of_one_round(*pair, noise, cut, interval) for pair in pairs)
        return directions, _composed_epsilon(directions, horizon, delta)

    interval, finest = _first_interval(pairs[0], noise, cut, horizon, delta)
    coarse, found = on_grid(2.0 * interval)[1], on_grid(interval)
    while coarse - found[1] > 3.0 * GRID_ERROR * found[1] and interval > finest:
        interval /= 2.0
        coarse, found = found[1], on_grid(interval)
    return found


def _first_interval(pair: Direction, noise: float, cut: float, horizon: int, delta: float) -> tuple[float, float]:
    """Return an interval that adds about `GRID_ERROR` to epsilon, by moments alone, and the finest interval possible.

    `MAX_LOSSES` points limit the interval from below. Epsilon is approached from above: each grid gives a bound, and
    each bound the next, finer grid. Rounding to the grid adds a variance of about a sixth of the squared interval to
    each round's loss.
    """
    losses = losses_of_one_round(*pair, noise, cut, None)
    while True:
        epsilon, theta = Composition([(losses, horizon)]).renyi_epsilon(delta)
        wanted = math.sqrt(12.0 * GRID_ERROR * max(epsilon, 1e-9) / (horizon * (1.0 + theta)))
        most = MAX_LOSSES if epsilon < 1e3 else MAX_LOSSES // 16
        finest = 2.0 ** math.ceil(math.log2(losses.interval * len(losses.probs) / most))
        if not math.isfinite(wanted):
            return finest, finest
        interval = max(2.0 ** math.floor(math.log2(wanted)), finest)
        if losses.interval <= interval:
            return interval, finest
        losses = losses_of_one_round(*pair, noise, cut, interval)


def _negligible(delta: float, rounds: int) -> float:
    """Return the log of the mass that one round may count as an infinite loss: a millionth of delta over all rounds."""
    return math.log(delta) - math.log(1e6 * rounds)


def _noise_of_one_gaussian(releases: float, delta: float, epsilon: float) -> float:
    """Return the noise multiplier at which all rounds, as one Gaussian, cost `epsilon`; from above, to 1e-12."""
    small, large = 0.0, MAX_SHIFT
    while large - small > 1e-12 * large:
        middle = 0.5 * (small + large)
        small, large = (middle, large) if gaussian_epsilon(middle, delta) <= epsilon else (small, middle)
    return math.sqrt(releases) / small if small > 0.0 else math.inf


def noise_by_moments(
    pairs: tuple[Direction, ...], in_bounds: float, delta: float, epsilon: float, rounds: int, enough: float
) -> float:
    """Return roughly the noise multiplier at which moments on a coarse grid prove `epsilon`; at most `enough`.

    `in_bounds` is the sensitivity in the unit of the pairs.
    """
    cut = _negligible(delta, rounds)
    low, high = max(1e-3 * enough, 1.0 / MAX_SHIFT / in_bounds), enough
    while high > 1.02 * low:
        middle = math.sqrt(low * high)
        losses = losses_of_one_round(*pairs[0], min(in_bounds * middle, MAX_HIDING_NOISE), cut, None)
        proved = Composition([(losses, rounds)]).renyi_epsilon(delta)[0] <= epsilon
        low, high = (low, middle) if proved else (middle, high)
    return high


def narrow(within: Callable[[float], float], too_little: float, enough: float) -> float:
    """Narrow the bracket until 0.05 % of epsilon, or 1e-6 of the noise, is left; return its safe end.

    Interpolation (log noise against log epsilon, nearly a line) and bisection alternate.
    """
    low, high, interpolate = within(too_little), within(enough), True
    while high > 1.0005 and enough > too_little * (1.0 + 1e-6):
        share = _share_left(low, high) if interpolate else 0.5
        middle = too_little**share * enough ** (1.0 - share)
        ratio, interpolate = within(middle), not interpolate
        if ratio >= 1.0:
            enough, high = middle, ratio
        else:
            too_little, low = middle, ratio
    return enough


def _share_left(low: float, high: float) -> float:
    """Return the distance from the safe end, as a share of the bracket, at which the line reaches 1.0002."""
    down, up = (math.log(min(max(ratio, 1e-3), 1e3) / 1.0002) for ratio in (low, high))
    return min(max(up / (up - down), 0.02), 0.98)

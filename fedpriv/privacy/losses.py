"""Privacy loss distributions of sampled Gaussian sums: one round, and the composition of many.

One round releases the sum of a random cohort's messages with Gaussian noise of standard deviation sigma. A hidden coin
of probability q decides if a given client is in the cohort. With everything else fixed, let a be the sum with its
message, b the sum with its neighbor's message, and c the sum of a cohort without it. The adversary distinguishes
q N(a) + (1-q) N(c) from q N(b) + (1-q) N(c), where N(.) has standard deviation sigma in all coordinates.

Lemma. For alpha >= 1 the hockey-stick divergence of the two is at most

    q max over half-lines S = (-inf, t] of  Phi(t) - (A - alpha) Phi(t - s) - alpha Phi(t - r),    A = 1 + (alpha-1)/q,

with s >= |c - a| / sigma and r >= |b - a| / sigma. Equality holds if the three are on a line in that order.

Proof. With beta = alpha / A it equals q H_A(N(a) || (1-beta) N(c) + beta N(b)) (Balle, Barthe and Gaboardi 2018,
Theorem 2). Let S be the set that attains it, and let the half-line have the same mass under N(a). Among all sets of
that mass, a half-space loses the most when a Gaussian is shifted (Neyman and Pearson), so N(c) and N(b) put no less
mass on S than N(s) and N(r) put on the half-line. QED. Mixtures over everything else only lower it (joint convexity).

The two kinds of cohort differ in the possible c, with messages of norm at most B = 1:

| cohort, neighbors                  | a, b, c (sum of the others' messages taken as 0)      | s | r |
|---|---|---|---|
| Poisson, message removed ("gone")  | message, 0, 0                                         | 1 | 1 |
| Poisson, message added ("come")    | 0, message, 0                                         | 0 | 1 |
| Poisson, replaced                  | message, other message, 0                             | 1 | 2 |
| fixed size, message becomes zero   | message, 0, message of the client in its place        | 2 | 1 |
| fixed size, zero becomes message   | 0, message, message of the client in its place        | 1 | 1 |
| fixed size, replaced               | message, other message, message of the one in its place | 2 | 2 |

For alpha < 1, H_alpha(P || Q) = 1 - alpha + alpha H_{1/alpha}(Q || P) gives the bound from that of the reversed
pair. Together, the two halves bound every pair of neighbors at every alpha > 0. So they are the profile of a
dominating pair, and dominating pairs compose adaptively (Zhu, Dong and Wang 2022, Theorem 10; for cohorts of a fixed
size this is their Proposition 30). With cohorts of a fixed size, the halves come from different pairs of neighbors: the
worst pair of one round, composed with itself, is *not* an upper bound (Lebeda, Regehr, Kamath and Steinke 2024).
"Gone" is composed with "gone" and "come" with "come", and epsilon is the larger of the two.

Losses are put on a grid by "Connect the Dots" (Doroshenko, Ghazi, Kamath, Kumar and Manurangsi 2022). Sums of losses
are computed by the fast Fourier transform of the *tilted* distribution, p(l) exp(theta l). Theta is chosen so that the
mean is near epsilon; rounding is then relative to delta itself, no matter how small delta is. Rounding and the masses
that wrap around or are cut off are bounded and added to delta.
"""

# pyright: reportMissingTypeStubs=false

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from scipy.special import ndtr, ndtri_exp

__all__ = ["Composition", "Half", "Losses", "losses_of_one_round"]

_UNIT = 2.0**-53
_LOW_CUT = math.log(1e-20)
"""Log of the mass per round with a loss far below 0 that may be rounded up to the smallest of the grid."""
_ALIASED = math.log(1e-18)
"""Log of the tilted mass beyond each end that may wrap around in a transform. It only adds to existing masses."""
_THETAS = 2.0 ** np.arange(-8, 24, 0.5)
_SPARE = _THETAS * np.log(_THETAS) - (1.0 + _THETAS) * np.log1p(_THETAS)
_COARSER = 16
_MAX_EXPONENT = 300.0

_MAX_TILTS = 5

MAX_SUMS = 2**20
"""Maximum points of a transform, if a smaller tilt makes that possible."""
_SHARED, _MAX_SHARED = 16, 2**16
"""Rounds with transforms that are kept for other numbers of rounds, and the most points of one that is kept."""


class Half(NamedTuple):
    """The bound of the lemma for alpha >= 1, as the larger losses of one pair of mixtures.

    Args:
        prob: q, in (0, 1].
        absent: s, in units of a message's bound: 0, 1 or 2.
        replaced: r, in the same unit: 1 or 2.
    """

    prob: float
    absent: float
    replaced: float

    def tails(self, losses: np.ndarray, noise: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the masses of losses of at least each of `losses`, which are not negative.

        Args:
            losses: Natural logarithms of alpha.
            noise: Standard deviation over the bound of a message.

        Returns:
            Masses under the pair's first and second distribution, and the ends t / sigma of the half-lines.
        """
        ends = noise * self._log_root(losses, noise)
        first, absent, replaced = ndtr(ends), ndtr(ends - self.absent / noise), ndtr(ends - self.replaced / noise)
        rest = (1.0 - self.prob) * absent
        return self.prob * first + rest, self.prob * replaced + rest, ends

    def loss(self, end: float, noise: float) -> float:
        """Return the privacy loss at `end` standard deviations; decreases with `end`."""
        absent, replaced = (s / noise * (end - 0.5 * s / noise) for s in (self.absent, self.replaced))
        rest = math.log1p(-self.prob) + absent if self.prob < 1.0 else -math.inf
        present = math.log(self.prob)
        return float(np.logaddexp(present, rest) - np.logaddexp(present + replaced, rest))

    def _log_root(self, losses: np.ndarray, noise: float) -> np.ndarray:
        """Return log y with (A - alpha) e^(-s^2/2) y^s + alpha e^(-r^2/2) y^r = 1, t = log y; s and r over sigma."""
        s, r, variance = self.absent, self.replaced, noise**2
        with np.errstate(divide="ignore"):
            by_absent = losses + np.log(-np.expm1(-losses)) + math.log((1.0 - self.prob) / self.prob or 5e-324)
        by_absent -= 0.5 * s**2 / variance
        by_replaced = losses - 0.5 * r**2 / variance
        if s == r:
            return -np.logaddexp(by_absent, by_replaced) / r
        if s == 0.0:
            with np.errstate(divide="ignore", invalid="ignore"):
                left = np.log1p(-np.exp(np.minimum(by_absent, 0.0)))
            return (left - by_replaced) / r
        squared, linear = (by_absent, by_replaced) if s > r else (by_replaced, by_absent)
        root = np.logaddexp(linear, 0.5 * np.logaddexp(2.0 * linear, math.log(4.0) + squared))
        return (math.log(2.0) - root) / min(s, r)


@dataclass(frozen=True, eq=False)
class Losses:
    """Privacy losses on a grid: an upper bound on those of one round.

    Args:
        interval: Distance between the grid's losses.
        lowest: Number of the smallest loss; loss i is (`lowest` + i) `interval`.
        probs: Masses `[losses]`.
        infinite: Mass that counts as an infinite loss.
    """

    interval: float
    lowest: int
    probs: np.ndarray
    infinite: float

    @cached_property
    def values(self) -> np.ndarray:
        """The grid's losses, ascending."""
        return (self.lowest + np.arange(len(self.probs))) * self.interval

    def log_moment(self, theta: float) -> float:
        """Return the log of the mean of exp(theta loss) over finite losses; computed once for each theta."""
        if theta not in self._known_moments:
            self._known_moments[theta] = self._log_moment(theta)
        return self._known_moments[theta]

    @cached_property
    def _known_moments(self) -> dict[float, float]:
        return {}

    def _log_moment(self, theta: float) -> float:
        exponents = theta * self.values
        peak = float(exponents[-1] if theta > 0.0 else exponents[0])
        if abs(peak) < _MAX_EXPONENT:
            return math.log(float(self.probs @ np.exp(exponents)))
        exponents += self._log_probs
        peak = float(exponents.max())
        return peak + math.log(float(np.exp(exponents - peak).sum()))

    def tilted(self, theta: float) -> tuple[np.ndarray, float]:
        """Return masses proportional to probs exp(theta loss), with sum 1, and the log of their divisor."""
        moment = self.log_moment(theta)
        with np.errstate(divide="ignore"):
            return np.exp(self._log_probs + theta * self.values - moment), moment

    def variance(self, masses: np.ndarray) -> float:
        """Return the variance of the loss under other masses."""
        mean = float(masses @ self.values)
        return float(masses @ np.square(self.values - mean))

    @cached_property
    def _log_probs(self) -> np.ndarray:
        with np.errstate(divide="ignore"):
            return np.log(self.probs)

    @cached_property
    def log_moments(self) -> np.ndarray:
        """Upper bounds on `log_moment` at each of `_THETAS`, from masses on a coarser grid that keep their means."""
        place = (np.arange(len(self.probs)) + self.lowest % _COARSER) / _COARSER
        floor = place.astype(int)
        up = self.probs * (place - floor)
        masses = np.bincount(floor, self.probs - up, floor[-1] + 2) + np.bincount(floor + 1, up, floor[-1] + 2)
        lowest = (self.lowest - self.lowest % _COARSER) * self.interval
        values = lowest + np.arange(len(masses)) * _COARSER * self.interval
        kept = masses > 0.0
        exponents = np.outer(_THETAS, values[kept]) + np.log(masses[kept])
        peaks = exponents.max(axis=1)
        return peaks + np.log(np.exp(exponents - peaks[:, None]).sum(axis=1))


def losses_of_one_round(larger: Half, smaller: Half, noise: float, cut: float, interval: float | None) -> Losses:
    """Return the privacy losses of one round, from the lemma's two halves.

    Args:
        larger: Gives the losses above 0.
        smaller: The half of the neighbors in the other order; gives the losses below 0.
        noise: Standard deviation over the bound of a message, above 0.
        cut: Log of the mass that counts as an infinite loss.
        interval: Distance between losses; None for 1/2,000 of the range.
    """
    high = larger.loss(float(ndtri_exp(cut)), noise)
    nearest = min(smaller.absent, smaller.replaced) / noise
    low = smaller.loss(float(ndtri_exp(max(cut, _LOW_CUT))) + nearest, noise)
    interval = interval or max(high + low, 1e-300) / 2000.0
    above, infinite = _dots(*larger.tails(*_grid(high, interval, noise)), interval)
    lower, upper, ends = smaller.tails(*_grid(low, interval, noise))
    below, rest = _dots(upper, lower, ends, interval, falling=True)
    below[-1] += rest
    probs = np.concatenate([below[:0:-1], above])
    probs[len(below) - 1] += below[0]
    probs[len(below) - 1] += max(1.0 - infinite - float(probs.sum()), 0.0)
    return Losses(interval, 1 - len(below), probs, infinite)


def _grid(most: float, interval: float, noise: float) -> tuple[np.ndarray, float]:
    return np.arange(math.ceil(max(most, 0.0) / interval) + 2) * interval, noise


def _dots(
    own: np.ndarray, other: np.ndarray, ends: np.ndarray, interval: float, *, falling: bool = False
) -> tuple[np.ndarray, float]:
    """Return the masses on the grid's losses, and the mass beyond the last.

    The mass of an interval is split between its ends so that both distributions keep their masses. If rounding could
    break this, the end with the larger loss gets more.

    Args:
        own: Mass of the losses' distribution beyond each |loss|.
        other: The same of the other distribution.
        ends: From `Half.tails`.
        interval: Distance between losses.
        falling: True if losses are minus the grid's.
    """
    masses, others = own[:-1] - own[1:], other[:-1] - other[1:]
    losses = np.arange(len(masses)) * interval
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        shift = -(losses + interval) if falling else losses
        kept = np.exp(np.log(others) - np.log(masses) + shift)
        wrong = [4.0 * _UNIT * np.where(tail > 0.0, tail * (4.0 + np.square(ends)), 0.0) for tail in (own, other)]
        blur = (wrong[0][:-1] + wrong[0][1:]) / masses + (wrong[1][:-1] + wrong[1][1:]) / others
        share = (1.0 - kept + blur) / -math.expm1(-interval)
    larger = masses * np.where(np.isnan(share), 1.0, np.clip(share, 0.0, 1.0))
    found = np.zeros(len(own))
    to_this, to_next = (larger, masses - larger) if falling else (masses - larger, larger)
    found[:-1] += to_this
    found[1:] += to_next
    return found, float(own[-1])


@dataclass(frozen=True, eq=False)
class Composition:
    """The sum of independent privacy losses; it bounds adaptive composition.

    Args:
        parts: Losses on grids of one interval, each with the number of its rounds.
    """

    parts: Sequence[tuple[Losses, int]]

    @property
    def interval(self) -> float:
        """Distance between losses."""
        return self.parts[0][0].interval

    @cached_property
    def infinite(self) -> float:
        """Probability that any loss is infinite."""
        return -math.expm1(sum(count * math.log1p(-min(losses.infinite, 0.5)) for losses, count in self.parts))

    @cached_property
    def log_moments(self) -> np.ndarray:
        """Upper bounds on the logs of the means of exp(theta sum), at each of `_THETAS`."""
        return np.sum([count * losses.log_moments for losses, count in self.parts], axis=0)

    def renyi_epsilon(self, delta: float) -> tuple[float, float]:
        """Return an epsilon at `delta` from moments alone, and its theta (the Renyi order minus 1); needs no transform.

        Source: Canonne, Kamath and Steinke 2020, Proposition 12.
        """
        if delta <= self.infinite:
            return math.inf, 1.0
        found = (self.log_moments - math.log(delta - self.infinite) + _SPARE) / _THETAS
        best = int(np.argmin(found))
        return max(float(found[best]), 0.0), float(_THETAS[best])

    def epsilon(self, delta: float) -> float:
        """Return the smallest epsilon that the losses prove at `delta`; infinite if there is none."""
        best, theta = self.renyi_epsilon(delta)
        center = best
        for _ in range(_MAX_TILTS if 0.0 < best < math.inf else 0):
            tilted, before = self._tilted(theta, center), best
            best = min(best, tilted.epsilon(delta))
            if best > 0.95 * before or tilted.rounding(best) < 1e-4 * delta:
                break
            theta *= 2.0**0.5
        return best

    def delta(self, epsilon: float) -> float:
        """Return the smallest delta that the losses prove at `epsilon`."""
        best = np.argmin(self.log_moments - _THETAS * epsilon)
        return self._tilted(float(_THETAS[best]), epsilon).delta(epsilon)

    def _tilted(self, theta: float, center: float) -> "_Tilted":
        window = self._window(theta)
        while window.last - window.first > MAX_SUMS and theta > _THETAS[0]:
            theta *= 0.9
            window = self._window(theta)
        size = _fast_size(window.last - window.first + 1)
        transform, moved = np.ones(1), 0.0
        for losses, count in self.parts:
            moved += count * _tilt(losses, theta).moved
            transform = transform * _power(losses, theta, size, count)
        sums = np.roll(np.fft.irfft(transform, size), -(window.first % size))
        blur = 128.0 * _UNIT * (1.0 + moved) * float(sums.max())
        scale = window.moment - theta * center
        rounding = (scale + theta * center + math.log(blur / (self.interval * theta * (1.0 + theta))), theta)
        first = (window.first, self.interval)
        return _Tilted(sums, blur, first, center, scale, self.infinite + window.lost, rounding)

    def _window(self, theta: float) -> "_Window":
        """Return the range of sums that matter under a tilt; the mass beyond it is negligible (Chernoff)."""
        tilts = [_tilt(losses, theta) for losses, _ in self.parts]
        moment = sum(count * tilt.moment for tilt, (_, count) in zip(tilts, self.parts, strict=True))
        variance = sum(count * tilt.variance for tilt, (_, count) in zip(tilts, self.parts, strict=True))
        spread = max(math.sqrt(variance), self.interval)

        def end(sign: int) -> int:
            ends = [losses.lowest + (sign > 0) * (len(losses.probs) - 1) for losses, _ in self.parts]
            longest = max(abs(place) for place in ends) * self.interval
            # Powers of two, so that other numbers of rounds need the same moments.
            low, high = math.frexp(0.1 / max(spread, longest))[1] - 1, math.frexp(50.0 / spread)[1]
            beyond = _minimum(
                lambda step: (self._log_moment(theta + sign * step) - moment - _ALIASED) / step,
                math.ldexp(1.0, low),
                math.ldexp(1.0, high),
            )
            most = sum(count * place for place, (_, count) in zip(ends, self.parts, strict=True))
            return sign * min(math.ceil(beyond / self.interval), sign * most)

        first, last = end(-1), end(1)
        lost = math.exp(min(moment + _ALIASED - theta * last * self.interval, 0.0))
        return _Window(first, last, lost, moment)

    def _log_moment(self, theta: float) -> float:
        return sum(count * losses.log_moment(theta) for losses, count in self.parts)


class _Window(NamedTuple):
    """Range of a tilted sum: numbers of its smallest and largest loss, delta lost beyond, and log moment."""

    first: int
    last: int
    lost: float
    moment: float


class _Tilt(NamedTuple):
    """One round's losses under a tilt: masses, log of their divisor, variance, and mass away from loss 0, twice."""

    masses: np.ndarray
    moment: float
    variance: float
    moved: float


# Numbers of rounds that are asked one after the other mostly share tilt and size.
@lru_cache(maxsize=8)
def _tilt(losses: Losses, theta: float) -> _Tilt:
    masses, moment = losses.tilted(theta)
    return _Tilt(masses, moment, losses.variance(masses), float(np.abs(_away(losses, masses)).sum()))


@lru_cache(maxsize=8)
def _log_transform(losses: Losses, theta: float, size: int) -> np.ndarray:
    """Return the log of the transform of one round's tilted losses on a circle, complex `[size // 2 + 1]`."""
    away = _away(losses, _tilt(losses, theta).masses)
    logs = _log_one_plus(np.fft.rfft(_on_circle(away, losses.lowest, size)))
    logs.setflags(write=False)
    return logs


def _power(losses: Losses, theta: float, size: int, count: int) -> np.ndarray:
    """Return the transform of `count` rounds: a product of two that are kept for others, if small."""
    if size > _MAX_SHARED:
        return np.exp(count * _log_transform(losses, theta, size))
    rest = count % _SHARED
    return _shared_power(losses, theta, size, count - rest) * _shared_power(losses, theta, size, rest)


@lru_cache(maxsize=3 * _SHARED)
def _shared_power(losses: Losses, theta: float, size: int, count: int) -> np.ndarray:
    return np.exp(count * _log_transform(losses, theta, size))


def _away(losses: Losses, masses: np.ndarray) -> np.ndarray:
    """Return the masses without those of a loss that is 0 for certain."""
    away = masses.copy()
    away[-losses.lowest] -= 1.0
    return away


def _minimum(function: Callable[[float], float], low: float, high: float) -> float:
    """Return roughly the minimum of a function that falls and then rises; golden section on a logarithmic scale."""
    low, high, ratio = math.log(low), math.log(high), 0.5 * (math.sqrt(5.0) - 1.0)
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = function(math.exp(left)), function(math.exp(right))
    while high - low > 0.2:
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = function(math.exp(left))
        else:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = function(math.exp(right))
    return min(at_left, at_right)


def _fast_size(least: int) -> int:
    """Return a size of at least `least` with no factors but 2 and at most one 3."""
    power = 1 << max(least - 1, 1).bit_length()
    return 3 * power // 4 if 3 * power // 4 >= least else power


def _log_one_plus(numbers: np.ndarray) -> np.ndarray:
    """Return the complex log(1 + z), exact to rounding of z even if z is small."""
    real, imaginary = np.real(numbers), np.imag(numbers)
    with np.errstate(divide="ignore"):
        near = 0.5 * np.log1p(np.maximum(real * (2.0 + real) + imaginary**2, -1.0))
        far = np.log(np.hypot(1.0 + real, imaginary))
    return np.where(real > -0.5, near, far) + 1j * np.arctan2(imaginary, 1.0 + real)


def _on_circle(masses: np.ndarray, lowest: int, size: int) -> np.ndarray:
    """Return masses of the losses from number `lowest` on, wrapped onto a circle of `size` losses."""
    start = lowest % size
    turns = -(-(start + len(masses)) // size)
    padded = np.zeros(turns * size)
    padded[start : start + len(masses)] = masses
    return padded.reshape(turns, size).sum(axis=0)


class _Tilted(NamedTuple):
    """The tilted sum's masses, and how masses of the sum follow from them near one loss.

    Args:
        sums: Masses of the tilted sum by loss, ascending, with errors of rounding.
        blur: Bound on these errors.
        grid: Number of the first loss, and distance between losses.
        center: The loss at which weights equal the masses of the tilted sum.
        scale: Log of the common factor: the sum's masses are weights times exp(`scale`).
        infinite: Mass that counts at every epsilon.
        lifted: Log of the delta that rounding may add at epsilon 0, and its rate of decrease with epsilon, theta.
    """

    sums: np.ndarray
    blur: float
    grid: tuple[int, float]
    center: float
    scale: float
    infinite: float
    lifted: tuple[float, float]

    def rounding(self, epsilon: float) -> float:
        """Return the maximum part of delta at `epsilon` that is due to rounding."""
        return math.exp(min(self.lifted[0] - self.lifted[1] * epsilon, 0.0))

    def epsilon(self, delta: float) -> float:
        """Return the smallest epsilon at `delta`, never below the first loss."""
        if delta <= self.infinite:
            return math.inf
        target = math.exp(min(math.log(delta - self.infinite) - self.scale, _MAX_EXPONENT))
        first, interval = self.grid
        near = min(max(math.floor(0.75 * self.center / interval) - first, 0), len(self.sums) - 1)
        found = self._epsilon_from(near, target) if near > 0 else None
        return self._epsilon_from(0, target) or 0.0 if found is None else found

    def _epsilon_from(self, start: int, target: float) -> float | None:
        """Return the smallest epsilon among the losses from number `start` on; None if an earlier one may suffice."""
        values, factors, upper, lower = self._masses(start)
        reached = upper[1:] - factors * lower[1:] <= target
        first = int(np.argmax(reached))
        if not reached[first]:
            return math.inf
        if first == 0:
            return None if start > 0 else max(float(values[0]), 0.0)
        found = self.center + math.log(max(upper[first] - target, 5e-324) / lower[first])
        return max(min(found, float(values[first])), 0.0)

    def delta(self, epsilon: float) -> float:
        """Return the delta at `epsilon`."""
        values, _, upper, lower = self._masses(0)
        first = int(np.searchsorted(values, epsilon, side="right"))
        found = upper[first] - math.exp(epsilon - self.center) * lower[first]
        return min(self.infinite + math.exp(self.scale) * max(found, 0.0), 1.0)

    def _masses(self, start: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return losses from number `start` on, their ratios of masses over that at the center, and sums of masses.

        The sums are of the masses from each loss on under both distributions, followed by 0.
        """
        first, interval = self.grid
        values = (first + np.arange(start, len(self.sums))) * interval
        factors = np.exp(np.minimum(values - self.center, _MAX_EXPONENT))
        weights = np.maximum(self.sums[start:], 0.0)
        weights += self.blur
        weights *= np.exp(np.minimum(-self.lifted[1] * (values - self.center), _MAX_EXPONENT))
        other = weights / np.maximum(factors, math.exp(-_MAX_EXPONENT))
        return values, factors, _from_each_on(weights), _from_each_on(other)


def _from_each_on(masses: np.ndarray) -> np.ndarray:
    """Return the sum of the masses from each on, and 0."""
    sums = np.zeros(len(masses) + 1)
    np.cumsum(masses[::-1], out=sums[-2::-1])
    return sums

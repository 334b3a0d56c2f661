"""Gaussian noise that is rounded to a grid, with exactly the law that the accountant assumes.

A float that is added to a float tells from its last bits what it was added to. So a release is an integer number of
grid steps: the Gaussian mechanism followed by rounding, which is post-processing. The rounding is decided as if all
numbers were real. Each coordinate has one uniform number, of which 64 bits are drawn; they settle the rounded value
almost always, and where they do not, more bits of the same number are drawn until they do. No approximation of the
normal distribution is left in the result.
"""

import math
from fractions import Fraction
from functools import cache
from itertools import count
from statistics import NormalDist

import numpy as np

from fedpriv.errors import UserError
from fedpriv.streams import Source

__all__ = ["MAX_STDDEV", "MAX_STEPS", "MIN_STDDEV", "release_grid", "rounded_noise"]

MIN_STDDEV, MAX_STDDEV = 2.0**-500, 2.0**500
"""Standard deviations between which grid, quotients and products are normal float64 numbers."""

MAX_STEPS = 2.0**62
"""Values are clipped to so many grid steps on either side, so that value and noise together fit into an int64."""

_MAX_RATIO = 2.0**20  # Of deviation and grid: beyond, float64 decides too few numbers.
_BLOCK = 2**14

# The table of the quantile function: 2**_SPLIT polynomials in every octave of the 63 bits of a tail probability.
_OCTAVES, _SPLIT, _DEGREE = range(32, 63), 4, 5
_FRACTION = 52 - _SPLIT  # Bits of a float64's fraction that say where in its polynomial's interval a number is.
_WIDTH = 8  # Doubles in a row, of which 6 are coefficients: a line of the processor's cache.
# Bound on the error of a normal number made of a uniform number's first 64 bits, all causes together.
_ERROR = 2.0**-34


def release_grid(stddev: float) -> float:
    """Return the grid step of releases with noise of this deviation: 2^floor(log2(stddev / 4)).

    Rounding adds at most (1/12) (G / stddev)^2 <= 0.53 % to the variance.

    Raises:
        UserError: If the deviation is not a number from `MIN_STDDEV` to `MAX_STDDEV`.
    """
    _check_stddev(stddev)
    return math.ldexp(1.0, math.frexp(stddev)[1] - 3)


def rounded_noise(values: np.ndarray, stddev: float, source: Source, grid: float | None = None) -> np.ndarray:
    """Return values plus Gaussian noise, rounded to whole grid steps; int64 `[size]`.

    The release is the result times the grid. With value = G q + r, q an integer and |r| <= G/2, the result is q + n
    with n = rint((r + stddev z) / G), z standard normal.

    Args:
        values: What is protected, float64 `[size]`.
        stddev: Standard deviation of the noise on each coordinate.
        source: Where the randomness comes from; it gives `size` words, and further ones of undecided numbers.
        grid: The grid step G, a power of two; by default `release_grid(stddev)`.

    Raises:
        UserError: If the deviation or the grid is out of range.

    Formal guarantees:
        If the source's bits are uniform and independent, the result has exactly the law of the rounded sum of the
        value and a normal number of deviation `stddev`, both taken as real numbers, independently by coordinate.
        Every input has a result: values that are not finite count as zero, and values beyond `MAX_STEPS` grid steps
        are clipped to that many, which moves no two values apart. Never fails or wraps because of a value.
        Bits and result do not depend on how the sampler is implemented, nor on the size of the blocks it works in.
    """
    _check_stddev(stddev)
    step = release_grid(stddev) if grid is None else _checked_grid(grid, stddev)
    values = np.ascontiguousarray(values, dtype=np.float64)
    rounded = np.empty(values.shape, dtype=np.int64)
    for start in range(0, len(values), _BLOCK):
        block, position = values[start : start + _BLOCK], source.position
        words = source.words(len(block))
        for index in _round_fast(words, block, stddev, step, rounded[start : start + _BLOCK]):
            number = _Tail(source, position + index, int(words[index]))
            rounded[start + index] = _round_exactly(float(block[index]), stddev, step, number)
    return rounded


def _check_stddev(stddev: float) -> None:
    if not MIN_STDDEV <= stddev <= MAX_STDDEV:
        expected = f"a number from {MIN_STDDEV:.3g} to {MAX_STDDEV:.3g}"
        raise UserError("noise_stddev", expected, repr(stddev), "Set another bound or noise multiplier")


def _checked_grid(grid: float, stddev: float) -> float:
    if not 2.0**-503 <= grid <= 2.0**498 or math.frexp(grid)[0] != 0.5:
        raise UserError("release_grid", "a power of two from 2^-503 to 2^498", repr(grid), "Take `release_grid`")
    if stddev > _MAX_RATIO * grid:
        expected = f"a deviation of at most {_MAX_RATIO:.0f} grid steps"
        raise UserError("noise_stddev", expected, f"{stddev / grid}", "Take a coarser grid")
    return grid


def _round_fast(words: np.ndarray, values: np.ndarray, stddev: float, grid: float, rounded: np.ndarray) -> list[int]:
    """Round by float64 into `rounded`; return the positions at which that does not settle the result.

    The top bit of a word is the sign of the noise, the others begin the probability of the tail beyond it.
    """
    signs = words.view(np.int64) >> 63
    tails = words.view(np.int64) ^ signs
    bits = tails.astype(np.float64).view(np.int64)
    rows = np.clip((bits >> _FRACTION) - ((1023 + _OCTAVES.start) << _SPLIT), 0, len(_quantiles()) - 1)
    offsets = ((bits & ((1 << _FRACTION) - 1)) | (1023 << 52)).view(np.float64) - (1.0 + 2.0 ** -(_SPLIT + 1))
    coefficients = _quantiles()[rows]
    noise = coefficients[:, _DEGREE]
    for power in reversed(range(_DEGREE)):
        noise = noise * offsets + coefficients[:, power]
    ratio = stddev / grid
    steps = np.where(np.isfinite(values), values, 0.0) * (1.0 / grid)
    steps = np.clip(steps, -MAX_STEPS, MAX_STEPS)
    whole = np.rint(steps)
    sums = (steps - whole) - (ratio * noise) * (1.0 + 2.0 * signs)
    shift = np.rint(sums)
    np.add(whole.astype(np.int64), shift.astype(np.int64), out=rounded)
    undecided = (0.5 - np.abs(sums - shift) <= _margin(ratio)) | (tails < 1 << _OCTAVES.start)
    return np.flatnonzero(undecided).tolist()


def _margin(ratio: float) -> float:
    """Return the distance from a half within which a sum is undecided: the error of noise, and of float64 itself."""
    return _ERROR * ratio + 2.0**-45


@cache
def _quantiles() -> np.ndarray:
    """Return polynomials for |z| given the tail probability p beyond it, times 2^63; float64 `[rows, 8]`.

    Each row interpolates at Chebyshev points. By the error formula of interpolation, with |z^(6)| at the interval's
    lower end, where it is largest, a row is off by less than 2^-37; 2^-36 is owed to the bits not yet drawn and to
    the rounding of the drawn ones. The tests prove both. The last row is for p = 1/2, where z = 0.
    """
    degree, half = _DEGREE, 2.0 ** -(_SPLIT + 1)
    nodes = np.cos(np.pi * (np.arange(degree + 1) + 0.5) / (degree + 1))
    to_powers = np.linalg.inv(np.vander(nodes, increasing=True)) / half ** np.arange(degree + 1)[:, None]
    starts = 1.0 + np.arange(2**_SPLIT) * 2.0**-_SPLIT
    points = (2.0 ** (np.array(_OCTAVES) - 64)[:, None, None] * (starts[:, None] + half + half * nodes)).ravel()
    heights = [-NormalDist().inv_cdf(point) for point in points.tolist()]
    table = np.zeros((len(points) // (degree + 1) + 1, _WIDTH))
    table[:-1, : degree + 1] = np.reshape(heights, (-1, degree + 1)) @ to_powers.T
    table.setflags(write=False)
    return table


class _Tail:
    """A uniform number in (0, 1/2), lazily extended, with a sign: the tail beyond a normal number on its side of zero.

    Args:
        source: Gives further words.
        position: The number's position in the source.
        word: Its first 64 bits.
    """

    def __init__(self, source: Source, position: int, word: int) -> None:
        self._source, self._position, self._more = source, position, count(1)
        self.positive = bool(word >> 63)
        self._digits, self._bits = (word ^ (2**64 - 1) if self.positive else word), 64

    @property
    def estimate(self) -> float:
        """About the normal number."""
        size = -NormalDist().inv_cdf(math.ldexp(self._digits + 0.5, -self._bits))
        return size if self.positive else -size

    def is_below(self, height: Fraction) -> bool:
        """Return whether the normal number is below `height`; draws bits until that is certain."""
        if (height > 0) != self.positive:
            return not self.positive
        return self._exceeds_tail(abs(height)) == self.positive

    def _exceeds_tail(self, height: Fraction) -> bool:
        while True:
            tail, error = _upper_tail(height, self._bits + 64), 2**32
            if self._digits << 64 >= tail + error:
                return True
            if (self._digits + 1) << 64 <= tail - error:
                return False
            self._digits = self._digits << 64 | self._source.more(self._position, next(self._more))
            self._bits += 64


def _round_exactly(value: float, stddev: float, grid: float, number: _Tail) -> int:
    """Return the integer nearest to (value + stddev z) / grid in real arithmetic."""
    steps = Fraction(value) / Fraction(grid) if math.isfinite(value) else Fraction(0)
    steps = min(max(steps, Fraction(-MAX_STEPS)), Fraction(MAX_STEPS))
    ratio, half = Fraction(stddev) / Fraction(grid), Fraction(1, 2)
    nearest = round(steps + ratio * Fraction(number.estimate))
    while not number.is_below((nearest + half - steps) / ratio):
        nearest += 1
    while number.is_below((nearest - half - steps) / ratio):
        nearest -= 1
    return nearest


def _upper_tail(height: Fraction, bits: int) -> int:
    """Return 2^bits times the probability that a standard normal number exceeds `height` >= 0; off by less than 2^32.

    With x the height, the tail is 1/2 - S(x) / (sqrt(2 pi) E(x^2/2)), S(x) = x + x^3/3 + x^5/(3 5) + ... and E the
    exponential series. Both have positive terms, 1 <= E and S <= 1.26 E. Rounding down each term of K costs each sum
    less than (K + 1)^2 E units in all, and rounding x down costs less than 2 (1 + x) E; K < 2^15 while bits < 4,000.
    """
    one = 1 << bits
    if height * height > 2 * bits:  # Then the tail is below exp(-bits).
        return 0
    x = (height.numerator << bits) // height.denominator
    square = x * x >> bits
    exponential, odd = _series(one, square, bits, 2, 0), _series(x, square, bits, 2, 1)
    return (one >> 1) - (odd << 2 * bits) // exponential // _root_of_two_pi(bits)


def _series(first: int, factor: int, bits: int, step: int, start: int) -> int:
    """Return the sum of terms of which each is the one before times factor / (start + step k), k = 1, 2, ..."""
    total, term = first, first
    for k in count(1):
        term = (term * factor >> bits) // (start + step * k)
        if term == 0:
            return total
        total += term
    raise AssertionError  # pragma: no cover


@cache
def _root_of_two_pi(bits: int) -> int:
    """Return 2^bits sqrt(2 pi), by Machin's formula."""
    guarded = bits + 32

    def arctan_of_inverse(n: int) -> int:
        power, total = (1 << guarded) // n, 0
        for k in count():
            if power == 0:
                break
            total += (-1) ** k * (power // (2 * k + 1))
            power //= n * n
        return total

    pi = 4 * (4 * arctan_of_inverse(5) - arctan_of_inverse(239))
    return math.isqrt(2 * pi << guarded) >> 32

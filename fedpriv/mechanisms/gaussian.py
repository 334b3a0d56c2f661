"""Gaussian noise rounded to a grid, with exactly the distribution that the accountant assumes.

The last bits of a sum of two floats reveal something about the summands. So a release is an integer number of grid
steps: the Gaussian mechanism followed by rounding, which is post-processing. Rounding is decided as in real arithmetic.
Each coordinate has one uniform number, of which 64 bits are drawn. They almost always determine the rounded value;
otherwise more bits of the same number are drawn until they do. The result contains no approximation of the normal
distribution.
"""

import ctypes
import math
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from pathlib import Path
from statistics import NormalDist

import numpy as np

from fedpriv.errors import UserError
from fedpriv.mechanisms.tails import Tail
from fedpriv.native import native_library
from fedpriv.streams import Words

__all__ = ["MAX_STDDEV", "MAX_STEPS", "MIN_STDDEV", "release_grid", "rounded_noise"]

MIN_STDDEV, MAX_STDDEV = 2.0**-500, 2.0**500
"""Range of standard deviations in which grid, quotients and products are normal float64 numbers."""

MAX_STEPS = 2.0**62
"""Values are clipped to this many grid steps in absolute value, so that the sum of value and noise fits an int64."""

_SOURCE = Path(__file__).with_name("gaussian.c")
_MAX_RATIO = 2.0**20  # Deviation over grid; above it, float64 decides too few numbers.
_BLOCK = 2**13  # Larger arrays would be returned to the operating system after every step.

# The table of the quantile function: 2**_SPLIT polynomials in every octave of the 63 bits of a tail probability.
_OCTAVES, _SPLIT, _DEGREE = range(32, 63), 4, 5
_FRACTION = 52 - _SPLIT  # Bits of a float64's fraction that give its position in the interval of its polynomial.
_MIDDLE = 1.0 + 2.0 ** -(_SPLIT + 1)  # The middle fraction of an interval, without the offset of its number.
# Bound on the total error of a normal number computed from a uniform number's first 64 bits.
_ERROR = 2.0**-34


def release_grid(stddev: float) -> float:
    """Return the grid step of releases with noise of this standard deviation: 2^floor(log2(stddev / 4)).

    Rounding adds at most (1/12) (G / stddev)^2 <= 0.53 % to the variance.

    Raises:
        UserError: If the deviation is not a number from `MIN_STDDEV` to `MAX_STDDEV`.
    """
    _check_stddev(stddev)
    return math.ldexp(1.0, math.frexp(stddev)[1] - 3)


def rounded_noise(values: np.ndarray, stddev: float, source: Words, grid: float | None = None) -> np.ndarray:
    """Return values plus Gaussian noise, rounded to whole grid steps; int64 `[size]`.

    The release is the result times the grid. With value = G q + r, q an integer and |r| <= G/2, the result is q + n
    with n = rint((r + stddev z) / G), z standard normal.

    Args:
        values: The protected values, float64 `[size]`.
        stddev: Standard deviation of the noise on each coordinate.
        source: Source of randomness; gives `size` words, and further words for undecided numbers.
        grid: The grid step G, a power of two; by default `release_grid(stddev)`.

    Raises:
        UserError: If the deviation or the grid is out of range.

    Formal guarantees:
        If the source's bits are uniform and independent, the result has exactly the distribution of the rounded sum of
        the value and a normal number of standard deviation `stddev`, both as real numbers, independently for each
        coordinate. Every input has a result: values that are not finite count as zero, and values beyond `MAX_STEPS`
        grid steps are clipped to that many, which increases no distance between values. No value causes an error or
        an overflow. Bits and result depend neither on the implementation of the sampler nor on its block size.
    """
    stddev = float(stddev)
    step = release_grid(stddev) if grid is None else _checked_grid(float(grid), stddev)
    values = np.ascontiguousarray(values, dtype=np.float64)
    rounded = np.empty(values.shape, dtype=np.int64)
    for start in range(0, len(values), _BLOCK):
        block, position = values[start : start + _BLOCK], source.position
        words = source.words(len(block))
        for index in _rounding()(words, block, stddev, step, rounded[start : start + _BLOCK]):
            number = Tail(source, position + index, int(words[index]))
            rounded[start + index] = _round_exactly(float(block[index]), stddev, step, number)
    return rounded


def _check_stddev(stddev: float) -> None:
    if not MIN_STDDEV <= stddev <= MAX_STDDEV:
        expected = f"a number from {MIN_STDDEV:.3g} to {MAX_STDDEV:.3g}"
        raise UserError("noise_stddev", expected, repr(stddev), "Change the bound or the noise multiplier")


def _checked_grid(grid: float, stddev: float) -> float:
    _check_stddev(stddev)
    if not 2.0**-503 <= grid <= 2.0**498 or math.frexp(grid)[0] != 0.5:
        raise UserError("release_grid", "a power of two from 2^-503 to 2^498", repr(grid), "Use `release_grid`")
    if stddev > _MAX_RATIO * grid:
        expected = f"a deviation of at most {_MAX_RATIO:.0f} grid steps"
        raise UserError("noise_stddev", expected, f"{stddev / grid}", "Use a coarser grid")
    return grid


_Rounding = Callable[[np.ndarray, np.ndarray, float, float, np.ndarray], list[int]]
"""Rounds values, given words, deviation and grid, into the last array; returns the undecided positions."""


@cache
def _rounding() -> _Rounding:
    """Return the fast rounding in C, or in numpy if there is no compiler or C and numpy disagree on this machine."""
    library = native_library(_SOURCE, _declare)
    if library is None:
        return _round_in_numpy
    in_c = _RoundInC(library)
    words, values = np.random.Philox(0).random_raw(_BLOCK), np.linspace(-9.0, 9.0, _BLOCK)
    found, expected = np.zeros((2, _BLOCK), dtype=np.int64)
    # With this many grid steps per deviation, an error of a millionth is visible.
    same = in_c(words, values, _MAX_RATIO, 1.0, found) == _round_in_numpy(words, values, _MAX_RATIO, 1.0, expected)
    return in_c if same and np.array_equal(found, expected) else _round_in_numpy


def _round_in_numpy(
    words: np.ndarray, values: np.ndarray, stddev: float, grid: float, rounded: np.ndarray
) -> list[int]:
    """See `_Rounding`. A word's top bit is the noise's sign; the others are the first bits of its tail probability."""
    signs, table = words.view(np.int64) >> 63, _quantiles()
    tails = words.view(np.int64) ^ signs
    bits = tails.astype(np.float64).view(np.int64)
    rows = np.maximum((bits >> _FRACTION) - ((1023 + _OCTAVES.start) << _SPLIT), 0)
    offsets = ((bits & ((1 << _FRACTION) - 1)) | (1023 << 52)).view(np.float64) - _MIDDLE
    noise = table[_DEGREE].take(rows)
    for power in reversed(range(_DEGREE)):
        noise *= offsets
        noise += table[power].take(rows)
    noise *= (1.0 + 2.0 * signs) * -(stddev / grid)
    with np.errstate(over="ignore"):
        steps = np.where(np.isfinite(values), values, 0.0) * (1.0 / grid)
    np.clip(steps, -MAX_STEPS, MAX_STEPS, out=steps)
    whole = np.rint(steps)
    noise += steps - whole
    shift = np.rint(noise)
    np.add(whole.astype(np.int64), shift.astype(np.int64), out=rounded)
    undecided = (np.abs(noise - shift) >= _edge(stddev / grid)) | (tails < 1 << _OCTAVES.start)
    return np.flatnonzero(undecided).tolist()


class _Release(ctypes.Structure):
    """`struct release` of `gaussian.c`."""

    _fields_ = (
        ("table", ctypes.c_void_p),
        ("first", ctypes.c_uint64),
        ("split", ctypes.c_uint64),
        ("middle", ctypes.c_double),
        ("steps", ctypes.c_double),
        ("inverse", ctypes.c_double),
        ("ratio", ctypes.c_double),
        ("edge", ctypes.c_double),
    )


class _RoundInC:
    """The function of `gaussian.c`. See `_Rounding`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._round = library.round_noise
        self._table = np.zeros((_quantiles().shape[1], 8))
        self._table[:, : _DEGREE + 1] = _quantiles().T

    def __call__(
        self, words: np.ndarray, values: np.ndarray, stddev: float, grid: float, rounded: np.ndarray
    ) -> list[int]:
        """See `_Rounding`."""
        ratio, table = stddev / grid, self._table.ctypes.data
        release = _Release(table, _OCTAVES.start, _SPLIT, _MIDDLE, MAX_STEPS, 1.0 / grid, ratio, _edge(ratio))
        undecided = np.empty(len(words), dtype=np.int64)
        arrays = words.ctypes.data, values.ctypes.data, len(words), rounded.ctypes.data, undecided.ctypes.data
        return undecided[: self._round(ctypes.byref(release), *arrays)].tolist()


def _declare(library: ctypes.CDLL) -> None:
    address, size = ctypes.c_void_p, ctypes.c_size_t
    library.round_noise.argtypes = [address, address, address, size, address, address]
    library.round_noise.restype = size


def _edge(ratio: float) -> float:
    """Return the largest decidable distance of a sum from an integer: a half minus the errors of noise and float64."""
    return 0.5 - (_ERROR * ratio + 2.0**-45)


@cache
def _quantiles() -> np.ndarray:
    """Return polynomials for |z| given the probability p of the tail beyond it; float64 `[6, intervals]`.

    Each column interpolates at Chebyshev points, in the offset from the middle of its interval over 2^exponent. A drawn
    number gets the p in the middle of its possible values: half a unit in its last place is added. The tests prove that
    no error exceeds `_ERROR`. The last column is for p = 1/2 and z = 0.
    """
    degree, half = _DEGREE, 2.0 ** -(_SPLIT + 1)
    nodes = np.cos(np.pi * (np.arange(degree + 1) + 0.5) / (degree + 1))
    to_powers = np.linalg.inv(np.vander(nodes, increasing=True)) / half ** np.arange(degree + 1)[:, None]
    fractions = _MIDDLE + np.arange(2**_SPLIT)[:, None] * 2.0 * half + half * nodes
    tails = ((2.0 ** np.array(_OCTAVES)[:, None, None] * fractions + 0.5) * 2.0**-64).ravel()
    heights = np.reshape([-NormalDist().inv_cdf(tail) for tail in tails.tolist()], (-1, degree + 1))
    table = np.zeros((degree + 1, len(heights) + 1))
    table[:, :-1] = to_powers @ heights.T
    table.setflags(write=False)
    return table


def _round_exactly(value: float, stddev: float, grid: float, number: Tail) -> int:
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

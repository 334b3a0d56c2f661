"""Gaussian noise rounded to a grid, with exactly the distribution that the accountant assumes.

The last bits of a sum of two floats reveal something about the summands. So a release is an integer number of grid
steps: the Gaussian mechanism followed by rounding, which is post-processing. Rounding is decided as in real arithmetic.
Each coordinate has one uniform number, of which 64 bits are drawn. They almost always determine the rounded value;
otherwise more bits of the same number are drawn until they do. The result contains no approximation of the normal
distribution.
"""

import ctypes
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple, cast

import numpy as np

from fedpriv.errors import UserError
from fedpriv.mechanisms.tails import Tail
from fedpriv.native import address_of, native_library
from fedpriv.philox import PhiloxInC, philox_in_c
from fedpriv.streams import PhiloxStart, SeededSource, Words

__all__ = ["MAX_STDDEV", "MAX_STEPS", "MIN_STDDEV", "noised", "noised_rows", "release_grid", "rounded_noise"]

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

# The table of the quantile function in float32, for C: polynomials in equal intervals of the first 31 bits of a tail
# probability. The first rows are left out: there the quantile function is too steep.
_COARSE_WIDTH, _COARSE_SKIPPED, _COARSE_DEGREE = 21, 4, 3
_COARSE_ERROR = 2.0**-16  # Bound on the total error of a normal number computed in float32 from 32 bits.
_MAX_COARSE_RATIO = 2.0**10  # Above it, float32 decides too few numbers.
_MIN_COARSE_GRID, _MAX_COARSE_GRID = 2.0**-60, 2.0**60  # In between, steps and releases are normal float32 numbers.


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


def noised(values: np.ndarray, stddev: float, source: Words, grid: float | None = None) -> np.ndarray:
    """Return the release, in the values' number format: `rounded_noise` times the grid; see `noised_rows`.

    Args:
        values: The protected values, float32 or float64 `[size]`.
        stddev: See `rounded_noise`.
        source: See `rounded_noise`.
        grid: See `rounded_noise`.
    """
    return noised_rows(values[None], stddev, [source], grid)[0]


def noised_rows(
    values: np.ndarray,
    stddev: float,
    sources: Sequence[Words],
    grid: float | None = None,
    level: int = int(MAX_STEPS),
) -> np.ndarray:
    """Return the releases of several messages, in the values' number format, `[rows, size]`.

    A release is `rounded_noise` times the grid, of at most `level` steps. The result is the same as row by row; the
    words of seeded sources are made where they are used, if there is a C compiler.

    Args:
        values: The protected values, float32 or float64 `[rows, size]`.
        stddev: See `rounded_noise`.
        sources: Source of randomness of each row.
        grid: See `rounded_noise`.
        level: Largest absolute value of a release in grid steps; larger ones are clamped, after the noise.

    Raises:
        UserError: If the deviation or the grid is out of range.

    Formal guarantees:
        See `rounded_noise`. The product is rounded to the number format, which is post-processing.
    """
    stddev = float(stddev)
    step = release_grid(stddev) if grid is None else _checked_grid(float(grid), stddev)
    values, terms = np.ascontiguousarray(values), _Terms(stddev, step, min(level, int(MAX_STEPS)))
    released, rounding = np.empty_like(values), _rounding()
    in_c = rounding if isinstance(rounding, _RoundInC) and rounding.suits(values, terms) else None
    starts = [_start(source, values.shape[1]) if in_c else None for source in sources]
    if in_c is not None and None not in starts:
        in_c.release_rows(values, terms, sources, cast(list[PhiloxStart], starts), released)
        return released
    for row, source, start, out in zip(values, sources, starts, released, strict=True):
        if in_c is not None and start is not None:
            in_c.release_rows(row[None], terms, [source], [start], out[None])
        else:
            _release_row(row, terms, source, in_c.release if in_c else _release, out)
    return released


def _start(source: Words, size: int) -> PhiloxStart | None:
    """Skip a source's next words and return where they begin, if C can make them."""
    return source.skipped(size) if isinstance(source, SeededSource) else None


def _release_row(
    values: np.ndarray, terms: "_Terms", source: Words, release: "_Releasing", released: np.ndarray
) -> None:
    for start in range(0, len(values), _BLOCK):
        block, position = values[start : start + _BLOCK], source.position
        words = source.words(len(block))
        for index in release(words, block, terms, released[start : start + _BLOCK]):
            released[start + index] = terms.exact(
                float(block[index]), Tail(source, position + index, int(words[index]))
            )


class _Terms(NamedTuple):
    """Deviation and grid of a release, and its largest number of steps."""

    stddev: float
    grid: float
    level: int

    def number(self, steps: np.ndarray) -> np.ndarray:
        """Return the released numbers, float64, of numbers of steps, int64."""
        return np.clip(steps, -self.level, self.level).astype(np.float64) * self.grid

    def exact(self, value: float, number: Tail) -> float:
        """Return the release of a value, decided with as many bits as it takes."""
        rounded = _round_exactly(float(value), self.stddev, self.grid, number)
        return float(self.number(np.array([rounded]))[0])


_Releasing = Callable[[np.ndarray, np.ndarray, _Terms, np.ndarray], list[int]]
"""Writes the releases of values, given words and terms, into the last array; returns the undecided positions."""


def _release(words: np.ndarray, values: np.ndarray, terms: _Terms, released: np.ndarray) -> list[int]:
    """Write the releases of one block that float64 can decide; return the positions of the others."""
    rounded = np.empty(len(values), dtype=np.int64)
    undecided = _rounding()(words, values.astype(np.float64), terms.stddev, terms.grid, rounded)
    with np.errstate(over="ignore"):
        released[:] = terms.number(rounded)
    return undecided


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
    return in_c if _agrees(in_c) else _round_in_numpy


def _agrees(in_c: "_RoundInC") -> bool:
    """Return True if C and numpy give equal results, where many grid steps to a deviation make small errors visible."""
    words, values = np.random.Philox(0).random_raw(_BLOCK), np.linspace(-9.0, 9.0, _BLOCK).astype(np.float32)
    for ratio in (_MAX_RATIO, _MAX_COARSE_RATIO):
        found, expected = np.zeros((2, _BLOCK), dtype=np.int64)
        exact, terms = values.astype(np.float64), _Terms(0.25 * ratio, 0.25, 2000)
        undecided = _round_in_numpy(words, exact, terms.stddev, terms.grid, expected)
        if in_c(words, exact, terms.stddev, terms.grid, found) != undecided or not np.array_equal(found, expected):
            return False
        for given in (exact, values):
            released = np.zeros_like(given)
            if not in_c.suits(given, terms):
                continue
            if in_c.release(words, given, terms, released) != undecided:
                return False
            released[undecided] = terms.number(expected)[undecided]
            if not np.array_equal(released, terms.number(expected)):
                return False
    return philox_in_c() is None or _rows_agree(in_c)


def _rows_agree(in_c: "_RoundInC") -> bool:
    """Return True if rows in one call equal each row alone, with its own words; they are longer than a block of C."""
    starts, terms = [PhiloxStart((1, 2), 0), PhiloxStart((3, 4), 5)], _Terms(5.3 * 0.25, 0.25, 2000)
    for kind in (np.float32, np.float64):
        values = np.linspace(-9.0, 9.0, 2 * 300).reshape(2, -1).astype(kind)
        together, alone = np.zeros((2, 2, 300), dtype=kind)
        undecided = in_c.decide_rows(values, terms, starts, together)
        expected: list[int] = []
        for row, start in enumerate(starts):
            left = in_c.release(_philox().words(start.key, start.position, 300), values[row], terms, alone[row])
            expected += [row * 300 + place for place in left]
        if undecided != expected or not np.array_equal(together, alone):
            return False
    return True


def _philox() -> PhiloxInC:
    """Return the C form of the words' generator, which must be in use."""
    found = philox_in_c()
    if found is None:
        raise ValueError("words are made in C, which is not in use")
    return found


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


class _ReleaseInC(ctypes.Structure):
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
        ("coarse", ctypes.c_void_p),
        ("width", ctypes.c_uint64),
        ("skipped", ctypes.c_uint64),
        ("coarse_edge", ctypes.c_double),
        ("level", ctypes.c_double),
        ("grid", ctypes.c_double),
    )


class _RoundInC:
    """The functions of `gaussian.c`. See `_Rounding`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._round, self._rows = library.round_noise, library.release_rows
        self._floats, self._doubles = library.release_floats, library.release_doubles
        self._table = np.zeros((_quantiles().shape[1], 8))
        self._table[:, : _DEGREE + 1] = _quantiles().T
        self._made: tuple[_Terms, _ReleaseInC] | None = None

    def __call__(
        self, words: np.ndarray, values: np.ndarray, stddev: float, grid: float, rounded: np.ndarray
    ) -> list[int]:
        """See `_Rounding`."""
        return self._run(self._round, words, values, _Terms(stddev, grid, int(MAX_STEPS)), rounded)

    def suits(self, values: np.ndarray, terms: _Terms) -> bool:
        """Return True if `release` takes such values: float64, or float32 on a grid that suits its range."""
        in_range = _MIN_COARSE_GRID <= terms.grid <= _MAX_COARSE_GRID and terms.stddev <= _MAX_COARSE_RATIO * terms.grid
        return values.dtype == np.float64 or (values.dtype == np.float32 and in_range)

    def release(self, words: np.ndarray, values: np.ndarray, terms: _Terms, released: np.ndarray) -> list[int]:
        """Do the same as `_release`; the release has the values' number format."""
        return self._run(self._floats if values.dtype == np.float32 else self._doubles, words, values, terms, released)

    def release_rows(
        self,
        values: np.ndarray,
        terms: _Terms,
        sources: Sequence[Words],
        starts: Sequence[PhiloxStart],
        released: np.ndarray,
    ) -> None:
        """Write the releases of rows with words of these keys and positions; each source gives further bits."""
        size = values.shape[1]
        for index in self.decide_rows(values, terms, starts, released):
            row, place = divmod(index, size)
            position = starts[row].position + place
            word = int(_philox().words(starts[row].key, position, 1)[0])
            released[row, place] = terms.exact(float(values[row, place]), Tail(sources[row], position, word))

    def decide_rows(
        self, values: np.ndarray, terms: _Terms, starts: Sequence[PhiloxStart], released: np.ndarray
    ) -> list[int]:
        """Write the releases that floating point can decide; return the flat positions of the others."""
        (rows, size), doubles = values.shape, int(values.dtype == np.float64)
        streams = np.array([(*start.key, start.position) for start in starts], dtype=np.uint64)
        undecided = np.empty(rows * size, dtype=np.int64)
        from_, into, found = address_of(values), address_of(released), address_of(undecided)
        made = self._terms(terms), _philox().address, address_of(streams), rows, size, doubles
        return undecided[: self._rows(*made, from_, into, found)].tolist()

    def _run(
        self, function: "_InC", words: np.ndarray, values: np.ndarray, terms: _Terms, out: np.ndarray
    ) -> list[int]:
        undecided = np.empty(len(words), dtype=np.int64)
        from_, into, found = address_of(values), address_of(out), address_of(undecided)
        count = function(self._terms(terms), address_of(words), from_, len(words), into, found)
        return undecided[:count].tolist() if count else []

    def _terms(self, terms: _Terms) -> _ReleaseInC:
        made = self._made
        if made is None or made[0] != terms:
            made = self._made = (terms, self._make(terms))
        return made[1]

    def _make(self, terms: _Terms) -> _ReleaseInC:
        ratio, grid = terms.stddev / terms.grid, terms.grid
        fine = self._table.ctypes.data, _OCTAVES.start, _SPLIT, _MIDDLE, MAX_STEPS, 1.0 / grid, ratio, _edge(ratio)
        edge = _coarse_edge(ratio) if ratio <= _MAX_COARSE_RATIO else 0.0
        coarse = _coarse_quantiles().ctypes.data, _COARSE_WIDTH, _COARSE_SKIPPED, edge
        return _ReleaseInC(*fine, *coarse, float(terms.level), grid)


_InC = Callable[..., int]


def _declare(library: ctypes.CDLL) -> None:
    address, size = ctypes.c_void_p, ctypes.c_size_t
    for function in (library.round_noise, library.release_floats, library.release_doubles):
        function.argtypes = [ctypes.POINTER(_ReleaseInC), address, address, size, address, address]
        function.restype = size
    library.release_rows.argtypes = [ctypes.POINTER(_ReleaseInC), address, address, *[size] * 3, *[address] * 3]
    library.release_rows.restype = size


def _coarse_edge(ratio: float) -> float:
    """Return `_edge` for float32."""
    return 0.5 - (_COARSE_ERROR * ratio + 2.0**-20)


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


@cache
def _coarse_quantiles() -> np.ndarray:
    """Return polynomials for |z| given a tail's first 31 bits; float32 `[rows, 4]`.

    Each row interpolates at Chebyshev points, in the integer offset from its middle. The tests prove that no error
    exceeds `_COARSE_ERROR`, except in the first rows, which are not used.
    """
    count, half = _COARSE_DEGREE + 1, 2.0 ** (_COARSE_WIDTH - 1)
    nodes = np.cos(np.pi * (np.arange(count) + 0.5) / count)
    to_powers = np.linalg.inv(np.vander(nodes, increasing=True)) / half ** np.arange(count)[:, None]
    middles = 2.0 * half * np.arange(2 ** (31 - _COARSE_WIDTH)) + half
    tails = ((middles[:, None] + half * nodes + 0.5) * 2.0**-32).ravel()
    heights = np.reshape([-NormalDist().inv_cdf(tail) for tail in tails.tolist()], (-1, count))
    table = np.ascontiguousarray((heights @ to_powers.T).astype(np.float32))
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

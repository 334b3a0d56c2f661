"""The exact sampler: numpy and C decide as real arithmetic does, which implies the distribution.

FEDPRIV_SAMPLER_DRAWS=1e8 compares the two forms on that many numbers.
"""

import math
import os
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from support.helpers import FALSE_ALARM, accepts_variance, brief

from fedpriv import philox
from fedpriv.errors import UserError
from fedpriv.mechanisms import gaussian
from fedpriv.mechanisms.gaussian import MAX_STDDEV, MAX_STEPS, MIN_STDDEV, release_grid, rounded_noise
from fedpriv.mechanisms.tails import Tail, upper_tail
from fedpriv.native import native_library
from fedpriv.streams import Purpose, SeededStreams, Source, Streams, SystemStreams

DRAWS = int(float(os.environ.get("FEDPRIV_SAMPLER_DRAWS", "1e6")))
SAMPLES = 300_000
ALL = 2**64 - 1
HALF = Fraction(1, 2)
KINDS: dict[str, Streams] = {"seeded": SeededStreams(8), "system": SystemStreams()}
Values = Callable[[np.random.Generator, int, float], np.ndarray]
every_kind = pytest.mark.parametrize("streams", KINDS.values(), ids=KINDS.keys())


class Scripted:
    """A source of given words and, for each, given further words; words missing in `further` are 1."""

    def __init__(self, words: list[int], further: list[list[int]] | None = None) -> None:
        self._words, self._further, self.position, self.asked = words, further, 0, 0

    def words(self, size: int) -> np.ndarray:
        self.position += size
        return np.array(self._words[self.position - size : self.position], dtype=np.uint64)

    def more(self, position: int, number: int) -> int:
        self.asked += 1
        given = self._further[position] if self._further else []
        return given[number - 1] if number <= len(given) else 1


class Recorded:
    """A source that records the requested further words."""

    def __init__(self, inner: Source) -> None:
        self.inner, self.asked = inner, []

    @property
    def position(self) -> int:
        return self.inner.position

    def words(self, size: int) -> np.ndarray:
        return self.inner.words(size)

    def more(self, position: int, number: int) -> int:
        self.asked.append((position, number))
        return self.inner.more(position, number)


def forget_forms() -> None:
    """Forget which form of the fast part, and of the words' generator, was found for `FEDPRIV_NATIVE`."""
    gaussian._rounding.cache_clear()
    philox.philox_in_c.cache_clear()


@pytest.fixture(autouse=True)
def _forms_of_this_test_alone() -> Iterator[None]:
    yield
    forget_forms()


@pytest.fixture(params=["numpy", "C"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Return each form of the fast part in turn."""
    use(request.param, monkeypatch)


both_forms = pytest.mark.usefixtures("form")


def use(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDPRIV_NATIVE", "0" if name == "numpy" else "1")
    forget_forms()
    if name == "C" and native_library(gaussian._SOURCE, gaussian._declare) is None:
        pytest.skip("no C compiler")
    assert (gaussian._rounding() is gaussian._round_in_numpy) == (name == "numpy")


def normal_source(seed: int = 1, streams: Streams | None = None) -> Source:
    return (streams or SeededStreams(seed)).source(Purpose.SERVER_NOISE, 1)


# The grid.


@pytest.mark.parametrize("exponent", [-498, -30, -1, 0, 1, 7, 52, 499])
def test_the_grid_jumps_exactly_at_powers_of_two(exponent: int) -> None:
    stddev = 2.0**exponent
    assert release_grid(stddev) == stddev / 4
    assert release_grid(math.nextafter(stddev, 0.0)) == stddev / 8
    assert release_grid(math.nextafter(stddev, math.inf)) == stddev / 4


@brief
@given(st.floats(MIN_STDDEV, MAX_STDDEV))
def test_the_deviation_is_from_four_to_eight_grid_steps(stddev: float) -> None:
    grid = release_grid(stddev)
    assert math.frexp(grid)[0] == 0.5
    assert 4.0 <= stddev / grid < 8.0


@pytest.mark.parametrize("stddev", [0.0, -1.0, math.nan, math.inf, 1e-200, 1e200, 5e-324])
def test_a_deviation_out_of_range_is_refused(stddev: float) -> None:
    for attempt in (lambda: release_grid(stddev), lambda: rounded_noise(np.zeros(1), stddev, normal_source())):
        with pytest.raises(UserError, match="noise_stddev"):
            attempt()


@pytest.mark.parametrize("grid", [0.0, -0.25, 0.3, math.nan, math.inf, 2.0**-600, 2.0**600])
def test_a_grid_that_is_no_power_of_two_is_refused(grid: float) -> None:
    with pytest.raises(UserError, match="release_grid"):
        rounded_noise(np.zeros(1), 1.0, normal_source(), grid)


def test_a_grid_too_fine_for_the_noise_is_refused() -> None:
    with pytest.raises(UserError, match="grid steps"):
        rounded_noise(np.zeros(1), 1.0, normal_source(), 2.0**-21)


# The proof that decisions in float64 are right.


def test_no_error_of_the_fast_part_is_above_its_margin() -> None:
    """Sum bounds on all errors of |z|: of interpolation, of the table, of undrawn bits and of float64."""
    table, degree, half = gaussian._quantiles(), gaussian._DEGREE, 2.0 ** -(gaussian._SPLIT + 1)
    octaves = np.array(gaussian._OCTAVES)[:, None]
    starts = ((2.0**octaves * (1.0 + np.arange(2**gaussian._SPLIT) * 2.0 * half) + 0.5) * 2.0**-64).ravel()
    widths = np.repeat(2.0 ** (gaussian._OCTAVES.start - 64 + np.arange(len(octaves))), 2**gaussian._SPLIT)
    heights = stats.norm.isf(starts)
    mills = starts / stats.norm.pdf(heights)
    # |z|'s sixth derivative by p is Q(z) / pdf(z)^6 with Q of positive coefficients: largest at an interval's start.
    polynomial = np.polynomial.Polynomial([1.0])
    for n in range(1, degree + 1):
        polynomial = polynomial.deriv() + n * np.polynomial.Polynomial([0.0, 1.0]) * polynomial
    assert min(polynomial.coef) >= 0.0
    derivative = polynomial(heights) * (mills / starts) ** (degree + 1)
    interpolation = derivative * (half * widths) ** (degree + 1) / 2.0**degree / math.factorial(degree + 1)
    # Each row differs from the true interpolant by its error at the nodes times the Lebesgue constant.
    nodes = np.cos(np.pi * (np.arange(degree + 1) + 0.5) / (degree + 1)) * half
    at_nodes = max(error_at(row, node) for row in range(len(starts)) for node in nodes.tolist())
    undrawn = mills * (0.5 / 2.0**32 / (widths / 2.0 ** (gaussian._OCTAVES.start - 64)) + 2.0**-52)
    evaluation = 20 * 2.0**-53 * (np.abs(table[:, :-1]) * half ** np.arange(degree + 1)[:, None]).sum(axis=0)
    total = interpolation + 2.2 * at_nodes + undrawn + evaluation
    assert total.max() * 1.5 < gaussian._ERROR < total.max() * 4.0


def error_at(row: int, offset: float) -> float:
    """Return the distance of a polynomial of the table from the quantile function, to 100 bits."""
    octave, part = divmod(row, 2**gaussian._SPLIT)
    octave += gaussian._OCTAVES.start
    with mpmath.workprec(100):
        fraction = mpmath.mpf(gaussian._MIDDLE) + mpmath.mpf(part) / 2**gaussian._SPLIT + offset
        tail = (fraction * mpmath.mpf(2) ** octave + 0.5) / mpmath.mpf(2) ** 64
        height = mpmath.polyval([mpmath.mpf(c) for c in gaussian._quantiles()[::-1, row].tolist()], offset)
        return float(abs(mpmath.ncdf(-height) - tail) / mpmath.npdf(height) * 1.001)


def test_no_error_of_the_float32_part_is_above_its_margin() -> None:
    """The same bounds for float32: of interpolation, of the table, of the undrawn bits and of float32."""
    table, degree, half = gaussian._coarse_quantiles().astype(np.float64), gaussian._COARSE_DEGREE, 2.0**20
    assert 2 * half == 2.0**gaussian._COARSE_WIDTH
    rows = np.arange(gaussian._COARSE_SKIPPED, len(table))
    starts = (2.0 * half * rows + 0.5) * 2.0**-32
    heights = stats.norm.isf(starts)
    slopes = 1.0 / stats.norm.pdf(heights)
    polynomial = np.polynomial.Polynomial([1.0])
    for n in range(1, degree + 1):
        polynomial = polynomial.deriv() + n * np.polynomial.Polynomial([0.0, 1.0]) * polynomial
    derivative = polynomial(heights) * slopes ** (degree + 1)
    interpolation = derivative * (half * 2.0**-32) ** (degree + 1) / 2.0**degree / math.factorial(degree + 1)
    nodes = np.cos(np.pi * (np.arange(degree + 1) + 0.5) / (degree + 1)) * half
    tails = (2.0 * half * rows[:, None] + half + nodes + 0.5) * 2.0**-32
    values = np.polynomial.polynomial.polyval(nodes, table[rows].T)
    at_nodes = np.abs(values - stats.norm.isf(tails)).max(axis=1)
    undrawn = slopes * 0.5 * 2.0**-32
    sizes = (np.abs(table[rows]) * half ** np.arange(degree + 1)).sum(axis=1)
    evaluation = (2 * degree + 4) * 2.0**-24 * sizes  # with the products by ratio and the sum of value and noise
    total = interpolation + 2.0 * at_nodes + undrawn + evaluation
    assert total.max() * 1.5 < gaussian._COARSE_ERROR < total.max() * 4.0
    assert gaussian._coarse_edge(4.0) < gaussian._edge(4.0) - 2.0**-16


def test_few_numbers_need_more_than_64_bits() -> None:
    for ratio in (4.0, 8.0):
        assert 2.0 * (0.5 - gaussian._edge(ratio)) + 2.0**-31 < 1.5e-9


@pytest.mark.parametrize("bits", [128, 192, 448])
def test_integers_bound_the_normal_tail(bits: int) -> None:
    rng = np.random.default_rng(bits)
    for height in [*rng.uniform(0.0, 40.0, 60).tolist(), 0.0, 5e-324, 1e-9, 37.5, 1e9]:
        with mpmath.workprec(bits + 100):
            exact = mpmath.ncdf(-mpmath.mpf(height)) * mpmath.mpf(2) ** bits
            assert abs(upper_tail(Fraction(height), bits) - exact) < 2**32


# Decisions close to the thresholds.


def threshold(height: Fraction) -> int:
    """Return the tail probability beyond |height|, times 2^192, rounded down."""
    with mpmath.workprec(400):
        tail = mpmath.ncdf(-abs(mpmath.mpf(height.numerator)) / height.denominator)
        return int(mpmath.floor(tail * mpmath.mpf(2) ** 192))


def numbers_beside(tail: int) -> set[int]:
    """Return tail probabilities of 192 bits on both sides of one, at every distance, and the ends of its first word."""
    first = tail >> 128 << 128
    beside = {tail - 1, tail + 1, first, first - 1, first + 2**128, first + 2**128 - 1, 0, 2**191 - 1}
    beside |= {tail + sign * 2**bit for bit in range(0, 191, 7) for sign in (-1, 1)}
    return {number for number in beside if 0 <= number < 2**191 and number != tail}


@pytest.mark.parametrize("ratio", [4.0, math.nextafter(8.0, 0.0), 0.3, 800.0, 7e5])
@pytest.mark.parametrize("rest", [-0.5, math.nextafter(0.5, 0.0), 0.5, 0.2])
@both_forms
def test_numbers_beside_every_threshold_are_decided_as_real_numbers(ratio: float, rest: float) -> None:
    words, further, expected = [], [], []
    last = 40 if ratio > 1.0 else 3
    for n in range(-last, last + 1):
        height = (n + HALF - Fraction(rest)) / Fraction(ratio)
        tail = threshold(height)
        for number in numbers_beside(tail) if n % 16 == 0 or last < 8 else {tail - 1, tail + 1}:
            if not 0 <= number < 2**191 or abs(height) > 20:
                continue
            split = [number >> 128, number >> 64 & ALL, number & ALL]
            words.append(split[0] if height <= 0 else split[0] ^ ALL)
            further.append(split[1:])
            expected.append((n, number > tail if height > 0 else number < tail))
    source, grid = Scripted(words, further), 2.0**-7
    found = rounded_noise(np.full(len(words), rest * grid), ratio * grid, source, grid)
    below = [value <= n for value, (n, _) in zip(found.tolist(), expected, strict=True)]
    assert below == [truth for _, truth in expected]
    assert len(words) > 100
    assert source.asked >= 2 * last


@both_forms
def test_noise_has_no_largest_value() -> None:
    """Box-Muller on 53 bits ends at 8.57 deviations, 24 bits at 5.4; here further words are nearly all zero."""
    for word, sign in ((0, -1), (ALL, 1)):
        sizes = []
        for zeros in range(4):
            source = Scripted([word], [[0] * zeros + [2**63]])
            sizes.append(sign * rounded_noise(np.zeros(1), 4.0, source)[0] / 4.0)
        exact = [float(stats.norm.isf(2.0 ** -(65 + 64 * zeros))) for zeros in range(4)]
        assert sizes == pytest.approx(exact, abs=0.13)
        assert sizes[0] > 9.0
        assert sizes[-1] > 18.0


@both_forms
def test_the_middle_words_are_the_smallest_noise() -> None:
    words = [2**63 - 1, 2**63]
    for value, expected in ((0.4999, [0, 0]), (0.5, [0, 1]), (-0.5, [-1, 0]), (1.5, [1, 2]), (0.5001, [1, 1])):
        found = rounded_noise(np.full(2, value), 4.0, Scripted(words), 1.0)
        assert found.tolist() == expected


# Both forms agree.


VALUES: dict[str, Values] = {
    "small": lambda rng, size, grid: rng.normal(size=size) * grid,
    "near a million": lambda rng, size, grid: 1e6 + rng.integers(-9, 9, size) * grid / 3,
    "float32": lambda rng, size, _: (1e3 * rng.normal(size=size)).astype(np.float32).astype(np.float64),
    "subnormal": lambda rng, size, _: rng.integers(-9, 9, size) * 5e-324,
    "halves": lambda rng, size, grid: (rng.integers(-9, 9, size) + 0.5) * grid,
    "huge": lambda rng, size, grid: grid * 2.0 ** rng.uniform(50.0, 70.0, size) * rng.choice([-1, 1], size),
    "anything": lambda rng, size, _: rng.integers(0, 2**64, size, dtype=np.uint64).view(np.float64),
}


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES.keys())
def test_numpy_and_c_give_equal_results(values: Values, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 2**20
    for start in range(0, max(DRAWS // len(VALUES), 1), size):
        count = min(size, DRAWS // len(VALUES) - start)
        rng = np.random.default_rng([start, len(VALUES)])
        stddev, found = float(2.0 ** rng.uniform(-40.0, 40.0)), []
        for name in ("numpy", "C"):
            use(name, monkeypatch)
            chosen = values(np.random.default_rng(start), count, release_grid(stddev))
            found.append(rounded_noise(chosen, stddev, normal_source(start)))
        assert np.array_equal(*found)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES.keys())
def test_releases_are_the_same_numbers_with_and_without_c(
    values: Values, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, found = np.random.default_rng(7), []
    for stddev, level in ((2.0**-9 * 5.3, 60), (2.0**30, 2**40), (2.0**-90, 2**62), (2.0**80, 50)):
        with np.errstate(over="ignore", invalid="ignore"):
            chosen = values(rng, 3 * 9_000, release_grid(stddev)).reshape(3, -1).astype(kind)
        for name in ("numpy", "C"):
            use(name, monkeypatch)
            sources = [SeededStreams(4).source(Purpose.CLIENT_NOISE, 2, client) for client in (0, 5, 2**33)]
            sources[1].words(3)
            sources[2].uniform(1)  # its words can no longer be made in C
            found.append(gaussian.noised_rows(chosen, stddev, sources, level=level))
            assert [source.position for source in sources] == [9_000, 9_003, 9_000]
        steps = np.clip(
            rounded_noise(chosen[0].astype(np.float64), stddev, SeededStreams(4).source(Purpose.CLIENT_NOISE, 2, 0)),
            -level,
            level,
        )
        with np.errstate(over="ignore"):
            assert np.array_equal(found[-1][0], (steps * release_grid(stddev)).astype(kind))
        assert found[-2].tobytes() == found[-1].tobytes()
        assert found[-1].dtype == kind


@pytest.mark.parametrize("name", ["numpy", "C"])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_rows_of_one_call_have_the_noise_of_their_own_sources(
    name: str, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All sources are seeded and untouched, so that one call of C makes the words of all rows."""
    use(name, monkeypatch)
    values, clients = np.zeros((3, 500), dtype=kind), (0, 5, 2**33)

    def source(client: int) -> Any:
        return SeededStreams(4).source(Purpose.CLIENT_NOISE, 2, client)

    together = gaussian.noised_rows(values, 0.5, [source(client) for client in clients], level=1000)
    for row, client in zip(together, clients, strict=True):
        wanted = rounded_noise(np.zeros(500), 0.5, source(client)) * release_grid(0.5)
        assert np.array_equal(row, wanted.astype(kind))
    assert not np.array_equal(together[0], together[1])


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_releases_of_undecided_numbers_are_exact(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Words beside thresholds, which neither float32 nor float64 decides, for a source of any kind."""
    for n in (0, 3, -7):
        tail = threshold((n + HALF) / Fraction(5))
        for more, expected in ((tail - 1, n + 1), (tail + 1, n)):
            digits = [more >> 128, more >> 64 & ALL, more & ALL]
            word = digits[0] if n < 0 else digits[0] ^ ALL
            for name in ("numpy", "C"):
                use(name, monkeypatch)
                source = Scripted([word], [digits[1:]])
                released = gaussian.noised(np.zeros(1, dtype=kind), 5.0, source, 1.0)
                assert released.tolist() == [expected if n >= 0 else 2 * n + 1 - expected]
                assert source.asked > 0


@pytest.mark.parametrize("ratio", [2.0**12, 2.0**20])
def test_forms_agree_where_many_numbers_need_more_bits(ratio: float, monkeypatch: pytest.MonkeyPatch) -> None:
    found, asked = [], []
    for name in ("numpy", "C"):
        use(name, monkeypatch)
        source = Recorded(normal_source())
        found.append(rounded_noise(np.linspace(-9.0, 9.0, 200_000), ratio, source, 1.0))
        asked.append(source.asked)
    assert np.array_equal(*found)
    assert asked[0] == asked[1]


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("sum = (steps - whole) +", "sum = (steps - whole) -"),
        ("c[3]", "c[2]"),
        ("shift = rint(sum)", "shift = floor(sum)"),
        ("return count;", "return 1;"),
        ("(steps - whole) + ratio", "(steps - whole) - ratio"),
        ("sum = MULTIPLY_ADD_FLOAT(sum, x, c[1])", "sum = MULTIPLY_ADD_FLOAT(sum, x, c[2])"),
        ("out[i] = level * grid;", "out[i] = level;"),
        ("return level * release->grid;", "return level;"),
        ("*stream = streams + row;", "*stream = streams;"),
        ("stream->position + start, length", "stream->position, length"),
    ],
)
def test_a_c_form_that_contradicts_numpy_is_not_used(
    right: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    use("C", monkeypatch)
    text = gaussian._SOURCE.read_text()
    assert right in text
    faulty = tmp_path / "gaussian.c"
    faulty.write_text(text.replace(right, wrong))
    monkeypatch.setattr(gaussian, "_SOURCE", faulty)
    gaussian._rounding.cache_clear()
    assert gaussian._rounding() is gaussian._round_in_numpy
    assert len(list((tmp_path / "fedpriv").glob("gaussian-*.so"))) == 2
    gaussian._rounding.cache_clear()


@both_forms
def test_the_size_of_blocks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(1).normal(size=3001)
    whole = rounded_noise(values, 2.0**16, normal_source(), 1.0)
    source = normal_source()
    parts = [rounded_noise(part, 2.0**16, source, 1.0) for part in (values[:1], values[1:1001], values[1001:])]
    assert np.array_equal(whole, np.concatenate(parts))
    monkeypatch.setattr(gaussian, "_BLOCK", 7)
    assert np.array_equal(whole, rounded_noise(values, 2.0**16, normal_source(), 1.0))


# The distribution.


@every_kind
@pytest.mark.parametrize("rest", [-0.5, 0.0, 0.3, math.nextafter(0.5, 0.0), 0.5])
@both_forms
def test_the_rounded_noise_follows_its_law(streams: Streams, rest: float) -> None:
    ratio, grid = 5.3, 2.0**-9
    found = rounded_noise(np.full(SAMPLES, rest * grid), ratio * grid, normal_source(streams=streams))
    assert follows(found, rest, ratio)
    assert not follows(found, rest + 0.2, ratio)
    assert not follows(found, rest, ratio * 1.02)
    assert not follows(found, rest, ratio / 1.02)


def follows(found: np.ndarray, mean: float, ratio: float) -> bool:
    """Run a chi-square test that integers are rounded normal numbers."""
    edges = np.arange(-21, 22) + 0.5
    expected = np.diff(stats.norm.cdf((np.array([-np.inf, *edges, np.inf]) - mean) / ratio)) * len(found)
    counts = np.bincount(np.clip(found + 22, 1, 44) - 1, minlength=44)
    return bool(stats.chisquare(counts, expected * len(found) / expected.sum()).pvalue > FALSE_ALARM)


@every_kind
def test_releases_have_the_variance_of_the_noise_and_of_the_rounding(streams: Streams) -> None:
    for stddev in (4.0, 7.9):
        noise = rounded_noise(np.zeros(SAMPLES), stddev, normal_source(streams=streams)) * release_grid(stddev)
        variance = stddev**2 + release_grid(stddev) ** 2 / 12.0
        assert accepts_variance(noise, variance)
        assert not accepts_variance(noise, variance * 1.03)
        assert not accepts_variance(noise, variance / 1.03)


@every_kind
def test_neighboring_coordinates_and_calls_are_independent(streams: Streams) -> None:
    source = normal_source(streams=streams)
    first, second = (rounded_noise(np.zeros(SAMPLES), 7.0, source) / 7.0 for _ in range(2))
    for one, other in ((first, second), (first[1:], first[:-1]), (first**2 - 1.0, second**2 - 1.0)):
        correlation = float(np.corrcoef(one, other)[0, 1])
        assert abs(correlation) < 6.2 / SAMPLES**0.5


# Values.


@both_forms
def test_the_release_is_the_value_to_the_nearest_step_plus_noise() -> None:
    """With the noise of one word, which is nearly zero, the result is exactly the value in steps."""
    grid = 2.0**-3
    values = [0.0, 1e6, -1e6, 5e-324, 1.06, -1.07, 2.0**53 * grid, -(2.0**54 + 4) * grid, 3.0**33]
    found = rounded_noise(np.array(values), 0.5, Scripted([2**63] * len(values)), grid)
    assert found.tolist() == [math.floor(Fraction(value) / Fraction(grid) + HALF) for value in values]


@both_forms
def test_huge_values_are_clipped_and_those_that_are_not_finite_count_as_zero() -> None:
    values = np.array([1e308, -1e308, MAX_STEPS, 2.0 * MAX_STEPS, math.nan, math.inf, -math.inf])
    base = rounded_noise(np.zeros(len(values)), 4.0, normal_source()).tolist()
    found = rounded_noise(values, 4.0, normal_source())
    most = int(MAX_STEPS)
    expected = [most, -most, most, most, 0, 0, 0]
    assert found.tolist() == [edge + noise for edge, noise in zip(expected, base, strict=True)]
    tiny = rounded_noise(np.array([1e308, -1.0, 5e-324]), 2.0**-500, Scripted([2**63] * 3))
    assert tiny.tolist() == [most, -most, 0]
    undecided = rounded_noise(np.array([math.nan, math.inf, 1e308]), 4.0, Scripted([1, 1, 1]))
    assert undecided.tolist() == [undecided[0], undecided[0], most + undecided[0]]
    assert -40 < undecided[0] < -30


@both_forms
def test_values_and_sizes_of_any_kind() -> None:
    assert rounded_noise(np.zeros(0), 1.0, normal_source()).shape == (0,)
    values = np.arange(20.0)
    expected = rounded_noise(values[::2].copy(), 1.0, normal_source())
    assert np.array_equal(rounded_noise(values[::2], 1.0, normal_source()), expected)
    assert np.array_equal(rounded_noise(values[::2].astype(np.float32), 1.0, normal_source()), expected)
    assert np.array_equal(values, np.arange(20.0))


@pytest.mark.parametrize("stddev", [MIN_STDDEV, 1e-140, 1e-3, 4.0, 1e140, MAX_STDDEV])
@both_forms
def test_noise_is_the_same_number_of_steps_at_every_scale(stddev: float) -> None:
    grid = release_grid(stddev)
    values = np.linspace(-20.0, 20.0, 1001)
    scaled = rounded_noise(values * grid, stddev, normal_source())
    assert np.array_equal(scaled, rounded_noise(values, stddev / grid, normal_source(), 1.0))
    assert np.isfinite(scaled * grid).all()


# Further bits.


def test_a_number_is_extended_by_its_own_bits_only_until_it_is_decided() -> None:
    height = Fraction(1, 3)
    tail = threshold(height)
    first, second, third = tail >> 128, tail >> 64 & ALL, tail & ALL
    for further, asked, below in (
        ([second - 1], 1, False),
        ([second + 1], 1, True),
        ([second, third - 1], 2, False),
        ([second, third, ALL], 3, None),
    ):
        source = Scripted([first ^ ALL], [further])
        answer = Tail(source, 0, first ^ ALL).is_below(height)
        assert below is None or answer == below
        assert source.asked == asked


def test_further_bits_are_asked_by_position_in_the_source() -> None:
    source = Recorded(normal_source())
    source.words(1000)
    rounded_noise(np.zeros(50_000), 2.0**20, source, 1.0)
    positions = [position for position, _ in source.asked]
    assert all(1000 <= position < 51_000 for position in positions)
    assert len(set(source.asked)) == len(source.asked)

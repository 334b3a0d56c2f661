"""Cohorts: the samplers follow the distributions that the accountant assumes."""

import math
from collections import Counter
from fractions import Fraction
from itertools import combinations

import dp_accounting as dpa
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from support.helpers import FALSE_ALARM, accepts_variance, brief

from fedpriv.errors import UserError
from fedpriv.privacy import SAMPLINGS, Everyone, FixedSize, Poisson, Sampling
from fedpriv.privacy.sampling import BLOCK
from fedpriv.streams import Purpose, SeededStreams, Source, Streams, SystemStreams

KINDS: dict[str, Streams] = {"seeded": SeededStreams(3), "system": SystemStreams()}
every_kind = pytest.mark.parametrize("streams", KINDS.values(), ids=KINDS.keys())
every_sampling = pytest.mark.parametrize("sampling", [Everyone(50), Poisson(50, 0.4), FixedSize(50, 20)])

CLIENTS, ROUNDS = 400, 4000


class UniformOnly:
    """A source of uniform numbers alone."""

    position = 0

    def words(self, size: int) -> np.ndarray:
        raise AssertionError(size)

    def more(self, position: int, number: int) -> int:
        raise AssertionError(position, number)

    def subset(self, population: int, size: int) -> np.ndarray:
        raise AssertionError(population, size)


class Scripted(UniformOnly):
    """A source of given uniform numbers, one value per call."""

    def __init__(self, *values: float) -> None:
        self.values = list(values)

    def uniform(self, size: int) -> np.ndarray:
        return np.full(size, self.values.pop(0))


def source(seed: int, round: int = 1) -> Source:
    return SeededStreams(seed).source(Purpose.COHORT, round)


def taken(sampling: Sampling, streams: Streams, rounds: int = ROUNDS) -> np.ndarray:
    """Return the participations, bool `[rounds, clients]`."""
    table = np.zeros((rounds, sampling.population), dtype=bool)
    for row in range(rounds):
        table[row, sampling.cohort(streams.source(Purpose.COHORT, row + 1))] = True
    return table


def accepts_count(count: int, trials: int, probability: float) -> bool:
    """Run an exact two-sided binomial test at `FALSE_ALARM`."""
    return bool(stats.binomtest(int(count), int(trials), probability).pvalue > FALSE_ALARM)


@brief
@given(seed=st.integers(0, 2**32), population=st.integers(1, 3000), share=st.floats(1e-9, 1.0))
def test_cohorts_are_ascending_ids_of_the_population(seed: int, population: int, share: float) -> None:
    size = max(1, int(share * population))
    for sampling in (Everyone(population), Poisson(population, share), FixedSize(population, size)):
        cohort = sampling.cohort(source(seed))
        assert cohort.dtype == np.int64
        assert (np.diff(cohort) > 0).all()
        assert len(cohort) == 0 or (cohort[0] >= 0 and cohort[-1] < population)


@every_sampling
def test_the_same_source_gives_the_same_cohort(sampling: Sampling) -> None:
    assert np.array_equal(sampling.cohort(source(7)), sampling.cohort(source(7)))


@pytest.mark.parametrize("sampling", [Poisson(50, 0.4), FixedSize(50, 20)])
def test_cohorts_differ_from_round_to_round(sampling: Sampling) -> None:
    cohorts = {sampling.cohort(source(7, round)).tobytes() for round in range(1, 101)}
    assert len(cohorts) == 100


@every_kind
def test_poisson_includes_each_client_equally_often_and_independently_of_its_neighbor(streams: Streams) -> None:
    prob = 0.1
    table = taken(Poisson(CLIENTS, prob), streams)
    spread = prob * (1.0 - prob)
    by_client = (table.sum(axis=0) - ROUNDS * prob) / (ROUNDS * spread) ** 0.5
    by_round = (table.sum(axis=1) - CLIENTS * prob) / (CLIENTS * spread) ** 0.5
    assert accepts_count(table.sum(), table.size, prob)
    assert accepts_variance(by_client, 1.0)
    assert accepts_variance(by_round, 1.0)
    assert accepts_count((table[:, ::2] & table[:, 1::2]).sum(), table.size // 2, prob**2)
    assert accepts_count((table[1:] & table[:-1]).sum(), table[1:].size, prob**2)


def test_the_same_tests_reject_cohorts_of_a_fixed_size_and_a_probability_off_by_5_percent() -> None:
    fixed = taken(FixedSize(CLIENTS, CLIENTS // 10), KINDS["seeded"])
    more = taken(Poisson(CLIENTS, 0.105), KINDS["seeded"])
    assert not accepts_variance((fixed.sum(axis=1) - 40.0) / 6.0, 1.0)
    assert not accepts_count(more.sum(), more.size, 0.1)


def test_poisson_keeps_its_law_across_blocks_of_gaps() -> None:
    prob, population = 0.3, 4 * BLOCK * 3
    cohort = Poisson(population, prob).cohort(source(5))
    counts = np.histogram(cohort, bins=256, range=(0, population))[0]
    each = population / 256
    assert len(cohort) > 2 * BLOCK
    assert accepts_count(len(cohort), population, prob)
    assert accepts_variance((counts - each * prob) / (each * prob * (1.0 - prob)) ** 0.5, 1.0)


def test_poisson_of_one_client_is_a_coin() -> None:
    rounds, prob = 20_000, 0.3
    sizes = [len(Poisson(1, prob).cohort(source(9, round))) for round in range(rounds)]
    assert accepts_count(sum(sizes), rounds, prob)


class Counting(UniformOnly):
    """A source that counts the requested uniform numbers."""

    def __init__(self, inner: Source) -> None:
        self.inner, self.drawn = inner, 0

    def uniform(self, size: int) -> np.ndarray:
        self.drawn += size
        return self.inner.uniform(size)

    def subset(self, population: int, size: int) -> np.ndarray:
        return self.inner.subset(population, size)


def test_poisson_of_a_billion_clients_costs_its_cohort() -> None:
    sampling, counting = Poisson(10**9, 1e-7), Counting(source(1))
    cohort = sampling.cohort(counting)
    assert counting.drawn < 1000
    assert sampling.expected_size == pytest.approx(100.0)
    assert stats.poisson.sf(len(cohort), 100) > FALSE_ALARM
    assert stats.poisson.cdf(len(cohort), 100) > FALSE_ALARM


@pytest.mark.parametrize("probability", [1e-100, 1e-60, 1e-20])
def test_a_tiny_probability_gives_an_empty_cohort_without_overflow(probability: float) -> None:
    assert len(Poisson(10**12, probability).cohort(source(2))) == 0


def test_a_probability_below_the_resolution_of_one_uniform_number_keeps_its_law() -> None:
    cohort = Poisson(6, 1e-17).cohort(Scripted(0.0, 0.5, 0.5, 0.5))
    assert cohort.tolist() == [5]


def test_the_largest_and_smallest_uniform_numbers_are_no_trouble() -> None:
    assert Poisson(5, 0.5).cohort(Scripted(0.0, 0.0)).tolist() == [0, 1, 2, 3, 4]
    assert Poisson(5, 0.5).cohort(Scripted(1.0 - 2.0**-53, 1.0 - 2.0**-53)).tolist() == []


class FirstGiven(UniformOnly):
    """A source with a given first number in each call; all others are one half."""

    def __init__(self, *values: float) -> None:
        self.values = list(values)

    def uniform(self, size: int) -> np.ndarray:
        return np.array([self.values.pop(0), *[0.5] * (size - 1)])


def first_of(sampling: Poisson, bits: int, more: int = 0) -> int:
    """Return a cohort's first client if U begins with 106 given bits, then 53 given ones; n if there is none."""
    high, low = (bits >> 53) * 2.0**-53, bits % 2**53 * 2.0**-53
    cohort = sampling.cohort(FirstGiven(high, low, *[more * 2.0**-53, 0.25] * 1000))
    return int(cohort[0]) if len(cohort) else sampling.population


@pytest.mark.parametrize(
    ("probability", "passed"),
    [
        *((q, k) for q in (0.01, 0.3, 0.5, 1 / 3) for k in (1, 2, 7, 60)),
        (1e-6, 1),
        (1e-6, 3000),
        (2.0**-53, 2),
        (1.0 - 2.0**-53, 1),
        (1e-12, 500),
    ],
)
def test_a_number_beside_a_threshold_passes_over_as_many_clients_as_in_exact_arithmetic(
    probability: float, passed: int
) -> None:
    """At least k clients are skipped exactly if U >= 1 - (1 - q)^k."""
    sampling = Poisson(passed + 1, probability)
    at = (1 - (1 - Fraction(probability)) ** passed) * 2**106
    bits = math.floor(at)
    beside = {bits - 1: False, bits + 1: True} | {bits + sign * 2**k: sign > 0 for k in (9, 40, 53) for sign in (-1, 1)}
    for number, truth in beside.items():
        if 0 <= number < 2**106:
            assert (first_of(sampling, number) >= passed) == truth
    if at != bits:
        further = math.floor((at - bits) * 2**53)
        for more, truth in ((further - 1, False), (further + 1, True)):
            if 0 <= more < 2**53:
                assert (first_of(sampling, bits, more) >= passed) == truth


def test_a_client_far_from_the_one_before_is_drawn_by_the_same_probability() -> None:
    """Near U = 1, float64 is coarse: after 2,400 skipped clients, the next must still be drawn with probability q."""
    q, passed = Fraction(0.01), 2400
    survive = (1 - q) ** passed
    start = math.ceil((1 - survive) * 2**106)
    for share in (Fraction(i, 200) + Fraction(1, 10**6) for i in range(-1, 200)):
        further = first_of(Poisson(4000, 0.01), start + int(survive * 2**106 * share)) - passed
        assert further == math.floor(math.log1p(-share) / math.log1p(-q))


def test_cohorts_of_a_seed_stay_what_they_were_before_coins_were_exact() -> None:
    known = [
        (Poisson(1000, 0.01), [95, 229, 288, 469, 747, 768, 780]),
        (Poisson(10**9, 1e-8), [95675592, 230217092, 289323854, 470815983, 750035379, 770524589, 782430825]),
        (Poisson(10**4, 0.3), [9990, 9991, 9992, 9995, 9998]),
    ]
    for sampling, cohort in known:
        assert sampling.cohort(source(12))[-7:].tolist()[-len(cohort) :] == cohort


@every_kind
def test_every_fixed_size_cohort_is_equally_likely(streams: Streams) -> None:
    rounds = 6000
    cohorts = [tuple(FixedSize(5, 2).cohort(streams.source(Purpose.COHORT, round))) for round in range(rounds)]
    seen = Counter(cohorts)
    counts = [seen[pair] for pair in combinations(range(5), 2)]
    assert sum(counts) == rounds
    assert stats.chisquare(counts).pvalue > FALSE_ALARM


def test_everyone_and_the_extremes_of_sampling_are_all_clients() -> None:
    for sampling in (Everyone(9), Poisson(9, 1.0), FixedSize(9, 9)):
        assert sampling.cohort(source(4)).tolist() == list(range(9))
        assert sampling.sampling_prob == 1.0
        assert sampling.expected_size == 9.0


@every_kind
@pytest.mark.parametrize("sampling", [Poisson(200, 0.07), FixedSize(200, 14)])
def test_the_event_counts_what_the_sampler_does(sampling: Sampling, streams: Streams) -> None:
    event, _ = sampling.event(1.0, replace=True)
    seen = int(taken(sampling, streams)[:, 17].sum())
    assert accepts_count(seen, ROUNDS, event_prob(event))
    assert not accepts_count(seen, ROUNDS, 2.0 * event_prob(event))
    assert event_prob(event) == sampling.sampling_prob


def event_prob(event: dpa.DpEvent) -> float:
    """Return the probability of one client that the accountant uses."""
    if isinstance(event, dpa.PoissonSampledDpEvent):
        return event.sampling_probability
    assert isinstance(event, dpa.SampledWithoutReplacementDpEvent)
    return event.sample_size / event.source_dataset_size


def test_the_table_names_every_sampling() -> None:
    assert {name: kind.name for name, kind in SAMPLINGS.items()} == {name: name for name in SAMPLINGS}


@pytest.mark.parametrize(
    ("key", "make"),
    [
        ("data.clients", lambda: Everyone(0)),
        ("data.clients", lambda: Everyone(2.0)),  # type: ignore[arg-type]
        ("data.clients", lambda: Everyone(True)),
        ("data.clients", lambda: Poisson(10**13, 0.5)),
        ("data.clients", lambda: FixedSize(-1, 1)),
        ("cohort.probability", lambda: Poisson(5, 0.0)),
        ("cohort.probability", lambda: Poisson(5, 1.0000001)),
        ("cohort.probability", lambda: Poisson(5, float("nan"))),
        ("cohort.probability", lambda: Poisson(5, "0.1")),  # type: ignore[arg-type]
        ("cohort.size", lambda: FixedSize(5, 0)),
        ("cohort.size", lambda: FixedSize(5, 6)),
        ("cohort.size", lambda: FixedSize(5, 2.0)),  # type: ignore[arg-type]
    ],
)
def test_a_refused_sampling_names_its_key_in_one_line(key: str, make) -> None:
    with pytest.raises(UserError) as refusal:
        make()
    assert refusal.value.where == key
    assert "\n" not in str(refusal.value)

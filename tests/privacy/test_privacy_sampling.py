"""Cohorts: the laws that the accountant assumes are the laws that the samplers follow."""

from collections import Counter
from itertools import combinations

import dp_accounting as dpa
import numpy as np
import pytest
from helpers import FALSE_ALARM, accepts_variance, brief
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedpriv.errors import UserError
from fedpriv.privacy import SAMPLINGS, Everyone, FixedSize, Poisson, Sampling
from fedpriv.privacy.accounting import round_event
from fedpriv.privacy.sampling import BLOCK
from fedpriv.streams import Purpose, SeededStreams, Source, Streams, SystemStreams

KINDS: dict[str, Streams] = {"seeded": SeededStreams(3), "system": SystemStreams()}
every_kind = pytest.mark.parametrize("streams", KINDS.values(), ids=KINDS.keys())
every_sampling = pytest.mark.parametrize("sampling", [Everyone(50), Poisson(50, 0.4), FixedSize(50, 20)])

CLIENTS, ROUNDS = 400, 4000


class Scripted:
    """A source of given uniform numbers, one value per call."""

    def __init__(self, *values: float) -> None:
        self.values = list(values)

    def normal(self, size: int) -> np.ndarray:
        raise AssertionError(size)

    def uniform(self, size: int) -> np.ndarray:
        return np.full(size, self.values.pop(0))

    def subset(self, population: int, size: int) -> np.ndarray:
        raise AssertionError(population, size)


def source(seed: int, round: int = 1) -> Source:  # noqa: A002
    return SeededStreams(seed).source(Purpose.COHORT, round)


def taken(sampling: Sampling, streams: Streams, rounds: int = ROUNDS) -> np.ndarray:
    """Who took part, bool `[rounds, clients]`."""
    table = np.zeros((rounds, sampling.population), dtype=bool)
    for row in range(rounds):
        table[row, sampling.cohort(streams.source(Purpose.COHORT, row + 1))] = True
    return table


def accepts_count(count: int, trials: int, probability: float) -> bool:
    """Exact two-sided binomial test at `FALSE_ALARM`."""
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
    cohorts = {sampling.cohort(source(7, round)).tobytes() for round in range(1, 101)}  # noqa: A001
    assert len(cohorts) == 100


@every_kind
def test_poisson_includes_each_client_equally_often_and_independently_of_its_neighbour(streams: Streams) -> None:
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
    sizes = [len(Poisson(1, prob).cohort(source(9, round))) for round in range(rounds)]  # noqa: A001
    assert accepts_count(sum(sizes), rounds, prob)


class Counting:
    """A source that counts the uniform numbers that are asked of it."""

    def __init__(self, inner: Source) -> None:
        self.inner, self.drawn = inner, 0

    def uniform(self, size: int) -> np.ndarray:
        self.drawn += size
        return self.inner.uniform(size)

    def normal(self, size: int) -> np.ndarray:
        return self.inner.normal(size)

    def subset(self, population: int, size: int) -> np.ndarray:
        return self.inner.subset(population, size)


def test_poisson_of_a_billion_clients_costs_its_cohort() -> None:
    sampling, counting = Poisson(10**9, 1e-7), Counting(source(1))
    cohort = sampling.cohort(counting)
    assert counting.drawn < 1000
    assert sampling.expected_size == pytest.approx(100.0)
    assert stats.poisson.sf(len(cohort), 100) > FALSE_ALARM
    assert stats.poisson.cdf(len(cohort), 100) > FALSE_ALARM


@pytest.mark.parametrize("probability", [5e-324, 1e-300, 1e-20])
def test_a_tiny_probability_gives_an_empty_cohort_without_overflow(probability: float) -> None:
    assert len(Poisson(10**12, probability).cohort(source(2))) == 0


def test_a_probability_below_the_resolution_of_one_uniform_number_keeps_its_law() -> None:
    cohort = Poisson(6, 1e-17).cohort(Scripted(0.0, 0.5, 0.5, 0.5))
    assert cohort.tolist() == [5]


def test_the_largest_and_smallest_uniform_numbers_are_no_trouble() -> None:
    assert Poisson(5, 0.5).cohort(Scripted(0.0, 0.0)).tolist() == [0, 1, 2, 3, 4]
    assert Poisson(5, 0.5).cohort(Scripted(1.0 - 2.0**-53, 1.0 - 2.0**-53)).tolist() == []


@every_kind
def test_every_fixed_size_cohort_is_equally_likely(streams: Streams) -> None:
    rounds = 6000
    cohorts = [
        tuple(FixedSize(5, 2).cohort(streams.source(Purpose.COHORT, round)))
        for round in range(rounds)  # noqa: A001
    ]
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
    event, _ = round_event(trust="central", adjacency="replace", sampling=sampling, noise_multiplier=1.0)
    seen = int(taken(sampling, streams)[:, 17].sum())
    assert accepts_count(seen, ROUNDS, event_prob(event))
    assert not accepts_count(seen, ROUNDS, 2.0 * event_prob(event))
    assert event_prob(event) == sampling.sampling_prob


def event_prob(event: dpa.DpEvent) -> float:
    """Probability of one client as the accountant is told."""
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

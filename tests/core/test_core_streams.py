"""Randomness: the address decides, the distributions are right, and the tests would detect small errors."""

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from support.helpers import FALSE_ALARM, accepts_law, accepts_variance, brief

from fedpriv import philox
from fedpriv import streams as streams_module
from fedpriv.streams import Purpose, SeededStreams, Source, Streams, SystemStreams

SAMPLES = 400_000
"""Sample size that distinguishes scales 1.05 and 1, with twice the margin that the false-alarm rate requires."""

KINDS: dict[str, Streams] = {"seeded": SeededStreams(11), "system": SystemStreams()}
every_kind = pytest.mark.parametrize("streams", KINDS.values(), ids=KINDS.keys())
LIMIT = float(stats.norm.isf(FALSE_ALARM / 2))
"""Standard deviations that a two-sided test allows."""

addresses = st.tuples(st.integers(0, 2**40), st.sampled_from(Purpose), st.integers(0, 10_000), st.integers(0, 10**12))


def draws(source: Source) -> tuple[bytes, ...]:
    """Return draws of each kind from a source."""
    return source.words(5).tobytes(), source.uniform(5).tobytes(), source.subset(10**6, 3).tobytes()


def correlated(first: np.ndarray, second: np.ndarray) -> bool:
    return abs(float(np.corrcoef(first, second)[0, 1])) * len(first) ** 0.5 > LIMIT


@brief
@given(address=addresses)
def test_the_same_address_gives_the_same_numbers(address: tuple[int, Purpose, int, int]) -> None:
    seed, purpose, round, client = address
    first, again = SeededStreams(seed), SeededStreams(seed)
    assert draws(first.source(purpose, round, client)) == draws(again.source(purpose, round, client))
    assert draws(first.source(purpose, np.int64(round), np.int64(client))) == draws(  # type: ignore[arg-type]
        again.source(purpose, round, client)
    )


@brief
@given(one=addresses, other=addresses)
def test_different_addresses_give_different_numbers(
    one: tuple[int, Purpose, int, int], other: tuple[int, Purpose, int, int]
) -> None:
    equal = one == other
    assert equal == (draws(SeededStreams(one[0]).source(*one[1:])) == draws(SeededStreams(other[0]).source(*other[1:])))


def test_every_part_of_the_address_counts() -> None:
    values = (0, 1, 2, 255, 2**16, 2**31, 2**32)
    found = [
        SeededStreams(seed).source(purpose, round, client).words(4).tobytes()
        for seed, purpose, round, client in itertools.product((0, 1, 2**32), Purpose, (0, 1, 2, 3, 1000), values)
    ]
    assert len(set(found)) == len(found)


def test_rounds_and_clients_are_not_interchangeable() -> None:
    streams = SeededStreams(0)
    assert draws(streams.source(Purpose.CLIENT_NOISE, 2, 3)) != draws(streams.source(Purpose.CLIENT_NOISE, 3, 2))


def test_different_addresses_are_uncorrelated() -> None:
    reference = SeededStreams(5).source(Purpose.CLIENT_NOISE, 1, 1).uniform(SAMPLES)
    for seed, purpose, round, client in (
        (6, Purpose.CLIENT_NOISE, 1, 1),
        (5, Purpose.SERVER_NOISE, 1, 1),
        (5, Purpose.CLIENT_NOISE, 2, 1),
        (5, Purpose.CLIENT_NOISE, 1, 2),
    ):
        assert not correlated(reference, SeededStreams(seed).source(purpose, round, client).uniform(SAMPLES))


def test_the_order_of_asking_does_not_matter() -> None:
    streams = SeededStreams(3)
    places = list(itertools.product(Purpose, (1, 2), (0, 7)))
    forward = {place: draws(streams.source(*place)) for place in places}
    backward = {place: draws(streams.source(*place)) for place in reversed(places)}
    assert forward == backward


def test_one_source_does_not_repeat_itself() -> None:
    for streams in KINDS.values():
        source = streams.source(Purpose.COHORT, 1)
        assert draws(source) != draws(source)


def test_system_streams_never_give_the_same_numbers_twice() -> None:
    streams = SystemStreams()
    found = [draws(streams.source(Purpose.SERVER_NOISE, 1, 1))[:2] for _ in range(200)]
    assert len(set(found)) == len(found)


def test_groups_of_clients_stay_in_system_streams_and_nothing_else_does() -> None:
    """A server that restarts in the middle of a run has the groups of before."""
    for purpose in Purpose:
        first, again = (draws(SystemStreams(4).source(purpose)) for _ in range(2))
        assert (first == again) == (purpose is Purpose.GROUP)
    groups = draws(SystemStreams(4).source(Purpose.GROUP))
    assert groups == draws(SeededStreams(4).source(Purpose.GROUP))
    assert groups != draws(SystemStreams(5).source(Purpose.GROUP))


def test_purposes_keep_the_numbers_that_seeded_results_rest_on() -> None:
    assert [purpose.name for purpose in sorted(Purpose)][:7] == [
        "MODEL",
        "PARTITION",
        "COHORT",
        "SERVER_NOISE",
        "CLIENT_NOISE",
        "LOCAL_WORK",
        "DATA",
    ]
    assert [int(purpose) for purpose in Purpose] == list(range(len(Purpose)))


@every_kind
@pytest.mark.parametrize("size", [0, 1, 2, 3, 8, 1001])
def test_a_source_gives_as_many_numbers_as_asked(streams: Streams, size: int) -> None:
    source = streams.source(Purpose.SERVER_NOISE, 1)
    words, uniform, subset = source.words(size), source.uniform(size), source.subset(2000, size)
    assert (words.dtype, uniform.dtype, subset.dtype) == (np.uint64, np.float64, np.int64)
    assert words.shape == uniform.shape == subset.shape == (size,)


@every_kind
def test_words_are_uniform_and_independent_bits(streams: Streams) -> None:
    words = streams.source(Purpose.SERVER_NOISE, 1).words(SAMPLES)
    bits = np.unpackbits(words.view(np.uint8)).reshape(SAMPLES, 64).astype(np.float64)
    assert words.dtype == np.uint64
    # None of 64 counts and of 63 + 64 products of neighboring bits and words is off by more than 7 deviations.
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 3.5 / SAMPLES**0.5
    assert np.abs((bits[:, 1:] == bits[:, :-1]).mean(axis=0) - 0.5).max() < 3.5 / SAMPLES**0.5
    assert np.abs((bits[1:] == bits[:-1]).mean(axis=0) - 0.5).max() < 3.5 / SAMPLES**0.5
    assert accepts_law(words * 2.0**-64, stats.uniform.cdf)
    assert len(np.unique(words)) == SAMPLES


def test_seeded_words_in_parts_are_those_at_once() -> None:
    streams = SeededStreams(6)
    source = streams.source(Purpose.CLIENT_NOISE, 2, 5)
    parts = []
    for size in (0, 1, 3, 100, 7):
        assert source.position == sum(len(part) for part in parts)
        parts.append(source.words(size))
    whole = streams.source(Purpose.CLIENT_NOISE, 2, 5).words(source.position)
    assert np.array_equal(np.concatenate(parts), whole)


def test_further_words_of_seeded_numbers_depend_on_the_position_alone() -> None:
    streams = SeededStreams(6)
    one, other = (streams.source(Purpose.CLIENT_NOISE, 2, 5) for _ in range(2))
    other.words(10)
    other.uniform(3)
    places = [(position, number) for position in (0, 1, 2, 2**32, 2**40 + 1) for number in (1, 2, 3)]
    found = [one.more(*place) for place in places]
    assert found == [other.more(*place) for place in reversed(places)][::-1]
    assert len(set(found)) == len(found)
    assert all(0 <= word < 2**64 for word in found)
    assert not set(found) & set(one.words(1000).tolist())


def test_further_words_are_those_of_no_other_address() -> None:
    """A client number of two 32-bit words must not be confused with a client and a position."""
    position = 7
    for key in ((position,), (position, 0), (0, position), (streams_module._MORE, position, 0)):
        client = sum(word << 32 * (1 + index) for index, word in enumerate(key))
        found = SeededStreams(6).source(Purpose.CLIENT_NOISE, 2, client + 5).words(4)
        assert SeededStreams(6).source(Purpose.CLIENT_NOISE, 2, 5).more(position, 1) not in found
    seeds = {
        SeededStreams(6).source(Purpose.CLIENT_NOISE, *address).more(0, 1)
        for address in itertools.product(range(4), range(4))
    }
    assert len(seeds) == 16


@pytest.mark.parametrize("size", [1, 8, 10_000])
def test_system_words_never_repeat(size: int) -> None:
    streams = SystemStreams()
    one, other = (streams.source(Purpose.SERVER_NOISE, 1) for _ in range(2))
    found = [source.words(size) for source in (one, other, one, other, one) for _ in range(2)]
    found.append(np.array([one.more(0, 1) for _ in range(50)] + [other.more(0, 1)], dtype=np.uint64))
    assert len(np.unique(np.concatenate(found))) == 10 * size + 51
    assert one.position == 6 * size


FORK = """
import os, sys
from fedpriv.streams import SystemSource
source = SystemSource()
source.words(10_000)
child = os.fork()
if child:
    os.waitpid(child, 0)
sys.stdout.buffer.write(source.words(10_000).tobytes())
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_a_forked_process_does_not_repeat_its_parent() -> None:
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, check=True)
    words = np.frombuffer(done.stdout, dtype=np.uint64)
    assert len(np.unique(words)) == len(words) == 20_000


NOISE = (Purpose.SERVER_NOISE, Purpose.CLIENT_NOISE, Purpose.CLIENT_NOISE_SUM, Purpose.SCORE_NOISE)
NOISE += (Purpose.STEP_NOISE,)


def test_experiments_of_one_seed_share_everything_but_their_noise() -> None:
    for purpose in Purpose:
        found = [
            SeededStreams(5, noise_id).source(purpose, 2, 3).words(4).tobytes() for noise_id in ("", "a", "b", "5 a")
        ]
        assert len(set(found)) == (4 if purpose in NOISE else 1)
        further = {SeededStreams(5, noise_id).source(purpose, 2, 3).more(0, 1) for noise_id in ("", "a", "b")}
        assert len(further) == (3 if purpose in NOISE else 1)


def test_equal_experiments_have_equal_noise() -> None:
    for purpose in NOISE:
        one, other = (SeededStreams(5, "a").source(purpose, 2, 3).words(4) for _ in range(2))
        assert np.array_equal(one, other)
        assert not np.array_equal(one, SeededStreams(6, "a").source(purpose, 2, 3).words(4))


def test_seeded_numbers_stay_what_they_are() -> None:
    """Results of earlier versions stay reproducible: these numbers never change, except noise with its version."""
    known = {
        Purpose.MODEL: 0.47595803,
        Purpose.PARTITION: 0.73032571,
        Purpose.COHORT: 0.47636703,
        Purpose.LOCAL_WORK: 0.76701814,
        Purpose.DATA: 0.06915912,
        Purpose.SHIFT: 0.4745361,
        Purpose.DEVICE: 0.73481815,
        Purpose.DROPOUT: 0.92297405,
        Purpose.ASKING: 0.47758797,
        Purpose.SERVER_NOISE: 0.89273427,
        Purpose.CLIENT_NOISE: 0.64071003,
        Purpose.CLIENT_NOISE_SUM: 0.97405391,
        Purpose.SCORE_NOISE: 0.27219797,
        Purpose.STEP_NOISE: 0.43484891,
        Purpose.AUGMENTATION: 0.02492210,
        Purpose.GROUP: 0.72090985,
        Purpose.GRAPH: 0.49989719,
        Purpose.WALK: 0.71637712,
    }
    assert known.keys() == set(Purpose)
    for purpose, number in known.items():
        assert SeededStreams(5).source(purpose, 2, 3).uniform(1)[0] == pytest.approx(number, abs=1e-8)


def test_the_statistics_reject_laws_that_are_a_little_wrong() -> None:
    samples = SeededStreams(2).source(Purpose.DATA).rng.standard_normal(SAMPLES)
    assert accepts_variance(samples, 1.0)
    assert accepts_law(samples, stats.norm.cdf)
    for scale in (0.95, 1.05):
        assert not accepts_variance(samples * scale, 1.0)
        assert not accepts_law(samples * scale, stats.norm.cdf)
    assert not accepts_law(samples + 0.02, stats.norm.cdf)
    assert not accepts_law(np.random.default_rng(1).uniform(-(3**0.5), 3**0.5, SAMPLES), stats.norm.cdf)


@every_kind
def test_uniform_numbers_are_uniform_from_zero_up_to_but_not_including_one(streams: Streams) -> None:
    samples = streams.source(Purpose.COHORT, 1).uniform(SAMPLES)
    assert samples.min() >= 0.0
    assert samples.max() < 1.0
    assert accepts_law(samples, stats.uniform.cdf)
    assert not accepts_law(samples**1.05, stats.uniform.cdf)
    # The low bits are random as well: 2**40 u modulo 1 is uniform.
    assert accepts_law((samples * 2.0**40) % 1.0, stats.uniform.cdf)
    assert not correlated(samples[:-1], samples[1:])


@every_kind
@pytest.mark.parametrize(("population", "size"), [(1, 0), (1, 1), (7, 7), (1000, 999), (10**6, 1000), (10**12, 50)])
def test_a_subset_is_ascending_and_of_distinct_members(streams: Streams, population: int, size: int) -> None:
    found = streams.source(Purpose.COHORT, 1).subset(population, size)
    assert len(found) == size
    assert (np.diff(found) > 0).all()
    assert all(0 <= member < population for member in found.tolist())


@every_kind
@pytest.mark.parametrize(("population", "size"), [(5, 2), (6, 3), (7, 1)])
def test_every_subset_is_equally_likely(streams: Streams, population: int, size: int) -> None:
    source = streams.source(Purpose.COHORT, 4)
    subsets = dict.fromkeys(itertools.combinations(range(population), size), 0)
    for _ in range(8000):
        subsets[tuple(source.subset(population, size).tolist())] += 1
    assert stats.chisquare(list(subsets.values())).pvalue > FALSE_ALARM


@every_kind
def test_a_small_subset_of_a_huge_population_costs_what_the_subset_costs(streams: Streams) -> None:
    source = streams.source(Purpose.COHORT, 1)
    members = source.subset(10**12, 1000)
    assert sys.getsizeof(members) < 100_000
    assert accepts_law(members / 1e12, stats.uniform.cdf)


@brief
@given(address=addresses, start=st.integers(0, 9), size=st.integers(0, 40))
def test_words_in_c_are_those_of_numpy(address: tuple[int, Purpose, int, int], start: int, size: int) -> None:
    for seed in (address[0], 2**255 + address[0]):
        source = SeededStreams(seed).source(*address[1:])
        source.words(start)
        found = source.words(size)
        again = SeededStreams(seed).source(*address[1:])
        again.uniform(0)  # from here on, numpy makes the words
        assert np.array_equal(found, again.words(start + size)[start:])
        assert np.array_equal(source.rng.bit_generator.random_raw(3), again.words(3))


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="non-negative"):
        SeededStreams(-1).source(Purpose.MODEL).words(1)


@pytest.mark.parametrize(("right", "wrong"), [("round < 10", "round < 9"), ("position % 4; i", "0; i")])
def test_c_that_contradicts_numpy_makes_no_words(
    right: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    text = philox._SOURCE.read_text()
    assert right in text
    faulty = tmp_path / "philox.c"
    faulty.write_text(text.replace(right, wrong))
    monkeypatch.setattr(philox, "_SOURCE", faulty)
    philox.philox_in_c.cache_clear()
    assert philox.philox_in_c() is None
    philox.philox_in_c.cache_clear()

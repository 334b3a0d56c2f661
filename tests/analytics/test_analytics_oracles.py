"""Frequency oracles: epsilon, probabilities and variances of the sampler itself, by exact enumeration."""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from decimal import Context, Decimal
from fractions import Fraction

import numpy as np
import pytest

from fedpriv.analytics.heavy import OLH, ORACLES, OUE, KRandomizedResponse, Oracle
from fedpriv.errors import UserError
from fedpriv.mechanisms.coins import WORDS, exp_below, tosses, uniform_below
from fedpriv.streams import Purpose, SeededStreams

EPSILONS = (0.3, 1.0, 3.0)
SMALL = [(kind, size) for kind in ORACLES for size in (2, 4)]

# Words with the same consequences, by one of them, with their exact share of all words.
Classes = Sequence[tuple[int, Fraction]]


class Script:
    """Words that a test chose."""

    def __init__(self, words: Sequence[int]) -> None:
        self._words, self.position = list(words), 0

    def words(self, size: int) -> np.ndarray:
        given = self._words[self.position : self.position + size]
        assert len(given) == size
        self.position += size
        return np.array(given, dtype=np.uint64)

    def more(self, position: int, number: int) -> int:
        raise AssertionError


def coin(threshold: int) -> Classes:
    """Words of a coin: on both sides of its threshold, as near as can be."""
    return [(threshold - 1, Fraction(threshold, WORDS)), (threshold, Fraction(WORDS - threshold, WORDS))]


def choice(number: int) -> Classes:
    """Words of a uniform choice; those that are drawn again leave all choices equally likely."""
    return [(word, Fraction(1, number)) for word in range(number)]


def threshold(probability: Fraction) -> int:
    scaled = probability * WORDS
    assert scaled.denominator == 1  # an exact coin
    return scaled.numerator


def words_of(oracle: Oracle, value: int) -> Iterator[tuple[list[int], Fraction]]:
    """All words that one report draws, up to those with the same consequences."""
    if isinstance(oracle, OUE):
        others, own = coin(threshold(oracle.support.other)), coin(threshold(oracle.support.own))
        parts: list[Classes] = [*(choice(1) if place == value else others for place in range(oracle.size)), own]
    elif isinstance(oracle, OLH):
        keys: list[Classes] = [[(2**63 + 12345, Fraction(1))], [(977, Fraction(1))]]
        parts = [*keys, coin(threshold(oracle.support.own)), choice(oracle.hashes - 1)]
    else:
        parts = [coin(threshold(oracle.support.own)), choice(oracle.size - 1)]
    for drawn in itertools.product(*parts):
        yield [word for word, _ in drawn], math.prod((share for _, share in drawn), start=Fraction(1))


def law(oracle: Oracle, value: int) -> dict[bytes, Fraction]:
    """The exact probabilities of a report, by running the sampler on every outcome of its coins."""
    found: dict[bytes, Fraction] = defaultdict(Fraction)
    for words, share in words_of(oracle, value):
        found[oracle.reports(np.array([value]), Script(words)).tobytes()] += share
    assert sum(found.values()) == 1
    return found


@pytest.mark.parametrize(("kind", "size"), SMALL)
@pytest.mark.parametrize("epsilon", EPSILONS)
def test_no_report_is_likelier_by_more_than_e_to_epsilon_and_one_is_by_that(
    kind: str, size: int, epsilon: float
) -> None:
    oracle = ORACLES[kind](epsilon=epsilon, size=size)
    laws = [law(oracle, value) for value in range(size)]
    ratios = [ours[report] / theirs[report] for ours, theirs in itertools.permutations(laws, 2) for report in ours]
    exact = Context(prec=60).exp(Decimal(epsilon))
    assert max(ratios) <= Fraction(exact)
    if kind != "olh" or len({tuple(law) for law in laws}) > 1 or max(ratios) > 1:
        assert float(max(ratios)) == pytest.approx(math.exp(epsilon), rel=1e-12)


@pytest.mark.parametrize(("kind", "size"), [one for one in SMALL if one[0] != "olh"])
@pytest.mark.parametrize("epsilon", EPSILONS)
def test_estimates_have_exactly_the_stated_mean_and_variance(kind: str, size: int, epsilon: float) -> None:
    """Of three users, two of whom have the value 0: over all their reports."""
    oracle = ORACLES[kind](epsilon=epsilon, size=size)
    values = (0, 0, 1)
    mean = variance = 0.0
    for value in values:  # reports are independent, and estimates are means over users
        outcomes = [
            (oracle.supports(_read(oracle, report))[0], float(share)) for report, share in law(oracle, value).items()
        ]
        single = [(float(oracle.support.shares(np.array([hit]), 1)[0]), share) for hit, share in outcomes]
        first = math.fsum(share * estimate for estimate, share in single)
        mean += first / len(values)
        variance += math.fsum(share * (estimate - first) ** 2 for estimate, share in single) / len(values) ** 2
    assert mean == pytest.approx(2.0 / 3.0, abs=1e-12)
    assert oracle.support.variance(2.0 / 3.0, len(values)) == pytest.approx(variance, rel=1e-9)


def _read(oracle: Oracle, report: bytes) -> np.ndarray:
    if isinstance(oracle, OUE):
        return np.frombuffer(report, dtype=bool).reshape(1, -1)
    return np.frombuffer(report, dtype=np.int64)


@pytest.mark.parametrize("kind", ORACLES)
def test_the_closed_form_of_the_variance_is_that_of_simulated_reports(kind: str) -> None:
    users, runs, size = 300, 400, 6
    oracle = ORACLES[kind](epsilon=1.5, size=size)
    values = np.repeat([0, 1], [users // 3, users - users // 3])
    source = SeededStreams(3).source(Purpose.CLIENT_NOISE)
    found = [oracle.support.shares(oracle.supports(oracle.reports(values, source)), users) for _ in range(runs)]
    for value, share in ((0, 1.0 / 3.0), (1, 2.0 / 3.0), (5, 0.0)):
        column = np.array(found)[:, value]
        stated = oracle.support.variance(share, users)
        assert abs(column.mean() - share) < 4.0 * math.sqrt(stated / runs)
        assert abs(column.var(ddof=1) / stated - 1.0) < 4.0 * math.sqrt(2.0 / runs)


def test_probabilities_are_those_of_the_papers_formulas() -> None:
    e = math.exp(2.0)
    assert list(map(float, KRandomizedResponse(epsilon=2.0, size=5).support)) == pytest.approx(
        [e / (e + 4), 1 / (e + 4)]
    )
    assert list(map(float, OUE(epsilon=2.0, size=5).support)) == pytest.approx([0.5, 1 / (e + 1)])
    assert OLH(epsilon=2.0, size=5).hashes == 8
    assert list(map(float, OLH(epsilon=2.0, size=5).support)) == pytest.approx([e / (e + 7), 1 / 8])
    # Wang et al. 2017, of rare values: 4 e^eps / (n (e^eps - 1)^2) for OUE, and about that for OLH.
    assert OUE(epsilon=2.0, size=5).support.variance(0.0, 10) == pytest.approx(4 * e / (10 * (e - 1) ** 2))
    assert OLH(epsilon=2.0, size=5).support.variance(0.0, 10) == pytest.approx(4 * e / (10 * (e - 1) ** 2), rel=0.02)


def test_hashes_of_two_values_agree_as_often_as_independent_ones() -> None:
    oracle, source = OLH(epsilon=1.0, size=9), SeededStreams(5).source(Purpose.CLIENT_NOISE)
    keys = source.words(40_000).reshape(-1, 2)
    hashed = oracle._hashed(keys, np.arange(9)[None, :])
    for a, b in ((0, 1), (3, 8), (7, 8)):
        pairs = np.bincount(hashed[:, a] * oracle.hashes + hashed[:, b], minlength=oracle.hashes**2) / len(keys)
        assert np.abs(pairs * oracle.hashes**2 - 1.0).max() < 5.0 * oracle.hashes / math.sqrt(len(keys))


def test_coins_and_choices_are_exact() -> None:
    assert tosses(Script([4, 5, 6]), 5, 3).tolist() == [True, False, False]
    last = WORDS - WORDS % 7  # the first word that is drawn again
    assert uniform_below(Script([last, 8, WORDS - 1, last - 1, last, 3]), 7, 3).tolist() == [6, 1, 3]
    with pytest.raises(ValueError, match="probability 0"):
        tosses(Script([1]), 0, 1)
    for epsilon in (1e-6, 0.1, 3.0, 30.0):
        exact = Fraction(Context(prec=120).exp(Decimal(epsilon)))
        assert exact * (1 - Fraction(1, 10**70)) < exp_below(epsilon) < exact


@pytest.mark.parametrize("epsilon", [0.0, -1.0, 31.0, math.nan])
def test_epsilons_without_exact_coins_are_refused(epsilon: float) -> None:
    with pytest.raises(UserError, match=r"privacy\.epsilon: expected from 1e-6 to 30"):
        OUE(epsilon=epsilon, size=3)


@pytest.mark.parametrize("kind", ORACLES)
def test_the_largest_and_the_smallest_epsilon_have_coins(kind: str) -> None:
    for epsilon in (1e-6, 30.0):
        oracle = ORACLES[kind](epsilon=epsilon, size=3)
        reports = oracle.reports(np.array([0, 1, 2]), SeededStreams(1).source(Purpose.CLIENT_NOISE))
        assert oracle.supports(reports).shape == (3,)
        assert oracle.support.own > oracle.support.other

"""Plans with correlated noise, and with clients that take turns: their charge against brute force, their refusals."""

import json
import math
from dataclasses import replace
from itertools import product
from typing import Any

import dp_accounting as dpa
import numpy as np
import pytest
from scipy import stats
from support.helpers import FALSE_ALARM

from fedpriv.errors import UserError
from fedpriv.mechanisms.coefficients import optimal_coefficients, workload
from fedpriv.mechanisms.correlated import SLACK, Correlated, row_norms
from fedpriv.mechanisms.noise import Gaussian
from fedpriv.privacy import Everyone, NoiseChoice, Poisson, PrivacyPlan, Separated, correlated, make_plan, read_plan
from fedpriv.privacy.accounting import GAUSSIAN
from fedpriv.privacy.correlation import Banded, FadingNoise, NoiseMatrix
from fedpriv.privacy.gaussian import gaussian_epsilon
from fedpriv.streams import SeededStreams

DELTA = 1e-5
GROUPS, COINS = Separated(1000, 4), Separated(1000, 4, 0.05)


def banded(rounds: int = 18, bands: int = 4, *, hidden: bool = False, damping: float = 0.0) -> Banded:
    c = optimal_coefficients(damping, rounds, bands, bands)
    return Banded(coefficients=c, rounds=rounds, damping=damping, hidden=hidden)


def plan(noise: NoiseMatrix | None, sampling: Any = GROUPS, **change: Any) -> PrivacyPlan:
    given: dict[str, Any] = {"trust": "central", "sampling": sampling, "rounds": 18, "delta": DELTA, "l2_bound": 0.5}
    made = make_plan(**{**given, "noise_multiplier": 3.0, **change})
    return made if noise is None else correlated(made, noise, change.get("epsilon"))


# Clients that take turns


def taken(sampling: Separated, rounds: int, seed: int = 3) -> np.ndarray:
    table = np.zeros((rounds, sampling.population), dtype=bool)
    for row in range(rounds):
        cohort = sampling.drawn(SeededStreams(seed), row + 1)
        assert (np.diff(cohort) > 0).all()
        assert cohort.dtype == np.int64
        table[row, cohort] = True
    return table


def test_every_client_has_its_turn_in_every_b_th_round_and_all_of_a_group_take_part() -> None:
    table = taken(Separated(300, 7), 21)
    assert (table[:7].sum(axis=0) == 1).all()
    assert np.array_equal(table[:7], table[7:14])
    sizes = table[:7].sum(axis=1)
    assert sizes.std() > 0.0
    assert abs(sizes - 300 / 7).max() < 6.0 * math.sqrt(300 / 7)
    assert not np.array_equal(table[:7], taken(Separated(300, 7), 7, seed=4))
    assert taken(Separated(5, 1), 2).all()


def test_one_client_more_moves_no_other() -> None:
    assert np.array_equal(taken(Separated(300, 7), 7), taken(Separated(301, 7), 7)[:, :300])


def test_coins_within_groups_are_independent_and_have_the_charged_probability() -> None:
    sampling, rounds = Separated(400, 4, 0.1), 4000
    table, turns = taken(sampling, rounds), np.resize(taken(Separated(400, 4), 4), (rounds, 400))
    assert not (table & ~turns).any()
    assert sampling.hiding_prob == 0.4
    assert sampling.expected_size == 40.0
    assert stats.binomtest(int(table.sum()), int(turns.sum()), 0.4).pvalue > FALSE_ALARM
    again = table[4:] & table[:-4]
    assert stats.binomtest(int(again.sum()), int(turns[4:].sum()), 0.16).pvalue > FALSE_ALARM
    assert stats.binomtest(int(table[:, ::2].sum()), int(turns[:, ::2].sum()), 0.41).pvalue < FALSE_ALARM


@pytest.mark.parametrize(
    ("key", "make"),
    [
        ("cohort.min_separation", lambda: Separated(9, 0)),
        ("cohort.min_separation", lambda: Separated(9, 2.0)),  # type: ignore[arg-type]
        ("cohort.min_separation", lambda: Separated(9, 10**7)),
        ("cohort.probability", lambda: Separated(9, 4, 0.26)),
        ("cohort.probability", lambda: Separated(9, 4, 0.0)),
        ("data.clients", lambda: Separated(0, 4)),
    ],
)
def test_groups_that_cannot_be_are_refused(key: str, make: Any) -> None:
    with pytest.raises(UserError, match=key):
        make()


def test_a_cohort_of_groups_depends_on_the_round() -> None:
    with pytest.raises(ValueError, match="number of the round"):
        GROUPS.cohort(SeededStreams(0).source(2))  # type: ignore[arg-type]


def test_clients_that_take_turns_pay_for_their_turns() -> None:
    fixed = plan(None, GROUPS)
    for rounds, turns in ((0, 0), (1, 1), (4, 1), (5, 2), (18, 5)):
        assert fixed.epsilon_after(rounds) == pytest.approx(gaussian_epsilon(math.sqrt(turns) / 3.0, DELTA), rel=1e-9)
    assert fixed.mu_after(18) == pytest.approx(math.sqrt(5) / 3.0)
    coins = plan(None, COINS)
    same = plan(None, Poisson(1000, 0.2), rounds=5)
    assert coins.epsilon == pytest.approx(same.epsilon, rel=1e-3)
    assert coins.epsilon < fixed.epsilon
    assert coins.amplification
    assert not fixed.amplification
    assert "every 4th round" in GROUPS.how


# Correlated noise


@pytest.mark.parametrize("adjacency", ["add-or-remove", "replace"])
def test_fixed_groups_cost_one_gaussian_of_all_of_a_clients_messages(adjacency: str) -> None:
    noise = banded()
    made = plan(noise, adjacency=adjacency)
    one = sum(c * c for c in noise.coefficients)
    last = sum(c * c for c in noise.coefficients[:2])  # the fifth turn is in round 17, of 18
    squared = (4 * one + last) * (1.0 + SLACK) ** 2
    assert made.epsilon == pytest.approx(gaussian_epsilon(math.sqrt(squared) / 3.0, DELTA), rel=1e-12)
    assert made.gaussian_dp_mu == pytest.approx(math.sqrt(squared) / 3.0, rel=1e-12)
    assert made.accountant == GAUSSIAN
    assert made.noise_stddev == 3.0 * 0.5 * (2.0 if adjacency == "replace" else 1.0)
    spent = [made.epsilon_after(k) for k in range(19)]
    assert spent == sorted(spent)
    assert spent[0] == 0.0
    assert made.epsilon > plan(None, adjacency=adjacency).epsilon
    assert replace(made, adjacency="replace", noise_multiplier=1.5).epsilon == made.under_replace().epsilon or (
        adjacency == "replace"
    )


@pytest.mark.parametrize("hidden", [False, True])
def test_noise_is_calibrated_to_its_target(hidden: bool) -> None:
    made = plan(banded(hidden=hidden), COINS if hidden else GROUPS, epsilon=3.0, noise_multiplier=None)
    assert 2.97 <= made.epsilon <= 3.0
    assert made.amplification == hidden


def test_coins_cost_a_poisson_round_for_each_turn_with_the_norm_of_a_column() -> None:
    noise = banded(hidden=True)
    made = plan(noise, COINS)
    column = math.sqrt(sum(c * c for c in noise.coefficients)) * (1.0 + SLACK)
    same = plan(None, Poisson(1000, 0.2), rounds=5, noise_multiplier=3.0 / column)
    assert made.epsilon == pytest.approx(same.epsilon, rel=1e-3)
    assert made.epsilon < plan(replace(noise, hidden=False), COINS).epsilon
    assert made.mu_after(18) is None
    event, _ = made.releases.event(3.0)
    assert event.event.noise_multiplier == pytest.approx(3.0 / column)  # type: ignore[attr-defined]
    assert event.sampling_probability == 0.2  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("damping", "sampling", "kind", "error"),
    [
        (0.0, Separated(1000, 20), "banded", 6.20),
        (0.0, Separated(1000, 5, 0.05), "cyclic-banded", 5.63),
        (0.1, Separated(1000, 20), "banded", 3.50),
        (0.1, Separated(1000, 5, 0.05), "cyclic-banded", 2.37),
        (0.1, Poisson(1000, 0.05), "independent", 2.11),
    ],
)
def test_the_error_of_a_memory_at_equal_epsilon_is_that_of_another_implementation(
    damping: float, sampling: Any, kind: Any, error: float
) -> None:
    """100 rounds, epsilon 4, root mean square over the rounds; a prototype with dp-accounting."""
    noise = NoiseChoice(kind=kind).of(sampling, 100, damping)
    made = plan(noise, sampling, rounds=100, l2_bound=1.0, epsilon=4.0, noise_multiplier=None)
    coefficients = noise.coefficients if isinstance(noise, Banded) else (1.0,)
    rows = row_norms(coefficients, workload(damping, 100))
    assert made.noise_stddev * math.sqrt(np.square(rows).mean()) == pytest.approx(error, rel=5e-3)


@pytest.mark.parametrize("adjacency", ["add-or-remove", "replace"])
def test_coins_cost_what_dp_accounting_says_of_windows(adjacency: str) -> None:
    made = plan(banded(hidden=True), COINS, adjacency=adjacency, noise_multiplier=2.0)
    event, relation = made.releases.event(2.0)
    accountant = dpa.pld.PLDAccountant(relation, value_discretization_interval=1e-3)
    theirs = accountant.compose(dpa.SelfComposedDpEvent(event, 5)).get_epsilon(DELTA)
    assert made.epsilon == pytest.approx(theirs, rel=0.01)
    assert made.epsilon_after(4) < made.epsilon_after(5) <= made.epsilon_after(8) < made.epsilon_after(9)


def hockey_stick(
    noise: Banded, sigma: float, epsilon: float, turns: tuple[int, ...], coin: float, message: Any
) -> float:
    """Return the largest delta, in both orders, of a client with these turns against its absence, by integration.

    The message in a turn may depend on the client's earlier coins: `message(turn, coins)` is 1 or -1.
    """
    rounds = noise.rounds
    padded = (*noise.coefficients, *(0.0,) * rounds)
    columns = np.stack([np.concatenate([np.zeros(t), padded])[:rounds] for t in turns], axis=1) / sigma
    basis, span = np.linalg.qr(columns)
    assert basis.shape == (rounds, len(turns))
    axis = np.linspace(-9.0, 9.0, 601)
    points = np.stack(np.meshgrid(*[axis] * len(turns), indexing="ij"), axis=-1).reshape(-1, len(turns))
    cell = (axis[1] - axis[0]) ** len(turns)

    def density(mean: np.ndarray) -> np.ndarray:
        squares = np.square(points - mean).sum(axis=1)
        return np.exp(-0.5 * squares) / (2.0 * math.pi) ** (len(turns) / 2)

    with_client = np.zeros(len(points))
    for coins in product((0, 1), repeat=len(turns)):
        weight = math.prod(coin if one else 1.0 - coin for one in coins)
        sent = np.array([one * message(turn, coins[:turn]) for turn, one in enumerate(coins)])
        with_client += weight * density(span @ sent)
    without = density(np.zeros(len(turns)))
    pairs = ((with_client, without), (without, with_client))
    return max(float(np.maximum(p - math.exp(epsilon) * q, 0.0).sum() * cell) for p, q in pairs)


MESSAGES = {
    "always the same": lambda turn, coins: 1.0,  # noqa: ARG005
    "alternating": lambda turn, coins: (-1.0) ** turn,  # noqa: ARG005
    "the other way after a turn": lambda turn, coins: -1.0 if sum(coins) % 2 else 1.0,  # noqa: ARG005
}


@pytest.mark.parametrize("message", MESSAGES)
def test_no_client_with_a_hidden_memory_beats_the_charge_of_windows(message: str) -> None:
    """K = 4, b = 2, bands 2, a coin of 1/2; delta .03, so that the grid of integration suffices."""
    noise = Banded(coefficients=(1.0, 0.8), rounds=4, hidden=True)
    made = plan(noise, Separated(10, 2, 0.25), rounds=4, delta=0.03, l2_bound=1.0, noise_multiplier=1.2)
    found = hockey_stick(noise, 1.2, made.epsilon, (0, 2), 0.5, MESSAGES[message])
    assert found <= 0.03
    assert found >= (0.0295 if message == "always the same" else 0.02)


def test_more_bands_than_the_rounds_between_turns_would_break_the_charge_and_are_refused() -> None:
    noise = Banded(coefficients=(1.0, 0.9, 0.8), rounds=4, hidden=True)
    with pytest.raises(UserError, match=r"noise\.bands: expected at most 2"):
        plan(noise, Separated(10, 2, 0.25), rounds=4)
    column = math.sqrt(1.0 + 0.81 + 0.64)
    claimed = plan(None, Poisson(10, 0.5), rounds=2, delta=0.03, noise_multiplier=1.2 / column).epsilon
    assert hockey_stick(noise, 1.2, claimed, (0, 2), 0.5, MESSAGES["always the same"]) > 1.5 * 0.03


def test_the_geometric_schedule_costs_one_gaussian_of_the_sum_of_squares() -> None:
    made = plan(FadingNoise(damping=0.2, rounds=18), Everyone(50))
    for rounds in (1, 7, 18):
        squared = sum(0.8 ** (18 - k) for k in range(1, rounds + 1))
        assert made.epsilon_after(rounds) == pytest.approx(gaussian_epsilon(math.sqrt(squared) / 3.0, DELTA), rel=1e-9)
    for sampling in (Poisson(50, 0.5), GROUPS):
        with pytest.raises(UserError, match=r'cohort\.sampling: expected "everyone"'):
            plan(FadingNoise(damping=0.2, rounds=18), sampling)


EVERY: list[tuple[NoiseMatrix, Any]] = [
    (banded(), GROUPS),
    (banded(hidden=True), COINS),
    (FadingNoise(damping=0.1, rounds=18), Everyone(50)),
]


@pytest.mark.parametrize(("noise", "sampling"), EVERY)
def test_a_record_is_read_back_as_the_same_plan(noise: NoiseMatrix, sampling: Any) -> None:
    made = plan(noise, sampling)
    table = json.loads(json.dumps(made.as_dict()))
    assert read_plan(table, "privacy.json") == made
    assert table["noise"]["rounds"] == 18
    with pytest.raises(UserError, match="the record of a privacy plan"):
        read_plan({**table, "noise": {**table["noise"], "kind": "pink"}}, "privacy.json")
    promised = {promise["adjacency"]: promise["epsilon"] for promise in made.promises()}
    assert promised["replace"] > promised["add-or-remove"] == made.epsilon


@pytest.mark.parametrize(("noise", "sampling"), EVERY)
def test_correlated_noise_is_refused_where_it_is_not_offered(noise: NoiseMatrix, sampling: Any) -> None:
    with pytest.raises(UserError, match=r'\[noise\]: expected no such value with privacy\.trust = "local"'):
        plan(noise, sampling, trust="local") if sampling.separation == 1 else plan(noise, Everyone(9), trust="local")
    with pytest.raises(UserError, match=r"training\.rounds: expected at most 18"):
        plan(noise, sampling, rounds=19)


def test_with_local_trust_each_turn_is_charged_without_amplification() -> None:
    made = plan(None, GROUPS, trust="local")
    assert made.releases.charged(made.rounds) == math.ceil(made.rounds / GROUPS.separation)
    assert not made.amplification


def test_coefficients_that_the_charge_does_not_cover_are_refused() -> None:
    for c in ((), (0.9,), (1.0, -0.1), (1.0, 0.2, 0.3)):
        with pytest.raises(ValueError, match="begin with 1"):
            Banded(coefficients=c, rounds=9)


def test_the_mechanism_follows_from_the_plan() -> None:
    assert banded(bands=1).mechanism(2.0, 1.0, 9) == Gaussian(2.0)
    made = banded().mechanism(2.0, 0.5, 9)
    assert isinstance(made, Correlated)
    assert (made.stddev, made.coefficients, made.rounds, made.bound) == (2.0, banded().coefficients, 18, 0.5)


def test_one_band_costs_what_independent_noise_does() -> None:
    assert plan(banded(bands=1)).epsilon == plan(None).epsilon


# The table [noise]


def test_the_workload_is_the_methods_and_bands_are_the_turns_by_default() -> None:
    found = NoiseChoice(kind="banded").of(GROUPS, 18, 0.3)
    assert found == Banded(coefficients=optimal_coefficients(0.3, 18, 4, 4), rounds=18, damping=0.3)
    few = NoiseChoice(kind="cyclic-banded", bands=2).of(COINS, 18, 0.0)
    assert few == Banded(coefficients=optimal_coefficients(0.0, 18, 2, 4), rounds=18, hidden=True)
    assert NoiseChoice(kind="independent").of(GROUPS, 18, 0.3) is None
    assert NoiseChoice(kind="banded").of(GROUPS, 2, 0.0) is not None
    assert NoiseChoice(kind="geometric-schedule").of(Everyone(9), 18, 0.3) == FadingNoise(damping=0.3, rounds=18)


@pytest.mark.parametrize(
    ("key", "words", "choice", "sampling", "damping"),
    [
        ("noise.kind", "a known name", {"kind": "band"}, GROUPS, 0.0),
        ("noise.bands", "no value", {"kind": "independent", "bands": 2}, GROUPS, 0.0),
        ("noise.bands", "no value", {"kind": "geometric-schedule", "bands": 2}, Everyone(9), 0.1),
        ("noise.bands", "whole number", {"kind": "banded", "bands": 0}, GROUPS, 0.0),
        ("noise.bands", "at most 4", {"kind": "banded", "bands": 5}, GROUPS, 0.0),
        ("noise.bands", "at most 4", {"kind": "cyclic-banded", "bands": 5}, COINS, 0.0),
        ("cohort.sampling", "1.225", {"kind": "banded"}, Everyone(9), 0.0),
        ("cohort.sampling", "1.225", {"kind": "cyclic-banded"}, Poisson(9, 0.1), 0.0),
        ("cohort.sampling", "1.225", {"kind": "banded"}, Separated(9, 1), 0.0),
        ("cohort.probability", "no value", {"kind": "banded"}, COINS, 0.0),
        ("cohort.probability", "below 1 / min_separation", {"kind": "cyclic-banded"}, GROUPS, 0.0),
        ("method.damping", "above 0", {"kind": "geometric-schedule"}, Everyone(9), 0.0),
        ("training.rounds", "at most", {"kind": "geometric-schedule"}, Everyone(9), 0.99),
        ("cohort.sampling", "everyone", {"kind": "geometric-schedule"}, Poisson(9, 0.5), 0.1),
    ],
)
def test_a_table_that_cannot_be_is_refused(
    key: str, words: str, choice: dict[str, Any], sampling: Any, damping: float
) -> None:
    with pytest.raises(UserError) as caught:
        NoiseChoice(**choice).of(sampling, 18, damping)
    assert str(caught.value).startswith(f"{key}: expected ")
    assert words in str(caught.value)


@pytest.mark.parametrize("c", [(), (0.5,), (1.0, 1.5), (1.0, -0.1), (1.0, math.nan), (1.0, math.nan, 0.5)])
def test_coefficients_without_a_proof_are_refused(c: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="never increase"):
        Banded(coefficients=c, rounds=4)

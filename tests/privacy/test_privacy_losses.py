"""Privacy losses of sampled rounds compared with integrals, exact mechanisms of few clients, and dp-accounting."""

import itertools
import math
from dataclasses import replace
from fractions import Fraction

import dp_accounting as dpa
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant, privacy_loss_distribution
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from scipy import stats
from support.helpers import brief

from fedpriv.privacy import Adjacency, FixedSize, Poisson, Sampling, trust_of
from fedpriv.privacy.accounting import Releases
from fedpriv.privacy.gaussian import exceeds_gaussian, gaussian_delta, gaussian_epsilon, gaussian_tradeoff
from fedpriv.privacy.losses import Composition, Half, Losses, losses_of_one_round

CUT, GRID = math.log(1e-40), 1.001
few = settings(brief, max_examples=10)
sides = {"gone": (1, 0, 0), "come": (0, 1, 0), "replaced": (1, -1, 0)}
in_its_place = {"gone": (1, 0, -1), "come": (0, 1, 1), "replaced": (1, -1, -1)}


def hockey_stick(first: np.ndarray, second: np.ndarray, epsilon: float, weight: float) -> float:
    return float(np.maximum(first - math.exp(epsilon) * second, 0.0).sum() * weight)


def spent(sampling: Sampling, noise: float, rounds: int, delta: float, adjacency: Adjacency = "add-or-remove") -> float:
    return hidden(sampling, adjacency, delta).epsilon(noise, rounds)


def hidden(sampling: Sampling, adjacency: Adjacency = "add-or-remove", delta: float = 1e-5) -> Releases:
    """Return releases of noised sums alone, of clients without memory."""
    trust = trust_of("central")
    return Releases(trust=trust, adjacency=adjacency, sampling=sampling, delta=delta, client_memory=False)


@pytest.mark.parametrize("sampling", [Poisson(1000, 0.2), FixedSize(1000, 200)])
@pytest.mark.parametrize("noise", [0.4, 1.0, 4.0])
def test_the_losses_above_zero_are_those_of_the_worst_pair_of_mixtures(sampling: Sampling, noise: float) -> None:
    """Integrate over the three messages of the lemma: the losses of one round, at every epsilon from 0."""
    grid = np.linspace(-3.0 - 12.0 * noise, 3.0 + 12.0 * noise, 200_001)
    places = sides if isinstance(sampling, Poisson) else in_its_place
    cases: list[tuple[str, Adjacency, int]] = [
        ("gone", "add-or-remove", 0),
        ("come", "add-or-remove", 1),
        ("replaced", "replace", 0),
    ]
    for name, adjacency, order in cases:
        present, other, absent = (stats.norm.pdf(grid, place, noise) for place in places[name])
        pair = hidden(sampling, adjacency).pairs[order]
        one = Composition([(losses_of_one_round(*pair, noise, CUT, 1e-3), 1)])
        for epsilon in (0.0, 0.05, 0.3, 1.0, 2.5):
            exact = hockey_stick(0.2 * present + 0.8 * absent, 0.2 * other + 0.8 * absent, epsilon, grid[1] - grid[0])
            assert exact * (1.0 - 1e-6) - 1e-12 <= one.delta(epsilon) <= exact * (1.0 + 1e-4) + 1e-12


@few
@given(
    angles=st.tuples(*[st.floats(0.0, 2.0 * math.pi)] * 3),
    lengths=st.tuples(*[st.floats(0.0, 1.0)] * 3),
    prob=st.floats(0.02, 0.9),
    noise=st.floats(0.4, 3.0),
    epsilon=st.floats(0.0, 3.0),
)
def test_no_three_messages_in_the_plane_beat_the_lemma(
    angles: tuple[float, ...], lengths: tuple[float, ...], prob: float, noise: float, epsilon: float
) -> None:
    a, b, c = (length * np.exp(1j * angle) for length, angle in zip(lengths, angles, strict=True))
    axis = np.linspace(-1.0 - 6.0 * noise, 1.0 + 6.0 * noise, 301)
    plane = axis[:, None] + 1j * axis[None, :]
    there, other, absent = (np.exp(-0.5 * np.abs((plane - place) / noise) ** 2) for place in (a, b, c))
    weight = (axis[1] - axis[0]) ** 2 / (2.0 * math.pi * noise**2)
    mixtures = (prob * there + (1 - prob) * absent, prob * other + (1 - prob) * absent)
    found = hockey_stick(*mixtures, epsilon, weight)
    half = Half(prob, 2.0, 2.0)
    assert found <= Composition([(losses_of_one_round(half, half, noise, CUT, 1e-3), 1)]).delta(epsilon) + 1e-6
    if b == 0.0:
        half = Half(prob, 2.0, 1.0)
        gone = losses_of_one_round(half, Half(prob, 1.0, 1.0), noise, CUT, 1e-3)
        assert found <= Composition([(gone, 1)]).delta(epsilon) + 1e-6


def cohort_law(grid: np.ndarray, messages: tuple[float, ...], size: int, noise: float) -> np.ndarray:
    """Return the density of a round's noised sum, over all cohorts of `size` of the clients."""
    sums = [math.fsum(cohort) for cohort in itertools.combinations(messages, size)]
    return np.mean([stats.norm.pdf(grid, one, noise) for one in sums], axis=0)


@pytest.mark.parametrize(("adjacency", "neighbors"), [("replace", (1.0, -1.0)), ("add-or-remove", (1.0, 0.0))])
@pytest.mark.parametrize(("clients", "size", "noise"), [(4, 2, 1.0), (3, 1, 0.6), (4, 3, 2.0)])
def test_no_two_rounds_of_a_fixed_size_beat_the_account_which_is_within_a_tenth_of_the_best(
    adjacency: Adjacency, neighbors: tuple[float, float], clients: int, size: int, noise: float
) -> None:
    """Two rounds of the true mechanism of few clients; the adversary picks the others' messages, given round 1."""
    grid = np.linspace(-size - 7.0 * noise, size + 7.0 * noise, 401)
    weight = grid[1] - grid[0]
    others = list(itertools.combinations_with_replacement((-1.0, 1.0), clients - 1))
    pairs = hidden(FixedSize(clients, size), adjacency).pairs
    for order, direction in enumerate(pairs):
        mine = neighbors if order == 0 else neighbors[::-1]
        both = [tuple(cohort_law(grid, (x, *rest), size, noise) for x in mine) for rest in others]
        account = Composition([(losses_of_one_round(*direction, noise, CUT, 2e-3), 2)])
        for epsilon in (0.0, 0.7, 2.0):
            best = 0.0
            for first, second in both:
                answers = [
                    np.maximum(np.outer(first, p) - math.exp(epsilon) * np.outer(second, q), 0.0).sum(axis=1)
                    for p, q in both
                ]
                best = max(best, float(np.max(answers, axis=0).sum()) * weight**2)
            assert best * (1.0 - 1e-6) <= account.delta(epsilon) <= 1.1 * best


def test_two_orders_of_neighbors_composed_each_with_itself_are_no_bound_for_a_fixed_size() -> None:
    """An adversary that reverses the others' messages after round 1 beats both; the account covers it."""
    clients, size, noise, epsilon = 4, 2, 1.0, 0.5
    grid = np.linspace(-9.0, 9.0, 401)
    weight = grid[1] - grid[0]
    laws = [
        tuple(cohort_law(grid, (x, *[rest] * (clients - 1)), size, noise) for x in (1.0, -1.0)) for rest in (-1.0, 1.0)
    ]

    def answers(first: np.ndarray, second: np.ndarray) -> list[np.ndarray]:
        """Return the result of each answer to each outcome of round 1."""
        return [
            np.maximum(np.outer(first, p) - math.exp(epsilon) * np.outer(second, q), 0.0).sum(axis=1) * weight**2
            for p, q in laws
        ]

    fixed = max(float(answers(*laws[i])[i].sum()) for i in (0, 1))
    turning = float(np.max(answers(*laws[0]), axis=0).sum())
    pair = hidden(FixedSize(clients, size), "replace").pairs[0]
    account = Composition([(losses_of_one_round(*pair, noise, CUT, 1e-3), 2)]).delta(epsilon)
    assert 1.02 * fixed < turning < account


@pytest.mark.parametrize(("rounds", "delta"), [(1, 1e-5), (40, 0.3), (10_000, 1e-12), (100_000, 1e-30), (300, 1e-100)])
@pytest.mark.parametrize("shift", [0.02, 1.0, 20.0])
def test_a_composed_gaussian_has_its_exact_epsilon_however_small_delta_is(
    rounds: int, delta: float, shift: float
) -> None:
    exact = gaussian_epsilon(shift, delta)
    half, noise = Half(1.0, 1.0, 1.0), math.sqrt(rounds) / shift
    cut, order = math.log(delta) - math.log(1e6 * rounds), 1.0 + math.sqrt(-2.0 * math.log(delta)) / shift
    losses = losses_of_one_round(half, half, noise, cut, 0.03 * math.sqrt(max(exact, 0.01) / (rounds * order)))
    assert exact * (1.0 - 1e-9) <= Composition([(losses, rounds)]).epsilon(delta) <= 1.001 * exact + 1e-12


def test_losses_that_count_as_infinite_are_charged_in_every_round() -> None:
    coin = Losses(0.5, -1, np.array([0.3, 0.0, 0.6]), 0.1)
    two = Composition([(coin, 2)])
    assert two.delta(5.0) == pytest.approx(1.0 - 0.9**2, rel=1e-9)
    assert two.delta(0.0) == pytest.approx(0.19 + 0.36 * (1.0 - math.exp(-1.0)), rel=1e-9)
    assert two.epsilon(0.18) == math.inf
    assert two.epsilon(0.2) < 1.0


def test_rounds_of_different_kinds_compose_as_dp_accounting_has_it() -> None:
    parts = [(0.02, 1.0, 50), (0.3, 4.0, 20), (1.0, 9.0, 5)]
    ours, theirs = [], PLDAccountant(dpa.NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=5e-4)
    for prob, noise, count in parts:
        gone, come = Half(prob, 1.0, 1.0), Half(prob, 0.0 if prob < 1.0 else 1.0, 1.0)
        ours.append((losses_of_one_round(gone, come, noise, CUT, 5e-4), count))
        event = dpa.GaussianDpEvent(noise)
        theirs.compose(event if prob == 1.0 else dpa.PoissonSampledDpEvent(prob, event), count)
    for delta in (1e-3, 1e-6):
        assert Composition(ours).epsilon(delta) == pytest.approx(theirs.get_epsilon(delta), rel=1e-4)


SAMPLED = {"poisson": Poisson(10**6, 1e-3), "fixed": FixedSize(10**6, 10**3)}
ADJACENCIES: tuple[Adjacency, ...] = ("add-or-remove", "replace")


def test_epsilons_of_many_rounds_share_transforms_and_stay_the_same() -> None:
    """All numbers of rounds from one object of losses, and each from as many separate ones, which share nothing."""
    pair, delta, numbers = hidden(Poisson(1000, 0.05)).pairs[0], 1e-5, (1, 15, 16, 33)
    shared = losses_of_one_round(*pair, 1.1, CUT, 2.0**-8)
    for rounds in numbers:
        alone = Composition([(losses_of_one_round(*pair, 1.1, CUT, 2.0**-8), 1) for _ in range(rounds)])
        assert Composition([(shared, rounds)]).epsilon(delta) == pytest.approx(alone.epsilon(delta), rel=1e-9)


def test_an_epsilon_exceeds_that_of_a_gaussian_where_a_search_finds_it() -> None:
    for shift, delta in ((0.3, 1e-5), (2.0, 1e-9), (900.0, 1e-5)):
        exact = gaussian_epsilon(shift, delta)
        assert exceeds_gaussian(exact * (1.0 + 1e-9), shift, delta)
        assert not exceeds_gaussian(exact * (1.0 - 1e-7), shift, delta)
        assert exceeds_gaussian(math.inf, shift, delta)
    assert exceeds_gaussian(0.0, 0.0, 1e-5)
    assert not exceeds_gaussian(math.inf, 1001.0, 1e-5)


def renyi(adjacency: Adjacency, sampling: Sampling, noise: float, rounds: int, delta: float) -> float:
    event, relation = hidden(sampling, adjacency).event(noise)
    orders = [1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 128]
    return float(dpa.rdp.RdpAccountant(orders, relation).compose(event, rounds).get_epsilon(delta))


@pytest.mark.parametrize(("adjacency", "name"), [("add-or-remove", "poisson"), ("replace", "fixed")])
def test_epsilon_is_below_that_of_renyi_divergence_for_every_delta(adjacency: Adjacency, name: str) -> None:
    for delta in (1e-5, 1e-10, 2.1e-12, 1e-12, 1e-18, 1e-30):
        ours = spent(SAMPLED[name], 1.0, 2000, delta, adjacency)
        assert ours <= renyi(adjacency, SAMPLED[name], 1.0, 2000, delta)


@pytest.mark.parametrize("adjacency", ADJACENCIES)
@pytest.mark.parametrize("name", SAMPLED)
def test_a_smaller_delta_costs_a_little_more_and_nowhere_falls_off_a_cliff(adjacency: Adjacency, name: str) -> None:
    """Deltas around rounds x 1e-15, at which amplification was once dropped, and far below."""
    deltas = 1e-10 * 0.5 ** np.arange(0, 40, 3.0)
    found = [spent(SAMPLED[name], 1.0, 2000, delta, adjacency) for delta in deltas]
    assert all(1.0 <= later / earlier <= 1.5 for earlier, later in itertools.pairwise(found))
    assert found[-1] < 10.0 * found[0]


def test_noise_for_a_target_does_not_jump_where_delta_is_small() -> None:
    deltas = (3e-12, 2.1e-12, 1e-12, 1e-18)
    noises = [hidden(SAMPLED["poisson"], delta=delta).calibrate(2.0, rounds=2000) for delta in deltas]
    assert all(later / earlier >= 1.0 for earlier, later in itertools.pairwise(noises))
    assert noises[2] < 1.05 * noises[0]
    assert noises[3] < 1.4 * noises[0]


@few
@given(
    kind=st.sampled_from(["poisson", "fixed"]),
    adjacency=st.sampled_from(ADJACENCIES),
    prob=st.floats(-4.0, -0.1).map(lambda x: 10.0**x),
    noise=st.floats(-0.3, 1.5).map(lambda x: 10.0**x),
    rounds=st.floats(0.0, 3.7).map(lambda x: int(10.0**x)),
    delta=st.floats(-30.0, -1.0).map(lambda x: 10.0**x),
    factor=st.floats(-3.0, 0.3).map(lambda x: 1.0 + 10.0**x),
)
@example("poisson", "add-or-remove", 1e-3, 1.0, 2000, 2.0e-12, 1.05)
@example("poisson", "replace", 3.8e-4, 2.0, 10_000, 0.99e-11, 1.03)
@example("fixed", "add-or-remove", 1e-3, 1.0, 2000, 1e-18, 1.5)
def test_epsilon_never_wavers_as_delta_noise_and_rounds_change(
    kind: str, adjacency: Adjacency, prob: float, noise: float, rounds: int, delta: float, factor: float
) -> None:
    population = 10**6
    sampling = Poisson(population, prob) if kind == "poisson" else FixedSize(population, int(population * prob))
    base = spent(sampling, noise, rounds, delta, adjacency)
    assert spent(sampling, noise, rounds, min(0.5, factor * delta), adjacency) <= GRID * base
    assert spent(sampling, factor * noise, rounds, delta, adjacency) <= GRID * base
    assert base <= GRID * spent(sampling, noise, max(rounds + 1, int(factor * rounds)), delta, adjacency)


@settings(few, max_examples=4)
@given(
    adjacency=st.sampled_from(ADJACENCIES),
    name=st.sampled_from(list(SAMPLED)),
    rounds=st.integers(1, 3000),
    delta=st.floats(-25.0, -5.0).map(lambda x: 10.0**x),
    epsilon=st.floats(0.3, 10.0),
    factor=st.floats(-2.0, 0.3).map(lambda x: 1.0 + 10.0**x),
)
def test_calibrated_noise_never_wavers_as_delta_epsilon_and_rounds_change(
    adjacency: Adjacency, name: str, rounds: int, delta: float, epsilon: float, factor: float
) -> None:
    releases = hidden(SAMPLED[name], adjacency, delta)
    base = releases.calibrate(epsilon, rounds)
    assert replace(releases, delta=delta / factor).calibrate(epsilon, rounds) >= base / GRID
    assert releases.calibrate(epsilon * factor, rounds) <= base * GRID
    assert releases.calibrate(epsilon, int(rounds * factor) + 1) >= base / GRID


def test_a_sampling_probability_is_never_accounted_below_what_is_drawn() -> None:
    assert hidden(Poisson(1000, 0.01)).pairs[0][0].prob == 0.01
    for clients, size in ((3, 1), (1000, 7), (49, 48)):
        accounted = hidden(FixedSize(clients, size), "replace").pairs[0][0].prob
        assert Fraction(size, clients) <= Fraction(accounted) <= Fraction(size, clients) * (1 + Fraction(1, 10**15))


PLANS = [
    (prob, noise, rounds, delta)
    for prob in (1e-3, 0.05, 0.5)
    for noise, rounds in ((0.7, 20), (1.5, 300), (6.0, 2000))
    for delta in (1e-3, 1e-6)
]


@pytest.mark.parametrize(("prob", "noise", "rounds", "delta"), PLANS)
@pytest.mark.sampled
def test_over_a_wide_grid_epsilon_is_between_the_two_estimates_of_dp_accounting(
    prob: float, noise: float, rounds: int, delta: float
) -> None:
    """dp-accounting also rounds losses down, to a bound from below; our finer grid may beat its upper bound."""
    ours = spent(Poisson(10**6, prob), noise, rounds, delta)
    interval = max(2e-5, min(1e-3, 0.02 * ours / math.sqrt(rounds)))
    high, low = (
        privacy_loss_distribution.from_gaussian_mechanism(
            noise,
            sampling_prob=prob,
            value_discretization_interval=interval,
            pessimistic_estimate=pessimistic,
            use_connect_dots=pessimistic,
        )
        .self_compose(rounds)
        .get_epsilon_for_delta(delta)
        for pessimistic in (True, False)
    )
    assert low * (1.0 - 1e-6) <= ours <= 1.001 * high + 1e-6
    assert ours <= renyi("add-or-remove", Poisson(10**6, prob), noise, rounds, delta)


@pytest.mark.parametrize(("prob", "noise", "rounds", "delta"), PLANS[::3])
def test_over_a_wide_grid_replaced_clients_cost_what_dp_accounting_says(
    prob: float, noise: float, rounds: int, delta: float
) -> None:
    ours = spent(Poisson(10**6, prob), noise / 2.0, rounds, delta, "replace")
    event, relation = hidden(Poisson(10**6, prob), "replace").event(noise / 2.0)
    interval = max(2e-5, min(1e-3, 0.02 * ours / math.sqrt(rounds)))
    theirs = PLDAccountant(relation, value_discretization_interval=interval).compose(event, rounds).get_epsilon(delta)
    assert ours == pytest.approx(theirs, rel=2e-3, abs=1e-6)


@few
@given(shift=st.floats(0.01, 8.0), false_alarms=st.floats(1e-6, 1.0 - 1e-6))
def test_the_tradeoff_of_a_gaussian_is_that_of_its_best_test(shift: float, false_alarms: float) -> None:
    misses = float(gaussian_tradeoff(np.array([false_alarms]), shift)[0])
    threshold = stats.norm.isf(false_alarms)
    assert misses == pytest.approx(stats.norm.cdf(threshold - shift), rel=1e-6, abs=1e-12)
    epsilon = 0.5 * shift**2
    assume(epsilon < 30.0)
    assert false_alarms + math.exp(epsilon) * misses >= 1.0 - gaussian_delta(epsilon, shift) - 1e-9

"""The best of a random number of trials: bounds compared with exact divergences of small mechanisms."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from scipy import special

from fedpriv.errors import UserError
from fedpriv.privacy import Everyone, Poisson, make_plan
from fedpriv.privacy.correlation import Banded
from fedpriv.privacy.tuning import (
    NegativeBinomialTrials,
    PoissonTrials,
    RenyiCurve,
    ScoreNoise,
    TrialCount,
    curve_of,
    tuning_epsilon,
)

ORDERS = 1.0 + np.logspace(-2.5, 2.5, 41)
COUNTS = [
    *(NegativeBinomialTrials(expected=mean, eta=eta) for mean in (1.5, 10.0, 300.0) for eta in (-0.5, 0.0, 1.0, 2.0)),
    *(PoissonTrials(expected=mean) for mean in (1.0, 3.0, 40.0, 400.0)),
]
Generating = Callable[[np.ndarray], np.ndarray]


def generating(count: TrialCount) -> Generating:
    """Return E[x^K], from the definition of the distribution."""
    if isinstance(count, PoissonTrials):
        return lambda x: np.exp(count.expected * (x - 1.0))
    gamma, eta = count.gamma, count.eta
    if eta == 0.0:
        return lambda x: np.log1p(-(1.0 - gamma) * x) / math.log(gamma)
    return lambda x: ((1.0 - (1.0 - gamma) * x) ** -eta - 1.0) / (gamma**-eta - 1.0)


def selected(probs: np.ndarray, count: TrialCount) -> np.ndarray:
    """Return the exact distribution of the best of K outputs, worst first, preceded by the event of no trial."""
    reached = np.minimum(np.append(0.0, np.cumsum(probs)), 1.0)
    return np.diff(generating(count)(reached), prepend=0.0)


def renyi(p: np.ndarray, q: np.ndarray, orders: np.ndarray) -> np.ndarray:
    """Return the exact Renyi divergence."""
    kept = p > 0.0
    logs = np.log(p[kept]) * orders[:, None] + np.log(q[kept]) * (1.0 - orders[:, None])
    top = logs.max(axis=1)
    return (top + np.log(np.exp(logs - top[:, None]).sum(axis=1))) / (orders - 1.0)


def mechanisms() -> list[tuple[np.ndarray, np.ndarray]]:
    """Return output distributions on neighboring data: randomized response, rare bad outcomes, and random ones."""
    pairs = []
    for ratio, rare in itertools.product((1.1, 2.0, 10.0), (0.3, 0.01, 1e-4)):
        if ratio * rare < 1.0:
            pairs.append((np.array([1.0 - ratio * rare, ratio * rare]), np.array([1.0 - rare, rare])))
            pairs.append((np.array([ratio * rare, 1.0 - ratio * rare]), np.array([rare, 1.0 - rare])))
    pairs.append((np.array([1.0 - 1e-3, 1e-3]), np.array([1.0 - 1e-9, 1e-9])))
    rng = np.random.default_rng(3)
    for size in (2, 3, 6):
        pairs += [tuple(rng.dirichlet(np.ones(size), 2)) for _ in range(6)]
    return [pair for p, q in pairs for pair in ((p, q), (q, p))]


def worst(p: np.ndarray, q: np.ndarray) -> RenyiCurve:
    return RenyiCurve(ORDERS, np.maximum(renyi(p, q, ORDERS), renyi(q, p, ORDERS)))


def excess(count: TrialCount, bound: Callable[[RenyiCurve], np.ndarray]) -> float:
    """Return the largest amount by which any mechanism exceeds a bound, at any order."""
    found = [
        np.max(renyi(selected(p, count), selected(q, count), ORDERS) - bound(worst(p, q))) for p, q in mechanisms()
    ]
    return float(max(found))


@pytest.mark.parametrize("count", COUNTS, ids=repr)
def test_the_bound_is_never_exceeded(count: TrialCount) -> None:
    assert excess(count, lambda trial: count.after(trial).epsilons) <= 1e-6


def test_every_term_of_the_negative_binomial_bound_is_needed() -> None:
    dropped: dict[str, Callable[[NegativeBinomialTrials, RenyiCurve], np.ndarray]] = {
        "selection": lambda n, t: t.epsilons + math.log(n.expected) / (t.orders - 1.0),
        "mean": lambda n, t: n.after(t).epsilons - math.log(n.expected) / (t.orders - 1.0),
        "trial": lambda n, t: n.after(t).epsilons - t.epsilons,
        "eta": lambda n, t: n.after(t).epsilons - n.eta / (1.0 + n.eta) * (n.after(t).epsilons - t.epsilons),
    }
    for name, bound in dropped.items():
        counts = [c for c in COUNTS if isinstance(c, NegativeBinomialTrials) and (c.eta > 0.0 or name != "eta")]
        assert max(excess(c, lambda t, c=c, bound=bound: bound(c, t)) for c in counts) > 1e-3, name


def test_every_term_of_the_poisson_bound_is_needed() -> None:
    dropped: dict[str, Callable[[PoissonTrials, RenyiCurve], np.ndarray]] = {
        "delta": lambda n, t: t.epsilons + math.log(n.expected) / (t.orders - 1.0),
        "mean": lambda n, t: n.after(t).epsilons - math.log(n.expected) / (t.orders - 1.0),
        "trial": lambda n, t: n.after(t).epsilons - t.epsilons,
    }
    counts = [count for count in COUNTS if isinstance(count, PoissonTrials)]
    for name, bound in dropped.items():
        assert max(excess(c, lambda t, c=c, bound=bound: bound(c, t)) for c in counts) > 1e-3, name


def rounded_gaussian(moved: float, stddev: float, grid: float, far: float) -> np.ndarray:
    """Return the exact distribution of a number with Gaussian noise, rounded to a grid and cut at `far` deviations."""
    steps = np.arange(-math.ceil(far * stddev / grid), math.ceil(far * stddev / grid))
    edges = np.concatenate([[-math.inf], ((steps + 0.5) * grid - moved) / stddev, [math.inf]])
    below, above = np.diff(special.ndtr(edges)), -np.diff(special.ndtr(-edges))
    return np.where(edges[1:] > 0.0, above, below)


@pytest.mark.parametrize("multiplier", [0.7, 2.0, 10.0])
def test_the_curve_of_a_training_with_a_noised_score_is_not_exceeded_and_nearly_reached(multiplier: float) -> None:
    """Compares with the exact divergence of trials that release two numbers, one of them the score: p(x) p(s)."""
    noise, orders = ScoreNoise(multiplier=multiplier), 1.0 + np.logspace(-1.0, 0.5, 9)
    scores = [rounded_gaussian(moved, noise.stddev, multiplier / 8.0, 12.0) for moved in (1.0, 0.0)]
    for p, q in mechanisms()[:12]:
        training = RenyiCurve(orders, np.maximum(renyi(p, q, orders), renyi(q, p, orders)))
        both = renyi(np.outer(p, scores[0]).ravel(), np.outer(q, scores[1]).ravel(), orders)
        back = renyi(np.outer(q, scores[1]).ravel(), np.outer(p, scores[0]).ravel(), orders)
        composed = noise.after(training).epsilons
        assert np.all(np.maximum(both, back) <= composed + 1e-9)
        assert np.all(np.maximum(both, back) >= composed - 0.01 * orders / multiplier**2)


@pytest.mark.parametrize("count", COUNTS, ids=repr)
def test_the_bound_is_not_exceeded_where_the_score_is_part_of_a_trial(count: TrialCount) -> None:
    """The best of K trials by a noised score; a trial's output is the pair of trained value and score."""
    noise, orders = ScoreNoise(multiplier=1.5), 1.0 + np.logspace(-1.0, 1.3, 12)
    scores = [rounded_gaussian(moved, noise.stddev, 0.5, 4.0) for moved in (1.0, 0.0)]
    for p, q in mechanisms()[::5]:
        training = RenyiCurve(orders, np.maximum(renyi(p, q, orders), renyi(q, p, orders)))
        bound = count.after(noise.after(training)).epsilons
        # Worst first: by the score, then by the trained value.
        one, other = (selected(np.outer(s, x).ravel(), count) for x, s in ((p, scores[0]), (q, scores[1])))
        assert np.all(renyi(one, other, orders) <= bound + 1e-6)
        assert np.all(renyi(other, one, orders) <= bound + 1e-6)


def test_a_noised_score_is_part_of_every_term_of_a_tunings_epsilon() -> None:
    plan = make_plan(trust="central", sampling=Everyone(50), rounds=20, l2_bound=1.0, epsilon=1.0, delta=1e-6)
    for count in (NegativeBinomialTrials(expected=10.0), PoissonTrials(expected=10.0)):
        costs = [tuning_epsilon(plan, count, ScoreNoise(multiplier=z)) for z in (1e6, 30.0, 10.0, 3.0)]
        assert costs[0] == pytest.approx(tuning_epsilon(plan, count), rel=1e-6)
        assert costs == sorted(costs)
        # Together, they are a Gaussian mechanism like a single training.
        mu = plan.gaussian_dp_mu
        assert mu is not None
        more = 1.0 / math.sqrt(mu * mu + 1.0 / 9.0)
        alike = make_plan(
            trust="central", sampling=Everyone(50), rounds=1, l2_bound=1.0, noise_multiplier=more, delta=1e-6
        )
        assert costs[3] == pytest.approx(tuning_epsilon(alike, count), rel=1e-9)


@pytest.mark.parametrize("multiplier", [0.0, -1.0, 1e-4, math.nan, math.inf])
def test_a_score_without_noise_worth_the_name_is_refused(multiplier: float) -> None:
    with pytest.raises(UserError, match=r"tuning\.score_noise_multiplier"):
        ScoreNoise(multiplier=multiplier)


@pytest.mark.parametrize("count", COUNTS, ids=repr)
def test_k_has_the_mean_and_the_distribution_that_are_charged(count: TrialCount) -> None:
    drawn = np.array([count.quantile((i + 0.5) / 1000) for i in range(1000)])
    reached = generating(count)(np.array([0.5, 0.9]))
    assert np.allclose([np.mean(0.5**drawn), np.mean(0.9**drawn)], reached, atol=5e-3)
    # A thousand quantiles miss part of a long tail.
    assert 0.75 * count.expected < np.mean(drawn) < 1.05 * count.expected


@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-9])
def test_a_curve_gives_no_less_than_the_exact_epsilon_of_one_run(delta: float) -> None:
    plan = make_plan(trust="central", sampling=Everyone(50), rounds=20, l2_bound=1.0, epsilon=2.0, delta=delta)
    assert plan.epsilon <= curve_of(plan).epsilon(delta) <= 1.4 * plan.epsilon


def test_tuning_costs_more_than_a_trial_and_less_than_its_sum() -> None:
    plan = make_plan(trust="central", sampling=Everyone(50), rounds=20, l2_bound=1.0, epsilon=1.0, delta=1e-6)
    for count in (NegativeBinomialTrials(expected=10.0), NegativeBinomialTrials(expected=10.0, eta=0.0)):
        assert plan.epsilon < tuning_epsilon(plan, count) < 4.0 * plan.epsilon
    assert plan.epsilon < tuning_epsilon(plan, PoissonTrials(expected=10.0)) < 2.5 * plan.epsilon


def test_hidden_cohorts_lower_the_cost_of_tuning() -> None:
    common = {"trust": "central", "rounds": 20, "l2_bound": 1.0, "noise_multiplier": 1.0, "delta": 1e-6}
    hidden = make_plan(sampling=Poisson(1000, probability=0.01), **common)
    known = make_plan(sampling=Everyone(1000), **common)
    count = NegativeBinomialTrials(expected=10.0)
    assert hidden.epsilon < tuning_epsilon(hidden, count) < 0.5 * tuning_epsilon(known, count)


@pytest.mark.parametrize(
    ("make", "where"),
    [
        (lambda: NegativeBinomialTrials(expected=1.0), "tuning.expected_trials"),
        (lambda: NegativeBinomialTrials(expected=1e9), "tuning.expected_trials"),
        (lambda: NegativeBinomialTrials(expected=math.nan), "tuning.expected_trials"),
        (lambda: NegativeBinomialTrials(expected=5.0, eta=-1.0), "tuning.eta"),
        (lambda: PoissonTrials(expected=0.5), "tuning.expected_trials"),
    ],
)
def test_a_distribution_that_is_none_is_refused(make: Callable[[], object], where: str) -> None:
    with pytest.raises(UserError, match=where):
        make()


def test_windows_of_correlated_noise_that_overlap_get_no_credit_for_coins() -> None:
    noise = Banded(coefficients=(1.0, 0.9, 0.8), rounds=10)
    plan = make_plan(
        trust="central", sampling=Poisson(100, 0.1), rounds=10, delta=1e-5, l2_bound=1.0, noise_multiplier=1.0
    )
    found, charge = curve_of(replace(plan, noise=noise)), noise.charge(10, plan.sampling)
    assert np.all(found.epsilons >= 0.5 * charge * found.orders)

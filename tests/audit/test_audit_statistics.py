"""Bounds compared with closed forms and with mechanisms of known privacy."""

import math
from functools import cache

import numpy as np
import pytest
import torch
from scipy import stats
from support.helpers import FALSE_ALARM

from fedpriv.audit.canaries import draw_canaries
from fedpriv.audit.scores import Null, gram, projections
from fedpriv.audit.statistics import (
    epsilon_of,
    f_dp_lower,
    largest_lower,
    mean_lower,
    mu_of,
    one_run_lower,
)
from fedpriv.privacy import Everyone, make_plan

DELTA = 1e-5
SIZE, ROUNDS = 400, 30


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 8.0, 300.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-10, 1e-90])
def test_mu_and_epsilon_are_inverse(epsilon: float, delta: float) -> None:
    assert epsilon_of(mu_of(epsilon, delta), delta) == pytest.approx(epsilon, rel=1e-6)


def test_no_distance_is_no_epsilon_and_more_distance_is_more() -> None:
    assert epsilon_of(0.0, DELTA) == epsilon_of(-3.0, DELTA) == 0.0
    assert 0.0 < epsilon_of(0.5, DELTA) < epsilon_of(1.7, DELTA) < epsilon_of(500.0, DELTA) < math.inf


def test_a_gaussian_plan_claims_what_its_mu_says() -> None:
    plan = make_plan(trust="central", sampling=Everyone(10), rounds=40, delta=DELTA, l2_bound=1.0, epsilon=4.0)
    exact = epsilon_of(math.sqrt(40) / plan.noise_multiplier, DELTA)
    assert exact <= plan.epsilon <= 1.01 * exact


def scores_of_a_gaussian_mechanism(mu: float, seed: int, canaries: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Return whitened and matched scores of canaries in sums of pure noise, with exactly `mu`."""
    made = draw_canaries(
        seed=seed, count=canaries, size=SIZE, rounds=ROUNDS, sampling_prob=1.0, replace=False, local=False
    )
    noise = np.random.default_rng([seed, 7]).standard_normal((ROUNDS, SIZE)) * math.sqrt(ROUNDS) / mu
    seen = made.seen
    sums = torch.from_numpy(noise + made.patterns[seen].T @ made.directions.numpy()[seen])
    null, projected = Null.of(gram(sums), SIZE), projections(made.directions[seen], sums)
    return null.whitened(projected, made.patterns[seen]), null.matched(projected, made.patterns[seen])


@pytest.mark.parametrize("mu", [0.5, 1.7, 3.0])
def test_lower_bounds_cover_200_gaussian_mechanisms(mu: float) -> None:
    """At least 93 % of bounds at 95 % are below the truth, and not far below it."""
    found = [scores_of_a_gaussian_mechanism(mu, seed) for seed in range(200)]
    for bounds in (
        [mean_lower(whitened, 0.05) for whitened, _ in found],
        [mean_lower(matched, 0.05) for _, matched in found],
        [max(mean_lower(scores, 0.025) for scores in both) for both in found],
        [largest_lower(whitened, np.ones_like(whitened), 0.05) for whitened, _ in found],
    ):
        assert np.mean(np.array(bounds) <= mu) >= 0.93
    assert np.mean([max(mean_lower(scores, 0.025) for scores in both) for both in found]) > mu - 0.4


@pytest.mark.parametrize("mu", [0.5, 1.7, 3.0])
def test_one_run_bounds_cover_200_sets_of_coins(mu: float) -> None:
    """Coins guessed from N(coin mu, 1): both bounds stay below the truth, and f-DP comes closer."""
    rng, truth = np.random.default_rng(11), epsilon_of(mu, DELTA)
    bounds = cache(lambda right: (one_run_lower(200, 50, right, DELTA, 0.05), f_dp_lower(200, 50, right, DELTA, 0.05)))
    found = []
    for _ in range(200):
        coins = rng.integers(2, size=200)
        order = np.argsort(rng.standard_normal(200) + mu * coins)
        right = int((coins[order[-25:]] == 1).sum() + (coins[order[:25]] == 0).sum())
        found.append(bounds(right))
    plain, gaussian = zip(*found, strict=True)
    assert np.mean(np.array(plain) <= truth) >= 0.93
    assert np.mean(np.array(gaussian) <= truth) >= 0.93
    assert 0.0 <= np.mean(plain) < np.mean(gaussian)


@pytest.mark.parametrize(("guesses", "correct"), [(20, 20), (100, 90), (50, 40)])
def test_without_delta_the_one_run_bound_is_clopper_and_pearson(guesses: int, correct: int) -> None:
    least = stats.beta.ppf(0.05, correct, guesses - correct + 1)
    assert one_run_lower(100, guesses, correct, 1e-100, 0.05) == pytest.approx(math.log(least / (1 - least)), abs=1e-3)


def test_guesses_that_say_nothing_bound_nothing() -> None:
    for bound in (one_run_lower, f_dp_lower):
        assert bound(100, 50, 25, DELTA, 0.05) == 0.0
        assert bound(100, 50, 0, DELTA, 0.05) == 0.0


def test_one_faulty_canary_among_many_is_seen_by_the_largest_score_alone() -> None:
    scores = np.random.default_rng(3).standard_normal(200) + 1.0
    scores[17] = 30.0
    assert largest_lower(scores, np.ones(200), 1e-4) > 20.0
    assert mean_lower(scores, 1e-4) < 1.5
    assert FALSE_ALARM < 1e-4

"""Compute lower bounds on mu and epsilon from scores of canaries.

A mechanism is mu-GDP (Dong, Roth & Su 2022) if no test distinguishes two neighboring populations better than one draw
from N(0, 1) can be distinguished from one from N(mu, 1). A Gaussian plan of K releases with noise multiplier z is
mu-GDP with mu = sqrt(K) / z, and for no smaller mu. Scores are constructed so that a canary that took no part scores
N(0, 1); see `fedpriv.audit.scores`.

Sources: mu and (epsilon, delta): Balle & Wang 2018, Theorem 8. One-run bounds that hold for every mechanism: Steinke,
Nasr & Jagielski 2023 (arXiv 2305.08846) and Mahloujifar, Melis & Chaudhuri 2024 (arXiv 2410.22235).
"""

import math
from collections.abc import Callable
from typing import cast

import numpy as np
from scipy import optimize, special, stats

__all__ = [
    "epsilon_of",
    "f_dp_lower",
    "largest_lower",
    "mean_lower",
    "mu_of",
    "one_run_lower",
]

# Far above every mu that d parameters can reveal; the upper end of the search in `mu_of`.
MAX_MU = 1e4
# Upper end of the search of the one-run bounds.
MAX_EPSILON = 100.0


def epsilon_of(mu: float, delta: float) -> float:
    """Return the exact epsilon at `delta` of a mu-GDP Gaussian mechanism; 0 for mu <= 0."""
    if mu <= 0.0 or _log_delta(0.0, mu) <= math.log(delta):
        return 0.0
    if math.isinf(mu):
        return math.inf
    high = 0.5 * mu**2 + 40.0 * mu  # below delta 1e-100
    return _root(lambda epsilon: _log_delta(epsilon, mu) - math.log(delta), 0.0, high)


def mu_of(epsilon: float, delta: float) -> float:
    """Return the mu of the Gaussian mechanism that is exactly (epsilon, delta)-differentially private."""
    return _root(lambda mu: _log_delta(epsilon, mu) - math.log(delta), 1e-9, MAX_MU)


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    return cast(float, optimize.brentq(function, low, high, xtol=1e-9))


def _log_delta(epsilon: float, mu: float) -> float:
    """Return log(Phi(-epsilon / mu + mu / 2) - exp(epsilon) Phi(-epsilon / mu - mu / 2))."""
    first = float(special.log_ndtr(-epsilon / mu + 0.5 * mu))
    second = epsilon + float(special.log_ndtr(-epsilon / mu - 0.5 * mu))
    gap = second - first
    return first + math.log(-math.expm1(gap)) if gap < 0.0 else -math.inf


def mean_lower(scores: np.ndarray, significance: float) -> float:
    """Return a lower bound on the mean score, by Student's t.

    Args:
        scores: Scores of canaries that took part; at least two.
        significance: Probability that the bound is too high.
    """
    count = len(scores)
    error = float(np.std(scores, ddof=1)) / math.sqrt(count)
    return float(np.mean(scores)) - float(stats.t.isf(significance, count - 1)) * error


def largest_lower(scores: np.ndarray, scale: np.ndarray, significance: float) -> float:
    """Return a lower bound on mu from the largest score alone, which detects faults that affect few canaries.

    Args:
        scores: Scores of canaries that took part.
        scale: The mu in question divided by each canary's mu, if the claim holds; 1 if all took part equally often.
        significance: Probability that the bound is too high.

    Formal guarantee: if each canary is protected by its mu-GDP and would score at most like N(0, 1) without taking
    part, then P(score > x) <= Phi(mu - x) for each, and the union bound over all gives the result. The dependence
    between scores is arbitrary.
    """
    return float(np.max((scores + float(special.ndtri(significance / len(scores)))) * scale))


def one_run_lower(canaries: int, guesses: int, correct: int, delta: float, significance: float) -> float:
    """Return the largest epsilon that the guesses in one run refute (Steinke et al. 2023, Theorem 5.2).

    Args:
        canaries: Number of fair coins.
        guesses: Number of coins that were guessed, chosen by the scores.
        correct: Number of correct guesses.
        delta: The delta of the claim.
        significance: Probability that the bound is too high.
    """

    def p_value(epsilon: float) -> float:
        right = 1.0 / (1.0 + math.exp(-epsilon))
        beta = float(stats.binom.sf(correct - 1, guesses, right))
        if not correct:
            return 1.0
        steps = np.arange(1, correct + 1)
        slope = float(np.max((stats.binom.sf(correct - steps - 1, guesses, right) - beta) / steps))
        return min(beta + 2.0 * canaries * delta * max(slope, 0.0), 1.0)

    return _largest_refuted(lambda epsilon: significance - p_value(epsilon))


def f_dp_lower(canaries: int, guesses: int, correct: int, delta: float, significance: float) -> float:
    """Return the largest epsilon for which one run's guesses refute mu-GDP (Mahloujifar et al. 2024).

    Arguments are those of `one_run_lower`. The trade-off curve is that of the Gaussian mechanism for (epsilon, delta).
    """

    def excess(epsilon: float) -> float:
        mu = mu_of(epsilon, delta)
        right, wrong = significance * correct / canaries, significance * (guesses - correct) / canaries
        for left in range(correct - 1, -1, -1):
            moved = max(wrong, float(special.ndtr(special.ndtri(right) - mu)))
            if moved == wrong:
                break
            right = min(right + left / (guesses - left) * (moved - wrong), 1.0)
            wrong = moved
        return right + wrong - guesses / canaries

    return _largest_refuted(excess)


def _largest_refuted(excess: Callable[[float], float]) -> float:
    """Return the largest epsilon with a positive `excess`, 0 if there is none; `excess` decreases with epsilon."""
    low = 1e-6
    if excess(low) <= 0.0:
        return 0.0
    if excess(MAX_EPSILON) > 0.0:
        return MAX_EPSILON
    return _root(excess, low, MAX_EPSILON)

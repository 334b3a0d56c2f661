"""The privacy cost of releasing the best of a random number of runs of one mechanism.

A trial draws its settings at random and runs. K trials run independently, and only the best is released: K, the other
trials and their scores stay secret. With a fixed K, the epsilons of all trials would add up. With a random K, the
release costs little more than one trial (Liu and Talwar 2019). The bounds by Renyi divergence are those of Papernot and
Steinke (2022), "Hyperparameter Tuning with Renyi Differential Privacy": let a trial be (lambda, epsilon(lambda))-RDP
for every order lambda > 1.

* K truncated negative binomial with eta > -1 and gamma in (0, 1) (their Theorem 2; eta = 1 is geometric, eta = 0
  logarithmic): the release is (lambda, e)-RDP for every order m >= 1 with

      e = epsilon(lambda) + (1 + eta) ((1 - 1/m) epsilon(m) + log(1/gamma) / m) + log(E[K]) / (lambda - 1).

* K Poisson with mean mu (their Theorem 6): if a trial is also (log(1 + 1/(lambda - 1)), delta)-DP,

      e = epsilon(lambda) + mu delta + log(mu) / (lambda - 1).

  K may be 0. Then nothing is released, which is also an outcome.

Trials are ordered by a score that is a function of their releases. Ties are broken at random, or by the order in which
the trials were drawn, which is equivalent for independent trials. A score on clients' examples has separate noise
(`ScoreNoise`): a trial is then the training followed by the release of its score, and their curves add up.
"""

# pyright: reportMissingTypeStubs=false

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np

from fedpriv.checks import plain_numbers, real_within
from fedpriv.errors import UserError
from fedpriv.privacy.gaussian import MAX_NOISE
from fedpriv.privacy.plan import PrivacyPlan

__all__ = [
    "MAX_TRIALS",
    "NegativeBinomialTrials",
    "PoissonTrials",
    "RenyiCurve",
    "ScoreNoise",
    "TrialCount",
    "curve_of",
    "tuning_epsilon",
]

MAX_TRIALS = 1_000
"""Largest expected number of trials."""

_ORDERS = 1.0 + np.logspace(-4.0, 6.0, 501)
# Orders for dp-accounting's bounds on sampled rounds: integer orders are finite sums, and large ones are slow.
_SAMPLED_ORDERS = np.array([*range(2, 33), 40, 48, 64, 96, 128, 256, 512], dtype=np.float64)
_MIN_SCORE_NOISE = 1e-3
"""Smallest noise multiplier of scores; less noise would be far below the effect of one client."""
_MIN_GAMMA = 1e-6
"""Smallest gamma. K is hardly ever above 40 / gamma, more trials than any tuning runs."""
_UP = 1.0 + 1e-12
"""Factor that covers the rounding of the few operations from a curve to an epsilon."""


@dataclass(frozen=True, eq=False)
class RenyiCurve:
    """Upper bounds on the Renyi divergence of a mechanism's outputs on neighboring data.

    Args:
        orders: Above 1, `[orders]`.
        epsilons: The bounds, `[orders]`.
    """

    orders: np.ndarray
    epsilons: np.ndarray

    def epsilon(self, delta: float) -> float:
        """Return an epsilon at `delta` (Canonne, Kamath and Steinke 2020, Proposition 12)."""
        spare = np.log1p(-1.0 / self.orders) - np.log(delta * self.orders) / (self.orders - 1.0)
        return max(float(np.min(self.epsilons + spare)) * _UP, 0.0)

    def delta(self, epsilon: float) -> float:
        """Return a delta at `epsilon`, by the same proposition."""
        orders = self.orders
        logs = (orders - 1.0) * (self.epsilons - epsilon + np.log1p(-1.0 / orders)) - np.log(orders)
        return min(math.exp(min(float(np.min(logs)), 0.0)) * _UP, 1.0)


@dataclass(frozen=True, kw_only=True)
class NegativeBinomialTrials:
    """K from the truncated negative binomial distribution: at least 1.

    Args:
        expected: E[K], above 1.
        eta: Its shape, above -1. A smaller eta is cheaper, and concentrates K less around its mean.
    """

    expected: float
    eta: float = 1.0

    def __post_init__(self) -> None:
        plain_numbers(self)
        _check_expected(self.expected, 1.0)
        if not -1.0 < self.eta <= 100.0:
            raise UserError("tuning.eta", "above -1 and at most 100", self.eta, "Set 1 (geometric) or 0 (logarithmic)")

    @cached_property
    def gamma(self) -> float:
        """The gamma at which E[K] is `expected`."""
        low, high = math.log(_MIN_GAMMA), math.log1p(-1e-9)
        if self._mean(math.exp(low)) < self.expected:
            raise UserError("tuning.eta", "a value that allows that many trials", self.eta, "Raise tuning.eta")
        if self._mean(math.exp(high)) > self.expected:
            raise UserError("tuning.expected_trials", "more than 1 + 1e-6", self.expected, "Set it to 2 or more")
        for _ in range(64):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if self._mean(math.exp(middle)) >= self.expected else (low, middle)
        return math.exp(low)

    def after(self, trial: RenyiCurve) -> RenyiCurve:
        """Return the curve of the best of K trials."""
        gamma = self.gamma
        selected = (1.0 - 1.0 / trial.orders) * trial.epsilons - math.log(gamma) / trial.orders
        once = (1.0 + self.eta) * min(float(selected.min()), -math.log(gamma))
        mean = max(self._mean(gamma), self.expected)  # Equal up to rounding.
        return RenyiCurve(trial.orders, (trial.epsilons + once + math.log(mean) / (trial.orders - 1.0)) * _UP)

    def quantile(self, uniform: float) -> int:
        """Return the K drawn by a uniform number in [0, 1)."""
        gamma, eta, number = self.gamma, self.eta, 1
        if eta == 0.0:
            mass = (1.0 - gamma) / -math.log(gamma)
        else:
            mass = eta * (1.0 - gamma) / math.expm1(-eta * math.log(gamma))
        reached = mass
        while reached <= uniform and mass > 0.0:
            mass *= (1.0 - gamma) * (number + eta) / (number + 1)
            number += 1
            reached += mass
        return number

    def _mean(self, gamma: float) -> float:
        if self.eta == 0.0:
            return (1.0 / gamma - 1.0) / -math.log(gamma)
        return self.eta * (1.0 - gamma) / (gamma * -math.expm1(self.eta * math.log(gamma)))


@dataclass(frozen=True, kw_only=True)
class PoissonTrials:
    """K from a Poisson distribution: 0 with probability exp(-`expected`).

    Args:
        expected: E[K], from 1.
    """

    expected: float

    def __post_init__(self) -> None:
        plain_numbers(self)
        _check_expected(self.expected, 0.0)

    def after(self, trial: RenyiCurve) -> RenyiCurve:
        """Return the curve of the best of K trials."""
        orders = trial.orders
        deltas = np.array([trial.delta(math.log1p(1.0 / (order - 1.0)) / _UP) for order in orders])
        more = self.expected * deltas + math.log(self.expected) / (orders - 1.0)
        return RenyiCurve(orders, (trial.epsilons + more) * _UP)

    def quantile(self, uniform: float) -> int:
        """Return the K drawn by a uniform number in [0, 1)."""
        number, mass = 0, math.exp(-self.expected)
        if mass == 0.0:
            raise UserError("tuning.expected_trials", "at most 700 for poisson", self.expected, "Lower it")
        reached = mass
        while reached <= uniform and mass > 0.0:
            number += 1
            mass *= self.expected / number
            reached += mass
        return number


TrialCount = NegativeBinomialTrials | PoissonTrials


@dataclass(frozen=True, kw_only=True)
class ScoreNoise:
    """Gaussian noise on a sum of one number in [0, 1] from each client: a model's accuracy on the client's examples.

    Args:
        multiplier: Standard deviation over the sensitivity of the sum, 0.001 to 1e12.

    Raises:
        UserError: If it is not such a number.

    Formal guarantees:
        The sum has sensitivity 1 under both adjacencies. A client's number follows from the model and its own examples
        alone: under add-or-remove one number becomes or was 0, and under replace one number in [0, 1] becomes another.
        The noised sum, even if rounded to a grid (`fedpriv.mechanisms.gaussian`), is (lambda, lambda / (2 Z^2))-RDP
        with Z the multiplier, for every model. The training releases the model. So the two compose adaptively, and
        their divergences add up order by order (Mironov 2017, Proposition 1).
    """

    multiplier: float

    SENSITIVITY: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        plain_numbers(self)
        real_within(
            "tuning.score_noise_multiplier", self.multiplier, _MIN_SCORE_NOISE, MAX_NOISE, "Set it, for example to 5"
        )

    @property
    def stddev(self) -> float:
        """Standard deviation of the noise on the sum."""
        return self.multiplier * self.SENSITIVITY

    def after(self, training: RenyiCurve) -> RenyiCurve:
        """Return the curve of a training and the score of its model."""
        orders = training.orders
        return RenyiCurve(orders, (training.epsilons + 0.5 * orders / self.multiplier**2) * _UP)


def curve_of(plan: PrivacyPlan, score: ScoreNoise | None = None) -> RenyiCurve:
    """Bound the Renyi divergence of a whole run, and of its score if `score` is given.

    All rounds together are at most one Gaussian mechanism, even if cohorts are hidden: mixtures lower a divergence.
    For hidden Poisson cohorts under add-or-remove, the result is the smaller of that and dp-accounting's bound.
    """
    training = _curve_of_training(plan)
    return training if score is None else score.after(training)


def _curve_of_training(plan: PrivacyPlan) -> RenyiCurve:
    if plan.noise_multiplier <= 0.0:
        return RenyiCurve(_ORDERS, np.full_like(_ORDERS, math.inf))
    rho = 0.5 * plan.releases.charged(plan.rounds) / plan.noise_multiplier**2
    hidden = plan.sampling.by_coins and plan.trust_rules.hides_cohorts and plan.noise is None
    if not (hidden and plan.adjacency == "add-or-remove"):
        return RenyiCurve(_ORDERS, _ORDERS * rho * _UP)
    import dp_accounting as dpa  # takes a second

    event, relation = plan.releases.event(plan.noise_multiplier)
    accountant = dpa.rdp.RdpAccountant(_SAMPLED_ORDERS.tolist(), relation)
    sampled = np.asarray(accountant.compose(event, plan.rounds)._rdp)
    sampled = np.minimum(sampled, _SAMPLED_ORDERS * rho)
    return RenyiCurve(np.append(_ORDERS, _SAMPLED_ORDERS), np.append(_ORDERS * rho, sampled) * _UP)


def tuning_epsilon(plan: PrivacyPlan, count: TrialCount, score: ScoreNoise | None = None) -> float:
    """Return an epsilon for which the best of K runs of `plan` is (epsilon, `plan.delta`)-differentially private.

    Args:
        plan: The plan of each trial.
        count: The distribution of K.
        score: The noise of each trial's score; None for a public score.
    """
    return count.after(curve_of(plan, score)).epsilon(plan.delta)


def _check_expected(expected: float, above: float) -> None:
    if not (above < expected <= MAX_TRIALS and expected >= 1.0):
        words = f"{'above' if above else 'from'} 1 and at most {MAX_TRIALS:,}"
        raise UserError("tuning.expected_trials", words, expected, "Set the expected number of trials")

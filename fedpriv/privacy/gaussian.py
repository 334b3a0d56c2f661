"""The exact cost of one Gaussian release of known shift.

A release of sensitivity s under noise of standard deviation sigma has shift mu = s / sigma. K releases, even adaptive
ones, cost at most one release of shift sqrt(sum of mu_k^2). All functions here are functions of that one shift.

Source: Balle and Wang 2018, Theorem 8; Dong, Roth and Su 2022, Definition 2.6 and Corollary 2.13.
"""

# pyright: reportMissingTypeStubs=false

import math

import numpy as np
from scipy.special import log_ndtr, ndtr, ndtri

__all__ = ["MAX_NOISE", "MAX_SHIFT", "exceeds_gaussian", "gaussian_delta", "gaussian_epsilon", "gaussian_tradeoff"]

MAX_SHIFT = 1e3
"""Largest sensitivity / std with a finite epsilon. Beyond it, epsilon exceeds 500,000 and counts as infinite."""

MAX_NOISE = 1e12
"""Largest noise multiplier: far more than any guarantee needs, and far below the float32 limit."""

_SAFE = 1e-9
"""Share of delta reserved for rounding; it costs at most a hundred-millionth of epsilon."""


def gaussian_delta(epsilon: float, shift: float) -> float:
    """Return the smallest delta for which one Gaussian release of `shift` is (`epsilon`, delta)-private.

    Args:
        epsilon: At least 0.
        shift: Sensitivity over standard deviation, above 0.
    """
    high = float(log_ndtr(0.5 * shift - epsilon / shift))
    low = float(log_ndtr(-0.5 * shift - epsilon / shift)) + epsilon
    return math.exp(high) * -math.expm1(min(low - high, 0.0))


def gaussian_epsilon(shift: float, delta: float) -> float:
    """Return an epsilon for which one Gaussian release of `shift` is (epsilon, `delta`)-private.

    Args:
        shift: Sensitivity over standard deviation, from 0.
        delta: In (0, 1).

    Formal guarantees:
        Never below the exact epsilon, and above it by at most 1e-8 of it. Increases with `shift`, decreases with
        `delta`, and is infinite beyond `MAX_SHIFT`.
    """
    if shift > MAX_SHIFT:
        return math.inf
    target = delta * (1.0 - _SAFE)
    if shift == 0.0 or gaussian_delta(0.0, shift) <= target:
        return 0.0
    low, high = 0.0, 0.5 * shift**2 + shift * math.sqrt(2.0 * math.log(1.0 / target))
    while high - low > 1e-13 * high:
        middle = 0.5 * (low + high)
        if middle in (low, high):
            break
        low, high = (low, middle) if gaussian_delta(middle, shift) <= target else (middle, high)
    return high


def exceeds_gaussian(epsilon: float, shift: float, delta: float) -> bool:
    """Return True if `epsilon` is at least `gaussian_epsilon`, found without a search."""
    if shift > MAX_SHIFT or shift == 0.0 or math.isinf(epsilon):
        return shift <= MAX_SHIFT
    return gaussian_delta(epsilon, shift) <= delta * (1.0 - _SAFE)


def gaussian_tradeoff(false_alarms: np.ndarray, shift: float) -> np.ndarray:
    """Return the smallest miss rate of any test with the given false alarm rates, all in [0, 1]."""
    return ndtr(ndtri(1.0 - false_alarms) - shift)

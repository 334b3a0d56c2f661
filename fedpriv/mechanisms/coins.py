"""Coins and uniform choices with exactly stated probabilities, for randomized reports.

A coin compares a uniform 64-bit word with a threshold T, so that its probability is exactly T / 2^64. Real
probabilities such as 1 / (e^epsilon + 1) are rounded to such multiples in the direction that lowers epsilon. So the
ratios of probabilities of a report are at most e^epsilon, without any error of floating-point numbers to charge.
"""

from decimal import ROUND_DOWN, Context, Decimal
from fractions import Fraction

import numpy as np

from fedpriv.streams import Words

__all__ = ["WORDS", "exp_below", "tosses", "uniform_below"]

WORDS = 2**64
"""Number of values of a word: all probabilities are multiples of 1 / `WORDS`."""

_DIGITS = 80


def exp_below(epsilon: float) -> Fraction:
    """Return a rational number below e^epsilon, by a share of less than 1e-70.

    Args:
        epsilon: Above 0, at most 100.
    """
    found = Context(prec=_DIGITS, rounding=ROUND_DOWN).exp(Decimal(epsilon))
    return Fraction(found) * (1 - Fraction(1, 10 ** (_DIGITS - 5)))


def tosses(source: Words, threshold: int, size: int) -> np.ndarray:
    """Return independent coins, bool `[size]`, each True with probability exactly `threshold` / 2^64.

    Args:
        source: Source of randomness; gives one word for each coin.
        threshold: From 1 to 2^64 - 1.
        size: Number of coins.
    """
    if not 0 < threshold < WORDS:
        raise ValueError(f"a coin of probability {threshold} / 2^64")
    return source.words(size) < np.uint64(threshold)


def uniform_below(source: Words, number: int, size: int) -> np.ndarray:
    """Return independent uniform numbers from 0 to `number - 1`, int64 `[size]`.

    Words beyond the last multiple of `number` are drawn again, so that all numbers are equally likely.

    Args:
        source: Source of randomness.
        number: From 1 to 2^32.
        size: Number of draws.
    """
    if not 1 <= number <= 2**32:
        raise ValueError(f"uniform numbers below {number}")
    last = np.uint64(WORDS - WORDS % number - 1)
    found = source.words(size).copy()
    while (again := np.flatnonzero(found > last)).size:
        found[again] = source.words(again.size)
    return (found % np.uint64(number)).astype(np.int64)

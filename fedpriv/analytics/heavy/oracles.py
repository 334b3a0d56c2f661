"""Frequency oracles: a randomized report of one of `size` values, and estimates of shares from many reports.

After Wang, Blocki, Li, Jha 2017, "Locally Differentially Private Protocols for Frequency Estimation". Every oracle is
pure in their sense: a report supports some values, its own value with probability p, and each other one with
probability q. From the share C of n reports that support a value, the estimate of its share f is (C - q) / (p - q).
Reports are independent, so that its variance is exactly

    (f p (1 - p) + (1 - f) q (1 - q)) / (n (p - q)^2).

Formal guarantee: for any two values, the probabilities of any report differ by a factor of at most e^epsilon. A user
who sends one report has epsilon-local differential privacy with delta = 0, under `replace`, for all of the user's data,
however the value was chosen from them. Coins are exact; see `fedpriv.mechanisms.coins`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import ClassVar, NamedTuple, Protocol

import numpy as np

from fedpriv.checks import is_real, plain_numbers
from fedpriv.errors import UserError
from fedpriv.mechanisms.coins import WORDS, exp_below, tosses, uniform_below
from fedpriv.streams import Words

__all__ = ["MAX_EPSILON", "OLH", "ORACLES", "OUE", "KRandomizedResponse", "Oracle", "Support"]

MAX_EPSILON = 30.0
MAX_HASHES = 2**20
_BLOCK = 2**22  # numbers in memory at once


class Support(NamedTuple):
    """The probabilities that a report supports its own value and another one; exact but for hashes, see `OLH`."""

    own: Fraction
    other: Fraction

    def variance(self, share: float, reports: int) -> float:
        """Return the variance of the estimate of a share in [0, 1]."""
        p, q = float(self.own), float(self.other)
        return (share * p * (1.0 - p) + (1.0 - share) * q * (1.0 - q)) / (reports * float(self.own - self.other) ** 2)

    def shares(self, supports: np.ndarray, reports: int) -> np.ndarray:
        """Return unbiased estimates of the values' shares, `[size]`, from the number of reports that support each."""
        return (supports / reports - float(self.other)) / float(self.own - self.other)


class Oracle(Protocol):
    """A frequency oracle: a frozen dataclass with the fields `epsilon` and `size`.

    Attributes:
        kind: Its name in `[analysis]`.
    """

    kind: ClassVar[str]

    @property
    def epsilon(self) -> float:
        """The largest logarithm of a ratio of probabilities of one report, for any two values."""
        ...

    @property
    def size(self) -> int:
        """Number of values."""
        ...

    @property
    def support(self) -> Support:
        """See `Support`."""
        ...

    def reports(self, values: np.ndarray, source: Words) -> np.ndarray:
        """Return one independent report for each value.

        Args:
            values: Values from 0 to `size - 1`, int64 `[users]`.
            source: Source of randomness; of one user alone on a device.

        Returns:
            `[users, ...]`; the dimensions of one report are the oracle's.
        """
        ...

    def supports(self, reports: np.ndarray) -> np.ndarray:
        """Return the number of reports that support each value, int64 `[size]`."""
        ...


@dataclass(frozen=True, kw_only=True)
class _Sized:
    """Fields of every oracle.

    Args:
        epsilon: The privacy of one report, above 0, at most `MAX_EPSILON`.
        size: Number of values, from 2 to 2^32 - 1.

    Raises:
        UserError: If epsilon is out of range.
    """

    epsilon: float
    size: int

    def __post_init__(self) -> None:
        plain_numbers(self)
        if not (is_real(self.epsilon, 1e-6) and self.epsilon <= MAX_EPSILON):
            expected = f"from 1e-6 to {MAX_EPSILON:g} for randomized reports"
            raise UserError("privacy.epsilon", expected, self.epsilon, "Change it")
        if not 2 <= self.size < 2**32:
            raise ValueError(f"an oracle for {self.size} values")

    def _checked(self, values: np.ndarray) -> np.ndarray:
        if len(values) and not (int(values.min()) >= 0 and int(values.max()) < self.size):
            raise ValueError(f"values from {values.min()} to {values.max()} of {self.size}")
        return values


def _kept(epsilon: float, size: int) -> int:
    """Return the threshold of the coin with which k-RR on `size` values keeps the true one, rounded down."""
    more = exp_below(epsilon)
    return min(math.floor(WORDS * more / (more + size - 1)), WORDS - 1)


def _responses(values: np.ndarray, kept: int, size: int, source: Words) -> np.ndarray:
    """Return k-RR reports: the value if a coin says so, otherwise one of the other values, each equally likely."""
    keeps = tosses(source, kept, len(values))
    others = uniform_below(source, size - 1, len(values))
    return np.where(keeps, values, others + (others >= values))


@dataclass(frozen=True, kw_only=True)
class KRandomizedResponse(_Sized):
    """k-RR: the true value with probability e^eps / (e^eps + k - 1), otherwise another one, each equally likely.

    A report is one value, int64 `[users]`.
    """

    kind: ClassVar[str] = "k-rr"

    @property
    def support(self) -> Support:
        """See `Oracle.support`."""
        own = Fraction(_kept(self.epsilon, self.size), WORDS)
        return Support(own, (1 - own) / (self.size - 1))

    def reports(self, values: np.ndarray, source: Words) -> np.ndarray:
        """See `Oracle.reports`."""
        return _responses(self._checked(values), _kept(self.epsilon, self.size), self.size, source)

    def supports(self, reports: np.ndarray) -> np.ndarray:
        """See `Oracle.supports`."""
        return np.bincount(reports, minlength=self.size)


@dataclass(frozen=True, kw_only=True)
class OUE(_Sized):
    """Optimized unary encoding: a bit for each value, set with probability 1/2 if it is true, else 1 / (e^eps + 1).

    Two values differ in two bits, so that the factor e^eps is reached. A report is bool `[users, size]`.
    """

    kind: ClassVar[str] = "oue"

    @cached_property
    def _other(self) -> int:
        return math.floor(WORDS / (exp_below(self.epsilon) + 1)) + 1

    @property
    def support(self) -> Support:
        """See `Oracle.support`."""
        return Support(Fraction(1, 2), Fraction(self._other, WORDS))

    def reports(self, values: np.ndarray, source: Words) -> np.ndarray:
        """See `Oracle.reports`."""
        found = tosses(source, self._other, len(values) * self.size).reshape(len(values), self.size)
        found[np.arange(len(values)), self._checked(values)] = tosses(source, WORDS // 2, len(values))
        return found

    def supports(self, reports: np.ndarray) -> np.ndarray:
        """See `Oracle.supports`."""
        return reports.sum(axis=0, dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class OLH(_Sized):
    """Optimized local hashing: k-RR on the hash of the value to g = round(e^eps) + 1 numbers.

    Every user draws an own hash, h(x) = ((a x + b) mod 2^64) >> 32 scaled to g, with a and b uniform, and sends it
    with the report. Two values have the same hash with probability 1/g, up to a share of g / 2^32. Privacy does not
    depend on that: the hash is independent of the value. A report is uint64 `[users, 3]`: a, b and the number.
    """

    kind: ClassVar[str] = "olh"

    @cached_property
    def hashes(self) -> int:
        """The number g of values of a hash, at most `MAX_HASHES`."""
        return min(round(math.exp(self.epsilon)) + 1, MAX_HASHES)

    @property
    def support(self) -> Support:
        """See `Oracle.support`."""
        return Support(Fraction(_kept(self.epsilon, self.hashes), WORDS), Fraction(1, self.hashes))

    def reports(self, values: np.ndarray, source: Words) -> np.ndarray:
        """See `Oracle.reports`."""
        keys = source.words(2 * len(values)).reshape(-1, 2)
        hashed = self._hashed(keys, self._checked(values)[:, None])[:, 0]
        drawn = _responses(hashed, _kept(self.epsilon, self.hashes), self.hashes, source)
        return np.column_stack([keys, drawn.astype(np.uint64)])

    def supports(self, reports: np.ndarray) -> np.ndarray:
        """See `Oracle.supports`."""
        found, values = np.zeros(self.size, dtype=np.int64), np.arange(self.size)[None, :]
        for part in _parts(reports, self.size):
            hashed = self._hashed(part[:, :2], values)
            found += (hashed == part[:, 2:].astype(np.int64)).sum(axis=0)
        return found

    def _hashed(self, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Return the hashes of values `[users or 1, values]` under the keys `[users, 2]`, int64 `[users, values]`."""
        wide = keys[:, :1] * values.astype(np.uint64) + keys[:, 1:]
        return (((wide >> np.uint64(32)) * np.uint64(self.hashes)) >> np.uint64(32)).astype(np.int64)


def _parts(rows: np.ndarray, width: int) -> Iterator[np.ndarray]:
    """Yield the rows in parts for which `[rows, width]` fits into memory."""
    step = max(_BLOCK // max(width, 1), 1)
    for start in range(0, len(rows), step):
        yield rows[start : start + step]


ORACLES: dict[str, type[KRandomizedResponse] | type[OUE] | type[OLH]] = {
    oracle.kind: oracle for oracle in (KRandomizedResponse, OUE, OLH)
}
"""The oracles by the name of their kind."""

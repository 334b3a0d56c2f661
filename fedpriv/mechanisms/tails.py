"""Normal numbers as real numbers, given by a tail probability with as many bits as a comparison needs.

Nothing here is approximate. Integers bound the normal distribution from both sides, more tightly with every bit.
"""

import math
from fractions import Fraction
from functools import cache
from itertools import count
from statistics import NormalDist

from fedpriv.streams import Words

__all__ = ["Tail", "upper_tail"]


class Tail:
    """A lazily extended uniform number in (0, 1/2) with a sign: the tail beyond a normal number on its side of zero.

    Args:
        source: Source of further words.
        position: The number's position in the source.
        word: Its first 64 bits.
    """

    def __init__(self, source: Words, position: int, word: int) -> None:
        self._source, self._position, self._more = source, position, count(1)
        self.positive = bool(word >> 63)
        self._digits, self._bits = (word ^ (2**64 - 1) if self.positive else word), 64
        while self._digits < 2**32:
            self._extend()

    @property
    def estimate(self) -> float:
        """The normal number, to within 1e-9."""
        size = -NormalDist().inv_cdf(math.ldexp(self._digits, -self._bits))
        return size if self.positive else -size

    def is_below(self, height: Fraction) -> bool:
        """Return True if the normal number is below `height`; draw bits until this is certain."""
        if (height > 0) != self.positive:
            return not self.positive
        return self._exceeds_tail(abs(height)) == self.positive

    def _exceeds_tail(self, height: Fraction) -> bool:
        while True:
            tail, error = upper_tail(height, self._bits + 64), 2**32
            if self._digits << 64 >= tail + error:
                return True
            if (self._digits + 1) << 64 <= tail - error:
                return False
            self._extend()

    def _extend(self) -> None:
        self._digits = self._digits << 64 | self._source.more(self._position, next(self._more))
        self._bits += 64


def upper_tail(height: Fraction, bits: int) -> int:
    """Return 2^bits times the probability that a standard normal number exceeds `height` >= 0; error below 2^32.

    With x the height, the tail is 1/2 - S(x) / (sqrt(2 pi) E(x^2/2)), S(x) = x + x^3/3 + x^5/(3 5) + ... and E the
    exponential series. Both have positive terms, 1 <= E and S <= 1.26 E. With K terms, rounding each term down costs
    each sum less than (K + 1)^2 E units in total, and rounding x down costs less than 2 (1 + x) E units. As x^2 is at
    most 2 bits, K is below 8 bits, hence below 2^15 for all numbers of up to 4,000 bits.
    """
    one = 1 << bits
    if height * height > 2 * bits:  # Then the tail is below exp(-bits).
        return 0
    x = (height.numerator << bits) // height.denominator
    square = x * x >> bits
    exponential, odd = _series(one, square, bits, 2, 0), _series(x, square, bits, 2, 1)
    return (one >> 1) - (odd << 2 * bits) // exponential // _root_of_two_pi(bits)


def _series(first: int, factor: int, bits: int, step: int, start: int) -> int:
    """Return the sum of a series: term k is term k - 1 times factor / (start + step k), k = 1, 2, ..."""
    total, term = first, first
    for k in count(1):
        term = (term * factor >> bits) // (start + step * k)
        if term == 0:
            return total
        total += term
    raise AssertionError  # pragma: no cover


@cache
def _root_of_two_pi(bits: int) -> int:
    """Return 2^bits sqrt(2 pi), by Machin's formula."""
    guarded = bits + 32

    def arctan_of_inverse(n: int) -> int:
        power, total = (1 << guarded) // n, 0
        for k in count():
            if power == 0:
                break
            total += (-1) ** k * (power // (2 * k + 1))
            power //= n * n
        return total

    pi = 4 * (4 * arctan_of_inverse(5) - arctan_of_inverse(239))
    return math.isqrt(2 * pi << guarded) >> 32

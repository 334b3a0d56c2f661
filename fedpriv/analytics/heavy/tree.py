"""The question for heavy hitters, and the rules by which its tree of prefixes grows.

Level by level, the shares of some candidate prefixes are estimated with noise, and only the largest are extended by
further letters. The rules read estimates alone, so that they are post-processing of earlier releases.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import numpy as np

from fedpriv.analytics.heavy.oracles import ORACLES
from fedpriv.analytics.heavy.prefixes import MAX_LENGTH, SYMBOLS, children, is_whole, written
from fedpriv.checks import one_of, positive_int
from fedpriv.errors import UserError

__all__ = ["Estimates", "Found", "HeavyHitters", "Tally", "answer_of"]

MAX_CANDIDATES = 10**6
NOISE_FACTOR = 2.0
"""An adaptive extension keeps the prefixes with an estimate above this many standard deviations of its noise."""


class Estimates(NamedTuple):
    """Noised shares of prefixes of one length.

    Args:
        prefixes: int64 `[prefixes]`, ascending.
        shares: Unbiased estimates, float64 `[prefixes]`.
        stddev: Standard deviation of the noise on each.
    """

    prefixes: np.ndarray
    shares: np.ndarray
    stddev: float


@dataclass(frozen=True, kw_only=True)
class HeavyHitters:
    """The most frequent words, by a tree of prefixes. The only query of its analysis.

    Args:
        name: The name of the answer.
        top: Number of words to return.
        length: Number of letters of the longest prefix; longer words count as their first letters.
        steps: Number of letters that each level adds; empty for two, then one at each further level.
        extension: `adaptive` extends the prefixes with estimates above twice the noise, at least `top` and at most
            `width`; `fixed` extends twice `top` prefixes, however large the noise is.
        width: Largest number of prefixes to extend; None for four times `top`.
        oracle: With local trust, the randomized reports: `k-rr`, `oue` or `olh`.
        parties: With local trust, the number of parties: equal blocks of clients in the order of their numbers.
        shared: With local trust, the number of first levels at which all parties extend the same prefixes.
        prune: With local trust, True if a party asks only about candidates that the parties before it did not find
            to be rare; see `fedpriv.analytics.heavy.local`.

    Raises:
        UserError: If a value is out of range.
    """

    kind: ClassVar[str] = "heavy-hitters"
    name: str = "words"
    top: int = 10
    length: int = 6
    steps: tuple[int, ...] = ()
    extension: str = "adaptive"
    width: int | None = None
    oracle: str = "oue"
    parties: int = 1
    shared: int = 0
    prune: bool = False

    def __post_init__(self) -> None:
        for key in ("top", "length", "parties"):
            positive_int(self.key(key), getattr(self, key))
        if not 2 <= self.length <= MAX_LENGTH:
            raise UserError(self.key("length"), f"from 2 to {MAX_LENGTH} letters", self.length, "Change it")
        object.__setattr__(self, "steps", tuple(self.steps) or (2, *(1 for _ in range(self.length - 2))))
        if min(self.steps) < 1 or sum(self.steps) != self.length or max(self.steps) > 3:
            expected = f"numbers from 1 to 3 with the sum {self.length}, which is length"
            raise UserError(self.key("steps"), expected, list(self.steps), "Correct them")
        one_of(self.key("extension"), self.extension, ("adaptive", "fixed"))
        one_of(self.key("oracle"), self.oracle, tuple(ORACLES))
        if not 0 <= self.shared <= len(self.steps):
            raise UserError(self.key("shared"), f"from 0 to {len(self.steps)} levels", self.shared, "Change it")
        if self.width is not None and self.width < self.top:
            raise UserError(self.key("width"), f"at least top = {self.top}", self.width, "Raise it")
        if self.widest * SYMBOLS ** max(self.steps) > MAX_CANDIDATES:
            raise UserError(self.key("width"), "fewer candidates", self.widest, "Lower width, or make steps of one")

    def key(self, name: str) -> str:
        """Return the name of a key in configs, for errors."""
        return f"analysis.{self.name}.{name}"

    @property
    def about(self) -> str:
        """The question in words, for the privacy statement."""
        return f"the {self.top} most frequent words, by a tree of {len(self.steps)} levels"

    @property
    def widest(self) -> int:
        """The largest number of prefixes to extend."""
        return 4 * self.top if self.width is None else self.width

    @property
    def lengths(self) -> tuple[int, ...]:
        """The number of letters of the prefixes at each level."""
        return tuple(int(end) for end in np.cumsum(self.steps))

    def candidates(self, level: int, kept: np.ndarray | None = None) -> np.ndarray:
        """Return the prefixes to ask about at a level, int64, ascending.

        Args:
            level: The level, from 0.
            kept: The prefixes of the level before that are extended; None at level 0.
        """
        if kept is None:
            return children(np.arange(1, SYMBOLS), self.steps[0] - 1)
        return children(np.sort(kept), self.steps[level])

    def extended(self, found: Estimates) -> np.ndarray:
        """Return the prefixes to extend, int64, from the largest estimate to the smallest."""
        order = np.argsort(-found.shares, kind="stable")
        if self.extension == "fixed":
            return found.prefixes[order[: 2 * self.top]]
        clear = int((found.shares > NOISE_FACTOR * found.stddev).sum())
        return found.prefixes[order[: min(max(clear, self.top), self.widest)]]


class Found(NamedTuple):
    """An item that an analysis found.

    Args:
        item: The prefix of the longest length.
        share: Its estimated share of users.
        stddev: Standard deviation of the noise on it.
    """

    item: int
    share: float
    stddev: float


@dataclass
class Tally:
    """Estimates of whole words over the levels.

    A word that ends at some level is asked about at all further ones as well. Their noise is independent, so that its
    estimate is their mean with weights of one over the variance.

    Args:
        asked: The question.
        sums: For each word, the sums of weights and of weighted estimates; empty at first.
    """

    asked: HeavyHitters
    sums: dict[int, tuple[float, float]] = field(default_factory=dict)

    def add(self, level: int, found: Estimates) -> None:
        """Add the estimates of whole words at a level; at the last one, of all prefixes."""
        last, letters = self.asked.lengths[-1], self.asked.lengths[level]
        of_words = is_whole(found.prefixes) | (letters == last)
        weight = 1.0 / max(found.stddev, 1e-12) ** 2
        for prefix, share in zip(found.prefixes[of_words], found.shares[of_words], strict=True):
            item = int(prefix) * SYMBOLS ** (last - letters)
            weights, weighted = self.sums.get(item, (0.0, 0.0))
            self.sums[item] = weights + weight, weighted + weight * float(share)

    def all(self) -> list[Found]:
        """Return the items, from the most frequent to the least."""
        found = [
            Found(item, weighted / weights, math.sqrt(1.0 / weights)) for item, (weights, weighted) in self.sums.items()
        ]
        return sorted(found, key=lambda one: (-one.share, one.item))


def answer_of(asked: HeavyHitters, found: Sequence[Found]) -> dict[str, object]:
    """Return items, estimates and standard errors for JSON."""
    length = asked.lengths[-1]
    return {
        "items": [written(one.item, length).removesuffix("$") for one in found],
        "cut": [not is_whole(np.array(one.item)) for one in found],
        "value": [one.share for one in found],
        "standard_error": [one.stddev for one in found],
    }

"""Heavy hitters under local privacy, across parties: every user sends one randomized report, about one level.

Users are dealt to levels at random and independently of their data. A user of level l reports which of the level's
candidates its item begins with, or "another one", by a frequency oracle. The candidates depend on reports of other
users alone. So every user spends epsilon once, with delta = 0, for any reports of others.

After the abstract of arXiv 2412.14832 and the short summary of its contents that search engines quote; its text could
not be read. From there: one level of a prefix tree for each user, a shallow tree shared by all parties, an extension
that adapts, and pruning by results of earlier parties, in a fixed order of the parties. Ours: the rules themselves.

* Shared levels: the reports of all parties are pooled, and all parties extend the same prefixes.
* Extension: prefixes with estimates above twice the noise (`HeavyHitters.extended`).
* Pruning: a party drops a candidate if the estimates of the parties before it, pooled over their users, are below one
  standard deviation of their noise. A candidate that none of them asked about stays.
* Results of parties are pooled with their numbers of users as weights; an item that a party did not reach counts as 0.
* Words that end early are asked about at all further levels, and their estimates are averaged (`Tally`).
"""

import math
from dataclasses import dataclass, field

import numpy as np

from fedpriv.analytics.heavy.oracles import ORACLES
from fedpriv.analytics.heavy.prefixes import of_length
from fedpriv.analytics.heavy.tree import Estimates, Found, HeavyHitters, Tally
from fedpriv.errors import UserError
from fedpriv.streams import Purpose, Streams, Words

__all__ = ["NO_ITEM", "Answer", "ask_users", "levels_of_users"]

NO_ITEM = -1
"""The item of a user without data."""

PRUNE_FACTOR = 1.0
_FEW = 4096  # reports in memory at once


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The result of a walk.

    Args:
        found: The most frequent items.
        kept: Number of prefixes that were extended after each level, over all parties.
        reports: Number of reports of each user, int64 `[users]`: 1 for everyone.
    """

    found: list[Found]
    kept: list[int]
    reports: np.ndarray


@dataclass
class _Prior:
    """Results of earlier parties at one level: for each prefix, the number of users and the sum of shares."""

    sums: dict[int, tuple[float, float, float]] = field(default_factory=dict)

    def add(self, found: Estimates, users: int) -> None:
        for prefix, share in zip(found.prefixes.tolist(), found.shares.tolist(), strict=True):
            many, total, variance = self.sums.get(prefix, (0.0, 0.0, 0.0))
            self.sums[prefix] = many + users, total + users * share, variance + (users * found.stddev) ** 2

    def pruned(self, candidates: np.ndarray) -> np.ndarray:
        """Return the candidates that were not found to be rare; all of them if hardly any is left."""
        stays = np.array([not self._rare(prefix) for prefix in candidates.tolist()])
        return candidates[stays] if stays.any() else candidates

    def _rare(self, prefix: int) -> bool:
        many, total, variance = self.sums.get(prefix, (0.0, 0.0, 0.0))
        return many > 0.0 and total < PRUNE_FACTOR * math.sqrt(variance)


def levels_of_users(parties: np.ndarray, levels: int, source: Words) -> np.ndarray:
    """Return the level of each user, int64 `[users]`: as equal numbers at each level as a party's size allows.

    Args:
        parties: The party of each user, int64 `[users]`.
        levels: Number of levels.
        source: Source of randomness, public and independent of the users' data.
    """
    order = np.argsort(source.words(len(parties)), kind="stable")
    found = np.empty(len(parties), dtype=np.int64)
    for party in np.unique(parties):
        members = order[parties[order] == party]
        found[members] = np.arange(len(members)) % levels
    return found


def ask_users(
    asked: HeavyHitters, items: np.ndarray, epsilon: float, streams: Streams, parties: np.ndarray | None = None
) -> Answer:
    """Return the most frequent items, from one report of every user.

    Args:
        asked: The question.
        items: Each user's item as a prefix of the longest length, or `NO_ITEM`, int64 `[users]`. A user with several
            items draws one, with its own randomness.
        epsilon: The privacy of each report.
        streams: Source of randomness; see `fedpriv.streams.SystemStreams`.
        parties: The party of each user, from 0; None for equal blocks, `asked.parties` of them.
    """
    if parties is None:
        parties = np.arange(len(items)) * asked.parties // max(len(items), 1)
    fewest = int(np.bincount(parties).min()) if len(parties) else 0
    if fewest < len(asked.steps):
        expected = f"at least {len(asked.steps)} clients in each party, one for each level"
        raise UserError(asked.key("parties"), expected, fewest, "Lower parties, or the number of steps")
    level_of = levels_of_users(parties, len(asked.steps), streams.source(Purpose.GROUP))
    walk = _Walk(asked, items, parties, level_of, epsilon, streams)
    for level in range(len(asked.steps)):
        if level < asked.shared:
            walk.together(level)
        else:
            walk.apart(level)
    return walk.answer()


class _Walk:
    """The state of a walk: for each party, the prefixes to extend and the estimates of words."""

    def __init__(
        self,
        asked: HeavyHitters,
        items: np.ndarray,
        parties: np.ndarray,
        level_of: np.ndarray,
        epsilon: float,
        streams: Streams,
    ) -> None:
        self._asked, self._items, self._parties, self._level_of = asked, items, parties, level_of
        self._epsilon, self._streams = epsilon, streams
        self._sizes = {int(party): int((parties == party).sum()) for party in np.unique(parties)}
        self._kept: dict[int, np.ndarray | None] = dict.fromkeys(self._sizes)
        self._tallies = {party: Tally(asked) for party in self._sizes}
        self._widths: list[int] = []
        self._reports = np.zeros(len(items), dtype=np.int64)

    def together(self, level: int) -> None:
        """Ask the users of all parties about the same candidates."""
        candidates = self._asked.candidates(level, self._kept[min(self._kept)] if level else None)
        found = self._estimates(level, self._level_of == level, candidates, party=len(self._sizes))
        kept = self._asked.extended(found)
        for party, tally in self._tallies.items():
            tally.add(level, found)
            self._kept[party] = kept
        self._widths.append(len(kept))

    def apart(self, level: int) -> None:
        """Ask the users of one party after the other, in the order of their numbers."""
        prior, widths = _Prior(), 0
        for party, users in self._sizes.items():
            candidates = self._asked.candidates(level, self._kept[party] if level else None)
            if self._asked.prune:
                candidates = prior.pruned(candidates)
            of_level = (self._level_of == level) & (self._parties == party)
            found = self._estimates(level, of_level, candidates, party=party)
            self._tallies[party].add(level, found)
            self._kept[party] = kept = self._asked.extended(found)
            prior.add(found, users)
            widths += len(kept)
        self._widths.append(widths)

    def _estimates(self, level: int, chosen: np.ndarray, candidates: np.ndarray, party: int) -> Estimates:
        """Return estimates of the candidates' shares from a report of each chosen user."""
        users = np.flatnonzero(chosen)
        self._reports[users] += 1
        oracle = ORACLES[self._asked.oracle](epsilon=self._epsilon, size=len(candidates) + 1)
        supports = np.zeros(oracle.size, dtype=np.int64)
        source = self._streams.source(Purpose.CLIENT_NOISE, level + 1, party)
        lengths = self._asked.lengths
        for start in range(0, len(users), _FEW):
            items = self._items[users[start : start + _FEW]]
            values = _places(candidates, of_length(items, lengths[-1], lengths[level]), items == NO_ITEM)
            supports += oracle.supports(oracle.reports(values, source))
        shares = oracle.support.shares(supports, len(users))[:-1]
        return Estimates(candidates, shares, math.sqrt(oracle.support.variance(0.0, len(users))))

    def answer(self) -> Answer:
        """Return the parties' results, pooled with their numbers of users as weights."""
        total, pooled = len(self._items), dict[int, tuple[float, float]]()
        for party, tally in self._tallies.items():
            weight = self._sizes[party] / total
            for one in tally.all():
                share, variance = pooled.get(one.item, (0.0, 0.0))
                pooled[one.item] = share + weight * one.share, variance + (weight * one.stddev) ** 2
        found = [Found(item, share, math.sqrt(variance)) for item, (share, variance) in pooled.items()]
        found.sort(key=lambda one: (-one.share, one.item))
        return Answer(found=found[: self._asked.top], kept=self._widths, reports=self._reports)


def _places(candidates: np.ndarray, prefixes: np.ndarray, absent: np.ndarray) -> np.ndarray:
    """Return the place of each prefix among the candidates, or their number if it is none of them, int64."""
    places = np.searchsorted(candidates, prefixes)
    matched = candidates[np.minimum(places, len(candidates) - 1)] == prefixes
    return np.where(matched & ~absent, places, len(candidates))

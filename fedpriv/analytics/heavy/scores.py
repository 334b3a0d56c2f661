"""Scores of the items that were found, against the true ones."""

from collections.abc import Sequence

import numpy as np

from fedpriv.analytics.heavy.local import NO_ITEM

__all__ = ["f1_score", "normalized_cumulative_rank", "true_items"]


def true_items(items: np.ndarray, owners: np.ndarray, clients: int, top: int) -> list[int]:
    """Return the items with the largest mean share over clients; a client without items has the share 0 in all.

    Args:
        items: int64 `[records]`.
        owners: The client of each record, int64 `[records]`.
        clients: Number of clients.
        top: Number of items to return.
    """
    owned = np.bincount(owners, minlength=clients)
    kinds, places = np.unique(items, return_inverse=True)
    shares = np.bincount(places, weights=1.0 / owned[owners], minlength=len(kinds))
    order = np.lexsort((kinds, -shares))
    return [int(kinds[place]) for place in order if kinds[place] != NO_ITEM][:top]


def f1_score(found: Sequence[int], true: Sequence[int]) -> float:
    """Return the harmonic mean of precision and recall."""
    right = len(set(found) & set(true))
    return 2.0 * right / (len(set(found)) + len(set(true))) if true else 1.0


def normalized_cumulative_rank(found: Sequence[int], true: Sequence[int]) -> float:
    """Return NCR: the true item of rank r of k counts k - r + 1, and the sum over found items is divided by all.

    After Wang, Li, Jha 2019, "Locally Differentially Private Heavy Hitter Identification".

    Args:
        found: The items that were found, in any order.
        true: The k true items, from the most frequent to the least.
    """
    merits = {item: len(true) - place for place, item in enumerate(true)}
    return sum(merits.get(item, 0) for item in set(found)) / max(sum(merits.values()), 1)

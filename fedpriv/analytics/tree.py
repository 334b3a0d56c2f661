"""A binary tree of noised counts, made consistent by least squares (Hay et al. 2010, arXiv 0904.0942, Theorem 3)."""

import numpy as np

__all__ = ["consistent", "cumulative"]


def consistent(counts: np.ndarray, levels: int, total: float | None) -> list[np.ndarray]:
    """Return the counts of each level, from the two halves to the leaves, for which children sum up to their parents.

    They are the least-squares fit to the noised counts, and so the best linear unbiased estimate under equal noise.

    Args:
        counts: The nodes below the root, level by level, `[2^(levels + 1) - 2]`.
        levels: Number of levels below the root.
        total: The count of the root, if it is known without noise; None if it is not.
    """
    given = [counts[2**level - 2 : 2 ** (level + 1) - 2] for level in range(1, levels + 1)]
    fitted = [given[-1]]  # each node from itself and the nodes below it
    for height, own in enumerate(reversed(given[:-1]), start=2):
        below = fitted[0].reshape(-1, 2).sum(axis=1)
        weight = 2.0 ** (height - 1) / (2.0**height - 1.0)
        fitted.insert(0, weight * own + (1.0 - weight) * below)
    parents = np.array([fitted[0].sum() if total is None else total])
    for level, own in enumerate(fitted):
        off = (parents - own.reshape(-1, 2).sum(axis=1)) / 2.0
        fitted[level] = parents = own + np.repeat(off, 2)
    return fitted


def cumulative(counts: np.ndarray, levels: int, total: float | None) -> np.ndarray:
    """Return the counts below each end of the leaves, `[2^levels + 1]`, from 0 to the count of the root.

    Each is a sum of at most `levels` noised nodes, before the fit. As the fit is the best linear unbiased estimate, its
    standard deviation is at most sqrt(`levels`) times that of the noise on a node. Arguments are those of `consistent`.
    """
    return np.concatenate([[0.0], np.cumsum(consistent(counts, levels, total)[-1])])

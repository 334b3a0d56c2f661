"""Measures of how much clients differ in their examples and in their initial gradients."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["evenly_chosen", "gini", "gradient_metrics", "metrics_of", "size_metrics"]


def evenly_chosen(population: int, maximum: int) -> np.ndarray:
    """Return at most `maximum` clients, evenly spaced from first to last; ascending int64."""
    return np.unique(np.linspace(0, population - 1, min(population, maximum)).round().astype(np.int64))


def gini(sizes: np.ndarray) -> float:
    """Return the Gini coefficient of sizes: 0 if all are equal, near 1 if one client has nearly everything.

    Args:
        sizes: `[clients]`, from 0, at least one of them above 0.
    """
    held = np.sort(sizes).astype(np.float64)
    ranks = np.arange(1, len(held) + 1)
    return float(2.0 * (ranks * held).sum() / (len(held) * held.sum()) - (len(held) + 1) / len(held))


def size_metrics(sizes: np.ndarray) -> dict[str, float]:
    """Return the minimum, median and maximum size, the coefficient of variation and the Gini coefficient.

    Args:
        sizes: Examples of each client, `[clients]`, from 0, at least one of them above 0.
    """
    return {
        "size_min": int(sizes.min()),
        "size_median": float(np.median(sizes)),
        "size_max": int(sizes.max()),
        "size_variation": float(sizes.std() / sizes.mean()),
        "size_gini": gini(sizes),
    }


def gradient_metrics(gradients: Iterable[Tensor]) -> dict[str, float]:
    """Return how far clients' gradients g_i are from their mean g, with equal weights.

    `gradient_norm` is ||g||. `gradient_spread` is zeta = sqrt(mean_i ||g_i - g||^2), as in Koloskova et al., A Unified
    Theory of Decentralized SGD, ICML 2020, assumption 3b. `gradient_dissimilarity` is zeta / ||g||, which is
    sqrt(B^2 - 1) for the local dissimilarity B of Li et al., Federated Optimization in Heterogeneous Networks, MLSys
    2020, definition 3: 0 if all gradients agree, NaN if the mean is zero.

    Args:
        gradients: An iterable of at least one `[params]`; only two float64 vectors are kept in memory.
    """
    mean, squares, count = torch.zeros(0), 0.0, 0
    for gradient in gradients:  # Welford's algorithm avoids cancellation
        exact, count = gradient.double(), count + 1
        mean = torch.zeros_like(exact) if count == 1 else mean
        off = exact - mean
        mean = mean + off / count
        squares += float(off @ (exact - mean))
    norm, spread = float(torch.linalg.vector_norm(mean)), (max(squares, 0.0) / count) ** 0.5
    ratio = spread / norm if norm > 0.0 else float("nan")
    return {"gradient_norm": norm, "gradient_spread": spread, "gradient_dissimilarity": ratio}


def metrics_of(measured: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers in the contents of `heterogeneity.json`."""
    return {key: value for key, value in measured.items() if not isinstance(value, str)}

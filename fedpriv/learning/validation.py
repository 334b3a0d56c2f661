"""Examples held out of the training data before they are spread, to choose by without looking at the test data.

They count as public, or as held by the server: what is chosen by examples that clients hold is a release of its own,
which no privacy statement here accounts for, and what is chosen by test data is reported better than it is.
"""

from dataclasses import replace

import numpy as np
import torch

from fedpriv.errors import UserError
from fedpriv.learning.datasets import Dataset

__all__ = ["hold_out"]


def hold_out(dataset: Dataset, share: float) -> Dataset:
    """The data set with a share of its training examples moved to `validation_inputs` and `validation_labels`.

    Which ones is fixed: neither the experiment's seed nor its population matters, so that all runs are compared on the
    same examples. Each label gives its share, evenly over its natural clients, the first example of each of whom stays.

    Args:
        dataset: The examples.
        share: Of the training examples, above 0 and below 1.

    Raises:
        UserError: If that is none of the examples, or all.
    """
    held = _held_out(dataset.train_labels.numpy(), dataset.groups, share)
    if not 0 < held.sum() < len(held):
        got = f"{held.sum()} of {len(held)} examples at {share:g}"
        raise UserError("data.validation", "a share that is some of the examples", got, "Change data.validation")
    out, kept = torch.from_numpy(np.flatnonzero(held)), torch.from_numpy(np.flatnonzero(~held))
    return replace(
        dataset,
        train_inputs=dataset.train_inputs[kept],
        train_labels=dataset.train_labels[kept],
        validation_inputs=dataset.train_inputs[out],
        validation_labels=dataset.train_labels[out],
        groups=None if dataset.groups is None else dataset.groups[~held],
    )


def _held_out(labels: np.ndarray, groups: np.ndarray | None, share: float) -> np.ndarray:
    """Which examples, bool `[examples]`: evenly spaced in each label, its examples in the order of their clients."""
    order = np.lexsort((np.zeros_like(labels) if groups is None else groups, labels))
    in_order = labels[order]
    place = np.arange(len(labels)) - np.searchsorted(in_order, in_order)
    held = np.zeros(len(labels), dtype=bool)
    # The least that makes 0.1 of ten examples one example in floating point.
    held[order] = np.floor((place + 1) * share + 1e-9) > np.floor(place * share + 1e-9)
    if groups is not None:
        held[np.unique(groups, return_index=True)[1]] = False
    return held

"""The hard threshold: the nearest vector with few numbers that are not zero."""

import torch
from torch import Tensor

__all__ = ["hard_threshold"]


def hard_threshold(vector: Tensor, sparsity: int) -> Tensor:
    """Return H_k(v) `[params]`: the k numbers of `[params]` with the largest absolute values, and zeros.

    Of equal absolute values, earlier ones are kept.

    Args:
        vector: v.
        sparsity: k; a vector with at most k numbers is returned unchanged.
    """
    if sparsity >= vector.shape[-1]:
        return vector
    kept = torch.argsort(vector.abs(), descending=True, stable=True)[:sparsity]
    found = torch.zeros_like(vector)
    found[kept] = vector[kept]
    return found

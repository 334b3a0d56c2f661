"""Scores of canaries: the projections of releases on a canary's pushes, in units of their exact null distribution.

Let S_1, ..., S_K be the releases and u a random direction of length 1 that was not part of the run. Given the releases,
the projections t_k = <u, S_k> have mean 0 and the covariance

    Sigma_kl = <S_k, S_l> / d

exactly, for any messages and any noise, and they are normal up to terms of order 1 / d. So for any weights w that do
not depend on u, a canary that took no part has a score w't / sqrt(w' Sigma w) of distribution N(0, 1). Two choices of
weights:

* whitened, w = Sigma^-1 p with p the canary's signs: the best linear test. It detects noise that is missing in some
  rounds, too small, or repeated, because Sigma then has directions with almost no variance.
* matched, w = p: as good if the noise is independent and clients are quiet. It avoids the estimate of Sigma^-1, which
  costs the whitened score a factor of about sqrt(1 - K / d).

A canary along one coordinate has no random direction, but random signs. Given releases without it,
sum_k p_k S_k[j] / sqrt(sum_k S_k[j]^2) has mean 0, variance 1 and the tails of N(0, 1) (Hoeffding 1963).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["Null", "coordinate_scores", "gram", "projections"]

# Number of columns converted to float64 at once.
_COLUMNS = 2**15
# Smallest variance distinguishable from rounding errors, as a share of the largest.
_MIN_VARIANCE = 1e-10
# With fewer parameters than this per round, eigenvalues of Sigma are shrunk toward their mean before inversion.
_AMPLE = 3


def gram(releases: Tensor) -> np.ndarray:
    """Return <S_k, S_l> of releases `[rounds, params]`, float64 `[rounds, rounds]`."""
    total = torch.zeros(len(releases), len(releases), dtype=torch.float64)
    for part in releases.split(_COLUMNS, dim=1):
        exact = part.double()
        total += exact @ exact.T
    return total.numpy()


def projections(directions: Tensor, releases: Tensor) -> np.ndarray:
    """Return <u_i, S_k> of directions `[candidates, params]`, float64 `[candidates, rounds]`."""
    total = torch.zeros(len(directions), len(releases), dtype=torch.float64)
    for part, along in zip(releases.split(_COLUMNS, dim=1), directions.split(_COLUMNS, dim=1), strict=True):
        total += along.double() @ part.double().T
    return total.numpy()


@dataclass(frozen=True, kw_only=True, eq=False)
class Null:
    """The distribution of projections on a direction that was not part of the run: N(0, Sigma).

    Args:
        values: Eigenvalues of Sigma, at least `_MIN_VARIANCE` of the largest.
        vectors: Its eigenvectors, in columns.
        inverses: The inverse eigenvalues, after shrinkage, for whitening weights.
    """

    values: np.ndarray
    vectors: np.ndarray
    inverses: np.ndarray

    @classmethod
    def of(cls, gram: np.ndarray, size: int) -> "Null":
        """Return the null distribution of releases with this Gram matrix and `size` parameters."""
        values, vectors = np.linalg.eigh(gram / size)
        values = np.maximum(values, max(float(values[-1]) * _MIN_VARIANCE, 1e-300))
        rounds = len(values)
        drawn = rounds / (rounds + size) if size < _AMPLE * rounds else 0.0
        return cls(values=values, vectors=vectors, inverses=1.0 / ((1.0 - drawn) * values + drawn * values.mean()))

    def whitened(self, projected: np.ndarray, patterns: np.ndarray) -> np.ndarray:
        """Return the whitened scores `[candidates]` of projections and signs, both `[candidates, rounds]`."""
        return self._score(projected, (patterns @ self.vectors * self.inverses) @ self.vectors.T)

    def matched(self, projected: np.ndarray, patterns: np.ndarray) -> np.ndarray:
        """Return the matched scores `[candidates]`."""
        return self._score(projected, patterns)

    def _score(self, projected: np.ndarray, weights: np.ndarray) -> np.ndarray:
        variances = (weights @ self.vectors) ** 2 @ self.values
        return _ratio(np.einsum("ck,ck->c", weights, projected), variances)


def coordinate_scores(columns: np.ndarray, patterns: np.ndarray) -> np.ndarray:
    """Return the scores `[candidates]` of canaries along coordinates.

    Args:
        columns: The releases' coordinates S_k[j], `[candidates, rounds]`.
        patterns: The canaries' signs, 0 in rounds without them.
    """
    return _ratio(np.einsum("ck,ck->c", patterns, columns), ((patterns * columns) ** 2).sum(axis=1))


def _ratio(sums: np.ndarray, variances: np.ndarray) -> np.ndarray:
    """Return sums divided by their deviations; 0 for a candidate that never took part."""
    return np.where(variances > 0.0, sums / np.sqrt(np.maximum(variances, 1e-300)), 0.0)

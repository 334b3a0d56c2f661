"""Bounded maps: limit the norm of a message for any data.

Edge cases; tests are named after each:

| input row | output row |
|---|---|
| NaN or infinity anywhere | zero |
| zero | zero |
| subnormal | finite, within the bound |
| huge (its squares overflow) | finite, within the bound, the right direction |
| next to other rows | the same as alone |
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fedpriv.checks import plain_numbers, require_representable
from fedpriv.vectors import norm

__all__ = [
    "IN_PLACE",
    "Bounded",
    "Clip",
    "InPlace",
    "SmoothedNormalization",
    "finite_rows",
    "row_norms",
    "scales_of",
]

# Rounding to float32 may lengthen a vector by a few parts in 2**24; this margin guarantees the bound.
_SHRINK = 1.0 - 2.0**-21
_HUGE = 2.0**96
# Below this, a float32 scale may be subnormal and then too coarse to keep the bound.
_TINY = 2.0**-96


class Bounded(Protocol):
    """A map of R^d into a ball, applied to the last axis.

    Formal guarantee: for every input, `||self(u)||_2 <= l2_bound`, and on finite inputs the map is Lipschitz with
    constant `lipschitz` (up to the rounding of the number format).
    """

    @property
    def l2_bound(self) -> float:
        """Largest l2 norm of an output."""
        ...

    @property
    def lipschitz(self) -> float:
        """Lipschitz constant in the l2 norm."""
        ...

    def __call__(self, vectors: Tensor) -> Tensor:
        """Bound each row of `[..., params]`."""
        ...


class InPlace(Bounded, Protocol):
    """A bounded map that engines may compute in place or in C; exactly the classes in `IN_PLACE`."""

    def bound_(self, vectors: Tensor, norms: Tensor | None = None) -> None:
        """Bound rows in place; `norms` are their l2 norms, float64 `[..., 1]`, if they are known."""
        ...

    @property
    def coefficients(self) -> tuple[float, float, float, float]:
        """(p, q, r, t): a row of ordinary norm n is multiplied by min(p / (q + n), r, t / n)."""
        ...


@dataclass(frozen=True, kw_only=True)
class Clip:
    """clip_C(u) = min(1, C / ||u||_2) u, the projection onto the ball of radius C.

    Args:
        clip_norm: C, from 1e-20 to 1e20, so that float32 can hold the product of bound and direction.
    """

    clip_norm: float

    def __post_init__(self) -> None:
        require_representable("method.clip_norm", self.clip_norm)
        plain_numbers(self)

    @property
    def l2_bound(self) -> float:
        """C."""
        return self.clip_norm

    @property
    def cocoercive(self) -> float:
        """1: the map is the gradient of a convex function, and 1-Lipschitz (Baillon and Haddad 1977)."""
        return 1.0

    @property
    def lipschitz(self) -> float:
        """1: a projection onto a convex set never increases the distance of two points."""
        return 1.0

    def __call__(self, vectors: Tensor) -> Tensor:
        """See `Bounded.__call__`."""
        return _scale_rows(vectors, self._scale)

    def bound_(self, vectors: Tensor, norms: Tensor | None = None) -> None:
        """See `InPlace.bound_`."""
        _scale_rows(vectors, self._scale, norms, out=vectors)

    @property
    def coefficients(self) -> tuple[float, float, float, float]:
        """See `InPlace.coefficients`."""
        return self.clip_norm * _SHRINK, 0.0, 1.0, math.inf

    def _scale(self, norm: Tensor, ratio: Tensor) -> Tensor:
        return torch.minimum(self.clip_norm * _SHRINK / norm, ratio)


@dataclass(frozen=True, kw_only=True)
class SmoothedNormalization:
    """N_alpha(u) = u / (alpha + ||u||_2): norm below one, same direction, no threshold to tune.

    Source: arXiv 2502.13482, section 3. It is the gradient of ||u|| - alpha log(1 + ||u|| / alpha).

    Args:
        alpha: Smoothing, from 1e-20 to 1e20, so that float32 can hold 1 / alpha.
    """

    alpha: float

    def __post_init__(self) -> None:
        require_representable("method.alpha", self.alpha)
        plain_numbers(self)

    @property
    def l2_bound(self) -> float:
        """||u|| / (alpha + ||u||) < 1."""
        return 1.0

    @property
    def cocoercive(self) -> float:
        """alpha: the map is the gradient of a convex function, and 1 / alpha-Lipschitz (Baillon and Haddad 1977)."""
        return self.alpha

    @property
    def lipschitz(self) -> float:
        """1 / alpha, reached at zero."""
        return 1.0 / self.alpha

    def __call__(self, vectors: Tensor) -> Tensor:
        """See `Bounded.__call__`."""
        return _scale_rows(vectors, self._scale)

    def bound_(self, vectors: Tensor, norms: Tensor | None = None) -> None:
        """See `InPlace.bound_`."""
        _scale_rows(vectors, self._scale, norms, out=vectors)

    @property
    def coefficients(self) -> tuple[float, float, float, float]:
        """See `InPlace.coefficients`."""
        return 1.0, self.alpha, math.inf, _SHRINK

    def _scale(self, norm: Tensor, ratio: Tensor) -> Tensor:
        return torch.minimum(1.0 / (self.alpha / ratio + norm), _SHRINK / norm)


IN_PLACE = (Clip, SmoothedNormalization)
"""The maps with an in-place form known to be equivalent. Subclasses are excluded: they may bound differently."""


def _scale_rows(
    vectors: Tensor,
    scale_of: Callable[[Tensor, Tensor], Tensor],
    norm: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Multiply each row u by a scale of its norm; a row that is not finite becomes zero. `out` may be `vectors`.

    `scale_of(norm, ratio)` receives the float64 norm of u / ratio and returns the scale that turns u / ratio into the
    output. The ratio is chosen per row so that nothing overflows.
    """
    if norm is None:
        norm = row_norms(vectors)
    scale = scale_of(norm.clamp(min=1e-300), torch.ones_like(norm))
    ordinary = (norm < _HUGE) & (scale >= _TINY)
    if bool(ordinary.all()):
        return torch.mul(vectors, scale.to(vectors.dtype), out=out)
    rare = torch.where(ordinary, vectors * scale.to(vectors.dtype), _scale_in_float64(vectors, scale_of))
    return rare if out is None else out.copy_(rare)


def _scale_in_float64(vectors: Tensor, scale_of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    finite = finite_rows(vectors)
    safe = torch.where(finite, vectors, 0.0).double()
    largest = safe.abs().amax(dim=-1, keepdim=True)
    ratio = torch.where(largest < _HUGE, 1.0, largest)
    rows = safe / ratio
    norms = norm(rows, -1, keepdim=True).clamp(min=1e-300)
    return (rows * scale_of(norms, ratio)).to(vectors.dtype)


def scales_of(norms: Tensor, bound: InPlace) -> Tensor:
    """Return the float64 scales by which a map of `IN_PLACE` multiplies rows of these float64 norms."""
    p, q, r, t = bound.coefficients
    scales = p / (norms + q if q else norms)
    return (scales if t == math.inf else torch.minimum(scales, t / norms)).clamp_(max=r)


def row_norms(vectors: Tensor) -> Tensor:
    """Return the l2 norms of rows, float64 `[..., 1]`."""
    return norm(vectors, -1, keepdim=True, exact=True)


def finite_rows(vectors: Tensor) -> Tensor:
    """Return a bool mask `[..., 1]` of the rows of `[..., params]` without NaN or infinity."""
    return torch.isfinite(vectors).all(dim=-1, keepdim=True)

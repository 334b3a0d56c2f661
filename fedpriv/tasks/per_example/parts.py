"""Gradients of the examples of one chunk with respect to the parameters of one layer, in a form that is cheap to sum.

Each form gives the squared norm of every example's part and adds the weighted parts to float64 totals. Squares and
sums are float64: they do not overflow for float32 numbers, and their rounding is charged by `SLACK`.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor

from fedpriv.vectors import norm

__all__ = ["MAX_CANCELLATION", "Factors", "Part", "Products", "Rows", "Segments", "Squares", "sum_of"]

MAX_CANCELLATION = 256.0
"""The terms of one example's gradient may be this many times longer in total than the gradient. A norm beyond that is
rounded up to the total over `MAX_CANCELLATION`: the rounding of the terms then stays within `SLACK`."""


@dataclass(frozen=True)
class Squares:
    """Squared norms of one layer's gradients, float64 `[examples]`.

    Args:
        norms: Of the gradients.
        terms: Of the sum of the lengths of a gradient's terms; None if gradients are not computed from terms.
    """

    norms: Tensor
    terms: Tensor | None = None


class Part(Protocol):
    """The gradients of a chunk's examples with respect to one layer's parameters."""

    @property
    def names(self) -> Collection[str]:
        """Names of the parameters."""
        ...

    @property
    def floats(self) -> int:
        """Floats of memory for all examples, copies in float64 included."""
        ...

    @property
    def tokens(self) -> int:
        """Number of terms of each gradient."""
        ...

    def squares(self) -> Squares:
        """Return squared norms; not finite if a gradient is not finite."""
        ...

    def add_to(self, totals: Mapping[str, Tensor], scales: Tensor, keep: int) -> None:
        """Set `totals` to `keep` times `totals` plus the sum of the gradients times `scales`.

        Args:
            totals: Float64 tensors by name of the parameter; they may hold anything if `keep` is 0.
            scales: Float64 `[examples]`.
            keep: 0 or 1.
        """
        ...

    def without(self, excluded: Tensor) -> "Part":
        """Return the same with zeros for the examples in `excluded`, bool `[examples]`."""
        ...


@dataclass(frozen=True)
class Rows:
    """Every example's gradient as such.

    Args:
        rows: `[examples, params]` by name of the parameter.
        work: Further floats that computing them took.
    """

    rows: Mapping[str, Tensor]
    work: int = 0

    @classmethod
    def of(cls, rows: Mapping[str, Tensor], work: int = 0) -> "Rows":
        """Return the part of gradients `[examples, *shape]` by name of the parameter."""
        return cls({name: found.flatten(1) for name, found in rows.items()}, work)

    @property
    def names(self) -> Collection[str]:
        """See `Part.names`."""
        return self.rows.keys()

    @property
    def floats(self) -> int:
        """See `Part.floats`."""
        return self.work + sum(rows.numel() for rows in self.rows.values())

    @property
    def tokens(self) -> int:
        """See `Part.tokens`; rows are not computed from terms here."""
        return 1

    def squares(self) -> Squares:
        """See `Part.squares`."""
        return Squares(sum_of([_squared(block) for rows in self.rows.values() for _, block in _blocks(rows)]))

    def add_to(self, totals: Mapping[str, Tensor], scales: Tensor, keep: int) -> None:
        """See `Part.add_to`."""
        for name, rows in self.rows.items():
            total = totals[name].view(-1)
            for place, block in _blocks(rows):
                total[place].addmv_(block.T, scales, beta=keep)

    def without(self, excluded: Tensor) -> "Rows":
        """See `Part.without`."""
        return Rows({name: _zeroed(rows, excluded) for name, rows in self.rows.items()})


@dataclass(frozen=True)
class _Outer:
    """Base of gradients that are products of a layer's inputs and the derivatives by its outputs."""

    inputs: Tensor
    slopes: Tensor
    weight: str
    bias: str | None

    @property
    def names(self) -> Collection[str]:
        """See `Part.names`."""
        return _named(self.weight, self.bias)

    def without(self, excluded: Tensor) -> Self:
        """See `Part.without`."""
        inputs, slopes = _zeroed(self.inputs, excluded), _zeroed(self.slopes, excluded)
        return replace(self, inputs=inputs, slopes=slopes)


@dataclass(frozen=True)
class Products(_Outer):
    """Gradients of a dense layer on one vector for each example: products `slopes^T inputs`.

    Args:
        inputs: `[examples, in]`.
        slopes: Derivatives by the layer's outputs, `[examples, out]`.
        weight: Name of the parameter `[out, in]`.
        bias: Name of the parameter `[out]`; None if there is none or it is frozen.
    """

    @property
    def floats(self) -> int:
        """See `Part.floats`."""
        return 3 * (self.inputs.numel() + self.slopes.numel())

    @property
    def tokens(self) -> int:
        """See `Part.tokens`."""
        return 1

    def squares(self) -> Squares:
        """See `Part.squares`."""
        left = _squared(self.inputs)
        if self.bias is not None:
            left += 1.0
        return Squares(left.mul_(_squared(self.slopes)))

    def add_to(self, totals: Mapping[str, Tensor], scales: Tensor, keep: int) -> None:
        """See `Part.add_to`."""
        slopes = self.slopes * scales.unsqueeze(1)
        totals[self.weight].addmm_(slopes.T, self.inputs.double(), beta=keep)
        if self.bias is not None:
            _add(totals[self.bias], slopes.sum(0), keep)


@dataclass(frozen=True)
class Factors(_Outer):
    """Gradients of a matrix of weights as sums over tokens t of the products `slopes[t]^T inputs[t]`.

    Args:
        inputs: `[examples, tokens, in]`.
        slopes: Derivatives by the layer's outputs, `[examples, tokens, out]`.
        weight: Name of the parameter, `[out, in]` or of a shape that can be viewed so.
        bias: Name of the parameter `[out]`; None if there is none or it is frozen.
    """

    @property
    def floats(self) -> int:
        """See `Part.floats`."""
        return 3 * (self.inputs.numel() + self.slopes.numel()) + 4 * len(self.inputs) * self.tokens**2

    @property
    def tokens(self) -> int:
        """See `Part.tokens`."""
        return self.inputs.shape[1]

    def squares(self) -> Squares:
        """See `Part.squares`: from inner products of tokens, without the gradients themselves."""
        inputs, slopes = self.inputs.double(), self.slopes.double()
        left = torch.bmm(inputs, inputs.transpose(1, 2))
        if self.bias is not None:
            left += 1.0
        right = torch.bmm(slopes, slopes.transpose(1, 2))
        lengths = left.diagonal(dim1=1, dim2=2) * right.diagonal(dim1=1, dim2=2)
        return Squares(left.mul_(right).sum((1, 2)).clamp_(min=0.0), lengths.sqrt().sum(1).square_())

    def add_to(self, totals: Mapping[str, Tensor], scales: Tensor, keep: int) -> None:
        """See `Part.add_to`."""
        slopes = (self.slopes * scales[:, None, None]).flatten(0, 1)
        weight = totals[self.weight].view(slopes.shape[1], -1)
        weight.addmm_(slopes.T, self.inputs.double().flatten(0, 1), beta=keep)
        if self.bias is not None:
            _add(totals[self.bias], slopes.sum(0), keep)


@dataclass(frozen=True)
class Segments:
    """Gradients of an embedding: for each example, one vector for each of its distinct indices.

    Args:
        name: The parameter `[indices, width]`.
        examples: Owner of each vector, `[vectors]`.
        indices: Its row of the parameter, `[vectors]`.
        vectors: Float64 `[vectors, width]`.
        count: Number of examples.
    """

    name: str
    examples: Tensor
    indices: Tensor
    vectors: Tensor
    count: int

    @property
    def names(self) -> Collection[str]:
        """See `Part.names`."""
        return (self.name,)

    @property
    def floats(self) -> int:
        """See `Part.floats`."""
        return 4 * self.vectors.numel()

    @property
    def tokens(self) -> int:
        """See `Part.tokens`; vectors are not computed from terms here."""
        return 1

    def squares(self) -> Squares:
        """See `Part.squares`."""
        found = self.vectors.new_zeros(self.count)
        return Squares(found.index_add_(0, self.examples, _squared(self.vectors)))

    def add_to(self, totals: Mapping[str, Tensor], scales: Tensor, keep: int) -> None:
        """See `Part.add_to`."""
        if keep == 0:
            totals[self.name].zero_()
        totals[self.name].index_add_(0, self.indices, self.vectors * scales[self.examples, None])

    def without(self, excluded: Tensor) -> "Segments":
        """See `Part.without`."""
        vectors = _zeroed(self.vectors, excluded[self.examples])
        return Segments(self.name, self.examples, self.indices, vectors, self.count)


def sum_of(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum of tensors of one shape; the first may be overwritten."""
    found = tensors[0]
    for tensor in tensors[1:]:
        found += tensor
    return found


_BLOCK = 2**18
"""Floats that are converted to float64 at once: they stay in a processor's cache."""


def _blocks(rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield all columns of `[examples, params]` in float64, in blocks, with their places."""
    width = max(_BLOCK // max(len(rows), 1), 1)
    for start in range(0, rows.shape[1], width):
        place = slice(start, start + width)
        yield place, rows[:, place].double()


def _squared(rows: Tensor) -> Tensor:
    """Return the squared norms of rows `[rows, width]`, float64."""
    return norm(rows, 1, exact=True).square_()


def _zeroed(rows: Tensor, excluded: Tensor) -> Tensor:
    return rows.masked_fill(excluded.view(-1, *[1] * (rows.dim() - 1)), 0.0)


def _named(weight: str, bias: str | None) -> tuple[str, ...]:
    return (weight,) if bias is None else (weight, bias)


def _add(total: Tensor, part: Tensor, keep: int) -> None:
    if keep:
        total += part
    else:
        total.copy_(part)

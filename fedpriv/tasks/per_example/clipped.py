"""Sums of bounded gradients of single examples, for privacy of records.

Why a sum keeps its bound (`SLACK`). A row is an example's gradient, computed in the module's own precision; u is the
rounding unit 2^-53 of float64.

1. Norms are computed in float64 from the same numbers as the sums. Scales are those of `fedpriv.bounding`, whose margin
   of 2^-21 covers the norms' rounding: a scaled row is never longer than C. Norms from inner products of terms are off
   by at most (in + out + 2^6) u / 2 (2^8)^2 of themselves, for layers of up to 2^15 inputs and outputs below 2^-22.
2. A sum of R rows in float64 is off by at most R T u (the total length of their terms) for T terms a row, which is at
   most R^2 T 2^8 u C, because a scale never lets terms exceed 2^8 C (`MAX_CANCELLATION`). Groups have
   R <= 2^11 / sqrt(T) rows, so that this is below 2^-23 C.
3. Sums of groups are added in float64: m / R additions of at most m C, off by m^2 u C / R <= 2^-22 C for the numbers of
   examples m that are accepted.
4. If one example is replaced by another or excluded, all others have the same place in batches of the same shape, and
   the same bits. So only the sum of one group changes, by the row, twice its error of 2 and twice that of 3. In total
   2 C (1 + 2^-21) for a replaced example and C (1 + 2^-20) for an excluded one.

Point 4 needs a module without branches by content, and kernels whose result for one example does not depend on the
content of others: PyTorch's on CPUs (tests check this), deterministic algorithms on a GPU. It says nothing about
batches of another length, where other examples may change in their last bits: draw batches first, and exclude examples
by `mask`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite, isqrt, prod

import torch
from torch import Tensor, nn

from fedpriv.bounding import IN_PLACE, Bounded, scales_of
from fedpriv.errors import UserError
from fedpriv.tasks.dense import DenseLayers, slopes_of_losses
from fedpriv.tasks.per_example.capture import Unsuitable, chunk_parts, known_layers
from fedpriv.tasks.per_example.layers import is_plain
from fedpriv.tasks.per_example.parts import MAX_CANCELLATION, Part, Products, Rows, sum_of
from fedpriv.tasks.per_example.rows import Losses, cross_entropies, gradient_rows, losses_of, rows_one_by_one
from fedpriv.vectors import Layout, trainable

__all__ = ["MAX_FLOATS", "SLACK", "PerExample"]

SLACK = 2.0**-20
"""Relative excess over the bound of real arithmetic: one replaced example moves a sum by at most 2 C (1 + SLACK), one
excluded example by at most C (1 + SLACK). See the module's docstring."""

MAX_FLOATS = 2**24
"""Floats that the examples of one chunk may take (inputs of layers, derivatives, gradients), unless one example alone
takes more. The process needs a few times that: copies in float64, and the graph of the forward pass."""

_MAX_CHUNK = 256
_GROUP = 2**11
_LARGE_BLOCK = 2**25 - 2**16
_ALL = ""  # the name of all parameters together


@dataclass(frozen=True)
class _Plan:
    """How inputs of one shape are processed: it follows from shapes, never from the data.

    Args:
        layers: The layers with known gradients; None to compute gradients one by one.
        chunk: Examples at once.
        group: Most examples in one sum.
    """

    layers: dict[nn.Module, dict[str, str]] | None
    chunk: int
    group: int


class PerExample:
    """Bounded sums of the gradients of single examples of a module, at the parameters that it holds when called.

    Args:
        module: Maps `[examples, ...]` to outputs; every example's depend on it alone.
        layout: Layout of its trainable parameters.
        losses: Maps outputs and labels to the losses of the examples, `[examples]`.

    Raises:
        UserError: If a layer mixes examples.
    """

    def __init__(self, module: nn.Module, layout: Layout, losses: Losses) -> None:
        if Layout.of_module(module) != layout:
            raise ValueError("the layout is another module's")
        _refuse_mixing(module)
        self._module = module
        self._layout = layout
        self._losses = losses
        self._parameters = list(trainable(module).values())
        dense = DenseLayers.of_module(module)
        ordinary = all(is_plain(layer) for layer in module.modules())
        ordinary &= all(parameter.dtype in (torch.float32, torch.float64) for parameter in self._parameters)
        self._dense = dense if dense is not None and dense.size == layout.size and ordinary else None
        self._plans: dict[object, _Plan] = {}
        # The C library returns freed memory to the system beyond a threshold that grows with the largest block freed.
        # Without this block, each call would get the gradients' memory page by page again.
        torch.empty(_LARGE_BLOCK, dtype=torch.uint8)

    def clipped_sum(self, inputs: Tensor, labels: Tensor, bound: Bounded, mask: Tensor | None = None) -> Tensor:
        """Return the sum of the bounded gradients, float64 `[params]`; see `SLACK`.

        A gradient with NaN or infinity counts as zero. Maps other than those in `fedpriv.bounding.IN_PLACE` need all
        gradients one by one, which is slow.

        Args:
            inputs: `[examples, *input_shape]`.
            labels: `[examples, ...]`.
            bound: Bounds each example's gradient to C = `bound.l2_bound`.
            mask: Bool `[examples]`; False excludes an example, whose content then has no effect.

        Raises:
            UserError: If there are too many examples to keep the bound, or a layer mixes examples.
        """
        if len(labels) == 0:
            return torch.zeros(self._layout.size, dtype=torch.float64, device=inputs.device)
        plan = self._plan(inputs, labels, bound)
        if len(labels) ** 2 > 2**31 * plan.group:
            most = isqrt(2**31 * plan.group)
            raise UserError("data", f"at most {most:,} examples a client", f"{len(labels):,}", "Split the client")
        total, group, rows = None, self._empty(inputs), 0
        named = self._named(group)
        for x, y, kept in _chunks(plan.chunk, inputs, labels, mask):
            if rows + len(y) > plan.group:
                total = group.clone() if total is None else total.add_(group)
                rows = 0
            self._add_chunk(named, plan, x, y, bound, kept, keep=int(rows > 0))
            rows += len(y)
        return group if total is None else total.add_(group)

    def norms(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Return the l2 norms of the examples' gradients, float64 `[examples]`.

        A gradient that is not finite has the norm infinity or NaN. The norm of a gradient whose terms (of tokens) are
        more than `MAX_CANCELLATION` times as long in total is rounded up.
        """
        if len(labels) == 0:
            return torch.zeros(0, dtype=torch.float64, device=inputs.device)
        plan = self._plan(inputs, labels, None)
        found = [_norms(self._parts(plan, x, y), y) for x, y, _ in _chunks(plan.chunk, inputs, labels, None)]
        return torch.cat(found)

    def rows(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Return the examples' gradients `[examples, params]`, computed one by one: the reference of all the rest."""
        return gradient_rows(self._module, self._losses, inputs, labels)

    def is_fast(self, inputs: Tensor, labels: Tensor) -> bool:
        """Return True if gradients of such inputs are computed by layer, without computing them one by one.

        Raises:
            UserError: If a layer mixes examples.
        """
        return self._dense is not None or self._plan(inputs, labels, None).layers is not None

    def _add_chunk(
        self,
        totals: dict[str, Tensor],
        plan: _Plan,
        inputs: Tensor,
        labels: Tensor,
        bound: Bounded,
        kept: Tensor | None,
        keep: int,
    ) -> None:
        """Set `totals` to `keep` times `totals` plus the bounded gradients of a chunk."""
        if not isinstance(bound, IN_PLACE) or type(bound) not in IN_PLACE:
            parts: list[Part] = [Rows.of({_ALL: bound(self.rows(inputs, labels))})]
            norms = scales = torch.ones(len(labels), dtype=torch.float64, device=inputs.device)
        else:
            parts = self._parts(plan, inputs, labels)
            norms = _norms(parts, labels)
            scales = scales_of(norms, bound)
        if kept is not None or not isfinite(float(norms.sum())):
            excluded = ~torch.isfinite(norms) if kept is None else ~(kept & torch.isfinite(norms))
            parts = [part.without(excluded) for part in parts]
            scales.masked_fill_(excluded, 0.0)
        self._add_parts(totals, parts, scales, keep)

    def _add_parts(self, totals: dict[str, Tensor], parts: list[Part], scales: Tensor, keep: int) -> None:
        for part in parts:
            part.add_to(totals, scales, keep)
        if keep == 0:
            found = {name for part in parts for name in part.names}
            for name in set(totals) - found - {_ALL} if _ALL not in found else ():
                totals[name].zero_()

    def _empty(self, inputs: Tensor) -> Tensor:
        return torch.empty(self._layout.size, dtype=torch.float64, device=inputs.device)

    def _named(self, vector: Tensor) -> dict[str, Tensor]:
        return {**self._layout.unflatten(vector), _ALL: vector}

    def _parts(self, plan: _Plan, inputs: Tensor, labels: Tensor) -> list[Part]:
        if self._dense is not None:
            return self._dense_parts(self._dense, inputs, labels)
        if plan.layers is not None:
            try:
                return chunk_parts(self._module, plan.layers, self._losses, inputs, labels)
            except Unsuitable:
                pass
        return [Rows.of({_ALL: self.rows(inputs, labels)})]

    def _dense_parts(self, dense: DenseLayers, inputs: Tensor, labels: Tensor) -> list[Part]:
        """Return the same as `chunk_parts` with fewer small operations."""
        pairs = list(zip(self._parameters[::2], self._parameters[1::2], strict=True))
        names = [name for name, _ in self._layout.entries]
        parts: list[Part] = []
        with torch.no_grad():
            below, outputs = dense.forward(pairs, inputs.flatten(1))
            slope = self._slopes(outputs, labels)
            for i in reversed(range(len(pairs))):
                parts.append(Products(below[i], slope, names[2 * i], names[2 * i + 1]))
                if i > 0:
                    slope = (slope @ pairs[i][0]).mul_(below[i] > 0)
        return parts

    def _slopes(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the derivatives of the examples' losses by their outputs."""
        if self._losses is cross_entropies and outputs.dim() == 2 and labels.dim() == 1:
            return slopes_of_losses(outputs, labels)
        with torch.enable_grad():
            outputs.requires_grad_()
            (slopes,) = torch.autograd.grad(losses_of(self._losses, outputs, labels).sum(), [outputs])
        return slopes

    def _plan(self, inputs: Tensor, labels: Tensor, bound: Bounded | None) -> _Plan:
        known = bound is None or type(bound) in IN_PLACE
        key = (inputs.shape[1:], inputs.dtype, labels.shape[1:], labels.dtype, known)
        if key not in self._plans:
            self._plans[key] = self._make_plan(inputs, labels) if known else self._slow_plan(inputs)
        return self._plans[key]

    def _make_plan(self, inputs: Tensor, labels: Tensor) -> _Plan:
        if self._dense is not None:
            floats = 3 * sum(outputs + before for outputs, before in self._dense.shapes)
            return _Plan({}, _chunk_of(floats), _GROUP)
        x, y = _made_up(self._module, inputs), labels.new_zeros((_PROBE, *labels.shape[1:]))
        with _made_up_parameters(self._parameters):
            self._refuse_dependence(x)
            try:
                layers = known_layers(self._module)
                parts = [self._probe(layers, x[:n], y[:n]) for n in (_PROBE - 1, _PROBE)][-1]
            except Unsuitable:
                return self._slow_plan(inputs)
        floats = sum(part.floats for part in parts) // _PROBE
        group = isqrt(_GROUP**2 // max((part.tokens for part in parts), default=1))
        return _Plan(layers, min(_chunk_of(floats), group), group)

    def _slow_plan(self, inputs: Tensor) -> _Plan:
        return _Plan(None, _chunk_of(3 * self._layout.size + 16 * prod(inputs.shape[1:])), _GROUP)

    def _probe(self, layers: dict[nn.Module, dict[str, str]], inputs: Tensor, labels: Tensor) -> list[Part]:
        """Return the parts of made-up inputs after a comparison with gradients computed one by one.

        Raises:
            Unsuitable: If they differ, or a layer has no known gradients.
        """
        parts = chunk_parts(self._module, layers, self._losses, inputs, labels)
        rows = rows_one_by_one(self._module, self._losses, inputs, labels).double()
        scales = 1.0 + torch.arange(len(labels), dtype=torch.float64, device=inputs.device)
        found = self._empty(inputs)
        self._add_parts(self._named(found), parts, scales, keep=0)
        lengths = torch.linalg.vector_norm(rows, dim=1)
        off = torch.linalg.vector_norm(found - scales @ rows)
        close = bool(torch.isfinite(off)) and float(off) <= 1e-3 * float(lengths.sum())
        if not close or not torch.allclose(_norms(parts, labels), lengths, rtol=1e-2):
            raise Unsuitable("gradients by layer differ from those computed one by one")
        return parts

    def _refuse_dependence(self, inputs: Tensor) -> None:
        """Raise UserError if the outputs of an example depend on other examples."""
        with torch.no_grad():
            together, alone = self._module(inputs), torch.cat([self._module(x) for x in inputs.split(1)])
        if together.shape != alone.shape or not torch.allclose(together, alone, 1e-3, 1e-4, equal_nan=True):
            expected = "outputs of each example that depend on it alone"
            remedy = "Remove layers that mix examples or draw random numbers: a bound for one example needs this"
            raise UserError("model", expected, "outputs that change beside different examples", remedy)


_PROBE = 3


def _made_up(module: nn.Module, inputs: Tensor) -> Tensor:
    """Return public inputs of the same shape for a trial: normal numbers, or the first indices of every embedding."""
    shape = (_PROBE, *inputs.shape[1:])
    if inputs.is_floating_point():
        generator = torch.Generator().manual_seed(0)
        return torch.randn(shape, generator=generator).to(inputs)
    sizes = [layer.num_embeddings for layer in module.modules() if isinstance(layer, nn.Embedding)]
    return (torch.arange(prod(shape)) % min([*sizes, 7]) if sizes else torch.zeros(prod(shape))).view(shape).to(inputs)


@contextmanager
def _made_up_parameters(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Set parameters to public numbers for a trial, so that its result does not depend on the model."""
    generator, before = torch.Generator().manual_seed(1), [parameter.data for parameter in parameters]
    try:
        for parameter in parameters:
            drawn = torch.randn(parameter.shape, generator=generator) / max(prod(parameter.shape[1:]), 1) ** 0.5
            parameter.data = drawn.to(parameter)
        yield
    finally:
        for parameter, data in zip(parameters, before, strict=True):
            parameter.data = data


def _chunk_of(floats: int) -> int:
    return min(max(MAX_FLOATS // max(floats, 1), 1), _MAX_CHUNK)


def _chunks(
    size: int, inputs: Tensor, labels: Tensor, mask: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    for start in range(0, len(labels), size):
        part = slice(start, start + size)
        yield inputs[part], labels[part], None if mask is None else mask[part]


def _norms(parts: list[Part], labels: Tensor) -> Tensor:
    """Return the norms of the examples' gradients over all parts; not finite if one is not."""
    if not parts:
        return torch.zeros(len(labels), dtype=torch.float64, device=labels.device)
    squares = [part.squares() for part in parts]
    found = [s.norms if s.terms is None else torch.maximum(s.norms, s.terms / MAX_CANCELLATION**2) for s in squares]
    return sum_of(found).sqrt_()


_MIXING = (nn.modules.batchnorm._BatchNorm, nn.SyncBatchNorm)


def _refuse_mixing(module: nn.Module) -> None:
    """Raise UserError if a layer computes with statistics of several examples."""
    for name, layer in module.named_modules():
        found = ""
        if isinstance(layer, _MIXING) and (layer.training or not layer.track_running_stats):
            found = "statistics of the batch"
        elif isinstance(layer, nn.Embedding) and layer.scale_grad_by_freq:
            found = "scale_grad_by_freq"
        elif isinstance(layer, nn.Embedding | nn.EmbeddingBag) and layer.max_norm is not None:
            found = "max_norm"
        if found:
            got = f"a {type(layer).__name__} with {found}"
            remedy = "Replace it (GroupNorm, LayerNorm): no bound for one example holds if examples mix"
            raise UserError(f"model layer {name}", "layers that do not mix examples", got, remedy)

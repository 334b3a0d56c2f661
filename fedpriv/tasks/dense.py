"""Gradients of many clients at once for stacks of dense layers, written out as matrix products.

A general batched gradient (`torch.func.vmap`) pays for every small operation of every layer. For dense layers with
ReLU between them, forward and backward are a few products. If clients share a model, one product serves all examples;
gradients take one batched product, with one batch per client. A single layer is softmax regression, for which there
is a C form.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from fedpriv.bounding import InPlace, scales_of
from fedpriv.tasks.native import softmax_in_c
from fedpriv.vectors import norm

__all__ = ["MAX_EXAMPLES", "DenseLayers", "slopes_of_losses"]

MAX_EXAMPLES = 2**15
"""Most examples of a client in one call of `DenseLayers.clipped_sums`."""


@dataclass(frozen=True)
class DenseLayers:
    """Dense layers with ReLU between them, and a loss: softmax and cross entropy by default.

    Args:
        shapes: `(outputs, inputs)` of each layer; the model vector holds the weights `[outputs, inputs]` and
            the biases `[outputs]` of one layer after the other.
        losses: Returns the loss of each example, `[examples]`, from outputs `[examples, outputs]` and labels
            `[examples, ...]`; None for the cross entropy, the slope of which is written out.
    """

    shapes: tuple[tuple[int, int], ...]
    losses: Callable[[Tensor, Tensor], Tensor] | None = None

    @classmethod
    def of_module(
        cls, module: nn.Module, losses: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> "DenseLayers | None":
        """Return the layers of a `Sequential` of Flatten, Linear, ReLU, Linear, ...; None for any other module."""
        if type(module) is not nn.Sequential or len(module) < 2 or not _is_flatten(module[0]):
            return None
        layers, between = list(module)[1::2], list(module)[2::2]
        linear = [layer for layer in layers if type(layer) is nn.Linear and layer.bias is not None]
        if len(linear) < len(layers) or len(layers) != len(between) + 1:
            return None
        if not all(type(layer) is nn.ReLU for layer in between):
            return None
        return cls(tuple((layer.out_features, layer.in_features) for layer in linear), losses)

    def gradients(self, models: Tensor, inputs: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """Return the gradients `[clients, params]` of the clients' weighted losses; see `Task.gradients`.

        Args:
            models: `[params]` for all clients, or `[clients, params]`.
            inputs: `[clients, examples, *input_shape]`.
            labels: `[clients, examples, ...]`.
            weights: `[clients, examples]`; zero for padding.
        """
        clients, examples = labels.shape[:2]
        inputs = inputs.reshape(clients, examples, self.shapes[0][1])
        if len(self.shapes) == 1 and self.losses is None and (in_c := softmax_in_c()) is not None:
            found = in_c.gradients(models, inputs, labels, weights)
            if found is not None:
                return found
        layers = list(self._layers(models))
        outputs, logits = self.forward(layers, inputs)
        slope = self.slope(logits, labels, weights)
        found = inputs.new_empty((clients, self.size))
        for (weight_part, bias_part), (weight, _), below in zip(
            reversed(list(self._layers(found))), reversed(layers), reversed(outputs), strict=True
        ):
            torch.sum(slope, dim=1, out=bias_part)
            torch.bmm(slope.transpose(1, 2), below, out=weight_part)
            if below is not outputs[0]:
                slope = (slope @ weight).mul_(below > 0)
        return found

    def forward(self, layers: Sequence[tuple[Tensor, Tensor]], inputs: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the inputs `[..., examples, width]` of each layer, and the logits `[..., examples, classes]`.

        Args:
            layers: Weights `[outputs, inputs]` and biases; for several models at once, with a first axis.
            inputs: `[..., examples, width]`.
        """
        found = [inputs]
        for i, (weight, bias) in enumerate(layers):
            linear = _affine(found[-1], weight, bias)
            found.append(linear if i == len(layers) - 1 else linear.relu_())
        return found[:-1], found[-1]

    def clipped_sums(self, models: Tensor, inputs: Tensor, labels: Tensor, mask: Tensor, bound: InPlace) -> Tensor:
        """Return the sums of the clients' bounded gradients, float64 `[clients, params]`.

        Each example's gradient of its cross entropy is bounded by itself; one that is not finite counts as zero. As
        for one client in `fedpriv.tasks.per_example`, no sum exceeds its bound by more than `SLACK` there.

        Args:
            models: `[params]` for all clients, or `[clients, params]`.
            inputs: `[clients, examples, *input_shape]`, at most `MAX_EXAMPLES` examples.
            labels: `[clients, examples]`.
            mask: Bool `[clients, examples]`; False for padding.
            bound: One of `fedpriv.bounding.IN_PLACE`.
        """
        clients, examples = labels.shape[:2]
        if examples > MAX_EXAMPLES:
            raise ValueError(f"at most {MAX_EXAMPLES} examples of a client at once, {examples} given")
        layers = list(self._layers(models))
        below, logits = self.forward(layers, inputs.reshape(clients, examples, self.shapes[0][1]))
        slopes = [self.slope(logits, labels, logits.new_ones((clients, examples)))]
        for (weight, _), values in zip(reversed(layers[1:]), reversed(below[1:]), strict=True):
            slopes.append((slopes[-1] @ weight).mul_(values > 0))
        pairs = list(zip(below, reversed(slopes), strict=True))
        squares = [norm(a, -1, exact=True).square_().add_(1.0) * norm(b, -1, exact=True).square_() for a, b in pairs]
        norms = torch.stack(squares).sum(0).sqrt_()
        excluded = ~(mask & torch.isfinite(norms))
        scales = scales_of(norms, bound).masked_fill_(excluded, 0.0).unsqueeze(-1)
        if bool(excluded.any()):
            pairs = [tuple(part.masked_fill(excluded.unsqueeze(-1), 0.0) for part in pair) for pair in pairs]
        found = torch.empty((clients, self.size), dtype=torch.float64, device=inputs.device)
        for (weight_part, bias_part), (values, slope) in zip(self._layers(found), pairs, strict=True):
            scaled = slope * scales
            torch.sum(scaled, dim=1, out=bias_part)
            torch.bmm(scaled.transpose(1, 2), values.double(), out=weight_part)
        return found

    def slope(self, outputs: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """Return the derivative of the weighted losses by the outputs, `[clients, examples, outputs]`."""
        if self.losses is None:
            return _slope_of_loss(outputs, labels, weights)
        with torch.enable_grad():
            leaf = outputs.detach().flatten(0, 1).requires_grad_()
            total = (self.losses(leaf, labels.flatten(0, 1)) * weights.flatten()).sum()
            return torch.autograd.grad(total, leaf)[0].view_as(outputs)

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(prod(shape) + shape[0] for shape in self.shapes)

    def _layers(self, vectors: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield views of weights `[..., outputs, inputs]` and biases `[..., outputs]` of vectors `[..., params]`."""
        start, lead = 0, vectors.shape[:-1]
        for shape in self.shapes:
            middle = start + prod(shape)
            yield vectors[..., start:middle].view(*lead, *shape), vectors[..., middle : middle + shape[0]]
            start = middle + shape[0]
        if start != vectors.shape[-1]:
            raise ValueError(f"vectors {list(lead)} + [{start}] expected, {list(vectors.shape)} given")


def _is_flatten(layer: nn.Module) -> bool:
    return type(layer) is nn.Flatten and (layer.start_dim, layer.end_dim) == (1, -1)


def _affine(below: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the outputs `[clients, examples, outputs]` of a layer, shared or with one weight per client."""
    if weight.dim() == 2:
        return torch.nn.functional.linear(below, weight, bias)
    return torch.baddbmm(bias.unsqueeze(1), below, weight.transpose(1, 2))


def slopes_of_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the derivatives of the cross entropies by the logits, `[..., classes]`, for labels `[...]`."""
    slopes = torch.softmax(logits, dim=-1)
    return slopes.scatter_add_(-1, labels.unsqueeze(-1), slopes.new_tensor(-1.0).expand(*labels.shape, 1))


def _slope_of_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Return the derivative of the weighted cross entropies by the logits, `[clients, examples, classes]`."""
    slope = slopes_of_losses(logits, labels)
    return slope.mul_(weights.unsqueeze(-1))

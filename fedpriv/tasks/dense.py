"""Gradients of many clients at once for stacks of dense layers, written out as matrix products.

A general batched gradient (`torch.func.vmap`) pays for every small operation of every layer. For dense layers with
ReLU between them, forward and backward are a few products. If clients share a model, one product serves all examples;
gradients take one batched product, with one batch per client.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

__all__ = ["DenseLayers"]


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
        layers = list(self._layers(models))
        outputs = [inputs.reshape(clients, examples, self.shapes[0][1])]
        for i, (weight, bias) in enumerate(layers):
            linear = _affine(outputs[-1], weight, bias)
            outputs.append(linear if i == len(layers) - 1 else linear.relu_())
        slope = self.slope(outputs.pop(), labels, weights)
        found = inputs.new_empty((clients, self.size))
        for (weight_part, bias_part), (weight, _), below in zip(
            reversed(list(self._layers(found))), reversed(layers), reversed(outputs), strict=True
        ):
            torch.sum(slope, dim=1, out=bias_part)
            torch.bmm(slope.transpose(1, 2), below, out=weight_part)
            if below is not outputs[0]:
                slope = (slope @ weight).mul_(below > 0)
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
            yield vectors[..., start:middle].unflatten(-1, shape), vectors[..., middle : middle + shape[0]]
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


def _slope_of_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Return the derivative of the weighted cross entropies by the logits, `[clients, examples, classes]`."""
    slope = torch.softmax(logits, dim=-1)
    slope.scatter_add_(-1, labels.unsqueeze(-1), slope.new_full((1, 1, 1), -1.0).expand(*labels.shape, 1))
    return slope.mul_(weights.unsqueeze(-1))

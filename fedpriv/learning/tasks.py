"""What is learned: a module seen as a function of one flat vector, and its loss on labelled examples."""

from collections.abc import Iterator
from functools import reduce
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fedpriv.vectors import Layout

__all__ = ["PIECE_FLOATS", "Task"]

# Floats of inputs that go through the module at once. Activations are many times larger: full gradients of thousands of
# images must be summed piece by piece. The pieces are part of how gradients are rounded, the same in every engine.
PIECE_FLOATS = 2**22


class Task:
    """Classification by a module whose parameters are the flat model vector.

    Args:
        module: Maps inputs `[examples, *input_shape]` to logits `[examples, classes]`; no buffers.
        device: Where gradients are computed.
    """

    def __init__(self, module: nn.Module, device: torch.device | str = "cpu") -> None:
        self.layout = Layout.of_module(module)
        self.device = torch.device(device)
        self._module = module.to(self.device)

    def initial_model(self) -> Tensor:
        """The module's own parameters as a vector `[params]` on the CPU."""
        return self.layout.flatten(dict(self._module.named_parameters())).detach().cpu().clone()

    def logits(self, model: Tensor, inputs: Tensor) -> Tensor:
        """Logits `[examples, classes]` of the model `[params]` on inputs."""
        return functional_call(self._module, self.layout.unflatten(model), (inputs,))

    def loss(self, model: Tensor, inputs: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """Weighted sum of the examples' cross entropies (nats); `weights` `[examples]`, 1/m each for the mean."""
        losses = F.cross_entropy(self.logits(model, inputs), labels, reduction="none")
        return (losses * weights).sum()

    def gradient(self, model: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
        """Gradient `[params]` of the mean loss over the examples; zero if there are none."""
        if len(labels) == 0:
            return torch.zeros_like(model)
        weights = torch.full((len(labels),), 1.0 / len(labels), device=model.device)
        leaf = model.detach().requires_grad_()
        pieces = _pieces(_width(inputs, 1), inputs, labels, weights)
        gradients = (torch.autograd.grad(self.loss(leaf, x, y, w), leaf)[0] for x, y, w in pieces)
        return reduce(torch.add, gradients)

    def gradients(self, models: Tensor, inputs: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """Gradients `[clients, params]` of many clients' weighted losses at once.

        Args:
            models: `[params]` where all clients stand at one model, else `[clients, params]`.
            inputs: `[clients, examples, *input_shape]`.
            labels: `[clients, examples]`.
            weights: `[clients, examples]`; zero for padding.
        """
        by_client = 0 if models.dim() == 2 else None
        batched = vmap(grad(self.loss), in_dims=(by_client, 0, 0, 0))
        pieces = _pieces(_width(inputs, 2) * len(inputs), inputs, labels, weights, dim=1)
        return reduce(torch.add, (batched(models, x, y, w) for x, y, w in pieces))

    def evaluate(self, model: Tensor, inputs: Tensor, labels: Tensor) -> tuple[float, float]:
        """Mean loss (nats) and accuracy (0 to 1) of the model `[params]` on labelled examples."""
        model, loss, right = model.to(self.device), 0.0, 0
        with torch.no_grad():
            for x, y in _pieces(_width(inputs, 1), inputs, labels):
                logits = self.logits(model, x.to(self.device))
                y = y.to(self.device)
                loss += float(F.cross_entropy(logits, y, reduction="sum").double())
                right += int((logits.argmax(dim=1) == y).sum())
        return loss / len(labels), right / len(labels)


def _width(inputs: Tensor, lead: int) -> int:
    """Floats of one example, behind `lead` leading axes."""
    return max(prod(inputs.shape[lead:]), 1)


def _pieces(width: int, *tensors: Tensor, dim: int = 0) -> Iterator[tuple[Tensor, ...]]:
    """Slices of tensors along `dim`, each of at most `PIECE_FLOATS` / `width` examples; at least one slice."""
    size = max(PIECE_FLOATS // width, 1)
    return zip(*(tensor.split(size, dim) for tensor in tensors), strict=True)

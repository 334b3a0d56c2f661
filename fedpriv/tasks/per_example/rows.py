"""Gradients of single examples, each computed on its own: for layers without a closed form, and to check the others."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

from fedpriv.vectors import trainable

__all__ = ["Losses", "cross_entropies", "gradient_rows", "losses_of", "rows_one_by_one"]

Losses = Callable[[Tensor, Tensor], Tensor]


def cross_entropies(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return the cross entropies (nats) of classes, `[examples]`; dense nets know its derivatives."""
    return cross_entropy(outputs, labels, reduction="none")


def losses_of(losses: Losses, outputs: Tensor, labels: Tensor) -> Tensor:
    """Return the losses `[examples]`, checked for their shape.

    Raises:
        ValueError: If there is not one loss for each example.
    """
    found = losses(outputs, labels)
    if found.shape != (len(labels),):
        raise ValueError(f"losses of shape [{len(labels)}] expected, {list(found.shape)} given: use reduction='none'")
    return found


def gradient_rows(module: nn.Module, losses: Losses, inputs: Tensor, labels: Tensor) -> Tensor:
    """Return the gradients `[examples, params]` of every example's loss by the module's trainable parameters."""
    if len(labels) == 0:
        return torch.zeros(0, sum(parameter.numel() for parameter in trainable(module).values()))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
            return _by_vmap(module, losses, inputs, labels)
    except (RuntimeError, NotImplementedError):  # an operation or a branch that vmap does not know
        return rows_one_by_one(module, losses, inputs, labels)


def _by_vmap(module: nn.Module, losses: Losses, inputs: Tensor, labels: Tensor) -> Tensor:
    parameters = {name: parameter.detach() for name, parameter in trainable(module).items()}

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        outputs = functional_call(module, parameters, (x.unsqueeze(0),))
        return losses_of(losses, outputs, y.unsqueeze(0)).sum()

    found = vmap(grad(loss), in_dims=(None, 0, 0), randomness="different")(parameters, inputs, labels)
    return torch.cat([found[name].flatten(1) for name in parameters], dim=1)


@torch.enable_grad()
def rows_one_by_one(module: nn.Module, losses: Losses, inputs: Tensor, labels: Tensor) -> Tensor:
    """Return the same as `gradient_rows`, at least one, with a backward pass for each example.

    For a few examples, this is faster: the first use of vmap imports PyTorch's compiler, for seconds.
    """
    parameters = list(trainable(module).values())
    rows = []
    for i in range(len(labels)):
        loss = losses_of(losses, module(inputs[i : i + 1]), labels[i : i + 1]).sum()
        parts = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([part.reshape(-1) for part in parts]))
    return torch.stack(rows)

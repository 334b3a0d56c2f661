"""One forward and one backward pass that records the inputs of layers and the derivatives by their outputs."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from fedpriv.tasks.per_example.layers import LAYERS, is_plain
from fedpriv.tasks.per_example.parts import Part
from fedpriv.tasks.per_example.rows import Losses, losses_of
from fedpriv.vectors import trainable

__all__ = ["Unsuitable", "chunk_parts", "known_layers"]


class Unsuitable(Exception):  # noqa: N818 - not an error: the gradients are then computed one by one
    """Gradients by layer would be wrong or are not known; the text says why."""


@dataclass(frozen=True)
class _Call:
    inputs: Tensor
    version: int
    outputs: GradientEdge


def known_layers(module: nn.Module) -> dict[nn.Module, dict[str, str]]:
    """Return the layers that hold the trainable parameters, with the names in the layout of each one's parameters.

    Raises:
        Unsuitable: If a parameter is in a layer of another type or in several layers.
    """
    names = {id(parameter): name for name, parameter in trainable(module).items()}
    found: dict[nn.Module, dict[str, str]] = {}
    owners: Counter[int] = Counter()
    for path, layer in module.named_modules(remove_duplicate=False):
        own = {name: names[id(p)] for name, p in layer.named_parameters(recurse=False) if id(p) in names}
        if not own:
            continue
        if type(layer) not in LAYERS or not is_plain(layer):
            raise Unsuitable(f"{path or 'the module'} is a {type(layer).__name__}")
        owners.update(id(p) for p in layer.parameters(recurse=False))
        found[layer] = own
    shared = [name for key, name in names.items() if owners[key] != 1]
    if shared:
        raise Unsuitable(f"{shared[0]} is used by several layers")
    return found


def chunk_parts(
    module: nn.Module,
    layers: Mapping[nn.Module, Mapping[str, str]],
    losses: Losses,
    inputs: Tensor,
    labels: Tensor,
) -> list[Part]:
    """Return the gradients of a chunk's examples, one part for each layer that was used.

    Raises:
        Unsuitable: If a layer or a parameter is used in another way than once on all examples.
    """
    calls: dict[nn.Module, _Call] = {}
    hooks = [layer.register_forward_hook(_recorder(calls)) for layer in layers]
    try:
        with torch.enable_grad():
            loss = losses_of(losses, module(inputs), labels).sum()
    finally:
        for hook in hooks:
            hook.remove()
    counts = _require_single_uses(layers, calls, loss)
    used = list(calls)
    if not used or not loss.requires_grad:
        return []
    slopes = torch.autograd.grad(loss, [calls[layer].outputs for layer in used], allow_unused=True)
    parts = []
    for layer, slope in zip(used, slopes, strict=True):
        call = calls[layer]
        if slope is None:
            if any(counts[id(getattr(layer, name))] for name in layers[layer]):
                raise Unsuitable("a parameter is used outside its layer")
            continue
        if call.inputs._version != call.version:
            raise Unsuitable(f"the inputs of a {type(layer).__name__} are changed later")
        if len(slope) != len(labels) or slope.dtype not in (torch.float32, torch.float64):
            raise Unsuitable(f"a {type(layer).__name__} has outputs of shape {list(slope.shape)}, {slope.dtype}")
        parts.append(LAYERS[type(layer)].gradients(layer, call.inputs, slope, layers[layer]))
    return parts


def _recorder(calls: dict[nn.Module, _Call]) -> Callable[[nn.Module, Any, Any], None]:
    def record(layer: nn.Module, args: Any, outputs: Any) -> None:
        if layer in calls or len(args) != 1 or not isinstance(outputs, Tensor) or not outputs.requires_grad:
            raise Unsuitable(f"a {type(layer).__name__} is called twice, or without gradients")
        given = args[0].detach()
        if given.dim() < LAYERS[type(layer)].axes:
            raise Unsuitable(f"a {type(layer).__name__} has inputs of shape {list(given.shape)}")
        calls[layer] = _Call(given, given._version, get_gradient_edge(outputs))

    return record


def _require_single_uses(
    layers: Mapping[nn.Module, Mapping[str, str]], calls: Mapping[nn.Module, _Call], loss: Tensor
) -> Counter[int]:
    """Return how often the graph of `loss` reads each parameter, by its id.

    Raises:
        Unsuitable: If it reads a parameter more often than its layer's call does.
    """
    expected: dict[int, int] = {}
    for layer, names in layers.items():
        uses = LAYERS[type(layer)].uses if layer in calls else 0
        for name in names:
            expected[id(getattr(layer, name))] = uses
    counts: Counter[int] = Counter()
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for following, _ in node.next_functions:
            variable = getattr(following, "variable", None)
            if variable is not None:
                counts[id(variable)] += 1
            elif following is not None:
                waiting.append(following)
    if any(counts[key] > uses for key, uses in expected.items()):
        raise Unsuitable("a parameter is used outside its layer")
    return counts

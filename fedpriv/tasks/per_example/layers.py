"""Layer types whose gradients by example are known in closed form.

| layer | form of its gradients |
|---|---|
| `Linear`, one vector an example | products of inputs and slopes: never computed by example |
| `Linear`, tokens | the same if tokens are few (64 T^2 < in x out), otherwise one product for each example |
| `Conv1d`, `Conv2d`, `Conv3d` | convolution, a group for each example; images of few channels or places: patches |
| `Embedding` | one vector for each distinct index of an example |
| `LayerNorm`, `GroupNorm`, `RMSNorm`, `OrientedNorm` | computed by example: they are small |
| `LiftingConv`, `GroupConv` | as a convolution, then turned back |

The choice follows from shapes alone, so that results are equal on every machine and engine. Types are compared
exactly: a subclass may compute something else.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedpriv.tasks.convolution import DirectConv2d
from fedpriv.tasks.equivariant import ORIENTATIONS, GroupConv, LiftingConv, OrientedNorm
from fedpriv.tasks.per_example.parts import Factors, Part, Products, Rows, Segments

__all__ = ["LAYERS", "Layer", "is_plain"]

Names = Mapping[str, str]
"""Names in the layout of a layer's trainable parameters, by their names in the layer."""


@dataclass(frozen=True)
class Layer:
    """A layer type.

    Args:
        gradients: Returns the gradients of a chunk's examples from the layer, its inputs `[examples, ...]`, the
            derivatives by its outputs `[examples, ...]` and the names of its trainable parameters.
        axes: Least number of axes of its inputs.
        uses: Times that its forward reads each parameter.
    """

    gradients: Callable[[nn.Module, Tensor, Tensor, Names], Part]
    axes: int = 2
    uses: int = 1


def is_plain(layer: nn.Module) -> bool:
    """Return True if a layer has neither hooks nor a replaced `forward`, which could change the result of its type."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return "forward" not in vars(layer) and not any(hooks)


def _linear(_: nn.Module, inputs: Tensor, slopes: Tensor, names: Names) -> Part:
    if "weight" in names and inputs.dim() == 2:
        return Products(inputs, slopes, names["weight"], names.get("bias"))
    inputs = inputs.reshape(len(inputs), -1, inputs.shape[-1])
    slopes = slopes.reshape(len(slopes), -1, slopes.shape[-1])
    if "weight" in names and _few_terms(inputs.shape[1], inputs.shape[2] * slopes.shape[2]):
        return Factors(inputs, slopes, names["weight"], names.get("bias"))
    rows = {}
    if "weight" in names:
        rows[names["weight"]] = torch.bmm(slopes.transpose(1, 2), inputs)
    if "bias" in names:
        rows[names["bias"]] = slopes.sum(1)
    return Rows.of(rows)


def _conv(layer: nn.Module, inputs: Tensor, slopes: Tensor, names: Names) -> Part:
    assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    rows = {}
    if "weight" in names:
        padding = layer.padding
        if isinstance(padding, str) or layer.padding_mode != "zeros":
            mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
            inputs = functional.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)
            padding = (0,) * len(layer.stride)
        shape = tuple(layer.weight.shape)
        places = prod(slopes.shape[2:])
        if layer.groups == 1 and len(shape) == 4 and _few_terms(places, prod(shape)):
            patches = _patches(inputs, slopes, shape, layer.stride, padding, layer.dilation)
            return Factors(
                patches.transpose(1, 2), slopes.flatten(2).transpose(1, 2), names["weight"], names.get("bias")
            )
        settings = (layer.stride, padding, layer.dilation, layer.groups)
        rows[names["weight"]] = _kernel_rows(inputs, slopes, shape, *settings)
    if "bias" in names:
        rows[names["bias"]] = slopes.flatten(2).sum(2)
    return Rows.of(rows, work=_work(inputs, slopes))


def _work(inputs: Tensor, slopes: Tensor) -> int:
    """Return the floats of the numbers around a convolution: both sides and their copies."""
    return 2 * inputs.numel() + 3 * slopes.numel()


_FEW_CHANNELS = 8
"""With fewer, grouped convolutions are slow on CPUs: with 50 images [3, 32, 32] and 8 kernels of side 5 they take 9.6
ms, patches 4.1; with 8 channels and 16 kernels 1.3 and 3.3."""

_PATCH_FLOATS = 2**20


def _few_terms(terms: int, parameters: int) -> bool:
    """Return True if sums of products are cheaper than every example's gradient.

    Measured in float64 with 50 examples: equal at 4 terms for 32 x 32 parameters, 6 for 64 x 64, 16 for 64 x 256, 24
    for 256 x 256 and about 160 for 1024 x 1024.
    """
    return 64 * terms**2 < parameters


def _kernel_rows(
    inputs: Tensor,
    slopes: Tensor,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """Return the gradients `[examples, *shape]` by the kernels of a convolution."""
    if groups == 1 and len(stride) == 2 and shape[1] < _FEW_CHANNELS:
        size = max(_PATCH_FLOATS // (prod(shape[1:]) * prod(slopes.shape[2:])), 1)
        found = [
            torch.bmm(y.flatten(2), _patches(x, y, shape, stride, padding, dilation).transpose(1, 2))
            for x, y in zip(inputs.split(size), slopes.split(size), strict=True)
        ]
        return torch.cat(found).view(len(inputs), *shape)
    examples, size = len(inputs), len(stride)
    kernels = inputs.new_empty(1).expand(examples * shape[0], *shape[1:])
    found = torch.ops.aten.convolution_backward(
        slopes.reshape(1, -1, *slopes.shape[2:]),
        inputs.reshape(1, -1, *inputs.shape[2:]),
        kernels,
        None,
        stride,
        padding,
        dilation,
        False,
        (0,) * size,
        examples * groups,
        (False, True, False),
    )[1]
    return found.view(examples, *shape)


def _patches(
    inputs: Tensor,
    slopes: Tensor,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Tensor:
    """Return the patches that the kernels of an image convolution see, `[examples, channels x height x width, places]`.

    Several times faster than `torch.nn.functional.unfold`.
    """
    image = functional.pad(inputs.contiguous(), (padding[1], padding[1], padding[0], padding[0])).contiguous()
    steps = image.stride()
    rows, columns = slopes.shape[2:]
    patches = image.as_strided(
        (len(image), shape[1], shape[2], shape[3], rows, columns),
        (*steps[:2], steps[2] * dilation[0], steps[3] * dilation[1], steps[2] * stride[0], steps[3] * stride[1]),
    )
    return patches.reshape(len(image), shape[1] * shape[2] * shape[3], rows * columns)


def _lifting_conv(layer: nn.Module, inputs: Tensor, slopes: Tensor, names: Names) -> Part:
    assert isinstance(layer, LiftingConv)
    after, before, side, _ = layer.weight.shape
    rows = _square_kernel_rows(inputs, slopes, (after * ORIENTATIONS, before, side, side))
    turned = rows.unflatten(1, (after, ORIENTATIONS))
    back = [torch.rot90(turned[:, :, turn], -turn, (-2, -1)) for turn in range(ORIENTATIONS)]
    return Rows.of({names["weight"]: torch.stack(back).sum(0)}, work=_work(inputs, slopes) + 2 * rows.numel())


def _group_conv(layer: nn.Module, inputs: Tensor, slopes: Tensor, names: Names) -> Part:
    assert isinstance(layer, GroupConv)
    after, before, _, side, _ = layer.weight.shape
    rows = _square_kernel_rows(inputs, slopes, (after * ORIENTATIONS, before * ORIENTATIONS, side, side))
    turned = rows.unflatten(1, (after, ORIENTATIONS)).unflatten(3, (before, ORIENTATIONS))
    back = [torch.rot90(turned[:, :, turn].roll(-turn, dims=3), -turn, (-2, -1)) for turn in range(ORIENTATIONS)]
    return Rows.of({names["weight"]: torch.stack(back).sum(0)}, work=_work(inputs, slopes) + 2 * rows.numel())


def _square_kernel_rows(inputs: Tensor, slopes: Tensor, shape: tuple[int, ...]) -> Tensor:
    half = shape[-1] // 2
    return _kernel_rows(inputs, slopes, shape, (1, 1), (half, half), (1, 1), 1)


def _oriented_norm(layer: nn.Module, inputs: Tensor, slopes: Tensor, names: Names) -> Part:
    assert isinstance(layer, OrientedNorm)
    maps = len(layer.weight)
    scaled = slopes * functional.group_norm(inputs, maps)
    by_map = {"weight": scaled, "bias": slopes}
    return Rows.of({names[name]: by_map[name].unflatten(1, (maps, ORIENTATIONS)).flatten(2).sum(2) for name in names})


def _group_norm(layer: nn.Module, inputs: Tensor, slopes: Tensor, names: Names) -> Part:
    assert isinstance(layer, nn.GroupNorm)
    rows = {}
    if "weight" in names:
        scaled = slopes * functional.group_norm(inputs, layer.num_groups, eps=layer.eps)
        rows[names["weight"]] = scaled.reshape(*scaled.shape[:2], -1).sum(2)
    if "bias" in names:
        rows[names["bias"]] = slopes.reshape(*slopes.shape[:2], -1).sum(2)
    return Rows.of(rows)


def _layer_norm(layer: nn.Module, inputs: Tensor, slopes: Tensor, names: Names) -> Part:
    assert isinstance(layer, nn.LayerNorm | nn.RMSNorm)
    shape = layer.normalized_shape
    rows = {}
    if "weight" in names:
        if isinstance(layer, nn.LayerNorm):
            normalized = functional.layer_norm(inputs, shape, eps=layer.eps)
        else:
            normalized = functional.rms_norm(inputs, shape, eps=layer.eps)
        rows[names["weight"]] = (slopes * normalized).reshape(len(slopes), -1, *shape).sum(1)
    if "bias" in names:
        rows[names["bias"]] = slopes.reshape(len(slopes), -1, *shape).sum(1)
    return Rows.of(rows)


def _embedding(layer: nn.Module, inputs: Tensor, slopes: Tensor, names: Names) -> Part:
    assert isinstance(layer, nn.Embedding)
    examples, width = len(inputs), layer.embedding_dim
    owners = torch.arange(examples, device=inputs.device).view(-1, *[1] * (inputs.dim() - 1)).expand_as(inputs)
    owners, indices, slopes = owners.reshape(-1), inputs.reshape(-1).long(), slopes.reshape(-1, width)
    if layer.padding_idx is not None:
        kept = indices != layer.padding_idx
        owners, indices, slopes = owners[kept], indices[kept], slopes[kept]
    keys, places = torch.unique(owners * layer.num_embeddings + indices, return_inverse=True)
    vectors = slopes.new_zeros((len(keys), width), dtype=torch.float64).index_add_(0, places, slopes.double())
    owners, indices = keys // layer.num_embeddings, keys % layer.num_embeddings
    return Segments(names["weight"], owners, indices, vectors, examples)


LAYERS: dict[type[nn.Module], Layer] = {
    nn.Linear: Layer(_linear),
    nn.Conv1d: Layer(_conv, axes=3),
    nn.Conv2d: Layer(_conv, axes=4),
    DirectConv2d: Layer(_conv, axes=4),
    nn.Conv3d: Layer(_conv, axes=5),
    nn.Embedding: Layer(_embedding, axes=1),
    nn.LayerNorm: Layer(_layer_norm),
    nn.RMSNorm: Layer(_layer_norm),
    nn.GroupNorm: Layer(_group_norm),
    LiftingConv: Layer(_lifting_conv, axes=4, uses=ORIENTATIONS),
    GroupConv: Layer(_group_conv, axes=4, uses=ORIENTATIONS),
    OrientedNorm: Layer(_oriented_norm, axes=4),
}
"""The table; every other layer with trainable parameters needs gradients computed one by one (`rows`)."""

"""Maximum pooling of 2 x 2 windows with ReLU in C, for single clients on a CPU, with the numbers of torch to the bit.

torch's pooling reads one number at a time if channels are outermost, a quarter of a small network's gradient. If they
are innermost, it still takes seven times as long as the C form for eight channels.
"""

import ctypes
import math
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fedpriv.native import native_library

__all__ = ["MaxPoolReLU", "PoolingInC", "in_memory", "is_eager", "pooling_in_c"]

_SOURCE = Path(__file__).with_name("pooling.c")
# Not part of torch's public interface: without them, torch computes.
_ASKED = ("_get_tracing_state", "_len_torch_dispatch_stack", "_are_functorch_transforms_active", "_has_storage")
_CAN_ASK = all(hasattr(torch._C, name) for name in _ASKED) and hasattr(forward_ad, "_current_level")


class PoolingInC:
    """The functions of `pooling.c`.

    Args:
        library: The compiled file.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._outer, self._inner = (library.pool, library.spread), (library.pool_inner, library.spread_inner)

    def pool(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the maxima `[..., height // 2, width // 2]` after ReLU, and their places in the windows, int32.

        Args:
            inputs: float32 `[..., height, width]` in one of the two layouts of `layout_of`, which the results share.

        Raises:
            ValueError: If the inputs have another layout.
        """
        layout = layout_of(inputs)
        if layout is None:
            raise ValueError(f"images of shape {tuple(inputs.shape)} and strides {inputs.stride()} have gaps")
        *lead, height, width = inputs.shape
        shape, kept = (*lead, height // 2, width // 2), {"memory_format": layout, "device": "cpu"}
        values = torch.empty(shape, dtype=torch.float32, **kept)
        places = torch.empty(shape, dtype=torch.int32, **kept)
        (pool, _), sizes = self._of(inputs.shape, layout)
        pool(inputs.data_ptr(), *sizes, values.data_ptr(), places.data_ptr())
        return values, places

    def spread(self, slopes: Tensor, places: Tensor, shape: torch.Size, layout: torch.memory_format) -> Tensor:
        """Return the derivative by the inputs of this shape and layout from the one by the maxima."""
        found = torch.empty(shape, dtype=torch.float32, memory_format=layout, device="cpu")
        slopes, places = slopes.contiguous(memory_format=layout), places.contiguous(memory_format=layout)
        (_, spread), sizes = self._of(shape, layout)
        spread(slopes.data_ptr(), places.data_ptr(), *sizes, found.data_ptr())
        return found

    def _of(self, shape: torch.Size, layout: torch.memory_format) -> tuple[tuple[Any, Any], tuple[int, ...]]:
        """Return the functions for a layout, and the sizes that they take."""
        *lead, height, width = shape
        if layout is torch.contiguous_format:
            return self._outer, (math.prod(lead), height, width)
        images, channels = lead
        return self._inner, (images, height, width, channels)


def layout_of(images: Tensor) -> torch.memory_format | None:
    """Return the layout of images without gaps: channels outermost, or innermost; None for any other."""
    if images.is_contiguous():
        return torch.contiguous_format
    innermost = images.dim() == 4 and images.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if innermost else None


def _declare(library: ctypes.CDLL) -> None:
    address, size = ctypes.c_void_p, ctypes.c_size_t
    library.pool.argtypes = [address, size, size, size, address, address]
    library.spread.argtypes = [address, address, size, size, size, address]
    library.pool_inner.argtypes = [address, size, size, size, size, address, address]
    library.spread_inner.argtypes = [address, address, size, size, size, size, address]
    library.pool.restype = library.spread.restype = library.pool_inner.restype = library.spread_inner.restype = None


@cache
def pooling_in_c() -> PoolingInC | None:
    """Return the C form; None if there is no compiler, or if it and torch disagree on this machine."""
    library = native_library(_SOURCE, _declare)
    if library is None:
        return None
    in_c = PoolingInC(library)
    with torch.device("cpu"), torch.inference_mode(False), torch.enable_grad():  # the first use may be anywhere
        return in_c if agrees(in_c) else None


def agrees(in_c: PoolingInC) -> bool:
    """Return True if C and torch give the same bits, also for equal numbers, infinities and NaN."""
    generator = torch.Generator().manual_seed(0)
    layouts = (torch.contiguous_format, torch.channels_last)
    for shape, layout in product(((2, 3, 38, 70), (1, 2, 7, 5), (2, 19, 6, 5), (2, 7, 6, 14)), layouts):
        inputs = torch.randint(-4, 4, shape, generator=generator, dtype=torch.float32) / 2.0
        inputs[torch.rand(shape, generator=generator) < 0.3] *= -1.0  # zeros of both signs
        inputs[torch.rand(shape, generator=generator) < 0.1] = torch.nan
        inputs[torch.rand(shape, generator=generator) < 0.1] = -torch.inf
        inputs = inputs.contiguous(memory_format=layout)
        leaf = inputs.clone().requires_grad_()
        expected = _in_torch(leaf)
        slopes = torch.randn(expected.shape, generator=generator, dtype=torch.float32)
        slopes *= torch.rand(expected.shape, generator=generator) < 0.9
        values, places = in_c.pool(inputs)
        found = in_c.spread(slopes, places, inputs.shape, layout)
        # Slopes as an argument would import PyTorch's compiler, for seconds.
        wanted = torch.autograd.grad((expected * slopes).sum(), leaf)[0]
        if not all(map(_same, (values, found), (expected.detach(), wanted))):
            return False
    return True


def _same(one: Tensor, other: Tensor) -> bool:
    both_nan = one.isnan() & other.isnan()
    return bool((both_nan | (one.view(torch.int32) == other.view(torch.int32))).all())


class _Pooled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, in_c: PoolingInC) -> Tensor:
        values, places = in_c.pool(inputs)
        ctx.shape, ctx.layout, ctx.in_c = inputs.shape, layout_of(inputs), in_c
        ctx.save_for_backward(places)
        return values

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, None]:
        (slopes,), (places,) = grad_outputs, ctx.saved_tensors
        # With gradients enabled, torch asks for a graph: derivatives of these derivatives.
        if torch.is_grad_enabled() or not is_eager() or not in_memory(slopes):
            return _spread_in_torch(slopes, places, ctx.shape), None
        return ctx.in_c.spread(slopes, places, ctx.shape, ctx.layout), None


def _spread_in_torch(slopes: Tensor, places: Tensor, shape: torch.Size) -> Tensor:
    """Return the same as `PoolingInC.spread`, of slopes that may be differentiated or transformed."""
    parts = [torch.where(places == place, slopes, 0.0) for place in range(4)]
    *lead, rows, columns = slopes.shape
    pairs = [torch.stack(parts[start : start + 2], -1) for start in (0, 2)]
    found = torch.stack([pair.reshape(*lead, rows, 2 * columns) for pair in pairs], -2)
    missing = (0, shape[-1] - 2 * columns, 0, shape[-2] - 2 * rows)
    return nn.functional.pad(found.reshape(*lead, 2 * rows, 2 * columns), missing)


class MaxPoolReLU(nn.Module):
    """`MaxPool2d(2)`, then `ReLU()`: in C where that gives the same bits faster, otherwise in torch.

    torch takes transforms of functions, exports, GPUs, and other types of numbers.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the positive parts `[..., height // 2, width // 2]` of the maxima of `[..., height, width]`."""
        in_c = pooling_in_c() if _suits(inputs) else None
        return _in_torch(inputs) if in_c is None else cast(Tensor, _Pooled.apply(inputs, in_c))


def _in_torch(inputs: Tensor) -> Tensor:
    return nn.functional.relu(nn.functional.max_pool2d(inputs, 2))


def _suits(inputs: Tensor) -> bool:
    if not is_eager() or not in_memory(inputs):
        return False
    return layout_of(inputs) is not None and min(inputs.shape[-2:]) >= 2


def is_eager() -> bool:
    """Return True if operations are computed as they are called: not compiled, recorded or transformed."""
    if not _CAN_ASK or torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    if torch._C._len_torch_dispatch_stack() or forward_ad._current_level >= 0:
        return False
    return not torch._C._are_functorch_transforms_active()


def in_memory(tensor: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    """Return True if C may read a tensor: numbers of this type in the CPU's memory, with the signs they have there.

    Args:
        tensor: Of any kind.
        dtype: The type of its numbers.
    """
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.device.type != "cpu" or tensor.dtype != dtype:
        return False
    return _CAN_ASK and torch._C._has_storage(tensor) and not tensor.is_neg() and not tensor._is_zerotensor()

"""Convolutions of few channels in C on a CPU; torch computes all others.

torch lays channels out in blocks of sixteen. With 3 and 8 channels, as in `cnn` on images 32 x 32, half of a block or
more is empty, and its convolutions with their gradients take 1.5 times as long as here; with 16 channels on both sides
torch is as fast.
"""

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv2d_input, conv2d_weight

from fedpriv.native import native_library
from fedpriv.tasks.pooling import in_memory, is_eager

__all__ = ["ConvolutionInC", "DirectConv2d", "convolution_in_c"]

_SOURCE = Path(__file__).with_name("convolution.c")
_SIDE, _PADDING = 5, 2
_SIZES = ((_SIDE, _SIDE), (1, 1), (_PADDING, _PADDING), (1, 1), 1, "zeros")
# With more channels torch is as fast, and narrower images fill less than half of a vector.
_MAX_INPUTS, _MAX_OUTPUTS, _MIN_WIDTH = 8, 16, 8
# C and a computation in float64 may differ by this part of the results' length.
_TOLERANCE = 4e-6
# Images of a thread, at least, if torch may use several.
_MIN_IMAGES = 64


class ConvolutionInC:
    """The functions of `convolution.c`, for kernels 5 x 5 with stride 1 and padding 2.

    Images are float32 on the CPU; those that are read may have any strides, and results have channels outermost. Many
    images are computed on as many threads as torch may use, except for sums over images.

    Args:
        library: The compiled file.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._convolution, self._gradient = library.convolution, library.convolution_gradient

    def outputs(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the outputs `[images, outs, height, width]`.

        Args:
            inputs: `[images, channels, height, width]`.
            weight: `[outs, channels, 5, 5]`.
            bias: `[outs]`, or None.

        Raises:
            MemoryError: If there is no memory for one image.
        """
        return self._run(inputs, weight, bias, len(weight), transposed=False)

    def slopes_of_inputs(self, slopes: Tensor, weight: Tensor) -> Tensor:
        """Return the derivative `[images, channels, height, width]` by the inputs from `slopes`, that by the outputs.

        Raises:
            MemoryError: If there is no memory for one image.
        """
        return self._run(slopes, weight, None, weight.shape[1], transposed=True)

    def slopes_of_weights(self, inputs: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the derivatives by weights `[outs, channels, 5, 5]` and biases `[outs]`, summed over all images.

        Raises:
            MemoryError: If there is no memory for some images.
        """
        slopes = slopes.contiguous()
        images, channels, height, width = inputs.shape
        outs = slopes.shape[1]
        weight = inputs.new_empty((outs, channels, _SIDE, _SIDE))
        bias = inputs.new_empty(outs)
        sizes = (images, channels, height, width, *inputs.stride())
        _require_memory(
            self._gradient(inputs.data_ptr(), *sizes, slopes.data_ptr(), outs, weight.data_ptr(), bias.data_ptr())
        )
        return weight, bias

    def _run(self, inputs: Tensor, weight: Tensor, bias: Tensor | None, outs: int, *, transposed: bool) -> Tensor:
        images, channels, height, width = inputs.shape
        found = torch.empty((images, outs, height, width), dtype=torch.float32, device="cpu")
        kept, added = weight.contiguous(), None if bias is None else bias.contiguous()
        biases = None if added is None else added.data_ptr()

        def run(part: tuple[Tensor, Tensor]) -> int:
            x, y = part
            sizes = (len(x), channels, height, width, *x.stride())
            return self._convolution(x.data_ptr(), *sizes, kept.data_ptr(), biases, outs, int(transposed), y.data_ptr())

        threads = max(min(torch.get_num_threads(), images // _MIN_IMAGES), 1)
        parts = list(zip(inputs.tensor_split(threads), found.tensor_split(threads), strict=True))
        _require_memory(max(_on_threads(run, parts)))
        return found


def _on_threads(run: Callable[[tuple[Tensor, Tensor]], int], parts: Sequence[tuple[Tensor, Tensor]]) -> list[int]:
    if len(parts) > 1:
        try:
            # Threads of their own: those of a kept pool would be missing after a fork.
            with ThreadPoolExecutor(len(parts)) as pool:
                return list(pool.map(run, parts))
        except RuntimeError:  # the system has no more threads, or Python starts none because its main one has ended
            pass
    return [run(part) for part in parts]


def _require_memory(missing: int) -> None:
    if missing:
        raise MemoryError("no memory for a convolution")


def _declare(library: ctypes.CDLL) -> None:
    address, sizes = ctypes.c_void_p, [ctypes.c_size_t] * 8
    library.convolution.argtypes = [address, *sizes, address, address, ctypes.c_size_t, ctypes.c_int, address]
    library.convolution_gradient.argtypes = [address, *sizes, address, ctypes.c_size_t, address, address]
    library.convolution.restype = library.convolution_gradient.restype = ctypes.c_int


@cache
def convolution_in_c() -> ConvolutionInC | None:
    """Return the C form; None without a compiler or AVX with FMA, or if it and torch disagree on this machine."""
    library = native_library(_SOURCE, _declare)
    if library is None:
        return None
    in_c = ConvolutionInC(library)
    with torch.device("cpu"):
        return in_c if agrees(in_c) else None


@torch.no_grad()
def agrees(in_c: ConvolutionInC) -> bool:
    """Return True if C computes the results of torch in float64, up to rounding."""
    generator = torch.Generator().manual_seed(0)
    layouts = (torch.contiguous_format, torch.channels_last)
    for shape, layout in product(((3, 3, 9, 37, 8), (2, 8, 16, 16, 16), (5, 1, 4, 10, 3)), layouts):
        images, channels, height, width, outs = shape
        inputs = torch.randn((images, channels, height, width), generator=generator, dtype=torch.float32)
        slopes = torch.randn((images, outs, height, width), generator=generator, dtype=torch.float32)
        weight = torch.randn((outs, channels, _SIDE, _SIDE), generator=generator, dtype=torch.float32)
        bias = torch.randn(outs, generator=generator, dtype=torch.float32)
        inputs, slopes = (part.contiguous(memory_format=layout) for part in (inputs, slopes))
        x, y, w = inputs.double(), slopes.double(), weight.double()
        pairs = [
            (in_c.outputs(inputs, weight, bias), functional.conv2d(x, w, bias.double(), padding=_PADDING)),
            (in_c.slopes_of_inputs(slopes, weight), conv2d_input(x.shape, w, y, padding=_PADDING)),
            *zip(
                in_c.slopes_of_weights(inputs, slopes),
                (conv2d_weight(x, w.shape, y, padding=_PADDING), y.sum((0, 2, 3))),
                strict=True,
            ),
        ]
        if not all(_is_close(found, expected) for found, expected in pairs):
            return False
    return True


def _is_close(found: Tensor, expected: Tensor) -> bool:
    return float((found - expected).norm()) <= _TOLERANCE * float(expected.norm())


class _Convolved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, in_c: ConvolutionInC) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.in_c = in_c
        return in_c.outputs(inputs, weight, bias)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (slopes,), (inputs, weight) = grad_outputs, ctx.saved_tensors
        wanted = by_inputs, by_weight, by_bias = ctx.needs_input_grad[:3]
        # With gradients enabled, torch asks for a graph: derivatives of these derivatives.
        if torch.is_grad_enabled() or not is_eager() or not all(map(in_memory, (slopes, inputs, weight))):
            return (*_slopes_in_torch(slopes, inputs, weight, wanted), None)
        found = ctx.in_c.slopes_of_weights(inputs, slopes) if by_weight or by_bias else (None, None)
        return (
            ctx.in_c.slopes_of_inputs(slopes, weight) if by_inputs else None,
            found[0] if by_weight else None,
            found[1] if by_bias else None,
            None,
        )


def _slopes_in_torch(
    slopes: Tensor, inputs: Tensor, weight: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the wanted derivatives by inputs, weights and biases, which may be differentiated again."""
    return torch.ops.aten.convolution_backward(
        slopes, inputs, weight, [len(weight)], [1, 1], [_PADDING] * 2, [1, 1], False, [0, 0], 1, list(wanted)
    )


class DirectConv2d(nn.Conv2d):
    """`Conv2d` that is computed in C if the kernel is 5 x 5, images keep their size, and channels are few.

    torch takes all others, transforms of functions, exports, GPUs, and other types of numbers. C adds products in
    another order than torch, so results differ in their last digits. Arguments are those of `Conv2d`.
    """

    def forward(self, inputs: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the outputs `[images, outs, height, width]` of images `[images, channels, height, width]`."""
        in_c = self.form if self._suits(inputs) else None
        if in_c is None:
            return super().forward(inputs)
        return cast(Tensor, _Convolved.apply(inputs, self.weight, self.bias, in_c))

    @property
    def form(self) -> ConvolutionInC | None:
        """The C form, if there is one and it computes this layer: then the layout of images does not matter."""
        if self.in_channels > _MAX_INPUTS or self.out_channels > _MAX_OUTPUTS:
            return None
        sizes = (self.kernel_size, self.stride, self.padding, self.dilation, self.groups, self.padding_mode)
        return convolution_in_c() if sizes == _SIZES else None

    def _suits(self, inputs: Tensor) -> bool:
        parts = [inputs, self.weight] if self.bias is None else [inputs, self.weight, self.bias]
        if not is_eager() or not all(map(in_memory, parts)) or torch.is_autocast_enabled("cpu"):
            return False
        if inputs.dim() != 4 or inputs.shape[2] < 1 or inputs.shape[3] < _MIN_WIDTH:
            return False
        if self.weight.shape != (self.out_channels, self.in_channels, _SIDE, _SIDE):
            return False
        return inputs.shape[1] == self.in_channels and (self.bias is None or self.bias.shape == (self.out_channels,))

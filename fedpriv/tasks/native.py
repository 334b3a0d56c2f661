"""Gradients of softmax regression for many clients in C; without a C compiler, torch computes them.

General libraries are slow for a product of tall matrices with a few columns: they reach a quarter of a processor's
speed for ten classes. The file `softmax.c` holds a client's examples in the cache for both products.
"""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from fedpriv.native import native_library
from fedpriv.tasks.pooling import in_memory

__all__ = ["SoftmaxInC", "softmax_in_c"]

_SOURCE = Path(__file__).with_name("softmax.c")
# C and a computation in float64 may differ by this part of a gradient's length.
_TOLERANCE = 2e-6


class SoftmaxInC:
    """The function of `softmax.c`.

    Args:
        library: The compiled file.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._gradients = library.softmax_gradients

    def gradients(self, models: Tensor, inputs: Tensor, labels: Tensor, weights: Tensor) -> Tensor | None:
        """Return the gradients `[clients, params]` of the clients' weighted cross entropies; None if torch must do it.

        Each client's gradient is the same to the bit next to any other clients and any padding.

        Args:
            models: `[params]` for all clients, or `[clients, params]`: weights `[classes, width]`, then biases.
            inputs: `[clients, examples, width]`.
            labels: `[clients, examples]`.
            weights: `[clients, examples]`; zero for padding.
        """
        given = (models, inputs, labels, weights)
        kinds = (torch.float32, torch.float32, torch.int64, torch.float32)
        if not all(in_memory(tensor, kind) for tensor, kind in zip(given, kinds, strict=True)):
            return None
        models, inputs, labels, weights = (tensor.contiguous() for tensor in given)
        clients, examples, width = inputs.shape
        size = models.shape[-1]
        found = inputs.new_empty((clients, size))
        failed = self._gradients(
            models.data_ptr(),
            0 if models.dim() == 1 else size,
            inputs.data_ptr(),
            labels.data_ptr(),
            weights.data_ptr(),
            clients,
            examples,
            width,
            size // (width + 1),
            found.data_ptr(),
        )
        return None if failed else found


def _declare(library: ctypes.CDLL) -> None:
    address, size = ctypes.c_void_p, ctypes.c_size_t
    library.softmax_gradients.argtypes = [address, size, address, address, address, size, size, size, size, address]
    library.softmax_gradients.restype = ctypes.c_int


@cache
def softmax_in_c() -> SoftmaxInC | None:
    """Return the C form; None if there is no compiler, or if it and torch disagree on this machine."""
    library = native_library(_SOURCE, _declare)
    if library is None:
        return None
    in_c = SoftmaxInC(library)
    with torch.device("cpu"):
        return in_c if agrees(in_c) else None


def agrees(in_c: SoftmaxInC) -> bool:
    """Return True if C computes the gradients of torch in float64, up to rounding."""
    generator = torch.Generator().manual_seed(0)
    for examples, width, classes in ((35, 37, 7), (18, 1060, 10), (3, 16, 3)):
        inputs = torch.randn((3, examples, width), generator=generator, dtype=torch.float32)
        labels = torch.randint(classes, (3, examples), generator=generator)
        weights = torch.rand((3, examples), generator=generator, dtype=torch.float32)
        weights[1, examples // 2 :] = 0.0  # padding
        weights[2] = 0.0  # a client without examples
        models = 0.1 * torch.randn((3, classes * (width + 1)), generator=generator, dtype=torch.float32)
        for chosen in (models, models[0]):
            found = in_c.gradients(chosen, inputs, labels, weights)
            expected = _in_float64(chosen, inputs, labels, weights)
            lengths = torch.linalg.vector_norm(expected, dim=1)
            if found is None or bool((torch.linalg.vector_norm(found - expected, dim=1) > _TOLERANCE * lengths).any()):
                return False
    return True


def _in_float64(models: Tensor, inputs: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    width = inputs.shape[2]
    classes = models.shape[-1] // (width + 1)
    matrices = models.double().expand(len(inputs), -1)
    weight, bias = matrices[:, : classes * width].unflatten(1, (classes, width)), matrices[:, classes * width :]
    outputs = torch.baddbmm(bias.unsqueeze(1), inputs.double(), weight.transpose(1, 2))
    slopes = outputs.softmax(-1).sub_(torch.nn.functional.one_hot(labels, classes)).mul_(weights.unsqueeze(-1))
    return torch.cat([torch.bmm(slopes.transpose(1, 2), inputs.double()).flatten(1), slopes.sum(1)], dim=1)

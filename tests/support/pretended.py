"""A pretended second device: tensors that report `cuda:0` and hold their numbers on the CPU.

With it, code for GPUs runs on a machine without one, and mistakes with devices are errors as on a GPU: operands on two
devices (but for scalars and indices on the CPU), `numpy()` of a tensor on the device.
Kernels are those of the CPU, so it says nothing about speed or rounding on a GPU.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["DEVICE", "OnDevice", "mixed", "pretended_device"]

DEVICE = torch.device("cuda:0")

_aten = torch.ops.aten
_CPU = torch.device("cpu")
# Operations that move numbers between devices.
_COPIES = {_aten._to_copy.default, _aten.copy_.default, _aten._copy_from.default}
# Operations that also take indices on the CPU.
_INDEXING = {_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default, _aten._index_put_impl_.default}


class OnDevice(Tensor):
    """A tensor that reports `DEVICE`.

    Args:
        held: Its numbers, on the CPU.
    """

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnDevice":
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=_CPU,  # of the numbers: PyTorch's own code would look for a GPU
        )

    def __init__(self, held: Tensor) -> None:
        self.held = held

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({self.held})"

    @property
    def data(self) -> Tensor:
        """The numbers without their history; assigning replaces them, as in `Module` parameters."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if not isinstance(value, OnDevice):
            raise RuntimeError(f"data on {value.device} for a tensor on {DEVICE}")
        self.held = value.held

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """`DEVICE`."""
        return DEVICE

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        """True."""
        return True

    def cpu(self, *_: Any, **__: Any) -> Tensor:
        """Return a copy on the CPU."""
        return _aten._to_copy(self, device=_CPU)

    def to(self, *args: Any, **options: Any) -> Tensor:
        """Return a tensor on another device or of another type; this one if it is so already."""
        if isinstance(args[0] if args else None, Tensor):
            args = (args[0].device, args[0].dtype)
        device, dtype, *_ = torch._C._nn._parse_to(*args, **options)  # type: ignore[attr-defined]
        device = self.device if device is None else device
        if device.type == DEVICE.type and dtype in (None, self.dtype):
            return self
        return _aten._to_copy(self, device=device, dtype=dtype)

    def tolist(self) -> Any:
        """Return the numbers, as Python's."""
        return self.cpu().tolist()

    def numpy(self, **_: Any) -> Any:
        """Raise the error of a tensor on a GPU."""
        raise TypeError(f"can't convert {DEVICE} device type tensor to numpy. Use Tensor.cpu() first")

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def data_ptr(self) -> int:
        """Return the address of the numbers."""
        return self.held.data_ptr()

    def new_tensor(self, *args: Any, **options: Any) -> Tensor:
        """Return a new tensor on the same device."""
        return torch.tensor(*args, **{"dtype": self.dtype, **options}).to(DEVICE)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.to and len(args) > 1 and isinstance(args[1], Tensor):
            args = (args[0], args[1].device, args[1].dtype, *args[2:])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


def mixed(func: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Return True if a GPU would refuse the operands of an operation because of their devices."""
    if func in _COPIES:
        return False
    given = args[:1] + tuple(args[2:]) if func in _INDEXING else (args, kwargs)
    tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
    here = any(not isinstance(tensor, OnDevice) and tensor.dim() > 0 for tensor in tensors)
    there = any(isinstance(tensor, OnDevice) for tensor in tensors)
    indices_there = func in _INDEXING and any(isinstance(leaf, OnDevice) for leaf in tree_leaves(args[1]))
    return here and (there or indices_there)


def _dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if mixed(func, args, kwargs):
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found {DEVICE} and cpu")
    there = any(isinstance(leaf, OnDevice) for leaf in tree_leaves((args, kwargs)))
    asked = kwargs.get("device")
    if asked is not None:
        there = torch.device(asked).type == DEVICE.type
        kwargs = {**kwargs, "device": _CPU, **({"pin_memory": False} if "pin_memory" in kwargs else {})}
    plain = tree_map(_plain, args), tree_map(_plain, kwargs)
    found = func(*plain[0], **plain[1])
    if func is _aten.copy_.default:
        return args[0]
    wrapped = tree_map(lambda leaf: _wrapped(leaf, there), found)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if there else wrapped


def _plain(leaf: Any) -> Any:
    return leaf.held if isinstance(leaf, OnDevice) else leaf


def _wrapped(leaf: Any, there: bool) -> Any:
    return OnDevice(leaf) if there and isinstance(leaf, Tensor) and not isinstance(leaf, OnDevice) else leaf


def _moving(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def moved(data: Any, *args: Any, device: Any = None, **options: Any) -> Tensor:
        if isinstance(data, OnDevice):
            return data.to(data.device if device is None else device)
        return make(data, *args, **options).to(_CPU if device is None else device)

    return moved


@contextmanager
def pretended_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Pretend in this block that there is one GPU."""
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    for name in ("tensor", "as_tensor"):  # they make tensors without asking modes
        monkeypatch.setattr(torch, name, _moving(getattr(torch, name)))
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # modules get new parameters, as for a GPU
    try:
        with _Mode():
            yield DEVICE
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)

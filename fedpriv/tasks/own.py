"""User models: a module's class, or a function that returns a module, such as `"./net.py:Net"`."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from fedpriv.errors import UserError
from fedpriv.plugins import line_of, settings_of
from fedpriv.vectors import refuse_buffers, trainable

__all__ = ["OwnModule", "refuse_lazy"]

_KEY = "model.name"


@dataclass(frozen=True, kw_only=True)
class OwnModule:
    """Base of the settings of a user model. The class that `of` returns has the parameters of the model as fields.

    The program itself passes parameters named `input_shape` (tuple of ints) and `classes` (int). The module maps
    float32 inputs `[batch, *input_shape]` to logits `[batch, classes]`. Its first weights follow from the seed.
    """

    dense: ClassVar[bool] = False
    called: ClassVar[Callable[..., Any]]
    asked: ClassVar[tuple[str, ...]]
    reference: ClassVar[str | None] = None

    @staticmethod
    def of(found: Any, where: str, name: str) -> "type[OwnModule]":
        """Return the settings of a module's class or of a function; see `fedpriv.plugins.Registry`."""
        if isinstance(found, nn.Module) or not callable(found):
            remedy = "Name the class of a torch module, or a function that returns one"
            raise UserError(where, "a class or a function", f"{name!r}, which is a {type(found).__name__}", remedy)
        return settings_of(OwnModule, found, where, given=("input_shape", "classes"), reserved=("name",))

    def parameters(self, input_shape: tuple[int, ...], classes: int) -> int:
        """See `ModelSource.parameters`. Frozen parameters do not count; shared ones count once."""
        try:
            with torch.random.fork_rng(devices=[]), torch.device("meta"), _Undrawn():
                module = self._make(input_shape, classes)
        except UserError:  # it may need values, which tensors on the meta device do not have
            module = self.build(input_shape, classes, 0)
        return sum(parameter.numel() for parameter in trainable(module).values())

    def build(self, input_shape: tuple[int, ...], classes: int, seed: int) -> nn.Module:
        """See `ModelSource.build`. Two inputs of zeros go through the module, to check that it fits the data.

        Raises:
            UserError: If the class or the module raises, or the module's outputs have another shape or type.
        """
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(seed)
            module = self._make(input_shape, classes)
            self._try(module, input_shape, classes)
        return module

    def _make(self, input_shape: tuple[int, ...], classes: int) -> nn.Module:
        options = {field.name: getattr(self, field.name) for field in fields(self)}
        given = {"input_shape": tuple(input_shape), "classes": classes}
        try:
            module = type(self).called(**options, **{name: given[name] for name in self.asked})
        except MemoryError:
            raise
        except Exception as error:
            got = line_of(error, type(self).called)
            raise UserError(_KEY, "a model that can be made", got, "Correct it, or its keys in [model]") from error
        if not isinstance(module, nn.Module):
            remedy = "Return a torch.nn.Module"
            raise UserError(_KEY, "a function that returns a module", f"a {type(module).__name__}", remedy)
        refuse_lazy(module, _KEY)
        if not trainable(module):
            remedy = "Keep requires_grad = True for the parameters to train"
            raise UserError(_KEY, "a module with trainable parameters", "only frozen parameters", remedy)
        return module

    def _try(self, module: nn.Module, input_shape: tuple[int, ...], classes: int) -> None:
        """Send two inputs of zeros through a copy of the module, and again after inputs of ones.

        A value that the module keeps of its inputs would go from one client to the next.
        """
        tried, example = copy.deepcopy(module), torch.zeros(2, *input_shape)
        before = {name: buffer.clone() for name, buffer in tried.named_buffers()}
        try:
            with torch.no_grad():
                logits, repeated = tried(example), tried(example)
                tried(torch.ones_like(example))
                again = tried(example)
        except Exception as error:
            expected = f"a model that takes float32 inputs [batch, {', '.join(map(str, input_shape))}]"
            raise UserError(_KEY, expected, line_of(error, type(self).called), "Correct its forward") from error
        shape = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        if not isinstance(shape, list) or len(shape) < 2 or (shape[0], shape[-1]) != (2, classes):
            raise UserError(_KEY, f"logits [batch, {classes}] of the model", f"{shape} for 2 inputs", "Correct forward")
        if logits.dtype != torch.float32:
            raise UserError(_KEY, "logits of type torch.float32", logits.dtype, "Convert them in forward")
        changed = [name for name, buffer in tried.named_buffers() if not _equal(buffer, before[name])]
        if changed:
            refuse_buffers(changed)
        if _equal(logits, repeated) and not _equal(logits, again):
            remedy = "Keep nothing of the inputs in forward: it would go from one client to the next without noise"
            raise UserError(
                _KEY, "logits that follow from the inputs alone", "logits that change after different inputs", remedy
            )
        if not _equal(logits, again):
            remedy = "Set the rate of dropout to 0: its draws would differ between engines"
            raise UserError(_KEY, "logits that depend on the inputs alone", "different ones in two calls", remedy)


def refuse_lazy(module: nn.Module, where: str) -> None:
    """Raise UserError for a module with layers that take their sizes from the first batch, such as `LazyLinear`."""
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(value):
            place, _, part = name.rpartition(".")
            owner = type(module.get_submodule(place)).__name__
            remedy = f"Give {place or 'the module'} its size, such as torch.nn.Linear(in_features, ...)"
            got = f"{owner}, which makes its {part} in the first call"
            raise UserError(where, "a model with all its parameters", got, remedy)


class _Undrawn(TorchFunctionMode):
    """Leaves normal numbers of tensors without values undrawn: torch would import its compiler, which takes seconds."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Call the function, unless it fills a tensor on the meta device with normal numbers."""
        kwargs = kwargs or {}
        if func in (torch.Tensor.normal_, nn.init.normal_):
            filled = args[0] if args else kwargs["tensor"]
            if filled.is_meta:
                return filled
        return func(*args, **kwargs)


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(torch.nan_to_num(one), torch.nan_to_num(other))

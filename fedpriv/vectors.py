"""Flat parameter vectors, and the layout that ties them to the tensors of a module.

Norms, noise and error feedback are statements about one vector of R^d, so the core sees a model as `[params]`
and the same thing for every client of a cohort as `[clients, params]`.
"""

from collections import namedtuple
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from fedpriv.errors import UserError

__all__ = ["Layout", "joined", "parted", "refuse_buffers"]


@dataclass(frozen=True)
class Layout:
    """Names and shapes of the tensors that lie one after the other in a flat vector.

    Args:
        entries: Name and shape of each tensor, in order.
    """

    entries: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Layout":
        """The layout of named tensors, in their order."""
        return cls(tuple((name, tuple(tensor.shape)) for name, tensor in tensors.items()))

    @classmethod
    def of_module(cls, module: nn.Module) -> "Layout":
        """The layout of a module's parameters.

        Raises:
            UserError: If the module has buffers (BatchNorm's statistics would be released without noise).
        """
        refuse_buffers(name for name, _ in module.named_buffers())
        return cls.of(dict(module.named_parameters()))

    @property
    def size(self) -> int:
        """Number of parameters d."""
        return sum(prod(shape) for _, shape in self.entries)

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The vector `[params]` of tensors that have this layout.

        Raises:
            UserError: If a name or a shape differs.
        """
        found = Layout.of(tensors)
        if found != self:
            raise UserError("model", f"tensors {self}", str(found), "Send and return the same model")
        if not self.entries:
            return torch.zeros(0)
        return torch.cat([tensor.reshape(-1) for tensor in tensors.values()])

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """Views of `vector` `[..., params]` as named tensors `[..., *shape]`."""
        parts = vector.split([prod(shape) for _, shape in self.entries], dim=-1)
        lead = vector.shape[:-1]
        return {name: part.reshape((*lead, *shape)) for (name, shape), part in zip(self.entries, parts, strict=True)}

    def __str__(self) -> str:
        return ", ".join(f"{name}{list(shape)}" for name, shape in self.entries)


def refuse_buffers(names: Iterable[str]) -> None:
    """Raises UserError if a model has buffers: they are data that leave a client without bound or noise."""
    found = list(names)
    if found:
        raise UserError(
            "model",
            "parameters only",
            f"the buffers {', '.join(found[:4])}{', ...' if len(found) > 4 else ''}",
            "Replace BatchNorm by GroupNorm: batch statistics mix examples and would be released without noise",
        )


def joined(first: Any, second: Any) -> Any:
    """One NamedTuple of the fields of two; the first itself if the second has none.

    So one state holds what a method, its server's optimiser and a mechanism of noise remember, and is saved as one.
    """
    return _kind(first._fields + second._fields)(*first, *second) if second._fields else first


def parted(state: Any, first: Any, second: Any) -> tuple[Any, Any]:
    """What `joined` has put together, given any two of the kinds that it was made of."""
    cut = len(first._fields)
    return type(first)(*state[:cut]), type(second)(*state[cut:])


@cache
def _kind(fields: tuple[str, ...]) -> type:
    return namedtuple("State", fields)

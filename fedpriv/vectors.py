"""Flat parameter vectors, and the layout that maps them to the tensors of a module.

Norms, noise and error feedback act on one vector of R^d. So the core represents a model as `[params]`, and the vectors
of a cohort's clients as `[clients, params]`.
"""

from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Protocol, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from fedpriv.errors import UserError

__all__ = [
    "Layout",
    "ServerState",
    "State",
    "joined",
    "named_fields",
    "norm",
    "parted",
    "rebuilt",
    "refuse_buffers",
    "trainable",
]


_NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)
"""Layers that can keep statistics of the examples they see."""


@dataclass(frozen=True)
class Layout:
    """Names and shapes of the tensors that are concatenated in a flat vector.

    Args:
        entries: Name and shape of each tensor, in order.
    """

    entries: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Layout":
        """Return the layout of named tensors, in their order."""
        return cls(tuple((name, tuple(tensor.shape)) for name, tensor in tensors.items()))

    @classmethod
    def of_module(cls, module: nn.Module) -> "Layout":
        """Return the layout of a module's trainable parameters; see `trainable`.

        Raises:
            UserError: If a layer keeps statistics of its examples, as BatchNorm does, or a trainable parameter is not
                float32.
        """
        layers: dict[str, nn.Module] = dict(module.named_modules())  # pyright: ignore[reportUnknownArgumentType]
        norms = {name: layer for name, layer in layers.items() if isinstance(layer, _NORMS)}
        kept = (name for name, layer in norms.items() if layer.track_running_stats and layer.training)
        refuse_buffers(f"{name}.{buffer}".lstrip(".") for name in kept for buffer, _ in layers[name].named_buffers())
        parameters = trainable(module)
        for name, parameter in parameters.items():
            if parameter.dtype not in (torch.float32, torch.float64):
                remedy = "Train it in float32, or freeze it with requires_grad_(False)"
                raise UserError(f"model parameter {name}", "torch.float32", parameter.dtype, remedy)
        return cls.of(parameters)

    @property
    def size(self) -> int:
        """Number of parameters d."""
        return sum(prod(shape) for _, shape in self.entries)

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Concatenate tensors of this layout into one vector `[params]`.

        Raises:
            UserError: If a name or a shape differs.
        """
        found = Layout.of(tensors)
        if found != self:
            raise UserError("model", f"tensors {self}", str(found), "Return the tensors of the received model")
        if not self.entries:
            return torch.zeros(0)
        return torch.cat([tensor.reshape(-1) for tensor in tensors.values()])

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """Return views of `vector` `[..., params]` as named tensors `[..., *shape]`."""
        sizes = [prod(shape) for _, shape in self.entries]
        parts: tuple[Tensor, ...] = torch.split(vector, sizes, dim=-1)
        lead = vector.shape[:-1]
        return {name: part.reshape((*lead, *shape)) for (name, shape), part in zip(self.entries, parts, strict=True)}

    def __str__(self) -> str:
        return ", ".join(f"{name}{list(shape)}" for name, shape in self.entries)


def norm(vectors: Tensor, dim: int | None = None, *, keepdim: bool = False, exact: bool = False) -> Tensor:
    """Return l2 norms: of all numbers, or along one axis.

    Args:
        vectors: Any shape.
        dim: The axis; None for all numbers.
        keepdim: Keep the axis, with length 1.
        exact: Compute in float64.
    """
    dtype = torch.float64 if exact else None
    return cast(
        Tensor,
        torch.linalg.vector_norm(  # pyright: ignore[reportUnknownMemberType]
            vectors, dim=dim, keepdim=keepdim, dtype=dtype
        ),
    )


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return a module's trainable parameters by name, without frozen ones and with shared ones once."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def refuse_buffers(names: Iterable[str]) -> None:
    """Raise UserError if a model has buffers: their values would leave a client without bound or noise."""
    found = list(names)
    if found:
        raise UserError(
            "model",
            "parameters only",
            f"the buffers {', '.join(found[:4])}{', ...' if len(found) > 4 else ''}",
            "Replace BatchNorm by GroupNorm: batch statistics mix examples and would be released without noise",
        )


class State(Protocol):
    """A NamedTuple of tensors: vectors `[..., params]` or numbers `[..., 1]`, possibly none."""

    @property
    def _fields(self) -> tuple[str, ...]: ...

    @classmethod
    def _make(cls, iterable: Iterable[Tensor], /) -> Self: ...

    def _asdict(self) -> dict[str, Tensor]: ...

    def _replace(self, **changes: Tensor) -> Self: ...

    def __iter__(self) -> Iterator[Tensor]: ...

    def __len__(self) -> int: ...


class ServerState(State, Protocol):
    """A state of vectors `[params]` and numbers `[1]`, with the model x as its field `model`."""

    @property
    def model(self) -> Tensor:
        """x, `[params]`."""
        ...


StateT = TypeVar("StateT", bound=State)
FirstT = TypeVar("FirstT", bound=State)
SecondT = TypeVar("SecondT", bound=State)


def joined(first: ServerState, second: State) -> ServerState:
    """Return one NamedTuple with the fields of two; the first itself if the second has none.

    So one state holds the states of a method, its server optimizer and a noise mechanism, and is saved as a whole.
    """
    names = (*first._fields, *second._fields)  # pyright: ignore[reportPrivateUsage]
    return named_fields(names)(*first, *second) if len(second) else first


def parted(state: State, first: FirstT, second: SecondT) -> tuple[FirstT, SecondT]:
    """Split a state from `joined` into its two parts; `first` and `second` are any states of the same types."""
    parts, cut = tuple(state), len(first)
    return rebuilt(first, parts[:cut]), rebuilt(second, parts[cut:])


def rebuilt(state: StateT, fields: Iterable[Tensor]) -> StateT:
    """Return a state of the same type with other values of its fields, in order."""
    return state._make(fields)  # pyright: ignore[reportPrivateUsage]


@cache
def named_fields(fields: tuple[str, ...]) -> Callable[..., ServerState]:
    """Return the NamedTuple of states with these fields; only those of a server have a model."""
    return cast(Callable[..., ServerState], namedtuple("State", fields))  # pyright: ignore[reportUntypedNamedTuple]

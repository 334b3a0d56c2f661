"""PyTorch's optimizers at the server: `[server] optimizer = "torch.optim:NAdam"`, or `"pytorch_optimizer:Adan"`.

An optimizer that computes each coordinate's step from past directions alone can take the place of those in
`fedpriv.methods.server_optimizers`. The method's `server_lr` is the length of the step, so the optimizer's own `lr` is
1. Optimizers that need more than directions are refused, because the server has no more: a closure that evaluates the
loss (L-BFGS, SAM), the curvature of clients' data, or the values of the parameters (weight decay, LAMB, Prodigy).
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import ClassVar, SupportsFloat, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fedpriv.errors import UserError
from fedpriv.plugins import line_of, settings_of
from fedpriv.vectors import State, named_fields, rebuilt

__all__ = ["TorchOptimizer"]

_KEY = "server.optimizer"
_ROUNDS = "optimizer_rounds"
# Rounds and coordinates of the trial that shows the memory of an optimizer and its inputs.
_TRIED, _SIZE = 24, 4

# Memory of an optimizer for each parameter, by name.
_Kept = Tensor | SupportsFloat
_Memory = dict[nn.Parameter, dict[str, _Kept | None]]


@dataclass(frozen=True, kw_only=True)
class TorchOptimizer:
    """Base of the settings of such an optimizer; `of` returns a subclass with the optimizer's parameters as fields."""

    called: ClassVar[Callable[..., Optimizer]]
    asked: ClassVar[tuple[str, ...]]

    @staticmethod
    def of(found: object, where: str, name: str) -> "type[TorchOptimizer]":
        """Return the settings of an optimizer's class; see `fedpriv.plugins.Registry`."""
        if not (inspect.isclass(found) and issubclass(found, Optimizer)):
            remedy = "Name a subclass of torch.optim.Optimizer"
            raise UserError(where, "an optimizer", f"{name!r}, which is another object", remedy)
        given, reserved = ("params", "lr"), ("optimizer",)
        return settings_of(TorchOptimizer, found, where, given=given, reserved=reserved, optional=True)

    def __post_init__(self) -> None:
        """Try the optimizer.

        Raises:
            UserError: If it cannot be made, or needs more than directions.
        """
        generator = torch.Generator().manual_seed(0)
        directions = torch.randn(_TRIED, _SIZE, dtype=torch.float64, generator=generator)
        expected, remedy = "an optimizer that steps on directions alone", "Choose another, such as torch.optim:NAdam"
        try:
            alone, again = self._trial(directions), self._trial(directions)
            along = self._path(directions, torch.ones(_SIZE, dtype=torch.float64))
        except UserError:
            raise
        except Exception as error:
            got = f"one that fails ({line_of(error, type(self).called)})"
            raise UserError(_KEY, expected, got, "Correct the keys of [server], or choose another") from error
        if not torch.equal(alone, again):
            raise UserError(_KEY, expected, "one that draws random numbers", remedy)
        if not torch.allclose(alone, along, rtol=1e-9, atol=1e-12):
            got = "one that looks at the parameters, such as by weight decay"
            raise UserError(_KEY, expected, got, remedy)

    def init(self, model: Tensor) -> State:
        """Return the state before the first round; see `ServerOptimizer.init`."""
        made = (model.new_zeros(1 if self._kept[name] else len(model)) for name in self._kept)
        return named_fields((*self._kept, _ROUNDS))(*made, model.new_zeros(1))

    def step(self, state: State, direction: Tensor) -> tuple[Tensor, State]:
        """Return the direction of the optimizer's step; see `ServerOptimizer.step`."""
        if not len(direction):
            return direction, state
        *kept, rounds = state
        at, optimizer = self._made(torch.zeros_like(direction))
        if bool(rounds > 0):
            self._put(optimizer, at, dict(zip(self._kept, kept, strict=True)))
        at.grad = direction.clone()
        optimizer.step()
        after = _read(optimizer, at)
        return -at.detach(), rebuilt(state, (*(_vector(after[name]) for name in self._kept), rounds + 1.0))

    @cached_property
    def _kept(self) -> dict[str, bool]:
        """Names of the optimizer's memories; True for one that is a single number."""
        at, optimizer = self._made(torch.zeros(_SIZE, dtype=torch.float64))
        at.grad = torch.ones_like(at)
        optimizer.step()
        found = _read(optimizer, at)
        for name, value in found.items():
            shape = tuple(_vector(value).shape)
            if shape not in ((1,), (_SIZE,)):
                expected = "an optimizer that keeps a vector or a number"
                raise UserError(_KEY, expected, f"{name} of shape {list(shape)}", "Choose another")
        return {name: _vector(value).shape == (1,) for name, value in found.items()}

    def _made(self, start: Tensor) -> tuple[nn.Parameter, Optimizer]:
        at = nn.Parameter(start)
        options = {field.name: getattr(self, field.name) for field in fields(self)}
        options |= {"lr": 1.0} if "lr" in self.asked else {}
        return at, type(self).called([at], **{key: value for key, value in options.items() if value is not None})

    def _put(self, optimizer: Optimizer, at: nn.Parameter, kept: Mapping[str, Tensor]) -> None:
        """Set the memories of an optimizer."""
        own = cast(_Memory, optimizer.state)[at] = {}
        for name in self._kept:
            where, key = _place(name)
            value = kept[name].clone()
            if where == "group":
                optimizer.param_groups[0][key] = type(optimizer.param_groups[0].get(key, 0.0))(value.item())
            else:
                own[key] = value.reshape(()) if self._kept[name] else value

    def _trial(self, directions: Tensor) -> Tensor:
        """Return the steps `[rounds, params]` by `step`."""
        state = self.init(directions[0])
        found: list[Tensor] = []
        for direction in directions:
            step, state = self.step(state, direction)
            found.append(step)
        return torch.stack(found)

    def _path(self, directions: Tensor, start: Tensor) -> Tensor:
        """Return the steps of the optimizer itself along its path from `start`."""
        at, optimizer = self._made(start.clone())
        found: list[Tensor] = []
        for direction in directions:
            before, at.grad = at.detach().clone(), direction.clone()
            optimizer.step()
            found.append(before - at.detach())
        return torch.stack(found)


def _read(optimizer: Optimizer, at: nn.Parameter) -> dict[str, _Kept]:
    """Return an optimizer's memories of the parameter, and numbers of its group that count."""
    own = cast(_Memory, optimizer.state).get(at, {})
    found = {f"optimizer_{key}": value for key, value in own.items() if value is not None}
    group = optimizer.param_groups[0]
    return found | {f"optimizer_group_{key}": group[key] for key in ("step", "k", "t") if key in group}


def _place(name: str) -> tuple[str, str]:
    rest = name.removeprefix("optimizer_")
    return ("group", rest.removeprefix("group_")) if rest.startswith("group_") else ("state", rest)


def _vector(value: _Kept) -> Tensor:
    made = value.detach() if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float64)
    return made.reshape(1) if made.dim() == 0 else made

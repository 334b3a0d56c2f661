"""A model with frozen weights, computed in stages, so that activations below the first trained weight can be kept."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from math import prod
from typing import cast

import torch
from torch import Tensor, nn

from fedpriv.errors import UserError
from fedpriv.vectors import trainable

__all__ = ["AdaptedModule", "frozen_digest"]


class AdaptedModule(nn.Module):
    """A module of which some parameters are trained, and the rest is frozen.

    If the module is an `nn.Sequential`, or has a property `stages` (modules that give its outputs if they are called
    one after the other), the stages below the first trained parameter always have the same outputs on the same inputs.
    `lower` computes these once, and `forward` takes them in place of the inputs: it distinguishes them by their shape.

    Args:
        inner: The module, with `requires_grad` set as it is to be trained. It is put in evaluation mode.
        input_shape: Shape of one input.

    Raises:
        UserError: If nothing is trained, or the stages have other outputs than the module.
    """

    def __init__(self, inner: nn.Module, input_shape: Sequence[int]) -> None:
        super().__init__()
        self.inner = inner.eval()
        if not trainable(inner):
            remedy = "Name layers in adapter.targets or adapter.train"
            raise UserError("[adapter]", "parameters to train", "only frozen ones", remedy)
        stages = _stages_of(inner)
        trained = [bool(trainable(stage)) for stage in stages]
        first = trained.index(True) if any(trained) else 0
        self._stages, self._first = stages, first  # tuples: the stages' layers belong to `inner` already
        self.kept_shape: tuple[int, ...] | None = None
        self._input_shape = tuple(input_shape)
        if stages:
            self._try_stages()

    def _try_stages(self) -> None:
        """Check that the stages give the module's outputs, and find the shape of the activations to keep."""
        example = torch.zeros(2, *self._input_shape)
        with torch.no_grad():
            kept = self._through(self._stages[: self._first], example)
            found = self._through(self._stages[self._first :], kept)
            expected = self.inner(example)
        if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-3, atol=1e-4):
            remedy = "Correct its property stages, or remove it"
            raise UserError("[model]", "stages with the outputs of the whole model", "different outputs", remedy)
        separate = self._first > 0 and self._is_separate()
        if separate and kept.shape[1:] != example.shape[1:] and kept.dtype == torch.float32:
            self.kept_shape = tuple(kept.shape[1:])

    def _drawn(self) -> Tensor:
        """Return two inputs of zeros and ones, drawn at random: they are valid as tokens, too."""
        return torch.rand((2, *self._input_shape), generator=torch.Generator().manual_seed(0)).round()

    def _is_separate(self) -> bool:
        """Return True if the activations of an example do not change beside different ones.

        Kept activations hide the lower stages from the check of bounds for single examples, which refuses such layers.
        """
        drawn = self._drawn()
        with torch.no_grad():
            beside, other = (
                self._through(self._stages[: self._first], x) for x in (drawn, torch.stack([drawn[0]] * 2))
            )
        return torch.allclose(beside[0], other[0], rtol=1e-3, atol=1e-4)

    @property
    def kept_floats(self) -> int:
        """Number of floats of one example's activations that can be kept; 0 for none."""
        return 0 if self.kept_shape is None else prod(self.kept_shape)

    @cached_property
    def lower_digest(self) -> bytes:
        """A SHA-256 of the stages below the first trained parameter: their structure, weights and some outputs."""
        found = hashlib.sha256()
        for stage in self._stages[: self._first]:
            found.update(f"{type(stage)} {stage} ".encode())
            for name, tensor in stage.state_dict().items():
                _update(found, name, tensor)
        for example in (torch.zeros(2, *self._input_shape), self._drawn()):
            _update(found, "outputs", self.lower(example.to(next(self.parameters()).device)))
        return found.digest()

    def lower(self, inputs: Tensor) -> Tensor:
        """Return the activations `[examples, *kept_shape]` below the first trained parameter."""
        with torch.no_grad():
            return self._through(self._stages[: self._first], inputs)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs `[examples, *input_shape]`, or the activations that `lower` returned for them, to outputs."""
        if not self._stages:
            return self.inner(inputs)
        if self.kept_shape is not None and tuple(inputs.shape[1:]) == self.kept_shape:
            return self._through(self._stages[self._first :], inputs)
        return self._through(self._stages, inputs)

    def train(self, mode: bool = True) -> "AdaptedModule":
        """Stay in evaluation mode: statistics and dropout of a frozen model do not change."""
        del mode
        return cast(AdaptedModule, super().train(False))

    @staticmethod
    def _through(stages: Sequence[nn.Module], values: Tensor) -> Tensor:
        for stage in stages:
            values = stage(values)
        return values


def frozen_digest(module: nn.Module) -> str | None:
    """Return a SHA-256 of a module's frozen parameters and buffers; None if there are none."""
    learned, found, some = set(trainable(module)), hashlib.sha256(), False
    for name, tensor in module.state_dict().items():
        if name not in learned:
            some = True
            _update(found, name, tensor)
    return found.hexdigest() if some else None


def _update(found: "hashlib._Hash", name: str, tensor: Tensor) -> None:
    found.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
    found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _stages_of(module: nn.Module) -> tuple[nn.Module, ...]:
    if type(module) is nn.Sequential:
        return tuple(module)
    return tuple(getattr(module, "stages", ()))

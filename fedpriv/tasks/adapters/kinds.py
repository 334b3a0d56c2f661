"""The table `[adapter]`: the parts of a model that are trained; all other weights are frozen.

Low-rank adapters are those of PEFT: a layer with the weight W has W + (alpha / rank) B A instead, with B zero at the
start. Hu, Shen, Wallis et al. 2021, "LoRA", arXiv 2106.09685. Sun, Li, Li, Ding 2024, "Improving LoRA in
Privacy-preserving Federated Learning" (FFA-LoRA), arXiv 2403.12313: A is fixed, so that averages and noise enter B A
linearly. For FedSVD, see `fedpriv.tasks.adapters.factors`.
"""

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, cast

import torch
from torch import nn

from fedpriv.checks import positive_int, require_representable
from fedpriv.errors import UserError, nearest, require_extra
from fedpriv.plugins import Registry, line_of
from fedpriv.tasks.adapters.factors import NAME, lora_layers, lora_weight, orthonormal_rows
from fedpriv.tasks.adapters.staged import AdaptedModule

__all__ = ["ADAPTERS", "Adapter", "FedSvd", "FfaLora", "Head", "Lora"]

_HEADS = ("head", "classifier", "fc")
_ADAPTABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Adapter(Protocol):
    """Settings of the trained parts of a model; filled from the table `[adapter]`.

    `rotates` is True if the method is only right for server rules that do not depend on the coordinates of B.
    """

    rotates: ClassVar[bool]

    def adapted(self, module: nn.Module, input_shape: Sequence[int], seed: int) -> AdaptedModule:
        """Return the model with adapters, and all other weights frozen; `module` is changed.

        Args:
            module: The model.
            input_shape: Shape of one input.
            seed: Decides the first adapters. The global generators are neither read nor changed.

        Raises:
            UserError: If a named layer does not exist, or cannot have an adapter.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Head:
    """No adapters: whole layers are trained, such as the head; all others are frozen.

    Args:
        train: Names of the layers that are trained as a whole; None for the layer named head, classifier or fc, if the
            model has one.
    """

    rotates: ClassVar[bool] = False
    train: list[str] | None = None

    def __post_init__(self) -> None:
        _require_names("adapter.train", self.train)

    def adapted(self, module: nn.Module, input_shape: Sequence[int], seed: int) -> AdaptedModule:
        """See `Adapter.adapted`."""
        module.requires_grad_(False)
        for name in _wholly_trained(module, self.train):
            module.get_submodule(name).requires_grad_(True)
        return AdaptedModule(module, input_shape)


@dataclass(frozen=True, kw_only=True)
class Lora:
    """LoRA: both factors A and B are trained.

    Args:
        targets: Names of the Linear and Conv layers that get adapters, or the last parts of their names: `query` stands
            for all layers with this name.
        rank: Number of rows of A; at most the number of inputs, and of outputs, of each target.
        alpha: Adapters are multiplied by alpha / rank.
        train: See `Head`.

    Raises:
        UserError: If a number is out of range, or no target is named.
    """

    rotates: ClassVar[bool] = False
    targets: list[str]
    rank: int = 8
    alpha: float = 16.0
    train: list[str] | None = None

    def __post_init__(self) -> None:
        positive_int("adapter.rank", self.rank)
        require_representable("adapter.alpha", self.alpha)
        _require_names("adapter.targets", self.targets)
        _require_names("adapter.train", self.train)
        if not self.targets:
            remedy = 'Name layers such as ["query", "value"], or set adapter.kind = "head"'
            raise UserError("adapter.targets", "names of layers", "an empty list", remedy)

    def adapted(self, module: nn.Module, input_shape: Sequence[int], seed: int) -> AdaptedModule:
        """See `Adapter.adapted`."""
        names, whole = _targeted(module, self.targets), _wholly_trained(module, self.train)
        for name in names:
            if any(f"{name}.".startswith(f"{each}.") for each in whole):
                got, remedy = repr(name), "Name it in adapter.targets or in adapter.train"
                raise UserError("adapter.targets", "layers that are not trained as a whole", got, remedy)
        self._refuse_rank(module, names)
        module.requires_grad_(False)
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(seed)
            self._inject(module, names)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(f".lora_B.{NAME}" in name or (f".lora_A.{NAME}" in name and self._trains_a))
        for name in whole:
            module.get_submodule(name).requires_grad_(True)
        return AdaptedModule(module, input_shape)

    def _refuse_rank(self, module: nn.Module, names: Sequence[str]) -> None:
        """Raise UserError if the rank exceeds a side of a layer's weight, beyond which B A gains no rank."""
        for name in names:
            weight = cast(nn.Linear, module.get_submodule(name)).weight
            sides = {"inputs": weight[0].numel(), "outputs": len(weight)}
            side = min(sides, key=lambda key: sides[key])
            if self.rank > sides[side]:
                expected = f"at most {sides[side]}, the number of {side} of {name!r}"
                raise UserError("adapter.rank", expected, self.rank, "Lower it, or name other targets")

    @property
    def _trains_a(self) -> bool:
        return True

    def _inject(self, module: nn.Module, names: Sequence[str]) -> None:
        require_extra("[adapter]", "adapters", ["peft"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from peft import LoraConfig, inject_adapter_in_model

            exactly = "|".join(map(re.escape, names))  # a list would also match the ends of other names
            config = LoraConfig(r=self.rank, lora_alpha=cast(int, self.alpha), target_modules=exactly)
            try:
                inject_adapter_in_model(config, module, adapter_name=NAME)
            except (ValueError, TypeError) as error:
                remedy = "Name other layers, or change adapter.rank"
                raise UserError(
                    "adapter.targets", "layers that PEFT can adapt", line_of(error, type(self)), remedy
                ) from None


@dataclass(frozen=True, kw_only=True)
class FfaLora(Lora):
    """FFA-LoRA: A keeps its random start, and B is trained.

    Args:
        targets: See `Lora`.
        rank: See `Lora`.
        alpha: See `Lora`.
        train: See `Head`.
    """

    @property
    def _trains_a(self) -> bool:
        return False


@dataclass(frozen=True, kw_only=True)
class FedSvd(FfaLora):
    """FedSVD: clients train B, and the rows of A are orthonormal; equal to a server that decomposes B A every round.

    Args:
        targets: See `Lora`.
        rank: See `Lora`.
        alpha: See `Lora`.
        train: See `Head`.
    """

    rotates: ClassVar[bool] = True

    def _inject(self, module: nn.Module, names: Sequence[str]) -> None:
        super()._inject(module, names)
        for layer in lora_layers(module).values():
            weight = lora_weight(layer, "lora_A")
            with torch.no_grad():
                weight.copy_(orthonormal_rows(weight))


ADAPTERS: Registry[Adapter] = Registry(
    "adapter",
    {"lora": Lora, "ffa-lora": FfaLora, "fed-svd": FedSvd, "head": Head},
    protocol=Adapter,
)


def _targeted(module: nn.Module, targets: Sequence[str]) -> list[str]:
    """Return the full names of the targeted layers, in the module's order."""
    names = [name for name, layer in module.named_modules() if isinstance(layer, _ADAPTABLE)]
    for target in targets:
        if not any(_ends_with(name, target) for name in names):
            got, known = repr(target), sorted({name.rpartition(".")[2] for name in names})
            raise UserError("adapter.targets", "the name of a Linear or Conv layer", got, nearest(target, known))
    return [name for name in names if any(_ends_with(name, target) for target in targets)]


def _require_names(key: str, names: object) -> None:
    """Raise UserError for one name in place of a list: its letters would count as names."""
    if isinstance(names, str):
        raise UserError(key, "a list of names of layers", repr(names), f"Write [{names!r}]")


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _wholly_trained(module: nn.Module, train: Sequence[str] | None) -> list[str]:
    known = {name for name, _ in module.named_modules() if name}
    if train is None:
        return [next(name for name in _HEADS if name in known)] if known.intersection(_HEADS) else []
    for name in train:
        if name not in known:
            raise UserError("adapter.train", "the name of a layer of the model", repr(name), nearest(name, known))
    return list(train)

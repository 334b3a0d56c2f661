"""Low-rank adapters after training: their factors, FedSVD's re-parametrization, and the merged model.

Lee, Baek, Kim et al. 2025, "FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA", arXiv
2505.12805. Clients train B of W + s B A, and after each round the server replaces the factors by B' = U S and A' = V^T,
from the singular value decomposition B A = U S V^T.

**The row space never changes.** The rows of B A are in the row space of A, so A' = M A for some r x r matrix
M: the row space of A is that of the start. If A begins with orthonormal rows, M is orthogonal, B' = B M^T,
and the gradient by B' is that by B, times M^T. A step, a clipped step or one scaled by its norm, isotropic Gaussian
noise and error feedback all commute with M. So a run of FedSVD has the same products B A (noise: the same distribution)
as a run that keeps the first orthonormal A, and takes the decomposition of the last B alone. fedpriv computes that run:
clients' memories stay valid, and neither A nor a decomposition is sent. `tests/tasks` compares the two.
It would not hold for server optimizers that act on single coordinates (Adam, Yogi, Adagrad); `[adapter]` refuses them.
"""

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

__all__ = ["adapter_tensors", "lora_layers", "lora_weight", "merged", "orthonormal_rows", "svd_step"]

NAME = "default"
"""The name of the one adapter in PEFT's layers."""


def svd_step(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Return FedSVD's factors B' = U S and A' = V^T of the product B A.

    Args:
        b: `[out, rank]`.
        a: `[rank, in]`, with independent rows.

    Returns:
        `[out, rank]` with orthogonal columns, and `[rank, in]` with orthonormal rows; their product is B A up to
        rounding. If B is zero, A' is an orthonormal basis of the rows of A.
    """
    basis, upper = torch.linalg.qr(a.double().T)  # a = upper^T basis^T
    left, values, right = torch.linalg.svd(b.double() @ upper.T, full_matrices=False)
    if len(values) < len(a):  # fewer outputs than the rank: keep a full basis
        rest = torch.linalg.svd(right, full_matrices=True)[2][len(values) :]
        right = torch.cat([right, rest])
        left = torch.cat([left, left.new_zeros(len(left), len(rest))], dim=1)
        values = torch.cat([values, values.new_zeros(len(rest))])
    return (left * values).to(b.dtype), (right @ basis.T).to(a.dtype)


def orthonormal_rows(weight: Tensor) -> Tensor:
    """Return a tensor of the same shape, with orthonormal rows `[rank, everything else]` that span the same space."""
    basis, upper = torch.linalg.qr(weight.flatten(1).double().T)
    signs = torch.where(upper.diagonal() < 0, -1.0, 1.0).to(basis.dtype)
    return (basis * signs).T.reshape(weight.shape).to(weight.dtype)


def lora_layers(module: nn.Module) -> "dict[str, LoraLayer]":
    """Return PEFT's LoRA layers in a module, by name; none if PEFT has not been imported."""
    found = {name: layer for name, layer in module.named_modules() if hasattr(layer, "lora_A")}
    return cast("dict[str, LoraLayer]", found)


def merged(module: nn.Module) -> nn.Module:
    """Return a copy of an adapted module as the model that was adapted, with W + s B A in place of W.

    Its parameters have the names of the model before. A module without adapters is returned as a copy.
    """
    made = copy.deepcopy(module)
    inner = getattr(made, "inner", made) if hasattr(made, "kept_shape") else made
    for name, layer in lora_layers(inner).items():
        layer.merge(safe_merge=True)
        path, _, last = name.rpartition(".")
        setattr(inner.get_submodule(path), last, layer.get_base_layer())
    return cast(nn.Module, inner).eval()


def adapter_tensors(module: nn.Module, *, svd: bool = False) -> dict[str, Tensor]:
    """Return the adapters alone, and all else that is trained, under the names of PEFT's files.

    Args:
        module: The inner module of an `AdaptedModule`.
        svd: Return each pair of factors as FedSVD has it; see `svd_step`.
    """
    found: dict[str, Tensor] = {}
    for name, layer in lora_layers(module).items():
        a, b = (lora_weight(layer, side) for side in ("lora_A", "lora_B"))
        if svd:
            left, right = svd_step(b.flatten(1), a.flatten(1))
            a, b = right.reshape(a.shape), left.reshape(b.shape)
        for side, weight in (("lora_A", a), ("lora_B", b)):
            found[f"base_model.model.{name}.{side}.weight"] = weight
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and ".lora_" not in name:
            found[f"base_model.model.{name}"] = parameter
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in found.items()}


def lora_weight(layer: "LoraLayer", side: str) -> Tensor:
    """Return the factor `lora_A` or `lora_B` of a layer."""
    return cast(Mapping[str, nn.Linear], getattr(layer, side))[NAME].weight

"""Adapters: small trained parts of a model with frozen weights, and pretrained models to put them in."""

from fedpriv.tasks.adapters.factors import adapter_tensors, lora_layers, merged, svd_step
from fedpriv.tasks.adapters.kinds import ADAPTERS, Adapter, FedSvd, FfaLora, Head, Lora
from fedpriv.tasks.adapters.staged import AdaptedModule, frozen_digest

__all__ = [
    "ADAPTERS",
    "AdaptedModule",
    "Adapter",
    "FedSvd",
    "FfaLora",
    "Head",
    "Lora",
    "adapter_tensors",
    "frozen_digest",
    "lora_layers",
    "merged",
    "svd_step",
]

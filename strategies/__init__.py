"""Flower's server side: strategies that run fedpriv's methods, and the ServerApp of its experiments."""

from fedpriv.flower.trained import frozen_arrays
from fedpriv.rounds import Agreement

from .method_strategy import MethodStrategy
from .named import AlphaNormEC, CenteredClip, Clip21, Clip21SGD2M, DPFedAvg, FedAlphaNormEC, NormalizedSGD, Privacy

__all__ = [
    "Agreement",
    "AlphaNormEC",
    "CenteredClip",
    "Clip21",
    "Clip21SGD2M",
    "DPFedAvg",
    "FedAlphaNormEC",
    "MethodStrategy",
    "NormalizedSGD",
    "Privacy",
    "frozen_arrays",
]

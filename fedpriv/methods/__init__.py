"""All methods, one paper a file; adding one is its file and one line here."""

from fedpriv.methods.alpha_normec import AlphaNormEC
from fedpriv.methods.base import ClientState, Method, ServerState, feedback_of, has_memory
from fedpriv.methods.clip21 import Clip21
from fedpriv.methods.dp_fedavg import DPFedAvg
from fedpriv.methods.normalized_sgd import NormalizedSGD

__all__ = [
    "METHODS",
    "AlphaNormEC",
    "ClientState",
    "Clip21",
    "DPFedAvg",
    "Method",
    "NormalizedSGD",
    "ServerState",
    "feedback_of",
    "has_memory",
]

METHODS: dict[str, type] = {
    "alpha-normec": AlphaNormEC,
    "normalized-sgd": NormalizedSGD,
    "clip21": Clip21,
    "dp-fedavg": DPFedAvg,
}

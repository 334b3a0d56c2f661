"""All methods, one file per paper. To add a method, add its file and one line in `base.METHODS`."""

from fedpriv.methods.alpha_normec import AlphaNormEC
from fedpriv.methods.base import (
    METHODS,
    ClientState,
    ClientStateT,
    Constrained,
    ExampleRule,
    Gradients,
    LostMemory,
    Method,
    OwnSignal,
    PlainMethod,
    ServerState,
    ServerStateT,
    damping_of,
    feedback_of,
    has_memory,
    own_signal_of,
    owns_steps,
    server_step,
)
from fedpriv.methods.centered_clip import CenteredClip
from fedpriv.methods.clip21 import Clip21
from fedpriv.methods.clip21_sgd2m import Clip21SGD2M
from fedpriv.methods.dice_sgd import DiceSGD
from fedpriv.methods.difference_estimators import DIFF2, PrivateSpiderBoost
from fedpriv.methods.dp_fedavg import DPFedAvg
from fedpriv.methods.dp_gd import DPGD
from fedpriv.methods.dp_scaffold import DPScaffold
from fedpriv.methods.fed_alpha_normec import FedAlphaNormEC
from fedpriv.methods.fedspeed import FedSpeed
from fedpriv.methods.normalized_sgd import NormalizedSGD
from fedpriv.methods.server_optimizers import SERVER_OPTIMIZERS, ServerOptimized, ServerOptimizer, optimized
from fedpriv.methods.side_values import (
    AdaptiveBound,
    PrivateMetrics,
    SideValues,
    bare,
    message_size,
    refuse_for_examples,
    side_values_of,
    with_side_values,
)
from fedpriv.methods.sparse import PrivateIHT

__all__ = [
    "DIFF2",
    "DPGD",
    "METHODS",
    "SERVER_OPTIMIZERS",
    "AdaptiveBound",
    "AlphaNormEC",
    "CenteredClip",
    "ClientState",
    "ClientStateT",
    "Clip21",
    "Clip21SGD2M",
    "Constrained",
    "DPFedAvg",
    "DPScaffold",
    "DiceSGD",
    "ExampleRule",
    "FedAlphaNormEC",
    "FedSpeed",
    "Gradients",
    "LostMemory",
    "Method",
    "NormalizedSGD",
    "OwnSignal",
    "PlainMethod",
    "PrivateIHT",
    "PrivateMetrics",
    "PrivateSpiderBoost",
    "ServerOptimized",
    "ServerOptimizer",
    "ServerState",
    "ServerStateT",
    "SideValues",
    "bare",
    "damping_of",
    "feedback_of",
    "has_memory",
    "message_size",
    "optimized",
    "own_signal_of",
    "owns_steps",
    "refuse_for_examples",
    "server_step",
    "side_values_of",
    "with_side_values",
]

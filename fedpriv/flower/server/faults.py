"""Checks of untrusted messages of clients."""

import math

import torch
from torch import Tensor

from fedpriv.methods import message_size
from fedpriv.rounds import ClientRules

__all__ = ["message_fault", "norm_limit"]

# Rounding to a grid of a quarter of the standard deviation adds 1 / (12 * 16) to the noise's variance.
_ROUNDED = math.sqrt(1.0 + 1.0 / (12 * 16))


def message_fault(message: Tensor, rules: ClientRules, size: int) -> str:
    """Return the reason why a message `[params]` is unusable; empty if it is usable.

    A usable message has the model's size and is finite. No coordinate is larger than exact sums allow, and its l2 norm
    is possible for an honest client.

    Args:
        message: Message as received.
        rules: The clients' half of the agreement.
        size: Number of parameters of the model.
    """
    size = message_size(rules.method, size)
    if message.shape != (size,):
        return f"shape {list(message.shape)}, expected {[size]}"
    if not bool(torch.isfinite(message).all()):
        return "NaN or infinity"
    if size and float(message.abs().max()) > rules.message_limit:
        return f"a coordinate above {rules.message_limit:g}"
    norm, limit = float(torch.linalg.vector_norm(message.double())), norm_limit(rules, size)
    return f"l2 norm {norm:g}, expected at most {limit:g}" if norm > limit else ""


def norm_limit(rules: ClientRules, size: int) -> float:
    """Return the largest l2 norm of an honest message: its bound, plus an allowance for its noise.

    The norm is 1-Lipschitz in the noise, so that an honest message exceeds the limit with a probability below e^-72.
    """
    noise = rules.noise_stddev * (_ROUNDED * math.sqrt(size) + 12.0)
    return rules.method.bounded.l2_bound + noise

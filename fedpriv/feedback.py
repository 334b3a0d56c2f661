"""The error-feedback step: send what is bounded, remember what was sent.

With memory v and signal u the client sends Delta = B(u - v) and keeps v + beta Delta; the server adds beta/n of
every message. Then, without noise, the server's memory is the mean of the clients' memories after every round.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fedpriv.bounding import Bounded, InPlace

__all__ = ["Feedback", "Release", "bounded_residual", "decayed", "remember", "sent_message"]

Release = Callable[[Tensor], Tensor]
"""Turns a bounded message `[..., params]` into the one that leaves the client: with noise, rounded to the grid of
`fedpriv.mechanisms.noise`; the same shape, number format and device."""


@dataclass(frozen=True, kw_only=True)
class Feedback:
    """A client rule of this form, as figures, for engines that move memories in place; see `Method.feedback`.

    Args:
        bounded: B.
        beta: How much of a message is remembered; None for a rule without memory, Delta = B(u).
        damping: lambda, how much of the memory is forgotten each round.
        sent: Whether the message is remembered with its noise.
    """

    bounded: "InPlace"
    beta: float | None
    damping: float = 0.0
    sent: bool = False


def bounded_residual(bounded: "Bounded", memory: Tensor, signal: Tensor) -> Tensor:
    """B(signal - memory) on the last axis; `[..., params]`, every row within `bounded.l2_bound`."""
    return bounded(signal - memory)


def sent_message(message: Tensor, release: Release | None) -> Tensor:
    """Return the message that leaves the client; `[..., params]`. Without `release` it is the bounded message."""
    return message if release is None else release(message)


def remember(memory: Tensor, message: Tensor, beta: float) -> Tensor:
    """Memory + beta message, on the client's side as on the server's; `[..., params]`."""
    return torch.add(memory, message, alpha=beta)


def decayed(memory: Tensor, damping: float, rounds: Tensor | int) -> Tensor:
    """(1 - damping)^rounds memory: what is left of a memory that nothing was added to for `rounds` rounds.

    Args:
        memory: `[..., params]`.
        damping: lambda in [0, 1); 0 leaves the memory as it is, to the bit.
        rounds: How many rounds; a number, or `[..., 1]` by client.
    """
    if damping == 0.0:
        return memory
    return memory * (1.0 - damping) ** rounds

"""The error-feedback step: send a bounded message and remember it.

With memory v and signal u the client sends Delta = B(u - v) and keeps v + beta Delta. The server adds beta/n of every
message. Without noise, the server's memory then equals the mean of the clients' memories after every round.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fedpriv.bounding import Bounded, InPlace

__all__ = [
    "Feedback",
    "Release",
    "RoundedRelease",
    "bounded_residual",
    "decayed",
    "on_grid",
    "remember",
    "sent_message",
]

Release = Callable[[Tensor], Tensor]
"""Turns a bounded message `[..., params]` into the one that leaves the client: adds noise and rounds to the grid of
`fedpriv.mechanisms.noise`. Keeps shape and device, and the number format except under secure aggregation."""


@dataclass(frozen=True, kw_only=True)
class RoundedRelease:
    """A `Release` for secure aggregation, which rounds a bounded message before it adds integer noise.

    Args:
        rounded: Rounds a bounded message to the grid of the sums.
        noised: Adds noise to a rounded message; returns float64.
        step: The grid.
    """

    rounded: Release
    noised: Release
    step: float

    def __call__(self, message: Tensor) -> Tensor:
        """Return the message that leaves the client."""
        return self.noised(self.rounded(message))


@dataclass(frozen=True, kw_only=True)
class Feedback:
    """The coefficients of a client rule of this form, for engines that update memories in place; see `Method.feedback`.

    Args:
        bounded: B.
        beta: The share of a message that is remembered; None for a rule without memory, Delta = B(u).
        damping: `lambda`, the share of the memory that is forgotten each round.
        sent: If True, the message is remembered with its noise.
        weight: The share of the newest signal in an exponential average of the client's signals, which takes the
            signal's place; None for the signal itself. Engines run such a rule by its `client_rule`.
        center: Subtracted from the signal first, `[params]`; None for nothing. Only for a rule without memory.
    """

    bounded: "InPlace"
    beta: float | None
    damping: float = 0.0
    sent: bool = False
    weight: float | None = None
    center: Tensor | None = None


def bounded_residual(bounded: "Bounded", memory: Tensor, signal: Tensor) -> Tensor:
    """Return B(signal - memory) on the last axis, `[..., params]`, every row within `bounded.l2_bound`."""
    return bounded(signal - memory)


def on_grid(message: Tensor, release: Release | None) -> Tensor:
    """Return the message to remember, `[..., params]`: rounded under secure aggregation, otherwise unchanged.

    Server and clients then agree on the same numbers. A rule with a memory calls it on its bounded message.
    """
    return release.rounded(message) if isinstance(release, RoundedRelease) else message


def sent_message(message: Tensor, release: Release | None) -> Tensor:
    """Return the message that leaves the client, `[..., params]`; the bounded message if `release` is None."""
    return message if release is None else release(message)


def remember(memory: Tensor, message: Tensor, beta: float) -> Tensor:
    """Return memory + beta message, `[..., params]`, the update of both client and server."""
    return torch.add(memory, message, alpha=beta)


def decayed(memory: Tensor, damping: float, rounds: Tensor | int) -> Tensor:
    """Return (1 - damping)^rounds memory: the memory left after `rounds` rounds without an update.

    Args:
        memory: `[..., params]`.
        damping: `lambda` in [0, 1); 0 leaves the memory unchanged to the bit.
        rounds: Number of rounds; a scalar, or `[..., 1]` by client.
    """
    if damping == 0.0:
        return memory
    return memory * (1.0 - damping) ** rounds

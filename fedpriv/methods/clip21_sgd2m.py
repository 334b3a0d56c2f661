"""Clip21-SGD2M: error feedback for clipping, with momentum at clients and server.

Islamov, Samsonov, Pavlenko, Richtarik, Horvath 2025, arXiv 2502.11682. Every round, every client:

    u_i <- (1 - b) u_i + b grad f_i(x)      c_i = clip_tau(u_i - g_i)      g_i <- g_i + b' c_i      sends c_i + z_i
    server:  g <- g + (b' / n) sum_i (c_i + z_i)      x <- x - gamma g

With b = b' = 1 it is Clip21. A smaller b averages the noise of random batches, and a smaller b' that of privacy.

| the paper's letter | here | who keeps it |
|---|---|---|
| u_i (v_i) | `ClientMemories.average` | client i |
| g_i | `ClientMemories.memory` | client i |
| g | `ServerMemory.memory` | server |
| x | `ServerMemory.model` | server |
| tau | `clip_norm` | client |
| b (beta) | `weight` | client |
| b' (beta with a hat) | `beta` | both |
| gamma | `server_lr` | server |

The paper starts a round with the step of x; here a round ends with it, which gives the same models, one round earlier.
With partial participation, only the clients of the cohort change their memories, and g stays the mean of the g_i. A
signal that is not finite changes no memory.

Accounting is ours, not the paper's. For whole clients, only the bound tau of a message counts. For single examples, u_i
is a linear filter of the client's gradients whose gain is at most 1, so the proof of `fedpriv.privacy.records` holds.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fedpriv.bounding import Clip
from fedpriv.checks import real_within, require_representable
from fedpriv.feedback import Feedback, Release, bounded_residual, on_grid, remember, sent_message
from fedpriv.methods.base import LostMemory, PlainMethod, Row
from fedpriv.methods.clip21 import ServerMemory

__all__ = ["ClientMemories", "Clip21SGD2M"]


class ClientMemories(NamedTuple):
    """`g_i` and `u_i`, both `[..., params]`."""

    memory: Tensor
    average: Tensor


@dataclass(frozen=True, kw_only=True)
class Clip21SGD2M(PlainMethod):
    """Clipped residuals of averaged signals, with a noiseless memory.

    Args:
        clip_norm: tau, the maximum length of a message.
        weight: b, the share of the newest signal in a client's average, above 0 and at most 1.
        beta: The share of a message that both memories add, above 0 and at most 1.
        server_lr: gamma.
    """

    row: ClassVar[Row] = Row(
        "clip(u_i - v_i), u_i += b (g_i - u_i)",
        memory="v_i += beta message",
        server="v += beta/n sum; x -= lr v",
        source="arXiv 2502.11682",
    )

    clip_norm: float = 1.0
    weight: float = 0.5
    beta: float = 0.5
    server_lr: float = 0.1

    def __post_init__(self) -> None:
        Clip(clip_norm=self.clip_norm)
        for key in ("weight", "beta", "server_lr"):
            require_representable(f"method.{key}", getattr(self, key))
        for key in ("weight", "beta"):
            real_within(f"method.{key}", getattr(self, key), 0.0, 1.0, "Set it above 0 and at most to 1")

    @property
    def bounded(self) -> Clip:
        """The map `clip_tau`."""
        return Clip(clip_norm=self.clip_norm)

    @property
    def feedback(self) -> Feedback:
        """The client rule as parameters."""
        return Feedback(bounded=self.bounded, beta=self.beta, weight=self.weight)

    @property
    def lost_memory(self) -> LostMemory:
        """`reset-all`: the server's memory would contain the lost one forever."""
        return "reset-all"

    def init_client(self, size: int) -> ClientMemories:
        """Return g_i = u_i = 0."""
        return ClientMemories(torch.zeros(size), torch.zeros(size))

    def init_server(self, model: Tensor) -> ServerMemory:
        """Return g = 0."""
        return ServerMemory(model, torch.zeros_like(model))

    def client_rule(
        self,
        state: ClientMemories,
        signal: Tensor,
        release: Release | None,
        round: int,
    ) -> tuple[Tensor, ClientMemories]:
        """See `Method.client_rule`."""
        average = torch.add((1.0 - self.weight) * state.average, signal, alpha=self.weight)
        message = on_grid(bounded_residual(self.bounded, state.memory, average), release)
        finite = torch.isfinite(average).all(dim=-1, keepdim=True)
        memories = ClientMemories(
            remember(state.memory, message, self.beta), torch.where(finite, average, state.average)
        )
        return sent_message(message, release), memories

    def server_rule(
        self, state: ServerMemory, mean_message: Tensor, sampling_prob: float
    ) -> tuple[Tensor, ServerMemory]:
        """See `Method.server_rule`."""
        memory = remember(state.memory, mean_message, self.beta * sampling_prob)
        return memory, ServerMemory(state.model, memory)

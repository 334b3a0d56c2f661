"""Clip21: error feedback for clipping.

Khirirat, Gorbunov, Horvath, Islamov, Karray, Richtarik 2023, "Clip21: Error Feedback for Gradient Clipping",
arXiv 2305.18929. Every round, every client:

    c_i = clip_tau(grad f_i(x) - v_i)      v_i <- v_i + c_i      sends c_i + z_i
    server:  v <- v + (1 / n) sum_i (c_i + z_i)      x <- x - gamma v

Known result: after O(1 / tau) rounds, the residuals are shorter than tau and clipping stops. Without noise, the method
is gradient descent from then on.

| the paper's letter | here | who keeps it |
|---|---|---|
| v_i | `ClientMemory.memory` | client i |
| v | `ServerMemory.memory` | server |
| x | `ServerMemory.model` | server |
| tau | `clip_norm` | client |
| gamma | `server_lr` | server |
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fedpriv.bounding import Clip
from fedpriv.checks import require_representable
from fedpriv.feedback import Feedback, Release, bounded_residual, on_grid, remember, sent_message
from fedpriv.methods.base import LostMemory, PlainMethod, Row

__all__ = ["ClientMemory", "Clip21", "ServerMemory"]


class ClientMemory(NamedTuple):
    """`v_i` `[..., params]`."""

    memory: Tensor


class ServerMemory(NamedTuple):
    """`x` and `v`, both `[params]`."""

    model: Tensor
    memory: Tensor


@dataclass(frozen=True, kw_only=True)
class Clip21(PlainMethod):
    """Clipped residuals with a noiseless memory.

    Args:
        clip_norm: tau, the maximum length of a message.
        server_lr: gamma.
    """

    row: ClassVar[Row] = Row(
        "clip(g_i - v_i)", memory="v_i += message", server="v += 1/n sum; x -= lr v", source="arXiv 2305.18929"
    )

    clip_norm: float = 1.0
    server_lr: float = 0.1

    def __post_init__(self) -> None:
        Clip(clip_norm=self.clip_norm)
        require_representable("method.server_lr", self.server_lr)

    @property
    def bounded(self) -> Clip:
        """The map `clip_tau`."""
        return Clip(clip_norm=self.clip_norm)

    @property
    def feedback(self) -> Feedback:
        """The client rule as parameters."""
        return Feedback(bounded=self.bounded, beta=1.0)

    @property
    def lost_memory(self) -> LostMemory:
        """`reset-all`: the server's memory would contain the lost one forever."""
        return "reset-all"

    def init_client(self, size: int) -> ClientMemory:
        """Return v_i = 0."""
        return ClientMemory(torch.zeros(size))

    def init_server(self, model: Tensor) -> ServerMemory:
        """Return v = 0."""
        return ServerMemory(model, torch.zeros_like(model))

    def client_rule(
        self,
        state: ClientMemory,
        signal: Tensor,
        release: Release | None,
        round: int,
    ) -> tuple[Tensor, ClientMemory]:
        """See `Method.client_rule`."""
        message = on_grid(bounded_residual(self.bounded, state.memory, signal), release)
        return sent_message(message, release), ClientMemory(remember(state.memory, message, 1.0))

    def server_rule(
        self, state: ServerMemory, mean_message: Tensor, sampling_prob: float
    ) -> tuple[Tensor, ServerMemory]:
        """See `Method.server_rule`."""
        memory = remember(state.memory, mean_message, sampling_prob)
        return memory, ServerMemory(state.model, memory)

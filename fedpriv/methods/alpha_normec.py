"""alpha-NormEC: smoothed normalization with error feedback and noiseless memories.

Shulgin, Khirirat, Richtarik 2025, "Smoothed Normalization for Efficient Distributed Private Optimization",
arXiv 2502.13482. Every round, every client:

    Delta_i = N_alpha(grad f_i(x) - v_i)       v_i <- v_i + beta Delta_i       sends m_i = Delta_i + z_i
    server:  v <- v + (beta / n) sum_i m_i     x <- x - gamma v / ||v||

| the paper's letter | here | who keeps it |
|---|---|---|
| v_i | `ClientMemory.memory` | client i |
| v | `ServerMemory.memory` | server |
| x | `ServerMemory.model` | server |
| alpha, beta | `alpha`, `beta` | both |
| gamma | `server_lr` | server |
| server normalization (SN) | `server_normalization` | server |

Ours, not the paper's, both off by default:

* `memory = "sent"`: v_i <- v_i + beta m_i, the noised message. Both memories then agree, including the noise, and the
  feedback corrects earlier noise. Requires noise at the client.
* `damping = lambda`: memories shrink by (1 - lambda) each round on both sides. This bounds the accumulated noise by a
  standard deviation of beta s / sqrt(lambda (2 - lambda)), with s that of the noise on the mean message. In return, the
  fixed point is 1 / (1 + alpha lambda / beta) as long (if residuals are short).

With partial participation, the server's factor on the sum is beta / n (n the population), so that v stays the mean of
the v_i. A client that skipped rounds first shrinks its memory as often as the server did.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from fedpriv.bounding import SmoothedNormalization
from fedpriv.checks import require_fraction, require_representable
from fedpriv.errors import UserError
from fedpriv.feedback import Feedback, Release, bounded_residual, decayed, on_grid, remember, sent_message
from fedpriv.methods.base import LostMemory, PlainMethod, Row, direction

__all__ = ["AlphaNormEC", "ClientMemory", "ServerMemory"]


# With less damping, more than a third of a lost memory remains after a thousand rounds.
_FADES = 1e-3


class ClientMemory(NamedTuple):
    """`v_i` `[..., params]`, and the round after which it was last updated `[..., 1]` (0: never)."""

    memory: Tensor
    updated: Tensor


class ServerMemory(NamedTuple):
    """`x` and `v`, both `[params]`."""

    model: Tensor
    memory: Tensor


@dataclass(frozen=True, kw_only=True)
class AlphaNormEC(PlainMethod):
    """alpha-NormEC as published, with two options that reduce the noise it accumulates.

    Args:
        alpha: Smoothing of the normalization; the message is half as long as allowed at ||residual|| = alpha.
        beta: Feedback step. beta <= alpha contracts every residual.
        server_lr: gamma; with server normalization, the length of each step.
        server_normalization: If True, the server steps along v / ||v|| (as in the theorems), otherwise along v.
        memory: The message that a client adds to its memory: the `noiseless` one, or the one that it `sent`.
        damping: lambda, the share of both memories that is forgotten each round.
    """

    row: ClassVar[Row] = Row(
        "N_alpha(g_i - v_i), N_alpha(u) = u / (alpha + ||u||)",
        memory="v_i += beta message",
        server="v += beta/n sum; x -= lr v/||v||, or lr v",
        source="arXiv 2502.13482",
    )

    alpha: float = 1.0
    beta: float = 0.1
    server_lr: float = 0.1
    server_normalization: bool = True
    memory: Literal["noiseless", "sent"] = "noiseless"
    damping: float = 0.0

    def __post_init__(self) -> None:
        for key in ("alpha", "beta", "server_lr"):
            require_representable(f"method.{key}", getattr(self, key))
        require_fraction("method.damping", self.damping)
        SmoothedNormalization(alpha=self.alpha)
        if self.memory not in ("noiseless", "sent"):
            raise UserError("method.memory", '"noiseless" or "sent"', repr(self.memory), "Choose one of the two")

    @property
    def bounded(self) -> SmoothedNormalization:
        """The map `N_alpha`."""
        return SmoothedNormalization(alpha=self.alpha)

    @property
    def needs_client_noise(self) -> bool:
        """True for sent memory: it contains the noise, so the client must draw it."""
        return self.memory == "sent"

    @property
    def feedback(self) -> Feedback:
        """The client rule as parameters."""
        return Feedback(bounded=self.bounded, beta=self.beta, damping=self.damping, sent=self.memory == "sent")

    @property
    def lost_memory(self) -> LostMemory:
        """With damping, the server's copy of a lost memory fades by (1 - lambda) per round; otherwise it stays."""
        return "reset-one" if self.damping >= _FADES else "reset-all"

    def init_client(self, size: int) -> ClientMemory:
        """Return v_i = 0: a start at true gradients would release their mean without noise."""
        return ClientMemory(torch.zeros(size), torch.zeros(1))

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
        memory = decayed(state.memory, self.damping, round - 1 - state.updated)
        message = on_grid(bounded_residual(self.bounded, memory, signal), release)
        sent = sent_message(message, release)
        learned = sent if self.memory == "sent" else message
        memory = remember(decayed(memory, self.damping, 1), learned, self.beta)
        return sent, ClientMemory(memory, torch.full_like(state.updated, round))

    def server_rule(
        self, state: ServerMemory, mean_message: Tensor, sampling_prob: float
    ) -> tuple[Tensor, ServerMemory]:
        """See `Method.server_rule`."""
        memory = decayed(state.memory, self.damping, 1)
        memory = remember(memory, mean_message, self.beta * sampling_prob)
        return direction(memory) if self.server_normalization else memory, ServerMemory(state.model, memory)

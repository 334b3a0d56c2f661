"""FedSpeed: local steps that are drawn to the server's model, with a correction by the client's earlier moves.

Sun, Shen, Huang, Ding, Tao 2023, "FedSpeed: Larger Local Interval, Less Communication Round, and Higher Generalization
Accuracy", arXiv 2302.10429. Every client of the cohort takes K local steps from w_0 = x:

    w <- w - eta_l (g + (w - w_0) / lambda - g_i)        g_i <- g_i - (w_K - w_0) / lambda
    server:  x <- mean_i (w_K - lambda g_i)

where g is the gradient of a batch at a model a little uphill, w + rho grad F(w) / ||grad F(w)|| (`[local] ascent`).
Here a client keeps h_i = lambda g_i, the sum of its pseudo-gradients s = w_0 - w_K, so that w_K - lambda g_i =
x - (s + h_i) with the new h_i, and sends

    h_i <- h_i + s      m_i = clip(s + h_i) + z_i      server:  x <- x - gamma mean_i m_i

| the paper's letter | here | who keeps it |
|---|---|---|
| x, w_0 | `ModelOnly.model` | server |
| lambda g_i (g_i with a hat) | `ClientMoves.moves` | client i |
| 1 / lambda | `prox`; the authors' code calls it lambda | client |
| rho | `ascent` of `[local]` | client |
| alpha | 1, as in the authors' code: only the gradient uphill counts | client |
| K, eta_l | the table `[local]` | client |
| 1 (or the server's step) | `server_lr` | server |

The sum s + h_i depends on the client's data in all rounds, so it is clipped as a whole: clipping s alone would leave
h_i without a bound. h_i never leaves the client. At the solution, s is zero and h_i is the
client's gradient times lambda: unlike Clip21, a clip shorter than that moves the solution, as in DP-FedAvg. A larger
`prox` makes messages shorter.

Ours, not the paper's: the clip, the noise, and the division by the expected cohort size. The authors' code averages the
h_i of all clients, the paper those of the cohort, as here. The ascent is along the normalized gradient, as in the code.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fedpriv.bounding import Clip, finite_rows
from fedpriv.checks import require_representable
from fedpriv.feedback import Release, on_grid, sent_message
from fedpriv.methods.base import LostMemory, PlainMethod, Row
from fedpriv.methods.memoryless import ModelOnly

__all__ = ["ClientMoves", "FedSpeed"]


class ClientMoves(NamedTuple):
    """`h_i`, the sum of the client's pseudo-gradients `[..., params]`."""

    moves: Tensor


@dataclass(frozen=True, kw_only=True)
class FedSpeed(PlainMethod):
    """Local steps with a proximal term that the client's earlier moves correct.

    Args:
        clip_norm: C, the maximum length of a message.
        prox: 1 / lambda, the strength of the pull to the server's model; the `prox` of the local work adds to it.
        server_lr: gamma; 1 in the paper.
    """

    row: ClassVar[Row] = Row(
        "clip(g_i + h_i), g_i the move of local steps along gradient + prox (w - x - h_i)",
        memory="h_i += g_i",
        source="arXiv 2302.10429",
    )

    clip_norm: float = 1.0
    prox: float = 0.1
    server_lr: float = 1.0

    def __post_init__(self) -> None:
        Clip(clip_norm=self.clip_norm)
        require_representable("method.prox", self.prox)
        require_representable("method.server_lr", self.server_lr)

    @property
    def bounded(self) -> Clip:
        """The map `clip_C`."""
        return Clip(clip_norm=self.clip_norm)

    @property
    def step_prox(self) -> float:
        """1 / lambda."""
        return self.prox

    @property
    def lost_memory(self) -> LostMemory:
        """`reset-one`: the server has no copy of a client's memory."""
        return "reset-one"

    def init_client(self, size: int) -> ClientMoves:
        """Return h_i = 0."""
        return ClientMoves(torch.zeros(size))

    def init_server(self, model: Tensor) -> ModelOnly:
        """Return the model alone."""
        return ModelOnly(model)

    def step_offset(self, state: ClientMoves, shared: Tensor | None) -> Tensor:
        """Return -h_i / lambda."""
        return -self.prox * state.moves

    def client_rule(
        self,
        state: ClientMoves,
        signal: Tensor,
        release: Release | None,
        round: int,
    ) -> tuple[Tensor, ClientMoves]:
        """See `Method.client_rule`. A signal that is not finite changes no memory."""
        after = state.moves + signal
        message = on_grid(self.bounded(signal + after), release)
        kept = torch.where(finite_rows(after), after, state.moves)
        return sent_message(message, release), ClientMoves(kept)

    def server_rule(self, state: ModelOnly, mean_message: Tensor, sampling_prob: float) -> tuple[Tensor, ModelOnly]:
        """See `Method.server_rule`."""
        return mean_message, state

"""DIFF2 and Private SpiderBoost: gradients now and then, and differences of gradients between.

Murata, Suzuki 2023, "DIFF2: Differential Private Optimization via Gradient Differences for Nonconvex Distributed
Learning", arXiv 2302.03884. Arora, Bassily, Gonzalez, Guzman, Menart, Ullah 2023, "Faster Rates of Convergence to
Stationary Points in Differentially Private Optimization", arXiv 2206.00846. In round r, with d = ||x_r - x_{r-1}||:

    restart, every T rounds:  m_i = mean_j clip_C1(grad_j(x_r)) / C1                                 v <- C1 mean_i m_i
    otherwise:                m_i = mean_j clip_rho(grad_j(x_r) - grad_j(x_{r-1})) / rho      v <- v + rho mean_i m_i
    server:                   x_{r+1} = x_r - gamma v

with rho = C2 d for DIFF2 and rho = min(C2 d, 2 C1) for Private SpiderBoost. Both papers add noise in proportion to C1
and rho. Here messages are in units of their bound and get the same noise in all rounds, which is the same. The
models are public, and so are d and rho: each round is one release, of a sensitivity that earlier ones do not change.

| the papers' letter | here | who keeps it |
|---|---|---|
| x_{r-1} | `ClientModel.previous`, `ServerEstimate.previous` | both |
| v | `ServerEstimate.estimate` | server |
| x | `ServerEstimate.model` | server |
| T (SpiderBoost: q) | `period` | both |
| C1, C2 (SpiderBoost: L0, L1) | `clip_norm`, `smoothness` | both |
| gamma, eta | `server_lr` | server |

SpiderBoost does not clip, but assumes gradients of at most L0 that change by at most L1 d. With these as C1 and C2,
clipping changes nothing if the assumption holds, and the guarantee does not depend on it.

Ours: `restart_weight` = w sends w m_i at restarts. Their noise is then 1 / w as large, and they cost w^2 times as much.
A client without the last round's model (it missed that round, or lost its memory) sends zero, with noise; v lacks its
difference until the next restart. If the model did not move, rho = 0 and v stays.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fedpriv.bounding import Clip
from fedpriv.checks import is_whole, real_within, require_representable
from fedpriv.errors import UserError
from fedpriv.feedback import Release, on_grid, sent_message
from fedpriv.methods.base import ExampleRule, Gradients, LostMemory, PlainMethod, Row
from fedpriv.vectors import norm

__all__ = ["DIFF2", "ClientModel", "PrivateSpiderBoost", "ServerEstimate"]


_MAX_PERIOD = 10**6


class ClientModel(NamedTuple):
    """`x_{r-1}` `[..., params]`, and the round in which the client got it `[..., 1]` (0: never)."""

    previous: Tensor
    updated: Tensor


class ServerEstimate(NamedTuple):
    """`x`, `x_{r-1}` and `v`, each `[params]`, and the number of rounds so far `[1]`."""

    model: Tensor
    previous: Tensor
    estimate: Tensor
    rounds: Tensor


@dataclass(frozen=True, kw_only=True)
class DIFF2(PlainMethod):
    """Private gradient differences.

    Args:
        clip_norm: C1, for gradients at restarts. With the unit `example`, it is `privacy.example_clip`.
        smoothness: C2: a gradient's change counts up to C2 times the distance of the models.
        period: T, the number of rounds from one restart to the next; 1 for clipped gradients alone.
        restart_weight: w, the noise of a difference over that of a restart, each relative to its bound.
        server_lr: gamma.
    """

    row: ClassVar[Row] = Row(
        "mean of clip(g_ij), then of clip(g_ij - last g_ij)",
        memory="last x",
        server="v = mean, then v += mean; x -= lr v",
        source="arXiv 2302.03884; unit `example`",
    )

    clip_norm: float = 1.0
    smoothness: float = 1.0
    period: int = 10
    restart_weight: float = 1.0
    server_lr: float = 0.1

    def __post_init__(self) -> None:
        for key in ("clip_norm", "smoothness", "server_lr"):
            require_representable(f"method.{key}", getattr(self, key))
        if not is_whole(self.period, 1, _MAX_PERIOD):
            expected = f"a whole number from 1 to {_MAX_PERIOD:,}"
            raise UserError("method.period", expected, repr(self.period), "Give a number of rounds such as 10")
        remedy = "Give 1 for the same relative noise in all rounds"
        real_within("method.restart_weight", self.restart_weight, 1e-3, 1e3, remedy)

    @property
    def bounded(self) -> Clip:
        """The map that limits messages to the longer of 1, a difference's bound, and w, a restart's."""
        return Clip(clip_norm=max(1.0, self.restart_weight))

    @property
    def longest_difference(self) -> float:
        """The largest radius of a difference, at any distance of the models."""
        return math.inf

    @property
    def lost_memory(self) -> LostMemory:
        """`reset-one`: a restart replaces the estimate, and with it the client's part."""
        return "reset-one"

    @property
    def vectors(self) -> int:
        """2: a gradient or a difference, in units of its bound; and the model, which the client remembers."""
        return 2

    @property
    def needs_everyone(self) -> bool:
        """True: a difference needs the model of the last round."""
        return True

    def own_signal(self, state: ClientModel, model: Tensor, gradients: Gradients, round: int) -> Tensor:
        """See `OwnSignal.own_signal`."""
        sent = self._in_its_unit(state, model, gradients, round)
        return torch.cat([sent, model.to(sent)])

    @property
    def example_rule(self) -> ExampleRule:
        """See `OwnSignal.example_rule`; each round is a fresh release in units of its bound."""
        return ExampleRule(
            "clip_norm",
            self.clip_norm,
            lipschitz=1.0 / self.clip_norm,
            period=self.period,
            restart_weight=self.restart_weight,
        )

    def init_client(self, size: int) -> ClientModel:
        """Return no model yet."""
        return ClientModel(torch.zeros(size), torch.zeros(1))

    def init_server(self, model: Tensor) -> ServerEstimate:
        """Return v = 0."""
        zero = torch.zeros_like(model)
        return ServerEstimate(model, zero, zero, model.new_zeros(1))

    def client_rule(
        self,
        state: ClientModel,
        signal: Tensor,
        release: Release | None,
        round: int,
    ) -> tuple[Tensor, ClientModel]:
        """See `Method.client_rule`."""
        size = state.previous.shape[-1]
        message = on_grid(self.bounded(signal[..., :size]), release)
        sent = sent_message(message, release)
        if signal.shape[-1] == size:  # no model to remember
            return sent, state
        return sent, ClientModel(signal[..., size:], torch.full_like(state.updated, round))

    def server_rule(
        self, state: ServerEstimate, mean_message: Tensor, sampling_prob: float
    ) -> tuple[Tensor, ServerEstimate]:
        """See `Method.server_rule`."""
        if int(state.rounds) % self.period == 0:
            estimate = mean_message * (self.clip_norm / self.restart_weight)
        else:
            estimate = state.estimate + mean_message * self._radius(state.model, state.previous)
        return estimate, ServerEstimate(state.model, state.model, estimate, state.rounds + 1.0)

    def _in_its_unit(self, state: ClientModel, model: Tensor, gradients: Gradients, round: int) -> Tensor:
        """Return the mean of clipped gradients or differences over their bound, `[params]`."""
        if (round - 1) % self.period == 0:
            return gradients.mean(model, self.clip_norm) * (self.restart_weight / self.clip_norm)
        previous = state.previous.to(model)
        radius = self._radius(model, previous)
        if float(state.updated) != round - 1 or radius == 0.0:
            return torch.zeros_like(state.previous)
        return gradients.change(model, previous, radius)

    def _radius(self, model: Tensor, previous: Tensor) -> float:
        """Return rho, from public numbers alone."""
        moved = float(norm(model.double() - previous.double(), exact=True))
        return min(self.smoothness * moved, self.longest_difference)


@dataclass(frozen=True, kw_only=True)
class PrivateSpiderBoost(DIFF2):
    """DIFF2 with differences never longer than two gradients, as in SpiderBoost; the parameters are DIFF2's."""

    row: ClassVar[Row] = Row(
        "as diff2, differences of at most 2 C1",
        memory="last x",
        server="v = mean, then v += mean; x -= lr v",
        source="arXiv 2206.00846; unit `example`",
    )

    @property
    def longest_difference(self) -> float:
        """2 C1: two gradients of at most C1 differ by no more."""
        return 2.0 * self.clip_norm

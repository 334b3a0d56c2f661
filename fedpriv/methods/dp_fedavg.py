"""DP-FedAvg: clip each client's update and average.

McMahan, Ramage, Talwar, Zhang 2018, "Learning Differentially Private Recurrent Language Models", arXiv 1710.06963,
with flat clipping and equal weights: m_i = clip_C(u_i) + z_i and x <- x - gamma mean_i m_i, with u_i the client's
pseudo-gradient. With one full gradient as the signal, it is DP-FedSGD.

| the paper's letter | here | who keeps it |
|---|---|---|
| theta | `ModelOnly.model` | server |
| S | `clip_norm` | client |
| 1 (or the server's step) | `server_lr` | server |
"""

from dataclasses import dataclass
from typing import ClassVar

from fedpriv.bounding import Clip
from fedpriv.checks import require_representable
from fedpriv.methods.base import Row
from fedpriv.methods.memoryless import Memoryless

__all__ = ["DPFedAvg"]


@dataclass(frozen=True, kw_only=True)
class DPFedAvg(Memoryless):
    """Average of clipped signals.

    Args:
        clip_norm: C, the maximum length of a message.
        server_lr: gamma; 1 is FedAvg if the signal is a pseudo-gradient.
    """

    row: ClassVar[Row] = Row("clip(g_i)", source="arXiv 1710.06963; with one gradient: DP-FedSGD")

    clip_norm: float = 1.0
    server_lr: float = 1.0

    def __post_init__(self) -> None:
        Clip(clip_norm=self.clip_norm)
        require_representable("method.server_lr", self.server_lr)

    @property
    def bounded(self) -> Clip:
        """The map `clip_C`."""
        return Clip(clip_norm=self.clip_norm)

"""Normalized SGD: smoothed normalization without memory, the baseline of the alpha-NormEC paper.

Source: arXiv 2502.13482, "DP-SGD with smoothed normalization": m_i = N_alpha(grad f_i(x)) + z_i and
x <- x - gamma mean_i m_i. If clients' gradients do not vanish at the optimum of their mean, it stops away from it.

| the paper's letter | here | who keeps it |
|---|---|---|
| x | `ModelOnly.model` | server |
| alpha | `alpha` | client |
| gamma | `server_lr` | server |
"""

from dataclasses import dataclass
from typing import ClassVar

from fedpriv.bounding import SmoothedNormalization
from fedpriv.checks import require_representable
from fedpriv.methods.base import Row
from fedpriv.methods.memoryless import Memoryless

__all__ = ["NormalizedSGD"]


@dataclass(frozen=True, kw_only=True)
class NormalizedSGD(Memoryless):
    """Average of smoothly normalized signals.

    Args:
        alpha: Smoothing of the normalization.
        server_lr: gamma.
    """

    row: ClassVar[Row] = Row("N_alpha(g_i)", source="arXiv 2502.13482, its baseline")

    alpha: float = 1.0
    server_lr: float = 1.0

    def __post_init__(self) -> None:
        SmoothedNormalization(alpha=self.alpha)
        require_representable("method.server_lr", self.server_lr)

    @property
    def bounded(self) -> SmoothedNormalization:
        """The map `N_alpha`."""
        return SmoothedNormalization(alpha=self.alpha)

"""DP-GD: the mean of the clients' noised means of bounded gradients, with nothing else in between.

Every round, every client sends m_i = u_i + z_i, where u_i is the mean of its examples' bounded gradients (with `unit =
"example"`), and x <- x - gamma mean_i m_i. This is DP-SGD (Abadi et al. 2016, arXiv 1607.00133) in a federation. It is
the baseline for all methods with single examples as the unit of privacy: bounding messages once more, or remembering
them, adds nothing to the privacy of an example.

| the paper's letter | here | who keeps it |
|---|---|---|
| theta | `ModelOnly.model` | server |
| C | `example_clip` of `[privacy]` | client |
| eta | `server_lr` | server |
"""

from dataclasses import dataclass
from typing import ClassVar

from fedpriv.bounding import Clip
from fedpriv.checks import require_representable
from fedpriv.methods.base import Row
from fedpriv.methods.memoryless import Memoryless

__all__ = ["DPGD"]


@dataclass(frozen=True, kw_only=True)
class DPGD(Memoryless):
    """Average of the clients' means of bounded gradients.

    Args:
        max_norm: The longest message. Full gradients are never longer than `privacy.example_clip`: with at least that,
            nothing is clipped twice. Random batches that are larger than expected may be.
        server_lr: gamma.
    """

    row: ClassVar[Row] = Row("mean of clip(g_ij)", source="arXiv 1607.00133; unit `example`")

    max_norm: float = 1.0
    server_lr: float = 1.0

    def __post_init__(self) -> None:
        require_representable("method.max_norm", self.max_norm)
        require_representable("method.server_lr", self.server_lr)

    @property
    def bounded(self) -> Clip:
        """The map that limits messages to `max_norm`."""
        return Clip(clip_norm=self.max_norm)

"""Private iterative hard thresholding: a clipped gradient step, after which only k parameters are not zero.

After the sequential model of arXiv 2310.07367, of which only the abstract was read; see `fedpriv.methods.sparse`. In
round t, the clients of group t send clipped gradients with noise, and the server steps and thresholds:

    m_i = clip_C(g_i) + z_i               x <- H_k(x - eta mean_i m_i)

with H_k the hard threshold. With `sampling = "separated"` and one group for each round, every client sends once.

| the paper's letter | here | who keeps it |
|---|---|---|
| theta | `ModelOnly.model` | server |
| k | `sparsity` | server |
| eta | `step_size` | server |

Ours: Gaussian noise on clipped gradients of any task. The threshold counts all parameters, an intercept among them. It
is computed from released values, and so costs nothing.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedpriv.bounding import Clip
from fedpriv.checks import require_representable, whole_within
from fedpriv.methods.base import Row
from fedpriv.methods.memoryless import Memoryless, ModelOnly
from fedpriv.methods.sparse.threshold import hard_threshold

__all__ = ["PrivateIHT"]


@dataclass(frozen=True, kw_only=True)
class PrivateIHT(Memoryless):
    """Average of clipped signals, and a model with few parameters that are not zero.

    Args:
        sparsity: k, the number of parameters that may differ from zero.
        clip_norm: C, the maximum length of a message.
        step_size: eta, the length of the step before the threshold.
    """

    row: ClassVar[Row] = Row(
        "clip(g_i)", server="x = H_k(x - lr mean)", source="after arXiv 2310.07367, its abstract; details ours"
    )

    sparsity: int = 10
    clip_norm: float = 1.0
    step_size: float = 0.1

    def __post_init__(self) -> None:
        whole_within("method.sparsity", self.sparsity, 1, 2**31, "Set it to a number of parameters")
        Clip(clip_norm=self.clip_norm)
        require_representable("method.step_size", self.step_size)

    @property
    def bounded(self) -> Clip:
        """The map `clip_C`."""
        return Clip(clip_norm=self.clip_norm)

    @property
    def server_lr(self) -> float:
        """1: the direction leads to the thresholded model, of which the zeros are then exact."""
        return 1.0

    @property
    def steps_into(self) -> str:
        """See `base.Constrained`."""
        return "models with few nonzero parameters"

    def server_rule(self, state: ModelOnly, mean_message: Tensor, sampling_prob: float) -> tuple[Tensor, ModelOnly]:
        """See `Method.server_rule`."""
        stepped = state.model - self.step_size * mean_message.to(state.model.dtype)
        return state.model - hard_threshold(stepped, self.sparsity), state

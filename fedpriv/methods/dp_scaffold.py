"""DP-SCAFFOLD: local steps that are corrected for the differences between clients' data.

Noble, Bellet, Dieuleveut 2022, "Differentially Private Federated Learning on Heterogeneous Data", arXiv 2111.09278;
without privacy, it is SCAFFOLD (Karimireddy et al. 2020, arXiv 1910.06378). Every client takes K local steps with
noised clipped gradients g_t, corrected by the control variates c of the server and c_i of the client:

    y <- y - eta_l (g_t - c_i + c)             c_i+ = mean_t g_t
    server:  x <- x + eta_g mean_i (y_i - x)   c <- c + (1 / n) sum_i (c_i+ - c_i)

Here, a client sends the single message m_i = clip(mean_t g_t - c_i). Both steps of the server follow from it, because
y_i - x = -eta_l K (m_i + c) while the clip is inactive:

    c_i <- c_i + m_i      sends m_i + z_i
    server:  x <- x - gamma (c + mean_i m_i)   c <- c + (1 / n) sum_i m_i

So one release serves the model and the control variates. With `[local] work = "dp-sgd"` and single examples as the unit
of privacy, the noise is in every g_t (z_i = 0), and everything else is post-processing. With whole clients as the unit,
the local steps have no noise, the message gets it, and clip(.) bounds the part of one client.

| the paper's letter | here | who keeps it |
|---|---|---|
| x | `ServerMemory.model` | server |
| c | `ServerMemory.memory`; clients receive it with the model | server |
| c_i | `ClientMemory.memory` | client i |
| C (of gradients) | `example_clip` of `[privacy]` | client |
| K, eta_l | `steps`, `client_lr` of `[local]` | client |
| eta_g eta_l K | `server_lr` | server |

Ours, not the papers': the clip of messages (`clip_norm`). It is an error feedback: the part that is cut from a message
stays in the next residual, so c_i still approaches the client's mean gradient. Sums are divided by the expected cohort
size; the paper draws cohorts of a fixed size, for which the two are equal.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedpriv.feedback import remember
from fedpriv.methods.base import Row
from fedpriv.methods.clip21 import ClientMemory, Clip21, ServerMemory

__all__ = ["DPScaffold"]


@dataclass(frozen=True, kw_only=True)
class DPScaffold(Clip21):
    """Local steps with control variates: the client rule of Clip21 on the mean gradient of corrected steps.

    Args:
        clip_norm: The maximum length of a message, the change of a client's control variate in one round.
        server_lr: gamma, the server's step along the mean of the clients' corrected gradients.
    """

    row: ClassVar[Row] = Row(
        "clip(g_i - c_i), g_i the mean gradient of local steps along gradient - c_i + c",
        memory="c_i += message",
        server="x -= lr (c + mean); c += 1/n sum",
        source="arXiv 2111.09278",
    )

    @property
    def corrects_steps(self) -> bool:
        """True: c - c_i is added to the gradient of each local step."""
        return True

    def shared(self, state: ServerMemory) -> Tensor:
        """Return c."""
        return state.memory

    def step_offset(self, state: ClientMemory, shared: Tensor | None) -> Tensor | None:
        """Return c - c_i."""
        return None if shared is None else shared.to(state.memory) - state.memory

    def server_rule(
        self, state: ServerMemory, mean_message: Tensor, sampling_prob: float
    ) -> tuple[Tensor, ServerMemory]:
        """See `Method.server_rule`."""
        memory = remember(state.memory, mean_message, sampling_prob)
        return state.memory + mean_message, ServerMemory(state.model, memory)

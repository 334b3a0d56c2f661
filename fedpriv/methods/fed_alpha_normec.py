"""Fed-alpha-NormEC: alpha-NormEC with local steps and partial participation.

Shulgin, Malinovsky, Khirirat, Richtarik 2025, "First Provable Guarantees for Practical Private FL: Beyond Restrictive
Assumptions", arXiv 2512.21521. Every round, every client i of the cohort S:

    d_i = (x - T_i(x)) / eta        Delta_i = N_alpha(d_i - v_i)      v_i <- v_i + beta Delta_i
    sends m_i = Delta_i + z_i
    server:  v <- v + (beta / n) sum_{i in S} m_i     x <- x - gamma v / ||v||

T_i is gradient descent (`[local] work = "local-steps"`) or passes of incremental gradient (`"local-epochs"`). With one
step on all examples, it is alpha-NormEC.

| the paper's letter | here | who keeps it |
|---|---|---|
| v_i | `ClientMemory.memory` | client i |
| v | `ServerMemory.memory` | server |
| x | `ServerMemory.model` | server |
| alpha, beta | `alpha`, `beta` | both |
| T_i and its step size | the table `[local]` | client |
| eta | `client_lr` of `[local]`; times the number of steps with `signal = "gradient-mean"` | client |
| gamma | `server_lr` | server |

The division by eta distinguishes it from alpha-NormEC on the pseudo-gradients x - T_i(x), which are eta times as long.
Since N_alpha(eta u) = N_{alpha / eta}(u), the latter is this method with alpha / eta and beta / eta.

Derived here, not stated in the paper: the server's factor is beta / n with n the population, not the cohort, so that v
stays the mean of all v_i.
"""

from dataclasses import dataclass
from typing import ClassVar

from fedpriv.methods.alpha_normec import AlphaNormEC
from fedpriv.methods.base import Row

__all__ = ["FedAlphaNormEC"]


@dataclass(frozen=True, kw_only=True)
class FedAlphaNormEC(AlphaNormEC):
    """alpha-NormEC with partial participation and local steps; the signal is divided by their length.

    Args:
        alpha: Smoothing of the normalization; the message is half as long as allowed at ||residual|| = alpha.
        beta: Feedback step. beta <= alpha contracts every residual.
        server_lr: gamma; with server normalization, the length of each step.
        server_normalization: If True, the server steps along v / ||v||, otherwise along v.
        memory: See `AlphaNormEC`; not in the paper.
        damping: See `AlphaNormEC`; not in the paper.
    """

    row: ClassVar[Row] = Row(
        "`alpha-normec` with g_i the sum or mean of the gradients of local steps",
        memory="v_i += beta message",
        server="as `alpha-normec`; some clients a round",
        source="arXiv 2512.21521",
    )

    @property
    def needs_gradient_scale(self) -> bool:
        """True: the paper's d_i is a pseudo-gradient over eta."""
        return True

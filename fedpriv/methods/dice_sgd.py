"""DiceSGD: error feedback inside clipped gradient descent, for single examples.

Zhang, Bu, Wu, Hong 2024, "Differentially Private SGD Without Clipping Bias: An Error-Feedback Approach",
arXiv 2311.14632. Here for a client with gradients g_1 ... g_m, none of them longer than G:

    u   = mean_j clip_C1(g_j) + clip_C2(e)        sends u + z
    e  <- e + mean_j g_j - u
    server:  x <- x - eta mean_i (u_i + z_i)

| the paper's letter | here | who keeps it |
|---|---|---|
| e | `Residual.residual` | client |
| theta | `ModelOnly.model` | server |
| C1, C2 | `clip_norm`, `feedback_clip` | client |
| G | `gradient_cap` = `example_clip` of `[privacy]` | client |
| eta | `server_lr` | server |

**Sensitivity**, ours, without the paper's assumptions: it bounds gradients by clipping them to G. Let R be the most by
which one example moves mean_j (g_j - clip_C1(g_j)): 2 (G - C1) / m if it is replaced. For two data sets that differ in
it, let E_k be the difference of the residuals and p_k that of clip_C2(e). The part that stays,
e - clip_C2(e), is a firmly nonexpansive function of e, so ||E_k - p_k||^2 <= ||E_k||^2 - ||p_k||^2, and
||E_{k+1}||^2 <= ||E_k||^2 - ||p_k||^2 + 2 R ||E_k|| + R^2. As ||E_k|| <= (k - 1) R, the sum over J rounds gives
sum_k ||p_k||^2 <= (J R)^2. Also ||p_k|| <= 2 C2. Together with the clipped gradients themselves,

    sqrt(sum_k ||u_k - u'_k||^2) <= (2 / m) C1 sqrt(J) + min(J R, 2 C2 sqrt(J)).     QED

The first term is the whole cost of `dp-gd` with the clip C1. The second is the price of the feedback; it grows with J,
not with its root, because a residual may collect an example's part for many rounds and release it in one. Batches
amplify nothing, because the residual is hidden.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fedpriv.bounding import Clip, finite_rows
from fedpriv.checks import require_representable
from fedpriv.errors import UserError
from fedpriv.feedback import Release, on_grid, sent_message
from fedpriv.methods.base import ExampleRule, Gradients, LostMemory, PlainMethod, Row
from fedpriv.methods.memoryless import ModelOnly

__all__ = ["DiceSGD", "Residual"]


class Residual(NamedTuple):
    """`e` `[..., params]`."""

    residual: Tensor


@dataclass(frozen=True, kw_only=True)
class DiceSGD(PlainMethod):
    """Clipped gradients, and the parts that clipping cut off in earlier rounds.

    Args:
        clip_norm: C1, for the gradient of each example.
        feedback_clip: C2, for the part of the residual that is sent in a round.
        gradient_cap: G, at least C1: longer gradients are cut to it and the rest is lost. With the unit `example`, it
            is `privacy.example_clip`. The price of the feedback grows with G - C1.
        server_lr: eta.
    """

    row: ClassVar[Row] = Row(
        "mean of clip(g_ij) + clip(e_i)",
        memory="e_i += mean of g_ij - message",
        source="arXiv 2311.14632; unit `example`",
    )

    clip_norm: float = 1.0
    feedback_clip: float = 1.0
    gradient_cap: float = 3.0
    server_lr: float = 0.1

    def __post_init__(self) -> None:
        for key in ("clip_norm", "feedback_clip", "gradient_cap", "server_lr"):
            require_representable(f"method.{key}", getattr(self, key))
        Clip(clip_norm=self.clip_norm + self.feedback_clip)
        if self.gradient_cap < self.clip_norm:
            remedy = "Raise it: no gradient is longer, so a smaller one leaves nothing to feed back"
            expected = f"at least method.clip_norm = {self.clip_norm:g}"
            raise UserError("method.gradient_cap", expected, self.gradient_cap, remedy)

    @property
    def bounded(self) -> Clip:
        """A map with the bound of a message, C1 + C2."""
        return Clip(clip_norm=self.clip_norm + self.feedback_clip)

    @property
    def lost_memory(self) -> LostMemory:
        """`reset-one`: the server has no copy of a residual."""
        return "reset-one"

    @property
    def vectors(self) -> int:
        """2: the mean of clipped gradients, and the mean of the parts cut off."""
        return 2

    @property
    def needs_everyone(self) -> bool:
        """False."""
        return False

    def own_signal(self, state: Residual, model: Tensor, gradients: Gradients, round: int) -> Tensor:
        """See `OwnSignal.own_signal`."""
        clipped = gradients.mean(model, self.clip_norm)
        return torch.cat([clipped, gradients.mean(model, self.gradient_cap) - clipped])

    @property
    def example_rule(self) -> ExampleRule:
        """See `OwnSignal.example_rule`."""
        return ExampleRule(
            "gradient_cap", self.gradient_cap, clip_norm=self.clip_norm, feedback_clip=self.feedback_clip
        )

    def init_client(self, size: int) -> Residual:
        """Return e = 0."""
        return Residual(torch.zeros(size))

    def init_server(self, model: Tensor) -> ModelOnly:
        """Return the model alone."""
        return ModelOnly(model)

    def client_rule(
        self,
        state: Residual,
        signal: Tensor,
        release: Release | None,
        round: int,
    ) -> tuple[Tensor, Residual]:
        """See `Method.client_rule`."""
        size = state.residual.shape[-1]
        if signal.shape[-1] == size:  # one vector counts as the gradient of a single example
            clipped = Clip(clip_norm=self.clip_norm)(signal)
            cut = Clip(clip_norm=self.gradient_cap)(signal) - clipped
        else:
            # If the public m is below the number of examples, their mean may be longer than C1.
            clipped, cut = Clip(clip_norm=self.clip_norm)(signal[..., :size]), signal[..., size:]
        finite = finite_rows(signal)
        returned = Clip(clip_norm=self.feedback_clip)(state.residual)
        message = on_grid(torch.where(finite, clipped + returned, 0.0), release)
        residual = torch.where(finite, state.residual - returned + cut, state.residual)
        return sent_message(message, release), Residual(residual)

    def server_rule(self, state: ModelOnly, mean_message: Tensor, sampling_prob: float) -> tuple[Tensor, ModelOnly]:
        """See `Method.server_rule`."""
        return mean_message, state

"""CenteredClip: one public memory at the server, around which clients bound their signals.

After Karimireddy, He, Jaggi 2021, "Learning from History for Byzantine Robust Optimization", arXiv 2012.10333: their
aggregator clips workers' vectors around the last aggregate, to limit the influence of each. The same limit is the
sensitivity that privacy needs. Per round, with v broadcast beside the model:

    client:  sends B(g_i - v) + z_i          B = clip_C or N_alpha; no client state
    server:  v <- v + beta mean_i message    x <- x - gamma v

| the paper's letter | here | who keeps it |
|---|---|---|
| tau | `clip_norm` | client |
| v | `ServerMemory.memory`; clients receive it with the model | server |
| beta = 1, one iteration a round | `beta` | server |

Ours, not the paper's: noise, N_alpha as the map, beta below 1, and sums over the expected cohort size.

v is a function of released sums, so it is public: noise in v is corrected by the next residuals, sampling is amplified
in full, and no client can lose a memory. A client that does not take part adds zero, not B(0 - v).

**Fixed point.** For constant signals, v tends to the point where sum_i B(g_i - v) = 0. That is the minimizer of
sum_i h(||g_i - v||) with h' the length of B: with clip_C the Huber loss, with N_alpha r - alpha log(1 + r / alpha). If
all signals are within C of their mean, clip_C tends to the mean. Otherwise v is biased towards the majority: of the
signals 0, 0 and 3 with C = 1, v tends to 0.5 where their mean is 1. The model rests where v = 0, that is where
sum_i B(g_i) = 0, as without memory: the memory centers and averages, and removes no bias. A memory per client (Clip21,
alpha-NormEC) removes it.
"""

from copy import copy
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from fedpriv.bounding import Clip, SmoothedNormalization
from fedpriv.checks import require_representable
from fedpriv.errors import UserError
from fedpriv.feedback import Feedback, Release, remember, sent_message
from fedpriv.methods.base import LostMemory, PlainMethod, Row
from fedpriv.methods.clip21 import ServerMemory
from fedpriv.methods.memoryless import NoMemory

__all__ = ["CenteredClip"]


@dataclass(frozen=True, kw_only=True)
class CenteredClip(PlainMethod):
    """Signals bounded around a memory that the server broadcasts.

    Args:
        bound: The map: `clip`, or `normalize` for N_alpha.
        clip_norm: C, the maximum length of a message; 1 with `normalize`, as its messages are shorter than 1.
        alpha: Smoothing of `normalize`; 1 with `clip`, which has none.
        beta: The share of the mean message that the memory takes. With `clip` and without noise, beta = 1 moves it to
            the mean of the signals that are within C.
        server_lr: gamma, the server's step along the memory.
    """

    row: ClassVar[Row] = Row(
        "clip(g_i - v) or N_alpha(g_i - v), v from the server",
        server="v += beta mean; x -= lr v",
        source="after arXiv 2012.10333",
    )

    _center: ClassVar[Tensor | None] = None

    bound: Literal["clip", "normalize"] = "clip"
    clip_norm: float = 1.0
    alpha: float = 1.0
    beta: float = 0.3
    server_lr: float = 0.1

    def __post_init__(self) -> None:
        if self.bound not in ("clip", "normalize"):
            raise UserError("method.bound", '"clip" or "normalize"', repr(self.bound), "Choose one of the two")
        for key in ("clip_norm", "alpha", "beta", "server_lr"):
            require_representable(f"method.{key}", getattr(self, key))
        unused = "alpha" if self.bound == "clip" else "clip_norm"
        if getattr(self, unused) != 1.0:
            other = "normalize" if self.bound == "clip" else "clip"
            remedy = f'Remove it, or set method.bound = "{other}"'
            raise UserError(f"method.{unused}", f'1 with bound = "{self.bound}"', getattr(self, unused), remedy)

    @property
    def bounded(self) -> Clip | SmoothedNormalization:
        """The map `clip_C` or `N_alpha`."""
        if self.bound == "clip":
            return Clip(clip_norm=self.clip_norm)
        return SmoothedNormalization(alpha=self.alpha)

    @property
    def feedback(self) -> Feedback:
        """The client rule as parameters."""
        return Feedback(bounded=self.bounded, beta=None, center=self._center)

    @property
    def lost_memory(self) -> LostMemory:
        """`reset-one`: nothing is lost."""
        return "reset-one"

    @property
    def needs_shared(self) -> bool:
        """True: the memory."""
        return True

    def init_client(self, size: int) -> NoMemory:
        """Return no state."""
        return NoMemory()

    def init_server(self, model: Tensor) -> ServerMemory:
        """Return v = 0."""
        return ServerMemory(model, torch.zeros_like(model))

    def shared(self, state: ServerMemory) -> Tensor:
        """Return v."""
        return state.memory

    def in_round(self, shared: Tensor) -> Self:
        """Return the method around v."""
        around = copy(self)
        object.__setattr__(around, "_center", shared)  # no hyperparameter: equal methods stay equal
        return around

    def client_rule(
        self,
        state: NoMemory,
        signal: Tensor,
        release: Release | None,
        round: int,
    ) -> tuple[Tensor, NoMemory]:
        """See `Method.client_rule`. Before `in_round`, the method bounds around zero, its first memory."""
        residual = signal if self._center is None else signal - self._center.to(signal.device)
        return sent_message(self.bounded(residual), release), state

    def server_rule(
        self, state: ServerMemory, mean_message: Tensor, sampling_prob: float
    ) -> tuple[Tensor, ServerMemory]:
        """See `Method.server_rule`."""
        memory = remember(state.memory, mean_message, self.beta)
        return memory, ServerMemory(state.model, memory)

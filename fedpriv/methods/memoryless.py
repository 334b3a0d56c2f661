"""The two rules that all methods without memory share: m_i = B(u_i) + z_i, x <- x - gamma mean_i m_i."""

from typing import NamedTuple, Protocol

from torch import Tensor

from fedpriv.bounding import IN_PLACE, Bounded
from fedpriv.feedback import Feedback, Release, sent_message
from fedpriv.methods.base import LostMemory, PlainMethod

__all__ = ["Memoryless", "ModelOnly", "NoMemory"]


class NoMemory(NamedTuple):
    """The client state of a method without memory."""


class ModelOnly(NamedTuple):
    """The server state of a method without memory: x, `[params]`."""

    model: Tensor


class _Hyperparameters(Protocol):
    @property
    def bounded(self) -> Bounded: ...


class Memoryless(PlainMethod):
    """Rules for a frozen dataclass with `bounded` and `server_lr`; d is the mean message."""

    @property
    def feedback(self: _Hyperparameters) -> Feedback | None:
        """The client rule as parameters; None for a map without a form in place."""
        bounded = self.bounded
        return Feedback(bounded=bounded, beta=None) if isinstance(bounded, IN_PLACE) else None

    @property
    def lost_memory(self) -> LostMemory:
        """`reset-one`: nothing is lost."""
        return "reset-one"

    def init_client(self, size: int) -> NoMemory:
        """Return no state."""
        return NoMemory()

    def init_server(self, model: Tensor) -> ModelOnly:
        """Return the model alone."""
        return ModelOnly(model)

    def client_rule(
        self: _Hyperparameters,
        state: NoMemory,
        signal: Tensor,
        release: Release | None,
        round: int,
    ) -> tuple[Tensor, NoMemory]:
        """See `Method.client_rule`."""
        return sent_message(self.bounded(signal), release), state

    def server_rule(self, state: ModelOnly, mean_message: Tensor, sampling_prob: float) -> tuple[Tensor, ModelOnly]:
        """See `Method.server_rule`."""
        return mean_message, state

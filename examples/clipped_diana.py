"""A method of your own: the two rules of a paper, as one class.

    fedpriv run examples/clipped_diana.toml

DIANA (Mishchenko, Gorbunov, Takac, Richtarik 2019, arXiv 1901.09269) compresses the difference between a client's
gradient and a shift that the client and the server both remember. Here the compression is clipping, which bounds the
message so that noise can hide it:

    client:  m_i = clip_C(g_i - h_i)                     h_i <- h_i + beta m_i
    server:  x <- x - gamma (h + mean_i m_i)             h <- h + beta q mean_i m_i

| the paper's letter | here | who keeps it |
|---|---|---|
| h_i | `Shift.shift` | client i |
| h | `Server.shift` | server |
| x | `Server.model` | server |
| alpha | `beta` | both |
| gamma | `server_lr` | server |
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fedpriv.bounding import Clip
from fedpriv.feedback import Release, sent_message
from fedpriv.methods import LostMemory, PlainMethod


class Shift(NamedTuple):
    """The state of a client: h_i, `[..., params]`."""

    shift: Tensor


class Server(NamedTuple):
    """The state of the server: x and h, both `[params]`."""

    model: Tensor
    shift: Tensor


@dataclass(frozen=True, kw_only=True)
class ClippedDiana(PlainMethod):
    """DIANA with clipping in place of compression.

    Args:
        clip_norm: C, the longest message.
        beta: Share of a message that is remembered.
        server_lr: gamma.
    """

    clip_norm: float = 1.0
    beta: float = 0.1
    server_lr: float = 0.1

    @property
    def bounded(self) -> Clip:
        """The map that bounds a message."""
        return Clip(clip_norm=self.clip_norm)

    @property
    def lost_memory(self) -> LostMemory:
        """All memories restart together: nothing in h ever fades."""
        return "reset-all"

    def init_client(self, size: int) -> Shift:
        """h_i = 0, which depends on no data."""
        return Shift(torch.zeros(size))

    def init_server(self, model: Tensor) -> Server:
        """h = 0."""
        return Server(model, torch.zeros_like(model))

    def client_rule(self, state: Shift, signal: Tensor, release: Release | None, round: int) -> tuple[Tensor, Shift]:
        """Send the clipped difference, and remember a share of it."""
        message = self.bounded(signal - state.shift)
        return sent_message(message, release), Shift(state.shift + self.beta * message)

    def server_rule(self, state: Server, mean_message: Tensor, sampling_prob: float) -> tuple[Tensor, Server]:
        """Return the direction of the step, and the new shift; the caller moves the model."""
        shift = state.shift + self.beta * sampling_prob * mean_message
        return state.shift + mean_message, Server(state.model, shift)

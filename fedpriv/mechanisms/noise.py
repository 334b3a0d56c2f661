"""Gaussian noise for sums and for single messages, rounded exactly to a grid before the release.

A sum of floating-point numbers reveals more than the sum of real numbers: the possible values of `message + noise`
depend on the message (Mironov 2012; Haney, Desfontaines, Hartman, Shrestha, Hay 2022). So nothing is released at full
precision. With standard deviation s, every released number is a multiple of

    G = 2^floor(log2(s / 4)),

namely `G (q + n)`. Here `G q + r` is the exact value with `|r| <= G / 2`, and `n = rint((r + s z) / G)` with z standard
normal, decided exactly (`fedpriv.mechanisms.gaussian`). In real arithmetic, this is the Gaussian mechanism followed by
rounding to the grid, which is post-processing. So the plan's accounting holds for the numbers that a computer releases.
Rounding adds at most 0.6 % to the variance.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedpriv.mechanisms.base import NoState
from fedpriv.mechanisms.gaussian import noised, noised_rows, release_grid
from fedpriv.streams import Purpose, Streams

__all__ = [
    "Gaussian",
    "StepNoise",
    "max_level",
    "release_clients_sum",
    "release_message",
    "release_rows",
    "release_sum",
]

_MAX_LEVEL = 2**62


def max_level(l2_bound: float, stddev: float) -> int:
    """Return the largest absolute value of `q + n` in a message; larger values are clamped.

    An honest message is clamped with a probability below 2^-180 per coordinate, and clamping a noised value costs no
    privacy.

    Args:
        l2_bound: Largest l2 norm of a message before the noise.
        stddev: Standard deviation of the noise, above 0.
    """
    return min(math.ceil((l2_bound + 16.0 * stddev) / release_grid(stddev)) + 1, _MAX_LEVEL)


def release_sum(streams: Streams, stddev: float, total: Tensor, round: int) -> Tensor:
    """Return the sum of a round's messages with the server's noise; float64 `[params]`, multiples of the grid.

    Args:
        streams: Source of randomness.
        stddev: Standard deviation of the noise in each coordinate; 0 returns the sum unchanged.
        total: Sum of the bounded messages, float64 `[params]` on the CPU.
        round: The round, from 1; each round has independent noise.
    """
    return _released(streams, Purpose.SERVER_NOISE, stddev, total, (round, 0))


@dataclass(frozen=True)
class Gaussian:
    """Fresh Gaussian noise in every round; see `Mechanism`.

    Args:
        stddev: Standard deviation per coordinate; 0 leaves sums as they are.
    """

    stddev: float

    def init(self, size: int) -> NoState:
        """Return no state."""
        return NoState()

    def noise(self, state: NoState, total: Tensor, streams: Streams, round: int) -> tuple[Tensor, NoState]:
        """See `Mechanism.noise`."""
        return release_sum(streams, self.stddev, total, round), state

    def sensitivity(self, moved: float, rounds: float) -> float:
        """See `Mechanism.sensitivity`; rounds are orthogonal."""
        return moved * math.sqrt(rounds)

    def event(self, moved: float, rounds: float) -> float:
        """See `Mechanism.event`."""
        moved = self.sensitivity(moved, rounds)
        return moved / self.stddev if self.stddev > 0.0 else math.inf if moved > 0.0 else 0.0


def release_clients_sum(
    streams: Streams,
    stddev: float,
    total: Tensor,
    round: int,
    clients: int,
    part: int = 0,
) -> Tensor:
    """Return the sum plus one noise vector with the distribution of the sum of all clients' noise; float64 `[params]`.

    For simulations that use only the sum of a round's messages. The sum of `clients` independent Gaussians of standard
    deviation s is one of standard deviation sqrt(clients) s. It is rounded once, to the grid of a single client. In a
    deployment, each client rounds its own message, which adds up to 0.6 % to the variance.

    Args:
        streams: Source of randomness.
        stddev: Standard deviation of one client's noise in each coordinate.
        total: Sum of the bounded messages, float64 `[params]` on the CPU.
        round: The round, from 1.
        clients: Number of messages in the sum.
        part: Index of the sum, if a round has several; each has independent noise.
    """
    grid = release_grid(stddev) if stddev > 0.0 else None
    spread = stddev * math.sqrt(clients)
    return _released(streams, Purpose.CLIENT_NOISE_SUM, spread, total, (round, part), grid)


def release_message(
    streams: Streams,
    stddev: float,
    level: int,
    message: Tensor,
    round: int,
    client: int,
) -> Tensor:
    """Return one client's message with its noise: multiples of the grid, `[params]`, in the message's number format.

    Args:
        streams: Source of randomness.
        stddev: Standard deviation of the noise in each coordinate; 0 returns the message unchanged.
        level: Largest absolute multiple of the grid; see `max_level`.
        message: The bounded message `[params]`.
        round: The round, from 1.
        client: Id of the sender; each client has independent noise.
    """
    if stddev == 0.0:
        return message
    return release_rows(streams, stddev, level, message.unsqueeze(0), round, (client,))[0]


def release_rows(
    streams: Streams,
    stddev: float,
    level: int,
    messages: Tensor,
    round: int,
    clients: Sequence[int],
) -> Tensor:
    """Return `release_message` of each row of `[clients, params]`."""
    if stddev == 0.0:
        return messages
    sources = [streams.source(Purpose.CLIENT_NOISE, round, client) for client in clients]
    released = noised_rows(_in_numpy(messages), stddev, sources, level=level)
    return torch.as_tensor(released).to(messages)


class StepNoise:
    """The noise of one client's local steps in one round: independent for each step, on the grid of releases.

    Args:
        streams: Source of randomness.
        stddev: Standard deviation of the noise in each coordinate, above 0.
        round: The round, from 1.
        client: Id of the client.
    """

    def __init__(self, streams: Streams, stddev: float, round: int, client: int) -> None:
        self._source = streams.source(Purpose.STEP_NOISE, round, client)
        self._stddev = stddev

    def release(self, total: Tensor) -> Tensor:
        """Return the sum of a step's bounded gradients with its noise; float64 `[params]`, multiples of the grid."""
        exact = total.detach().cpu().double().numpy()
        return torch.as_tensor(noised(exact, self._stddev, self._source), device=total.device)


def _released(
    streams: Streams,
    purpose: Purpose,
    stddev: float,
    values: Tensor,
    address: tuple[int, int],
    grid: float | None = None,
) -> Tensor:
    if stddev == 0.0:
        return values
    exact = values.detach().cpu().double().numpy()
    return torch.as_tensor(noised(exact, stddev, streams.source(purpose, *address), grid))


def _in_numpy(messages: Tensor) -> np.ndarray:
    """Return messages as float32 if they are, otherwise as float64."""
    exact = messages.detach().cpu()
    return (exact if exact.dtype == torch.float32 else exact.double()).numpy()

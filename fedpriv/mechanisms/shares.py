"""Integer shares of noise for sums under secure aggregation: rounded messages, shares, and the sum modulo 2^32.

Why such sums are as private as a Gaussian mechanism is proved in `fedpriv.privacy.aggregation`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fedpriv.mechanisms.gaussian import noised_rows
from fedpriv.streams import Purpose, Streams

__all__ = ["HALF_MODULUS", "IntegerSums", "NoServerNoise", "Voids", "centered"]

HALF_MODULUS = 2**31
"""Sums are taken modulo twice this number of grid steps."""


@dataclass(frozen=True, kw_only=True)
class IntegerSums:
    """The rules for sums of integers under secure aggregation.

    Args:
        grid: G, a power of two: messages are rounded to multiples of it.
        limit: Largest absolute value of a sum in grid steps; a larger sum makes its round void.
        least: Fewest messages for which a round counts.
        size: Number of parameters that the plan charges the rounding of; None if no plan does.
        answering: Number of clients that answer in every round, those that are not sampled with their share of the
            noise alone; None if only sampled clients answer.
    """

    grid: float
    limit: int
    least: int
    size: int | None = None
    answering: int | None = None

    def check_size(self, size: int) -> None:
        """Raise ValueError if messages of `size` numbers are rounded by more than the plan charges."""
        if self.size not in (None, size):
            raise ValueError(f"the plan was made for {self.size:,} parameters, and messages have {size:,}")

    def rounded(self, message: Tensor) -> Tensor:
        """Return the nearest multiples of the grid, in the message's number format, which holds them exactly.

        Large numbers are multiples of the grid already; the quotient of any other is below 2^24 (float32).
        """
        return (message.double() / self.grid).round_().mul_(self.grid).to(message.dtype)

    def noised(self, streams: Streams, stddev: float, message: Tensor, round: int, client: int) -> Tensor:
        """Return a rounded message with its share of the noise: multiples of the grid, float64 `[params]`.

        Args:
            streams: Source of randomness.
            stddev: Standard deviation of the share in each coordinate; 0 for none.
            message: The rounded message `[params]`.
            round: The round or turn, from 1.
            client: Id of the sender; each client has independent noise.
        """
        return self.noised_rows(streams, stddev, message.unsqueeze(0), round, (client,))[0]

    def noised_rows(
        self, streams: Streams, stddev: float, messages: Tensor, round: int, clients: Sequence[int]
    ) -> Tensor:
        """Return `noised` of each row of `[clients, params]`."""
        if stddev == 0.0:
            return messages.double()
        sources = [streams.source(Purpose.CLIENT_NOISE, round, client) for client in clients]
        exact = messages.detach().cpu().double().numpy()
        return torch.as_tensor(noised_rows(exact, stddev, sources, self.grid), device=messages.device)

    def total(self, sum_: Tensor) -> Tensor | None:
        """Return the sum modulo 2^32 steps, in the half-open range around zero; None if it is beyond the limit.

        Args:
            sum_: A sum of noised messages, float64 `[params]`, multiples of the grid.
        """
        levels = centered((sum_ / self.grid).to(torch.int64))
        if bool((levels.abs() > self.limit).any()):
            return None
        return levels.double() * self.grid


def centered(levels: Tensor) -> Tensor:
    """Return integers modulo 2^32, from -2^31 to 2^31 - 1."""
    return torch.remainder(levels + HALF_MODULUS, 2 * HALF_MODULUS) - HALF_MODULUS


class Voids(NamedTuple):
    """The number of void rounds so far, `[1]`: `round` of a method counts the others."""

    voids: Tensor

    def skipped(self) -> "Voids":
        """Return the number after another void round."""
        return Voids(self.voids + 1)


@dataclass(frozen=True)
class NoServerNoise:
    """The server's part of secure aggregation: it adds no noise, and counts void rounds; see `Mechanism`."""

    @property
    def stddev(self) -> float:
        """0: the server adds no noise."""
        return 0.0

    def init(self, size: int) -> Voids:
        """Return zero void rounds."""
        return Voids(torch.zeros(1, dtype=torch.int64))

    def noise(self, state: Voids, total: Tensor, streams: Streams, round: int) -> tuple[Tensor, Voids]:
        """Return the sum unchanged."""
        return total, state

    def sensitivity(self, moved: float, rounds: float) -> float:
        """See `Mechanism.sensitivity`; rounds are orthogonal."""
        return moved * rounds**0.5

    def event(self, moved: float, rounds: float) -> float:
        """See `Mechanism.event`; the noise is the clients'."""
        return float("inf") if moved > 0.0 else 0.0

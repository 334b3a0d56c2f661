"""Gaussian noise for sums and for single messages."""

import math

import torch
from torch import Tensor

from fedpriv.streams import Purpose, Streams

__all__ = ["client_noise", "client_noise_sum", "server_noise"]


def server_noise(streams: Streams, stddev: float, size: int, round: int) -> Tensor:  # noqa: A002
    """The noise on the sum of a round's messages where trust is central; float32 `[size]` on the CPU.

    Args:
        streams: Where the randomness comes from.
        stddev: Standard deviation of each coordinate.
        size: Number of parameters.
        round: The round, from 1; every round has noise of its own.
    """
    return _normal(streams, Purpose.SERVER_NOISE, stddev, size, round, 0)


def client_noise(streams: Streams, stddev: float, size: int, round: int, client: int) -> Tensor:  # noqa: A002
    """The noise on one client's message where trust is local; float32 `[size]` on the CPU.

    Args:
        streams: Where the randomness comes from.
        stddev: Standard deviation of each coordinate.
        size: Number of parameters.
        round: The round, from 1.
        client: Who sends; every client has noise of its own.
    """
    return _normal(streams, Purpose.CLIENT_NOISE, stddev, size, round, client)


def client_noise_sum(
    streams: Streams,
    stddev: float,
    size: int,
    round: int,  # noqa: A002
    clients: int,
    part: int = 0,
) -> Tensor:
    """One draw with the law of the sum of so many clients' noises; float32 `[size]` on the CPU.

    For simulations in which nothing but the sum of a round's messages is used.

    Args:
        streams: Where the randomness comes from.
        stddev: Standard deviation of each coordinate of one client's noise.
        size: Number of parameters.
        round: The round, from 1.
        clients: How many send.
        part: Which of the round's sums it is, where there are several; each has noise of its own.
    """
    return _normal(streams, Purpose.CLIENT_NOISE_SUM, stddev * math.sqrt(clients), size, round, part)


def _normal(streams: Streams, purpose: Purpose, stddev: float, size: int, round: int, client: int) -> Tensor:  # noqa: A002
    if stddev == 0.0:
        return torch.zeros(size)
    return torch.from_numpy(streams.source(purpose, round, client).normal(size)) * stddev

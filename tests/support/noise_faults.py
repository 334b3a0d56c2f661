"""Replaces the noise of servers and clients in tests, one message at a time."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import fedpriv.mechanisms.noise
import fedpriv.rounds
from fedpriv.mechanisms.shares import IntegerSums
from fedpriv.streams import Purpose, Streams

__all__ = ["Released", "Share", "replace_noise", "replace_shares", "rows_by"]

Released = Callable[..., Tensor]
"""Arguments: streams, purpose, stddev, values, (round, client), and others."""
Share = Callable[[IntegerSums, Streams, float, Tensor, int, int], Tensor]
"""The arguments of `IntegerSums.noised`."""


def rows_by(released: Released) -> Callable[..., Tensor]:
    """Return a `release_rows` that calls `released` for every message."""

    def rows(streams: Any, stddev: float, _: int, messages: Tensor, round: int, clients: Sequence[int]) -> Tensor:
        each = zip(messages, clients, strict=True)
        found = [released(streams, Purpose.CLIENT_NOISE, stddev, row, (round, client)) for row, client in each]
        return torch.stack(found).to(messages)

    return rows


def replace_noise(patch: pytest.MonkeyPatch, fault: Callable[..., Tensor]) -> None:
    """Let `fault(released, *arguments)` add all noise of sums and of clients' messages, but for shares and steps."""
    released, rows = fedpriv.mechanisms.noise._released, fedpriv.mechanisms.noise.release_rows

    def faulty_rows(streams: Any, stddev: float, level: int, *rest: Any) -> Tensor:
        def one(streams: Any, _: Purpose, stddev: float, values: Tensor, address: tuple[int, int]) -> Tensor:
            return rows(streams, stddev, level, values.unsqueeze(0), address[0], (address[1],))[0]

        return rows_by(lambda *where: fault(one, *where))(streams, stddev, level, *rest)

    patch.setattr(fedpriv.mechanisms.noise, "_released", lambda *where, **more: fault(released, *where, **more))
    for module in (fedpriv.mechanisms.noise, fedpriv.rounds):
        patch.setattr(module, "release_rows", faulty_rows)


def replace_shares(patch: pytest.MonkeyPatch, fault: Callable[..., Tensor]) -> None:
    """Let `fault(noised, *arguments)` add all shares of noise under secure aggregation."""
    drawn = IntegerSums.noised_rows

    def one(sums: IntegerSums, streams: Streams, stddev: float, message: Tensor, round: int, client: int) -> Tensor:
        return drawn(sums, streams, stddev, message.unsqueeze(0), round, (client,))[0]

    def rows(
        sums: IntegerSums, streams: Streams, stddev: float, messages: Tensor, round: int, clients: Sequence[int]
    ) -> Tensor:
        each = zip(messages, clients, strict=True)
        return torch.stack([fault(one, sums, streams, stddev, row, round, client) for row, client in each])

    patch.setattr(IntegerSums, "noised_rows", rows)

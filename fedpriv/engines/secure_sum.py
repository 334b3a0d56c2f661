"""Sums under secure aggregation in a simulation: integers modulo 2^32, void rounds, and no cryptography.

A deployment adds the same integers under masks that cancel in the sum, so that it gets the same bits.
"""

import math

import numpy as np
import torch
from torch import Tensor

from fedpriv.engines.base import UndoingEngine
from fedpriv.mechanisms.shares import IntegerSums
from fedpriv.methods import message_size
from fedpriv.rounds import Broadcast, ClientRules, Total, counted_total
from fedpriv.tasks.task import Forward

__all__ = ["SecureSum"]


class SecureSum:
    """An engine that declares rounds void if too few clients answer, or if a sum is beyond the limit of the grid.

    If everyone answers, the shares of the clients that are not sampled are added here, one after another.

    In a void round, the server learns nothing that it uses, and no client's state changes.

    Args:
        inner: Runs the clients, who add integer shares of the noise.
        sums: The rules for the sums.
        rules: The clients' rules, for the noise of those that are not sampled.
    """

    def __init__(self, inner: UndoingEngine, sums: IntegerSums, rules: ClientRules) -> None:
        self._inner = inner
        self._rules = rules
        self._sums = sums

    @property
    def name(self) -> str:
        """The name of the inner engine."""
        return self._inner.name

    @property
    def forward(self) -> Forward | None:
        """See `Engine.forward`."""
        return self._inner.forward

    def sum_messages(self, broadcast: Broadcast) -> Total:
        """See `Engine.sum_messages`."""
        size = message_size(self._rules.method, broadcast.model.shape[-1])
        if (self._sums.answering or len(broadcast.cohort)) < self._sums.least:
            nothing = torch.zeros(size, dtype=torch.float64)
            return Total(nothing, len(broadcast.cohort), 0, math.nan, void=True)
        total = self._inner.sum_messages(broadcast)
        total = total._replace(sum=self._with_others(broadcast, total.sum))
        total = counted_total(total, self._sums, self._sums.answering or len(broadcast.cohort))
        if total.void:
            self._inner.undo()
        return total

    def _with_others(self, broadcast: Broadcast, sum_: Tensor) -> Tensor:
        """Return the sum with the shares of the clients that answer without being sampled; integers, so exact."""
        if self._sums.answering is None:
            return sum_
        sum_, zero = sum_.clone(), torch.zeros_like(sum_)
        for client in np.setdiff1d(np.arange(self._sums.answering), broadcast.cohort):
            stddev, turn = self._rules.noise_stddev, broadcast.address
            sum_ += self._sums.noised(self._rules.streams, stddev, zero, turn, int(client))
        return sum_

    def save(self) -> dict[str, Tensor]:
        """See `Engine.save`."""
        return self._inner.save()

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """See `Engine.restore`."""
        self._inner.restore(tensors)

    def close(self) -> None:
        """See `Engine.close`."""
        self._inner.close()

"""Sums that do not depend on order: messages are rounded to one grid, on which float64 addition is exact.

Whoever adds a round's messages (a loop, batches, actors, a server that hears them as they come) gets the same bits for
every order and every division of the cohort. The grid follows from what is known before the round: the largest
coordinate that a message may have, and how many messages there may be.
"""

import math

import torch
from torch import Tensor

__all__ = ["ExactSum", "grid_step"]

# Rows of a batch that are rounded at once: half a MiB in float64.
_BLOCK_FLOATS = 2**16


def grid_step(limit: float, messages: int) -> float:
    """The distance of two points of the grid, a power of two.

    The sum of `messages` numbers of at most `limit` is below 2^51 steps, so that float64 holds every partial sum.

    Args:
        limit: Largest absolute value of a coordinate.
        messages: How many there may be.
    """
    return 2.0 ** (math.ceil(math.log2(limit * max(messages, 1))) - 51)


class ExactSum:
    """The sum `[params]` of a round's messages, each rounded to the grid; the same for every order and grouping.

    A message of 50 clients is rounded by less than 2^-45 of `limit`, which is finer than float32 resolves its own
    coordinates unless they are 2^-21 of the limit or less. A coordinate beyond `limit` costs exactness, not the sum.

    Args:
        size: Number of parameters.
        limit: Largest absolute value of a coordinate; see `ClientRules.message_limit`.
        messages: How many messages the whole round may have, wherever they are added.
        device: Where they lie.
    """

    def __init__(self, size: int, limit: float, messages: int, device: torch.device | str = "cpu") -> None:
        self._sum = torch.zeros(size, dtype=torch.float64, device=device)
        # Adding and taking off 1.5 * 2^52 steps rounds to whole steps.
        self.shift = 1.5 * 2.0**52 * grid_step(limit, messages)
        self._block = max(_BLOCK_FLOATS // max(size, 1), 1)
        self._rounded = torch.empty(0, dtype=torch.float64, device=device)

    def add(self, messages: Tensor) -> None:
        """Adds one message `[params]`, or each row of `[clients, params]`."""
        if messages.dim() == 1:
            messages = messages.unsqueeze(0)
        rows = messages.split(self._block if messages.device.type == "cpu" else max(len(messages), 1))
        for block in rows:
            if self._rounded.shape != block.shape:
                self._rounded = torch.empty_like(block, dtype=torch.float64)
            rounded = self._rounded.copy_(block).add_(self.shift).sub_(self.shift)
            self._sum += rounded[0] if len(block) == 1 else rounded.sum(dim=0)

    @property
    def running(self) -> Tensor:
        """The sum so far, for those who add `(message + shift) - shift` to it themselves; float64 `[params]`."""
        return self._sum

    @property
    def value(self) -> Tensor:
        """The sum, float64 `[params]` on the CPU; sums of parts of a round can be added without rounding."""
        return self._sum.cpu()

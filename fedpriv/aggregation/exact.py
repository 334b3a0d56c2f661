"""Order-independent sums: messages are rounded to one grid on which float64 addition is exact.

The sum of a round's messages has the same bits in every order and for every division of the cohort (a loop, batches,
actors, a server that receives messages one by one). The grid depends only on values known before the round: the largest
possible coordinate of a message and the maximum number of messages.
"""

import math

import torch
from torch import Tensor

__all__ = ["ExactSum", "grid_step"]

# Number of float64 values rounded at once: half a MiB.
_BLOCK_FLOATS = 2**16


def grid_step(limit: float, messages: int) -> float:
    """Return the distance between grid points, a power of two.

    The sum of `messages` numbers of at most `limit` is below 2^51 steps, so float64 holds every partial sum exactly.

    Args:
        limit: Largest absolute value of a coordinate.
        messages: Maximum number of messages.
    """
    return 2.0 ** (math.ceil(math.log2(limit * max(messages, 1))) - 51)


class ExactSum:
    """The sum `[params]` of a round's messages, each rounded to the grid; the same for every order and grouping.

    With 50 clients, a message is rounded by less than 2^-45 of `limit`. That is finer than float32 resolves its
    coordinates, unless they are 2^-21 of the limit or less. A coordinate beyond `limit` costs exactness, not the sum.

    Args:
        size: Number of parameters.
        limit: Largest absolute value of a coordinate; see `ClientRules.message_limit`.
        messages: Maximum number of messages in the whole round, on all workers together.
        device: The device of the messages.
    """

    def __init__(self, size: int, limit: float, messages: int, device: torch.device | str = "cpu") -> None:
        self._sum = torch.zeros(size, dtype=torch.float64, device=device)
        # Adding and subtracting 1.5 * 2^52 steps rounds to whole steps.
        self.shift = 1.5 * 2.0**52 * grid_step(limit, messages)
        self._block = max(_BLOCK_FLOATS // max(size, 1), 1)
        self._rounded = torch.empty(0, dtype=torch.float64, device=device)

    def add(self, messages: Tensor) -> None:
        """Add one message `[params]`, or each row of `[clients, params]`."""
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
        """The sum so far, float64 `[params]`, for callers that add `(message + shift) - shift` to it themselves."""
        return self._sum

    @property
    def value(self) -> Tensor:
        """The sum, float64 `[params]` on the CPU. Sums of parts of a round can be added without rounding."""
        return self._sum.cpu()

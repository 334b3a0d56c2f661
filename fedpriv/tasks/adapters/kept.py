"""Activations below the first trained parameter: computed once for each client, and kept."""

from torch import Tensor

from fedpriv.tasks.task import Task

__all__ = ["MAX_KEPT_FLOATS", "KeptActivations"]

MAX_KEPT_FLOATS = 2**29
"""Floats that a process keeps, 2 GiB. The activations of further clients are computed again in each of their rounds."""


class KeptActivations:
    """The activations of the clients that were seen first, as many as fit.

    They follow from a client's inputs and from frozen weights, so they are the same in every round and every engine.

    Args:
        task: Its module may be an `AdaptedModule`; otherwise, inputs are returned as they are.
        limit: Most floats to keep; None for `MAX_KEPT_FLOATS`.
    """

    def __init__(self, task: Task, limit: int | None = None) -> None:
        self._task, self._left = task, MAX_KEPT_FLOATS if limit is None else limit
        self._kept: dict[int, Tensor] = {}

    def of(self, client: int, inputs: Tensor) -> Tensor:
        """Return the activations `[examples, *kept_shape]` of a client, from its inputs if they are not kept."""
        if self._task.kept_floats == 0:
            return inputs
        found = self._kept.get(client)
        if found is None:
            found = self._task.lower(inputs)
            if found.numel() <= self._left:
                self._left -= found.numel()
                self._kept[client] = found
        return found

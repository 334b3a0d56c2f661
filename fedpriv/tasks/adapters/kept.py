"""Activations below the first trained parameter: computed once for each client, and kept for all runs of a process."""

import hashlib
from collections.abc import Container

import torch
from torch import Tensor

from fedpriv.tasks.task import Task

__all__ = ["MAX_KEPT_FLOATS", "KeptActivations", "KeptStore"]

MAX_KEPT_FLOATS = 2**29
"""Floats that a process keeps, 2 GiB. The activations of further clients are computed again in each of their rounds."""

Key = tuple[object, ...]


class KeptStore:
    """Activations by the frozen layers and the inputs that they follow from.

    One store serves all runs of a process, one after the other: trials of a sweep share the activations of equal
    inputs.
    """

    def __init__(self) -> None:
        self._kept: dict[Key, Tensor] = {}
        self._floats = 0

    def get(self, key: Key) -> Tensor | None:
        """Return what is kept under a key; None for nothing."""
        return self._kept.get(key)

    def keep(self, key: Key, activations: Tensor, limit: int, used: Container[Key]) -> None:
        """Keep activations if they fit, in place of the oldest that are not `used`.

        Args:
            key: See `get`.
            activations: Not changed later by the caller.
            limit: Most floats of the whole store.
            used: Keys that stay.
        """
        size = activations.numel()
        for old in [each for each in self._kept if each not in used] if self._floats + size > limit else ():
            self._floats -= self._kept.pop(old).numel()
            if self._floats + size <= limit:
                break
        if self._floats + size <= limit:
            self._kept[key] = activations
            self._floats += size


_STORE = KeptStore()


class KeptActivations:
    """The activations of the clients of one run that were seen first, as many as fit.

    They follow from a client's inputs and from frozen weights, so they are the same in every round and every engine.

    Args:
        task: Its module may be an `AdaptedModule`; otherwise, inputs are returned as they are.
        limit: Most floats to keep; None for `MAX_KEPT_FLOATS`.
        store: None for the store of the process.
    """

    def __init__(self, task: Task, limit: int | None = None, store: KeptStore | None = None) -> None:
        self._task, self._limit = task, MAX_KEPT_FLOATS if limit is None else limit
        self._store = _STORE if store is None else store
        self._keys: dict[object, Key] = {}

    def of(self, client: object, inputs: Tensor) -> Tensor:
        """Return the activations `[examples, *kept_shape]` of a client, from its inputs if they are not kept.

        Args:
            client: Its id, or another name of a set of inputs that does not change.
            inputs: `[examples, *input_shape]`.
        """
        if self._task.kept_floats == 0:
            return inputs
        key = self._keys.get(client)
        if key is None:
            content = hashlib.sha256(
                inputs.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            ).digest()
            key = (*self._task.lower_key, tuple(inputs.shape), inputs.dtype, content)
        found = self._store.get(key)
        if found is None:
            found = self._task.lower(inputs)
            self._store.keep(key, found, self._limit, set(self._keys.values()))
        self._keys[client] = key
        return found

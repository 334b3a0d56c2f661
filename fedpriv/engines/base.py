"""What an engine is: whoever runs the clients of a round."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fedpriv.data.federation import Federation, Holders
from fedpriv.engines.states import StateStore
from fedpriv.rounds import Broadcast, ClientRules, Total
from fedpriv.streams import SeededStreams
from fedpriv.tasks.local_work import LocalWork, batches_of, make_signal
from fedpriv.tasks.task import Task

__all__ = ["Engine", "Population", "keep_freed_memory", "one_thread"]

# The names M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


class Engine(Protocol):
    """Runs the clients of a round and returns the sum of their messages.

    The sum is on the round's grid (`fedpriv.aggregation.exact`).
    """

    @property
    def name(self) -> str:
        """As in `--engine`."""
        ...

    def sum_messages(self, broadcast: Broadcast) -> Total:
        """Runs the cohort's clients on the broadcast model and keeps their new states."""
        ...

    def save(self) -> dict[str, Tensor]:
        """The states of all clients that ever took part: `clients` int64 `[seen]` and a `[seen, ...]` per field."""
        ...

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Takes back what `save` gave, also that of another engine."""
        ...

    def close(self) -> None:
        """Ends what the engine started outside this process; it is not used afterwards."""
        ...


@dataclass(frozen=True, kw_only=True)
class Population:
    """All clients: their rules, their data and how they work on it.

    Args:
        rules: The clients' half of the agreement.
        task: Gives gradients.
        federation: Who holds which examples.
        work: How a signal is made.
        streams: Where the choice of local batches comes from.
    """

    rules: ClientRules
    task: Task
    federation: Holders
    work: LocalWork
    streams: SeededStreams

    @cached_property
    def inputs(self) -> Tensor:
        """All training inputs, on the task's device."""
        return self.federation.dataset.train_inputs.to(self.task.device)

    @cached_property
    def labels(self) -> Tensor:
        """All training labels, on the task's device."""
        return self.federation.dataset.train_labels.to(self.task.device)

    @cached_property
    def _in_client_order(self) -> tuple[Tensor, Tensor] | None:
        """Inputs and labels with each client's examples side by side; None where clients may share examples."""
        if not isinstance(self.federation, Federation):
            return None
        rows = self.federation.rows
        if np.array_equal(rows, np.arange(len(self.labels))):
            return self.inputs, self.labels
        at = torch.from_numpy(rows).to(self.task.device)
        return self.inputs[at], self.labels[at]

    def examples(self, client: int) -> tuple[Tensor, Tensor]:
        """Inputs `[examples, *input_shape]` and labels `[examples]` of one client, on the task's device."""
        if self._in_client_order is None or not isinstance(self.federation, Federation):
            rows = torch.from_numpy(self.federation.rows_of(client)).to(self.task.device)
            return self.inputs[rows], self.labels[rows]
        inputs, labels = self._in_client_order
        start, end = self.federation.offsets[client : client + 2].tolist()
        return inputs[start:end], labels[start:end]

    def signal(self, client: int, model: Tensor, round: int) -> Tensor:
        """The signal `[params]` of one client in one round, a tensor of its own."""
        inputs, labels = self.examples(client)
        batches = batches_of(self.work, self.streams, len(labels), round, client)
        return make_signal(self.task, model, inputs, labels, self.work, batches)

    def on(self, device: torch.device) -> "Population":
        """The same clients, computed elsewhere."""
        return self if device == self.task.device else replace(self, task=self.task.on(device))

    def in_client_order(self) -> "Population":
        """The same clients, with the data set itself in their order, so that processes can share it as it is."""
        federation = self.federation
        if not isinstance(federation, Federation) or self._in_client_order is None:
            return self
        inputs, labels = self._in_client_order
        if inputs is self.inputs:
            return self
        dataset = replace(federation.dataset, train_inputs=inputs.cpu(), train_labels=labels.cpu(), groups=None)
        rows = np.arange(len(federation.rows))
        return replace(self, federation=Federation(dataset=dataset, offsets=federation.offsets, rows=rows))

    def state_store(self, memory: int | None = None, folder: Path | None = None) -> StateStore:
        """An empty store for these clients' states; see `StateStore`."""
        return StateStore(self.rules.method, self.task.layout.size, self.task.device, memory, folder)


@cache
def keep_freed_memory() -> None:
    """Asks the C library to keep what is freed for the next client, up to 2 GiB, where it would give it to the system.

    Activations come and go with every client. Memory that goes back and comes again is cleared page by page: some per
    cent of a round. Only glibc is known to do so, and to listen.
    """
    with suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_MMAP_THRESHOLD, 2**25)


@contextmanager
def one_thread() -> Iterator[None]:
    """Runs torch on one thread, because the number of threads decides how sums are rounded."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)

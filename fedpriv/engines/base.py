"""Engine interface: runs the clients of one round and sums their messages."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fedpriv.data.augment import Augmentation, augmented, draws_of
from fedpriv.data.federation import Federation, Holders
from fedpriv.data.mapped import chosen_rows
from fedpriv.engines.states import StateStore
from fedpriv.methods import ClientState, own_signal_of, side_values_of
from fedpriv.rounds import Broadcast, ClientRules, Total
from fedpriv.streams import SeededStreams
from fedpriv.tasks.adapters.kept import KeptActivations
from fedpriv.tasks.local_work import ClientGradients, LocalWork, PoissonGradient, RecordSum, batches_of, make_signal
from fedpriv.tasks.task import Forward, Task

__all__ = ["Engine", "Population", "UndoingEngine", "keep_freed_memory", "one_thread", "with_metrics"]

# The names M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


class Engine(Protocol):
    """Runs the clients of a round and returns the sum of their messages.

    The sum is on the round's grid (`fedpriv.aggregation.exact`).
    """

    @property
    def name(self) -> str:
        """The name that `--engine` takes."""
        ...

    @property
    def forward(self) -> Forward | None:
        """Computes outputs for evaluations on more or faster devices than this process's; None if there are none."""
        ...

    def sum_messages(self, broadcast: Broadcast) -> Total:
        """Run the cohort's clients on the broadcast model, store their new states, and return the sum."""
        ...

    def save(self) -> dict[str, Tensor]:
        """Return the states of all clients seen so far: `clients` int64 `[seen]` and `[seen, ...]` for each field."""
        ...

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Restore the states that `save` of this or another engine returned."""
        ...

    def close(self) -> None:
        """End everything that the engine started outside this process. Do not use the engine afterwards."""
        ...


class UndoingEngine(Engine, Protocol):
    """An engine that can take back a round, for secure aggregation."""

    def undo(self) -> None:
        """Restore all states from before the last call of `sum_messages`, if clients' rules have `sums`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Population:
    """All clients: their rules, their data and their local work.

    Args:
        rules: The clients' half of the agreement.
        task: Computes gradients.
        federation: Who holds which examples.
        work: Computes a signal.
        streams: Source of randomness for local batches and augmentations.
        augment: The random change of clients' inputs in each round; None for none.
    """

    rules: ClientRules
    task: Task
    federation: Holders
    work: LocalWork
    streams: SeededStreams
    augment: Augmentation | None = None

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
        """Inputs and labels, grouped by client; None if clients may share examples."""
        if not isinstance(self.federation, Federation):
            return None
        rows = self.federation.rows
        if np.array_equal(rows, np.arange(len(self.labels))):
            return self.inputs, self.labels
        at = torch.from_numpy(rows).to(self.task.device)
        return chosen_rows(self.inputs, rows), self.labels[at]

    @cached_property
    def kept(self) -> KeptActivations:
        """The activations of frozen layers that this run uses."""
        return KeptActivations(self.task)

    def examples(self, client: int) -> tuple[Tensor, Tensor]:
        """Return inputs `[examples, *input_shape]` and labels `[examples]` of one client, on the task's device.

        If lower layers are frozen and inputs are not augmented, the layers' activations take the place of the inputs;
        see `Task.lower`.
        """
        inputs, labels = self._examples(client)
        return (inputs if self.augment is not None else self.kept.of(client, inputs)), labels

    def _examples(self, client: int) -> tuple[Tensor, Tensor]:
        if self._in_client_order is None or not isinstance(self.federation, Federation):
            rows = torch.from_numpy(self.federation.rows_of(client)).to(self.task.device)
            return self.inputs[rows], self.labels[rows]
        inputs, labels = self._in_client_order
        start, end = self.federation.offsets[client : client + 2].tolist()
        return inputs[start:end], labels[start:end]

    def signal(
        self,
        client: int,
        model: Tensor,
        round: int,
        rules: ClientRules | None = None,
        offset: Tensor | None = None,
        state: ClientState | None = None,
    ) -> Tensor:
        """Return the signal of one client in one round, as a new tensor.

        `[params]`, or `[vectors * params]` for a method with its own signal (`fedpriv.methods.OwnSignal`); with private
        metrics, `[params + metrics]` (`fedpriv.methods.SideValues`).

        Args:
            client: Its id.
            model: x, `[params]`.
            round: The round, from 1.
            rules: Replaces those of the population, if the client receives its rules with the model.
            offset: Added to the gradient of each local step; see `Broadcast.offset`.
            state: The client's state; needed by methods with their own signal.
        """
        rules = rules or self.rules
        inputs, labels = plain = self.examples(client)
        streams = self.streams if rules.examples is None else rules.streams  # secret batches
        losses = partial(self.task.example_losses, model, inputs, labels)
        batches = batches_of(self.work, streams, len(labels), round, client, losses)
        if self.augment is not None:
            inputs = augmented(self.augment, inputs, self.draws(len(labels), round, client), batches)
        clipped, own = rules.clipped(round, client), own_signal_of(rules.method)
        if own is not None:
            if state is None:
                raise ValueError(f"{rules.method} needs a client's state for its signal")
            given = ClientGradients(self.task, inputs, labels, self.work, batches, clipped)
            return own.own_signal(state, model, given, round)
        prox = rules.method.step_prox
        signal = make_signal(self.task, model, inputs, labels, self.work, batches, clipped, offset, prox)
        return with_metrics(rules, signal, self.task, model, *plain)

    def losses(self, client: int, model: Tensor) -> Tensor:
        """Return the losses `[examples]` of one client's examples, without augmentation, under the model `[params]`."""
        return self.task.example_losses(model, *self.examples(client))

    @cached_property
    def one_by_one(self) -> bool:
        """True if the signals of several clients cannot be computed at once."""
        side = side_values_of(self.rules.method)
        own = self.needs_states or self.rules.examples is not None or (side is not None and side.given > 0)
        return own or isinstance(self.work, PoissonGradient | RecordSum) or self.task.kept_floats > 0

    @cached_property
    def needs_states(self) -> bool:
        """True if signals depend on clients' states."""
        return own_signal_of(self.rules.method) is not None

    def draws(self, examples: int, round: int, client: int) -> np.ndarray:
        """Return the draws for the augmentation of one client's examples in one round; no columns without one."""
        if self.augment is None:
            return np.zeros((examples, 0))
        return draws_of(self.augment, self.streams, examples, round, client)

    def on(self, device: torch.device) -> "Population":
        """Return the same clients on another device."""
        return self if device == self.task.device else replace(self, task=self.task.on(device))

    def in_client_order(self) -> "Population":
        """Return the same clients with the data set sorted by client, so that processes can share it unchanged."""
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
        """Return an empty store for these clients' states; see `StateStore`."""
        exact = self.rules.examples is not None
        return StateStore(self.rules.method, self.task.layout.size, self.task.device, memory, folder, exact)


def with_metrics(
    rules: ClientRules, signal: Tensor, task: Task, model: Tensor, inputs: Tensor, labels: Tensor
) -> Tensor:
    """Return a client's signal `[params]`, followed by its metrics at the model if the method has private metrics.

    The metrics are those of its examples as they are, without augmentation.
    """
    side = side_values_of(rules.method)
    if side is None or side.metrics is None:
        return signal
    found = task.evaluate(model, inputs, labels) if len(labels) else {}
    return torch.cat([signal, signal.new_tensor([found.get(name, 0.0) for name in side.metrics.names])])


@cache
def keep_freed_memory() -> None:
    """Ask the C library to keep up to 2 GiB of freed memory for the next client, instead of returning it to the system.

    Every client allocates activations and frees them. The system clears returned memory page by page before it hands
    it out again, which costs some percent of a round. Only glibc is known to return it, and to have this setting.
    """
    with suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_MMAP_THRESHOLD, 2**25)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread, because the number of threads decides how sums are rounded."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)

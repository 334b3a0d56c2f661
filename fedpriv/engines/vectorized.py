"""The vectorized engine: computes chunks of clients at once if that is faster, and client steps in C if possible."""

from functools import partial

import numpy as np
import torch
from torch import Tensor

from fedpriv.engines.base import Population, keep_freed_memory, one_thread
from fedpriv.engines.in_place import ClientStep
from fedpriv.engines.states import StateStore
from fedpriv.methods import owns_steps
from fedpriv.rounds import Broadcast, Total
from fedpriv.tasks.local_work import Batches, LocalSGD, batches_of
from fedpriv.tasks.task import MAX_PIECE_FLOATS

__all__ = ["VectorizedEngine"]

# Most floats of inputs, or of messages, in one chunk: 16 MiB each.
_MAX_CHUNK_FLOATS = MAX_PIECE_FLOATS
# Most floats of messages that the client rule takes at once on a CPU, so that they stay in its cache.
_MAX_RULE_FLOATS = 2**17
# Fewest parameters for which the step in C of one client is faster than torch's step of several.
_MIN_ALONE_FLOATS = 2**14
# Most floats of padded inputs that are kept from one round to the next: 1 GiB.
_MAX_CACHE_FLOATS = 2**28


class VectorizedEngine:
    """An engine for chunks of clients of similar size on one device; equal to the loop engine up to rounding.

    Args:
        population: All clients.
        chunk: Clients per chunk; None to choose by memory.
        states: The store of their states; None for unbounded memory.
        batched: Compute a chunk's gradients at once. None does so on a GPU, and on a CPU for dense layers: on CPUs,
            convolutions with separate weights per client are slower than one client after the other.
    """

    name = "vectorized"

    def __init__(
        self,
        population: Population,
        chunk: int | None = None,
        states: StateStore | None = None,
        batched: bool | None = None,
    ) -> None:
        keep_freed_memory()
        self._population = population
        on_cpu = population.task.device.type == "cpu"
        self._batched = (population.task.dense is not None or not on_cpu) if batched is None else batched
        self._size = population.task.layout.size
        self._states = population.state_store() if states is None else states
        self._chunk = chunk
        self._cache: dict[tuple[int, ...], tuple[Tensor, Tensor, Tensor]] = {}
        self._next_cache: dict[tuple[int, ...], tuple[Tensor, Tensor, Tensor]] = {}
        self._cached_floats = 0
        self._round = 0

    def sum_messages(self, broadcast: Broadcast) -> Total:
        """See `Engine.sum_messages`."""
        model = broadcast.model.to(self._population.task.device)
        if self._population.rules.sums is not None:
            self._states.begin()
        step = ClientStep(self._population.rules, broadcast, model.device, native=True)
        with one_thread():  # further cores are better used by further workers
            for clients in self._chunks(broadcast.cohort):
                if self._batched and not self._population.one_by_one:
                    self._batch(step, model, clients, broadcast)
                else:
                    self._one_by_one(step, model, clients, broadcast)
        self._cache, self._next_cache, self._cached_floats = self._next_cache, {}, 0
        return step.total()

    def _batch(self, step: ClientStep, model: Tensor, clients: list[int], broadcast: Broadcast) -> None:
        signals = self._signals(model, clients, broadcast.round, self._offsets(clients, broadcast))
        rows = self._rows_at_once(len(clients))
        if rows == 1:
            for signal, client, following in zip(signals, clients, [*clients[1:], None], strict=True):
                step.take_alone(client, signal, self._states, following)
            return
        for start in range(0, len(clients), rows):
            few = clients[start : start + rows]
            with self._states.borrowed(few) as state:
                step.take(few, signals[start : start + rows], state)

    def _one_by_one(self, step: ClientStep, model: Tensor, clients: list[int], broadcast: Broadcast) -> None:
        if self._population.needs_states:
            for client in clients:
                signal = partial(self._population.signal, client, model, broadcast.round, None, None)
                step.take_with_state(client, signal, self._states)
            return
        for client, following in zip(clients, [*clients[1:], None], strict=True):
            offset = self._offsets([client], broadcast)
            offset = None if offset is None else offset[0]
            signal = self._population.signal(client, model, broadcast.round, offset=offset)
            step.take_alone(client, signal, self._states, following)

    def _offsets(self, clients: list[int], broadcast: Broadcast) -> Tensor | None:
        """Return the vectors that are added to the gradients of local steps, `[clients, params]`; None for none."""
        found: list[Tensor] = []
        for client in clients if owns_steps(self._population.rules.method) else ():
            with self._states.borrowed([client]) as state:
                offset = broadcast.offset(self._population.rules.method, state)
            found += [] if offset is None else [offset]
        return torch.cat(found) if found else None

    def first_chunk(self, cohort: np.ndarray) -> list[int]:
        """Return the clients of the first chunk of a cohort."""
        return self._chunks(cohort)[0]

    def save(self) -> dict[str, Tensor]:
        """See `Engine.save`."""
        return self._states.save()

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """See `Engine.restore`."""
        self._states.restore(tensors)

    def undo(self) -> None:
        """See `UndoingEngine.undo`."""
        self._states.undo()

    def close(self) -> None:
        """Do nothing: the engine starts no process."""

    def _rows_at_once(self, clients: int) -> int:
        on_cpu = self._population.task.device.type == "cpu"
        rows = max(_MAX_RULE_FLOATS // max(self._size, 1), 1) if on_cpu else clients
        if on_cpu and self._size >= _MIN_ALONE_FLOATS:
            rows = 1
        return min(rows, self._states.capacity or rows)

    def _chunks(self, cohort: np.ndarray) -> list[list[int]]:
        """Return the cohort in chunks, largest clients first, to keep padding small."""
        sizes = self._population.federation.sizes[cohort]
        order = np.argsort(-sizes, kind="stable")
        width = max(int(np.prod(self._population.inputs.shape[1:])), 1)
        chunks: list[list[int]] = []
        start = 0
        while start < len(order):
            floats = max(int(sizes[order[start]]) * width, self._size)
            count = self._chunk or max(1, _MAX_CHUNK_FLOATS // floats)
            chunks.append(cohort[order[start : start + count]].tolist())
            start += count
        return chunks

    def _signals(self, model: Tensor, clients: list[int], round: int, offsets: Tensor | None = None) -> Tensor:
        people, self._round = self._population, round
        rows = [people.federation.rows_of(client) for client in clients]
        plans = [
            batches_of(people.work, people.streams, len(r), round, c, partial(people.losses, c, model))
            for c, r in zip(clients, rows, strict=True)
        ]
        if people.work.client_lr is None:
            return people.task.gradients(model, *self._padded(clients, rows, [plan[0] for plan in plans]))
        local = LocalSGD(people.work, model, offsets, people.rules.method.step_prox)
        steps = [len(plan) for plan in plans]
        for number in range(max(steps)):
            at_work = model.new_tensor([number < count for count in steps]).unsqueeze(1)
            chosen = {"clients": clients, "rows": rows, "plans": plans, "number": number}
            local.step(partial(self._gradients, **chosen), at_work)
        return local.signal(model.new_tensor(steps).unsqueeze(1))

    def _gradients(
        self, local: Tensor, clients: list[int], rows: list[np.ndarray], plans: list[Batches], number: int
    ) -> Tensor:
        """Return the gradients `[clients, params]` of step `number`; zero for clients that take fewer steps."""
        task, at_work = self._population.task, [i for i, plan in enumerate(plans) if number < len(plan)]
        if len(at_work) == len(plans):
            return task.gradients(local, *self._padded(clients, rows, [plan[number] for plan in plans]))
        padded = self._padded(
            [clients[i] for i in at_work], [rows[i] for i in at_work], [plans[i][number] for i in at_work]
        )
        gradients = torch.zeros_like(local)
        gradients[at_work] = task.gradients(local[at_work], *padded)
        return gradients

    def _padded(self, clients: list[int], rows: list[np.ndarray], batches: Batches) -> tuple[Tensor, Tensor, Tensor]:
        """Return inputs `[clients, examples, ...]`, labels and weights of one step; cache those of whole clients."""
        if any(batch is not None for batch in batches):
            padded = self._gather([r if b is None else r[b] for r, b in zip(rows, batches, strict=True)])
            return self._augmented(padded, clients, rows, batches)
        key = tuple(clients)
        padded = self._cache.get(key) or self._gather(rows)
        self._cached_floats += padded[0].numel()
        if self._cached_floats <= _MAX_CACHE_FLOATS:
            self._next_cache[key] = padded
        return self._augmented(padded, clients, rows, batches)

    def _augmented(
        self, padded: tuple[Tensor, Tensor, Tensor], clients: list[int], rows: list[np.ndarray], batches: Batches
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the padded inputs of one step with all examples augmented, but not the padding."""
        people, (inputs, labels, weights) = self._population, padded
        if people.augment is None:
            return padded
        draws = [people.draws(len(r), self._round, c) for c, r in zip(clients, rows, strict=True)]
        used = np.concatenate([d if b is None else d[b] for d, b in zip(draws, batches, strict=True)])
        real, changed = weights > 0, inputs.clone()
        changed[real] = people.augment.apply(inputs[real], used)
        return changed, labels, weights

    def _gather(self, rows: list[np.ndarray]) -> tuple[Tensor, Tensor, Tensor]:
        longest = max(len(r) for r in rows)
        index = np.zeros((len(rows), longest), dtype=np.int64)
        weights = np.zeros((len(rows), longest), dtype=np.float32)
        for i, r in enumerate(rows):
            index[i, : len(r)] = r
            index[i, len(r) :] = r[0] if len(r) else 0
            weights[i, : len(r)] = 1.0 / max(len(r), 1)
        at = torch.from_numpy(index).to(self._population.task.device)
        inputs = self._population.inputs[at]
        inputs[[i for i, r in enumerate(rows) if not len(r)]] = 0.0
        return inputs, self._population.labels[at], torch.from_numpy(weights).to(at.device)

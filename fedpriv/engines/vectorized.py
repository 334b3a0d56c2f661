"""The vectorized engine: computes chunks of clients at once if that is faster, and client steps in C if possible."""

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fedpriv.data.federation import Federation, Holders
from fedpriv.data.mapped import rows_at
from fedpriv.engines.base import Population, keep_freed_memory, one_thread
from fedpriv.engines.in_place import ClientStep
from fedpriv.engines.states import StateStore
from fedpriv.methods import owns_steps
from fedpriv.rounds import Broadcast, Total
from fedpriv.tasks.local_work import Batches, LocalSGD, batches_of, draws_nothing
from fedpriv.tasks.task import MAX_PIECE_FLOATS, Forward

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
    forward: Forward | None = None

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
        if step.in_c:
            step.take_many(clients, signals, self._states)
            return
        rows = self._rows_at_once(len(clients))
        for start in range(0, len(clients), rows):
            step.take_rows(clients[start : start + rows], signals[start : start + rows], self._states)

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
        sizes = people.federation.sizes[clients].tolist()
        plans = self._plans(model, clients, sizes, round)
        if people.work.client_lr is None:
            (step,) = self._steps(clients, sizes, [plan[:1] for plan in plans])
            return people.task.gradients(model, *step[1])
        local = LocalSGD(people.work, model, offsets, people.rules.method.step_prox)
        for at_work, padded in self._steps(clients, sizes, plans):
            if len(at_work) == len(plans):
                local.step(partial(people.task.gradients, inputs=padded[0], labels=padded[1], weights=padded[2]))
                continue
            taking = model.new_zeros(len(plans), 1)
            taking[at_work] = 1.0
            local.step(partial(self._gradients, at_work=at_work, padded=padded), taking)
        return local.signal(model.new_tensor([len(plan) for plan in plans]).unsqueeze(1))

    def _plans(self, model: Tensor, clients: list[int], sizes: list[int], round: int) -> list[Batches]:
        """Return the batches of each client; clients of one size that draw nothing have the same."""
        people = self._population
        drawn = partial(batches_of, people.work, people.streams)
        same = {size: drawn(size, round, 0) for size in set(sizes) if draws_nothing(people.work, size)}
        return [
            same[size] if size in same else drawn(size, round, client, partial(people.losses, client, model))
            for client, size in zip(clients, sizes, strict=True)
        ]

    def _gradients(self, local: Tensor, at_work: list[int], padded: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Return the gradients `[clients, params]` of a step; zero for clients that take fewer steps."""
        gradients = torch.zeros_like(local)
        gradients[at_work] = self._population.task.gradients(local[at_work], *padded)
        return gradients

    def _steps(
        self, clients: list[int], sizes: list[int], plans: list[Batches]
    ) -> Iterator[tuple[list[int], tuple[Tensor, Tensor, Tensor]]]:
        """Yield which clients take each step, and its inputs `[clients at work, examples, ...]`, labels and weights."""
        whole: dict[tuple[int, ...], tuple[Tensor, Tensor, Tensor]] = {}
        for number in range(max(len(plan) for plan in plans)):
            at_work = [i for i, plan in enumerate(plans) if number < len(plan)]
            batches = [plans[i][number] for i in at_work]
            few, their_sizes = [clients[i] for i in at_work], [sizes[i] for i in at_work]
            if any(batch is not None for batch in batches):
                yield at_work, self._augmented(self._gather(few, their_sizes, batches), few, their_sizes, batches)
                continue
            key = tuple(few)
            if key not in whole:
                whole = {key: self._whole(key, few, their_sizes, batches)}
            yield at_work, whole[key]

    def _whole(
        self, key: tuple[int, ...], clients: list[int], sizes: list[int], batches: Batches
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return inputs, labels and weights of all examples of the clients; keep them for the next round."""
        padded = self._cache.get(key) or self._gather(clients, sizes, batches)
        self._cached_floats += padded[0].numel()
        if self._cached_floats <= _MAX_CACHE_FLOATS:
            self._next_cache[key] = padded
        return self._augmented(padded, clients, sizes, batches)

    def _augmented(
        self, padded: tuple[Tensor, Tensor, Tensor], clients: list[int], sizes: list[int], batches: Batches
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the padded inputs of one step with all examples augmented, but not the padding."""
        people, (inputs, labels, weights) = self._population, padded
        if people.augment is None:
            return padded
        draws = [people.draws(n, self._round, c) for c, n in zip(clients, sizes, strict=True)]
        used = np.concatenate([d if b is None else d[b] for d, b in zip(draws, batches, strict=True)])
        real, changed = weights > 0, inputs.clone()
        changed[real] = people.augment.apply(inputs[real], used)
        return changed, labels, weights

    def _gather(self, clients: list[int], sizes: list[int], batches: Batches) -> tuple[Tensor, Tensor, Tensor]:
        """Return the clients' examples, padded to the longest batch: inputs, labels and weights."""
        population = self._population
        lengths = np.array([n if b is None else len(b) for n, b in zip(sizes, batches, strict=True)])
        chosen, longest = _rows_of(population.federation, clients, sizes, lengths, batches), int(lengths.max())
        if chosen.size == longest * len(lengths):
            index = chosen.reshape(len(lengths), longest)
            weights = np.full(index.shape, 1.0 / max(longest, 1), dtype=np.float32)
        else:
            used = np.arange(longest) < lengths[:, None]
            ends = np.cumsum(lengths)
            first = np.where(lengths > 0, chosen[np.minimum(ends - lengths, len(chosen) - 1)], 0)
            index = np.repeat(first[:, None], longest, axis=1)
            index[used] = chosen
            weights = np.where(used, 1.0 / np.maximum(lengths, 1)[:, None], 0.0).astype(np.float32)
        at = torch.from_numpy(index).to(population.task.device)
        found = rows_at(population.inputs, at)
        if not lengths.all():
            found[torch.from_numpy(lengths == 0)] = 0.0
        return found, population.labels[at], torch.from_numpy(weights).to(at.device)


def _rows_of(
    federation: Holders, clients: list[int], sizes: list[int], lengths: np.ndarray, batches: Batches
) -> np.ndarray:
    """Return the training rows of the batches of all clients, one after the other, int64 `[sum of lengths]`."""
    if not isinstance(federation, Federation):
        held = [federation.rows_of(client) for client in clients]
        return np.concatenate([r if b is None else r[b] for r, b in zip(held, batches, strict=True)])
    starts = federation.offsets[clients]
    if all(batch is None for batch in batches):
        within = np.arange(lengths.sum()) + np.repeat(starts - np.cumsum(lengths) + lengths, lengths)
    else:
        places = [np.arange(n) if b is None else b for n, b in zip(sizes, batches, strict=True)]
        within = np.concatenate(places) + np.repeat(starts, lengths)
    return federation.rows[within]

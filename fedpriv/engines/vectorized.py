"""The vectorized engine: a chunk of clients is one batched gradient and one client rule on `[clients, params]`."""

import math

import numpy as np
import torch
from torch import Tensor

from fedpriv.engines.base import Population
from fedpriv.learning.local_work import batches_of
from fedpriv.learning.tasks import PIECE_FLOATS
from fedpriv.methods import ClientState, Method
from fedpriv.noise import client_noise
from fedpriv.rounds import Broadcast, Total, apply_client_rule

__all__ = ["StateStore", "VectorizedEngine"]

# Floats of inputs, or of messages, in one chunk: 16 MiB each.
_CHUNK_FLOATS = PIECE_FLOATS
# Floats of padded inputs that are kept from round to round: 1 GiB.
_CACHE_FLOATS = 2**28


class StateStore:
    """States of the clients that took part, stacked by field; grows with the clients seen, not the population.

    Args:
        method: Whose client states these are.
        size: Number of parameters.
        device: Where they live.
    """

    def __init__(self, method: Method, size: int, device: torch.device) -> None:
        self._fresh = [field.to(device) for field in method.init_client(size)]
        self._kind = type(method.init_client(0))
        self._slots: dict[int, int] = {}
        self._device = device
        self._fields = [field.new_zeros((0, *field.shape)) for field in self._fresh]

    def take(self, clients: list[int]) -> ClientState:
        """The states of `clients`, fields `[clients, ...]`; new clients start fresh."""
        for client in clients:
            self._slots.setdefault(client, len(self._slots))
        self._grow(len(self._slots))
        rows = self._rows(clients)
        return self._kind(*(field[rows] for field in self._fields))

    def put(self, clients: list[int], state: ClientState) -> None:
        """Keeps the new states of clients that were taken before."""
        rows = self._rows(clients)
        for field, new in zip(self._fields, state, strict=True):
            field[rows] = new

    def save(self) -> dict[str, Tensor]:
        """See `Engine.save`."""
        clients = sorted(self._slots)
        rows = self._rows(clients)
        named = zip(self._kind._fields, self._fields, strict=True)
        stacked = {name: field[rows].cpu() for name, field in named if clients}
        return {"clients": torch.tensor(clients, dtype=torch.int64), **stacked}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """See `Engine.restore`."""
        clients = tensors["clients"].tolist()
        self._slots = {client: row for row, client in enumerate(clients)}
        self._fields = [field.new_zeros((0, *field.shape)) for field in self._fresh]
        if clients:
            self._fields = [tensors[name].to(self._device).clone() for name in self._kind._fields]

    def _rows(self, clients: list[int]) -> Tensor:
        return torch.tensor([self._slots[client] for client in clients], dtype=torch.int64, device=self._device)

    def _grow(self, needed: int) -> None:
        for index, (field, fresh) in enumerate(zip(self._fields, self._fresh, strict=True)):
            if len(field) < needed:
                grown = fresh.expand(max(needed, 2 * len(field)), *fresh.shape).clone()
                grown[: len(field)] = field
                self._fields[index] = grown


class VectorizedEngine:
    """Chunks of clients of similar size on one device; equal to the loop engine up to rounding.

    Args:
        population: All clients.
        chunk: Clients at a time; None chooses by memory.
    """

    name = "vectorized"

    def __init__(self, population: Population, chunk: int | None = None) -> None:
        self._population = population
        self._size = population.task.layout.size
        self._store = StateStore(population.rules.method, self._size, population.task.device)
        self._chunk = chunk
        self._cache: dict[tuple[int, ...], tuple[Tensor, Tensor, Tensor]] = {}
        self._cached_floats = 0

    def sum_messages(self, broadcast: Broadcast) -> Total:
        """See `Engine.sum_messages`."""
        device = self._population.task.device
        model = broadcast.model.to(device)
        total = broadcast.empty_sum(self._population.rules, device)
        norms = [torch.zeros(0, dtype=torch.float64, device=device)]
        for clients in self._chunks(broadcast.cohort):
            signals = self._signals(model, clients, broadcast.round)
            norms.append(torch.linalg.vector_norm(signals, dim=-1, dtype=torch.float64))
            total.add(self._client_rules(clients, signals, broadcast.round))
        found = torch.cat(norms)
        finite = found[torch.isfinite(found)]
        mean = float(finite.mean()) if len(finite) else math.nan
        return Total(total.value, len(found), len(found) - len(finite), mean)

    def save(self) -> dict[str, Tensor]:
        """See `Engine.save`."""
        return self._store.save()

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """See `Engine.restore`."""
        self._store.restore(tensors)

    def _client_rules(self, clients: list[int], signals: Tensor, round: int) -> Tensor:  # noqa: A002
        rules = self._population.rules
        noise = None
        if rules.noise_stddev > 0.0:
            drawn = [client_noise(rules.streams, rules.noise_stddev, self._size, round, c) for c in clients]
            noise = torch.stack(drawn).to(signals.device)
        messages, states = apply_client_rule(rules.method, self._store.take(clients), signals, noise, round)
        self._store.put(clients, states)
        return messages

    def _chunks(self, cohort: np.ndarray) -> list[list[int]]:
        """The cohort in chunks, largest clients first, so that little is padded."""
        sizes = self._population.federation.sizes[cohort]
        order = np.argsort(-sizes, kind="stable")
        width = max(int(np.prod(self._population.inputs.shape[1:])), 1)
        chunks: list[list[int]] = []
        start = 0
        while start < len(order):
            floats = max(int(sizes[order[start]]) * width, self._size)
            count = self._chunk or max(1, _CHUNK_FLOATS // floats)
            chunks.append(cohort[order[start : start + count]].tolist())
            start += count
        return chunks

    def _signals(self, model: Tensor, clients: list[int], round: int) -> Tensor:  # noqa: A002
        people = self._population
        rows = [people.federation.rows_of(client) for client in clients]
        plans = [batches_of(people.work, people.streams, len(r), round, c) for c, r in zip(clients, rows, strict=True)]
        local = model
        for batches in zip(*plans, strict=True):
            gradients = people.task.gradients(local, *self._padded(clients, rows, batches))
            if people.work.client_lr is None:
                return gradients
            local = local - people.work.client_lr * gradients
        return model - local

    def _padded(
        self, clients: list[int], rows: list[np.ndarray], batches: tuple[np.ndarray | None, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs `[clients, examples, ...]`, labels and weights of one step; whole clients are kept for next time."""
        if any(batch is not None for batch in batches):
            return self._gather([r if b is None else r[b] for r, b in zip(rows, batches, strict=True)])
        key = tuple(clients)
        if key not in self._cache:
            padded = self._gather(rows)
            self._cached_floats += padded[0].numel()
            if self._cached_floats > _CACHE_FLOATS:
                self._cache.clear()
                self._cached_floats = padded[0].numel()
            self._cache[key] = padded
        return self._cache[key]

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

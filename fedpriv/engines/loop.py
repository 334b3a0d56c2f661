"""The loop engine: a `for` over the cohort. Every other engine is tested against it."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fedpriv.engines.base import Population, one_thread
from fedpriv.methods import ClientState
from fedpriv.rounds import Broadcast, Total, client_round

__all__ = ["LoopEngine"]


class LoopEngine:
    """One client after the other, on one thread; states only of clients that took part."""

    name = "loop"

    def __init__(self, population: Population) -> None:
        self._population = population
        self._size = population.task.layout.size
        self._states: dict[int, ClientState] = {}
        self._norms: list[float] = []

    def sum_messages(self, broadcast: Broadcast) -> Total:
        """See `Engine.sum_messages`."""
        self._norms = []
        total = broadcast.empty_sum(self._population.rules, self._population.task.device)
        with one_thread():
            for message in self._messages(broadcast):
                total.add(message)
        finite = [norm for norm in self._norms if math.isfinite(norm)]
        mean = sum(finite) / len(finite) if finite else math.nan
        return Total(total.value, len(self._norms), len(self._norms) - len(finite), mean)

    def _messages(self, broadcast: Broadcast) -> Iterator[Tensor]:
        model = broadcast.model.to(self._population.task.device)
        for client in broadcast.cohort.tolist():
            signal = self._population.signal(client, model, broadcast.round)
            self._norms.append(float(torch.linalg.vector_norm(signal, dtype=torch.float64)))
            state = self._states.get(client)
            if state is None:
                state = self._fresh_state(model.device)
            message, self._states[client] = client_round(self._population.rules, client, state, signal, broadcast.round)
            yield message

    def _fresh_state(self, device: torch.device) -> ClientState:
        state = self._population.rules.method.init_client(self._size)
        return type(state)(*(field.to(device) for field in state))

    def save(self) -> dict[str, Tensor]:
        """See `Engine.save`."""
        clients = sorted(self._states)
        fields = self._population.rules.method.init_client(0)._fields
        stacked = {f: torch.stack([getattr(self._states[c], f) for c in clients]).cpu() for f in fields if clients}
        return {"clients": torch.tensor(clients, dtype=torch.int64), **stacked}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """See `Engine.restore`."""
        kind = type(self._population.rules.method.init_client(0))
        device = self._population.task.device
        fields = [tensors[field].to(device) for field in kind._fields] if len(tensors["clients"]) else []
        self._states = {
            client: kind(*(field[row].clone() for field in fields))
            for row, client in enumerate(tensors["clients"].tolist())
        }

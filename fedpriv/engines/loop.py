"""The loop engine: a `for` over the cohort. Every other engine is tested against it."""

from torch import Tensor

from fedpriv.engines.base import Population, keep_freed_memory, one_thread
from fedpriv.engines.in_place import ClientStep
from fedpriv.engines.states import StateStore
from fedpriv.rounds import Broadcast, Total

__all__ = ["LoopEngine"]


class LoopEngine:
    """One client after the other, on one thread; states only of clients that took part.

    Args:
        population: All clients.
        states: Where their states are kept; None for memory without a bound.
    """

    name = "loop"

    def __init__(self, population: Population, states: StateStore | None = None) -> None:
        keep_freed_memory()
        self._population = population
        self._states = population.state_store() if states is None else states

    def sum_messages(self, broadcast: Broadcast) -> Total:
        """See `Engine.sum_messages`."""
        population = self._population
        model = broadcast.model.to(population.task.device)
        step = ClientStep(population.rules, broadcast, model.device)
        with one_thread():
            for client in broadcast.cohort.tolist():
                signal = population.signal(client, model, broadcast.round)
                with self._states.borrowed([client]) as state:
                    step.take([client], signal.unsqueeze(0), state)
        return step.total()

    def save(self) -> dict[str, Tensor]:
        """See `Engine.save`."""
        return self._states.save()

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """See `Engine.restore`."""
        self._states.restore(tensors)

    def close(self) -> None:
        """Nothing was started."""

"""The loop engine: `client_round` for each client of the cohort. Every other engine is tested against it."""

from torch import Tensor

from fedpriv.bounding import row_norms
from fedpriv.engines.base import Population, keep_freed_memory, one_thread
from fedpriv.engines.states import StateStore
from fedpriv.methods import ClientState
from fedpriv.rounds import Broadcast, Total, client_round, counted_norms, total_of
from fedpriv.tasks.task import Forward

__all__ = ["LoopEngine"]


class LoopEngine:
    """An engine that runs one client after the other on one thread, and stores states of participants only.

    Args:
        population: All clients.
        states: The store of their states; None for unbounded memory.
    """

    name = "loop"
    forward: Forward | None = None

    def __init__(self, population: Population, states: StateStore | None = None) -> None:
        keep_freed_memory()
        self._population = population
        self._states = population.state_store() if states is None else states

    def sum_messages(self, broadcast: Broadcast) -> Total:
        """See `Engine.sum_messages`."""
        population, round = self._population, broadcast.round
        if self._population.rules.sums is not None:
            self._states.begin()
        rules, model = population.rules, broadcast.model.to(population.task.device)
        total, norms = broadcast.empty_sum(rules, model.device), []
        with one_thread():
            for client in broadcast.cohort.tolist():
                with self._states.borrowed([client]) as kept:
                    state = type(kept)(*(field[0] for field in kept))
                    offset = broadcast.offset(rules.method, state)
                    signal = population.signal(client, model, round, offset=offset, state=state)
                    norms += _counted_norm(signal[: len(model)], state)
                    message, new = client_round(
                        rules, client, state, signal, round, broadcast.address, broadcast.shared
                    )
                    total.add(message)
                    _write(state, new)
        return total_of(total, norms)

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


def _counted_norm(signal: Tensor, state: ClientState) -> list[float]:
    norm = row_norms(signal.unsqueeze(0))
    return counted_norms(norm, sum((row_norms(field.double().reshape(1, -1)) for field in state), norm))


def _write(state: ClientState, new: ClientState) -> None:
    """Copy the new state over the old one; both may share tensors."""
    for target, source in zip(state, [field.clone() for field in new], strict=True):
        target.copy_(source)

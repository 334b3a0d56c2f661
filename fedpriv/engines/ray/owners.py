"""The assignment of clients to workers, balanced by cost and measured speed; no result depends on it."""

import math
from collections import deque
from collections.abc import Callable, Iterable
from typing import Literal

import numpy as np

from fedpriv.engines.base import Population

__all__ = ["Owners", "Unit", "client_costs"]

# The indivisible unit of work: a client, or all clients of one class (client id modulo the number).
Unit = Literal["client"] | int

# Fixed cost of a client, in examples.
_CLIENT_EXAMPLES = 8.0
# Weight of the newest round in a worker's speed.
_NEWEST = 0.3
# Owners change if workers differ by the factor _UNEVEN for _STREAK rounds in a row, and new owners cut the longest time
# to the share _GAIN or less.
_STREAK = 5
_UNEVEN = 1.2
_GAIN = 0.9


def client_costs(population: Population) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function for clients' costs in a round: processed examples plus a constant, float64 `[clients]`."""

    def costs(clients: np.ndarray) -> np.ndarray:
        return population.work.walked(population.federation.sizes[clients]) + _CLIENT_EXAMPLES

    return costs


class Owners:
    """The owners of clients: they divide each round's cohort among workers.

    If clients have memory, a new unit goes to the worker with the least work for its speed and stays there. Otherwise
    every round is divided independently, largest units first.

    Args:
        workers: The numbers of the workers.
        unit: The indivisible unit.
        costs: Returns the costs of clients, `[clients]`.
        stay: True if clients have memory.
    """

    def __init__(
        self, workers: Iterable[int], unit: Unit, costs: Callable[[np.ndarray], np.ndarray], *, stay: bool
    ) -> None:
        self.workers = list(workers)
        self._unit = unit
        self._costs = costs
        self._stay = stay
        self._owner: dict[int, int] = {}
        self._weight: dict[int, float] = {}
        self._seconds_per_cost: dict[int, float] = {}
        self._given: dict[int, float] = {}
        self._recent: deque[dict[int, float]] = deque(maxlen=_STREAK)
        self._patience = _STREAK
        self._waited = 0

    def shares(self, cohort: np.ndarray) -> dict[int, list[np.ndarray]]:
        """Return groups of clients for each worker with work; each group runs separately, with ascending ids."""
        if not len(cohort):
            return {}
        units, costs = self._units(cohort), self._costs(cohort)
        present, at = np.unique(units, return_inverse=True)
        weights = dict(zip(present.tolist(), np.bincount(at, weights=costs).tolist(), strict=True))
        owner = self._owners(weights)
        by_worker = np.array([owner[unit] for unit in present.tolist()], dtype=np.int64)[at]
        self._given = {}
        shares = {}
        for worker in np.unique(by_worker).tolist():
            mine = by_worker == worker
            self._given[worker] = float(costs[mine].sum())
            shares[worker] = self._groups(cohort[mine], units[mine])
        return shares

    def measured(self, seconds: dict[int, float]) -> None:
        """Record the seconds that workers took for their last shares; NaN if a time is not representative."""
        known = {w: s for w, s in seconds.items() if math.isfinite(s) and s > 0.0}
        for worker, took in known.items():
            now = took / self._given[worker]
            before = self._seconds_per_cost.get(worker, now)
            self._seconds_per_cost[worker] = before + _NEWEST * (now - before)
        self._recent.append({w: known.get(w, math.nan) for w in self.workers})
        self._waited += 1

    def rebalanced(self) -> bool:
        """Change owners if some workers took much longer than others for several rounds in a row; return True then.

        After each change, the next one takes twice as many rounds.
        """
        if not self._stay or self._waited < self._patience or not self._uneven():
            return False
        before = self._longest(self._loads())
        owner, self._owner = self._owner, {}
        self._owners(self._weight)
        if self._longest(self._loads()) > _GAIN * before:
            self._owner = owner
            return False
        self._patience *= 2
        self._waited = 0
        self._recent.clear()
        return True

    def lose(self, worker: int) -> None:
        """Remove a worker; its units get new owners when they next take part."""
        self.workers.remove(worker)
        self._owner = {unit: owner for unit, owner in self._owner.items() if owner != worker}
        self._seconds_per_cost.pop(worker, None)
        self._recent.clear()

    def forget(self) -> None:
        """Forget the owners, but not the speeds of workers."""
        self._owner.clear()
        self._weight.clear()

    def owners_of(self, clients: np.ndarray) -> np.ndarray:
        """Return the worker of each client, int64 `[clients]`; clients without an owner get one."""
        self.shares(clients)
        return np.array([self._owner[unit] for unit in self._units(clients).tolist()], dtype=np.int64)

    def _units(self, clients: np.ndarray) -> np.ndarray:
        return clients if self._unit == "client" else clients % self._unit

    def _groups(self, clients: np.ndarray, units: np.ndarray) -> list[np.ndarray]:
        if self._unit == "client":
            return [clients]
        return [clients[units == unit] for unit in np.unique(units)]

    def _owners(self, weights: dict[int, float]) -> dict[int, int]:
        """Return the owner of each unit of `weights`; owners are remembered if clients have memory."""
        owner = self._owner if self._stay else {}
        if self._stay:
            for unit, weight in weights.items():
                self._weight[unit] = max(weight, self._weight.get(unit, 0.0))
        new = sorted((unit for unit in weights if unit not in owner), key=lambda unit: (-weights[unit], unit))
        loads = self._loads() if new else {}
        speed = self._speeds()
        for unit in new:
            chosen = min(self.workers, key=lambda w: (loads[w] + weights[unit]) * speed[w])
            owner[unit] = chosen
            loads[chosen] += weights[unit]
        return owner

    def _loads(self) -> dict[int, float]:
        loads = dict.fromkeys(self.workers, 0.0)
        for unit, worker in self._owner.items():
            loads[worker] += self._weight[unit]
        return loads

    def _longest(self, loads: dict[int, float]) -> float:
        speed = self._speeds()
        return max(load * speed[worker] for worker, load in loads.items())

    def _speeds(self) -> dict[int, float]:
        """Return the seconds per cost of each worker; the median of the others if it was never measured."""
        usual = float(np.median(list(self._seconds_per_cost.values()))) if self._seconds_per_cost else 1.0
        return {worker: self._seconds_per_cost.get(worker, usual) for worker in self.workers}

    def _uneven(self) -> bool:
        """Return True if the workers' times differ much in all recent rounds; a worker without work took no time."""
        if len(self._recent) < _STREAK:
            return False
        times = [[0.0 if math.isnan(s) else s for s in row.values()] for row in self._recent]
        return all(max(row) > _UNEVEN * min(row) for row in times)

"""The Ray engine: workers on many cores, GPUs and machines, each with a local engine and the memories of its clients.

In a round, each worker receives the model and returns one partial sum. Messages are added exactly
(`fedpriv.aggregation.exact`), so that neither the number of workers nor the owner of a client changes a bit of the sum.
If a worker or a machine dies, all workers return to the last snapshot of the clients' states and repeat the rounds
since then. The run ends with the same bits as an undisturbed one.
"""

import contextlib
import pickle
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import ray
import torch
from ray.exceptions import (
    LocalRayletDiedError,
    ObjectStoreFullError,
    OutOfDiskError,
    OutOfMemoryError,
    RayError,
    RaySystemError,
    RayTaskError,
)
from torch import Tensor

from fedpriv.checks import at_least_one
from fedpriv.data.federation import Federation
from fedpriv.engines.base import Population
from fedpriv.engines.ray.cluster import Need, connect, quiet, room
from fedpriv.engines.ray.host import Failure, Host, MakeLocal, Partial, Versions, merged, pack, unpack
from fedpriv.engines.ray.owners import Owners, Unit, client_costs
from fedpriv.engines.ray.snapshots import KeepSnapshots, Snapshots
from fedpriv.errors import EngineStartError, UserError
from fedpriv.methods import has_memory, message_size
from fedpriv.rounds import Broadcast, Total
from fedpriv.tasks.task import Forward

__all__ = ["RayEngine"]

T = TypeVar("T")

# Failures of workers in one round after which the run ends with an error.
_MAX_ATTEMPTS = 3
# Longest time for workers to start, and for replacements of dead ones.
_MAX_START_SECONDS = 120.0
_MAX_REPLACE_SECONDS = 60.0
_POLL_SECONDS = 0.5
# Most sets of examples that workers keep for evaluations: test and validation.
_EVALUATED = 2
# Bytes of shared objects beside data and vectors.
_STORE_BYTES = 2**28


class RayEngine:
    """An engine of Ray workers on this machine or on many; the same bits for any number of workers.

    Each worker owns some clients, in indivisible units. `"client"` suffices for a local engine that runs one client
    after the other. In a local engine that runs batches, rounding depends on the members of a batch, and `unit` must be
    a number: clients with the same id modulo this number form a class. One call of the local engine runs all clients of
    a class in the cohort, on the worker that owns the class.

    All workers must compute alike: with some on GPUs and some on CPUs, results are equal up to rounding only.

    Args:
        population: All clients, on the CPU. Each machine receives the data once.
        make_local: Makes the engine inside a worker, from the population and the worker's device; must be picklable.
        workers: Number of workers.
        gpus_per_worker: Share of a GPU per worker, or a list of the workers' shares; 0 for the CPU.
        cpus_per_worker: CPU cores, or a share of one, of each worker. Torch gets as many threads, at least one.
        unit: `"client"`, or the number of classes.
        address: HOST:PORT of a running Ray; None starts one on this machine. If this process is already connected to
            a Ray, the engine uses that one, and `close` does not end it.
        snapshots: Frequency and place of snapshots of clients' states, to restore if a worker dies; None for every
            twentieth round, in this process's memory.

    Raises:
        UserError: If there is no Ray at the address, it has no room for the workers, or they cannot start.
    """

    name = "ray"

    def __init__(
        self,
        population: Population,
        make_local: MakeLocal,
        *,
        workers: int,
        gpus_per_worker: float | Sequence[float] = 0.0,
        cpus_per_worker: float = 1.0,
        unit: Unit = "client",
        address: str | None = None,
        snapshots: KeepSnapshots | None = None,
    ) -> None:
        self._population = population
        self._needs = _needs(workers, cpus_per_worker, gpus_per_worker)
        self._method = population.rules.method
        self._memory = has_memory(self._method)
        self._owners = Owners(range(workers), unit, client_costs(population), stay=self._memory)
        self._snapshots = Snapshots(snapshots or KeepSnapshots())
        self._seen: set[int] = set()
        self._hosts: dict[int, Any] = {}
        self._dead: set[int] = set()
        self._stale = False
        self._last: Broadcast | None = None  # a round that may still be taken back
        self._evaluated: dict[int, tuple[Tensor, ray.ObjectRef]] = {}
        shipment = pack((_to_ship(population), make_local))
        size = sum(array.nbytes for array in shipment.arrays)
        self._elsewhere = address is not None or any(need.gpus for need in self._needs)
        if self._elsewhere:
            size += _evaluated_bytes(population)
        vectors = 16 * population.task.layout.size * (workers + 2)
        self._handler = _Termination()
        self._ended: Callable[[], object] = lambda: None
        try:
            self._ended = weakref.finalize(self, connect(address, _STORE_BYTES + 2 * size + vectors).close)
            self._handler.install()
            self._shipment = ray.put(shipment)
            self._start_all()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "RayEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def sum_messages(self, broadcast: Broadcast) -> Total:
        """See `Engine.sum_messages`.

        Raises:
            UserError: If workers die repeatedly.
            Exception: Any exception that a client's rules raise.
        """
        if broadcast.capacity is None:
            broadcast = broadcast._replace(capacity=len(broadcast.cohort))
        self._settle()
        doing = f"round {broadcast.address}"
        total, seconds = self._until_done(lambda: self._run(broadcast), doing)
        self._owners.measured(seconds)
        if not self._memory:
            self._seen.update(broadcast.cohort.tolist())
            return total
        self._last = broadcast
        if self._population.rules.sums is None:
            self._settle()
        return total

    @property
    def forward(self) -> Forward | None:
        """See `Engine.forward`: the workers, if they have GPUs or Ray ran before; otherwise None.

        On this machine's cores alone, one process with a thread for each core is as fast.
        """
        return self._outputs if self._elsewhere else None

    def _outputs(self, model: Tensor, inputs: Tensor, size: int) -> Iterator[Tensor]:
        """See `Task.outputs`. The workers keep the inputs; each computes one piece at a time."""
        self._settle()
        if id(inputs) not in self._evaluated:
            while len(self._evaluated) >= _EVALUATED:
                self._evaluated.pop(next(iter(self._evaluated)))
            self._evaluated[id(inputs)] = inputs, ray.put(inputs.detach().cpu().numpy())
        given = ray.put(model.detach().cpu().numpy()), self._evaluated[id(inputs)][1]
        pieces = [(start, min(start + size, len(inputs))) for start in range(0, len(inputs), size)]
        while pieces:
            now, pieces = pieces[: len(self._hosts)], pieces[len(self._hosts) :]
            yield from self._until_done(partial(self._outputs_of, now, *given), "an evaluation")

    def _outputs_of(self, pieces: list[tuple[int, int]], model: ray.ObjectRef, inputs: ray.ObjectRef) -> list[Tensor]:
        """Return the outputs of some pieces, in their order."""
        hosts = list(self._hosts)
        mine = {worker: pieces[place :: len(hosts)] for place, worker in enumerate(hosts[: len(pieces)])}
        found = self._collect({w: self._hosts[w].outputs.remote(model, inputs, some) for w, some in mine.items()})
        by_piece = {piece: array for w, some in mine.items() for piece, array in zip(some, found[w], strict=True)}
        return [torch.from_numpy(by_piece[piece].copy()) for piece in pieces]

    def undo(self) -> None:
        """See `UndoingEngine.undo`: workers return to the last snapshot and repeat the rounds since then."""
        if self._last is not None:
            self._last, self._stale = None, True

    def _settle(self) -> None:
        """Record the last round, which is no longer taken back."""
        if self._last is None:
            return
        broadcast, self._last = self._last, None
        self._snapshots.log(broadcast)
        if self._owners.rebalanced():
            self._until_done(self._exchange, f"round {broadcast.address}")
        elif self._snapshots.due:
            self._until_done(self._snapshot, f"round {broadcast.address}")

    def save(self) -> dict[str, Tensor]:
        """See `Engine.save`. The saved states become the last snapshot."""
        if not self._memory:
            return {"clients": torch.tensor(sorted(self._seen), dtype=torch.int64)}
        self._settle()
        self._until_done(self._snapshot, "a checkpoint")
        return merged(self._snapshots.parts())

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """See `Engine.restore`. Clients get new owners."""
        self._seen, self._last = set(tensors["clients"].tolist()), None
        if self._memory:
            self._owners.forget()
            self._snapshots.keep([tensors])
            self._stale = True
            self._until_done(lambda: None, "restoring")

    def close(self) -> None:
        """End the workers, and Ray if it was started here; can be called again."""
        if ray.is_initialized():
            for host in self._hosts.values():
                with contextlib.suppress(RayError, ValueError):
                    ray.kill(host)
        self._hosts = {}
        self._shipment = None
        self._evaluated = {}
        self._snapshots.clear()
        self._ended()
        self._handler.remove()

    # One round.

    def _run(self, broadcast: Broadcast) -> tuple[Total, dict[int, float]]:
        """Return the total of a round, and the time that each worker took (seconds)."""
        sum_ = np.zeros(message_size(self._method, broadcast.model.shape[-1]))
        shares = self._owners.shares(broadcast.cohort)
        model = ray.put(broadcast.model.detach().cpu().numpy())
        beside = None if broadcast.shared is None else ray.put(broadcast.shared.detach().cpu().numpy())
        about = broadcast.round, broadcast.turn, model, broadcast.capacity
        calls = {worker: self._hosts[worker].run.remote(*about, share, beside) for worker, share in shares.items()}
        found: dict[int, Partial] = self._collect(calls)
        for part in found.values():
            sum_ += part.sum
        messages = sum(part.messages for part in found.values())
        non_finite = sum(part.non_finite for part in found.values())
        finite = messages - non_finite
        mean = sum(part.signal_norms for part in found.values()) / finite if finite else float("nan")
        return Total(torch.from_numpy(sum_), messages, non_finite, mean), {w: p.seconds for w, p in found.items()}

    def _collect(self, calls: dict[int, ray.ObjectRef]) -> dict[int, Any]:
        """Return the workers' answers, once all have answered or died.

        Raises:
            _LostError: If some died.
        """
        try:
            found = dict(zip(calls, ray.get(list(calls.values())), strict=True))
            lost: dict[int, str] = {}
        except RayError:
            found, lost = _one_by_one(calls)
        for worker, answer in found.items():
            if isinstance(answer, Failure):
                if answer.kind != "memory":
                    raise _raised(answer)
                ray.kill(self._hosts[worker])
                lost[worker] = f"{_NO_MEMORY}: {answer.text}"
        if lost:
            raise _LostError(lost)
        return found

    # Faults.

    def _until_done(self, work: Callable[[], T], doing: str) -> T:
        """Call `work` and return its value; if workers die, replace them, restore all states and call it again."""
        lost = _LostError({})
        for _ in range(_MAX_ATTEMPTS):
            try:
                if self._stale:
                    self._recover()
                return work()
            except _LostError as error:
                lost = error
                self._dead |= set(lost.workers) & set(self._hosts)
                self._stale = True
            except BaseException:
                self._stale = True
                raise
        raise _given_up(doing, lost)

    def _recover(self) -> None:
        """Replace dead workers, and bring all workers to the state after the last finished round."""
        if self._dead:
            self._replace()
        if self._memory:
            self._spread()
            for past in self._snapshots.rounds:
                self._run(past)
        self._stale = False

    def _spread(self) -> None:
        """Send the snapshot's states to their owners."""
        inboxes: dict[int, list[ray.ObjectRef]] = {worker: [] for worker in self._owners.workers}
        for part in self._snapshots.parts():
            owners = self._owners.owners_of(part["clients"].numpy())
            for worker in np.unique(owners).tolist():
                rows = torch.from_numpy(np.flatnonzero(owners == worker))
                inboxes[worker].append(ray.put(pack({name: tensor[rows] for name, tensor in part.items()})))
        self._collect({worker: self._hosts[worker].restore.remote(*inbox) for worker, inbox in inboxes.items()})

    def _snapshot(self) -> None:
        calls = {worker: host.save.remote() for worker, host in self._hosts.items()}
        self._snapshots.keep(unpack(self._collect({worker: calls[worker]})[worker]) for worker in list(calls))

    def _exchange(self) -> None:
        """Move all states to their new owners."""
        self._snapshot()
        self._spread()

    # Workers.

    def _start_all(self) -> None:
        fit = room(self._needs)
        if fit < len(self._needs):
            raise _no_room(self._needs, fit)
        for worker in range(len(self._needs)):
            self._launch(worker)
        try:
            late = self._greet(list(self._hosts), _MAX_START_SECONDS, lambda: True)
        except _LostError as lost:
            reason = next(iter(lost.workers.values()))
            remedy = "Install fedpriv on all machines, and read the logs of Ray"
            raise EngineStartError("workers", "processes that start", reason, remedy) from None
        if late:
            raise _no_room(self._needs, len(self._needs) - len(late), "now because other programs use the rest")

    def _launch(self, worker: int) -> None:
        need = self._needs[worker]
        options = {"num_cpus": need.cpus, "num_gpus": need.gpus, "max_restarts": 0, "max_task_retries": 0}
        with quiet():
            self._hosts[worker] = ray.remote(Host).options(**options, scheduling_strategy="SPREAD").remote()  # type: ignore[attr-defined]

    def _greet(self, workers: Sequence[int], seconds: float, possible: Callable[[], bool]) -> list[int]:
        """Wait until workers run and have their local engines; return the workers that do not start.

        Args:
            workers: The workers to wait for.
            seconds: Longest time to wait.
            possible: Returns True while waiting makes sense.
        """
        calls = {worker: self._hosts[worker].ready.remote() for worker in workers}
        until = time.monotonic() + seconds
        left = list(calls.values())
        while left and time.monotonic() < until and possible():
            _, left = ray.wait(left, num_returns=len(left), timeout=_POLL_SECONDS)
        late = [worker for worker, call in calls.items() if call in left]
        here = {worker: call for worker, call in calls.items() if worker not in late}
        for versions in self._collect(here).values():
            _check_versions(versions)
        self._collect({worker: self._start(worker) for worker in here})
        return late

    def _start(self, worker: int) -> ray.ObjectRef:
        need = self._needs[worker]
        path = [folder for folder in sys.path if folder and Path(folder).is_dir()]
        return self._hosts[worker].start.remote(self._shipment, max(1, int(need.cpus)), need.gpus > 0, path)

    def _replace(self) -> None:
        """Start new workers for dead ones; if there is no room for them, the other workers take over their clients."""
        dead = sorted(self._dead)
        alive = [self._needs[worker] for worker in self._hosts if worker not in self._dead]

        def fitting() -> int:
            return room([*alive, *(self._needs[worker] for worker in dead)]) - len(alive)

        wanted = dead[: max(fitting(), 0)]
        for worker in wanted:
            self._launch(worker)
        late = self._greet(wanted, _MAX_REPLACE_SECONDS, lambda: fitting() >= len(wanted))
        for worker in {*dead, *late} - ({*wanted} - {*late}):
            ray.kill(self._hosts.pop(worker))
            self._owners.lose(worker)
        self._dead = set()
        if not self._hosts:
            raise UserError("workers", "a live machine to run them on", "dead machines", "Start again with --resume")


_NO_MEMORY = "out of memory"


class _LostError(Exception):
    """Dead workers, each with the reason."""

    def __init__(self, workers: dict[int, str]) -> None:
        super().__init__(workers)
        self.workers = workers


class _RemoteTracebackError(Exception):
    """The traceback in a worker, as text."""

    def __str__(self) -> str:
        return f'\n"""\n{self.args[0]}"""'


def _one_by_one(calls: dict[int, ray.ObjectRef]) -> tuple[dict[int, object], dict[int, str]]:
    """Return the answers of live workers, and the reasons why the others died."""
    found: dict[int, object] = {}
    lost: dict[int, str] = {}
    for worker, call in calls.items():
        try:
            found[worker] = ray.get(call)
        except (LocalRayletDiedError, RaySystemError) as error:
            raise UserError("Ray", "a live node on this machine", _brief(error), "Start again with --resume") from None
        except (ObjectStoreFullError, OutOfDiskError) as error:
            remedy = "Make room in /dev/shm and on the disk, or use a smaller model"
            raise UserError("Ray's shared memory", "room for models and states", _brief(error), remedy) from None
        except RayTaskError as error:
            if not isinstance(error.cause, RayError):
                raise
            lost[worker] = _why(error.cause)
        except RayError as error:
            lost[worker] = _why(error)
    return found, lost


def _why(error: BaseException) -> str:
    text = str(error)
    if isinstance(error, OutOfMemoryError) or "running low on memory" in text:
        return _NO_MEMORY
    if "ModuleNotFoundError" in text or "ImportError" in text:
        return text.strip().splitlines()[-1]
    return "its machine is gone" if "node" in text and "worker process has died" not in text else "its process died"


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:200].rstrip(".")


def _raised(failure: Failure) -> Exception:
    """Return the exception of a worker as an exception of its original type."""
    if failure.kind == "user":
        error = UserError.__new__(UserError)
        ValueError.__init__(error, failure.text)
        error.where = failure.where
        return error
    if failure.kind == "disk":
        return UserError(failure.where, "room on the disk", failure.text, "Make room, or use fewer clients")
    error = pickle.loads(failure.error)
    error.__cause__ = _RemoteTracebackError(failure.text)
    return error


def _given_up(doing: str, lost: _LostError) -> UserError:
    worker, reason = next(iter(lost.workers.items()))
    got = f"{_MAX_ATTEMPTS} failures in a row, the last of worker {worker}: {reason}"
    remedy = "Read the logs of Ray and of the machines, then resume with --resume"
    if any(why.startswith(_NO_MEMORY) for why in lost.workers.values()):
        remedy = "Use fewer --workers, a smaller chunk or a smaller model"
    return UserError(doing, "workers that survive it", got, remedy)


def _to_ship(population: Population) -> Population:
    """Return the population for workers: grouped by client, so that clients' tensors are views of shared memory.

    It has one test example, for the shape, and no validation data.
    """
    population = replace(population.in_client_order())
    if not isinstance(population.federation, Federation):
        return population
    data = population.federation.dataset
    dataset = replace(data, test_inputs=data.test_inputs[:1], test_labels=data.test_labels[:1], groups=None)
    dataset = replace(dataset, validation_inputs=None, validation_labels=None, tested=None, validated=None)
    return replace(population, federation=replace(population.federation, dataset=dataset))


def _evaluated_bytes(population: Population) -> int:
    """Return the bytes of the inputs of test and validation."""
    data = population.federation.dataset
    held_out = 0 if data.validation_inputs is None else data.validation_inputs.nbytes
    return data.test_inputs.nbytes + held_out


def _needs(workers: int, cpus: float, gpus: float | Sequence[float]) -> list[Need]:
    at_least_one("workers", workers, "Give a number of workers")
    shares = [float(gpus)] * workers if isinstance(gpus, int | float) else [float(share) for share in gpus]
    if len(shares) != workers:
        raise UserError("GPUs of the workers", f"{workers} numbers", len(shares), "Give one for each worker")
    if any(share < 0.0 for share in shares) or cpus < 0.0:
        raise UserError("CPUs and GPUs of a worker", "numbers from 0", (cpus, gpus), "Give 0 or more")
    return [Need(float(cpus), share) for share in shares]


def _no_room(needs: list[Need], fit: int, when: str = "") -> EngineStartError:
    total = ray.cluster_resources()
    cpus, gpus = sum(need.cpus for need in needs), sum(need.gpus for need in needs)
    machines = sum(bool(node["Alive"]) for node in ray.nodes())
    there = f"{total.get('CPU', 0):g} CPUs and {total.get('GPU', 0):g} GPUs on {machines} machine(s)"
    expected = f"room for {len(needs)} workers with {cpus:g} CPUs and {gpus:g} GPUs in all"
    got = " ".join(f"{there} with room for {fit} {when}".split())
    return EngineStartError("workers", expected, got, "Use fewer workers, or a smaller share for each")


def _check_versions(there: Versions) -> None:
    if there != Versions.here():
        remedy = "Install the same versions on all machines"
        raise EngineStartError("workers", f"the same versions ({Versions.here()})", there, remedy)


class _Termination:
    """The handler of SIGTERM while Ray is in use: it raises an exception, so that Ray ends.

    Ray replaces any handler with its own. This class restores an earlier handler, if there was one.
    """

    def __init__(self) -> None:
        self._main = threading.current_thread() is threading.main_thread()
        self._before = signal.getsignal(signal.SIGTERM) if self._main else None

    def install(self) -> None:
        """Install the handler; call it after Ray has started."""
        if self._main:
            signal.signal(signal.SIGTERM, _leave if self._before in (signal.SIG_DFL, None) else self._before)

    def remove(self) -> None:
        """Restore the earlier handler."""
        if self._main and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)


def _leave(number: int, _: object) -> None:
    raise SystemExit(128 + number)

"""Run functions in parallel on Ray workers, on one or more machines, each with the resources it needs."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from fedpriv.engines.ray.cluster import Need, connect, quiet, room
from fedpriv.errors import UserError
from fedpriv.sweeps.jobs import Began, Ended, Job, JobDied, call

__all__ = ["side_by_side"]

_STORE_BYTES = 2**27
# Time between two empty events for the live display; ends of jobs are reported at once.
_WAIT_SECONDS = 0.5
_MAX_FAILED_STARTS = 3


def side_by_side(
    jobs: Iterable[Job],
    at_once: int | None = None,
    *,
    cpus: float = 1.0,
    gpus: float = 0.0,
    address: str | None = None,
) -> Generator[Began | Ended | None]:
    """Run jobs as workers become free. A worker runs many jobs in turn, so it imports modules once.

    Args:
        jobs: The jobs, in starting order.
        at_once: Maximum number of parallel jobs; None for as many as fit on the machines.
        cpus: CPUs per job.
        gpus: GPUs per job.
        address: HOST:PORT of a running Ray; None starts Ray.

    Yields:
        Starts and ends of jobs; None after each interval without an event.

    Raises:
        UserError: If no machine has room for a job, no worker starts, or Ray itself ends.
    """
    waiting = deque(jobs)
    connection = connect(address, _STORE_BYTES)
    try:
        places = room([Need(cpus, gpus)] * min(len(waiting), at_once or len(waiting)))
        if waiting and not places:
            where = "--gpus-per-trial" if gpus else "--cpus-per-trial"
            need = f"{gpus:g} GPU" if gpus else f"{cpus:g} CPU"
            raise UserError(
                where, f"a machine with {need}", "smaller machines", f"Lower {where}, or join a Ray with such a machine"
            )
        yield from _Pool(waiting, cpus, gpus).run(places)
    except RayError as error:
        remedy = "Run again with --resume; finished trials are kept"
        raise UserError("Ray", "a Ray that keeps running", _first_line(error), remedy) from None
    finally:
        connection.close()


class _Worker:
    """The actor that runs in each Ray process."""

    def ready(self) -> None:
        """Return once the process runs."""

    def do(self, function: Callable[..., object], arguments: tuple[object, ...]) -> object:
        """Run one job."""
        return call(function, arguments)


class _Pool:
    """Ray workers with their pending calls: a job, or a test that the worker has started."""

    def __init__(self, waiting: deque[Job], cpus: float, gpus: float) -> None:
        self._waiting = waiting
        with quiet():
            self._kind: Any = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0)(_Worker)
        self._asked: dict[ray.ObjectRef, tuple[Any, Job | None]] = {}
        self._failed_starts = 0

    def run(self, places: int) -> Iterator[Began | Ended | None]:
        """Run until all jobs are done."""
        for _ in range(places):
            self._start()
        while self._waiting or any(job is not None for _, job in self._asked.values()):
            with quiet():
                answered, _ = ray.wait(list(self._asked), num_returns=1, timeout=_WAIT_SECONDS)
                events = [event for reference in answered for event in self._take(reference)]
            yield from events or [None]

    def _start(self) -> None:
        with quiet():
            worker = self._kind.remote()
            self._asked[worker.ready.remote()] = (worker, None)

    def _take(self, reference: ray.ObjectRef) -> list[Began | Ended]:
        """Handle an answer; gives its worker the next job first."""
        worker, job = self._asked.pop(reference)
        result = _result(reference)
        events: list[Began | Ended] = [] if job is None else [Ended(job.name, result)]
        if isinstance(result, JobDied):
            ray.kill(worker)
            self._failed_starts += job is None
            if self._failed_starts == _MAX_FAILED_STARTS:
                raise UserError(
                    "Ray", "workers that start", str(result), "Try --jobs 1 to see if a single worker starts"
                )
            if self._waiting:
                self._start()
        elif self._waiting:
            self._failed_starts = 0
            following = self._waiting.popleft()
            self._asked[worker.do.remote(following.function, following.arguments)] = (worker, following)
            events.append(Began(following.name))
        return events


def _result(reference: ray.ObjectRef) -> object:
    try:
        return ray.get(reference)
    except RayActorError as error:
        return JobDied(f"its process ended early: {_first_line(error)}")
    except RayError as error:
        return JobDied(_first_line(error))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

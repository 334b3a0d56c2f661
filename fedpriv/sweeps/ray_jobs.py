"""Functions side by side on Ray's workers, on one machine or many, each with the share of one that it needs."""

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
# Between two signs of life to whoever shows what goes on; an end is seen at once.
_WAIT_SECONDS = 0.5
_STARTS_IN_VAIN = 3


def side_by_side(
    jobs: Iterable[Job],
    at_once: int | None = None,
    *,
    cpus: float = 1.0,
    gpus: float = 0.0,
    address: str | None = None,
) -> Generator[Began | Ended | None]:
    """Runs jobs as workers become free. A worker does one job after the other, so that it imports once.

    Args:
        jobs: In the order in which they begin.
        at_once: Most at a time; None for as many as the machines have room for.
        cpus: What each one needs.
        gpus: Likewise.
        address: HOST:PORT of a running Ray; None for one of our own.

    Yields:
        What happens; None whenever nothing has for a moment.

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
            raise UserError(where, f"a machine with {need}", "none", "Ask for less, or join a Ray that has it")
        yield from _Pool(waiting, cpus, gpus).run(places)
    except RayError as error:
        remedy = "Run again with --resume; what has ended is kept"
        raise UserError("Ray", "a Ray that stays", _first_line(error), remedy) from None
    finally:
        connection.close()


class _Worker:
    """What a process of Ray's does; made by Ray."""

    def ready(self) -> None:
        """Answers once the process is there."""

    def do(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        """One job."""
        return call(function, arguments)


class _Pool:
    """Workers, and what each is asked at the moment: a job, or whether it is there."""

    def __init__(self, waiting: deque[Job], cpus: float, gpus: float) -> None:
        self._waiting = waiting
        with quiet():
            self._kind: Any = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0)(_Worker)
        self._asked: dict[Any, tuple[Any, Job | None]] = {}
        self._in_vain = 0

    def run(self, places: int) -> Iterator[Began | Ended | None]:
        """Until all is done."""
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

    def _take(self, reference: Any) -> list[Began | Ended]:
        """An answer; its worker is given the next job before anything else is done about it."""
        worker, job = self._asked.pop(reference)
        result = _result(reference)
        events: list[Began | Ended] = [] if job is None else [Ended(job.name, result)]
        if isinstance(result, JobDied):
            ray.kill(worker)
            self._in_vain += job is None
            if self._in_vain == _STARTS_IN_VAIN:
                raise UserError("Ray", "workers that start", str(result), "Run it with --jobs 1 to see if one does")
            if self._waiting:
                self._start()
        elif self._waiting:
            self._in_vain = 0
            following = self._waiting.popleft()
            self._asked[worker.do.remote(following.function, following.arguments)] = (worker, following)
            events.append(Began(following.name))
        return events


def _result(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except RayActorError as error:
        return JobDied(f"its process ended before it did: {_first_line(error)}")
    except RayError as error:
        return JobDied(_first_line(error))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

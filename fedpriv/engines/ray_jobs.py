"""Functions side by side on Ray's workers, each with the share of a machine that it needs."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ray
from ray.exceptions import RayError

from fedpriv.engines.ray_cluster import Need, connect, quiet, room
from fedpriv.errors import UserError

__all__ = ["JobDied", "side_by_side"]

_STORE_BYTES = 2**28
_WAIT_SECONDS = 0.25


class JobDied(Exception):  # noqa: N818
    """A job's process ended before the job did, as by the memory of the machine running out."""


def side_by_side(
    jobs: Iterable[tuple[str, Callable[..., Any], tuple[Any, ...]]],
    at_once: int,
    *,
    cpus: float = 1.0,
    gpus: float = 0.0,
    address: str | None = None,
) -> Iterator[tuple[str, Any] | None]:
    """Runs jobs as places become free, and yields each one's name and result as it ends.

    Args:
        jobs: Name, function and arguments of each, in the order in which they begin.
        at_once: Most at a time.
        cpus: What each one needs.
        gpus: Likewise.
        address: HOST:PORT of a running Ray; None for one of our own.

    Yields:
        Name and result, an exception for a job that failed; None whenever nothing has ended for a moment.

    Raises:
        UserError: If no machine has room for a job.
    """
    waiting = deque(jobs)
    connection = connect(address, _STORE_BYTES)
    try:
        if not room([Need(cpus, gpus)]):
            where, need = ("--gpus-per-trial", f"{gpus:g} GPU") if gpus else ("Ray", f"{cpus:g} CPU")
            raise UserError(where, f"a machine with {need}", "none", "Ask for less, or join a Ray that has it")
        with quiet():
            work = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(_call)
        running: dict[Any, str] = {}
        while waiting or running:
            with quiet():
                while waiting and len(running) < at_once:
                    name, function, arguments = waiting.popleft()
                    running[work.remote(function, arguments)] = name
                ended, _ = ray.wait(list(running), num_returns=1, timeout=_WAIT_SECONDS)
                found = [(running.pop(reference), _result(reference)) for reference in ended]
            yield from found or [None]
    finally:
        connection.close()


def _call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """A job's own mistakes come back as values, in words: an exception may not survive the way."""
    try:
        return function(*arguments)
    except UserError as error:
        return RuntimeError(str(error))
    except Exception as error:
        return RuntimeError(f"{type(error).__name__}: {error}")


def _result(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except RayError as error:
        return JobDied(str(error).strip().splitlines()[0])

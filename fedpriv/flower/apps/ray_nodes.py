"""Clients of a Flower app on Ray's workers: processes that each own some of the clients, with their contexts.

Client j belongs to worker j mod K. A context never travels; a model that is sent to many clients travels once to each
worker; replies come back one by one, while the worker goes on. Ray is imported only when it is used.
"""

import logging
import math
import os
import pickle
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import Array, Message

from fedpriv.checks import at_least_one
from fedpriv.engines import one_thread
from fedpriv.errors import UserError
from fedpriv.flower.apps.folder import import_component
from fedpriv.flower.apps.virtual_clients import FIRST_NODE, Population, VirtualClients
from fedpriv.flower.internals.app import copy_message

if TYPE_CHECKING:
    from fedpriv.engines.ray.cluster import Connection

__all__ = ["RayClients", "Workers"]

_log = logging.getLogger("flwr")

_CONNECT_SECONDS = 5.0
_START_SECONDS = 300.0
_LOOK_SECONDS = 1.0


@dataclass(frozen=True)
class Workers:
    """Which workers a run asks for.

    Args:
        count: How many processes.
        gpus_each: The share of a GPU that each of them takes.
        address: A Ray cluster's `host:port`, or `auto`; empty for a Ray of the run's own, on this machine.
    """

    count: int = 1
    gpus_each: float = 0.0
    address: str = ""

    @property
    def need_ray(self) -> bool:
        """Whether this process alone will not do."""
        return self.count > 1 or self.address != ""

    def check(self) -> None:
        """Raises a `UserError` if this cannot be asked for."""
        at_least_one("--workers", self.count, "Give a number of processes")
        if not (math.isfinite(self.gpus_each) and self.gpus_each >= 0):
            raise UserError("--gpus-per-worker", "0 or more", self.gpus_each, "Give each worker a share, such as 0.25")
        if self.gpus_each and not self.need_ray:
            raise UserError(
                "--gpus-per-worker", "--workers above 1", self.count, "One process sees all GPUs: leave the option out"
            )


class _Worker:
    """What runs in a process of its own."""

    def load(self, folder: Path, component: str, population: Population, cwd: str) -> str:
        """Loads the ClientApp; returns why it cannot be loaded, or nothing."""
        if Path(cwd).is_dir():
            os.chdir(cwd)
        try:
            self._clients = VirtualClients(import_component(folder, component, "clientapp"), population)
        except UserError as error:
            return f"{socket.gethostname()}: {error}"
        _import_ray().util.register_serializer(Array, serializer=_taken_apart, deserializer=_put_together)
        return ""

    def play(self, messages: list[Message]) -> Iterator[tuple[Message, list[str]]]:
        """The replies of clients, one by one, each with the warnings that were logged meanwhile.

        Messages may share records, so each client gets a copy.
        """
        with one_thread(), _warnings_kept() as warnings_:
            for message in messages:
                yield self._clients.play(copy_message(message)), list(warnings_)
                warnings_.clear()


@contextmanager
def _warnings_kept() -> Iterator[list[str]]:
    """Keeps what Flower's logger is told as a warning or worse: nobody sees a worker's own log."""
    kept: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: kept.append(handler.format(record))
    _log.addHandler(handler)
    try:
        yield kept
    finally:
        _log.removeHandler(handler)


def _taken_apart(array: Array) -> tuple[str, tuple[int, ...], str, pickle.PickleBuffer]:
    """An array whose bytes Ray copies into shared memory as they are, and not into a pickle before that."""
    return array.dtype, array.shape, array.stype, pickle.PickleBuffer(array.data)


def _put_together(parts: tuple[str, tuple[int, ...], str, Any]) -> Array:
    dtype, shape, stype, data = parts
    return Array(dtype, shape, stype, bytes(data))


class RayClients:
    """All clients on Ray's workers.

    Args:
        folder: The app's folder, which must be there on every machine.
        component: The ClientApp, as `module:attribute`.
        population: Who the clients are.
        workers: Which workers to ask for.

    Raises:
        UserError: If Ray cannot be reached or has too little, or cannot load the app. Nothing is left running.
    """

    def __init__(self, folder: Path, component: str, population: Population, workers: Workers) -> None:
        self.workers = min(workers.count, population.size)
        self._ray = _import_ray()
        self._connection = _connected(self._ray, workers, self.workers)
        self._streams: dict[Any, int] = {}
        self._former = _leave_on_termination()
        try:
            there = {"env_vars": {"PYTHONPATH": os.pathsep.join(_import_paths())}}
            actor = self._ray.remote(num_cpus=1, num_gpus=workers.gpus_each, runtime_env=there)(_Worker)
            self._actors = [actor.remote() for _ in range(self.workers)]
            loading = [a.load.remote(folder, component, population, os.getcwd()) for a in self._actors]  # noqa: PTH109
            self._loaded(loading)
        except BaseException:
            self.close()
            raise

    def push(self, messages: Sequence[Message]) -> None:
        """Sends each worker its messages, which start at once."""
        shares: dict[int, list[Message]] = {}
        for message in messages:
            shares.setdefault((message.metadata.dst_node_id - FIRST_NODE) % self.workers, []).append(message)
        for owner, share in shares.items():
            stream = self._actors[owner].play.options(num_returns="streaming").remote(share)
            self._streams[stream] = len(share)

    def advance(self, until: float = -math.inf) -> list[tuple[float, Message]]:
        """The replies that are there, or the first that comes until a moment of the monotonic clock, in seconds.

        Raises:
            UserError: If a worker died: the states of its clients died with it.
        """
        seconds = min(max(until - time.monotonic(), 0.0), _LOOK_SECONDS)
        streams = list(self._streams)
        if not streams:
            time.sleep(seconds)
            return []
        try:
            ready, _ = self._ray.wait(streams, num_returns=1, timeout=seconds)
            return [(time.monotonic(), self._next(stream)) for stream in ready]
        except self._ray.exceptions.RayError as error:
            raise UserError(
                "a worker of --workers",
                "one that lives until the end",
                _first_line(error),
                "Its clients' states are lost with it. Give workers more memory, or take fewer of them",
            ) from error

    def close(self) -> None:
        """Ends the workers, and Ray if it was started here."""
        self._actors = []  # which ends them where Ray itself stays
        self._connection.close()
        if self._former is not None:
            signal.signal(signal.SIGTERM, self._former)

    def _next(self, stream: Any) -> Message:
        reply, warnings_ = self._ray.get(next(stream))
        for line in warnings_:
            _log.warning("%s", line)
        self._streams[stream] -= 1
        if not self._streams[stream]:
            del self._streams[stream]
        return reply

    def _loaded(self, loading: list[Any]) -> None:
        try:
            reasons = self._ray.get(loading, timeout=_START_SECONDS)
        except self._ray.exceptions.RayError as error:
            raise UserError(
                "Ray's workers",
                f"{self.workers} that start",
                _first_line(error),
                "Try fewer --workers; on other machines fedpriv must be installed in the same version",
            ) from error
        if any(reasons):
            raise UserError(
                "Ray's workers", "the app on every machine", next(filter(None, reasons)), "Put the same folder there"
            )


def _import_ray() -> Any:
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise UserError("--workers", "Ray", f"none ({error})", "Install ray, or leave the option out") from None
    return ray


def _connected(ray: Any, workers: Workers, count: int) -> "Connection":
    """Starts or joins a Ray that has room for the workers."""
    from fedpriv.engines.ray.cluster import connect

    if workers.address:
        _probe(workers.address)
    try:
        connection = connect(workers.address or None, cpus=count)
    except UserError:
        raise
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise UserError("Ray", "one that starts", _first_line(error), "Try without --workers") from None
    try:
        _check_resources(ray, workers, count)
    except BaseException:
        connection.close()
        raise
    return connection


def _leave_on_termination() -> Any:
    """Lets SIGTERM end this process by an exception, so that the workers go first; returns what it did before."""

    def leave(number: int, frame: object) -> None:  # noqa: ARG001
        raise SystemExit(128 + number)

    main_thread = threading.current_thread() is threading.main_thread()
    return signal.signal(signal.SIGTERM, leave) if main_thread else None


def _probe(address: str) -> None:
    """Finds in seconds what Ray finds in minutes: that nobody listens."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        raise UserError(
            "--ray-address", "HOST:PORT or auto", address, "Give the address that `ray start --head` prints"
        )
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            "--ray-address", "a Ray that answers", f"{address}: {error}", "Start one with `ray start --head`"
        ) from None


def _check_resources(ray: Any, workers: Workers, count: int) -> None:
    """Ray would wait for ever for what it does not have."""
    there = ray.cluster_resources()
    if there.get("CPU", 0) < count:
        raise UserError("--workers", f"at most {there.get('CPU', 0):.0f}, a CPU each", count, "Take fewer workers")
    share = workers.gpus_each
    gpus = there.get("GPU", 0)
    fit = math.floor(1 / share) * gpus if 0 < share <= 1 else gpus // share if share else math.inf
    if fit < count:
        raise UserError(
            "--gpus-per-worker",
            f"a share that {count} workers can have",
            f"{share:g} of {gpus:.0f} GPUs",
            "Make the share smaller, or take fewer workers",
        )


def _import_paths() -> list[str]:
    """Where workers find what this process finds, the app's folder aside."""
    here = str(Path(__file__).parents[3])
    return [here, *(path for path in sys.path if path and path != here and Path(path).is_dir())]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")

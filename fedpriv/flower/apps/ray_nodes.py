"""Clients of a Flower app on Ray workers: each process owns some of the clients and their contexts.

Client j belongs to worker j mod K. A context never leaves its worker. A model for many clients is transferred once to
each worker. Replies come back one by one while the worker continues. Ray is imported only when it is used.
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
from types import ModuleType
from typing import TYPE_CHECKING, Any

from flwr.app import Array, Message

from fedpriv.checks import at_least_one
from fedpriv.engines import one_thread
from fedpriv.errors import EngineStartError, UserError
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
    """Workers of a run.

    Args:
        count: Number of processes.
        gpus_each: Share of a GPU for each of them.
        address: `host:port` of a Ray cluster, or `auto`; empty to start Ray on this machine for this run.
    """

    count: int = 1
    gpus_each: float = 0.0
    address: str = ""

    @property
    def need_ray(self) -> bool:
        """True if the run needs more than this process."""
        return self.count > 1 or self.address != ""

    def check(self) -> None:
        """Raise a `UserError` if a value is invalid."""
        at_least_one("--workers", self.count, "Give a number of processes")
        if not (math.isfinite(self.gpus_each) and self.gpus_each >= 0):
            raise UserError("--gpus-per-worker", "0 or more", self.gpus_each, "Give each worker a share, such as 0.25")
        if self.gpus_each and not self.need_ray:
            raise UserError(
                "--gpus-per-worker", "--workers above 1", self.count, "Remove the option: one process sees all GPUs"
            )


class _Worker:
    """Ray actor that plays its share of the clients."""

    def load(self, folder: Path, component: str, population: Population, cwd: str) -> str:
        """Load the ClientApp; return the reason if it cannot be loaded, otherwise an empty string."""
        if Path(cwd).is_dir():
            os.chdir(cwd)
        try:
            self._clients = VirtualClients(import_component(folder, component, "clientapp"), population)
        except UserError as error:
            return f"{socket.gethostname()}: {error}"
        _import_ray().util.register_serializer(Array, serializer=_taken_apart, deserializer=_put_together)
        return ""

    def play(self, messages: list[Message]) -> Iterator[tuple[Message, list[str]]]:
        """Yield the replies of clients, each with the warnings logged for it.

        Messages may share records, so each client gets a copy.
        """
        with one_thread(), _warnings_kept() as warnings_:
            for message in messages:
                yield self._clients.play(copy_message(message)), list(warnings_)
                warnings_.clear()


@contextmanager
def _warnings_kept() -> Iterator[list[str]]:
    """Collect warnings and errors of Flower's logger, because users do not see the log of a worker."""
    kept: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: kept.append(handler.format(record))
    _log.addHandler(handler)
    try:
        yield kept
    finally:
        _log.removeHandler(handler)


def _taken_apart(array: Array) -> tuple[str, tuple[int, ...], str, pickle.PickleBuffer]:
    """Return the parts of an array; Ray copies its bytes directly into shared memory, not first into a pickle."""
    return array.dtype, array.shape, array.stype, pickle.PickleBuffer(array.data)


def _put_together(parts: tuple[str, tuple[int, ...], str, bytes | memoryview]) -> Array:
    dtype, shape, stype, data = parts
    return Array(dtype, shape, stype, bytes(data))


class RayClients:
    """Backend that runs all clients on Ray workers.

    Args:
        folder: Folder of the app, which must exist on every machine.
        component: ClientApp, as `module:attribute`.
        population: Clients of the run.
        workers: Number and resources of the workers.

    Raises:
        UserError: If Ray cannot be reached, lacks resources or cannot load the app. No process is left running.
    """

    def __init__(self, folder: Path, component: str, population: Population, workers: Workers) -> None:
        self.workers = min(workers.count, population.size)
        self._ray = _import_ray()
        self._connection = _connected(self._ray, workers, self.workers)
        self._streams: dict[Iterator[object], int] = {}
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
        """Send each worker its messages, which it starts to process at once."""
        shares: dict[int, list[Message]] = {}
        for message in messages:
            shares.setdefault((message.metadata.dst_node_id - FIRST_NODE) % self.workers, []).append(message)
        for owner, share in shares.items():
            stream = self._actors[owner].play.options(num_returns="streaming").remote(share)
            self._streams[stream] = len(share)

    def advance(self, until: float = -math.inf) -> list[tuple[float, Message]]:
        """Return the available replies, or the first to arrive until a time of the monotonic clock, in seconds.

        Raises:
            UserError: If a worker died, and with it the states of its clients.
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
                "it to run until the end",
                _first_line(error),
                "Give workers more memory, or use fewer; the states of its clients are lost",
            ) from error

    def close(self) -> None:
        """End the workers, and Ray if this object started it."""
        self._actors = []  # ends the actors of a Ray cluster that stays up
        self._connection.close()
        if self._former is not None:
            signal.signal(signal.SIGTERM, self._former)

    def _next(self, stream: Iterator[object]) -> Message:
        reply, warnings_ = self._ray.get(next(stream))
        for line in warnings_:
            _log.warning("%s", line)
        self._streams[stream] -= 1
        if not self._streams[stream]:
            del self._streams[stream]
        return reply

    def _loaded(self, loading: list[object]) -> None:
        try:
            reasons = self._ray.get(loading, timeout=_START_SECONDS)
        except self._ray.exceptions.RayError as error:
            raise UserError(
                "Ray's workers",
                f"{self.workers} to start",
                _first_line(error),
                "Use fewer --workers, and install the same version of fedpriv on all machines",
            ) from error
        if any(reasons):
            raise UserError(
                "Ray's workers", "the app on every machine", next(filter(None, reasons)), "Put the same folder there"
            )


def _import_ray() -> ModuleType:
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise UserError("--workers", "Ray", f"an import error ({error})", "Install ray, or remove the option") from None
    return ray


def _connected(ray: ModuleType, workers: Workers, count: int) -> "Connection":
    """Start Ray or connect to it, and check that it has room for the workers."""
    from fedpriv.engines.ray.cluster import connect

    if workers.address:
        _probe(workers.address)
    try:
        connection = connect(workers.address or None, cpus=count)
    except EngineStartError as error:
        if error.__cause__ is None:
            raise
        raise UserError("Ray", "it to start", _first_line(error.__cause__), "Try without --workers") from None
    try:
        _check_resources(ray, workers, count)
    except BaseException:
        connection.close()
        raise
    return connection


def _leave_on_termination() -> Any:
    """Make SIGTERM end this process by an exception, so that the workers end first; return the previous handler."""

    def leave(number: int, frame: object) -> None:  # noqa: ARG001
        raise SystemExit(128 + number)

    main_thread = threading.current_thread() is threading.main_thread()
    return signal.signal(signal.SIGTERM, leave) if main_thread else None


def _probe(address: str) -> None:
    """Check within seconds that something listens at the address, for which Ray takes minutes."""
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
            "--ray-address", "a Ray cluster that answers", f"{address}: {error}", "Start one with `ray start --head`"
        ) from None


def _check_resources(ray: ModuleType, workers: Workers, count: int) -> None:
    """Check for missing resources, for which Ray would wait forever."""
    there = ray.cluster_resources()
    if there.get("CPU", 0) < count:
        raise UserError("--workers", f"at most {there.get('CPU', 0):.0f}, one per CPU", count, "Use fewer workers")
    share = workers.gpus_each
    gpus = there.get("GPU", 0)
    fit = math.floor(1 / share) * gpus if 0 < share <= 1 else gpus // share if share else math.inf
    if fit < count:
        raise UserError(
            "--gpus-per-worker",
            f"a share for each of {count} workers",
            f"{share:g} of {gpus:.0f} GPUs",
            "Make the share smaller, or use fewer workers",
        )


def _import_paths() -> list[str]:
    """Return the import paths for workers: those of this process, without the app's folder."""
    here = str(Path(__file__).parents[3])
    return [here, *(path for path in sys.path if path and path != here and Path(path).is_dir())]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")

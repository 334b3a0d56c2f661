"""Start a Ray cluster or join a running one, and count the workers that fit on it."""

import contextlib
import gc
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

import ray

from fedpriv.engines.ray import KEPT
from fedpriv.errors import EngineStartError
from fedpriv.files import lock_file

__all__ = ["Connection", "Need", "connect", "quiet", "remove_abandoned", "room"]

# Ray adds some 70 characters to its folder for sockets, and the path of a socket has at most 107.
_MAX_SOCKET_FOLDER = 36
_PROBE_SECONDS = 10.0
_PREFIX = "fedpriv-ray-"
_TIMED_OUT = "timed out during startup"
# Locked while the process that started a Ray lives.
_ALIVE = "alive"
# A folder is made before it is locked.
_ABANDONED_SECONDS = 60.0
# Ends with an error unless a Ray answers.
_PROBE = "import sys, ray; ray._raylet.GcsClient(address=sys.argv[1])"


class Need(NamedTuple):
    """The resources that one worker needs."""

    cpus: float
    gpus: float


class Connection(NamedTuple):
    """The connection of this process to a Ray.

    Args:
        ours: True if `connect` made the connection.
        folder: The folder of a Ray that was started here.
        alive: A lock on that folder.
    """

    ours: bool
    folder: str | None
    alive: TextIO | None = None

    def close(self) -> None:
        """Disconnect, and end a Ray that was started here; one that ran before continues."""
        if self.ours:
            with quiet():
                ray.shutdown()
                gc.collect()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
        if self.alive is not None:
            self.alive.close()


def connect(address: str | None, store_bytes: int | None = None, cpus: int | None = None) -> Connection:
    """Use the Ray of this process; without one, join the Ray at `address`; without an address, start a local Ray.

    No other function of fedpriv starts or joins a Ray. Within `one_ray`, that context closes the connection.

    Args:
        address: HOST:PORT as `ray start --head` prints it, or `auto` for one on this machine; None to start one.
        store_bytes: Memory for shared objects of a Ray that is started; None for Ray's default.
        cpus: Number of cores of a Ray that is started; None for all cores of the machine.

    Raises:
        EngineStartError: If there is no Ray at `address`, its version differs, or a new one does not start.
    """
    if ray.is_initialized():
        return Connection(ours=False, folder=None)
    made, keeper = _made(address, store_bytes, cpus), KEPT.get()
    if keeper is None:
        return made
    keeper.callback(made.close)
    return Connection(ours=False, folder=None)


def _made(address: str | None, store_bytes: int | None, cpus: int | None) -> Connection:
    if address is not None:
        _join(address)
        return Connection(ours=True, folder=None)
    remove_abandoned(Path(_short_folder()))
    folder = tempfile.mkdtemp(prefix=_PREFIX, dir=_short_folder())
    alive = (Path(folder) / _ALIVE).open("w")
    lock_file(alive)
    try:
        with quiet(), _environment(RAY_USAGE_STATS_ENABLED="0"):
            ray.init(
                address="local",
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                num_cpus=cpus,
                object_store_memory=store_bytes,
                _temp_dir=folder,
            )
            gc.collect()  # collects files that Ray left open, while warnings are off
    except BaseException as error:
        Connection(ours=True, folder=folder, alive=alive).close()
        if not isinstance(error, Exception):
            raise
        raise _not_started(error) from error
    return Connection(ours=True, folder=folder, alive=alive)


def _not_started(error: Exception) -> EngineStartError:
    if _TIMED_OUT in str(error):
        remedy = "Run again while the computer has less to do, or use another engine"
        return EngineStartError("--engine", "Ray to start within 30 seconds", "a computer that takes longer", remedy)
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300].rstrip(".")
    return EngineStartError("--engine", "a Ray that starts", reason, "Use another engine, or reinstall Ray")


def remove_abandoned(place: Path) -> None:
    """Remove the folders of Rays started by processes that were killed; Ray's processes have ended with those."""
    for file in place.glob(f"{_PREFIX}*/{_ALIVE}"):
        try:
            if time.time() - file.stat().st_mtime < _ABANDONED_SECONDS:
                continue
            with file.open("r+") as alive:
                lock_file(alive, wait=False)
                shutil.rmtree(file.parent, ignore_errors=True)
        except OSError:  # in use, owned by another user, or removed
            continue


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress the warnings of Ray's code: files left to the garbage collector, and announced changes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def room(needs: Sequence[Need]) -> int:
    """Return the number of workers, counted from the first, that fit on the live machines if nothing else runs."""
    free = [
        [node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0)] for node in ray.nodes() if node["Alive"]
    ]
    for placed, need in enumerate(needs):
        node = next((n for n in free if all(f >= w - 1e-6 for f, w in zip(n, need, strict=True))), None)
        if node is None:
            return placed
        node[0] -= need.cpus
        node[1] -= need.gpus
    return len(needs)


def _join(address: str) -> None:
    reason = None
    if address != "auto":
        host, _, port = address.rpartition(":")
        if "/" in address or not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise _no_ray(address, "HOST:PORT of a running Ray", repr(address))
        reason = _probe(host, int(port), address)
    if reason is None:
        with quiet(), _environment(RAY_USAGE_STATS_ENABLED="0"):
            try:
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
                gc.collect()
                return
            except Exception as error:
                reason = " ".join(str(error).split())[:300].rstrip(".")
    raise _no_ray(address, "a running Ray of the same version", reason)


def _probe(host: str, port: int, address: str) -> str | None:
    """Return the reason why there is no Ray, or None if one answers. Ray would try for minutes and end the process."""
    try:
        socket.create_connection((host, port), timeout=_PROBE_SECONDS).close()
    except OSError as error:
        return f"a failed connection ({error.strerror or error})"
    try:
        done = subprocess.run([sys.executable, "-c", _PROBE, address], capture_output=True, timeout=_PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        return "an answer that is not Ray's"
    if done.returncode and b"AttributeError" not in done.stderr:
        return "an answer that is not Ray's"
    return None


def _no_ray(address: str, expected: str, got: str) -> EngineStartError:
    remedy = "Start one with `ray start --head` and give the address that it prints, or omit it to use this machine"
    return EngineStartError(f"Ray at {address}", expected, got, remedy)


def _short_folder() -> str:
    folder = tempfile.gettempdir()
    return folder if len(folder) + len("/fedpriv-ray-12345678") <= _MAX_SOCKET_FOLDER else "/tmp"


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Set environment variables within the context."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value

"""Starting a Ray of one's own, or joining one that is there; and what fits on it."""

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

from fedpriv.errors import UserError
from fedpriv.files import lock_file

__all__ = ["Connection", "Need", "connect", "quiet", "remove_abandoned", "room"]

# Ray puts sockets some 70 characters below its folder, and a socket's path has at most 107.
_LONGEST_FOR_SOCKETS = 36
_PROBE_SECONDS = 10.0
_PREFIX = "fedpriv-ray-"
# Locked for as long as the process that started a Ray lives.
_ALIVE = "alive"
# A folder is made before it is locked.
_ABANDONED_SECONDS = 60.0
# Ends with an error unless a Ray answers.
_PROBE = "import sys, ray; ray._raylet.GcsClient(address=sys.argv[1])"


class Need(NamedTuple):
    """What one worker needs of its machine."""

    cpus: float
    gpus: float


class Connection(NamedTuple):
    """How this process is tied to a Ray: whether it was tied here; of one started here its folder and a lock on it."""

    ours: bool
    folder: str | None
    alive: TextIO | None = None

    def close(self) -> None:
        """Unties it, and ends a Ray that was started here; one that was there before stays as it is."""
        if self.ours:
            with quiet():
                ray.shutdown()
                gc.collect()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
        if self.alive is not None:
            self.alive.close()


def connect(address: str | None, store_bytes: int | None = None, cpus: int | None = None) -> Connection:
    """Uses the Ray that this process has, else joins the one at `address`, else starts one on this machine.

    Nothing else in fedpriv starts or joins a Ray.

    Args:
        address: HOST:PORT as `ray start --head` prints it, or `auto` for one on this machine; None for one's own.
        store_bytes: Room for shared objects in a Ray of one's own; None for Ray's own choice.
        cpus: How many cores a Ray of one's own says it has; None for as many as there are.

    Raises:
        UserError: If there is no Ray at `address`, or another version of it.
    """
    if ray.is_initialized():
        return Connection(ours=False, folder=None)
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
            gc.collect()  # files that it opened and let go of, while nobody complains of them
    except BaseException:
        Connection(ours=True, folder=folder, alive=alive).close()
        raise
    return Connection(ours=True, folder=folder, alive=alive)


def remove_abandoned(place: Path) -> None:
    """Removes the folders of Rays whose process was killed before it could; Ray's own processes end with it."""
    for file in place.glob(f"{_PREFIX}*/{_ALIVE}"):
        try:
            if time.time() - file.stat().st_mtime < _ABANDONED_SECONDS:
                continue
            with file.open("r+") as alive:
                lock_file(alive, wait=False)
                shutil.rmtree(file.parent, ignore_errors=True)
        except OSError:  # in use, another's, or gone
            continue


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of Ray's own code: files that it leaves to the collector, and its plans."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def room(needs: Sequence[Need]) -> int:
    """How many of the workers, from the first on, find a place on the machines that are alive if nobody else is."""
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
            except (RuntimeError, ConnectionError, ValueError) as error:
                reason = " ".join(str(error).split())[:300].rstrip(".")
    raise _no_ray(address, "a running Ray of the same version", reason)


def _probe(host: str, port: int, address: str) -> str | None:
    """Why there is no Ray, or None if one answers. Ray itself would try for minutes, and then end the process."""
    try:
        socket.create_connection((host, port), timeout=_PROBE_SECONDS).close()
    except OSError as error:
        return f"no answer ({error.strerror or error})"
    try:
        done = subprocess.run([sys.executable, "-c", _PROBE, address], capture_output=True, timeout=_PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        return "an answer that is not Ray's"
    if done.returncode and b"AttributeError" not in done.stderr:
        return "an answer that is not Ray's"
    return None


def _no_ray(address: str, expected: str, got: str) -> UserError:
    remedy = "Start one with `ray start --head`, give the address that it prints, or leave it out to use this machine"
    return UserError(f"Ray at {address}", expected, got, remedy)


def _short_folder() -> str:
    folder = tempfile.gettempdir()
    return folder if len(folder) + len("/fedpriv-ray-12345678") <= _LONGEST_FOR_SOCKETS else "/tmp"


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Sets variables of the environment for a while."""
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

"""Flower's processes of a node or server, forked from it, so that they do not import PyTorch and Flower again.

Flower starts a SuperExec, which starts a process for every message or run. Here, the node or server forks the SuperExec
before it has threads. The SuperExec waits for its command, and then forks the process of `companion.fork_apps`.
Both end with the node or server.
"""

import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import IO

from fedpriv.flower import companion
from fedpriv.flower.companion import AHEAD, QUIET, SUPEREXEC, entry_of, fork_apps, run

__all__ = ["ForkedProcess", "forked_ahead"]

_OURS = ("clients", "fedpriv", "strategies")
_POLL_SECONDS = 0.02


class ForkedProcess:
    """Child of this process, with the part of the interface of `subprocess.Popen` that Flower and nodes use.

    Attributes:
        pid: Its number.
        returncode: Its exit code, or minus the number of the signal that ended it; None while it runs.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._lock = threading.Lock()

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs."""
        with self._lock:
            if self.returncode is None:
                try:
                    ended, status = os.waitpid(self.pid, os.WNOHANG)
                except ChildProcessError:  # signals of ended children are ignored, and its code is lost
                    self.returncode = 0
                else:
                    self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it has ended, and return the exit code.

        Args:
            timeout: Seconds; None for no limit.

        Raises:
            subprocess.TimeoutExpired: If it has not ended by then.
        """
        if timeout is None:
            with suppress(ChildProcessError):  # it was waited for
                os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        until = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if until is not None and time.monotonic() > until:
                raise subprocess.TimeoutExpired(SUPEREXEC, timeout or 0.0)
            time.sleep(_POLL_SECONDS)
        return code

    def terminate(self) -> None:
        """Send it the signal SIGTERM."""
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        """Send it the signal SIGKILL."""
        self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)


class _Ahead:
    """A forked SuperExec that waits for its command."""

    def __init__(self, process: ForkedProcess, orders: IO[bytes]) -> None:
        self._process = process
        self._orders = orders

    def start(self, command: Sequence[str], *, start_new_session: bool = False) -> ForkedProcess:
        """Start it, in place of `subprocess.Popen`."""
        order = {"command": list(command), "environment": dict(os.environ), "session": start_new_session}
        try:
            self._orders.write(f"{json.dumps(order)}\n".encode())
        except OSError:  # it was killed
            self._process.poll()
            raise
        return self._process

    def close(self) -> None:
        """Let it end if it has no command yet."""
        self._orders.close()


@contextmanager
def forked_ahead(lock: Path, prepared: Sequence[str], shared: Sequence[str] = (), *, foreign: bool) -> Iterator[None]:
    """Fork Flower's SuperExec, to be started by `starting_companions` in the block; it forks the process of its apps.

    On other systems than Linux, in a process with threads, and if the system allows no more processes, nothing is
    forked, and the processes are started when Flower needs them.

    Args:
        lock: See `companion.companion_of`.
        prepared: The program of the apps, and modules that they may import before they are known.
        shared: Modules to import before the fork, because this process needs them, too.
        foreign: Whether an app may have packages of fedpriv's names, so that this process's are forgotten.
    """
    ahead = _fork_ahead(str(lock), prepared, shared, foreign=foreign) if sys.platform == "linux" else None
    if ahead is not None:
        AHEAD[SUPEREXEC] = ahead.start
    try:
        yield
    finally:
        if ahead is not None:
            AHEAD.pop(SUPEREXEC, None)
            ahead.close()


def _fork_ahead(lock: str, prepared: Sequence[str], shared: Sequence[str], *, foreign: bool) -> _Ahead | None:
    os.environ.update(QUIET)  # Flower reads them at import
    for module in shared:
        importlib.import_module(module)
    entry_of(SUPEREXEC)
    if threading.active_count() > 1:
        return None
    reading, writing = os.pipe()

    def wait_and_run() -> None:
        os.close(writing)
        with os.fdopen(reading, "rb") as orders:
            _wait_and_run(orders, lock, prepared, foreign=foreign)

    try:
        process = ForkedProcess(_forked(wait_and_run))
    except OSError:
        os.close(reading)
        os.close(writing)
        return None
    os.close(reading)
    return _Ahead(process, os.fdopen(writing, "wb", buffering=0))


def _forked(job: Callable[[], object]) -> int:
    """Fork a process that does a job and then ends as any program of Python does; return its number.

    Raises:
        SystemExit: In the new process, at its end.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        if pid := os.fork():
            return pid
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the node, too, which closes the input
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    try:
        job()
    except SystemExit:
        raise
    except BaseException as error:  # as Python reports it at the end of a program
        sys.excepthook(type(error), error, error.__traceback__)
        raise SystemExit(130 if isinstance(error, KeyboardInterrupt) else 1) from None
    sys.exit(0)


def _wait_and_run(orders: IO[bytes], lock: str, prepared: Sequence[str], *, foreign: bool) -> None:
    """Wait for the command of Flower's SuperExec; fork the process that forks apps, and run the command."""
    line = orders.readline()
    orders.close()
    if not line.endswith(b"\n"):  # the node has ended
        return
    order = json.loads(line)
    os.environ.clear()
    os.environ.update(order["environment"])
    if order["session"]:
        os.setsid()
    if not sys.flags.safe_path:
        del sys.path[0]  # the folder of the command, or the current one
    reading, writing = os.pipe()
    _forked(lambda: _fork_apps(reading, writing, lock, prepared, foreign=foreign))
    os.close(reading)
    _name(SUPEREXEC)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with os.fdopen(writing, "wb", buffering=0) as requests:
        run(lock, order["command"], requests)


def _fork_apps(reading: int, writing: int, lock: str, prepared: Sequence[str], *, foreign: bool) -> None:
    os.close(writing)
    os.dup2(reading, 0)
    os.close(reading)
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    _name("fork-apps")
    # Workers of an app that multiprocessing spawns load the file of this module again.
    sys.modules["__main__"] = main = ModuleType("__main__")
    main.__file__ = companion.__file__
    if foreign:
        _forget_ours()
    fork_apps(lock, *prepared)


def _forget_ours() -> None:
    """Undo the imports of fedpriv, and the settings of Python that they and the command have made."""
    for name in [name for name in sys.modules if name.partition(".")[0] in _OURS]:
        del sys.modules[name]
    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__module__.partition(".")[0] not in _OURS]
    logging.getLogger("fedpriv").handlers.clear()
    sys.excepthook = sys.__excepthook__


def _name(name: str) -> None:
    """Give this process a name of at most 15 bytes, for `ps` and `top`."""
    with suppress(OSError):
        Path("/proc/self/comm").write_text(name[:15])

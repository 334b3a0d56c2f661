"""Flower's processes of a node or server, forked from it, so that they do not import PyTorch and Flower again.

Flower starts a SuperExec, which starts a process for every message or run. Here, the node or server forks the SuperExec
before it has threads. The SuperExec waits for its command, and then forks the process of `companion.fork_apps`.
Both end with the node or server.
"""

import atexit
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, NoReturn

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
                ended, status = os.waitpid(self.pid, os.WNOHANG)
                if ended:
                    self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it has ended, and return the exit code.

        Args:
            timeout: Seconds; None for no limit.

        Raises:
            subprocess.TimeoutExpired: If it has not ended by then.
        """
        if timeout is None:
            with suppress(ChildProcessError):  # another thread was faster
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
            os.kill(self.pid, number)


@contextmanager
def forked_ahead(lock: Path, prepared: Sequence[str], shared: Sequence[str] = (), *, foreign: bool) -> Iterator[None]:
    """Fork Flower's SuperExec, to be started by `starting_companions` in the block; it forks the process of its apps.

    On other systems than Linux, and in a process with threads, nothing is forked, and the processes are started when
    Flower needs them.

    Args:
        lock: See `companion.companion_of`.
        prepared: The program of the apps, and modules that they may import before they are known.
        shared: Modules to import before the fork, because this process needs them, too.
        foreign: Whether an app may have packages of fedpriv's names, so that this process's are forgotten.
    """
    if sys.platform != "linux" or threading.active_count() > 1:
        yield
        return
    os.environ.update(QUIET)  # Flower reads them at import
    for module in shared:
        importlib.import_module(module)
    entry_of(SUPEREXEC)
    reading, writing = os.pipe()

    def wait_and_run() -> None:
        os.close(writing)
        with os.fdopen(reading, "rb") as orders:
            _wait_and_run(orders, str(lock), prepared, foreign=foreign)

    process = ForkedProcess(_forked(wait_and_run))
    os.close(reading)
    with os.fdopen(writing, "wb", buffering=0) as orders:

        def start(command: Sequence[str], *, start_new_session: bool = False) -> ForkedProcess:
            order = {"command": list(command), "environment": dict(os.environ), "session": start_new_session}
            orders.write(f"{json.dumps(order)}\n".encode())
            return process

        AHEAD[SUPEREXEC] = start
        try:
            yield
        finally:
            AHEAD.pop(SUPEREXEC, None)


def _forked(job: Callable[[], object]) -> int:
    """Fork a process that does a job and exits; return its number."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _do_and_exit(job)
    return pid


def _do_and_exit(job: Callable[[], object]) -> NoReturn:
    """Do a job in a new process, and end it as Python ends, without anything that its parent registered for its end."""
    atexit._clear()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the node, too, which closes the input
    code = 1
    try:
        job()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:  # as Python reports it
        traceback.print_exc()
    finally:
        with suppress(BaseException):
            threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _wait_and_run(orders: IO[bytes], lock: str, prepared: Sequence[str], *, foreign: bool) -> None:
    """Wait for the command of Flower's SuperExec; fork the process that forks apps, and run the command."""
    line = orders.readline()
    if not line:
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
    if foreign:
        for name in [name for name in sys.modules if name.partition(".")[0] in _OURS]:
            del sys.modules[name]
    fork_apps(lock, *prepared)


def _name(name: str) -> None:
    """Give this process a name of at most 15 bytes, for `ps` and `top`."""
    with suppress(OSError):
        Path("/proc/self/comm").write_text(name[:15])

"""Program that runs one of Flower's programs and ends with the node or server that started it.

    python -P companion.py LOCK PROGRAM [ARGUMENTS ...]

The node or server holds the lock of the file LOCK. The operating system releases the lock when that process ends, even
if it is killed, and the companion then ends at once. Flower's own programs only poll for a process of a given number,
and miss the answer while they wait for a server that is gone.

The program is run by its path and imports nothing from fedpriv: the app that it loads may have packages of those names.

Flower starts a process for every message to a ClientApp, and for every run's ServerApp, and each would import PyTorch
and Flower again. On Linux, they are therefore forked by a process that imports both once. If the node or server names
the program in the environment (`PREPARED`), that process starts with it; otherwise, with the first message.
"""

import contextlib
import importlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

__all__ = ["ALIVE", "LOCK", "PREPARED", "companion_of", "end_with", "starting_companions"]

LOCK = "lock"
"""Name of the file, in the folder of Flower's files, that a node or server locks while it runs."""

ALIVE = "alive"
"""Name of the file, in the same folder, that a node touches when the server has answered it."""
PREPARED = "FEDPRIV_PREPARED"
"""Environment variable: the program to fork, then modules that it may import before its app is known."""

_CLIENT_APP = "flwr-clientapp"
_FORKING = "fork-client-apps"


def companion_of(lock: str, command: Sequence[str]) -> list[str]:
    """Return the command that runs one of Flower's programs until the lock is released."""
    return [sys.executable, "-P", __file__, lock, *command]


def starting_companions(
    lock: str, started: Callable[[str, subprocess.Popen[bytes]], None] = lambda *_: None
) -> SimpleNamespace:
    """Return a stand-in for the module `subprocess` that starts Flower's programs as companions.

    Args:
        lock: See `companion_of`.
        started: Called with each program's name and its process.
    """

    def start(command: Sequence[str], **options: Any) -> "subprocess.Popen[bytes]":
        process: Any = subprocess.Popen(companion_of(lock, command), **options)
        started(command[0], process)
        return process

    return SimpleNamespace(**{**vars(subprocess), "Popen": start})


class ForkedApps:
    """Starts processes of Flower's apps by forking one that has imported PyTorch and Flower.

    Args:
        lock: See `companion_of`.
        program: Program of the processes.
        modules: Modules that the first process imports, too.
    """

    def __init__(self, lock: str, program: str = _CLIENT_APP, modules: Sequence[str] = ()) -> None:
        self.program = program
        self._lock = lock
        self._modules = modules
        self._parent: subprocess.Popen[bytes] | None = None

    def prepare(self) -> None:
        """Start the process that imports and forks, unless it runs."""
        if self._parent is None:
            parent = companion_of(self._lock, [_FORKING, self.program, *self._modules])
            self._parent = subprocess.Popen(parent, stdin=subprocess.PIPE, bufsize=0)

    def start(self, command: Sequence[str], **options: Any) -> None:
        """Start a process that runs `command` and ends by itself; only the absence of output is an option."""
        request = json.dumps({"command": list(command), "quiet": options.get("stdout") == subprocess.DEVNULL})
        try:
            self._send(request)
        except OSError:  # the process was killed
            self._parent = None
            self._send(request)

    def _send(self, request: str) -> None:
        self.prepare()
        assert self._parent is not None
        assert self._parent.stdin is not None
        self._parent.stdin.write(f"{request}\n".encode())


def fork_apps(lock: str, program: str = _CLIENT_APP, *modules: str) -> None:
    """Fork a process for each line of the standard input; return in each of them, and exit at the end of the input.

    Args:
        lock: See `companion_of`.
        program: Program of the processes, which is imported.
        modules: Other modules to import, if they are installed.
    """
    _entry(program)
    for name in ("torch", "scipy.special", "pydantic", *modules):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the node, too, which closes the input
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the processes are not waited for
    while line := sys.stdin.readline():
        sys.stdout.flush()
        sys.stderr.flush()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            request = json.loads(line)
            null = os.open(os.devnull, os.O_RDWR)
            for descriptor in (0, 1, 2) if request["quiet"] else (0,):
                os.dup2(null, descriptor)
            run(lock, request["command"])
    sys.exit(0)


def end_with(lock: str) -> None:
    """Kill this process as soon as the lock is released."""
    import fcntl  # Windows has none, and reads results without

    def wait() -> None:
        with Path(lock).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def main(arguments: Sequence[str]) -> None:
    """Run one of Flower's programs in this process, or fork processes for ClientApps."""
    lock, *command = arguments
    if command[0] == _FORKING:
        fork_apps(lock, *command[1:])
    run(lock, command)


def run(lock: str, command: Sequence[str]) -> None:
    """Run one of Flower's programs, which end with the lock, and exit."""
    end_with(lock)
    threading.excepthook = _one_line_for_refused_heartbeats
    if command[0] == "flower-superexec":
        executor: Any = importlib.import_module("flwr.supercore.superexec.executor.subprocess_executor")
        executor.subprocess = _for_superexec(lock)
    sys.argv = list(command)
    sys.exit(_entry(command[0])())


def _one_line_for_refused_heartbeats(raised: threading.ExceptHookArgs) -> None:
    """Say in one line that a node's heartbeat failed, as it does once the server has removed the node."""
    files = (Path(frame.filename) for frame in traceback.extract_tb(raised.exc_traceback))
    if any(file.parts[-2:] == ("supercore", "heartbeat.py") for file in files):
        message = str(raised.exc_value).partition("\n")[0]
        print(f"fedpriv: the server did not accept a heartbeat: {message}", file=sys.stderr)
    else:
        threading.__excepthook__(raised)


def _for_superexec(lock: str) -> Any:
    companions = starting_companions(lock)
    if sys.platform != "linux":
        return companions
    program, *modules = os.environ.get(PREPARED, "").split() or [_CLIENT_APP]
    forked, others = ForkedApps(lock, program, modules), companions.Popen
    if PREPARED in os.environ:
        forked.prepare()

    def start(command: Sequence[str], **options: Any) -> Any:
        return (forked.start if command[0] == forked.program else others)(command, **options)

    return SimpleNamespace(**{**vars(companions), "Popen": start})


def _entry(program: str) -> Callable[[], Any]:
    """Return the function behind one of Flower's programs."""
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name=program)
    return entry.load()


if __name__ == "__main__":
    main(sys.argv[1:])

"""Program that runs one of Flower's programs and ends with the node or server that started it.

    python -P companion.py LOCK PROGRAM [ARGUMENTS ...]

The node or server holds the lock of the file LOCK. The operating system releases the lock when that process ends, even
if it is killed, and the companion then ends at once. Flower's own programs only poll for a process of a given number,
and miss the answer while they wait for a server that is gone.

The program is run by its path and imports nothing from fedpriv: the app that it loads may have packages of those names.
A process that a node or server forked forgets its imports of them before it loads such an app.

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
from typing import IO, Any

__all__ = [
    "AHEAD",
    "ALIVE",
    "LOCK",
    "PREPARED",
    "QUIET",
    "SUPEREXEC",
    "ForkedApps",
    "companion_of",
    "end_with",
    "entry_of",
    "fork_apps",
    "run",
    "starting_companions",
]

LOCK = "lock"
"""Name of the file, in the folder of Flower's files, that a node or server locks while it runs."""

ALIVE = "alive"
"""Name of the file, in the same folder, that a node touches when the server has answered it."""
PREPARED = "FEDPRIV_PREPARED"
"""Environment variable: the program to fork, then modules that it may import before its app is known."""

AHEAD: dict[str, Callable[..., Any]] = {}
"""How to start a program of which this process has forked one ahead, by name; each can be started once."""

QUIET = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Environment variables that keep Flower's processes from calling other servers and installing packages."""

SUPEREXEC = "flower-superexec"
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
        process: Any = None
        if command[0] in AHEAD:
            with contextlib.suppress(OSError):  # it was killed
                process = AHEAD.pop(command[0])(command, **options)
        if process is None:
            process = subprocess.Popen(companion_of(lock, command), **options)
        started(command[0], process)
        return process

    return SimpleNamespace(**{**vars(subprocess), "Popen": start})


class ForkedApps:
    """Starts processes of Flower's apps by forking one that has imported PyTorch and Flower.

    Args:
        lock: See `companion_of`.
        program: Program of the processes.
        modules: Modules that the first process imports, too.
        requests: Input of a process that runs `fork_apps`; None to start one.
    """

    def __init__(
        self,
        lock: str,
        program: str = _CLIENT_APP,
        modules: Sequence[str] = (),
        requests: IO[bytes] | None = None,
    ) -> None:
        self.program = program
        self._lock = lock
        self._modules = modules
        self._requests = requests
        self._parent: subprocess.Popen[bytes] | None = None

    def prepare(self) -> None:
        """Start the process that imports and forks, unless it runs."""
        if self._requests is None:
            parent = companion_of(self._lock, [_FORKING, self.program, *self._modules])
            self._parent = subprocess.Popen(parent, stdin=subprocess.PIPE, bufsize=0)
            self._requests = self._parent.stdin

    def start(self, command: Sequence[str], **options: Any) -> None:
        """Start a process that runs `command` and ends by itself; only the absence of output is an option."""
        request = json.dumps({"command": list(command), "quiet": options.get("stdout") == subprocess.DEVNULL})
        try:
            self._send(request)
        except OSError:  # the process was killed
            self._requests = None
            self._send(request)

    def _send(self, request: str) -> None:
        self.prepare()
        assert self._requests is not None
        self._requests.write(f"{request}\n".encode())
        self._requests.flush()


def fork_apps(lock: str, program: str = _CLIENT_APP, *modules: str) -> None:
    """Fork a process for each line of the standard input; return in each of them, and exit at the end of the input.

    Args:
        lock: See `companion_of`.
        program: Program of the processes, which is imported.
        modules: Other modules to import, if they are installed.
    """
    entry_of(program)
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


def run(lock: str, command: Sequence[str], requests: IO[bytes] | None = None) -> None:
    """Run one of Flower's programs, which end with the lock, and exit.

    Args:
        lock: See `companion_of`.
        command: Name of the program, and its arguments.
        requests: For Flower's SuperExec, see `ForkedApps`.
    """
    end_with(lock)
    threading.excepthook = _one_line_for_refused_heartbeats
    if command[0] == SUPEREXEC:
        executor: Any = importlib.import_module("flwr.supercore.superexec.executor.subprocess_executor")
        executor.subprocess = _for_superexec(lock, requests)
    sys.argv = list(command)
    sys.exit(entry_of(command[0])())


def _one_line_for_refused_heartbeats(raised: threading.ExceptHookArgs) -> None:
    """Say in one line that a node's heartbeat failed, as it does once the server has removed the node."""
    files = (Path(frame.filename) for frame in traceback.extract_tb(raised.exc_traceback))
    if any(file.parts[-2:] == ("supercore", "heartbeat.py") for file in files):
        message = str(raised.exc_value).partition("\n")[0]
        print(f"fedpriv: the server did not accept a heartbeat: {message}", file=sys.stderr)
    else:
        threading.__excepthook__(raised)


def _for_superexec(lock: str, requests: IO[bytes] | None = None) -> Any:
    companions = starting_companions(lock)
    if sys.platform != "linux":
        return companions
    program, *modules = os.environ.get(PREPARED, "").split() or [_CLIENT_APP]
    forked, others = ForkedApps(lock, program, modules, requests), companions.Popen
    if PREPARED in os.environ:
        forked.prepare()

    def start(command: Sequence[str], **options: Any) -> Any:
        return (forked.start if command[0] == forked.program else others)(command, **options)

    return SimpleNamespace(**{**vars(companions), "Popen": start})


def entry_of(program: str) -> Callable[[], Any]:
    """Return the function behind one of Flower's programs."""
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name=program)
    return entry.load()


if __name__ == "__main__":
    main(sys.argv[1:])

"""Program that runs one of Flower's programs and ends with the node or server that started it.

    python -P companion.py LOCK PROGRAM [ARGUMENTS ...]

The node or server holds the lock of the file LOCK. The operating system releases the lock when that process ends, even
if it is killed, and the companion then ends at once. Flower's own programs only poll for a process of a given number,
and miss the answer while they wait for a server that is gone.

The program is run by its path and imports nothing from fedpriv: the app that it loads may have packages of those names.
"""

import importlib
import importlib.metadata
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

__all__ = ["LOCK", "companion_of", "end_with", "starting_companions"]

LOCK = "lock"
"""Name of the file, in the folder of Flower's files, that a node or server locks while it runs."""


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

    def start(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        process: Any = subprocess.Popen(companion_of(lock, command), **options)
        started(command[0], process)
        return process

    return SimpleNamespace(**{**vars(subprocess), "Popen": start})


def end_with(lock: str) -> None:
    """Kill this process as soon as the lock is released."""
    import fcntl  # Windows has none, and reads results without

    def wait() -> None:
        with Path(lock).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def main(arguments: Sequence[str]) -> None:
    """Run one of Flower's programs in this process."""
    lock, program, *rest = arguments
    end_with(lock)
    if program == "flower-superexec":
        executor: Any = importlib.import_module("flwr.supercore.superexec.executor.subprocess_executor")
        executor.subprocess = starting_companions(lock)
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name=program)
    sys.argv = [program, *rest]
    sys.exit(entry.load()())


if __name__ == "__main__":
    main(sys.argv[1:])

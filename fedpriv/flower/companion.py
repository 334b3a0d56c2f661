"""One of Flower's programs, which ends with the node or server that it works for, however that ends.

    python -P companion.py LOCK PROGRAM [ARGUMENTS ...]

The node or server holds the file LOCK. The operating system lets go of it when that process is gone, also when it was
killed and could tell nobody; whoever waits for the file then ends at once. Flower's own programs ask every now and then
whether a process of that number is there, and do not hear the answer while they wait for the server that is gone.

It is run by its path and imports nothing of fedpriv: the app that the program loads may have packages of those names.
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
"""The name of the file, in the folder of Flower's files, that a node or server holds while it runs."""


def companion_of(lock: str, command: Sequence[str]) -> list[str]:
    """Return the command that runs one of Flower's programs until nobody holds `lock`."""
    return [sys.executable, "-P", __file__, lock, *command]


def starting_companions(lock: str, started: Callable[[str, subprocess.Popen[bytes]], None] = lambda *_: None) -> Any:
    """Return a stand-in for the module `subprocess` that starts Flower's programs as companions.

    Args:
        lock: See `companion_of`.
        started: Called with each program's name and its process.
    """

    def start(command: Sequence[str], **options: Any) -> Any:
        process: Any = subprocess.Popen(companion_of(lock, command), **options)
        started(command[0], process)
        return process

    return SimpleNamespace(**{**vars(subprocess), "Popen": start})


def end_with(lock: str) -> None:
    """Ends this process, whatever it is doing, once nobody holds `lock` any more."""
    import fcntl  # Windows has none, and reads results without

    def wait() -> None:
        with Path(lock).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def main(arguments: Sequence[str]) -> None:
    """Runs a program of Flower's in this process."""
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

"""A process that does one job after the other, started by `local_jobs`; it ends when what started it does."""

import os
import sys
import threading
from multiprocessing.connection import Connection

from fedpriv.sweeps.jobs import call

__all__ = ["main"]


def main(connection: int, life: int) -> None:
    """Takes jobs until there are none.

    Args:
        connection: File descriptor that jobs come from, and answers go to.
        life: One that nothing comes from until the other side has ended, however it did.
    """
    threading.Thread(target=_end_with, args=(life,), daemon=True).start()
    jobs = Connection(connection)
    while True:
        try:
            function, arguments = jobs.recv()
        except EOFError:
            return
        except Exception as error:  # what it names cannot be imported here
            jobs.send(RuntimeError(f"{type(error).__name__}: {error}"))
            continue
        jobs.send(call(function, arguments))


def _end_with(life: int) -> None:
    os.read(life, 1)
    os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))

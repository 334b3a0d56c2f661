"""A process that runs jobs in turn, started by `local_jobs`; it ends when its parent ends."""

import os
import sys
import threading
from multiprocessing.connection import Connection

from fedpriv.sweeps.jobs import call

__all__ = ["main"]


def main(connection: int, life: int) -> None:
    """Run jobs until the connection closes.

    Args:
        connection: File descriptor that receives jobs and sends results.
        life: File descriptor that becomes readable only when the parent ends, for any reason.
    """
    threading.Thread(target=_end_with, args=(life,), daemon=True).start()
    jobs = Connection(connection)
    while True:
        try:
            function, arguments = jobs.recv()
        except EOFError:
            return
        except Exception as error:  # the job cannot be imported here
            jobs.send(RuntimeError(f"{type(error).__name__}: {error}"))
            continue
        jobs.send(call(function, arguments))


def _end_with(life: int) -> None:
    os.read(life, 1)
    os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))

"""Functions side by side in processes of this machine, without Ray, which takes seconds to start and cores to run."""

import os
import pickle
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Generator, Iterable
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any

from fedpriv.sweeps.jobs import Began, Ended, Job, JobDied

__all__ = ["side_by_side"]

# Between two signs of life to whoever shows what goes on; an end is seen at once.
_WAIT_SECONDS = 0.5
_END_SECONDS = 10.0


def side_by_side(jobs: Iterable[Job], at_once: int, *, threads: int = 1) -> Generator[Began | Ended | None]:
    """Runs jobs as processes become free. A process does one job after the other, so that it imports once.

    Args:
        jobs: In the order in which they begin.
        at_once: Most at a time.
        threads: Of OpenMP in each process.

    Yields:
        What happens; None whenever nothing has for a moment.
    """
    waiting, idle = deque(jobs), []
    busy: dict[Connection, tuple[_Worker, Job]] = {}

    def hand_out() -> list[Began | Ended]:
        began = []
        while waiting and len(busy) < at_once:
            worker, job = idle.pop() if idle else _Worker(threads), waiting.popleft()
            if not worker.give(job):  # it died with nothing to do
                worker = _Worker(threads)
                worker.give(job)
            busy[worker.connection] = (worker, job)
            began.append(Began(job.name))
        return began

    try:
        events = hand_out()
        while events or busy:
            yield from events or [None]
            ended: list[Began | Ended] = []
            for connection in wait(list(busy), timeout=_WAIT_SECONDS):
                assert isinstance(connection, Connection)
                worker, job = busy.pop(connection)
                result = worker.answer()
                ended.append(Ended(job.name, result))
                if not isinstance(result, JobDied):
                    idle.append(worker)
            events = ended + hand_out()
    finally:
        for worker in (*idle, *(worker for worker, _ in busy.values())):
            worker.end()


class _Worker:
    """A process that waits for jobs. Its own group, so that Ctrl-C is this process's to deal with."""

    def __init__(self, threads: int) -> None:
        self.connection, theirs = Pipe()
        life, self._life = os.pipe()
        names = [str(theirs.fileno()), str(life)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fedpriv.sweeps.local_worker", *names],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(), life),
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            process_group=0,
        )
        theirs.close()
        os.close(life)

    def give(self, job: Job) -> bool:
        """Hands it a job; whether it was there to take it."""
        try:
            self.connection.send((job.function, job.arguments))
        except OSError:
            self.end()
            return False
        return True

    def answer(self) -> Any:
        """What its job returned, or how the process ended."""
        try:
            return self.connection.recv()
        except (EOFError, OSError, pickle.UnpicklingError):
            code = self.end()
            how = f"exit code {code}" if code >= 0 else f"signal {-code} ({signal.Signals(-code).name})"
            memory = ", as when memory runs out" if code == -signal.SIGKILL else ""
            return JobDied(f"its process ended before it did: {how}{memory}")

    def end(self) -> int:
        """Ends the process if it has not ended by itself, and says how it did."""
        self.connection.close()
        os.close(self._life)
        try:
            return self._process.wait(timeout=_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait(timeout=_END_SECONDS)

"""Run functions in parallel processes on this machine, without Ray, which takes seconds to start and needs cores."""

import os
import pickle
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Generator, Iterable
from multiprocessing.connection import Connection, Pipe, wait

from fedpriv.sweeps.jobs import Began, Ended, Job, JobDied

__all__ = ["side_by_side"]

# Time between two empty events for the live display; ends of jobs are reported at once.
_WAIT_SECONDS = 0.5
_END_SECONDS = 10.0


def side_by_side(jobs: Iterable[Job], at_once: int, *, threads: int = 1) -> Generator[Began | Ended | None]:
    """Run jobs as processes become free. A process runs many jobs in turn, so it imports modules once.

    Args:
        jobs: The jobs, in starting order.
        at_once: Maximum number of parallel jobs.
        threads: OpenMP threads per process.

    Yields:
        Starts and ends of jobs; None after each interval without an event.
    """
    waiting, idle = deque(jobs), []
    busy: dict[Connection, tuple[_Worker, Job]] = {}

    def hand_out() -> list[Began | Ended]:
        began = []
        while waiting and len(busy) < at_once:
            worker, job = idle.pop() if idle else _Worker(threads), waiting.popleft()
            if not worker.give(job):  # it died while idle
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
    """A process that waits for jobs. It has a separate process group, so that only this process receives Ctrl-C."""

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
        """Send a job to the process; return False if the process is gone."""
        try:
            self.connection.send((job.function, job.arguments))
        except OSError:
            self.end()
            return False
        return True

    def answer(self) -> object:
        """Return the job's result, or the reason why the process ended."""
        try:
            return self.connection.recv()
        except (EOFError, OSError, pickle.UnpicklingError):
            code = self.end()
            how = f"exit code {code}" if code >= 0 else f"signal {-code} ({signal.Signals(-code).name})"
            memory = ", which may mean that memory ran out" if code == -signal.SIGKILL else ""
            return JobDied(f"its process ended early: {how}{memory}")

    def end(self) -> int:
        """End the process if it still runs, and return its exit code."""
        self.connection.close()
        os.close(self._life)
        try:
            return self._process.wait(timeout=_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait(timeout=_END_SECONDS)

"""Sweeps for tests: a small experiment, a sweep of it, and trials in this process."""

from collections.abc import Generator, Iterable
from pathlib import Path

import pytest

from fedpriv.sweeps.jobs import Began, Ended, Job, call

__all__ = ["BASE", "in_process", "sweep_file"]

BASE = """
name = "base"
seed = 1
[data]
name = "digits"
clients = 6
[model]
name = "softmax"
[method]
name = "dp-fedavg"
clip_norm = 1.0
server_lr = 0.5
[training]
rounds = 3
"""


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials one after the other in this process, for tests without other processes."""

    def one_by_one(jobs: Iterable[Job], at_once: int, *, threads: int) -> Generator[Began | Ended | None]:
        assert at_once >= 1 <= threads
        for job in jobs:
            yield Began(job.name)
            yield None
            yield Ended(job.name, call(job.function, job.arguments))

    monkeypatch.setattr("fedpriv.sweeps.local_jobs.side_by_side", one_by_one)
    monkeypatch.setattr("fedpriv.experiment.recorder.plot_curves", lambda *_, **__: None)  # most of a short trial


def sweep_file(folder: Path, text: str, base: str = BASE) -> Path:
    (folder / "base.toml").write_text(base)
    path = folder / "sweep.toml"
    path.write_text(f'name = "s"\nbase = "base.toml"\n{text}')
    return path

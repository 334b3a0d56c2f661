"""One trial of a sweep, in any process."""

import errno
import gc
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from fedpriv.checks import real_from
from fedpriv.errors import UserError
from fedpriv.experiment.config import parse_config
from fedpriv.experiment.execution import LocalEngine
from fedpriv.experiment.run import run_experiment
from fedpriv.experiment.watching import StopRun, Watcher
from fedpriv.sweeps.files import GROUPS
from fedpriv.sweeps.stopping import Stopping, StopRule
from fedpriv.tables import Table
from fedpriv.tracking.trackers import track, watched_by

__all__ = ["DiskTrouble", "Manner", "Tracking", "TrialExecution", "run_trial"]

_LOCKED_SECONDS = 120.0
# Errors that would stop every other trial as well.
_DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@dataclass(frozen=True, kw_only=True)
class TrialExecution:
    """The execution of each trial of a sweep, and its resources; no trial's experiment depends on them.

    Args:
        engine: An engine in process: `auto`, `loop` or `vectorized`.
        device: The device for gradients.
        cpus: Cores for each trial; PyTorch uses as many threads, and at least one.
        gpus: Share of a GPU for each trial; above 0, Ray schedules the trials.
        ray: Schedule trials with Ray without GPUs, too. Ray takes seconds to start, and its daemons use some CPU.
        ray_address: HOST:PORT of a running Ray; its machines then run the trials.
    """

    engine: LocalEngine = "vectorized"
    device: str = "cpu"
    cpus: float = 1.0
    gpus: float = 0.0
    ray: bool = False
    ray_address: str | None = None

    def __post_init__(self) -> None:
        real_from("--cpus-per-trial", self.cpus, 0.01, "Give 0.5 to put two trials on a core", high=4096.0)
        real_from("--gpus-per-trial", self.gpus, 0, "Give 0.25 to put four trials on a GPU", high=64.0)

    @property
    def on_ray(self) -> bool:
        """True if Ray runs the trials, instead of local processes."""
        return self.ray or self.gpus > 0 or self.ray_address is not None

    @property
    def threads(self) -> int:
        """Threads of PyTorch in each trial."""
        return max(1, int(self.cpus))


@dataclass(frozen=True)
class Tracking:
    """The trackers that receive each trial's rows, in addition to its run directory.

    Args:
        logs: Names of `tracking.TRACKERS`.
        diagnostics: Also send unreleased diagnostics to the trackers; None for runs without `[privacy]` only.
    """

    logs: Sequence[str] = ()
    diagnostics: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Manner:
    """The common options of all trials.

    Args:
        options: Options of `run_experiment`.
        threads: PyTorch threads.
        rule: The rule that stops trials early; None for none.
        logs: Trackers that receive rows, and their stores.
        tracked: Options of `track`.
    """

    options: dict[str, Any]
    threads: int
    rule: StopRule | None
    logs: dict[str, str]
    tracked: dict[str, Any]


@dataclass(frozen=True)
class DiskTrouble:
    """An error that prevents every trial from writing."""

    number: int
    words: str
    where: str


def run_trial(tables: Table, folder: Path, called: str, manner: Manner) -> list[str] | DiskTrouble:
    """Run one trial in a worker process, resuming a killed one; return the trackers' complaints."""
    torch.set_num_threads(manner.threads)
    complaints: list[str] = []
    try:
        _run_when_free(tables, folder, called, manner, complaints)
        return complaints
    except StopRun:
        return complaints
    except OSError as error:
        ours = error.filename is not None and Path(error.filename).is_relative_to(folder.parent)
        if error.errno in _DISK_TROUBLE or (ours and isinstance(error, PermissionError)):
            return DiskTrouble(error.errno or 0, error.strerror or str(error), str(error.filename or folder))
        raise
    finally:
        if torch.cuda.is_initialized():
            gc.collect()
            torch.cuda.empty_cache()


def _run_when_free(tables: Table, folder: Path, called: str, manner: Manner, complaints: list[str]) -> None:
    end = time.monotonic() + _LOCKED_SECONDS
    while True:
        try:
            config = parse_config(tables)
            watchers: list[Watcher] = []
            if manner.rule is not None:
                others, rounds = _comparable(folder), config.training.rounds
                watchers.append(Stopping(manner.rule, folder, others, rounds, config.task.selects))
            log = track(manner.logs, config, folder, name=called, **manner.tracked)
            try:
                with log:
                    watch = watched_by(log, *watchers)
                    run_experiment(config, folder, resume=True, watch=watch, **manner.options)
                return
            finally:
                complaints += log.complaints
        except UserError as error:
            # The process of a killed sweep may still hold the folder for a while.
            if "another run at work" not in str(error) or time.monotonic() > end:
                raise
        time.sleep(0.2)


def _comparable(folder: Path) -> list[Path]:
    """Return the folders of the other trials in a trial's group."""
    file = folder.parents[1] / GROUPS
    groups = _groups(file, file.stat().st_mtime_ns)
    mine = groups.get(folder.name)
    return [folder.parent / name for name, group in groups.items() if group == mine and name != folder.name]


@lru_cache(maxsize=1)
def _groups(file: Path, written: int) -> dict[str, str]:
    """Return the groups of a sweep's trials, read once per process."""
    del written
    return json.loads(file.read_bytes())

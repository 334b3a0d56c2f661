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
from fedpriv.experiment.run import run_experiment
from fedpriv.experiment.watching import StopRun, Watcher
from fedpriv.sweeps.files import GROUPS
from fedpriv.sweeps.stopping import Stopping, StopRule
from fedpriv.tracking.trackers import track, watched_by

__all__ = ["DiskTrouble", "Manner", "Tracking", "TrialExecution", "run_trial"]

_LOCKED_SECONDS = 120.0
# Errors that every other trial would meet as well.
_DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@dataclass(frozen=True, kw_only=True)
class TrialExecution:
    """How each trial of a sweep runs, and what it needs of a machine; no trial's experiment depends on it.

    Args:
        engine: One in process: `auto`, `loop` or `vectorized`.
        device: Where gradients are computed.
        cpus: Cores that a trial needs; PyTorch uses as many threads, and one at least.
        gpus: Share of a GPU that a trial needs; above 0 a Ray is started that deals them out.
        ray: Whether Ray deals out this machine's cores, too; it takes seconds to start, and its daemons their share.
        ray_address: HOST:PORT of a running Ray, whose machines then run the trials.
    """

    engine: str = "vectorized"
    device: str = "cpu"
    cpus: float = 1.0
    gpus: float = 0.0
    ray: bool = False
    ray_address: str | None = None

    def __post_init__(self) -> None:
        real_from("--cpus-per-trial", self.cpus, 0.01, "0.5 puts two trials on a core", high=4096.0)
        real_from("--gpus-per-trial", self.gpus, 0, "0.25 puts four on a GPU", high=64.0)

    @property
    def on_ray(self) -> bool:
        """Whether Ray runs the trials, and not processes of our own."""
        return self.ray or self.gpus > 0 or self.ray_address is not None

    @property
    def threads(self) -> int:
        """Threads of PyTorch in each trial."""
        return max(1, int(self.cpus))


@dataclass(frozen=True)
class Tracking:
    """Who gets each trial's rows beside its run directory.

    Args:
        logs: Names of `tracking.TRACKERS`.
        diagnostics: Whether they get what is not released, too; None for runs without `[privacy]` alone.
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


def run_trial(tables: dict[str, Any], folder: Path, called: str, manner: Manner) -> list[str] | DiskTrouble:
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


def _run_when_free(tables: dict[str, Any], folder: Path, called: str, manner: Manner, complaints: list[str]) -> None:
    end = time.monotonic() + _LOCKED_SECONDS
    while True:
        try:
            config = parse_config(tables)
            watchers: list[Watcher] = []
            if manner.rule is not None:
                watchers.append(Stopping(manner.rule, folder, _comparable(folder), config.training.rounds))
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

"""Running a sweep: trials side by side, what is done on the disk, what failed beside it, and a table of all.

Neither Ray Tune nor Optuna runs it. A trial is a run directory like any other, which resumes by itself to the bit and
is found again by its digest; a library that owns trials, their names, their checkpoints and their results would need a
second truth beside that. Ray places the processes.
"""

import errno
import gc
import json
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from fedpriv.errors import UserError
from fedpriv.experiment.config import parse_config
from fedpriv.experiment.journal import StopRun, Watcher
from fedpriv.experiment.records import RunDirectory, write_atomically
from fedpriv.experiment.run import run_experiment
from fedpriv.experiment.stopping import STOPPED, Stopping, StopRule, group_of
from fedpriv.experiment.sweep_table import FAILURE, TrialsTable, label, status_of
from fedpriv.experiment.sweeps import Sweep, Trial
from fedpriv.experiment.tracking import check_trackers, track, watched_by
from fedpriv.learning.dataset_files import default_data_root

__all__ = ["SweepState", "run_sweep"]

TRIALS = "trials"
GROUPS = "groups.json"
_LOCKED_SECONDS = 120.0
# Nothing that another trial would not meet as well.
_DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@dataclass
class SweepState:
    """How far a sweep is; what the live table shows.

    Args:
        total: How many different trials there are.
        done: How many have ended well, also in earlier sessions.
        failed: How many did not.
        stopped: How many were not worth their remaining rounds.
        before: How many of these three there were when this session began.
        running: What runs, by name.
        began: When this session began, on the monotonic clock.
    """

    total: int
    done: int = 0
    failed: int = 0
    stopped: int = 0
    before: int = 0
    running: dict[str, str] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    @property
    def ended(self) -> int:
        """How many will not run again by themselves."""
        return self.done + self.failed + self.stopped

    @property
    def seconds_left(self) -> float | None:
        """By the mean pace of this session; None before anything has ended."""
        ended = self.ended - self.before
        return (time.monotonic() - self.began) / ended * (self.total - self.ended) if ended else None

    def count(self, status: str) -> None:
        """One more that is `done`, `failed` or `stopped`; anything else is still to do."""
        self.done += status == "done"
        self.failed += status == "failed"
        self.stopped += status == "stopped"


@dataclass(frozen=True, kw_only=True)
class _Manner:
    """How every trial is run.

    Args:
        options: For `run_experiment`.
        threads: Of PyTorch.
        rule: When a trial is stopped; None for never.
        logs: What rows are sent to beside the run directory, and where that writes.
        tracked: For `track`.
    """

    options: dict[str, Any]
    threads: int
    rule: StopRule | None
    logs: dict[str, str]
    tracked: dict[str, Any]


def run_sweep(
    sweep: Sweep,
    out: Path,
    *,
    jobs: int | None = 1,
    engine: str = "vectorized",
    device: str = "cpu",
    data_root: Path | None = None,
    resume: bool = False,
    retry: bool = False,
    stop: bool = True,
    cpus_per_trial: float = 1.0,
    gpus_per_trial: float = 0.0,
    ray_address: str | None = None,
    logs: Sequence[str] = (),
    log_diagnostics: bool = True,
    watch: Callable[[SweepState], None] | None = None,
) -> pd.DataFrame:
    """Runs what is not done yet, and returns the table of all trials.

    Args:
        sweep: What to run.
        out: The sweep's folder: `trials/NAME/` are run directories, `trials.csv` is the table.
        jobs: Most trials at a time; None for as many as the machines have room for.
        engine: In each trial; one in process.
        device: Where gradients are computed.
        data_root: Where data sets lie; None for the environment's choice.
        resume: Whether `out` may hold a part of a sweep.
        retry: Whether trials that failed are tried again.
        stop: Whether the sweep's rule stops trials; if not, those that it has stopped are gone on with.
        cpus_per_trial: Cores that each needs; PyTorch uses as many threads, and one at least.
        gpus_per_trial: Share of a GPU that each needs.
        ray_address: HOST:PORT of a running Ray; None starts one on this machine.
        logs: Names of `tracking.TRACKERS` that get each trial's rows.
        log_diagnostics: Whether they get what is not private, too.
        watch: Called whenever something has begun or ended.

    Raises:
        UserError: If no trial is an experiment, or the folder is taken. Failing trials do not stop a sweep.
        OSError: If the disk is full, or cannot be written to.
    """
    _check(jobs, cpus_per_trial, gpus_per_trial)
    stores = check_trackers(logs)
    folder = RunDirectory(out)
    with folder.locked():
        if (out / TRIALS).exists() and not resume:
            raise UserError(str(out), "a folder without a sweep", "one", "Add --resume, or choose another --out")
        (out / TRIALS).mkdir(exist_ok=True)
        trials, refused = _different(sweep)
        if not trials:
            raise refused[0][1] if refused else UserError("axes", "a trial", "none", "Give values")
        if sweep.stop is not None:
            folder.write_json(GROUPS, {name: group_of(trial.config) for name, trial in trials.items()})
        again = (*((FAILURE,) if retry else ()), *(() if stop else (STOPPED,)))
        for path in (out / TRIALS / name / file for name in trials for file in again):
            path.unlink(missing_ok=True)
        table = TrialsTable(out, out / TRIALS, trials, refused)
        state = SweepState(total=len(trials) + len(refused))
        for status in table.statuses():
            state.count(status)
        state.before = state.ended
        # A worker's folder and environment may be others.
        root = (data_root or default_data_root()).resolve()
        manner = _Manner(
            options={"engine": engine, "device": device, "data_root": root},
            threads=max(1, int(cpus_per_trial)),
            rule=sweep.stop if stop else None,
            logs=stores,
            tracked={"group": sweep.name, "diagnostics": log_diagnostics},
        )
        needs = {"cpus": cpus_per_trial, "gpus": gpus_per_trial, "address": ray_address}
        left = {name: trial for name, trial in trials.items() if not status_of(out / TRIALS / name)}
        try:
            with closing(_finish(left, out, manner, jobs, needs)) as happenings:
                for happened in happenings:
                    if happened is not None:
                        _note(happened, state, table, left)
                    if watch is not None:
                        watch(state)
                    table.write_now_and_then()
        except BaseException:
            with suppress(OSError):
                table.write()
            raise
        return table.write()


def _check(jobs: int | None, cpus: float, gpus: float) -> None:
    if jobs is not None and jobs < 1:
        raise UserError("--jobs", "at least 1", jobs, "Give the number of trials at a time")
    if not 0.01 <= cpus <= 4096.0:
        raise UserError("--cpus-per-trial", "a number from 0.01", cpus, "0.5 puts two trials on a core")
    if not 0.0 <= gpus <= 64.0:
        raise UserError("--gpus-per-trial", "a number from 0", gpus, "0.25 puts four on a GPU")


def _different(sweep: Sweep) -> tuple[dict[str, Trial], list[tuple[Trial, UserError]]]:
    """Trials by name, each experiment once, and those that are none, with the reason."""
    trials: dict[str, Trial] = {}
    refused: list[tuple[Trial, UserError]] = []
    for trial in sweep.trials():
        try:
            trials.setdefault(trial.name, trial)
        except UserError as error:
            refused.append((trial, error))
    return trials, refused


def _finish(
    left: dict[str, Trial], out: Path, manner: _Manner, jobs: int | None, needs: dict[str, Any]
) -> Generator[tuple[str, str] | None]:
    """Runs trials; yields a name and its new status, `running`, `done`, `failed` or `stopped`, or None meanwhile."""
    if not left:
        return
    from fedpriv.engines.ray_jobs import Began, Ended, Job, side_by_side

    folder = out.resolve() / TRIALS
    work = (Job(n, _run_trial, (t.tables, folder / n, label(t) or n, manner)) for n, t in left.items())
    with closing(side_by_side(work, jobs, **needs)) as events:
        for event in events:
            if isinstance(event, Began):
                yield event.name, "running"
            elif isinstance(event, Ended):
                yield event.name, _ended(out / TRIALS / event.name, event.result)
            else:
                yield None


def _ended(folder: Path, result: Any) -> str:
    """The status of a trial that has just ended; a failure is written down."""
    if isinstance(result, _DiskTrouble):
        raise OSError(result.number, result.words, result.where)
    if isinstance(result, BaseException):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / FAILURE, json.dumps({"reason": str(result)}) + "\n")
    status = status_of(folder)
    if not status:
        remedy = "Choose one on a file system that all machines of the Ray share"
        raise UserError("--out", "a folder that every trial can write to", f"no results in {folder}", remedy)
    return status


def _note(happened: tuple[str, str], state: SweepState, table: TrialsTable, trials: dict[str, Trial]) -> None:
    name, status = happened
    if status == "running":
        state.running[name] = label(trials[name])
        return
    state.running.pop(name, None)
    state.count(status)
    table.changed(name)


@dataclass(frozen=True)
class _DiskTrouble:
    """Why no other trial could write either."""

    number: int
    words: str
    where: str


def _run_trial(tables: dict[str, Any], folder: Path, called: str, manner: _Manner) -> float | _DiskTrouble | None:
    """One trial in a worker's process: its seconds, None if it was stopped. What a killed one left is gone on with."""
    torch.set_num_threads(manner.threads)
    try:
        return _run_when_free(tables, folder, called, manner)
    except StopRun:
        return None
    except OSError as error:
        ours = error.filename is not None and Path(error.filename).is_relative_to(folder.parent)
        if error.errno in _DISK_TROUBLE or (ours and isinstance(error, PermissionError)):
            return _DiskTrouble(error.errno or 0, error.strerror or str(error), str(error.filename or folder))
        raise
    finally:
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def _run_when_free(tables: dict[str, Any], folder: Path, called: str, manner: _Manner) -> float:
    end = time.monotonic() + _LOCKED_SECONDS
    while True:
        try:
            config = parse_config(tables)
            watchers: list[Watcher] = []
            if manner.rule is not None:
                watchers.append(Stopping(manner.rule, folder, _comparable(folder), config.training.rounds))
            with track(manner.logs, config, folder, name=called, **manner.tracked) as log:
                watch = watched_by(log, *watchers)
                return run_experiment(config, folder, resume=True, watch=watch, **manner.options)["seconds"]
        except UserError as error:
            # The process of a sweep that was killed may still hold the folder for a while.
            if "another run at work" not in str(error) or time.monotonic() > end:
                raise
        time.sleep(0.2)


def _comparable(folder: Path) -> list[Path]:
    """The folders of a trial's group but its own."""
    file = folder.parents[1] / GROUPS
    groups = _groups(file, file.stat().st_mtime_ns)
    mine = groups.get(folder.name)
    return [folder.parent / name for name, group in groups.items() if group == mine and name != folder.name]


@lru_cache(maxsize=1)
def _groups(file: Path, written: int) -> dict[str, str]:
    """The groups of a sweep's trials, read once a process."""
    del written
    return json.loads(file.read_bytes())

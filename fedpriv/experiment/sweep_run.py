"""Running a sweep: trials side by side, what is done on the disk, what failed beside it, and a table of all.

Neither Ray Tune nor Optuna runs it. A trial is a run directory like any other, which resumes by itself to the bit and
is found again by its digest; a library that owns trials, their names, their checkpoints and their results would need a
second truth beside that. Ray places the processes.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from fedpriv.errors import UserError
from fedpriv.experiment.config import parse_config
from fedpriv.experiment.records import RunDirectory, flat_tables, write_atomically
from fedpriv.experiment.run import run_experiment
from fedpriv.experiment.sweeps import Sweep, Trial

__all__ = ["SweepState", "run_sweep", "trials_table"]

TRIALS = "trials"
TABLE = "trials.csv"
FAILURE = "failure.json"
_LOCKED_SECONDS = 120.0
_FIGURES = ("test_accuracy", "test_loss", "epsilon", "rounds", "population", "parameters", "seconds")


@dataclass
class SweepState:
    """How far a sweep is; what the live table shows.

    Args:
        total: How many different trials there are.
        jobs: How many run at once.
        done: How many have ended well, also in earlier sessions.
        failed: How many did not.
        before: How many of `done` and `failed` there were when this session began.
        running: What runs, by name.
        began: When this session began, on the monotonic clock.
    """

    total: int
    jobs: int
    done: int = 0
    failed: int = 0
    before: int = 0
    running: dict[str, str] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    @property
    def seconds_left(self) -> float | None:
        """By the mean pace of this session; None before anything has ended."""
        ended = self.done + self.failed - self.before
        left = self.total - self.done - self.failed
        return (time.monotonic() - self.began) / ended * left if ended else None


def run_sweep(
    sweep: Sweep,
    out: Path,
    *,
    jobs: int = 1,
    engine: str = "vectorized",
    device: str = "cpu",
    data_root: Path | None = None,
    resume: bool = False,
    retry: bool = False,
    gpus_per_trial: float = 0.0,
    ray_address: str | None = None,
    watch: Callable[[SweepState], None] | None = None,
) -> pd.DataFrame:
    """Runs what is not done yet, and returns the table of all trials.

    Args:
        sweep: What to run.
        out: The sweep's folder: `trials/NAME/` are run directories, `trials.csv` is the table.
        jobs: Most trials at a time.
        engine: In each trial; one in process.
        device: Where gradients are computed.
        data_root: Where data sets lie; None for the environment's choice.
        resume: Whether `out` may hold a part of a sweep.
        retry: Whether trials that failed are tried again.
        gpus_per_trial: Share of a GPU that each needs.
        ray_address: HOST:PORT of a running Ray; None starts one on this machine.
        watch: Called whenever something has begun or ended.

    Raises:
        UserError: If no trial is an experiment, or the folder is taken. Failing trials do not stop a sweep.
    """
    if jobs < 1:
        raise UserError("--jobs", "at least 1", jobs, "Give the number of trials at a time")
    folder = RunDirectory(out)
    with folder.locked():
        if (out / TRIALS).exists() and not resume:
            raise UserError(str(out), "a folder without a sweep", "one", "Add --resume, or choose another --out")
        (out / TRIALS).mkdir(exist_ok=True)
        trials, refused = _different(sweep)
        if not trials:
            raise refused[0][1] if refused else UserError("axes", "a trial", "none", "Give values")
        state = SweepState(total=len(trials) + len(refused), jobs=jobs, failed=len(refused))
        left = []
        for name, trial in trials.items():
            status = _status(out, name)
            if status == "failed" and retry:
                (out / TRIALS / name / FAILURE).unlink()
                status = ""
            state.done += status == "done"
            state.failed += status == "failed"
            left += [] if status else [(name, trial)]
        state.before = state.done + state.failed
        options = {"engine": engine, "device": device, "data_root": data_root}
        written = state.before
        for _ in _finish(left, out, state, options, gpus_per_trial, ray_address):
            if watch is not None:
                watch(state)
            if state.done + state.failed > written:
                written = state.done + state.failed
                _write_table(out, trials, refused)
        return _write_table(out, trials, refused)


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
    left: list[tuple[str, Trial]],
    out: Path,
    state: SweepState,
    options: dict[str, Any],
    gpus: float,
    address: str | None,
) -> Iterator[None]:
    """Runs trials; yields whenever there may be something new to show."""
    if not left:
        return
    from fedpriv.engines.ray_jobs import side_by_side

    labels = {name: _label(trial) for name, trial in left}

    def jobs() -> Iterator[tuple[str, Callable[..., Any], tuple[Any, ...]]]:
        for name, trial in left:
            yield name, _run_trial, (trial.tables, out.resolve() / TRIALS / name, options)

    begun = iter(labels)
    for _ in range(state.jobs):
        _begin(begun, labels, state)
    for ended in side_by_side(jobs(), state.jobs, gpus=gpus, address=address):
        if ended is not None:
            name, result = ended
            state.running.pop(name, None)
            _begin(begun, labels, state)
            if isinstance(result, BaseException):
                _record_failure(out / TRIALS / name, result)
                state.failed += 1
            else:
                state.done += 1
        yield


def _begin(names: Iterator[str], labels: dict[str, str], state: SweepState) -> None:
    name = next(names, None)
    if name is not None:
        state.running[name] = labels[name]


def _run_trial(tables: dict[str, Any], folder: Path, options: dict[str, Any]) -> float:
    """One trial in a process of Ray's; a part of it that a killed sweep left is gone on with."""
    torch.set_num_threads(1)
    end = time.monotonic() + _LOCKED_SECONDS
    while True:
        try:
            return run_experiment(parse_config(tables), folder, resume=True, **options)["seconds"]
        except UserError as error:
            # The process of a sweep that was killed may still hold the folder for a while.
            if "another run at work" not in str(error) or time.monotonic() > end:
                raise
        time.sleep(1.0)


def _status(out: Path, name: str) -> str:
    folder = out / TRIALS / name
    if (folder / "summary.json").exists():
        return "done"
    return "failed" if (folder / FAILURE).exists() else ""


def _record_failure(folder: Path, error: BaseException) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / FAILURE, json.dumps({"reason": str(error)}) + "\n")


def trials_table(out: Path, trials: dict[str, Trial], refused: list[tuple[Trial, UserError]]) -> pd.DataFrame:
    """A row a trial: name, status, what it changes, figures of its summary, and why it failed."""
    rows = []
    for name, trial in trials.items():
        folder, status = RunDirectory(out / TRIALS / name), _status(out, name) or "left"
        summary = folder.read_json("summary.json") or {}
        reason = (folder.read_json(FAILURE) or {}).get("reason", "") if status == "failed" else ""
        figures = {key: summary.get(key) for key in _FIGURES}
        rows.append({"trial": name, "status": status, **_flat(trial.changes), **figures, "reason": reason})
    rows += [{"trial": "", "status": "failed", **_flat(trial.changes), "reason": str(e)} for trial, e in refused]
    return pd.DataFrame(rows)


def _write_table(out: Path, trials: dict[str, Trial], refused: list[tuple[Trial, UserError]]) -> pd.DataFrame:
    table = trials_table(out, trials, refused)
    write_atomically(out / TABLE, table.to_csv(index=False))
    return table


def _flat(changes: dict[str, Any]) -> dict[str, Any]:
    return flat_tables(changes)


def _label(trial: Trial) -> str:
    return " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in _flat(trial.changes).items())

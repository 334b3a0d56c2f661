"""Run a sweep: trials in parallel, their run directories on disk with the failed ones, and a table of all.

A sweep uses neither Ray Tune nor Optuna. A trial is a run directory like any other: it resumes to the bit and is found
by its digest. A library that owns trials, their names, their checkpoints and their results would need a second record
of the same facts. On one machine without shares of GPUs, trials run in local processes; otherwise Ray places them.
"""

import json
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from fedpriv.checks import at_least_one
from fedpriv.data.files import default_data_root
from fedpriv.errors import UserError, require_extra
from fedpriv.experiment.build import check_device_name
from fedpriv.experiment.execution import cores
from fedpriv.experiment.run_directory import RunDirectory
from fedpriv.files import make_owners_folder
from fedpriv.privacy import PrivacyPlan
from fedpriv.privacy.released import OWNER_ONLY
from fedpriv.sweeps import local_jobs
from fedpriv.sweeps.config import Sweep, Trial
from fedpriv.sweeps.files import CHOSEN, DRAWN, FAILURE, GROUPS, STOPPED, TRIALS, status_of
from fedpriv.sweeps.jobs import Began, Ended, Job
from fedpriv.sweeps.stopping import group_of
from fedpriv.sweeps.table import Best, TrialsTable, labels
from fedpriv.sweeps.trial import DiskTrouble, Manner, Tracking, TrialExecution, run_trial
from fedpriv.sweeps.tuning import Tuning, choose_best, common_plan, draw_trials, score_of, scored_on
from fedpriv.sweeps.tuning_score import noised_scores, streams_of
from fedpriv.tables import Record
from fedpriv.tracking.trackers import check_trackers

__all__ = ["SweepState", "run_sweep"]

# A trial's name; its new status: `running`, `done`, `failed` or `stopped`; and complaints of trackers.
_Happened = tuple[str, str, list[str]]


@dataclass
class SweepState:
    """The progress of a sweep, for the live table.

    Args:
        total: Number of different trials.
        done: Number of finished trials, including those of earlier sessions.
        failed: Number of failed trials.
        stopped: Number of trials that the sweep's rule stopped early.
        before: Number of these three kinds at the start of this session.
        running: Labels of running trials, by name.
        complaints: Complaints of trackers, by name of the trial.
        best: The best settings so far; empty in a tuning, whose trials stay secret.
        began: Start of this session, on the monotonic clock (seconds).
    """

    total: int
    done: int = 0
    failed: int = 0
    stopped: int = 0
    before: int = 0
    running: dict[str, str] = field(default_factory=dict)
    complaints: dict[str, list[str]] = field(default_factory=dict)
    best: list[Best] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    @property
    def ended(self) -> int:
        """Number of trials that are done, failed or stopped."""
        return self.done + self.failed + self.stopped

    @property
    def seconds_left(self) -> float | None:
        """Estimated time left (seconds) at the mean pace of this session; None before a trial has ended."""
        ended = self.ended - self.before
        return (time.monotonic() - self.began) / ended * (self.total - self.ended) if ended else None

    def count(self, status: str) -> None:
        """Count one more trial that is `done`, `failed` or `stopped`; ignore any other status."""
        self.done += status == "done"
        self.failed += status == "failed"
        self.stopped += status == "stopped"


def run_sweep(
    sweep: Sweep,
    out: Path,
    *,
    jobs: int | None = 1,
    execution: TrialExecution | None = None,
    data_root: Path | None = None,
    resume: bool = False,
    retry: bool = False,
    stop: bool = True,
    tracking: Tracking | None = None,
    watch: Callable[[SweepState], None] | None = None,
) -> pd.DataFrame:
    """Run all unfinished trials and return the table of all trials.

    Args:
        sweep: The sweep.
        out: The sweep's folder: `trials/NAME/` are run directories, `trials.csv` is the table.
        jobs: Most trials at a time; None for as many as fit on the machines.
        execution: The execution of each trial, and its resources; None for one core and the vectorized engine.
        data_root: The folder of the data sets; None for the default.
        resume: Resume the sweep in `out`, if there is one.
        retry: Run failed trials again.
        stop: Let the sweep's rule stop trials early. If False, trials that it has stopped resume.
        tracking: The trackers that receive each trial's rows; None for no trackers.
        watch: Called whenever a trial has begun or ended.

    Raises:
        UserError: If no trial is a valid experiment, or the folder is in use. Failed trials do not stop a sweep.
        OSError: If the disk is full or not writable.
    """
    execution, tracking = execution or TrialExecution(), tracking or Tracking()
    if jobs is not None:
        at_least_one("--jobs", jobs, "Give the number of trials at a time")
    check_device_name(execution.device, "--device")
    if execution.on_ray:
        require_extra("--ray", "ray")
    _check_tuning(sweep, retry=retry, logs=tracking.logs)
    stores = check_trackers(tracking.logs)
    folder = RunDirectory(out)
    if folder.file("config.toml").exists():
        raise UserError(str(out), "a folder for a sweep", "the folder of a run", "Choose another --out")
    with folder.locked():
        if (out / TRIALS).exists() and not resume:
            raise UserError(
                str(out), "a folder without a sweep", "a folder with one", "Add --resume, or choose another --out"
            )
        # The current folder and the environment of a worker may differ.
        root = (data_root or default_data_root()).resolve()
        trials, refused, plan = _trials(sweep, folder, root)
        if not trials:
            raise refused[0][1] if refused else UserError("axes", "at least one trial", 0, "Give values for each axis")
        if sweep.stop is not None:
            folder.write_json(GROUPS, {name: group_of(trial.config) for name, trial in trials.items()})
        again = (*((FAILURE,) if retry else ()), *(() if stop else (STOPPED,)))
        for path in (out / TRIALS / name / file for name in trials for file in again):
            path.unlink(missing_ok=True)
        mode = None if sweep.tuning is None else OWNER_ONLY
        table = TrialsTable(out, out / TRIALS, trials, refused, mode)
        state = SweepState(total=len(trials) + len(refused))
        for status in table.statuses():
            state.count(status)
        state.before = state.ended
        state.best = [] if sweep.tuning is not None else table.best()
        manner = Manner(
            options={"engine": execution.engine, "device": execution.device, "data_root": root},
            threads=execution.threads,
            rule=sweep.stop if stop else None,
            logs=stores,
            tracked={"group": sweep.name, "diagnostics": tracking.diagnostics},
        )
        left = {name: trial for name, trial in trials.items() if not status_of(out / TRIALS / name)}
        called = labels(left)
        try:
            with closing(_finish(left, called, out, manner, jobs, execution)) as happenings:
                for happened in happenings:
                    if happened is not None:
                        _note(happened, state, table, called)
                        if sweep.tuning is None and happened[1] == "done":
                            state.best = table.best()
                    if watch is not None:
                        watch(state)
                    table.write_now_and_then()
        except BaseException:
            with suppress(OSError):
                for name in left:  # a trial may have ended without its event
                    table.changed(name)
                table.write()
            raise
        if watch is not None:
            watch(state)
        written = table.write()
        if sweep.tuning is not None and plan is not None:
            chosen = _select(sweep.tuning, plan, trials, written, folder, execution.device, root)
            folder.write_json(CHOSEN, chosen)
        return written


def _select(
    tuning: Tuning,
    plan: PrivacyPlan,
    trials: dict[str, Trial],
    table: pd.DataFrame,
    folder: RunDirectory,
    device: str,
    root: Path,
) -> Record:
    """Return the best trial, by its score in the table or by its score with noise."""
    config, noise = next(iter(trials.values())).config, tuning.score_noise
    score, better = score_of(config, noise), config.task.selects.better
    if noise is None:
        return choose_best(tuning, plan, score, trials, table, better=better)
    scores, clients = noised_scores(
        folder,
        {name: folder.file(TRIALS) / name for name in table["trial"][table["status"] == "done"]},
        trials,
        on=scored_on(config)[0],
        noise=noise,
        streams=streams_of(tuning.seed, folder.read_json(DRAWN)["digest"]),
        released=folder.file(CHOSEN).exists(),
        device=device,
        data_root=root,
    )
    noised = table.assign(**{score: table["trial"].map(scores)})
    return choose_best(tuning, plan, score, trials, noised, clients, better)


def _check_tuning(sweep: Sweep, *, retry: bool, logs: Sequence[str]) -> None:
    if sweep.tuning is None:
        return
    if retry:
        remedy = "Omit --retry: a failed trial was drawn like the others, and counts as the worst"
        raise UserError("--retry", "a sweep without [tuning]", "a sweep with it", remedy)
    if logs:
        remedy = "Omit --log: all trials except the selected one stay secret"
        raise UserError("--log", "a sweep without [tuning]", "a sweep with it", remedy)


def _trials(
    sweep: Sweep, folder: RunDirectory, root: Path
) -> tuple[dict[str, Trial], list[tuple[Trial, UserError]], PrivacyPlan | None]:
    """Make the folder of trials; return trials by name, invalid ones with the reason, and a tuning's common plan."""
    where = folder.file(TRIALS)
    if sweep.tuning is None:
        if folder.file(DRAWN).exists():
            remedy = "Choose another --out: a plain sweep in this folder would break the guarantee of its tuning"
            raise UserError(str(folder.path), "a folder without a tuning", "a folder with one", remedy)
        trials, refused = _different(sweep)
        if trials:
            where.mkdir(exist_ok=True)
        return trials, refused, None
    grid = sweep.trials()
    plan = common_plan(sweep, grid, root)
    begun = where.exists() and any(where.iterdir())
    rows = draw_trials(sweep, grid, folder, begun=begun)
    make_owners_folder(where)
    drawn = [sweep.drawn(row["place"], row["draw"], grid) for row in rows]
    if not drawn:
        remedy = "Increase expected_trials, which makes this unlikely; another tuning spends epsilon again"
        raise UserError("[tuning]", "a trial", "a draw of 0 trials, which selects none", remedy)
    return {trial.name: trial for trial in drawn}, [], plan


def _different(sweep: Sweep) -> tuple[dict[str, Trial], list[tuple[Trial, UserError]]]:
    """Return trials by name, each experiment once, and invalid trials with the reason."""
    trials: dict[str, Trial] = {}
    refused: list[tuple[Trial, UserError]] = []
    for trial in sweep.trials():
        try:
            trials.setdefault(trial.name, trial)
        except UserError as error:
            refused.append((trial, error))
    return trials, refused


def _finish(
    left: dict[str, Trial],
    called: dict[str, str],
    out: Path,
    manner: Manner,
    jobs: int | None,
    execution: TrialExecution,
) -> Generator[_Happened | None]:
    """Run trials; yield an event for each change, and None while waiting."""
    if not left:
        return
    folder = out.resolve() / TRIALS
    work = (Job(n, run_trial, (t.config.tables, folder / n, called[n] or n, manner)) for n, t in left.items())
    with closing(_side_by_side(work, jobs, execution)) as events:
        for event in events:
            if isinstance(event, Began):
                yield event.name, "running", []
            elif isinstance(event, Ended):
                status = _ended(out / TRIALS / event.name, event.result)
                yield event.name, status, event.result if isinstance(event.result, list) else []
            else:
                yield None


def _side_by_side(work: Iterable[Job], jobs: int | None, execution: TrialExecution) -> Generator[Began | Ended | None]:
    cpus = execution.cpus
    if execution.on_ray:
        from fedpriv.sweeps import ray_jobs

        return ray_jobs.side_by_side(work, jobs, cpus=cpus, gpus=execution.gpus, address=execution.ray_address)
    places = int(cores() / cpus + 1e-9)
    if not places:
        remedy = "Give fewer, or join a Ray with more"
        raise UserError("--cpus-per-trial", f"a machine with {cpus:g} CPU", cores(), remedy)
    return local_jobs.side_by_side(work, min(jobs or places, places), threads=execution.threads)


def _ended(folder: Path, result: object) -> str:
    """Return the status of a trial that has just ended; write a file for a failure."""
    if isinstance(result, DiskTrouble):
        raise OSError(result.number, result.words, result.where)
    if isinstance(result, BaseException):
        folder.mkdir(parents=True, exist_ok=True)
        RunDirectory(folder).write_text(FAILURE, json.dumps({"reason": str(result)}) + "\n")
    status = status_of(folder)
    if not status:
        remedy = "Choose a folder on a file system that all machines of the Ray share"
        raise UserError("--out", "a folder that every trial can write to", f"{folder} without results", remedy)
    return status


def _note(happened: _Happened, state: SweepState, table: TrialsTable, called: dict[str, str]) -> None:
    name, status, complaints = happened
    if complaints:
        state.complaints[name] = complaints
    if status == "running":
        state.running[name] = called[name]
        return
    state.running.pop(name, None)
    state.count(status)
    table.changed(name)

"""The commands `fedpriv sweep`, `compare` and `report`."""

import json
import shlex
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

from fedpriv.checks import one_of
from fedpriv.cli.app import DataRoot, LogDiagnostics, Logs, app
from fedpriv.cli.terminal import say
from fedpriv.errors import require_extra

__all__ = ["trial_warnings"]

# Maximum number of lines about the best settings: one for each promise and problem.
_BEST = 8


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(metavar="SWEEP", help="TOML file of the sweep.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="Output folder.", show_default="runs/NAME")] = None,
    jobs: Annotated[int | None, typer.Option(help="Number of parallel trials.", show_default="as many as fit")] = None,
    engine: Annotated[str, typer.Option(help="Engine of each trial: auto, loop or vectorized.")] = "vectorized",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    cpus_per_trial: Annotated[float, typer.Option(help="Cores, and PyTorch threads, for each trial.")] = 1.0,
    gpus_per_trial: Annotated[
        float, typer.Option(help="Share of a GPU for each trial, such as 0.25; requires Ray.")
    ] = 0.0,
    ray: Annotated[bool, typer.Option("--ray", help="Schedule trials with Ray instead of local processes.")] = False,
    ray_address: Annotated[
        str | None,
        typer.Option(help="HOST:PORT of a running Ray cluster, or auto.", show_default="start one"),
    ] = None,
    data_root: DataRoot = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the sweep in the output folder.")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Resume, and run failed trials again.")] = False,
    no_stop: Annotated[
        bool, typer.Option("--no-stop", help="Do not stop trials early; with --resume, also finish stopped trials.")
    ] = False,
    log: Logs = None,
    log_diagnostics: LogDiagnostics = None,
) -> None:
    """Run an experiment for each combination of a sweep's values, in parallel. Failed trials do not stop the sweep."""
    from fedpriv.experiment.execution import LOCAL_ENGINES
    from fedpriv.sweeps.config import load_sweep
    from fedpriv.sweeps.files import CHOSEN, TRIALS
    from fedpriv.sweeps.live import SweepTable
    from fedpriv.sweeps.run import SweepState, run_sweep
    from fedpriv.sweeps.table import Best, other_trials
    from fedpriv.sweeps.trial import Tracking, TrialExecution
    from fedpriv.sweeps.tuning import about_tuning

    plan = load_sweep(file)
    folder = out or Path("runs") / plan.name
    complaints: dict[str, list[str]] = {}
    best: list[Best] = []
    with SweepTable() as table:

        def watch(state: SweepState) -> None:
            complaints.update(state.complaints)
            best[:] = state.best
            table(state)

        trials = run_sweep(
            plan,
            folder,
            jobs=jobs,
            execution=TrialExecution(
                engine=one_of("--engine", engine, LOCAL_ENGINES),
                device=device,
                cpus=cpus_per_trial,
                gpus=gpus_per_trial,
                ray=ray,
                ray_address=ray_address,
            ),
            data_root=data_root,
            resume=resume or retry,
            retry=retry,
            stop=not no_stop,
            tracking=Tracking(log or (), log_diagnostics),
            watch=watch,
        )
    failed = trials[trials["status"] == "failed"]
    for name, reason in list(zip(failed["trial"], failed["reason"], strict=True))[:5]:
        say(f"failed      {name or 'no experiment'}: {reason}")
    for name, lines in list(complaints.items())[:5]:
        say(f"not logged  {name}: {lines[-1]}")
    for line in islice(trial_warnings(folder / TRIALS, trials["trial"]), 5):
        say(line)
    stopped = list(trials["status"]).count("stopped")
    counts = f"{list(trials['status']).count('done')} done, {len(failed)} failed"
    counts += f", {stopped} stopped early" if stopped else ""
    others = other_trials(trials, folder / TRIALS)
    if others:
        noun = "trial" if others == 1 else "trials"
        say(f"others      {others} {noun} not in {file}; kept in {folder / TRIALS}, left out of the table")
    say(
        f"trials      {len(trials)}: {counts}\n"
        f"table       {folder / 'trials.csv'}\nresults     fedpriv.load_results({str(folder)!r})"
    )
    for one in best[:_BEST]:
        say(f"best        {one}")
    if plan.tuning is None and best:
        say(f"report      fedpriv report {shlex.quote(str(folder))}")
    if plan.tuning is not None:
        for sentence in about_tuning(json.loads((folder / CHOSEN).read_bytes())):
            say(f"tuning      {sentence}")
    if len(failed) == len(trials):
        raise typer.Exit(2)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN ...", help="Run directories.", show_default=False)],
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
) -> None:
    """Compare finished runs: how their configs differ, and their results."""
    from fedpriv.cli.print_compare import print_comparison
    from fedpriv.experiment.results import compare_runs
    from fedpriv.tables import short_texts

    table = compare_runs(runs)
    if as_csv:
        print(table.to_csv(), end="")
        return
    # Results have six digits already; those of similar runs should not look equal.
    for key in table.index:
        table.loc[key] = (
            short_texts(table.loc[key], str(key)) if "." in key else [_text(value) for value in table.loc[key]]
        )
    print_comparison({str(run): {str(key): text for key, text in cells.items()} for run, cells in table.items()})


@app.command()
def report(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder of a sweep, or of run directories.", show_default=False)
    ],
    out: Annotated[Path | None, typer.Option(help="Output folder.", show_default="DIR/report")] = None,
    select: Annotated[
        str | None,
        typer.Option(
            help="Choose the best runs by test or validation, and by a metric: test_loss, validation_rmse.",
            show_default="validation if all runs have it",
        ),
    ] = None,
) -> None:
    """Write a web page about many runs: the best of each method, curves, robustness, privacy, figures and tables."""
    require_extra("fedpriv report", "report")
    from fedpriv.report.write import write_report

    page = write_report(folder, out, select=select)
    say(f"page        {page}\nfigures     {page.parent / 'figures'}\ntables      {page.parent / 'tables'}")


def _text(value: object) -> str:
    return "" if value is None or value != value else str(value)


def trial_warnings(folder: Path, names: Iterable[str]) -> Iterator[str]:
    """Yield a line for each warning in the diagnostics of a sweep's trials."""
    from fedpriv.experiment.learned import warnings_of
    from fedpriv.experiment.run_directory import RunDirectory

    for name in filter(None, names):
        for warning in warnings_of(RunDirectory(folder / name).rows("diagnostics.jsonl")):
            yield f"warning     {name}: {warning}"

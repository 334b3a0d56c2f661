"""The commands `fedpriv new` and `fedpriv run`."""

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedpriv.cli.app import ConfigFile, DataRoot, LogDiagnostics, Logs, Settings, app, picture
from fedpriv.errors import UserError, require_extra
from fedpriv.experiment.config import load_config
from fedpriv.experiment.execution import Execution, bytes_of
from fedpriv.experiment.learned import learned_nothing, warnings_of
from fedpriv.experiment.progress import RoundProgress
from fedpriv.experiment.run_directory import DIAGNOSTICS_FILE, RunDirectory
from fedpriv.privacy import rounded_up
from fedpriv.tracking.trackers import track, watched_by

if TYPE_CHECKING:
    from fedpriv.deploy.run import Connection


@app.command()
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the experiment.", show_default=False)],
    source: Annotated[str, typer.Option("--from", help="Shipped experiment to copy.")] = "quickstart",
) -> None:
    """Write NAME.toml, a first experiment, to the current directory."""
    from fedpriv.experiment.starter import write_starter

    path = write_starter(name, source)
    print(f"made        {path}\nnext        fedpriv run {shlex.quote(str(path))}")


@app.command()
def run(
    config: ConfigFile,
    out: Annotated[Path | None, typer.Option(help="Run directory.", show_default="runs/NAME")] = None,
    engine: Annotated[
        str, typer.Option(help="auto (the fastest by measurement), loop, vectorized, ray or flower.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    data_root: DataRoot = None,
    settings: Settings = None,
    workers: Annotated[
        int | None, typer.Option(help="Number of Ray workers.", show_default="one per core or GPU")
    ] = None,
    compute: Annotated[str, typer.Option(help="Engine inside a Ray worker: auto, loop or vectorized.")] = "auto",
    gpus_per_worker: Annotated[
        float | None, typer.Option(help="Share of a GPU for each Ray worker, such as 0.25.", show_default=False)
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(help="HOST:PORT of a running Ray cluster, or auto.", show_default="start one"),
    ] = None,
    state_memory: Annotated[
        str | None,
        typer.Option(help="Memory limit for client states, such as 8GB; the rest is kept on disk.", show_default=False),
    ] = None,
    state_folder: Annotated[
        Path | None, typer.Option(help="Folder for states on disk.", show_default="the temporary folder")
    ] = None,
    client_noise: Annotated[
        str | None,
        typer.Option(
            help="With trust local: fused (one draw per round, same distribution) or faithful (one per client).",
            show_default="fused",
        ),
    ] = None,
    channels_last: Annotated[
        bool | None, typer.Option("--channels-last", help="Store channels last: faster convolutions on CPUs.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="float32, or bfloat16 for faster but coarser gradients.", show_default="float32")
    ] = None,
    deploy: Annotated[
        str | None,
        typer.Option(
            metavar="CONNECTION", help="Run on real devices: the folder admin of a deployment, or a Flower connection."
        ),
    ] = None,
    test_seeded: Annotated[bool, typer.Option("--test-seeded", hidden=True)] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Resume from the checkpoint in the run directory.")] = False,
    checkpoint_every: Annotated[
        int | None, typer.Option(help="Rounds between checkpoints.", show_default="one every 10 s")
    ] = None,
    log: Logs = None,
    log_diagnostics: LogDiagnostics = None,
) -> None:
    """Run an experiment and record it in its run directory."""
    from fedpriv.runners import run_experiment

    experiment = load_config(config, settings or ())
    directory = out or Path("runs") / experiment.name
    execution = Execution(
        engine=engine,
        compute=compute,
        client_noise=client_noise,
        workers=workers,
        gpus_per_worker=gpus_per_worker,
        ray_address=ray_address,
        state_memory=None if state_memory is None else bytes_of(state_memory),
        state_folder=state_folder,
        channels_last=channels_last,
        precision=precision,
    )
    if log and deploy is not None:
        raise UserError("--log", "a run on this machine", "--deploy", "Drop one of the two options")
    with (
        track(log or (), experiment, directory, diagnostics=log_diagnostics) as sent,
        RoundProgress(experiment.training.rounds) as progress,
    ):
        summary = run_experiment(
            experiment,
            directory,
            engine=engine,
            device=device,
            data_root=data_root,
            resume=resume,
            watch=watched_by(progress, sent),
            checkpoint_every=checkpoint_every,
            execution=execution,
            deploy=None if deploy is None else _connection(deploy, seeded=test_seeded),
        )
    if summary is None:
        print(f"done        the run directory is on the server: {directory.resolve()}")
    else:
        _print_summary(summary, directory)
        _print_warnings(directory)


def _print_summary(summary: dict[str, Any], directory: Path) -> None:
    accuracy, loss = summary["test_accuracy"], summary["test_loss"]
    if summary["private"]:
        promise = f"{rounded_up(summary['epsilon'])} at delta = {summary['delta']:g}, {summary['adjacency']} adjacency"
        promise += f"\nadversary   {summary['adversary']}"
    else:
        promise = "none: this run is not private"
    if summary.get("validation_accuracy") is not None:
        unprotected = _mark(summary, "validation_accuracy")
        print(f"validation  {summary['validation_accuracy']:.4f} on the held-out examples, to choose by{unprotected}")
    print(
        f"accuracy    {accuracy:.4f} on the test set (loss {'not finite' if loss is None else format(loss, '.4f')})"
        f"{_mark(summary, 'test_accuracy')}\n"
        f"epsilon     {promise}\n"
        f"{_clock_line(summary, directory)}"
        f"speed       {summary['clients_per_second']:.0f} clients/s, engine {_engine_line(summary)}\n"
        f"picture     {picture(directory / 'curves.png')}\n"
        f"statement   {directory / 'privacy.txt'}"
    )


def _print_warnings(directory: Path) -> None:
    """Print the warnings in the diagnostics of a run.

    Raises:
        UserError: If no update was finite, so that nothing was learned. The records are complete in that case, too.
    """
    rows = RunDirectory(directory).rows("diagnostics.jsonl")
    warnings = warnings_of(rows)
    if learned_nothing(rows):
        remedy = f"{warnings[0].removesuffix('.')}. Its records are in {directory}"
        raise UserError("the run", "updates of finite numbers", "only NaN or infinity", remedy)
    for warning in warnings:
        print(f"warning     {warning}", file=sys.stderr)


def _mark(summary: dict[str, Any], score: str) -> str:
    """Return the warning for a score that is computed on the examples of protected clients; empty for other scores."""
    return "; NOT covered by epsilon: on the clients' own examples" if score in summary.get("not_covered", ()) else ""


def _clock_line(summary: dict[str, Any], directory: Path) -> str:
    """Return the line on the simulated duration and traffic of a run; empty without a virtual clock."""
    unreleased = RunDirectory(directory).read_json(DIAGNOSTICS_FILE) or {}  # the clock may reveal who took part
    found = {**unreleased, **summary}
    if "simulated_seconds" not in found:
        return ""
    hours, rest = divmod(round(found["simulated_seconds"]), 3600)
    down, up = (found[key] / 1e6 for key in ("bytes_down", "bytes_up"))
    return f"clock       {hours} h {rest // 60} min {rest % 60} s, {down:.1f} MB down, {up:.1f} MB up (simulated)\n"


def _engine_line(summary: dict[str, Any]) -> str:
    """Return the engine that ran, with the measured times if it was chosen by measurement."""
    ran, line = summary["execution"], summary["engine"]
    if ran.get("workers", 1) > 1:
        line += f" with {ran['workers']} workers, {ran['compute']} inside"
    if ran.get("seconds_per_client"):
        each = ", ".join(f"{name} {1e3 * seconds:.2g}" for name, seconds in ran["seconds_per_client"].items())
        line += f" (measured, ms a client: {each})"
    return line


def _connection(given: str, *, seeded: bool) -> "Connection":
    require_extra("--deploy", "deploy")
    from fedpriv.deploy.run import Connection

    return replace(Connection.of(given), seeded=seeded)

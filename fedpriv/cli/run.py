"""The commands `fedpriv new` and `fedpriv run`."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedpriv.checks import one_of
from fedpriv.cli.app import (
    ConfigFile,
    DataRoot,
    Deploy,
    Device,
    EngineOption,
    LogDiagnostics,
    Logs,
    Out,
    Settings,
    Workers,
    app,
)
from fedpriv.cli.terminal import say
from fedpriv.errors import UserError, require_extra

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
    say(f"made        {path}\nnext        fedpriv run {shlex.quote(str(path))}")


@app.command()
def run(
    config: ConfigFile,
    out: Out = None,
    engine: EngineOption = "auto",
    device: Device = "cpu",
    data_root: DataRoot = None,
    settings: Settings = None,
    workers: Workers = None,
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
        str | None,
        typer.Option(help="float32, or bfloat16: coarser, and faster on some processors.", show_default="float32"),
    ] = None,
    deploy: Deploy = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="With --deploy: wait at the start until all clients are connected.")
    ] = False,
    test_seeded: Annotated[bool, typer.Option("--test-seeded", hidden=True)] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Resume, or show the results of a finished run.")] = False,
    checkpoint_every: Annotated[
        int | None, typer.Option(help="Rounds between checkpoints.", show_default="one every 10 s")
    ] = None,
    log: Logs = None,
    log_diagnostics: LogDiagnostics = None,
) -> None:
    """Run an experiment and record it in its run directory."""
    from fedpriv.cli.print_run import print_summary, print_warnings
    from fedpriv.experiment.config import load_config
    from fedpriv.experiment.execution import CLIENT_NOISES, ENGINE_NAMES, LOCAL_ENGINES, Execution, bytes_of
    from fedpriv.experiment.progress import RoundProgress
    from fedpriv.runners import run_experiment
    from fedpriv.tasks.task import PRECISIONS
    from fedpriv.tracking.trackers import track, watched_by

    experiment = load_config(config, settings or ())
    if not experiment.learns:
        raise UserError("[analysis]", "a config that trains a model", "this table", "Use fedpriv analyze")
    directory = out or Path("runs") / experiment.name
    engine_name = one_of("--engine", engine, ENGINE_NAMES)
    execution = Execution(
        engine=engine_name,
        compute=one_of("--compute", compute, LOCAL_ENGINES),
        client_noise=None if client_noise is None else one_of("--client-noise", client_noise, CLIENT_NOISES),
        workers=workers,
        gpus_per_worker=gpus_per_worker,
        ray_address=ray_address,
        state_memory=None if state_memory is None else bytes_of(state_memory),
        state_folder=state_folder,
        channels_last=channels_last,
        precision=None if precision is None else one_of("--precision", precision, PRECISIONS),
    )
    if wait and deploy is None:
        raise UserError("--wait", "a run with --deploy", "a run without it", "Drop --wait, or add --deploy DIR")
    if log and deploy is not None:
        raise UserError("--log", "a run on this machine", "--deploy", "Drop one of the two options")
    with (
        track(log or (), experiment, directory, diagnostics=log_diagnostics) as sent,
        RoundProgress(experiment.training.rounds) as progress,
    ):
        summary = run_experiment(
            experiment,
            directory,
            engine=engine_name,
            device=device,
            data_root=data_root,
            resume=resume,
            watch=watched_by(progress, sent),
            checkpoint_every=checkpoint_every,
            execution=execution,
            deploy=None if deploy is None else _connection(deploy, wait, seeded=test_seeded),
        )
    if summary is None:
        say(f"done        the run directory is on the server: {directory.resolve()}")
    else:
        print_summary(summary, directory)
        print_warnings(directory)


def _connection(given: str, wait: bool, *, seeded: bool) -> "Connection":
    require_extra("--deploy", "deploy")
    from fedpriv.deploy.run import Connection

    return replace(Connection.of(given), wait=wait, seeded=seeded)

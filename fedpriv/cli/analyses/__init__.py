"""The command `fedpriv analyze`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from fedpriv.checks import one_of
from fedpriv.cli.app import ConfigFile, DataRoot, Settings, app
from fedpriv.errors import UserError


@app.command()
def analyze(
    config: ConfigFile,
    out: Annotated[Path | None, typer.Option(help="Run directory.", show_default="runs/NAME")] = None,
    engine: Annotated[str, typer.Option(help="auto, loop, vectorized, ray or flower.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    data_root: DataRoot = None,
    settings: Settings = None,
    workers: Annotated[
        int | None, typer.Option(help="Number of Ray workers.", show_default="one per core or GPU")
    ] = None,
    deploy: Annotated[
        str | None,
        typer.Option(metavar="CONNECTION", help="Ask real devices: folder of a deployment, or a Flower connection."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume, or show the answers of a finished run.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    r"""Ask about the clients' data: counts, histograms, means, variances and quantiles, with noise.

    CONFIG has the table \[analysis]. The answers are in analysis.json of the run directory.
    """
    from fedpriv.cli.analyses.print_answers import print_answers
    from fedpriv.experiment.analyses.answers import ANALYSIS_FILE
    from fedpriv.experiment.config import load_config
    from fedpriv.experiment.execution import ENGINE_NAMES, Execution
    from fedpriv.experiment.run_directory import RunDirectory
    from fedpriv.runners import run_experiment

    experiment = load_config(config, settings or ())
    if experiment.learns:
        remedy = 'Add queries, such as [analysis.labels] with kind = "labels", or train with fedpriv run'
        raise UserError("[analysis]", "this table", "a config that trains a model", remedy)
    directory = out or Path("runs") / experiment.name
    name = one_of("--engine", engine, ENGINE_NAMES)
    summary = run_experiment(
        experiment,
        directory,
        engine=name,
        device=device,
        data_root=data_root,
        resume=resume,
        execution=Execution(engine=name, workers=workers),
        deploy=deploy,
    )
    found = None if summary is None else RunDirectory(directory).read_json(ANALYSIS_FILE)
    if found is None:
        typer.echo(f"done        the answers are on the server, in {ANALYSIS_FILE} of its run directory")
    elif as_json:
        print(json.dumps(found, indent=2))
    else:
        print_answers(found, directory)

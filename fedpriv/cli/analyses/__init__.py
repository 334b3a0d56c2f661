"""The command `fedpriv analyze`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from fedpriv.checks import one_of
from fedpriv.cli.app import (
    ConfigFile,
    DataRoot,
    Deploy,
    Device,
    EngineOption,
    Out,
    Settings,
    Workers,
    app,
)
from fedpriv.errors import UserError


@app.command()
def analyze(
    config: ConfigFile,
    out: Out = None,
    engine: EngineOption = "auto",
    device: Device = "cpu",
    data_root: DataRoot = None,
    settings: Settings = None,
    workers: Workers = None,
    deploy: Deploy = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume, or show the answers of a finished run.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    r"""Ask about the clients' data: counts, histograms, means, variances, quantiles and frequent words, with noise.

    CONFIG has the table \[analysis]. The answers are in analysis.json of the run directory.
    """
    from fedpriv.cli.analyses.print_answers import print_answers
    from fedpriv.experiment.analyses.answers import ANALYSIS_FILE
    from fedpriv.experiment.analyses.heavy import HeavyAnalysis, asks_heavy_hitters
    from fedpriv.experiment.build import check_device_name
    from fedpriv.experiment.config import Config, load_config, read_tables
    from fedpriv.experiment.execution import ENGINE_NAMES, Execution
    from fedpriv.experiment.run_directory import RunDirectory
    from fedpriv.runners import run_experiment
    from fedpriv.tables import Record

    name = one_of("--engine", engine, ENGINE_NAMES)
    check_device_name(device, "--device")

    def ask(asked: Config, directory: Path) -> Record | None:
        """Run one analysis; return its answers, or None if they are on another machine."""
        summary = run_experiment(
            asked,
            directory,
            engine=name,
            device=device,
            data_root=data_root,
            resume=resume,
            execution=Execution(engine=name, workers=workers),
            deploy=deploy,
        )
        return None if summary is None else RunDirectory(directory).read_json(ANALYSIS_FILE)

    tables = read_tables(config, settings or ())
    if asks_heavy_hitters(tables):
        heavy = HeavyAnalysis(tables)
        if deploy is not None:
            expected = "a simulation: devices add up the levels of heavy hitters as separate runs, beyond the promise"
            raise UserError("--deploy", expected, deploy, "Drop --deploy")
        if heavy.local and name not in ("auto", "loop"):
            expected, remedy = "auto or loop for randomized reports of heavy hitters", "Drop the option"
            raise UserError("--engine", expected, name, remedy)
        directory = out or Path("runs") / heavy.name
        found = heavy.run(directory, ask, data_root=data_root, resume=resume)
    else:
        experiment = load_config(tables)
        if experiment.learns:
            remedy = 'Add queries, such as [analysis.labels] with kind = "labels", or train with fedpriv run'
            raise UserError("[analysis]", "this table", "a config that trains a model", remedy)
        directory = out or Path("runs") / experiment.name
        found = ask(experiment, directory)
    if found is None:
        typer.echo(f"done        the answers are on the server, in {ANALYSIS_FILE} of its run directory")
    elif as_json:
        print(json.dumps(found, indent=2))
    else:
        print_answers(found, directory)

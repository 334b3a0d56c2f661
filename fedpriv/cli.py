"""The command line: fedpriv run | privacy | data | list."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from rich.console import Console
from rich.table import Table

from fedpriv import __version__
from fedpriv.errors import UserError
from fedpriv.experiment.assemble import IN_PROCESS_ENGINES, make_federation, sampling_of
from fedpriv.experiment.config import load_config
from fedpriv.experiment.progress import RoundProgress
from fedpriv.experiment.records import jsonable
from fedpriv.experiment.run import run_experiment
from fedpriv.learning.datasets import DATASETS
from fedpriv.learning.federation import plot_who_holds_what, who_holds_what
from fedpriv.learning.local_work import LOCAL_WORKS
from fedpriv.learning.models import MODELS
from fedpriv.learning.partitions import PARTITIONS
from fedpriv.methods import METHODS
from fedpriv.privacy import SAMPLINGS, privacy_statement, rounded_up
from fedpriv.rounds import agree
from fedpriv.streams import SeededStreams

__all__ = ["app", "main"]

app = typer.Typer(
    help="Differentially private federated learning.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.callback(invoke_without_command=True)
def version(
    context: typer.Context,
    show: Annotated[bool, typer.Option("--version", help="Show the version and stop.")] = False,
) -> None:
    """Differentially private federated learning."""
    if show:
        print(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="The experiment's TOML file.", show_default=False)]
Settings = Annotated[
    list[str] | None,
    typer.Option("-s", "--set", metavar="table.key=value", help="Change a key of the config; empty value removes it."),
]
DataRoot = Annotated[
    Path | None, typer.Option(help="Where data sets lie; else FEDPRIV_DATA, else ./data.", show_default=False)
]

_FLOWER = {"flower": "Flower's simulation: the same rules as messages between a ServerApp and ClientApps."}


@app.command()
def run(
    config: ConfigFile,
    out: Annotated[Path | None, typer.Option(help="The run directory; else runs/NAME.", show_default=False)] = None,
    engine: Annotated[str, typer.Option(help="auto, loop, vectorized or flower.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    data_root: DataRoot = None,
    settings: Settings = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the run directory.")] = False,
    checkpoint_every: Annotated[
        int | None, typer.Option(help="Rounds between checkpoints; else one every ten seconds.", show_default=False)
    ] = None,
) -> None:
    """Run an experiment and fill its run directory."""
    experiment = load_config(config, settings or ())
    directory = out or Path("runs") / experiment.name
    if checkpoint_every is not None and checkpoint_every < 1:
        raise UserError("--checkpoint-every", "at least 1", checkpoint_every, "Give a number of rounds")
    with RoundProgress(experiment.training.rounds) as progress:
        if engine == "flower":
            from strategies.launch import run_with_flower

            summary = run_with_flower(
                experiment, directory, device=device, data_root=data_root, resume=resume, watch=progress
            )
        else:
            summary = run_experiment(
                experiment,
                directory,
                engine=engine,
                device=device,
                data_root=data_root,
                resume=resume,
                watch=progress,
                checkpoint_every=checkpoint_every,
            )
    _print_summary(summary, directory)


@app.command()
def privacy(
    config: ConfigFile,
    settings: Settings = None,
    data_root: DataRoot = None,
    as_json: Annotated[bool, typer.Option("--json", help="The plan as JSON.")] = False,
) -> None:
    """Show what an experiment promises: noise, epsilon, statement. Trains nothing."""
    experiment = load_config(config, settings or ())
    sampling = sampling_of(experiment, data_root)
    plan = experiment.plan(sampling)
    agree(experiment.method, sampling, plan, SeededStreams(experiment.seed))
    if as_json:
        absent = {"private": False, "epsilon": None, "delta": None, "noise_multiplier": None, "noise_stddev": 0.0}
        absent |= dict.fromkeys(("l2_sensitivity", "trust", "adjacency", "accountant"))
        print(json.dumps(jsonable(absent if plan is None else plan.as_dict()), indent=2))
    else:
        print(privacy_statement(plan, method=experiment.method_name, randomness="seeded"))


@app.command()
def data(
    config: ConfigFile,
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option(help="Where to; else runs/NAME-data.", show_default=False)] = None,
    data_root: DataRoot = None,
) -> None:
    """Show who holds what: a table and a picture of every client's examples by label."""
    experiment = load_config(config, settings or ())
    federation = make_federation(experiment, data_root)
    directory = out or Path("runs") / f"{experiment.name}-data"
    directory.mkdir(parents=True, exist_ok=True)
    table = who_holds_what(federation)
    table.to_csv(directory / "clients.csv", index=False)
    plot_who_holds_what(federation, directory / "clients.png", partition=experiment.tables["data"]["partition"])
    print(table.to_string(index=False, max_rows=24))
    print(f"\ntable    {directory / 'clients.csv'}\npicture  {directory / 'clients.png'}")


@app.command(name="list")
def list_(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """List methods, data, models, engines and what else a config can name."""
    kinds = {
        "methods": _describe(METHODS),
        "data": _describe(DATASETS),
        "partitions": _describe(PARTITIONS),
        "models": _describe(MODELS),
        "local": _describe(LOCAL_WORKS),
        "cohorts": _describe(SAMPLINGS, hidden=("population",)),
        "engines": {n: {"about": _first_line(k), "keys": {}} for n, k in IN_PROCESS_ENGINES.items()}
        | {n: {"about": about, "keys": {}} for n, about in _FLOWER.items()},
    }
    if as_json:
        print(json.dumps(kinds, indent=2))
        return
    console = Console()
    for title, entries in kinds.items():
        table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
        for column in ("name", "what it is", "keys"):
            table.add_column(column, overflow="fold")
        for name, entry in entries.items():
            keys = ", ".join(f"{key}={json.dumps(value)}" for key, value in entry["keys"].items())
            table.add_row(name, entry["about"], keys)
        console.print(table)
        console.print()


def _describe(kinds: dict[str, type], hidden: tuple[str, ...] = ()) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "about": _first_line(kind),
            "keys": {f.name: _default(f) for f in dataclasses.fields(kind) if f.init and f.name not in hidden},
        }
        for name, kind in kinds.items()
    }


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return "required" if field.default_factory is dataclasses.MISSING else field.default_factory()


def _first_line(kind: type) -> str:
    return (kind.__doc__ or "").strip().splitlines()[0]


def _print_summary(summary: dict[str, Any], directory: Path) -> None:
    accuracy, loss = summary["test_accuracy"], summary["test_loss"]
    if summary["private"]:
        promise = f"{rounded_up(summary['epsilon'])} at delta = {summary['delta']:g}, {summary['adjacency']} adjacency"
        promise += f"\nadversary   {summary['adversary']}"
    else:
        promise = "none: this run is not private"
    print(
        f"accuracy    {accuracy:.4f} on the test set (loss {'not finite' if loss is None else format(loss, '.4f')})\n"
        f"epsilon     {promise}\n"
        f"speed       {summary['clients_per_second']:.0f} clients/s, engine {summary['engine']}\n"
        f"picture     {directory / 'curves.png'}\n"
        f"statement   {directory / 'privacy.txt'}"
    )


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; a mistake of the user's is one line on stderr and exit code 2."""
    try:
        code = app(args=arguments, standalone_mode=False)
    except UserError as error:
        _fail(str(error))
    except click.ClickException as error:
        _fail(" ".join(error.format_message().split()))
    except (KeyboardInterrupt, click.Abort):
        print("fedpriv: stopped. Runs in process go on from the last checkpoint with --resume.", file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as error:
        where = error.filename or "file system"
        _fail(f"{where}: {error.strerror or error}. Mend it and run again; a run goes on with --resume")
    else:
        raise SystemExit(code if isinstance(code, int) else 0)


def _fail(line: str) -> None:
    print(f"fedpriv: {line}", file=sys.stderr)
    raise SystemExit(2) from None


if __name__ == "__main__":
    main()

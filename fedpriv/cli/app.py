"""The Typer application and the options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

from fedpriv.errors import has_extra
from fedpriv.version import __version__

__all__ = [
    "ConfigFile",
    "DataRoot",
    "Deploy",
    "Device",
    "EngineOption",
    "LogDiagnostics",
    "Logs",
    "Out",
    "Settings",
    "Workers",
    "app",
    "picture",
]


app = typer.Typer(
    help="Differentially private federated learning.",
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.callback(invoke_without_command=True)
def version(
    context: typer.Context,
    show: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Differentially private federated learning."""
    if show:
        print(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="TOML file of the experiment.", show_default=False)]
Settings = Annotated[
    list[str] | None,
    typer.Option("-s", "--set", metavar="table.key=value", help="Override a config key; an empty value removes it."),
]
DataRoot = Annotated[
    Path | None,
    typer.Option(help="Folder of the data sets.", show_default="$FEDPRIV_DATA, otherwise ./data"),
]
Out = Annotated[Path | None, typer.Option(help="Run directory.", show_default="runs/NAME")]
EngineOption = Annotated[
    str, typer.Option("--engine", help="auto (the fastest by measurement), loop, vectorized, ray or flower.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
Workers = Annotated[int | None, typer.Option(help="Number of Ray workers.", show_default="one per core or GPU")]
Deploy = Annotated[
    str | None,
    typer.Option(metavar="CONNECTION", help="Run on real devices: folder of a deployment, or a Flower connection."),
]
Logs = Annotated[
    list[str] | None,
    typer.Option("--log", metavar="TRACKER", help="Also log to tensorboard, mlflow or wandb; repeatable."),
]
LogDiagnostics = Annotated[
    bool | None,
    typer.Option(
        "--log-diagnostics/--no-log-diagnostics",
        help="Also send unreleased diagnostics to the trackers.",
        show_default="only for non-private runs",
    ),
]


def picture(path: Path) -> str:
    """Return the path of a picture, or how to install the package that draws it."""
    return str(path) if has_extra("report") else "none: install 'fedpriv[report]' to draw it"

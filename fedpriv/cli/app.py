"""The program and what all of its commands share."""

from pathlib import Path
from typing import Annotated

import typer

from fedpriv.errors import has_extra
from fedpriv.version import __version__

__all__ = ["ConfigFile", "DataRoot", "LogDiagnostics", "Logs", "Settings", "app", "picture"]


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
Logs = Annotated[
    list[str] | None,
    typer.Option("--log", metavar="TRACKER", help="Send rounds to tensorboard, mlflow or wandb too; may be repeated."),
]
LogDiagnostics = Annotated[
    bool | None,
    typer.Option(
        "--log-diagnostics/--no-log-diagnostics",
        help="Whether what is not released is sent there as well.",
        show_default="of runs without privacy",
    ),
]


def picture(path: Path) -> str:
    """A picture's path, or what draws it."""
    return str(path) if has_extra("report") else "none: pip install 'fedpriv[report]' draws it"

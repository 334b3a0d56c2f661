"""The commands `fedpriv data` and `fedpriv list`."""

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedpriv.cli.app import DataRoot, Settings, app, picture
from fedpriv.errors import has_extra

if TYPE_CHECKING:
    from fedpriv.data.federation import Holders
    from fedpriv.experiment.config import Config


@app.command()
def data(
    configs: Annotated[list[Path], typer.Argument(metavar="CONFIG ...", help="TOML files.", show_default=False)],
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option(help="Output folder.", show_default="runs/NAME-data")] = None,
    data_root: DataRoot = None,
    all_gradients: Annotated[
        bool, typer.Option("--all-gradients", help="Compare the gradients of up to 200 clients at any cost.")
    ] = False,
) -> None:
    """Show each client's data as a table and a picture, and how much clients differ.

    With several configs, show only how much clients differ, side by side.
    """
    from rich.console import Console
    from rich.table import Table

    from fedpriv.data.heterogeneity import metrics_of
    from fedpriv.experiment.build import assemble_clients
    from fedpriv.experiment.config import load_config
    from fedpriv.experiment.heterogeneity import measure_heterogeneity

    columns = {}
    for path in configs:
        experiment = load_config(path, settings or ())
        population = assemble_clients(experiment, data_root=data_root)
        columns[str(path)] = metrics_of(measure_heterogeneity(experiment, population, bounded=not all_gradients))
        if len(configs) == 1:
            _show_clients(experiment, population.federation, out or Path("runs") / f"{experiment.name}-data")
    shown = Table(box=None, padding=(0, 2, 0, 0))
    shown.add_column("", no_wrap=True)
    for name in columns:
        shown.add_column(name, overflow="fold")
    for key in dict.fromkeys(key for measures in columns.values() for key in measures):
        shown.add_row(key, *("" if key not in measures else f"{measures[key]:.6g}" for measures in columns.values()))
    Console().print(shown)


def _show_clients(experiment: "Config", federation: "Holders", directory: Path) -> None:
    from fedpriv.data.federation import plot_who_holds_what, who_holds_what
    from fedpriv.files import write_atomically
    from fedpriv.privacy.released import OWNER_ONLY

    directory.mkdir(parents=True, exist_ok=True)
    table = who_holds_what(federation)
    write_atomically(directory / "clients.csv", table.to_csv(index=False), OWNER_ONLY)
    if has_extra("report"):
        drawn = io.BytesIO()
        plot_who_holds_what(federation, drawn, partition=experiment.tables["data"]["partition"])
        write_atomically(directory / "clients.png", drawn.getvalue(), OWNER_ONLY)
    print(table.to_string(index=False, max_rows=24))
    print(f"\ntable    {directory / 'clients.csv'}\npicture  {picture(directory / 'clients.png')}\n")


@app.command(name="list")
def list_(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List everything a config can name, such as methods, data sets, models and engines, and which parts run in C."""
    from rich.console import Console
    from rich.table import Table

    from fedpriv.cli.catalogue import catalogue

    kinds = catalogue()
    if as_json:
        print(json.dumps(kinds, indent=2))
        return
    console = Console()
    for title, entries in kinds.items():
        table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
        for column in ("name", "description", "keys"):
            table.add_column(column, overflow="fold")
        for name, entry in entries.items():
            keys = ", ".join(f"{key}={json.dumps(value)}" for key, value in entry["keys"].items())
            table.add_row(name, entry["about"], keys)
        console.print(table)
        console.print()

"""The commands `fedpriv data` and `fedpriv list`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from fedpriv.cli.app import DataRoot, Settings, app


@app.command()
def data(
    configs: Annotated[list[Path], typer.Argument(metavar="CONFIG ...", help="TOML files.", show_default=False)],
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option(help="Output folder.", show_default="runs/NAME-data")] = None,
    data_root: DataRoot = None,
    all_gradients: Annotated[
        bool, typer.Option("--all-gradients", help="Compare the gradients of up to 200 clients at any cost.")
    ] = False,
    clients: Annotated[bool, typer.Option("--clients", help="Also print the table of all clients.")] = False,
) -> None:
    """Show how many examples clients hold, a picture of their labels, and how much clients differ.

    With several configs, show only how much clients differ, side by side.
    """
    from rich.console import Console
    from rich.table import Table

    from fedpriv.cli.print_data import show_clients
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
            show_clients(
                experiment, population.federation, out or Path("runs") / f"{experiment.name}-data", whole=clients
            )
    shown = Table(box=None, padding=(0, 2, 0, 0))
    shown.add_column("", no_wrap=True)
    stems = [Path(name).stem for name in columns]
    for stem, name in zip(stems, columns, strict=True):
        shown.add_column(stem if stems.count(stem) == 1 else name, overflow="fold", justify="right")
    for key in dict.fromkeys(key for measures in columns.values() for key in measures):
        shown.add_row(key, *("" if key not in measures else f"{measures[key]:.6g}" for measures in columns.values()))
    Console().print(shown)


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

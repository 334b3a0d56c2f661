"""The commands `fedpriv data` and `fedpriv list`."""

import dataclasses
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fedpriv.cli.app import DataRoot, Settings, app, picture
from fedpriv.clock import DEVICES, SCHEDULES
from fedpriv.data.dataset import DATASETS
from fedpriv.data.federation import Holders, plot_who_holds_what, who_holds_what
from fedpriv.data.heterogeneity import metrics_of
from fedpriv.data.partitions import PARTITIONS
from fedpriv.data.shifts import SHIFTS
from fedpriv.engines.native import feedback_in_c
from fedpriv.errors import has_extra
from fedpriv.experiment.build import assemble_clients
from fedpriv.experiment.config import Config, load_config
from fedpriv.experiment.execution import ENGINES
from fedpriv.experiment.heterogeneity import measure_heterogeneity
from fedpriv.files import write_atomically
from fedpriv.mechanisms.gaussian import noise_is_in_c
from fedpriv.methods import METHODS, SERVER_OPTIMIZERS
from fedpriv.native import about_compiled
from fedpriv.privacy import SAMPLINGS
from fedpriv.privacy.released import OWNER_ONLY
from fedpriv.tasks.local_work import LOCAL_WORKS
from fedpriv.tasks.models import MODELS


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


def _show_clients(experiment: Config, federation: Holders, directory: Path) -> None:
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
    kinds = {
        "methods": _describe(METHODS),
        "server": _describe(SERVER_OPTIMIZERS),
        "data": _describe(DATASETS),
        "partitions": _describe(PARTITIONS),
        "shifts": _describe(SHIFTS),
        "models": _describe(MODELS),
        "local": _describe(LOCAL_WORKS),
        "cohorts": _describe(SAMPLINGS, hidden=("population",)),
        "devices": _describe(DEVICES),
        "schedules": _describe(SCHEDULES),
        "engines": {name: {"about": about, "keys": {}} for name, about in ENGINES.items()},
        "in C": {
            "client step": {"about": about_compiled(feedback_in_c() is not None), "keys": {}},
            "noise": {"about": about_compiled(noise_is_in_c()), "keys": {}},
        },
    }
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


def _describe(kinds: Mapping[str, type[Any]], hidden: tuple[str, ...] = ()) -> dict[str, dict[str, Any]]:
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

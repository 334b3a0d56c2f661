"""The command `fedpriv privacy`."""

from pathlib import Path
from typing import Annotated

import typer

from fedpriv.cli.app import DataRoot, Settings, app
from fedpriv.errors import UserError


@app.command()
def privacy(
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG", help="TOML file of the experiment.", show_default=False)
    ] = None,
    settings: Settings = None,
    data_root: DataRoot = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="Draw the trade-off curve of type I and type II error."),
    ] = None,
    spent: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Instead of CONFIG: add up the privacy spent by all runs below DIR."),
    ] = None,
) -> None:
    """Show the noise, epsilon and privacy statement of an experiment, or the privacy that runs have spent.

    Nothing is trained.
    """
    if (config is None) == (spent is None) or (spent is not None and (settings or plot)):
        remedy = "Give either CONFIG, with -s and --plot if needed, or --spent DIR alone"
        raise UserError("CONFIG", "either a config or --spent", "both" if spent else "an empty command", remedy)
    from fedpriv.cli.print_privacy import print_levels, print_plan, print_spent
    from fedpriv.experiment.analyses.heavy import HeavyAnalysis, asks_heavy_hitters
    from fedpriv.experiment.config import load_config, read_tables

    if spent is not None:
        print_spent(spent, as_json=as_json)
        return
    assert config is not None
    tables = read_tables(config, settings or ())
    if not asks_heavy_hitters(tables):
        print_plan(load_config(tables), data_root, plot, as_json=as_json)
    elif plot is None:
        print_levels(HeavyAnalysis(tables), data_root, as_json=as_json)
    else:
        raise UserError("--plot", "a config without heavy hitters", str(plot), "Drop --plot")

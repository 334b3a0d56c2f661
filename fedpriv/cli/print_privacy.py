"""Output of `fedpriv privacy`."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedpriv.cli.terminal import say
from fedpriv.errors import UserError
from fedpriv.experiment.analyses.heavy import HeavyAnalysis
from fedpriv.experiment.build import assemble_clients, make_federation, plan_of, sampling_of
from fedpriv.experiment.config import Config
from fedpriv.experiment.run_directory import jsonable
from fedpriv.privacy import (
    NOT_PROMISED,
    Simulated,
    noise_against_signal,
    privacy_statement,
    quoted,
    rounded_up,
    with_analyses,
)
from fedpriv.privacy.own_sizes import of_sizes, sizes_in_words
from fedpriv.rounds import make_agreement
from fedpriv.streams import SeededStreams

if TYPE_CHECKING:
    from fedpriv.report.spent import Group

__all__ = ["print_levels", "print_plan", "print_spent"]

_EARLY = "ended before a privacy plan was recorded; nothing was released or spent"


def _size_of(experiment: Config, data_root: Path | None) -> int | None:
    """Return the number of parameters; None if this machine lacks the data set, on which it depends."""
    try:
        return assemble_clients(experiment, data_root=data_root).task.layout.size
    except UserError:
        return None


def print_plan(experiment: Config, data_root: Path | None, plot: Path | None, *, as_json: bool) -> None:
    """Print the privacy statement of an experiment, or its plan as JSON; draw the trade-off curve to `plot`."""
    sampling = sampling_of(experiment, data_root)
    plan = plan_of(experiment, sampling, data_root)
    make_agreement(experiment.method, sampling, plan, SeededStreams(experiment.seed), experiment.controller)
    by_client = of_sizes(plan, make_federation(experiment, data_root).sizes) if experiment.needs_sizes else {}
    size = None if plan is None or not experiment.learns else _size_of(experiment, data_root)
    if plot is not None:
        from fedpriv.experiment.pictures.tradeoff import plot_trade_off

        plot_trade_off(plan, plot, experiment.name)
    choice = experiment.privacy
    together, paragraph = with_analyses(plan, choice and choice.analyses, choice and choice.analyses_mu)
    if as_json:
        absent = {"private": False, "epsilon": None, "delta": None, "noise_multiplier": None, "noise_stddev": 0.0}
        absent |= {**dict.fromkeys(("l2_sensitivity", "trust", "adjacency", "accountant")), **NOT_PROMISED}
        found = absent if plan is None else plan.as_dict(thorough=True)
        if plan is not None and plan.private and size is not None:
            found |= noise_against_signal(plan, size).as_dict()
        found |= by_client | together
        print(json.dumps(jsonable(found), indent=2))
    else:
        statement = privacy_statement(
            plan,
            method=experiment.title,
            randomness="seeded",
            size=size,
            simulated=Simulated(clock=experiment.devices is not None),
            data=experiment.facts,
            recorded=True,
        )
        say(quoted(statement, paragraph) + sizes_in_words(by_client), paragraphs=True)
        if plot is not None:
            say(f"picture     {plot}")


def print_levels(asked: HeavyAnalysis, data_root: Path | None, *, as_json: bool) -> None:
    """Print the promise of all levels of an analysis for heavy hitters."""
    promise, statement = asked.promise(data_root)
    if as_json:
        print(json.dumps(jsonable(promise), indent=2))
    else:
        say(statement, paragraphs=True)


def print_spent(folder: Path, *, as_json: bool) -> None:
    """Print the privacy that the runs below a folder have spent."""
    from fedpriv.report.spent import notes_on, spent_below

    groups = spent_below(folder)
    if as_json:
        found = {"folder": str(folder), "groups": [group.as_dict() for group in groups], "notes": notes_on(groups)}
        print(json.dumps(jsonable(found), indent=2))
        return
    console = Console()
    for group in groups:
        if not group.recorded:
            console.print(f"{_EARLY}:", markup=False, highlight=False)
            console.print(*(f"  {run.name}" for run in group.runs), "", sep="\n", markup=False, highlight=False)
            continue
        promise = "no privacy" if group.trust is None else f"trust {group.trust}, {group.adjacency}"
        console.print(f"{group.label}: {promise}", markup=False, highlight=False)
        if group.adversary is not None:
            console.print(f"adversary: {group.adversary}", markup=False, highlight=False)
        console.print(_spent_table(group))
        console.print(f"composition: {group.total.how}\n", markup=False, highlight=False)
    for note in notes_on(groups):
        console.print(f"* {note}", markup=False, highlight=False)


def _spent_table(group: "Group") -> Table:
    shown = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("run", "state", "rounds", "epsilon", "delta"):
        shown.add_column(name, overflow="fold", justify="left" if name in ("run", "state") else "right")
    for run in group.runs:
        delta = "" if run.plan is None else f"{run.plan.delta:g}"
        shown.add_row(escape(run.name), run.state, run.extent, _epsilon(run.epsilon_after(run.rounds)), delta)
    delta = "" if group.total.delta is None else f"{group.total.delta:g}"
    shown.add_row("together", "", "", _epsilon(group.total.epsilon), delta, style="bold")
    return shown


def _epsilon(epsilon: float) -> str:
    return rounded_up(epsilon) if math.isfinite(epsilon) else "infinite"

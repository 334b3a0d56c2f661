"""Output of `fedpriv analyze`."""

from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedpriv.cli.terminal import say
from fedpriv.privacy import rounded_up
from fedpriv.tables import Record

__all__ = ["print_answers"]

_FOUND = ("items", "cut", "value", "standard_error")
MAX_ROWS = 40
"""Most rows of one answer in the terminal; `analysis.json` has all."""


def print_answers(found: Record, directory: Path) -> None:
    """Print the answers of an analysis as a table, with their promise.

    Args:
        found: The content of `analysis.json`.
        directory: The run directory.
    """
    shown = Table(box=None, padding=(0, 2, 0, 0))
    kinds = {answer["kind"] == "quantiles" for answer in found["answers"].values()}
    error = {False: "standard error", True: "interval"}
    uncertain = error[kinds.pop()] if len(kinds) == 1 else "standard error or interval"
    for name in ("question", "of", "value", uncertain, "epsilon alone"):
        shown.add_column(name, justify="left" if name in ("question", "of") else "right", overflow="fold")
    for name, answer in found["answers"].items():
        rows = list(_rows(answer))
        alone = answer["epsilon_alone"]
        for number, (of, value, error) in enumerate(rows[:MAX_ROWS]):
            first = number == 0
            cost = rounded_up(alone) if first and alone is not None else ""
            shown.add_row(escape(name) if first else "", escape(of), value, error, cost)
        if len(rows) > MAX_ROWS:
            shown.add_row("", f"{len(rows) - MAX_ROWS:,} more in analysis.json", "", "", "")
    Console().print(shown)
    promise = "none: this analysis is not private"
    if found["private"]:
        of_all = f"{rounded_up(found['epsilon'])} at delta = {found['delta']:g} for all answers together"
        promise = f"{of_all}, {found['adjacency']} adjacency, unit {found['unit']}\nadversary   {found['adversary']}"
    weight = "clients: every client counts as one" if found["records"] is None else "records"
    say(
        f"weight      {weight}\nepsilon     {promise}\n"
        f"answers     {directory / 'analysis.json'}\nstatement   {directory / 'privacy.txt'}"
    )


def _rows(answer: Record) -> Iterator[tuple[str, str, str]]:
    """Yield what a value is of, the value, and its standard error; of quantiles, the interval of two rank errors."""
    if answer["kind"] == "moments":
        for place, column in enumerate(answer["columns"]):
            for key in ("mean", "variance"):
                error = answer[f"{key}_standard_error"][place]
                yield f"{key} of {column}", _number(answer[key][place]), _number(error)
    elif answer["kind"] == "quantiles":
        for rank, value, low, high in zip(*(answer[key] for key in ("at", "value", "low", "high")), strict=True):
            yield f"quantile {rank:g}", _number(value), f"{_number(low)} to {_number(high)}"
    elif answer["kind"] == "heavy-hitters":
        for item, cut, value, error in zip(*(answer[key] for key in _FOUND), strict=True):
            yield item + "..." * cut, _number(value), _number(error)
    elif answer["kind"] == "count":
        yield "records", _number(answer["value"]), _number(answer["standard_error"])
    else:
        edges, names = answer.get("edges"), answer.get("names")
        for place, value in enumerate(answer["value"]):
            of = names[place] if names else str(place)
            of = of if edges is None else f"{edges[place]:g} to {edges[place + 1]:g}"
            yield of, _number(value), _number(answer["standard_error"])


def _number(value: float) -> str:
    return f"{value:.4g}"

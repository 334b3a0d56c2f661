"""The title of a report, and the sentences that say what came out."""

from collections.abc import Sequence

import pandas as pd

from fedpriv.plugins import bare_reference
from fedpriv.report import words
from fedpriv.report.analysis import Judge
from fedpriv.report.study import Row, Study
from fedpriv.tasks.metrics import Metric

__all__ = ["MAX_FINDINGS", "findings", "title_of"]

MAX_FINDINGS = 4
"""Guarantees and problems with their own sentence; the table of the best settings has all."""


def title_of(study: Study) -> str:
    """Return the methods, or their number, and the data of a study."""
    methods = study.runs["method"].drop_duplicates().tolist()
    data = words.listed(study.runs["data.name"].map(bare_reference), 3)
    return f"{methods[0] if len(methods) == 1 else f'{len(methods)} methods'} on {data}"


def findings(best: pd.DataFrame, titles: Sequence[str], metric: Metric, judge: Judge) -> list[str]:
    """Return a sentence for each problem and guarantee: the best method, the next one, and how sure their order is.

    Args:
        best: See `analysis.best_settings`; the methods of a problem and guarantee are in order of merit.
        titles: The words for each row's problem and guarantee; empty if there is only one.
        metric: The metric of the study.
        judge: The examples that ranked the methods.
    """
    groups: dict[str, list[Row]] = {}
    for row, title in zip(best.to_dict("records"), titles, strict=True):
        groups.setdefault(title, []).append(row)
    told = [_finding(title, rows, metric, judge) for title, rows in list(groups.items())[:MAX_FINDINGS]]
    more = len(groups) - MAX_FINDINGS
    return told + ([f"{words.many(more, 'more comparison')}: see the table of the best settings."] if more > 0 else [])


def _finding(title: str, rows: Sequence[Row], metric: Metric, judge: Judge) -> str:
    first, column = rows[0], f"test_{metric.name}"
    scores = [words.score(row, column, metric) + (" %" if metric.bounded else "") for row in rows[:2]]
    text = f"{title[:1].upper()}{title[1:]}: " if title else ""
    name = f"{first['method']} ({first['hyperparameters']})" if first["hyperparameters"] else str(first["method"])
    if len(rows) == 1:
        return f"{text}{name} has a test {metric.label} of {scores[0]}{_seeds(first)}."
    by = f" by {judge} {metric.label}"
    same = first["seeds"] == rows[1]["seeds"]
    text += f"{name} is best{by}, with a test {metric.label} of {scores[0]}{'' if same else _seeds(first)}; "
    text += f"next is {rows[1]['method']} with {scores[1]}{_seeds(rows[1], same)}. "
    return text + _certainty(first, rows[1], column)


def _seeds(row: Row, each: bool = False) -> str:
    mean = "means" if each else "mean"
    return f" ({mean} of {row['seeds']} seeds)" if row["seeds"] > 1 else " (one seed)"


def _certainty(first: Row, second: Row, column: str) -> str:
    """Return a sentence on the order of two methods, by their ranges over seeds."""
    if min(first["seeds"], second["seeds"]) < 2:
        return "One seed does not show whether this order is more than chance."
    apart = first[f"{column}_min"] > second[f"{column}_max"] or first[f"{column}_max"] < second[f"{column}_min"]
    return f"Their ranges over seeds {'do not overlap' if apart else 'overlap: the order may be chance'}."

"""The paragraphs of a report, and its number formats."""

import math
from collections.abc import Iterable
from typing import Any

import pandas as pd

from fedpriv.privacy import rounded_up
from fedpriv.report.analysis import Judge, Quantity
from fedpriv.report.figures import MAX_SERIES
from fedpriv.report.study import Row, Study, as_text
from fedpriv.sweeps.tuning import about_tuning

__all__ = [
    "about_choice",
    "about_cost",
    "about_curves",
    "about_marks",
    "about_trials",
    "about_uncovered",
    "accuracy",
    "accuracy_range",
    "brief",
    "caption",
    "epsilon_delta",
    "listed",
    "many",
    "not_released",
    "number",
    "percent",
    "plus_minus",
    "points",
]

FIGURES = (
    "Each point is the best setting at that value, selected by the rule above: the mean over its seeds, with the "
    "range over seeds. For costs, the front is shown: no other setting is both as accurate and cheaper."
)
SPREAD = (
    "± is the standard deviation over seeds (of the sample). Pictures show the range over seeds, with a tick at the "
    "mean, all on one scale. “Best of” is the number of settings that the best was selected from."
)


def about_trials(study: Study) -> str:
    """Return the number of trials, by status."""
    count = study.trials["status"].value_counts()
    words = {"done": "done", "failed": "failed", "stopped": "stopped early", "left": "not finished"}
    counts = ", ".join(f"{count[status]:,} {word}" for status, word in words.items() if status in count)
    return f"{many(len(study.trials), 'trial')}: {counts}."


def about_choice(study: Study, settings: pd.DataFrame, best: pd.DataFrame, judge: Judge) -> list[str]:
    """Return paragraphs on how the best settings were selected, on which data, and the limits of the selection."""
    paragraphs = [_rule(study, judge) if len(settings) > len(best) else _NO_CHOICE]
    if settings["privacy"].nunique() > 1:
        paragraphs.append(
            "Rows with different privacy are listed separately: an accuracy under one guarantee says nothing about "
            "another."
        )
    if settings["seeds"].nunique() > 1:
        paragraphs.append("Settings have different numbers of seeds; a mean over few of them is less certain.")
    stopped = int((study.trials["status"] == "stopped").sum())
    if stopped:
        paragraphs.append(
            f"{many(stopped, 'trial')} of the sweep stopped early, based on the accuracy at that time (validation "
            "accuracy if available, otherwise test accuracy). They are excluded from all means and shares on this "
            "page: a setting with only some finished seeds looks better than it is."
        )
    if study.tuning is not None:
        paragraphs += [f"{sentence[0].upper()}{sentence[1:]}." for sentence in about_tuning(study.tuning)]
        paragraphs.append(
            "This page shows all trials, so it must stay secret as well. It selects the best settings by their means: "
            "that is not the selection that the tuning's epsilon covers."
        )
    elif study.runs["private"].any():
        paragraphs.append(
            "Tuning is not free under privacy. The epsilon shown is that of one run; it includes neither the other "
            "trials nor the selection among them. See “Privacy guarantees”."
        )
    return paragraphs


_NO_CHOICE = (
    "Each method was run with one setting, so nothing was selected here. The values may have been set earlier by "
    "looking at test data."
)


def _rule(study: Study, judge: Judge) -> str:
    lacking = study.runs["validation_accuracy"].isna()
    if judge == "validation":
        return (
            "The best setting is the one with the highest validation accuracy after the last round, as the mean over "
            "seeds. No selection on this page looked at the test accuracy shown next to it."
        )
    why = "no run has a validation accuracy" if lacking.all() else "not every run has a validation accuracy"
    return (
        "The best setting is the one with the highest test accuracy after the last round, as the mean over seeds, "
        f"because {why if lacking.any() else 'that was requested'}. The selection looked at the test data, so the "
        "accuracy of the best of many settings is somewhat too high. The bias grows with the number of settings, and "
        "with fewer seeds."
    )


def about_cost(study: Study) -> list[str]:
    """Return paragraphs on costs that the epsilon of a single run does not include."""
    count = int(study.runs["private"].sum())
    if not count:
        return ["No run here is private: there is no guarantee for any client's data against any observer."]
    return [
        f"Each of the {many(count, 'private run')} here keeps its own guarantee. If they all used the same clients' "
        "data, their privacy costs add up. A hyperparameter selected by their results is one more release: the "
        "epsilon shown does not include the selection of hyperparameters. For private selection and its cost, see "
        "Liu and Talwar (2019), Private Selection from Private Candidates, and Papernot and Steinke (2022), "
        "Hyperparameter Tuning with Rényi Differential Privacy. Only trials with public training and test data cost "
        "nothing.",
        "An epsilon is meaningful only together with its delta, the adversary, and the data that are hidden. Epsilon "
        "is rounded up.",
    ]


def about_curves(settings: int, held: int, longest: int, points: int) -> str:
    """Return a text about the curves, and about those left out to keep the page small.

    Args:
        settings: Number of settings with a curve.
        held: Maximum number of curves on the page.
        longest: Number of recorded rounds of the longest curve.
        points: Maximum number of points per curve on the page.
    """
    text = (
        "Each curve is a setting: the mean over its seeds and, if few curves are shown, the range over seeds. Click a "
        "name below the chart to hide or show its curves."
    )
    if settings > held:
        text += f" Of {settings:,} settings the page has the curves of {held}: the best of each, then by accuracy."
    if longest > points:
        text += f" Of up to {longest:,} recorded rounds a curve shows {points}, evenly spread."
    return text + (" The file tables/curves.csv has all of them." if settings > held or longest > points else "")


def caption(quantity: Quantity, table: pd.DataFrame, same: str, *, released: bool = True) -> str:
    """Return the caption of a quantity's figure.

    Args:
        quantity: The quantity.
        table: The data in the figure.
        same: The properties that all shown settings share, in words.
        released: True if the quantity is released.
    """
    parts = [f"All settings have {same}."] if same else []
    if not released:
        parts.append(not_released(quantity.label, costs=quantity.cost))
    if quantity.column == "epsilon":
        parts.append("Epsilon is rounded up.")
        if (table["x"] == math.inf).any():
            parts.append("Dotted lines are runs without privacy.")
    count = table["series"].nunique()
    if count > MAX_SERIES:
        parts.append(f"Of {count} series the {MAX_SERIES} with the best accuracy are drawn; the table has all.")
    return " ".join(parts)


def about_marks(mark: str, prefix: str) -> str:
    """Return the meaning of the marks on labels and column names."""
    return (
        f"Values marked{mark}, and columns of tables with names that begin with {prefix}, are not covered by any "
        "guarantee: not released: seen in simulation only, computed from data that are not private."
    )


def about_uncovered(mark: str, scores: Iterable[str]) -> str:
    """Return the meaning of the mark on scores that no epsilon covers."""
    return (
        f"Scores marked{mark}, and the columns listed in not_covered ({', '.join(scores)}), were computed without "
        "noise on examples of clients that are protected by a guarantee on this page. No epsilon covers these scores: "
        "they reveal information about the clients' data, regardless of epsilon."
    )


def not_released(what: str, *, costs: bool) -> str:
    """Return a sentence about values that only simulations have; `costs` are released unless cohorts are hidden."""
    of = "for runs with hidden cohorts, " if costs else ""
    text = f"{of}{what}: not released: seen in simulation only, computed from data that are not private."
    return text[0].upper() + text[1:]


def many(count: int, what: str) -> str:
    """Return a count with its noun."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def points(points: float) -> str:
    """Return percentage points, in words."""
    return many(int(points), "point")


def listed(values: Iterable[Any], maximum: int) -> str:
    """Return the distinct values as text, ascending; beyond `maximum` values, only how many more there are."""
    kept = {as_text(value): value for value in values if as_text(value)}
    numbers = all(isinstance(value, int | float) for value in kept.values())
    texts = sorted(kept, key=(lambda text: float(kept[text])) if numbers else None)
    more = f" and {len(texts) - maximum} more" if len(texts) > maximum else ""
    return ", ".join(texts[:maximum]) + more


def percent(value: float) -> str:
    """Return a share in percent, with one decimal."""
    return f"{100.0 * value:.1f}"


def plus_minus(mean: float, std: float) -> str:
    """Return mean and standard deviation in percent; for one seed, only the mean."""
    return percent(mean) + (f" ± {percent(std)}" if std == std else "")


def accuracy(row: Row, metric: str) -> str:
    """Return a setting's mean accuracy over seeds, with its standard deviation, in percent."""
    mean = row[f"{metric}_mean"]
    return "–" if mean != mean else plus_minus(mean, row[f"{metric}_std"])


def accuracy_range(row: Row, metric: str) -> str:
    """Return the minimum and maximum over seeds, in percent."""
    return f"{percent(row[f'{metric}_min'])} to {percent(row[f'{metric}_max'])}" if row["seeds"] > 1 else "–"


def epsilon_delta(row: Row) -> list[str]:
    """Return a setting's epsilon, rounded up, and delta."""
    if not row["private"]:
        return ["none", "–"]
    return [rounded_up(row["epsilon"]) if row["epsilon"] == row["epsilon"] else "–", f"{row['delta']:g}"]


def number(value: str | float) -> str:
    """Return any other number, with four digits."""
    if isinstance(value, str):
        return value
    return "–" if value != value else f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def brief(value: float) -> int | float | None:
    """Return a number with five digits, valid in JSON."""
    if isinstance(value, int) or value != value or math.isinf(value):
        return value if isinstance(value, int) else None
    short = float(f"{value:.5g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short

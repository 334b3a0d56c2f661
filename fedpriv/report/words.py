"""The paragraphs of a report, and its number formats."""

import math
from collections.abc import Iterable
from typing import Any

import pandas as pd

from fedpriv.privacy import rounded_up
from fedpriv.report.analysis import Judge, Quantity
from fedpriv.report.figures import MAX_SERIES
from fedpriv.report.study import Row, Study
from fedpriv.sweeps.tuning import about_tuning
from fedpriv.tables import as_text, short_texts
from fedpriv.tasks.metrics import METRICS, Metric

__all__ = [
    "about_choice",
    "about_cost",
    "about_curves",
    "about_marks",
    "about_trials",
    "about_uncovered",
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
    "score",
    "score_range",
    "shown",
    "with_article",
]

FIGURES = (
    "Each point is the best setting at that value, selected by the rule above: the mean over its seeds, with the "
    "range over seeds. For costs, the front is shown: no other setting is both as good and cheaper."
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
    name = study.metric.label
    paragraphs = [_rule(study, judge) if len(settings) > len(best) else _NO_CHOICE]
    if settings["privacy"].nunique() > 1:
        paragraphs.append(
            f"Rows with different privacy are listed separately: {with_article(study.metric)} under one guarantee says "
            "nothing about another."
        )
    if settings["seeds"].nunique() > 1:
        paragraphs.append("Settings have different numbers of seeds; a mean over few of them is less certain.")
    stopped = int((study.trials["status"] == "stopped").sum())
    if stopped:
        paragraphs.append(
            f"{many(stopped, 'trial')} of the sweep stopped early, based on the {name} at that time (validation "
            f"{name} if available, otherwise test {name}). They are excluded from all means and shares on this "
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
    metric = study.metric
    name, best = metric.label, "highest" if metric.better == "higher" else "lowest"
    lacking = study.runs[f"validation_{metric.name}"].isna()
    if judge == "validation":
        return (
            f"The best setting is the one with the {best} validation {name} after the last round, as the mean over "
            f"seeds. No selection on this page looked at the test {name} shown next to it."
        )
    why = f"no run has a validation {name}" if lacking.all() else f"not every run has a validation {name}"
    return (
        f"The best setting is the one with the {best} test {name} after the last round, as the mean over seeds, "
        f"because {why if lacking.any() else 'that was requested'}. The selection looked at the test data, so the "
        f"{name} of the best of many settings is somewhat too {'high' if metric.sign > 0 else 'low'}. The bias grows "
        "with the number of settings, and with fewer seeds."
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


def about_curves(settings: int, held: int, longest: int, points: int, metric: Metric = METRICS["accuracy"]) -> str:
    """Return a text about the curves, and about those left out to keep the page small.

    Args:
        settings: Number of settings with a curve.
        held: Maximum number of curves on the page.
        longest: Number of recorded rounds of the longest curve.
        points: Maximum number of points per curve on the page.
        metric: The metric that orders settings.
    """
    text = (
        "Each curve is a setting: the mean over its seeds and, if few curves are shown, the range over seeds. Click a "
        "name below the chart to hide or show its curves."
    )
    if settings > held:
        text += (
            f" Of {settings:,} settings the page has the curves of {held}: the best of each, then by {metric.label}."
        )
    if longest > points:
        text += f" Of up to {longest:,} recorded rounds a curve shows {points}, evenly spread."
    return text + (" The file tables/curves.csv has all of them." if settings > held or longest > points else "")


def caption(
    quantity: Quantity,
    table: pd.DataFrame,
    same: str,
    *,
    released: bool = True,
    metric: Metric = METRICS["accuracy"],
) -> str:
    """Return the caption of a quantity's figure.

    Args:
        quantity: The quantity.
        table: The data in the figure.
        same: The properties that all shown settings share, in words.
        released: True if the quantity is released.
        metric: The metric on the vertical axis.
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
        parts.append(f"Of {count} series the {MAX_SERIES} with the best {metric.label} are drawn; the table has all.")
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


def points(points: float, *, relative: bool = False) -> str:
    """Return percentage points in words, or percent of the best."""
    return f"{int(points)} % of it" if relative else many(int(points), "point")


def listed(values: Iterable[Any], maximum: int, key: str = "") -> str:
    """Return the distinct values of a key as text, ascending; beyond `maximum` values, how many more there are."""
    values = [value for value in values if as_text(value)]
    kept = dict(zip(short_texts(values, key), values, strict=True))
    numbers = all(isinstance(value, int | float) for value in kept.values())
    texts = sorted(kept, key=(lambda text: float(kept[text])) if numbers else None)
    more = f" and {len(texts) - maximum} more" if len(texts) > maximum else ""
    return ", ".join(texts[:maximum]) + more


def percent(value: float) -> str:
    """Return a share in percent, with two decimals."""
    return f"{100.0 * value:.2f}"


def plus_minus(mean: float, std: float, metric: Metric = METRICS["accuracy"]) -> str:
    """Return mean and standard deviation, in percent for a metric in [0, 1]; for one seed, only the mean."""
    return shown(mean, metric) + (f" ± {shown(std, metric)}" if std == std else "")


def score(row: Row, column: str, metric: Metric) -> str:
    """Return a setting's mean over seeds, with its standard deviation; in percent if the metric is in [0, 1]."""
    mean = row[f"{column}_mean"]
    return "–" if mean != mean else plus_minus(mean, row[f"{column}_std"], metric)


def score_range(row: Row, column: str, metric: Metric) -> str:
    """Return the minimum and maximum over seeds, likewise."""
    low, high = (shown(row[f"{column}_{end}"], metric) for end in ("min", "max"))
    return f"{low} to {high}" if row["seeds"] > 1 else "–"


def shown(value: float, metric: Metric) -> str:
    """Return a value of a metric, in percent if it is in [0, 1]."""
    return percent(value) if metric.bounded else number(value)


def with_article(metric: Metric) -> str:
    """Return the metric's name after `a` or `an`, as it is spoken."""
    spoken = metric.label[0].lower() in "aeiou" or metric.label in ("RMSE", "F1")
    return f"{'an' if spoken else 'a'} {metric.label}"


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

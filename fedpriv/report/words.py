"""The words and numbers of a report: what its paragraphs say, and how figures are written."""

import math
from collections.abc import Iterable
from typing import Any

import pandas as pd

from fedpriv.privacy import rounded_up
from fedpriv.report.analysis import Judge, Quantity
from fedpriv.report.figures import MAX_SERIES
from fedpriv.report.study import Study, as_text
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
    "figure",
    "listed",
    "many",
    "not_released",
    "percent",
    "plus_minus",
    "points",
]

FIGURES = (
    "Each point is the best setting at that value, by the same rule as above: the mean over its seeds, with the "
    "range over seeds. What an accuracy costs is shown as a front: no other setting is as accurate and cheaper."
)
SPREAD = (
    "± is the standard deviation over seeds (of the sample). Pictures: range over seeds, and a stroke at the mean, "
    "all on one scale. “Best of” is the number of settings of which the best was taken."
)


def about_trials(study: Study) -> str:
    """How many trials there are, and how they ended."""
    count = study.trials["status"].value_counts()
    words = {"done": "done", "failed": "failed", "stopped": "stopped early", "left": "not finished"}
    told = ", ".join(f"{count[status]:,} {word}" for status, word in words.items() if status in count)
    return f"{many(len(study.trials), 'trial')}: {told}."


def about_choice(study: Study, settings: pd.DataFrame, best: pd.DataFrame, judge: Judge) -> list[str]:
    """How the best settings were chosen, what the choice looked at, and what it does not say."""
    paragraphs = [_rule(study, judge) if len(settings) > len(best) else _NO_CHOICE]
    if settings["privacy"].nunique() > 1:
        paragraphs.append(
            "Rows with different privacy stand apart: an accuracy under one promise says nothing about another."
        )
    if settings["seeds"].nunique() > 1:
        paragraphs.append("Settings have different numbers of seeds; a mean over few of them is less certain.")
    stopped = int((study.trials["status"] == "stopped").sum())
    if stopped:
        paragraphs.append(
            f"{many(stopped, 'trial')} of the sweep stopped early, by the accuracy that they had by then (validation "
            "where there was one, else test). They are in no mean and no share on this page: a setting of which only "
            "some seeds went on looks better than it is."
        )
    if study.tuning is not None:
        paragraphs += [f"{sentence[0].upper()}{sentence[1:]}." for sentence in about_tuning(study.tuning)]
        paragraphs.append(
            "This page shows all trials, so that it has to stay secret as well. Its best settings are chosen by their "
            "means: that choice is not the one that the tuning is charged for."
        )
    elif study.runs["private"].any():
        paragraphs.append(
            "Tuning is not free under privacy. The epsilon shown is that of one run; it includes neither the other "
            "trials nor the choice among them. See “What was promised”."
        )
    return paragraphs


_NO_CHOICE = (
    "Each method was run with one setting, so nothing was chosen here. Whoever set the values before may have looked "
    "at test data."
)


def _rule(study: Study, judge: Judge) -> str:
    lacking = study.runs["validation_accuracy"].isna()
    if judge == "validation":
        return (
            "The best setting is the one with the highest validation accuracy after the last round, the mean over "
            "seeds. No choice on this page looked at the test accuracy that stands beside it."
        )
    why = "no run has a validation accuracy" if lacking.all() else "not every run has a validation accuracy"
    return (
        "The best setting is the one with the highest test accuracy after the last round, the mean over seeds, "
        f"because {why if lacking.any() else 'that was asked for'}. The choice looked at the test data: the accuracy "
        "of the best of many settings is then somewhat too high, the more so the more settings were tried and the "
        "fewer seeds there are."
    )


def about_cost(study: Study) -> list[str]:
    """What the epsilon of a run leaves out when there are many runs."""
    count = int(study.runs["private"].sum())
    if not count:
        return ["No run here is private: nothing is promised about any client's data, whoever looks."]
    return [
        f"Each of the {many(count, 'private run')} here keeps its own promise. If they all used the same clients' "
        "data, what they spend adds up, and a hyperparameter that is chosen by their results is one more thing that "
        "is released: the epsilon shown does not include the choice of hyperparameters. How to choose privately, and "
        "what it costs: Liu and Talwar (2019), Private Selection from Private Candidates; Papernot and Steinke "
        "(2022), Hyperparameter Tuning with Rényi Differential Privacy. Only trials whose training and test data are "
        "public cost nothing.",
        "An epsilon means something only together with its delta, with who looks, and with what is hidden. Epsilon "
        "is rounded up.",
    ]


def about_curves(settings: int, held: int, longest: int, points: int) -> str:
    """What the curves are, and what was left out to keep the page small.

    Args:
        settings: How many have a curve.
        held: How many curves the page holds at most.
        longest: Recorded rounds of the longest.
        points: How many of them a curve of the page has at most.
    """
    text = (
        "A curve is a setting: the mean over its seeds; where few curves are shown, with the range over seeds. A "
        "click on a name below the chart takes its curves away or brings them back."
    )
    if settings > held:
        text += f" Of {settings:,} settings the page holds the curves of {held}: the best of each, then by accuracy."
    if longest > points:
        text += f" Of up to {longest:,} recorded rounds a curve shows {points}, evenly spread."
    return text + (" All are in tables/curves.csv." if settings > held or longest > points else "")


def caption(quantity: Quantity, table: pd.DataFrame, same: str, *, released: bool = True) -> str:
    """What stands below a quantity's figure.

    Args:
        quantity: The figure's.
        table: What it shows.
        same: What all that it shows have in common, in words.
        released: Whether the quantity is.
    """
    parts = [f"All with {same}."] if same else []
    if not released:
        parts.append(not_released(quantity.label, costs=quantity.cost))
    if quantity.column == "epsilon":
        parts.append("Epsilon is rounded up.")
        if (table["x"] == math.inf).any():
            parts.append("Dotted lines: without any privacy.")
    count = table["series"].nunique()
    if count > MAX_SERIES:
        parts.append(f"Of {count} series the {MAX_SERIES} with the best accuracy are drawn; the table has all.")
    return " ".join(parts)


def about_marks(mark: str, prefix: str) -> str:
    """What the marks on labels and names of columns mean."""
    return (
        f"What is marked{mark}, and columns of tables whose names begin with {prefix}, are not part of any promise: "
        "not released: seen in simulation only, computed from what is not private."
    )


def about_uncovered(mark: str, scores: Iterable[str]) -> str:
    """The meaning of the mark on scores that no epsilon covers."""
    return (
        f"What is marked{mark}, and the columns of tables that not_covered names ({', '.join(scores)}), was computed "
        "without noise on the own examples of clients that a promise on this page is about. No epsilon covers it: it "
        "tells about their data whatever epsilon is."
    )


def not_released(what: str, *, costs: bool) -> str:
    """A sentence about figures that only a simulation has; `costs` are released where cohorts are not hidden."""
    of = "of runs whose cohorts are hidden, " if costs else ""
    text = f"{of}{what}: not released: seen in simulation only, computed from what is not private."
    return text[0].upper() + text[1:]


def many(count: int, what: str) -> str:
    """A number of things, in words."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def points(points: float) -> str:
    """Percentage points, in words."""
    return many(int(points), "point")


def listed(values: Iterable[Any], most: int) -> str:
    """The different values as words, ascending, with how many more there are."""
    kept = {as_text(value): value for value in values if as_text(value)}
    numbers = all(isinstance(value, int | float) for value in kept.values())
    texts = sorted(kept, key=(lambda text: float(kept[text])) if numbers else None)
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more


def percent(value: float) -> str:
    """A share in percent, one digit after the point."""
    return f"{100.0 * value:.1f}"


def plus_minus(mean: float, std: float) -> str:
    """Mean and standard deviation in percent; of one seed the mean alone."""
    return percent(mean) + (f" ± {percent(std)}" if std == std else "")


def accuracy(row: dict[Any, Any], metric: str) -> str:
    """A setting's mean accuracy over seeds, with its standard deviation, in percent."""
    mean = row[f"{metric}_mean"]
    return "–" if mean != mean else plus_minus(mean, row[f"{metric}_std"])


def accuracy_range(row: dict[Any, Any], metric: str) -> str:
    """The least and the largest over seeds, in percent."""
    return f"{percent(row[f'{metric}_min'])} to {percent(row[f'{metric}_max'])}" if row["seeds"] > 1 else "–"


def epsilon_delta(row: dict[Any, Any]) -> list[str]:
    """A setting's epsilon, rounded up, and delta."""
    if not row["private"]:
        return ["none", "–"]
    return [rounded_up(row["epsilon"]) if row["epsilon"] == row["epsilon"] else "–", f"{row['delta']:g}"]


def figure(value: Any) -> str:
    """Any other number, in four digits."""
    if isinstance(value, str):
        return value
    return "–" if value != value else f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def brief(value: Any) -> Any:
    """A number of five digits that JSON can hold."""
    if isinstance(value, int) or value != value or math.isinf(value):
        return value if isinstance(value, int) else None
    short = float(f"{value:.5g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short

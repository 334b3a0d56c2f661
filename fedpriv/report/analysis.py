"""Analyze a study: best settings, robustness over hyperparameters, the cost of accuracy. Tables in, tables out.

A setting is an experiment without its seed; it is judged by its mean over seeds. Settings are compared only within the
same problem and privacy.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from fedpriv.data.partitions import PARTITIONS
from fedpriv.data.shifts import SHIFTS
from fedpriv.errors import UserError
from fedpriv.experiment.schema import field_names
from fedpriv.privacy import rounded_up
from fedpriv.report.study import (
    COSTS,
    HYPERPARAMETERS,
    TERMS,
    Study,
    problem_key,
    telling,
    words_of,
)
from fedpriv.tables import as_text, short_texts
from fedpriv.tasks.metrics import METRICS, Metric

__all__ = [
    "QUANTITIES",
    "HeatMap",
    "Judge",
    "Quantity",
    "against",
    "best_settings",
    "curves",
    "front",
    "heat_maps",
    "held",
    "judge_of",
    "settings_table",
    "share_near_best",
    "thinned",
]

Judge = Literal["validation", "test"]
_OPTIMIZER, _MOMENTUM = "server.optimizer", "server.momentum"
GROUP = ["problem", "privacy", "method"]
"""Columns within which settings are compared; only methods are also compared, under one guarantee."""


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """A quantity on the horizontal axis of the metric.

    Args:
        name: Name of the figure.
        label: Label of the axis.
        column: Column of the table of settings.
        own: Config keys that set the quantity: its figure does not separate runs by them.
        cost: True if less is better: the figure then shows the front of metric and cost.
    """

    name: str
    label: str
    column: str
    own: tuple[str, ...] = ()
    cost: bool = False


_SPREAD = (
    "partition",
    "shift",
    *sorted({field for kind in (*PARTITIONS.values(), *SHIFTS.values()) for field in field_names(kind)}),
)
_PARTITION = tuple(f"data.{field}" for field in _SPREAD)
_EPSILON = ("privacy.epsilon", "privacy.noise_multiplier")
_COHORT = ("cohort.sampling", "cohort.probability", "cohort.size")
LABEL_DISTANCE, GRADIENT_DISTANCE = "heterogeneity.label_tv", "heterogeneity.gradient_dissimilarity"

QUANTITIES = (
    Quantity(name="epsilon", label="epsilon", column="epsilon"),
    Quantity(name="label_distance", label="mean distance of labels (TV)", column=LABEL_DISTANCE, own=_PARTITION),
    Quantity(name="gradient_distance", label="dissimilarity of gradients", column=GRADIENT_DISTANCE, own=_PARTITION),
    Quantity(name="partition", label="partition", column="partition", own=_PARTITION),
    Quantity(name="cohort_size", label="expected cohort size", column="cohort_size", own=_COHORT),
    Quantity(name="population", label="population (clients)", column="population", own=("data.clients",)),
    Quantity(name="simulated_time", label="simulated time (s)", column="simulated_seconds", cost=True),
    Quantity(name="bytes", label="bytes up and down", column="bytes", cost=True),
)


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """The metric over two hyperparameters, for one problem, privacy and method.

    Args:
        group: Problem, privacy and method.
        keys: The config keys of rows and of columns.
        rows: Values of the first key, ascending, as text.
        columns: Values of the second key.
        row_texts: Values of the first key as they are shown, with few digits.
        column_texts: Values of the second key, likewise.
        values: `[rows, columns]`, mean over seeds, the best over all other hyperparameters; NaN for missing runs.
        seeds: int `[rows, columns]`, the number of seeds of that setting; 0 for missing runs.
    """

    group: tuple[str, str, str]
    keys: tuple[str, str]
    rows: list[str]
    columns: list[str]
    row_texts: list[str]
    column_texts: list[str]
    values: np.ndarray
    seeds: np.ndarray


def judge_of(study: Study, wanted: str | None = None) -> Judge:
    """Return the examples that select settings: the wanted ones, or validation if every run has it, otherwise test.

    Raises:
        UserError: If validation is wanted and a run lacks it.
    """
    if wanted not in (None, "test", "validation"):
        raise UserError("--select", "test or validation", repr(wanted), "Choose one, or remove --select")
    lacking = study.runs.loc[study.runs[f"validation_{study.metric.name}"].isna(), "run"].tolist()
    if wanted == "validation" and lacking:
        some = f"{len(lacking)} without it, such as {lacking[0]}"
        raise UserError(
            "--select validation", f"runs with a validation {study.metric.label}", some, "Choose --select test"
        )
    return "test" if lacking or wanted == "test" else "validation"


def settings_table(study: Study, judge: Judge) -> pd.DataFrame:
    """Return one row per setting, by number.

    Returns:
        Columns `setting`, `problem`, `privacy`, `method`, `hyperparameters` (those that vary for the method, in words),
        `seeds` (their number), `METRIC_mean`, `_std` (of the sample; NaN for one seed), `_min` and `_max` of each
        metric over seeds, `score` (the mean of the judging metric, its negative if lower is better), `epsilon` (the
        largest), `delta`, means of costs and distances, `partition` in words, and the keys of the configs. Runs of one
        setting and seed count as one seed.
    """
    runs = study.runs
    measured = [*study.scores, *COSTS, "bytes", *(key for key in runs.columns if key.startswith("heterogeneity."))]
    by_seed = runs.groupby(["setting", "seed"], sort=True)[measured].mean().reset_index()
    by_setting = by_seed.groupby("setting", sort=True)
    made = runs.groupby("setting", sort=True).first(skipna=False)
    made = made.drop(columns=["run", "name", "seed", *measured], errors="ignore")
    made["epsilon"] = runs.groupby("setting")["epsilon"].max()
    made["seeds"] = by_setting["seed"].nunique()
    for metric in study.scores:
        for name, value in by_setting[metric].agg(["mean", "std", "min", "max"]).items():
            made[f"{metric}_{name}"] = value
    for key in measured[len(study.scores) :]:
        made[key] = by_setting[key].mean()
    made["score"] = study.metric.sign * made[f"{judge}_{study.metric.name}_mean"]
    made = made.reset_index()
    made["partition"] = [text or "default" for text in words_of(made, [k for k in study.varying() if k in _PARTITION])]
    made["hyperparameters"] = ""
    for _, rows in made.groupby("method", sort=True):
        keys = [key for key in study.varying(rows) if key.startswith(HYPERPARAMETERS)]
        told = telling(rows, keys)
        if _OPTIMIZER in told and _MOMENTUM in keys and _MOMENTUM not in told:
            told.append(_MOMENTUM)
        made.loc[rows.index, "hyperparameters"] = words_of(rows, told)
    first = ["setting", *GROUP, "hyperparameters", "seeds", "score", "epsilon", "delta"]
    return made[[*first, *(key for key in made.columns if key not in first)]]


def best_settings(settings: pd.DataFrame, judge: Judge) -> pd.DataFrame:
    """Return the best setting of each problem, privacy and method, by mean over seeds; ties by the smaller loss.

    Returns:
        Rows of `settings`, and `tried`: the number of settings it was selected from. Ordered by problem, then privacy
        (not private first, then weaker guarantees first), then accuracy.
    """
    ranked = _ranked(settings, judge)
    best = ranked.groupby(GROUP, sort=False).head(1).copy()
    best["tried"] = [int((settings[GROUP] == row[GROUP]).all(axis=1).sum()) for _, row in best.iterrows()]
    best["weakness"] = best["epsilon"].where(best["private"], np.inf).fillna(np.inf)
    weakest = best.groupby(["problem", "privacy"])["weakness"].transform("max")
    order = best.assign(weakest=weakest).sort_values(
        ["problem", "weakest", "privacy", "score", "setting"], ascending=[True, False, True, False, True], kind="stable"
    )
    return order.drop(columns=["weakness", "weakest"]).reset_index(drop=True)


def share_near_best(
    settings: pd.DataFrame, points: Sequence[float] = (1.0, 2.0, 5.0, 10.0), *, relative: bool = False
) -> pd.DataFrame:
    """Return the robustness of methods over hyperparameters: the share of settings that come near the best.

    Args:
        settings: See `settings_table`.
        points: Distances in percentage points.
        relative: Distances are in percent of the best score instead.

    Returns:
        One row for each problem, privacy, method and distance: `settings` (their number), `points`, and the share of
        settings within that distance of the method's best (`near_own`) and of the best of all methods of the same
        problem and privacy (`near_all`).
    """
    judged = settings[settings["score"].notna()]
    rows: list[dict[str, object]] = []
    for (problem, privacy), rivals in judged.groupby(["problem", "privacy"], sort=False):
        for method, group in rivals.groupby("method", sort=True):
            for distance in points:
                near: dict[str, float] = {}
                for name, best in (("near_own", group["score"].max()), ("near_all", rivals["score"].max())):
                    off = distance / 100.0 * (abs(best) if relative else 1.0)
                    near[name] = float((group["score"] >= best - off - 1e-12).mean())
                facts = {"problem": problem, "privacy": privacy, "method": method, "settings": len(group)}
                rows.append({**facts, "points": distance, **near})
    return pd.DataFrame(rows, columns=["problem", "privacy", "method", "settings", "points", "near_own", "near_all"])


def against(
    settings: pd.DataFrame, quantity: Quantity, judge: Judge, metric: Metric = METRICS["accuracy"]
) -> pd.DataFrame:
    """Return the metric against a quantity: the best setting at each of its values, or the front if it is a cost.

    Returns:
        Columns `series` (method, privacy and problem, as far as they differ and the quantity does not set them),
        `method`, `x` (a number, or a text), `setting`, `seeds`, the metric's name (test, mean over seeds), `std`,
        `low`, `high`, `private`. In the figure of epsilon, `x` is infinite without privacy. Series with a constant
        quantity are left out.
    """
    rows = settings.assign(series=_series(settings, quantity), x=settings[quantity.column])
    rows["place"] = words_of(rows, [key for key in quantity.own if key in rows]) if quantity.own else rows["x"]
    if quantity.column == "epsilon":
        rows["x"] = [float(rounded_up(e)) if e == e else math.nan for e in rows["epsilon"].where(rows["private"])]
        rows["place"] = rows["x"]
    rows = rows[rows["score"].notna()]
    known = rows[rows["x"].notna()]
    known = known[known.groupby("series")["place"].transform("nunique") > 1]
    if quantity.cost and len(known):
        kept = pd.concat([front(group, "x", "score") for _, group in known.groupby("series", sort=True)])
    else:
        kept = _ranked(known, judge).groupby(["series", "place"], sort=False).head(1)
    if quantity.column == "epsilon":
        free = rows[~rows["private"] & rows["series"].isin(list(known["series"]))].assign(x=math.inf)
        kept = pd.concat([kept, _ranked(free, judge).groupby("series", sort=False).head(1)])
    kept = kept.assign(series=_series(kept, quantity)).sort_values(["series", "x", "setting"])
    names = {metric.name: "mean", "std": "std", "low": "min", "high": "max"}
    for name, statistic in names.items():
        kept[name] = kept[f"test_{metric.name}_{statistic}"]
    return kept[["series", "method", "private", "x", "setting", "seeds", *names]].reset_index(drop=True)


def front(rows: pd.DataFrame, cost: str, value: str) -> pd.DataFrame:
    """Return the rows that no other row dominates.

    A row dominates another if it costs at most as much and is worth more, or costs less and is worth as much.

    Args:
        rows: Any table.
        cost: Name of the cost column; less is better.
        value: Name of the value column; more is better.

    Returns:
        Rows by ascending cost; of rows equal in both, the first.
    """
    ordered = rows.sort_values([cost, value], ascending=[True, False], kind="stable")
    before = ordered[value].astype(np.float64).cummax().shift(fill_value=-np.inf)
    return ordered[ordered[value] > before]


def heat_maps(study: Study, settings: pd.DataFrame) -> list[HeatMap]:
    """Return a heat map for each problem, privacy, method and pair of hyperparameters that both vary there."""
    made = []
    for group, rows in settings[settings["score"].notna()].groupby(GROUP, sort=True):
        keys = [key for key in study.varying(rows) if key.startswith(HYPERPARAMETERS)]
        made += [_heat_map(rows, group, pair, study.metric.sign) for pair in itertools.combinations(keys, 2)]
    return made


def curves(study: Study) -> pd.DataFrame:
    """Return one row per setting and recorded round: means over runs of metrics, epsilon and costs, and the minimum and
    maximum of the test metric (`low`, `high`). Rounds without it are left out.
    """
    tested = f"test_{study.metric.name}"
    rounds = study.rounds[study.rounds[tested].notna()]
    grouped = rounds.groupby(["setting", "round"], sort=True)
    made = grouped[[*study.scores, "epsilon", *COSTS, "bytes"]].mean()
    made["epsilon"] = grouped["epsilon"].max()
    made["low"], made["high"] = grouped[tested].min(), grouped[tested].max()
    return made.reset_index()


def thinned(length: int, maximum: int) -> np.ndarray:
    """Return at most `maximum` indices below `length`, evenly spaced, ascending, with the first and the last; int64."""
    if length <= maximum:
        return np.arange(length)
    return np.unique(np.linspace(0, length - 1, max(maximum, 2)).round().astype(np.int64))


def _ranked(rows: pd.DataFrame, judge: Judge) -> pd.DataFrame:
    """Return rows with a score, the best first; ties by the smaller loss, then by number."""
    judged = rows[rows["score"].notna()]
    return judged.sort_values(
        ["score", f"{judge}_loss_mean", "setting"], ascending=[False, True, True], na_position="last", kind="stable"
    )


def _apart(settings: pd.DataFrame, quantity: Quantity) -> tuple[list[str], list[str]]:
    """Return the keys of problem and guarantee that separate the series of a quantity's figure."""
    keys = [key for key in settings.columns if "." in key and not key.startswith("heterogeneity.")]
    varying = [key for key in keys if key not in quantity.own and settings[key].map(as_text).nunique() > 1]
    private = settings[settings["private"]]
    known = {*_EPSILON, *(f"privacy.{term}" for term in TERMS)}
    terms = [key for key in varying if key.startswith("privacy.") and key not in known]
    terms += [term for term in TERMS if term in settings]
    problem = telling(settings, [key for key in varying if problem_key(key)])
    return problem, [key for key in terms if private[key].map(as_text).nunique() > 1]


def _series(settings: pd.DataFrame, quantity: Quantity) -> list[str]:
    """Return the series names of a quantity's figure."""
    problem, terms = _apart(settings, quantity)
    if quantity.column == "epsilon":
        pairs = zip(words_of(settings, terms), settings["private"], strict=True)
        privacy = [words if private else "" for words, private in pairs]
    else:
        privacy = settings["privacy"].tolist() if settings["privacy"].nunique() > 1 else [""] * len(settings)
    parts = zip(settings["method"], privacy, words_of(settings, problem), strict=True)
    return [" · ".join(part for part in row if part) for row in parts]


def held(settings: pd.DataFrame, table: pd.DataFrame, quantity: Quantity) -> str:
    """Describe the properties that all settings of a figure share and other settings lack; see `against`."""
    shown = settings[settings["setting"].isin(list(table["setting"]))]
    problem, terms = _apart(settings, quantity)
    promised = shown[shown["private"]]
    same = [key for key in problem if shown[key].map(as_text).nunique() == 1]
    shared = terms if quantity.column == "epsilon" and len(promised) else []
    shared = [key for key in shared if promised[key].map(as_text).nunique() == 1]
    privacy = shown["privacy"].iloc[0] if settings["privacy"].nunique() > shown["privacy"].nunique() == 1 else ""
    return ", ".join(
        part for part in (privacy, words_of(shown.head(1), same)[0], *words_of(promised.head(1), shared)) if part
    )


def _heat_map(rows: pd.DataFrame, group: Any, pair: tuple[str, str], sign: float) -> HeatMap:
    kept = rows[[*pair, "score", "seeds"]].copy()
    given: list[dict[str, Any]] = []
    for key in pair:
        kept[key] = kept[key].map(as_text)
        given.append(dict(zip(kept[key], rows[key], strict=True)))
    kept = kept[(kept[list(pair)] != "").all(axis=1)]
    best = kept.sort_values("score", ascending=False, kind="stable").drop_duplicates(list(pair))
    places = [sorted(kept[key].unique(), key=_by_size) for key in pair]
    values = np.full((len(places[0]), len(places[1])), np.nan)
    seeds = np.zeros(values.shape, dtype=np.int64)
    for row, column, score, count in best.itertuples(index=False):
        at = places[0].index(row), places[1].index(column)
        values[at], seeds[at] = sign * score, count
    problem, privacy, method = group
    texts = [short_texts((of[text] for text in place), key) for of, place, key in zip(given, places, pair, strict=True)]
    return HeatMap(
        group=(problem, privacy, method),
        keys=pair,
        rows=places[0],
        columns=places[1],
        row_texts=texts[0],
        column_texts=texts[1],
        values=values,
        seeds=seeds,
    )


def _by_size(text: str) -> tuple[int, float, str]:
    try:
        return 0, float(text), text
    except ValueError:
        return 1, 0.0, text

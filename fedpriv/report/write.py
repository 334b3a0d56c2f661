"""`fedpriv report`: a study as one self-contained page, with its figures and tables as files next to it."""

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import TypedDict

import numpy as np
import pandas as pd
from jinja2 import Environment, StrictUndefined

from fedpriv.checks import a_path, shown
from fedpriv.errors import UserError
from fedpriv.experiment.run_directory import jsonable
from fedpriv.files import write_atomically
from fedpriv.privacy import rounded_up
from fedpriv.report import figures as report_figures
from fedpriv.report import words
from fedpriv.report.analysis import (
    QUANTITIES,
    HeatMap,
    Judge,
    Quantity,
    against,
    best_settings,
    curves,
    heat_maps,
    held,
    judge_of,
    settings_table,
    share_near_best,
    thinned,
)
from fedpriv.report.figures import DASHES, looks
from fedpriv.report.finding import findings, title_of
from fedpriv.report.places import Run, runs_of
from fedpriv.report.study import (
    HYPERPARAMETERS,
    Row,
    Study,
    load_study,
    not_covered,
    short_names,
    unreleased,
    words_of,
)
from fedpriv.tables import as_text
from fedpriv.tasks.metrics import METRICS
from fedpriv.version import __version__

__all__ = ["report_on", "write_report"]

# Limits of the page; the files in tables/ are complete.
MAX_CURVES = 200
MAX_POINTS = 60
MAX_ROWS = 200
MAX_MAPS = 40
MAX_MAP_FIGURES = 12
POINTS = (1.0, 2.0, 5.0, 10.0)

# The mark on values that exist only in simulation and are not private, in labels and in column names.
MARK, PREFIX = " (not released)", "not_released."
# The mark on scores that some run's epsilon does not cover.
UNCOVERED = " (not covered)"

_X = {"round": "round", "epsilon": "epsilon spent", "simulated_seconds": "simulated time", "bytes": "bytes up and down"}
_TITLES = {
    "epsilon": "epsilon",
    "label_distance": "differences between clients' labels",
    "gradient_distance": "differences between clients' gradients",
    "partition": "the partition",
    "cohort_size": "the cohort",
    "population": "the population",
    "simulated_time": "its cost in simulated time",
    "bytes": "its cost in bytes",
}
_FIGURE_FILES = ("best", "curves", *_TITLES, *(f"heat_map_{number}" for number in range(1, MAX_MAP_FIGURES + 1)))
_TABLE_FILES = ("best", "settings", "trials", "near_best", "heat_maps", "curves", "privacy", "failed", *_TITLES)


class _Group(TypedDict):
    title: str
    rows: list[dict[str, object]]


@dataclass(frozen=True)
class _Column:
    name: str
    kind: str = ""

    @property
    def number(self) -> bool:
        return self.kind == "n"


@dataclass(frozen=True)
class _Shown:
    """A table of the page, with cells as text."""

    columns: list[_Column]
    rows: list[list[str]]
    left_out: int = 0


@dataclass(frozen=True)
class _Settings:
    """All settings as a table, with the number and the runs of each."""

    table: _Shown
    numbers: list[int]
    runs: list[list[Run]]


def write_report(path: Path | str, out: Path | str | None = None, *, select: str | None = None) -> Path:
    """Write `report.html`, `figures/` and `tables/` for the runs below a folder; equal runs give equal bytes.

    Args:
        path: A sweep's folder, a folder of run directories, or a run directory.
        out: The destination; None for `report` in that folder. Files of an earlier report are replaced.
        select: Name of the metric that selects the best settings: `test` or `validation` examples, a metric of all
            runs such as `loss`, or both as `test_loss`. None for validation if every run has it, and the first metric
            of the task.

    Returns:
        The path of the page.

    Raises:
        UserError: If there is no finished run, a file is damaged, `select` is unavailable, or `out` is not writable.
    """
    if select is not None and not isinstance(select, str):
        raise UserError("select", "the name of a metric", shown(select), "Give a name such as test_loss, or None")
    on, metric = _selection(select)
    path = a_path("path", path)
    folder = path / "report" if out is None else a_path("out", out)
    return report_on(load_study(path, metric), folder, select=on, root=Path(path))


def report_on(study: Study, folder: Path, *, select: str | None = None, root: Path | None = None) -> Path:
    """Write a report on a loaded study, see `write_report`.

    Args:
        study: The study.
        folder: The destination.
        select: `test`, `validation` or None.
        root: The folder of the runs. A page inside it links to the runs; None for a page without links.
    """
    report = _Report(study, judge_of(study, select), folder, root)
    _clear(folder)
    page = report.page()
    for name, table in report.tables.items():
        write_atomically(folder / "tables" / f"{name}.csv", _csv(table))
    write_atomically(folder / "report.html", page)
    return folder / "report.html"


def _selection(select: str | None) -> tuple[str | None, str | None]:
    """Return the examples and the metric of `--select`."""
    if select in (None, "test", "validation"):
        return select, None
    on, _, metric = select.partition("_")
    return (on, metric) if on in ("test", "validation") and metric else (None, select)


def _clear(folder: Path) -> None:
    """Create the folders, and remove files of an earlier report."""
    if (folder / "config.toml").exists():
        raise UserError(str(folder), "a folder only for the report", "a run directory", "Choose another --out")
    try:
        for part, names, endings in (("figures", _FIGURE_FILES, ("png", "svg")), ("tables", _TABLE_FILES, ("csv",))):
            (folder / part).mkdir(parents=True, exist_ok=True)
            for file in (folder / part / f"{name}.{ending}" for name in names for ending in endings):
                file.unlink(missing_ok=True)
    except OSError as error:
        why = error.strerror or str(error)
        raise UserError(str(folder), "a writable folder", why, "Choose another --out") from None


class _Report:
    """The contents of the page, built step by step from one study."""

    def __init__(self, study: Study, judge: Judge, folder: Path, root: Path | None) -> None:
        self.study, self.figures = study, folder / "figures"
        self.runs = runs_of(study, root, folder)
        self.judge: Judge = judge
        self.metric = study.metric
        self.tested, self.validated = f"test_{study.metric.name}", f"validation_{study.metric.name}"
        self.settings = settings_table(study, judge)
        self.best = best_settings(self.settings, judge)
        self.curves = curves(study)
        self.promises = _by_weakness(study.runs)
        self.methods = sorted(study.runs["method"].unique())
        self.settings["series"] = _joined(self.settings, self._apart("method", "privacy", "problem"))
        self.best["series"] = self.settings.set_index("setting")["series"].loc[self.best["setting"]].to_numpy()
        self.look = looks(_method_of(self.best) | _method_of(self.settings), self.methods)
        self.short = short_names(key for key in study.keys if key.startswith(HYPERPARAMETERS))
        self.has_validation = bool(study.runs[self.validated].notna().any())
        self.unreleased = {key for key in study.runs.columns if unreleased(study.runs, key)}
        self.uncovered = sorted(not_covered(study.runs))
        named = _labels(study)
        self.labels = {key: label + (UNCOVERED if key in self.uncovered else "") for key, label in named.items()}
        self.tables: dict[str, pd.DataFrame] = {}

    def page(self) -> str:
        """Return the page; writes the figures and collects the tables on the way."""
        parts = files("fedpriv.report") / "page"
        style, script, template = (
            (parts / f"report.{ending}").read_text(encoding="utf-8") for ending in ("css", "js", "html")
        )
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        content = {
            "name": self.study.name,
            "title": title_of(self.study),
            "findings": findings(self.best, self._titles(self.best), self.metric, self.judge),
            "subtitle": words.about_trials(self.study),
            "tiles": self._tiles(),
            "axes": self._axes(),
            "choice": words.about_choice(self.study, self.settings, self.best, self.judge),
            "cost": [*words.about_cost(self.study), *self._about_unreleased()],
            "best": self._best(),
            "figures": self._figures(),
            "figures_text": words.FIGURES,
            "curves_svg": self._draw_curves(),
            "near": self._near(),
            "judged_by": f"Settings are judged by {self.judge} {self.metric.label}, the mean over seeds.",
            "judged": f"{self.judge} {self.metric.label}",
            "metric": self.metric.label,
            "a_metric": words.with_article(self.metric),
            "map_unit": " in %" if self.metric.bounded else "",
            "promises": self._promises(),
            "statements": self._statements(),
            "settings": self._all_settings(),
            "failed": self._failed(),
            "footer": f"Written by fedpriv {__version__} from the records of the runs.",
        }
        content["maps"], content["maps_left_out"] = self._maps()
        drawn, content["curves_text"] = self._drawn_curves()
        hidden = [label for key, label in _X.items() if key in self.unreleased]
        content["curves_text"] += "".join(f" {words.not_released(label, costs=True)}" for label in hidden)
        content["curve_x"] = [
            (key, label + MARK, f"{PREFIX}{key}") if key in self.unreleased else (key, label, key)
            for key, label in _X.items()
            if self.curves[key].notna().any()
        ]
        content["curve_y"] = [(key, label) for key, label in self.labels.items() if self.curves[key].notna().any()]
        content["contents"] = _contents(bool(content["figures"]), bool(content["failed"].rows), self.metric.label)
        self._trials()
        texts = {name: _csv(table) for name, table in self.tables.items() if name != "curves"}
        near = [words.points(p, relative=not self.metric.bounded) for p in POINTS]
        shares = [f"{on}_{one.name}" for on in ("test", "validation") for one in self.study.metrics if one.bounded]
        data = {"tables": texts, "near": near, "dashes": DASHES, "shares": shares, "main": self.tested, **drawn}
        environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        return environment.from_string(template).render(
            **content, style=style, script=script, script_hash=f"sha256-{digest}", data=_embedded(data)
        )

    def _marked(self, table: pd.DataFrame) -> pd.DataFrame:
        """Return the table with a mark on the names of columns that are not released."""
        return table.rename(columns={key: f"{PREFIX}{key}" for key in self.unreleased})

    def _about_unreleased(self) -> list[str]:
        """Return the meanings of the marks, if there are any."""
        marks = [words.about_marks(MARK, PREFIX)] if self.unreleased else []
        return [*marks, *([words.about_uncovered(UNCOVERED, self.uncovered)] if self.uncovered else [])]

    def _apart(self, *names: str) -> list[str]:
        """Return the columns in which settings differ, and always the first."""
        return [name for name in names if name == names[0] or self.settings[name].nunique() > 1]

    def _titles(self, rows: pd.DataFrame) -> list[str]:
        """Return headings for rows of one problem and privacy; empty if there is nothing to distinguish."""
        apart = [name for name in ("privacy", "problem") if self.settings[name].nunique() > 1]
        return _joined(rows, apart) if apart else [""] * len(rows)

    def _tiles(self) -> list[tuple[str, str]]:
        runs = self.study.runs
        count = self.study.trials["status"].value_counts()
        told = [
            ("trials done", f"{count['done']:,} of {len(self.study.trials):,}"),
            ("settings", f"{runs['setting'].nunique():,}"),
            ("methods", ", ".join(self.methods)),
            ("privacy", "; ".join(self.promises[:6]) + (" ..." if len(self.promises) > 6 else "")),
            ("data", words.listed(runs["data.name"], 4)),
            ("model", words.listed(runs["model.name"], 4)),
            ("clients", words.listed(runs["population"], 4)),
            ("rounds", words.listed(runs["rounds"], 4)),
            ("seeds", words.listed(runs["seed"], 6)),
        ]
        return [(name, value) for name, value in told if value]

    def _axes(self) -> list[tuple[str, int, str]]:
        """Return the keys that differ between runs, with the number of their values, and the values."""
        made = []
        for key in (*self.study.varying(), "seed"):
            count = len({as_text(value) for value in self.study.runs[key]} - {""})
            if count > 1:
                made.append((key, count, words.listed(self.study.runs[key], 12, key)))
        return made

    def _best(self) -> dict[str, object]:
        best = self.best
        low, high = best[f"{self.tested}_min"].min(), best[f"{self.tested}_max"].max()
        width = max(float(high - low), 1e-9)
        tested, validated = self._headings()
        first = [("method", "nowrap"), *([(validated, "n")] if self.has_validation else [])]
        first += [(tested, "n"), ("min to max", "n")]
        then = [("hyperparameters", "w"), ("seeds", "n"), ("best of", "n"), ("epsilon", "n"), ("delta", "n")]
        groups: list[_Group] = []
        unit = " %" if self.metric.bounded else ""
        for row, title in zip(best.to_dict("records"), self._titles(best), strict=True):
            told = [row["method"], *self._validated(row)]
            told += [words.score(row, self.tested, self.metric), words.score_range(row, self.tested, self.metric)]
            more = [row["hyperparameters"] or "–", str(row["seeds"]), str(row["tried"]), *words.epsilon_delta(row)]
            place = {k: f"{100 * (row[f'{self.tested}_{k}'] - low) / width:.1f}" for k in ("min", "max", "mean")}
            if not groups or groups[-1]["title"] != title:
                groups.append(_Group(title=str(title), rows=[]))
            groups[-1]["rows"].append(
                {
                    "first": [(cell, kind) for cell, (_, kind) in zip(told, first, strict=True)],
                    "then": [(cell, kind) for cell, (_, kind) in zip(more, then, strict=True)],
                    "spread": {
                        "low": place["min"],
                        "high": place["max"],
                        "mean": place["mean"],
                        "words": f"test {self.metric.label} {told[-2]}{unit}, {told[-1]}{unit}",
                    },
                    "color": self.look[row["series"]].color,
                    "setting": int(row["setting"]),
                }
            )
        ends = f"{words.shown(low, self.metric)} to {words.shown(high, self.metric)}{unit}"
        columns = [*first, (ends, ""), *then, ("setting", "n")]
        self.tables["best"] = _numbers(self._marked(self._told(best, extra=("tried",))))
        names = _joined(best, self._apart("method", "privacy", "problem"))
        drawn = report_figures.draw_best(best, names, self.look, self.labels[self.tested], self.metric)
        report_figures.save_figure(drawn, self.figures, "best")
        return {"columns": columns, "groups": groups, "legend": words.SPREAD}

    def _headings(self) -> tuple[str, str]:
        """Return the headings of the columns of the metric on test and on validation examples."""
        unit = ", %" if self.metric.bounded else ""
        return self.labels[self.tested] + unit, self.labels[self.validated] + unit

    def _validated(self, row: Row) -> list[str]:
        return [words.score(row, self.validated, self.metric)] if self.has_validation else []

    def _told(self, settings: pd.DataFrame, extra: Sequence[str] = ()) -> pd.DataFrame:
        """Return settings as a table for other programs: identifying columns, metrics, and the keys that vary."""
        metrics = [m for m in self.labels if self.settings[f"{m}_mean"].notna().any()]
        statistics = [f"{metric}_{name}" for metric in metrics for name in ("mean", "std", "min", "max")]
        costs = [q.column for q in QUANTITIES if q.column in settings and q.column not in ("epsilon", "partition")]
        costs = [key for key in costs if settings[key].notna().any()]
        first = ["setting", "problem", "privacy", "method", "hyperparameters", *extra, "seeds"]
        marks = ["not_covered"] if self.uncovered else []
        return settings[[*first, *statistics, "epsilon", "delta", *marks, *costs, *self.study.varying()]]

    def _figures(self) -> list[dict[str, object]]:
        made = []
        distances = any(q.column in self.settings for q in QUANTITIES if q.column.startswith("heterogeneity."))
        for quantity in QUANTITIES:
            if quantity.column not in self.settings or (quantity.name == "partition" and distances):
                continue
            table = against(self.settings, quantity, self.judge, self.metric)
            if table.empty:
                continue
            look = looks(_method_of(table), self.methods)
            hidden = unreleased(self.settings[self.settings["setting"].isin(list(table["setting"]))], quantity.column)
            same = held(self.settings, table, quantity)
            caption = words.caption(quantity, table, same, released=not hidden, metric=self.metric)
            labeled = replace(quantity, label=quantity.label + MARK) if hidden else quantity
            figure = report_figures.draw_against(table, labeled, look, self.labels[self.tested], self.metric)
            svg = report_figures.save_figure(figure, self.figures, quantity.name)
            self.tables[quantity.name] = _numbers(table.rename(columns={"x": f"{PREFIX}x"}) if hidden else table)
            shown = self._shown_against(table, labeled)
            title = f"{_capital(self.metric.label)} and {_TITLES[quantity.name]}"
            made.append({"name": quantity.name, "title": title, "svg": svg, "caption": caption, "table": shown})
        return made

    def _shown_against(self, table: pd.DataFrame, quantity: Quantity) -> _Shown:
        names = self.settings.set_index("setting")["hyperparameters"]
        name = self.metric.label + (UNCOVERED if self.tested in self.uncovered else "")
        name += ", %" if self.metric.bounded else ""
        columns = [_Column("series", "w"), _Column(quantity.label, "n"), _Column(name, "n")]
        columns += [_Column("seeds", "n"), _Column("setting", "w")]
        rows = []
        for row in table.to_dict("records"):
            x = "not private" if row["x"] == math.inf else words.number(row["x"])
            spread = words.plus_minus(row[self.metric.name], row["std"], self.metric)
            rows.append([row["series"], x, spread, str(row["seeds"]), names.loc[row["setting"]] or "–"])
        return _Shown(columns, rows[:MAX_ROWS], max(len(rows) - MAX_ROWS, 0))

    def _draw_curves(self) -> str:
        series = self.best.set_index("setting")["series"]
        rows = self.curves[self.curves["setting"].isin(list(series.index))]
        table = rows.assign(series=rows["setting"].map(series))
        chosen = self.best.sort_values("score", ascending=False, kind="stable")["series"]
        table = table[table["series"].isin(list(chosen[: report_figures.MAX_SERIES]))]
        self.tables["curves"] = _numbers(self._marked(self.curves.dropna(axis="columns", how="all")))
        drawn = report_figures.draw_curves(table, self.look, self.labels[self.tested], self.metric)
        return report_figures.save_figure(drawn, self.figures, "curves")

    def _drawn_curves(self) -> tuple[dict[str, object], str]:
        """Return the curves of the page, thinned, and the text about them."""
        best = self.best["setting"].tolist()
        ranked = self.settings[self.settings["score"].notna()].sort_values("score", ascending=False, kind="stable")
        order = [*best, *(s for s in ranked["setting"] if s not in set(best))]
        by_setting = dict(list(self.curves.groupby("setting", sort=False)))
        order = [setting for setting in order if setting in by_setting]
        told = {row["setting"]: row for row in self.settings.to_dict("records")}
        names = list(self.look)
        kept, longest = [], 0
        for setting in order[:MAX_CURVES]:
            rows = by_setting[setting]
            longest = max(longest, len(rows))
            rows = rows.iloc[thinned(len(rows), MAX_POINTS)]
            keys = [key for key in (*_X, *self.labels, "low", "high") if rows[key].notna().any()]
            values = {key: [words.brief(value) for value in rows[key].tolist()] for key in keys}
            if "epsilon" in values:
                values["epsilon"] = [words.brief(value) for value in _numbers(rows)["epsilon"].tolist()]
            kept.append(
                {
                    "setting": int(setting),
                    "series": names.index(told[setting]["series"]),
                    "name": told[setting]["hyperparameters"],
                    "seeds": int(told[setting]["seeds"]),
                    "best": setting in set(best),
                    "values": values,
                }
            )
        best_names = dict(zip(self.best["series"], self.best["hyperparameters"], strict=True))
        series = [
            {"name": n, "color": self.look[n].color, "dash": self.look[n].dash, "best": best_names.get(n, "")}
            for n in names
        ]
        text = words.about_curves(len(order), MAX_CURVES, longest, MAX_POINTS, self.metric)
        return {"curves": kept, "series": series}, text

    def _near(self) -> dict[str, object]:
        relative = not self.metric.bounded
        table = share_near_best(self.settings, POINTS, relative=relative)
        self.tables["near_best"] = _numbers(table)
        groups: list[_Group] = []
        order = self.best[["problem", "privacy", "method"]].drop_duplicates()
        ordered = order.merge(table, on=["problem", "privacy", "method"], how="left")
        for _, rows in ordered.groupby(["problem", "privacy", "method"], sort=False):
            title, first = self._titles(rows)[0], rows.iloc[0]
            if first["settings"] < 2:
                continue
            if not groups or groups[-1]["title"] != title:
                groups.append(_Group(title=str(title), rows=[]))
            shares = {name: [words.brief(v) for v in rows[f"near_{name}"]] for name in ("own", "all")}
            groups[-1]["rows"].append({"method": first["method"], "settings": int(first["settings"]), **shares})
        return {
            "groups": groups,
            "points": POINTS,
            "words": [words.points(p, relative=relative) for p in POINTS],
            "start": 1,
        }

    def _maps(self) -> tuple[list[dict[str, object]], int]:
        maps = heat_maps(self.study, self.settings)
        for number, one in enumerate(maps[:MAX_MAP_FIGURES], 1):
            figure = report_figures.draw_heat_map(
                one, self.short, self.labels[f"{self.judge}_{self.metric.name}"], self.metric
            )
            report_figures.save_figure(figure, self.figures, f"heat_map_{number}")
        if maps:
            self.tables["heat_maps"] = _numbers(
                pd.concat([_long(one, self.metric.name) for one in maps], ignore_index=True)
            )
        return [self._map(one) for one in maps[:MAX_MAPS]], max(len(maps) - MAX_MAPS, 0)

    def _map(self, one: HeatMap) -> dict[str, object]:
        row_key, column_key = (self.short[key] for key in one.keys)
        higher = self.metric.better == "higher"
        low, high = float(np.nanmin(one.values)), float(np.nanmax(one.values))
        rows = []
        for text, values, counts in zip(one.row_texts, one.values.tolist(), one.seeds.tolist(), strict=True):
            cells = [
                {
                    "text": words.shown(value, self.metric),
                    "part": f"{max(value - low if higher else high - value, 0.0) / max(high - low, 1e-9):.3f}",
                    "words": f"{row_key} {text}, {column_key} {column}: {words.many(count, 'seed')}",
                }
                if value == value
                else None
                for value, count, column in zip(values, counts, one.column_texts, strict=True)
            ]
            rows.append((text, cells))
        apart = self._apart("method", "privacy", "problem")
        group: dict[str, str] = dict(zip(("problem", "privacy", "method"), one.group, strict=True))
        told = " · ".join(group[name] for name in apart if group[name])
        mark = UNCOVERED if f"{self.judge}_{self.metric.name}" in self.uncovered else ""
        title = f"{told}: {row_key} and {column_key}{mark}"
        return {"title": title, "row_key": row_key, "column_key": column_key, "columns": one.column_texts, "rows": rows}

    def _promises(self) -> _Shown:
        keys = ["privacy", "trust", "adjacency", "adversary", "accountant", "delta"]
        keys += ["unit"] if "unit" in self.study.runs else []
        keys += ["not_covered"] if self.uncovered else []
        runs = self.study.runs.assign(**{key: self.study.runs[key].map(as_text) for key in keys})
        rows, told = [], []
        for _, group in sorted(runs.groupby(keys, sort=True), key=lambda pair: self._place(pair[1]["privacy"].iloc[0])):
            row = {key: str(group[key].iloc[0]) for key in keys}
            largest = group["epsilon"].max() if group["private"].any() else float("nan")
            epsilon = rounded_up(largest) if largest == largest else "–"
            unit = "one " + row["unit"] if row.get("unit") else "–"
            promise = [row[key] or "–" for key in ("delta", "adjacency", "adversary", "accountant")]
            marks = [row["not_covered"] or "–"] if self.uncovered else []
            rows.append([row["privacy"], epsilon, promise[0], unit, *promise[1:], *marks, str(len(group))])
            told.append({**row, "epsilon": None if epsilon == "–" else float(epsilon), "runs": len(group)})
        self.tables["privacy"] = pd.DataFrame(told)
        kinds = {"privacy": "nowrap", "epsilon": "n", "delta": "n", "unit": "nowrap", "adjacency": "nowrap"}
        kinds |= {"adversary": "w", "accountant": "nowrap", **({"not covered": "w"} if self.uncovered else {})}
        kinds |= {"runs": "n"}
        return _Shown([_Column(name, kind) for name, kind in kinds.items()], rows)

    def _place(self, promise: object) -> int:
        return self.promises.index(str(promise))

    def _statements(self) -> list[dict[str, object]]:
        promise = {row["run"]: row for row in self.study.runs.to_dict("records")}
        made = []
        for text, runs in self.study.statements.items():
            first = promise[runs[0]]
            told = ", ".join(part for part in (first["method"], first["privacy"], first["problem"]) if part)
            title = f"{told}: {words.many(len(runs), 'trial')}"
            place = (self._place(first["privacy"]), first["problem"], first["method"], title, text)
            made.append((place, {"title": title, "text": text.strip(), "runs": runs}))
        return [one for _, one in sorted(made, key=lambda pair: pair[0])]

    def _by_merit(self) -> pd.DataFrame:
        """Return the settings by problem and guarantee, weaker guarantees first; the best first within each."""
        placed = self.settings.assign(place=[self._place(promise) for promise in self.settings["privacy"]])
        ascending = [True, True, False, True]
        return placed.sort_values(["problem", "place", "score", "setting"], ascending=ascending, kind="stable")

    def _told_first(self, ordered: pd.DataFrame) -> pd.DataFrame:
        """Return the rows of the page, in order: the best of each method, and as many of the others as fit."""
        best = ordered["setting"].isin(list(self.best["setting"]))
        others = ordered[~best].head(max(MAX_ROWS - int(best.sum()), 0)).index
        return ordered[best | ordered.index.isin(others)]

    def _all_settings(self) -> _Settings:
        ordered = self._by_merit()
        self.tables["settings"] = _numbers(self._marked(self._told(ordered)))
        groups = [
            name for name in ("problem", "privacy", "method") if name in self._apart("method", "privacy", "problem")
        ]
        columns = [_Column("setting", "n"), *(_Column(name, "w" if name == "problem" else "nowrap") for name in groups)]
        columns += [_Column("hyperparameters", "w"), _Column("seeds", "n")]
        tested, validated = self._headings()
        columns += [_Column(validated, "n")] if self.has_validation else []
        columns += [_Column(tested, "n"), _Column("min to max", "n"), _Column("test loss", "n")]
        columns += [_Column("epsilon", "n")]
        rows = []
        told = self._told_first(ordered)
        for row in told.to_dict("records"):
            cells = [
                str(row["setting"]),
                *(row[name] for name in groups),
                row["hyperparameters"] or "–",
                str(row["seeds"]),
            ]
            cells += self._validated(row)
            cells += [
                words.score(row, self.tested, self.metric),
                words.score_range(row, self.tested, self.metric),
                words.number(row["test_loss_mean"]),
            ]
            rows.append([*cells, words.epsilon_delta(row)[0]])
        numbers = [int(number) for number in told["setting"]]
        table = _Shown(columns, rows, len(ordered) - len(told))
        return _Settings(table, numbers, [self.runs[number] for number in numbers])

    def _failed(self) -> _Shown:
        failed = self.study.trials[self.study.trials["status"] == "failed"].reset_index(drop=True)
        if failed.empty:
            return _Shown([], [])
        keys = [k for k in failed.columns if ("." in k or k == "seed") and failed[k].map(as_text).nunique() > 1]
        failed = failed.assign(changes=words_of(failed, keys))[["trial", "changes", "reason"]]
        self.tables["failed"] = failed
        rows = [[row["trial"] or "–", row["changes"] or "–", row["reason"]] for row in failed.to_dict("records")]
        columns = [_Column("trial", "nowrap"), _Column("changes", "w"), _Column("reason", "w")]
        return _Shown(columns, rows[:MAX_ROWS], max(len(rows) - MAX_ROWS, 0))

    def _trials(self) -> None:
        columns = ["setting", "method", "problem", "privacy", *self.labels, "epsilon", "delta", "population", "rounds"]
        columns += ["not_covered"] if self.uncovered else []
        columns += ["cohort_size", *(q.column for q in QUANTITIES if q.column in self.study.runs)]
        runs = self.study.runs[["run", *dict.fromkeys(f for f in columns if self.study.runs[f].notna().any())]]
        keys = [key for key in (*self.study.varying(), "seed") if key in self.study.trials]
        trials = self.study.trials[["trial", "status", "reason", *keys]]
        told = trials.merge(runs.rename(columns={"run": "trial"}), on="trial", how="left")
        self.tables["trials"] = _numbers(self._marked(told))


def _labels(study: Study) -> dict[str, str]:
    """Return the label of each score, with the direction in which it is better unless it is accuracy or a loss."""
    usual = [metric.name for metric in study.metrics] == ["accuracy"]
    named = {metric.name: metric for metric in study.metrics} | {"loss": METRICS["loss"]}
    labels = {}
    for on in ("test", "validation"):
        for name, metric in named.items():
            more = " (nats)" if name == "loss" and usual else ""
            more = more if name in ("accuracy", "loss") else f" ({metric.better} is better)"
            labels[f"{on}_{name}"] = f"{on} {metric.label}{more}"
    order = [f"{on}_{name}" for name in named for on in ("test", "validation")]
    return {key: labels[key] for key in order}


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _contents(figures: bool, failed: bool, metric: str) -> list[tuple[str, str]]:
    all_ = [("what", "Runs"), ("best", "Best of each method"), ("figures", f"{_capital(metric)} by factor")]
    all_ += [("curves", "Curves"), ("robustness", "Hyperparameters"), ("privacy", "Privacy guarantees")]
    all_ += [("settings", "All settings"), ("failed", "Failed trials")]
    return [(key, title) for key, title in all_ if (key != "figures" or figures) and (key != "failed" or failed)]


def _method_of(table: pd.DataFrame) -> dict[str, str]:
    return dict(zip(table["series"], table["method"], strict=True))


def _joined(rows: pd.DataFrame, names: Sequence[str]) -> list[str]:
    return [" · ".join(part for part in parts if part) for parts in zip(*(rows[name] for name in names), strict=True)]


def _by_weakness(runs: pd.DataFrame) -> list[str]:
    """Return the guarantees in words, the weakest first."""
    epsilon = runs["epsilon"].where(runs["private"], math.inf).fillna(math.inf)
    weakest = runs.assign(weakness=-epsilon).groupby("privacy", sort=True)["weakness"].min()
    return [str(name) for name in weakest.sort_values(kind="stable").index]


def _numbers(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table with epsilon rounded up, as everywhere on the page."""
    if "epsilon" not in table:
        return table
    up = [float(rounded_up(e)) if e == e and not math.isinf(e) else e for e in table["epsilon"].tolist()]
    return table.assign(epsilon=up)


def _csv(table: pd.DataFrame) -> str:
    return table.to_csv(index=False, lineterminator="\n", float_format="%.8g")


def _long(one: HeatMap, metric: str) -> pd.DataFrame:
    group = dict(zip(("problem", "privacy", "method"), one.group, strict=True))
    rows = [
        {**group, "row_key": one.keys[0], "row": row, "column_key": one.keys[1], "column": column}
        | {metric: one.values[i, j], "seeds": int(one.seeds[i, j])}
        for i, row in enumerate(one.rows)
        for j, column in enumerate(one.columns)
    ]
    return pd.DataFrame(rows)


def _embedded(data: object) -> str:
    """Return JSON that can be embedded in a page: nothing in it can end its element."""
    text = json.dumps(jsonable(data), separators=(",", ":"), ensure_ascii=True)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")

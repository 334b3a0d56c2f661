"""A report's figures, saved as PNG and SVG, and embedded in the page in its colors."""

import io
import re
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FixedLocator, MaxNLocator, NullLocator

from fedpriv.errors import naming
from fedpriv.files import write_atomically
from fedpriv.report.analysis import HeatMap, Quantity
from fedpriv.tasks.metrics import Metric

__all__ = ["Look", "draw_against", "draw_best", "draw_curves", "draw_heat_map", "looks", "save_figure"]

# The first ones differ most, also for color-blind readers. The page has lighter ones on dark ground.
COLORS = ("#0072b2", "#d55e00", "#0a4d2a", "#cc79a7", "#332288", "#8f8f1f", "#6b1f3a", "#4f9a92", "#7d7d7d", "#b08f1e")
DASHES = ("", "6 3", "2 2", "8 2 2 2", "12 4", "4 1 1 1 1 1")
MARKERS = "osD^vP"
_INK, _LINE, _HEAT = "#1a1b1c", "#d0d1d2", "BuGn"
_WIDTH = 4.2
MAX_SERIES = 20

_STYLE: Any = {
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _LINE,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 9.0,
    "legend.frameon": False,
    "text.parse_math": False,
    "svg.fonttype": "none",
}


@dataclass(frozen=True)
class Look:
    """The look of a series in every figure and on the page: indices of its color, and of its dashes and marker."""

    color: int
    dash: int

    @property
    def line(self) -> dict[str, Any]:
        """The look as Matplotlib options."""
        pattern = tuple(float(part) for part in DASHES[self.dash].split())
        style = (0, pattern) if pattern else "-"
        return {"color": COLORS[self.color], "linestyle": style, "marker": MARKERS[self.dash]}


def looks(series: Mapping[str, str], methods: Sequence[str]) -> dict[str, Look]:
    """Return a look for each series.

    Args:
        series: The method of each series, in the order of the legend.
        methods: All methods of the study; if there are several, each has a color.
    """
    made: dict[str, Look] = {}
    seen: dict[str, int] = {}
    for name in series:
        number = seen.setdefault(series[name], 0)
        seen[series[name]] += 1
        color, dash = (methods.index(series[name]), number) if len(methods) > 1 else (number, number // len(COLORS))
        made[name] = Look(color % len(COLORS), dash % len(DASHES))
    return made


def draw_best(best: pd.DataFrame, names: Sequence[str], look: Mapping[str, Look], label: str, metric: Metric) -> Figure:
    """Draw the best settings' test metric, one line each: mean and range over seeds."""
    column = f"test_{metric.name}"
    with _styled():
        wrapped = [_wrapped(name, 30) for name in names]
        lines = np.array([1 + name.count("\n") for name in wrapped])
        figure, axes = _figure(0.9 + 0.17 * (lines.sum() + 0.5 * len(lines)))
        heights = (-np.cumsum(lines + 0.5) + lines / 2).astype(float)
        for height, row in zip(heights, best.to_dict("records"), strict=True):
            color = COLORS[look[row["series"]].color]
            axes.plot([row[f"{column}_min"], row[f"{column}_max"]], [height, height], color=color, lw=1.5)
            axes.plot(row[f"{column}_mean"], height, "o", color=color, ms=5)
        axes.set_yticks(heights, wrapped)
        axes.set(xlabel=_fitted(label), ylim=(heights[-1] - 1.0, heights[0] + 1.0))
        axes.xaxis.set_major_formatter(_in_percent if metric.bounded else _as_number)
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        axes.grid(visible=False, axis="y")
    return figure


def draw_against(
    table: pd.DataFrame, quantity: Quantity, look: Mapping[str, Look], label: str, metric: Metric
) -> Figure:
    """Draw the metric against a quantity, one line per series, the `MAX_SERIES` best; see `analysis.against`."""
    name_of, best = metric.name, (metric.sign * table[metric.name]).groupby(table["series"]).max()
    chosen = best.sort_values(ascending=False, kind="stable").index[:MAX_SERIES]
    table = table[table["series"].isin(list(chosen))]
    finite = table[table["x"] != np.inf]
    texts = [] if pd.api.types.is_numeric_dtype(finite["x"]) else sorted(finite["x"].astype(str).unique())
    with _styled():
        figure, axes = _figure(2.7)
        for name in chosen:
            rows = finite[finite["series"] == name]
            if rows.empty:
                continue
            x = [texts.index(str(v)) for v in rows["x"]] if texts else rows["x"].to_numpy(dtype=float)
            line = look[str(name)].line
            spread = np.clip(np.stack([rows[name_of] - rows["low"], rows["high"] - rows[name_of]]), 0.0, None)
            line |= {"drawstyle": "steps-post"} if quantity.cost else {}
            axes.errorbar(x, rows[name_of], spread, label=str(name), ms=4, lw=1.5, elinewidth=1, **line)
        free = table[table["x"] == np.inf]
        for name in (name for name in chosen if name in set(free["series"])):
            rows = free[free["series"] == name]
            line = {**look[str(name)].line, "marker": None, "linestyle": (0, (1.0, 1.5))}
            axes.axhline(rows[name_of].iloc[0], label=f"{name}, not private", lw=1.2, **line)
        _set_x(axes, finite["x"], texts, quantity)
        axes.set(xlabel=quantity.label, ylabel=_fitted(label))
        axes.yaxis.set_major_formatter(_in_percent if metric.bounded else _as_number)
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        _add_legend(figure)
    return figure


def draw_curves(table: pd.DataFrame, look: Mapping[str, Look], label: str, metric: Metric) -> Figure:
    """Draw the test metric over rounds, per series: columns `series`, `round`, `test_METRIC`, `low`, `high`."""
    with _styled():
        figure, axes = _figure(2.7)
        for name in (name for name in look if name in set(table["series"])):  # in order of merit
            rows = table[table["series"] == name]
            line = {**look[str(name)].line, "marker": None}
            axes.plot(rows["round"], rows[f"test_{metric.name}"], label=str(name), lw=1.5, **line)
            axes.fill_between(rows["round"], rows["low"], rows["high"], color=line["color"], alpha=0.12, lw=0)
        axes.set(xlabel="round", ylabel=_fitted(label))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_formatter(_in_percent if metric.bounded else _as_number)
        _add_legend(figure)
    return figure


def draw_heat_map(map_: HeatMap, names: Mapping[str, str], label: str, metric: Metric) -> Figure:
    """Draw the metric over two hyperparameters, with the numbers in the cells; darker is better."""
    rows, columns = map_.values.shape
    shown = 100.0 * map_.values if metric.bounded else map_.values
    heat = _HEAT if metric.better == "higher" else f"{_HEAT}_r"
    with _styled():
        figure, axes = _figure(1.3 + 0.32 * rows, width=max(_WIDTH, 1.6 + 0.5 * columns))
        image = axes.imshow(shown, aspect="auto", cmap=heat)
        axes.set_xticks(range(columns), map_.column_texts, rotation=45 if columns > 6 else 0)
        axes.set_yticks(range(rows), map_.row_texts)
        axes.set(xlabel=names[map_.keys[1]], ylabel=names[map_.keys[0]])
        axes.set_title(" · ".join(part for part in map_.group if part), fontsize=9)
        axes.grid(visible=False)
        middle = (np.nanmin(shown) + np.nanmax(shown)) / 2
        for (row, column), value in np.ndenumerate(shown):
            if value == value:
                color = "#ffffff" if metric.sign * (value - middle) > 0 else "#000000"
                axes.text(
                    column,
                    row,
                    f"{value:.1f}" if metric.bounded else _as_number(value),
                    ha="center",
                    va="center",
                    color=color,
                )
        figure.colorbar(image, ax=axes, label=_fitted(f"{label}, %" if metric.bounded else label))
    return figure


def save_figure(figure: Figure, folder: Path, name: str) -> str:
    """Write `NAME.png` and `NAME.svg`, and return the SVG for a page.

    The returned SVG has no size and no prologue, identifiers that begin with `name`, and the page's variables `--ink`,
    `--line` and `--c0` ... instead of colors. The files contain no date.
    """
    text = io.StringIO()
    picture = folder / f"{name}.png"
    with naming(picture), _styled(), warnings.catch_warnings(), mpl.rc_context({"svg.hashsalt": name}):
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        warnings.filterwarnings("ignore", message="Matplotlib currently does not support")
        FigureCanvasAgg(figure)
        figure.savefig(picture, dpi=200, facecolor="white", metadata={"Software": None})
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    svg = text.getvalue()
    write_atomically(folder / f"{name}.svg", svg)
    return _for_page(svg, name)


def _for_page(svg: str, name: str) -> str:
    inner = svg[svg.index("<svg") :]
    inner = re.sub(r"<metadata>.*?</metadata>", "", inner, flags=re.DOTALL)
    inner = re.sub(r'\b(id|xlink:href|clip-path)="(#|url\(#)?([^"]+)"', rf'\1="\2{name}-\3"', inner)
    box = re.search(r'viewBox="[^"]+"', inner)
    assert box is not None
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    head = f'<svg {names} {box[0]} aria-hidden="true">'
    inner = re.sub(r"^<svg[^>]*>", head, inner)
    colors = {_INK: "var(--ink)", _LINE: "var(--line)"}
    colors |= {color: f"var(--c{number})" for number, color in enumerate(COLORS)}
    for color, variable in colors.items():
        inner = inner.replace(color, variable)
    return inner


@contextmanager
def _styled() -> Iterator[None]:
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        yield


def _figure(height: float, width: float = _WIDTH) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _in_percent(share: float, _: float | None = None) -> str:
    return f"{100.0 * share:.4g} %"


def _as_number(value: float, _: float | None = None) -> str:
    return f"{value:.4g}"


def _add_legend(figure: Figure) -> None:
    """Add a legend below the axes, and enlarge the figure for it."""
    handles, names = figure.axes[0].get_legend_handles_labels()
    wrapped = [_wrapped(name, 52) for name in names]
    lines = sum(1 + name.count("\n") for name in wrapped)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.165 * lines + 0.15)
    figure.legend(handles, wrapped, loc="outside lower left", ncols=1, borderaxespad=0.3)


def _wrapped(text: str, width: int) -> str:
    return textwrap.fill(text, width, max_lines=4, placeholder=" ...") or "-"


def _fitted(label: str) -> str:
    """Return the label of an axis in several lines if it is too long for one."""
    return label if len(label) <= 36 else _wrapped(label, 24)


def _set_x(axes: Axes, values: pd.Series, texts: Sequence[str], quantity: Quantity) -> None:
    if texts:
        axes.set_xticks(
            range(len(texts)), texts, rotation=30 if len(texts) > 3 else 0, ha="right" if len(texts) > 3 else "center"
        )
        return
    distinct = np.unique(values.to_numpy(dtype=float))
    if distinct[0] > 0.0 and distinct[-1] >= 10.0 * distinct[0]:
        axes.set_xscale("log")
    if quantity.cost:
        axes.xaxis.set_major_formatter(EngFormatter(unit="B" if quantity.column == "bytes" else "s"))
        axes.xaxis.set_minor_locator(NullLocator())
    elif _far_apart(distinct, log=axes.get_xscale() == "log"):
        axes.xaxis.set_major_locator(FixedLocator([float(x) for x in distinct]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:.4g}")


def _far_apart(values: np.ndarray, *, log: bool) -> bool:
    """Return True if each of the ascending values can have a separate tick."""
    places = np.log(values) if log else values
    return len(places) <= 8 and bool((np.diff(places) >= 0.11 * (places[-1] - places[0])).all())

"""Plots of a run."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedpriv.errors import naming, require_extra
from fedpriv.tables import Record
from fedpriv.tasks.kinds import Classification, TaskKind
from fedpriv.tasks.metrics import Metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_curves"]

COLORS = ("#0072B2", "#D55E00", "#009E73")

_WARNING = "#B00020"


_CHANCE = "#666666"


def plot_curves(
    rows: Sequence[Record],
    path: Path,
    title: str,
    task: TaskKind | None = None,
    classes: int | None = None,
    metric: Metric | None = None,
) -> None:
    """Write the first metric, loss and epsilon over rounds as one PNG.

    Args:
        rows: The released rows of a run, by round; the scores in `not_covered` are marked.
        path: The file to write.
        title: The title above the panels.
        task: The task, which has the metric; None for classification.
        classes: The number of labels, for a line at the accuracy of uniform guesses; None for no line.
        metric: The metric of the first panel; None for the task's, and its unit of the loss.

    Raises:
        UserError: If the plotting packages are not installed.
    """
    require_extra("the plot of a run", "report")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(11, 3.6))
    FigureCanvasAgg(figure)
    figure.suptitle(title, parse_math=False)
    figure.subplots_adjust(left=0.06, right=0.985, top=0.8, bottom=0.14, wspace=0.27)  # layout engines draw twice
    task = task or Classification()
    unit = f" ({task.loss_unit})" if task.loss_unit and metric is None else ""
    metric = metric or task.selects
    usual = metric.name == "accuracy"
    panels = [
        (f"test_{metric.name}", f"test {metric.label}" + ("" if usual else f", {metric.better} is better")),
        ("test_loss", f"test loss{unit}"),
        ("epsilon", "epsilon spent"),
    ]
    for axes, (key, label), color in zip(figure.subplots(1, 3), panels, COLORS, strict=True):
        points = [(row["round"], row[key]) for row in rows if row.get(key) is not None]
        axes.set(xlabel="round", title=label)
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        if not points:
            what = "not private" if key == "epsilon" else "not finite"
            what = what if any(key in row for row in rows) else "not evaluated"
            axes.text(0.5, 0.5, what, ha="center", transform=axes.transAxes)
            axes.set(xticks=[], yticks=[])
            continue
        marker = "o" if len(points) < 30 else None
        axes.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=3)
        if key == f"test_{metric.name}":
            limits = {"ylim": (0, 1)} if metric.bounded else {}
            axes.set(**limits, title=f"{label}: {points[-1][1]:.4g} at the end")
            _mark_chance(axes, task.chance(classes) if classes else None)
        if any(key in row.get("not_covered", ()) for row in rows):
            axes.set_title(f"{axes.get_title()}\nnot covered by epsilon", color=_WARNING)
    with naming(path), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(path, dpi=120)


def _mark_chance(axes: "Axes", chance: float | None) -> None:
    """Draw the score of uniform guesses, and name it."""
    if chance is None:
        return
    axes.axhline(chance, color=_CHANCE, linestyle=":", linewidth=1.2)
    beside = axes.get_yaxis_transform()
    axes.text(0.99, chance, f"uniform guess: {chance:.3g}", transform=beside, ha="right", va="bottom", color=_CHANCE)

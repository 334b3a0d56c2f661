"""Plots of a run."""

import warnings
from collections.abc import Sequence
from pathlib import Path

from fedpriv.errors import require_extra
from fedpriv.tables import Record

__all__ = ["plot_curves"]

PANELS = (
    ("test_accuracy", "test accuracy", "#0072B2"),
    ("test_loss", "test loss (nats)", "#D55E00"),
    ("epsilon", "epsilon spent", "#009E73"),
)

_WARNING = "#B00020"


def plot_curves(rows: Sequence[Record], path: Path, title: str) -> None:
    """Write accuracy, loss and epsilon over rounds as one PNG.

    Args:
        rows: The released rows of a run, by round; the scores in `not_covered` are marked.
        path: The file to write.
        title: The title above the panels.

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
    for axes, (key, label, color) in zip(figure.subplots(1, 3), PANELS, strict=True):
        points = [(row["round"], row[key]) for row in rows if row[key] is not None]
        axes.set(xlabel="round", title=label)
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if not points:
            what = "not private" if key == "epsilon" else "not finite"
            axes.text(0.5, 0.5, what, ha="center", transform=axes.transAxes)
            axes.set(xticks=[], yticks=[])
            continue
        marker = "o" if len(points) < 30 else None
        axes.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=3)
        if key == "test_accuracy":
            axes.set(ylim=(0, 1), title=f"{label}: {points[-1][1]:.3f} at the end")
        if any(key in row.get("not_covered", ()) for row in rows):
            axes.set_title(f"{axes.get_title()}\nnot covered by epsilon", color=_WARNING)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(path, dpi=120)

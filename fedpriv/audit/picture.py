"""The plot of an audit: scores of canaries, and the resulting bounds on epsilon."""

from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from fedpriv.privacy import rounded_up
from fedpriv.tables import Record

if TYPE_CHECKING:
    from fedpriv.audit.verdict import Findings

__all__ = ["plot_audit"]

# From Okabe and Ito's scheme, suitable for color-blind readers; one dark, one light.
NULL, SEEN, CLAIM = "#56B4E9", "#D55E00", "#000000"


def plot_audit(findings: "Findings", record: Record) -> bytes:
    """Return histograms of scores, and lower bounds next to the claim, as one PNG.

    Args:
        findings: The findings.
        record: The contents of `audit.json`.
    """
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    promise = f"{record['trust']} trust, epsilon {rounded_up(record['epsilon_claimed'])} claimed"
    figure.suptitle(f"Audit of {record['name']}: {record['verdict']} ({record['method']}, {promise})", parse_math=False)
    left, right = figure.subplots(1, 2, width_ratios=(6, 5))
    _draw_scores(left, findings)
    _draw_bounds(right, findings, record)
    content = BytesIO()
    figure.savefig(content, format="png", dpi=130)
    return content.getvalue()


def _draw_scores(axes: Axes, findings: "Findings") -> None:
    null, seen, expected = findings.null, findings.whitened, findings.score_claimed
    low, high = float(min(null.min(), seen.min(), -3.0)), float(max(null.max(), seen.max(), expected + 3.0))
    axes.hist(null, _bins(null, high - low), density=True, color=NULL, alpha=0.75, label=f"{len(null):,} unseen")
    axes.hist(seen, _bins(seen, high - low), density=True, color=SEEN, alpha=0.75, label=f"{len(seen)} canaries")
    grid = np.linspace(low, high, 2000)
    curves = (0.0, ":", "without a canary: N(0, 1)"), (expected, "-", "a canary, if the claim is exact")
    for mean, style, label in curves:
        density = np.exp(-0.5 * (grid - mean) ** 2) / np.sqrt(2.0 * np.pi)
        axes.plot(grid, density, color=CLAIM, linestyle=style, linewidth=1.4, label=label)
    axes.set(xlabel="whitened score (deviations of the null)", ylabel="density", title="Scores of canaries")
    axes.set_ylim(0.0, axes.get_ylim()[1] * 1.25)
    axes.legend(frameon=False, fontsize=9, loc="upper left", ncols=2)
    axes.spines[["top", "right"]].set_visible(False)


def _bins(scores: np.ndarray, span: float) -> list[float]:
    """Return bin edges for these scores, none of them closer than a sixtieth of the whole axis."""
    fine = np.histogram_bin_edges(scores, "fd")
    width = max(float(fine[1] - fine[0]), span / 60.0)
    return (float(scores.min()) - 0.5 * width + width * np.arange(int(np.ptp(scores) / width) + 3)).tolist()


def _draw_bounds(axes: Axes, findings: "Findings", record: Record) -> None:
    rows = findings.scores[::-1]
    heights = np.arange(len(rows))
    longest = max(row.estimate or row.lower for row in rows)
    axes.barh(heights, [row.lower for row in rows], 0.55, color=[NULL if row.certified else SEEN for row in rows])
    beside = axes.get_yaxis_transform()
    for height, row in zip(heights, rows, strict=True):
        axes.text(1.02, float(height), f"{row.lower:.2f}", transform=beside, va="center", fontsize=10)
        axes.plot([row.claimed] * 2, [height - 0.38, height + 0.38], color=CLAIM, linewidth=2.0)
        if row.estimate is not None:
            axes.plot(row.estimate, height, "D", color=CLAIM, markersize=5)
    axes.set(yticks=heights, yticklabels=[row.name for row in rows], ylim=(-0.6, len(rows) + 0.5))
    if longest > 8.0 * findings.claimed:
        axes.set_xscale("symlog", linthresh=1.0)
        axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlim(0.0, 1.12 * max(findings.claimed, longest))
    axes.set(xlabel="epsilon", title=f"Lower bounds at {100 * record['confidence']:g} % confidence")
    legend = [
        Patch(color=SEEN, label="for Gaussian plans"),
        Patch(color=NULL, label="certified, one run"),
        Line2D([], [], color=CLAIM, linewidth=2.0, label="claim"),
        Line2D([], [], color=CLAIM, marker="D", markersize=5, linestyle="", label="estimate"),
    ]
    axes.legend(handles=legend, frameon=False, fontsize=9, loc="upper left", ncols=2)
    axes.spines[["top", "right"]].set_visible(False)

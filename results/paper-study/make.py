"""The study of the alpha-NormEC paper at a small size: CIFAR-10, ten clients, and which of its claims hold here.

    python results/paper-study/make.py [--data-root DIR] [--jobs 2] [--runs runs/paper-study] [--draw]

Runs the missing trials of sim_configs/sweeps/paper-*.toml, and writes trials.csv (a row a trial), best.csv (the best
setting of each method), beta.csv, shares.csv, figure.png and the tables of README.md. Settings are chosen by their mean
test accuracy over three seeds, for every method alike: an optimistic number, useful only for comparison. `--draw` only
draws figure.png again, from trials.csv.
"""

import argparse
import json
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedpriv.experiment.run_directory import flat_tables
from fedpriv.sweeps.config import load_sweep
from fedpriv.sweeps.run import run_sweep

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[0] / "benchmarks")]

from page import fill, table  # noqa: E402

ROOT = HERE.parents[1]
SWEEPS = ("paper-alpha-normec", "paper-others", "paper-epsilon8")
SETTING = ["alpha", "beta", "clip_norm", "damping", "server_normalization", "server_lr"]
NAMES = {
    "alpha-normec": "alpha-NormEC",
    "normalized-sgd": "normalized SGD (no memory)",
    "clip21": "Clip21",
    "dp-fedavg": "DP-FedAvg (no memory)",
}
PRIVACY = {
    "0.0": "no noise",
    "0.01": "noise multiplier 0.01",
    "local": "local, epsilon 8",
    "central": "central, epsilon 8",
}


def trials(runs: Path) -> pd.DataFrame:
    """Return a row for each finished trial."""
    rows = []
    for sweep in SWEEPS:
        for folder in sorted((runs / sweep / "trials").iterdir()):
            if (folder / "summary.json").exists():
                rows.append(_row(folder))
    return pd.DataFrame(rows)


def _row(folder: Path) -> dict[str, Any]:
    config = flat_tables(tomllib.loads((folder / "config.toml").read_text()))
    summary = json.loads((folder / "summary.json").read_text())
    noise = config.get("privacy.noise_multiplier")
    method = {key: config[f"method.{key}"] for key in SETTING if f"method.{key}" in config}
    name = NAMES[config["method.name"]]
    if config["method.name"] == "alpha-normec":
        name += ", damped" if method["damping"] else ", SN" if method["server_normalization"] else ", without SN"
    privacy = PRIVACY[config["privacy.trust"] if noise is None else str(noise)]
    figures = {key: summary[key] for key in ("test_accuracy", "test_loss", "epsilon", "seconds")}
    return {"privacy": privacy, "method": name, **method, "seed": config["seed"], **figures}


def settings(found: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each setting: mean, deviation and number of seeds."""
    keys = ["privacy", "method", *SETTING]
    grouped = found.groupby(keys, dropna=False, sort=False)["test_accuracy"]
    return grouped.agg(["mean", "std", "count"]).reset_index()


def best(made: pd.DataFrame) -> pd.DataFrame:
    """Return the best setting of each method under each privacy."""
    return made.loc[made.groupby(["privacy", "method"], sort=False)["mean"].idxmax()].reset_index(drop=True)


def shares(made: pd.DataFrame, points: tuple[float, ...] = (0.02, 0.05)) -> pd.DataFrame:
    """Return the share of each grid within so many points of the method's best, and of the best of all methods.

    Once for all settings, and once for pairs of alpha and beta (or one of alpha or clip_norm) at their best step.
    """
    rows = []
    for privacy, under in made[made["privacy"].isin(list(PRIVACY.values())[:2])].groupby("privacy", sort=False):
        for method, part in under.groupby("method", sort=False):
            tuned = part.groupby(["alpha", "beta", "clip_norm"], dropna=False)["mean"].max()
            row: dict[str, Any] = {"privacy": privacy, "method": method, "settings": len(part), "tuned": len(tuned)}
            for p in points:
                row[f"within {p:g} of own best"] = (part["mean"] >= part["mean"].max() - p).mean()
                row[f"within {p:g} of best of all"] = (part["mean"] >= under["mean"].max() - p).mean()
                row[f"tuned step: within {p:g} of own best"] = (tuned >= tuned.max() - p).mean()
            rows.append(row)
    return pd.DataFrame(rows)


def by_beta(made: pd.DataFrame) -> pd.DataFrame:
    """Return best accuracy of published alpha-NormEC at each beta, over alpha and step."""
    part = made[made["method"].isin(["alpha-NormEC, SN", "alpha-NormEC, without SN"])]
    part = part[part["privacy"].isin(list(PRIVACY.values())[:2])]
    return (
        part.groupby(["privacy", "method", "beta"], sort=False)["mean"].max().unstack().sort_index(axis=1).reset_index()
    )


def draw(made: pd.DataFrame, path: Path) -> None:
    """Heat maps of alpha and beta at the best step, and the best of the others beside them."""
    figure = Figure(figsize=(10, 6.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 3, width_ratios=(1, 1, 1.2))
    for row, privacy in enumerate(list(PRIVACY.values())[:2]):
        under = made[made["privacy"] == privacy]
        low, high = under["mean"].min(), under["mean"].max()
        for panel, method in zip(panels[row], ("alpha-NormEC, SN", "alpha-NormEC, without SN"), strict=False):
            grid = under[under["method"] == method].pivot_table(
                index="alpha", columns="beta", values="mean", aggfunc="max"
            )
            _heat(panel, grid, low, high)
            panel.set_title(f"{method}\n{privacy}", fontsize=9)
        _dots(panels[row, 2], best(under))
        panels[row, 2].set_title(f"best setting of each method\n{privacy}", fontsize=9)
    low = min(axes.get_xlim()[0] for axes in panels[:, 2])
    high = max(axes.get_xlim()[1] for axes in panels[:, 2])
    for axes in panels[:, 2]:
        axes.set_xlim(low, high)
    figure.suptitle(
        "Test accuracy on CIFAR-10, mean of three seeds; chance is 0.1. Maps: best step. SN: server normalization",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)


def _heat(panel: Axes, grid: pd.DataFrame, low: float, high: float) -> None:
    panel.imshow(grid, cmap="cividis", vmin=low, vmax=high, aspect="auto")
    panel.set_xticks(range(len(grid.columns)), [f"{x:g}" for x in grid.columns])
    panel.set_yticks(range(len(grid.index)), [f"{x:g}" for x in grid.index])
    panel.set(xlabel="beta", ylabel="alpha")
    for (y, x), value in np.ndenumerate(grid.to_numpy()):
        bright = value > (low + high) / 2
        panel.text(x, y, f"{value:.3f}", ha="center", va="center", fontsize=8, color="black" if bright else "white")


def _dots(panel: Axes, rows: pd.DataFrame) -> None:
    rows = rows.sort_values("mean")
    panel.errorbar(rows["mean"], rows["method"], xerr=rows["std"], fmt="o", color="#0072B2", capsize=3, elinewidth=1)
    panel.set_ylim(-0.6, len(rows) - 0.4)
    panel.tick_params(axis="y", labelsize=8)
    panel.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    panel.grid(axis="x", alpha=0.3)
    panel.set_xlabel("test accuracy, with standard deviation", fontsize=8)


def in_words(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the best settings with one column for the setting; best first, within each privacy."""
    order = {name: number for number, name in enumerate(PRIVACY.values())}
    rows = rows.assign(order=rows["privacy"].map(order)).sort_values(["order", "mean"], ascending=[True, False])
    shown = ["alpha", "beta", "clip_norm", "server_lr"]
    words = [
        ", ".join(f"{key} {row[key]:g}" for key in shown if row[key] == row[key]) for row in rows.to_dict("records")
    ]
    accuracy = [f"{mean:.3f} ± {std:.3f}" for mean, std in zip(rows["mean"], rows["std"], strict=True)]
    columns = {"privacy": rows["privacy"], "method": rows["method"], "test accuracy": accuracy, "setting": words}
    return pd.DataFrame(columns)


def markdown(rows: pd.DataFrame) -> str:
    """Return a table as Markdown, three digits."""
    shown = rows.map(lambda x: "" if x != x else f"{x:.3f}".rstrip("0").rstrip(".") if isinstance(x, float) else str(x))
    return table([f"{name}" for name in shown.columns], shown.to_numpy().tolist())


def main() -> None:
    """Run the missing trials and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, default=None)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=Path("runs/paper-study"))
    parser.add_argument("--draw", action="store_true")
    options = parser.parse_args()
    if options.draw:
        draw(settings(pd.read_csv(HERE / "trials.csv")), HERE / "figure.png")
        return
    for name in SWEEPS:
        sweep = load_sweep(ROOT / "sim_configs" / "sweeps" / f"{name}.toml")
        run_sweep(sweep, options.runs / name, jobs=options.jobs, data_root=options.data_root, resume=True)
    found = trials(options.runs)
    found.to_csv(HERE / "trials.csv", index=False, float_format="%.5g")
    made = settings(found)
    tables = {"best": best(made), "shares": shares(made), "beta": by_beta(made)}
    for name, rows in tables.items():
        rows.to_csv(HERE / f"{name}.csv", index=False, float_format="%.4g")
        fill(name, markdown(in_words(rows) if name == "best" else rows), HERE / "README.md")
    draw(made, HERE / "figure.png")


if __name__ == "__main__":
    main()

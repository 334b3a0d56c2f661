"""Time to an accuracy on unequal devices, in rounds, with FedBuff and with FedFix, with and without privacy.

    python results/devices/make.py [--jobs 2] [--runs runs/devices] [--draw]

Runs the missing trials of sim_configs/sweeps/devices.toml, and writes trials.csv (a row a trial), times.csv (a row a
cell: the better of the two steps by mean time, then by final accuracy, over three seeds), figure.png and the tables of
README.md. Seconds are those of the virtual clock. `--draw` only draws figure.png again, from trials.csv.
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
from matplotlib.lines import Line2D

from fedpriv.experiment.run_directory import RunDirectory, flat_tables
from fedpriv.sweeps.config import load_sweep
from fedpriv.sweeps.run import run_sweep

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[0] / "benchmarks")]

from page import fill  # noqa: E402

TARGET = 0.8
SCHEDULES = {
    ("synchronous", None): "rounds, all",
    ("synchronous", 5.0): "rounds, 5 s",
    ("fedbuff", None): "FedBuff",
    ("fedfix", None): "FedFix",
}
METHODS = {"dp-fedavg": "DP-FedAvg", "alpha-normec": "alpha-NormEC, damped"}
CELL = ["privacy", "speed_spread", "dropout", "schedule", "method"]


def row(folder: Path) -> dict[str, Any]:
    """Return a trial's row: settings, time of the target accuracy, and final accuracy."""
    config = flat_tables(tomllib.loads((folder / "config.toml").read_text()))
    summary = json.loads((folder / "summary.json").read_text())
    rounds = pd.DataFrame(RunDirectory(folder).rows("rounds.jsonl"))
    there = rounds[rounds["test_accuracy"] >= TARGET]
    first = there.iloc[0] if len(there) else {}
    return {
        "privacy": "epsilon 8" if "privacy.epsilon" in config else "none",
        "speed_spread": config["devices.speed_spread"],
        "dropout": config["devices.dropout"],
        "schedule": SCHEDULES[config["schedule.kind"], config.get("schedule.deadline")],
        "method": METHODS[config["method.name"]],
        "server_lr": config["method.server_lr"],
        "seed": config["seed"],
        "seconds_to_target": first.get("simulated_seconds", np.nan),
        "megabytes_to_target": (first.get("bytes_up", np.nan) + first.get("bytes_down", np.nan)) / 1e6,
        "test_accuracy": summary["test_accuracy"],
        "simulated_seconds": rounds["simulated_seconds"].iloc[-1],
        "epsilon": summary["epsilon"],
        "noise_multiplier": summary["noise_multiplier"],
    }


def cells(found: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each cell; a time is given if all seeds reached the accuracy."""
    figures = ["seconds_to_target", "megabytes_to_target", "test_accuracy", "simulated_seconds", "noise_multiplier"]
    grouped = found.groupby([*CELL, "server_lr"], sort=False)
    means = grouped[figures].mean()
    reached = grouped["seconds_to_target"].count() == grouped["seconds_to_target"].size()
    means.loc[~reached, ["seconds_to_target", "megabytes_to_target"]] = np.nan
    means = means.reset_index().sort_values(["seconds_to_target", "test_accuracy"], ascending=[True, False])
    order = {name: number for number, name in enumerate(SCHEDULES.values())}
    best = means.groupby(CELL, sort=False).first().reset_index()
    return best.sort_values(CELL, key=lambda key: key.map(order) if key.name == "schedule" else key, ignore_index=True)


def markdown(best: pd.DataFrame, privacy: str) -> str:
    """Return seconds to the accuracy, and the final one, as one table: a row for each device setting and method."""
    part = best[best["privacy"] == privacy]
    names = list(SCHEDULES.values())
    lines = ["| speed spread | dropout | method | " + " | ".join(names) + " |", "|---" * (3 + len(names)) + "|"]
    for (spread, dropout, method), rows in part.groupby(["speed_spread", "dropout", "method"]):
        by = rows.set_index("schedule")
        texts = []
        for name in names:
            seconds, end = by.loc[name, "seconds_to_target"], by.loc[name, "test_accuracy"]
            texts.append(f"{'never' if pd.isna(seconds) else f'{seconds:.0f} s'} ({end:.3f})")
        lines.append(f"| {spread:g} | {dropout:g} | {method} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def draw(best: pd.DataFrame, found: pd.DataFrame) -> None:
    """Draw seconds to the accuracy over speed spread, with the range over seeds; crosses where seeds missed it."""
    figure = Figure(figsize=(10, 7.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    top = float(best["seconds_to_target"].max()) * 3.0
    for across, privacy in zip(panels, ("none", "epsilon 8"), strict=True):
        for panel, dropout in zip(across, (0.0, 0.3), strict=True):
            part = best[(best["privacy"] == privacy) & (best["dropout"] == dropout)]
            _draw_panel(panel, part, found, top)
            panel.set_title(f"privacy: {privacy}; {dropout:.0%} drop out", fontsize=10)
    for panel in panels[1]:
        panel.set_xlabel("speed spread (standard deviation of the logarithm)")
    for across in panels:
        across[0].set_ylabel(f"simulated seconds to accuracy {TARGET:g}")
    keys = [Line2D([], [], color=color, linewidth=3, label=name) for name, color in COLORS.items()]
    keys += [Line2D([], [], color="#444444", linestyle=style, marker="o", label=name) for name, style in STYLES.items()]
    keys.append(Line2D([], [], color="#444444", linestyle="", marker="x", label="not reached by all three seeds"))
    figure.legend(handles=keys, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle("Mean and range over three seeds; markers are moved sideways so that they do not hide each other")
    figure.savefig(HERE / "figure.png", dpi=150)


COLORS = dict(zip(SCHEDULES.values(), ("#332288", "#56B4E9", "#CC6677", "#117733"), strict=True))
STYLES = dict(zip(METHODS.values(), ("-", "--"), strict=True))


def _draw_panel(panel: Axes, part: pd.DataFrame, found: pd.DataFrame, top: float) -> None:
    lines = [(schedule, method) for schedule in COLORS for method in STYLES]
    for number, (schedule, method) in enumerate(lines):
        line = part[(part["schedule"] == schedule) & (part["method"] == method)].sort_values("speed_spread")
        times = line.merge(found, on=[*CELL, "server_lr"], suffixes=("", "_seed"))
        times = times.groupby("speed_spread")["seconds_to_target_seed"].agg(["min", "max"]).loc[line["speed_spread"]]
        x, y = line["speed_spread"].to_numpy() + 0.025 * (number - 3.5), line["seconds_to_target"].to_numpy()
        spread = np.clip(np.stack([y - times["min"].to_numpy(), times["max"].to_numpy() - y]), 0.0, None)
        look = {"color": COLORS[schedule], "linestyle": STYLES[method], "markersize": 4, "capsize": 2}
        panel.errorbar(x, y, np.where(np.isnan(y), np.nan, spread), marker="o", **look)
        panel.plot(x[np.isnan(y)], np.full(np.isnan(y).sum(), top), "x", color=COLORS[schedule])
    panel.axhline(top / 1.6, color="#bbbbbb", linewidth=0.8)
    panel.set_xticks(sorted(part["speed_spread"].unique()))
    panel.set_yscale("log")
    panel.set_ylim(top=1.5 * top)
    panel.grid(axis="y", alpha=0.3)


def main() -> None:
    """Run the missing trials and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=Path("runs/devices"))
    parser.add_argument("--draw", action="store_true")
    options = parser.parse_args()
    if options.draw:
        found = pd.read_csv(HERE / "trials.csv", keep_default_na=False, na_values=[""])
        draw(cells(found), found)
        return
    sweep = load_sweep(HERE.parents[1] / "sim_configs" / "sweeps" / "devices.toml")
    run_sweep(sweep, options.runs, jobs=options.jobs, resume=True)
    folders = sorted((options.runs / "trials").iterdir())
    found = pd.DataFrame([row(folder) for folder in folders if (folder / "summary.json").exists()])
    found = found.sort_values([*CELL, "server_lr", "seed"], ignore_index=True)
    found.to_csv(HERE / "trials.csv", index=False, float_format="%.5g")
    best = cells(found)
    best.to_csv(HERE / "times.csv", index=False, float_format="%.4g")
    for privacy in ("none", "epsilon 8"):
        fill(privacy, markdown(best, privacy), HERE / "README.md")
    draw(best, found)


if __name__ == "__main__":
    main()

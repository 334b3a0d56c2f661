"""Run one app under two adaptive clipping rules, from three first bounds, and plot the bounds.

    python results/adaptive-clipping/make.py [--draw]

The app (`app/`) is the same: 100 clients whose updates have lengths with median 1, everyone in each of 60 rounds, noise
multiplier 1, target quantile 0.5, learning rate 0.2, and a standard deviation of 5 on the count. One run clips with
Flower's mod and its strategy wrapper around FedAvg, the other with fedpriv's mod and strategy. `--draw` only draws
bounds.png again, from bounds.csv.
"""

import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import flwr
import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).parent
FIRSTS = (0.1, 1.0, 10.0)
RULES = {"flower": f"Flower {flwr.__version__}", "fedpriv": "fedpriv"}
CLIENTS = 100


def bounds_of(rule: str, first: float) -> list[float]:
    """Return the bound before each round, and after the last."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "bounds.csv"
        command = [sys.executable, "-m", "fedpriv.cli", "flower", str(HERE / "app"), "--clients", str(CLIENTS)]
        command += ["-c", f"first={first}", "-c", f'out="{out}"', "-c", f"clients={CLIENTS}"]
        done = subprocess.run(
            command, env={**os.environ, "QUANTILE_RULE": rule}, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
        with out.open(encoding="utf-8") as file:
            return [float(row["bound"]) for row in csv.DictReader(file)]


def median_length() -> float:
    """Return the median length of the clients' updates."""
    sys.path.insert(0, str(HERE / "app"))
    from quantile_app.client import update_of

    return float(np.median([np.linalg.norm(update_of(client)) for client in range(CLIENTS)]))


def recorded() -> dict[tuple[str, float], list[float]]:
    """Return the bounds in bounds.csv."""
    found: dict[tuple[str, float], list[float]] = {}
    rules = {name.split()[0]: rule for rule, name in RULES.items()}
    with (HERE / "bounds.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            found.setdefault((rules[row["rule"].split()[0]], float(row["first"])), []).append(float(row["bound"]))
    return found


def plot(found: dict[tuple[str, float], list[float]], median: float) -> None:
    """Write bounds.png."""
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    colors = {"flower": "#b2182b", "fedpriv": "#2166ac"}
    for (rule, first), bounds in found.items():
        axes.semilogy(bounds, color=colors[rule], lw=1.6, label=RULES[rule] if first == FIRSTS[0] else None)
    axes.axhline(median, color="0.4", lw=1.0, ls="--", label="target: the median length of updates")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    first = ", ".join(f"{value:g}" for value in FIRSTS)
    axes.set(xlabel="round", ylabel="clip norm", title=f"Clip norms that start at {first}: one run each")
    figure.legend(frameon=False, loc="outside lower center", ncols=3, fontsize=9)
    figure.savefig(HERE / "bounds.png", dpi=150)


def main() -> None:
    """Run all, and write bounds.csv and bounds.png."""
    median = median_length()
    if "--draw" in sys.argv[1:]:
        plot(recorded(), median)
        return
    found = {(rule, first): bounds_of(rule, first) for rule in RULES for first in FIRSTS}
    with (HERE / "bounds.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["rule", "first", "round", "bound"])
        for (rule, first), bounds in found.items():
            writer.writerows([RULES[rule], first, k, f"{bound:.5g}"] for k, bound in enumerate(bounds))
    plot(found, median)
    for (rule, first), bounds in found.items():
        print(f"{RULES[rule]} from {first:g}: {bounds[20]:.3g}, {bounds[40]:.3g}, {bounds[-1]:.3g}")
    print(f"median length: {median:.4g}")


if __name__ == "__main__":
    main()

"""Server momentum beside the methods of the paper's study, to see if feedback is still ahead.

    python results/paper-study/momentum.py [--data-root DIR] [--jobs 2] [--runs runs/paper-study]

Runs the missing trials of sim_configs/sweeps/paper-momentum.toml, and writes momentum-trials.csv (a row a trial),
momentum.csv (the best step of each method) and the table of README.md. All rows have the same three seeds, so that
differences are paired by seed. Every method has three steps without and three with momentum.
"""

import argparse
import json
import math
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t as student

from fedpriv.experiment.run_directory import flat_tables
from fedpriv.sweeps.config import load_sweep
from fedpriv.sweeps.run import run_sweep

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[0] / "benchmarks")]

from page import fill, table  # noqa: E402

ROOT = HERE.parents[1]
SWEEP = "paper-momentum"
NAMES = {
    "normalized-sgd": "normalized SGD (no memory)",
    "clip21": "Clip21",
    "dp-fedavg": "DP-FedAvg (no memory)",
    "centered-clip": "public memory (centered-clip)",
}
REFERENCE = ("DP-FedAvg (no memory)", "momentum")
CONFIDENCE = 0.95


def trials(runs: Path) -> pd.DataFrame:
    """Return a row for each finished trial."""
    folders = sorted((runs / SWEEP / "trials").iterdir())
    return pd.DataFrame([_row(folder) for folder in folders if (folder / "summary.json").exists()])


def _row(folder: Path) -> dict[str, Any]:
    config = flat_tables(tomllib.loads((folder / "config.toml").read_text()))
    summary = json.loads((folder / "summary.json").read_text())
    server = config["server.optimizer"]
    if server == "momentum" and config["server.momentum"] == 0.0:
        server = "plain"
    return {
        "noise": config["privacy.noise_multiplier"],
        "method": _name(config),
        "server": server,
        "server_lr": config["method.server_lr"],
        "seed": config["seed"],
        "test_accuracy": summary["test_accuracy"],
    }


def _name(config: dict[str, Any]) -> str:
    if config["method.name"] != "alpha-normec":
        return NAMES[config["method.name"]]
    return f"alpha-NormEC, {'SN' if config['method.server_normalization'] else 'without SN'}"


def best(found: pd.DataFrame) -> pd.DataFrame:
    """Return for each noise, method and server the step with the best mean, and its gain over the reference."""
    keys = ["noise", "method", "server"]
    means = found.groupby([*keys, "server_lr"])["test_accuracy"].agg(["mean", "std", "count"]).reset_index()
    rows = means.loc[means.groupby(keys)["mean"].idxmax()].reset_index(drop=True)
    for at, row in rows.iterrows():
        reference = rows[(rows["noise"] == row["noise"]) & (rows["method"] == REFERENCE[0])]
        reference = reference[reference["server"] == REFERENCE[1]].iloc[0]
        gains = _seeds(found, row) - _seeds(found, reference)
        quantile = student.ppf((1 + CONFIDENCE) / 2, len(gains) - 1)
        rows.loc[at, "gain"] = gains.mean()
        rows.loc[at, "half"] = quantile * gains.std(ddof=1) / math.sqrt(len(gains))
    return rows.sort_values(["noise", "mean"], ascending=[True, False])


def _seeds(found: pd.DataFrame, row: pd.Series) -> np.ndarray:
    keys = ["noise", "method", "server", "server_lr"]
    same = (found[keys] == row[keys]).all(axis=1)
    return found[same].sort_values("seed")["test_accuracy"].to_numpy()


def in_words(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the page."""
    return pd.DataFrame(
        {
            "noise multiplier": row["noise"],
            "method": row["method"],
            "server": row["server"],
            "server_lr": row["server_lr"],
            "test accuracy": f"{row['mean']:.3f} ± {row['std']:.3f}",
            "gain over clipping with momentum": f"{row['gain']:+.3f} ± {row['half']:.3f}",
        }
        for row in rows.to_dict("records")
    )


def main() -> None:
    """Run the missing trials and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, default=None)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=Path("runs/paper-study"))
    options = parser.parse_args()
    sweep = load_sweep(ROOT / "sim_configs" / "sweeps" / f"{SWEEP}.toml")
    run_sweep(sweep, options.runs / SWEEP, jobs=options.jobs, data_root=options.data_root, resume=True)
    found = trials(options.runs)
    found.to_csv(HERE / "momentum-trials.csv", index=False, float_format="%.5g")
    rows = best(found)
    rows.to_csv(HERE / "momentum.csv", index=False, float_format="%.4g")
    shown = in_words(rows)
    fill("momentum", table(list(shown.columns), shown.to_numpy().tolist()), HERE / "README.md")


if __name__ == "__main__":
    main()

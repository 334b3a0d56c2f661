"""Own data through the command line: choose settings from the tuning sweeps, and fill the tables of README.md.

    python results/own-data/make.py choose NAME --runs runs/own-data      # writes NAME-tune.csv and NAME-chosen.toml
    python results/own-data/make.py keep NAME --runs runs/own-data        # writes NAME-trials.csv
    python results/own-data/make.py tables                                # fills README.md from the CSV files
    python results/own-data/make.py baselines --data-root DATA            # prints the scores of constants

NAME is adult, hours or speakers. README.md has the order of all commands; `fedpriv sweep` does the training.
"""

import argparse
import json
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t as student

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[0] / "benchmarks"), str(HERE)]

from data import ALPHABET, IGNORED, speakers  # noqa: E402
from page import fill, table  # noqa: E402

NAMES = ("adult", "hours", "speakers")
METRIC = {"adult": "accuracy", "hours": "rmse", "speakers": "perplexity"}
OTHER = {"adult": "auroc", "hours": "mae", "speakers": "loss"}
DIGITS = {"adult": 3, "hours": 2, "speakers": 2}
SEEDS = (1, 2, 3)
PROMISES = {"none": "none", "example": "each record, epsilon 1", "client": "each client, epsilon 8"}
SETTINGS = ("clip_norm", "beta", "damping", "server_lr")


def sign(name: str) -> int:
    """1 if higher is better, otherwise -1."""
    return 1 if name == "adult" else -1


def cells(found: pd.DataFrame) -> pd.DataFrame:
    """Add the columns `promise`, `kind` and `server` of a sweep's table."""
    column = {key: found.get(key, pd.Series(np.nan, found.index)) for key in ("privacy.epsilon", "privacy.unit")}
    promise = np.where(column["privacy.epsilon"].isna(), "none", column["privacy.unit"].astype(object).fillna("client"))
    damped = found.get("method.damping", pd.Series(np.nan, found.index)).fillna(0.0) > 0
    memory = np.where(damped, "alpha-NormEC, damped", "alpha-NormEC")
    kind = np.where(found["method.name"] == "alpha-normec", memory, "averaging")
    momentum = found.get("server.momentum", pd.Series(np.nan, found.index)).fillna(0.0)
    adam = found.get("server.optimizer", pd.Series("", found.index)) == "adam"
    server = np.where(adam, "Adam", np.where(momentum > 0, "momentum 0.9", "plain"))
    return found.assign(promise=promise, kind=kind, server=server)


def choose(name: str, runs: Path) -> None:
    """Choose each cell's setting by validation examples, and write the sweep that runs it with several seeds."""
    folder = runs / f"{name}-tune"
    found = cells(pd.read_csv(folder / "trials.csv", dtype={"trial": str}))
    found.drop(columns=["reason", "not_covered"], errors="ignore").to_csv(
        HERE / f"{name}-tune.csv", index=False, float_format="%.5g"
    )
    score = f"validation_{METRIC[name]}"
    known = found[np.isfinite(found[score])]
    best = known.sort_values([score, "validation_loss"], ascending=[sign(name) < 0, True])
    if name == "speakers":  # damping is a setting there
        best = best.assign(kind=best["kind"].str.split(",").str[0])
    best = best.groupby(["promise", "kind", "server"], sort=True).head(1).sort_values(["promise", "kind", "server"])
    lines = []
    for trial in best["trial"]:
        tables = tomllib.loads((folder / "trials" / trial / "config.toml").read_text(encoding="utf-8"))
        values = (_inline(tables.get(key, "")) for key in ("privacy", "method", "server"))
        lines.append(f"  [{', '.join(values)}],")
    text = f"""# The settings that make.py chose from {name}-tune.toml by validation examples, with three seeds.
#   fedpriv sweep results/own-data/{name}-chosen.toml --out runs/own-data/{name}-chosen
name = "{name}-chosen"
base = "{name}.toml"
seeds = {list(SEEDS)}

[[axis]]
key = ["privacy", "method", "server"]
values = [
"""
    (HERE / f"{name}-chosen.toml").write_text(text + "\n".join(lines) + "\n]\n", encoding="utf-8")


def _inline(value: Any) -> str:
    """Return a value as TOML in one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_inline(inner)}" for key, inner in value.items()) + "}"
    return json.dumps(value)


def keep(name: str, runs: Path) -> None:
    """Write the table of the chosen trials beside this file."""
    found = cells(pd.read_csv(runs / f"{name}-chosen" / "trials.csv", dtype={"trial": str}))
    found = found[found["status"] == "done"]
    shown = found.drop(columns=["reason", "not_covered", "status"], errors="ignore")
    shown.to_csv(HERE / f"{name}-trials.csv", index=False, float_format="%.6g")


def interval(values: pd.Series, digits: int, plus: str = "") -> str:
    """Return the mean, and half the width of its 95 % interval by Student's t."""
    values = values.dropna()
    if len(values) < 2:
        return f"{values.mean():{plus}.{digits}f}" if len(values) else "-"
    half = student.ppf(0.975, len(values) - 1) * values.std() / np.sqrt(len(values))
    return f"{values.mean():{plus}.{digits}f} ± {half:.{digits}f}"


def results(name: str) -> str:
    """Return the chosen settings of one problem: their metric, and the paired difference to plain averaging."""
    found, digits = pd.read_csv(HERE / f"{name}-trials.csv"), DIGITS[name]
    rows = []
    for promise in PROMISES:
        under = found[found["promise"] == promise]
        if name == "speakers":
            under = under.assign(kind=under["kind"].str.split(",").str[0])
        plain = under[(under["kind"] == "averaging") & (under["server"] == "plain")].set_index("seed")
        part = []
        for (kind, server), own in under.groupby(["kind", "server"], sort=True):
            by_seed = own.set_index("seed")
            gain = by_seed[f"test_{METRIC[name]}"] - plain[f"test_{METRIC[name]}"]
            setting = _setting(own.iloc[0])
            scores = (interval(by_seed[f"test_{key}"], digits) for key in (METRIC[name], OTHER[name]))
            ahead = "" if (kind, server) == ("averaging", "plain") else interval(gain, digits, "+")
            main, other = scores
            part.append((PROMISES[promise], kind, server, main, ahead, other, setting, len(own)))
        rows += sorted(part, key=lambda row: -sign(name) * float(row[3].split()[0]))
    head = ("promise", "method", "server", f"test {METRIC[name]}", "against averaging", OTHER[name], "chosen", "seeds")
    return table(head, rows)


def _setting(row: pd.Series) -> str:
    keys = ["privacy.example_clip", *(f"method.{key}" for key in SETTINGS)]
    shown = {key.partition(".")[2]: row.get(key) for key in keys}
    return ", ".join(f"{key} {value:g}" for key, value in shown.items() if value is not None and value > 0)


def tables() -> None:
    """Fill README.md from the tables of trials."""
    for name in NAMES:
        fill(name, results(name), HERE / "README.md")


def baselines(data_root: Path) -> None:
    """Print the scores of constant predictions: the larger label, 40 hours, and the frequencies of characters."""
    rows = [line.rstrip(".\n").split(", ") for line in (data_root / "adult" / "adult.test").open(encoding="utf-8")]
    people = [row for row in rows if len(row) == 15 and "?" not in (row[1], row[6])]
    hours = np.array([float(row[12]) for row in people])
    print(f"adult: {len(people)} people, always <=50K: accuracy {np.mean([row[14] == '<=50K' for row in people]):.4f}")
    print(f"hours: always 40: rmse {np.sqrt(np.mean((hours - 40) ** 2)):.3f}, mae {np.abs(hours - 40).mean():.3f}")
    print(f"hours: always the mean of the test people, {hours.mean():.1f}: rmse {hours.std():.3f}")
    labels = np.asarray(speakers(data_root)["labels"])
    counts = np.bincount(labels[labels != IGNORED], minlength=len(ALPHABET)) + 1.0
    share = counts / counts.sum()
    print(f"speakers: frequencies of characters: perplexity {np.exp(-(share * np.log(share)).sum()):.2f}")


def main() -> None:
    """Do one step of the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("choose", "keep", "tables", "baselines"))
    parser.add_argument("name", nargs="?", choices=NAMES)
    parser.add_argument("--runs", type=Path, default=Path("runs/own-data"))
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    given = parser.parse_args()
    if given.step in ("choose", "keep"):
        if given.name is None:
            parser.error(f"{given.step} needs NAME: {', '.join(NAMES)}")
        {"choose": choose, "keep": keep}[given.step](given.name, given.runs)
    elif given.step == "tables":
        tables()
    else:
        baselines(given.data_root)


if __name__ == "__main__":
    main()

"""Record-level privacy between hospitals: the trials of heart.toml and adult.toml, each silo alone, and pooled data.

    python results/hospitals/make.py [--data-root DIR] [--seconds 3600] [--tables]

Runs the trials that trials.csv lacks, for at most so many seconds, and appends a row for each. Then, or at once with
`--tables`, it fills the tables of README.md and draws figure.png. Each trial's model is scored on validation and test
rows of every client. `fedpriv sweep` cannot train one client alone, or all data as one client, on the same rows.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.stats import rankdata
from scipy.stats import t as student

from fedpriv.data.federation import Federation
from fedpriv.data.natural_files import HOSPITALS
from fedpriv.engines.loop import LoopEngine
from fedpriv.experiment.build import assemble, make_federation
from fedpriv.experiment.config import Config, load_config
from fedpriv.rounds import begin_round, finish_round
from fedpriv.sweeps.config import load_sweep

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[0] / "benchmarks")]

from data import OCCUPATIONS  # noqa: E402
from page import fill, table  # noqa: E402

TRIALS = HERE / "trials.csv"
KEYS = ["data", "holders", "method", "epsilon", "setting", "seed"]
TOGETHER, POOLED = "together", "pooled"
SEEDS = (1, 2, 3, 4, 5)
REFERENCE = "dp-gd, one divisor"
NAMES = {
    "dp-gd": "dp-gd",
    "dp-scaffold": "DP-SCAFFOLD",
    "diff2": "DIFF2",
    "dice-sgd": "DiceSGD",
    "alpha-normec": "alpha-NormEC",
    "clip21": "Clip21",
}
TUNABLE = {
    "dp-gd": ("server_lr",),
    "dp-scaffold": ("server_lr",),
    "diff2": ("period", "server_lr"),
    "dice-sgd": ("clip_norm", "feedback_clip", "server_lr"),
    "alpha-normec": ("beta", "server_lr"),
    "clip21": ("clip_norm", "server_lr"),
}
UNSEEN = {"heart": (), "adult": (1,)}
TUNED = {"heart": (1, 2, 3), "adult": (1,)}
ROUNDS = {"heart": 60, "adult": 30}
ORDER = (("heart", (1, 2, 3)), ("heart", (4, 5)), ("adult", (1,)), ("adult", (2, 3, 4, 5)))
STEPS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


class Trial(NamedTuple):
    """A config, the method's name in tables, its settings, and the clients that provide the data."""

    data: str
    holders: str
    method: str
    epsilon: float
    setting: str
    config: Config

    @property
    def key(self) -> tuple[object, ...]:
        """The columns that identify it in trials.csv."""
        return (self.data, self.holders, self.method, self.epsilon, self.setting, self.config.seed)


@cache
def trials(data: str) -> tuple[Trial, ...]:
    """Return all trials on one data set: of the sweep, of single clients and pooled data, and without privacy."""
    return tuple(_trials(data))


def _trials(data: str) -> Iterator[Trial]:
    for trial in load_sweep(HERE / f"{data}.toml").trials():
        name, setting = _named(trial.tables)
        epsilon = trial.config.privacy.epsilon
        for holders in (TOGETHER, *((POOLED, *alone(data)) if name == "dp-gd, each its own m" else ())):
            yield Trial(data, holders, name, epsilon, setting, trial.config)
    for seed in SEEDS:
        for step in STEPS:
            changes = [f"seed={seed}", f"data.split={seed}", f"method.server_lr={step}", "privacy="]
            changes += [f'data.name="{HERE}/data.py:{data}"', f"training.rounds={ROUNDS[data]}"]
            config = load_config(HERE / "base.toml", changes)
            for holders in (TOGETHER, POOLED, *alone(data)):
                yield Trial(data, holders, "gradient descent", 0.0, json.dumps({"server_lr": step}), config)


def alone(data: str) -> tuple[str, ...]:
    """Return the clients that also train alone: all that have validation and test rows."""
    count = {"heart": len(HOSPITALS), "adult": len(OCCUPATIONS)}[data]
    return tuple(str(client) for client in range(count) if client not in UNSEEN[data])


def _named(tables: dict[str, Any]) -> tuple[str, str]:
    method, local, privacy = tables["method"], tables["local"], tables["privacy"]
    kind, momentum = method["name"], bool(tables["server"]["momentum"])
    name = NAMES[kind]
    if kind == "alpha-normec":
        name += ", server normalization" if method["server_normalization"] else ""
        name += ", damped" if method.get("damping") else ""
    elif kind == "dp-gd" and local["work"] == "dp-sgd":
        name = "local DP-SGD"
    name += " with momentum" if momentum else ""
    if privacy.get("examples"):
        name += ", one divisor"
    elif name == "dp-gd":
        name += ", each its own m"
    keys = {"example_clip": privacy, "client_lr": local, **dict.fromkeys(TUNABLE[kind], method)}
    if kind in ("alpha-normec", "clip21"):
        del keys["example_clip"]
    if local["work"] == "dp-sgd" and kind == "dp-gd":
        del keys["server_lr"]
    return name, json.dumps({key: table[key] for key, table in keys.items() if key in table})


def held(federation: Federation, holders: str) -> Federation:
    """Return the federation, or one client with its rows alone or with all rows, on the same dataset."""
    if holders == TOGETHER:
        return federation
    rows = federation.rows if holders == POOLED else federation.rows_of(int(holders))
    return replace(federation, rows=np.sort(rows), offsets=np.array([0, len(rows)]))


def run(trial: Trial, federation: Federation, data_root: Path | None) -> dict[str, Any]:
    """Train, and score on every client's validation and test rows."""
    experiment = assemble(trial.config, federation=held(federation, trial.holders), data_root=data_root)
    server, engine = experiment.server, LoopEngine(experiment.population)
    state = server.init(experiment.initial_model)
    for number in range(1, trial.config.training.rounds + 1):
        state = finish_round(server, state, number, engine.sum_messages(begin_round(server, state, number)).sum)
    data, task, row = federation.dataset, experiment.population.task, dict(zip(KEYS, trial.key, strict=True))
    for part, owners in (("validation", data.validated), ("test", data.tested)):
        inputs, labels = getattr(data, f"{part}_inputs"), getattr(data, f"{part}_labels")
        logits = task.logits(state.model, inputs).detach()
        right = (logits.argmax(1) == labels).numpy()
        row[f"{part}_loss"] = float(task.losses(logits, labels).mean())
        row[f"{part}_auc"] = _auc((logits[:, 1] - logits[:, 0]).numpy(), labels.numpy())
        row[f"{part}_accuracy"] = float(right.mean())
        rows = [owners.owners == client for client in range(owners.clients)]
        each = [right[own].mean() for own in rows if own.any()]
        row[f"{part}_each"] = json.dumps([round(float(share), 4) for share in each])
        row[f"{part}_worst"] = float(min(each))
    return row


def _auc(scores: np.ndarray, labels: np.ndarray) -> float:
    ranks, positive = rankdata(scores), labels == 1
    count = positive.sum()
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * (len(labels) - count)))


def run_missing(data_root: Path | None, seconds: float) -> bool:
    """Run trials that trials.csv lacks until the time is over; return True if none is left."""
    end, done = time.monotonic() + seconds, set()
    if TRIALS.exists():
        done = set(pd.read_csv(TRIALS, dtype={"holders": str})[KEYS].itertuples(index=False, name=None))
    for last, (data, seeds) in product((False, True), ORDER):
        shared: dict[int, Federation] = {}
        picked = None if set(seeds) <= set(TUNED[data]) else _picked(data)
        for trial in sorted(trials(data), key=lambda trial: trial.config.seed):
            if trial.key in done or trial.config.seed not in seeds or (picked and trial.key[:5] not in picked):
                continue
            if last != (data == "adult" and trial.holders.isdigit()):  # single occupations
                continue
            if time.monotonic() > end:
                return False
            seed = trial.config.seed
            if seed not in shared:
                shared = {seed: make_federation(trial.config, data_root)}
            row = pd.DataFrame([run(trial, shared[seed], data_root)])
            done.add(trial.key)
            row.to_csv(TRIALS, mode="a", header=not TRIALS.exists(), index=False, float_format="%.5g")
    return True


def _picked(data: str) -> set[tuple[object, ...]]:
    """Return the settings that are judged on splits on which nothing is tuned."""
    best = chosen(pd.read_csv(TRIALS, dtype={"holders": str}))
    return set(best[best["data"] == data][KEYS[:5]].itertuples(index=False, name=None))


def chosen(found: pd.DataFrame) -> pd.DataFrame:
    """Return the trials of the setting that each method, epsilon and holder of data prefers on validation rows.

    A client alone chooses by its own rows. Settings that lack a split of those that are tuned on are left out.
    """
    own = [
        json.loads(each)[alone(data).index(who)] if who.isdigit() else mean for data, each, who, mean in _judged(found)
    ]
    found, everything = found.assign(judged=own), found
    found = found[[seed in TUNED[data] for data, seed in zip(found["data"], found["seed"], strict=True)]]
    keys = ["data", "holders", "method", "epsilon"]
    grouped = found.groupby([*keys, "setting"], sort=False)
    mean = grouped[["judged", "validation_loss"]].mean().join(grouped.size().rename("splits")).reset_index()
    mean = mean[mean["splits"] == mean.groupby(keys)["splits"].transform("max")]
    best = mean.sort_values(["judged", "validation_loss"], ascending=[False, True]).groupby(keys, sort=False).head(1)
    return everything.merge(best[[*keys, "setting"]], on=[*keys, "setting"])


def _judged(found: pd.DataFrame) -> Iterator[tuple[str, str, str, float]]:
    return zip(found["data"], found["validation_each"], found["holders"], found["validation_accuracy"], strict=True)


def interval(values: pd.Series, digits: int = 3, sign: str = "") -> str:
    """Return the mean, and half the width of its 95 % interval by Student's t."""
    if len(values) < 2:
        return f"{values.mean():{sign}.{digits}f}"
    half = student.ppf(0.975, len(values) - 1) * values.std() / np.sqrt(len(values))
    return f"{values.mean():{sign}.{digits}f} ± {half:.{digits}f}"


def methods_table(best: pd.DataFrame, data: str) -> str:
    """Methods on the clients together and on pooled data: accuracy, and the paired differences to three references."""
    rows = []
    part = best[best["data"] == data]
    for epsilon in (0.0, 3.0, 1.0):
        under = part[part["epsilon"] == epsilon]
        plain = under[under["method"] == (REFERENCE if epsilon else "gradient descent")]
        reference = plain[plain["holders"] == TOGETHER].set_index("seed")["test_accuracy"]
        pooled = under[under["holders"] == POOLED].set_index("seed")["test_accuracy"]
        silos = _alone(under, data)
        both = under[under["holders"].isin([TOGETHER, POOLED])]
        for (holders, method), found in both.groupby(["holders", "method"], sort=False):
            own = found.set_index("seed")["test_accuracy"]
            name = f"{method.split(',')[0]} on pooled data" if holders == POOLED else method
            setting = ", ".join(f"{key} {value:g}" for key, value in json.loads(found["setting"].iloc[0]).items())
            row = (f"{epsilon:g}" if epsilon else "none", name, interval(own))
            row += (_gain(own, reference), _gain(_mean_client(found), silos), _gain(own, pooled))
            rows.append((*row, interval(found["test_auc"]), interval(found["test_worst"], 2), setting))
    rows.sort(key=lambda row: (["none", "3", "1"].index(row[0]), -float(row[2].split()[0])))
    head = ("epsilon", "method", "test accuracy", "against dp-gd", "against alone", "against pooled", "AUC")
    return table((*head, "worst client", "chosen"), rows)


def _gain(own: pd.Series, reference: pd.Series) -> str:
    gain = (own - reference).dropna()
    same = own.index.equals(reference.index) and bool((gain == 0).all())
    return "" if same or gain.empty else interval(gain, sign="+")


def _alone(under: pd.DataFrame, data: str) -> pd.Series:
    """Return the mean over clients of the accuracy of each client's own model on its own test rows."""
    each = [_of_client(under[under["holders"] == who], place) for place, who in enumerate(alone(data))]
    return pd.concat(each, axis=1, join="inner").astype(float).mean(axis=1)


def _mean_client(found: pd.DataFrame) -> pd.Series:
    return found.set_index("seed")["test_each"].map(lambda each: float(np.mean(json.loads(each))))


def hospitals_table(best: pd.DataFrame) -> str:
    """Return scores on each hospital's own test patients, by models trained alone, together and on pooled data."""
    rows = []
    part = best[best["data"] == "heart"]
    for epsilon in (0.0, 3.0, 1.0):
        under = part[part["epsilon"] == epsilon]
        for number, name in enumerate([*HOSPITALS, "mean of the four"]):
            clients = range(len(HOSPITALS)) if number == len(HOSPITALS) else (number,)
            shares = {
                "alone": [_of_client(under[under["holders"] == str(client)], client) for client in clients],
                "together": [_of_client(_together(under, epsilon), client) for client in clients],
                "pooled": [_of_client(under[under["holders"] == POOLED], client) for client in clients],
            }
            means = {who: sum(each) / len(each) for who, each in shares.items()}
            gain = (means["together"] - means["alone"]).dropna()
            cells = [interval(means[who], 2) for who in ("alone", "together", "pooled")]
            rows.append((f"{epsilon:g}" if epsilon else "none", name, *cells, interval(gain, 2, "+")))
    return table(("epsilon", "hospital", "alone", "together", "pooled", "together - alone"), rows)


def _together(under: pd.DataFrame, epsilon: float) -> pd.DataFrame:
    name = "dp-gd, one divisor" if epsilon else "gradient descent"
    return under[(under["holders"] == TOGETHER) & (under["method"] == name)]


def _of_client(found: pd.DataFrame, client: int) -> pd.Series:
    return found.set_index("seed")["test_each"].map(lambda each: json.loads(each)[client])


def draw(best: pd.DataFrame, path: Path) -> None:
    """Draw the test accuracy of all methods on heart disease, with intervals."""
    part = best[(best["data"] == "heart") & best["holders"].isin([TOGETHER, POOLED])]
    free = part[(part["method"] == "gradient descent") & (part["holders"] == TOGETHER)]["test_accuracy"]
    part = part[part["epsilon"] > 0]
    names = part["method"].where(part["holders"] == TOGETHER, "dp-gd on pooled data")
    order = part.assign(name=names).groupby("name")["test_accuracy"].mean().sort_values().index
    figure = Figure(figsize=(8.4, 1.4 + 0.24 * len(order)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for shift, color, epsilon in ((0.12, "#332288", 3.0), (-0.12, "#CC6677", 1.0)):
        for place, name in enumerate(order):
            values = part[(names == name) & (part["epsilon"] == epsilon)]["test_accuracy"]
            spread = half_width(values)
            label = f"epsilon {epsilon:g} for a record" if place == 0 else None
            axes.errorbar(values.mean(), place + shift, xerr=spread, fmt="o", color=color, capsize=3, label=label)
    ends = free.mean() - half_width(free), free.mean() + half_width(free)
    axes.axvspan(*ends, color="#117733", alpha=0.12, linewidth=0)
    axes.axvline(free.mean(), color="#117733", linestyle="--", linewidth=1, label="without privacy")
    axes.axvline(0.553, color="#888888", linestyle=":", linewidth=1, label="always the larger label")
    axes.set_yticks(range(len(order)), order)
    counts = sorted(part.groupby([names, "epsilon"]).size().unique())
    axes.set_xlabel("test accuracy on heart disease")
    axes.set_title(f"Mean and 95 % interval over {' or '.join(map(str, counts))} splits of the records", fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    figure.legend(fontsize=9, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=130)


def half_width(values: pd.Series) -> float:
    """Return half of the 95 % interval of a mean over splits."""
    return float(student.ppf(0.975, max(len(values) - 1, 1)) * values.std() / np.sqrt(max(len(values), 1)))


def write_tables() -> None:
    """Fill README.md from trials.csv, and write chosen.csv and figure.png."""
    best = chosen(pd.read_csv(TRIALS, dtype={"holders": str}))
    best.to_csv(HERE / "chosen.csv", index=False)
    page = HERE / "README.md"
    for data in TUNED:
        fill(data, methods_table(best, data), page)
    fill("hospitals", hospitals_table(best), page)
    draw(best, HERE / "figure.png")


def main() -> None:
    """Run the missing trials, then write tables and figure.png."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", type=Path, default=None)
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--tables", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if not given.tables and not run_missing(given.data_root, given.seconds):
        print("Trials are left: run it again.")
    write_tables()


if __name__ == "__main__":
    main()

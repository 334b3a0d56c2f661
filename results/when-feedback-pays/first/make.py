"""When does error feedback pay under privacy? A map over population, heterogeneity and epsilon, on MNIST.

    python results/when-feedback-pays/first/make.py [--data-root DIR] [--jobs 2] [--runs runs/when-feedback-pays]

Every cell of the map is a population (10 to 10,000 clients that share 20,000 images), a spread of labels (alike, or
two shards a client) and a client-level epsilon for released models (none, 8; 2 in one cell; delta 1e-5).
In every cell three families of methods are tuned with as many settings each (8 or 10): without memory (clipping and
smoothed normalization), the published feedback (alpha-NormEC), and damped feedback (ours). The best of each, by
validation images, is then trained with two other seeds and judged on test images. In one cell, of 1,000 clients, the
clients add the noise (trust local), and sent memory joins.

Trials are run directories of two sweeps (tuning, then judging), which resume. Writes tuned.csv,
judged.csv, map.csv and map.png here, and the page's table.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fedpriv.data.datasets import Mnist
from fedpriv.experiment.results import load_model
from fedpriv.sweeps.config import Axis, Sweep
from fedpriv.sweeps.run import run_sweep

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1] / "benchmarks")]

from page import fill  # noqa: E402
from page import table as markdown  # noqa: E402

POPULATIONS = (10, 100, 1000, 10_000)
SPREADS: dict[str, dict[str, Any]] = {"alike": {"partition": "iid"}, "two shards": {"partition": "shards"}}
PRIVACY: dict[str, dict[str, Any]] = {
    "none": {"trust": "central", "noise_multiplier": 0.0},
    "central, 8": {"trust": "central", "epsilon": 8.0, "delta": 1e-5},
    "central, 2": {"trust": "central", "epsilon": 2.0, "delta": 1e-5},
}
LOCAL: dict[str, dict[str, Any]] = {"local, 8": {"trust": "local", "epsilon": 8.0, "delta": 1e-5}}
SEEDS = (1, 2)
BASE: dict[str, Any] = {
    "name": "when-feedback-pays",
    "seed": 0,
    "data": {"name": "mnist", "train_examples": 20_000},
    "model": {"name": "softmax"},
    "local": {"work": "full-gradient"},
    "cohort": {"sampling": "everyone"},
    "training": {"rounds": 60, "evaluate_every": 60},
}


def families(trust: str, steps: tuple[float, ...]) -> dict[str, list[dict[str, Any]]]:
    """Return as many settings of each family. A step is the longest move of the model by one round."""
    plain: dict[str, Any] = {"name": "alpha-normec", "server_normalization": False}
    without = [{"name": "dp-fedavg", "clip_norm": 1.0}, {"name": "normalized-sgd", "alpha": 1.0}]
    published = [{**plain, "alpha": 1.0, "beta": beta} for beta in (0.1, 1.0)]
    cured = [{**plain, "alpha": 1.0, "beta": beta, "damping": 0.1} for beta in (0.3, 1.0)]
    found = {"without memory": without, "published feedback": published, "damped feedback": cured}
    if trust == "local":
        found["sent feedback"] = [{**plain, "alpha": 1.0, "beta": beta, "memory": "sent"} for beta in (0.1, 1.0)]
    return {name: [{**method, "server_lr": s} for method in methods for s in steps] for name, methods in found.items()}


def steps(population: int, privacy: str) -> tuple[float, ...]:
    """Return the steps to try in a cell: longer ones if many messages cancel, shorter ones under much noise."""
    if population == 10_000:
        return (0.1, 0.3, 1.0, 3.0) if privacy == "none" else (0.1, 0.3, 1.0, 3.0, 10.0)
    shortest = (0.01,) if population <= 100 and privacy != "none" else ()
    return (*shortest, 0.03, 0.1, 0.3, 1.0)


def cells() -> list[tuple[int, str, str]]:
    """Population, spread and privacy of every cell."""
    central = [(n, spread, name) for name in ("none", "central, 8") for spread in SPREADS for n in POPULATIONS]
    central.remove((10_000, "alike", "central, 8"))
    return central + [(1000, "two shards", name) for name in ("central, 2", *LOCAL)]


def changes(cell: tuple[int, str, str], method: dict[str, Any], seed: int) -> dict[str, Any]:
    """Return a trial's changes of BASE."""
    population, spread, privacy = cell
    data = {**BASE["data"], "clients": population, **SPREADS[spread]}
    return {"data": data, "privacy": {**PRIVACY, **LOCAL}[privacy], "method": method, "seed": seed}


def run(name: str, trials: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Path]:
    """Run the missing trials; return each one's run directory, by its changes as JSON."""
    keys = tuple(trials[0])
    axis = Axis(key=keys, values=tuple([trial[key] for key in keys] for trial in trials))
    sweep = Sweep(name=name, base=BASE, axes=(axis,))
    out = options.runs / name
    run_sweep(sweep, out, jobs=options.jobs, data_root=options.data_root, resume=True, retry=True, watch=print_state)
    return {json.dumps(trial.changes, sort_keys=True): out / "trials" / trial.name for trial in sweep.trials()}


def print_state(state: Any) -> None:
    """Print one line whenever another ten trials have ended."""
    ended = state.done + state.failed
    if ended % 10 == 0 and ended != getattr(print_state, "last", None):
        print_state.last = ended  # pyright: ignore[reportFunctionMemberAccess]
        print(f"{ended} of {state.total}, {state.failed} failed", flush=True)


class Judge:
    """Accuracy on the odd (validation) and on the even-numbered (test) images of MNIST's test set."""

    def __init__(self, data_root: Path | None) -> None:
        dataset = Mnist(train_examples=1).load(data_root)
        self.inputs, self.labels = dataset.test_inputs.flatten(1), dataset.test_labels

    def __call__(self, folder: Path) -> dict[str, float]:
        """Return both accuracies of the model of a run."""
        weight, bias = load_model(folder).values()
        right = ((self.inputs @ weight.T + bias).argmax(dim=1) == self.labels).double()
        summary = json.loads((folder / "summary.json").read_text())
        return {
            "validation": right[1::2].mean().item(),
            "test": right[::2].mean().item(),
            "seconds": summary["seconds"],
        }


def table(
    trials: list[dict[str, Any]], found: dict[str, Path], judge: Judge, labels: list[dict[str, Any]]
) -> pd.DataFrame:
    """Return a row for each trial."""
    rows = []
    for trial, label in zip(trials, labels, strict=True):
        folder = found[json.dumps(trial, sort_keys=True)]
        method = json.dumps(trial["method"], sort_keys=True)
        rows.append({**label, "method": method, "seed": trial["seed"], **judge(folder)})
    return pd.DataFrame(rows)


def main() -> None:
    """Tune, judge, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, default=None)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=Path("runs/when-feedback-pays"))
    options = parser.parse_args()
    judge = Judge(options.data_root)
    trials, labels = [], []
    for cell in cells():
        for family, methods in families(cell[2].split(",")[0], steps(cell[0], cell[2])).items():
            trials += [changes(cell, method, 0) for method in methods]
            label = dict(zip(("population", "spread", "privacy"), cell, strict=True))
            labels += [{**label, "family": family}] * len(methods)
    tuned = table(trials, run("tuning", trials, options), judge, labels)
    tuned.to_csv(HERE / "tuned.csv", index=False, float_format="%.4g")
    best = tuned.loc[tuned.groupby(["population", "spread", "privacy", "family"], sort=False)["validation"].idxmax()]
    trials, labels = [], []
    for row in best.to_dict("records"):
        cell = (row["population"], row["spread"], row["privacy"])
        trials += [changes(cell, json.loads(row["method"]), seed) for seed in SEEDS]
        labels += [{key: row[key] for key in ("population", "spread", "privacy", "family")}] * len(SEEDS)
    judged = table(trials, run("judging", trials, options), judge, labels)
    judged.to_csv(HERE / "judged.csv", index=False, float_format="%.4g")
    drawn = map_of(judged)
    drawn.to_csv(HERE / "map.csv", index=False, float_format="%.4g")
    draw(drawn)
    fill("map", page_table(drawn), HERE / "README.md")


KEYS = ["privacy", "spread", "population"]


def map_of(judged: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each cell: mean test accuracy of each family, and the gain of feedback, best and damped."""
    means = judged.groupby([*KEYS, "family"], sort=False)["test"].agg(["mean", "std"]).unstack()
    found = means["mean"].copy()
    with_memory = [name for name in found if name.endswith("feedback")]
    without = found["without memory"]
    found["gain, published"] = found["published feedback"] - without
    found["gain, best"] = found[with_memory].max(axis=1) - without
    found["best feedback"] = found[with_memory].idxmax(axis=1)
    found["largest std"] = means["std"].max(axis=1)
    return found.reset_index()


def page_table(drawn: pd.DataFrame) -> str:
    """Return the map as Markdown."""
    families = ["without memory", "published feedback", "damped feedback", "sent feedback"]
    head = ["privacy", "labels", "clients", *families, "gain, published", "gain, best"]
    rows = []
    for row in drawn.to_dict("records"):
        means = ["" if pd.isna(row[name]) else f"{row[name]:.3f}" for name in families]
        gains = [f"{row[name]:+.3f}" for name in ("gain, published", "gain, best")]
        rows.append([row["privacy"], row["spread"], f"{row['population']:,}", *means, *gains])
    return markdown(head, rows)


def draw(drawn: pd.DataFrame) -> None:
    """Gain of the published feedback (left) and of the best one (right) over population."""
    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    colours = {"none": "#117733", "central, 8": "#332288", "central, 2": "#CC6677", "local, 8": "#999933"}
    for panel, column in zip(panels, ("gain, published", "gain, best"), strict=True):
        panel.axhline(0.0, color="black", linewidth=0.8)
        for (privacy, spread), part in drawn.groupby(["privacy", "spread"], sort=False):
            line = {"linestyle": "-" if spread == "two shards" else "--", "color": colours[str(privacy)]}
            panel.plot(part["population"], part[column], marker="o", label=f"{privacy}, {spread}", **line)
        title = "published feedback" if column == "gain, published" else "best feedback, cures included"
        panel.set(xscale="log", xlabel="clients", title=title)
    panels[0].set_ylabel("test accuracy gained over no memory")
    panels[1].legend(fontsize=7, handlelength=4, title="epsilon, labels", title_fontsize=7)
    figure.savefig(HERE / "map.png", dpi=150)


if __name__ == "__main__":
    main()

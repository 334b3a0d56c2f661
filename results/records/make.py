"""The setting of the alpha-NormEC paper at record level: CIFAR-10, ten clients, four methods, epsilon 8 and 1.

    python results/records/make.py [--data-root DIR] [--seconds 2700] [--work DIR] [--tables]

Runs the trials that are missing, for at most so many seconds, cell by cell: first all settings on seed 1, then the
chosen setting on the other seeds. Each finished trial is a JSON file in the work folder. Then, or at once with
`--tables`, it writes trials.csv, fills the tables of README.md and draws figure.png. Rows of trials.csv also count as
finished, so that a fresh checkout runs only what is missing. `CELLS` and `METHODS` list everything.
"""

import argparse
import json
import re
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

from fedpriv.data.federation import Federation
from fedpriv.engines.loop import LoopEngine
from fedpriv.experiment.build import assemble, make_federation
from fedpriv.experiment.config import Config, load_config
from fedpriv.rounds import begin_round, finish_round

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[0] / "benchmarks")]

from page import fill, table  # noqa: E402

TRIALS, WORK = HERE / "trials.csv", Path("runs/records")
SEEDS = (1, 2, 3)
TUNED_ON = 1
KEYS = ["cell", "method", "setting", "seed"]
NONE = "without privacy"
CELLS = {
    "central, epsilon 8": ("privacy.epsilon=8.0", 'privacy.trust="central"'),
    "local, epsilon 8": ("privacy.epsilon=8.0", 'privacy.trust="local"'),
    "no noise": ("privacy.epsilon=", "privacy.noise_multiplier=0.0"),
    NONE: ("privacy=",),
    "central, epsilon 1": ("privacy.epsilon=1.0", 'privacy.trust="central"'),
    "local, epsilon 1": ("privacy.epsilon=1.0", 'privacy.trust="local"'),
}
COLUMNS = ("no noise", "central, epsilon 8", "local, epsilon 8", "central, epsilon 1", "local, epsilon 1")
STEPS = (0.3, 1.5, 7.5)
# The table [method], and the three steps of the server. With momentum 0.9, they are a tenth as long.
METHODS: dict[str, tuple[dict[str, object], tuple[float, ...]]] = {
    "dp-gd": ({"name": "dp-gd", "max_norm": 100.0}, STEPS),
    "normalized SGD": ({"name": "normalized-sgd", "alpha": 1.0}, STEPS),
    "Clip21": ({"name": "clip21", "clip_norm": 0.3}, STEPS),
    "alpha-NormEC": (
        {"name": "alpha-normec", "alpha": 1.0, "beta": 0.3, "server_normalization": True},
        (0.06, 0.3, 1.5),
    ),
    "alpha-NormEC, plain step": (
        {"name": "alpha-normec", "alpha": 1.0, "beta": 0.3, "server_normalization": False},
        STEPS,
    ),
}
DESCENT, AVERAGING = "gradient descent", "federated averaging"
MOMENTUM = " with momentum"
NO_MOMENTUM = (AVERAGING, "alpha-NormEC, plain step")


class Trial(NamedTuple):
    """One run: the cell and the method of the tables, the length of its steps, and the settings of its config."""

    cell: str
    method: str
    setting: float
    seed: int
    settings: tuple[str, ...]

    @property
    def key(self) -> tuple[object, ...]:
        """The columns that identify it in trials.csv."""
        return self[:4]

    @property
    def file(self) -> str:
        """Its name in the work folder."""
        return re.sub("[^A-Za-z0-9.]+", "-", f"{self.cell} {self.method} {self.setting:g} {self.seed}")


def trials(cell: str, seed: int) -> Iterator[Trial]:
    """Return the trials of one cell on one seed."""
    common = (f"seed={seed}", f'data.name="{HERE}/data.py:small_cifar10"', f'model.name="{HERE}/model.py:SmallCnn"')
    for name, momentum in ((name, momentum) for name in methods(cell) for momentum in (0.0, 0.9)):
        if name in NO_MOMENTUM and momentum:
            continue
        options, steps = METHODS["dp-gd"] if cell == NONE else METHODS[name]
        steps = (0.03, 0.1, 0.3) if name == AVERAGING else (0.1, 0.3, 1.0) if cell == NONE else steps
        for step in (round(step * (0.1 if momentum else 1.0), 6) for step in steps):
            settings = [*common, *CELLS[cell], f"server.momentum={momentum}", "method="]
            settings += [f"method.{key}={json.dumps(value)}" for key, value in options.items()]
            settings.append(f"method.server_lr={1.0 if name == AVERAGING else step}")
            if name == AVERAGING:
                work = {"work": "local-epochs", "epochs": 1, "batch_size": 20, "client_lr": step}
                settings += ["local=", *(f"local.{key}={json.dumps(value)}" for key, value in work.items())]
            yield Trial(cell, name + (MOMENTUM if momentum else ""), step, seed, tuple(settings))


def methods(cell: str) -> tuple[str, ...]:
    """Return the methods of a cell, without momentum."""
    return (DESCENT, AVERAGING) if cell == NONE else tuple(METHODS)


def variants() -> list[str]:
    """Return the methods with privacy, with and without momentum."""
    every = [name + suffix for name in METHODS for suffix in ("", MOMENTUM)]
    return [name for name in every if name.removesuffix(MOMENTUM) not in NO_MOMENTUM or MOMENTUM not in name]


def run(trial: Trial, config: Config, federation: Federation, data_root: Path | None) -> dict[str, Any]:
    """Train, and score on validation and test images."""
    start = time.process_time()
    experiment = assemble(config, federation=federation, data_root=data_root)
    server, engine = experiment.server, LoopEngine(experiment.population)
    state = server.init(experiment.initial_model)
    for number in range(1, config.training.rounds + 1):
        state = finish_round(server, state, number, engine.sum_messages(begin_round(server, state, number)).sum)
    data, task = federation.dataset, experiment.population.task
    row: dict[str, Any] = dict(zip(KEYS, trial.key, strict=True))
    for part in ("validation", "test"):
        inputs, labels = getattr(data, f"{part}_inputs"), getattr(data, f"{part}_labels")
        logits = task.logits(state.model, inputs).detach()
        row[f"{part}_loss"] = float(torch.nan_to_num(task.losses(logits, labels).mean(), nan=1e9, posinf=1e9))
        row[f"{part}_accuracy"] = float((logits.argmax(1) == labels).float().mean())
    return {**row, "cpu_seconds": time.process_time() - start}


def finished(work: Path) -> pd.DataFrame:
    """Return all finished trials: rows of trials.csv, and the files of the work folder."""
    found = pd.read_csv(TRIALS).to_dict("records") if TRIALS.exists() else []
    found += [json.loads(path.read_text()) for path in sorted(work.glob("*.json"))]
    if not found:
        return pd.DataFrame(columns=[*KEYS, "validation_accuracy", "validation_loss", "test_accuracy"])
    return pd.DataFrame(found).drop_duplicates(KEYS, keep="last").reset_index(drop=True)


def run_missing(data_root: Path | None, seconds: float, work: Path) -> bool:
    """Run missing trials until the time is over; return True if none is left."""
    end = time.monotonic() + seconds
    work.mkdir(parents=True, exist_ok=True)
    done = {tuple(row) for row in finished(work)[KEYS].itertuples(index=False)}
    federations: dict[int, Federation] = {}
    for cell in CELLS:
        for seed in SEEDS:
            best = chosen(finished(work))
            picked = set(best[best["cell"] == cell][KEYS[:3]].itertuples(index=False, name=None))
            for trial in trials(cell, seed):
                if trial.key in done or (seed != TUNED_ON and trial.key[:3] not in picked):
                    continue
                if time.monotonic() > end:
                    return False
                config = load_config(HERE / "base.toml", list(trial.settings))
                if seed not in federations:
                    federations[seed] = make_federation(config, data_root)
                row = run(trial, config, federations[seed], data_root)
                done.add(trial.key)
                (work / f"{trial.file}.json").write_text(json.dumps(row))
    return True


def chosen(found: pd.DataFrame) -> pd.DataFrame:
    """Return the trials of the setting of each method and cell that is best on the validation images of seed 1.

    Only of methods with all of their settings on that seed.
    """
    keys = ["cell", "method"]
    tuned = found[found["seed"] == TUNED_ON].sort_values(
        ["validation_accuracy", "validation_loss"], ascending=[False, True], kind="stable"
    )
    best = tuned[tuned.groupby(keys)["setting"].transform("size") == len(STEPS)].groupby(keys, sort=False).head(1)
    return found.merge(best[[*keys, "setting"]], on=[*keys, "setting"])


def accuracy_table(best: pd.DataFrame) -> str:
    """A row for each method: mean test accuracy in each cell, and the deviation over seeds."""
    cells = [cell for cell in COLUMNS if (best["cell"] == cell).any()]
    rows = []
    for method in variants():
        rows.append((method, *(_cell(best, cell, method) for cell in cells)))
    return table(("method", *cells), rows)


def ceiling_table(best: pd.DataFrame) -> str:
    """Scores of the same network without bounds and without noise."""
    names = (DESCENT, DESCENT + MOMENTUM, AVERAGING)
    return table(("without privacy", "test accuracy"), [(name, _cell(best, NONE, name)) for name in names])


def differences_table(best: pd.DataFrame) -> str:
    """Paired differences of each method's better variant (by validation) to the better variant of dp-gd."""
    cells = [cell for cell in COLUMNS if (best["cell"] == cell).any()]
    rows = []
    for name in [name for name in METHODS if name != "dp-gd"]:
        cells_of = []
        for cell in cells:
            own, plain = _better(best, cell, name), _better(best, cell, "dp-gd")
            gain = (own - plain).dropna() if own is not None and plain is not None else pd.Series(dtype=float)
            cells_of.append(_spread(gain, "+"))
        rows.append((name, *cells_of))
    return table(("against dp-gd", *cells), rows)


def settings_table(best: pd.DataFrame) -> str:
    """The chosen step of each method in each cell."""
    cells = [cell for cell in (*COLUMNS, NONE) if (best["cell"] == cell).any()]
    names = [name for name in (*variants(), DESCENT, DESCENT + MOMENTUM, AVERAGING) if name in set(best["method"])]
    rows = []
    for name in names:
        part = best[best["method"] == name].drop_duplicates("cell").set_index("cell")["setting"]
        rows.append((name, *(f"{part[cell]:g}" if cell in part else "" for cell in cells)))
    return table(("chosen step", *cells), rows)


def _better(best: pd.DataFrame, cell: str, name: str) -> pd.Series | None:
    part = best[(best["cell"] == cell) & best["method"].isin([name, name + MOMENTUM])]
    if part.empty:
        return None
    first = part[part["seed"] == TUNED_ON].sort_values("validation_accuracy", ascending=False, kind="stable")
    method = first["method"].iloc[0]
    return part[part["method"] == method].set_index("seed")["test_accuracy"]


def _cell(best: pd.DataFrame, cell: str, method: str) -> str:
    return _spread(best[(best["cell"] == cell) & (best["method"] == method)]["test_accuracy"])


def _spread(values: pd.Series, sign: str = "") -> str:
    if values.empty:
        return ""
    missing = "" if len(values) == len(SEEDS) else f" ({len(values)} of {len(SEEDS)} seeds)"
    deviation = "" if len(values) < 2 else f" ± {values.std():.3f}"
    return f"{values.mean():{sign}.3f}{deviation}{missing}"


def draw(best: pd.DataFrame, path: Path) -> None:
    """Draw mean and deviation of each method's test accuracy in each cell."""
    order = COLUMNS
    figure = Figure(figsize=(7.6, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    colors = dict(zip(METHODS, ("#332288", "#999933", "#CC6677", "#44AA99", "#88CCEE"), strict=True))
    for number, name in enumerate(variants()):
        part = best[best["method"] == name].groupby("cell")["test_accuracy"].agg(["mean", "std"]).reindex(order)
        at = np.arange(len(order)) + (number - 4) * 0.085
        color = colors[name.removesuffix(MOMENTUM)]
        axes.errorbar(
            at,
            part["mean"],
            yerr=part["std"].fillna(0.0),
            fmt="s" if name.endswith(MOMENTUM) else "o",
            markerfacecolor="white" if name.endswith(MOMENTUM) else color,
            color=color,
            capsize=2,
            markersize=5,
            elinewidth=1,
            label=name,
        )
    ceiling = best[best["cell"] == NONE].groupby("method")["test_accuracy"].mean()
    for name, style in ((AVERAGING, "-"), (DESCENT + MOMENTUM, "--")):
        if name in ceiling:
            axes.axhline(ceiling[name], color="#117733", linestyle=style, linewidth=1, label=f"{name}, without privacy")
    axes.axhline(0.1, color="#888888", linestyle=":", linewidth=1, label="chance")
    axes.set_xticks(range(len(order)), order)
    axes.set_ylabel("test accuracy")
    axes.grid(axis="y", alpha=0.3)
    axes.set_title("CIFAR-10 on ten clients: mean and deviation of three seeds", fontsize=10)
    figure.legend(fontsize=8, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=130)


def write_tables(work: Path) -> None:
    """Write trials.csv, the tables of README.md and figure.png from all finished trials."""
    found = finished(work)
    found.to_csv(TRIALS, index=False, float_format="%.5g")
    best = chosen(found)
    page = HERE / "README.md"
    for name, make in (
        ("accuracy", accuracy_table),
        ("ceiling", ceiling_table),
        ("differences", differences_table),
        ("settings", settings_table),
    ):
        fill(name, make(best), page)
    draw(best, HERE / "figure.png")


def main() -> None:
    """Run the missing trials, then write tables and figure.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, default=None)
    parser.add_argument("--seconds", type=float, default=2700.0)
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--tables", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if not given.tables and not run_missing(given.data_root, given.seconds, given.work):
        print("Trials are left: run it again.")
    write_tables(given.work)


if __name__ == "__main__":
    main()

"""Make the table and the plot of this folder: private federated learning on MNIST, one client per writer.

    python results/mnist-by-writer/make.py [--data-root DIR] [--jobs N] [--only COLUMNS] [--draw]

For each model, privacy setting and method, every point of the grid below is trained with seed 0 and judged on the
odd-numbered test images. While the best step is at an end of those tried, the next one, three times as long or as
short, is tried as well, at most twice. The best point is trained again with seeds 1, 2 and 3 and judged on the
even-numbered ones.
Trials are kept in runs/ as they finish, so an interrupted run resumes from them; trials.csv here is their last copy.
The choice of the best point looks at labeled data that are not private here; on private data it would have to be paid.
"""

import argparse
import itertools
import json
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fedpriv.experiment.build import Experiment, assemble
from fedpriv.experiment.config import parse_config
from fedpriv.experiment.execution import make_engine
from fedpriv.rounds import begin_round, finish_round, signal_to_noise

HERE = Path(__file__).parent
SEEDS = (1, 2, 3)
MOMENTUM = 0.9
# Steps beyond an end of a grid: how many at most, and the factor between them.
EXTENSIONS, FACTOR = 2, 3.0
ADAM_STEPS = (0.001, 0.003, 0.01)
PUBLIC_BETA = 0.3

PROBLEMS: dict[str, dict[str, Any]] = {
    "softmax": {
        "model": {"name": "softmax"},
        "local": {"work": "full-gradient"},
        "cohort": {"sampling": "everyone"},
        "training": {"rounds": 60, "evaluate_every": 60},
    },
    "cnn": {
        "model": {"name": "cnn", "width": 4},
        "local": {"work": "minibatch-gradient", "batch_size": 32},
        "cohort": {"sampling": "poisson", "probability": 0.1},
        "training": {"rounds": 40, "evaluate_every": 40},
    },
}

CENTRAL = {"trust": "central", "adjacency": "add-or-remove", "delta": 1e-5}
AGGREGATOR = {"trust": "aggregator", "adjacency": "replace", "delta": 1e-5}
LOCAL = {"trust": "local", "adjacency": "replace", "delta": 1e-5}
PRIVACY: dict[str, dict[str, Any] | None] = {
    "non-private": None,
    "central, epsilon 8": {**CENTRAL, "epsilon": 8.0},
    "central, epsilon 2": {**CENTRAL, "epsilon": 2.0},
    "aggregator, epsilon 8": {**AGGREGATOR, "epsilon": 8.0},
    "aggregator, epsilon 2": {**AGGREGATOR, "epsilon": 2.0},
    "local, epsilon 8": {**LOCAL, "epsilon": 8.0},
    "local, epsilon 2": {**LOCAL, "epsilon": 2.0},
}
CELLS = [
    (problem, setting) for problem in PROBLEMS for setting in PRIVACY if problem == "softmax" or setting[0] not in "al"
]


def _points(steps: tuple[float, ...], **axes: Any) -> list[dict[str, Any]]:
    """Return all combinations of axes and of how far one bounded message moves the model; step = server_lr x bound."""
    grid = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    return [{**p, "server_lr": s / p.get("clip_norm", 1.0)} for p in grid for s in steps]


def _feedback(steps: tuple[float, ...], pairs: tuple[tuple[float, float], ...], **fixed: Any) -> list[dict[str, Any]]:
    grid = [{"alpha": a, "beta": b, **fixed} for a, b in pairs]
    return [{"name": "alpha-normec", **point, "server_lr": step} for point in grid for step in steps]


def grid_of(problem: str, setting: str) -> dict[str, list[dict[str, Any]]]:
    """Return every method with the hyperparameters that are tried for it."""
    small, local = problem == "cnn", setting.startswith("local")
    if local:
        steps = (0.003, 0.01, 0.03)
    elif small:
        steps = (0.3, 1.0, 3.0)
    else:
        steps = (0.03, 0.1, 0.3) if setting.endswith("epsilon 2") else (0.1, 0.3, 1.0)
    lengths = tuple(step / 2 for step in steps)
    few = small or local
    clips = (1.0,) if few else (0.3, 1.0)
    pairs = ((1.0, 0.1),) if local else ((1.0, 0.1), (1.0, 1.0)) if small else ((0.1, 0.1), (1.0, 0.1), (1.0, 1.0))
    residuals = _points(steps, clip_norm=(0.1,) if local else (0.3, 1.0) if small else (0.1, 0.3))
    clipped, smoothed = _points(steps, clip_norm=clips), _points(steps, alpha=(1.0,) if few else (0.1, 1.0))
    damped = ((1.0, 1.0),) if few else ((1.0, 0.3), (1.0, 1.0))
    methods = {
        "DP-FedAvg": [{"name": "dp-fedavg", **p} for p in clipped],
        "normalized SGD": [{"name": "normalized-sgd", **p} for p in smoothed],
        "Clip21": [{"name": "clip21", **p, "server_lr": p["server_lr"] * p["clip_norm"]} for p in residuals],
        "alpha-NormEC": _feedback(steps, pairs, server_normalization=False),
        "alpha-NormEC, SN": _feedback(lengths, ((1.0, 0.1),) if few else ((1.0, 0.1), (1.0, 1.0))),
        "alpha-NormEC, damped": _feedback(steps, damped, server_normalization=False, damping=0.1),
    }
    if local:
        methods["alpha-NormEC, sent"] = _feedback(steps, pairs, server_normalization=False, memory="sent")
    public = [{"name": "centered-clip", "beta": PUBLIC_BETA, **p} for p in clipped]
    methods |= {"public memory": public}
    methods |= {f"{name}, momentum": _with_momentum(points) for name, points in methods.items()}
    methods["DP-FedAvg, Adam"] = [
        {"name": "dp-fedavg", **p, "server_lr": p["server_lr"] * p["clip_norm"], "optimizer": "adam"}
        for p in _points(ADAM_STEPS, clip_norm=clips)
    ]
    return methods


def _with_momentum(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**p, "server_lr": p["server_lr"] * (1.0 - MOMENTUM), "momentum": MOMENTUM} for p in points]


@lru_cache(maxsize=4)
def _experiment(problem: str, seed: int, data_root: Path | None) -> Experiment:
    """Data, model and cohorts of a problem; the method and the privacy plan are put in by each trial."""
    method = {"name": "dp-fedavg"}
    return assemble(parse_config(_tables(problem, None, method, seed)), data_root=data_root)


def _tables(problem: str, privacy: dict[str, Any] | None, method: dict[str, Any], seed: int) -> dict[str, Any]:
    tables = {"name": problem, "seed": seed, "data": {"name": "mnist-by-writer", "partition": "natural"}}
    of_server = {"momentum", "optimizer"}
    tables |= {**PROBLEMS[problem], "method": {key: value for key, value in method.items() if key not in of_server}}
    if of_server & method.keys():
        tables["server"] = {"optimizer": "momentum", **{key: method[key] for key in method if key in of_server}}
    return tables if privacy is None else {**tables, "privacy": privacy}


def run_trial(problem: str, setting: str, method: dict[str, Any], seed: int, data_root: Path | None) -> dict[str, Any]:
    """Train one model; return its validation and test accuracy, and the last round's signal-to-noise ratio."""
    torch.set_num_threads(1)
    data = _experiment(problem, seed, data_root)
    config = parse_config(_tables(problem, PRIVACY[setting], method, seed))
    experiment = data.with_method(config)
    engine = make_engine("auto", experiment)
    state = experiment.server.init(experiment.initial_model)
    ratio = None
    for number in range(1, config.training.rounds + 1):
        total = engine.sum_messages(begin_round(experiment.server, state, number))
        state = finish_round(experiment.server, state, number, total.sum)
        ratio = signal_to_noise(total, experiment.server.noise_stddev, experiment.population.rules.noise_stddev)
    dataset, task = experiment.population.federation.dataset, experiment.population.task
    judged = {
        part: task.evaluate(state.model, dataset.test_inputs[rows], dataset.test_labels[rows])
        for part, rows in (("validation", slice(1, None, 2)), ("test", slice(0, None, 2)))
    }
    figures = {
        f"{part}_{what}": value
        for part, scores in judged.items()
        for what, value in (("loss", scores["loss"]), ("accuracy", scores["accuracy"]))
    }
    return {**figures, "signal_to_noise": ratio, "epsilon": experiment.plan and experiment.plan.epsilon}


class Trials:
    """The trials done so far, on disk as they finish."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._done = {} if not path.exists() else {self._key(row): row for row in self._rows()}

    def _rows(self) -> list[dict[str, Any]]:
        return pd.read_csv(self._path, dtype={"point": str}).to_dict("records")

    @staticmethod
    def _key(row: dict[str, Any]) -> tuple[Any, ...]:
        return (row["problem"], row["setting"], row["method"], row["point"], int(row["seed"]))

    def get(self, row: dict[str, Any]) -> dict[str, Any] | None:
        """Return the finished trial, or None."""
        return self._done.get(self._key(row))

    def add(self, row: dict[str, Any]) -> None:
        """Keep a finished trial."""
        self._done[self._key(row)] = row
        pd.DataFrame([row]).to_csv(
            self._path, mode="a", header=not self._path.exists(), index=False, float_format="%.6g"
        )


def run_all(rows: list[dict[str, Any]], trials: Trials, pool: ProcessPoolExecutor, data_root: Path | None) -> None:
    """Run the trials that are not done yet, side by side."""
    waiting = {
        pool.submit(run_trial, r["problem"], r["setting"], json.loads(r["point"]), r["seed"], data_root): r
        for r in rows
        if trials.get(r) is None
    }
    for number, future in enumerate(as_completed(waiting), start=1):
        row = {**waiting[future], **future.result()}
        trials.add(row)
        print(
            f"{number}/{len(waiting)}  {row['problem']}, {row['setting']}, {row['method']}  {row['point']}", flush=True
        )
        print(f"      validation accuracy {row['validation_accuracy']:.4f}", flush=True)


def trial_rows(cells: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """Return one row per grid point, with seed 0."""
    return [
        {"problem": p, "setting": s, "method": name, "point": json.dumps(point, sort_keys=True), "seed": 0}
        for p, s in cells
        for name, points in grid_of(p, s).items()
        for point in points
    ]


def steps_beyond(rows: list[dict[str, Any]], trials: Trials) -> list[dict[str, Any]]:
    """Return a row with the next step for each method whose best step is at an end of those tried with it."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["problem"], row["setting"], row["method"]), []).append(row)
    return [
        {**group[0], "point": json.dumps(point, sort_keys=True)}
        for group in groups.values()
        if (point := _point_beyond(group, trials)) is not None
    ]


def _point_beyond(group: list[dict[str, Any]], trials: Trials) -> dict[str, Any] | None:
    best = json.loads(max(group, key=lambda row: (trials.get(row) or {})["validation_accuracy"])["point"])
    others = [json.loads(row["point"]) for row in group]
    steps = [point["server_lr"] for point in others if {**point, "server_lr": 0.0} == {**best, "server_lr": 0.0}]
    step = best["server_lr"]
    if step == max(steps):
        return {**best, "server_lr": float(f"{step * FACTOR:.6g}")}
    return {**best, "server_lr": float(f"{step / FACTOR:.6g}")} if step == min(steps) else None


def winners(rows: list[dict[str, Any]], trials: Trials) -> list[dict[str, Any]]:
    """Return the best point of each problem, setting and method, by validation accuracy, for each reported seed."""
    frame = pd.DataFrame([trials.get(row) for row in rows])
    best = frame.loc[frame.groupby(["problem", "setting", "method"], sort=False)["validation_accuracy"].idxmax()]
    keys = ["problem", "setting", "method", "point"]
    return [{**row, "seed": seed} for row in best[keys].to_dict("records") for seed in SEEDS]


def run_cell(
    cell: tuple[str, str], trials: Trials, pool: ProcessPoolExecutor, data_root: Path | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Run what a cell lacks; return the rows of its tuning and of its reported seeds."""
    rows = trial_rows([cell])
    run_all(rows, trials, pool, data_root)
    for _ in range(EXTENSIONS):
        further = steps_beyond(rows, trials)
        run_all(further, trials, pool, data_root)
        rows += further
    finals = winners(rows, trials)
    run_all(finals, trials, pool, data_root)
    return rows, finals


def summarise(rows: list[dict[str, Any]], trials: Trials) -> pd.DataFrame:
    """Return mean and standard deviation over seeds of test accuracy and loss, and the chosen point."""
    frame = pd.DataFrame([trials.get(row) for row in rows])
    groups = frame.groupby(["problem", "setting", "method", "point"], sort=False)
    table = groups.agg(
        accuracy=("test_accuracy", "mean"),
        spread=("test_accuracy", "std"),
        loss=("test_loss", "mean"),
        signal_to_noise=("signal_to_noise", "mean"),
        epsilon=("epsilon", "mean"),
    )
    return table.reset_index()


COLOURS = {
    "DP-FedAvg": "#000000",
    "normalized SGD": "#E69F00",
    "Clip21": "#009E73",
    "public memory": "#8C564B",
    "alpha-NormEC": "#0072B2",
    "alpha-NormEC, SN": "#56B4E9",
    "alpha-NormEC, damped": "#D55E00",
    "alpha-NormEC, sent": "#CC79A7",
}
# Marks of the server's optimizers, by the suffix of a row's name.
MARKS = {"": "o", ", momentum": "D", ", Adam": "^"}


CHANCE = 0.1


def draw(table: pd.DataFrame, path: Path) -> None:
    """Accuracy by setting and method: one panel a problem, and one for local trust, which is far below."""
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    panel = table["problem"] + table["setting"].str.startswith("local").map({True: ", local trust", False: ""})
    names = ["softmax", "softmax, local trust", "cnn"]
    names = [name for name in names if name in set(panel)]
    widths = [table[panel == name]["setting"].nunique() for name in names]
    panels = figure.subplots(1, len(names), width_ratios=widths, squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        _draw_panel(axes, table[panel == name], name)
    panels[0].set_ylabel("test accuracy")
    handles = [Line2D([], [], color=colour, marker="s", linestyle="", label=name) for name, colour in COLOURS.items()]
    marks = {"o": "plain server step", "D": "server momentum", "^": "server Adam"}
    handles += [
        Line2D([], [], color="#666666", marker=mark, linestyle="", markerfacecolor="white", label=label)
        for mark, label in marks.items()
    ]
    handles.append(Line2D([], [], color="#666666", linestyle=":", linewidth=1, label="chance"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(
        "MNIST, 539 writers as clients, client-level privacy at delta = 1e-5: mean and standard deviation of 3 seeds\n"
        "SN: server normalization; sent: the memory adds up the noised messages. The panels have different ranges.",
        fontsize=11,
    )
    figure.savefig(path, dpi=120)


def _draw_panel(axes: Axes, part: pd.DataFrame, title: str) -> None:
    settings = list(dict.fromkeys(part["setting"]))
    rows_of = [(name + suffix, colour, mark) for name, colour in COLOURS.items() for suffix, mark in MARKS.items()]
    rows_of = [row for row in rows_of if row[0] in set(part["method"])]
    for index, (method, colour, mark) in enumerate(rows_of):
        rows = part[part["method"] == method].set_index("setting")
        shift = 0.8 * ((index + 0.5) / len(rows_of) - 0.5)
        at = [settings.index(setting) + shift for setting in rows.index]
        fill = "white" if mark == "o" else colour
        axes.errorbar(at, rows["accuracy"], yerr=rows["spread"], fmt=mark, color=colour, mfc=fill, markersize=5)
    if axes.get_ylim()[0] < 2 * CHANCE:
        axes.axhline(CHANCE, color="#666666", linestyle=":", linewidth=1)
    for place in range(1, len(settings)):
        axes.axvline(place - 0.5, color="#dddddd", linewidth=0.8, zorder=0)
    axes.set(title=title)
    axes.set_xticks(range(len(settings)), [setting.replace(", ", "\n") for setting in settings])
    axes.grid(axis="y", alpha=0.3)


def markdown(table: pd.DataFrame) -> str:
    """Return the table, one row a method, one column a setting."""
    parts = []
    for problem, part in table.groupby("problem", sort=False):
        cells = part.assign(cell=[f"{a:.3f} ± {s:.3f}" for a, s in zip(part["accuracy"], part["spread"], strict=True)])
        wide = cells.pivot(index="method", columns="setting", values="cell")
        wide = wide.reindex(index=list(dict.fromkeys(part["method"])), columns=list(dict.fromkeys(part["setting"])))
        lines = ["| method | " + " | ".join(wide.columns) + " |", "|---" * (len(wide.columns) + 1) + "|"]
        lines += [f"| {name} | " + " | ".join(row.fillna("-")) + " |" for name, row in wide.iterrows()]
        parts.append(f"**{problem}**\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def main() -> None:
    """Run the missing trials and make table.csv, table.md and figure.png."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-root", type=Path, default=None)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument(
        "--only", default="", help='only run the trials of some columns, as in "cnn" or "cnn, central, epsilon 8"'
    )
    parser.add_argument("--draw", action="store_true", help="only draw figure.png again, from table.csv")
    arguments = parser.parse_args()
    if arguments.draw:
        draw(pd.read_csv(HERE / "table.csv"), HERE / "figure.png")
        return
    kept = HERE.parents[1] / "runs" / "mnist-by-writer-trials.csv"
    kept.parent.mkdir(exist_ok=True)
    trials = Trials(kept)
    cells = [cell for cell in CELLS if ", ".join(cell).startswith(arguments.only)]
    rows, finals = [], []
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        for cell in cells:
            found = run_cell(cell, trials, pool, arguments.data_root)
            rows += found[0]
            finals += found[1]
    if arguments.only:
        return
    pd.DataFrame([trials.get(row) for row in (*rows, *finals)]).to_csv(
        HERE / "trials.csv", index=False, float_format="%.5g"
    )
    table = summarise(finals, trials)
    table.to_csv(HERE / "table.csv", index=False, float_format="%.4f")
    (HERE / "table.md").write_text(markdown(table))
    draw(table, HERE / "figure.png")
    print(markdown(table))


if __name__ == "__main__":
    main()

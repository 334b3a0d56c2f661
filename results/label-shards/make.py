"""Makes the figure and the table of this folder: what error feedback repairs when there is no noise.

    python results/label-shards/make.py

Handwritten digits (embedded, no download), 40 clients of one or two labels each, softmax regression, full local
gradients, everyone in every round, no privacy. Every method walks 2,000 rounds; each but gradient descent is given
the best step size of a grid, judged by its last training loss, so that no curve is a badly tuned one.
"""

from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fedpriv.experiment.assemble import assemble, make_engine
from fedpriv.experiment.config import parse_config
from fedpriv.rounds import begin_round, finish_round

HERE = Path(__file__).parent
ROUNDS = 2000
STEPS = (0.3, 1.0, 3.0)
ALPHA = 0.1
METHODS: dict[str, dict[str, Any]] = {
    "gradient descent": {"name": "dp-fedavg", "clip_norm": 1e6},
    "alpha-NormEC": {"name": "alpha-normec", "alpha": ALPHA, "beta": ALPHA, "server_normalization": False},
    "Clip21": {"name": "clip21", "clip_norm": ALPHA},
    "normalized SGD": {"name": "normalized-sgd", "alpha": ALPHA},
    "clipping without memory": {"name": "dp-fedavg", "clip_norm": ALPHA},
}
# Without memory a message is about 1 (normalized) or 0.1 (clipped) long, whatever the gradient: steps to match.
SCALE = {"normalized SGD": 0.1, "clipping without memory": 1.0}
COLOURS = ("#000000", "#0072B2", "#009E73", "#D55E00", "#CC79A7")


def experiment_of(method: dict[str, Any]) -> Any:
    """The problem under one method."""
    tables = {
        "name": "label-shards",
        "seed": 1,
        "data": {"name": "digits", "clients": 40, "partition": "shards", "shards_per_client": 1},
        "model": {"name": "softmax"},
        "method": method,
        "training": {"rounds": ROUNDS},
    }
    return assemble(parse_config(tables))


def walk(method: dict[str, Any]) -> pd.DataFrame:
    """Training loss (mean of the clients' losses, nats) and test accuracy, every 20 rounds."""
    experiment = experiment_of(method)
    engine = make_engine("vectorized", experiment)
    state = experiment.config.method.init_server(experiment.initial_model)
    rows = []
    for number in range(1, ROUNDS + 1):
        total = engine.sum_messages(begin_round(experiment.server, state, number))
        state = finish_round(experiment.server, state, number, total.sum)
        if number % 20 == 0:
            rows.append({"round": number, "train_loss": objective(experiment, state.model)})
            rows[-1]["test_accuracy"] = experiment.evaluate(state.model)[1]
    return pd.DataFrame(rows)


def objective(experiment: Any, model: torch.Tensor) -> float:
    """f(x): the mean over clients of each client's mean loss."""
    population = experiment.population
    losses = []
    for client in range(population.federation.population):
        rows = torch.from_numpy(population.federation.rows_of(client))
        weights = torch.full((len(rows),), 1.0 / len(rows))
        losses.append(population.task.loss(model, population.inputs[rows], population.labels[rows], weights))
    return float(torch.stack(losses).mean())


def best_walk(name: str) -> tuple[float, pd.DataFrame]:
    """The step size with the lowest last training loss, and its walk."""
    walks = {}
    for step in STEPS:
        size = step * SCALE.get(name, 1.0)
        walks[size] = walk({**METHODS[name], "server_lr": size})
    return min(walks.items(), key=lambda pair: pair[1]["train_loss"].fillna(float("inf")).iloc[-1])


def main() -> None:
    """Makes curves.csv, table.csv and figure.png."""
    torch.set_num_threads(1)
    curves, table = [], []
    for name in METHODS:
        size, frame = best_walk(name)
        curves.append(frame.assign(method=name))
        table.append({"method": name, "server_lr": size, **frame.iloc[-1][["train_loss", "test_accuracy"]].to_dict()})
        print(table[-1], flush=True)
    frame = pd.concat(curves)
    frame.to_csv(HERE / "curves.csv", index=False, float_format="%.5g")
    pd.DataFrame(table).to_csv(HERE / "table.csv", index=False, float_format="%.4g")
    draw(frame, HERE / "figure.png")


def draw(frame: pd.DataFrame, path: Path) -> None:
    """Loss and accuracy over rounds."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    loss, accuracy = figure.subplots(1, 2)
    for (name, rows), colour in zip(frame.groupby("method", sort=False), COLOURS, strict=True):
        style = "--" if name == "gradient descent" else "-"
        loss.plot(rows["round"], rows["train_loss"], style, color=colour, label=name)
        accuracy.plot(rows["round"], rows["test_accuracy"], style, color=colour, label=name)
    loss.set(xlabel="round", title="training loss (nats)", yscale="log")
    accuracy.set(xlabel="round", title="test accuracy")
    loss.legend(frameon=False)
    for axes in (loss, accuracy):
        axes.grid(alpha=0.3)
    figure.suptitle(f"Digits, 40 clients of one label shard each, no noise, alpha = clip norm = {ALPHA}")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()

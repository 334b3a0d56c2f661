"""Make the plot and the tables of this folder: the effect of error feedback without noise.

    python results/label-shards/make.py

Handwritten digits (embedded, no download), reduced to their first four principal components, so that no linear model
fits them perfectly and a best loss exists; 40 clients of one label shard each, softmax regression, full local
gradients, everyone in every round, no privacy. Every method walks 2,000 rounds with the best step size of a grid,
judged by the last training loss, so that no curve is a badly tuned one. The best possible loss comes from L-BFGS.
"""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fedpriv.experiment.build import Experiment, assemble, make_federation
from fedpriv.experiment.config import parse_config
from fedpriv.experiment.execution import make_engine
from fedpriv.rounds import begin_round, finish_round

HERE = Path(__file__).parent
ROUNDS = 2000
STEPS = (0.3, 1.0, 3.0, 10.0)
ALPHA = 0.1
COMPONENTS = 4
METHODS: dict[str, dict[str, Any]] = {
    "gradient descent": {"name": "dp-fedavg", "clip_norm": 1e6},
    "alpha-NormEC": {"name": "alpha-normec", "alpha": ALPHA, "beta": ALPHA, "server_normalization": False},
    "Clip21": {"name": "clip21", "clip_norm": ALPHA},
    "normalized SGD": {"name": "normalized-sgd", "alpha": ALPHA},
    "clipping without memory": {"name": "dp-fedavg", "clip_norm": ALPHA},
}
# Three curves coincide: a broad one, a dotted one and a dashed one.
LOOKS: dict[str, dict[str, Any]] = {
    "gradient descent": {"linestyle": "--", "zorder": 3},
    "alpha-NormEC": {"linewidth": 5, "alpha": 0.45},
    "Clip21": {"linestyle": ":", "linewidth": 2.5},
}
COLOURS = ("#000000", "#0072B2", "#009E73", "#D55E00", "#CC79A7")


def components(train: torch.Tensor, test: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first principal components of the training inputs, at unit variance, of both."""
    mean = train.mean(dim=0)
    values, vectors = torch.linalg.eigh((train - mean).T @ (train - mean) / len(train))
    turn = vectors[:, -COMPONENTS:] / values[-COMPONENTS:].sqrt()
    return (train - mean) @ turn, (test - mean) @ turn


@cache
def problem() -> Experiment:
    """Return the data, spread over the clients, and the model."""
    tables = {
        "name": "label-shards",
        "seed": 1,
        "data": {"name": "digits", "clients": 40, "partition": "shards", "shards_per_client": 1},
        "model": {"name": "softmax"},
        "method": METHODS["gradient descent"],
        "training": {"rounds": ROUNDS},
    }
    config = parse_config(tables)
    federation = make_federation(config)
    dataset = federation.dataset
    train, test = components(dataset.train_inputs.flatten(1), dataset.test_inputs.flatten(1))
    federation = replace(federation, dataset=replace(dataset, train_inputs=train, test_inputs=test))
    return assemble(config, federation=federation)


def experiment_of(method: dict[str, Any]) -> Experiment:
    """Return the problem under one method."""
    return problem().with_method(parse_config({**problem().config.tables, "method": method}))


def walk(method: dict[str, Any]) -> pd.DataFrame:
    """Return training loss (mean of the clients' losses, nats) and test accuracy, every 50 rounds."""
    experiment = experiment_of(method)
    engine = make_engine("vectorized", experiment)
    state = experiment.server.init(experiment.initial_model)
    rows = []
    for number in range(1, ROUNDS + 1):
        total = engine.sum_messages(begin_round(experiment.server, state, number))
        state = finish_round(experiment.server, state, number, total.sum)
        if number % 50 == 0:
            rows.append({"round": number, "train_loss": float(objective(experiment, state.model))})
            rows[-1]["test_accuracy"] = experiment.evaluate(state.model)["accuracy"]
    return pd.DataFrame(rows)


def objective(experiment: Experiment, model: torch.Tensor) -> torch.Tensor:
    """f(x): the mean over clients of each client's mean loss."""
    population = experiment.population
    losses = []
    for client in range(population.federation.population):
        rows = torch.from_numpy(population.federation.rows_of(client))
        weights = torch.full((len(rows),), 1.0 / len(rows))
        losses.append(population.task.loss(model, population.inputs[rows], population.labels[rows], weights))
    return torch.stack(losses).mean()


def least_objective() -> float:
    """Return the smallest possible f, by L-BFGS."""
    experiment = problem()
    model = experiment.initial_model.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [model], max_iter=5000, tolerance_grad=1e-7, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = objective(experiment, model)
        loss.backward()
        return loss

    optimizer.step(closure)
    return float(objective(experiment, model.detach()))


def best_walk(name: str) -> tuple[float, pd.DataFrame]:
    """Return the step size with the lowest last training loss, and its walk."""
    walks = {}
    for step in STEPS:
        walks[step] = walk({**METHODS[name], "server_lr": step})
        print(f"  {name}, step {step}: {walks[step]['train_loss'].iloc[-1]:.4f}", flush=True)
    return min(walks.items(), key=lambda pair: pair[1]["train_loss"].fillna(float("inf")).iloc[-1])


def main() -> None:
    """Make curves.csv, table.csv and figure.png."""
    torch.set_num_threads(1)
    curves, table = [], []
    for name in METHODS:
        size, frame = best_walk(name)
        curves.append(frame.assign(method=name))
        table.append({"method": name, "server_lr": size, **frame.iloc[-1][["train_loss", "test_accuracy"]].to_dict()})
        print(table[-1], flush=True)
    least = least_objective()
    table.append({"method": "best possible", "train_loss": least})
    frame = pd.concat(curves)
    frame.to_csv(HERE / "curves.csv", index=False, float_format="%.8g")
    pd.DataFrame(table).to_csv(HERE / "table.csv", index=False, float_format="%.4g")
    draw(frame, least, HERE / "figure.png")


def draw(frame: pd.DataFrame, least: float, path: Path) -> None:
    """Loss and accuracy over rounds."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    loss, accuracy = figure.subplots(1, 2)
    for (name, rows), colour in zip(frame.groupby("method", sort=False), COLOURS, strict=True):
        look = {"color": colour, "label": name, **LOOKS.get(str(name), {})}
        loss.plot(rows["round"], rows["train_loss"] - least, **look)
        accuracy.plot(rows["round"], rows["test_accuracy"], **look)
    loss.set(xlabel="round", title="training loss above the best possible (nats)", yscale="log")
    accuracy.set(xlabel="round", title="test accuracy", ylim=(0.7, 0.87))
    loss.legend(frameon=False, fontsize=9, loc="lower left")
    for axes in (loss, accuracy):
        axes.grid(alpha=0.3)
    figure.suptitle(
        f"Four components of digits, 40 clients of one label shard each, no noise, alpha = clip norm = {ALPHA}"
    )
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()

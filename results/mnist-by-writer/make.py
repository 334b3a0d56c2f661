"""Makes the table and the figure of this folder: private federated learning on MNIST, one client per writer.

    python results/mnist-by-writer/make.py [--data-root DIR] [--jobs N]

For each model, privacy setting and method, every point of the grid below is trained with seed 0 and judged on the
odd-numbered test images; the best point is trained again with seeds 1, 2 and 3 and judged on the even-numbered ones.
Trials are kept in trials.csv as they finish, so an interrupted run goes on where it was. The choice of the best point
looks at labelled data that are not private here; on private data it would have to be paid for.
"""

import argparse
import itertools
import json
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fedpriv.experiment.assemble import Experiment, assemble, make_engine
from fedpriv.experiment.config import parse_config
from fedpriv.rounds import begin_round, finish_round, signal_to_noise

HERE = Path(__file__).parent
SEEDS = (1, 2, 3)

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
        "cohort": {"sampling": "poisson", "probability": 0.25},
        "training": {"rounds": 60, "evaluate_every": 60},
    },
}

PRIVACY: dict[str, dict[str, Any] | None] = {
    "non-private": None,
    "central, epsilon 8": {"trust": "central", "adjacency": "add-or-remove", "epsilon": 8.0, "delta": 1e-5},
    "central, epsilon 2": {"trust": "central", "adjacency": "add-or-remove", "epsilon": 2.0, "delta": 1e-5},
    "local, epsilon 8": {"trust": "local", "adjacency": "replace", "epsilon": 8.0, "delta": 1e-5},
    "local, epsilon 2": {"trust": "local", "adjacency": "replace", "epsilon": 2.0, "delta": 1e-5},
}


@lru_cache(maxsize=4)
def _experiment(problem: str, seed: int, data_root: Path | None) -> Experiment:
    """Data, model and cohorts of a problem; the method and the privacy plan are put in by each trial."""
    method = {"name": "dp-fedavg"}
    return assemble(parse_config(_tables(problem, None, method, seed)), data_root=data_root)


def _tables(problem: str, privacy: dict[str, Any] | None, method: dict[str, Any], seed: int) -> dict[str, Any]:
    tables = {"name": problem, "seed": seed, "data": {"name": "mnist-by-writer", "partition": "natural"}}
    tables |= {**PROBLEMS[problem], "method": method}
    return tables if privacy is None else {**tables, "privacy": privacy}


def run_trial(problem: str, setting: str, method: dict[str, Any], seed: int, data_root: Path | None) -> dict[str, Any]:
    """Trains one model; returns its validation and test accuracy, and the last round's signal-to-noise ratio."""
    torch.set_num_threads(1)
    data = _experiment(problem, seed, data_root)
    config = parse_config(_tables(problem, PRIVACY[setting], method, seed))
    experiment = data.with_method(config)
    engine = make_engine("auto", experiment)
    state = experiment.config.method.init_server(experiment.initial_model)
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
    figures = {f"{part}_{what}": value for part, pair in judged.items() for what, value in zip(("loss", "accuracy"), pair)}
    return {**figures, "signal_to_noise": ratio, "epsilon": experiment.plan and experiment.plan.epsilon}

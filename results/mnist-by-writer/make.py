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

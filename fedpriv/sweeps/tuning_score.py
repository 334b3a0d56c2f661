"""A private selection score for tuning: computed on clients' examples, with noise.

The score of a model is the mean, over all clients that may hold held-out examples, of the model's accuracy on the
client's examples, or another metric in [0, 1]. Gaussian noise is added to the sum of these numbers, as
`fedpriv.privacy.tuning.ScoreNoise` accounts for it. The divisor, the number of these clients, is public, regardless of
which of them hold examples.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fedpriv.data.dataset import Dataset, HeldOut
from fedpriv.errors import UserError
from fedpriv.experiment.build import make_federation, task_of
from fedpriv.experiment.results import load_model
from fedpriv.experiment.run_directory import RunDirectory
from fedpriv.mechanisms.gaussian import release_grid, rounded_noise
from fedpriv.privacy.tuning import ScoreNoise
from fedpriv.streams import Purpose, SeededStreams, Streams, SystemStreams, Words
from fedpriv.tables import Record
from fedpriv.tasks.task import Task

if TYPE_CHECKING:
    from fedpriv.sweeps.config import Trial

__all__ = ["SCORES", "UNITS", "noised_scores", "streams_of", "sum_of_scores", "with_noise"]

SCORES = "scores.json"

UNITS = 2**20
"""Scores are rounded down to multiples of 1 / `UNITS`, so that their sum is exact."""


def sum_of_scores(task: Task, model: Tensor, inputs: Tensor, labels: Tensor, held_out: HeldOut) -> int:
    """Return the sum of clients' scores by the task's first metric, in units of 1 / `UNITS`.

    Args:
        task: Evaluates the model.
        model: `[params]`.
        inputs: Held-out examples of all clients.
        labels: Their labels.
        held_out: Their owners.

    Formal guarantees:
        Each client adds a whole number from 0 to `UNITS`, 0 if it has no examples. A score that is undefined for a
        client's examples counts as the worst one. The number is computed only from the model
        and the client's examples: each client's examples pass through the model separately, because the rest of a batch
        may affect how an example is rounded. Changing, adding or removing one client's examples thus moves the sum by
        at most `UNITS`, regardless of the examples: its sensitivity is 1.
    """
    order = np.argsort(held_out.owners, kind="stable")
    ends = np.cumsum(np.bincount(held_out.owners, minlength=held_out.clients))
    total, metric = 0, task.kind.selects
    worst = 0.0 if metric.better == "higher" else 1.0
    for rows in map(torch.from_numpy, np.split(order, ends[:-1])):
        if len(rows):
            score = task.evaluate(model, inputs[rows], labels[rows])[metric.name]
            score = min(max(worst if math.isnan(score) else score, 0.0), 1.0)
            total += math.floor(score * UNITS)
    return total


def with_noise(total: int, clients: int, noise: ScoreNoise, source: Words) -> float:
    """Return the mean over clients of a sum in units of 1 / `UNITS`, with exactly sampled Gaussian noise.

    The noisy sum is a multiple of `release_grid`; later steps are post-processing and cost no privacy. The mean may be
    below 0 or above 1.
    """
    (steps,) = rounded_noise(np.array([total / UNITS]), noise.stddev, source)
    return float(steps) * release_grid(noise.stddev) / clients


def noised_scores(
    folder: RunDirectory,
    runs: Mapping[str, Path],
    trials: Mapping[str, "Trial"],
    *,
    on: str,
    noise: ScoreNoise,
    streams: Streams,
    released: bool,
    device: str,
    data_root: Path | None,
) -> tuple[dict[str, float], int | None]:
    """Return the scores of finished trials by name, and the number of clients. Each score is drawn only once, ever.

    A score is saved to `SCORES`, an owner-only file, before it is used, and is read from there from then on: two draws
    of one score would reveal more than is accounted for.

    Args:
        folder: The sweep's folder.
        runs: The run directories of finished trials, by name.
        trials: All trials by name, in the order of the draw.
        on: `test` or `validation`.
        noise: The noise of each score.
        streams: The source of the noise, at the trial's place.
        released: True if a selection by these scores may be known already.
        device: The device that computes scores.
        data_root: The folder of the data sets.

    Raises:
        UserError: If scores are lost that a selection has used.
    """
    found: Record = folder.read_json(SCORES) or {"clients": None, "scores": {}}
    scores: dict[str, float] = found["scores"]
    left = runs.keys() - scores.keys()
    if left and released:
        remedy = "Restore the file: new noise would release the same scores again without accounting for it"
        raise UserError(str(folder.file(SCORES)), "the scores of all trials", f"{len(left)} missing scores", remedy)
    if not left:
        return scores, found["clients"]
    federation = make_federation(trials[next(iter(left))].config, data_root)
    inputs, labels, held_out = _examples(federation.dataset, on)
    for place, (name, trial) in enumerate(trials.items()):
        if name in left:
            task = task_of(trial.config, federation, device)
            model = task.layout.flatten(load_model(runs[name]))
            total = sum_of_scores(task, model, inputs, labels, held_out)
            source = streams.source(Purpose.SCORE_NOISE, client=place)
            scores[name] = with_noise(total, held_out.clients, noise, source)
            found = {"noise_multiplier": noise.multiplier, "clients": held_out.clients, "scores": scores}
            folder.write_json(SCORES, found)
    return scores, held_out.clients


def streams_of(seed: int | None, tuning: str) -> Streams:
    """Return the randomness of a tuning's scores: the operating system's, or streams that depend only on its seed."""
    return SystemStreams() if seed is None else SeededStreams(seed, tuning)


def _examples(dataset: Dataset, on: str) -> tuple[Tensor, Tensor, HeldOut]:
    if on == "test":
        inputs, labels, held_out = dataset.test_inputs, dataset.test_labels, dataset.tested
    else:
        inputs, labels, held_out = dataset.validation_inputs, dataset.validation_labels, dataset.validated
    if inputs is None or labels is None or held_out is None:
        raise ValueError(f"{dataset.name} has no {on} examples of clients")
    return inputs, labels, held_out

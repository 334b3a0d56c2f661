"""The selection score of a tuning that is itself private: on examples of clients, with noise of its own.

The score of a model is the mean, over all clients that may hold held-out examples, of the model's accuracy on the
client's own. Gaussian noise is added to the sum of the accuracies, as `fedpriv.privacy.tuning.ScoreNoise` accounts for
it; the number of clients that divides it is public, whoever of them holds anything.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from fedpriv.tasks.task import Task

if TYPE_CHECKING:
    from fedpriv.sweeps.config import Trial

__all__ = ["SCORES", "UNITS", "noised_scores", "streams_of", "sum_of_accuracies", "with_noise"]

SCORES = "scores.json"

UNITS = 2**20
"""Accuracies are rounded down to whole numbers of 1 / `UNITS`, so that their sum is exact."""


def sum_of_accuracies(task: Task, model: Tensor, inputs: Tensor, labels: Tensor, held_out: HeldOut) -> int:
    """Return the sum of clients' accuracies, in units of 1 / `UNITS`.

    Args:
        task: Says what is right.
        model: `[params]`.
        inputs: Held-out examples of all clients.
        labels: Theirs.
        held_out: Whose each is.

    Formal guarantees:
        Each client adds a whole number from 0 to `UNITS`, 0 if it has no examples, which is computed from the model and
        from its own examples alone: they go through the model by themselves, because what an example is computed with
        may decide how it is rounded. Changing, adding or removing one client's examples thus moves the sum by at most
        `UNITS`, whatever they are: its sensitivity is 1.
    """
    order = np.argsort(held_out.owners, kind="stable")
    ends = np.cumsum(np.bincount(held_out.owners, minlength=held_out.clients))
    total = 0
    for rows in map(torch.from_numpy, np.split(order, ends[:-1])):
        if len(rows):
            _, accuracy = task.evaluate(model, inputs[rows], labels[rows])
            total += math.floor(accuracy * UNITS)
    return total


def with_noise(total: int, clients: int, noise: ScoreNoise, source: Words) -> float:
    """Return the mean over clients of a sum in units of 1 / `UNITS`, with Gaussian noise that is sampled exactly.

    The sum with its noise is a multiple of `release_grid`; what is done to it afterwards costs no privacy. The mean may
    be below 0 or above 1.
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
    """Return the scores of finished trials by name, and the number of clients; each score is drawn once, ever.

    A score is written to `SCORES`, which its owner alone can read, before anything is made of it, and read from there
    from then on: two draws of one score would tell more than is accounted for.

    Args:
        folder: The sweep's.
        runs: The run directories of finished trials, by name.
        trials: All trials, by name, in the order in which they were drawn.
        on: `test` or `validation`.
        noise: Of each score.
        streams: Where the noise comes from, at the trial's place.
        released: Whether a selection by these scores may be known already.
        device: Where accuracies are computed.
        data_root: Where data sets lie.

    Raises:
        UserError: If scores are lost that a selection has used.
    """
    found: dict[str, Any] = folder.read_json(SCORES) or {"clients": None, "scores": {}}
    scores: dict[str, float] = found["scores"]
    left = runs.keys() - scores.keys()
    if left and released:
        remedy = "Restore it: with other noise the same scores would be released again, for which nothing is charged"
        raise UserError(str(folder.file(SCORES)), "the scores of all trials", f"{len(left)} missing", remedy)
    if not left:
        return scores, found["clients"]
    federation = make_federation(trials[next(iter(left))].config, data_root)
    inputs, labels, held_out = _examples(federation.dataset, on)
    for place, (name, trial) in enumerate(trials.items()):
        if name in left:
            task = task_of(trial.config, federation, device)
            model = task.layout.flatten(load_model(runs[name]))
            total = sum_of_accuracies(task, model, inputs, labels, held_out)
            source = streams.source(Purpose.SCORE_NOISE, client=place)
            scores[name] = with_noise(total, held_out.clients, noise, source)
            found = {"noise_multiplier": noise.multiplier, "clients": held_out.clients, "scores": scores}
            folder.write_json(SCORES, found)
    return scores, held_out.clients


def streams_of(seed: int | None, tuning: str) -> Streams:
    """The randomness of a tuning's scores: the operating system's, or that of its seed and of nothing else."""
    return SystemStreams() if seed is None else SeededStreams(seed, tuning)


def _examples(dataset: Dataset, on: str) -> tuple[Tensor, Tensor, HeldOut]:
    if on == "test":
        inputs, labels, held_out = dataset.test_inputs, dataset.test_labels, dataset.tested
    else:
        inputs, labels, held_out = dataset.validation_inputs, dataset.validation_labels, dataset.validated
    if inputs is None or labels is None or held_out is None:
        raise ValueError(f"{dataset.name} has no {on} examples of clients")
    return inputs, labels, held_out

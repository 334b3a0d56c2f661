"""fedpriv through its Python API: the same rounds on one of its engines.

    python results/benchmarks/ours.py --workload cnn62k --engine vectorized --options '{"chunk": 10}'

`--options` goes to the engine's constructor, but for `noise`, which says how clients add theirs under local trust:
`faithful` (each its own draw), `none`, or what an engine offers besides.
"""

import argparse
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from workloads import CLASSES, CLIP_NORM, CONSTANT, SERVER_LR, Job, Workload, one_thread, parse_job, run_rounds

from fedpriv.engines import Engine, Population
from fedpriv.experiment.assemble import IN_PROCESS_ENGINES
from fedpriv.learning.datasets import Dataset
from fedpriv.learning.federation import Federation
from fedpriv.learning.local_work import FullGradient
from fedpriv.learning.tasks import Task
from fedpriv.methods import DPFedAvg
from fedpriv.privacy import FixedSize, make_plan
from fedpriv.rounds import ServerRules, agree, begin_round, finish_round
from fedpriv.streams import SeededStreams

ENGINES: dict[str, Callable[..., Engine]] = {**IN_PROCESS_ENGINES}
"""Name to a function of a population and options. An engine that is not in the table of fedpriv gets a line here."""


class ConstantTask(Task):
    """Clients that compute nothing: every gradient is the same constant."""

    def gradient(self, model: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG002
        """See `Task.gradient`."""
        return torch.full_like(model, CONSTANT)

    def gradients(self, models: Tensor, inputs: Tensor, labels: Tensor, weights: Tensor) -> Tensor:  # noqa: ARG002
        """See `Task.gradients`."""
        return torch.full((len(inputs), models.shape[-1]), CONSTANT)


def federation_of(workload: Workload, seed: int) -> Federation:
    """Client i holds the i-th block of rows."""
    inputs, labels = workload.data(seed)
    inputs, labels = inputs.flatten(0, 1), labels.flatten()
    dataset = Dataset(
        name="synthetic",
        train_inputs=inputs,
        train_labels=labels,
        test_inputs=inputs[:1],
        test_labels=labels[:1],
        classes=CLASSES,
    )
    offsets = np.arange(workload.clients + 1) * workload.examples
    return Federation(dataset=dataset, offsets=offsets, rows=np.arange(len(labels)))


@dataclass
class Ours:
    """A server and an engine."""

    server: ServerRules
    engine: Engine
    state: Any
    number: int = 0

    def round(self) -> None:
        """One round."""
        self.number += 1
        total = self.engine.sum_messages(begin_round(self.server, self.state, self.number))
        self.state = finish_round(self.server, self.state, self.number, total.sum)


def make_ours(job: Job, engine: str, options: dict[str, Any]) -> Ours:
    """The workload on the engine called `engine`."""
    workload, options = job.workload, dict(options)
    noise_multiplier = 0.0 if options.get("noise") == "none" else workload.noise_multiplier
    if options.get("noise") in ("none", "faithful"):
        del options["noise"]
    method = DPFedAvg(clip_norm=CLIP_NORM, server_lr=SERVER_LR)
    sampling = FixedSize(population=workload.clients, size=workload.cohort)
    plan = make_plan(
        trust="local" if workload.local else "central",
        adjacency="add-or-remove",
        sampling=sampling,
        rounds=1,
        delta=1e-5,
        l2_bound=method.bounded.l2_bound,
        noise_multiplier=noise_multiplier,
        client_memory=False,
    )
    streams = SeededStreams(job.seed)
    server, client = agree(method, sampling, plan, streams)
    task = (Task if workload.computes else ConstantTask)(workload.module())
    people = Population(
        rules=client, task=task, federation=federation_of(workload, job.seed), work=FullGradient(), streams=streams
    )
    make = ENGINES[engine]
    if "workers" in inspect.signature(make).parameters:
        options["workers"] = job.workers
    else:
        torch.set_num_threads(job.workers)
    return Ours(server, make(people, **options), method.init_server(task.initial_model()))


def main() -> None:
    """Runs the job of the command line."""

    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--engine", default="loop", choices=list(ENGINES))
        parser.add_argument("--options", type=json.loads, default={})

    job, found = parse_job(add)
    one_thread()
    ours = make_ours(job, found.engine, found.options)
    run_rounds(job, ours.round, lambda: ours.state.model)


if __name__ == "__main__":
    main()

"""fedpriv through its Python API: the same rounds on one of its engines.

    python results/benchmarks/ours.py --workload cnn62k --engine vectorized --options '{"chunk": 10}'

`--options` go to the constructors of the task (`precision`, `channels_last`) and of the engine (`chunk`, ...), except
`noise`, which says how clients add theirs under local trust: `faithful` (each its own draw, the default), `fused` (one
draw for the sum of all) or `none`. Needs only torch and numpy, except for engines that need more.
"""

import argparse
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from workloads import CLASSES, CLIP_NORM, CONSTANT, SERVER_LR, Job, Workload, one_thread, parse_job, run_rounds

from fedpriv.data.dataset import Dataset
from fedpriv.data.federation import Federation
from fedpriv.engines import Engine, LoopEngine, Population, VectorizedEngine
from fedpriv.experiment.execution import choose_compute
from fedpriv.mechanisms.noise import Gaussian
from fedpriv.methods import DPFedAvg, has_memory
from fedpriv.privacy import FixedSize, make_plan
from fedpriv.rounds import ServerRules, begin_round, finish_round, make_agreement
from fedpriv.streams import SeededStreams
from fedpriv.tasks.local_work import FullGradient, LocalEpochs, LocalWork
from fedpriv.tasks.task import Task

TASK_OPTIONS = ("precision", "channels_last")


@dataclass(frozen=True)
class LocalEngine:
    """Makes the engine inside a worker of the Ray engine."""

    name: str
    options: dict[str, Any]

    def __call__(self, population: Population, device: torch.device) -> Engine:
        """See `RayEngine`."""
        return ENGINES[self.name](population.on(device), **self.options)


def ray_engine(population: Population, *, workers: int, local: str = "loop", unit: Any = "client") -> Engine:
    """Ray's processes on this machine; `local` is the engine inside them."""
    from fedpriv.engines.ray.engine import RayEngine

    return RayEngine(population, LocalEngine(local, {}), workers=workers, unit=unit)


def auto_engine(population: Population) -> Engine:
    """Return the engine that `--engine auto` chooses on one core: the faster on a first chunk."""
    clients = population.federation.population
    server = ServerRules(
        method=population.rules.method,
        sampling=FixedSize(clients, clients // 2),
        mechanism=Gaussian(0.0),
        streams=SeededStreams(0),
    )
    name, _ = choose_compute(population, server, population.task.initial_model())
    return ENGINES[name](population)


# Name to a function of a population and options. One more engine is one line.
ENGINES: dict[str, Callable[..., Engine]] = {
    "loop": LoopEngine,
    "vectorized": VectorizedEngine,
    "auto": auto_engine,
    "ray": ray_engine,
}


class ConstantTask(Task):
    """Clients that compute nothing: every gradient is the same constant."""

    def gradient(self, model: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
        """See `Task.gradient`."""
        return torch.full_like(model, CONSTANT)

    def gradients(self, models: Tensor, inputs: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
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
        """Run one round."""
        self.number += 1
        total = self.engine.sum_messages(begin_round(self.server, self.state, self.number))
        self.state = finish_round(self.server, self.state, self.number, total.sum)

    def close(self) -> None:
        """End the processes that the engine started."""
        getattr(self.engine, "close", lambda: None)()


def make_ours(job: Job, engine: str, options: dict[str, Any]) -> Ours:
    """Return the workload on the engine called `engine`."""
    workload = job.workload
    return build(
        kind=Task if workload.computes else ConstantTask,
        module=workload.module(ours=True),
        federation=federation_of(workload, job.seed),
        method=DPFedAvg(clip_norm=CLIP_NORM, server_lr=SERVER_LR),
        cohort=workload.cohort,
        noise_multiplier=workload.noise_multiplier,
        trust="local" if workload.local else "central",
        seed=job.seed,
        engine=engine,
        workers=job.workers,
        options=options,
        work=work_of(workload),
    )


def work_of(workload: Workload) -> LocalWork:
    """Return the local work."""
    if not workload.passes:
        return FullGradient()
    order = "reshuffled" if workload.shuffled else "fixed"
    return LocalEpochs(epochs=workload.passes, batch_size=workload.batch, client_lr=workload.client_lr, order=order)


def build(
    *,
    kind: type[Task] = Task,
    kind_of_population: type[Population] = Population,
    module: nn.Module,
    device: str = "cpu",
    federation: Any,
    method: Any,
    cohort: int,
    noise_multiplier: float,
    trust: str = "central",
    seed: int = 0,
    engine: str,
    workers: int = 1,
    options: dict[str, Any],
    work: LocalWork | None = None,
) -> Ours:
    """Return a server and an engine from their parts; `options` as on the command line."""
    for_task = {key: value for key, value in options.items() if key in TASK_OPTIONS}
    for_engine = {key: value for key, value in options.items() if key not in (*TASK_OPTIONS, "noise")}
    noise = options.get("noise", "faithful")
    sampling = FixedSize(population=federation.population, size=cohort)
    plan = make_plan(
        trust=trust,
        adjacency="add-or-remove",
        sampling=sampling,
        rounds=1,
        delta=1e-5,
        l2_bound=method.bounded.l2_bound,
        noise_multiplier=0.0 if noise == "none" else noise_multiplier,
        client_memory=has_memory(method),
    )
    streams = SeededStreams(seed)
    server, client, _ = make_agreement(method, sampling, plan, streams)
    task = kind(module, device, **for_task)
    people = kind_of_population(
        rules=client, task=task, federation=federation, work=work or FullGradient(), streams=streams
    )
    made = make_engine(people, engine, workers, for_engine, fused=noise == "fused" and client.noise_stddev > 0.0)
    return Ours(server, made, server.init(task.initial_model()))


def make_engine(people: Population, name: str, workers: int, options: dict[str, Any], *, fused: bool) -> Engine:
    """Return the engine; workers of an engine in one process are torch's threads."""
    make = ENGINES[name]
    if "workers" in inspect.signature(make).parameters:
        options = {**options, "workers": workers}
    else:
        torch.set_num_threads(workers)
    if not fused:
        return make(people, **options)
    from fedpriv.engines.fused_noise import FusedNoise, without_noise

    return FusedNoise(make(without_noise(people), **options), people.rules)


def main() -> None:
    """Run the job of the command line."""

    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--engine", default="loop", choices=list(ENGINES))
        parser.add_argument("--options", type=json.loads, default={})

    job, found = parse_job(add)
    one_thread()
    ours = make_ours(job, found.engine, found.options)
    run_rounds(job, ours.round, lambda: ours.state.model)
    ours.close()


if __name__ == "__main__":
    main()

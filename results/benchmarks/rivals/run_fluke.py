"""fluke: its centralized federated averaging, in memory; 0.8.1, unpatched. A simulation has one process.

It has no client-level privacy (its DP-FedAvg is example-level, by Opacus): clip, sum, noise and step are written into
its server. Its progress bars stay on, because its loop has no switch for them; they are drawn to nowhere.
"""

# ruff: noqa: E402 - fluke takes its terminal when it is imported

import os
import sys

import common
import torch
from workloads import CLASSES, CONSTANT, Clock, Job, Workload, flat, one_thread, parse_job, report

os.environ.setdefault("TERM", "dumb")
terminal, sys.stdout = sys.stdout, open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115

from fluke import FlukeENV
from fluke.algorithms.fedavg import FedAVG
from fluke.client import Client
from fluke.config import OptimizerConfigurator
from fluke.data import FastDataLoader
from fluke.server import Server


class PrivateServer(Server):
    """fluke's server with a private mean."""

    work: Workload

    @torch.no_grad()
    def aggregate(self, eligible, client_models) -> None:  # noqa: D102
        common.private_step(
            [p.data for p in self.model.parameters()],
            ([p.data for p in model.parameters()] for model in client_models),
            self.work,
        )


class ConstantClient(Client):
    """A client that computes nothing."""

    def fit(self, override_local_epochs: int = 0) -> float:
        """Move its model by a constant."""
        with torch.no_grad():
            torch._foreach_sub_([p.data for p in self.model.parameters()], CONSTANT)
        return 0.0


class Timer:
    """Marks the end of each round, and leaves when enough is measured."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def end_round(self, round: int) -> None:
        """See fluke's observers."""
        self._clock.tick()
        if self._clock.done():
            raise common.Enough

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda **_: None


def run(job: Job) -> None:
    """Run and report."""
    work, clock = job.workload, Clock(job)
    FlukeENV().set_seed(job.seed)
    FlukeENV().set_device("cpu")
    FlukeENV().set_inmemory(True)
    FlukeENV().set_eval_cfg(pre_fit=False, post_fit=False, server=False, locals=False)
    inputs, labels = work.data(job.seed)
    make_optimizer = OptimizerConfigurator(
        optimizer_cfg={"name": "SGD", "lr": 1.0}, scheduler_cfg={"name": "StepLR", "step_size": 1, "gamma": 1}
    )
    loaders = [
        FastDataLoader(x, y, num_labels=CLASSES, batch_size=work.examples, skip_singleton=False)
        for x, y in zip(inputs, labels, strict=True)
    ]
    kind = Client if work.computes else ConstantClient
    clients = [
        kind(number, loader, None, make_optimizer, torch.nn.CrossEntropyLoss(), local_epochs=1, persistency=False)
        for number, loader in enumerate(loaders)
    ]
    server = PrivateServer(work.module(), None, clients, weighted=False, lr=1.0)
    server.work = work
    algorithm = FedAVG(work.clients, None, {}, clients=clients, server=server)
    algorithm.attach(Timer(clock))
    start = flat(server.model)
    clock.tick()
    try:
        algorithm.run(10**5, work.cohort / work.clients)
    except common.Enough:
        sys.stdout = terminal
        report(job, clock.seconds, flat(server.model) - start)
        sys.stdout.flush()
        os._exit(0)


def main() -> None:
    """Run the job of the command line."""
    job, _ = parse_job()
    if job.workers != 1:
        raise SystemExit("absent: one process only")
    one_thread()
    run(job)


if __name__ == "__main__":
    main()

"""The yardstick: the same rounds in plain PyTorch, without a framework, on one process or several.

The model is one flat vector, and the module's parameters are its slices, so that nothing is copied in or out of it.
With several processes it is in shared memory, as is the sum of each process over its part of the cohort.
"""

import sys
from contextlib import suppress
from multiprocessing.connection import Connection

import torch
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.functional import cross_entropy
from workloads import CLIP_NORM, CONSTANT, SERVER_LR, Job, flat, one_thread, parse_job, run_rounds


class Worker:
    """Adds up the clipped gradients of the clients that it is given.

    Args:
        job: The work.
        model: `[params]`; the module's parameters become slices of it.
    """

    def __init__(self, job: Job, model: Tensor) -> None:
        self._work = job.workload
        self._inputs, self._labels = job.workload.data(job.seed)
        self._module = job.workload.module()
        self._parameters = list(self._module.parameters())
        self._constant = torch.full_like(model, CONSTANT)
        self._model = model
        self._local = model.clone() if job.workload.steps else model
        parts = self._local.split([parameter.numel() for parameter in self._parameters])
        for parameter, part in zip(self._parameters, parts, strict=True):
            parameter.data = part.view_as(parameter)

    def add(self, clients: list[int], total: Tensor) -> None:
        """Write the sum over `clients` into `total` `[params]`."""
        total.zero_()
        for client in clients:
            gradient = self._signal(client) if self._work.computes else self._constant
            norm = float(torch.linalg.vector_norm(gradient))
            total.add_(gradient, alpha=min(1.0, CLIP_NORM / norm) if norm > 0.0 else 0.0)
            if self._work.local and self._work.noise_stddev:
                total.add_(torch.randn_like(total), alpha=self._work.noise_stddev)

    def _signal(self, client: int) -> Tensor:
        """Return the client's gradient, or the way that it walks."""
        inputs, labels = self._inputs[client], self._labels[client]
        if not self._work.steps:
            return torch.cat([part.reshape(-1) for part in self._gradients(inputs, labels)])
        self._local.copy_(self._model)
        for batch in self._work.batches():
            gradients = self._gradients(inputs[batch], labels[batch])
            for parameter, gradient in zip(self._parameters, gradients, strict=True):
                parameter.data.sub_(gradient, alpha=self._work.client_lr)
        return self._model - self._local

    def _gradients(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(cross_entropy(self._module(inputs), labels), self._parameters)


class Ideal:
    """The server, which is also the first worker."""

    def __init__(self, job: Job) -> None:
        self._work = job.workload
        self.model = flat(job.workload.module()).share_memory_()
        self._totals = torch.zeros(job.workers, len(self.model)).share_memory_()
        self._worker = Worker(job, self.model)
        self._generator = torch.Generator().manual_seed(job.seed)
        self._helpers = [self._start(job, number) for number in range(1, job.workers)]

    def round(self) -> None:
        """Run one round."""
        work = self._work
        cohort = torch.randperm(work.clients, generator=self._generator)[: work.cohort].tolist()
        for number, helper in enumerate(self._helpers, start=1):
            helper.send(cohort[number :: len(self._totals)])
        self._worker.add(cohort[:: len(self._totals)], self._totals[0])
        for helper in self._helpers:
            helper.recv()
        total = self._totals.sum(dim=0) if self._helpers else self._totals[0]
        if work.noise_stddev and not work.local:
            total = total.add_(torch.randn_like(total), alpha=work.noise_stddev)
        self.model.sub_(total, alpha=SERVER_LR / work.cohort)

    def _start(self, job: Job, number: int) -> Connection:
        ours, theirs = mp.Pipe()
        mp.Process(target=_help, args=(theirs, job, self.model, self._totals[number]), daemon=True).start()
        theirs.close()
        return ours


def _help(orders: Connection, job: Job, model: Tensor, total: Tensor) -> None:
    """Run a further process, which adds up the clients that it receives."""
    one_thread()
    worker = Worker(job, model)
    with suppress(EOFError):
        while True:
            worker.add(orders.recv(), total)
            orders.send(None)


def main() -> None:
    """Run the job of the command line."""
    job, _ = parse_job()
    one_thread()
    mp.set_start_method("spawn")
    ideal = Ideal(job)
    run_rounds(job, ideal.round, lambda: ideal.model)
    sys.exit(0)


if __name__ == "__main__":
    main()

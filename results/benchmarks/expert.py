"""An expert's rounds of equal work: plain PyTorch with effort, for one model and one machine.

The messages have the same bound and are added in float64 on the same kind of grid as fedpriv's, and the noise is
float64. Dense networks take all clients of a cohort in batched products; convolutional networks take one client after
the other, with channels innermost. Local steps change the clients' models in place.
"""

import math
import sys

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear
from workloads import CLIP_NORM, SERVER_LR, Job, flat, one_thread, parse_job, run_rounds

MAX_FLOATS = 2**22
"""Most floats of inputs in one batched product."""


class Expert:
    """A server, and the clients that it has in its memory.

    Args:
        job: The work; one worker.
    """

    def __init__(self, job: Job) -> None:
        self._work, self._generator = job.workload, torch.Generator().manual_seed(job.seed)
        self._inputs, self._labels = job.workload.data(job.seed)
        self._module = job.workload.module()
        self._parameters = list(self._module.parameters())
        self.model = flat(self._module)
        self._local = self.model.clone() if job.workload.steps else self.model
        parts = self._local.split([parameter.numel() for parameter in self._parameters])
        for parameter, part in zip(self._parameters, parts, strict=True):
            parameter.data = part.view_as(parameter)
        self._shift = 1.5 * 2.0**52 * 2.0 ** (math.ceil(math.log2(CLIP_NORM * job.workload.cohort)) - 51)
        if not job.workload.source.dense:
            strided = torch.empty(self._inputs.flatten(0, 1).shape, memory_format=torch.channels_last)
            self._inputs = strided.copy_(self._inputs.flatten(0, 1)).unflatten(0, self._inputs.shape[:2])

    def round(self) -> None:
        """Run one round."""
        work = self._work
        cohort = torch.randperm(work.clients, generator=self._generator)[: work.cohort].sort().values
        total = torch.zeros(len(self.model), dtype=torch.float64)
        if work.source.dense:
            floats = work.examples * self._inputs[0, 0].numel()
            for few in cohort.split(max(MAX_FLOATS // floats, 1)):
                self._add(self._signals(few), total)
        else:
            for client in cohort.tolist():
                self._add(self._signal(client).unsqueeze(0), total)
        if work.noise_stddev:
            total.add_(torch.randn(len(total), dtype=torch.float64), alpha=work.noise_stddev)
        self.model.sub_(total.float(), alpha=SERVER_LR / work.cohort)

    def _add(self, signals: Tensor, total: Tensor) -> None:
        """Bound the rows of `signals` `[clients, params]`, and add them to `total` on the grid, few at a time."""
        for rows in signals.split(max(2**16 // len(total), 1)):
            norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64, keepdim=True)
            rows = rows.mul_((CLIP_NORM / norms).clamp_(max=1.0)).double()
            total += rows.add_(self._shift).sub_(self._shift).sum(dim=0)

    def _signal(self, client: int) -> Tensor:
        """Return the gradient or the walk of one client, `[params]`."""
        inputs, labels = self._inputs[client], self._labels[client]
        if not self._work.steps:
            return torch.cat([part.reshape(-1) for part in self._gradients(inputs, labels)])
        self._local.copy_(self.model)
        for batch in self._work.batches():
            gradients = self._gradients(inputs[batch], labels[batch])
            torch._foreach_sub_([p.data for p in self._parameters], gradients, alpha=self._work.client_lr)
        return self.model - self._local

    def _gradients(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(cross_entropy(self._module(inputs), labels), self._parameters)

    def _signals(self, cohort: Tensor) -> Tensor:
        """Return the gradients or the walks of all clients of a dense network, `[clients, params]`."""
        first, last = int(cohort[0]), int(cohort[-1])
        chosen = slice(first, last + 1) if last - first + 1 == len(cohort) else cohort  # neighbors are not copied
        inputs, labels = self._inputs[chosen].flatten(2), self._labels[chosen]
        if not self._work.steps:
            return self._dense(self.model, inputs, labels)
        models, whole = self.model.repeat(len(cohort), 1), self._work.batch is None
        orders = [] if whole else [self._work.batches() for _ in range(len(cohort))]
        for step in range(self._work.steps):
            x, y = inputs, labels
            if not whole:
                at = torch.stack([batches[step] for batches in orders])
                x, y = x.gather(1, at.unsqueeze(2).expand(-1, -1, x.shape[2])), y.gather(1, at)
            models.sub_(self._dense(models, x, y), alpha=self._work.client_lr)
        return self.model - models

    def _layers(self, vectors: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return views of weights and biases of `vectors` `[..., params]`."""
        found, start = [], 0
        for weight, bias in zip(self._parameters[::2], self._parameters[1::2], strict=True):
            middle, end = start + weight.numel(), start + weight.numel() + len(bias)
            found.append((vectors[..., start:middle].unflatten(-1, weight.shape), vectors[..., middle:end]))
            start = end
        return found

    def _dense(self, models: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
        """Return the gradients `[clients, params]` of dense layers at one model or one for each client."""
        layers, below = self._layers(models), [inputs]
        for weight, bias in layers:
            above = linear(below[-1], weight, bias) if models.dim() == 1 else _affine(below[-1], weight, bias)
            below.append(above.relu_() if len(below) < len(layers) else above)
        slope = below.pop().softmax(dim=-1)
        slope.scatter_add_(2, labels.unsqueeze(2), torch.full((*labels.shape, 1), -1.0)).div_(labels.shape[1])
        found = inputs.new_empty((len(inputs), len(self.model)))
        for (weight, _), (weight_part, bias_part) in zip(layers[::-1], self._layers(found)[::-1], strict=True):
            values = below.pop()
            torch.bmm(slope.transpose(1, 2), values, out=weight_part)
            torch.sum(slope, dim=1, out=bias_part)
            if below:
                slope = (slope @ weight).mul_(values > 0)
        return found


def _affine(below: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.baddbmm(bias.unsqueeze(1), below, weight.transpose(1, 2))


def main() -> None:
    """Run the job of the command line."""
    job, _ = parse_job()
    one_thread()
    torch.manual_seed(job.seed)
    expert = Expert(job)
    run_rounds(job, expert.round, lambda: expert.model)
    sys.exit(0)


if __name__ == "__main__":
    main()

"""JAX: a round of equal work, compiled by XLA; written by us, since JAX is no federated framework.

Dense networks take the whole cohort in one vectorized gradient. Convolutions take one client after the other, with
channels innermost: in a loop of XLA (`lax.scan`), its convolutions were a hundred times as slow. The bound, the grid
and the noise are those of `expert.py`: norms, sum and noise in float64. `--turns` answers each number on the standard
input, which is a number of rounds, with the processor time of one: `ratios.py` asks by turns.
"""

import math
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import common  # noqa: F401 - the way to `workloads`
import torch
from torch import Tensor, nn
from workloads import CLIP_NORM, SERVER_LR, Job, flat, one_thread, parse_job, run_rounds

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
from jax import lax

jax.config.update("jax_enable_x64", True)

Array = Any
Layer = Callable[[Array, Array], Array]


class Forward:
    """The logits of a torch network as a function of its flat parameters and one client's inputs.

    Args:
        module: `Sequential` of linear layers, convolutions, ReLU, pooling and flattening.
    """

    def __init__(self, module: nn.Module) -> None:
        self._layers: list[Layer] = []
        self._end = 0
        for layer in module.children():
            self._layers.append(self._of(layer))

    def __call__(self, model: Array, inputs: Array) -> Array:
        """Return the logits `[examples, classes]` of `model` `[params]`."""
        for layer in self._layers:
            inputs = layer(model, inputs)
        return inputs

    def _part(self, shape: torch.Size) -> Callable[[Array], Array]:
        start, self._end = self._end, self._end + math.prod(shape)
        end = self._end
        return lambda model: model[start:end].reshape(tuple(shape))

    def _of(self, layer: nn.Module) -> Layer:
        if isinstance(layer, nn.Linear):
            weight, bias = self._part(layer.weight.shape), self._part(layer.bias.shape)
            return lambda model, x: x @ weight(model).T + bias(model)
        if isinstance(layer, nn.Conv2d):
            weight, bias = self._part(layer.weight.shape), self._part(layer.bias.shape)
            pads = [(side, side) for side in layer.padding]
            order = ("NHWC", "HWIO", "NHWC")

            def convolution(model: Array, x: Array) -> Array:
                kernel = weight(model).transpose(2, 3, 1, 0)
                return lax.conv_general_dilated(x, kernel, (1, 1), pads, dimension_numbers=order) + bias(model)

            return convolution
        if isinstance(layer, nn.MaxPool2d):
            return _pooled
        if isinstance(layer, nn.ReLU):
            return lambda _, x: jax.nn.relu(x)
        return lambda _, x: (x if x.ndim == 2 else x.transpose(0, 3, 1, 2)).reshape(len(x), -1)


def _pooled(_: Array, x: Array) -> Array:
    """Pool windows of two by two; on a CPU, this is faster than `lax.reduce_window`."""
    count, height, width, channels = x.shape
    x = x.reshape(count, height // 2, 2, width // 2, 2, channels)
    return jnp.maximum(jnp.maximum(x[:, :, 0, :, 0], x[:, :, 0, :, 1]), jnp.maximum(x[:, :, 1, :, 0], x[:, :, 1, :, 1]))


class Rounds:
    """A server, and the clients that it has in its memory.

    Args:
        job: The work; one worker.
    """

    def __init__(self, job: Job) -> None:
        self._work = work = job.workload
        self._generator = torch.Generator().manual_seed(job.seed)
        inputs, labels = work.data(job.seed)
        inputs = inputs.flatten(2) if work.source.dense else inputs.permute(0, 1, 3, 4, 2).contiguous()
        self._inputs, self._labels = jnp.asarray(inputs.numpy()), jnp.asarray(labels.numpy())
        module = work.module()
        self._forward = Forward(module)
        self._model = jnp.asarray(flat(module).numpy())
        self._key = jax.random.key(job.seed)
        self._shift = 1.5 * 2.0**52 * 2.0 ** (math.ceil(math.log2(CLIP_NORM * work.cohort)) - 51)
        self._cohort_sum = jax.jit(self._sum_of_cohort)
        self._one_more = jax.jit(self._sum_with_one_more, donate_argnums=0)
        self._moved = jax.jit(self._moved_model, donate_argnums=0)

    @property
    def model(self) -> Tensor:
        """The model now, `[params]`."""
        return torch.from_numpy(jax.device_get(self._model).copy())

    def round(self) -> None:
        """Run one round."""
        work = self._work
        cohort = torch.randperm(work.clients, generator=self._generator)[: work.cohort]
        self._key, key = jax.random.split(self._key)
        orders = None
        if work.steps and work.batch is not None:
            batches = [work.batches() for _ in cohort]
            orders = jnp.asarray(torch.stack([torch.stack(some) for some in batches]).numpy())
        if work.source.dense:
            total = self._cohort_sum(self._model, self._inputs, self._labels, jnp.asarray(cohort.numpy()), orders)
        else:
            total = jnp.zeros(len(self._model), jnp.float64)
            for row, client in enumerate(cohort.tolist()):
                order = None if orders is None else orders[row]
                total = self._one_more(total, self._model, self._inputs, self._labels, client, order)
        self._model = self._moved(self._model, total, key).block_until_ready()

    def _sum_of_cohort(self, model: Array, inputs: Array, labels: Array, cohort: Array, orders: Array | None) -> Array:
        axes = (None, 0, 0, None if orders is None else 0)
        signals = jax.vmap(self._signal, axes)(model, inputs[cohort], labels[cohort], orders)
        return jax.vmap(self._bounded)(signals).sum(axis=0)

    def _sum_with_one_more(
        self, total: Array, model: Array, inputs: Array, labels: Array, client: Array, order: Array | None
    ) -> Array:
        return total + self._bounded(self._signal(model, inputs[client], labels[client], order))

    def _moved_model(self, model: Array, total: Array, key: Array) -> Array:
        work = self._work
        if work.noise_stddev:
            total += work.noise_stddev * jax.random.normal(key, total.shape, jnp.float64)
        return model - (SERVER_LR / work.cohort * total).astype(model.dtype)

    def _signal(self, model: Array, inputs: Array, labels: Array, order: Array | None) -> Array:
        """Return the gradient or the walk of one client, `[params]`."""
        slope, work = jax.grad(self._loss), self._work
        if not work.steps:
            return slope(model, inputs, labels)
        whole = order is None
        if work.source.dense:  # the steps are a loop of XLA
            steps = jnp.zeros(work.steps) if whole else order

            def step(local: Array, at: Array) -> tuple[Array, None]:
                some = (inputs, labels) if whole else (inputs[at], labels[at])
                return local - work.client_lr * slope(local, *some), None

            return model - lax.scan(step, model, steps)[0]
        local = model
        for number in range(work.steps):  # convolutions are slow within such a loop
            some = (inputs, labels) if whole else (inputs[order[number]], labels[order[number]])
            local = local - work.client_lr * slope(local, *some)
        return model - local

    def _loss(self, model: Array, inputs: Array, labels: Array) -> Array:
        logits = self._forward(model, inputs)
        chosen = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
        return (jax.nn.logsumexp(logits, axis=1) - chosen).mean()

    def _bounded(self, signal: Array) -> Array:
        """Return a signal `[params]` with its bound, on the grid."""
        exact = signal.astype(jnp.float64)
        norm = jnp.sqrt(jnp.vdot(exact, exact))
        return (exact * jnp.minimum(1.0, CLIP_NORM / norm) + self._shift) - self._shift


def main() -> None:
    """Run the job of the command line."""
    job, found = parse_job(lambda parser: parser.add_argument("--turns", action="store_true"))
    one_thread()
    torch.manual_seed(job.seed)
    rounds = Rounds(job)
    if not found.turns:
        run_rounds(job, rounds.round, lambda: rounds.model)
        return
    for line in sys.stdin:
        start = time.process_time()
        for _ in range(int(line)):
            rounds.round()
        print((time.process_time() - start) / int(line), flush=True)


if __name__ == "__main__":
    main()

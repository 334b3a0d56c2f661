"""The learning task: a module as a function of one flat vector, and its losses on labeled examples."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, partial, reduce
from math import prod
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fedpriv.bounding import Bounded, Clip
from fedpriv.checks import one_of
from fedpriv.tasks.adapters.staged import AdaptedModule, frozen_digest
from fedpriv.tasks.convolution import DirectConv2d
from fedpriv.tasks.dense import DenseLayers
from fedpriv.tasks.kinds import Classification, TaskKind
from fedpriv.tasks.metrics import meter_of
from fedpriv.tasks.per_example import PerExample, cross_entropies
from fedpriv.vectors import Layout, trainable

__all__ = ["MAX_PIECE_FLOATS", "PRECISIONS", "Forward", "Precision", "Task"]

Precision = Literal["float32", "bfloat16"]
"""The format of products; see `Task`."""

PRECISIONS: tuple[Precision, ...] = get_args(Precision)

Forward = Callable[[Tensor, Tensor, int], Iterable[Tensor]]
"""Like `Task.outputs`: the outputs of pieces of some examples, of a model `[params]` and inputs."""

# Most floats of inputs that go through the module at once. Activations are many times larger, so full gradients of
# thousands of images are summed piece by piece. The pieces affect rounding; they are the same in every engine.
MAX_PIECE_FLOATS = 2**22
# Most floats of one layer's outputs in an evaluation: 32 MB. For larger blocks, the C library asks the system
# for memory at every use, which has to be cleared, and they do not fit a processor's cache.
_MAX_OUTPUT_FLOATS = 8_000_000


class Task:
    """A module and a loss. The flat model vector holds its trainable parameters; frozen ones never change.

    Args:
        module: Maps inputs `[examples, *input_shape]` to outputs `[examples, ...]`, such as logits
            `[examples, classes]`; no layer keeps statistics of examples.
        device: The device for gradients.
        channels_last: Store images with channels innermost, which is faster for convolutions on CPUs. Gradients are
            equal up to rounding (which occasionally changes the maximum of a pooling window).
        precision: `float32`, or `bfloat16` for products in that format: gradient errors reach a tenth of their length.
        kind: The losses and the metrics; None for plain classification.
    """

    def __init__(
        self,
        module: nn.Module,
        device: torch.device | str = "cpu",
        *,
        channels_last: bool = False,
        precision: Precision = "float32",
        kind: TaskKind | None = None,
    ) -> None:
        one_of("--precision", precision, PRECISIONS)
        self.layout = Layout.of_module(module)
        self.device = torch.device(device)
        self.kind = kind or Classification()
        self._module = module.to(self.device)
        parameters = trainable(self._module)
        self._parameters = list(parameters.values())
        self._initial = self.layout.flatten(parameters).detach().cpu().clone()
        self._loaded: Tensor | None = None
        self._widths: dict[tuple[int, ...], int] = {}
        self._channels_last = channels_last
        self._precision: Precision = precision
        losses = None if self.kind.plain else self.kind.losses
        dense = DenseLayers.of_module(module, losses) if precision == "float32" else None
        self.dense = dense if dense is not None and dense.size == self.layout.size else None

    def initial_model(self) -> Tensor:
        """Return the module's first parameters as a vector `[params]` on the CPU."""
        return self._initial.clone()

    def on(self, device: torch.device) -> "Task":
        """Return the same task on another device."""
        if device == self.device:
            return self
        module = copy.deepcopy(self._module)
        for name, parameter in trainable(module).items():
            parameter.data = self.layout.unflatten(self._initial)[name].clone()
        return Task(module, device, channels_last=self._channels_last, precision=self._precision, kind=self.kind)

    def logits(self, model: Tensor, inputs: Tensor) -> Tensor:
        """Return outputs `[examples, ...]` of the model `[params]` on inputs."""
        parameters = self.layout.unflatten(model)
        return self._in_precision(lambda: functional_call(self._module, parameters, (inputs,)))

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of each example `[examples]`, which depends on no other example; see `TaskKind.losses`."""
        if self.kind.plain:
            return F.cross_entropy(outputs, labels, reduction="none")
        return self.kind.losses(outputs, labels)

    def loss(self, model: Tensor, inputs: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum of the examples' losses; `weights` `[examples]` of 1/m each give the mean."""
        return (self.losses(self.logits(model, inputs), labels) * weights).sum()

    def example_losses(self, model: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of each example under the model `[params]`, `[examples]`."""
        self._load(model)
        with torch.no_grad():
            pieces = _pieces(_width(inputs, 1), inputs, labels) if len(labels) else ()
            return torch.cat([labels.new_zeros(0), *(self.losses(self._forward(x), y) for x, y in pieces)])

    def gradient(self, model: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
        """Return the gradient `[params]` of the mean loss over the examples; zero if there are none."""
        if len(labels) == 0:
            return torch.zeros_like(model)
        self._load(model)
        pieces = _pieces(_width(inputs, 1), inputs, labels)
        return reduce(torch.add, (self._gradient_of_part(x, y, len(labels)) for x, y in pieces))

    def _gradient_of_part(self, inputs: Tensor, labels: Tensor, examples: int) -> Tensor:
        """Return these inputs' part `[params]` of the gradient of the mean loss over `examples`."""
        outputs = self._forward(inputs)
        loss = F.cross_entropy(outputs, labels) if self.kind.plain else self.losses(outputs, labels).mean()
        if len(labels) < examples:
            loss = loss * (len(labels) / examples)
        parts = torch.autograd.grad(loss, self._parameters, allow_unused=True, materialize_grads=True)
        return torch.cat([part.reshape(-1) for part in parts])

    def _forward(self, inputs: Tensor) -> Tensor:
        """Return the logits of the loaded model."""
        if self._channels_last and inputs.dim() == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        return self._in_precision(lambda: self._module(inputs))

    def _in_precision(self, forward: Callable[[], Tensor]) -> Tensor:
        """Return the logits of `forward`, float32, with products computed in the task's precision."""
        if self._precision == "float32":
            return forward()
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            return forward().float()

    @property
    def kept_floats(self) -> int:
        """Number of floats of one example's activations that never change, which `lower` returns; 0 for none."""
        return self._module.kept_floats if isinstance(self._module, AdaptedModule) else 0

    @cached_property
    def frozen_digest(self) -> str | None:
        """A SHA-256 of the weights that are not trained; None if there are none."""
        return frozen_digest(self._module)

    @property
    def lower_key(self) -> tuple[object, ...]:
        """A key that is equal for tasks whose `lower` returns the same tensors, to the bit."""
        digest = self._module.lower_digest if isinstance(self._module, AdaptedModule) else None
        return digest, self.device, self._precision

    def lower(self, inputs: Tensor) -> Tensor:
        """Return the activations `[examples, ...]` below the first trained parameter, which may replace the inputs.

        Inputs `[examples, *input_shape]` are returned as they are if there are none.
        """
        module = self._module
        if not isinstance(module, AdaptedModule) or self.kept_floats == 0 or not len(inputs):
            return inputs
        pieces = _pieces(max(_width(inputs, 1), self.kept_floats), inputs)
        return torch.cat([self._in_precision(partial(module.lower, x.to(self.device))) for (x,) in pieces])

    def _load(self, model: Tensor) -> None:
        """Make the module's parameters views of `model`, so that nothing is copied."""
        if self._loaded is not model:
            views = self.layout.unflatten(model.detach()).values()
            for parameter, view in zip(self._parameters, views, strict=True):
                parameter.data = view
            self._loaded = model

    def gradients(self, models: Tensor, inputs: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """Return the gradients `[clients, params]` of many clients' weighted losses at once.

        Args:
            models: `[params]` if all clients have the same model, otherwise `[clients, params]`.
            inputs: `[clients, examples, *input_shape]`.
            labels: `[clients, examples]`.
            weights: `[clients, examples]`; zero for padding.
        """
        if self.dense is not None:
            if inputs.numel() <= MAX_PIECE_FLOATS:
                return self.dense.gradients(models, inputs, labels, weights)
            pieces = _pieces(_width(inputs, 2) * len(inputs), inputs, labels, weights, dim=1)
            return reduce(torch.add, (self.dense.gradients(models, x, y, w) for x, y, w in pieces))
        by_client = 0 if models.dim() == 2 else None
        batched = vmap(grad(self.loss), in_dims=(by_client, 0, 0, 0))
        pieces = _pieces(_width(inputs, 2) * len(inputs), inputs, labels, weights, dim=1)
        return reduce(torch.add, (batched(models, x, y, w) for x, y, w in pieces))

    @property
    def dtype(self) -> torch.dtype:
        """Number format of models."""
        return self._initial.dtype

    def clipped_sum(self, model: Tensor, inputs: Tensor, labels: Tensor, bound: Bounded) -> Tensor:
        """Return the sum of the bounded gradients of all examples, float64 `[params]`; see `tasks.per_example`.

        Args:
            model: `[params]`.
            inputs: `[examples, *input_shape]`; there may be none.
            labels: `[examples]`.
            bound: Applied to the gradient of each example's own loss.

        Raises:
            UserError: If a layer mixes examples.
        """
        self._load(model)
        return self._per_example.clipped_sum(inputs, labels, bound)

    def clipped_change(self, at: Tensor, before: Tensor, inputs: Tensor, labels: Tensor, radius: float) -> Tensor:
        """Return the sum of the examples' clipped changes of gradient, float64 `[params]`.

        Each change, gradient at `at` minus gradient at `before`, is divided by `radius` and then clipped to 1. One that
        is not finite counts as zero. Gradients are computed one by one.

        Args:
            at: `[params]`.
            before: `[params]`.
            inputs: `[examples, *input_shape]`; there may be none.
            labels: `[examples]`.
            radius: Above 0.

        Raises:
            UserError: If a layer mixes examples.
        """
        total = torch.zeros(self.layout.size, dtype=torch.float64, device=inputs.device)
        for x, y in _pieces(self.layout.size, inputs, labels) if len(labels) else ():
            self._per_example.is_fast(x, y)  # raises if a layer mixes examples
            self._load(before)
            earlier = self._per_example.rows(x, y).double()
            self._load(at)
            moved = (self._per_example.rows(x, y).double() - earlier) / radius
            total += Clip(clip_norm=1.0)(moved).sum(dim=0)
        return total

    @cached_property
    def _per_example(self) -> PerExample:
        return PerExample(self._module, self.layout, cross_entropies if self.kind.plain else self.losses)

    def operations(self, inputs: Tensor) -> int:
        """Estimate the floating-point operations of computing logits: two for each use of a weight.

        The estimate comes from the layers' weights and outputs; each parameter counts as used at least once. PyTorch's
        own counter takes more than a second to start.

        Args:
            inputs: `[examples, *input_shape]`.
        """
        found = 0

        def count(layer: nn.Module, _: object, output: Tensor) -> None:
            nonlocal found
            weight = dict(layer.named_parameters(recurse=False)).get("weight")
            if weight is not None:
                found += 2 * weight.numel() * (output.numel() // weight.shape[0])

        hooks = [layer.register_forward_hook(count) for layer in self._module.modules()]
        try:
            with torch.no_grad():
                self._module(inputs.to(self.device))
        finally:
            for hook in hooks:
                hook.remove()
        return max(found, 2 * self.layout.size * len(inputs))

    def evaluate(
        self, model: Tensor, inputs: Tensor, labels: Tensor, forward: Forward | None = None
    ) -> dict[str, float]:
        """Return the mean `loss` and the metrics, by name, of the model `[params]` on labeled examples.

        For classification, these are `accuracy` (0 to 1) and `loss` (nats).

        Args:
            model: x, `[params]`.
            inputs: `[examples, *input_shape]`.
            labels: `[examples]`.
            forward: Computes the outputs elsewhere; None for `outputs` here.
        """
        loss, meters = 0.0, {metric.name: meter_of(metric, self.kind) for metric in self.kind.measured}
        with torch.no_grad():
            self._load(model.to(self.device))
            size = max(MAX_PIECE_FLOATS // self._evaluation_width(inputs), 1)
            found = (forward or self.outputs)(model, inputs, size)
            for outputs, y in zip(found, labels.split(size), strict=True):
                outputs, y = outputs.to(self.device), y.to(self.device)
                if self.kind.plain:
                    loss += float(F.cross_entropy(outputs, y, reduction="sum").double())
                else:
                    loss += float(self.losses(outputs, y).double().sum())
                for meter in meters.values():
                    meter.update(outputs, y)
        return {**{name: meter.value() for name, meter in meters.items()}, "loss": loss / len(labels)}

    @torch.no_grad()
    def outputs(self, model: Tensor, inputs: Tensor, size: int) -> Iterator[Tensor]:
        """Yield the outputs `[size, ...]` of pieces of `size` examples, the last one of the rest; without gradients.

        On a CPU, convolutions of torch take images with channels innermost here, also without `channels_last`: it is
        faster, and logits are equal up to rounding. Modules of others may contain views that need the usual order.

        Args:
            model: x, `[params]`.
            inputs: `[examples, *input_shape]`, on any device.
            size: Examples in one piece, at least 1.
        """
        self._load(model.to(self.device))
        for x in inputs.split(size):
            yield self._forward(self._for_evaluation(x.to(self.device))).contiguous()

    @cached_property
    def _takes_channels_last(self) -> bool:
        known = all(
            type(layer).__module__.partition(".")[0] in ("torch", "fedpriv") for layer in self._module.modules()
        )
        convolutions = [layer for layer in self._module.modules() if isinstance(layer, nn.Conv2d)]
        direct = DirectConv2d if self._precision == "float32" else ()
        return known and any(not isinstance(layer, direct) or layer.form is None for layer in convolutions)

    def _for_evaluation(self, inputs: Tensor) -> Tensor:
        if inputs.dim() != 4 or self.device.type != "cpu" or not self._takes_channels_last:
            return inputs
        # A copy: with one channel, `contiguous` would keep the strides by which torch chooses its kernels.
        return torch.empty(inputs.shape, dtype=inputs.dtype, memory_format=torch.channels_last).copy_(inputs)

    def _evaluation_width(self, inputs: Tensor) -> int:
        """Return the floats of one example that a piece should count in an evaluation; call it without gradients."""
        width, shape = _width(inputs, 1), tuple(inputs.shape[1:])
        if shape not in self._widths:
            few = torch.zeros((2, *shape), dtype=inputs.dtype, device=self.device)
            self._widths[shape] = _widest_output(self._module, partial(self._forward, few)) // len(few)
        return max(width, math.ceil(self._widths[shape] * (MAX_PIECE_FLOATS / _MAX_OUTPUT_FLOATS)))


def _widest_output(module: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Return the number of elements of the largest output of a layer."""
    found = [0]

    def count(_: nn.Module, __: object, output: object) -> None:
        if isinstance(output, Tensor):
            found.append(output.numel())

    hooks = [layer.register_forward_hook(count) for layer in module.modules()]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    return max(found)


def _width(inputs: Tensor, lead: int) -> int:
    """Return the number of floats of one example, behind `lead` leading axes."""
    return max(prod(inputs.shape[lead:]), 1)


def _pieces(width: int, *tensors: Tensor, dim: int = 0) -> Iterator[tuple[Tensor, ...]]:
    """Yield slices of tensors along `dim`, at least one, of at most `MAX_PIECE_FLOATS` / `width` examples each."""
    size = max(MAX_PIECE_FLOATS // width, 1)
    return zip(*(tensor.split(size, dim) for tensor in tensors), strict=True)

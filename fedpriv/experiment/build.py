"""Build the parts of an experiment from its config: data, model, the two halves of the agreement, a plan."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fedpriv.checks import refuse_beyond_memory, shown
from fedpriv.clock import Timeline
from fedpriv.data.augment import Augmentation
from fedpriv.data.dataset import Dataset
from fedpriv.data.federation import Holders, shifted, spread
from fedpriv.data.labels import labels_as
from fedpriv.data.validation import evaluated_on, hold_out
from fedpriv.engines import Population
from fedpriv.errors import UserError, nearest
from fedpriv.experiment.config import Config
from fedpriv.experiment.timing import make_timeline, sampling_under
from fedpriv.privacy import PrivacyPlan, Sampling
from fedpriv.rounds import Agreement, ClientRules, ServerRules, make_agreement
from fedpriv.streams import Purpose, SeededStreams
from fedpriv.tasks.adapters.kept import MAX_KEPT_FLOATS
from fedpriv.tasks.kinds import check_losses
from fedpriv.tasks.own import OwnModule
from fedpriv.tasks.task import Forward, Precision, Task
from fedpriv.vectors import trainable

__all__ = [
    "Experiment",
    "assemble",
    "assemble_clients",
    "build_module",
    "check_device",
    "check_device_name",
    "check_task",
    "count_parameters",
    "fewest_examples",
    "make_federation",
    "plan_of",
    "sampling_of",
    "task_of",
]


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that a run needs, built from its config.

    Args:
        config: The experiment.
        population: The clients.
        server: The server's half of the agreement.
        plan: The privacy plan; None for a non-private run.
        initial_model: x before the first round, `[params]`.
        timeline: The clients that count in each step of the virtual clock; None without a clock.
    """

    config: Config
    population: Population
    server: ServerRules
    plan: PrivacyPlan | None
    initial_model: Tensor
    timeline: Timeline | None = None

    @property
    def agreement(self) -> Agreement:
        """The rules that server and clients follow."""
        return Agreement(self.server, self.population.rules, self.plan)

    def evaluate(self, model: Tensor, forward: Forward | None = None) -> dict[str, float]:
        """Return the loss and the metrics of a model `[params]` on test examples; empty for an analysis.

        See `Task.evaluate`.
        """
        if not self.config.learns:
            return {}
        dataset = self.population.federation.dataset
        inputs = self._lowered("test", dataset.test_inputs)
        return self.population.task.evaluate(model, inputs, dataset.test_labels, forward)

    def _lowered(self, name: str, inputs: Tensor) -> Tensor:
        """Return public inputs, or their activations if these never change and fit; see `Task.lower`."""
        fits = len(inputs) * self.population.task.kept_floats <= MAX_KEPT_FLOATS
        return self.population.kept.of(name, inputs) if fits else inputs

    def validate(self, model: Tensor, forward: Forward | None = None) -> dict[str, float] | None:
        """Return the same on the validation examples; None if none are held out."""
        dataset = self.population.federation.dataset
        if dataset.validation_inputs is None or dataset.validation_labels is None or not self.config.learns:
            return None
        inputs = self._lowered("validation", dataset.validation_inputs)
        return self.population.task.evaluate(model, inputs, dataset.validation_labels, forward)

    def with_method(self, config: Config) -> "Experiment":
        """Return an experiment with the same data, model and cohorts, and another config's method and privacy."""
        federation, sampling, timeline = self.population.federation, self.server.sampling, self.timeline
        if timeline is not None:
            timeline = make_timeline(config, federation, self.population.task.layout.size)
            sampling = sampling_under(config, federation.population, timeline)
        size = self.population.task.layout.size
        plan = config.plan(sampling, fewest_examples(config, federation), size)
        streams = config.streams
        agreed = make_agreement(config.method, sampling, plan, streams, config.controller)
        population = replace(self.population, rules=agreed.client, streams=streams)
        return replace(self, config=config, population=population, server=agreed.server, plan=plan, timeline=timeline)


def make_federation(config: Config, data_root: Path | None = None) -> Holders:
    """Load the data and split them among the clients, as the config and its seed say."""
    choice, streams = config.data, SeededStreams(config.seed)
    with labels_as(config.task.labels):
        dataset, rng = choice.dataset.load(data_root), streams.source(Purpose.PARTITION).rng
    if choice.test is not None:
        dataset = evaluated_on(dataset, choice.test, choice.validation, rng)
    elif choice.validation is not None:
        dataset = hold_out(replace(dataset, groups=None), choice.validation)
    federation = spread(dataset, choice.partition, choice.clients, rng)
    return federation if choice.shift is None else shifted(federation, choice.shift, streams)


def fewest_examples(config: Config, federation: Holders) -> int | None:
    """Return the number of examples of the client with the fewest, if the config's plan depends on it."""
    if not config.needs_sizes:
        return None
    sizes = np.asarray(federation.sizes)
    return int(sizes[sizes > 0].min(initial=int(sizes.max(initial=1))))


def plan_of(config: Config, sampling: Sampling, data_root: Path | None = None) -> PrivacyPlan | None:
    """Return the config's plan; read the data only if it depends on them: on numbers of examples, or on their shape."""
    if not config.needs_sizes and not config.sums_securely:
        return config.plan(sampling)
    federation = make_federation(config, data_root)
    size = task_of(config, federation, "cpu").layout.size if config.sums_securely else None
    return config.plan(sampling, fewest_examples(config, federation), size)


def _check_labels(config: Config, dataset: Dataset) -> None:
    """Raise UserError, naming the first row, unless the labels suit the task."""
    kind = config.task
    if dataset.kind != kind.labels:
        remedy = "Choose another [task], or data with such labels"
        raise UserError(f"dataset {dataset.name}", f"labels that are {kind.labels}", dataset.kind, remedy)
    if not kind.plain:
        for labels in (dataset.train_labels, dataset.test_labels):
            kind.check_labels(f"dataset {dataset.name}", labels, dataset.classes)


def sampling_of(config: Config, data_root: Path | None = None) -> Sampling:
    """Return the sampling for the config's population.

    Reads the data only if they determine the number of clients, or if a timeline is accounted. A timeline needs the
    numbers of examples and the model's size.
    """
    if not config.rule.draws_cohorts:
        federation = make_federation(config, data_root)
        timeline = make_timeline(config, federation, task_of(config, federation, "cpu").layout.size)
        return sampling_under(config, federation.population, timeline)
    clients = config.data.clients
    if clients is None:
        clients = make_federation(config, data_root).population
    return config.cohort.of(clients)


def assemble(
    config: Config,
    *,
    device: str = "cpu",
    data_root: Path | None = None,
    federation: Holders | None = None,
    channels_last: bool = False,
    precision: Precision = "float32",
) -> Experiment:
    """Build everything that a run of `config` needs.

    Args:
        config: The experiment.
        device: The device that computes gradients, such as `cpu` or `cuda`.
        data_root: The folder of the data sets; None uses the environment's setting.
        federation: The clients' data, if the caller has them already; None builds them from the config.
        channels_last: See `Task`.
        precision: See `Task`.

    Raises:
        UserError: If data or device are unavailable, or method and privacy cannot be combined.
    """
    check_device(device)
    federation = federation or make_federation(config, data_root)
    task = task_of(config, federation, device, channels_last=channels_last, precision=precision)
    timeline = make_timeline(config, federation, task.layout.size)
    sampling = sampling_under(config, federation.population, timeline)
    plan = config.plan(sampling, fewest_examples(config, federation), task.layout.size)
    streams = config.streams
    agreed = make_agreement(config.method, sampling, plan, streams, config.controller)
    population = Population(
        rules=agreed.client,
        task=task,
        federation=federation,
        work=config.local,
        streams=streams,
        augment=_augmentation(config, federation),
    )
    return Experiment(
        config=config,
        population=population,
        server=agreed.server,
        plan=plan,
        initial_model=task.initial_model(),
        timeline=timeline,
    )


def assemble_clients(
    config: Config,
    *,
    device: str = "cpu",
    data_root: Path | None = None,
    check_size: Callable[[int], None] | None = None,
) -> Population:
    """Build the clients alone, without noise calibration: they add no noise and follow the server's instructions.

    Args:
        config: The experiment.
        device: See `assemble`.
        data_root: See `assemble`.
        check_size: Called with the number of parameters before the model is built; its exceptions propagate.
    """
    check_device(device)
    federation, streams = make_federation(config, data_root), SeededStreams(config.seed)
    if check_size is not None:
        dataset = federation.dataset
        check_size(count_parameters(config, tuple(dataset.train_inputs.shape[1:]), dataset.classes))
    rules = ClientRules(method=config.method, noise_stddev=0.0, streams=streams)
    task = task_of(config, federation, device)
    return Population(
        rules=rules,
        task=task,
        federation=federation,
        work=config.local,
        streams=streams,
        augment=_augmentation(config, federation),
    )


def _augmentation(config: Config, federation: Holders) -> Augmentation | None:
    """Return the config's augmentation, if there is one, after checking that it fits the inputs."""
    if config.augment is not None:
        config.augment.check(federation.dataset.input_shape)
    return config.augment


def task_of(
    config: Config,
    federation: Holders,
    device: str,
    *,
    channels_last: bool = False,
    precision: Precision = "float32",
) -> Task:
    """Return the config's model with its loss; see `Task` for the options."""
    seed = int(SeededStreams(config.seed).source(Purpose.MODEL).rng.integers(2**31))
    dataset = federation.dataset
    _check_labels(config, dataset)
    shape = tuple(dataset.train_inputs.shape[1:])
    module = build_module(config, shape, dataset.classes, seed)
    check_task(config, module, shape, dataset.train_labels[:1], dataset.classes)
    return Task(module, device, channels_last=channels_last, precision=precision, kind=config.task)


def check_task(config: Config, module: nn.Module, input_shape: tuple[int, ...], labels: Tensor, classes: int) -> None:
    """Raise UserError unless the model's outputs suit the task, and each loss depends on its own example alone.

    Args:
        config: The experiment.
        module: Its model.
        input_shape: Shape of one input.
        labels: Some labels, for their shape.
        classes: Number of labels, targets or tokens.
    """
    if config.task.plain and not isinstance(config.model, OwnModule):
        return
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        outputs = copy.deepcopy(module)(torch.zeros(2, *input_shape))
    expected = config.task.output_shape(labels, classes)
    if list(outputs.shape) != [2, *expected]:
        wanted = f"outputs [batch, {', '.join(map(str, expected))}] of the model, for [task]"
        raise UserError("model.name", wanted, f"{list(outputs.shape)} for 2 inputs", "Choose another model or task")
    if not config.task.plain:
        check_losses(config.task, expected, labels, classes)


# A module, the model, a gradient and a message in float32, and the sum of messages in float64.
_BYTES_A_PARAMETER = 24


def count_parameters(config: Config, input_shape: tuple[int, ...], classes: int) -> int:
    """Return the number of trained parameters of the config's model for an input shape.

    Unless it has adapters, the model is not built.

    Raises:
        UserError: If the model is invalid or too large to count.
    """
    if config.adapter is not None:
        return sum(part.numel() for part in trainable(build_module(config, input_shape, classes, 0)).values())
    return _count_of_model(config, input_shape, classes)


def _count_of_model(config: Config, input_shape: tuple[int, ...], classes: int) -> int:
    """Return the number of parameters of the config's model, without adapters."""
    try:
        return config.model.parameters(input_shape, config.task.width(classes))
    except (RuntimeError, MemoryError, OverflowError, TypeError) as error:
        raise _too_large(error) from None


def build_module(config: Config, input_shape: tuple[int, ...], classes: int, seed: int) -> nn.Module:
    """Build the config's model for an input shape; raise UserError if it does not fit in memory."""
    count = _count_of_model(config, input_shape, classes)
    remedy = f"Make the model smaller: a run holds several copies of its {count:,} parameters"
    refuse_beyond_memory("[model]", _BYTES_A_PARAMETER * count, remedy)
    try:
        module = config.model.build(input_shape, config.task.width(classes), seed)
        return module if config.adapter is None else config.adapter.adapted(module, input_shape, seed)
    except (RuntimeError, MemoryError, OverflowError, TypeError) as error:
        raise _too_large(error) from None


def _too_large(error: Exception) -> UserError:
    reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return UserError("[model]", "a model that fits in memory", reason, "Make the model smaller")


_GPU_NAMES = ("gpu", "nvidia", "metal")


def check_device(device: str, where: str = "--device") -> None:
    """Raise UserError, which names the option or key `where`, if torch cannot use `device` on this machine."""
    check_device_name(device, where)
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        remedy = "Use --device cpu" if where == "--device" else 'Set it to "cpu"'
        raise UserError(where, "a device that torch can use here", f"{device!r} ({reason})", remedy) from None


def check_device_name(device: str, where: str) -> None:
    """Raise UserError if `device` is not the name of a device, without a look at this machine's devices."""
    if not isinstance(device, str | torch.device):
        raise UserError(where, "a text such as cpu or cuda", shown(device), f"Give {where} a text")
    try:
        known = torch.device(device)
    except RuntimeError:
        kind = str(device).lower().partition(":")[0]
        gpu = "mps" if torch.backends.mps.is_available() else "cuda"
        remedy = f"Write {gpu}" if kind in _GPU_NAMES or kind.isdecimal() else nearest(kind, ("cpu", "cuda", "mps"))
        raise UserError(where, "cpu, cuda, cuda:0, mps, ...", repr(device), remedy) from None
    if known.type == "meta":
        remedy = "Write cpu, or the name of a GPU"
        raise UserError(where, "a device that computes", f"{str(device)!r}, whose tensors are empty", remedy)

"""Experiments written in Python, with models and data in memory."""

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import ClassVar, cast, get_args

import torch
from torch import nn

from fedpriv.checks import an_object, folder_name, is_whole, one_of, whole_from
from fedpriv.data.augment import Augmentation
from fedpriv.data.dataset import Dataset, DatasetSource
from fedpriv.data.labels import labels_as
from fedpriv.data.own import dataset_of
from fedpriv.data.partitions import Iid, Natural, Partition
from fedpriv.data.tables import Columns, arrays_of, is_table
from fedpriv.errors import UserError
from fedpriv.experiment.build import plan_of, sampling_of
from fedpriv.experiment.config import (
    CohortChoice,
    Config,
    DataChoice,
    PrivacyChoice,
    Training,
    check_config,
)
from fedpriv.experiment.dry_run import Findings, try_experiment
from fedpriv.experiment.execution import LOCAL_ENGINES, LocalEngine
from fedpriv.experiment.schema import write_table
from fedpriv.experiment.watching import Watcher
from fedpriv.mechanisms.controllers import Controller
from fedpriv.methods import AdaptiveBound, Method, ServerOptimized, optimized, with_side_values
from fedpriv.plugins import MEMORY
from fedpriv.privacy import SAMPLINGS, AggregationChoice, Everyone, NoiseChoice, PrivacyPlan, Sampling, trust_of
from fedpriv.privacy.released import Whose
from fedpriv.tables import Record
from fedpriv.tasks.adapters import Adapter
from fedpriv.tasks.kinds import Classification, TaskKind
from fedpriv.tasks.local_work import FullGradient, LocalWork
from fedpriv.tasks.models import ModelSource
from fedpriv.tasks.own import OwnModule, refuse_lazy
from fedpriv.tasks.own_task import own_loss
from fedpriv.tasks.per_client import PerClient

__all__ = ["Experiment", "weights_digest"]


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """An experiment on objects of a Python program; `fedpriv.load_config` reads one from a file.

        experiment = Experiment(model=net, data=clients, method=AlphaNormEC(), privacy=Privacy(epsilon=8.0), rounds=50)
        print(experiment.plan())
        summary = experiment.run("out")

    Its run directory is like any other, but its `config.toml` names objects in memory. So only this program, with the
    same model and data, can resume the run, and `config.toml` alone cannot repeat it. Experiments that differ only in
    their data in memory share their noise, like all simulations with one seed and the same settings.

    Args:
        model: A torch module, of which a copy is trained from its current weights; or a function that returns one,
            or a class, as for `[model] name`; or a built-in model such as `Mlp(hidden=(32,))`.
        data: A list with the examples of each client, as a pair of arrays `(inputs, labels)` or as a torch `Dataset`
            of such pairs; or a pandas data frame or a Hugging Face `datasets.Dataset`; or `{"train": ..., "test": ...}`
            with one of these and public test examples; or a mapping of arrays, see `fedpriv.data.own.dataset_of`; or a
            `fedpriv.data.dataset.Dataset`; or a built-in data set such as `Digits()`.
        method: A method such as `fedpriv.methods.AlphaNormEC(beta=0.1)`.
        rounds: Number of rounds.
        adaptive: How the bound of messages follows a quantile: `fedpriv.methods.AdaptiveBound()`; None if it is fixed.
        privacy: The privacy guarantee; None for a run without privacy.
        aggregation: The numbers of secure aggregation, if `privacy.trust` is `aggregator`; None for the defaults.
        noise: The noise over rounds, such as `fedpriv.privacy.NoiseChoice(kind="banded")`; None for independent rounds.
        controller: Chooses the noise of each round within `privacy.epsilon`, the budget, as
            `fedpriv.mechanisms.controllers.LinearDecay()` does; None for constant noise.
        task: The losses and the metrics, such as `fedpriv.tasks.kinds.Regression(loss="huber")`; or a function
            `loss(outputs, labels)` that returns the loss of each example, see `fedpriv.tasks.own_task.own_loss`. None
            for classification.
        local: The local work of a client; None for the full gradient.
        augment: The augmentation of training inputs, such as `fedpriv.data.augment.ImageVariants(flip=True)`.
        cohort: The sampling of a round's clients; None for everyone.
        partition: The division of examples among simulated clients; None for the natural clients if the data have some,
            otherwise at random.
        clients: Number of simulated clients; None for the natural clients.
        label: The column of the labels in a table; see `fedpriv.data.tables.Columns`.
        client: The column of the clients' ids in a table; None if it has no natural clients.
        inputs: The columns of the inputs in a table; None for all other columns.
        test: The test examples of natural clients, see `[data] test`; None for public test examples if the data have
            some, otherwise a fifth of each client's examples.
        evaluation: The evaluation of single clients, `fedpriv.tasks.per_client.PerClient()`; None for none.
        seed: The seed of all randomness.
        evaluate_every: Rounds from one evaluation to the next.
        name: The name of the experiment.
        adapter: The parts of the model that are trained, such as `fedpriv.tasks.adapters.Lora(targets=["query"])`; None
            for all that have `requires_grad`.

    Raises:
        UserError: If a part is missing or does not fit, raised when the part is first needed.
    """

    model: nn.Module | ModelSource | Callable[..., nn.Module] = field(repr=False)
    data: "Sequence[object] | Mapping[str, object] | Dataset | DatasetSource" = field(repr=False)
    method: Method
    rounds: int
    adaptive: AdaptiveBound | None = None
    privacy: PrivacyChoice | None = None
    aggregation: AggregationChoice | None = None
    controller: Controller | None = None
    task: TaskKind | Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    local: LocalWork | None = None
    augment: Augmentation | None = None
    cohort: Sampling | None = None
    partition: Partition | None = None
    clients: int | None = None
    label: str | None = None
    client: str | None = None
    inputs: str | Sequence[str] | None = None
    test: Whose | None = None
    evaluation: PerClient | None = None
    seed: int = 0
    evaluate_every: int = 1
    name: str = "experiment"
    noise: NoiseChoice | None = None
    adapter: Adapter | None = None

    def __repr__(self) -> str:
        """Return the parts that were given, without model and data."""
        given = {part.name: getattr(self, part.name) for part in fields(self) if part.repr}
        return f"Experiment({', '.join(f'{name}={value!r}' for name, value in given.items() if value is not None)})"

    @cached_property
    def config(self) -> Config:
        """The resolved experiment, as for one from a file."""
        self._check_kinds()
        task = _task_kind(self.task)
        with labels_as(task.labels):
            columns = Columns(label=self.label, client=self.client, inputs=self.inputs)
            source, dataset = _data_source(self.data, columns)
        natural = source.natural if dataset is None else dataset.groups is not None
        if not natural and self.clients is None:
            remedy = "Give clients=..., the number of simulated clients, or client=..., the column of the clients' ids"
            raise UserError("clients", "a number of clients", "data that name no clients", remedy)
        partition = self.partition or (Natural() if natural and self.clients is None else Iid())
        test = self.test
        if isinstance(partition, Natural) and test is None:
            test = source.test if dataset is None or dataset.test_groups is None else "within"
        sampling = self.cohort or Everyone(self.clients or 1)
        config = Config(
            name=self.name,
            seed=self.seed,
            data=DataChoice(dataset=source, partition=partition, clients=self.clients, test=test),
            model=_model_source(self.model),
            local=self.local or FullGradient(),
            augment=self.augment,
            cohort=CohortChoice(sampling=SAMPLINGS.name_of(sampling), options=write_table(sampling, ("population",))),
            method=self._method(task),
            privacy=self.privacy,
            aggregation=self._sums(),
            controller=self.controller,
            training=Training(rounds=self.rounds, evaluate_every=self.evaluate_every),
            task=task,
            evaluation=self.evaluation,
            noise=None if self.noise is not None and self.noise.kind == "independent" else self.noise,
            adapter=self.adapter,
        )
        check_config(config)
        return config

    def _method(self, task: TaskKind) -> Method:
        metrics = None if self.privacy is None else self.privacy.metrics(task)
        if self.adaptive is None and metrics is None:
            return self.method
        method, optimizer = self.method, None
        if isinstance(method, ServerOptimized):
            method, optimizer = method.method, method.optimizer
        return optimized(with_side_values(method, self.adaptive, metrics), optimizer)

    def _sums(self) -> AggregationChoice | None:
        secure = self.privacy is not None and trust_of(self.privacy.trust).secure_sums
        return self.aggregation or (AggregationChoice() if secure else None)

    def _check_kinds(self) -> None:
        """Raise UserError for an argument of another kind, such as a class or a name in place of an object."""
        if not is_whole(self.seed):
            raise UserError("seed", "a whole number", repr(self.seed), "Give seed a number")
        whole_from("seed", self.seed, 0, "Give a seed such as 7")
        if not isinstance(self.name, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UserError("name", "a text", repr(self.name), "Give name a text")
        folder_name("name", self.name)
        for name, member, example in (
            ("method", "client_rule", "fedpriv.methods.DPFedAvg()"),
            ("adaptive", "quantile", "fedpriv.methods.AdaptiveBound()"),
            ("aggregation", "least_survivors", "fedpriv.privacy.AggregationChoice()"),
            ("controller", "noise_multiplier", "fedpriv.mechanisms.controllers.LinearDecay()"),
            ("evaluation", "client_lr", "fedpriv.tasks.per_client.PerClient()"),
            ("noise", "bands", 'fedpriv.privacy.NoiseChoice(kind="banded")'),
            ("local", "batches", "fedpriv.tasks.local_work.LocalSteps(steps=5, client_lr=0.1)"),
            ("cohort", "population", "fedpriv.privacy.Poisson(population=100, probability=0.1)"),
            ("augment", "apply", "fedpriv.data.augment.ImageVariants(flip=True)"),
            ("partition", "__dataclass_fields__", "fedpriv.data.partitions.Dirichlet(concentration=0.3)"),
            ("privacy", "noise_multiplier", "fedpriv.Privacy(epsilon=8.0)"),
            ("adapter", "adapted", 'fedpriv.tasks.adapters.Lora(targets=["query"])'),
        ):
            value = getattr(self, name)
            if value is not None or name == "method":
                an_object(name, value, member, example)
        if self.test is not None:
            one_of("test", self.test, get_args(Whose))

    def plan(self) -> PrivacyPlan | None:
        """Return the privacy plan; None for a run without privacy. Train nothing."""
        return plan_of(self.config, sampling_of(self.config))

    def check(self, *, device: str = "cpu") -> Findings:
        """Build all parts and let one client compute one step; see `fedpriv check`."""
        return try_experiment(self.config, device=device)

    def run(
        self,
        out: Path | str,
        *,
        engine: LocalEngine = "auto",
        device: str = "cpu",
        resume: bool = False,
        watch: Watcher | None = None,
        checkpoint_every: int | None = None,
    ) -> Record:
        """Run the experiment and return its summary; see `fedpriv.run_experiment`.

        Args:
            out: The run directory.
            engine: `auto`, `loop` or `vectorized`; engines with other processes cannot use objects in memory.
            device: The device for gradients.
            resume: Resume from the checkpoint in `out`, if there is one.
            watch: Called after every round with its rows.
            checkpoint_every: Rounds between checkpoints; None for about one in ten seconds.

        Raises:
            UserError: For any mistake that the user can fix.
        """
        from fedpriv.experiment.run import run_experiment

        if engine not in LOCAL_ENGINES:
            remedy = "Use one of these, or put model and data into files and name them in a config"
            raise UserError("engine", f"{', '.join(LOCAL_ENGINES)} for objects in memory", repr(engine), remedy)
        return run_experiment(
            self.config,
            out,
            engine=engine,
            device=device,
            resume=resume,
            watch=watch,
            checkpoint_every=checkpoint_every,
        )


@dataclass(frozen=True, kw_only=True)
class _Held:
    """Base of the settings of a data set in memory."""

    natural: ClassVar[bool] = True
    test: ClassVar[Whose] = "public"
    reference: ClassVar[str]
    source: ClassVar[dict[str, str]] = {"module": MEMORY}
    dataset: ClassVar[Dataset]

    def load(self, data_root: Path | None) -> Dataset:
        """Return the data set; see `DatasetSource.load`."""
        del data_root
        return self.dataset


def _data_source(data: object, columns: Columns) -> tuple[DatasetSource, Dataset | None]:
    """Return the settings of the data, and the data set if it is in memory."""
    if not (isinstance(data, Dataset | Mapping | Sequence) or is_table(data)) and hasattr(data, "load"):
        return cast(DatasetSource, data), None
    dataset = data if isinstance(data, Dataset) else dataset_of(arrays_of(data, columns), "data")
    held = type("Data", (_Held,), {"reference": f"{MEMORY}:data", "dataset": dataset})
    return dataclass(frozen=True, kw_only=True)(held)(), dataset


def _task_kind(task: TaskKind | Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None) -> TaskKind:
    if task is None or isinstance(task, TaskKind):
        return task or Classification()
    return own_loss(task)


def _model_source(model: object) -> ModelSource:
    if isinstance(model, nn.Module):
        return _module_source(model)
    if isinstance(model, type) and model.__module__.startswith("torch.nn."):
        remedy = f"Give model an object, such as torch.nn.{model.__name__}(...)"
        raise UserError("model", "a torch module", f"the class {model.__name__}", remedy)
    if hasattr(model, "build") and hasattr(model, "parameters"):
        return cast(ModelSource, model)
    made = OwnModule.of(model, "model", getattr(model, "__name__", "model"))
    made.reference = f"{MEMORY}:{getattr(model, '__name__', 'model')}"
    return made()


def _module_source(module: nn.Module) -> ModelSource:
    """Return the settings of a model that begins with the weights of a module."""
    refuse_lazy(module, "model")
    held, name = copy.deepcopy(module), type(module).__name__
    facts = {
        "called": staticmethod(lambda: copy.deepcopy(held)),
        "asked": (),
        "reference": f"{MEMORY}:{name}",
        "source": {"module": MEMORY, "sha256": weights_digest(held)},
    }
    return dataclass(frozen=True, kw_only=True)(type(name, (OwnModule,), facts))()


def weights_digest(module: nn.Module) -> str:
    """Return a SHA-256 of a module's class name and of all its weights and buffers."""
    weights = hashlib.sha256(type(module).__name__.encode())
    for key, value in module.state_dict().items():
        weights.update(f"{key} {value.dtype} {list(value.shape)} ".encode())
        weights.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return weights.hexdigest()

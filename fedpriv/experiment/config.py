"""Experiments as TOML files: read strictly, resolved completely, identified by a digest."""

import hashlib
import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar, cast

import tomli_w

from fedpriv.analytics.statistics import Statistics
from fedpriv.checks import (
    a_path,
    at_least_one,
    folder_name,
    is_real,
    is_whole,
    plain_numbers,
    positive_int,
    require_representable,
    shown,
    whole_from,
)
from fedpriv.clock import DEVICES, SCHEDULES, Devices, Schedule, Synchronous
from fedpriv.data.augment import AUGMENTATIONS, Augmentation
from fedpriv.data.dataset import DATASETS, DatasetSource, declared_by
from fedpriv.data.partitions import PARTITIONS, Natural, Partition, Resampled
from fedpriv.data.shifts import SHIFTS, Shift
from fedpriv.data.validation import TESTS
from fedpriv.errors import UserError, nearest
from fedpriv.experiment.analyses.constants import check_same_clients, standardized
from fedpriv.experiment.analyses.tables import as_experiment
from fedpriv.experiment.deployment import DeploymentChoice
from fedpriv.experiment.schema import NAMED, field_names, read_table, refuse_unknown, write_table
from fedpriv.mechanisms.controllers import CONTROLLERS, Controller
from fedpriv.methods import (
    DPGD,
    METHODS,
    SERVER_OPTIMIZERS,
    AdaptiveBound,
    Method,
    PrivateMetrics,
    ServerOptimized,
    bare,
    damping_of,
    has_memory,
    message_size,
    optimized,
    own_signal_of,
    refuse_for_examples,
    side_values_of,
    with_side_values,
)
from fedpriv.methods.server_optimizers import Momentum
from fedpriv.plugins import Registry, bare_reference, source_of, whole_reference
from fedpriv.privacy import (
    SAMPLINGS,
    Adjacency,
    Aggregation,
    AggregationChoice,
    DataFacts,
    NoiseChoice,
    PrivacyPlan,
    Sampling,
    TrustName,
    UnitName,
    adjacency_of,
    correlated,
    make_plan,
    trust_of,
    unit_of,
)
from fedpriv.privacy.records import ExampleTerms, RecordBound
from fedpriv.privacy.released import Whose
from fedpriv.rounds import most_messages, record_bound
from fedpriv.streams import SeededStreams
from fedpriv.tables import Record, Table
from fedpriv.tasks.adapters import ADAPTERS, Adapter
from fedpriv.tasks.kinds import TASKS, Classification, TaskKind
from fedpriv.tasks.local_work import DPSGD, LOCAL_WORKS, FullGradient, LocalEpochs, LocalWork, PoissonGradient
from fedpriv.tasks.models import MODELS, ModelSource
from fedpriv.tasks.per_client import PerClient

__all__ = [
    "Config",
    "check_config",
    "digest_of_tables",
    "load_config",
    "method_tables",
    "parse_config",
    "read_config_file",
    "read_config_text",
    "read_tables",
    "with_bare_names",
    "with_whole_paths",
]

T = TypeVar("T")

MAX_ROUNDS = 10**9

# Keys with the name of a class, by table.
_NAMES = {
    "data": ("name", "partition", "shift"),
    "augment": ("name",),
    "model": ("name",),
    "task": ("name",),
    "local": ("work",),
    "method": ("name",),
    "server": ("optimizer",),
    "devices": ("kind",),
    "schedule": ("kind",),
    "controller": ("kind",),
    "adapter": ("kind",),
}

# Choices of clients by loss, under the names that one would try; see `fedpriv.tasks.curricula`.
_BY_LOSS = ("by-loss", "loss", "highest-loss", "lowest-loss", "power-of-choice", "curriculum")

# Replaces an unknown population, so that the keys of the cohort can be checked early.
_UNKNOWN_POPULATION = 10**9

TABLES = ("data", "model", "local", "cohort", "method", "server", "privacy", "training")
TABLES += ("adaptive", "aggregation", "augment", "controller", "devices", "schedule", "deployment")
TABLES += ("sources", "task", "evaluation", "noise", "adapter")

# Tables that change clients' messages or the noise on them. Experiments that differ in one of them, or in the number of
# rounds, have independent noise. The name, the times of evaluation and the deployment change neither.
NOISE_TABLES = ("data", "augment", "model", "local", "cohort", "method", "server", "privacy", "noise")
NOISE_TABLES += ("adaptive", "aggregation", "controller", "devices", "schedule", "sources", "task", "adapter")


@dataclass(frozen=True, kw_only=True)
class DataChoice:
    """The data set, its partition, and the number of clients (None for the natural clients).

    `shift` changes each client's inputs, and `validation` is the share of examples held out before; None for neither.
    `test` chooses the test examples of natural clients (`validation.TESTS`); None for simulated clients.
    """

    dataset: DatasetSource
    partition: Partition
    clients: int | None
    shift: Shift | None = None
    validation: float | None = None
    test: Whose | None = None

    @property
    def facts(self) -> DataFacts:
        """The uses of clients' examples, for the privacy statement."""
        natural = self.test is not None
        held: Whose = "within" if natural else "public"
        return DataFacts(
            clients="natural" if natural else "resampled" if isinstance(self.partition, Resampled) else "simulated",
            test=self.test or "public",
            validation=None if self.validation is None else "clients" if self.test == "clients" else held,
        )


@dataclass(frozen=True, kw_only=True)
class CohortChoice:
    """The sampling of a round's clients; becomes a `Sampling` once the population is known."""

    sampling: str
    options: Table

    def of(self, population: int) -> Sampling:
        """Return the sampling of `population` clients."""
        return read_table(SAMPLINGS[self.sampling], self.options, "cohort", population=population)


_PLANNED = ("adjacency", "delta", "epsilon", "noise_multiplier")
_OF_EXAMPLES = ("example_clip", "example_normalization", "examples")


@dataclass(frozen=True, kw_only=True)
class PrivacyChoice:
    """The privacy guarantee; `fedpriv.Privacy` in Python. Give either `epsilon` or `noise_multiplier`.

    Args:
        trust: `central`: a trusted server adds the noise. `local`: every client adds noise, and the server is the
            adversary. `aggregator`: every client adds a share of the noise, and the server sees only the sum; see
            `AggregationChoice`.
        adjacency: `add-or-remove` or `replace`; None for the default of the trust.
        delta: Probability in (0, 1) with which the guarantee may fail; well below one over the number of clients.
        epsilon: The target; the noise is calibrated to it.
        noise_multiplier: Noise standard deviation over the sensitivity; epsilon follows from it. 0 for no noise.
        unit: The data that the guarantee protects together: all examples of one `client`, or a single `example`.
        example_clip: C, to which the gradient of each example is clipped; for the unit `example`.
        example_normalization: alpha of N_alpha on the gradient of each example, in place of `example_clip`.
        examples: A public number by which every client divides the sum of its gradients; None for each client's own
            number of examples, which is then public. For the unit `example`.
        metrics_share: The share of the squared noise multiplier for the clients' own loss and accuracy, which are then
            reported with noise; see `fedpriv.methods.side_values`. None for no such report.
        metrics_max_loss: The largest loss of a client that counts there; None for 5.
        draw: The number of a trial of a tuning, which decides noise and cohorts alone. None for other runs.
        analyses: Names of earlier analyses of the same clients. The run uses their answers; see `data.standardize`.
        analyses_mu: Together they are one Gaussian mechanism with this mu, under the run's adjacency.

    Raises:
        UserError: If a value is out of range; the plan checks the other values.
    """

    trust: TrustName = field(default="central", metadata=NAMED)
    adjacency: Adjacency | None = field(default=None, metadata=NAMED)
    delta: float = 1e-5
    epsilon: float | None = None
    noise_multiplier: float | None = None
    unit: UnitName = field(default="client", metadata=NAMED)
    example_clip: float | None = None
    example_normalization: float | None = None
    examples: int | None = None
    metrics_share: float | None = None
    metrics_max_loss: float | None = None
    draw: int | None = None
    analyses: list[str] | None = None
    analyses_mu: float | None = None

    def __post_init__(self) -> None:
        plain_numbers(self)
        self._check_analyses()
        trust_of(self.trust)
        if self.adjacency is not None:
            adjacency_of(self.adjacency)
        if unit_of(self.unit).name != "example":
            for key in _OF_EXAMPLES:
                if getattr(self, key) is not None:
                    remedy = 'Remove it, or set unit = "example"'
                    raise UserError(f"privacy.{key}", 'no value unless unit = "example"', getattr(self, key), remedy)
        elif self.adjacency == "add-or-remove" and self.examples is None:
            remedy = "Set it: otherwise clients divide by their own numbers of examples, which would reveal a record"
            raise UserError("privacy.examples", "a public number with add-or-remove", "a missing key", remedy)
        for key in ("example_clip", "example_normalization"):
            if getattr(self, key) is not None:
                require_representable(f"privacy.{key}", getattr(self, key))
        if self.examples is not None:
            positive_int("privacy.examples", self.examples, "Give a public number: how many examples a client has")
        if self.metrics_share is None and self.metrics_max_loss is not None:
            remedy = "Set privacy.metrics_share, or remove it"
            raise UserError("privacy.metrics_max_loss", "no value without metrics_share", self.metrics_max_loss, remedy)
        if self.draw is not None:
            whole_from("privacy.draw", self.draw, 0, "Remove it: a tuning sets it")

    def _check_analyses(self) -> None:
        if (self.analyses is None) != (self.analyses_mu is None):
            got = "one of the two"
            raise UserError("privacy.analyses_mu", "both this key and analyses, or none", got, "Use data.standardize")
        if self.analyses_mu is not None and (not is_real(self.analyses_mu, 0.0, 1e6) or self.analyses_mu == 0.0):
            raise UserError(
                "privacy.analyses_mu", "above 0, at most 1e6", shown(self.analyses_mu), "Use data.standardize"
            )

    def metrics(self, task: TaskKind) -> PrivateMetrics | None:
        """Return the metrics that clients report with noise; None for none."""
        if self.metrics_share is None:
            return None
        most = 5.0 if self.metrics_max_loss is None else self.metrics_max_loss
        named = any(each.name == "accuracy" for each in task.measured)
        return PrivateMetrics(share=self.metrics_share, max_loss=most, accuracy=named)

    @property
    def row_bound(self) -> float:
        """The longest bounded gradient of one example, for the unit `example`."""
        return self.example_clip or 1.0


@dataclass(frozen=True, kw_only=True)
class Training:
    """The number of rounds and of evaluations.

    Args:
        rounds: Number of rounds, at most a billion; 0 writes the initial model.
        evaluate_every: Rounds from one evaluation to the next; the first and the last model are always evaluated.
    """

    rounds: int
    evaluate_every: int = 1

    def __post_init__(self) -> None:
        if not is_whole(self.rounds, 0, MAX_ROUNDS):
            expected = f"a whole number from 0 to {MAX_ROUNDS:,}"
            raise UserError("training.rounds", expected, repr(self.rounds), "Give the number of rounds")
        at_least_one("training.evaluate_every", self.evaluate_every, "Give 1 to evaluate every round")

    def evaluates(self, round: int) -> bool:
        """Return True if the model after `round` is evaluated."""
        return round in (0, self.rounds) or round % self.evaluate_every == 0


@dataclass(frozen=True, kw_only=True)
class Config:
    """A resolved experiment: it includes every default, and no option of its execution."""

    name: str
    seed: int
    data: DataChoice
    model: ModelSource
    local: LocalWork
    cohort: CohortChoice
    method: Method
    privacy: PrivacyChoice | None
    training: Training
    augment: Augmentation | None = None
    deployment: DeploymentChoice | None = None
    devices: Devices | None = None
    schedule: Schedule | None = None
    task: TaskKind = field(default_factory=Classification)
    evaluation: PerClient | None = None
    aggregation: AggregationChoice | None = None
    noise: NoiseChoice | None = None
    controller: Controller | None = None
    adapter: Adapter | None = None

    @cached_property
    def tables(self) -> Record:
        """The experiment as TOML tables; reading them gives this config again."""
        clients = {} if self.data.clients is None else {"clients": self.data.clients}
        data = {"name": DATASETS.name_of(self.data.dataset), **write_table(self.data.dataset), **clients}
        data |= {"partition": PARTITIONS.name_of(self.data.partition), **write_table(self.data.partition)}
        if self.data.shift is not None:
            data |= {"shift": SHIFTS.name_of(self.data.shift), **write_table(self.data.shift)}
        if self.data.validation is not None:
            data["validation"] = self.data.validation
        # Older versions had public test examples alone; omitting the key keeps the digest of their experiments.
        if self.data.test is not None and (self.data.test != "public" or self.data.validation is not None):
            data["test"] = self.data.test
        privacy = {} if self.privacy is None else {"privacy": write_table(self.privacy)}
        aggregation = {} if self.aggregation is None else {"aggregation": write_table(self.aggregation)}
        noise = {} if self.noise is None else {"noise": write_table(self.noise)}
        control = {} if self.controller is None else {"controller": _write_named(CONTROLLERS, self.controller, "kind")}
        adapter = {} if self.adapter is None else {"adapter": _write_named(ADAPTERS, self.adapter, "kind")}
        deployment = {} if self.deployment is None else {"deployment": write_table(self.deployment)}
        clock = {} if self.devices is None else {"devices": _write_named(DEVICES, self.devices, "kind")}
        clock |= {} if self.schedule is None else {"schedule": _write_named(SCHEDULES, self.schedule, "kind")}
        augment = {} if self.augment is None else {"augment": _write_named(AUGMENTATIONS, self.augment, "name")}
        # Older versions had plain classification alone; omitting the table keeps the digest of their experiments.
        task = {} if self.task == Classification() else {"task": _write_named(TASKS, self.task, "name")}
        return {
            "name": self.name,
            "seed": self.seed,
            "data": data,
            **augment,
            "model": {"name": MODELS.name_of(self.model), **write_table(self.model)},
            **adapter,
            **task,
            "local": {"work": LOCAL_WORKS.name_of(self.local), **write_table(self.local)},
            "cohort": {"sampling": self.cohort.sampling, **self.cohort.options},
            **method_tables(self.method),
            **privacy,
            **aggregation,
            **noise,
            **control,
            "training": write_table(self.training),
            **clock,
            **({} if self.evaluation is None else {"evaluation": write_table(self.evaluation)}),
            **deployment,
            **({"sources": self.sources} if self.sources else {}),
        }

    @cached_property
    def sources(self) -> dict[str, dict[str, str]]:
        """The sources of classes outside of fedpriv, by the key that names the class; see `plugins.source_of`.

        They are part of the experiment: different sources make different experiments.
        """
        optimizer = self.method.optimizer if isinstance(self.method, ServerOptimized) else None
        named = {
            "data.name": self.data.dataset,
            "data.partition": self.data.partition,
            "data.shift": self.data.shift,
            "augment.name": self.augment,
            "model.name": self.model,
            "task.name": self.task,
            "local.work": self.local,
            "method.name": bare(self.method),
            "server.optimizer": optimizer,
            "devices.kind": self.devices,
            "controller.kind": self.controller,
        }
        found = {key: source_of(type(instance)) for key, instance in named.items() if instance is not None}
        return {key: source for key, source in found.items() if source is not None}

    @property
    def method_name(self) -> str:
        """The method's name in the table of methods."""
        return METHODS.name_of(bare(self.method))

    @property
    def rule(self) -> Schedule:
        """The schedule of server steps; synchronous rounds by default."""
        return self.schedule or Synchronous()

    @property
    def not_covered(self) -> tuple[str, ...]:
        """Names of the scores that the privacy guarantee does not cover; empty for a run without privacy."""
        return () if self.privacy is None else self.facts.not_covered

    @property
    def facts(self) -> DataFacts:
        """The uses of clients' examples, for the privacy statement."""
        side = side_values_of(self.method)
        reported = () if side is None else side.reported
        facts = replace(self.data.facts, scores=self.task.scores, reported=reported)
        if not isinstance(self.model, Statistics):
            return facts
        return replace(facts, asked=self.model.questions, weight=self.model.weight)

    @property
    def learns(self) -> bool:
        """False for an analysis, which trains no model."""
        return not isinstance(self.model, Statistics)

    @property
    def title(self) -> str:
        """The subject of the privacy statement: the method's name, or an analysis."""
        return self.method_name if self.learns else "an analysis"

    @property
    def digest(self) -> str:
        """SHA-256 of the resolved tables except `deployment`: equal digests mean the same experiment.

        For a class in a file, the content of the file matters and its folder does not.
        """
        return digest_of_tables({name: table for name, table in self._identity.items() if name != "deployment"})

    @property
    def noise_id(self) -> str:
        """SHA-256 of `NOISE_TABLES` and the number of rounds; with the seed, it decides the noise of a simulation.

        Otherwise two experiments with one seed would share their noise, and the difference of their models would have
        no noise. Equal experiments keep equal bits.
        """
        tables = {name: table for name, table in self._identity.items() if name in NOISE_TABLES}
        return digest_of_tables({**tables, "rounds": self.training.rounds})

    @property
    def _identity(self) -> dict[str, object]:
        """The tables, with file names instead of paths, in words that never change."""
        found = with_bare_names(self.tables)
        local = found["local"]
        if isinstance(local, Mapping) and local.get("signal") == "pseudo-gradient":
            found["local"] = {**local, "signal": "move"}  # as older versions wrote it
        return found

    @property
    def streams(self) -> SeededStreams:
        """The randomness of a simulation. Trials of a tuning share their data, but neither noise nor cohorts."""
        drawn = self.privacy is not None and self.privacy.draw is not None
        return SeededStreams(self.seed, self.noise_id, own_cohorts=drawn)

    def to_toml(self) -> str:
        """Return the resolved experiment as TOML text."""
        return tomli_w.dumps(self.tables)

    def check_only_sampled_answer(self) -> None:
        """Raise UserError for what Flower's servers do not offer yet: answers without training, and fewer rounds.

        Raises:
            UserError: If clients that are not sampled answer as well, or a controller may end the run early.
        """
        if self.controller is not None:
            expected = "no such table with Flower and in deployments, for now: their number of rounds is fixed"
            remedy = "Remove it, or simulate it with --engine loop, vectorized or ray"
            raise UserError("[controller]", expected, "a controller", remedy)
        if self.aggregation is not None and self.aggregation.everyone_answers:
            expected = "false with Flower, for now: its servers draw the cohorts"
            remedy = "Remove it, or simulate it with --engine loop, vectorized or ray"
            raise UserError("aggregation.everyone_answers", expected, "true", remedy)

    def check_deployable(self) -> None:
        """Raise UserError if the experiment needs a simulation.

        Raises:
            UserError: If it shifts clients' inputs, holds out their examples, tests single clients, has the table
                `[devices]`, or protects examples without naming the number that sums are divided by.
        """
        self.check_unclocked()
        self.check_only_sampled_answer()
        self._check_turns_of_devices()
        own, trust = own_signal_of(self.method), None if self.privacy is None else trust_of(self.privacy.trust)
        weight = 1.0 if own is None else own.example_rule.restart_weight
        if weight != 1.0 and trust is not None and trust.shows_messages:
            expected = (
                "1 in a deployment with local trust: a turn that does not count would show a dearer restart again"
            )
            raise UserError("method.restart_weight", expected, weight, "Set it to 1")
        if self.needs_sizes:
            remedy = "Set it: devices do not report their numbers of examples"
            raise UserError("privacy.examples", "a public number in a deployment", "a missing key", remedy)
        remedy = "Remove the key: a deployment does not change devices' data, and tests on the server's data"
        if self.data.validation is not None:
            raise UserError("data.validation", "no value in a deployment", self.data.validation, remedy)
        if self.evaluation is not None:
            raise UserError("[evaluation]", "no such table in a deployment", "scores of single clients", "Remove it")
        if self.data.shift is not None:
            raise UserError("data.shift", "no value in a deployment", repr(SHIFTS.name_of(self.data.shift)), remedy)

    def _check_turns_of_devices(self) -> None:
        apart = self.cohort.of(self.data.clients or _UNKNOWN_POPULATION).separation > 1
        if apart and self.privacy is not None and trust_of(self.privacy.trust).shows_messages:
            expected = f'no such value in a deployment with privacy.trust = "{self.privacy.trust}", for now'
            raise UserError("cohort.sampling", expected, f'"{self.cohort.sampling}"', 'Set it to "everyone"')

    def check_unclocked(self) -> None:
        """Raise UserError if the experiment has a virtual clock; real devices and Flower cannot keep one.

        Raises:
            UserError: If it has the table `[devices]`.
        """
        if self.devices is not None:
            remedy = "Choose an engine in process, or remove [devices] and [schedule]"
            raise UserError("[devices]", "no such table with Flower", "a virtual clock", remedy)

    def check_positions(self) -> None:
        """Raise UserError if one example more would change how other examples of its client are used.

        Which examples are held out, and how each is augmented, follows from their order and number.

        Raises:
            UserError: If some of a client's own examples are held out, or inputs are augmented.
        """
        data, remedy = self.data, 'Set privacy.adjacency = "replace", or remove the key'
        if data.test == "within" or (data.test is not None and data.test != "clients" and data.validation is not None):
            key = "data.test" if data.test == "within" else "data.validation"
            expected = "no examples held out within clients with add-or-remove of single examples"
            raise UserError(key, expected, "some, chosen by their number", remedy)
        if self.augment is not None:
            expected = "no [augment] with add-or-remove of single examples"
            raise UserError("[augment]", expected, "random changes by the position of an example", remedy)

    @property
    def needs_sizes(self) -> bool:
        """True if the plan depends on the clients' numbers of examples, which are then public."""
        return self.privacy is not None and self.privacy.unit == "example" and self.privacy.examples is None

    @property
    def sums_securely(self) -> bool:
        """True if the plan rounds messages to integers, and therefore depends on the number of parameters."""
        return self.privacy is not None and trust_of(self.privacy.trust).secure_sums

    def plan(self, sampling: Sampling, fewest: int | None = None, size: int | None = None) -> PrivacyPlan | None:
        """Return the privacy plan with these cohorts, or None for a non-private run.

        Args:
            sampling: The sampling of clients.
            fewest: Examples of the client with the fewest, if `needs_sizes`.
            size: Number of parameters, if `sums_securely`.

        Raises:
            ValueError: If the schedule has its own timeline of cohorts and `sampling` draws others, or the reverse.
        """
        if sampling.draws_cohorts != self.rule.draws_cohorts:
            raise ValueError(f"{self.rule} is not accounted by {sampling.name}")
        if self.privacy is None:
            return None
        planned = {field: getattr(self.privacy, field) for field in _PLANNED}
        budget = planned["epsilon"] if planned["noise_multiplier"] is None else None
        if self.controller is not None and budget is not None:
            planned |= {"epsilon": None, "noise_multiplier": 1.0}  # the filter calibrates, without sampling
        plan = make_plan(
            sampling=sampling,
            rounds=self.training.rounds,
            l2_bound=self.method.bounded.l2_bound,
            client_memory=has_memory(self.method),
            record=self._record_bound(self.privacy, fewest),
            trust=self._aggregation(sampling, size) or self.privacy.trust,
            **planned,
        )
        if self.controller is not None:
            return plan.under_filter(budget)
        matrix = None if self.noise is None else self.noise.of(sampling, self.training.rounds, self.noise_damping)
        return plan if matrix is None else correlated(plan, matrix, self.privacy.epsilon)

    @property
    def noise_damping(self) -> float:
        """The share of the server's memory that is forgotten each round: the sums over rounds that the noise suits."""
        return damping_of(self.method)

    def _aggregation(self, sampling: Sampling, size: int | None) -> Aggregation | None:
        if not self.sums_securely or size is None:
            return None
        return (self.aggregation or AggregationChoice()).of(
            sampling, most_messages(sampling), message_size(self.method, size)
        )

    def _record_bound(self, privacy: PrivacyChoice, fewest: int | None) -> RecordBound | None:
        if privacy.unit != "example":
            return None
        if privacy.examples is None and fewest is None:
            remedy = "Give a public number: how many examples a client typically has"
            raise UserError("privacy.examples", "this key, where clients' data are not known", "a missing key", remedy)
        return record_bound(self.method, self._example_terms(privacy, fewest))

    @property
    def example_terms(self) -> ExampleTerms | None:
        """How clients of a deployment bound and weight gradients; None unless the unit of privacy is `example`."""
        privacy = self.privacy
        return None if privacy is None or privacy.unit != "example" else self._example_terms(privacy, None)

    def _example_terms(self, privacy: PrivacyChoice, fewest: int | None) -> ExampleTerms:
        return ExampleTerms(
            clip=privacy.example_clip,
            normalization=privacy.example_normalization,
            examples=privacy.examples or fewest or 1,
            declared=privacy.examples is not None,
            rate=getattr(self.local, "rate", 1.0),
            steps=self.local.queries if isinstance(self.local, DPSGD) else 0,
        )


def method_tables(method: Method) -> Record:
    """Return the tables `[method]`, `[adaptive]` and `[server]` of a method."""
    tables: Record = {"method": {"name": METHODS.name_of(bare(method)), **write_table(bare(method))}}
    side = side_values_of(method)
    if side is not None and side.adaptive is not None:
        tables["adaptive"] = write_table(side.adaptive)
    if isinstance(method, ServerOptimized):
        optimizer = method.optimizer
        tables["server"] = {"optimizer": SERVER_OPTIMIZERS.name_of(optimizer), **write_table(optimizer)}
    return tables


def digest_of_tables(tables: Table) -> str:
    """Return the SHA-256 of tables, in hexadecimal; the order of keys does not matter."""
    canonical = json.dumps(tables, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def load_config(source: Path | str | Table, settings: Sequence[str] = ()) -> Config:
    """Read an experiment.

    Args:
        source: Its TOML file, or the tables of such a file.
        settings: Changes as `table.key=value`, the value in TOML or a bare word; an empty value removes the key.

    Raises:
        UserError: If it is not a valid experiment.
    """
    whole = read_tables(source, settings)
    config = parse_config(standardized(whole))
    check_same_clients(whole, config.tables)
    return config


def read_tables(source: Path | str | Table, settings: Sequence[str] = ()) -> dict[str, object]:
    """Return the tables of an experiment with the settings applied, before they are checked; see `load_config`."""
    if not isinstance(settings, list | tuple) or not all(isinstance(each, str) for each in settings):
        raise UserError("settings", "a list of texts", shown(settings), 'Write it as ["training.rounds=20"]')
    tables = dict(source) if isinstance(source, Mapping) else read_config_file(a_path("config", source))
    return with_whole_paths(apply_settings(tables, settings), Path.cwd())


def read_config_file(path: Path) -> dict[str, object]:
    """Return the tables of a TOML file; paths of classes (`"./own.py:Class"`) are relative to the TOML file."""
    try:
        return with_whole_paths(read_config_text(path.read_text(encoding="utf-8-sig"), str(path)), path.parent)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(str(path), "a readable TOML file", reason, "Check the path") from None
    except UnicodeDecodeError:
        raise UserError(
            str(path), "a TOML file", "bytes that are not text", "Correct the file, or restore it"
        ) from None


def read_config_text(text: str, where: str) -> dict[str, object]:
    """Return the tables of a TOML text; errors name its origin, `where`."""
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(where, "a TOML file", str(error), "Correct the file") from None


def with_whole_paths(tables: Table, folder: Path) -> dict[str, object]:
    """Return the tables with the file of every `"file.py:Class"` as an absolute path."""
    return _with_names(tables, lambda name: whole_reference(name, folder))


def with_bare_names(tables: Table) -> dict[str, object]:
    """Return the tables with file names instead of paths in references: the folder is no part of an experiment."""
    return _with_names(tables, bare_reference)


def _with_names(tables: Table, change: Callable[[object], object]) -> dict[str, object]:
    """Return the tables with `change` applied to every name of a class."""
    changed = dict(tables)
    for table, keys in _NAMES.items():
        found = tables.get(table)
        if isinstance(found, Mapping):
            changed[table] = {**found, **{key: change(found[key]) for key in keys if key in found}}
    return changed


def apply_settings(tables: Table, settings: Sequence[str]) -> dict[str, object]:
    """Return a copy of `tables` with each `table.key=value` applied; tables within tables add more dots."""
    changed = _copied(tables)
    for setting in settings:
        address, equals, value = setting.partition("=")
        parts = address.strip().split(".")
        if not equals or not all(parts):
            raise UserError(
                f"-s {setting}", "table.key=value", repr(setting), "Write, for example, -s training.rounds=20"
            )
        _put(changed, parts, value.strip())
    return changed


def _copied(tables: Table) -> dict[str, object]:
    """Return a copy of the tables, at all depths, that shares other values."""
    return {key: _copied(cast(Table, value)) if isinstance(value, dict) else value for key, value in tables.items()}


def _put(tables: dict[str, object], parts: list[str], value: str) -> None:
    place = tables
    for depth, part in enumerate(parts[:-1], start=1):
        inner = place.setdefault(part, {})
        if not isinstance(inner, dict):
            name = ".".join(parts[:depth])
            raise UserError(".".join(parts), "a table", f"the key {name}", f"Use -s {name}=value")
        place = cast(dict[str, object], inner)
    if value:
        place[parts[-1]] = _toml_value(value)
    else:
        place.pop(parts[-1], None)


def _toml_value(text: str) -> object:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    except (ValueError, RecursionError) as error:
        raise UserError("-s", "a TOML value", str(error), "Give a shorter value") from None


def parse_config(tables: Table) -> Config:
    """Return the experiment that TOML tables describe; see `load_config` for errors."""
    if "base" in tables and "data" not in tables:
        raise UserError("base", "an experiment", "a sweep", "Use fedpriv sweep")
    if "analysis" in tables:
        tables = as_experiment(tables, declared_by(_read_data(_table("data", tables.get("data", {}))).dataset))
    if "randomness" in tables:  # written by a strategy with `out`
        got = "the description of a run of a Flower app"
        raise UserError("config", "an experiment", got, "Start the app: its data and training are not in this file")
    refuse_unknown(tables, ["name", "seed", "analysis", *TABLES], "")
    given = {name: _table(name, tables[name]) for name in TABLES if name in tables}
    top = read_table(_Top, {key: tables[key] for key in ("name", "seed") if key in tables}, "")
    data = _read_data(_need(given, "data"))
    local = _read_named(LOCAL_WORKS, given.get("local", {"work": "full-gradient"}), "local", "work")
    task = _read_named(TASKS, {"name": "classification", **given.get("task", {})}, "task", "name")
    privacy = read_table(PrivacyChoice, given["privacy"], "privacy") if "privacy" in given else None
    config = Config(
        name=top.name,
        seed=top.seed,
        data=data,
        model=_read_named(MODELS, _need(given, "model"), "model", "name"),
        local=local,
        cohort=_read_cohort(given.get("cohort", {"sampling": "everyone"}), data.clients),
        method=_read_method(given, privacy, task),
        privacy=privacy,
        training=read_table(Training, _need(given, "training"), "training"),
        deployment=read_table(DeploymentChoice, given["deployment"], "deployment") if "deployment" in given else None,
        devices=_read_named(DEVICES, given["devices"], "devices", "kind") if "devices" in given else None,
        schedule=_read_named(SCHEDULES, given["schedule"], "schedule", "kind") if "schedule" in given else None,
        augment=_read_named(AUGMENTATIONS, given["augment"], "augment", "name") if "augment" in given else None,
        task=task,
        evaluation=read_table(PerClient, given["evaluation"], "evaluation") if "evaluation" in given else None,
        aggregation=_read_aggregation(given),
        noise=_read_noise(given),
        controller=_read_controller(given),
        adapter=_read_named(ADAPTERS, given["adapter"], "adapter", "kind") if "adapter" in given else None,
    )
    _check_sources(config, given.get("sources", {}))
    check_config(config)
    return config


def _read_controller(given: Mapping[str, Table]) -> Controller | None:
    return _read_named(CONTROLLERS, given["controller"], "controller", "kind") if "controller" in given else None


def _read_aggregation(given: Mapping[str, Table]) -> AggregationChoice | None:
    """Return the numbers of secure aggregation; the defaults if a config names its trust alone."""
    trust = given.get("privacy", {}).get("trust", "central")
    secure = isinstance(trust, str) and trust_of(trust).secure_sums
    table = given.get("aggregation", {} if secure else None)
    return None if table is None else read_table(AggregationChoice, table, "aggregation")


def _read_noise(given: Mapping[str, Table]) -> NoiseChoice | None:
    """Return the table `[noise]`; None for independent rounds, as without it."""
    found = read_table(NoiseChoice, given["noise"], "noise") if "noise" in given else None
    return None if found is None or found.kind == "independent" else found


def check_config(config: Config) -> None:
    """Raise UserError if parts of an experiment do not fit each other."""
    _check_side_values(config)
    _check_controller(config)
    _check_sums(config)
    _check_turns(config)
    _check_schedule(config)
    _check_unit(config)
    _check_presence(config)
    _check_adapter(config)
    if config.method.client_part.needs_gradient_scale and config.local.signal == "pseudo-gradient":
        expected = f'"gradient-sum" or "gradient-mean" with {config.method_name}, which divides by client_lr'
        raise UserError(
            "local.signal",
            expected,
            '"pseudo-gradient"',
            "Set it to one of the two, or choose alpha-normec, which does not divide",
        )
    _check_corrections(config)
    if config.deployment is not None:
        config.deployment.check(config.method)
    if config.evaluation is not None and config.evaluation.clients:
        _check_evaluation(config)


def _check_corrections(config: Config) -> None:
    """Raise UserError if a method that corrects local steps could not, or would get another signal than it needs."""
    if config.method.step_prox > 0.0 and config.local.signal != "pseudo-gradient":
        if config.local.signal is None:
            expected, got = f"local steps with {config.method_name}", repr(LOCAL_WORKS.name_of(config.local))
            raise UserError("local.work", expected, got, 'Choose "local-steps" or "local-epochs"')
        expected = f'"pseudo-gradient" with {config.method_name}: it sums up the moves of the model'
        raise UserError("local.signal", expected, f'"{config.local.signal}"', "Remove the key")
    if config.method.corrects_steps and config.local.signal not in (None, "gradient-mean"):
        expected = f'"gradient-mean" with {config.method_name}: corrections are as long as one gradient'
        raise UserError("local.signal", expected, f'"{config.local.signal}"', 'Set it to "gradient-mean"')
    if config.method.needs_shared and config.devices is not None:
        expected = f"no such table with {config.method_name}: the clock counts the model, and this server sends more"
        raise UserError("[devices]", expected, "a virtual clock", "Remove [devices] and [schedule]")


def _check_side_values(config: Config) -> None:
    """Raise UserError for side values of single examples, or that the tables, and so the digest, do not name."""
    if config.privacy is not None and config.privacy.unit == "example":
        refuse_for_examples(config.method)
    side, named = side_values_of(config.method), config.privacy and config.privacy.metrics(config.task)
    if side is not None and side.metrics != named:
        expected, remedy = "private metrics as privacy.metrics_share names them", "Set it, and give the method alone"
        raise UserError("method", expected, f"{side.metrics} in the method", remedy)


def _check_controller(config: Config) -> None:
    """Raise UserError for settings under which no filter is offered."""
    if config.controller is None:
        return
    if config.privacy is None:
        remedy = "Add [privacy] with an epsilon, the budget, or remove [controller]"
        raise UserError("[controller]", "a [privacy] table with a budget", "a run without privacy", remedy)
    if not trust_of(config.privacy.trust).trusts_server:
        expected = 'privacy.trust = "central": clients that add noise would each need a filter of their own'
        remedy = 'Remove [controller], or set privacy.trust = "central"'
        raise UserError("[controller]", expected, f'"{config.privacy.trust}"', remedy)
    if config.privacy.unit == "example":
        expected = 'privacy.unit = "client": noise on one record is stated for all rounds together'
        raise UserError("[controller]", expected, '"example"', "Remove [controller], or change the unit")
    if config.devices is not None:
        expected = "no such table with [controller]: a timeline is made for all rounds before the first"
        raise UserError("[devices]", expected, "a virtual clock", "Remove [devices] and [schedule], or [controller]")
    if config.noise is not None:
        expected = "no such table with [controller]: a later round takes back the noise of an earlier one"
        raise UserError("[noise]", expected, "a table", "Remove [noise] or [controller]")
    if config.cohort.of(config.data.clients or _UNKNOWN_POPULATION).separation > 1:
        expected = "clients that may be in every round, with [controller]: it charges everyone for each round"
        raise UserError("cohort.sampling", expected, '"separated"', 'Set it to "everyone", or remove [controller]')


def _check_sums(config: Config) -> None:
    """Raise UserError for settings that secure aggregation cannot protect, or does not offer yet."""
    if config.aggregation is not None and not config.sums_securely:
        remedy = 'Remove the table, or set privacy.trust = "aggregator"'
        raise UserError("[aggregation]", 'no such table unless privacy.trust = "aggregator"', "a table", remedy)
    if not config.sums_securely or config.privacy is None:
        return
    if config.aggregation is not None:
        config.aggregation.check_sampling(by_coins=SAMPLINGS[config.cohort.sampling].by_coins)
    if config.method.needs_client_noise:
        expected = '"noiseless" with privacy.trust = "aggregator": sent memories would reveal shares of the noise'
        raise UserError("method.memory", expected, '"sent"', 'Set it to "noiseless", or privacy.trust to "local"')
    if config.privacy.unit == "example":
        expected = '"client" with privacy.trust = "aggregator": rounding to its grid may enlarge one record\'s change'
        raise UserError("privacy.unit", expected, '"example"', 'Set it to "client", or privacy.trust to "local"')
    if config.devices is not None:
        expected = 'no such table with privacy.trust = "aggregator", for now'
        raise UserError("[devices]", expected, "a virtual clock", "Remove [devices] and [schedule]")


def _check_turns(config: Config) -> None:
    """Raise UserError if clients that take turns, or correlated noise, do not fit the rest of a config."""
    apart = config.cohort.of(config.data.clients or _UNKNOWN_POPULATION).separation > 1
    if not apart and config.noise is None:
        return
    key, got = ("cohort.sampling", f'"{config.cohort.sampling}"') if apart else ("[noise]", "a table")
    remedy = "Remove one of the two"
    if config.noise is not None and config.privacy is None:
        raise UserError("[noise]", "no such table without [privacy]", "a table", "Remove it, or add [privacy]")
    if config.devices is not None:
        expected = "no such value with [devices]: late clients would count outside of their turns"
        raise UserError(key, expected, got, remedy)
    trust = None if config.privacy is None else trust_of(config.privacy.trust)
    own_noise = config.noise is None and trust is not None and trust.shows_messages
    if config.privacy is not None and trust is not None and not trust.trusts_server and not own_noise:
        why = "a client's own noise cannot return" if trust.shows_messages else "clients change"
        expected = f'no such value with privacy.trust = "{config.privacy.trust}": {why} from round to round'
        raise UserError(key, expected, got, 'Set privacy.trust to "central", or remove it')
    if config.privacy is not None and config.privacy.unit == "example":
        raise UserError(key, 'no such value with privacy.unit = "example", for now', got, remedy)
    if config.noise is not None:
        sampling = config.cohort.of(config.data.clients or _UNKNOWN_POPULATION)
        config.noise.of(sampling, config.training.rounds, config.noise_damping)


def _check_evaluation(config: Config) -> None:
    """Raise UserError unless scores of single clients may be computed: never in a private run."""
    if config.privacy is not None:
        remedy = "Remove [evaluation], or [privacy] in a simulation of clients whose data are public"
        raise UserError("evaluation.clients", "no private run", "[privacy]: such scores show single clients", remedy)
    if config.data.test != "within":
        got, remedy = repr(config.data.test or "public"), 'Choose natural clients and data.test = "within"'
        raise UserError("evaluation.clients", "clients with own test examples", got, remedy)


def _check_unit(config: Config) -> None:
    """Raise UserError if local work and unit of privacy do not fit each other."""
    examples, work = config.privacy is not None and config.privacy.unit == "example", type(config.local)
    if work is DPSGD and not examples:
        remedy = 'Add it with example_clip, or choose local.work = "local-steps"'
        raise UserError(
            "local.work",
            'privacy.unit = "example" with "dp-sgd"',
            "a run for whole clients" if config.privacy else "a run without privacy",
            remedy,
        )
    bound, method = config.privacy.row_bound if examples and config.privacy else 0.0, bare(config.method)
    if isinstance(method, DPGD) and method.max_norm < bound:
        remedy = f"Set it to {bound:g}, so that full gradients are not clipped twice"
        expected = f"at least {bound:g}, the longest gradient of an example"
        raise UserError("method.max_norm", expected, method.max_norm, remedy)
    if examples and isinstance(config.local, LocalEpochs) and config.local.order == "by-loss":
        expected = 'no order by loss with privacy.unit = "example": one record could change every batch'
        remedy = 'Use dp-sgd for local steps, or set privacy.unit to "client"'
        raise UserError("local.order", expected, '"by-loss"', remedy)
    if examples and work not in (FullGradient, PoissonGradient, DPSGD):
        name = LOCAL_WORKS.name_of(config.local)
        remedy = (
            "After several steps without noise, one example may change everything: use dp-sgd for local steps"
            if config.local.client_lr is not None
            else "Use poisson-gradient: its batches can be accounted for"
        )
        raise UserError("local.work", '"full-gradient", "poisson-gradient" or "dp-sgd"', repr(name), remedy)
    if examples and config.privacy is not None and config.privacy.adjacency == "add-or-remove":
        config.check_positions()
    forgets = has_memory(method) and not method.needs_client_noise and work is not DPSGD
    seen = config.privacy is not None and trust_of(config.privacy.trust).shows_messages
    late = getattr(config.rule, "deadline", None) if seen else None
    if examples and forgets and late:
        expected = "no deadline with a noiseless memory: the server sees late messages that the memory would lack"
        remedy = 'Remove it, or set method.memory = "sent" or privacy.trust = "central"'
        raise UserError("schedule.deadline", expected, late, remedy)
    if examples and not config.rule.draws_cohorts:
        remedy = 'Remove [schedule], or set privacy.unit = "client"'
        raise UserError("[schedule]", 'no such table with privacy.unit = "example"', "a schedule", remedy)


def _check_presence(config: Config) -> None:
    """Raise UserError if clients may miss a round although the method needs everyone in every round."""
    own = own_signal_of(config.method)
    if own is None or not own.needs_everyone:
        return
    expected = f"with {config.method_name}: clients need the model of the last round, which an absent one lacks"
    if config.cohort.sampling != "everyone":
        remedy = 'Set it to "everyone", or choose another method'
        raise UserError("cohort.sampling", f'"everyone" {expected}', repr(config.cohort.sampling), remedy)
    if config.devices is not None:
        raise UserError("[devices]", f"no such table {expected}", "a virtual clock", "Remove [devices] and [schedule]")


def _check_adapter(config: Config) -> None:
    """Raise UserError for a server optimizer that depends on coordinates that FedSVD changes."""
    optimizer = config.method.optimizer if isinstance(config.method, ServerOptimized) else None
    if config.adapter is None or not config.adapter.rotates or optimizer is None or type(optimizer) is Momentum:
        return
    expected = f'no optimizer but "momentum" with adapter.kind = "{ADAPTERS.name_of(config.adapter)}"'
    remedy = 'Remove [server], or set adapter.kind = "ffa-lora"'
    raise UserError("server.optimizer", expected, repr(SERVER_OPTIMIZERS.name_of(optimizer)), remedy)


def _check_sources(config: Config, recorded: Table) -> None:
    """Raise UserError if the source of a class differs from the source that a run recorded in its `config.toml`."""
    for key, source in config.sources.items():
        expected = recorded.get(key, source)
        if expected != source:
            got = f"a different source ({', '.join(f'{part} {source[part][:12]}' for part in sorted(source))})"
            remedy = "Restore the source, or remove the table [sources] for a new experiment"
            raise UserError(f'sources."{key}"', "the source of the first run of this experiment", got, remedy)


def _check_schedule(config: Config) -> None:
    """Raise early the errors that `make_timeline` would raise later."""
    if config.devices is None and config.rule != Synchronous():
        remedy = "Add [devices] with the speed of clients, or remove [schedule]"
        raise UserError("[devices]", "this table with [schedule]", "a missing table", remedy)
    if config.privacy is not None and config.rule.shows_messages:
        trust, schedule = config.privacy.trust, SCHEDULES.name_of(config.rule)
        if not trust_of(trust).shows_messages:
            expected = f'"local" with schedule.kind = "{schedule}": the next client sees each message'
            raise UserError("privacy.trust", expected, f'"{trust}"', 'Set it to "local"')
    sampling = config.cohort.of(config.data.clients or _UNKNOWN_POPULATION)
    config.rule.check(sampling, memory=has_memory(config.method))


@dataclass(frozen=True, kw_only=True)
class _Top:
    name: str
    seed: int

    def __post_init__(self) -> None:
        whole_from("seed", self.seed, 0, "Give a seed such as 7")
        folder_name("name", self.name)


def _table(name: str, value: object) -> Table:
    if not isinstance(value, dict):
        raise UserError(name, "a table", repr(value), f"Write [{name}] and its keys below")
    return value


def _need(tables: Mapping[str, Table], table: str) -> Table:
    if table not in tables:
        raise UserError(f"[{table}]", "this table", "a missing table", f"Add [{table}] to the config")
    return tables[table]


def _read_named(kinds: Registry[T], table: Table, where: str, key: str) -> T:
    if key not in table:
        raise UserError(
            f"{where}.{key}", f"one of {', '.join(sorted(kinds))}", "a missing key", f"Add {key} to [{where}]"
        )
    kind = kinds.resolve(table[key], f"{where}.{key}")
    options = {k: v for k, v in table.items() if k != key}
    refuse_unknown(options, field_names(kind), where, _left_over(where, key, table[key]))
    return read_table(kind, options, where)


def _read_method(tables: Mapping[str, Table], privacy: PrivacyChoice | None, task: TaskKind) -> Method:
    method = _read_named(METHODS, _need(tables, "method"), "method", "name")
    adaptive = read_table(AdaptiveBound, tables["adaptive"], "adaptive") if "adaptive" in tables else None
    method = with_side_values(method, adaptive, None if privacy is None else privacy.metrics(task))
    if "server" not in tables:
        return method
    return optimized(method, _read_named(SERVER_OPTIMIZERS, tables["server"], "server", "optimizer"))


def _left_over(where: str, key: str, name: object) -> str:
    clear = f"-s {where}= -s {where}.{key}={name}"
    return f". If it is left over from another {where} in the file, clear the table first: {clear}"


def _read_data(table: Table) -> DataChoice:
    options = dict(table)
    dataset_kind = DATASETS.resolve(options.pop("name", None), "data.name")
    partition_kind = PARTITIONS.resolve(options.pop("partition", "iid"), "data.partition")
    given = options.pop("clients", None)
    clients = None if given is None else positive_int("data.clients", given, "Give the number of clients")
    shift_kind = SHIFTS.resolve(options.pop("shift"), "data.shift") if "shift" in options else None
    validation = options.pop("validation", None)
    if validation is not None and (isinstance(validation, bool) or not isinstance(validation, int | float)):
        raise UserError("data.validation", "a number", repr(validation), "Give a share such as 0.1")
    if validation is not None and not 0 < validation < 1:
        raise UserError("data.validation", "above 0 and below 1", validation, "Give a share such as 0.1")
    for_dataset, for_partition = field_names(dataset_kind), field_names(partition_kind)
    for_shift = [] if shift_kind is None else field_names(shift_kind)
    for key in for_dataset:
        if key in (*for_partition, *for_shift):
            remedy = "Rename the key of the data set"
            raise UserError(
                f"data.{key}", "a key with one meaning", "a key of both the data set and its partition", remedy
            )
    known = ["name", "clients", "partition", "shift", "validation", "test", *for_dataset, *for_partition, *for_shift]
    known += [] if "standardize" in options else ["standardize"]  # load_config has replaced it
    refuse_unknown(options, known, "data")
    return DataChoice(
        dataset=read_table(dataset_kind, {k: v for k, v in options.items() if k in for_dataset}, "data"),
        partition=read_table(partition_kind, {k: v for k, v in options.items() if k in for_partition}, "data"),
        clients=clients,
        shift=shift_kind and read_table(shift_kind, {k: v for k, v in options.items() if k in for_shift}, "data"),
        validation=validation,
        test=_read_test(options.get("test"), dataset_kind, table.get("partition", "iid")),
    )


def _read_test(given: object, dataset: type[DatasetSource], partition: object) -> Whose | None:
    """Return the choice of test examples for natural clients; None for simulated clients, tested on the pool's."""
    expected = " or ".join(f'"{test}"' for test in TESTS)
    if given is not None and given not in TESTS:
        raise UserError("data.test", expected, repr(given), nearest(str(given), TESTS))
    if PARTITIONS.resolve(partition, "data.partition") is Natural:
        return dataset.test if given is None else given
    if given not in (None, "public"):
        remedy = 'Choose data.partition = "natural", or remove data.test'
        raise UserError("data.test", f"natural clients for {given!r}", f"partition {partition!r}", remedy)
    return None


def _read_cohort(table: Table, clients: int | None) -> CohortChoice:
    options = dict(table)
    name = options.pop("sampling", "everyone")
    if name in _BY_LOSS:
        expected = "a draw that depends on no data: a choice by loss reveals losses, and its cohorts hide no client"
        remedy = 'Choose "poisson"; local.order = "by-loss" orders the examples of each client'
        raise UserError("cohort.sampling", expected, repr(name), remedy)
    kind = SAMPLINGS.resolve(name, "cohort.sampling")
    refuse_unknown(options, field_names(kind, ("population",)), "cohort", _left_over("cohort", "sampling", name))
    sampling = read_table(kind, options, "cohort", population=clients or _UNKNOWN_POPULATION)
    return CohortChoice(sampling=str(name), options=write_table(sampling, ("population",)))


def _write_named(table: Registry[T], instance: T, key: str) -> dict[str, object]:
    return {key: table.name_of(instance), **write_table(instance)}

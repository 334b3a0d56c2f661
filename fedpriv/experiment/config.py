"""Experiments as TOML files: read strictly, resolved completely, identified by a digest."""

import hashlib
import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import tomli_w

from fedpriv.checks import at_least_one, folder_name, positive_int, whole_from
from fedpriv.clock import DEVICES, SCHEDULES, Devices, Schedule, Synchronous
from fedpriv.data.augment import AUGMENTATIONS, Augmentation
from fedpriv.data.dataset import DATASETS, DatasetSource
from fedpriv.data.partitions import PARTITIONS, Natural, Partition, Resampled
from fedpriv.data.shifts import SHIFTS, Shift
from fedpriv.data.validation import TESTS
from fedpriv.errors import UserError, nearest
from fedpriv.experiment.deployment import DeploymentChoice
from fedpriv.experiment.schema import field_names, read_table, refuse_unknown, write_table
from fedpriv.methods import METHODS, SERVER_OPTIMIZERS, Method, ServerOptimized, has_memory, optimized
from fedpriv.plugins import Registry, bare_reference, source_of, whole_reference
from fedpriv.privacy import SAMPLINGS, DataFacts, PrivacyPlan, Sampling, make_plan
from fedpriv.privacy.released import Whose
from fedpriv.streams import SeededStreams
from fedpriv.tasks.local_work import LOCAL_WORKS, LocalWork
from fedpriv.tasks.models import MODELS, ModelSource

__all__ = [
    "Config",
    "check_config",
    "load_config",
    "parse_config",
    "read_config_file",
    "read_config_text",
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
    "local": ("work",),
    "method": ("name",),
    "server": ("optimizer",),
    "devices": ("kind",),
    "schedule": ("kind",),
}

# Replaces an unknown population, so that the keys of the cohort can be checked early.
_UNKNOWN_POPULATION = 10**9

TABLES = ("data", "model", "local", "cohort", "method", "server", "privacy", "training")
TABLES += ("augment", "devices", "schedule", "deployment", "sources")

# Tables that change clients' messages or the noise on them. Experiments that differ in one of them, or in the number of
# rounds, have independent noise. The name, the times of evaluation and the deployment change neither.
NOISE_TABLES = ("data", "augment", "model", "local", "cohort", "method", "server", "privacy")
NOISE_TABLES += ("devices", "schedule", "sources")


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
    options: dict[str, Any]

    def of(self, population: int) -> Sampling:
        """Return the sampling of `population` clients."""
        return read_table(SAMPLINGS[self.sampling], self.options, "cohort", population=population)


@dataclass(frozen=True, kw_only=True)
class PrivacyChoice:
    """The privacy guarantee; `fedpriv.Privacy` in Python. Give either `epsilon` or `noise_multiplier`.

    Args:
        trust: `central`: a trusted server adds the noise. `local`: every client adds noise, and the server is the
            adversary.
        adjacency: `add-or-remove` or `replace`; None for the default of the trust.
        delta: Probability in (0, 1) with which the guarantee may fail; well below one over the number of clients.
        epsilon: The target; the noise is calibrated to it.
        noise_multiplier: Noise standard deviation over the sensitivity; epsilon follows from it. 0 for no noise.
        unit: Whose data one unit of the guarantee protects: `client`.
        draw: The number of a trial of a tuning, which decides noise and cohorts alone. None for other runs.

    Raises:
        UserError: If a value is out of range; the plan checks the other values.
    """

    trust: str = "central"
    adjacency: str | None = None
    delta: float = 1e-5
    epsilon: float | None = None
    noise_multiplier: float | None = None
    unit: str = "client"
    draw: int | None = None

    def __post_init__(self) -> None:
        if self.draw is not None:
            whole_from("privacy.draw", self.draw, 0, "Remove it: a tuning sets it")


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
        if not 0 <= self.rounds <= MAX_ROUNDS:
            expected = f"a whole number from 0 to {MAX_ROUNDS:,}"
            raise UserError("training.rounds", expected, self.rounds, "Give the number of rounds")
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

    @cached_property
    def tables(self) -> dict[str, Any]:
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
        deployment = {} if self.deployment is None else {"deployment": write_table(self.deployment)}
        clock = {} if self.devices is None else {"devices": _write_named(DEVICES, self.devices, "kind")}
        clock |= {} if self.schedule is None else {"schedule": _write_named(SCHEDULES, self.schedule, "kind")}
        augment = {} if self.augment is None else {"augment": _write_named(AUGMENTATIONS, self.augment, "name")}
        server = {}
        if isinstance(self.method, ServerOptimized):
            optimizer = self.method.optimizer
            server = {"server": {"optimizer": SERVER_OPTIMIZERS.name_of(optimizer), **write_table(optimizer)}}
        return {
            "name": self.name,
            "seed": self.seed,
            "data": data,
            **augment,
            "model": {"name": MODELS.name_of(self.model), **write_table(self.model)},
            "local": {"work": LOCAL_WORKS.name_of(self.local), **write_table(self.local)},
            "cohort": {"sampling": self.cohort.sampling, **self.cohort.options},
            "method": {"name": self.method_name, **write_table(self.method.client_part)},
            **server,
            **privacy,
            "training": write_table(self.training),
            **clock,
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
            "local.work": self.local,
            "method.name": self.method.client_part,
            "server.optimizer": optimizer,
            "devices.kind": self.devices,
        }
        found = {key: source_of(type(instance)) for key, instance in named.items() if instance is not None}
        return {key: source for key, source in found.items() if source is not None}

    @property
    def method_name(self) -> str:
        """The method's name in the table of methods."""
        return METHODS.name_of(self.method.client_part)

    @property
    def rule(self) -> Schedule:
        """The schedule of server steps; synchronous rounds by default."""
        return self.schedule or Synchronous()

    @property
    def not_covered(self) -> tuple[str, ...]:
        """Names of the scores that the privacy guarantee does not cover; empty for a run without privacy."""
        return () if self.privacy is None else self.data.facts.not_covered

    @property
    def digest(self) -> str:
        """SHA-256 of the resolved tables except `deployment`: equal digests mean the same experiment.

        For a class in a file, the content of the file matters and its folder does not.
        """
        return _hash({name: table for name, table in self._identity.items() if name != "deployment"})

    @property
    def noise_id(self) -> str:
        """SHA-256 of `NOISE_TABLES` and the number of rounds; with the seed, it decides the noise of a simulation.

        Otherwise two experiments with one seed would share their noise, and the difference of their models would have
        no noise. Equal experiments keep equal bits.
        """
        tables = {name: table for name, table in self._identity.items() if name in NOISE_TABLES}
        return _hash({**tables, "rounds": self.training.rounds})

    @property
    def _identity(self) -> dict[str, Any]:
        """The tables, with file names instead of paths."""
        return with_bare_names(self.tables)

    @property
    def streams(self) -> SeededStreams:
        """The randomness of a simulation. Trials of a tuning share their data, but neither noise nor cohorts."""
        drawn = self.privacy is not None and self.privacy.draw is not None
        return SeededStreams(self.seed, self.noise_id, own_cohorts=drawn)

    def to_toml(self) -> str:
        """Return the resolved experiment as TOML text."""
        return tomli_w.dumps(self.tables)

    def check_deployable(self) -> None:
        """Raise UserError if the experiment needs a simulation.

        Raises:
            UserError: If it shifts clients' inputs, holds out their examples, or has the table `[devices]`.
        """
        self.check_unclocked()
        remedy = "Remove the key: a deployment does not change devices' data, and tests on the server's data"
        if self.data.validation is not None:
            raise UserError("data.validation", "no value in a deployment", self.data.validation, remedy)
        if self.data.shift is not None:
            raise UserError("data.shift", "no value in a deployment", repr(SHIFTS.name_of(self.data.shift)), remedy)

    def check_unclocked(self) -> None:
        """Raise UserError if the experiment has a virtual clock; real devices and Flower cannot keep one.

        Raises:
            UserError: If it has the table `[devices]`.
        """
        if self.devices is not None:
            remedy = "Choose an engine in process, or remove [devices] and [schedule]"
            raise UserError("[devices]", "no such table with Flower", "a virtual clock", remedy)

    def plan(self, sampling: Sampling) -> PrivacyPlan | None:
        """Return the privacy plan with these cohorts, or None for a non-private run.

        Raises:
            ValueError: If the schedule has its own timeline of cohorts and `sampling` draws others, or the reverse.
        """
        if sampling.draws_cohorts != self.rule.draws_cohorts:
            raise ValueError(f"{self.rule} is not accounted by {sampling.name}")
        if self.privacy is None:
            return None
        return make_plan(
            sampling=sampling,
            rounds=self.training.rounds,
            l2_bound=self.method.bounded.l2_bound,
            client_memory=has_memory(self.method),
            **{field: getattr(self.privacy, field) for field in field_names(PrivacyChoice, ("draw",))},
        )


def _hash(tables: dict[str, Any]) -> str:
    canonical = json.dumps(tables, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def load_config(source: Path | str | Mapping[str, Any], settings: Sequence[str] = ()) -> Config:
    """Read an experiment.

    Args:
        source: Its TOML file, or the tables of such a file.
        settings: Changes as `table.key=value`, the value in TOML or a bare word; an empty value removes the key.

    Raises:
        UserError: If it is not a valid experiment.
    """
    tables = dict(source) if isinstance(source, Mapping) else read_config_file(Path(source))
    return parse_config(with_whole_paths(apply_settings(tables, settings), Path.cwd()))


def read_config_file(path: Path) -> dict[str, Any]:
    """Return the tables of a TOML file; paths of classes (`"./own.py:Class"`) are relative to the TOML file."""
    try:
        return with_whole_paths(read_config_text(path.read_text(encoding="utf-8"), str(path)), path.parent)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(str(path), "a readable TOML file", reason, "Check the path of the config") from None
    except UnicodeDecodeError as error:
        raise UserError(str(path), "a TOML file", str(error), "Correct the file") from None


def read_config_text(text: str, where: str) -> dict[str, Any]:
    """Return the tables of a TOML text; errors name its origin, `where`."""
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(where, "a TOML file", str(error), "Correct the file") from None


def with_whole_paths(tables: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the tables with the file of every `"file.py:Class"` as an absolute path."""
    return _with_names(tables, lambda name: whole_reference(name, folder))


def with_bare_names(tables: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tables with file names instead of paths in references: the folder is no part of an experiment."""
    return _with_names(tables, bare_reference)


def _with_names(tables: Mapping[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """Return the tables with `change` applied to every name of a class."""
    changed = dict(tables)
    for table, keys in _NAMES.items():
        found = tables.get(table)
        if isinstance(found, Mapping):
            changed[table] = {**found, **{key: change(found[key]) for key in keys if key in found}}
    return changed


def apply_settings(tables: dict[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """Return a copy of `tables` with each `table.key=value` applied."""
    changed = {key: dict(value) if isinstance(value, dict) else value for key, value in tables.items()}
    for setting in settings:
        address, equals, value = setting.partition("=")
        parts = address.strip().split(".")
        if not equals or len(parts) > 2 or not all(parts):
            raise UserError(
                f"-s {setting}", "table.key=value", repr(setting), "Write, for example, -s training.rounds=20"
            )
        _put(changed, parts, value.strip())
    return changed


def _put(tables: dict[str, Any], parts: list[str], value: str) -> None:
    place = tables
    if len(parts) == 2:
        place = tables.setdefault(parts[0], {})
        if not isinstance(place, dict):
            raise UserError(".".join(parts), "a table", f"the key {parts[0]}", f"Use -s {parts[0]}=value")
    if value:
        place[parts[-1]] = _toml_value(value)
    else:
        place.pop(parts[-1], None)


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    except (ValueError, RecursionError) as error:
        raise UserError("-s", "a TOML value", str(error), "Give a shorter value") from None


def parse_config(tables: dict[str, Any]) -> Config:
    """Return the experiment that TOML tables describe; see `load_config` for errors."""
    if "base" in tables and "data" not in tables:
        raise UserError("base", "an experiment", "a sweep", "Use fedpriv sweep")
    refuse_unknown(tables, ["name", "seed", *TABLES], "")
    for table in TABLES:
        if not isinstance(tables.get(table, {}), dict):
            raise UserError(table, "a table", repr(tables[table]), f"Write [{table}] and its keys below")
    top = read_table(_Top, {key: tables[key] for key in ("name", "seed") if key in tables}, "")
    data = _read_data(_need(tables, "data"))
    local = _read_named(LOCAL_WORKS, tables.get("local", {"work": "full-gradient"}), "local", "work")
    config = Config(
        name=top.name,
        seed=top.seed,
        data=data,
        model=_read_named(MODELS, _need(tables, "model"), "model", "name"),
        local=local,
        cohort=_read_cohort(tables.get("cohort", {"sampling": "everyone"}), data.clients),
        method=_read_method(tables),
        privacy=read_table(PrivacyChoice, tables["privacy"], "privacy") if "privacy" in tables else None,
        training=read_table(Training, _need(tables, "training"), "training"),
        augment=_read_named(AUGMENTATIONS, tables["augment"], "augment", "name") if "augment" in tables else None,
        deployment=read_table(DeploymentChoice, tables["deployment"], "deployment") if "deployment" in tables else None,
        devices=_read_named(DEVICES, tables["devices"], "devices", "kind") if "devices" in tables else None,
        schedule=_read_named(SCHEDULES, tables["schedule"], "schedule", "kind") if "schedule" in tables else None,
    )
    _check_sources(config, tables.get("sources", {}))
    check_config(config)
    return config


def check_config(config: Config) -> None:
    """Raise UserError if parts of an experiment do not fit each other."""
    _check_schedule(config)
    if config.method.client_part.needs_gradient_scale and config.local.signal == "move":
        expected = f'"gradient-sum" or "gradient-mean" with {config.method_name}, which divides by client_lr'
        raise UserError(
            "local.signal",
            expected,
            '"move"',
            "Set it to one of the two, or choose alpha-normec, which does not divide",
        )
    if config.deployment is not None:
        config.deployment.check(config.method)


def _check_sources(config: Config, recorded: Mapping[str, Any]) -> None:
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
    sampling = config.cohort.of(config.data.clients or _UNKNOWN_POPULATION)
    config.rule.check(sampling, memory=has_memory(config.method))


@dataclass(frozen=True, kw_only=True)
class _Top:
    name: str
    seed: int

    def __post_init__(self) -> None:
        whole_from("seed", self.seed, 0, "Give a seed such as 7")
        folder_name("name", self.name)


def _need(tables: dict[str, Any], table: str) -> dict[str, Any]:
    if table not in tables:
        raise UserError(f"[{table}]", "this table", "a missing table", f"Add [{table}] to the config")
    return tables[table]


def _read_named(kinds: Registry[T], table: dict[str, Any], where: str, key: str) -> T:
    if key not in table:
        raise UserError(
            f"{where}.{key}", f"one of {', '.join(sorted(kinds))}", "a missing key", f"Add {key} to [{where}]"
        )
    kind = kinds.resolve(table[key], f"{where}.{key}")
    options = {k: v for k, v in table.items() if k != key}
    refuse_unknown(options, field_names(kind), where, _left_over(where, key, table[key]))
    return read_table(kind, options, where)


def _read_method(tables: dict[str, Any]) -> Method:
    method = _read_named(METHODS, _need(tables, "method"), "method", "name")
    if "server" not in tables:
        return method
    return optimized(method, _read_named(SERVER_OPTIMIZERS, tables["server"], "server", "optimizer"))


def _left_over(where: str, key: str, name: object) -> str:
    clear = f"-s {where}= -s {where}.{key}={name}"
    return f". If it is left over from another {where} in the file, clear the table first: {clear}"


def _read_data(table: dict[str, Any]) -> DataChoice:
    options = dict(table)
    dataset_kind = DATASETS.resolve(options.pop("name", "nothing"), "data.name")
    partition_kind = PARTITIONS.resolve(options.pop("partition", "iid"), "data.partition")
    clients = options.pop("clients", None)
    if clients is not None:
        positive_int("data.clients", clients, "Give the number of clients")
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
    refuse_unknown(options, known, "data")
    return DataChoice(
        dataset=read_table(dataset_kind, {k: v for k, v in options.items() if k in for_dataset}, "data"),
        partition=read_table(partition_kind, {k: v for k, v in options.items() if k in for_partition}, "data"),
        clients=clients,
        shift=shift_kind and read_table(shift_kind, {k: v for k, v in options.items() if k in for_shift}, "data"),
        validation=validation,
        test=_read_test(options.get("test"), dataset_kind, table.get("partition", "iid")),
    )


def _read_test(given: Any, dataset: type[DatasetSource], partition: str) -> Whose | None:
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


def _read_cohort(table: dict[str, Any], clients: int | None) -> CohortChoice:
    options = dict(table)
    name = options.pop("sampling", "everyone")
    kind = SAMPLINGS.resolve(name, "cohort.sampling")
    refuse_unknown(options, field_names(kind, ("population",)), "cohort", _left_over("cohort", "sampling", name))
    sampling = read_table(kind, options, "cohort", population=clients or _UNKNOWN_POPULATION)
    return CohortChoice(sampling=name, options=write_table(sampling, ("population",)))


def _write_named(table: Registry[Any], instance: object, key: str) -> dict[str, Any]:
    return {key: table.name_of(instance), **write_table(instance)}

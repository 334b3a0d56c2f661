"""One experiment, one TOML file: read strictly, resolved completely, identified by a digest."""

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

# Keys whose values name a class, by table.
_NAMES = {
    "data": ("name", "partition", "shift"),
    "model": ("name",),
    "local": ("work",),
    "method": ("name",),
    "server": ("optimizer",),
    "devices": ("kind",),
    "schedule": ("kind",),
}

# Stands for the population while it is not known, so that the cohort's own keys can be checked at once.
_UNKNOWN_POPULATION = 10**9

TABLES = ("data", "model", "local", "cohort", "method", "server", "privacy", "training")
TABLES += ("devices", "schedule", "deployment", "sources")

# Tables that change what clients send or how much noise is on it. Experiments that differ in one of them, or in the
# number of rounds, have independent noise. A name, the times of evaluation and the deployment change none of it.
NOISE_TABLES = ("data", "model", "local", "cohort", "method", "server", "privacy", "devices", "schedule", "sources")


@dataclass(frozen=True, kw_only=True)
class DataChoice:
    """Which data, and how they are spread over how many clients (None: as many as there naturally are).

    `shift` is what each client's inputs undergo, `validation` the share of examples held out before; None for neither.
    `test` says on whose examples natural clients' models are tested (`validation.TESTS`); None for simulated clients.
    """

    dataset: DatasetSource
    partition: Partition
    clients: int | None
    shift: Shift | None = None
    validation: float | None = None
    test: Whose | None = None

    @property
    def facts(self) -> DataFacts:
        """Whose examples are used for what, for the privacy statement."""
        natural = self.test is not None
        held: Whose = "within" if natural else "public"
        return DataFacts(
            clients="natural" if natural else "resampled" if isinstance(self.partition, Resampled) else "simulated",
            test=self.test or "public",
            validation=None if self.validation is None else "clients" if self.test == "clients" else held,
        )


@dataclass(frozen=True, kw_only=True)
class CohortChoice:
    """How a round's clients are chosen; becomes a `Sampling` once the population is known."""

    sampling: str
    options: dict[str, Any]

    def of(self, population: int) -> Sampling:
        """The sampling of `population` clients."""
        return read_table(SAMPLINGS[self.sampling], self.options, "cohort", population=population)


@dataclass(frozen=True, kw_only=True)
class PrivacyChoice:
    """What is promised: see `fedpriv.privacy.make_plan`.

    `draw` tells the trials of a tuning apart: it decides noise and cohorts, and nothing else. None for other runs.
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
            whole_from("privacy.draw", self.draw, 0, "Take it away: a tuning gives it")


@dataclass(frozen=True, kw_only=True)
class Training:
    """How long, and how often the test data are looked at.

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
        at_least_one("training.evaluate_every", self.evaluate_every, "1 evaluates every round")

    def evaluates(self, round: int) -> bool:
        """Whether the model after `round` is evaluated."""
        return round in (0, self.rounds) or round % self.evaluate_every == 0


@dataclass(frozen=True, kw_only=True)
class Config:
    """An experiment, resolved: every default spelled out, nothing about how fast or where it runs."""

    name: str
    seed: int
    data: DataChoice
    model: ModelSource
    local: LocalWork
    cohort: CohortChoice
    method: Method
    privacy: PrivacyChoice | None
    training: Training
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
        # Public test examples alone are what there was before the key: such experiments keep their digest.
        if self.data.test is not None and (self.data.test != "public" or self.data.validation is not None):
            data["test"] = self.data.test
        privacy = {} if self.privacy is None else {"privacy": write_table(self.privacy)}
        deployment = {} if self.deployment is None else {"deployment": write_table(self.deployment)}
        clock = {} if self.devices is None else {"devices": _write_named(DEVICES, self.devices, "kind")}
        clock |= {} if self.schedule is None else {"schedule": _write_named(SCHEDULES, self.schedule, "kind")}
        server = {}
        if isinstance(self.method, ServerOptimized):
            optimizer = self.method.optimizer
            server = {"server": {"optimizer": SERVER_OPTIMIZERS.name_of(optimizer), **write_table(optimizer)}}
        return {
            "name": self.name,
            "seed": self.seed,
            "data": data,
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
        """Where the classes come from that are not of fedpriv, by the key that names them; see `plugins.source_of`.

        They are part of the experiment: one with another source is another experiment.
        """
        optimizer = self.method.optimizer if isinstance(self.method, ServerOptimized) else None
        named = {
            "data.name": self.data.dataset,
            "data.partition": self.data.partition,
            "data.shift": self.data.shift,
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
        """When the server moves; rounds, if nothing is said."""
        return self.schedule or Synchronous()

    @property
    def not_covered(self) -> tuple[str, ...]:
        """Names of the scores that the experiment's promise does not cover; empty if nothing is promised at all."""
        return () if self.privacy is None else self.data.facts.not_covered

    @property
    def digest(self) -> str:
        """SHA-256 of the resolved tables but `deployment`: equal digests are the same experiment.

        The folder of a file that holds a class does not matter; its content does.
        """
        return _hash({name: table for name, table in self._identity.items() if name != "deployment"})

    @property
    def noise_id(self) -> str:
        """SHA-256 of `NOISE_TABLES` and the number of rounds; with the seed, it decides the noise of a simulation.

        Two experiments with one seed would otherwise share their noise, and the difference of their models would
        have none. Equal experiments keep equal bits.
        """
        tables = {name: table for name, table in self._identity.items() if name in NOISE_TABLES}
        return _hash({**tables, "rounds": self.training.rounds})

    @property
    def _identity(self) -> dict[str, Any]:
        """The tables, with the bare names of files."""
        return with_bare_names(self.tables)

    @property
    def streams(self) -> SeededStreams:
        """The randomness of a simulation; trials of a tuning share their data, and neither noise nor cohorts."""
        drawn = self.privacy is not None and self.privacy.draw is not None
        return SeededStreams(self.seed, self.noise_id, own_cohorts=drawn)

    def to_toml(self) -> str:
        """The resolved experiment as a TOML file."""
        return tomli_w.dumps(self.tables)

    def check_deployable(self) -> None:
        """Refuses what is made of data that only a simulation has in one place, and a clock that only it can keep.

        Raises:
            UserError: If clients' inputs are to be shifted, or their examples held out, or there are `[devices]`.
        """
        self.check_unclocked()
        remedy = "Take the key away: a device's data are what they are, and the server's own are its test data"
        if self.data.validation is not None:
            raise UserError("data.validation", "none in a deployment", self.data.validation, remedy)
        if self.data.shift is not None:
            raise UserError("data.shift", "none in a deployment", repr(SHIFTS.name_of(self.data.shift)), remedy)

    def check_unclocked(self) -> None:
        """Refuses a virtual clock where none can be kept: with real devices, or Flower's.

        Raises:
            UserError: If there are `[devices]`.
        """
        if self.devices is not None:
            remedy = "Choose an engine in process, or take [devices] and [schedule] away"
            raise UserError("[devices]", "none with Flower", "a virtual clock", remedy)

    def plan(self, sampling: Sampling) -> PrivacyPlan | None:
        """The privacy plan with these cohorts, or None for a non-private run.

        Raises:
            ValueError: If the schedule settles who counts, and the sampling is not its timeline's.
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
    """Reads an experiment.

    Args:
        source: Its TOML file, or the tables that such a file would hold.
        settings: Changes as `table.key=value`, the value in TOML or a bare word; an empty value removes the key.

    Raises:
        UserError: On anything that is not a valid experiment.
    """
    tables = dict(source) if isinstance(source, Mapping) else read_config_file(Path(source))
    return parse_config(with_whole_paths(apply_settings(tables, settings), Path.cwd()))


def read_config_file(path: Path) -> dict[str, Any]:
    """The tables of a TOML file; a class of a file (`"./own.py:Class"`) is looked for from the TOML file's folder."""
    try:
        return with_whole_paths(read_config_text(path.read_text(encoding="utf-8"), str(path)), path.parent)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(str(path), "a readable TOML file", reason, "Check the path of the config") from None
    except UnicodeDecodeError as error:
        raise UserError(str(path), "a TOML file", str(error), "Mend the file") from None


def read_config_text(text: str, where: str) -> dict[str, Any]:
    """The tables of a TOML text; `where` it is from, for errors."""
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(where, "a TOML file", str(error), "Mend the file") from None


def with_whole_paths(tables: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The tables with the file of every `"file.py:Class"` as an absolute path."""
    return _with_names(tables, lambda name: whole_reference(name, folder))


def with_bare_names(tables: Mapping[str, Any]) -> dict[str, Any]:
    """The tables with every `"folder/file.py:Class"` without its folder, which makes no other experiment."""
    return _with_names(tables, bare_reference)


def _with_names(tables: Mapping[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """The tables with every name of a class changed."""
    changed = dict(tables)
    for table, keys in _NAMES.items():
        found = tables.get(table)
        if isinstance(found, Mapping):
            changed[table] = {**found, **{key: change(found[key]) for key in keys if key in found}}
    return changed


def apply_settings(tables: dict[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """A copy of `tables` with each `table.key=value` put in."""
    changed = {key: dict(value) if isinstance(value, dict) else value for key, value in tables.items()}
    for setting in settings:
        address, equals, value = setting.partition("=")
        parts = address.strip().split(".")
        if not equals or len(parts) > 2 or not all(parts):
            raise UserError(f"-s {setting}", "table.key=value", repr(setting), "For example -s training.rounds=20")
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
    """The experiment that TOML tables describe; see `load_config` for errors."""
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
        raise UserError("local.signal", expected, '"move"', "Set it to one of the two; alpha-normec takes bare moves")
    if config.deployment is not None:
        config.deployment.check(config.method)


def _check_sources(config: Config, recorded: Mapping[str, Any]) -> None:
    """Refuses to take a class whose source differs from what a run has recorded in its `config.toml`."""
    for key, source in config.sources.items():
        expected = recorded.get(key, source)
        if expected != source:
            got = f"another one ({', '.join(f'{part} {source[part][:12]}' for part in sorted(source))})"
            remedy = "Restore the source, or remove the table [sources] for another experiment"
            raise UserError(f'sources."{key}"', "the source that this experiment was run with", got, remedy)


def _check_schedule(config: Config) -> None:
    """Finds early what `make_timeline` would find later."""
    if config.devices is None and config.rule != Synchronous():
        remedy = "Say how fast clients are, or take [schedule] away"
        raise UserError("[devices]", "this table beside [schedule]", "nothing", remedy)
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
        raise UserError(f"[{table}]", "this table", "nothing", f"Add [{table}] to the config")
    return tables[table]


def _read_named(kinds: Registry[T], table: dict[str, Any], where: str, key: str) -> T:
    if key not in table:
        raise UserError(f"{where}.{key}", f"one of {', '.join(sorted(kinds))}", "nothing", f"Add {key} to [{where}]")
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
            remedy = "Rename the data set's"
            raise UserError(f"data.{key}", "a key of one thing", "one of the data set and of its partition", remedy)
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
    """On whose examples natural clients' models are tested; None for simulated clients, who have the pool's."""
    expected = " or ".join(f'"{test}"' for test in TESTS)
    if given is not None and given not in TESTS:
        raise UserError("data.test", expected, repr(given), nearest(str(given), TESTS))
    if PARTITIONS.resolve(partition, "data.partition") is Natural:
        return dataset.test if given is None else given
    if given not in (None, "public"):
        remedy = 'Choose data.partition = "natural", or take data.test away'
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

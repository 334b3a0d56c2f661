"""The ready module of a run: built from its `config.toml`, with the trained weights, in evaluation mode."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from fedpriv.checks import a_path
from fedpriv.data.dataset import DATASETS, DatasetSource
from fedpriv.data.labels import labels_as
from fedpriv.errors import UserError
from fedpriv.experiment.config import read_config_file
from fedpriv.experiment.in_python import weights_digest
from fedpriv.experiment.results import load_model
from fedpriv.experiment.run_directory import FACTS_FILE, RunDirectory, model_facts
from fedpriv.experiment.schema import field_names, read_table
from fedpriv.plugins import MEMORY, source_of
from fedpriv.streams import Purpose, SeededStreams
from fedpriv.tables import Record, Table
from fedpriv.tasks.adapters import ADAPTERS, Adapter, frozen_digest, merged
from fedpriv.tasks.kinds import TASKS, Classification, TaskKind
from fedpriv.tasks.models import MODELS
from fedpriv.vectors import Layout, trainable

__all__ = ["Trained", "load_module", "load_trained"]


@dataclass(frozen=True)
class Trained:
    """A finished run.

    Args:
        path: The run directory.
        module: Its module with the trained weights, in evaluation mode.
        tables: The tables of its `config.toml`.
        facts: The content of `model.json`; see `fedpriv.experiment.run_directory.model_facts`.
    """

    path: Path
    module: nn.Module
    tables: Record
    facts: Record

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return tuple(self.facts["input_shape"])

    @property
    def classes(self) -> int:
        """Number of labels, targets or tokens."""
        return self.facts["classes"]

    @property
    def class_names(self) -> list[str] | None:
        """The declared names of the labels; None if there are none."""
        return self.facts["class_names"]

    @cached_property
    def task(self) -> TaskKind:
        """The losses and the metrics."""
        return _task(self.tables)

    def record(self, name: str) -> Record:
        """Return one of the run's JSON files; empty if it is missing."""
        return RunDirectory(self.path).read_json(name) or {}


def load_module(
    path: Path | str, *, module: nn.Module | None = None, data_root: Path | None = None, merge: bool = False
) -> nn.Module:
    """Return the trained module of a finished run, in evaluation mode, on the CPU.

        net = fedpriv.load_module("runs/quickstart")
        outputs = net(inputs)  # prepared inputs, float32 [batch, *input_shape]

    Args:
        path: The run directory.
        module: The module of the run, if the run was made in Python with a model in memory. A copy gets the weights.
        data_root: The folder of the data sets; used for runs of older versions alone, which have no `model.json`.
        merge: Return the model that was adapted, with the adapters added to its weights, instead of the adapted one.

    Raises:
        UserError: If the run is not finished, its model cannot be built again, or the module has other parameters.
    """
    made = load_trained(path, module=module, data_root=data_root).module
    return merged(made) if merge else made


def load_trained(path: Path | str, *, module: nn.Module | None = None, data_root: Path | None = None) -> Trained:
    """Return a finished run with its trained module; see `load_module`."""
    folder = a_path("path", path)
    data_root = None if data_root is None else a_path("data_root", data_root)
    if not (folder / "config.toml").is_file():
        got = "a folder without config.toml" if folder.is_dir() else "a path without a folder"
        raise UserError(str(folder), "the folder of a finished run", got, "Create one with: fedpriv run CONFIG")
    weights, tables = load_model(folder), read_config_file(folder / "config.toml")
    table = _part(tables, "model")
    if module is None and str(table.get("name")).startswith(f"{MEMORY}:"):
        remedy = f"Call fedpriv.load_module({str(folder)!r}, module=...) with the module that was given as model"
        got = f"{table['name']!r}, an object of a Python program"
        raise UserError("module", "the module of this run", got, remedy)
    facts = _facts(folder, tables, data_root)
    if module is None:
        made = _built(tables, table, facts)
    elif not isinstance(module, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise UserError("module", "a torch module", repr(module)[:60], "Give the module of this run")
    else:
        made = copy.deepcopy(module).cpu()
        _refuse_other_frozen(made, _recorded(tables))
        made = _adapted(made, tables, facts)
    _refuse_other_layout(made, weights)
    recorded = facts.get("frozen_sha256")
    if recorded is not None and frozen_digest(made) != recorded:
        remedy = "Restore the files or the versions of the run: it stores the trained weights alone"
        raise UserError("model", "the frozen weights of the run", "a model with other frozen weights", remedy)
    if module is None and _has_frozen(made):
        _refuse_other_start(made, folder)
    with torch.no_grad():
        for name, parameter in trainable(made).items():
            parameter.copy_(weights[name])
    return Trained(folder, made.eval(), tables, facts)


def _part(tables: Table, name: str) -> Table:
    found = tables.get(name)
    if not isinstance(found, Mapping):
        raise UserError("config.toml", f"a table [{name}]", "a missing table", "Restore the run's config.toml")
    return found


def _recorded(tables: Table) -> Table:
    """Return the recorded source of the model; empty for models of fedpriv."""
    sources = tables.get("sources")
    found = sources.get("model.name") if isinstance(sources, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _task(tables: Table) -> TaskKind:
    if "task" not in tables:
        return Classification()
    table = _part(tables, "task")
    kind = TASKS.resolve(table.get("name"), "task.name")
    return read_table(kind, {key: value for key, value in table.items() if key != "name"}, "task")


def _facts(folder: Path, tables: Table, data_root: Path | None) -> Record:
    """Return the content of `model.json`; for a run of an older version, load the data for it."""
    found = RunDirectory(folder).read_json(FACTS_FILE)
    if found is not None:
        return found
    task, table = _task(tables), _part(tables, "data")
    try:
        kind = DATASETS.resolve(table.get("name"), "data.name")
        known = {key: value for key, value in table.items() if key in field_names(kind)}
        with labels_as(task.labels):
            source = cast(DatasetSource, read_table(kind, known, "data"))
            dataset = source.load(data_root)
    except UserError as error:
        remedy = "Give --data-root, or export it with the version and data of the run"
        got = f"a run of an older version, with data that cannot be loaded: {error}"
        raise UserError(str(folder / FACTS_FILE), "the shape of inputs", got, remedy) from None
    return model_facts(source, dataset, task.width(dataset.classes))


def _built(tables: Table, table: Table, facts: Record) -> nn.Module:
    """Return the untrained model of a config, as the run built it."""
    kind = MODELS.resolve(table.get("name"), "model.name")
    source = source_of(kind)
    recorded = _recorded(tables).get("sha256")
    if source is not None and recorded is not None and source.get("sha256") != recorded:
        remedy = "Restore the file, or call fedpriv.load_module(RUN, module=...)"
        got = f"sha256 {source.get('sha256', 'unknown')[:12]}"
        raise UserError(f"model {table['name']}", f"the source of the run, sha256 {str(recorded)[:12]}", got, remedy)
    settings = read_table(kind, {key: value for key, value in table.items() if key != "name"}, "model")
    return _adapted(settings.build(tuple(facts["input_shape"]), facts["outputs"], _seed(tables)), tables, facts)


def _adapted(module: nn.Module, tables: Table, facts: Record) -> nn.Module:
    """Return the model with the first adapters of the run; the model itself for a run without adapters."""
    adapter = adapter_of(tables)
    return module if adapter is None else adapter.adapted(module, tuple(facts["input_shape"]), _seed(tables))


def adapter_of(tables: Table) -> Adapter | None:
    """Return the settings of a run's adapters; None for none."""
    if "adapter" not in tables:
        return None
    table = _part(tables, "adapter")
    kind = ADAPTERS.resolve(table.get("kind"), "adapter.kind")
    return read_table(kind, {key: value for key, value in table.items() if key != "kind"}, "adapter")


def _seed(tables: Table) -> int:
    """Return the seed of a run's first weights."""
    return int(SeededStreams(cast(int, tables["seed"])).source(Purpose.MODEL).rng.integers(2**31))


def _has_frozen(module: nn.Module) -> bool:
    learned = set(trainable(module))
    return any(name not in learned for name in module.state_dict(keep_vars=True))


def _refuse_other_layout(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    there, here = Layout.of(weights).entries, Layout.of(trainable(module)).entries
    if there == here:
        return
    pairs = [pair for pair in zip(there, here, strict=False) if pair[0] != pair[1]]
    first = pairs[0] if pairs else ((f"{len(there)} trainable tensors",), (f"{len(here)} trainable tensors",))
    expected, got = (" ".join(map(str, part)) for part in first)
    raise UserError("module", f"the trained parameters of the run ({expected})", got, "Give the module of this run")


def _refuse_other_frozen(module: nn.Module, recorded: Table) -> None:
    """Raise UserError if the module's frozen weights may differ from those of the run, which stores trained ones."""
    if recorded.get("module") != MEMORY or not _has_frozen(module) or recorded.get("sha256") == weights_digest(module):
        return
    remedy = "Give the module as it was before training, with its frozen weights"
    raise UserError("module", "the weights that the run began with", "a module with other weights", remedy)


def _refuse_other_start(module: nn.Module, folder: Path) -> None:
    """Raise UserError if the model begins with other weights than in the run: frozen ones may differ, too."""
    if not (folder / "initial.safetensors").is_file():
        return
    first = load_model(folder, "initial.safetensors")
    if all(torch.equal(first[name], parameter.detach().cpu()) for name, parameter in trainable(module).items()):
        return
    remedy = "Use the versions of the run, or call fedpriv.load_module(RUN, module=...) with its module"
    raise UserError("model.name", "the first weights of the run", "different weights from the same seed", remedy)

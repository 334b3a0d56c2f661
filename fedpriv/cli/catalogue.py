"""All names for configs, as `fedpriv list` shows them.

To read them from the classes would import torch. So `python -m fedpriv.cli.catalogue` writes `catalogue.json`, and a
test compares this file with the classes. It also prints the README's table of methods.
"""

import dataclasses
import json
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypedDict

from fedpriv.native import about_compiled, native_library

__all__ = ["catalogue", "described", "methods_table"]

PACKAGE = Path(__file__).parents[1]
FILE = Path(__file__).with_suffix(".json")
GROUPS = {
    "fedpriv.methods": "methods",
    "fedpriv.server_optimizers": "server",
    "fedpriv.datasets": "data",
    "fedpriv.partitions": "partitions",
    "fedpriv.shifts": "shifts",
    "fedpriv.augmentations": "augment",
    "fedpriv.models": "models",
    "fedpriv.tasks": "tasks",
    "fedpriv.local_works": "local",
    "fedpriv.devices": "devices",
    "fedpriv.controllers": "controllers",
}
"""The groups of entry points by which packages add names."""


class Entry(TypedDict):
    """A name's description and the default of each of its keys."""

    about: str
    keys: dict[str, object]


Entries = dict[str, Entry]


def catalogue() -> dict[str, Entries]:
    """Return all names for configs: by kind and name, a description (`about`) and the default of each key (`keys`)."""
    kinds: dict[str, Entries] = json.loads(FILE.read_text(encoding="utf-8"))
    for group, kind in GROUPS.items():
        for entry in entry_points(group=group):
            package = "" if entry.dist is None else f" of {entry.dist.name} {entry.dist.version}"
            kinds[kind].setdefault(entry.name, {"about": f"{entry.value}{package}", "keys": {}})
    files = {
        "client step": PACKAGE / "engines" / "feedback.c",
        "noise": PACKAGE / "mechanisms" / "gaussian.c",
        "softmax": PACKAGE / "tasks" / "softmax.c",
        "pooling": PACKAGE / "tasks" / "pooling.c",
        "convolution": PACKAGE / "tasks" / "convolution.c",
    }
    found = {name: native_library(file, lambda _: None) is not None for name, file in files.items()}
    return {**kinds, "in C": {name: {"about": about_compiled(there), "keys": {}} for name, there in found.items()}}


def described() -> dict[str, Entries]:
    """Return the built-in part of the catalogue, read from the classes."""
    from fedpriv.clock import DEVICES, SCHEDULES
    from fedpriv.data.augment import AUGMENTATIONS
    from fedpriv.data.dataset import DATASETS
    from fedpriv.data.partitions import PARTITIONS
    from fedpriv.data.shifts import SHIFTS
    from fedpriv.experiment.execution import ENGINES
    from fedpriv.mechanisms.controllers import CONTROLLERS
    from fedpriv.methods import METHODS, SERVER_OPTIMIZERS
    from fedpriv.privacy import SAMPLINGS
    from fedpriv.tasks.adapters import ADAPTERS
    from fedpriv.tasks.kinds import TASKS
    from fedpriv.tasks.local_work import LOCAL_WORKS
    from fedpriv.tasks.models import MODELS

    return {
        "methods": _describe(METHODS),
        "server": _describe(SERVER_OPTIMIZERS),
        "data": _describe(DATASETS),
        "partitions": _describe(PARTITIONS),
        "shifts": _describe(SHIFTS),
        "augment": _describe(AUGMENTATIONS),
        "models": _describe(MODELS),
        "adapters": _describe(ADAPTERS),
        "tasks": _describe(TASKS),
        "local": _describe(LOCAL_WORKS),
        "cohorts": _describe(SAMPLINGS, hidden=("population",)),
        "devices": _describe(DEVICES),
        "schedules": _describe(SCHEDULES),
        "controllers": _describe(CONTROLLERS),
        "engines": {name: {"about": about, "keys": {}} for name, about in ENGINES.items()},
    }


def _describe(kinds: Mapping[str, type[Any]], hidden: tuple[str, ...] = ()) -> Entries:
    return {
        name: {
            "about": _first_line(kind),
            "keys": {f.name: _default(f) for f in dataclasses.fields(kind) if f.init and f.name not in hidden},
        }
        for name, kind in kinds.items()
        if kind.__module__.partition(".")[0] == "fedpriv"
    }


def _default(field: dataclasses.Field[object]) -> object:
    if field.default is not dataclasses.MISSING:
        return field.default
    return "required" if field.default_factory is dataclasses.MISSING else field.default_factory()


def _first_line(kind: type) -> str:
    return (kind.__doc__ or "").strip().splitlines()[0]


def methods_table() -> str:
    """Return a Markdown table with a row for each method of fedpriv."""
    from fedpriv.methods.base import METHODS, Row

    heads = Row(message="message of client i", memory="memory", server="server", source="source")
    rows = {"`method.name`": heads, **{f"`{name}`": kind.row for name, kind in METHODS.items()}}
    head, *lines = (
        f"| {' | '.join((name, *(cell.replace('|', chr(92) + '|') for cell in row)))} |" for name, row in rows.items()
    )
    return "\n".join((head, "|---" * (len(heads) + 1) + "|", *lines))


if __name__ == "__main__":
    FILE.write_text(json.dumps(described(), indent=1) + "\n", encoding="utf-8")
    print(methods_table())

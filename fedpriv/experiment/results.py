"""Read runs back as tidy tables."""

import json
import math
import shlex
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedpriv.checks import a_path, shown
from fedpriv.data.heterogeneity import metrics_of
from fedpriv.errors import UserError
from fedpriv.experiment.analyses.answers_file import ANALYSIS_FILE
from fedpriv.experiment.run_directory import CLIENTS_FILE, HETEROGENEITY_FILE, RunDirectory, flat_tables
from fedpriv.privacy import rounded_up
from fedpriv.tables import Record
from fedpriv.vectors import Layout

__all__ = ["compare_runs", "load_model", "load_results"]


def load_results(path: Path | str) -> pd.DataFrame:
    """Return one row per recorded round of one run, or of all runs below a folder.

    Args:
        path: A run directory, or a folder that contains run directories at any depth.

    Returns:
        Columns `run` (the directory's path relative to `path`), every key of the config as `table.key` (such as
        `privacy.trust`), `engine`, the values of `heterogeneity.json` as `heterogeneity.label_tv` and so on, those of
        `[evaluation]` as `clients.accuracy.worst_decile` and so on, and the columns of `rounds.jsonl` and
        `diagnostics.jsonl`. Missing values are NaN; numbers are then float64. Lists are text, separated by commas, such
        as `not_covered`, the scores that a run's epsilon does not cover.

    Raises:
        UserError: If there is no run, or if a run's file is damaged or lacks rows.
    """
    root = a_path("path", path)
    directories = sorted(file.parent for file in root.rglob("config.toml") if (file.parent / "rounds.jsonl").exists())
    if not directories:
        expected = "a run directory, or a folder of run directories"
        raise UserError(str(root), expected, "a folder without runs", "Create one with: fedpriv run CONFIG")
    rows = [row for folder in directories for row in _one_run(folder, root)]
    names = dict.fromkeys(name for row in rows for name in row)
    return pd.DataFrame({name: _column([row.get(name) for row in rows]) for name in names})


def _column(values: list[object]) -> "pd.Series[Any]":
    """Return a column: of float64 if it holds numbers and some are missing; other missing values are NaN.

    A column of a value that no run has, such as epsilon without privacy, is a column of numbers, all NaN.
    """
    there = [value for value in values if value is not None]
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in there):
        return pd.Series(values, dtype=None if len(there) == len(values) else "float64")
    return pd.Series([math.nan if value is None else _hashable(value) for value in values])


def _hashable(value: object) -> object:
    """Return lists as text, separated by commas, and tables as JSON, by which rows can be grouped."""
    if isinstance(value, list) and not any(isinstance(item, list | dict) for item in value):
        return ", ".join(map(str, value))
    return json.dumps(value) if isinstance(value, list | dict) else value


def load_model(path: Path | str, name: str = "model.safetensors") -> dict[str, Tensor]:
    """Return the final model of a run as named tensors, ready for `module.load_state_dict`.

    `fedpriv.load_module` returns the module itself.

    Args:
        path: A run directory.
        name: The file; `initial.safetensors` is the first model.

    Raises:
        UserError: If the run is not finished.
    """
    file = a_path("path", path) / a_path("name", name)
    try:
        with safe_open(str(file), framework="pt") as content:
            entries = json.loads(content.metadata()["layout"])
            vector = content.get_tensor("model")
    except FileNotFoundError:
        raise _no_finished_run(file.parent) from None
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise UserError(
            str(file), "the model of a finished run", repr(error), "Finish the run with fedpriv run ... --resume"
        ) from None
    return Layout(tuple((name, tuple(shape)) for name, shape in entries)).unflatten(vector)


def compare_runs(paths: Sequence[Path | str]) -> pd.DataFrame:
    """Compare finished runs in one table.

    Args:
        paths: Run directories.

    Returns:
        One column per run. Rows are the config keys that differ, then values of the summaries, with epsilon rounded up.
        `not_covered` lists the scores that a run's epsilon does not cover.

    Raises:
        UserError: If a run is not finished.
    """
    columns: dict[str, dict[str, object]] = {}
    configs = {}
    if isinstance(paths, str | Path) or not isinstance(paths, Sequence):
        raise UserError("paths", "a list of run directories", shown(paths), "Give paths a list")
    for path in paths:
        directory = RunDirectory(a_path("paths", path))
        summary = directory.read_json("summary.json")
        if summary is None or directory.file(ANALYSIS_FILE).exists():
            raise _no_finished_run(directory.path)
        configs[str(path)] = flat_tables(tomllib.loads(directory.file("config.toml").read_text(encoding="utf-8")))
        scored = [key for on in ("test_", "validation_") for key in summary if key.startswith(on)]
        first = ["method", *(key for key in scored if key.startswith("test_"))]
        columns[str(path)] = {key: _shown(key, summary.get(key)) for key in (*first, *_COMPARED)}
        columns[str(path)] |= {key: _shown(key, summary[key]) for key in (*scored, *_IF_THERE) if key in summary}
    keys = list(dict.fromkeys(key for config in configs.values() for key in config))
    differing = [key for key in keys if len({str(config.get(key)) for config in configs.values()}) > 1]
    differing = [key for key in differing if not _told_twice(key, configs, columns)]
    rows = list(dict.fromkeys(key for column in columns.values() for key in column))
    together = {
        run: {**{key: configs[run].get(key) for key in differing}, **{key: column.get(key) for key in rows}}
        for run, column in columns.items()
    }
    return pd.DataFrame(together, dtype=object)


def _no_finished_run(path: Path) -> UserError:
    """Return the error for a folder without a finished run of a model."""
    where, wanted = str(path), "the folder of a finished run"
    if not path.is_dir():
        return UserError(where, wanted, "a path without a folder", "Create one with: fedpriv run CONFIG")
    if (path / ANALYSIS_FILE).exists() or (path / "level-1").is_dir():
        remedy = f"Print its answers with fedpriv analyze CONFIG --out {shlex.quote(where)} --resume"
        return UserError(where, "a run that trains a model", "an analysis", remedy)
    if (path / "config.toml").exists():
        return UserError(where, "a finished run", "an unfinished one", "Finish it with fedpriv run ... --resume")
    first = next(iter(sorted(path.rglob("summary.json"))), None)
    if first is None:
        return UserError(where, wanted, "a folder without runs", "Create one with: fedpriv run CONFIG")
    several = shlex.quote(str(first.parent.parent))
    return UserError(where, wanted, "a folder of runs", f"Name its runs, such as {several}/*, or use fedpriv report")


def _told_twice(key: str, configs: dict[str, Record], columns: dict[str, dict[str, object]]) -> bool:
    """Return True for a key of `[privacy]` that says of every run the same as its summary."""
    table, _, name = key.rpartition(".")
    if table != "privacy" or name not in _PROMISE:
        return False
    return all(config.get(key) == columns[run].get(name) for run, config in configs.items())


_PROMISE = ("epsilon", "delta", "trust", "adjacency")
_COMPARED = (*_PROMISE, "rounds", "engine", "seconds")
_IF_THERE = ("not_covered", "simulated_seconds", "bytes_down", "bytes_up")


def _shown(key: str, value: object) -> object:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if not isinstance(value, float):
        return value
    return float(rounded_up(value) if key == "epsilon" else f"{value:.6g}")


def _one_run(folder: Path, root: Path) -> list[Record]:
    directory = RunDirectory(folder)
    released = directory.rows("rounds.jsonl")
    diagnostics = {row["round"]: row for row in directory.rows("diagnostics.jsonl")}
    config = flat_tables(tomllib.loads(directory.file("config.toml").read_text(encoding="utf-8")))
    summary = directory.read_json("summary.json") or {}
    _require_all_rounds(directory, [row["round"] for row in released], summary.get("rounds"))
    measured = metrics_of(directory.read_json(HETEROGENEITY_FILE) or {})
    clients_differ: Record = {f"heterogeneity.{key}": value for key, value in measured.items()}
    found = (directory.read_json(CLIENTS_FILE) or {}).get("distribution", {})
    clients_differ |= {f"clients.{key}.{name}": value for key, row in found.items() for name, value in row.items()}
    constants = {"run": str(folder.relative_to(root)), "engine": summary.get("engine"), **config, **clients_differ}
    return [{**constants, **row, **diagnostics.get(row["round"], {})} for row in released]


def _require_all_rounds(directory: RunDirectory, found: list[int], rounds: int | None) -> None:
    """Raise UserError unless there is a row for every round: to the last recorded one, or to `rounds` if not None."""
    wanted = range((found[-1] if rounds is None else rounds) + 1) if found or rounds is not None else range(0)
    if found != list(wanted):
        lacking = sorted(set(wanted) - set(found))
        got = f"rows without round {lacking[0]}" if lacking else f"{len(found)} rows, in another order"
        remedy = "Restore the file from a copy, or move the run out of the folder"
        expected = f"one row for each round from 0 to {wanted[-1]}, in order"
        raise UserError(str(directory.file("rounds.jsonl")), expected, got, remedy)

"""Reading runs back, as tidy tables."""

import tomllib
from pathlib import Path
from typing import Any

import pandas as pd

from fedpriv.errors import UserError
from fedpriv.experiment.records import RunDirectory

__all__ = ["load_results"]


def load_results(path: Path | str) -> pd.DataFrame:
    """One row per recorded round of one run, or of all runs below a folder.

    Args:
        path: A run directory, or a folder that holds run directories at any depth.

    Returns:
        Columns `run` (the directory's path relative to `path`), every key of the config as `table.key`, `engine`,
        and the columns of `rounds.jsonl` and `diagnostics.jsonl`; what a row lacks is NaN.

    Raises:
        UserError: If there is no run.
    """
    root = Path(path)
    directories = sorted(file.parent for file in root.rglob("config.toml") if (file.parent / "rounds.jsonl").exists())
    if not directories:
        raise UserError(str(root), "a run directory, or a folder of them", "none", "Make one with: fedpriv run CONFIG")
    return pd.concat([_one_run(folder, root) for folder in directories], ignore_index=True)


def _one_run(folder: Path, root: Path) -> pd.DataFrame:
    directory = RunDirectory(folder)
    released = pd.DataFrame(directory.rows("rounds.jsonl"))
    diagnostics = pd.DataFrame(directory.rows("diagnostics.jsonl"), columns=_columns(directory))
    table = released.merge(diagnostics, on="round", how="left")
    summary = directory.read_json("summary.json") or {}
    constants = {"run": str(folder.relative_to(root)), "engine": summary.get("engine"), **_flat_config(folder)}
    return pd.DataFrame({key: [value] * len(table) for key, value in constants.items()}).join(table)


def _columns(directory: RunDirectory) -> list[str]:
    rows = directory.rows("diagnostics.jsonl")
    return list(rows[0]) if rows else ["round"]


def _flat_config(folder: Path) -> dict[str, Any]:
    tables = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
    flat: dict[str, Any] = {}
    for key, value in tables.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": item for inner, item in value.items()}
        else:
            flat[key] = value
    return flat

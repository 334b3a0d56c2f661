"""The table of a sweep's trials: `trials.csv`, made of what lies in their folders."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from fedpriv.errors import UserError
from fedpriv.experiment.run_directory import RunDirectory, flat_tables
from fedpriv.files import write_atomically
from fedpriv.sweeps.config import Trial
from fedpriv.sweeps.files import FAILURE, STOPPED, TABLE, status_of

__all__ = ["TrialsTable", "label", "other_trials"]

_FIGURES = ("test_accuracy", "test_loss", "epsilon", "rounds", "population", "parameters", "seconds")
_VALIDATED = ("validation_accuracy", "validation_loss")
# Writing takes at most about this share of the time, however many trials there are.
_SHARE = 0.01


def label(trial: Trial) -> str:
    """What a trial changes, in short."""
    return " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in flat_tables(trial.changes).items())


def other_trials(table: pd.DataFrame, trials: Path) -> int:
    """How many folders there are of trials that are not, or no longer, in the table."""
    names = set(table["trial"])
    return sum(folder.name not in names for folder in trials.iterdir())


class TrialsTable:
    """A row a trial: name, status, what it changes, figures, and why it failed or was stopped.

    Args:
        out: Where the table is written.
        trials: The folder of the run directories.
        named: Trials by name.
        refused: Those that are no experiment, with the reason.
        mode: Who may read the file; None leaves that to the umask.
    """

    def __init__(
        self,
        out: Path,
        trials: Path,
        named: dict[str, Trial],
        refused: list[tuple[Trial, UserError]],
        mode: int | None = None,
    ) -> None:
        self._mode = mode
        self._file, self._trials, self._named = out / TABLE, trials, named
        self._rows = {name: self._row(name) for name in named}
        self._refused = [
            {"trial": "", "status": "failed", **flat_tables(trial.changes), "reason": str(e)} for trial, e in refused
        ]
        self._stale, self._next = False, 0.0

    def statuses(self) -> Iterator[str]:
        """Of all trials."""
        for row in (*self._rows.values(), *self._refused):
            yield row["status"]

    def changed(self, name: str) -> None:
        """A trial has ended: its row is read again."""
        self._rows[name], self._stale = self._row(name), True

    def write_now_and_then(self) -> None:
        """Writes the file if there is something new, and the last time was long enough ago."""
        if self._stale and time.monotonic() >= self._next:
            began = time.monotonic()
            self.write()
            self._stale, self._next = False, time.monotonic() + (time.monotonic() - began) / _SHARE

    def write(self) -> pd.DataFrame:
        """Writes the file, and returns the table."""
        table = pd.DataFrame([*self._rows.values(), *self._refused])
        write_atomically(self._file, table.to_csv(index=False), self._mode)
        return table

    def _row(self, name: str) -> dict[str, Any]:
        folder = RunDirectory(self._trials / name)
        status = status_of(folder.path)
        file = {"done": "summary.json", "stopped": STOPPED, "failed": FAILURE}.get(status)
        found = (file and folder.read_json(file)) or {}
        figures = {key: found.get(key) for key in _FIGURES}
        figures |= {key: found[key] for key in _VALIDATED if key in found}
        figures |= {"not_covered": ", ".join(found["not_covered"])} if "not_covered" in found else {}
        if status == "stopped":
            figures["rounds"] = found.get("round")
        changes = flat_tables(self._named[name].changes)
        return {"trial": name, "status": status or "left", **changes, **figures, "reason": found.get("reason", "")}

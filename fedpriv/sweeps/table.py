"""The table of a sweep's trials, `trials.csv`, built from their folders."""

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from fedpriv.errors import UserError
from fedpriv.experiment.run_directory import RunDirectory, flat_tables
from fedpriv.files import write_atomically
from fedpriv.sweeps.config import Trial
from fedpriv.sweeps.files import FAILURE, STOPPED, TABLE, status_of
from fedpriv.tables import Record, short_texts

__all__ = ["Best", "TrialsTable", "best_settings", "labels", "other_trials"]

_METRICS = ("epsilon", "rounds", "population", "parameters", "seconds")
# The tables of a config that make the promise and the problem. Settings compete within one of each.
_PROBLEM = ("privacy", "data", "task", "devices")
# Writing takes about this share of the time at most, for any number of trials.
_SHARE = 0.01


def labels(trials: Mapping[str, Trial]) -> dict[str, str]:
    """Return a short label with each trial's changes, by the trial's name."""
    changes = {name: flat_tables(trial.changes) for name, trial in trials.items()}
    texts = _texts(changes.values())
    return {name: _values(changed, texts) for name, changed in changes.items()}


def other_trials(table: pd.DataFrame, trials: Path) -> int:
    """Return the number of trial folders that are not, or no longer, in the table."""
    names = set(table["trial"])
    return sum(folder.name not in names for folder in trials.iterdir())


@dataclass(frozen=True)
class Best:
    """The best setting of a sweep, among those with one promise and one problem.

    Args:
        within: The values of the axes that make the promise and the problem; empty if the sweep has one of each.
        setting: The values of the other axes, without the seed.
        score: The name of the score.
        value: Its mean over the seeds that are done.
        seeds: Their number.
        covered: False if the promise does not cover the score.
    """

    within: str
    setting: str
    score: str
    value: float
    seeds: int
    covered: bool

    def __str__(self) -> str:
        within = f" ({self.within})" if self.within else ""
        mean = f", mean of {self.seeds} seeds" if self.seeds > 1 else ""
        unprotected = "" if self.covered else "; NOT covered by epsilon"
        return f"{self.setting or 'the only setting'}{within}: {self.score} {self.value:.4g}{mean}{unprotected}"


def best_settings(rows: Mapping[str, Record], trials: Mapping[str, Trial]) -> list[Best]:
    """Return the best setting for each promise and problem of a sweep, by the mean score over seeds.

    The score is that of the held-out examples if there are some, otherwise that of the test set.

    Args:
        rows: Rows of the table, by the trial's name; only finished trials count.
        trials: Trials by name.
    """
    found: dict[str, dict[str, list[float]]] = {}
    about: dict[str, tuple[str, bool, bool]] = {}
    texts = _texts(flat_tables(trials[name].changes) for name in rows)
    for name, row in rows.items():
        config, changes = trials[name].config, flat_tables(trials[name].changes)
        score = f"{'test' if config.data.validation is None else 'validation'}_{config.task.selects.name}"
        if row["status"] != "done" or row.get(score) is None:
            continue
        common = {key: value for key, value in changes.items() if key.partition(".")[0] in _PROBLEM}
        within = _values(common, texts)
        varied = {key: value for key, value in changes.items() if key not in common and key != "seed"}
        setting = _values(varied, texts)
        found.setdefault(within, {}).setdefault(setting, []).append(row[score])
        covered = score not in row.get("not_covered", "").split(", ")
        about[within] = (score, config.task.selects.better == "higher", covered)
    best = []
    for within, settings in found.items():
        score, higher, covered = about[within]
        means = {setting: sum(values) / len(values) for setting, values in settings.items()}
        setting = (max if higher else min)(means, key=means.__getitem__)
        best.append(Best(within, setting, score, means[setting], len(settings[setting]), covered))
    return best


def _texts(all_changes: Iterable[Mapping[str, object]]) -> dict[tuple[str, str], str]:
    """Return the text of each value of each key, to be shown, by the key and the value's own text."""
    found: dict[str, dict[str, object]] = {}
    for changes in all_changes:
        for key, value in changes.items():
            found.setdefault(key, {})[str(value)] = value
    return {
        (key, own): text
        for key, values in found.items()
        for own, text in zip(values, short_texts(values.values(), key), strict=True)
    }


def _values(changes: Mapping[str, object], texts: Mapping[tuple[str, str], str]) -> str:
    return " ".join(f"{key.rpartition('.')[2]}={texts[key, str(value)]}" for key, value in changes.items())


class TrialsTable:
    """One row per trial: name, status, changes, metrics, and the reason if it failed or was stopped.

    Args:
        out: The folder of the table.
        trials: The folder of the run directories.
        named: Trials by name.
        refused: Trials with an invalid config, each with its error.
        mode: Permissions of the file; None leaves them to the umask.
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
        """Yield the status of each trial."""
        for row in (*self._rows.values(), *self._refused):
            yield row["status"]

    def best(self) -> list[Best]:
        """Return the best setting so far for each promise and problem."""
        return best_settings(self._rows, self._named)

    def changed(self, name: str) -> None:
        """Reread the row of a trial that has ended."""
        self._rows[name], self._stale = self._row(name), True

    def write_now_and_then(self) -> None:
        """Write the file if there are changes and the last write was long enough ago."""
        if self._stale and time.monotonic() >= self._next:
            began = time.monotonic()
            self.write()
            self._stale, self._next = False, time.monotonic() + (time.monotonic() - began) / _SHARE

    def write(self) -> pd.DataFrame:
        """Write the file and return the table."""
        table = pd.DataFrame([*self._rows.values(), *self._refused])
        write_atomically(self._file, table.to_csv(index=False), self._mode)
        return table

    def _row(self, name: str) -> Record:
        folder = RunDirectory(self._trials / name)
        status = status_of(folder.path)
        file = {"done": "summary.json", "stopped": STOPPED, "failed": FAILURE}.get(status)
        found = (file and folder.read_json(file)) or {}
        scores = self._named[name].config.task.scores
        metrics = {key: found.get(key) for key in (*(f"test_{score}" for score in scores), *_METRICS)}
        metrics |= {key: found[key] for key in (f"validation_{score}" for score in scores) if key in found}
        metrics |= {"not_covered": ", ".join(found["not_covered"])} if "not_covered" in found else {}
        if status == "stopped":
            metrics["rounds"] = found.get("round")
        changes = flat_tables(self._named[name].changes)
        return {"trial": name, "status": status or "left", **changes, **metrics, "reason": found.get("reason", "")}

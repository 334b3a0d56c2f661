"""Which trials of a sweep are not worth their remaining rounds, by what others of the same kind had at the same round.

A rule looks at files alone, `rounds.jsonl` and `summary.json` of the other trials, so that a sweep that was killed
decides as it would have. It compares within a group: trials whose data, model, cohorts, privacy and rounds are the
same, under the same method; they differ in the own numbers of the method, the local work and the server's optimiser,
and in the seed.
"""

import hashlib
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedpriv.checks import at_least_one
from fedpriv.errors import UserError
from fedpriv.experiment.config import Config
from fedpriv.experiment.run_directory import RunDirectory
from fedpriv.experiment.schema import read_table
from fedpriv.experiment.watching import StopRun
from fedpriv.plugins import Registry
from fedpriv.sweeps.files import STOPPED, TUNED

__all__ = ["RULES", "Halving", "Median", "StopRule", "Stopping", "group_of", "read_rule"]

# Round and figure, in order, of the rounds after the first model that were evaluated.
Curve = Sequence[tuple[int, float]]


@dataclass(frozen=True, kw_only=True)
class Median:
    """Stops a trial whose best figure so far is below the median of the finished trials' averages up to that round.

    Source: Golovin et al., Google Vizier, KDD 2017, section 3.2.2, the median stopping rule.

    Args:
        grace: No trial is stopped before this round.
        least: Finished trials that there must be.
        every: Rounds from one look to the next.
    """

    grace: int = 10
    least: int = 5
    every: int = 1

    def __post_init__(self) -> None:
        _at_least_one(self, "grace", "least", "every")

    def looks(self, round: int) -> bool:
        """Whether it decides after this round."""
        return round >= self.grace and (round - self.grace) % self.every == 0

    def counts(self, folder: RunDirectory) -> bool:
        """Whether the trial in a folder is one of those that others are compared with: the finished ones."""
        return folder.file("summary.json").exists()

    def verdict(self, own: Curve, others: Sequence[Curve], round: int) -> str | None:
        """Why a trial is stopped after a round, or None."""
        averages = [statistics.fmean(part) for part in (_until(other, round) for other in others) if part]
        figures = _until(own, round)
        if not figures or len(averages) < self.least:
            return None
        best, middle = max(figures), statistics.median(averages)
        if best >= middle:
            return None
        return f"best {best:.4f} by round {round}, median of {len(averages)} finished trials' averages {middle:.4f}"


@dataclass(frozen=True, kw_only=True)
class Halving:
    """Stops a trial that is not among the best part of all that have come to the same rung.

    Rungs are the rounds grace, grace x factor, grace x factor^2, ...; the best 1/factor of those that have come to a
    rung, this one included and one at least, go on. Source: Li et al., A System for Massively Parallel Hyperparameter
    Tuning (ASHA), MLSys 2020, in the form that stops trials instead of promoting them.

    Args:
        grace: The first rung, in rounds.
        factor: What the number of trials is divided by at each.
        least: Other trials that must have come to the rung.
    """

    grace: int = 10
    factor: int = 3
    least: int = 3

    def __post_init__(self) -> None:
        _at_least_one(self, "grace", "least")
        if self.factor < 2:
            raise UserError("stop.factor", "at least 2", self.factor, "3 keeps the best third at each rung")

    def looks(self, round: int) -> bool:
        """Whether it decides after this round."""
        rung = self.grace
        while rung < round:
            rung *= self.factor
        return rung == round

    def counts(self, folder: RunDirectory) -> bool:
        """Whether the trial in a folder is one of those that others are compared with: all that have begun."""
        return folder.file("rounds.jsonl").exists()

    def verdict(self, own: Curve, others: Sequence[Curve], round: int) -> str | None:
        """Why a trial is stopped after a round, or None."""
        reached = [part[-1] for part in (_until(other, round) for other in others) if part]
        figures = _until(own, round)
        if not figures or len(reached) < self.least:
            return None
        better = sum(other > figures[-1] for other in reached)
        kept = max(1, (len(reached) + 1) // self.factor)
        if better < kept:
            return None
        return f"{figures[-1]:.4f} at round {round}, {better} of {len(reached)} others are better and {kept} go on"


StopRule = Median | Halving
RULES: Registry[StopRule] = Registry("rule", {"median": Median, "halving": Halving}, group="fedpriv.stop_rules")


def read_rule(table: dict[str, Any]) -> StopRule:
    """The rule that `[stop]` describes: `rule`, a key of `RULES`, and that rule's fields."""
    options = {key: value for key, value in table.items() if key != "rule"}
    return read_table(RULES.resolve(table.get("rule", "nothing"), "stop.rule"), options, "stop")


def group_of(config: Config) -> str:
    """A digest of what trials that may be compared have in common: their tables but for what is tuned, and the seed."""
    tables = {
        name: {TUNED[name]: table[TUNED[name]]} if name in TUNED else table
        for name, table in config.tables.items()
        if name not in ("name", "seed", "deployment")
    }
    return hashlib.sha256(json.dumps(tables, sort_keys=True).encode()).hexdigest()[:12]


@dataclass
class Stopping:
    """Watches a trial, and ends it where its rule says so: first `stopped.json` is written, then the run is saved.

    Args:
        rule: When.
        folder: The trial's.
        others: Folders of the trials that it may be compared with.
        rounds: How many rounds it has; after the last one nothing is stopped.
    """

    rule: StopRule
    folder: Path
    others: Iterable[Path]
    rounds: int
    _rows: list[dict[str, Any]] = field(default_factory=list)
    _finished: dict[Path, Curve] = field(default_factory=dict)

    def __call__(self, released: dict[str, Any], diagnostics: dict[str, Any]) -> None:
        """Decides after a recorded round; see `journal.Watcher`.

        Raises:
            StopRun: If the trial is not worth its remaining rounds.
        """
        del diagnostics
        number = released["round"]
        directory = RunDirectory(self.folder)
        if self._rows:
            self._rows.append(released)
        else:
            self._rows = directory.rows("rounds.jsonl")
        if number >= self.rounds or not self.rule.looks(number):
            return
        reason = self.rule.verdict(_curve(self._rows), self._curves(number), number)
        if reason is not None:
            directory.write_json(STOPPED, {"reason": reason, **released})
            raise StopRun(reason)

    def _curves(self, number: int) -> list[Curve]:
        """Of all that count and have come as far; those of finished trials are read once."""
        found = []
        for path in self.others:
            other = RunDirectory(path)
            if path not in self._finished and self.rule.counts(other):
                finished, rows = other.file("summary.json").exists(), _rows_of(other)
                if finished:
                    self._finished[path] = _curve(rows)
                elif rows and rows[-1]["round"] >= number:
                    found.append(_curve(rows))
            if path in self._finished:
                found.append(self._finished[path])
        return found


def _rows_of(other: RunDirectory) -> list[dict[str, Any]]:
    """None of a trial whose file is damaged: that is its own failure, and not this one's."""
    try:
        return other.rows("rounds.jsonl")
    except UserError:
        return []


def _curve(rows: Sequence[dict[str, Any]]) -> Curve:
    """Validation accuracy where there is one, else test accuracy."""
    validated = any(row.get("validation_accuracy") is not None for row in rows)
    key = "validation_accuracy" if validated else "test_accuracy"
    return [(row["round"], row[key]) for row in rows if row["round"] > 0 and row.get(key) is not None]


def _until(curve: Curve, last: int) -> list[float]:
    return [figure for number, figure in curve if number <= last]


def _at_least_one(rule: StopRule, *names: str) -> None:
    for name in names:
        at_least_one(f"stop.{name}", getattr(rule, name), "Give a whole number from 1")

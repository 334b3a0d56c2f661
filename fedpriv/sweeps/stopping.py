"""Early stopping of a sweep's trials, based on similar trials at the same round.

A rule looks only at files, `rounds.jsonl` and `summary.json` of the other trials, so a sweep that was killed and
resumed makes the same decisions. It compares trials within a group: those with the same data, model, cohorts, privacy,
rounds and method. They differ in the hyperparameters of the method, the local work and the server optimizer, and in the
seed.
"""

import hashlib
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedpriv.checks import at_least_one, is_whole, shown
from fedpriv.errors import UserError
from fedpriv.experiment.config import Config
from fedpriv.experiment.run_directory import RunDirectory
from fedpriv.experiment.schema import read_table
from fedpriv.experiment.watching import StopRun
from fedpriv.plugins import Registry
from fedpriv.sweeps.files import STOPPED, TUNED
from fedpriv.tables import Record, Table
from fedpriv.tasks.metrics import METRICS, Metric

__all__ = ["RULES", "Halving", "Median", "StopRule", "Stopping", "group_of", "read_rule"]

# Rounds and scores, in order, of the evaluated rounds after the initial model.
Curve = Sequence[tuple[int, float]]


@dataclass(frozen=True, kw_only=True)
class Median:
    """A rule that stops a trial if its best score is below the median of the finished trials' averages up to then.

    Source: Golovin et al., Google Vizier, KDD 2017, section 3.2.2, the median stopping rule.

    Args:
        grace: First round at which a trial may be stopped.
        least: Minimum number of finished trials.
        every: Rounds between decisions.
    """

    grace: int = 10
    least: int = 5
    every: int = 1

    def __post_init__(self) -> None:
        _at_least_one(self, "grace", "least", "every")

    def looks(self, round: int) -> bool:
        """Return True if the rule decides after this round."""
        return round >= self.grace and (round - self.grace) % self.every == 0

    def counts(self, folder: RunDirectory) -> bool:
        """Return True if the trial in a folder takes part in comparisons: it must be finished."""
        return folder.file("summary.json").exists()

    def verdict(self, own: Curve, others: Sequence[Curve], round: int) -> str | None:
        """Return the reason to stop a trial after a round, or None."""
        averages = [statistics.fmean(part) for part in (_until(other, round) for other in others) if part]
        scores = _until(own, round)
        if not scores or len(averages) < self.least:
            return None
        best, middle = max(scores), statistics.median(averages)
        if best >= middle:
            return None
        return f"best {best:.4f} by round {round}, median of {len(averages)} finished trials' averages {middle:.4f}"


@dataclass(frozen=True, kw_only=True)
class Halving:
    """A rule that stops a trial unless it is among the best of all trials that have reached the same rung.

    Rungs are the rounds grace, grace x factor, grace x factor^2, ... At each rung, the best 1/factor of the trials that
    have reached it continue, this one included and at least one. Source: Li et al., A System for Massively Parallel
    Hyperparameter Tuning (ASHA), MLSys 2020, in the variant that stops trials instead of promoting them.

    Args:
        grace: The first rung, in rounds.
        factor: Divisor of the number of trials at each rung.
        least: Minimum number of other trials at the rung.
    """

    grace: int = 10
    factor: int = 3
    least: int = 3

    def __post_init__(self) -> None:
        _at_least_one(self, "grace", "least")
        if not is_whole(self.factor, 2):
            raise UserError(
                "stop.factor", "at least 2", shown(self.factor), "Choose 3 to keep the best third at each rung"
            )

    def looks(self, round: int) -> bool:
        """Return True if the rule decides after this round."""
        rung = self.grace
        while rung < round:
            rung *= self.factor
        return rung == round

    def counts(self, folder: RunDirectory) -> bool:
        """Return True if the trial in a folder takes part in comparisons: it must have started."""
        return folder.file("rounds.jsonl").exists()

    def verdict(self, own: Curve, others: Sequence[Curve], round: int) -> str | None:
        """Return the reason to stop a trial after a round, or None."""
        reached = [part[-1] for part in (_until(other, round) for other in others) if part]
        scores = _until(own, round)
        if not scores or len(reached) < self.least:
            return None
        better = sum(other > scores[-1] for other in reached)
        kept = max(1, (len(reached) + 1) // self.factor)
        if better < kept:
            return None
        return f"{scores[-1]:.4f} at round {round}, {better} of {len(reached)} others are better and {kept} continue"


StopRule = Median | Halving
RULES: Registry[StopRule] = Registry("rule", {"median": Median, "halving": Halving}, group="fedpriv.stop_rules")


def read_rule(table: Table) -> StopRule:
    """Return the rule described by `[stop]`: `rule`, a key of `RULES`, and that rule's fields."""
    options = {key: value for key, value in table.items() if key != "rule"}
    return read_table(RULES.resolve(table.get("rule"), "stop.rule"), options, "stop")


def group_of(config: Config) -> str:
    """Return a digest of the tables that comparable trials share: all but the tuned settings and the seed."""
    tables = {
        name: {TUNED[name]: table[TUNED[name]]} if name in TUNED else table
        for name, table in config.tables.items()
        if name not in ("name", "seed", "deployment")
    }
    return hashlib.sha256(json.dumps(tables, sort_keys=True).encode()).hexdigest()[:12]


@dataclass
class Stopping:
    """A watcher that stops a trial if the rule says so: it writes `stopped.json`, then has the run saved.

    Args:
        rule: The stopping rule.
        folder: The trial's folder.
        others: Folders of the comparable trials.
        rounds: Number of rounds; a trial is never stopped after the last one.
        metric: The metric of the score. If lower is better, the score is its negative.
    """

    rule: StopRule
    folder: Path
    others: Iterable[Path]
    rounds: int
    metric: Metric = METRICS["accuracy"]
    _rows: list[Record] = field(default_factory=list)
    _finished: dict[Path, Curve] = field(default_factory=dict)

    def __call__(self, released: Record, diagnostics: Record) -> None:
        """Decide after a recorded round; see `watching.Watcher`.

        Raises:
            StopRun: If the rule stops the trial.
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
        reason = self.rule.verdict(self._curve(self._rows), self._curves(number), number)
        if reason is not None:
            reason += "" if self.metric.better == "higher" else f" (scores: -{self.metric.name})"
            directory.write_json(STOPPED, {"reason": reason, **released})
            raise StopRun(reason)

    def _curves(self, number: int) -> list[Curve]:
        """Return the curves of all comparable trials that have come as far; finished trials are read once."""
        found = []
        for path in self.others:
            other = RunDirectory(path)
            if path not in self._finished and self.rule.counts(other):
                finished, rows = other.file("summary.json").exists(), _rows_of(other)
                if finished:
                    self._finished[path] = self._curve(rows)
                elif rows and rows[-1]["round"] >= number:
                    found.append(self._curve(rows))
            if path in self._finished:
                found.append(self._finished[path])
        return found

    def _curve(self, rows: Sequence[Record]) -> Curve:
        """Return scores on validation examples if there are any, otherwise on test examples."""
        keys = (f"{on}_{self.metric.name}" for on in ("validation", "test"))
        key = next((key for key in keys if any(row.get(key) is not None for row in rows)), "")
        scored = [row for row in rows if row["round"] > 0 and row.get(key) is not None]
        return [(row["round"], self.metric.sign * row[key]) for row in scored]


def _rows_of(other: RunDirectory) -> list[Record]:
    """Return no rows for a damaged file: the failure belongs to that trial, not to this one."""
    try:
        return other.rows("rounds.jsonl")
    except UserError:
        return []


def _until(curve: Curve, last: int) -> list[float]:
    return [score for number, score in curve if number <= last]


def _at_least_one(rule: StopRule, *names: str) -> None:
    for name in names:
        at_least_one(f"stop.{name}", getattr(rule, name), "Set it to 1 or more")

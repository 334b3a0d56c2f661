"""The total privacy cost of several runs on the same clients, read from their folders.

Runs are read one by one (`spent_runs`), and the trials of a tuning are combined (`spent_tuning`). The results are
grouped by clients and by type of guarantee, and composed within each group (`compose`). Nothing is added up across
groups: their guarantees differ, or their clients do.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fedpriv.errors import UserError
from fedpriv.privacy import Adjacency, Everyone, PrivacyPlan, TrustName, UnitName
from fedpriv.privacy.reports import LocalReports
from fedpriv.report.spent_runs import Run, finite, read_run
from fedpriv.report.spent_tuning import with_tunings
from fedpriv.tables import Record

__all__ = ["Group", "Total", "compose", "notes_on", "spent_below"]


@dataclass(frozen=True, kw_only=True)
class Total:
    """The joint privacy cost of several runs.

    Args:
        epsilon: Infinite if there is no guarantee.
        delta: None if no run has a guarantee.
        mu: The mu of Gaussian DP, if it is exact for every run.
        composition: gaussian, basic, or none with the reason.
    """

    epsilon: float
    delta: float | None
    mu: float | None
    composition: str

    @property
    def how(self) -> str:
        """The composition in words."""
        if self.composition == "gaussian":
            return f"exact composition of Gaussian mechanisms, mu = {self.mu:.4g}"
        if self.composition == "basic":
            return "basic composition: the sum of the epsilons at the sum of the deltas"
        return f"no bound on the total, {self.composition.removeprefix('none: ')}"


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs on the same clients with one adversary, adjacency and unit, or all runs that ended before they had a plan.

    Args:
        clients: See `clients_of`; empty for runs without a plan.
        trust: None if no run has a guarantee.
        adjacency: As `trust`.
        unit: As `trust`.
        runs: Ordered by name; runs without privacy are in every group of their clients.
    """

    clients: dict[str, object]
    trust: TrustName | None
    adjacency: Adjacency | None
    unit: UnitName | None
    runs: tuple[Run, ...]

    @cached_property
    def total(self) -> Total:
        """The cost of the released rounds."""
        return compose(self.runs)

    @cached_property
    def planned(self) -> Total:
        """The cost once every run has finished."""
        return compose(self.runs, planned=True)

    @property
    def adversary(self) -> str | None:
        """The adversary of the guarantee."""
        return next((run.plan.adversary for run in self.runs if run.plan is not None), None)

    @property
    def recorded(self) -> bool:
        """False for the group of all runs that ended before their privacy plans were recorded."""
        return any(run.recorded for run in self.runs)

    @property
    def label(self) -> str:
        """The clients in words."""
        return ", ".join(str(value) if key == "name" else f"{key} {value}" for key, value in self.clients.items())

    def as_dict(self) -> Record:
        """Return the group for JSON; an infinite epsilon is None."""
        total, planned = self.total, self.planned.epsilon
        return {
            "clients": self.clients,
            "unit": self.unit,
            "trust": self.trust,
            "adversary": self.adversary,
            "adjacency": self.adjacency,
            "private": math.isfinite(total.epsilon) and self.trust is not None,
            "epsilon": finite(total.epsilon),
            "delta": total.delta,
            "gaussian_dp_mu": finite(total.mu),
            "composition": total.composition,
            "epsilon_planned": finite(planned),
            "runs": [run.as_dict() for run in self.runs],
        }


def spent_below(folder: Path) -> list[Group]:
    """Read all runs below a folder and group them. A tuning counts as one run if it is finished and fits its trials.

    Raises:
        UserError: If there is no run, or a run's files are damaged.
    """
    found = {file.parent for file in folder.rglob("config.toml") if (file.parent / "digest.txt").exists()}
    if not found:
        remedy = "Create one with: fedpriv run CONFIG"
        raise UserError(str(folder), "a run directory, or a folder of run directories", "a folder without runs", remedy)
    return _grouped(with_tunings({path: read_run(path, folder) for path in sorted(found)}, folder))


def _grouped(runs: Sequence[Run]) -> list[Group]:
    by_clients: dict[str, list[Run]] = {}
    early = tuple(run for run in runs if not run.recorded)
    for run in (run for run in runs if run.recorded):
        by_clients.setdefault(json.dumps(run.clients, sort_keys=True), []).append(run)
    groups = []
    for same in by_clients.values():
        promises = sorted({_promise_of(run.plan) for run in same if run.plan is not None})
        for trust, adjacency, unit in promises or [(None, None, None)]:
            chosen = tuple(run for run in same if run.plan is None or _promise_of(run.plan) == (trust, adjacency, unit))
            groups.append(Group(clients=same[0].clients, trust=trust, adjacency=adjacency, unit=unit, runs=chosen))
    if early:
        groups.append(Group(clients={}, trust=None, adjacency=None, unit=None, runs=early))
    return groups


def _promise_of(plan: PrivacyPlan | LocalReports) -> tuple[TrustName, Adjacency, UnitName]:
    return plan.trust, plan.adjacency, plan.unit


def compose(runs: Iterable[Run], *, planned: bool = False) -> Total:
    """Return the joint cost of runs with one adversary, adjacency and unit.

    Args:
        runs: Runs on the same clients.
        planned: Charge all rounds of every experiment, not only the released ones.

    Formal guarantees:
        An upper bound for a client that takes part in all runs, even if a run's config was chosen by the results of
        earlier ones. Runs with exact mu_i are together exactly one Gaussian mechanism with mu = sqrt(sum of mu_i^2).
        All others are charged the sum of their epsilons at the sum of their deltas (basic composition), including the
        best trial of a tuning, with the tuning's epsilon. The bound requires independently drawn noise: runs that share
        noise without being equal have no guarantee.
    """
    charged = [(run, run.planned if planned else run.rounds) for run in runs]
    charged = [(run, rounds) for run, rounds in charged if rounds > 0]
    deltas = [run.plan.delta for run, _ in charged if run.plan is not None]
    if any(run.plan is None for run, _ in charged):
        delta = min(deltas, default=None)
        return Total(epsilon=math.inf, delta=delta, mu=None, composition="none: a run without privacy")
    if sharing([run for run, _ in charged]):
        return Total(epsilon=math.inf, delta=min(deltas), mu=None, composition="none: runs that share their noise")
    if len(charged) < 2:
        return _alone(charged)
    shifts = [run.mu_after(rounds) for run, rounds in charged]
    exact = [mu for mu in shifts if mu is not None]
    if len(exact) == len(charged):
        mu, delta = math.sqrt(math.fsum(mu * mu for mu in exact)), min(deltas)
        return Total(epsilon=_gaussian_epsilon(mu, delta), delta=delta, mu=mu, composition="gaussian")
    epsilon, delta = math.fsum(run.epsilon_after(rounds) for run, rounds in charged), math.fsum(deltas)
    return Total(epsilon=epsilon if delta < 1.0 else math.inf, delta=delta, mu=None, composition="basic")


def _alone(charged: Sequence[tuple[Run, int]]) -> Total:
    """Return the cost of one run, or none: a single guarantee needs no composition."""
    if not charged:
        return Total(epsilon=0.0, delta=0.0, mu=0.0, composition="gaussian")
    run, rounds = charged[0]
    assert run.plan is not None
    mu = run.mu_after(rounds)
    how = "basic" if mu is None else "gaussian"
    return Total(epsilon=run.epsilon_after(rounds), delta=run.plan.delta, mu=mu, composition=how)


def _gaussian_epsilon(mu: float, delta: float) -> float:
    """Return the epsilon of one Gaussian mechanism with sensitivity over deviation mu, by the common accountant."""
    if mu == 0.0 or math.isinf(mu):
        return mu
    one = PrivacyPlan(
        trust="central",
        adjacency="add-or-remove",
        sampling=Everyone(1),
        rounds=1,
        delta=delta,
        l2_bound=1.0,
        noise_multiplier=min(1.0 / mu, 1e12),
    )
    return one.epsilon


def sharing(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Return pairs of private runs with the same noise but different results.

    The difference of two such runs has no noise. They are equal experiments with one seed that differ in data,
    precision or engine. Runs with equal results are copies, which reveal nothing more; they are charged nevertheless.
    """
    first: dict[str, Run] = {}
    pairs = []
    for run in (part for whole in runs for part in whole.parts):
        if run.noise is None or run.plan is None:
            continue
        other = first.setdefault(run.noise, run)
        common = other.scores.keys() & run.scores.keys()
        if any(other.scores[number] != run.scores[number] for number in common):
            pairs.append((other.name, run.name))
    return pairs


def notes_on(groups: Sequence[Group]) -> list[str]:
    """Return notes that a reader needs to add up groups, one or two sentences each."""
    groups = [group for group in groups if group.recorded]
    runs = {run.name: run for group in groups for run in group.runs}.values()
    notes = []
    if len({json.dumps(group.clients, sort_keys=True) for group in groups}) > 1:
        notes.append(
            "Runs with other data, another partition or another seed are on other clients: they form separate groups, "
            "and nothing is added up across groups."
        )
    promises = {json.dumps(group.clients, sort_keys=True) for group in groups}
    if len(promises) < len(groups):
        notes.append(
            "Runs on the same clients with another trust, adjacency or unit are added up separately: their guarantees "
            "differ. Runs with trust local or aggregator also spend against the adversary of trust central, runs with "
            "trust local also against that of trust aggregator, and runs that protect clients (replace) also spend for "
            "single examples: add them to that total."
        )
    sums = [run.plan.aggregation for run in runs if run.plan is not None and run.plan.aggregation is not None]
    if len({terms.colluders for terms in sums}) > 1:
        least = min(terms.colluders for terms in sums)
        notes.append(f"Runs with secure aggregation allow different numbers of colluders: together, at most {least}.")
    if any(run.rounds < run.planned for run in runs):
        notes.append(
            "Unfinished runs are charged for the rounds that they released. If results decided when a run ended, a "
            "proof may rely only on all of its planned rounds (epsilon_planned in --json)."
        )
    if any(run.plan is not None and not run.plan.sampling.draws_cohorts and run.rounds < run.planned for run in runs):
        notes.append("Unfinished runs on a schedule are charged for the whole timeline, because only that is recorded.")
    notes += dict.fromkeys(run.note for run in runs if run.note)
    lone = [run.name for run in runs if run.draw is not None and not run.note]
    if lone:
        notes.append(
            f"Trials of a tuning with its folder elsewhere: {', '.join(lone)}. If one was selected by its score, that "
            "costs more than is counted here: see tuning.json of the sweep."
        )
    for name in sorted({run.name for run in runs if run.plan is None and run.rounds > 0}):
        notes.append(f"{name} is not private: there is no bound on its clients' privacy cost.")
    pairs = sharing([run for run in runs if run.rounds > 0])
    notes += [f"{a} and {b} share their noise but not their results: their difference has no noise." for a, b in pairs]
    notes.append("Only runs with folders here are counted.")
    return notes

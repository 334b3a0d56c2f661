"""The privacy cost of a tuning, read from its folder: one release of its best trial, or the sum of all its trials.

The epsilon of a tuning is far below the sum, but it is proved for a random number of trials with one guarantee, all
drawn before the first began. It counts only if the folder shows all that; otherwise the trials are added up.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedpriv.errors import UserError
from fedpriv.experiment.run_directory import RunDirectory
from fedpriv.experiment.schema import field_names, read_table
from fedpriv.privacy import Everyone, ExampleTerms, PrivacyPlan, RecordBound
from fedpriv.privacy.tuning import ScoreNoise, tuning_epsilon
from fedpriv.report.spent_runs import Run, name_of
from fedpriv.sweeps.files import CHOSEN, DRAWN, TRIALS
from fedpriv.sweeps.tuning import Tuning, but_for_bound
from fedpriv.sweeps.tuning_score import SCORES
from fedpriv.tables import Record

__all__ = ["TunedRun", "with_tunings"]

_PROMISE = ("trust", "adjacency", "unit", "delta")
_ROUNDING = 1e-9
# One example moves the score of its client by at most the sensitivity, whatever the training's own route.
_OF_SCORES = RecordBound(terms=ExampleTerms(clip=1.0, examples=1, declared=True), l2_bound=ScoreNoise.SENSITIVITY)


@dataclass(frozen=True, kw_only=True)
class TunedRun(Run):
    """The best trial of a tuning, released as one run; its plan is that of each trial.

    Args:
        epsilon: Epsilon of the tuning, at the plan's delta.
        selected: Name of the trial; None if every trial failed.
        condition: The condition for the epsilon.
        trials: All trials in the folder. Their number, and all but the selected one, are secret.
    """

    epsilon: float
    selected: str | None
    condition: str
    trials: tuple[Run, ...]

    @property
    def parts(self) -> tuple[Run, ...]:
        """See `Run.parts`."""
        return self.trials

    @property
    def extent(self) -> str:
        """See `Run.extent`."""
        return "the best trial"

    def epsilon_after(self, rounds: int) -> float:
        """Return the epsilon of the tuning, for any number of rounds: a selection was released."""
        return self.epsilon

    def mu_after(self, rounds: int) -> float | None:
        """Return None: the best of many trials is not a Gaussian mechanism."""
        return None

    def as_dict(self) -> dict[str, object]:
        """See `Run.as_dict`."""
        return {**super().as_dict(), "selected": self.selected, "condition": self.condition}


class _Misfit(Exception):  # noqa: N818
    """The reason why a tuning.json does not fit its trials."""


def with_tunings(runs: Mapping[Path, Run], root: Path) -> list[Run]:
    """Return the runs below a folder; all trials of a finished tuning that fits become one run.

    Args:
        runs: Runs by folder.
        root: The folder that was searched.

    Raises:
        UserError: If a tuning's file is damaged.
    """
    found = {path: [run] for path, run in runs.items()}
    for folder in sorted({file.parent for name in (CHOSEN, DRAWN) for file in root.rglob(name)}):
        paths = [path for path in found if path.parent == folder / TRIALS]
        if paths:
            trials = {path.name: run for path in paths for run in found.pop(path)}
            found[folder] = _counted(RunDirectory(folder), name_of(folder, root), trials)
    return [run for path in sorted(found) for run in found[path]]


def _counted(folder: RunDirectory, name: str, trials: Mapping[str, Run]) -> list[Run]:
    chosen = folder.read_json(CHOSEN)
    if chosen is None:
        why = f"{name} is an unfinished tuning, without {CHOSEN}: all its trials here are added up."
        return _one_by_one(folder, name, trials, {}, why)
    try:
        return [_as_one(name, trials, chosen, folder.read_json(DRAWN))]
    except _Misfit as misfit:
        why = f"{name}: its {CHOSEN} does not fit its trials ({misfit}): all its trials here are added up."
        return _one_by_one(folder, name, trials, chosen if isinstance(chosen, dict) else {}, why)


def _as_one(name: str, trials: Mapping[str, Run], chosen: Record, drawn: object) -> TunedRun:
    tuning, stated = _record(chosen)
    selected = chosen["selected"]
    _check_drawn(trials, selected, drawn)
    finished = {trial for trial, run in trials.items() if run.state == "finished"}
    if selected not in finished and (selected is not None or finished):
        raise _Misfit("the selected trial is not here, or not finished")
    plan = _common_plan(trials)
    if any(chosen[key] != getattr(plan, key) for key in _PROMISE):
        raise _Misfit("its guarantee differs from theirs")
    least = tuning_epsilon(plan, tuning.count, tuning.score_noise)
    if not plan.trust_rules.trusts_server or not stated >= least * (1.0 - _ROUNDING):
        raise _Misfit("its epsilon is less than the cost of such trials")
    rounds = max(plan.rounds, 1)
    return TunedRun(
        name=name,
        clients=next(iter(trials.values())).clients,
        state="tuning",
        rounds=rounds,
        planned=rounds,
        plan=plan,
        noise=None,
        scores={},
        note=f"{name} is a tuning, counted as one release of its best trial: its epsilon holds {tuning.condition}.",
        epsilon=stated,
        selected=selected,
        condition=tuning.condition,
        trials=tuple(trials.values()),
    )


def _record(chosen: Record) -> tuple[Tuning, float]:
    """Return the distribution of trials and the stated epsilon."""
    try:
        tuning = read_table(Tuning, {key: chosen[key] for key in field_names(Tuning) if key in chosen}, "tuning")
        stated = math.inf if chosen["epsilon"] is None else float(chosen["epsilon"])
        if isinstance(chosen["selected"], str | None) and all(key in chosen for key in _PROMISE):
            return tuning, stated
    except (UserError, KeyError, TypeError, ValueError):
        pass
    raise _Misfit("it is not the record of a tuning")


def _check_drawn(trials: Mapping[str, Run], selected: str | None, drawn: object) -> None:
    """Check that all trials were drawn before the first began; a released tuning keeps only the selected trial."""
    if drawn is None and set(trials) == {selected} and all(run.draw is not None for run in trials.values()):
        return
    kept = drawn if isinstance(drawn, dict) else {}
    try:
        left = {row["draw"] for row in kept["trials"]}
    except (TypeError, KeyError):
        raise _Misfit(f"there is no {DRAWN} that lists their draw") from None
    for run in trials.values():
        if run.draw not in left:
            raise _Misfit("one of them was not drawn for it")
        left.remove(run.draw)


def _common_plan(trials: Mapping[str, Run]) -> PrivacyPlan:
    """Return the plan of every trial, except for its bound."""
    begun = [run for run in trials.values() if run.plan is not None or run.rounds > 0]
    plans = [None if run.training_plan is None else but_for_bound(run.training_plan) for run in begun]
    if not plans or any(plan is None or plan != plans[0] for plan in plans):
        raise _Misfit("their guarantees differ")
    first = next(iter(trials.values()))
    if any(run.clients != first.clients for run in trials.values()):
        raise _Misfit("their clients differ")
    assert plans[0] is not None
    return plans[0]


def _one_by_one(folder: RunDirectory, name: str, trials: Mapping[str, Run], chosen: Record, why: str) -> list[Run]:
    """Return all trials and, in addition, their scores if those come from clients' examples."""
    runs = [replace(run, note=why) for run in trials.values()]
    kept = folder.read_json(SCORES)
    multiplier: Any = chosen.get("score_noise_multiplier")
    if kept is not None:
        multiplier = kept.get("noise_multiplier") if isinstance(kept, dict) else repr(kept)
    first = next((run for run in runs if run.training_plan is not None), None)
    if multiplier is None or first is None or first.training_plan is None:
        return runs
    try:
        noise = ScoreNoise(multiplier=multiplier)
    except (UserError, TypeError):
        file, remedy = folder.file(CHOSEN if kept is None else SCORES), "Restore the file, or move the tuning away"
        raise UserError(str(file), "the noise multiplier of scores", repr(multiplier), remedy) from None
    plan = first.training_plan
    everyone = Everyone(plan.sampling.population)
    scores = Run(
        name=f"{name}/{SCORES}",
        clients=first.clients,
        state=first.state,
        rounds=sum(run.state == "finished" for run in runs),
        planned=len(runs),
        plan=replace(
            plan,
            sampling=everyone,
            rounds=len(runs),
            l2_bound=ScoreNoise.SENSITIVITY,
            noise_multiplier=noise.multiplier,
            record=None if plan.record is None else _OF_SCORES,
        ),
        noise=None,
        scores={},
        note=why,
    )
    return [*runs, scores]

"""`[tuning]` of a sweep: how many trials there are is random, and their number is charged to whatever is released."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from fedpriv.checks import whole_from
from fedpriv.errors import UserError
from fedpriv.experiment.build import sampling_of
from fedpriv.experiment.config import Config
from fedpriv.experiment.run_directory import RunDirectory
from fedpriv.privacy import PrivacyPlan, rounded_up
from fedpriv.privacy.released import Whose
from fedpriv.privacy.tuning import NegativeBinomialTrials, PoissonTrials, ScoreNoise, TrialCount, tuning_epsilon
from fedpriv.sweeps.files import DRAWN

if TYPE_CHECKING:
    from fedpriv.sweeps.config import Sweep, Trial

__all__ = [
    "Tuning",
    "about_tuning",
    "but_for_bound",
    "choose_best",
    "common_plan",
    "draw_trials",
    "score_of",
    "scored_on",
]

# Tables that an axis may change: all others decide the data, the promise, or how long a trial takes.
_TUNED = ("method", "server", "local", "model")
_MAX_DRAW = 2**62
_CONDITION = "if the number of trials and all trials but the selected one stay secret"
_CONDITION_OF_SCORES = (
    "if the number of trials, all trials but the selected one, and every score without noise on clients' examples stay "
    "secret"
)


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How trials are drawn.

    Args:
        distribution: Of the number of trials K. `negative-binomial` is truncated: never 0.
        expected_trials: E[K].
        eta: Of `negative-binomial`; `geometric` is eta = 1, and `logarithmic` eta = 0.
        seed: Of K, the trials and the noise of scores; None for the operating system's entropy. Who knows the seed
            knows K, and with it nothing is promised: a seed is for experiments about tuning.
        score_noise_multiplier: Standard deviation of the noise on the sum of clients' accuracies over its sensitivity,
            1; where the score is on clients' examples. None for a public score.
    """

    distribution: Literal["geometric", "logarithmic", "negative-binomial", "poisson"]
    expected_trials: float
    eta: float | None = None
    seed: int | None = None
    score_noise_multiplier: float | None = None

    def __post_init__(self) -> None:
        if (self.eta is not None) != (self.distribution == "negative-binomial"):
            expected = "a number for negative-binomial, and for no other distribution"
            raise UserError("tuning.eta", expected, self.eta, "1 is geometric, 0 logarithmic")
        if self.seed is not None:
            whole_from("tuning.seed", self.seed, 0, "Take it away for a secret one")
        # Whatever the distribution refuses is refused before anything is drawn.
        self.count.quantile(0.0)
        _ = self.score_noise

    @property
    def count(self) -> TrialCount:
        """The distribution of K."""
        if self.distribution == "poisson":
            return PoissonTrials(expected=self.expected_trials)
        eta = {"geometric": 1.0, "logarithmic": 0.0}.get(self.distribution, self.eta)
        assert eta is not None
        return NegativeBinomialTrials(expected=self.expected_trials, eta=eta)

    @property
    def score_noise(self) -> ScoreNoise | None:
        """The noise of each trial's score; None for a public one."""
        multiplier = self.score_noise_multiplier
        return None if multiplier is None else ScoreNoise(multiplier=multiplier)

    @property
    def condition(self) -> str:
        """Under which its (epsilon, delta) holds; a clause."""
        return _CONDITION if self.score_noise_multiplier is None else _CONDITION_OF_SCORES


def common_plan(sweep: "Sweep", grid: Sequence["Trial"], data_root: Path | None) -> PrivacyPlan:
    """Returns the plan of every trial, but for its bound.

    Raises:
        UserError: If the bound of a tuning does not hold for such trials.
    """
    if sweep.stop is not None:
        remedy = "Take [stop] away: what is charged are trials that look at no other trial"
        raise UserError("[tuning]", "no [stop] beside it", "one", remedy)
    for axis in sweep.axes:
        for key in axis.keys:
            if key.partition(".")[0] not in _TUNED:
                remedy = "Trials of a tuning have one promise and the same data: set it for all in [set]"
                raise UserError(f"axis {axis.name}", f"a key of {', '.join(_TUNED)} beside [tuning]", key, remedy)
    if not grid:
        raise UserError("axes", "a trial", "none", "Give values")
    sampling, plans = sampling_of(grid[0].config, data_root), []
    for config in (trial.config for trial in grid):
        _check_trial(config, sweep.tuning)
        plan = config.plan(sampling)
        assert plan is not None
        plans.append(plan)
    first = but_for_bound(plans[0])
    if any(but_for_bound(plan) != first for plan in plans):
        remedy = "Give privacy.noise_multiplier instead of privacy.epsilon, or tune such methods apart"
        raise UserError("[tuning]", "trials with the same noise multiplier", "others", remedy)
    if not plans[0].trust_rules.trusts_server:
        remedy = "Choose trust central: with trust local the server sees every trial, and each is charged in full"
        raise UserError("[tuning]", 'privacy.trust = "central"', f'"{plans[0].trust}"', remedy)
    if not plans[0].private:
        raise UserError("[tuning]", "trials that promise something", "none", "Give privacy.epsilon")
    return plans[0]


def _check_trial(config: Config, tuning: Tuning | None) -> None:
    if config.privacy is None:
        raise UserError("[tuning]", "trials with [privacy]", "none", "Take [tuning] away: without privacy it is free")
    if config.privacy.draw is not None:
        raise UserError("privacy.draw", "none beside [tuning]", config.privacy.draw, "Take it away: it is drawn")
    if config.devices is not None:
        raise UserError("[tuning]", "no [devices] beside it", "some", "Tune without a virtual clock")
    score_of(config, None if tuning is None else tuning.score_noise)


def scored_on(config: Config) -> tuple[str, Whose]:
    """On which examples the best trial is chosen, `test` or `validation`, and whose those are."""
    facts = config.data.facts
    return ("test", facts.test) if facts.validation is None else ("validation", facts.validation)


def score_of(config: Config, noise: ScoreNoise | None) -> str:
    """The name of the score by which the best trial is chosen: on public examples, or with noise.

    Raises:
        UserError: If a score on clients' examples is to have no noise, or one on public examples is to have some.
    """
    on, whose = scored_on(config)
    if whose == "public" and noise is not None:
        remedy = "Take it away: a score on public examples costs nothing, and noise would only spoil the choice"
        raise UserError("tuning.score_noise_multiplier", f"none with public {on} examples", noise.multiplier, remedy)
    if whose != "public" and noise is None:
        of = "protected clients" if whose == "within" else "other clients"
        remedy = (
            "Set tuning.score_noise_multiplier, which makes the score itself private; or choose a data set with public "
            "test examples, or hold out validation examples of a pool"
        )
        raise UserError("[tuning]", "a score on public examples, or one with noise", f"{on} examples of {of}", remedy)
    return f"{on}_accuracy" if noise is None else f"noised_{on}_accuracy"


def about_tuning(chosen: Mapping[str, Any]) -> list[str]:
    """What was selected by what, and what is promised about it; one sentence a line."""
    name = chosen["selected"]
    epsilon = "none" if chosen["epsilon"] is None else rounded_up(chosen["epsilon"])
    what = "none, every trial failed" if name is None else f"{name} by {chosen['by']} {chosen['score']:.4f}"
    alone = f"of one trial alone: {rounded_up(chosen['epsilon_of_one_trial'])}"
    lines = [f"selected {what}; equal ones by the order in which they were drawn, failed trials as the worst"]
    if "score_noise_multiplier" in chosen:
        alone = alone.replace("alone", "alone, without a score")
        many, deviation = "", ""
        if name is not None:
            many, deviation = f"{chosen['score_clients']} ", f" of deviation {chosen['score_noise_stddev']:.2g}"
        lines.append(
            f"the score is the mean over {many}clients of each one's accuracy on its own held-out examples, with "
            f"Gaussian noise{deviation} (multiplier {chosen['score_noise_multiplier']:g}), which the epsilon of the "
            "tuning includes"
        )
    lines.append(f"(epsilon, delta) of the tuning: ({epsilon}, {chosen['delta']:g}), {chosen['condition']}; {alone}")
    return lines


def but_for_bound(plan: PrivacyPlan) -> PrivacyPlan:
    """Returns the plan that all trials have in common, which may bound messages in their own ways.

    Memory matters to hidden cohorts of a fixed size alone, and no tuning is credited with those.
    """
    return replace(plan, l2_bound=1.0, client_memory=True)


def draw_trials(sweep: "Sweep", grid: Sequence["Trial"], folder: RunDirectory, *, begun: bool) -> list[dict[str, Any]]:
    """Draws K trials from a grid, or reads those that were drawn when the tuning began.

    Each has a number that nobody can guess, and that says nothing about how many there are.

    Args:
        sweep: The tuning.
        grid: What is drawn from, uniformly and with replacement.
        folder: The sweep's, where the trials are written down before the first begins.
        begun: Whether there may be trials already.

    Returns:
        `draw` and `place` in the grid of each trial.

    Raises:
        UserError: If the folder holds another sweep.
    """
    assert sweep.tuning is not None
    drawn = asdict(sweep.tuning)
    if sweep.tuning.score_noise_multiplier is None:
        del drawn["score_noise_multiplier"]
    tables = [drawn, [trial.tables for trial in grid]]
    digest = hashlib.sha256(json.dumps(tables, sort_keys=True).encode()).hexdigest()
    found = folder.read_json(DRAWN)
    if found is None and begun:
        remedy = "Choose another --out: trials that were not drawn for it cannot be part of a tuning"
        raise UserError(str(folder.path), f"the {DRAWN} of a tuning", "trials without it", remedy)
    if found is not None:
        if not isinstance(found, dict) or found.get("digest") != digest:
            remedy = "Go on with the file that began it, or choose another --out, and add up what both spend"
            raise UserError(str(folder.path), "this tuning, unchanged", "another", remedy)
        return found["trials"]
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(sweep.tuning.seed)))
    count = sweep.tuning.count.quantile(float(rng.random()))
    draws, places = rng.integers(_MAX_DRAW, size=count).tolist(), rng.integers(len(grid), size=count).tolist()
    trials = [{"draw": draw, "place": place} for draw, place in zip(draws, places, strict=True)]
    folder.write_json(DRAWN, {"digest": digest, "trials": trials})
    return trials


def choose_best(
    tuning: Tuning,
    plan: PrivacyPlan,
    score: str,
    trials: Mapping[str, "Trial"],
    table: pd.DataFrame,
    clients: int | None = None,
) -> dict[str, Any]:
    """Returns the trial with the highest score, the first drawn of equal ones, and what the choice promises.

    A trial that failed has the worst score. It was drawn like the others and counts like them.

    Args:
        tuning: How trials were drawn.
        plan: Of each.
        score: Its column.
        trials: All, by name, in the order in which they were drawn.
        table: A row a trial, in the same order.
        clients: Over how many the score is a mean, if it is noised and any trial has one.
    """
    noise = tuning.score_noise
    done = {str(row["trial"]): float(row[score]) for row in table.to_dict("records") if row["status"] == "done"}
    name = max(done, key=done.__getitem__) if done else None
    return {
        "selected": name,
        "changes": {} if name is None else {k: v for k, v in trials[name].changes.items() if k != "privacy.draw"},
        "by": score,
        "score": None if name is None else done[name],
        **({} if noise is None else _about_noise(noise, clients)),
        "epsilon": tuning_epsilon(plan, tuning.count, noise),
        "delta": plan.delta,
        "epsilon_of_one_trial": plan.epsilon,
        "trust": plan.trust,
        "adjacency": plan.adjacency,
        "unit": plan.unit,
        "distribution": tuning.distribution,
        "expected_trials": tuning.expected_trials,
        **({} if tuning.eta is None else {"eta": tuning.eta}),
        "condition": tuning.condition,
    }


def _about_noise(noise: ScoreNoise, clients: int | None) -> dict[str, Any]:
    """What is known of the noise of the selected score; its deviation is that of the mean over clients."""
    deviation = None if clients is None else noise.stddev / clients
    return {"score_noise_multiplier": noise.multiplier, "score_noise_stddev": deviation, "score_clients": clients}

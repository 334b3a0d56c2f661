"""`[tuning]` of a sweep: a random number of trials, with the selection included in the privacy of the result."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from fedpriv.checks import whole_from
from fedpriv.errors import UserError
from fedpriv.experiment.build import plan_of, sampling_of
from fedpriv.experiment.config import Config
from fedpriv.experiment.run_directory import RunDirectory
from fedpriv.privacy import PrivacyPlan, rounded_up
from fedpriv.privacy.released import Whose
from fedpriv.privacy.tuning import NegativeBinomialTrials, PoissonTrials, ScoreNoise, TrialCount, tuning_epsilon
from fedpriv.sweeps.files import DRAWN
from fedpriv.tables import Record
from fedpriv.tasks.metrics import Better

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

# Tables that an axis may change: all others determine the data, the guarantee, or the duration of a trial.
_TUNED = ("method", "server", "local", "model")
_MAX_DRAW = 2**62
_CONDITION = "if the number of trials and all trials but the selected one stay secret"
_CONDITION_OF_SCORES = (
    "if the number of trials, all trials but the selected one, and every score without noise on clients' examples stay "
    "secret"
)


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """The distribution of trials.

    Args:
        distribution: Distribution of the number of trials K. `negative-binomial` is truncated: never 0.
        expected_trials: E[K].
        eta: Parameter of `negative-binomial`; `geometric` is eta = 1, and `logarithmic` eta = 0.
        seed: Seed of K, the trials and the noise of scores; None for the operating system's entropy. Anyone who knows
            the seed knows K, which voids the guarantee: a seed is for experiments about tuning.
        score_noise_multiplier: Standard deviation of the noise on the sum of clients' accuracies, divided by its
            sensitivity, 1; for scores on clients' examples. None for a public score.
    """

    distribution: Literal["geometric", "logarithmic", "negative-binomial", "poisson"]
    expected_trials: float
    eta: float | None = None
    seed: int | None = None
    score_noise_multiplier: float | None = None

    def __post_init__(self) -> None:
        if (self.eta is not None) != (self.distribution == "negative-binomial"):
            expected = "a number for negative-binomial, and for no other distribution"
            raise UserError(
                "tuning.eta",
                expected,
                self.eta,
                "Set tuning.eta only for negative-binomial; 1 is geometric, 0 logarithmic",
            )
        if self.seed is not None:
            whole_from("tuning.seed", self.seed, 0, "Remove tuning.seed for a secret one")
        # Let the distribution validate its parameters before anything is drawn.
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
        """The noise of each trial's score; None for a public score."""
        multiplier = self.score_noise_multiplier
        return None if multiplier is None else ScoreNoise(multiplier=multiplier)

    @property
    def condition(self) -> str:
        """The condition for its (epsilon, delta), as a clause."""
        return _CONDITION if self.score_noise_multiplier is None else _CONDITION_OF_SCORES


def common_plan(sweep: "Sweep", grid: Sequence["Trial"], data_root: Path | None) -> PrivacyPlan:
    """Return the plan of every trial, except for its bound.

    Raises:
        UserError: If the bound of a tuning does not hold for such trials.
    """
    if sweep.stop is not None:
        remedy = "Remove [stop]: the accounting assumes trials that do not look at others"
        raise UserError("[tuning]", "a sweep without [stop]", "both tables", remedy)
    for axis in sweep.axes:
        for key in axis.keys:
            if key.partition(".")[0] not in _TUNED:
                remedy = "Set it for all trials in [set]: trials of a tuning share the data and the guarantee"
                raise UserError(f"axis {axis.name}", f"a key of {', '.join(_TUNED)} with [tuning]", key, remedy)
    if not grid:
        raise UserError("axes", "at least one trial", "empty axes", "Add values")
    sampling, plans = sampling_of(grid[0].config, data_root), []
    for config in (trial.config for trial in grid):
        _check_trial(config, sweep.tuning)
        plan = plan_of(config, sampling, data_root)
        assert plan is not None
        plans.append(plan)
    first = but_for_bound(plans[0])
    if any(but_for_bound(plan) != first for plan in plans):
        remedy = "Set privacy.noise_multiplier instead of privacy.epsilon, or tune such methods separately"
        raise UserError("[tuning]", "trials with the same noise multiplier", "different ones", remedy)
    if not plans[0].trust_rules.trusts_server:
        remedy = "Choose trust central: otherwise the server sees every trial, and each costs its full epsilon"
        raise UserError("[tuning]", 'privacy.trust = "central"', f'"{plans[0].trust}"', remedy)
    if not plans[0].private:
        raise UserError("[tuning]", "private trials", "trials without a guarantee", "Set privacy.epsilon")
    return plans[0]


def _check_trial(config: Config, tuning: Tuning | None) -> None:
    if config.privacy is None:
        raise UserError(
            "[tuning]",
            "trials with [privacy]",
            "a non-private config",
            "Remove [tuning]: without privacy, tuning is free",
        )
    if config.privacy.draw is not None:
        raise UserError(
            "privacy.draw", "no value with [tuning]", config.privacy.draw, "Remove privacy.draw: the tuning draws it"
        )
    if config.privacy.analyses is not None:
        remedy = (
            "Remove privacy.analyses and analyses_mu with the constants that they paid for, or tune without [tuning]"
        )
        raise UserError("[tuning]", "trials without analyses, whose cost its bound lacks", "privacy.analyses", remedy)
    if config.devices is not None:
        raise UserError("[tuning]", "a config without [devices]", "both tables", "Tune without a virtual clock")
    score_of(config, None if tuning is None else tuning.score_noise)


def scored_on(config: Config) -> tuple[str, Whose]:
    """Return the examples that select the best trial, `test` or `validation`, and their owners."""
    facts = config.data.facts
    return ("test", facts.test) if facts.validation is None else ("validation", facts.validation)


def score_of(config: Config, noise: ScoreNoise | None) -> str:
    """Return the name of the score that selects the best trial: on public examples, or with noise.

    Raises:
        UserError: If a score on clients' examples has no noise, or a score on public examples has some.
    """
    on, whose = scored_on(config)
    if whose == "public" and noise is not None:
        remedy = "Remove it: a score on public examples costs nothing, and noise would only blur the choice"
        raise UserError(
            "tuning.score_noise_multiplier", f"no value with public {on} examples", noise.multiplier, remedy
        )
    if whose != "public" and noise is None:
        of = "protected clients" if whose == "within" else "other clients"
        remedy = (
            "Set tuning.score_noise_multiplier, which makes the score itself private. Otherwise choose a data set with "
            "public test examples, or hold out validation examples of a pool"
        )
        raise UserError("[tuning]", "a score on public examples, or one with noise", f"{on} examples of {of}", remedy)
    metric = config.task.selects
    if noise is not None and not metric.bounded:
        bounded = [known for known in config.task.known if config.task.known[known].bounded]
        remedy = f"List one of {', '.join(bounded)} first in task.metrics" if bounded else "Use public examples"
        raise UserError(
            "tuning.score_noise_multiplier",
            "scores from 0 to 1 of each client",
            f"{metric.name}, without limit",
            remedy,
        )
    return f"{on}_{metric.name}" if noise is None else f"noised_{on}_{metric.name}"


def about_tuning(chosen: Record) -> list[str]:
    """Return the selected trial, the score that selected it, and the guarantee, one sentence per line."""
    name = chosen["selected"]
    epsilon = "none" if chosen["epsilon"] is None else rounded_up(chosen["epsilon"])
    what = "none, every trial failed" if name is None else f"{name} by {chosen['by']} {chosen['score']:.4f}"
    alone = f"of one trial alone: {rounded_up(chosen['epsilon_of_one_trial'])}"
    lines = [f"selected {what}; ties go to the trial that was drawn first, and failed trials rank last"]
    if "score_noise_multiplier" in chosen:
        alone = alone.replace("alone", "alone, without a score")
        many, deviation = "", ""
        what_of = str(chosen["by"]).rpartition("_")[2]
        if name is not None:
            many, deviation = f"{chosen['score_clients']} ", f" of deviation {chosen['score_noise_stddev']:.2g}"
        lines.append(
            f"the score is the mean over {many}clients of each client's {what_of} on its held-out examples, with "
            f"Gaussian noise{deviation} (multiplier {chosen['score_noise_multiplier']:g}), which the epsilon of the "
            "tuning includes"
        )
    lines.append(f"(epsilon, delta) of the tuning: ({epsilon}, {chosen['delta']:g}), {chosen['condition']}; {alone}")
    return lines


def but_for_bound(plan: PrivacyPlan) -> PrivacyPlan:
    """Return the plan that all trials share, except that each may bound messages in its own way.

    Memory matters only to hidden cohorts of a fixed size, and a tuning receives no credit for those.
    """
    return replace(plan, l2_bound=1.0, client_memory=True)


def draw_trials(sweep: "Sweep", grid: Sequence["Trial"], folder: RunDirectory, *, begun: bool) -> list[Record]:
    """Draw K trials from a grid, or read the trials that were drawn when the tuning began.

    Each has a number that cannot be guessed and that does not reveal how many trials there are.

    Args:
        sweep: The tuning.
        grid: The trials to draw from, uniformly and with replacement.
        folder: The sweep's folder; the draw is saved there before the first trial begins.
        begun: True if there may be trials already.

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
        remedy = "Choose another --out: a tuning cannot include trials that were not drawn for it"
        raise UserError(str(folder.path), f"the {DRAWN} of a tuning", "trials without this file", remedy)
    if found is not None:
        if not isinstance(found, dict) or found.get("digest") != digest:
            remedy = "Resume with the original file, or choose another --out and add up both epsilons"
            raise UserError(str(folder.path), "this tuning, unchanged", "a different tuning", remedy)
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
    better: Better = "higher",
) -> Record:
    """Return the trial with the best score, the first drawn among ties, and the guarantee for the selection.

    A failed trial has the worst score. It was drawn like the others and counts like them.

    Args:
        tuning: The distribution of trials.
        plan: The plan of each trial.
        score: The column of the score.
        trials: All trials by name, in the order of the draw.
        table: One row per trial, in the same order.
        clients: Number of clients in the mean, if the score has noise and any trial has a score.
        better: The direction in which scores are better. A trial without a score has the worst.
    """
    noise = tuning.score_noise
    done = {str(row["trial"]): float(row[score]) for row in table.to_dict("records") if row["status"] == "done"}
    ranked = {name: value if better == "higher" else -value for name, value in done.items()}
    ranked = {name: -math.inf if math.isnan(value) else value for name, value in ranked.items()}
    name = max(ranked, key=ranked.__getitem__) if ranked else None
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


def _about_noise(noise: ScoreNoise, clients: int | None) -> Record:
    """Return the facts about the noise of the selected score; the deviation is that of the mean over clients."""
    deviation = None if clients is None else noise.stddev / clients
    return {"score_noise_multiplier": noise.multiplier, "score_noise_stddev": deviation, "score_clients": clients}

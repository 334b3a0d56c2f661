"""The verdict: lower bounds on epsilon from every score, each compared with the claim that it attacks.

There are two levels. Bounds are reported at the requested confidence. A mechanism is found guilty only at 99.9 %,
shared by all scores (Bonferroni), because one correct run in twenty exceeds a bound at 95 %.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fedpriv.audit.canaries import Canaries
from fedpriv.audit.statistics import (
    epsilon_of,
    f_dp_lower,
    largest_lower,
    mean_lower,
    one_run_lower,
)
from fedpriv.privacy import REPLACE_FACTOR, PrivacyPlan
from fedpriv.tables import Record

if TYPE_CHECKING:
    from fedpriv.audit.evidence import Evidence

__all__ = ["CONVICTION", "Finding", "Findings", "judge"]

CONVICTION = 0.999
"""Confidence at which a mechanism is found guilty, over all scores together."""

# Shares of the candidates that the one-run bounds guess; the best counts, each at a third of the significance.
_GUESSED = (1 / 8, 1 / 4, 1 / 2)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The result of one score.

    Args:
        name: The score's name.
        about: Its description, as a clause.
        certified: True if the bound holds for every mechanism, not only for Gaussian ones.
        estimate: Epsilon according to the score, without allowance for chance; None if the score gives no estimate.
        lower: Lower bound at the requested confidence.
        convicting: Lower bound at this score's share of `CONVICTION`.
        claimed: The epsilon that the score attacks.
    """

    name: str
    about: str
    certified: bool
    estimate: float | None
    lower: float
    convicting: float
    claimed: float

    @property
    def guilty(self) -> bool:
        """True if the score refutes the claim."""
        return self.convicting > self.claimed

    def as_dict(self) -> Record:
        """Return a dict for JSON."""
        return {
            "name": self.name,
            "about": self.about,
            "certified": self.certified,
            "epsilon_estimate": self.estimate,
            "epsilon_lower": self.lower,
            "epsilon_lower_to_convict": self.convicting,
            "epsilon_claimed": self.claimed,
            "guilty": self.guilty,
        }


@dataclass(frozen=True, kw_only=True)
class Findings:
    """All scores of one audit.

    Args:
        scores: The scores that decide the verdict.
        claimed: The epsilon under attack.
        score_claimed: Mean of `whitened` if the claim is exact and the attack loses nothing.
        whitened: Scores of the canaries along random directions that took part.
        null: The same score for directions that are in no run.
        final_model: Epsilon from the last model alone: an estimate, and a lower bound.
        without_cohorts: Epsilon estimated by an auditor who does not know the cohorts; None if they are public.
    """

    scores: tuple[Finding, ...]
    claimed: float
    score_claimed: float
    whitened: np.ndarray
    null: np.ndarray
    final_model: tuple[float, float]
    without_cohorts: float | None

    @property
    def best(self) -> Finding:
        """The tighter of the two means, which share the confidence: it gives the audit's main estimate and bound."""
        return max(self.scores[:2], key=lambda finding: finding.lower)

    @property
    def guilty(self) -> bool:
        """True if any score refutes its claim."""
        return any(finding.guilty for finding in self.scores)


@dataclass(frozen=True, kw_only=True)
class _Claims:
    """A plan's claims about canaries by their participations, and epsilon by score.

    Args:
        plan: The privacy plan.
        everyone: True if no coin hides a participation, as the plan's epsilon assumes.
    """

    plan: PrivacyPlan
    everyone: bool

    @property
    def distance(self) -> float:
        """Distance of neighbors if a client and its absence are 1 apart: 2 under replace."""
        return REPLACE_FACTOR if self.plan.adjacency == "replace" else 1.0

    def epsilon(self, score: float) -> float:
        """Return the epsilon of neighbors if canaries score like N(`score`, 1)."""
        return epsilon_of(self.distance * score, self.plan.delta)

    def score(self, root: float) -> float:
        """Return the claimed mean score of canaries; `root` is the norm of their messages.

        It is in messages of full length: the root of the number of participations, if rounds are independent.
        """
        plan, record = self.plan, self.plan.record
        unit = plan.noise_multiplier * self.distance
        if record is None or record.route != "memory":
            return root / unit
        # The noise multiplier is stated over all rounds of the plan.
        if record.feedback_clip is None:
            return math.sqrt(plan.releases.charged(round(root**2))) / unit
        return min(root * record.terms.alone / plan.noise_stddev, math.sqrt(plan.releases.charged(plan.rounds)) / unit)

    def claimed(self, root: float) -> float:
        """Return the claimed epsilon of such canaries, without amplification by sampling."""
        record = self.plan.record
        own = record is not None and record.feedback_clip is not None
        found = self.epsilon(self.score(root)) if own or not self.everyone else self.plan.epsilon
        return min(found, self.plan.epsilon) if self.everyone else found


class _Score(NamedTuple):
    """A score from which `lower` computes a bound on epsilon, given a significance."""

    name: str
    certified: bool
    estimate: float | None
    claimed: float
    lower: Callable[[float], float]
    about: str


def judge(canaries: Canaries, evidence: "Evidence", plan: PrivacyPlan, confidence: float) -> Findings:
    """Return the findings of an attacked run.

    Args:
        canaries: The canaries.
        evidence: Their scores.
        plan: The privacy plan, as without an audit.
        confidence: Confidence of the lower bounds.
    """
    everyone = plan.sampling.hiding_prob == 1.0 or bool(canaries.takes_part.all())
    claims = _Claims(plan=plan, everyone=everyone and not canaries.batched)
    seen, roots = canaries.seen, canaries.roots
    if plan.noise is not None:
        roots = np.linalg.norm(plan.noise.applied(canaries.patterns), axis=1)
    root, coins, along = float(roots[seen].mean()), canaries.coins[seen], roots[canaries.along]
    whitened, matched, took_part = evidence.whitened[seen] * coins, evidence.matched[seen] * coins, along > 0.0
    means = (_mean("whitened", whitened, root, claims), _mean("matched", matched, root, claims))
    others = [_largest("largest", whitened, roots[seen], claims)]
    if took_part.any() and (plan.record is None or plan.record.feedback_clip is None):  # signs are not independent
        others.append(_largest("coordinates", evidence.coordinate[took_part], along[took_part], claims))
    for name, bound in (("one-run", one_run_lower), ("one-run f-DP", f_dp_lower)):
        others.append(_one_run(name, bound, canaries, evidence, claims, float(roots[: canaries.isotropic].max())))
    risk, share = 1.0 - confidence, (1.0 - CONVICTION) / (len(means) + len(others))
    rows = [_found(score, risk / len(means), share) for score in means]
    return Findings(
        scores=(*rows, *(_found(score, risk, share) for score in others)),
        claimed=claims.claimed(root),
        score_claimed=claims.score(root),
        whitened=whitened,
        null=evidence.unseen,
        final_model=(claims.epsilon(float(evidence.final.mean())), claims.epsilon(mean_lower(evidence.final, risk))),
        without_cohorts=_without_cohorts(evidence, canaries, claims),
    )


def _found(score: _Score, risk: float, share: float) -> Finding:
    return Finding(
        name=score.name,
        about=score.about,
        certified=score.certified,
        estimate=score.estimate,
        lower=score.lower(risk),
        convicting=score.lower(share),
        claimed=score.claimed,
    )


_MEANS = {
    "whitened": "mean score, weighted by the inverse of the releases' covariance; for Gaussian plans",
    "matched": "mean score, weighted only by the canaries' signs; for Gaussian plans",
}
_LARGEST = {
    "largest": "the most visible canary alone; for Gaussian plans",
    "coordinates": "the most visible canary along a single coordinate; for Gaussian plans",
}
_ONE_RUN = {
    "one-run": "guessed coins, for every mechanism (Steinke, Nasr & Jagielski 2023)",
    "one-run f-DP": "guessed coins, for every Gaussian trade-off curve (Mahloujifar, Melis & Chaudhuri 2024)",
}


def _mean(name: str, scores: np.ndarray, root: float, claims: _Claims) -> _Score:
    def lower(significance: float) -> float:
        return claims.epsilon(mean_lower(scores, significance))

    return _Score(name, False, claims.epsilon(float(scores.mean())), claims.claimed(root), lower, _MEANS[name])


def _largest(name: str, scores: np.ndarray, roots: np.ndarray, claims: _Claims) -> _Score:
    """Return a score from the largest one; canaries are scaled to the mean number of rounds they took part in."""
    root = float(roots.mean())

    def lower(significance: float) -> float:
        return claims.epsilon(largest_lower(scores, root / roots, significance))

    return _Score(name, False, None, claims.claimed(root), lower, _LARGEST[name])


def _one_run(
    name: str,
    bound: Callable[[int, int, int, float, float], float],
    canaries: Canaries,
    evidence: "Evidence",
    claims: _Claims,
    most: float,
) -> _Score:
    """Return the best of three numbers of guesses; `most` is the norm of the most frequent canary."""
    candidates = canaries.isotropic
    coins, root = canaries.coins[:candidates], most
    guessed = [max(round(share * candidates), 1) for share in _GUESSED]

    def lower(significance: float) -> float:
        risk = significance / len(guessed)
        right = [_right_guesses(evidence.whitened, coins, guesses) for guesses in guessed]
        pairs = zip(guessed, right, strict=True)
        return max(bound(candidates, guesses, correct, claims.plan.delta, risk) for guesses, correct in pairs)

    return _Score(name, True, None, claims.claimed(root), lower, _ONE_RUN[name])


def _right_guesses(scores: np.ndarray, coins: np.ndarray, guesses: int) -> int:
    """Return the number of correct guesses: the sign of the largest scores, or presence at both ends."""
    if (coins < 0).any():
        chosen = np.argsort(-np.abs(scores), kind="stable")[:guesses]
        return int((np.sign(scores[chosen]) == coins[chosen]).sum())
    order = np.argsort(-scores, kind="stable")
    present, absent = order[: guesses - guesses // 2], order[len(order) - guesses // 2 :]
    return int((coins[present] == 1).sum() + (coins[absent] == 0).sum())


def _without_cohorts(evidence: "Evidence", canaries: Canaries, claims: _Claims) -> float | None:
    """Return the epsilon of two Gaussians of deviation 1, as far apart as an auditor's scores without cohorts.

    Source: Andrew et al. 2023, arXiv 2302.03098. An estimate: a sampled mechanism is not Gaussian.
    """
    if evidence.unaware is None:
        return None
    return claims.epsilon(float((evidence.unaware[canaries.seen] * canaries.coins[canaries.seen]).mean()))

"""An audit in words: what was attacked, with what knowledge, and what came of it."""

from typing import Any

from fedpriv.privacy import PrivacyPlan, rounded_up

__all__ = ["claim_of", "in_words", "knowledge_of"]


def claim_of(hidden: bool) -> str:
    """Return which epsilon is attacked; one clause.

    Args:
        hidden: Whether only some clients take part in a round.
    """
    if hidden:
        return "epsilon of a client's own participations, without amplification by sampling: the cohorts are known"
    return "epsilon of the plan, after all rounds"


def knowledge_of(plan: PrivacyPlan, hidden: bool) -> str:
    """Return what the auditor knows; one clause.

    Args:
        plan: What is promised.
        hidden: See `claim_of`.
    """
    known = "the direction and the signs of every canary" + (" and the cohort of every round" if hidden else "")
    return f"sees {plan.trust_rules.seen}; knows {known}; does not know the noise"


def in_words(record: dict[str, Any]) -> str:
    """Return one paragraph about an audit from its record (`audit.json`)."""
    rounds, mean = record["rounds"], record["participations"]["mean"]
    each = f"{rounds} rounds" if mean == rounds else f"{mean:.1f} of {rounds} rounds on average"
    attacked = (
        f"{record['canaries_seen']} canary clients took part in {each} of {record['name']} ({record['method']}, "
        f"{record['parameters']} parameters) beside {record['population']} clients, and went through the same rule, "
        f"bound, noise and sum. The auditor {record['knowledge']}."
    )
    lower = (
        f"At {100 * record['confidence']:g} % confidence epsilon is at least {record['epsilon_lower']:.2f} at delta = "
        f"{record['delta']:g} ({record['adjacency']}); the estimate is {record['epsilon_estimate']:.2f}. Claimed is "
        f"{rounded_up(record['epsilon_claimed'])}, the {record['claim']}."
    )
    level = f"{100 * record['verdict_confidence']:g} %"
    if record["verdict"] == "guilty":
        names = ", ".join(score["name"] for score in record["scores"] if score["guilty"])
        verdict = f"Guilty: at {level} over all scores, the claim is refuted by: {names}. The promise does not hold."
    else:
        verdict = (
            f"Not guilty: no score refutes the claim at {level}. That is not a proof: another attack may see more, and "
            "what an audit does not look at (files, timing, what clients report about themselves) it cannot find."
        )
    last = record["final_model"]
    final = (
        f"The last model alone shows {last['epsilon_estimate']:.2f} (at least {last['epsilon_lower']:.2f}) of a client "
        "that pushes one way whenever it takes part: an estimate of what hiding other models hides, never a guarantee."
    )
    hidden = record["without_cohorts"]
    unaware = (
        ""
        if hidden is None
        else f" Without knowing the cohorts, epsilon looks like {hidden['epsilon_estimate']:.2f}, an estimate to be "
        f"compared with the promised {rounded_up(record['epsilon_promised'])}."
    )
    crowded = " So many canaries hide each other: fewer would see more." if record["crowded"] else ""
    return f"{attacked} {lower} {verdict} {final}{unaware}{crowded}"

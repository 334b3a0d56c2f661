"""An audit in words: the attack, the auditor's knowledge, and the result."""

from fedpriv.errors import number_of
from fedpriv.privacy import PrivacyPlan, rounded_up
from fedpriv.tables import Record

__all__ = ["claim_of", "in_words", "knowledge_of"]

_CANARIES = {"client": "canary clients", "example": "canary examples, each of another client without other examples,"}


def claim_of(hidden: bool, plan: PrivacyPlan) -> str:
    """Return the epsilon under attack, as a clause.

    Args:
        hidden: True if only some clients take part in a round.
        plan: The privacy plan.
    """
    unit, record = plan.unit, plan.record
    if record is not None and record.feedback_clip is not None:
        return "epsilon of these canaries' own pushes under the plan's noise, which is below the plan's"
    if record is not None and record.terms.rate < 1.0:
        return "epsilon of an example in the batches that used it, without amplification: cohorts and batches are known"
    if hidden and unit == "example":
        return "epsilon of an example in its client's participations: the cohorts are known"
    if hidden:
        return "epsilon of a client's participations, without amplification by sampling: the cohorts are known"
    return "epsilon of the plan, after all rounds"


def knowledge_of(plan: PrivacyPlan, hidden: bool) -> str:
    """Return the auditor's knowledge, as a clause.

    Args:
        plan: The privacy plan.
        hidden: See `claim_of`.
    """
    known = "the direction and the signs of every canary" + (" and the cohort of every round" if hidden else "")
    known += " and all batches" if plan.record is not None and plan.record.terms.rate < 1.0 else ""
    return f"sees {plan.trust_rules.seen}; knows {known}; does not know the noise"


def in_words(record: Record) -> str:
    """Return one paragraph about an audit from its record (`audit.json`)."""
    rounds, mean = record["rounds"], record["participations"]["mean"]
    each = number_of(rounds, "round") if mean == rounds else f"{mean:.1f} of {rounds} rounds on average"
    attacked = (
        f"{record['canaries_seen']} {_CANARIES[record['unit']]} took part in {each} of {record['name']} "
        f"({record['method']}, {record['parameters']} parameters) next to {record['population']} clients, and went "
        f"through the same rule, bound, noise and sum. The auditor {record['knowledge']}."
    )
    lower = (
        f"At {100 * record['confidence']:g} % confidence epsilon is at least {record['epsilon_lower']:.2f} at delta = "
        f"{record['delta']:g} ({record['adjacency']}); the estimate is {record['epsilon_estimate']:.2f}. The claim is "
        f"{rounded_up(record['epsilon_claimed'])}, the {record['claim']}."
    )
    level = f"{100 * record['verdict_confidence']:g} %"
    if record["verdict"] == "guilty":
        names = ", ".join(score["name"] for score in record["scores"] if score["guilty"])
        verdict = f"Guilty: at {level} over all scores, the claim is refuted by {names}. The guarantee does not hold."
    else:
        verdict = (
            f"Not guilty: no score refutes the claim at {level}. That is not a proof: another attack may see more, and "
            "an audit cannot find leaks that it does not look at (files, timing, clients' reports about themselves)."
        )
    last = record["final_model"]
    final = (
        f"From the last model alone, epsilon is estimated at {last['epsilon_estimate']:.2f} (at least "
        f"{last['epsilon_lower']:.2f}) for a client that pushes one way in every round it takes part in. This only "
        "estimates the effect of hiding the other models; it is never a guarantee."
    )
    hidden = record["without_cohorts"]
    unaware = (
        ""
        if hidden is None
        else f" Without knowing who was in which round, epsilon is estimated at {hidden['epsilon_estimate']:.2f}, to "
        f"be compared with the promised {rounded_up(record['epsilon_promised'])}."
    )
    crowded = " So many canaries hide each other: fewer would be more visible." if record["crowded"] else ""
    return f"{attacked} {lower} {verdict} {final}{unaware}{crowded}"

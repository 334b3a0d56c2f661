"""Epsilon of single records by their client: a client with more examples than the fewest is protected better.

All clients add the noise that the smallest client needs. With `replace` and without `privacy.examples`, each divides by
its own number of examples, which is public. A record of a client with m examples moves its messages by 2 C / m.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fedpriv.privacy.gaussian import MAX_NOISE
from fedpriv.privacy.plan import PrivacyPlan
from fedpriv.privacy.statement import rounded_up

__all__ = ["ledgers_of", "of_sizes", "plan_for", "sizes_in_words"]

# Most different (examples, rounds) of clients that are accounted one by one; far fewer if each takes seconds.
_MAX_LEDGERS, _MAX_SLOW_LEDGERS = 10_000, 8


def plan_for(plan: PrivacyPlan, examples: int) -> PrivacyPlan:
    """Return the promise of the same noise to the records of a client with `examples` examples."""
    record = plan.record
    if record is None or record.terms.declared or record.route == "steps":  # one sensitivity for all clients
        return plan
    # Beyond the most examples, memories round by more than their slack: the bound of fewer examples holds as well.
    own = max(min(examples, int(record.most_examples(plan.rounds))), record.terms.examples)
    found = replace(plan, record=replace(record, terms=replace(record.terms, examples=own)))
    return replace(found, noise_multiplier=min(plan.noise_stddev / found.l2_sensitivity, MAX_NOISE))


def of_sizes(plan: PrivacyPlan | None, sizes: np.ndarray | Sequence[int]) -> dict[str, Any]:
    """Return the least, median and largest epsilon of clients after all rounds, ready for JSON.

    Args:
        plan: The plan; its epsilon is the largest.
        sizes: Numbers of examples of all clients; those without examples have no records.

    Returns:
        `clients` with `examples` and `epsilon` of the three; nothing if all clients have the plan's epsilon.
    """
    held = np.sort(np.asarray(sizes)[np.asarray(sizes) > 0])
    if plan is None or not plan.private or not len(held) or plan_for(plan, int(held[-1])) == plan:
        return {}
    found = {who: int(held[at]) for who, at in (("min", -1), ("median", (len(held) - 1) // 2), ("max", 0))}
    rows = {who: {"examples": own, "epsilon": plan_for(plan, own).epsilon} for who, own in found.items()}
    return {"clients": rows}


def sizes_in_words(found: dict[str, Any]) -> str:
    """Return what `of_sizes` found as a line of a statement; nothing if it found nothing."""
    if not found:
        return ""
    rows = [found["clients"][who] for who in ("min", "median", "max")]
    told = [f"{rounded_up(row['epsilon'])} ({row['examples']} examples)" for row in rows]
    return (
        f"\nby client   epsilon of a record follows from its client's public number of examples: {told[0]} at least, "
        f"{told[1]} in the median, {told[2]} at most, which is the epsilon above\n"
    )


def ledgers_of(plan: PrivacyPlan, sizes: Sequence[int], taken: Sequence[int]) -> list[dict[str, Any]]:
    """Return what each client's records spent under local trust, by its own examples and rounds; empty if it is long.

    Args:
        plan: The plan.
        sizes: Number of examples of each client.
        taken: Number of messages of each client.
    """
    pairs = sorted({(own, times) for own, times in zip(sizes, taken, strict=True) if own > 0})
    slow = plan.record is not None and plan.record.terms.rate < 1.0
    if len(pairs) > (_MAX_SLOW_LEDGERS if slow else _MAX_LEDGERS):
        return []
    spent = {(own, times): plan_for(plan, own).epsilon_of_participations(times) for own, times in pairs}
    return [
        {"client": client, "examples": own, "participations": times, "epsilon": spent.get((own, times), 0.0)}
        for client, (own, times) in enumerate(zip(sizes, taken, strict=True))
    ]

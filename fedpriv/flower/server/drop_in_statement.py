"""The privacy statement of a run of somebody's own app: which arrays it covers, and what failing clients change."""

import textwrap
from typing import Literal

from fedpriv.flower.trained import TrainedArrays
from fedpriv.privacy import PrivacyPlan, privacy_statement

__all__ = ["drop_in_statement"]

_COVERED = (
    "Arrays: a client's message is its update of {trained}. Noise is added to these numbers ({size:,}), and to nothing "
    "else. {fixed}"
)

_FIXED = "Not part of it, sent to all clients as they were at the start and never changed: {names}."

_FAILURES = (
    "Failures: a client that does not answer, or whose message cannot be used, is one whose message is zero. The noise "
    "does not depend on how many answer, and sums are divided by the expected number of clients."
)

_SECRET = (
    " Epsilon relies on nobody knowing who took part: keep the server's log, which names clients that fail, and the "
    "network's traffic from the adversary."
)


def drop_in_statement(
    plan: PrivacyPlan | None,
    *,
    method: str,
    randomness: str,
    arrays: TrainedArrays,
    size: int,
    app: Literal["fixed", "supplied"] | None = None,
    evaluated: bool = False,
) -> str:
    """Return the statement of a run.

    Args:
        plan: See `privacy_statement`.
        method: See `privacy_statement`.
        randomness: See `privacy_statement`.
        arrays: Which arrays are trained.
        size: How many numbers these hold.
        app: See `privacy_statement`.
        evaluated: See `privacy_statement`.
    """
    statement = privacy_statement(plan, method=method, randomness=randomness, app=app, evaluated=evaluated)
    if plan is None or not plan.private:
        return statement
    fixed = _FIXED.format(names=", ".join(arrays.fixed)) if arrays.fixed else ""
    covered = _COVERED.format(trained=_trained(arrays), size=size, fixed=fixed)
    paragraphs = [covered, _FAILURES + (_SECRET if plan.amplification else "")]
    return statement + "".join("\n" + textwrap.fill(text, width=100) + "\n" for text in paragraphs)


def _trained(arrays: TrainedArrays) -> str:
    """Return the trained arrays in words; if there are many, they follow from the fixed ones, which are all named."""
    if not arrays.fixed:
        return f"all {len(arrays.names)} arrays of the model"
    if len(arrays.trained) <= len(arrays.fixed) or len(arrays.trained) <= 10:
        return ", ".join(arrays.trained)
    return f"{len(arrays.trained)} of the model's {len(arrays.names)} arrays"

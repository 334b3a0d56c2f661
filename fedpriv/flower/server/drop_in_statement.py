"""The privacy statement of a run of somebody's own app: the arrays that it covers, and what failures and time show."""

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

_EQUALLY_LONG = "Time: every round lasts {seconds:g} s, whoever takes part; a late answer is a message of zero."

_AS_LONG_AS_ANSWERS_TAKE = (
    "Time: a round lasts until its last answer, and how long that takes shows who took part. So the promise is against "
    "an adversary who sees models alone, as in a simulation, and not against one who can time rounds; round_seconds of "
    "the strategy makes all rounds equally long."
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
    round_seconds: float | None = None,
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
        round_seconds: How long every round lasts; None for as long as answers take.
    """
    statement = privacy_statement(plan, method=method, randomness=randomness, app=app, evaluated=evaluated)
    if plan is None or not plan.private:
        return statement
    fixed = _FIXED.format(names=", ".join(arrays.fixed)) if arrays.fixed else ""
    covered = _COVERED.format(trained=_trained(arrays), size=size, fixed=fixed)
    paragraphs = [covered, _FAILURES + (_SECRET if plan.amplification else "")]
    if plan.amplification:
        timed = _AS_LONG_AS_ANSWERS_TAKE if round_seconds is None else _EQUALLY_LONG.format(seconds=round_seconds)
        paragraphs.append(timed)
    return statement + "".join("\n" + textwrap.fill(text, width=100) + "\n" for text in paragraphs)


def _trained(arrays: TrainedArrays) -> str:
    """Return the trained arrays in words; if there are many, they follow from the fixed ones, which are all named."""
    if not arrays.fixed:
        return f"all {len(arrays.names)} arrays of the model"
    if len(arrays.trained) <= len(arrays.fixed) or len(arrays.trained) <= 10:
        return ", ".join(arrays.trained)
    return f"{len(arrays.trained)} of the model's {len(arrays.names)} arrays"

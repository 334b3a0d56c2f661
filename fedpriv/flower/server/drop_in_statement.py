"""Privacy statement of a run of a user's app, including its arrays, failures and timing, and its warnings."""

import textwrap
from typing import Literal

from fedpriv.flower.trained import TrainedArrays
from fedpriv.privacy import PrivacyPlan, files_in_words, privacy_statement, signal_warning
from fedpriv.streams import Randomness

__all__ = ["RECORDED", "drop_in_statement", "warnings_of"]

_COVERED = (
    "Arrays: a client's message is its update of {trained}. Noise is added to these numbers ({size:,}) and to no "
    "others. {fixed}"
)

_FIXED = "These arrays are not part of it, keep their initial values and are sent to all clients unchanged: {names}."

_FAILURES = (
    "Failures: a client that does not answer, or sends an unusable message, counts as a client with a zero message. "
    "{noise}, and sums are divided by the expected number of clients."
)

_SAME_NOISE = "The noise does not depend on how many clients answer"
_ENOUGH_SHARES = "A round in which too few clients answer with their share of the noise is void"

_SECRET = (
    " Epsilon holds only if the adversary does not know who took part: keep the server's log, which names clients that "
    "fail, and the network's traffic from the adversary."
)

_EQUALLY_LONG = (
    "Time: every round lasts {seconds:g} s, regardless of who takes part; a late answer counts as a zero message."
)

_AS_LONG_AS_ANSWERS_TAKE = (
    "Time: a round lasts until its last answer, and its duration reveals who took part. The guarantee therefore holds "
    "against an adversary who sees only models, as in a simulation, and not against one who can time rounds. To make "
    "all rounds equally long, set round_seconds of the strategy."
)


RECORDED = (
    *("config.toml", "digest.txt", ".lock", "privacy.json", "privacy.txt", "initial.safetensors", "model.safetensors"),
    *("rounds.jsonl", "curves.png", "summary.json", "mlflow.json", "wandb.json", "tensorboard", "wandb"),
    *("checkpoint.safetensors", "diagnostics.jsonl", "diagnostics.json"),
)
"""The files that a strategy writes in its run directory."""


def drop_in_statement(
    plan: PrivacyPlan | None,
    *,
    method: str,
    randomness: Randomness,
    arrays: TrainedArrays,
    size: int,
    app: Literal["fixed", "supplied"] | None = None,
    evaluated: bool = False,
    round_seconds: float | None = None,
    recorded: bool = False,
) -> str:
    """Return the statement of a run.

    Args:
        plan: See `privacy_statement`.
        method: See `privacy_statement`.
        randomness: See `privacy_statement`.
        arrays: Trained and fixed arrays.
        size: Number of values in the trained arrays.
        app: See `privacy_statement`.
        evaluated: See `privacy_statement`.
        round_seconds: Duration of every round in seconds; None if a round ends with its last answer.
        recorded: True if the run writes a run directory; the statement then lists its files.
    """
    statement = privacy_statement(plan, method=method, randomness=randomness, app=app, evaluated=evaluated)
    if plan is None or not plan.private:
        return statement
    fixed = _FIXED.format(names=", ".join(arrays.fixed)) if arrays.fixed else ""
    covered = _COVERED.format(trained=_trained(arrays), size=size, fixed=fixed)
    failures = _FAILURES.format(noise=_SAME_NOISE if plan.aggregation is None else _ENOUGH_SHARES)
    paragraphs = [covered, failures + (_SECRET if plan.amplification else "")]
    if plan.amplification:
        timed = _AS_LONG_AS_ANSWERS_TAKE if round_seconds is None else _EQUALLY_LONG.format(seconds=round_seconds)
        paragraphs.append(timed)
    texts = [textwrap.fill(text, width=100) for text in paragraphs]
    return statement + "".join(f"\n{text}\n" for text in (*texts, *([files_in_words(RECORDED)] if recorded else [])))


def warnings_of(
    plan: PrivacyPlan | None, size: int, arrays: TrainedArrays, randomness: Randomness, evaluated: bool
) -> list[str]:
    """Return warnings about a run; see `drop_in_statement`."""
    found = []
    drowned = None if plan is None or not plan.private else signal_warning(plan, size)
    if drowned:
        found.append(drowned)
    if randomness == "seeded":
        found.append("Randomness comes from a seed: anyone who knows it can remove the noise. Simulation only.")
    elif plan is not None and not plan.trust_rules.trusts_server and not arrays.declared:
        found.append(
            "No array is declared frozen or trainable, so all get noise. Clients do not report untrained arrays to "
            "an untrusted server: declare them."
        )
    if evaluated and plan is not None:
        found.append("Clients report metrics of their data. The privacy statement does not cover them.")
    return found


def _trained(arrays: TrainedArrays) -> str:
    """Return the trained arrays in words; if there are many, only their number, since all fixed arrays are named."""
    if not arrays.fixed:
        return f"all {len(arrays.names)} arrays of the model"
    if len(arrays.trained) <= len(arrays.fixed) or len(arrays.trained) <= 10:
        return ", ".join(arrays.trained)
    return f"{len(arrays.trained)} of the model's {len(arrays.names)} arrays"

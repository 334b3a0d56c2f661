"""Curricula: the order of a client's own examples by their loss, and the share of them that it uses.

Vahidian et al. 2022, "When Do Curricula Work in Federated Learning?", arXiv 2212.12712. A client sorts its examples by
their loss under the round's model, the smallest first, and uses the first N g(t) of its N examples:

    g(t) = b + (1 - b) phi(t / aT),     phi linear: min(1, t / aT),     phi step: 0 before t = aT, then 1

| the paper's letter | here |
|---|---|
| t | the rounds before this one |
| b | `pacing_start` |
| aT | `pacing_rounds` |
| phi | `pacing` |

The order and the share are part of how a client makes its message. With whole clients as the unit of privacy, they
change neither sensitivity nor accounting. With single examples as the unit, one example could change every batch, so
the order is refused there. The same paper also orders clients by loss; this is refused, because it makes cohorts depend
on the clients' data.
"""

import math
from typing import Literal, get_args

import numpy as np

from fedpriv.checks import positive_int, real_within
from fedpriv.errors import UserError

__all__ = ["Pacing", "by_loss", "check_pacing", "share_of"]

Pacing = Literal["linear", "step"]
"""The growth of the share of examples in use: a little in each round, or at once."""


def check_pacing(pacing: str | None, start: float | None, rounds: int | None, *, ordered: bool) -> None:
    """Raise UserError unless the keys of a pacing are all given, or none, with an order by loss."""
    if pacing is not None and pacing not in get_args(Pacing):
        raise UserError("local.pacing", '"linear" or "step"', repr(pacing), "Choose one of the two")
    for key, value in (("pacing", pacing), ("pacing_start", start), ("pacing_rounds", rounds)):
        if value is not None and not ordered:
            remedy = 'Set order = "by-loss", or remove the key'
            raise UserError(f"local.{key}", 'no value unless local.order = "by-loss"', repr(value), remedy)
        if (value is None) != (pacing is None):
            got = "a missing key" if value is None else repr(value)
            remedy = "Set all of pacing, pacing_start and pacing_rounds, or none"
            raise UserError(f"local.{key}", "a value together with local.pacing", got, remedy)
    if start is not None:
        real_within("local.pacing_start", start, 1e-6, 1.0, "Give the share of examples in the first round")
    if rounds is not None:
        positive_int("local.pacing_rounds", rounds, "Give the number of rounds before all examples are used")


def share_of(pacing: Pacing | None, start: float | None, rounds: int | None, round: int) -> float:
    """Return the share of its examples that a client uses in `round`, from 1; see the module for the letters."""
    if pacing is None or start is None or rounds is None:
        return 1.0
    grown = min(1.0, (round - 1) / rounds)
    return start + (1.0 - start) * (grown if pacing == "linear" else math.floor(grown))


def by_loss(losses: np.ndarray, share: float, batch_size: int | None) -> list[np.ndarray | None]:
    """Return the batches of one pass, as positions in the client's data; None for all examples.

    Args:
        losses: The losses of the examples, `[examples]`. Examples of equal loss keep their order; NaN comes last.
        share: The share of examples to use, rounded up to a whole number of at least 1.
        batch_size: Examples of each batch; the last one may have fewer. None for a single batch.
    """
    examples = len(losses)
    used = min(examples, max(1, math.ceil(share * examples - 1e-9)))
    if batch_size is None or batch_size >= used:
        return [None if used == examples else np.sort(np.argsort(losses, kind="stable")[:used])]
    order = np.argsort(losses, kind="stable")[:used]
    return [np.sort(order[start : start + batch_size]) for start in range(0, used, batch_size)]

"""Warnings for runs with non-finite client updates, or that learned nothing.

An update that is not finite counts as zero. Without a warning, a run in which every update diverged would end like any
other, with a model that is pure noise. All warnings derive from `diagnostics.jsonl`, which is for simulations only.
"""

from collections.abc import Sequence

from fedpriv.errors import number_of
from fedpriv.tables import Record

__all__ = ["Complaints", "learned_nothing", "warnings_of"]

_CAUSE = "Lower local.client_lr or method.server_lr, or look at the clients' inputs."


class Complaints:
    """A callable that reports rounds with non-finite updates as they happen; call it with every row of diagnostics.

    It reports the first round with such an update, and the first in which no update is finite.
    """

    def __init__(self) -> None:
        self._any = self._all = False

    def __call__(self, row: Record) -> str:
        """Return a line to show; empty if there is nothing new to report."""
        bad, messages = row.get("non_finite") or 0, row.get("cohort_size") or 0
        new = (bad > 0 and not self._any) or (0 < messages == bad and not self._all)
        self._any, self._all = self._any or bad > 0, self._all or 0 < messages == bad
        return f"round {row['round']}: {_updates(bad, messages)} not finite and counted as zero" if new else ""


def warnings_of(rows: Sequence[Record]) -> list[str]:
    """Return the warnings for a run, one or two sentences each; an empty list for an ordinary run.

    Args:
        rows: The rows of `diagnostics.jsonl`.
    """
    void = sum(row.get("void", False) for row in rows)
    if 2 * void >= len(rows) > 0:
        return [*_warnings_of([row for row in rows if not row.get("void", False)]), _void(void, len(rows))]
    return _warnings_of(rows)


def _void(void: int, rounds: int) -> str:
    return (
        f"Void rounds: {void} of {rounds}, with too few answers or too large a sum. They are charged, but change no "
        "model. Use larger cohorts, or lower aggregation.least_survivors."
    )


def _warnings_of(rows: Sequence[Record]) -> list[str]:
    messages, bad = _sum(rows, "cohort_size"), _sum(rows, "non_finite")
    if not rows:
        return []
    if messages == 0:
        return [f"No client's message counted in {number_of(len(rows), 'round')}: the model is at most noise."]
    if learned_nothing(rows):
        return [f"None of {messages} updates was finite; all counted as zero. The model is at most noise. {_CAUSE}"]
    if bad == 0:
        return []
    since = _useless_since(rows)
    last = f" From round {since} on no update was finite." if since is not None else ""
    return [f"{_updates(bad, messages)} not finite and counted as zero.{last} {_CAUSE}"]


def learned_nothing(rows: Sequence[Record]) -> bool:
    """Return True if clients sent messages and none of them came from a finite update."""
    messages = _sum(rows, "cohort_size")
    return 0 < messages == _sum(rows, "non_finite")


def _useless_since(rows: Sequence[Record]) -> int | None:
    """Return the first of the final rounds in which no update was finite; None if the last round had a finite one."""
    since = None
    for row in reversed(rows):
        if (row.get("cohort_size") or 0) > (row.get("non_finite") or 0):
            break
        since = row["round"] if row.get("cohort_size") else since
    return since


def _updates(bad: int, messages: int) -> str:
    return f"{bad} of {messages} updates {'was' if bad == 1 else 'were'}"


def _sum(rows: Sequence[Record], key: str) -> int:
    return sum(row.get(key) or 0 for row in rows)

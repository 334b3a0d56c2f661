"""The one shape of error for what a user can cause: where, expected what, got what, what to do."""

import difflib
from collections.abc import Iterable

__all__ = ["UserError", "nearest"]


class UserError(ValueError):
    """A mistake that the user can mend, as one clear line.

    Args:
        where: The key, file or argument that is at fault.
        expected: What would have been right.
        got: What was found.
        remedy: What to do about it; a full sentence without its full stop.
    """

    def __init__(self, where: str, expected: str, got: object, remedy: str) -> None:
        self.where = where
        line = f"{where}: expected {expected}, got {got}. {remedy}."
        super().__init__(" ".join(line.split()))


def nearest(name: str, known: Iterable[str]) -> str:
    """A remedy that names the known name nearest to `name`, or all known names if none is near."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"Did you mean {close[0]!r}? Known: {', '.join(names)}"
    return f"Known: {', '.join(names) or 'none'}"

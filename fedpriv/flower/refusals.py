"""Refusals of clients: a kind for programs, and a line for people."""

from fedpriv.errors import UserError

__all__ = ["KINDS", "Refusal"]

KINDS = {
    "policy": "this client's policy does not allow these instructions",
    "budget": "its privacy budget does not allow another message",
    "model": "the model or the instructions are invalid",
    "stale": "it has already answered this turn, or a later one",
    "lost": "its memory is lost, or belongs to another turn than the last one that counted",
    "trouble": "its records cannot be read or written, or its own code failed",
    "app": "its app failed",
}


# The full line of these refusals may leave: it mentions the instructions and limits, never data, files or past runs.
_OPEN = ("policy", "model", "stale", "lost")


class Refusal(UserError):  # noqa: N818
    """Refusal of instructions by a client; nothing was sent, and the client's records are unchanged.

    Args:
        kind: One of `KINDS`.
        where: See `UserError`.
        expected: See `UserError`.
        got: See `UserError`.
        remedy: See `UserError`.
    """

    def __init__(self, kind: str, where: str, expected: str, got: object, remedy: str) -> None:
        super().__init__(where, expected, got, remedy)
        self.kind = kind

    @property
    def public_line(self) -> str:
        """Line for the server: it reveals nothing beyond the instructions, the model and the policy."""
        return str(self) if self.kind in _OPEN else f"{KINDS[self.kind]}; see its operator's log"

    @classmethod
    def because(cls, kind: str, line: str) -> "Refusal":
        """Return a refusal with a given line."""
        refusal = cls(kind, line.split(":", 1)[0], "", "", "")
        refusal.args = (line,)
        return refusal

"""How a client says no: a kind that programs read, and a line that people read."""

from fedpriv.errors import UserError

__all__ = ["KINDS", "Refusal"]

KINDS = {
    "policy": "the order is not what this client agreed to",
    "budget": "its privacy budget does not allow another message",
    "model": "the model or the order cannot be right",
    "stale": "an answer to this turn, or a later one, was given already",
    "lost": "its memory is lost, or is not that of the turn that counted last",
    "trouble": "its records cannot be read or written, or its own code failed",
    "app": "its app failed",
}


# Refusals whose whole line may leave: it speaks of the order and of limits, never of data, files or past runs.
_OPEN = ("policy", "model", "stale", "lost")


class Refusal(UserError):  # noqa: N818
    """An order that a client does not follow; nothing was sent, and nothing of the client changed.

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
    def told(self) -> str:
        """The line for the server: nothing in it that the order, the model or the policy does not say already."""
        return str(self) if self.kind in _OPEN else f"{KINDS[self.kind]}; its operator's log says more"

    @classmethod
    def because(cls, kind: str, line: str) -> "Refusal":
        """A refusal whose line is written already."""
        refusal = cls(kind, line.split(":", 1)[0], "", "", "")
        refusal.args = (line,)
        return refusal

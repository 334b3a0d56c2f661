"""Whose data a promise protects together. A unit answers for itself; records keep the plain word."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Protocol

from fedpriv.errors import UserError, nearest
from fedpriv.plugins import Registry

__all__ = ["ADJACENCIES", "UNITS", "Client", "Unit", "unit_of"]

ADJACENCIES = ("add-or-remove", "replace")
"""How two neighboring populations differ; see `Unit.neighbors`."""


class Unit(Protocol):
    """Whose data may change: a frozen dataclass without fields.

    Attributes:
        name: The word in configs, records, orders and ledgers.
        one: One of them, in words.
        neighbors: By adjacency, which populations an adversary cannot tell apart; a sentence.
    """

    name: ClassVar[str]
    one: ClassVar[str]
    neighbors: ClassVar[Mapping[str, str]]

    def over(self, rounds: int) -> str:
        """What is protected in a run of so many rounds; a sentence."""
        ...


@dataclass(frozen=True)
class Client:
    """All data of one client, in all rounds."""

    name: ClassVar[str] = "client"
    one: ClassVar[str] = "client"
    neighbors: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "add-or-remove": "Neighbours (add-or-remove): two populations that differ in one client, whose message is "
            "there in the one and zero in the other.",
            "replace": "Neighbours (replace): two populations that differ in all the data of one client, whose message "
            "is any bounded message in the one and any other in the other.",
        }
    )

    def over(self, rounds: int) -> str:
        """See `Unit.over`."""
        return f"Unit: one client, that is all of its data, in all of its {rounds} rounds together."


UNITS: Registry[Unit] = Registry("unit", {"client": Client})


def unit_of(name: str) -> Unit:
    """The unit that a word stands for.

    Raises:
        UserError: If there is none.
    """
    if name == "example":
        remedy = 'Not offered yet: use unit = "client", which protects all examples of a client together'
        raise UserError("privacy.unit", '"client"', '"example"', remedy)
    if name not in UNITS:
        raise UserError("privacy.unit", "a known name", repr(name), nearest(str(name), UNITS))
    return UNITS[name]()

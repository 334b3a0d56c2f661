"""The unit of privacy: the data that a guarantee protects together. Records keep only the unit's name."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal, Protocol, cast, get_args

from fedpriv.errors import UserError, nearest
from fedpriv.plugins import Registry

__all__ = [
    "ADJACENCIES",
    "UNITS",
    "Adjacency",
    "Client",
    "Example",
    "Unit",
    "UnitName",
    "adjacency_of",
    "unit_name",
    "unit_of",
]

Adjacency = Literal["add-or-remove", "replace"]
"""The way in which two neighboring populations differ; see `Unit.neighbors`."""

ADJACENCIES: tuple[Adjacency, ...] = get_args(Adjacency)

UnitName = Literal["client", "example"]
"""The name of a unit in `UNITS`."""


class Unit(Protocol):
    """The data that differ between neighbors: a frozen dataclass without fields.

    Attributes:
        name: Its name in configs, records, instructions and ledgers.
        one: One such unit, in words.
        neighbors: By adjacency, the populations that an adversary cannot distinguish; a sentence.
    """

    name: ClassVar[str]
    one: ClassVar[str]
    neighbors: ClassVar[Mapping[str, str]]

    def over(self, rounds: int) -> str:
        """Return a sentence on the data that are protected in a run of `rounds` rounds."""
        ...


@dataclass(frozen=True)
class Client:
    """All data of one client, in all rounds."""

    name: ClassVar[str] = "client"
    one: ClassVar[str] = "client"
    neighbors: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "add-or-remove": "Neighbors (add-or-remove): two populations that differ in one client; its message is "
            "present in one of them and zero in the other.",
            "replace": "Neighbors (replace): two populations that differ in all the data of one client; its message is "
            "any bounded message in one of them and any other in the other.",
        }
    )

    def over(self, rounds: int) -> str:
        """See `Unit.over`."""
        together = "its only round" if rounds == 1 else f"all of its {rounds} rounds together"
        return f"Unit: one client, that is, all of its data in {together}."


@dataclass(frozen=True)
class Example:
    """A single record of a client, in all rounds."""

    name: ClassVar[str] = "example"
    one: ClassVar[str] = "example"
    neighbors: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "add-or-remove": "Neighbors (add-or-remove): two populations of the same clients that differ in one "
            "example of one client, which is present in one of them and absent in the other. The number that sums are "
            "divided by is public, and the same in both.",
            "replace": "Neighbors (replace): two populations of the same clients that differ in the content of one "
            "example of one client. The number of examples of each client is public, and the same in both.",
        }
    )

    def over(self, rounds: int) -> str:
        """See `Unit.over`."""
        together = "the only round" if rounds == 1 else f"all of the {rounds} rounds together"
        return (
            f"Unit: one example, that is, one row of one client's data, in {together}. The "
            "adversary may know all other examples of the client. A person with several rows, or whose row is held by "
            "several clients, is protected less: the epsilons of the rows add up."
        )


UNITS: Registry[Unit] = Registry("unit", {"client": Client, "example": Example})


def unit_of(name: str) -> Unit:
    """Return the unit with this name.

    Raises:
        UserError: If there is none.
    """
    if name not in UNITS:
        raise UserError("privacy.unit", "a known name", repr(name), nearest(str(name), UNITS))
    return UNITS[name]()


def unit_name(name: str) -> UnitName:
    """Return the name if there is such a unit; see `unit_of` for errors."""
    unit_of(name)
    return cast(UnitName, name)


def adjacency_of(name: str) -> Adjacency:
    """Return the name if there is such an adjacency.

    Raises:
        UserError: If there is none.
    """
    for known in ADJACENCIES:
        if name == known:
            return known
    raise UserError("privacy.adjacency", "a known name", repr(name), nearest(str(name), ADJACENCIES))

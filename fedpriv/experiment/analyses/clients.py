"""The clients of an analysis: a training may take its answers only if it has the same ones."""

from pathlib import Path

from fedpriv.errors import UserError
from fedpriv.plugins import bare_reference
from fedpriv.tables import Record

__all__ = ["CONSTANTS", "clients_of", "refuse_other_clients"]

CONSTANTS = ("numeric", "mean", "std")
"""Keys of [data] that scale the clients' examples, and that an analysis of the same clients may have set."""

# Keys that change which natural clients or examples take part, but no client.
_PARTS = ("clients", "test", "validation")


def clients_of(tables: Record) -> dict[str, object]:
    """Return the values that determine the clients and their examples, but for constants.

    Natural clients are the same for every seed, and for any number of them.

    Args:
        tables: A resolved config.
    """
    found = {key: value for key, value in tables["data"].items() if key not in CONSTANTS}
    found["name"] = bare_reference(found["name"])
    if found["partition"] == "natural":
        return {key: value for key, value in found.items() if key not in _PARTS}
    return {**found, "seed": tables["seed"]}


def refuse_other_clients(asked: object, tables: Record, folder: Path) -> None:
    """Raise UserError unless a training has the clients of an analysis: the costs of other clients do not add up.

    Args:
        asked: The clients of the analysis; see `clients_of`.
        tables: The resolved config of the training.
        folder: The run directory of the analysis.
    """
    ours = clients_of(tables)
    if not isinstance(asked, dict):
        remedy = "Repeat the analysis with this version"
        raise UserError("data.standardize", "an analysis that records its clients", str(folder), remedy)
    theirs: dict[str, object] = dict(asked)  # pyright: ignore[reportUnknownArgumentType]
    for key in sorted({*ours, *theirs}):
        if ours.get(key) != theirs.get(key):
            where = key if key == "seed" else f"data.{key}"
            expected = f"an analysis of the same clients ({where} = {ours.get(key)!r})"
            remedy = "Repeat the analysis with the [data] and the seed of this run"
            raise UserError("data.standardize", expected, f"{theirs.get(key)!r} in {folder}", remedy)

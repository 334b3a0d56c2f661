"""Strict parsing of a TOML table into a frozen dataclass, with errors that name the key."""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from fedpriv.errors import UserError, nearest
from fedpriv.tables import Record, Table

__all__ = ["NAMED", "field_names", "read_table", "write_table"]

NAMED: Mapping[str, bool] = {"named": True}
"""Metadata of a field that holds a name; its class checks the name, and the error suggests the nearest one."""

T = TypeVar("T")


def field_names(kind: type, given: tuple[str, ...] = ()) -> list[str]:
    """Return the fields that a table may set: all but those in `given`, which the program sets."""
    return [field.name for field in dataclasses.fields(kind) if field.init and field.name not in given]


def read_table(kind: type[T], table: Table, where: str, **given: object) -> T:
    """Return an instance of the dataclass `kind` from a TOML table.

    Args:
        kind: The dataclass.
        table: The values by key.
        where: The table's name, for errors.
        given: Fields that the program sets.

    A field with `metadata={"formerly": {"old": "new"}}` also takes the old words of its values.

    Raises:
        UserError: For an unknown key, a missing key or a value of the wrong type.
    """
    known = field_names(kind, tuple(given))
    refuse_unknown(table, known, where)
    hints = typing.get_type_hints(kind)
    values: dict[str, object] = {}
    for field in dataclasses.fields(kind):  # pyright: ignore[reportArgumentType]
        key = f"{where}.{field.name}" if where else field.name
        if field.name in given or not field.init:
            continue
        if field.name in table:
            hint = _text(hints[field.name]) if field.metadata.get("named") else hints[field.name]
            former, value = field.metadata.get("formerly", {}), table[field.name]
            values[field.name] = _typed(hint, former.get(value, value) if isinstance(value, str) else value, key)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            place = f"to [{where}]" if where else "at the top of the file"
            raise UserError(key, _describe(hints[field.name]), "a missing key", f"Add {field.name} {place}")
    return kind(**values, **given)


def refuse_unknown(table: Table, known: list[str], where: str, hint: str = "") -> None:
    """Raise UserError for an unknown key in the table; suggests the nearest known key, followed by `hint`."""
    for key in table:
        if key not in known:
            raise UserError(
                f"{where}.{key}" if where else key, "a known key", "an unknown one", nearest(key, known) + hint
            )


def write_table(instance: object, given: tuple[str, ...] = ()) -> Record:
    """Return the TOML table that `read_table` would read as `instance`, with every default spelled out.

    The default of a field with `metadata={"absent_by_default": True}` is omitted: the field was added later, and
    experiments that ran without it keep their digest.
    """
    names = field_names(type(instance), given)
    values = {name: getattr(instance, name) for name in names}
    for field in dataclasses.fields(instance):  # pyright: ignore[reportArgumentType]
        if field.metadata.get("absent_by_default") and values.get(field.name) == field.default:
            values.pop(field.name, None)
    return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items() if v is not None}


def _typed(hint: Any, value: object, key: str) -> object:
    try:
        return TypeAdapter(hint).validate_json(json.dumps(value), strict=True)
    except (ValidationError, TypeError):
        raise UserError(key, _describe(hint), repr(value), f"Change {key}") from None


def _text(hint: object) -> object:
    """Return the type of any text; None is accepted if the type accepts it."""
    return str | None if type(None) in typing.get_args(hint) else str


_WORDS = {int: "a whole number", float: "a number", str: "a quoted string", bool: "true or false"}


def _describe(hint: object) -> str:
    if hint in _WORDS:
        return _WORDS[hint]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " or ".join(json.dumps(choice) for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(a) for a in arguments if a is not type(None))
    if origin in (tuple, list):
        if origin is tuple and arguments[-1] is not Ellipsis:
            return f"a list of {len(arguments)}, each {_describe(arguments[0])}"
        return f"a list, each {_describe(arguments[0])}"
    if origin is dict:
        return f"a table, each value {_describe(arguments[1])}"
    return str(hint)

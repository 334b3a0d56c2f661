"""Strict reading of one TOML table into one frozen dataclass, with errors that name the key."""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from fedpriv.errors import UserError, nearest

__all__ = ["field_names", "read_table", "write_table"]

T = TypeVar("T")


def field_names(kind: type, given: tuple[str, ...] = ()) -> list[str]:
    """The fields that a table may set: all but those that the program gives itself."""
    return [field.name for field in dataclasses.fields(kind) if field.init and field.name not in given]


def read_table(kind: type[T], table: Mapping[str, Any], where: str, **given: object) -> T:
    """An instance of the dataclass `kind`, made of a TOML table.

    Args:
        kind: The dataclass.
        table: Key by key what the file says.
        where: The table's name, for errors.
        given: Fields that the program fills in itself.

    Raises:
        UserError: On an unknown key, a missing key or a value of another type.
    """
    known = field_names(kind, tuple(given))
    refuse_unknown(table, known, where)
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(kind):  # pyright: ignore[reportArgumentType]
        key = f"{where}.{field.name}" if where else field.name
        if field.name in given or not field.init:
            continue
        if field.name in table:
            values[field.name] = _typed(hints[field.name], table[field.name], key)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            place = f"to [{where}]" if where else "at the top of the file"
            raise UserError(key, _describe(hints[field.name]), "nothing", f"Add {field.name} {place}")
    return kind(**values, **given)


def refuse_unknown(table: Mapping[str, Any], known: list[str], where: str, hint: str = "") -> None:
    """Raises UserError, with the nearest known key and a hint, if the table holds a key that is not known."""
    for key in table:
        if key not in known:
            raise UserError(
                f"{where}.{key}" if where else key, "a known key", "an unknown one", nearest(key, known) + hint
            )


def write_table(instance: object, given: tuple[str, ...] = ()) -> dict[str, Any]:
    """The TOML table that `read_table` would make `instance` from, with every default spelled out.

    But for the default of a field with `metadata={"absent_by_default": True}`: one that came after experiments were
    run without it, which keep their digest so.
    """
    names = field_names(type(instance), given)
    values = {name: getattr(instance, name) for name in names}
    for field in dataclasses.fields(instance):  # pyright: ignore[reportArgumentType]
        if field.metadata.get("absent_by_default") and values.get(field.name) == field.default:
            values.pop(field.name, None)
    return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items() if v is not None}


def _typed(hint: Any, value: Any, key: str) -> Any:
    try:
        return TypeAdapter(hint).validate_json(json.dumps(value), strict=True)
    except (ValidationError, TypeError):
        raise UserError(key, _describe(hint), repr(value), "Change the value") from None


_WORDS = {int: "a whole number", float: "a number", str: "a text in quotes", bool: "true or false"}


def _describe(hint: Any) -> str:
    if hint in _WORDS:
        return _WORDS[hint]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " or ".join(json.dumps(choice) for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(a) for a in arguments if a is not type(None))
    if origin in (tuple, list):
        return f"a list, each {_describe(arguments[0])}"
    return str(hint)

"""The types of values in TOML and JSON files, and the values as text."""

import json
import math
from collections.abc import Iterable, Mapping
from decimal import ROUND_CEILING, ROUND_HALF_EVEN, Context
from typing import Any

__all__ = ["Record", "Table", "as_text", "short_texts"]

_MIN_DIGITS, _MAX_DIGITS = 4, 10

Table = Mapping[str, object]
"""A TOML table, or a part of one; its values are checked next."""

Record = dict[str, Any]
"""A table that fedpriv has written to such a file: a row, a summary, a config. Its keys depend on the experiment."""


def as_text(value: object) -> str:
    """Return one text for equal values of any type, numbers with ten digits; empty for missing values."""
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float | int):
        return f"{value:.{_MAX_DIGITS}g}"
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def short_texts(values: Iterable[object], key: str = "") -> list[str]:
    """Return a text for each value of a parameter, to be shown: numbers with four digits.

    If four digits do not distinguish the values, all have the fewest digits that do. Files that are read again contain
    the values themselves.

    Args:
        values: Values of one parameter.
        key: The parameter's name; epsilon and delta are rounded up, others to the nearest number.
    """
    rounding = ROUND_CEILING if key.rpartition(".")[2] in ("epsilon", "delta") else ROUND_HALF_EVEN
    values = list(values)
    whole = [as_text(value) for value in values]
    for digits in range(_MIN_DIGITS, _MAX_DIGITS):
        short = [_rounded(value, Context(prec=digits, rounding=rounding)) for value in values]
        if len(set(short)) == len(set(whole)):
            return short
    return whole


def _rounded(value: object, context: Context) -> str:
    if not isinstance(value, float) or not math.isfinite(value) or value.is_integer():
        return as_text(value)
    return as_text(float(context.create_decimal(repr(value))))

"""The types of values in TOML and JSON files."""

from collections.abc import Mapping
from typing import Any

__all__ = ["Record", "Table"]

Table = Mapping[str, object]
"""A TOML table, or a part of one; its values are checked next."""

Record = dict[str, Any]
"""A table that fedpriv has written to such a file: a row, a summary, a config. Its keys depend on the experiment."""

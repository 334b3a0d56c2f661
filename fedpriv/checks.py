"""Checks of single configuration values; each failure is one `UserError`."""

import math
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard, TypeVar

from fedpriv.errors import UserError, nearest

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = [
    "a_path",
    "an_object",
    "at_least_one",
    "folder_name",
    "free_memory",
    "is_real",
    "is_whole",
    "one_of",
    "plain_numbers",
    "positive_int",
    "positive_real",
    "real_from",
    "real_within",
    "refuse_beyond_memory",
    "require_fraction",
    "require_representable",
    "shown",
    "true_or_false",
    "whole_from",
    "whole_within",
]

_GIB = 2.0**30
_MAX_NAME_BYTES = 200
"""File systems take 255, and files beside a run have longer names."""

WordT = TypeVar("WordT", bound=str)


def is_whole(value: object, low: float = -math.inf, high: float = math.inf) -> TypeGuard[int]:
    """Return True for a whole number (Python or numpy, not bool) from `low` to `high`."""
    return isinstance(value, Integral) and not isinstance(value, bool) and low <= int(value) <= high


def is_real(value: object, low: float = -math.inf, high: float = math.inf) -> bool:
    """Return True for a finite number (Python or numpy, not bool) from `low` to `high`."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    number = value if isinstance(value, int) else float(value)  # a float16 cannot be compared with 1e20
    return -math.inf < number < math.inf and low <= number <= high


def plain_numbers(record: "DataclassInstance") -> None:
    """Replace numpy's numbers in the fields of a frozen dataclass, also in tuples, by Python's of equal value.

    Arithmetic of a float16 or float32 with Python's numbers stays as coarse, and so would a bound or an epsilon.
    """
    for part in fields(record):
        value = getattr(record, part.name)
        plain = tuple(map(_plain, value)) if type(value) is tuple else _plain(value)
        object.__setattr__(record, part.name, plain)


def _plain(value: object) -> object:
    if not isinstance(value, Real) or type(value) in (bool, int, float):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def one_of(where: str, value: str, known: Sequence[WordT]) -> WordT:
    """Return the word of `known` that equals the value.

    Raises:
        UserError: Names `where`, the configuration key or option, and the nearest word.
    """
    for word in known:
        if word == value:
            return word
    raise UserError(where, " or ".join(known), repr(value), nearest(value, known))


def a_path(where: str, value: object) -> Path:
    """Return a path that is given as a text or as a path.

    Raises:
        UserError: Names `where`, the argument; also for an empty text, which would be the current folder.
    """
    if isinstance(value, str | os.PathLike) and isinstance(text := os.fspath(value), str) and text and "\0" not in text:
        return Path(text)
    raise UserError(where, "a path", shown(value), f"Give {where} a text or a pathlib.Path")


def an_object(where: str, value: object, member: str, example: str) -> None:
    """Raise UserError for anything but an object with this member, such as a class or a name in its place.

    Raises:
        UserError: Names `where`, the argument, and shows the example.
    """
    if isinstance(value, type) or not hasattr(value, member):
        raise UserError(where, f"an object such as {example}", shown(value), f"Give {where} an object")


def true_or_false(where: str, value: object) -> None:
    """Raise UserError for anything but True and False: other values would count as one of them.

    Raises:
        UserError: Names `where`, the argument.
    """
    if not isinstance(value, bool):
        raise UserError(where, "True or False", shown(value), f"Set {where} to one of them")


def shown(value: object) -> str:
    """Return a value in a few words, for errors."""
    return f"the class {value.__name__}" if isinstance(value, type) else repr(value)[:60]


def positive_int(where: str, value: object, remedy: str | None = None) -> int:
    """Return the value if it is a whole number of at least 1.

    Raises:
        UserError: Names `where`, the configuration key.
    """
    if not is_whole(value, 1):
        raise UserError(where, "a whole number of at least 1", repr(value), remedy or f"Change {where}")
    return value


def at_least_one(where: str, value: int, remedy: str) -> None:
    """Raise UserError for a whole number below 1.

    Raises:
        UserError: Names `where`, the configuration key or option.
    """
    if not is_whole(value, 1):
        raise UserError(where, "at least 1", value if is_whole(value) else repr(value), remedy)


def whole_from(where: str, value: int, low: int, remedy: str) -> None:
    """Raise UserError for a whole number below `low`.

    Raises:
        UserError: Names `where`, the configuration key or option.
    """
    if not is_whole(value, low):
        raise UserError(where, f"a whole number of at least {low}", repr(value), remedy)


def whole_within(where: str, value: int, low: int, high: int, remedy: str) -> None:
    """Raise UserError unless a whole number is between `low` and `high`, inclusive.

    Raises:
        UserError: Names `where`, the configuration key or option.
    """
    if not is_whole(value, low, high):
        raise UserError(where, f"a whole number from {low} to {high}", repr(value), remedy)


def positive_real(where: str, value: object, remedy: str | None = None) -> None:
    """Raise UserError unless the value is a finite number above 0.

    Raises:
        UserError: Names `where`, the configuration key.
    """
    if not is_real(value) or not value > 0:  # type: ignore[operator]
        raise UserError(where, "a finite number above 0", repr(value), remedy or f"Change {where}")


def folder_name(where: str, value: str) -> None:
    """Raise UserError unless a text can be the name of a folder.

    Raises:
        UserError: As described.
    """
    if len(value.encode(errors="replace")) > _MAX_NAME_BYTES:
        raise UserError(where, f"a name of at most {_MAX_NAME_BYTES} bytes", f"{len(value):,} characters", "Shorten it")
    if value.strip() in ("", ".", "..") or any(c in value for c in "/\\\0\n"):
        raise UserError(where, "a short name that can be a folder's", repr(value), "Change the name")


def real_from(where: str, value: float, low: float, remedy: str, high: float = math.inf) -> None:
    """Raise UserError unless the value is a finite number from `low` to `high`; `high` only excludes absurd values.

    Raises:
        UserError: Names `where`, the configuration key or option.
    """
    if not is_real(value, low, high):
        raise UserError(where, f"a number of at least {low:g}", value, remedy)


def real_within(where: str, value: object, low: float, high: float, remedy: str | None = None) -> None:
    """Raise UserError unless the value is a number from `low` to `high`.

    Raises:
        UserError: Names `where`, the configuration key.
    """
    if not is_real(value, low, high):
        raise UserError(where, f"a number from {low:g} to {high:g}", repr(value), remedy or f"Change {where}")


def require_representable(key: str, value: float) -> None:
    """Raise UserError for a number so small or large that float32 cannot hold its products."""
    if not is_real(value) or value <= 0.0:
        got = value if isinstance(value, Real) else repr(value)
        raise UserError(key, "a positive number", got, f"Set {key} above 0")
    if not is_real(value, 1e-20, 1e20):
        remedy = f"Choose {key} in this range: beyond it, float32 rounds to zero or infinity"
        raise UserError(key, "a number from 1e-20 to 1e20", value, remedy)


def require_fraction(key: str, value: float) -> None:
    """Raise UserError unless 0 <= value < 1."""
    if not is_real(value, 0.0) or value >= 1.0:
        got = value if isinstance(value, Real) else repr(value)
        raise UserError(key, "a number from 0 to below 1", got, f"Set {key} to 0 to switch it off")


def refuse_beyond_memory(where: str, wanted: float, remedy: str) -> None:
    """Raise UserError for an object that cannot fit in memory, before the system runs out and kills the process.

    Args:
        where: The configuration key.
        wanted: Bytes needed, a lower bound.
        remedy: See `UserError`.

    Raises:
        UserError: If less memory is free.
    """
    free = free_memory()
    if wanted > free:
        got = f"{wanted / _GIB:,.1f} GiB with {free / _GIB:,.1f} GiB free"
        raise UserError(where, "an object that fits in memory", got, remedy)


def free_memory() -> float:
    """Return the free memory in bytes; infinite if the system does not report it."""
    found = [math.inf]
    with suppress(OSError, ValueError, AttributeError):
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found += [1024.0 * float(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    with suppress(OSError, ValueError, KeyError):  # a container's limit; its file cache can be reclaimed
        group = Path("/sys/fs/cgroup")
        limit, used = (float((group / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current"))
        lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
        found.append(limit - used + float(dict(line.split() for line in lines)["file"]))
    return max(min(found), 0.0)

"""Checks of single configuration values, in the one shape of error."""

import math
import os
from contextlib import suppress
from numbers import Integral, Real
from pathlib import Path

from fedpriv.errors import UserError

__all__ = [
    "at_least_one",
    "free_memory",
    "is_real",
    "is_whole",
    "positive_int",
    "positive_real",
    "real_from",
    "real_within",
    "refuse_beyond_memory",
    "require_fraction",
    "require_representable",
    "whole_from",
    "whole_within",
]

_GIB = 2.0**30


def is_whole(value: object, low: float = -math.inf, high: float = math.inf) -> bool:
    """Whether this is a whole number, of Python or numpy, from `low` to `high`; truth values are none."""
    return isinstance(value, Integral) and not isinstance(value, bool) and low <= int(value) <= high


def is_real(value: object, low: float = -math.inf, high: float = math.inf) -> bool:
    """Whether this is a finite number, of Python or numpy, from `low` to `high`; truth values are none."""
    real = isinstance(value, Real) and not isinstance(value, bool)
    return real and -math.inf < value < math.inf and low <= value <= high  # type: ignore[operator]


def positive_int(where: str, value: object, remedy: str | None = None) -> None:
    """Refuses what is not a whole number of at least 1.

    Raises:
        UserError: At `where`, the configuration key.
    """
    if not is_whole(value, 1):
        raise UserError(where, "a whole number of at least 1", repr(value), remedy or f"Correct {where}")


def at_least_one(where: str, value: int, remedy: str) -> None:
    """Refuses a whole number below 1.

    Raises:
        UserError: At `where`, the configuration key or option.
    """
    if value < 1:
        raise UserError(where, "at least 1", value, remedy)


def whole_from(where: str, value: int, low: int, remedy: str) -> None:
    """Refuses a whole number below `low`.

    Raises:
        UserError: At `where`, the configuration key or option.
    """
    if value < low:
        raise UserError(where, f"a whole number from {low}", value, remedy)


def whole_within(where: str, value: int, low: int, high: int, remedy: str) -> None:
    """Refuses a whole number that is not from `low` to `high`.

    Raises:
        UserError: At `where`, the configuration key or option.
    """
    if not low <= value <= high:
        raise UserError(where, f"a whole number from {low} to {high}", value, remedy)


def positive_real(where: str, value: object, remedy: str | None = None) -> None:
    """Refuses what is not a finite number above 0.

    Raises:
        UserError: At `where`, the configuration key.
    """
    if not is_real(value) or not value > 0:  # type: ignore[operator]
        raise UserError(where, "a finite number above 0", repr(value), remedy or f"Correct {where}")


def real_from(where: str, value: float, low: float, remedy: str, high: float = math.inf) -> None:
    """Refuses what is not a finite number from `low` on, or is one beyond all sense.

    Raises:
        UserError: At `where`, the configuration key or option.
    """
    if not is_real(value, low, high):
        raise UserError(where, f"a number from {low:g}", value, remedy)


def real_within(where: str, value: object, low: float, high: float, remedy: str | None = None) -> None:
    """Refuses what is not a number from `low` to `high`.

    Raises:
        UserError: At `where`, the configuration key.
    """
    if not is_real(value, low, high):
        raise UserError(where, f"a number from {low:g} to {high:g}", repr(value), remedy or f"Correct {where}")


def require_representable(key: str, value: float) -> None:
    """Raises UserError for a number so small or large that float32 cannot hold what is multiplied with it."""
    if not 0.0 < value < math.inf:
        raise UserError(key, "a positive number", value, "Give a number above zero")
    if not 1e-20 <= value <= 1e20:
        raise UserError(key, "a number from 1e-20 to 1e20", value, "Beyond that, float32 rounds to zero or infinity")


def require_fraction(key: str, value: float) -> None:
    """Raises UserError unless 0 <= value < 1."""
    if not 0.0 <= value < 1.0:
        raise UserError(key, "a number from 0 up to but not including 1", value, "0 switches it off")


def refuse_beyond_memory(where: str, wanted: float, remedy: str) -> None:
    """Refuses what surely does not fit, before anything of it is made: a system that runs out ends the process.

    Args:
        where: The configuration key.
        wanted: Bytes that are needed at least.
        remedy: See `UserError`.

    Raises:
        UserError: If fewer are free.
    """
    free = free_memory()
    if wanted > free:
        got = f"one of {wanted / _GIB:,.1f} GiB where {free / _GIB:,.1f} GiB are free"
        raise UserError(where, "what fits in memory", got, remedy)


def free_memory() -> float:
    """Return how many bytes of memory can still be had; infinite if the system does not say."""
    found = [math.inf]
    with suppress(OSError, ValueError, AttributeError):
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found += [1024.0 * float(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    with suppress(OSError, ValueError, KeyError):  # the limit of a container, whose cached files make room
        group = Path("/sys/fs/cgroup")
        limit, used = (float((group / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current"))
        lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
        found.append(limit - used + float(dict(line.split() for line in lines)["file"]))
    return max(min(found), 0.0)

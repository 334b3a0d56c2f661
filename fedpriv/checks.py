"""Checks of single configuration values, in the one shape of error."""

import math
import os
from contextlib import suppress
from pathlib import Path

from fedpriv.errors import UserError

__all__ = ["free_memory", "positive_int", "positive_real", "real_within", "refuse_beyond_memory"]

_GIB = 2.0**30


def positive_int(where: str, value: object) -> None:
    """Refuses what is not a whole number of at least 1.

    Raises:
        UserError: At `where`, the configuration key.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(where, "a whole number of at least 1", repr(value), f"Correct {where}")


def positive_real(where: str, value: object) -> None:
    """Refuses what is not a finite number above 0.

    Raises:
        UserError: At `where`, the configuration key.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UserError(where, "a finite number above 0", repr(value), f"Correct {where}")


def real_within(where: str, value: object, low: float, high: float) -> None:
    """Refuses what is not a number from `low` to `high`.

    Raises:
        UserError: At `where`, the configuration key.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise UserError(where, f"a number from {low:g} to {high:g}", repr(value), f"Correct {where}")


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

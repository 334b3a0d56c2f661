"""Checks of single configuration values, in the one shape of error."""

import math

from fedpriv.errors import UserError

__all__ = ["positive_int", "positive_real", "real_within"]


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

"""Checks of single values: valid numbers pass, and each error is one line."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from fedpriv import checks
from fedpriv.errors import UserError


@pytest.mark.parametrize("value", [1, 7, np.int64(7), 10**400])
def test_whole_numbers(value: object) -> None:
    assert checks.is_whole(value, 1)
    assert checks.is_real(value, 1)
    assert not checks.is_whole(value, 1, 0)


@pytest.mark.parametrize("value", [True, "1", None, math.nan, math.inf, -math.inf, 1j, [1], np.True_])
def test_what_is_no_finite_number(value: object) -> None:
    assert not checks.is_whole(value)
    assert not checks.is_real(value)


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), np.float64(0.5)])
def test_real_numbers(value: object) -> None:
    assert checks.is_real(value, 0.5, 0.5)
    assert not checks.is_real(value, 0.6)
    assert not checks.is_whole(value)


@pytest.mark.parametrize(
    ("check", "right", "wrong", "words"),
    [
        (checks.positive_int, 1, True, "a whole number of at least 1, got True. Change key."),
        (lambda k, v: checks.positive_int(k, v, "Fix it"), 1, 0, "a whole number of at least 1, got 0. Fix it."),
        (lambda k, v: checks.at_least_one(k, v, "Fix it"), 1, 0, "at least 1, got 0. Fix it."),
        (lambda k, v: checks.whole_from(k, v, 0, "Fix it"), 0, -1, "a whole number of at least 0, got -1. Fix it."),
        (lambda k, v: checks.whole_within(k, v, 1, 3650, "Fix it"), 3650, 3651, "a whole number from 1 to 3650, got"),
        (checks.positive_real, 1e-300, math.nan, "a finite number above 0, got nan. Change key."),
        (checks.positive_real, 1, 0.0, "a finite number above 0, got 0.0. Change key."),
        (lambda k, v: checks.real_from(k, v, 0, "Fix it"), 0.0, math.inf, "a number of at least 0, got inf. Fix it."),
        (lambda k, v: checks.real_from(k, v, 0.01, "Fix it", high=8), 8.0, 9.0, "a number of at least 0.01, got 9.0."),
        (lambda k, v: checks.real_within(k, v, 1, 65535), 65535, 65536, "a number from 1 to 65535, got 65536."),
        (checks.require_representable, 1e-20, 0.0, "a positive number, got 0.0."),
        (checks.require_representable, 1e20, 1e21, "a number from 1e-20 to 1e20, got 1e+21."),
        (checks.require_fraction, 0.0, 1.0, "a number from 0 to below 1, got 1.0."),
    ],
)
def test_a_wrong_value_is_one_line(
    check: Callable[[str, object], None], right: object, wrong: object, words: str
) -> None:
    check("key", right)
    with pytest.raises(UserError) as caught:
        check("key", wrong)
    assert str(caught.value).startswith(f"key: expected {words}")

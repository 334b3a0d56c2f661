"""Closed words are types: a type checker finds a misspelled one, and a program refuses it."""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from typing import Any, assert_type, get_args

import pytest

from fedpriv.errors import UserError
from fedpriv.experiment.execution import CLIENT_NOISES, ClientNoise, Execution
from fedpriv.privacy import (
    ADJACENCIES,
    TRUSTS,
    UNITS,
    Adjacency,
    Everyone,
    TrustName,
    UnitName,
    adjacency_of,
    make_plan,
    trust_name,
    unit_name,
)
from fedpriv.tasks.task import PRECISIONS, Precision

PLAN: dict[str, Any] = {"sampling": Everyone(9), "rounds": 3, "delta": 1e-6, "l2_bound": 1.0, "noise_multiplier": 3.0}


@pytest.mark.parametrize(
    ("word", "known"),
    [
        (TrustName, TRUSTS),
        (UnitName, UNITS),
        (Adjacency, ADJACENCIES),
        (Precision, PRECISIONS),
        (ClientNoise, CLIENT_NOISES),
    ],
)
def test_a_type_has_all_words_that_are_known_and_no_other(word: object, known: Any) -> None:
    assert list(get_args(word)) == list(known)


def test_a_checker_finds_a_misspelled_word() -> None:
    with pytest.raises(UserError, match=r"privacy\.trust"):
        make_plan(trust="centrall", **PLAN)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match=r"privacy\.adjacency"):
        make_plan(trust="local", adjacency="replce", **PLAN)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="--precision"):
        Execution(precision="bfloat")  # pyright: ignore[reportArgumentType]
    plan = make_plan(trust="local", **PLAN)
    assert_type(plan.trust, TrustName)
    assert_type(plan.adjacency, Adjacency)
    assert_type(plan.unit, UnitName)


def test_a_word_from_a_file_is_checked_once_and_known_then() -> None:
    words = [str(word) for word in ("local", "replace", "example")]
    assert_type(trust_name(words[0]), TrustName)
    assert_type(adjacency_of(words[1]), Adjacency)
    assert_type(unit_name(words[2]), UnitName)
    for of in (trust_name, adjacency_of, unit_name):
        with pytest.raises(UserError, match="expected a known name, got 'other'"):
            of("other")

"""The list of seeded faults matches the code; `python tests/mutants.py` runs the faults themselves."""

import pytest
from mutants import MUTANTS, ROOT


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_seeded_fault_still_has_its_place_and_its_tests(mutant):
    assert mutant.old in (ROOT / mutant.file).read_text(encoding="utf-8")
    assert mutant.old != mutant.new
    assert all((ROOT / word).exists() for word in mutant.tests.split() if not word.startswith("-"))

"""The list of seeded faults matches the code; `python tests/mutants.py` runs the faults themselves."""

import ast
import json
import subprocess
import sys

import pytest
from mutants import KILLERS, MUTANTS, ROOT


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_seeded_fault_still_has_its_place_and_its_tests(mutant):
    assert mutant.old in (ROOT / mutant.file).read_text(encoding="utf-8")
    assert mutant.old != mutant.new
    assert all((ROOT / word).exists() for word in mutant.tests.split() if not word.startswith("-"))


def functions_of(file: str) -> set[str]:
    """Return the names of a file's tests, those in classes as `Class::test`."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    found = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    return found | {
        f"{kind.name}::{node.name}" for kind in classes for node in kind.body if isinstance(node, ast.FunctionDef)
    }


def killers() -> dict[str, str]:
    return json.loads(KILLERS.read_text(encoding="utf-8"))


def test_every_test_that_noticed_a_fault_is_still_there():
    assert set(killers()) <= {mutant.name for mutant in MUTANTS}
    ids = {killer.partition("[")[0] for killer in killers().values()}
    known = {file: functions_of(file) for file in {name.partition("::")[0] for name in ids}}
    missing = {name for name in ids if name.partition("::")[2] not in known[name.partition("::")[0]]}
    assert missing == set()


@pytest.mark.slow
def test_every_case_that_noticed_a_fault_is_still_there():
    files = sorted({killer.partition("::")[0] for killer in killers().values()})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *files]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    assert set(killers().values()) - set(listed.splitlines()) == set()

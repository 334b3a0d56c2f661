"""How large rooms, functions and chains of imports may be."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("fedpriv", "strategies", "clients")
MAX_PARAMETERS = 10
MAX_MODULES = 18

Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources(*packages: str) -> Iterator[Path]:
    for package in packages:
        yield from sorted((ROOT / package).rglob("*.py"))


def functions(path: Path) -> Iterator[Function]:
    found = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return (node for node in found if isinstance(node, Function))


def is_command(function: Function) -> bool:
    """Whether it is a command of the command line, whose parameters are options of a program."""
    return any("command" in ast.unparse(decorator) for decorator in function.decorator_list)


def parameters(function: Function) -> int:
    given = function.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    return len(named) + (given.vararg is not None) + (given.kwarg is not None)


def test_no_function_but_commands_has_more_than_ten_parameters() -> None:
    found = {
        f"{path.relative_to(ROOT)}:{function.name}": parameters(function)
        for path in sources(*PACKAGES)
        for function in functions(path)
        if not (path.is_relative_to(ROOT / "fedpriv" / "cli") and is_command(function))
    }
    assert len(found) > 1000
    assert {name: count for name, count in found.items() if count > MAX_PARAMETERS} == {}


@pytest.mark.parametrize(("package", "most"), [("strategies", 800), ("clients", 450)])
def test_strategies_and_clients_hold_nothing_else(package: str, most: int) -> None:
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in sources(package)) <= most


def test_no_folder_is_a_heap() -> None:
    folders = {path.parent for path in sources(*PACKAGES)}
    counts = {str(folder.relative_to(ROOT)): len(list(folder.glob("*.py"))) for folder in folders}
    counts.pop("fedpriv/methods")  # one paper a file
    assert {name: count for name, count in counts.items() if count > MAX_MODULES} == {}


def test_few_lines_are_kept_from_the_linter() -> None:
    lines = [line for path in sources(*PACKAGES) for line in path.read_text(encoding="utf-8").splitlines()]
    assert sum("# noqa" in line for line in lines) <= 15

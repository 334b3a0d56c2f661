"""How large rooms, functions and chains of imports may be, and how much may have any type."""

import ast
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("fedpriv", "strategies", "clients")
MAX_PARAMETERS = 10
MAX_MODULES = 18
MAX_ANY = 4.6  # uses of `Any`, and of its names below, per 1,000 lines. Lower it, and never raise it.

# Names of types with values of any type, by the module that has them.
ANY = {"typing": "Any", "fedpriv.tables": "Record", "fedpriv.report.study": "Row"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources(*packages: str) -> Iterator[Path]:
    for package in packages:
        yield from sorted((ROOT / package).rglob("*.py"))


def functions(path: Path) -> Iterator[Function]:
    found = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return (node for node in found if isinstance(node, Function))


def is_command(function: Function) -> bool:
    """Return True for a command of the command line: its parameters are options of a program."""
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


def uses_of_any(text: str) -> int:
    """The uses of `Any` and of its names, in quotes too, without their imports."""
    tree = ast.parse(text)
    names = {"Any"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names if alias.name == ANY.get(node.module or "")}
    quoted = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    for part in quoted:
        with suppress(SyntaxError, ValueError):
            tree.body += [ast.Expr(ast.parse(part, mode="eval").body)] if "[" in part else []
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Name | ast.Attribute)]
    return sum((node.id if isinstance(node, ast.Name) else node.attr) in names for node in nodes)


@pytest.mark.parametrize(
    ("text", "uses"),
    [
        ("from typing import Any\nx: Any = 1\ny: dict[str, Any] = {}", 2),
        ("import typing\nx: typing.Any = 1", 1),
        ('x: "dict[str, Any]" = {}', 1),
        ('"""Any text with [Record] and Any."""', 0),
        ("from fedpriv.tables import Record as Kept, Table\nx: Kept = {}\ny: Table = {}", 1),
        ("class Record: ...\nx: Record", 0),
    ],
)
def test_uses_of_any_are_counted(text: str, uses: int) -> None:
    assert uses_of_any(text) == uses


def test_little_has_any_type() -> None:
    texts = [path.read_text(encoding="utf-8") for path in sources(*PACKAGES)]
    lines = sum(len(text.splitlines()) for text in texts)
    assert 1000.0 * sum(uses_of_any(text) for text in texts) / lines <= MAX_ANY


def test_few_lines_are_kept_from_the_linter() -> None:
    lines = [line for path in sources(*PACKAGES) for line in path.read_text(encoding="utf-8").splitlines()]
    assert sum("# noqa" in line for line in lines) <= 15


def test_bounds_are_named_max_or_min() -> None:
    words = re.compile(r"_?(MOST|LEAST|FEWEST|SHORTEST|LONGEST|SMALLEST|GREATEST|LARGEST)_\w+\Z")
    for path in sources(*PACKAGES, "results"):
        names = (node.id for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Name))
        assert not [name for name in names if words.match(name)], path

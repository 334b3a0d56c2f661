"""Plain English: counted constructions stay below their limits (`tests/english.py`)."""

import ast
from pathlib import Path

import pytest
from english import BUILD, CONSTRUCTIONS, DOCUMENTS, PACKAGES, RESULTS, ROOT, count, rates, sentences, texts

# They hold examples of bad sentences, and names of faults.
EXAMPLES = ("english.py", "test_core_english.py", "mutants.py")

# Occurrences per 10,000 words. Lower them, and never raise them.
CEILINGS = {
    "what": 2.5,
    "where": 2.5,
    "whoever": 2.5,
    "figure": 2.5,
    "else": 0.5,
    "lies": 0.5,
    "own": 0.5,
    "anew": 0.5,
    "told": 0.5,
    "goes on": 0.5,
    "whether": 0.5,
    "got nothing": 0.0,
    "spelling": 0.5,
}


@pytest.mark.parametrize("named", [PACKAGES, (*DOCUMENTS, *BUILD), (RESULTS,)], ids=["code", "documents", "results"])
def test_texts_do_not_exceed_their_ceilings(named: tuple[str, ...]) -> None:
    above = {name: rate for name, rate in rates([ROOT / name for name in named]).items() if rate > CEILINGS[name]}
    assert not above, f"python tests/english.py {' '.join(named)} --list NAME shows the sentences: {above}"


def test_tests_do_not_exceed_their_ceilings() -> None:
    paths = [path for path in sorted((ROOT / "tests").rglob("*.*")) if path.suffix in (".py", ".sh")]
    found = rates([path for path in paths if path.name not in EXAMPLES])
    above = {name: rate for name, rate in found.items() if rate > CEILINGS[name]}
    assert not above, f"python tests/english.py tests --list NAME shows the sentences: {above}"


def is_property(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("property" in ast.unparse(decorator) for decorator in function.decorator_list)


def test_docstrings_of_functions_begin_with_a_verb() -> None:
    nouns = {"A", "All", "An", "Both", "Each", "Every", "Names", "None", "The", "What", "Where", "Whether", "Which"}
    begun: dict[str, str] = {}
    for path in (path for name in (*PACKAGES, "examples") for path in (ROOT / name).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not is_property(node):
                begun[f"{path.relative_to(ROOT)}:{node.lineno}"] = (ast.get_docstring(node) or "-").split()[0]
    assert len(begun) > 1000
    assert {place: word for place, word in begun.items() if word in nouns} == {}


def found(path: Path) -> list[str]:
    return [one.name for one in count([path])[1]]


@pytest.mark.parametrize(
    ("sentence", "names"),
    [
        ("Return what it sends.", ["what"]),
        ("What is promised? It asks what happens if a client leaves?", []),
        ("Noise is added where trust is local.", ["where"]),
        ("`a` / sqrt(n), where `n` is the number of clients.", []),
        ("The server, or whoever holds the key, whose figures are told.", ["whoever", "whoever", "figure", "told"]),
        ("It goes on, else it begins anew with a seed of its own.", ["else", "own", "anew", "goes on"]),
        ("See Figure 2 and `what else` in [the report](where/figure.md).", []),
        ("Whether it is private.", ["whether"]),
        ("Expected a name, got nothing.", ["got nothing"]),
        ("The optimiser normalises.", ["spelling", "spelling"]),
    ],
)
def test_constructions_are_found(tmp_path: Path, sentence: str, names: list[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Title\n\n{sentence}\n\n```\nwhat it is\n```\n", encoding="utf-8")
    assert sorted(found(page)) == sorted(names)
    code = tmp_path / "code.py"
    code.write_text(f'"""{sentence}"""\n\nA = f"{{1}} words that are {{2}} enough"\n# Short.\n', encoding="utf-8")
    assert sorted(found(code)) == sorted(names)


def test_comments_and_texts_are_prose_but_names_are_not(tmp_path: Path) -> None:
    code = tmp_path / "code.py"
    code.write_text('# It lies\n# there.\nA = "whoever"\nB = "It is told to everyone."\n', encoding="utf-8")
    assert sorted(found(code)) == ["lies", "told"]
    assert [line for text in texts(code) for line, _ in sentences(text)] == [4, 1]


def test_rates_are_per_ten_thousand_words(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("It lies " + "there " * 98 + "\n", encoding="utf-8")
    assert rates([page]) == {name: 100.0 if name == "lies" else 0.0 for name in CONSTRUCTIONS}

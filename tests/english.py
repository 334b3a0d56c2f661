"""Count constructions that make English hard to read, per 10,000 words.

    python tests/english.py [PATH ...] [--list NAME] [--by-file]

A path is a file or a folder. Of Python, docstrings, comments and texts (error messages, help, statements: string
literals of at least three words) are counted; the value that a UserError found is read as "got ...". Of C, TOML and
shell scripts, comments are counted; of Markdown and notebooks, all but code, addresses and formulas. The rules behind
the counts are in CONTRIBUTING.md, under "English". `tests/core/test_core_english.py` holds the limits.
"""

import argparse
import ast
import io
import json
import re
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("fedpriv", "strategies", "clients")
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "docs", "examples", "sim_configs")
BUILD = ("Makefile", "pyproject.toml", "mkdocs.yml", ".ci/run", ".github/workflows/ci.yml", ".pre-commit-config.yaml")
RESULTS = "results"
KINDS = (".py", ".md", ".ipynb", ".c", ".toml", ".sh")

# Name: pattern. A pattern is matched in one sentence with its line breaks replaced by spaces.
CONSTRUCTIONS = {
    # "what it sends" for "the message". Questions and "what if" are fine.
    "what": r"(?<!no matter )\bwhat\b(?! if\b)(?!'s\b)(?=[^?]*$)",
    # "where X is" for "if". Formulas ("where x is ...", "where `x` ..."), are fine.
    "where": r"\bwhere\b(?!\s+(?:`|\$|\\|<|[A-Za-z]\b\s*(?:=|is\b|are\b|,|and\b)))",
    "whoever": r"\b(?:whoever|whomever|whatever|whichever|whose|somebody|nobody)\b",
    # "figure" for number, value, metric. Pictures ("Figure 2", "figures/", "figure.png") are fine.
    "figure": r"\bfigures?\b(?!\s*[\d(/.`])",
    "else": r"(?:[;,:]|\band|\bor|\bbut) else\b|\belse (?:it|they|the|a|an|its|no)\b",
    "lies": r"\b(?:lies|lie|lay)\b(?! detector)",
    "own": r"\bof (?:its|their|his|her|one's|the \w+'s) own\b",
    "anew": r"\banew\b|\bafresh\b|\bmend(?:s|ed|ing)?\b",
    "told": r"\b(?:told|tells?|telling)\b",
    "goes on": r"\b(?:go|goes|gone|went|going) on\b",
    "whether": r"^\s*Whether\b",
    # Error messages: "got nothing", "got others".
    "got nothing": r"\bgot (?:nothing|none|nobody|neither|others?|another|no)\b",
    "spelling": (
        r"\b\w*(?:optimis(?!ti|m)|normalis|initialis|minimis|maximis|randomis|regularis|summaris|serialis|synchronis|organis|"
        r"recognis|generalis|capitalis|materialis|realis(?=e|i)|standardis|factoris|neighbour|behaviour|colour|favour|"
        r"honour|labell|modell|cancell(?=ed|ing)|travell|centre|licence|judgement|grey)\w*"
    ),
}
_EXPRESSIONS = {
    name: re.compile(pattern, re.IGNORECASE if name != "whether" else 0) for name, pattern in CONSTRUCTIONS.items()
}
_WORD = re.compile(r"[A-Za-z][A-Za-z'-]*")


@dataclass(frozen=True)
class Text:
    """A piece of prose, with the place where it begins."""

    path: Path
    line: int
    words: str


@dataclass(frozen=True)
class Found:
    """One occurrence of a construction."""

    name: str
    path: Path
    line: int
    sentence: str


def texts(path: Path) -> Iterator[Text]:
    """Yield the prose of a file, or of all files of `KINDS` below a folder."""
    if path.is_dir():
        for inner in sorted(path.rglob("*")):
            hidden = any(part.startswith((".", "__pycache__")) for part in inner.relative_to(path).parts)
            if inner.suffix in KINDS and not hidden:
                yield from texts(inner)
        return
    content = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        yield from _python(path, content)
    elif path.suffix == ".md":
        yield from _markdown(path, content)
    elif path.suffix == ".ipynb":
        cells = json.loads(content)["cells"]
        prose = ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
        yield from _markdown(path, "\n\n".join(prose))
    elif path.suffix == ".c":
        for found in re.finditer(r"/\*(.*?)\*/|//([^\n]*)", content, re.DOTALL):
            words = re.sub(r"\n\s*\*", "\n", found[1] or found[2] or "")
            yield Text(path, content.count("\n", 0, found.start()) + 1, words)
    else:
        lines = (re.search(r"(?:^|\s)#(?!!)\s*(.*)", line) for line in content.splitlines())
        yield from _comments(path, ((number, found[1]) for number, found in enumerate(lines, start=1) if found))


def _comments(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[Text]:
    """Yield the comments on adjacent lines as one text each."""
    block: list[str] = []
    last = -1
    for number, words in lines:
        if number != last + 1 and block:
            yield Text(path, last + 1 - len(block), "\n".join(block))
            block = []
        block.append(words)
        last = number
    if block:
        yield Text(path, last + 1 - len(block), "\n".join(block))


def _found_values(nodes: list[ast.AST]) -> set[int]:
    """Return the ids of the texts that errors show after "got"."""
    found: list[ast.AST] = []
    for node in nodes:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            at = {"Refusal": 3, "_no": 2}.get(node.func.id, 2 if node.func.id.endswith("Error") else None)
            found += node.args[at : at + 1] if at is not None and len(node.args) >= 3 else []
        elif isinstance(node, ast.Assign):
            names, values = (one.elts if isinstance(one, ast.Tuple) else [one] for one in (node.targets[0], node.value))
            pairs = zip(names, values, strict=False)
            found += [value for name, value in pairs if isinstance(name, ast.Name) and name.id == "got"]
    return {id(part) for value in found for part in ast.walk(value)}


def _python(path: Path, source: str) -> Iterator[Text]:
    nodes = list(ast.walk(ast.parse(source)))
    docstrings, values = set(), _found_values(nodes)
    for node in nodes:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                docstrings.add(id(first.value))
    parts = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}  # of f-strings
    for node in nodes:
        if isinstance(node, ast.JoinedStr):
            words = "".join(str(p.value) if isinstance(p, ast.Constant) else "x" for p in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            words = node.value
        else:
            continue
        if id(node) in values:
            yield Text(path, node.lineno, f"got {words}")
        elif id(node) in docstrings or (len(_WORD.findall(words)) >= 3 and " " in words.strip()):
            yield Text(path, node.lineno, words)
    if "#" not in source:
        return
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    found = ((token.start[0], token.string.lstrip("# ")) for token in tokens if token.type == tokenize.COMMENT)
    yield from _comments(path, found)


def _markdown(path: Path, content: str) -> Iterator[Text]:
    block: list[str] = []
    start, fence = 1, None
    for number, line in enumerate(content.splitlines(), start=1):
        mark = re.match(r"\s*(```+|~~~+|\$\$)", line)
        if mark is not None:
            fence = None if fence else mark[1]
            line = ""
        elif fence:
            continue
        if not line.strip() or re.match(r"\s*([*+-]|\d+\.|\||#|:::|!!!)", line):
            if block:
                yield Text(path, start, "\n".join(block))
            block, start = [], number
        if line.strip() and not line.lstrip().startswith(":::"):
            block.append(line)
    if block:
        yield Text(path, start, "\n".join(block))


def plain(words: str) -> str:
    """Return prose without code, formulas, addresses and HTML tags; code becomes a lone backtick pair."""
    words = re.sub(r"```.*?```", " ", words, flags=re.DOTALL)
    words = re.sub(r"``?[^`]+``?", "`_`", words)
    words = re.sub(r"\$[^$\n]+\$", "$_$", words)
    words = re.sub(r"\]\([^)]*\)", "]", words)
    words = re.sub(r"https?://\S+", " ", words)
    return re.sub(r"<[^>\n]+>", " ", words)


def sentences(text: Text) -> Iterator[tuple[int, str]]:
    """Yield the sentences of a text, each with the line on which it begins."""
    words = plain(text.words)
    at = 0
    for end in [*(m.end() for m in re.finditer(r"[.?!](?=[\s\"')]|$)|\n\s*\n", words)), len(words)]:
        sentence = words[at:end]
        if sentence.strip():
            skipped = len(sentence) - len(sentence.lstrip())
            yield text.line + words.count("\n", 0, at + skipped), " ".join(sentence.split())
        at = end


def count(paths: list[Path]) -> tuple[int, list[Found]]:
    """Return the number of words below `paths`, and all constructions found there."""
    words, found = 0, []
    for path in paths:
        for text in texts(path):
            words += len(_WORD.findall(plain(text.words)))
            for line, sentence in sentences(text):
                for name, expression in _EXPRESSIONS.items():
                    found += [Found(name, text.path, line, sentence) for _ in expression.finditer(sentence)]
    return words, found


def rates(paths: list[Path]) -> dict[str, float]:
    """Return each construction's occurrences per 10,000 words below `paths`."""
    words, found = count(paths)
    return {name: 1e4 * sum(f.name == name for f in found) / max(words, 1) for name in CONSTRUCTIONS}


def main(arguments: list[str] | None = None) -> None:
    """Print a table of counts, or the sentences behind one of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("paths", nargs="*", type=Path, help="files and folders; without any, packages and documents")
    parser.add_argument(
        "--list", metavar="NAME", help=f"show sentences of one of {', '.join(CONSTRUCTIONS)}, or of all"
    )
    parser.add_argument("--by-file", action="store_true", help="one line a file, the worst first")
    options = parser.parse_args(arguments)
    paths = options.paths or [ROOT / name for name in (*PACKAGES, *DOCUMENTS, *BUILD, RESULTS)]
    if options.list:
        for one in count(paths)[1]:
            if options.list in (one.name, "all"):
                print(f"{one.path}:{one.line}: {one.name}: {one.sentence}")
        return
    if options.by_file:
        _, found = count(paths)
        files = {f.path for f in found}
        for path in sorted(files, key=lambda p: -sum(f.path == p for f in found)):
            print(f"{sum(f.path == path for f in found):5d}  {path}")
        return
    print(f"{'':24}{'words':>8}" + "".join(f"{name:>13}" for name in CONSTRUCTIONS))
    for path in paths:
        words, found = count([path])
        cells = [sum(f.name == name for f in found) for name in CONSTRUCTIONS]
        name = path.parent.name if path.name == "README.md" and path.parent != ROOT else path.name
        print(f"{name[:23]:24}{words:8d}" + "".join(f"{c:5d} {1e4 * c / max(words, 1):6.1f} " for c in cells))


if __name__ == "__main__":
    sys.exit(main())

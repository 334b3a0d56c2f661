"""Writes tables into the README, between the marks `<!-- NAME -->` and `<!-- /NAME -->`."""

from collections.abc import Iterable, Sequence
from pathlib import Path

PAGE = Path(__file__).parent / "README.md"


def fill(name: str, text: str, page: Path = PAGE) -> None:
    """Replace the text between the marks of `name`.

    Raises:
        ValueError: If the page has no such marks.
    """
    before, mark, rest = page.read_text(encoding="utf-8").partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- /{name} -->\n")
    if not mark or not end:
        raise ValueError(f"{page} has no marks <!-- {name} --> and <!-- /{name} -->")
    page.write_text(f"{before}{mark}\n{text.strip()}\n\n{end}{after}", encoding="utf-8")


def rows(name: str, page: Path = PAGE) -> list[list[str]]:
    """Return the cells of the rows of the table between the marks of `name`, without its head."""
    text = page.read_text(encoding="utf-8").partition(f"<!-- {name} -->\n")[2].partition(f"<!-- /{name} -->")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.strip().splitlines()[2:]]


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"

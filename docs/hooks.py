"""Hooks of the documentation site: pages from elsewhere in the repository, and formulas as MathML."""

import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
TABLE = "<!-- the table of README.md -->"
SHOWN = (".md", ".png", ".csv", ".svg")
LONG = 40  # characters of a cell that gets a minimum width, because a narrow screen would make it a tall column
_CELL = re.compile(r"<td( style=[^>]*)?>(.*?)</td>", re.DOTALL)
_CODE = re.compile(r"(^```.*?^```|^~~~.*?^~~~|`+[^`]*`+)", re.MULTILINE | re.DOTALL)
_BLOCK = re.compile(r"\$\$(.+?)\$\$", re.DOTALL)
_INLINE = re.compile(r"(?<![\\\w$])\$(?!\s)([^$\n]+?)(?<!\s)\$(?![\w$])")


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    """Add the pages of `results/` with their pictures and tables, CONTRIBUTING.md and CHANGELOG.md."""
    pages = [*(ROOT / "results").glob("*/README.md"), *(ROOT / "results").glob("analytics/*/README.md")]
    for page in sorted(pages):
        for path in sorted(page.parent.iterdir()):
            if path.suffix in SHOWN and (path.suffix != ".md" or path == page):
                name = path.relative_to(ROOT).as_posix()
                files.append(File.generated(config, name, abs_src_path=str(path)))
    for name in ("CONTRIBUTING.md", "CHANGELOG.md"):
        text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, name.lower(), content=text))
    return files


def methods_table() -> str:
    """Return the table of methods, which a test compares with the registered ones in README.md."""
    return (ROOT / "README.md").read_text(encoding="utf-8").split("\n## Methods\n\n")[1].split("\n\n")[0]


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Write formulas outside of code as MathML, which browsers draw without a script, and lead links to `results/`.

    In the repository `results/` is beside `docs/`; in the site it is within.
    """
    markdown = markdown.replace(TABLE, methods_table())
    if not page.file.src_uri.startswith("results/"):
        up = "../" * page.file.src_uri.count("/")
        markdown = markdown.replace(f"]({up}../results/", f"]({up}results/")
    parts = _CODE.split(markdown)
    parts[::2] = [_formulas(part) for part in parts[::2]]
    return "".join(parts)


def on_page_content(html: str, **_: Any) -> str:
    """Mark long cells of tables, which docs/style.css keeps wide; their table then scrolls."""

    def marked(found: re.Match[str]) -> str:
        long = len(re.sub(r"<[^>]*>", "", found[2])) > LONG
        return f'<td{found[1] or ""} class="long">{found[2]}</td>' if long else found[0]

    return _CELL.sub(marked, html)


def _formulas(text: str) -> str:
    def block(found: re.Match[str]) -> str:
        return f'\n<div class="formula">{convert(found[1].strip(), display="block")}</div>\n'

    # Inline formulas become spans, which Markdown keeps within their paragraph even at the start of a line.
    return _INLINE.sub(lambda found: f'<span class="formula">{convert(found[1])}</span>', _BLOCK.sub(block, text))

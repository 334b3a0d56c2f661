"""The documentation: it builds without warnings, loads nothing from other servers, and its programs run."""

import os
import re
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlparse

import pytest

from fedpriv.methods import METHODS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"

SITE = pytest.mark.xdist_group("site")  # it is built once


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    if find_spec("mkdocs") is None and "CI" not in os.environ:
        pytest.skip("mkdocs is not installed: make setup")
    out = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


class Loads(HTMLParser):
    """Collects the addresses that a browser fetches for a page, without a click."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for key, value in attrs:
            fetched = (tag == "link" and key == "href") or (tag != "a" and key in ("src", "srcset", "data", "poster"))
            if fetched and value is not None:
                self.found.append(value)
            if key == "style" and value is not None:
                self.found += urls(value)


def urls(css: str) -> list[str]:
    return re.findall(r"(?:url\(|@import )\s*[\"']?([^\"')\s;]+)", css)


@SITE
def test_nothing_is_loaded_from_another_server(site: Path) -> None:
    loaded: list[str] = []
    for page in site.rglob("*.html"):
        parser = Loads()
        parser.feed(page.read_text(encoding="utf-8"))
        loaded += parser.found
    for style in site.rglob("*.css"):
        loaded += urls(style.read_text(encoding="utf-8"))
    assert any(address.endswith(".js") for address in loaded)
    elsewhere = {address for address in loaded if urlparse(address).scheme not in ("", "data") or address[:2] == "//"}
    assert not elsewhere


@SITE
def test_examples_are_shown_and_no_marker_of_them_is_left(site: Path) -> None:
    assert "ClippedDiana" in (site / "guides" / "method" / "index.html").read_text(encoding="utf-8")
    assert not [page for page in site.rglob("index.html") if "--8" in page.read_text(encoding="utf-8")]


@SITE
def test_formulas_are_mathml(site: Path) -> None:
    page = (site / "concepts" / "round" / "index.html").read_text(encoding="utf-8")
    assert page.count("<math") >= 8
    assert page.count("<math") == page.count('class="formula"><math')  # so that none begins a paragraph by itself
    assert "$" not in re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.DOTALL)


@SITE
def test_results_and_changelog_are_pages(site: Path) -> None:
    assert {path.parent.name for path in (site / "results").glob("*/index.html")} == {
        path.parent.name for path in ROOT.glob("results/*/README.md")
    }
    assert (site / "results" / "devices" / "figure.png").is_file()
    assert (site / "changelog" / "index.html").is_file()


@SITE
def test_long_cells_of_tables_are_marked_for_narrow_screens(site: Path) -> None:
    page = (site / "threat-model" / "index.html").read_text(encoding="utf-8")
    assert re.search(r'<td class="long">.{0,40}protected</strong>, unless the node fixes the app', page)
    assert "<td>every released model</td>" in page


@SITE
def test_the_table_of_methods_is_that_of_the_readme(site: Path) -> None:
    page = (site / "methods" / "index.html").read_text(encoding="utf-8")
    assert all(f"<code>{name}</code>" in page for name in METHODS)


def test_every_method_is_in_the_reference() -> None:
    page = (DOCS / "reference" / "write.md").read_text(encoding="utf-8")
    places = {f"{type_.__module__}.{type_.__qualname__}" for type_ in (METHODS[name] for name in METHODS)}
    assert {place for place in places if f"::: {place}\n" not in page} == set()


def test_pages_that_moved_into_the_site_are_gone() -> None:
    assert not [name for name in ("EXPERIMENTS.md", "DEPLOYING.md") if (ROOT / name).exists()]


def test_the_readme_is_short_and_its_links_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("\n") <= 150
    links = re.findall(r"\]\(([^)#]+)", text)
    assert len(links) > 20
    assert [link for link in links if "//" not in link and not (ROOT / link).exists()] == []


def test_links_between_documents_lead_somewhere() -> None:
    for page in (*DOCS.rglob("*.md"), *ROOT.glob("*.md")):
        links = re.findall(r"\]\(([^)#\s]+)", re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL))
        inside = [link for link in links if "//" not in link and link not in ("contributing.md", "../contributing.md")]
        assert [link for link in inside if not (page.parent / link).exists()] == [], page


def run(*command: str, cwd: Path) -> None:
    """Run Python in `cwd`; fails with its errors."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", ["model.md", "data.md"])
def test_the_programs_of_the_guides_run(page: str, tmp_path: Path) -> None:
    text = (DOCS / "guides" / page).read_text(encoding="utf-8")
    files = dict(re.findall(r"^```\w+ title=\"([\w.]+)\"\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL))
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    (config,) = tmp_path.glob("*.toml")
    run("-m", "fedpriv.cli", "run", str(config), "--out", "out", cwd=tmp_path)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_the_experiment_on_objects_in_memory_runs(tmp_path: Path) -> None:
    text = (DOCS / "guides" / "experiments.md").read_text(encoding="utf-8")
    programs = re.findall(r"^```python\n(import (?:torch|pandas).*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    run("-c", "\n".join(programs), cwd=tmp_path)
    made = {path.parent.name for path in tmp_path.glob("runs/*/model.safetensors")}
    assert made == {"in-memory", "frame"}


def test_versions_agree() -> None:
    from fedpriv import __version__

    assert tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"] == __version__
    assert f"version: {__version__}" in (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text("utf-8")

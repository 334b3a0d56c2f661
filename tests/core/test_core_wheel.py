"""The wheel: its contents, its requirements, and that it runs from the folder of its files."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from email.parser import HeaderParser
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from support.wheels import PARTS, build_wheel

from fedpriv.errors import EXTRAS
from fedpriv.version import __version__

pytestmark = pytest.mark.xdist_group("wheel")  # it is built once

ROOT = Path(__file__).parents[2]
# Packages that may not come with an extra that does not name them.
HEAVY = {"torchvision", "scikit-learn", "matplotlib", "flwr", "ray", "tensorboard", "mlflow-skinny", "wandb", "peft"}
MAY = {
    "": set(),
    "flower": {"flwr", "ray"},
    "deploy": {"flwr"},
    "ray": {"ray"},
    "report": {"matplotlib"},
    "data": {"scikit-learn"},
    "datasets": {"matplotlib"},
    "adapters": {"peft"},
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel."""
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def requirements(wheel: Path) -> list[Requirement]:
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(f"fedpriv-{__version__}.dist-info/METADATA").decode()
    return [Requirement(line) for line in HeaderParser().parsestr(text).get_all("Requires-Dist", [])]


def asked_for(requirements: list[Requirement], extra: str) -> list[Requirement]:
    """Return the requirements of an extra, including indirect ones, as far as they are installed here."""
    found, left = [], within(requirements, extra)
    seen = set()
    while left:
        requirement = left.pop()
        found.append(requirement)
        for inner in ("", *sorted(requirement.extras)):
            if (requirement.name.lower(), inner) not in seen:
                seen.add((requirement.name.lower(), inner))
                own = requirement.name == "fedpriv"
                left += within(requirements, inner) if own else requirements_of(requirement.name, inner)
    return found


@cache
def requirements_of(package: str, extra: str) -> list[Requirement]:
    """Return a package's requirements; none if it is not installed here."""
    try:
        return within([Requirement(line) for line in requires(package) or []], extra)
    except PackageNotFoundError:
        return []


def within(requirements: list[Requirement], extra: str) -> list[Requirement]:
    return [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": extra})]


def test_it_holds_packages_types_c_page_templates_and_the_shipped_experiments(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    templates = {".md", ".service", ".sh", ".yaml", ""}
    suffixes = {".py", ".c", ".json", ".typed", ".html", ".css", ".js", ".toml", ".csv", *templates}
    paths = [path for part in PARTS for path in (ROOT / part).rglob("*") if "__pycache__" not in path.parts]
    files = {path for path in paths if path.is_file()}
    wanted = {path.relative_to(ROOT).as_posix() for path in files if path.suffix in suffixes}
    assert {f"{part}/py.typed" for part in PARTS[:3]} < wanted
    assert "fedpriv/deploy/setup/templates/Dockerfile" in wanted
    assert not wanted - held
    left = {path.suffix for path in files} - suffixes
    assert not left, "a kind of file that the wheel may not have"
    tops = {name.split("/")[0] for name in held}
    assert tops == {*PARTS, f"fedpriv-{__version__}.dist-info"}


def test_unpacked_it_lists_its_experiments_and_begins_a_new_one(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "here").mkdir()
    program = "import sys; sys.path.insert(0, sys.argv.pop(1)); from fedpriv.cli import main; main()"
    call = [sys.executable, "-P", "-c", program, str(tmp_path / "site"), "new", "mine"]
    done = subprocess.run(call, cwd=tmp_path / "here", capture_output=True, text=True, check=False)
    assert done.stdout == "made        mine.toml\nnext        fedpriv run mine.toml\n", done.stderr
    assert tomllib.loads((tmp_path / "here" / "mine.toml").read_text())["name"] == "mine"


@pytest.mark.parametrize("extra", MAY)
def test_an_installed_torch_stays(extra: str, requirements: list[Requirement]) -> None:
    found = asked_for(requirements, extra)
    assert {requirement.name.lower() for requirement in found} & HEAVY == MAY[extra]
    torch = [requirement for requirement in found if requirement.name == "torch"]
    assert torch
    for requirement in torch:
        assert {part.operator for part in requirement.specifier} <= {">=", "!="}, requirement


@pytest.mark.slow
@pytest.mark.skipif("CI" not in os.environ, reason="asks the package index for the packages to install")
def test_pip_leaves_an_installed_torch_alone(wheel: Path, tmp_path: Path) -> None:
    """Return the packages that pip would install beside a torch for CPUs, from the index: metadata alone."""
    here = tmp_path / "there"
    venv.create(here, with_pip=False)
    (site,) = here.glob("lib/python*/site-packages")
    metadata = Path(str(distribution("torch").locate_file("."))) / f"torch-{version('torch')}.dist-info"
    shutil.copytree(metadata, site / metadata.name)
    report = tmp_path / "report.json"
    pip = [sys.executable, "-m", "pip", "--python", here / "bin" / "python", "--disable-pip-version-check"]
    asked = [f"{wheel}[flower,ray,deploy,report]", "--dry-run", "--quiet", "--report", report]
    done = subprocess.run([*pip, "install", *asked], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names = {item["metadata"]["name"].lower() for item in json.loads(report.read_text())["install"]}
    assert {"fedpriv", "flwr", "ray", "matplotlib", "numpy"} <= names
    assert not {name for name in names if name in ("torch", "torchvision", "triton") or name.startswith("nvidia")}


def test_torchvision_alone_asks_for_one_version_of_torch_and_constraints_name_both(
    requirements: list[Requirement],
) -> None:
    for extra in ("vision", "all", "dev"):
        assert "torchvision" in {requirement.name for requirement in asked_for(requirements, extra)}
    pins = (ROOT / "constraints.txt").read_text()
    assert re.search(r"^torch==", pins, re.MULTILINE)
    assert re.search(r"^torchvision==", pins, re.MULTILINE)
    assert "-c constraints.txt" in (ROOT / "README.md").read_text()


def test_the_extras_are_those_that_errors_name(requirements: list[Requirement]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert set(extras) == {*EXTRAS, "all", "docs", "dev"}
    (everything,) = (Requirement(line) for line in extras["all"])
    assert everything.extras == set(EXTRAS) - {"onnx"}
    assert "fedpriv[all]" in extras["dev"]
    named = {"sklearn": "scikit-learn", "PIL": "pillow", "mlflow": "mlflow-skinny", "flwr_datasets": "flwr-datasets"}
    named["prometheus_client"] = "prometheus-client"
    for extra, packages in EXTRAS.items():
        brought = asked_for(requirements, extra)
        assert {named.get(package, package) for package in packages} <= {r.name.lower() for r in brought}, extra


def test_what_is_installed_for_the_tests_is_within_the_wheels_ranges(wheel: Path, tmp_path: Path) -> None:
    """Offline, pip would install only the wheel itself."""
    report = tmp_path / "report.json"
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "--quiet", "--report", report]
    done = subprocess.run([*pip, f"{wheel}[all]"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {item["metadata"]["name"] for item in json.loads(report.read_text())["install"]} <= {"fedpriv"}

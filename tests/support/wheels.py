"""The project's wheel, built for tests."""

import shutil
import subprocess
import sys
from pathlib import Path

__all__ = ["PARTS", "build_wheel"]

ROOT = Path(__file__).parents[2]
PARTS = ("fedpriv", "strategies", "clients", "sim_configs")


def build_wheel(folder: Path) -> Path:
    """Build the wheel in a copy below `folder`, as pip does, offline; return its path."""
    for part in PARTS:
        shutil.copytree(ROOT / part, folder / "src" / part, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, folder / "src")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*pip, "-w", folder, folder / "src"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path

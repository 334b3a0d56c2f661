"""Install the rivals, each into a separate environment.

    python results/benchmarks/rivals/setup.py [NAME ...]

The environments are in `$FEDPRIV_BENCH_CACHE`, by default `~/.cache/fedpriv-bench`; existing ones are kept. torch
is installed first and alone, at one version for all. The rivals then come without their dependencies, because the pins
of three of them refuse that torch or pull in a gigabyte that is not used here; the packages that they import are below.
Flower needs nothing: it is a dependency of fedpriv.
"""

import argparse
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

TORCH = "torch==2.13.0"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Installation of a rival.

    Args:
        bare: Packages that come without dependencies.
        rest: Packages that they import, with dependencies.
        options: Further options for the bare ones.
    """

    bare: tuple[str, ...]
    rest: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


_HYDRA = ("hydra-core==1.3.2", "omegaconf==2.3.0", "antlr4-python3-runtime==4.9.3", "opacus==1.6.0")

RIVALS = {
    "jax": Recipe(bare=("jax==0.10.2",), rest=("jax==0.10.2", "numpy")),
    "pfl": Recipe(
        bare=("pfl==0.6.0", "prv-accountant==0.2.0"),
        rest=("dp-accounting>=0.4,<0.6", "multiprocess", "numpy", "packaging<26", "scipy", "wheel<0.46"),
    ),
    "blazefl": Recipe(bare=("blazefl==2.0.3",), rest=("numpy", "tqdm"), options=("--ignore-requires-python",)),
    "flsim": Recipe(
        bare=("flsim==0.1.0", *_HYDRA),
        rest=("numpy", "opt-einsum", "pandas", "pyyaml", "scikit-learn", "scipy", "tensorboard", "tqdm"),
    ),
    "fluke": Recipe(
        bare=("fluke-fl==0.8.1", *_HYDRA),
        rest=(
            *("cerberus", "diskcache", "matplotlib", "numpy", "opt-einsum", "pandas", "psutil", "pyyaml", "requests"),
            *("rich", "scikit-learn", "scipy", "seaborn", "torchmetrics", "typer"),
        ),
    ),
}


def cache() -> Path:
    """Return the folder of the environments."""
    return Path(os.environ.get("FEDPRIV_BENCH_CACHE", Path.home() / ".cache" / "fedpriv-bench"))


def interpreter(name: str) -> Path:
    """Return a rival's Python; it exists once the rival is installed."""
    return cache() / name / "bin" / "python"


def is_installed(name: str) -> bool:
    """Return True if a rival was installed completely."""
    return (cache() / name / ".ready").exists()


def install(name: str) -> None:
    """Install one rival.

    Raises:
        subprocess.CalledProcessError: If pip refuses; its last words are on the screen.
    """
    folder, recipe = cache() / name, RIVALS[name]
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(interpreter(name)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, TORCH], check=True)
    subprocess.run([*pip, "--no-deps", *recipe.options, *recipe.bare], check=True)
    subprocess.run([*pip, TORCH, *recipe.rest], check=True)
    (folder / ".ready").touch()


def main() -> None:
    """Install the named rivals, or all; continue after one that fails."""
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(RIVALS))
    names = parser.parse_args().names or list(RIVALS)
    unknown = sorted(set(names) - set(RIVALS))
    if unknown:
        parser.error(f"no such rival: {', '.join(unknown)}; known: {', '.join(RIVALS)}")
    failed = [name for name in names if not is_installed(name) and not _installs(name)]
    print("installed:", ", ".join(name for name in RIVALS if is_installed(name)) or "none")
    if failed:
        raise SystemExit(f"not installed: {', '.join(failed)}")


def _installs(name: str) -> bool:
    print(f"installing {name} ...", flush=True)
    try:
        install(name)
    except subprocess.CalledProcessError:
        return False
    return True


if __name__ == "__main__":
    main()

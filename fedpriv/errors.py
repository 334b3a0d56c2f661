"""The one exception for user mistakes: the key at fault, the expected value, the value found, and the remedy."""

import difflib
import importlib.util
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = [
    "EXTRAS",
    "EngineStartError",
    "UserError",
    "extra_of",
    "has_extra",
    "naming",
    "nearest",
    "plural",
    "require_extra",
    "shown_as",
]

EXTRAS = {
    "flower": ("flwr", "ray"),
    "deploy": ("flwr",),
    "metrics": ("prometheus_client",),
    "ray": ("ray",),
    "report": ("matplotlib", "jinja2"),
    "data": ("sklearn", "PIL"),
    "parquet": ("pyarrow",),
    "vision": ("torchvision",),
    "datasets": ("flwr_datasets",),
    "adapters": ("transformers", "peft"),
    "timm": ("timm",),
    "onnx": ("onnx", "onnxscript"),
    "tensorboard": ("tensorboard",),
    "mlflow": ("mlflow",),
    "wandb": ("wandb",),
}
"""The packages that `pip install 'fedpriv[EXTRA]'` adds, by import name."""


_MAX_NAMES, _NAMES_OF_MANY = 40, 8
"""Number of names above which a list of suggestions is cut, and the number of those that remain."""


class UserError(ValueError):
    """A mistake that the user can fix, reported as one line.

    Args:
        where: The key, file or argument that is at fault.
        expected: Description of a valid value.
        got: The value that was found.
        remedy: The fix, as an imperative sentence without its full stop.
    """

    def __init__(self, where: str, expected: str, got: object, remedy: str) -> None:
        self.where = where
        line = f"{where}: expected {expected}, got {got}. {remedy}."
        super().__init__(" ".join(line.split()))

    def within(self, place: str) -> "UserError":
        """Return this error with its place before the key at fault, such as the file of the key."""
        line = " ".join(str(self).split())
        found = UserError(f"{place}: {self.where}", "", "", "")
        found.args = (f"{place}: {line}",)
        return found


class EngineStartError(UserError):
    """An engine does not start on this computer; another engine may run the same experiment."""


@contextmanager
def shown_as(part: Path, final: Path) -> Iterator[None]:
    """Name `final` in errors of the block that name `part`, a temporary file or folder that does not outlive it."""
    try:
        yield
    except UserError as error:
        error.where = error.where.replace(str(part), str(final))
        error.args = tuple(str(line).replace(str(part), str(final)) for line in error.args)
        raise
    except OSError as error:
        if isinstance(error.filename, str):
            error.filename = error.filename.replace(str(part), str(final))
        raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name `path` in errors of the block without a file: writes to an open file, as on a full disk, name none."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def nearest(name: object, known: Iterable[str]) -> str:
    """Return a remedy that suggests the known name closest to `name`, and lists all names, or the closest of many."""
    name, names = str(name), sorted(set(known))
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    listed = f"Known: {', '.join(names) or 'none'}"
    if len(names) > _MAX_NAMES:
        shown = difflib.get_close_matches(name, names, n=_NAMES_OF_MANY, cutoff=0.0)
        listed = f"Closest of {len(names):,} names: {', '.join(shown)}"
    return f"Did you mean {close[0]!r}? {listed}" if close else listed


def has_extra(extra: str) -> bool:
    """Return True if all packages of an extra are installed. Imports none of them.

    Args:
        extra: A key of `EXTRAS`.
    """
    return not _absent(EXTRAS[extra])


def extra_of(package: str) -> str | None:
    """Return the first extra that adds the package of this import name; None if there is none."""
    return next((extra for extra, packages in EXTRAS.items() if package in packages), None)


def plural(noun: str, number: int) -> str:
    """Return a regular noun for this number of things."""
    return noun if number == 1 else f"{noun}s"


def number_of(number: int, noun: str) -> str:
    """Return a number and a regular noun in the form that fits it, as in `1 round` and `2,000 rounds`."""
    return f"{number:,} {plural(noun, number)}"


def require_extra(where: str, extra: str, packages: Iterable[str] | None = None) -> None:
    """Raise UserError unless the packages of an extra are installed. Imports none of them.

    Args:
        where: The command, option or key that needs the extra.
        extra: A key of `EXTRAS`.
        packages: The required packages of the extra; None requires all of them.

    Raises:
        UserError: If a package is missing; the message names the extra to install.
    """
    absent = _absent(EXTRAS[extra] if packages is None else packages)
    if absent:
        remedy = f"Install it with pip install 'fedpriv[{extra}]'"
        raise UserError(where, f"an installed package {absent[0]}", "a missing one", remedy)


def _absent(packages: Iterable[str]) -> list[str]:
    return [package for package in packages if importlib.util.find_spec(package) is None]

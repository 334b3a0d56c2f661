"""The one shape of error for what a user can cause: where, expected what, got what, what to do."""

import difflib
import importlib.util
from collections.abc import Iterable

__all__ = ["EXTRAS", "UserError", "has_extra", "nearest", "require_extra"]

EXTRAS = {
    "flower": ("flwr", "ray"),
    "deploy": ("flwr",),
    "ray": ("ray",),
    "report": ("matplotlib", "jinja2"),
    "data": ("sklearn", "PIL"),
    "parquet": ("pyarrow",),
    "vision": ("torchvision",),
    "tensorboard": ("tensorboard",),
    "mlflow": ("mlflow",),
    "wandb": ("wandb",),
}
"""What `pip install 'fedpriv[EXTRA]'` adds, by the names under which it is imported."""


class UserError(ValueError):
    """A mistake that the user can mend, as one clear line.

    Args:
        where: The key, file or argument that is at fault.
        expected: What would have been right.
        got: What was found.
        remedy: What to do about it; a full sentence without its full stop.
    """

    def __init__(self, where: str, expected: str, got: object, remedy: str) -> None:
        self.where = where
        line = f"{where}: expected {expected}, got {got}. {remedy}."
        super().__init__(" ".join(line.split()))


def nearest(name: str, known: Iterable[str]) -> str:
    """A remedy that names the known name nearest to `name`, or all known names if none is near."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"Did you mean {close[0]!r}? Known: {', '.join(names)}"
    return f"Known: {', '.join(names) or 'none'}"


def has_extra(extra: str) -> bool:
    """Whether the packages of an extra are installed; imports none of them.

    Args:
        extra: Of `EXTRAS`.
    """
    return not _absent(EXTRAS[extra])


def require_extra(where: str, extra: str, packages: Iterable[str] | None = None) -> None:
    """Refuses to go on without an extra; imports nothing.

    Args:
        where: The command, option or key that needs it.
        extra: Of `EXTRAS`.
        packages: Those of its packages that are needed; None for all.

    Raises:
        UserError: If one of the packages is not installed; says what to install.
    """
    absent = _absent(EXTRAS[extra] if packages is None else packages)
    if absent:
        remedy = f"Install it with pip install 'fedpriv[{extra}]'"
        raise UserError(where, f"the package {absent[0]}", "none", remedy)


def _absent(packages: Iterable[str]) -> list[str]:
    return [package for package in packages if importlib.util.find_spec(package) is None]

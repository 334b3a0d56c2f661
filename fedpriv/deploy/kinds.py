"""Kinds of folders in a deployment, recognized by their files, and one line about a folder of the wrong kind."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedpriv.errors import UserError

__all__ = ["described", "in_file", "kind_of", "require_kind", "text_of", "wrong_kind"]

# The first match counts. A folder keeps its kind if its settings are missing, so that a check can name the files.
_MARKS = {
    "deployment": ("deployment.toml",),
    "server": ("server.toml", "server.key"),
    "helper": ("helper.toml", "helper.key"),
    "node": ("node.toml", "fedpriv-client.toml"),
    "admin": ("register.sh",),
    "ca": ("ca.key",),
}
_NAMES = {
    "deployment": "the folder of a whole deployment",
    "server": "the folder of a server",
    "helper": "the folder of a helper",
    "node": "the folder of a node",
    "admin": "the folder admin of a deployment",
    "ca": "the folder ca of a deployment",
}


def kind_of(folder: Path) -> str:
    """Return `deployment`, `server`, `helper`, `node`, `admin` or `ca`; empty for any other path."""
    return next((kind for kind, names in _MARKS.items() if any((folder / name).is_file() for name in names)), "")


def described(folder: Path) -> str:
    """Return what is found at a path, in words."""
    if not folder.exists():
        return "a missing folder"
    if not folder.is_dir():
        return "a file"
    return _NAMES.get(kind_of(folder), "a folder without a deployment's files")


def require_kind(folder: Path, *kinds: str) -> str:
    """Return the kind of a folder.

    Args:
        folder: The folder.
        kinds: Those that are allowed, among server, node and helper.

    Raises:
        UserError: If it is none of `kinds`.
    """
    found = kind_of(folder)
    if found not in kinds:
        raise wrong_kind(folder, *kinds)
    return found


def wrong_kind(folder: Path, *kinds: str) -> UserError:
    """Return the error for a folder that is none of `kinds`, with the folder that may be meant."""
    within = sorted(path for path in _folders_in(folder) if kind_of(path) in kinds)
    names = {"node": "node-I", "helper": "helper-J"}
    usual = _listed([names.get(kind, kind) for kind in kinds])
    expected = f"the folder of {_listed([f'a {kind}' for kind in kinds])}"
    made = f"{usual} in the folder that `fedpriv deploy init` made"
    return UserError(str(folder), expected, described(folder), f"Give {within[0] if len(within) == 1 else made}")


def _listed(words: list[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _folders_in(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.is_dir()]
    except OSError:
        return []


def text_of(path: Path, expected: str, remedy: str) -> str:
    """Return the text of a file.

    Args:
        path: The file.
        expected: Description of it, for the error.
        remedy: The fix if it cannot be read.

    Raises:
        UserError: If it is missing, unreadable, or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(str(path), expected, error.strerror or error, remedy) from None
    except UnicodeDecodeError:
        raise UserError(str(path), expected, "bytes that are not text", remedy) from None


@contextmanager
def in_file(path: Path) -> Iterator[None]:
    """Name a file in each `UserError` about one of its keys."""
    try:
        yield
    except UserError as error:
        if error.where.startswith(str(path)):
            raise
        raise error.within(str(path)) from None

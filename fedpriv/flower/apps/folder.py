"""Flower apps in folders: their pyproject.toml, ServerApp and ClientApp."""

import importlib
import re
import sys
import tomllib
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, Literal, overload

from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedpriv.errors import UserError, nearest

__all__ = ["AppFolder", "import_component", "imports_from", "last_line_in"]

Scalar = bool | int | float | str
_ASSIGNMENT = re.compile(r"(\S+?)=('[^']*'|\"[^\"]*\"|\S+)")


@dataclass(frozen=True)
class AppFolder:
    """Flower app in a folder.

    Args:
        path: Folder of the app.
        serverapp: ServerApp, as `module:attribute`.
        clientapp: ClientApp, as `module:attribute`.
        run_config: `context.run_config` of the server and the clients.
    """

    path: Path
    serverapp: str
    clientapp: str
    run_config: dict[str, Scalar]

    @classmethod
    def read(cls, path: Path, overrides: Sequence[str] = ()) -> "AppFolder":
        """Read an app's pyproject.toml.

        Args:
            path: Folder of the app.
            overrides: In the format of `flwr run --run-config`: `key=value` pairs, in TOML, or one .toml file.

        Raises:
            UserError: If the folder has no Flower app, or a key is not in its config.
        """
        path = Path(path).resolve()
        file = path / "pyproject.toml"
        if not file.is_file():
            raise UserError(
                str(path), "a folder with a pyproject.toml", "a folder without it", "Give the folder of a Flower app"
            )
        app = _parse(file.read_text(encoding="utf-8"), str(file)).get("tool", {}).get("flwr", {}).get("app", {})
        components = app.get("components", {})
        for name in ("serverapp", "clientapp"):
            if not re.fullmatch(r"[^:\s]+:[^:\s]+", str(components.get(name, ""))):
                raise UserError(
                    f"{file}: tool.flwr.app.components.{name}",
                    '"module:attribute"',
                    repr(components[name]) if name in components else "a missing key",
                    "Set it to the place of the app object",
                )
        config = _flat(app.get("config", {}), f"{file}: tool.flwr.app.config")
        given = _overrides(overrides)
        for key in given:
            if key not in config:
                raise UserError("--run-config", "a key of the app's config", key, nearest(key, config))
        return cls(path, components["serverapp"], components["clientapp"], {**config, **given})


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(where, "valid TOML", str(error), "Put strings in quotes, as in 'key=\"text\"'") from None


def _overrides(given: Sequence[str]) -> dict[str, Scalar]:
    """Return the pairs of all strings, of which the last one with a key counts, or the keys of one TOML file."""
    if len(given) == 1 and given[0].endswith(".toml"):
        file = Path(given[0]).expanduser()
        if not file.is_file():
            raise UserError("--run-config", "an existing TOML file", str(file), "Give a file or key=value")
        return _flat(_parse(file.read_text(encoding="utf-8"), str(file)), str(file))
    pairs: dict[str, Scalar] = {}
    for text in given:
        if _ASSIGNMENT.sub("", text).strip() or not text.strip():
            raise UserError("--run-config", "key=value pairs", repr(text), "Write -c 'key=1 other=\"text\"'")
        for key, value in _ASSIGNMENT.findall(text):
            pairs |= _flat(_parse(f"{key} = {value}", f"--run-config {key}"), "--run-config")
    return pairs


def _flat(table: dict[str, Any], where: str, above: str = "") -> dict[str, Scalar]:
    """Return nested tables as one table, with dots between the names, as in Flower."""
    flat: dict[str, Scalar] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= _flat(value, where, f"{above}{key}.")
        elif isinstance(value, Scalar):
            flat[above + key] = value
        else:
            raise UserError(
                f"{where}.{above}{key}",
                "a bool, number or string",
                type(value).__name__,
                "Use one of these types: Flower passes no others on",
            )
    return flat


@contextmanager
def imports_from(folder: Path) -> Iterator[None]:
    """Let an app import its own modules within the block; then forget them, so that the next app imports its own."""
    before = list(sys.path)
    known = set(sys.modules)
    try:
        yield
    finally:
        sys.path[:] = before
        for name in set(sys.modules) - known:
            if _is_module_in(folder, sys.modules[name]):
                del sys.modules[name]


@overload
def import_component(folder: Path, reference: str, kind: Literal["serverapp"]) -> ServerApp: ...
@overload
def import_component(folder: Path, reference: str, kind: Literal["clientapp"]) -> ClientApp: ...
def import_component(folder: Path, reference: str, kind: str) -> ServerApp | ClientApp:
    """Return a component of an app, imported with the app's folder first in the import path.

    Args:
        folder: Folder of the app.
        reference: `module:attribute`.
        kind: Kind of the component.

    Raises:
        UserError: If the component cannot be imported, is not a ServerApp or ClientApp, or shares a package name with
            fedpriv.
    """
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
        importlib.invalidate_caches()
    name, _, attributes = reference.partition(":")
    where = f"{folder}: {kind} {reference!r}"
    _refuse_borrowed_names(folder)
    try:
        found: Any = importlib.import_module(name)
        for attribute in attributes.split("."):
            found = getattr(found, attribute)
    except UserError:
        raise
    except Exception as error:
        got = f"{type(error).__name__}: {str(error).rstrip('.')}{last_line_in(folder, error)}"
        raise UserError(where, "an app that can be imported", got, "Fix the app, or install its packages") from error
    expected = ServerApp if kind == "serverapp" else ClientApp
    if not isinstance(found, expected):
        raise UserError(where, f"a {expected.__name__}", type(found).__name__, "Point to the app object")
    return found


def _refuse_borrowed_names(folder: Path) -> None:
    """Raise a `UserError` if a loaded fedpriv package would hide an app's package of the same name."""
    for name in ("clients", "fedpriv", "strategies"):
        own = PathFinder.find_spec(name, [str(folder)])
        loaded = sys.modules.get(name)
        if own is not None and loaded is not None and not _is_module_in(folder, loaded):
            raise UserError(
                str(folder),
                "package names that fedpriv does not use",
                name,
                "Rename the package, or run this app with flwr run",
            )


def _is_module_in(folder: Path, module: Any) -> bool:
    places = [getattr(module, "__file__", None), *(getattr(module, "__path__", None) or ())]
    return any(_is_own(folder, place) for place in places if place)


def _is_own(folder: Path, file: str) -> bool:
    """Return whether a file belongs to the app, and not to a virtual environment in its folder."""
    path = Path(file).resolve()
    return path.is_relative_to(folder) and "site-packages" not in path.relative_to(folder).parts


def last_line_in(folder: Path, error: BaseException) -> str:
    """Return the place of an exception in the app's own files; empty if it was raised elsewhere."""
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_own(folder, frame.filename)]
    return f" ({Path(lines[-1].filename).name}, line {lines[-1].lineno})" if lines else ""

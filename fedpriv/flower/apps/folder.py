"""A Flower app as it lies in a folder: what its pyproject.toml says, and its ServerApp and ClientApp."""

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
    """A Flower app.

    Args:
        path: Its folder.
        serverapp: The ServerApp, as `module:attribute`.
        clientapp: The ClientApp, as `module:attribute`.
        run_config: What server and clients find in `context.run_config`.
    """

    path: Path
    serverapp: str
    clientapp: str
    run_config: dict[str, Scalar]

    @classmethod
    def read(cls, path: Path, overrides: Sequence[str] = ()) -> "AppFolder":
        """Reads an app's pyproject.toml.

        Args:
            path: The app's folder.
            overrides: As `flwr run --run-config` takes them: `key=value` pairs, in TOML, or one .toml file.

        Raises:
            UserError: If the folder holds no Flower app, or a key is none of its config.
        """
        path = Path(path).resolve()
        file = path / "pyproject.toml"
        if not file.is_file():
            raise UserError(str(path), "a folder with a pyproject.toml", "none", "Give the folder of a Flower app")
        app = _parse(file.read_text(encoding="utf-8"), str(file)).get("tool", {}).get("flwr", {}).get("app", {})
        components = app.get("components", {})
        for name in ("serverapp", "clientapp"):
            if not re.fullmatch(r"[^:\s]+:[^:\s]+", str(components.get(name, ""))):
                raise UserError(
                    f"{file}: tool.flwr.app.components.{name}",
                    '"module:attribute"',
                    repr(components.get(name, "none")),
                    "Say where the app is",
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
        raise UserError(where, "valid TOML", str(error), "Strings need quotes, as in 'key=\"text\"'") from None


def _overrides(given: Sequence[str]) -> dict[str, Scalar]:
    """Pairs of all strings, the last one of a key counting; or the keys of one TOML file."""
    if len(given) == 1 and given[0].endswith(".toml"):
        file = Path(given[0]).expanduser()
        if not file.is_file():
            raise UserError("--run-config", "a TOML file", f"{file}, which is none", "Give a file or key=value")
        return _flat(_parse(file.read_text(encoding="utf-8"), str(file)), str(file))
    pairs: dict[str, Scalar] = {}
    for text in given:
        if _ASSIGNMENT.sub("", text).strip() or not text.strip():
            raise UserError("--run-config", "key=value pairs", repr(text), "Write -c 'key=1 other=\"text\"'")
        for key, value in _ASSIGNMENT.findall(text):
            pairs |= _flat(_parse(f"{key} = {value}", f"--run-config {key}"), "--run-config")
    return pairs


def _flat(table: dict[str, Any], where: str, above: str = "") -> dict[str, Scalar]:
    """Nested tables as one, with dots between the names, as Flower has them."""
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
                "Flower passes nothing else on",
            )
    return flat


@contextmanager
def imports_from(folder: Path) -> Iterator[None]:
    """Lets an app import its own modules for a while; forgets them afterwards, so that the next app finds its own."""
    before = list(sys.path)
    known = set(sys.modules)
    try:
        yield
    finally:
        sys.path[:] = before
        for name in set(sys.modules) - known:
            if _lies_in(folder, sys.modules[name]):
                del sys.modules[name]


@overload
def import_component(folder: Path, reference: str, kind: Literal["serverapp"]) -> ServerApp: ...
@overload
def import_component(folder: Path, reference: str, kind: Literal["clientapp"]) -> ClientApp: ...
def import_component(folder: Path, reference: str, kind: str) -> ServerApp | ClientApp:
    """A component of an app, imported with the app's folder in front of everything else.

    Args:
        folder: The app's folder.
        reference: `module:attribute`.
        kind: Which component this is.

    Raises:
        UserError: If it cannot be imported, is another project's, or is no ServerApp or ClientApp.
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
        raise UserError(where, "one that can be imported", got, "Mend the app, or install what it needs") from error
    expected = ServerApp if kind == "serverapp" else ClientApp
    if not isinstance(found, expected):
        raise UserError(where, f"a {expected.__name__}", type(found).__name__, "Point to the app object")
    return found


def _refuse_borrowed_names(folder: Path) -> None:
    """An app's package must not be answered for by one of ours of the same name, which is loaded already."""
    for name in ("clients", "fedpriv", "strategies"):
        own = PathFinder.find_spec(name, [str(folder)])
        loaded = sys.modules.get(name)
        if own is not None and loaded is not None and not _lies_in(folder, loaded):
            raise UserError(
                str(folder),
                "packages of other names than fedpriv's own",
                name,
                "Rename it, or run this app with flwr run",
            )


def _lies_in(folder: Path, module: Any) -> bool:
    places = [getattr(module, "__file__", None), *(getattr(module, "__path__", None) or ())]
    return any(_is_own(folder, place) for place in places if place)


def _is_own(folder: Path, file: str) -> bool:
    """Whether a file belongs to the app, and not to a virtual environment that lies in the same folder."""
    path = Path(file).resolve()
    return path.is_relative_to(folder) and "site-packages" not in path.relative_to(folder).parts


def last_line_in(folder: Path, error: BaseException) -> str:
    """Where in the app's own files an exception came from, in words; empty if from none of them."""
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_own(folder, frame.filename)]
    return f" ({Path(lines[-1].filename).name}, line {lines[-1].lineno})" if lines else ""

"""Names that an experiment uses, and the classes that they stand for.

Every name in a config, an order to a device or a job of a sweep is resolved by a `Registry`: built-in names, names that
installed packages add (entry points such as the group `fedpriv.methods`), `"package.module:Class"`, and
`"folder/file.py:Class"`. A class is imported when it is first asked for.
"""

import dataclasses
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeGuard, TypeVar, cast

from fedpriv.errors import UserError, nearest

__all__ = ["Registry", "is_reference", "modules_of_files", "only_known", "whole_reference"]

_ONLY_KNOWN: ContextVar[bool] = ContextVar("only_known", default=False)

# What the names of modules begin with that were loaded from a file.
_OF_A_FILE = "fedpriv_file_"

T = TypeVar("T")


class Registry(Mapping[str, type[T]], Generic[T]):
    """The classes of one kind by name; a mapping of the built-in names and those that packages or programs add.

    Args:
        kind: What errors call one of them, such as `method`.
        builtin: Classes by name, or where they are: `"package.module:Class"`.
        protocol: What each of them has; one from elsewhere without it is refused. None to take what there is.
        group: The group of entry points of packages that add some; None if all there are are built in.
    """

    def __init__(
        self, kind: str, builtin: Mapping[str, type[T] | str], protocol: type | None = None, group: str | None = None
    ) -> None:
        self.kind = kind
        self._group = group
        self._members = _members(protocol)
        self._known: dict[str, type[T] | str] = dict(builtin)
        self._referred: dict[str, type[T]] = {}

    def __getitem__(self, name: str) -> type[T]:
        found = self._known.get(name)
        if found is None:
            if name in self._referred:
                return self._referred[name]
            if name not in self._entry_points:
                raise KeyError(name)
            return cast(type[T], self._entry_points[name].load())
        if isinstance(found, str):
            found = self._known[name] = cast(type[T], _imported(found, self.kind, found))
        return found

    def __contains__(self, name: object) -> bool:
        return name in self._known or name in self._referred or name in self._entry_points

    def __iter__(self) -> Iterator[str]:
        yield from self._known
        yield from (name for name in self._entry_points if name not in self._known)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def add(self, name: str, kind: type[T]) -> None:
        """Adds a class for this process, or replaces one."""
        self._known[name] = kind

    def remove(self, name: str) -> None:
        """Takes away a name that `add` has added."""
        del self._known[name]

    def known(self, name: object, where: str) -> type[T]:
        """The class that a name stands for, if this process has it already: nothing is imported for a stranger.

        Args:
            name: A built-in name, one of an entry point, or a reference that `resolve` was asked for before.
            where: The key that holds it, for the error.

        Raises:
            UserError: If it is another.
        """
        if not isinstance(name, str) or name not in self:
            raise UserError(where, "a known name", repr(name), nearest(str(name), self))
        return self[name]

    def resolve(self, name: object, where: str) -> type[T]:
        """The class that a name or a reference stands for.

        Args:
            name: A known name, `"package.module:Class"` or `"folder/file.py:Class"`. A reference runs the code of that
                module: take none from others.
            where: The key that holds it, for the error.

        Raises:
            UserError: If there is no such class, or under `only_known` if this process does not have it already.
        """
        if self._group is None or _ONLY_KNOWN.get() or not is_reference(name) or name in self:
            return self.known(name, where)
        found = _imported(name, where, name)
        if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
            remedy = f"Make it a class with @dataclass(frozen=True), whose fields are the keys of the {self.kind}"
            raise UserError(where, f"a dataclass that is a {self.kind}", repr(name), remedy)
        missing = self._members - {*dir(found), *(field.name for field in dataclasses.fields(found))}
        if missing:
            remedy = f"Give it: fedpriv's own classes of this kind, such as {next(iter(self))!r}, have all of them"
            expected = f"a {self.kind} with {', '.join(sorted(missing))}"
            raise UserError(where, expected, f"{name!r}, which has none", remedy)
        self._referred[name] = cast(type[T], found)
        return self._referred[name]

    def name_of(self, instance: object) -> str:
        """The name of the class of an instance; its reference if it has been resolved by one."""
        kind = type(instance)
        for name, known in self._known.items():
            if known is kind or known == f"{kind.__module__}:{kind.__qualname__}":
                return name
        for name in (*self._referred, *self):
            if self[name] is kind:
                return name
        raise KeyError(f"{kind.__qualname__} is no {self.kind} with a name")

    @property
    def _entry_points(self) -> Mapping[str, EntryPoint]:
        return {} if self._group is None else _installed(self._group)


@contextmanager
def only_known() -> Iterator[None]:
    """Makes every `resolve` a `known` meanwhile, so that nothing is imported that a stranger names."""
    token = _ONLY_KNOWN.set(True)
    try:
        yield
    finally:
        _ONLY_KNOWN.reset(token)


def is_reference(name: object) -> TypeGuard[str]:
    """Whether a name says where its class is: `"package.module:Class"` or `"folder/file.py:Class"`."""
    return isinstance(name, str) and ":" in name


def whole_reference(name: Any, folder: Path) -> Any:
    """A `"file.py:Class"` with the file's absolute path; anything else as it is.

    Args:
        name: A name, a reference, or what a file has in place of one.
        folder: Where a relative path begins.
    """
    if not is_reference(name):
        return name
    place, _, found = name.rpartition(":")
    return f"{(folder / place).resolve()}:{found}" if place.endswith(".py") else name


def _members(protocol: type | None) -> frozenset[str]:
    """Names of what a protocol asks for."""
    found = () if protocol is None else (*vars(protocol), *protocol.__annotations__)
    return frozenset(name for name in found if not name.startswith("_"))


def modules_of_files() -> list[ModuleType]:
    """The modules of classes that were named by a file: another process cannot import them by their names."""
    return [module for name, module in sys.modules.items() if name.startswith(_OF_A_FILE)]


@cache
def _installed(group: str) -> Mapping[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=group)}


def _imported(reference: str, where: str, shown: str) -> Any:
    place, _, name = reference.rpartition(":")
    try:
        module = _module_of_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
        found: Any = module
        for part in name.split("."):
            found = getattr(found, part)
        return found
    except (ImportError, AttributeError, ValueError, OSError) as error:
        remedy = 'Write "package.module:Class" or "./file.py:Class"'
        raise UserError(where, "a class that can be imported", f"{shown!r} ({error})", remedy) from error


def _module_of_file(path: Path) -> Any:
    """The module that a file holds, loaded once a process under a name of its own."""
    path = path.resolve(strict=True)
    name = f"{_OF_A_FILE}{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]

"""Resolve the names in a config to classes.

A `Registry` resolves every name in a config, an instruction to a device or a job of a sweep. A name is built in, comes
from an installed package (entry points such as the group `fedpriv.methods`), or is a reference:
`"package.module:Class"` or `"folder/file.py:Class"`. A class is imported on first use.
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
from typing import Any, Generic, TypeGuard, TypeVar, cast

from fedpriv.errors import UserError, nearest

__all__ = ["Registry", "is_reference", "only_known", "whole_reference"]

_ONLY_KNOWN: ContextVar[bool] = ContextVar("only_known", default=False)

T = TypeVar("T")


class Registry(Mapping[str, type[T]], Generic[T]):
    """The classes of one kind by name: a mapping of built-in names and those that packages or programs add.

    Args:
        kind: The noun for one of them in error messages, such as `method`.
        builtin: Classes by name, or their locations: `"package.module:Class"`.
        group: The entry point group in which packages add classes; None if all are built in.
    """

    def __init__(self, kind: str, builtin: Mapping[str, type[T] | str], group: str | None = None) -> None:
        self.kind = kind
        self._group = group
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
        """Register a class in this process, replacing any class of that name."""
        self._known[name] = kind

    def remove(self, name: str) -> None:
        """Remove a name that `add` registered."""
        del self._known[name]

    def known(self, name: object, where: str) -> type[T]:
        """Return the class for a name that this process already knows. Never imports code that untrusted input names.

        Args:
            name: A built-in name, an entry point, or a reference that `resolve` has already resolved.
            where: The key that holds the name, for the error.

        Raises:
            UserError: If the name is unknown.
        """
        if not isinstance(name, str) or name not in self:
            raise UserError(where, "a known name", repr(name), nearest(str(name), self))
        return self[name]

    def resolve(self, name: object, where: str) -> type[T]:
        """Return the class for a name or a reference.

        Args:
            name: A known name, `"package.module:Class"` or `"folder/file.py:Class"`. A reference runs the code of that
                module: use only references you trust.
            where: The key that holds the name, for the error.

        Raises:
            UserError: If there is no such class or, under `only_known`, if this process does not know it yet.
        """
        if self._group is None or _ONLY_KNOWN.get() or not is_reference(name) or name in self:
            return self.known(name, where)
        found = _imported(name, where, name)
        if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
            remedy = f"Make it a class with @dataclass(frozen=True) and a field for each key of the {self.kind}"
            raise UserError(where, f"a dataclass that is a {self.kind}", repr(name), remedy)
        self._referred[name] = cast(type[T], found)
        return self._referred[name]

    def name_of(self, instance: object) -> str:
        """Return the name of an instance's class, or the reference that resolved it."""
        kind = type(instance)
        for name, known in self._known.items():
            if known is kind or known == f"{kind.__module__}:{kind.__qualname__}":
                return name
        for name in (*self._referred, *self):
            if self[name] is kind:
                return name
        raise KeyError(f"{kind.__qualname__} is not a registered {self.kind}")

    @property
    def _entry_points(self) -> Mapping[str, EntryPoint]:
        return {} if self._group is None else _installed(self._group)


@contextmanager
def only_known() -> Iterator[None]:
    """Turn every `resolve` into `known` within the context, so that untrusted names import nothing."""
    token = _ONLY_KNOWN.set(True)
    try:
        yield
    finally:
        _ONLY_KNOWN.reset(token)


def is_reference(name: object) -> TypeGuard[str]:
    """Return True for a reference: `"package.module:Class"` or `"folder/file.py:Class"`."""
    return isinstance(name, str) and ":" in name


def whole_reference(name: Any, folder: Path) -> Any:
    """Return a `"file.py:Class"` reference with the file's absolute path; return anything else unchanged.

    Args:
        name: A name, a reference, or any other value that a file has in its place.
        folder: The folder that relative paths start from.
    """
    if not is_reference(name):
        return name
    place, _, found = name.rpartition(":")
    return f"{(folder / place).resolve()}:{found}" if place.endswith(".py") else name


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
    """Load a file as a module, once per process, under a unique name."""
    path = path.resolve(strict=True)
    name = f"fedpriv_file_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
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

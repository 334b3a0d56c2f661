"""Resolve the names in a config to classes.

A `Registry` resolves every name in a config, an instruction to a device or a job of a sweep. A name is built in, comes
from an installed package (entry points such as the group `fedpriv.methods`), or is a reference:
`"package.module:Class"` or `"folder/file.py:Class"`. A class is imported on first use.
"""

import copy
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import inspect
import json
import operator
import sys
import traceback
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.metadata import EntryPoint, entry_points, packages_distributions
from importlib.metadata import version as version_of
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, Protocol, TypeGuard, TypeVar, cast

from fedpriv.errors import UserError, extra_of, nearest

__all__ = [
    "MEMORY",
    "Registry",
    "bare_reference",
    "is_reference",
    "line_of",
    "modules_of_files",
    "only_known",
    "own_frames",
    "settings_of",
    "source_of",
    "whole_reference",
]

MEMORY = "memory"
"""Replaces the module in names of objects that a Python program holds in memory."""

_OF_FILE = "fedpriv_file_"
"""Prefix of the names of modules loaded from a file."""

_SHA256 = "__fedpriv_sha256__"
"""Name, in such a module, of the hash of the content that was loaded."""

# Attributes that `source_of` and `Registry.name_of` read from a class; a field of that name would replace one.
_TAKEN = ("called", "asked", "reference", "source", "named_in")

_ONLY_KNOWN: ContextVar[bool] = ContextVar("only_known", default=False)

T = TypeVar("T")
KindT = TypeVar("KindT", covariant=True)


class _Adapter(Protocol[KindT]):
    def of(self, found: object, where: str, name: str) -> type[KindT]: ...


class Registry(Mapping[str, type[T]], Generic[T]):
    """The classes of one kind by name: a mapping of built-in names and those that packages or programs add.

    Args:
        kind: The noun for one of them in error messages, such as `method`.
        builtin: Classes by name, or their locations: `"package.module:Class"`.
        protocol: The required members; user classes without them are refused. None to accept all.
        group: The entry point group in which packages add classes; None if all are built in.
        wrap: Location of an adapter, `"package.module:Class"`. Its method `of(found, where, name)` returns a
            dataclass of this kind for an imported function or a class that is not a dataclass, or raises UserError.
            None to refuse these.
        hidden: Built-in names that resolve and are not listed: other tables of a config write them.
    """

    def __init__(
        self,
        kind: str,
        builtin: Mapping[str, type[T] | str],
        protocol: type | None = None,
        group: str | None = None,
        wrap: str | None = None,
        hidden: Collection[str] = (),
    ) -> None:
        self._hidden = frozenset(hidden)
        self.kind = kind
        self.group = group
        self._wrap = wrap
        self._members = _members(protocol)
        self._known: dict[str, type[T] | str] = dict(builtin)
        self._referred: dict[str, type[T]] = {}
        self._names: dict[type, str] = {}
        self._modules: dict[str, str] = {}

    def __getitem__(self, name: str) -> type[T]:
        found = self._known.get(name)
        if found is None:
            if name in self._referred:
                return self._referred[name]
            if name not in self._entry_points:
                raise KeyError(name)
            entry = self._entry_points[name]
            return self._refer(name, self._fitting(entry.load(), self.kind, name), entry.module)
        if isinstance(found, str):
            found = self._known[name] = cast(type[T], _imported(found, self.kind, found))
        return found

    def __contains__(self, name: object) -> bool:
        known = isinstance(name, str) and (name in self._known or name in self._referred)
        return known or (isinstance(name, str) and name in self._entry_points)

    def __iter__(self) -> Iterator[str]:
        yield from (name for name in self._known if name not in self._hidden)
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
            name: A built-in name, an entry point, or a reference that `resolve` has already resolved; None for a
                missing key. A reference to a file may name another folder: the class is the one of the resolved
                reference. (Another content of the file is another experiment; see `source_of`.)
            where: The key that holds the name, for the error.

        Raises:
            UserError: If the name is unknown.
        """
        if is_reference(name) and name not in self:
            bare = bare_reference(name)
            name = next((known for known in self._referred if bare_reference(known) == bare), name)
        if isinstance(name, str) and name.endswith(".py") and name not in self:
            remedy = f'Add the name in the file, such as "{name}:NAME"'
            raise UserError(where, f"a {self.kind} of the file, after a colon", repr(name), remedy)
        if name is None:
            raise UserError(where, "a known name", "a missing key", nearest("", self))
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
        if (
            self.group is None
            or _ONLY_KNOWN.get()
            or not is_reference(name)
            or (name in self and not self._is_edited(name))
        ):
            return self.known(name, where)
        place = name.rpartition(":")[0]
        kind = self._fitting(_imported(name, where, name), where, name)
        return self._refer(name, kind, _module_name(Path(place)) if place.endswith(".py") else place)

    def _refer(self, name: str, kind: type[T], module: str) -> type[T]:
        """Remember the class that a name leads to, and the module that the name is of."""
        self._referred[name], self._names[kind], self._modules[name] = kind, name, module
        if hasattr(kind, "called"):
            kind.named_in = module  # pyright: ignore[reportAttributeAccessIssue]
        return kind

    def _is_edited(self, reference: str) -> bool:
        """Return True if the file of a reference has changed since the reference was resolved."""
        path = Path(reference.rpartition(":")[0])
        return path.suffix == ".py" and path.is_file() and _module_name(path) != self._modules.get(reference)

    def name_of(self, instance: object) -> str:
        """Return the name of an instance's class, or the reference that resolved it."""
        kind = type(instance)
        reference: str | None = getattr(kind, "reference", None)
        if reference is not None:
            return reference
        for name, known in self._known.items():
            if known is kind or known == f"{kind.__module__}:{kind.__qualname__}":
                return name
        if kind in self._names:
            return self._names[kind]
        for name in self:
            if self[name] is kind:
                return name
        raise KeyError(f"{kind.__qualname__} is not a registered {self.kind}")

    def _fitting(self, found: object, where: str, name: str) -> type[T]:
        """Return an imported class as a dataclass of this kind."""
        if isinstance(found, type) and dataclasses.is_dataclass(found):
            missing = self._members - {*dir(found), *(field.name for field in dataclasses.fields(found))}
            if missing:
                remedy = f"Add them; built-in classes of this kind, such as {next(iter(self))!r}, have all of them"
                raise UserError(where, f"a {self.kind} with {', '.join(sorted(missing))}", repr(name), remedy)
            return cast(type[T], found)
        if self._wrap is not None:
            return cast(_Adapter[T], _imported(self._wrap, where, self._wrap)).of(found, where, name)
        remedy = f"Make it a class with @dataclass(frozen=True) and a field for each key of the {self.kind}"
        raise UserError(where, f"a dataclass that is a {self.kind}", repr(name), remedy)

    @property
    def _entry_points(self) -> Mapping[str, EntryPoint]:
        return {} if self.group is None else _installed(self.group)


def settings_of(
    base: type[T],
    called: Callable[..., object],
    where: str,
    *,
    given: Collection[str],
    reserved: Collection[str],
    optional: bool = False,
) -> type[T]:
    """Return a frozen dataclass with the parameters of a function or a class as fields, read as strictly as any.

    Args:
        base: The dataclass to derive it from; the function becomes its class attribute `called`, and those names of
            `given` that the function has become `asked`.
        called: The function or class. Its parameters need types or defaults.
        where: The key that names it, for errors.
        given: Parameters that the program itself passes, if the function has them.
        reserved: Keys of the table that have another meaning.
        optional: Take the type of the default if a config cannot hold the parameter's type, and skip the parameter if
            it cannot hold that either.

    Raises:
        UserError: If a parameter has a reserved name, no type, or a type that a TOML value cannot have.
    """
    signature = _signature(called, where)
    hints = _hints(called, where)
    fields: list[tuple[str, object, object]] = []
    for parameter in signature.parameters.values():
        name, default = parameter.name, parameter.default
        if name in given or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise UserError(where, "parameters that can be given by name", f"{name}, /", "Remove the slash")
        if name in reserved or name in _TAKEN or hasattr(base, name):
            table = where.partition(".")[0]
            raise UserError(where, f"parameters with other names than the keys of [{table}]", name, "Rename it")
        if default is parameter.empty:
            fields.append((name, _readable(_possible(hints.get(name)), name, where), dataclasses.field()))
            continue
        hint = hints.get(name) or (None if default is None else type(default))
        if optional and not _is_readable(hint):
            hint = _plain(hint, default)
            if hint is None:
                continue
        read = _readable(hint, name, where)
        read = read | None if default is None else read
        fields.append((name, read, _default(_as_read(read, default, name, where), name, where)))
    named = _named(called)
    made = dataclasses.make_dataclass(
        getattr(named, "__name__", base.__name__), fields, bases=(base,), frozen=True, kw_only=True
    )
    made.__module__ = named.__module__ or base.__module__
    made.called = staticmethod(called)
    made.asked = tuple(name for name in given if name in signature.parameters)
    return made


def _signature(called: Callable[..., object], where: str) -> inspect.Signature:
    try:
        return inspect.signature(called)
    except (TypeError, ValueError) as error:
        raise UserError(where, "a function or class with named parameters", str(error), "Wrap it in one") from None


def _named(called: Callable[..., object]) -> Callable[..., object]:
    """Return the function that a `functools.partial` calls; return anything else unchanged."""
    while isinstance(called, functools.partial):
        called = called.func
    return called


def _hints(called: Callable[..., object], where: str) -> dict[str, object]:
    try:
        return typing.get_type_hints(called.__init__ if isinstance(called, type) else _named(called))
    except (NameError, TypeError):
        return {}
    except Exception as error:
        remedy = "Write types such as int, float, str or bool"
        raise UserError(where, "parameters with types", _words(error), remedy) from None


def _as_read(hint: Any, default: object, name: str, where: str) -> object:
    """Return a default as a config holds it: 0 of a float is 0.0, so that the digest is that of a written value."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(hint).validate_python(default)
    except ValidationError:
        got = repr(default)[:60]
        raise UserError(
            where, f"a default of its parameter {name} that is {hint}", got, "Correct one of them"
        ) from None


def _default(value: object, name: str, where: str) -> object:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        remedy = "Use a whole number, a number, a text, true or false, or lists of them"
        got = f"a {type(value).__name__}"
        raise UserError(where, f"a default of its parameter {name} that a config can hold", got, remedy) from None
    if isinstance(value, list | dict | set):
        return dataclasses.field(default_factory=lambda: copy.copy(value))
    return dataclasses.field(default=value)


def _plain(hint: object, default: object) -> object:
    """Return the type of a default value that a config can hold; None if there is none."""
    if isinstance(default, tuple):
        parts = [_plain(hint, value) for value in default]
        return None if None in parts or not parts else tuple[tuple(parts)]
    if isinstance(default, int) and not isinstance(default, bool) and "float" in str(hint):
        return float
    return type(default) if isinstance(default, bool | int | float | str) else None


def _possible(hint: Any) -> Any:
    """Return a union without the types that a config cannot hold, if it can hold some of them."""
    if typing.get_origin(hint) not in (typing.Union, types.UnionType) or _is_readable(hint):
        return hint
    parts = [part for part in typing.get_args(hint) if part is not type(None) and _is_readable(part)]
    return functools.reduce(operator.or_, parts) if parts else hint


def _is_readable(hint: Any) -> bool:
    from pydantic import TypeAdapter
    from pydantic.errors import PydanticInvalidForJsonSchema, PydanticSchemaGenerationError

    try:
        TypeAdapter(hint).json_schema()
    except (PydanticSchemaGenerationError, PydanticInvalidForJsonSchema):
        return False
    return hint is not None


def _readable(hint: object, name: str, where: str) -> Any:
    if hint is None:
        raise UserError(
            where, f"a type for its parameter {name}", "a missing type", f"Write it as {name}: int, for instance"
        )
    if not _is_readable(hint):
        remedy = "Use int, float, str, bool or lists of them"
        raise UserError(where, f"a type for its parameter {name} that a config can hold", hint, remedy) from None
    return hint


def line_of(error: BaseException, source: Callable[..., object]) -> str:
    """Return an exception in one line, with the file and line in the user's code that raised it.

    Args:
        error: The exception.
        source: The user's function or class that was called.
    """
    text = _words(error)
    file = getattr(sys.modules.get(_named(source).__module__), "__file__", None)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == file]
    return f"{text} ({own[-1].filename}, line {own[-1].lineno})" if own else text


def own_frames(error: BaseException) -> list[traceback.FrameSummary]:
    """Return the frames of an exception from the first one in a file that a config names; empty if it met none."""
    files = {getattr(module, "__file__", None) for name, module in sys.modules.items() if name.startswith(_OF_FILE)}
    frames = traceback.extract_tb(error.__traceback__)
    first = next((place for place, frame in enumerate(frames) if frame.filename in files), None)
    return [] if first is None else frames[first:]


def _words(error: BaseException) -> str:
    """Return an exception's class and the first line of its message, if it has one that can be read."""
    try:
        reason = (str(error).splitlines() or [""])[0][:300]
    except Exception:
        reason = ""
    return f"{type(error).__name__}: {reason}" if reason else type(error).__name__


def source_of(kind: type) -> dict[str, str] | None:
    """Return the source of a class: its `module`, the package's `version` and the `sha256` of the module's file.

    Args:
        kind: A class of a registry; for one made by `settings_of`, its function's module counts. If the name
            leads through one module to a function of another, both count, the other as `called_module` and so on.

    Returns:
        None for classes of fedpriv. `sha256` is absent if the module has no file, and `version` if the file belongs
        to no package. Modules that it imports are not covered.
    """
    recorded: dict[str, str] | None = getattr(kind, "source", None)
    if recorded is not None:
        return recorded
    module = kind.__module__
    named_in: str = getattr(kind, "named_in", module)
    if named_in.partition(".")[0] == __package__:
        return None
    if named_in == module:
        return _source_of_module(module)
    called = _source_of_module(module)
    return _source_of_module(named_in) | {f"called_{part}": text for part, text in called.items()}


def _source_of_module(name: str) -> dict[str, str]:
    module = sys.modules.get(name)
    file = Path(getattr(module, "__file__", None) or "")
    if name.startswith(_OF_FILE):
        return {"module": file.name, "sha256": getattr(module, _SHA256)}
    version = _version(name.partition(".")[0])
    found = {"module": name} | ({} if version is None else {"version": version})
    return found | ({"sha256": hashlib.sha256(file.read_bytes()).hexdigest()} if file.is_file() else {})


@cache
def _version(package: str) -> str | None:
    names = packages_distributions().get(package)
    return version_of(names[0]) if names else None


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


def whole_reference(name: object, folder: Path) -> object:
    """Return a `"file.py:Class"` reference with the file's absolute path; return anything else unchanged.

    Args:
        name: A name, a reference, or any other value from a file.
        folder: The folder that relative paths start from.
    """
    if not is_reference(name):
        return name
    place, _, found = name.rpartition(":")
    return f"{(folder / place).resolve()}:{found}" if place.endswith(".py") else name


def bare_reference(name: object) -> object:
    """Return a `"folder/file.py:Class"` reference without its folder; return anything else unchanged."""
    if not is_reference(name):
        return name
    place, _, found = name.rpartition(":")
    return f"{Path(place).name}:{found}" if place.endswith(".py") else name


def modules_of_files() -> list[ModuleType]:
    """Return the modules that were loaded from files: another process cannot import them by their names."""
    return [module for name, module in sys.modules.items() if name.startswith(_OF_FILE)]


def _members(protocol: type | None) -> frozenset[str]:
    """Return the names of the members that a protocol requires."""
    found = () if protocol is None else (*vars(protocol), *protocol.__annotations__)
    return frozenset(name for name in found if not name.startswith("_"))


@cache
def _installed(group: str) -> Mapping[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=group)}


def _imported(reference: str, where: str, shown: str) -> object:
    place, _, name = reference.rpartition(":")
    if place == MEMORY:
        remedy = "Run the program that made it, or put the object into a file and name the file"
        raise UserError(where, "a class that can be imported", f"{shown!r}, an object of a Python program", remedy)
    if place.endswith(".py") and not Path(place).is_file():
        got = f"{shown!r}, and there is no such file"
        raise UserError(where, "a class that can be imported", got, "Correct the path, which begins at the config")
    try:
        module = _module_of_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        remedy = 'Write "package.module:Class" or "./file.py:Class", and see that the module can be imported'
        extra = None if not isinstance(error, ModuleNotFoundError) else extra_of(str(error.name).partition(".")[0])
        remedy = remedy if extra is None else f"Install it with pip install 'fedpriv[{extra}]'"
        raise UserError(where, "a class that can be imported", f"{shown!r} ({_words(error)})", remedy) from error
    found: object = module
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            got = f"{shown!r}, which the module does not have"
            raise UserError(where, "a class that can be imported", got, nearest(name, _offered(module))) from None
        except UserError:
            raise
        except Exception as error:  # a module may import its parts on first use
            got, remedy = f"{shown!r} ({_words(error)})", "Install the packages that it needs, or name another class"
            raise UserError(where, "a class that can be imported", got, remedy) from error
    return found


def _offered(module: ModuleType) -> list[str]:
    """Return the public names of a module's classes and functions, without those that it imports from elsewhere."""
    parts, package = vars(module), f"{module.__name__}."
    listed = parts.get("__all__")
    if isinstance(listed, list | tuple):
        return [name for name in listed if name not in parts or callable(parts[name])]  # some are imported on first use
    return [
        name
        for name, value in parts.items()
        if not name.startswith("_") and callable(value) and f"{getattr(value, '__module__', '')}.".startswith(package)
    ]


def _module_name(path: Path) -> str:
    """Return the name of the module of a file with its present content."""
    return f"{_OF_FILE}{hashlib.sha256(f'{path.resolve()} {_sha256(path)}'.encode()).hexdigest()[:16]}"


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _is_edited(reference: str) -> bool:
    """Return True if the file of a reference has changed since it was loaded."""
    path = Path(reference.rpartition(":")[0])
    return path.suffix == ".py" and path.is_file() and _module_name(path) not in sys.modules


def _module_of_file(path: Path) -> ModuleType:
    """Load a file as a module under a unique name, once per process unless its content changes."""
    path = path.resolve(strict=True)
    name = _module_name(path)
    if name not in sys.modules:
        content = path.read_bytes()
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        setattr(module, _SHA256, hashlib.sha256(content).hexdigest())
        sys.modules[name] = module
        try:
            # Compiled here, because cached bytecode of a file that was edited within a second may be of its old text.
            exec(compile(content, path, "exec"), module.__dict__)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]

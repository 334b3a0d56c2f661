"""A sweep: one experiment and the axes along which it varies, parsed strictly from one TOML file."""

import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

from fedpriv.checks import folder_name
from fedpriv.errors import UserError
from fedpriv.experiment.config import Config, parse_config, read_config_file, with_whole_paths
from fedpriv.experiment.schema import read_table, refuse_unknown
from fedpriv.plugins import whole_reference
from fedpriv.sweeps.stopping import StopRule, read_rule
from fedpriv.sweeps.tuning import Tuning
from fedpriv.tables import Table

__all__ = ["Axis", "Sweep", "Trial", "load_sweep"]

# More trials than any real sweep.
MAX_TRIALS = 100_000
_ABSENT = object()

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Axis:
    """The values of one config key, or of several keys together.

    Args:
        key: `table.key`, to any depth, a whole `table`, or a list of these for values that belong together.
        values: One per trial along the axis; with several keys, lists of that length.
        first: Start of a range (`from` in the file).
        to: End of the range.
        count: Number of values. They are whole numbers if both ends and all values are.
        scale: Spacing of the range: `linear` or `log`.
        when: Use the axis only if these keys have this value, or one of these values; otherwise it changes nothing. The
            value "" stands for a key that the trial does not have.
    """

    key: str | tuple[str, ...]
    values: tuple[Any, ...] = ()
    first: int | float | None = None
    to: int | float | None = None
    count: int | None = None
    scale: Literal["linear", "log"] = "linear"
    when: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ranged = (self.first, self.to, self.count)
        if not self.values and all(part is None for part in ranged):
            expected, remedy = "values, or from, to and count", "Write values = [...] with at least one value"
            raise UserError(f"axis {self.name}", expected, "an empty list", remedy)
        if bool(self.values) == any(part is not None for part in ranged) or (not self.values and None in ranged):
            raise UserError(
                f"axis {self.name}", "values, or from, to and count", "a part of them, or both", "Set one of the two"
            )
        if not self.values:
            self._check_range()
        elif len(self.keys) > 1 and not all(isinstance(v, list) and len(v) == len(self.keys) for v in self.values):
            raise UserError(
                f"axis {self.name}",
                f"lists of {len(self.keys)} values",
                repr(self.values)[:100],
                "List one value for each key",
            )

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of the axis."""
        return (self.key,) if isinstance(self.key, str) else tuple(self.key)

    @property
    def name(self) -> str:
        """The name in messages."""
        return "+".join(self.keys)

    def changes(self) -> list[dict[str, object]]:
        """Return the changes of each trial along the axis."""
        values = self.values or self._range()
        rows = (value if len(self.keys) > 1 and isinstance(value, list) else [value] for value in values)
        return [dict(zip(self.keys, row, strict=True)) for row in rows]

    def holds(self, tables: Table) -> bool:
        """Return True if the axis applies to these tables."""
        wanted = {key: value if isinstance(value, list) else [value] for key, value in self.when.items()}
        found = {key: _get(tables, key) for key in wanted}
        return all(("" if found[key] is _ABSENT else found[key]) in accepted for key, accepted in wanted.items())

    def _check_range(self) -> None:
        assert self.first is not None
        assert self.to is not None
        assert self.count is not None
        if len(self.keys) > 1 or not 1 <= self.count <= MAX_TRIALS:
            expected = f"one key and a count from 1 to {MAX_TRIALS:,}"
            raise UserError(
                f"axis {self.name}", expected, f"{len(self.keys)} and {self.count:,}", "Set values for several keys"
            )
        if not (math.isfinite(self.first) and math.isfinite(self.to)):
            raise UserError(
                f"axis {self.name}", "finite ends", f"{self.first} and {self.to}", "Set finite values of from and to"
            )
        if self.scale == "log" and not (self.first > 0.0 and self.to > 0.0):
            raise UserError(
                f"axis {self.name}", "ends above 0 on a log scale", f"{self.first}, {self.to}", "Raise them above 0"
            )

    def _range(self) -> Sequence[int | float]:
        assert self.first is not None
        assert self.to is not None
        assert self.count is not None
        log = self.scale == "log"
        a, b = (math.log(self.first), math.log(self.to)) if log else (self.first, self.to)
        points = [a + (b - a) * i / max(self.count - 1, 1) for i in range(self.count)]
        # Twelve digits, to get 0.1 and not 0.10000000000000002.
        found = [float(f"{math.exp(x) if log else x:.12g}") for x in points]
        whole = isinstance(self.first, int) and isinstance(self.to, int) and all(x.is_integer() for x in found)
        return [int(x) for x in found] if whole else found


@dataclass(frozen=True)
class Trial:
    """One experiment of a sweep.

    Args:
        changes: The changed values, by `table.key`.
        tables: The tables of the trial's config.
    """

    changes: dict[str, object]
    tables: dict[str, object]

    @cached_property
    def config(self) -> Config:
        """The trial's config; raises UserError if the changes are invalid."""
        return parse_config(self.tables)

    @property
    def name(self) -> str:
        """The name of its folder; equal experiments have equal names."""
        return self.config.digest[:12]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The contents of a sweep's file.

    Args:
        name: The sweep's name.
        base: The tables that the trials change.
        axes: The axes, the outermost first.
        stop: The rule that stops trials early; None runs all to their end.
        tuning: Draw trials from the grid, and release only the best; None runs the whole grid.
        folder: The folder of a class's file (`"./own.py:Class"`); the working directory by default.
    """

    name: str
    base: dict[str, object]
    axes: tuple[Axis, ...]
    stop: StopRule | None = None
    tuning: Tuning | None = None
    folder: Path = Path()

    def trials(self) -> list[Trial]:
        """Return all trials; the last axis varies fastest.

        Raises:
            UserError: If there are too many, an axis overwrites another, or one depends on a key that no trial has.
        """
        found = list(itertools.islice(self._along({}, self.base, self.axes), MAX_TRIALS + 1))
        if len(found) > MAX_TRIALS:
            raise UserError("axes", f"at most {MAX_TRIALS:,} trials", "a longer list", "List fewer values")
        for where, key in ((axis.name, key) for axis in self.axes for key in axis.when):
            if all(_get(trial.tables, key) is _ABSENT for trial in found):
                raise UserError(f"axis {where}.when", "a key of some trial", key, "Correct the key, or set it")
        return found

    def drawn(self, place: int, draw: int, grid: Sequence[Trial]) -> Trial:
        """Return a tuning's trial with the settings at a place of the grid, with separate noise and cohorts."""
        change = {"privacy.draw": draw}
        return Trial({**grid[place].changes, **change}, _changed(grid[place].tables, change))

    def _along(self, changes: dict[str, object], tables: dict[str, object], axes: Sequence[Axis]) -> Iterator[Trial]:
        if not axes:
            yield Trial(changes, with_whole_paths(tables, self.folder))
        elif not axes[0].holds(tables):
            yield from self._along(changes, tables, axes[1:])
        else:
            _refuse_overwriting(axes[0], changes)
            for change in axes[0].changes():
                yield from self._along({**changes, **change}, _changed(tables, change), axes[1:])


def load_sweep(path: Path | str) -> Sweep:
    """Load a sweep's TOML file.

    Keys: `name`; `base`, the config's file, relative to this one; `[set]`, changes for all trials, merged key by key;
    `seeds`, the number of seeds from the base's on, or a list of seeds, as the last axis; `[[axis]]`, see `Axis`;
    `[stop]`, see `stopping.RULES`; `[tuning]`, see `Tuning`.

    Raises:
        UserError: If the file is not a valid sweep.
    """
    path = Path(path)
    tables = {key: _with_whole_references(value, path.parent) for key, value in read_config_file(path).items()}
    if "base" not in tables and "data" in tables:
        asks = "analysis" in tables
        got = "an analysis" if asks else "an experiment"
        raise UserError(str(path), "a sweep", got, f"Use fedpriv {'analyze' if asks else 'run'}")
    refuse_unknown(tables, ["name", "base", "set", "seeds", "axis", "stop", "tuning"], "")
    name, base_file = (_text(tables, *key, path) for key in (("name", "my-sweep"), ("base", "../quickstart.toml")))
    folder_name("name", name)
    changes = _part(tables, "set", dict, "a table", path)
    listed = _part(tables, "axis", list, "tables [[axis]]", path)
    stopping, tuned = (_part(tables, key, dict, "a table", path) for key in ("stop", "tuning"))
    base = _changed(read_config_file(path.parent / base_file), _leaves(changes))
    axes = [_read_axis(number, table) for number, table in enumerate(listed, 1)]
    if "seeds" in tables:
        axes.append(Axis(key="seed", values=_seeds(tables["seeds"], base.get("seed"))))
    stop = read_rule(stopping) if "stop" in tables else None
    tuning = read_table(Tuning, tuned, "tuning") if "tuning" in tables else None
    return Sweep(name=name, base=base, axes=tuple(axes), stop=stop, tuning=tuning, folder=path.parent)


def _text(tables: Table, key: str, example: str, path: Path) -> str:
    value = tables.get(key)
    if not isinstance(value, str):
        raise UserError(key, f'a string such as "{example}"', repr(value), f"Add {key} to {path}")
    return value


def _part(tables: Table, key: str, kind: type[T], words: str, path: Path) -> T:
    value = tables.get(key, kind())
    if not isinstance(value, kind):
        raise UserError(key, words, repr(value), f"Fix {path}")
    return value


def _with_whole_references(value: object, folder: Path) -> object:
    """Return a value of a sweep's file with the file of every `"./file.py:Class"` as an absolute path."""
    if isinstance(value, dict):
        return {key: _with_whole_references(inner, folder) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_whole_references(inner, folder) for inner in value]
    return whole_reference(value, folder)


def _seeds(given: object, first: object) -> tuple[int, ...]:
    if type(given) is int and given >= 1 and type(first) is int:
        return tuple(range(first, first + min(given, MAX_TRIALS + 1)))
    if isinstance(given, list) and given and all(type(seed) is int for seed in given):
        return tuple(given)
    expected = "a number of seeds, or a list of seeds"
    raise UserError("seeds", expected, repr(given), "Write for example seeds = 5, or seeds = [1, 2, 3]")


def _read_axis(number: int, table: object) -> Axis:
    if not isinstance(table, dict):
        raise UserError(f"axis {number}", "a table", repr(table), "Write [[axis]], and its keys below it")
    options = dict(table)
    if "from" in options:
        options["first"] = options.pop("from")
    return read_table(Axis, options, f"axis {number}")


def _refuse_overwriting(axis: Axis, changes: Table) -> None:
    """Raise UserError for an axis that overwrites an earlier one; changing a part of an earlier value is allowed."""
    for key in axis.keys:
        lost = [earlier for earlier in changes if earlier == key or earlier.startswith(f"{key}.")]
        if lost:
            remedy = "Put the wider axis first, or change the `when` of one of the two"
            raise UserError(
                f"axis {axis.name}", f"keys that leave {lost[0]} as it is", "an axis that overwrites it", remedy
            )


def _leaves(tables: Table, above: str = "") -> dict[str, object]:
    """Flatten tables to keys by address: TOML reads `training.rounds = 9` and [training] rounds = 9 alike."""
    found: dict[str, object] = {}
    for key, value in tables.items():
        found |= _leaves(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": value}
    return found


def _changed(tables: Table, changes: Table) -> dict[str, object]:
    """Return a copy of `tables` with each `table.key`, or each whole table, replaced, or removed if the value is ""."""
    made = copy.deepcopy(dict(tables))
    for address, value in changes.items():
        *path, last = address.split(".")
        place = made
        for depth, part in enumerate(path, 1):
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                above = ".".join(path[:depth])
                raise UserError(address, "a table", f"the key {above}", f"Write {above} instead")
        if value == "":
            place.pop(last, None)
        else:
            place[last] = copy.deepcopy(value)
    return made


def _get(tables: Table, address: str) -> object:
    found: object = tables
    for part in address.split("."):
        found = found.get(part, _ABSENT) if isinstance(found, dict) else _ABSENT
    return found

"""A sweep: one experiment and the axes along which it is changed, read strictly from one TOML file."""

import copy
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from fedpriv.errors import UserError
from fedpriv.experiment.config import Config, parse_config, read_config_file
from fedpriv.experiment.schema import read_table, refuse_unknown
from fedpriv.sweeps.stopping import StopRule, read_rule
from fedpriv.sweeps.tuning import Tuning

__all__ = ["Axis", "Sweep", "Trial", "load_sweep"]

# More trials than anybody means to run.
MAX_TRIALS = 100_000
_ABSENT = object()


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Values that one place of the config takes, or several places together.

    Args:
        key: `table.key`, to any depth, a whole `table`, or a list of such for values that go together.
        values: One for each trial along the axis; lists of as many as there are keys.
        first: Where a range begins (`from` in the file).
        to: Where it ends.
        count: How many values it has. They are whole if both ends are and all values come out so.
        scale: How they lie between: `linear` or `log`.
        when: The axis is there only where these keys have this value, or one of these; elsewhere it changes nothing.
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
        if bool(self.values) == any(part is not None for part in ranged) or (not self.values and None in ranged):
            raise UserError(
                f"axis {self.name}", "values, or from, to and count", "another choice", "Give one of the two"
            )
        if not self.values:
            self._check_range()
        elif len(self.keys) > 1 and not all(isinstance(v, list) and len(v) == len(self.keys) for v in self.values):
            raise UserError(
                f"axis {self.name}", f"lists of {len(self.keys)} values", "others", "One value for each key"
            )

    @property
    def keys(self) -> tuple[str, ...]:
        """The places."""
        return (self.key,) if isinstance(self.key, str) else tuple(self.key)

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return "+".join(self.keys)

    def changes(self) -> list[dict[str, Any]]:
        """What each trial along the axis changes."""
        values: Sequence[Any] = self.values or self._range()
        rows: list[Any] = list(values) if len(self.keys) > 1 else [[value] for value in values]
        return [dict(zip(self.keys, row, strict=True)) for row in rows]

    def holds(self, tables: Mapping[str, Any]) -> bool:
        """Whether the axis is there."""
        wanted = {key: value if isinstance(value, list) else [value] for key, value in self.when.items()}
        return all(_get(tables, key) in accepted for key, accepted in wanted.items())

    def _check_range(self) -> None:
        assert self.first is not None
        assert self.to is not None
        assert self.count is not None
        if len(self.keys) > 1 or not 1 <= self.count <= MAX_TRIALS:
            expected = f"one key and a count from 1 to {MAX_TRIALS:,}"
            raise UserError(f"axis {self.name}", expected, "others", "Give values for several keys")
        if not (math.isfinite(self.first) and math.isfinite(self.to)):
            raise UserError(f"axis {self.name}", "finite ends", f"{self.first} and {self.to}", "Mend the range")
        if self.scale == "log" and not (self.first > 0.0 and self.to > 0.0):
            raise UserError(f"axis {self.name}", "ends above 0 on a log scale", f"{self.first}, {self.to}", "Mend it")

    def _range(self) -> Sequence[int | float]:
        assert self.first is not None
        assert self.to is not None
        assert self.count is not None
        log = self.scale == "log"
        a, b = (math.log(self.first), math.log(self.to)) if log else (self.first, self.to)
        points = [a + (b - a) * i / max(self.count - 1, 1) for i in range(self.count)]
        # Twelve digits: 0.1 and not 0.10000000000000002.
        found = [float(f"{math.exp(x) if log else x:.12g}") for x in points]
        whole = isinstance(self.first, int) and isinstance(self.to, int) and all(x.is_integer() for x in found)
        return [int(x) for x in found] if whole else found


@dataclass(frozen=True)
class Trial:
    """One experiment of a sweep.

    Args:
        changes: What it changes, by `table.key`.
        tables: The experiment's tables.
    """

    changes: dict[str, Any]
    tables: dict[str, Any]

    @cached_property
    def config(self) -> Config:
        """The experiment; a `UserError` if the changes do not make one."""
        return parse_config(self.tables)

    @property
    def name(self) -> str:
        """Its folder: equal experiments have equal names."""
        return self.config.digest[:12]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What is run.

    Args:
        name: What the sweep is called.
        base: The tables that all trials change.
        axes: How, the outermost first.
        stop: Which trials are not run to their end; None runs all.
        tuning: How trials are drawn from the grid, of which the best alone is released; None runs the whole grid.
    """

    name: str
    base: dict[str, Any]
    axes: tuple[Axis, ...]
    stop: StopRule | None = None
    tuning: Tuning | None = None

    def trials(self) -> list[Trial]:
        """All trials, the last axis fastest.

        Raises:
            UserError: If there are too many, an axis overwrites another, or one waits for a key that no trial has.
        """
        found = list(itertools.islice(self._along({}, self.base, self.axes), MAX_TRIALS + 1))
        if len(found) > MAX_TRIALS:
            raise UserError("axes", f"at most {MAX_TRIALS:,} trials", "more", "Give fewer values")
        for where, key in ((axis.name, key) for axis in self.axes for key in axis.when):
            if all(_get(trial.tables, key) is _ABSENT for trial in found):
                raise UserError(f"axis {where}.when", "a key of some trial", key, "Mend it, or set the key")
        return found

    def drawn(self, place: int, draw: int, grid: Sequence[Trial]) -> Trial:
        """The trial of a tuning that has the settings at a place of the grid, with noise and cohorts of its own."""
        change = {"privacy.draw": draw}
        return Trial({**grid[place].changes, **change}, _changed(grid[place].tables, change))

    def _along(self, changes: dict[str, Any], tables: dict[str, Any], axes: Sequence[Axis]) -> Iterator[Trial]:
        if not axes:
            yield Trial(changes, tables)
        elif not axes[0].holds(tables):
            yield from self._along(changes, tables, axes[1:])
        else:
            _refuse_overwriting(axes[0], changes)
            for change in axes[0].changes():
                yield from self._along({**changes, **change}, _changed(tables, change), axes[1:])


def load_sweep(path: Path | str) -> Sweep:
    """Reads a sweep's TOML file.

    Keys: `name`; `base`, the config's file, seen from this one; `[set]`, changes for all trials, a table's keys one by
    one; `seeds`, how many seeds from the base's on, or which, as the last axis; `[[axis]]`, see `Axis`; `[stop]`, see
    `stopping.RULES`; `[tuning]`, see `Tuning`.

    Raises:
        UserError: On anything that is not a sweep.
    """
    path = Path(path)
    tables = read_config_file(path)
    refuse_unknown(tables, ["name", "base", "set", "seeds", "axis", "stop", "tuning"], "")
    for key, kind, example in (("name", str, '"my-sweep"'), ("base", str, '"../quickstart.toml"')):
        if not isinstance(tables.get(key), kind):
            raise UserError(key, f"a text such as {example}", repr(tables.get(key, "nothing")), f"Add {key} to {path}")
    if tables["name"] in ("", ".", "..") or any(c in tables["name"] for c in "/\\\0\n"):
        raise UserError("name", "a short name that can be a folder's", repr(tables["name"]), "Change the name")
    for key in ("set", "axis", "stop", "tuning"):
        kind, words = (list, "tables [[axis]]") if key == "axis" else (dict, "a table")
        if not isinstance(tables.get(key, kind()), kind):
            raise UserError(key, words, repr(tables[key]), f"Mend {path}")
    base = _changed(read_config_file(path.parent / tables["base"]), _leaves(tables.get("set", {})))
    axes = [_read_axis(number, table) for number, table in enumerate(tables.get("axis", []), 1)]
    if "seeds" in tables:
        axes.append(Axis(key="seed", values=_seeds(tables["seeds"], base.get("seed"))))
    stop = read_rule(tables["stop"]) if "stop" in tables else None
    tuning = read_table(Tuning, tables["tuning"], "tuning") if "tuning" in tables else None
    return Sweep(name=tables["name"], base=base, axes=tuple(axes), stop=stop, tuning=tuning)


def _seeds(given: Any, first: Any) -> tuple[int, ...]:
    if type(given) is int and given >= 1 and type(first) is int:
        return tuple(range(first, first + min(given, MAX_TRIALS + 1)))
    if isinstance(given, list) and given and all(type(seed) is int for seed in given):
        return tuple(given)
    expected = "how many, from the base's seed on, or a list of seeds"
    raise UserError("seeds", expected, repr(given), "For example seeds = 5, or seeds = [1, 2, 3]")


def _read_axis(number: int, table: Any) -> Axis:
    if not isinstance(table, dict):
        raise UserError(f"axis {number}", "a table", repr(table), "Write [[axis]] and its keys below")
    options = dict(table)
    if "from" in options:
        options["first"] = options.pop("from")
    return read_table(Axis, options, f"axis {number}")


def _refuse_overwriting(axis: Axis, changes: Mapping[str, Any]) -> None:
    """A later axis may change a part of what an earlier one put in, and not the other way round."""
    for key in axis.keys:
        lost = [earlier for earlier in changes if earlier == key or earlier.startswith(f"{key}.")]
        if lost:
            remedy = "Put the wider axis first, or give one of the two another when"
            raise UserError(f"axis {axis.name}", f"a place that keeps {lost[0]}", "an axis that overwrites it", remedy)


def _leaves(tables: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """The keys of tables by address: TOML reads `training.rounds = 9` and [training] rounds = 9 alike."""
    found: dict[str, Any] = {}
    for key, value in tables.items():
        found |= _leaves(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": value}
    return found


def _changed(tables: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `tables` with each `table.key`, or each whole table, put in."""
    made = copy.deepcopy(dict(tables))
    for address, value in changes.items():
        *path, last = address.split(".")
        place = made
        for depth, part in enumerate(path, 1):
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                above = ".".join(path[:depth])
                raise UserError(address, "a table", f"the key {above}", f"Use {above}")
        place[last] = copy.deepcopy(value)
    return made


def _get(tables: Mapping[str, Any], address: str) -> Any:
    found: Any = tables
    for part in address.split("."):
        found = found.get(part, _ABSENT) if isinstance(found, dict) else _ABSENT
    return found

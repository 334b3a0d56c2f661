"""The table `[analysis]`: becomes an ordinary experiment, a linear loss with one step on it."""

from collections.abc import Mapping
from typing import cast

from fedpriv.analytics.heavy.tree import HeavyHitters
from fedpriv.analytics.queries import KINDS, Categories, Column, Count, Moments, Query, missing_place, read_query
from fedpriv.analytics.statistics import Statistics
from fedpriv.checks import folder_name, positive_int
from fedpriv.data.dataset import Declared
from fedpriv.errors import UserError, nearest
from fedpriv.experiment.schema import field_names, read_table, refuse_unknown, write_table
from fedpriv.tables import Table

__all__ = ["as_experiment", "columns_of"]

# Tables that decide about a training, and keys of [privacy] that an analysis sets.
_SET = ("model", "task", "local", "method", "server", "adaptive", "training", "evaluation", "augment", "noise")
_SET += ("controller", "devices", "schedule")
_OWN = ("label_kind", "records")
_SET_BY_DATA = ("shift", "scale", "shifts", "scales", "names", "counted", "of_label")
_PRIVACY = ("example_clip", "example_normalization", "examples", "metrics_share", "metrics_max_loss")


def as_experiment(tables: Table, declared: Declared) -> dict[str, object]:
    """Return the tables of the experiment that answers `[analysis]`; every other table is unchanged.

    Args:
        tables: A config with the table `[analysis]`: a table for each query, named as its answer, and the keys
            `label_kind` (the kind of the data set's labels) and `records`. With `records = M`, a client's vector is
            the sum over its records divided by M, shortened to norm 1; otherwise it is the mean over its records, and
            every client counts as one.
        declared: The constants of the data set, for names of columns and raw units.

    Raises:
        UserError: If a query is invalid, or a table does not go with an analysis.
    """
    for name in _SET:
        if name in tables:
            raise UserError(f"[{name}]", "no such table beside [analysis]", "a table", f"Remove [{name}]")
    given = tables["analysis"]
    if not isinstance(given, Mapping):
        raise UserError("analysis", "a table", repr(given), "Write [analysis.NAME] for each query")
    records = given.get("records")
    if records is not None:
        positive_int("analysis.records", records, "Give a public number: how many records a client has at most")
    asked = _read_queries({name: table for name, table in given.items() if name not in _OWN})
    queries = [_resolved(query, declared, counted=_counts(tables, records)) for query in asked]
    for query in queries:
        if isinstance(query, Count) and records is None:
            remedy = "Set analysis.records, the most records of a client that count"
            raise UserError(query.key("kind"), "analysis.records with a count", "an absent key", remedy)
    model = Statistics(queries=[{"kind": query.kind, **write_table(query)} for query in queries], records=records)
    kind = str(given.get("label_kind", "classes"))
    if kind != "classes" and any(query.kind == "labels" for query in queries):
        raise UserError("analysis.label_kind", '"classes" with a histogram of labels', repr(kind), "Remove that query")
    of_label = [{"kind": query.kind, **write_table(query)} for query in queries if query.of_label]
    kept = {name: table for name, table in tables.items() if name != "analysis"}
    if "privacy" in kept:
        kept["privacy"] = _privacy(kept["privacy"], records)
    example = isinstance(kept.get("privacy"), Mapping) and cast(Table, kept["privacy"]).get("unit") == "example"
    summed = records is not None and not example
    return {
        **kept,
        "model": {"name": "statistics", **write_table(model)},
        "task": {"name": "statistics", "labels": kind, **({"queries": of_label} if of_label else {})},
        "local": {"work": "record-sum", "records": records} if summed else {"work": "full-gradient"},
        "method": {"name": "dp-gd", "max_norm": 1.0, "server_lr": 1.0},
        "training": {"rounds": 1, "evaluate_every": 1},
    }


def columns_of(declared: Declared) -> tuple[dict[str, Column], dict[str, tuple[int, int]]]:
    """Return the declared columns of numbers; and for each column of categories, the first place and the number.

    Columns of arrays with declared constants have their places as names.
    """
    if declared.columns is None:
        size = max(len(declared.mean), len(declared.std))
        mean, std = declared.mean or (0.0,) * size, declared.std or (1.0,) * size
        return {str(place): Column(place, mean[place], std[place]) for place in range(size)}, {}
    numeric = cast(Mapping[str, tuple[float, float]], declared.columns["numeric"])
    listed = cast(Mapping[str, list[str]], declared.columns["categories"])
    numbers = {name: Column(place, *numeric[name]) for place, name in enumerate(numeric)}
    categories, place = dict[str, tuple[int, int]](), len(numbers)
    for name, values in listed.items():
        categories[name] = (place, len(values))
        place += len(values)
    return numbers, categories


def _counts(tables: Table, records: object) -> bool:
    """Return True if a moment is a ratio of sums: the number that it is divided by is then not known."""
    cohort = tables.get("cohort")
    everyone = not isinstance(cohort, Mapping) or cohort.get("sampling", "everyone") == "everyone"
    return records is not None or not everyone


def _read_queries(tables: Table) -> list[Query]:
    if not tables:
        remedy = 'Add a query, for example [analysis.labels] with kind = "labels"'
        raise UserError("[analysis]", "at least one query", "an empty table", remedy)
    found: list[Query] = []
    for name, table in tables.items():
        folder_name("analysis", name)
        where = f"analysis.{name}"
        if not isinstance(table, Mapping):
            remedy = f"Write [{where}] and its keys below; other keys are {' and '.join(_OWN)}"
            raise UserError(where, "a table with a query", repr(table), remedy)
        options = dict(table)
        kind = options.pop("kind", None)
        if kind == HeavyHitters.kind:
            remedy = "Use fedpriv analyze or fedpriv privacy"
            expected = "a kind that one round answers"
            raise UserError(f"{where}.kind", expected, f"{kind!r}, which takes several", remedy)
        if not isinstance(kind, str) or kind not in KINDS:
            got = "a missing key" if kind is None else repr(kind)
            known = (*KINDS, HeavyHitters.kind)
            raise UserError(f"{where}.kind", f"one of {', '.join(known)}", got, nearest(str(kind), known))
        for key in _SET_BY_DATA:
            if key in options:
                raise UserError(f"{where}.{key}", "no such key", repr(options[key]), "Remove it: the data set sets it")
        refuse_unknown(options, field_names(KINDS[kind], ("name", *_SET_BY_DATA)), where)
        if KINDS[kind] is Categories and "column" not in options and "categories" not in options:
            remedy = f"Add column to [{where}]"
            raise UserError(f"{where}.column", "the name of a column of data.categories", "a missing key", remedy)
        found.append(read_table(KINDS[kind], options, where, name=name))
    return found


def _resolved(query: Query, declared: Declared, *, counted: bool) -> Query:
    columns, categories = columns_of(declared)
    resolve = getattr(query, "resolved", None)
    found: Query = query if resolve is None else resolve(columns, categories)
    if found.of_label:
        return _counted(found, counted=counted)
    _refuse_places(found, None if declared.columns is None else len(columns) + sum(n for _, n in categories.values()))
    return _counted(found, counted=counted)


def _counted(query: Query, *, counted: bool) -> Query:
    if isinstance(query, Moments) and counted:
        return read_query({"kind": query.kind, **write_table(query), "counted": True})
    return query


def _refuse_places(query: Query, inputs: int | None) -> None:
    """Raise UserError for a place beyond the inputs of a table; of other data, the number is known once they load."""
    if inputs is None:
        return
    for key in ("column", "columns"):
        asked = getattr(query, key, ())
        last = max(map(int, asked if isinstance(asked, tuple) else (asked,)), default=0)
        last += max((getattr(query, "categories", None) or 1) - 1, 0)
        if last >= inputs:
            raise missing_place(query.key(key), last, inputs)


def _privacy(given: object, records: object) -> object:
    """Return the table `[privacy]` with the bounds of an analysis."""
    if not isinstance(given, Mapping):
        return given
    for key in _PRIVACY:
        if key in given:
            remedy = "Remove it; analysis.records is the number of records" if key == "examples" else "Remove it"
            raise UserError(f"privacy.{key}", "no such key beside [analysis], which sets it", given[key], remedy)
    if given.get("unit", "client") != "example":
        return given
    return {**given, "example_clip": 1.0, **({} if records is None else {"examples": records})}

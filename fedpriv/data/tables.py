"""Data in memory: pandas data frames, Hugging Face `datasets`, and lists with the examples of each client."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from fedpriv.checks import shown
from fedpriv.errors import UserError, nearest

__all__ = ["Columns", "arrays_of", "is_table"]

_SPLITS = ("train", "test")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns of a table, by name.

    Args:
        label: The column of the labels: whole numbers from 0, a pandas category or a `ClassLabel`.
        client: The column of clients' ids; None if there are no natural clients.
        inputs: The columns of the inputs, or one column with arrays or images; None for all other columns.
    """

    label: str | None = None
    client: str | None = None
    inputs: str | Sequence[str] | None = None


def is_table(data: object) -> bool:
    """Return True for a pandas data frame or a Hugging Face data set; imports neither package."""
    return hasattr(data, "column_names") or (hasattr(data, "columns") and hasattr(data, "iloc"))


class _Read(NamedTuple):
    """The arrays of a table, the number of its labels if that is known, and the names of its inputs."""

    inputs: np.ndarray
    labels: np.ndarray
    names: list[str]
    classes: int | None = None
    client_ids: np.ndarray | None = None
    clients: np.ndarray | None = None

    @property
    def arrays(self) -> dict[str, object]:
        """The arrays for `fedpriv.data.own.dataset_of`."""
        return {key: value for key, value in self._asdict().items() if key != "names" and value is not None}


def arrays_of(data: object, columns: Columns) -> Mapping[str, object]:
    """Return the arrays of data in memory, for `fedpriv.data.own.dataset_of`.

    Args:
        data: A table; or a list with the examples of each client: a table, a pair of arrays `(inputs, labels)` or a
            torch `Dataset` of such pairs; or a mapping with one of these as `train` and public test examples as `test`,
            which are one table, pair or `Dataset`. A mapping of arrays is returned unchanged.
        columns: The columns of the tables.

    Raises:
        UserError: If a column is missing, or the data are of another kind.
    """
    if isinstance(data, Mapping) and data and (_SPLITS[0] in data or all(is_table(part) for part in data.values())):
        for name in data:
            if name not in _SPLITS:
                raise UserError("data", "parts 'train' and 'test'", repr(name), nearest(str(name), _SPLITS))
        if "train" not in data:
            raise UserError("data", "a part 'train'", ", ".join(map(repr, data)), "Add the examples to train on")
        if not is_table(data["train"]):
            return {**arrays_of(data["train"], columns), **_tests(data.get("test"), columns)}
        made = _of_table(data["train"], columns)
        if "test" in data:
            tests = _of_table(data["test"], Columns(label=columns.label, inputs=made.names))
            return {**made.arrays, "test_inputs": tests.inputs, "test_labels": tests.labels}
        return made.arrays
    if is_table(data):
        return _of_table(data, columns).arrays
    if columns != Columns() and not _has_tables(data):
        name = next(key for key, value in vars(columns).items() if value is not None)
        raise UserError(name, "no value, because the data are no table", repr(getattr(columns, name)), f"Remove {name}")
    return data if isinstance(data, Mapping) else _of_clients(data, columns)


def _tests(test: object, columns: Columns) -> dict[str, object]:
    """Return public test examples beside a list of clients: a table, a pair of arrays or a torch `Dataset`."""
    if test is None:
        return {}
    if is_table(test):
        table = _of_table(test, Columns(label=columns.label, inputs=columns.inputs))
        return {"test_inputs": table.inputs, "test_labels": table.labels}
    inputs, labels = _pair(test, "data['test']")
    return {"test_inputs": inputs, "test_labels": labels}


def _has_tables(data: object) -> bool:
    return isinstance(data, Sequence) and any(is_table(part) for part in data)


def _of_table(table: Any, columns: Columns) -> _Read:
    """Return the arrays of a table."""
    known = [str(name) for name in (table.column_names if hasattr(table, "column_names") else table.columns)]
    if columns.label is None:
        remedy = "Name the column, as in Experiment(..., label='disease')"
        raise UserError("label", f"one of the columns {', '.join(known)}"[:200], "a call without label", remedy)
    chosen = [columns.inputs] if isinstance(columns.inputs, str) else columns.inputs
    if chosen is not None and not (isinstance(chosen, Sequence) and all(isinstance(name, str) for name in chosen)):
        raise UserError("inputs", "a list of names of columns", shown(chosen), "Name the columns to learn from")
    if chosen is None:
        chosen = [name for name in known if name not in (columns.label, columns.client)]
    named = {"label": [columns.label], "client": [columns.client], "inputs": chosen}
    for key, names in named.items():
        for name in names:
            if name is not None and name not in known:
                raise UserError(key, "a column of the data", repr(name), nearest(str(name), known))
    labels, classes = _categories(table, columns.label)
    made = _Read(_inputs(table, chosen), labels, list(chosen), None if classes is None else max(len(classes), 2))
    if columns.client is None:
        return made
    ids, everyone = _categories(table, columns.client)
    clients = np.arange(len(everyone)) if everyone is not None and hasattr(table, "iloc") else None
    return made._replace(client_ids=ids, clients=clients)


def _categories(table: Any, name: str) -> tuple[np.ndarray, list[str] | None]:
    """Return a column as numbers, and the names that these stand for; None if it is no column of categories."""
    if hasattr(table, "iloc"):
        column = table[name]
        known = getattr(column.dtype, "categories", None)
        if known is None:
            return column.to_numpy(), None
        if column.isna().any():
            row = int(column.isna().to_numpy().argmax())
            raise UserError(f"column {name!r}", "a category", f"a missing value in row {row}", "Remove such rows")
        return column.cat.codes.to_numpy().astype(np.int64), [str(category) for category in known]
    return np.asarray(table.with_format("numpy")[name][:]), getattr(table.features[name], "names", None)


def _inputs(table: Any, names: Sequence[str]) -> np.ndarray:
    """Return the inputs, float32 `[rows, *shape]`: one column as it is, several side by side.

    Raises:
        UserError: If there is no column, or one holds something other than finite numbers.
    """
    if not names:
        raise UserError("inputs", "at least one column", "0 columns", "Name the columns to learn from")
    parts = [_numbers(table, name) for name in names]
    if len(parts) == 1 and parts[0].ndim > 1:
        return parts[0]
    return np.concatenate([_flat(part) for part in parts], axis=1)


def _flat(rows: np.ndarray) -> np.ndarray:
    """Return one vector per row; there may be no rows."""
    return rows.reshape(len(rows), math.prod(rows.shape[1:]))


def _numbers(table: Any, name: str) -> np.ndarray:
    if type(getattr(table, "features", {}).get(name)).__name__ == "Image":
        return _images(table, name)
    column = table[name].to_numpy() if hasattr(table, "iloc") else np.asarray(table.with_format("numpy")[name][:])
    if column.dtype.kind == "O" and len(column) == 0:
        return column.astype(np.float32)
    if column.dtype.kind == "O":
        try:  # such as a column of lists, or of numbers that may be missing
            column = np.stack([np.asarray(cell, dtype=np.float64) for cell in column])
        except (TypeError, ValueError):
            column = column.astype(str)
    if column.dtype.kind not in "biuf":
        got, remedy = f"texts such as {str(column[:1].tolist())[:40]}", "Encode categories as numbers, by a fixed list"
        raise UserError(f"column {name!r}", "numbers of one shape", got, remedy)
    finite = np.isfinite(_flat(column)).all(axis=1)
    if not finite.all():
        got = f"a missing or infinite value in row {int(np.argmin(finite))}"
        remedy = "Fill in or drop missing values, by a rule that does not use other clients' data"
        raise UserError(f"column {name!r}", "finite numbers", got, remedy)
    return column.astype(np.float32)


def _images(table: Any, name: str) -> np.ndarray:
    """Return images as numbers from 0 to 1, float32 `[rows, channels, height, width]`."""
    gray = all(image.mode in ("1", "L", "I;16") for image in table[name])
    images = [np.asarray(image.convert("L" if gray else "RGB")) for image in table[name]]
    shapes = {image.shape for image in images}
    if len(shapes) != 1:
        got, remedy = ", ".join(map(str, sorted(shapes)[:3])), "Give all images one size"
        raise UserError(f"column {name!r}", "images of one size", got, remedy)
    stacked = np.stack(images).astype(np.float32) / np.float32(255)
    return stacked[:, None] if stacked.ndim == 3 else stacked.transpose(0, 3, 1, 2)


def _of_clients(clients: object, columns: Columns) -> dict[str, object]:
    """Return the arrays of a list of clients."""
    if isinstance(clients, tuple) and len(clients) == 2 and all(hasattr(part, "shape") for part in clients):
        remedy = 'Write data={"inputs": inputs, "labels": labels}, or a list with such a pair for each client'
        raise UserError("data", "a list of clients", "one pair of arrays", remedy)
    if not isinstance(clients, Sequence) or isinstance(clients, str) or not clients:
        expected = "a list of clients, a table, a mapping of arrays, or a data set"
        empty = isinstance(clients, Sequence) and not clients
        got = "an empty one" if empty else f"a {type(clients).__name__}"
        raise UserError("data", expected, got, "Give data as fedpriv.Experiment describes")
    inputs, labels, owners, classes = [], [], [], None
    for number, client in enumerate(clients):
        if is_table(client):
            table = _of_table(client, columns)
            parts, classes = [table.inputs, np.asarray(table.labels)], table.classes
        else:
            parts = _pair(client, f"data of client {number}")
        if len(parts[0]) != len(parts[1]):
            got = f"{len(parts[0]):,} and {len(parts[1]):,}"
            raise UserError(f"data of client {number}", "as many inputs as labels", got, "Give one label for each")
        if len(parts[0]):
            inputs.append(parts[0])
            labels.append(parts[1].reshape(len(parts[0]), -1) if parts[1].ndim > 1 else parts[1])
            owners.append(np.full(len(parts[0]), number))
    shapes = {part.shape[1:] for part in inputs}
    if len(shapes) != 1:
        got = ", ".join(map(str, sorted(shapes))) or "clients without examples"
        raise UserError("data", "inputs of one shape", got, "Give all clients inputs of one shape")
    joined = (np.concatenate(parts) for parts in (inputs, labels, owners))
    made: dict[str, object] = dict(zip(("inputs", "labels", "client_ids"), joined, strict=True))
    return made | {"clients": np.arange(len(clients))} | ({} if classes is None else {"classes": classes})


def _values(part: object, where: str) -> np.ndarray:
    """Return inputs or labels of one client, a row for each example."""
    try:
        found = torch.as_tensor(part).detach().cpu().numpy()
    except (TypeError, ValueError, RuntimeError) as error:
        got = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0].removesuffix(".")
        raise UserError(where, "numbers in dense arrays", got, "Convert them, to float32 for instance") from None
    if found.ndim == 0:
        raise UserError(
            where, "an array with one row for each example", "a single number", "Give rows, such as [[0.5]]"
        )
    return found


def _pair(client: Any, where: str) -> list[np.ndarray]:
    """Return the inputs and labels of one client."""
    if isinstance(client, tuple | list) and len(client) == 2:
        return [_values(part, where) for part in client]
    if not (hasattr(client, "__len__") and hasattr(client, "__getitem__")):
        remedy = "Give a pair of arrays, or a torch Dataset with a length"
        raise UserError(where, "inputs and labels", f"a {type(client).__name__}", remedy)
    rows = [client[i] for i in range(len(client))]
    if not all(isinstance(row, tuple | list) and len(row) == 2 for row in rows):
        got = f"a {type(rows[0]).__name__}"
        raise UserError(where, "examples that are pairs of input and label", got, "Return (input, label)")
    try:
        return [np.array([np.asarray(row[at]) for row in rows]) for at in (0, 1)]
    except ValueError as error:
        raise UserError(where, "inputs of one shape", str(error), "Give all inputs one shape") from None

"""Inputs for a trained model, from files: read, checked and scaled as the data set declares."""

import csv
import math
import zipfile
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from fedpriv.data.dataset import DATASETS
from fedpriv.data.files import other_separator, refuse_other_separator
from fedpriv.data.labels import labels_as
from fedpriv.data.own import labelled_arrays
from fedpriv.data.text.tokens import Texts
from fedpriv.data.user_files import Csv, read_arrays
from fedpriv.errors import UserError
from fedpriv.experiment.schema import field_names, read_table
from fedpriv.tables import Record
from fedpriv.trained.module import Trained

__all__ = ["read_examples", "read_inputs"]

_KINDS = (".npz", ".npy", ".csv")
_TABLES = (".csv", ".tsv")


def read_inputs(trained: Trained, path: Path, *, prepared: bool = False) -> Tensor:
    """Return prepared inputs from a file, float32 `[examples, *input_shape]`.

    Args:
        trained: The run.
        path: A `.npz` file with an array `inputs`, or a `.npy` file, or a `.csv` file: with the declared columns if
            the data set is a table, separated by commas, semicolons, tabs or bars; with the column of texts if it is
            one of texts (also `.tsv`); otherwise with the numbers of one input in each row.
        prepared: True if the numbers are scaled already. A table's `.npz` and `.npy` files always are.

    Raises:
        UserError: If the file cannot be read, or has other shapes or values.
    """
    texts = None if prepared else _texts(trained)
    kind = _kind(path, "--inputs", texts)
    if texts is not None and kind in _TABLES:
        return _shaped(trained, path, texts.read_inputs(path), prepared)
    if kind == ".csv":
        table = _table(trained, path)
        width = math.prod(trained.input_shape)
        found = _rows_of_numbers(path, width) if table is None else table.read_inputs(path)
        return _shaped(trained, path, found, prepared)
    return _shaped(trained, path, _array(path) if kind == ".npy" else _named(path, "inputs"), prepared)


def read_examples(trained: Trained, path: Path, *, prepared: bool = False) -> tuple[Tensor, Tensor]:
    """Return prepared inputs and labels from a file.

    Args:
        trained: The run.
        path: A `.npz` file with `inputs` and `labels`; or a `.csv` file with the declared columns and the target, or
            with texts and their labels.
        prepared: See `read_inputs`.

    Raises:
        UserError: If the file cannot be read, or does not suit the run.
    """
    texts = _texts(trained)
    kind, table = _kind(path, "--data", texts), texts or _table(trained, path)
    if kind == ".npy" or (kind == ".csv" and table is None):
        remedy = "Write both arrays with numpy.savez"
        raise UserError("--data", "a .npz file with inputs and labels", str(path), remedy)
    with labels_as(trained.task.labels):
        if table is None or kind == ".npz":
            found = {"inputs": _named(path, "inputs"), "labels": _named(path, "labels")}
        else:
            found = {"inputs": table.read_inputs(path), "labels": table.read_labels(path)}
        inputs = _shaped(trained, path, np.asarray(found["inputs"]), prepared)
        _, labels, _ = labelled_arrays({**found, "inputs": inputs.numpy()}, path.name)
    made = torch.from_numpy(labels)
    if trained.task.labels in ("classes", "tokens") and int(made.max()) >= trained.classes:
        expected = f"labels from 0 to {trained.classes - 1}"
        raise UserError(str(path), expected, int(made.max()), "Correct the labels")
    trained.task.check_labels(str(path), made, trained.classes)
    return inputs, made


def _kind(path: Path, option: str, texts: Texts | None) -> str:
    kinds = _KINDS if texts is None else (*_KINDS, ".tsv")
    if path.suffix not in kinds:
        raise UserError(option, f"a file {', '.join(kinds)}", str(path), "Convert it to one of these")
    if not path.is_file():
        raise UserError(option, "an existing file", str(path), "Correct the path")
    return path.suffix


def _texts(trained: Trained) -> Texts | None:
    """Return a reader of texts with the run's settings; None if its data set is of another kind."""
    table = cast(Record, trained.tables["data"])
    if DATASETS.get(table["name"]) is not Texts:
        return None
    return read_table(Texts, {key: value for key, value in table.items() if key in field_names(Texts)}, "data")


def _table(trained: Trained, path: Path) -> Csv | None:
    """Return a reader of the run's declared columns with the file's separator; None if its data set is no table."""
    columns = cast(Record | None, trained.facts["inputs"]["columns"])
    if columns is None:
        return None
    numeric = {name: (shift, scale) for name, (shift, scale) in columns["numeric"].items()}
    labels = columns["labels"]
    if labels is None and trained.task.labels == "classes":
        labels = [str(label) for label in range(trained.classes)]
    names = [*numeric, *columns["categories"]]
    separator = (path.suffix == ".csv" and other_separator(path, ",", names)) or ","
    return Csv(**{**columns, "file": "inputs", "numeric": numeric, "labels": labels, "separator": separator})


def _array(path: Path) -> np.ndarray:
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(str(path), "a file of numpy.save without objects", error, "Write it again") from None
    if not isinstance(found, np.ndarray):
        raise UserError(str(path), "a file of numpy.save", "one of numpy.savez", "Name it .npz")
    return found


def _named(path: Path, name: str) -> np.ndarray:
    found = read_arrays(path)
    if name not in found:
        got, remedy = f"only {', '.join(found)}", f"Write it with numpy.savez(..., {name}={name})"
        raise UserError(str(path), f"an array {name!r}", got, remedy)
    return np.asarray(found[name])


def _rows_of_numbers(path: Path, width: int) -> np.ndarray:
    """Return the rows of a CSV file, float32 `[rows, width]`; a first row that holds no number is a header."""
    refuse_other_separator(path, ",", width)
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = [row for row in csv.reader(file) if row]
    if rows and not any(_is_number(cell) for cell in rows[0]):
        rows = rows[1:]
    for number, row in enumerate(rows):
        if len(row) != len(rows[0]) or not all(map(_is_number, row)):
            got = f"{', '.join(row)}"[:60]
            raise UserError(str(path), f"{len(rows[0])} numbers in each row", f"row {number}: {got}", "Correct the row")
    return np.array(rows, dtype=np.float32).reshape(len(rows), -1)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _shaped(trained: Trained, path: Path, array: np.ndarray, prepared: bool) -> Tensor:
    """Return the array as prepared inputs `[examples, *input_shape]`."""
    shape = trained.input_shape
    if len(array) == 0 or array.dtype.kind not in "biuf":
        got = f"{array.dtype} of shape {list(array.shape)}"
        raise UserError(str(path), "at least one input of numbers", got, "Correct the file")
    if path.suffix == ".csv" and array[0].size == int(np.prod(shape)):
        array = array.reshape(len(array), *shape)
    if array.shape[1:] != shape:
        expected = f"inputs [examples, {', '.join(map(str, shape))}]"
        raise UserError(
            str(path), expected, list(array.shape), "Bring them into the shape that the model was trained on"
        )
    if not prepared:
        array = _scaled(trained.facts["inputs"], array)
    array = array.astype(np.float32)
    finite = np.isfinite(array.reshape(len(array), -1)).all(axis=1)
    if not finite.all():
        got = f"NaN or infinity in row {int(np.argmin(finite))}"
        raise UserError(str(path), "finite numbers", got, "Fill in missing values by a fixed rule")
    return torch.from_numpy(np.ascontiguousarray(array))


def _scaled(constants: Record, array: np.ndarray) -> np.ndarray:
    """Return (array / scale - mean) / std, in float32 and in the order of the loaders of data sets."""
    if (constants["scale"], constants["mean"], constants["std"]) == (1.0, [], []):
        return array
    made = array.astype(np.float32) / np.float32(constants["scale"])
    axes = (-1, *[1] * (array.ndim - 2))
    if constants["mean"]:
        made = made - np.array(constants["mean"], np.float32).reshape(axes)
    if constants["std"]:
        made = made / np.array(constants["std"], np.float32).reshape(axes)
    return made

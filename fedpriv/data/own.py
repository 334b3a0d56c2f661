"""User data sets, returned by a function such as `"./data.py:load"`."""

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar, cast

import numpy as np
import torch

from fedpriv.data.dataset import Dataset
from fedpriv.data.files import default_data_root
from fedpriv.data.labels import expected_labels
from fedpriv.data.mapped import mapped
from fedpriv.data.validation import test_rows_within
from fedpriv.errors import UserError, nearest
from fedpriv.plugins import line_of, settings_of
from fedpriv.privacy.released import Whose

__all__ = ["RESERVED", "OwnData", "dataset_of", "labelled_arrays"]

_KEY = "data.name"
# Keys of [data] that do not belong to the data set.
RESERVED = ("name", "clients", "partition", "shift", "validation", "test", "standardize")
_ARRAYS = ("inputs", "labels", "client_ids", "test_inputs", "test_labels", "classes", "clients")


@dataclass(frozen=True, kw_only=True)
class OwnData:
    """Base of the settings of a user data set. The class that `of` returns has the function's parameters as fields.

    The program itself passes a parameter named `data_root`. The function returns a `Dataset`, or a mapping for
    `dataset_of`. Every process that needs the data calls it, so it must return the same data each time.
    """

    natural: ClassVar[bool] = True
    test: ClassVar[Whose] = "public"
    called: ClassVar[Callable[..., object]]
    asked: ClassVar[tuple[str, ...]]

    @staticmethod
    def of(found: object, where: str, name: str) -> "type[OwnData]":
        """Return the settings of a function that returns data; see `fedpriv.plugins.Registry`."""
        if not callable(found):
            remedy = "Name a function that returns the arrays"
            raise UserError(where, "a function", f"{name!r}, which is a {type(found).__name__}", remedy)
        return settings_of(OwnData, found, where, given=("data_root",), reserved=RESERVED)

    def load(self, data_root: Path | None) -> Dataset:
        """Call the function; see `DatasetSource.load`.

        Raises:
            UserError: If the function raises an exception, or returns any other type.
        """
        called, options = type(self).called, {field.name: getattr(self, field.name) for field in fields(self)}
        if "data_root" in self.asked:
            options["data_root"] = data_root or default_data_root()
        try:
            found = called(**options)
        except UserError:
            raise
        except Exception as error:
            remedy = "Correct the function, or its keys in [data]"
            raise UserError(_KEY, "a function that returns data", line_of(error, called), remedy) from error
        return dataset_of(found, getattr(called, "__name__", "own"))


def dataset_of(found: object, name: str) -> Dataset:
    """Return a data set made of arrays, after checking every value.

    Args:
        found: A `Dataset`; or a mapping with `inputs` (numbers, `[examples, *input_shape]`) and `labels` (whole numbers
            from 0, `[examples]`, unless the task expects another kind). Optional are `client_ids` (the natural client
            of each example: whole numbers or texts), `clients` (the ids of all clients, if some hold no example),
            `test_inputs` and `test_labels` (which count as public), and `classes` (the number of labels; by default one
            more than the largest). All are arrays of numpy or torch, or lists; inputs that `numpy.load(path,
            mmap_mode="r")` returned stay on the disk. Without test arrays, a fifth of the examples is held out to
            test on: of each natural client, or without natural clients, of each label. With `partition = "natural"`,
            `data.test` is then required: see `fedpriv.data.validation.evaluated_on`.
        name: The name of the data set.

    Raises:
        UserError: If an array is missing or unknown, or has a wrong shape, type or value; it names the first row.
    """
    if isinstance(found, Dataset):
        return found
    if not isinstance(found, Mapping):
        remedy = f"Return a mapping with {', '.join(_ARRAYS[:3])}"
        raise UserError(_KEY, "a function that returns a mapping of arrays", f"a {type(found).__name__}", remedy)
    for key in found:
        if key not in _ARRAYS:
            raise UserError(f"dataset {name}", "known arrays", repr(key), nearest(str(key), _ARRAYS))
    inputs, labels, _ = labelled_arrays(found, name)
    groups, population = None, None
    if found.get("client_ids") is not None:
        groups, population = _clients(name, found["client_ids"], found.get("clients"), len(inputs))
    given = [key for key in ("test_inputs", "test_labels") if found.get(key) is not None]
    if len(given) == 1:
        raise UserError(f"dataset {name}", "both test_inputs and test_labels", f"only {given[0]}", "Return both")
    test_groups = None
    if given:
        test = _numbers(name, found, "test_inputs"), _labels(name, found, "test_labels")
        _same_length(name, "test_labels", test[1], len(test[0]))
    else:
        held = _every_fifth(labels) if groups is None else test_rows_within(groups)
        if not held.any():
            remedy = "Return test_inputs and test_labels, or more examples"
            raise UserError(f"dataset {name}", "enough examples to hold some out to test on", len(labels), remedy)
        test = _chosen(inputs, held), labels[held]
        inputs, labels = _chosen(inputs, ~held), labels[~held]
        if groups is not None:
            groups, test_groups = groups[~held], groups[held]
    arrays = (inputs, labels, *test)
    return Dataset(
        name=name,
        **dict(
            zip(
                ("train_inputs", "train_labels", "test_inputs", "test_labels"),
                (_tensor(array) for array in arrays),
                strict=True,
            )
        ),
        classes=_classes(name, found.get("classes"), labels, test[1]),
        groups=groups,
        natural_clients=population,
        test_groups=test_groups,
        kind=expected_labels(),
    )


def labelled_arrays(found: Mapping[str, object], name: str) -> tuple[np.ndarray, np.ndarray, int]:
    """Return inputs float32 `[examples, *input_shape]`, labels and the number of labels; see `Dataset`.

    Args:
        found: The mapping that `dataset_of` takes.
        name: Its name in errors.

    Raises:
        UserError: If an array is missing, or has a wrong shape, type or value; it names the first row.
    """
    for key in ("inputs", "labels"):
        if found.get(key) is None:
            got = f"only {', '.join(map(str, found))}" if found else "an empty mapping"
            raise UserError(f"dataset {name}", f"an array {key!r}", got, f"Add {key}")
    inputs, labels = _numbers(name, found, "inputs"), _labels(name, found, "labels")
    if len(inputs.shape) == 1:
        remedy = "Give each example a row, with inputs.reshape(-1, 1) for single numbers"
        raise UserError(f"dataset {name}", "inputs [examples, *shape]", f"shape ({len(inputs)},)", remedy)
    _same_length(name, "labels", labels, len(inputs))
    return inputs, labels, _classes(name, found.get("classes"), labels)


def _array(name: str, found: Mapping[str, object], key: str) -> np.ndarray:
    value = found[key]
    try:
        array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    except (TypeError, RuntimeError) as error:
        got = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"dataset {name}", f"{key} that numpy can hold", got, "Convert them, to float32 for instance"
        ) from None
    except ValueError as error:
        raise UserError(f"dataset {name}", f"{key} of one shape", str(error), "Make all rows equally long") from None
    if array.ndim == 0 or len(array) == 0:
        raise UserError(f"dataset {name}", f"{key} with at least one row", f"shape {array.shape}", "Return rows")
    return array


def _numbers(name: str, found: Mapping[str, object], key: str) -> np.ndarray:
    """Return the array as float32; raise UserError unless all values are finite. Mapped inputs stay in their file."""
    held = mapped(found[key])
    if held is not None and len(held) and held.kind in "biuf":
        return cast(np.ndarray, held)
    array = _array(name, found, key)
    if array.dtype.kind not in "biuf":
        row = _first_row(array, lambda value: not isinstance(value, int | float | np.number))
        got = f"{array.dtype} ({_shown(array, row)})"
        raise UserError(f"dataset {name}", f"{key} that are numbers", got, "Encode categories as numbers")
    with np.errstate(over="ignore"):  # values that overflow become infinite, and are refused below
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        row = int(np.argmin(np.isfinite(array.reshape(len(array), -1)).all(axis=1)))
        remedy = "Fill in or drop missing values, by a rule that does not use other clients' data"
        raise UserError(f"dataset {name}", f"finite float32 {key}", f"NaN or infinity in row {row}", remedy)
    return array


def _whole_numbers(name: str, found: Mapping[str, object], key: str) -> np.ndarray:
    """Return the array as int64 `[examples]`; raise UserError unless all values are whole numbers from 0."""
    array = _array(name, found, key)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    expected = f"{key} that are whole numbers from 0, one for each example"
    remedy = "Number the labels from 0 by a fixed list"
    if array.ndim != 1:
        raise UserError(f"dataset {name}", expected, f"shape {array.shape}", remedy)
    if array.dtype.kind not in "biuf":
        raise UserError(f"dataset {name}", expected, f"{array.dtype} ({_shown(array, 0)})", remedy)
    wrong = ~(np.isfinite(array) & (array >= 0) & (array == np.floor(array)) & (array < 2**53))
    if wrong.any():
        raise UserError(f"dataset {name}", expected, _shown(array, int(np.argmax(wrong))), remedy)
    return array.astype(np.int64)


def _labels(name: str, found: Mapping[str, object], key: str) -> np.ndarray:
    """Return labels as the task expects them; see `labels.LabelKind`."""
    kind = expected_labels()
    if kind == "classes":
        return _whole_numbers(name, found, key)
    array = _numbers(name, found, key)
    if kind == "tokens":
        array = _array(name, found, key)  # float32 holds whole numbers up to 2**24 alone
        wrong = array != np.floor(array)
        if wrong.any():
            row = int(np.argmax(wrong.reshape(len(array), -1).any(axis=1)))
            raise UserError(f"dataset {name}", f"{key} that are tokens", _shown(array, row), "Return whole numbers")
        array = array.astype(np.int64)
    if array.ndim == 2 and array.shape[1] == 1 and kind == "numbers":
        array = array[:, 0]
    if array.ndim != 2 and not (kind == "numbers" and array.ndim == 1):
        axes = {"numbers": "[examples] or [examples, targets]", "flags": "[examples, labels]"}
        expected = f"{key} {axes.get(kind, '[examples, positions]')} for this task"
        raise UserError(f"dataset {name}", expected, f"shape {array.shape}", "Change the labels or [task] name")
    return array


def _clients(name: str, ids: object, everyone: object, examples: int) -> tuple[np.ndarray, int]:
    """Return the rank of each example's client among all, int64 `[examples]`, and the number of clients."""
    array, remedy = (
        _array(name, {"client_ids": ids}, "client_ids"),
        "Give each example the number or name of its client",
    )
    if array.ndim != 1 or array.dtype.kind not in "biuUSO":
        got = f"{array.dtype} of shape {array.shape}"
        raise UserError(f"dataset {name}", "client_ids that are whole numbers or texts", got, remedy)
    _same_length(name, "client_ids", array, examples)
    if array.dtype.kind == "O":
        missing = _first_row(array, lambda value: not isinstance(value, str | int))
        if missing is not None:
            raise UserError(f"dataset {name}", "a client for each example", _shown(array, missing), remedy)
        array = array.astype(str)
    known = np.unique(array if everyone is None else _everyone(name, everyone, texts=array.dtype.kind == "U"))
    _refuse_two_spellings(name, known)
    at = np.minimum(np.searchsorted(known, array), len(known) - 1)
    if (known[at] != array).any():
        row = int(np.argmax(known[at] != array))
        raise UserError(f"dataset {name}", "client_ids that are in clients", _shown(array, row), "Add it to clients")
    return at.astype(np.int64), len(known)


def _everyone(name: str, clients: object, *, texts: bool) -> np.ndarray:
    """Return the ids of all clients, as texts if those of the examples are."""
    array = _array(name, {"clients": clients}, "clients")
    if array.ndim != 1 or array.dtype.kind not in ("biuUSO" if texts else "biu"):
        got, remedy = f"{array.dtype} of shape {array.shape}", "Give their ids in one list, written as in client_ids"
        raise UserError(f"dataset {name}", "clients that are whole numbers or texts, as client_ids", got, remedy)
    return array.astype(str) if texts else array


def _refuse_two_spellings(name: str, known: np.ndarray) -> None:
    """Refuse one client under two names, each of which would have the whole bound to itself."""
    if known.dtype.kind != "U":
        return
    first: dict[str, str] = {}
    for text in known.tolist():
        plain = unicodedata.normalize("NFC", text).strip()
        plain = re.sub(r"^([+-]?\d+)\.0*$", r"\1", plain)
        if plain in first:
            got, remedy = f"{first[plain]!r} and {text!r}", "Write the id of a client in one way"
            raise UserError(f"dataset {name}", "clients with different ids", got, remedy)
        first[plain] = text


def _classes(name: str, given: object, *labels: np.ndarray) -> int:
    if expected_labels() in ("numbers", "flags"):
        return labels[0].shape[1] if labels[0].ndim == 2 else 1
    found = max(int(part.max()) for part in labels) + 1
    if given is None:
        return max(found, 2)
    if isinstance(given, float | np.floating) and float(given).is_integer():
        given = int(given)
    if isinstance(given, bool) or not isinstance(given, int | np.integer) or given < found:
        raise UserError(f"dataset {name}", f"classes of at least {found}", repr(given), "Correct classes or the labels")
    return int(given)


def _tensor(array: np.ndarray) -> torch.Tensor:
    held = mapped(array)
    return torch.from_numpy(np.ascontiguousarray(array)) if held is None else cast(torch.Tensor, held)


def _chosen(array: np.ndarray, rows: np.ndarray) -> np.ndarray:
    held = mapped(array)
    return array[rows] if held is None else cast(np.ndarray, held.chosen(np.flatnonzero(rows)))


def _same_length(name: str, key: str, array: np.ndarray, examples: int) -> None:
    if len(array) != examples:
        raise UserError(f"dataset {name}", f"{key} for {examples:,} examples", f"{len(array):,}", "Return one for each")


def _every_fifth(labels: np.ndarray) -> np.ndarray:
    from fedpriv.data.datasets import every_fifth_of_each_label

    return every_fifth_of_each_label(labels if expected_labels() == "classes" else np.zeros(len(labels), np.int64))


def _first_row(array: np.ndarray, wrong: Callable[[object], bool]) -> int | None:
    rows: Sequence[Sequence[object]] = array.reshape(len(array), -1).tolist()
    return next((at for at, row in enumerate(rows) if any(wrong(value) for value in row)), None)


def _shown(array: np.ndarray, row: int | None) -> str:
    return f"row {row}: {str(array[row or 0])[:60]}"

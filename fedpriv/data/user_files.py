"""Data sets in a user's own files: CSV, Parquet, npz, npy, LEAF's JSON, and a folder of images.

The experiment declares scales, categories and labels. None is computed from the rows, because they belong to clients: a
mean over all rows would let one client change the message of another.
"""

import csv
import json
import math
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fedpriv.checks import is_real, refuse_beyond_memory, shown
from fedpriv.data.dataset import Dataset, Declared
from fedpriv.data.files import DATA_ROOT_VARIABLE, default_data_root, refuse_other_separator
from fedpriv.data.labels import expected_labels
from fedpriv.data.mapped import MappedInputs
from fedpriv.data.own import dataset_of
from fedpriv.errors import UserError, nearest, require_extra
from fedpriv.privacy.released import Whose

if TYPE_CHECKING:
    import pandas as pd

    Column = pd.Series[Any]

__all__ = ["Csv", "ImageFolder", "Leaf", "Npy", "Npz", "Parquet", "read_arrays"]

Labels = list[str | list[str]]

_LABELS = "names of labels"
"""Key beside the arrays of a file: names of labels, numbered in their order."""


@dataclass(frozen=True, kw_only=True)
class _Files:
    """A file with examples of clients, and optionally one with public test examples.

    Args:
        file: The examples; a path from the data root.
        test_file: Public test examples. Without it, a fifth of the examples is held out to test on: of each natural
            client, or without natural clients, of each label. With `partition = "natural"`, `data.test` is then
            required: `"within"` tests on that fifth, `"clients"` on all examples of a fifth of the clients instead.

    Raises:
        UserError: If no file is named.
    """

    natural: ClassVar[bool] = True
    test: ClassVar[Whose] = "public"
    file: str = ""
    test_file: str | None = None

    def __post_init__(self) -> None:
        if not self.file:
            raise UserError("data.file", "a path from the data root", repr(self.file), "Name the file of the examples")

    def load(self, data_root: Path | None) -> Dataset:
        """Read the files; see `DatasetSource.load`.

        Raises:
            UserError: If a file is missing or damaged, or has unexpected contents; it names the first wrong row.
        """
        root = data_root or default_data_root()
        found = self._read(_existing(root, self.file, "data.file"))
        if self.test_file is not None:
            tests = self._read(_existing(root, self.test_file, "data.test_file"))
            found = {**found, "test_inputs": tests["inputs"], "test_labels": tests["labels"]}
            if found.get(_LABELS) != tests.get(_LABELS):
                remedy = "List all labels in data.labels: they are numbered in that order"
                raise UserError("data.test_file", f"labels {found[_LABELS]}", tests[_LABELS], remedy)
            counts = [count for part in (found, tests) if isinstance(count := part.get("classes"), int)]
            if len(counts) == 2:
                found["classes"] = max(counts)
        found.pop(_LABELS, None)
        return dataset_of(found, Path(self.file).name)

    def _read(self, path: Path) -> dict[str, object]:
        """Return the arrays of one file, for `dataset_of`."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class _Table(_Files):
    """A table of examples, one per row, with declared columns.

    Args:
        target: The column of the labels.
        client: The column of clients' ids; None if there are no natural clients.
        numeric: For each column of numbers, a shift to subtract and a scale to divide by, such as `{age = [40, 15]}`.
            Both are public constants, not statistics of the rows.
        categories: For each column of categories, all of its values. Each value becomes a separate input of 0 or 1.
        labels: The values of `target`, in the order of the labels 0, 1, ...; a list of values is one label. Without
            it, the values must be whole numbers from 0.
        missing: Texts that mean a missing value, in addition to an empty cell.
        fill: For columns of numbers, the replacement of a missing value, before scaling. A missing category has no
            replacement: it becomes a row of zeros.
        drop_missing: Drop rows with a missing value in a declared column; then `fill` has to be empty.
        columns: Names of the columns, if the file does not begin with them.

    Raises:
        UserError: If no column is declared, one is declared twice, or a scale is not a finite number above 0.
    """

    target: str
    client: str | None = None
    numeric: dict[str, tuple[float, float]] = field(default_factory=dict)
    categories: dict[str, list[str]] = field(default_factory=dict)
    labels: Labels | None = None
    missing: list[str] = field(default_factory=list)
    fill: dict[str, float | str] = field(default_factory=dict)
    drop_missing: bool = False
    columns: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_kinds()
        if not self.numeric and not self.categories:
            remedy = "Declare the columns to learn from, for example data.numeric = {age = [40, 15]}"
            raise UserError(
                "data.numeric", "at least one column here or in data.categories", "two empty tables", remedy
            )
        twice = sorted((set(self.numeric) & set(self.categories)) | ({self.target} & {*self.numeric, *self.categories}))
        if twice:
            raise UserError(f"data.{twice[0]}", "a column with one meaning", "two meanings", "Declare it once")
        for name, (shift, scale) in self.numeric.items():
            if not (is_real(shift) and _is_scale(scale)):
                expected = f"two finite numbers for {name}, the second from 1e-20 to 1e20"
                remedy = "Give the number to subtract and the number to divide by"
                raise UserError("data.numeric", expected, [shift, scale], remedy)
        self._check_fill()
        texts = [text for texts in self.labels or [] for text in _listed(texts)]
        if len(set(texts)) < len(texts):
            raise UserError("data.labels", "different values", self.labels, "List each value once")
        for name, values in self.categories.items():
            if not values or len(set(values)) < len(values):
                raise UserError("data.categories", f"different values of {name}", values, "List each value once")

    def _check_fill(self) -> None:
        for name, value in self.fill.items():
            if name in self.categories:
                remedy = 'Remove it, or add a text for "missing" to its categories in the file and in data.categories'
                got = f"the column of categories {name}: a missing category becomes a row of zeros"
                raise UserError("data.fill", "columns of data.numeric", got, remedy)
            if name not in self.numeric:
                raise UserError("data.fill", "columns of data.numeric", name, nearest(name, self.numeric))
            if not is_real(value):
                raise UserError("data.fill", f"a finite number for {name}", shown(value), "Give a public constant")
        if self.fill and self.drop_missing:
            remedy = "Remove fill or drop_missing"
            raise UserError("data.fill", "no values with drop_missing = true, which drops such rows", self.fill, remedy)

    def _check_kinds(self) -> None:
        """Raise UserError for a value of another kind; a config is checked before."""
        checks: dict[str, tuple[Callable[[object], bool], str]] = {
            "target": (lambda value: isinstance(value, str), "the name of a column"),
            "client": (lambda value: value is None or isinstance(value, str), "the name of a column"),
            "numeric": (lambda value: _is_table(value, _is_pair), "a table with two numbers for each column"),
            "categories": (lambda value: _is_table(value, _is_texts), "a table with a list of texts for each column"),
            "labels": (lambda value: value is None or _is_labels(value), "a list of texts, or of lists of texts"),
            "missing": (_is_texts, "a list of texts"),
            "fill": (lambda value: _is_table(value, _is_constant), "a table with a number for each column"),
            "columns": (lambda value: value is None or _is_texts(value), "a list of names"),
        }
        for key, (fits, expected) in checks.items():
            if not fits(getattr(self, key)):
                raise UserError(f"data.{key}", expected, shown(getattr(self, key)), f"Change data.{key}")

    def _frame(self, path: Path, names: list[str] | None) -> "pd.DataFrame":
        """Return the table with unchanged cells."""
        raise NotImplementedError

    def _place(self, path: Path, column: "Column", row: int) -> str:
        """Return the place in the file of one row of a column, for errors."""
        return f"row {column.index[row]}"

    @property
    def declared(self) -> Declared:
        """The columns and the names of the labels; see `Declared`."""
        keys = ("numeric", "categories", "missing", "fill", "target", "labels")
        columns = {key: getattr(self, key) for key in keys}
        return Declared(class_names=_names(self.labels), columns=columns)

    def read_inputs(self, path: Path) -> np.ndarray:
        """Return the inputs of all rows of a table, float32 `[rows, features]`; needs neither labels nor clients.

        Args:
            path: A table with the declared columns of numbers and categories.

        Raises:
            UserError: If the file is damaged, or has unexpected contents.
        """
        frame = self._frame(path, None)
        self._require_columns(path, frame, [*self.numeric, *self.categories])
        return self._inputs(path, frame)

    def read_labels(self, path: Path) -> np.ndarray:
        """Return the label of each row of a table; see `read_inputs`."""
        frame = self._frame(path, None)
        self._require_columns(path, frame, [self.target])
        return self._numbered(path, frame[self.target])

    def _require_columns(self, path: Path, frame: "pd.DataFrame", wanted: Sequence[str]) -> None:
        twice = sorted(set(map(str, frame.columns[frame.columns.duplicated()])))
        if twice:
            raise UserError(str(path), "columns with different names", f"{twice[0]!r} twice", "Rename one of them")
        for name in wanted:
            if name not in frame.columns:
                remedy = nearest(name, list(map(str, frame.columns)))
                raise UserError(str(path), f"a column {name!r}", f"{', '.join(map(str, frame.columns))}"[:200], remedy)

    def _inputs(self, path: Path, frame: "pd.DataFrame") -> np.ndarray:
        """Return the scaled columns of numbers and those of categories, float32 `[rows, features]`."""
        if frame.empty:
            raise UserError(str(path), "at least one row", "an empty table", "Choose another file")
        width = len(self.numeric) + sum(map(len, self.categories.values()))
        refuse_beyond_memory("data.file", 4 * len(frame) * width, "Declare fewer columns, or use fewer rows")
        parts = [self._scaled(path, frame[name], name) for name in self.numeric]
        parts += [self._one_hot(path, frame[name], name) for name in self.categories]
        return np.concatenate(parts, axis=1)

    def _read(self, path: Path) -> dict[str, object]:
        frame = self._frame(path, self.columns)
        wanted = [*self.numeric, *self.categories, self.target, *([] if self.client is None else [self.client])]
        self._require_columns(path, frame, wanted)
        everyone = None
        if self.client is not None and self.drop_missing:  # a client is one even if none of its rows is complete
            column = frame[self.client]
            everyone = self._ids_of_clients(path, column[~self._absent(column)])
        if self.drop_missing:
            frame = frame[~np.any([self._absent(frame[name]) for name in wanted], axis=0)]
        made: dict[str, object] = {"inputs": self._inputs(path, frame)}
        made["labels"] = self._numbered(path, frame[self.target])
        if self.labels is not None:
            made["classes"] = max(len(self.labels), 2)
        if self.client is not None:
            made["client_ids"] = self._ids_of_clients(path, frame[self.client])
            made |= {} if everyone is None else {"clients": everyone}
        return made

    def _absent(self, column: "Column") -> np.ndarray:
        texts = column.astype(str).str.strip()
        return (column.isna() | texts.isin(["", *self.missing])).to_numpy(dtype=bool)

    def _scaled(self, path: Path, column: "Column", name: str) -> np.ndarray:
        """Return a scaled column, float32 `[rows, 1]`."""
        import pandas as pd

        absent = self._absent(column)
        if absent.any() and name not in self.fill:
            row = int(np.argmax(absent))
            remedy = f"Set data.fill = {{{name} = ...}} to a public constant, or data.drop_missing = true"
            raise UserError(
                str(path),
                f"a number in column {name!r}",
                f"a missing value in {self._place(path, column, row)}",
                remedy,
            )
        numbers = pd.to_numeric(column.where(~absent), errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
        wrong = ~absent & ~np.isfinite(numbers)
        if wrong.any():
            row = int(np.argmax(wrong))
            remedy = "Declare the column in data.categories, or add texts for missing values to data.missing"
            if re.fullmatch(r"\s*[+-]?[\d.]+,\d+\s*", str(column.iloc[row])):
                remedy = "Write numbers with a decimal point, and without commas"
            got = f"{str(column.iloc[row])[:40]!r} in {self._place(path, column, row)}"
            raise UserError(str(path), f"finite numbers in column {name!r}", got, remedy)
        shift, scale = self.numeric[name]
        filled = np.where(absent, float(self.fill.get(name, 0.0)), numbers)
        with np.errstate(over="ignore"):  # values that overflow become infinite, and are refused
            return ((filled - shift) / scale).astype(np.float32)[:, None]

    def _one_hot(self, path: Path, column: "Column", name: str) -> np.ndarray:
        """Return a column of categories as zeros and ones, float32 `[rows, categories]`."""
        values, absent = self.categories[name], self._absent(column)
        at = _places(column, {value: place for place, value in enumerate(values)})
        wrong = (at < 0) & ~absent
        if wrong.any():
            row = int(np.argmax(wrong))
            got = f"{str(column.iloc[row])[:40]!r} in {self._place(path, column, row)}"
            remedy = "Add it to data.categories, or to data.missing"
            raise UserError(str(path), f"a declared category in column {name!r}", got, remedy)
        made = np.zeros((len(column), len(values)), dtype=np.float32)
        rows = np.flatnonzero(at >= 0)
        made[rows, at[rows]] = 1.0
        return made

    def _numbered(self, path: Path, column: "Column") -> np.ndarray:
        """Return the label of each row, int64 `[rows]`; float64 if the task expects numbers."""
        if expected_labels() == "numbers":
            return self._targets(path, column)
        if self.labels is None:
            places = {str(number): number for number in range(len(column) + 1)}
            remedy = f"List the values of {self.target!r} in data.labels"
        else:
            places = {text: label for label, texts in enumerate(self.labels) for text in _listed(texts)}
            remedy = "Add it to data.labels, or remove such rows"
        at = _places(column, places)
        if (at < 0).any():
            row = int(np.argmax(at < 0))
            expected = f"a label in column {self.target!r}"
            raise UserError(
                str(path), expected, f"{str(column.iloc[row])[:40]!r} in {self._place(path, column, row)}", remedy
            )
        return at

    def _targets(self, path: Path, column: "Column") -> np.ndarray:
        """Return the number of each row, float64 `[rows]`."""
        import pandas as pd

        numbers = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
        if not np.isfinite(numbers).all():
            row = int(np.argmin(np.isfinite(numbers)))
            got = f"{str(column.iloc[row])[:40]!r} in {self._place(path, column, row)}"
            raise UserError(str(path), f"a number in column {self.target!r}", got, "Correct or remove such rows")
        return numbers

    def _ids_of_clients(self, path: Path, column: "Column") -> np.ndarray:
        absent = self._absent(column)
        if absent.any():
            row, remedy = int(np.argmax(absent)), "Name the client of each row, or remove such rows"
            raise UserError(
                str(path),
                f"a client in column {self.client!r}",
                f"an empty cell in {self._place(path, column, row)}",
                remedy,
            )
        return column.astype(str).str.strip().to_numpy(dtype=object)


@dataclass(frozen=True, kw_only=True)
class Csv(_Table):
    """A user's CSV file, with columns of numbers and of categories; scales and categories are declared.

    Args:
        separator: The text between two cells; spaces around cells are ignored.
        comment: The first character of lines to skip.
    """

    separator: str = ","
    comment: str | None = None

    def _frame(self, path: Path, names: list[str] | None) -> "pd.DataFrame":
        import pandas as pd

        try:
            # Read without a header, because with one pandas renames a name that comes twice, and takes the first column
            # for row names if rows are longer than the header.
            cells = pd.read_csv(
                path,
                sep=self.separator,
                comment=self.comment,
                dtype=str,
                keep_default_na=False,
                skipinitialspace=True,
                header=None,
            )
        except (ValueError, OSError) as error:  # pandas raises ValueError for unreadable files
            self._check_separator(path, [*self.numeric, *self.categories] if names is None else len(names))
            raise _damaged(path, "a CSV file", error) from None
        if names is not None:
            if len(names) != cells.shape[1]:
                self._check_separator(path, len(names))
            return _renamed(path, cells, names)
        header = [str(name).removeprefix("\ufeff").strip() for name in cells.iloc[0]]
        return cells.iloc[1:].set_axis(header, axis=1)

    def _require_columns(self, path: Path, frame: "pd.DataFrame", wanted: Sequence[str]) -> None:
        if not set(wanted) <= set(frame.columns):
            self._check_separator(path, wanted)
        super()._require_columns(path, frame, wanted)

    def _check_separator(self, path: Path, wanted: Sequence[str] | int) -> None:
        refuse_other_separator(path, self.separator, wanted, "data.separator", self.comment)

    def _place(self, path: Path, column: "Column", row: int) -> str:
        """Return the line of the file; lines are counted from 1, with the header, empty lines and comments."""
        wanted, end, number = int(str(column.index[row])), 0, -1
        with path.open(encoding="utf-8", newline="") as file:
            try:
                reader = csv.reader(file, delimiter=self.separator, skipinitialspace=True)
                for cells in reader:
                    start, end = end + 1, reader.line_num
                    first = cells[0].strip() if cells else ""
                    skipped = self.comment is not None and first.startswith(self.comment)
                    number += not skipped and (len(cells) > 1 or first != "")
                    if number == wanted:
                        return f"line {start}"
            except (csv.Error, TypeError, UnicodeDecodeError):  # pandas reads more kinds of files
                pass
        return f"row {wanted}"


@dataclass(frozen=True, kw_only=True)
class Parquet(_Table):
    """A user's Parquet file, declared like a CSV file."""

    def _frame(self, path: Path, names: list[str] | None) -> "pd.DataFrame":
        import pandas as pd

        require_extra("data.name = 'parquet'", "parquet")
        try:
            frame = pd.read_parquet(path)
        except (ValueError, OSError) as error:
            raise _damaged(path, "a Parquet file", error) from None
        return frame if names is None else _renamed(path, frame, names)


@dataclass(frozen=True, kw_only=True)
class Npz(_Files):
    """A user's arrays in a file of `numpy.savez`: `inputs`, `labels` and optionally `client_ids`, `classes`.

    `test_inputs` and `test_labels` may be in the same file; they count as public.

    Args:
        scale: The divisor of inputs, such as 255 for images of bytes; a public constant.
        mean: The number to subtract from each channel, or each feature, after that; public constants.
        std: The number to divide each channel or feature by, after that; public constants.
    """

    scale: float = 1.0
    mean: list[float] | None = None
    std: list[float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_scale(self.scale)
        _check_channels(self.mean, self.std)

    @property
    def declared(self) -> Declared:
        """The constants of the inputs; see `Declared`."""
        return Declared(scale=self.scale, mean=tuple(self.mean or ()), std=tuple(self.std or ()))

    def _read(self, path: Path) -> dict[str, object]:
        found = read_arrays(path)
        for key in ("inputs", "test_inputs"):
            array = found.get(key)
            if not isinstance(array, np.ndarray):
                continue
            _require_scale_of_bytes(key, array, self.scale)
            if array.dtype.kind in "biuf":
                with np.errstate(over="ignore"):  # values that overflow become infinite, and are refused
                    found[key] = _normalized(array / np.float32(self.scale), self.mean, self.std)
        return found


@dataclass(frozen=True, kw_only=True)
class Npy:
    """A user's arrays in files of `numpy.save`; inputs stay on the disk, so that they may be larger than memory.

    A round reads the examples of its clients. All processes read the same files.

    Args:
        inputs: The inputs; a path from the data root, as all files here.
        labels: The labels, whole numbers from 0.
        client_ids: The natural client of each example; None if there are none.
        test_inputs: Inputs of public test examples. Without them, a fifth of the examples is held out to test on: of
            each natural client, or without natural clients, of each label. With `partition = "natural"`, `data.test` is
            then required: `"within"` tests on that fifth, `"clients"` on the examples of a fifth of the clients.
        test_labels: Their labels.
        scale: The divisor of inputs, such as 255 for images of bytes; a public constant.
        mean: The number to subtract from each channel, or each feature, after that; public constants.
        std: The number to divide each channel or feature by, after that; public constants.
        label_count: Number of labels; None for one more than the largest.

    Raises:
        UserError: If `scale` is out of range.
    """

    natural: ClassVar[bool] = True
    test: ClassVar[Whose] = "public"
    inputs: str
    labels: str
    client_ids: str | None = None
    test_inputs: str | None = None
    test_labels: str | None = None
    scale: float = 1.0
    mean: list[float] | None = None
    std: list[float] | None = None
    label_count: int | None = None

    def __post_init__(self) -> None:
        _require_scale(self.scale)
        _check_channels(self.mean, self.std)

    @property
    def declared(self) -> Declared:
        """The constants of the inputs; see `Declared`."""
        return Declared(scale=self.scale, mean=tuple(self.mean or ()), std=tuple(self.std or ()))

    def load(self, data_root: Path | None) -> Dataset:
        """Map the inputs and read the other files; see `DatasetSource.load`.

        Raises:
            UserError: If a file is missing or damaged, or has unexpected contents.
        """
        root = data_root or default_data_root()
        found: dict[str, object] = {} if self.label_count is None else {"classes": self.label_count}
        for key in ("inputs", "labels", "client_ids", "test_inputs", "test_labels"):
            file = getattr(self, key)
            if file is None:
                continue
            path = _existing(root, file, f"data.{key}")
            try:
                array = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
                raise _damaged(path, "a file of numpy.save without objects", error) from None
            if not isinstance(array, np.memmap):
                array.close()
                raise UserError(f"data.{key}", "a file of numpy.save", f"{path}, one of numpy.savez", "Use numpy.save")
            if key.endswith("inputs") and array.ndim and array.dtype.kind in "biuf":
                _require_scale_of_bytes(key, array, self.scale)
                found[key] = MappedInputs(array, self.scale, _channels(array.shape, self.mean, self.std))
            else:
                found[key] = np.array(array)
        return dataset_of(found, Path(self.inputs).name)


@dataclass(frozen=True, kw_only=True)
class Leaf(_Files):
    """A user's file in LEAF's JSON: `users`, and `user_data` with `x` and `y` of each; users may have no example.

    Args:
        shape: Shape of one input; None for the nesting of the lists.

    Source of the format: Caldas et al., LEAF: A Benchmark for Federated Settings, 2018.
    """

    shape: list[int] | None = None

    def _read(self, path: Path) -> dict[str, object]:
        try:
            found = json.loads(path.read_text(encoding="utf-8-sig"))
            users, held = found["users"], found["user_data"]
            parts = [(user, list(held[user]["x"]), list(held[user]["y"])) for user in users]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise _damaged(path, "LEAF's JSON with users and user_data", error) from None
        if len(set(map(str, users))) < len(users):
            raise UserError(str(path), "different users", "one of them twice", "List each user once")
        for user, inputs, labels in parts:
            if len(inputs) != len(labels):
                got = f"{len(inputs)} and {len(labels)}"
                raise UserError(str(path), f"as many x as y of user {user}", got, "Correct the file")
        inputs = [row for _, rows, _ in parts for row in rows]
        if self.shape is not None:
            size = math.prod(self.shape)
            for at, row in enumerate(inputs):
                expected = f"{size} numbers in each input, of shape {self.shape}"
                try:
                    inputs[at] = np.asarray(row, dtype=np.float32)
                except (ValueError, TypeError) as error:
                    raise UserError(str(path), expected, f"{error} in row {at}", "Correct the file") from None
                if inputs[at].size != size:
                    raise UserError(str(path), expected, f"{inputs[at].size} in row {at}", "Correct data.shape")
            inputs = np.asarray(inputs, dtype=np.float32).reshape(-1, *self.shape)
        return {
            "inputs": inputs,
            "labels": [label for _, _, labels in parts for label in labels],
            "client_ids": [str(user) for user, rows, _ in parts for _ in rows],
            "clients": [str(user) for user in users],
        }


@dataclass(frozen=True, kw_only=True)
class ImageFolder(_Files):
    """A folder of images of one size, `CLIENT/LABEL/image.png` or `LABEL/image.png`; needs the package Pillow.

    Labels are numbered in the order of their names. Pixels are divided by 255.

    Args:
        clients_first: True if the first level of folders is the clients.
        mean: The number to subtract from each channel, after the division by 255; a public constant.
        std: The number to divide each channel by, after that; a public constant.
        labels: Names of the folders of labels, in their order; None for all that exist, which then count as public.
    """

    clients_first: bool = True
    mean: list[float] = field(default_factory=list)
    std: list[float] = field(default_factory=list)
    labels: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_channels(self.mean, self.std)

    @property
    def declared(self) -> Declared:
        """The constants of the inputs and the names of the labels, if listed; see `Declared`."""
        return Declared(class_names=_names(self.labels), scale=255.0, mean=tuple(self.mean), std=tuple(self.std))

    def _read(self, path: Path) -> dict[str, object]:
        require_extra("data.name = 'image-folder'", "data", ["PIL"])
        from PIL import Image, UnidentifiedImageError

        if not path.is_dir():
            raise UserError(str(path), "a folder of images", "a file", "Name the folder in data.file")
        files = sorted(file for file in path.glob("*/*/*" if self.clients_first else "*/*") if file.is_file())
        if not files:
            layout = "CLIENT/LABEL/image.png" if self.clients_first else "LABEL/image.png"
            raise UserError(str(path), f"images at {layout}", "0 files", "Move them, or change data.clients_first")
        names = self.labels or sorted({file.parent.name for file in files})
        images, labels = [], []
        for file in files:
            if file.parent.name not in names:
                raise UserError(str(file), "a label of data.labels", file.parent.name, nearest(file.parent.name, names))
            try:
                with Image.open(file) as image:
                    pixels = np.asarray(image.convert("L" if image.mode in ("1", "L", "I;16") else "RGB"))
            except (UnidentifiedImageError, OSError) as error:
                raise _damaged(file, "an image", error) from None
            pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
            if images and pixels.shape != images[0].shape:
                expected = f"channels, height and width {images[0].shape} as in {files[0].name}"
                raise UserError(str(file), expected, pixels.shape, "Give all images one size and one mode")
            images.append(pixels)
            labels.append(names.index(file.parent.name))
        inputs = np.stack(images).astype(np.float32) / np.float32(255)
        inputs = _normalized(inputs, self.mean, self.std)
        found: dict[str, object] = {"inputs": inputs, "labels": labels, "classes": max(len(names), 2), _LABELS: names}
        return {**found, "client_ids": [file.parts[-3] for file in files]} if self.clients_first else found


def read_arrays(path: Path) -> dict[str, object]:
    """Return the arrays of a file of `numpy.savez`; an array without axes becomes a number.

    Raises:
        UserError: If it is another kind of file, or holds objects.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise UserError(str(path), "a file of numpy.savez", "one of numpy.save", "Write it with numpy.savez")
            found: dict[str, np.ndarray] = {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise _damaged(path, "a file of numpy.savez without objects", error) from None
    return {name: array.item() if array.ndim == 0 else array for name, array in found.items()}


def _renamed(path: Path, frame: "pd.DataFrame", names: list[str]) -> "pd.DataFrame":
    if len(names) != frame.shape[1]:
        raise UserError("data.columns", f"{frame.shape[1]} names, as {path.name} has columns", len(names), "Correct it")
    return frame.set_axis(names, axis=1)


def _is_table(value: object, fits: Callable[[object], bool]) -> bool:
    """Return True for a table by names of columns if all its values fit."""
    return isinstance(value, Mapping) and _is_texts(list(value)) and all(map(fits, value.values()))


def _is_pair(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(one, Real) for one in value)


def _is_constant(value: object) -> bool:
    return isinstance(value, Real | str)  # `_check_fill` refuses texts, by their column


def _is_texts(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(one, str) for one in value)


def _is_labels(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(one, str) or _is_texts(one) for one in value)


def _is_scale(number: object) -> bool:
    """Return True for a number that float32 inputs can be divided by."""
    return is_real(number, 1e-20, 1e20)


def _require_scale(scale: float) -> None:
    if not _is_scale(scale):
        raise UserError("data.scale", "a number from 1e-20 to 1e20", shown(scale), "Give a divisor such as 255")


def _require_scale_of_bytes(key: str, array: np.ndarray, scale: float) -> None:
    if array.dtype == np.uint8 and scale == 1.0:
        remedy = "Set data.scale = 255, or convert them to float32 in the file"
        raise UserError("data.scale", f"a scale for {key} that are bytes", scale, remedy)


def _check_channels(mean: list[float] | None, std: list[float] | None) -> None:
    remedy = "Give one for each channel"
    for key, numbers, low in (("mean", mean, -1e20), ("std", std, 1e-20)):
        listed = numbers is None or isinstance(numbers, list | tuple)
        if not listed or not all(is_real(number, low, 1e20) for number in numbers or ()):
            raise UserError(f"data.{key}", f"numbers from {low:g} to 1e20 in a list", shown(numbers), remedy)


def _normalized(inputs: np.ndarray, mean: list[float] | None, std: list[float] | None) -> np.ndarray:
    """Return inputs `[examples, channels, ...]` with each channel's mean subtracted, divided by its std."""
    normal = _channels(inputs.shape, mean, std)
    return inputs if normal is None else (inputs - normal[0]) / normal[1]


def _channels(
    shape: tuple[int, ...], mean: list[float] | None, std: list[float] | None
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return mean and std as float32 arrays that fit an input, given the shape `[examples, channels, ...]` of all."""
    if not mean and not std:
        return None
    channels = shape[1] if len(shape) > 1 else 1
    for key, numbers in (("mean", mean), ("std", std)):
        if numbers and len(numbers) != channels:
            expected = f"{channels} numbers, one per channel"
            raise UserError(f"data.{key}", expected, numbers, "Give one for each channel")
    both = (np.array(given or [other] * channels, np.float32) for given, other in ((mean, 0.0), (std, 1.0)))
    first, second = (numbers.reshape(-1, *[1] * (len(shape) - 2)) for numbers in both)
    return first, second


def _existing(root: Path, file: str, key: str) -> Path:
    path = root / Path(file).expanduser()
    if not path.exists():
        remedy = f"Give a path from the data root, which --data-root or {DATA_ROOT_VARIABLE} sets"
        raise UserError(key, "an existing file", str(path), remedy)
    return path


def _places(column: "Column", places: Mapping[str, int]) -> np.ndarray:
    """Return the place of each cell's text, int64 `[rows]`; -1 if it has none. Whole numbers may be 1 or 1.0."""
    texts = column.astype(str).str.strip()
    exact = texts.map(places)
    plain = texts.str.replace(r"\.0+$", "", regex=True).map(places)
    return exact.fillna(plain).fillna(-1).to_numpy(dtype=np.int64)


def _listed(texts: str | Sequence[str]) -> Iterable[str]:
    return [texts] if isinstance(texts, str) else texts


def _names(labels: Sequence[str | list[str]] | None) -> tuple[str, ...] | None:
    """Return one name of each declared label."""
    return None if labels is None else tuple(" or ".join(_listed(texts)) for texts in labels)


def _damaged(path: Path, expected: str, error: Exception) -> UserError:
    reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
    got = f"{type(error).__name__}: {reason}"
    if path.is_dir():
        got = "a folder"
    elif path.is_file() and path.stat().st_size == 0:
        got = "an empty file"
    elif "pickle" in reason:  # numpy recommends an option that would run code of the file
        got = "a file with objects, or of another kind"
    return UserError(str(path), expected, got, "Correct or replace the file")

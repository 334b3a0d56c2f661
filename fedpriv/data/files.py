"""Locate the files of common public data sets, and read them without trusting their contents.

Each reader returns arrays or raises a `UserError` that names the file. No reader executes code from a file.
"""

import csv
import gzip
import importlib.util
import io
import json
import math
import os
import pickle
import warnings
import zlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedpriv.data import torchvision_cpu
from fedpriv.errors import UserError, has_extra, require_extra

__all__ = [
    "DATA_ROOT_VARIABLE",
    "REPLACE",
    "content_of",
    "default_data_root",
    "local_path",
    "locate",
    "other_separator",
    "read_cifar_batch",
    "read_digits",
    "read_idx",
    "read_libsvm",
    "refuse_other_separator",
]

DATA_ROOT_VARIABLE = "FEDPRIV_DATA"
REPLACE = "Replace the file, or delete it to download it again if possible"
SEPARATORS = (",", ";", "\t", "|")
IDX_TYPES = {0x08: np.dtype(np.uint8), 0x0C: np.dtype(">i4")}


def default_data_root() -> Path:
    """Return the data folder: the environment variable FEDPRIV_DATA, or `data` in the working directory."""
    return Path(os.environ.get(DATA_ROOT_VARIABLE) or "data").expanduser()


def local_path(key: str, folder: str, package: str | None) -> Path:
    """Return an existing file or folder.

    Args:
        key: The key that names it, for errors.
        folder: A path; from the package's folder if there is one.
        package: Import name of an installed package; None for none.

    Raises:
        UserError: If the package or the path does not exist.
    """
    root = Path()
    if package is not None:
        found = importlib.util.find_spec(package) if package.isidentifier() else None
        if found is None or not found.submodule_search_locations:
            got, remedy = repr(package), "Install it, or give a path without a package"
            raise UserError(key.rpartition(".")[0] + ".package", "an installed package", got, remedy)
        root = Path(next(iter(found.submodule_search_locations)))
    path = root / Path(folder).expanduser()
    if not path.exists():
        raise UserError(key, "an existing path", str(path), "Correct it: nothing is downloaded")
    return path


def locate(data_root: Path, folder: str, names: Sequence[str], source: str | None) -> list[Path]:
    """Return the paths of `names` in `data_root / folder`, each plain or with .gz added; download missing files.

    Args:
        data_root: The folder of all data.
        folder: The data set's folder in it.
        names: Names of the plain files.
        source: The torchvision class that can download them; None if there is none.

    Raises:
        UserError: If a file is missing and cannot be downloaded; the message lists the files and their folder.
    """
    place = data_root / folder
    reason = None if source is None or _all_present(place, names) else _download_failure(source, data_root)
    missing = [name for name in names if _plain_or_packed(place / name) is None]
    if missing:
        raise _missing(data_root, place, missing, reason)
    return [path for name in names if (path := _plain_or_packed(place / name)) is not None]


def other_separator(path: Path, used: str, wanted: Collection[str] | int, comment: str | None = None) -> str | None:
    """Return the separator of a CSV file's columns, judged by the first line; None if no other one fits better.

    Args:
        path: The file.
        used: The separator that is expected.
        wanted: Names of columns of the header; or the number of columns of a file without a header.
        comment: The first character of lines to skip.
    """
    fits: dict[str, int] = {}
    for separator in {used: None} | dict.fromkeys(SEPARATORS):
        try:
            with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
                lines = (line for line in file if line.strip() and not (comment and line.lstrip().startswith(comment)))
                cells = next(csv.reader(lines, delimiter=separator, skipinitialspace=True), [])
        except (OSError, csv.Error, TypeError):  # pandas takes separators of several characters
            return None
        names = {cell.strip() for cell in cells}
        fits[separator] = len(cells) == wanted > 1 if isinstance(wanted, int) else sum(name in names for name in wanted)
    best = max(fits, key=lambda separator: fits[separator])  # the first of equals is the one that is used
    return None if best == used else best


def refuse_other_separator(
    path: Path, used: str, wanted: Collection[str] | int, key: str | None = None, comment: str | None = None
) -> None:
    """Raise UserError if the columns of a CSV file have another separator; see `other_separator`.

    Args:
        path: The file.
        used: The separator that is expected.
        wanted: Names of columns of the header; or the number of columns of a file without a header.
        key: The key that sets the separator; None if it is fixed.
        comment: The first character of lines to skip.

    Raises:
        UserError: As described.
    """
    found = other_separator(path, used, wanted, comment)
    if found is not None:
        fixed = f"Save the file with {json.dumps(used)} between the columns"
        remedy = fixed if key is None else f"Set {key} = {json.dumps(found)}"
        raise UserError(str(path), f"columns separated by {json.dumps(used)}", json.dumps(found), remedy)


def read_idx(path: Path) -> np.ndarray:
    """Return the array in an idx file (LeCun's format for MNIST), plain or gzipped: uint8 or int32.

    Raises:
        UserError: If the file is damaged, truncated, or has another number type.
    """
    content = content_of(path)
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in IDX_TYPES:
        raise _damaged(path, "an idx file of bytes or 32-bit integers", f"the first bytes {content[:4].hex()!r}")
    dtype, start = IDX_TYPES[content[2]], 4 + 4 * content[3]
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
    if len(content) != start + math.prod(shape) * dtype.itemsize:
        raise _damaged(path, f"an idx file of shape {shape}", f"{len(content)} bytes")
    values = np.frombuffer(content, dtype, offset=start).reshape(shape)
    return values.astype(dtype.newbyteorder("="), copy=False)


def read_cifar_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return images uint8 `[examples, 3, 32, 32]` and labels int64 `[examples]` of one CIFAR-10 batch (a pickle).

    Only numpy arrays are unpickled: a file that names anything else is rejected before any of its code runs.

    Raises:
        UserError: If the file is damaged, truncated, or not a CIFAR-10 batch.
    """
    batch = _unpickle(path)
    try:
        named = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
        images, labels = np.asarray(named["data"]), np.asarray(named["labels"])
        images = images.reshape(-1, 3, 32, 32)
    except Exception as error:
        raise _damaged(path, "a CIFAR-10 batch", f"{type(error).__name__}: {error}") from None
    sound = images.dtype == np.uint8 and labels.dtype.kind in "iu" and labels.shape == images.shape[:1] != (0,)
    if not sound or labels.min() < 0 or labels.max() > 9:
        raise _damaged(path, "byte images, each with a label from 0 to 9", "other contents")
    return images, labels.astype(np.int64)


def read_digits() -> np.ndarray:
    """Return the digits of the installed scikit-learn: float64 `[1797, 65]`, 64 pixels from 0 to 16 and the label.

    The file is read without importing scikit-learn, which takes longer than importing torch.

    Raises:
        UserError: If scikit-learn is not installed, or its file is missing or damaged.
    """
    require_extra("data.name = 'digits'", "data", ["sklearn"])
    package = importlib.util.find_spec("sklearn")
    folders = package.submodule_search_locations if package else None
    path = Path(next(iter(folders or ()), ""), "datasets", "data", "digits.csv.gz")
    try:
        with warnings.catch_warnings(action="error", category=UserWarning):  # an empty file is one
            table = np.loadtxt(path, delimiter=",")
    except (OSError, EOFError, ValueError, UserWarning, zlib.error) as error:
        remedy = "Install scikit-learn again"
        raise UserError(str(path), "scikit-learn's digits", f"{type(error).__name__}: {error}", remedy) from None
    if table.shape != (1797, 65):
        raise _damaged(path, "1,797 rows of 65 numbers", f"an array of shape {table.shape}")
    return table


def read_libsvm(path: Path) -> tuple[Any, np.ndarray]:
    """Return the sparse float32 matrix `[examples, 1 + largest index]` and float64 labels of a LIBSVM text file.

    Column i holds index i of the file, so column 0 is empty if indices start at one, as they should.

    Raises:
        UserError: If the file is missing, empty, in another format, or has non-finite numbers; if scikit-learn is
            missing.
    """
    require_extra("data.name = 'libsvm'", "data", ["sklearn"])
    from sklearn.datasets import load_svmlight_file

    if not path.is_file():
        remedy = f"Set the data root, from which paths start, with --data-root or {DATA_ROOT_VARIABLE}"
        raise UserError("data.file", "a LIBSVM text file", f"{path}, which is not a file", remedy)
    options: dict[str, Any] = {"dtype": np.float32, "zero_based": True}
    try:
        loaded = load_svmlight_file(str(path), **options)
    except Exception as error:
        got = f"{type(error).__name__}: {error}"
        raise _damaged(path, "LIBSVM text with indices below 2^31", got, "Correct the file") from None
    matrix, labels = loaded[0], np.asarray(loaded[1], dtype=np.float64)
    if len(labels) == 0 or not (np.isfinite(matrix.data).all() and np.isfinite(labels).all()):
        got = "an empty file, NaN or infinity"
        raise _damaged(path, "at least one example and finite numbers", got, "Correct the file")
    return matrix, labels


def _all_present(place: Path, names: Sequence[str]) -> bool:
    return all(_plain_or_packed(place / name) for name in names)


def _plain_or_packed(path: Path) -> Path | None:
    packed = path.with_name(path.name + ".gz")
    return path if path.is_file() else packed if packed.is_file() else None


def _download_failure(source: str, data_root: Path) -> str | None:
    """Return the reason why the download failed, in one line; None if it succeeded."""
    if not has_extra("vision"):
        return "downloading needs pip install 'fedpriv[vision]'"
    try:
        torchvision_cpu.download(source, data_root)
    except Exception as error:
        reason = str(error).strip() or type(error).__name__
        return reason.splitlines()[-1]
    return None


def _missing(data_root: Path, place: Path, missing: list[str], reason: str | None) -> UserError:
    files = ", ".join(missing)
    got = f"{len(missing)} missing, and the download failed ({reason})" if reason else f"{len(missing)} missing"
    remedy = f"Put them there, or change the data root {data_root} with --data-root or {DATA_ROOT_VARIABLE}"
    return UserError("data.name", f"the files {files} (plain or .gz) in {place}", got, remedy)


def _damaged(path: Path, expected: str, got: str, remedy: str = REPLACE) -> UserError:
    return UserError(str(path), expected, got, remedy)


def content_of(path: Path) -> bytes:
    """Return a file's contents, unpacked if its name ends in .gz.

    Raises:
        UserError: If it cannot be read or unpacked.
    """
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(path, "a readable file", f"{type(error).__name__}: {error}") from None


def _unpickle(path: Path) -> Any:
    try:
        return _ArraysOnly(io.BytesIO(content_of(path)), encoding="latin1").load()
    except UserError:
        raise
    except Exception as error:  # a damaged pickle may raise any exception
        raise _damaged(path, "a pickle of numpy arrays", f"{type(error).__name__}: {error}") from None


class _ArraysOnly(pickle.Unpickler):
    """An unpickler that allows numpy's array constructors and no other global."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the constructor; never imports anything that the file names."""
        known = _array_constructors()
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it requires {module}.{name}, which no array needs")
        return known[module, name]


def _array_constructors() -> dict[tuple[str, str], Any]:
    """Return the constructors in an array's pickle, under the names used by numpy 1 and numpy 2."""
    reconstruct = np.empty(0).__reduce__()[0]
    from_buffer = np.empty(0).__reduce_ex__(5)[0]
    return {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("numpy.core.multiarray", "_reconstruct"): reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): reconstruct,
        ("numpy.core.numeric", "_frombuffer"): from_buffer,
        ("numpy._core.numeric", "_frombuffer"): from_buffer,
    }

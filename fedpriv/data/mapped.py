"""Inputs larger than memory: memory-mapped files, of which each access reads the rows that it needs."""

import mmap
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from fedpriv.errors import UserError

__all__ = ["MappedInputs", "chosen_rows", "joined_rows", "mapped", "rows_at"]


class MappedInputs:
    """Inputs in a memory-mapped file, which take the place of a tensor of inputs: an access reads only its rows.

    Indexing returns a float32 tensor. Other processes open the file under the same path.

    Args:
        array: An array that `numpy.load(path, mmap_mode="r")` or `numpy.memmap` returned, `[rows, *input_shape]`.
        scale: The divisor of all values.
        normal: The arrays to subtract after that, and to divide by; each fits one input. None for neither.
        rows: The rows of the array that these inputs are, int64; None for all.
        device: The device of the tensors that are read.
    """

    dtype = torch.float32

    def __init__(
        self,
        array: np.memmap[Any, Any],
        scale: float = 1.0,
        normal: tuple[np.ndarray, np.ndarray] | None = None,
        rows: np.ndarray | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self._array, self._scale, self._normal = array, scale, normal
        self._rows, self._device = rows, torch.device(device)

    @property
    def kind(self) -> str:
        """The kind of numbers in the file, as in `numpy.dtype.kind`."""
        return self._array.dtype.kind

    @property
    def shape(self) -> torch.Size:
        """Number of rows, and shape of one input."""
        return torch.Size((len(self), *self._array.shape[1:]))

    @property
    def parts(self) -> tuple[str, tuple[np.ndarray, ...]]:
        """The path of the file, and arrays that determine the inputs made of it."""
        array, normal = self._array, () if self._normal is None else self._normal
        order = int(not array.flags.c_contiguous)
        place = np.array([array.offset, order, *array.shape])
        kind = np.frombuffer(array.dtype.str.encode(), np.uint8)
        rows = () if self._rows is None else (self._rows,)
        return str(array.filename), (place, kind, np.array([self._scale]), *rows, *normal)

    def __len__(self) -> int:
        return len(self._array) if self._rows is None else len(self._rows)

    def __getitem__(self, at: "slice | np.ndarray | Tensor") -> Tensor:
        """Read rows: `at` is a slice, or an array or tensor of row numbers or a mask."""
        index = at.cpu().numpy() if isinstance(at, Tensor) else at
        rows = index if self._rows is None else self._rows[index]
        with np.errstate(over="ignore"):  # values that overflow become infinite, and are refused below
            values = np.array(self._array[rows], dtype=np.float32)
        if not np.isfinite(values).all():
            raise UserError(
                str(self._array.filename),
                "finite numbers",
                f"NaN or infinity in row {self._first_wrong(rows, values)}",
                "Fill in or drop missing values, by a rule that does not use other clients' data",
            )
        values /= np.float32(self._scale)
        if self._normal is not None:
            values = (values - self._normal[0]) / self._normal[1]
        return torch.from_numpy(values).to(self._device)

    def chosen(self, rows: np.ndarray) -> "MappedInputs":
        """Return the rows of these numbers, int64, without reading any."""
        return self._with(rows if self._rows is None else self._rows[rows], self._device)

    def joined(self, other: "MappedInputs") -> "MappedInputs":
        """Return these rows followed by those of `other`, which are of the same file, without reading any."""
        parts = [np.arange(len(part)) if part._rows is None else part._rows for part in (self, other)]
        return self._with(np.concatenate(parts), self._device)

    def to(self, device: torch.device | str) -> "MappedInputs":
        """Return the same inputs, which are read to a device."""
        return self._with(self._rows, device)

    def _with(self, rows: np.ndarray | None, device: torch.device | str) -> "MappedInputs":
        return MappedInputs(self._array, self._scale, self._normal, rows, device)

    def cpu(self) -> "MappedInputs":
        """Return the same inputs, which are read to the CPU."""
        return self.to("cpu")

    def split(self, size: int, dim: int = 0) -> Iterator[Tensor]:
        """Read pieces of at most `size` rows, one after the other."""
        if dim != 0:
            raise ValueError("mapped inputs have one axis of rows")
        return (self[start : start + size] for start in range(0, len(self), size))

    def __reduce__(self) -> tuple[object, ...]:
        array = self._array
        order = "C" if array.flags.c_contiguous else "F"
        place = (array.filename, array.dtype, array.offset, array.shape, order)
        return _opened, (place, self._scale, self._normal, self._rows, self._device)

    def _first_wrong(self, rows: slice | np.ndarray, values: np.ndarray) -> int:
        numbers = (np.arange(len(self._array))[rows] if isinstance(rows, slice) else np.asarray(rows)).reshape(-1)
        finite = np.isfinite(values.reshape(len(numbers), -1)).all(axis=1)
        return int(numbers[np.argmin(finite)])


def _opened(place: tuple[Any, ...], *options: Any) -> MappedInputs:
    """Return mapped inputs that were sent to this process."""
    name, dtype, offset, shape, order = place
    return MappedInputs(np.memmap(name, dtype, "r", offset, shape, order), *options)


def mapped(array: object) -> MappedInputs | None:
    """Return the inputs of an array that is the whole of a memory-mapped file, or mapped inputs; otherwise None."""
    if isinstance(array, np.memmap) and array.ndim and isinstance(array.base, mmap.mmap) and array.filename is not None:
        return MappedInputs(array)
    return array if isinstance(array, MappedInputs) else None


def chosen_rows(inputs: Tensor, rows: np.ndarray) -> Tensor:
    """Return some rows; a copy in memory, unless the inputs are mapped."""
    held = mapped(inputs)
    return inputs[torch.from_numpy(rows).to(inputs.device)] if held is None else cast(Tensor, held.chosen(rows))


def rows_at(inputs: Tensor, at: Tensor) -> Tensor:
    """Return the rows at int64 `at` of any shape, `[*at.shape, *input_shape]`, in memory."""
    if mapped(inputs) is not None:
        return inputs[at]
    return inputs.index_select(0, at.flatten()).view(*at.shape, *inputs.shape[1:])  # faster than an index


def joined_rows(one: Tensor, other: Tensor) -> Tensor:
    """Return the rows of both, of which the second may be held out of the first; see `chosen_rows`."""
    first, second = mapped(one), mapped(other)
    if first is not None and second is not None:
        return cast(Tensor, first.joined(second))
    return torch.cat([one, other])

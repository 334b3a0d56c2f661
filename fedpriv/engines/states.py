"""Client states: created when a client is first seen, in memory up to a bound and on disk beyond it."""

import errno
import math
import mmap
import os
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Generic

import torch
from torch import Tensor

from fedpriv.errors import UserError, number_of
from fedpriv.methods import ClientStateT, Method

__all__ = ["StateStore"]

# Most floats of one piece of memory. The store grows piece by piece and never copies states to grow.
_MAX_SLAB_FLOATS = 2**24
_ALIGNMENT = 64
# Fewest elements of a row for which padding costs less than two percent.
_MIN_PADDED_ROW = 1024
# Longest row that is copied faster by an index over many rows than row by row.
_MAX_INDEXED_ROW = 2048


class StateStore(Generic[ClientStateT]):
    """The states of the clients that took part; grows with the clients seen, not with the population.

    States are stored in pieces of memory, one row for each client. Once `memory` bytes are used, the least recently
    used state makes room: its row goes to a file without a name (a crash leaves nothing behind).

    Args:
        method: The method that defines the states.
        size: Number of parameters.
        device: The device of the states.
        memory: Most bytes of states in memory; None for no bound.
        folder: The folder of the file; None for the system's temporary folder.
        exact: Keep all fields in float64.

    Raises:
        UserError: If `memory` does not hold one state.
    """

    def __init__(
        self,
        method: Method[ClientStateT],
        size: int,
        device: torch.device | str = "cpu",
        memory: int | None = None,
        folder: Path | None = None,
        exact: bool = False,
    ) -> None:
        dtype = torch.float64 if exact else None
        self._fresh = [field.to(device, dtype or field.dtype) for field in method.init_client(size)]
        self._kind, self._names = type(method.init_client(0)), method.init_client(0)._fields
        self._device = torch.device(device)
        self._row_bytes = sum(field.numel() * field.element_size() for field in self._fresh)
        self._strides = [_padded(field) for field in self._fresh]
        self._steps = [n * field.element_size() for n, field in zip(self._strides, self._fresh, strict=True)]
        in_memory = sum(self._steps)
        self._capacity = None if memory is None or not in_memory else memory // in_memory
        if self._capacity == 0:
            expected = f"at least {in_memory:,} bytes, one client's state"
            raise UserError("--state-memory", expected, f"{memory:,} bytes", "Give more, or use a smaller model")
        widest = max(self._strides, default=1)
        self._slab_rows = max(_MAX_SLAB_FLOATS // max(widest, 1), 1)
        self._folder = folder
        self._clear()

    def _clear(self) -> None:
        self._slabs: list[list[Tensor]] = []
        self._addresses: list[tuple[int, ...]] = []  # of each row's fields
        self._places: list[tuple[int, int]] = []  # of each row: its piece, and its position in the piece
        self._slots: dict[int, int] = {}  # client -> row in memory, least recently used first
        self._free: list[int] = []
        self._file: _SpillFile | None = None
        self._before: dict[int, list[Tensor]] | None = None  # states from before a round that may be taken back

    @property
    def capacity(self) -> int | None:
        """Most clients with a state in memory at once; None for no bound."""
        return self._capacity

    def __len__(self) -> int:
        return len(self._slots) + (len(self._file.away) if self._file else 0)

    @contextmanager
    def borrowed(self, clients: Sequence[int]) -> Iterator[ClientStateT]:
        """Yield the states of `clients`, fields `[clients, ...]`, to be changed in place; new clients start fresh.

        Raises:
            UserError: If the disk is full, or memory cannot hold the states of all `clients`.
        """
        if not self._fresh:
            self._slots.update(dict.fromkeys(clients, 0))
            yield self._kind()
            return
        self._refuse_more_than_fit(clients)
        rows = [self._slot(client, clients) for client in clients]
        slab, first = self._places[rows[0]]
        if [self._places[row] for row in rows] == [(slab, first + i) for i in range(len(rows))]:
            yield self._kind(*(field[first : first + len(rows)] for field in self._slabs[slab]))
            return
        copy_states = self._copy_by_index if max(self._strides) <= _MAX_INDEXED_ROW else self._copy_by_row
        with copy_states(rows) as copies:
            yield copies

    @contextmanager
    def _copy_by_row(self, rows: Sequence[int]) -> Iterator[ClientStateT]:
        views = [self._row(row) for row in rows]
        copies = self._kind(*(torch.stack(parts) for parts in zip(*views, strict=True)))
        yield copies
        for view, *new in zip(views, *copies, strict=True):
            for field, value in zip(view, new, strict=True):
                field.copy_(value)

    @contextmanager
    def _copy_by_index(self, rows: Sequence[int]) -> Iterator[ClientStateT]:
        pieces = self._pieces(rows)
        copies = self._kind(*(fresh.new_empty((len(rows), *fresh.shape)) for fresh in self._fresh))
        for slab, at, within in pieces:
            for copy, field in zip(copies, self._slabs[slab], strict=True):
                copy[at] = field[within]
        yield copies
        for slab, at, within in pieces:
            for copy, field in zip(copies, self._slabs[slab], strict=True):
                field[within] = copy[at]

    def _pieces(self, rows: Sequence[int]) -> list[tuple[int, Tensor, Tensor]]:
        """Return for each piece of memory that has rows: its number, and their positions in `rows` and in the piece."""
        places = torch.tensor([self._places[row] for row in rows])
        found: list[tuple[int, Tensor, Tensor]] = []
        for slab in places[:, 0].unique().tolist():
            at = (places[:, 0] == slab).nonzero().flatten()
            found.append((slab, at.to(self._device), places[at, 1].to(self._device)))
        return found

    def begin(self) -> None:
        """Begin a round that `undo` can take back: keep a copy of each state that is used, beyond the memory bound."""
        self._before = {}

    def undo(self) -> None:
        """Restore the states from before the last `begin`."""
        before, self._before = self._before or {}, None
        for client, fields in before.items():
            with self.borrowed([client]) as state:
                for target, source in zip(state, fields, strict=True):
                    target[0].copy_(source)

    def count(self, client: int) -> None:
        """Count a client without state as seen."""
        self._slots[client] = 0

    def addresses(self, client: int) -> tuple[int, ...]:
        """Return the addresses of the fields of a client's state; with a capacity, valid until the next call alone.

        Only for a store in the CPU's memory. Raises as `borrowed` does.
        """
        return self._addresses[self._slot(client, (client,))]

    def address_of(self, client: int) -> int:
        """Return the address of a client's first field; 0 if the client is not in memory. Move nothing."""
        slot = self._slots.get(client)
        return 0 if slot is None else self._addresses[slot][0]

    def save(self) -> dict[str, Tensor]:
        """See `Engine.save`. If some states are on disk, the tensors are memory maps of a file."""
        clients = sorted([*self._slots, *(self._file.away if self._file else ())])
        if not clients or not self._fresh:
            return {"clients": torch.tensor(clients, dtype=torch.int64)}
        if self._file is None:
            rows = [self._row(self._slots[client]) for client in clients]
            fields = [torch.stack(parts).cpu() for parts in zip(*rows, strict=True)]
        else:
            fields = self._save_to_file(clients)
        named = dict(zip(self._names, fields, strict=True))
        return {"clients": torch.tensor(clients, dtype=torch.int64), **named}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """See `Engine.restore`."""
        self._clear()
        fields = [tensors[name] for name in self._names] if len(tensors["clients"]) else []
        for row, client in enumerate(tensors["clients"].tolist()):
            with self.borrowed([client]) as state:
                for target, source in zip(state, fields, strict=True):
                    target.copy_(source[row : row + 1])

    def _refuse_more_than_fit(self, clients: Sequence[int]) -> None:
        if self._capacity is not None and len(clients) > self._capacity:
            expected, got = f"room for {number_of(len(clients), 'client')} at once", f"room for {self._capacity}"
            raise UserError("--state-memory", expected, got, "Give more memory")

    def _row(self, slot: int) -> list[Tensor]:
        slab, row = self._places[slot]
        return [field[row] for field in self._slabs[slab]]

    def _slot(self, client: int, needed: Sequence[int]) -> int:
        """Return the row of `client` and mark it as most recently used; `needed` clients must stay in memory."""
        slot = self._slots.pop(client, None)
        if slot is None:
            slot = self._room(needed)
            if self._file is None or not self._file.take_back(client, self._row(slot)):
                for field, fresh in zip(self._row(slot), self._fresh, strict=True):
                    field.copy_(fresh)
        self._slots[client] = slot
        if self._before is not None and client not in self._before:
            self._before[client] = [field.clone() for field in self._row(slot)]
        return slot

    def _room(self, needed: Sequence[int]) -> int:
        """Return an unused row."""
        if not self._free:
            if self._capacity is None or len(self._places) < self._capacity:
                self._grow(len(needed))
            else:
                self._free.append(self._evict(set(needed)))
        return self._free.pop()

    def _grow(self, needed: int) -> None:
        """Double the rows, by at most the length of a piece and within the bound."""
        have = len(self._places)
        rows = max(min(have, self._slab_rows), needed)
        if self._capacity is not None:
            rows = min(rows, self._capacity - have)
        self._places += [(len(self._slabs), row) for row in range(rows)]
        self._slabs.append(
            [_rows(field, rows, stride) for field, stride in zip(self._fresh, self._strides, strict=True)]
        )
        starts = [field.data_ptr() for field in self._slabs[-1]]
        for row in range(rows):
            self._addresses.append(tuple(at + row * step for at, step in zip(starts, self._steps, strict=True)))
        self._free += range(have + rows - 1, have - 1, -1)

    def _evict(self, needed: set[int]) -> int:
        """Write the least recently used client to the disk and return its row."""
        client = next(client for client in self._slots if client not in needed)
        if self._file is None:
            self._file = _SpillFile(self._row_bytes, self._folder)
        self._file.put_away(client, self._row(self._slots[client]))
        return self._slots.pop(client)

    def _save_to_file(self, clients: list[int]) -> list[Tensor]:
        """Return each field of all clients as a map of a file without a name, written client by client."""
        assert self._file is not None
        saved = []
        for index, fresh in enumerate(self._fresh):
            width = fresh.numel() * fresh.element_size()
            target = _SpillFile(width, self._folder)
            scratch = [field.clone() for field in self._fresh]
            for client in clients:
                if client in self._slots:
                    row = self._row(self._slots[client])
                else:
                    self._file.read(client, scratch)
                    row = scratch
                target.put_away(client, [row[index]])
            saved.append(target.as_tensor(fresh.dtype, (len(clients), *fresh.shape)))
        return saved


def _padded(field: Tensor) -> int:
    """Return the stride of rows in elements: long rows begin at multiples of 64 bytes, for fastest access."""
    line = max(_ALIGNMENT // field.element_size(), 1)
    return field.numel() if field.numel() < _MIN_PADDED_ROW else math.ceil(field.numel() / line) * line


def _rows(field: Tensor, rows: int, stride: int) -> Tensor:
    """Return zeros `[rows, *field.shape]`, each row contiguous and `stride` elements from the next."""
    return field.new_zeros((rows, stride))[:, : field.numel()].view(rows, *field.shape)


class _SpillFile:
    """Rows of equal length in a file without a name; while it had one, only its owner could read it."""

    def __init__(self, row_bytes: int, folder: Path | None) -> None:
        self._row_bytes = row_bytes
        self._where = str(folder or tempfile.gettempdir())
        self.away: dict[int, int] = {}
        self._places: dict[int, int] = {}
        try:
            if folder is not None:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._file, name = tempfile.mkstemp(dir=folder, prefix="fedpriv-states-")
            Path(name).unlink()
        except OSError as error:
            raise self._trouble(error) from None
        weakref.finalize(self, os.close, self._file)

    def put_away(self, client: int, row: list[Tensor]) -> None:
        """Write a client's row."""
        place = self._places.setdefault(client, len(self._places))
        data = memoryview(b"".join(field.cpu().reshape(-1).view(torch.uint8).numpy().tobytes() for field in row))
        at = place * self._row_bytes
        try:
            while data:
                written = os.pwrite(self._file, data, at)
                data, at = data[written:], at + written
        except OSError as error:
            raise self._trouble(error) from None
        self.away[client] = place

    def take_back(self, client: int, row: list[Tensor]) -> bool:
        """Read a client's row back and return True; return False if it is not in the file."""
        if client not in self.away:
            return False
        self.read(client, row)
        del self.away[client]
        return True

    def read(self, client: int, row: list[Tensor]) -> None:
        """Read a client's row into tensors."""
        data = bytearray(os.pread(self._file, self._row_bytes, self.away[client] * self._row_bytes))
        start = 0
        for field in row:
            count = field.numel()
            field.copy_(torch.frombuffer(data, dtype=field.dtype, count=count, offset=start).reshape(field.shape))
            start += count * field.element_size()

    def as_tensor(self, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """Return the whole file as a tensor that the system reads page by page."""
        return torch.frombuffer(mmap.mmap(self._file, 0, access=mmap.ACCESS_COPY), dtype=dtype).reshape(shape)

    def _trouble(self, error: OSError) -> UserError:
        reason = "no space left" if error.errno == errno.ENOSPC else (error.strerror or str(error))
        remedy = "Free some, or choose another --state-folder; then resume with --resume"
        return UserError(self._where, "room for the states of clients that do not fit in memory", reason, remedy)

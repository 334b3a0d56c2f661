"""Snapshots for recovery after a worker dies: all clients' states after some round, and the rounds since."""

import errno
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from fedpriv.engines.ray.host import merged
from fedpriv.errors import UserError
from fedpriv.files import write_pieces_atomically
from fedpriv.rounds import Broadcast

__all__ = ["KeepSnapshots", "Snapshots"]

# Bytes of models and cohorts after which a new snapshot is due.
_MAX_LOG_BYTES = 2**30


@dataclass(frozen=True, kw_only=True)
class KeepSnapshots:
    """Frequency and place of snapshots of the clients' states.

    Args:
        every: Fewest rounds between two snapshots.
        share: Most seconds that a snapshot may cost for each second of the rounds before it.
        folder: Folder for files of states; None for this process's memory.
    """

    every: int = 20
    share: float = 0.1
    folder: Path | None = None


class Snapshots:
    """The last snapshot of all states, and the rounds after it.

    Args:
        how: Frequency and place.
    """

    def __init__(self, how: KeepSnapshots) -> None:
        self.rounds: list[Broadcast] = []
        self._every = how.every
        self._folder = how.folder
        self._share = how.share
        self._cost = 0.0
        self._since = time.monotonic()
        self._states: dict[str, Tensor] = merged([])
        self._files: list[Path] = []
        self._number = 0

    @property
    def due(self) -> bool:
        """True if a new snapshot is due: after enough rounds for its cost, or if their models take much memory."""
        if sum(_bytes_of(past) for past in self.rounds) >= _MAX_LOG_BYTES:
            return True
        worth_it = self._cost <= self._share * (time.monotonic() - self._since)
        return len(self.rounds) >= self._every and worth_it

    def log(self, broadcast: Broadcast) -> None:
        """Record a round that all workers have finished."""
        shared = None if broadcast.shared is None else broadcast.shared.detach().cpu().clone()
        self.rounds.append(broadcast._replace(model=broadcast.model.detach().cpu().clone(), shared=shared))

    def keep(self, parts: Iterable[dict[str, Tensor]]) -> None:
        """Replace the snapshot by states in the form of `Engine.save`, part by part; forget the rounds before it.

        Raises:
            UserError: If the disk is full.
        """
        began = time.monotonic()
        if self._folder is None:
            self._states = merged(parts)
        else:
            self._number += 1
            files = [self._write(self._folder, place, part) for place, part in enumerate(parts)]
            self._drop()
            self._files = files
        self.rounds = []
        self._since = time.monotonic()
        self._cost = self._since - began

    def parts(self) -> Iterator[dict[str, Tensor]]:
        """Yield the states of the last snapshot, part by part."""
        yield from (load_file(file) for file in self._files) if self._folder is not None else [self._states]

    def clear(self) -> None:
        """Remove all states and rounds."""
        self._drop()
        self.rounds, self._states = [], merged([])

    def _write(self, folder: Path, place: int, part: dict[str, Tensor]) -> Path:
        """Write one file atomically, readable by its owner alone."""
        path = folder / f"states-{os.getpid()}-{self._number}-{place}.safetensors"
        content = safetensors_bytes({name: tensor.contiguous() for name, tensor in part.items()})
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_pieces_atomically(path, [content], 0o600, durable=False)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            remedy = "Make room, or choose another folder"
            raise UserError(str(folder), "room for the clients' states", error.strerror, remedy) from None
        return path

    def _drop(self) -> None:
        for file in self._files:
            file.unlink(missing_ok=True)
        self._files = []


def _bytes_of(past: Broadcast) -> int:
    return past.model.nbytes + past.cohort.nbytes + (0 if past.shared is None else past.shared.nbytes)

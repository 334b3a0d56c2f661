"""What a run over workers falls back to: all clients' states after some round, and the rounds since."""

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
_LOG_BYTES = 2**30


@dataclass(frozen=True, kw_only=True)
class KeepSnapshots:
    """How often clients' states are gathered, and where they are kept.

    Args:
        every: Rounds after which a new snapshot is due, at the earliest.
        share: Most seconds that a snapshot may cost for each second of the rounds before it.
        folder: Where states are kept, in files; None for this process's memory.
    """

    every: int = 20
    share: float = 0.1
    folder: Path | None = None


class Snapshots:
    """The last snapshot of all states, and the rounds that came after it.

    Args:
        how: How often, and where.
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
        """Whether there were many rounds since the last snapshot, for what one costs, or they take much memory."""
        if sum(past.model.nbytes + past.cohort.nbytes for past in self.rounds) >= _LOG_BYTES:
            return True
        worth_it = self._cost <= self._share * (time.monotonic() - self._since)
        return len(self.rounds) >= self._every and worth_it

    def log(self, broadcast: Broadcast) -> None:
        """Takes note of a round that all workers have finished."""
        self.rounds.append(broadcast._replace(model=broadcast.model.detach().cpu().clone()))

    def keep(self, parts: Iterable[dict[str, Tensor]]) -> None:
        """Replaces the snapshot by states in the form of `Engine.save`, part by part; the rounds before are forgotten.

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
        """The states that were kept last."""
        yield from (load_file(file) for file in self._files) if self._folder is not None else [self._states]

    def clear(self) -> None:
        """Forgets everything."""
        self._drop()
        self.rounds, self._states = [], merged([])

    def _write(self, folder: Path, place: int, part: dict[str, Tensor]) -> Path:
        """One file, which appears whole or not at all, and which its owner alone can read."""
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

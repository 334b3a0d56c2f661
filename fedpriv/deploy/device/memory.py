"""A client's memory on its own disk, in two phases.

Error feedback needs the server's memory to be the mean of the clients'. A client that has answered does not know
whether its answer counted, so it keeps both memories: the committed one, from before, and the pending one, from after,
with the message that it sent. The server's next order says which of its turns counted last, and that settles it:

| the order says | then |
|---|---|
| the pending turn counted | the pending memory is committed |
| the committed turn counted last | the pending memory is dropped |
| no turn counted yet, 0 | the client starts afresh |
| anything else | the memories have parted: the client says so |

One file a run and client: a line with version and checksum, then safetensors. Each also says how long the ledger was
when it was written, so that a ledger that was lost or replaced by an older copy is noticed in every run.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from fedpriv.errors import UserError
from fedpriv.files import finish_replacing, make_private_folder, prepare_replacing, unfinished
from fedpriv.flower.refusals import Refusal

__all__ = ["Fields", "MemoryFile", "Record", "remembered_ledgers"]

# The fields of a client state by name.
Fields = dict[str, Tensor]

_VERSION = "fedpriv-memory 1"
_NAME = "memory"
_MAX_HEADER = 2**20
_FACTS = ("epoch", "committed_turn", "pending_turn", "request", "ledger_lines", "ledger_hash")


@dataclass(frozen=True)
class Record:
    """What a client remembers of a run.

    Args:
        epoch: How often all memories were started anew when this one was written.
        committed_turn: The last turn that is known to have counted; 0: none.
        committed: The state after it; empty for a fresh one.
        pending_turn: The last turn that was answered; 0: none, or known to have counted.
        pending: The state after it.
        request: SHA-256 of what was asked in that turn.
        reply: The message that was sent, `[params]`; None: none.
        ledger_lines: How many lines the ledger had when this was written.
        ledger_hash: SHA-256 of the last of them.
    """

    epoch: int = 0
    committed_turn: int = 0
    committed: Fields = field(default_factory=dict)
    pending_turn: int = 0
    pending: Fields = field(default_factory=dict)
    request: str = ""
    reply: Tensor | None = None
    ledger_lines: int = 0
    ledger_hash: str = ""

    @property
    def latest_turn(self) -> int:
        """The last turn that was answered."""
        return max(self.committed_turn, self.pending_turn)

    def settled(self, last_turn: int) -> "Record | None":
        """The record once it is known which turn counted last; None if the memories have parted."""
        if last_turn == 0:
            return Record(epoch=self.epoch)
        if self.pending_turn and last_turn == self.pending_turn:
            return Record(epoch=self.epoch, committed_turn=self.pending_turn, committed=self.pending)
        if last_turn == self.committed_turn:
            return Record(epoch=self.epoch, committed_turn=self.committed_turn, committed=self.committed)
        return None

    def answered(
        self, turn: int, state: Fields, request: str, reply: Tensor, ledger_lines: int, ledger_hash: str
    ) -> "Record":
        """The record with an answer that is about to be sent, and is in the ledger."""
        sent = {"pending_turn": turn, "pending": state, "request": request, "reply": reply}
        return replace(self, **sent, ledger_lines=ledger_lines, ledger_hash=ledger_hash)


class MemoryFile:
    """The record of one run and client, in a folder of its own.

    Args:
        folder: Where all of the client's runs are kept.
        run: The run's name.
        client: The client's id.
    """

    def __init__(self, folder: Path, run: str, client: int) -> None:
        if not re.fullmatch("[0-9a-z]{1,64}", run):
            raise Refusal("model", "run", "a name of at most 64 small letters and digits", repr(run)[:80], "It is none")
        self.path = folder / f"{run}-{client}" / _NAME

    def read(self) -> Record | None:
        """The record; None if there is none.

        Raises:
            UserError: If the file is damaged or of another version. A damaged memory is never used.
        """
        return self._read(self.path)

    def complete(self, is_charged: Callable[[int, str], bool]) -> None:
        """Finishes what a crash interrupted: a message that is in the ledger, and in a file of its own beside this one.

        Args:
            is_charged: Returns whether the ledger's line of this number has this hash.
        """
        try:
            record = self._read(unfinished(self.path))
        except UserError:  # torn: its message was never charged, and the next one is written over it
            return
        if record is not None and is_charged(record.ledger_lines, record.ledger_hash):
            self.finish()

    def _read(self, path: Path) -> Record | None:
        if not path.exists():
            return None
        line, _, body = path.read_bytes().partition(b"\n")
        if line.decode(errors="replace") != f"{_VERSION} {hashlib.sha256(body).hexdigest()}":
            raise self._damaged("checksum or version differ")
        try:
            tensors = load_safetensors(body)
            facts = json.loads(tensors.pop("facts").numpy().tobytes())
        except (SafetensorError, KeyError, ValueError) as error:
            raise self._damaged(str(error)) from None
        parts = {side: _part(tensors, side) for side in ("committed.", "pending.")}
        return Record(**facts, committed=parts["committed."], pending=parts["pending."], reply=tensors.get("reply"))

    def prepare(self, record: Record) -> None:
        """Writes a record beside the file; `finish` makes it the record. All that needs room on the disk is done here.

        Raises:
            UserError: If the disk is full; the former record is still there.
        """
        facts = {name: getattr(record, name) for name in _FACTS}
        tensors = {"facts": torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)}
        tensors |= {f"committed.{name}": value for name, value in record.committed.items()}
        tensors |= {f"pending.{name}": value for name, value in record.pending.items()}
        if record.reply is not None:
            tensors["reply"] = record.reply
        make_private_folder(self.path.parent)
        # Copies: safetensors refuses tensors that share memory.
        body = save_safetensors({name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()})
        prepare_replacing(self.path, f"{_VERSION} {hashlib.sha256(body).hexdigest()}\n".encode() + body)

    def finish(self) -> None:
        """Replaces the record by the prepared one; it is on the disk when this returns."""
        finish_replacing(self.path)

    def drop(self) -> None:
        """Forgets the prepared record."""
        unfinished(self.path).unlink(missing_ok=True)

    def _damaged(self, reason: str) -> UserError:
        return _damaged(self.path, reason)


def remembered_ledgers(folder: Path) -> Iterator[tuple[Path, int, str]]:
    """Yield, for each memory of a client's runs, its file and the lines and last hash that the ledger had then.

    Only a few hundred bytes of each file are read.

    Raises:
        UserError: If a file does not say it. A memory that cannot be read is no reason to forget what was spent.
    """
    for path in sorted(folder.glob(f"*/{_NAME}")):
        try:
            facts = _facts_of(path)
            yield path, int(facts["ledger_lines"]), str(facts["ledger_hash"])
        except (ValueError, KeyError, TypeError) as error:
            raise _damaged(path, f"no account of the ledger ({error})") from None


def _facts_of(path: Path) -> dict[str, Any]:
    """Return the facts in a memory file without its tensors: safetensors is a length, a JSON header and the data."""
    with path.open("rb") as file:
        if not file.readline(_MAX_HEADER).startswith(_VERSION.encode()):
            raise ValueError("another version")
        length = int.from_bytes(file.read(8), "little")
        if length > _MAX_HEADER:
            raise ValueError("no header")
        start, end = json.loads(file.read(length))["facts"]["data_offsets"]
        file.seek(start, os.SEEK_CUR)
        return json.loads(file.read(end - start))


def _damaged(path: Path, reason: str) -> UserError:
    remedy = "Put back the newest copy, or remove the file: the server then goes by its rule for lost memories"
    return UserError(str(path), "a whole memory file", reason, remedy)


def _part(tensors: Fields, side: str) -> Fields:
    return {name.removeprefix(side): value for name, value in tensors.items() if name.startswith(side)}

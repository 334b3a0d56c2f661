"""Memory of a client on its own disk, committed in two phases.

Error feedback requires that the server's memory is the mean of the clients' memories. After a client has answered, it
does not know whether its answer counted. It therefore keeps both the committed memory from before the turn, and the
pending memory from after it, together with its message. The next instructions name the last turn that counted, which
decides:

| last turn that counted | action |
|---|---|
| the pending turn | the pending memory is committed |
| the committed turn | the pending memory is dropped |
| 0: no turn counted yet | the client restarts with a new memory |
| any other | the memories diverge: the client refuses |

There is one file for each run and client: a line with version and checksum, followed by safetensors. Each file also
records the length of the ledger at that time, so that all runs detect a ledger that was lost or replaced by an older
copy.
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
    """Memory of a client for one run.

    Args:
        epoch: Number of times that all memories had been reset when this record was written.
        committed_turn: Last turn that is known to have counted; 0 for none.
        committed: State after it; empty for a new state.
        pending_turn: Last turn that was answered; 0 for none, or if it is known to have counted.
        pending: State after it.
        request: SHA-256 of the request in that turn.
        reply: Message that was sent, `[params]`; None if there is none.
        ledger_lines: Number of lines of the ledger when this record was written.
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
        """Last turn that was answered."""
        return max(self.committed_turn, self.pending_turn)

    def settled(self, last_turn: int) -> "Record | None":
        """Return the record after `last_turn` was the last turn that counted; None if the memories diverge."""
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
        """Return the record with an answer that is recorded in the ledger and about to be sent.

        Args:
            turn: The turn of the answer.
            state: The client's memory after the answer; it takes effect if the message counts.
            request: Digest of the request; only the same request gets these bytes again.
            reply: The answer.
            ledger_lines: Lines of the ledger, with that of this answer.
            ledger_hash: Hash of the last of these lines.
        """
        sent = {"pending_turn": turn, "pending": state, "request": request, "reply": reply}
        return replace(self, **sent, ledger_lines=ledger_lines, ledger_hash=ledger_hash)


class MemoryFile:
    """Record of one run and client, in a separate folder.

    Args:
        folder: Folder of all runs of the client.
        run: Name of the run.
        client: Id of the client.
    """

    def __init__(self, folder: Path, run: str, client: int) -> None:
        if not re.fullmatch("[0-9a-z]{1,64}", run):
            expected = "a name of at most 64 lowercase letters and digits"
            raise Refusal("model", "run", expected, repr(run)[:80], "Ask the server's operator")
        self.path = folder / f"{run}-{client}" / _NAME

    def read(self) -> Record | None:
        """Return the record; None if there is none.

        Raises:
            UserError: If the file is damaged or has another version. A damaged memory is never used.
        """
        return self._read(self.path)

    def complete(self, is_charged: Callable[[int, str], bool]) -> None:
        """Complete an update that a crash interrupted after its message was recorded in the ledger.

        Args:
            is_charged: Returns whether the ledger's line of a given number has a given hash.
        """
        try:
            record = self._read(unfinished(self.path))
        except UserError:  # incomplete: its message was never charged, and the next one overwrites it
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
        """Write a record next to the file, for `finish`. Only this step needs space on the disk.

        Raises:
            UserError: If the disk is full; the previous record stays.
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
        """Replace the record by the prepared one; it is on disk when this returns."""
        finish_replacing(self.path)

    def drop(self) -> None:
        """Delete the prepared record."""
        unfinished(self.path).unlink(missing_ok=True)

    def _damaged(self, reason: str) -> UserError:
        return _damaged(self.path, reason)


def remembered_ledgers(folder: Path) -> Iterator[tuple[Path, int, str]]:
    """Yield, for each memory of a client's runs, its file and the ledger's number of lines and last hash at that time.

    Only a few hundred bytes of each file are read.

    Raises:
        UserError: If a file lacks this record. An unreadable memory must not reduce the spent budget.
    """
    for path in sorted(folder.glob(f"*/{_NAME}")):
        try:
            facts = _facts_of(path)
            yield path, int(facts["ledger_lines"]), str(facts["ledger_hash"])
        except (ValueError, KeyError, TypeError) as error:
            raise _damaged(path, f"a file without the length of the ledger ({error})") from None


def _facts_of(path: Path) -> dict[str, Any]:
    """Return the facts in a memory file without its tensors: safetensors is a length, a JSON header and the data."""
    with path.open("rb") as file:
        if not file.readline(_MAX_HEADER).startswith(_VERSION.encode()):
            raise ValueError("a different version")
        length = int.from_bytes(file.read(8), "little")
        if length > _MAX_HEADER:
            raise ValueError("no header")
        start, end = json.loads(file.read(length))["facts"]["data_offsets"]
        file.seek(start, os.SEEK_CUR)
        return json.loads(file.read(end - start))


def _damaged(path: Path, reason: str) -> UserError:
    remedy = "Restore the newest copy, or remove the file: the server then applies its rule for lost memories"
    return UserError(str(path), "an intact memory file", reason, remedy)


def _part(tensors: Fields, side: str) -> Fields:
    return {name.removeprefix(side): value for name, value in tensors.items() if name.startswith(side)}

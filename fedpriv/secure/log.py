"""A helper's record of one run: its key for the run, and every round that it answered.

Key and record are one file, which each answer replaces atomically. If the file is lost, the key is lost with it, and no
further seed of the run can be opened: a lost record never leads to a second answer about a round. The same holds for a
damaged file. A file that is restored from a backup is the one danger left, because it forgets the latest answers: a
helper's folder must not be restored.
"""

import hashlib
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedpriv.errors import UserError
from fedpriv.files import make_private_folder, replace_durably, sync_folder
from fedpriv.secure.messages import DIGEST_BYTES, KEY_BYTES
from fedpriv.secure.wire import Fields, pack

__all__ = ["Answered", "Record", "RunLog"]

LOG_FILE = "run.log"


@dataclass(frozen=True)
class Answered:
    """Digests of an answered query and of its answer."""

    query: bytes
    answer: bytes


@dataclass(frozen=True)
class Record:
    """State of a run at a helper.

    Args:
        run: Name of the run.
        private: Private X25519 key for the run.
        answered: The answered queries by round.
    """

    run: str
    private: bytes
    answered: dict[int, Answered] = field(default_factory=dict[int, Answered])

    @property
    def key(self) -> X25519PrivateKey:
        """The key for the run."""
        return X25519PrivateKey.from_private_bytes(self.private)

    def with_answer(self, round: int, answered: Answered) -> "Record":
        """Return the record after another answer."""
        return replace(self, answered={**self.answered, round: answered})

    def to_bytes(self) -> bytes:
        """Return the encoding, with a checksum."""
        rows = [part for round, one in sorted(self.answered.items()) for part in (round, one.query, one.answer)]
        content = pack("helper's record", self.run, self.private, len(self.answered), *rows)
        return content + hashlib.sha256(content).digest()

    @classmethod
    def from_bytes(cls, content: bytes) -> "Record":
        """Return the record in an encoding.

        Raises:
            UserError: If the bytes are not a record, or are damaged.
        """
        found = Fields("helper's record", content[:-DIGEST_BYTES])
        run, private = found.text(), bytes(found.octets(KEY_BYTES))
        answered: dict[int, Answered] = {}
        for _ in range(found.whole()):
            round = found.whole()
            answered[round] = Answered(bytes(found.octets(DIGEST_BYTES)), bytes(found.octets(DIGEST_BYTES)))
        found.end()
        record = cls(run, private, answered)
        if record.to_bytes() != content:
            raise UserError("helper's record", "an undamaged record", "a wrong checksum", "The run is void: erase it")
        return record


@dataclass(frozen=True)
class RunLog:
    """The files of one run.

    Args:
        home: Folder of the helper.
        run: Name of the run.
    """

    home: Path
    run: str

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return self.home / hashlib.sha256(self.run.encode()).hexdigest()[:32]

    def read(self) -> Record | None:
        """Return the record; None if the run is unknown, lost or erased.

        Raises:
            UserError: If the file is damaged, or is of another run.
        """
        path = self.folder / LOG_FILE
        if not path.exists():
            return None
        record = Record.from_bytes(path.read_bytes())
        if record.run != self.run:
            raise UserError(str(path), f"the record of run {self.run!r}", repr(record.run), "The run is void: erase it")
        return record

    def write(self, record: Record) -> None:
        """Replace the record; it is on disk, with its entry in the folder, when this returns."""
        make_private_folder(self.folder)
        replace_durably(self.folder / LOG_FILE, record.to_bytes())

    def keep_answer(self, round: int, content: bytes) -> None:
        """Store an answer, which counts only once `write` has recorded it."""
        replace_durably(self._answer(round), content)

    def kept_answer(self, round: int, digest: bytes) -> bytes:
        """Return a stored answer.

        Raises:
            UserError: If it is lost or damaged.
        """
        path = self._answer(round)
        content = path.read_bytes() if path.exists() else b""
        if hashlib.sha256(content).digest() != digest:
            remedy = "The round is void: start another one"
            raise UserError(str(path), f"the answer about round {round}", "a lost or damaged one", remedy)
        return content

    def erase(self) -> None:
        """Delete all files of the run, the key first."""
        if not self.folder.exists():
            return
        (self.folder / LOG_FILE).unlink(missing_ok=True)
        sync_folder(self.folder)
        shutil.rmtree(self.folder)
        sync_folder(self.home)

    def _answer(self, round: int) -> Path:
        return self.folder / f"{round}.answer"

"""Heads of a client's ledger: how long it was and how it ended, signed by the client and kept by servers.

A ledger that was lost, or replaced by an older copy, cannot say so itself. Two witnesses can: every memory file beside
it (see `fedpriv.deploy.device.memory`), and the server, to which the client gives the head of its ledger with each
message, and which shows the newest one with each order. A server cannot make a head up, since it lacks the client's
key. It can keep one
back: then only the client's own files speak.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from flwr.app import ConfigRecord, RecordDict

from fedpriv.errors import UserError
from fedpriv.experiment.schema import read_table
from fedpriv.files import make_private_folder, replace_durably

__all__ = ["HEAD", "KEY_FILE", "Head", "LedgerKey"]

HEAD = "head"
"""The name of the record that holds a head, in an order as in an answer."""

KEY_FILE = "ledger.key"

_MAX_LINES = 10**12


@dataclass(frozen=True, kw_only=True)
class Head:
    """The end of a ledger at some moment, in its client's own words.

    Args:
        lines: Number of releases.
        hash: SHA-256 of the last line.
        key: The client's public Ed25519 key, 64 hexadecimal digits.
        signature: Of all this by that key, 128 hexadecimal digits.
    """

    lines: int
    hash: str
    key: str
    signature: str

    @property
    def valid(self) -> bool:
        """Return whether it says what the owner of its key has signed."""
        try:
            key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(self.key))
            key.verify(bytes.fromhex(self.signature), _signed(self.lines, self.hash))
        except (ValueError, InvalidSignature):
            return False
        return 0 < self.lines <= _MAX_LINES

    def to_record(self) -> ConfigRecord:
        """Return it as the record `head`."""
        return ConfigRecord(asdict(self))

    def to_json(self) -> dict[str, Any]:
        """Return it as a JSON object."""
        return asdict(self)

    @classmethod
    def of(cls, content: RecordDict) -> "Head | None":
        """Return the head in a message; None if it holds none, or one that nobody has signed."""
        record = content.config_records.get(HEAD)
        return None if record is None else cls.of_json(dict(record))

    @classmethod
    def of_json(cls, value: Any) -> "Head | None":
        """Return the head in a JSON object; None if it is not one, or one that nobody has signed."""
        try:
            head = read_table(cls, value, HEAD)
        except (UserError, TypeError):
            return None
        return head if head.valid else None


@dataclass(frozen=True)
class LedgerKey:
    """The key with which a client signs the heads of its ledger."""

    private: Ed25519PrivateKey

    @classmethod
    def at(cls, home: Path) -> "LedgerKey":
        """Return the key in a client's home, which is made if there is none.

        Raises:
            UserError: If the file does not hold a key, or cannot be written.
        """
        path = home / KEY_FILE
        if not path.exists():
            make_private_folder(home)
            private = Ed25519PrivateKey.generate()
            replace_durably(path, private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
            return cls(private)
        try:
            private = load_pem_private_key(path.read_bytes(), None)
        except (ValueError, TypeError):
            private = None
        if not isinstance(private, Ed25519PrivateKey):
            remedy = "Put back a copy. Without it, what servers remember of this client's ledger counts no more"
            raise UserError(str(path), "an Ed25519 key in PEM form, without a passphrase", "something else", remedy)
        return cls(private)

    @property
    def public(self) -> str:
        """The public half, 64 hexadecimal digits."""
        return self.private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()

    def sign(self, lines: int, digest: str) -> Head:
        """Return the signed head of a ledger of `lines` lines, the last of which has the hash `digest`."""
        signature = self.private.sign(_signed(lines, digest)).hex()
        return Head(lines=lines, hash=digest, key=self.public, signature=signature)


def _signed(lines: int, digest: str) -> bytes:
    return f"fedpriv ledger head 1\n{lines} {digest}\n".encode()

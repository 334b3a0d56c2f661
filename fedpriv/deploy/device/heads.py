"""Heads of a client's ledger: its length and last hash, signed by the client and kept by servers.

A ledger alone does not reveal that it was lost or replaced by an older copy. Two witnesses do: every memory file beside
it (see `fedpriv.deploy.device.memory`), and the server. The client sends the head of its ledger with each message, and
the server returns the newest head with its instructions. A server cannot forge a head, because it lacks the client's
key. It can withhold a head; then only the client's own files bear witness.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

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
"""Name of the record with a head, in instructions and in answers."""

KEY_FILE = "ledger.key"

_MAX_LINES = 10**12


@dataclass(frozen=True, kw_only=True)
class Head:
    """Length and last line of a ledger at some time, signed by its client.

    Args:
        lines: Number of releases.
        hash: SHA-256 of the last line.
        key: Public Ed25519 key of the client, 64 hexadecimal digits.
        signature: Signature of lines and hash by that key, 128 hexadecimal digits.
    """

    lines: int
    hash: str
    key: str
    signature: str

    @property
    def valid(self) -> bool:
        """True if the signature is valid."""
        try:
            key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(self.key))
            key.verify(bytes.fromhex(self.signature), _signed(self.lines, self.hash))
        except (ValueError, InvalidSignature):
            return False
        return 0 < self.lines <= _MAX_LINES

    def to_record(self) -> ConfigRecord:
        """Return the record `head`."""
        return ConfigRecord(asdict(self))

    def to_json(self) -> dict[str, object]:
        """Return a JSON object."""
        return asdict(self)

    @classmethod
    def of(cls, content: RecordDict) -> "Head | None":
        """Return the head in a message; None if there is none, or if its signature is invalid."""
        record = content.config_records.get(HEAD)
        return None if record is None else cls.of_json(dict(record))

    @classmethod
    def of_json(cls, value: object) -> "Head | None":
        """Return the head in a JSON object; None if it is not a head, or if its signature is invalid."""
        try:
            head = read_table(cls, value, HEAD) if isinstance(value, dict) else None
        except (UserError, TypeError):
            return None
        return head if head is not None and head.valid else None


@dataclass(frozen=True)
class LedgerKey:
    """Key with which a client signs the heads of its ledger."""

    private: Ed25519PrivateKey

    @classmethod
    def at(cls, home: Path) -> "LedgerKey":
        """Return the key in a client's home, after creating it if it does not exist.

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
            remedy = "Restore a copy: without it, the heads of this client's ledger on servers no longer count"
            raise UserError(
                str(path), "an Ed25519 key in PEM format, without a passphrase", "a different format", remedy
            )
        return cls(private)

    @property
    def public(self) -> str:
        """Public half of the key, 64 hexadecimal digits."""
        return self.private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()

    def sign(self, lines: int, digest: str) -> Head:
        """Return the signed head of a ledger with `lines` lines and last hash `digest`."""
        signature = self.private.sign(_signed(lines, digest)).hex()
        return Head(lines=lines, hash=digest, key=self.public, signature=signature)


def _signed(lines: int, digest: str) -> bytes:
    return f"fedpriv ledger head 1\n{lines} {digest}\n".encode()

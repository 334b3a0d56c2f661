"""Keys of a deployment's nodes in its administrator's folder.

The folder `admin` has the nodes' keys in `nodes/NAME.pub`, and removed keys in `removed-keys`, one in each line: kind,
key, name, date.
"""

import datetime
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_ssh_public_key

from fedpriv.deploy.kinds import described, text_of
from fedpriv.errors import UserError, nearest
from fedpriv.files import write_atomically

__all__ = ["CONNECTION", "REMOVED", "Roster", "key_in"]

CONNECTION = "deployment"
REMOVED = "removed-keys"
DEPLOYMENT_FILE = "deployment.toml"


@dataclass(frozen=True)
class Roster:
    """Keys in an administrator's folder, in OpenSSH's format and without comments.

    Args:
        folder: The folder.
        keys: Keys of the nodes by name.
        removed: Names of removed nodes by key.
    """

    folder: Path
    keys: dict[str, bytes]
    removed: dict[bytes, str]

    @classmethod
    def read(cls, folder: Path) -> "Roster":
        """Return the roster in the folder of a deployment, or in `admin` in it.

        Raises:
            UserError: If `folder` is neither, or a list of keys cannot be read.
        """
        given = folder = folder.resolve()
        if not (folder / "register.sh").is_file():
            folder = folder / "admin"
        if not (folder / "register.sh").is_file():
            remedy = "Give the folder that `fedpriv deploy init` made, or admin in it"
            expected = "a folder of a deployment, with admin/ in it"
            whole = (given / DEPLOYMENT_FILE).is_file()
            got = "the folder of a deployment without it" if whole else described(given)
            remedy = "Move admin/ back into it" if whole else remedy
            raise UserError(str(given), expected, got, remedy)
        keys = {path.stem: key_in(path.read_bytes()) for path in sorted(folder.glob("nodes/*.pub"), key=_in_order)}
        removed = {key_in(line): line.split()[2].decode() for line in _removed(folder / REMOVED)}
        return cls(folder, keys, removed)

    @property
    def damaged(self) -> list[str]:
        """Names of nodes without a key in their file."""
        return [name for name, key in self.keys.items() if not _is_key(key)]

    @property
    def removed_nodes(self) -> list[str]:
        """Names of removed nodes that have no new key."""
        return [name for name in self.removed.values() if self.keys.get(name) in (None, *self.removed)]

    def key_of(self, name: str) -> bytes:
        """Return the key of a node, which may be removed.

        Raises:
            UserError: If there never was a node with this name.
        """
        gone = {name: key for key, name in self.removed.items()}
        if name not in self.keys and name not in gone:
            remedy = nearest(name, self.keys)
            raise UserError("NAME", f"the name of a node in {self.folder / 'nodes'}", repr(name), remedy)
        return self.keys.get(name, gone.get(name, b""))

    def without(self, name: str) -> None:
        """Record that a node is removed, and delete its key from the keys to register."""
        key = self.key_of(name)
        if key not in self.removed:
            self._note_removed(name, key)
        if name in self.keys:
            (self.folder / "nodes" / f"{name}.pub").unlink(missing_ok=True)

    def replace(self, name: str, old: bytes, new: bytes) -> None:
        """Record the new key of a node, and the old one as removed; may be repeated after a crash."""
        write_atomically(self.folder / "nodes" / f"{name}.pub", new + b"\n", 0o644)
        if old not in self.removed:
            self._note_removed(name, old)

    def _note_removed(self, name: str, key: bytes) -> None:
        path = self.folder / REMOVED
        before = path.read_bytes() if path.exists() else b""
        write_atomically(path, before + key + f" {name} {datetime.date.today().isoformat()}\n".encode())


def key_in(line: bytes) -> bytes:
    """Return kind and key of a line in OpenSSH's format, without the comment."""
    return b" ".join(line.split()[:2])


def _removed(path: Path) -> list[bytes]:
    """Return the lines of removed keys."""
    if not path.exists():
        return []
    remedy = "Restore a copy: a removed key must not be accepted again"
    lines = [line for line in text_of(path, "removed keys", remedy).splitlines() if line.strip()]
    for number, line in enumerate(lines, 1):
        if len(line.split()) < 3:
            raise UserError(f"{path}, line {number}", "kind, key and name of a removed node", repr(line[:40]), remedy)
    return [line.encode() for line in lines]


def _is_key(line: bytes) -> bool:
    try:
        load_ssh_public_key(line)
    except (ValueError, UnsupportedAlgorithm):
        return False
    return True


def _in_order(path: Path) -> tuple[int, str]:
    return len(path.name), path.name

"""Keys of a deployment's nodes in its administrator's folder.

The folder `admin` has the nodes' keys in `nodes/NAME.pub`, and removed keys in `removed-keys`, one in each line: kind,
key, name, date.
"""

import datetime
from dataclasses import dataclass
from pathlib import Path

from fedpriv.errors import UserError, nearest
from fedpriv.files import write_atomically

__all__ = ["CONNECTION", "REMOVED", "Roster", "key_in"]

CONNECTION = "deployment"
REMOVED = "removed-keys"


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
            UserError: If `folder` is neither.
        """
        folder = folder.resolve()
        if not (folder / "register.sh").is_file():
            folder = folder / "admin"
        if not (folder / "register.sh").is_file():
            remedy = "Give the folder that `fedpriv deploy init` made, or admin in it"
            expected = "a folder of a deployment, with admin/ in it"
            raise UserError(str(folder.parent), expected, "a different folder", remedy)
        keys = {path.stem: key_in(path.read_bytes()) for path in sorted(folder.glob("nodes/*.pub"), key=_in_order)}
        lines = (folder / REMOVED).read_bytes().splitlines() if (folder / REMOVED).exists() else []
        removed = {key_in(line): line.split()[2].decode() for line in lines if len(line.split()) > 2}
        return cls(folder, keys, removed)

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
            raise UserError(name, f"the name of a node in {self.folder / 'nodes'}", "an unknown name", remedy)
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


def _in_order(path: Path) -> tuple[int, str]:
    return len(path.name), path.name

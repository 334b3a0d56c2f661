"""The keys of a deployment's nodes, as its administrator's folder has them.

The folder `admin` has the keys of the nodes in `nodes/NAME.pub`, and those that were removed in `removed-keys`, one a
line: kind, key, name, date.
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
    """The keys that an administrator's folder holds, in OpenSSH's form and without comments.

    Args:
        folder: The folder.
        keys: Those of the nodes, by name.
        removed: The names of those that were removed, by key.
    """

    folder: Path
    keys: dict[str, bytes]
    removed: dict[bytes, str]

    @classmethod
    def read(cls, folder: Path) -> "Roster":
        """The roster in the folder `admin` of a deployment, or in the deployment's own folder.

        Raises:
            UserError: If `folder` is neither.
        """
        folder = folder.resolve()
        if not (folder / "register.sh").is_file():
            folder = folder / "admin"
        if not (folder / "register.sh").is_file():
            remedy = "Give the folder that `fedpriv deploy init` made, or admin in it"
            raise UserError(str(folder.parent), "a folder of a deployment, with admin/ in it", "another one", remedy)
        keys = {path.stem: key_in(path.read_bytes()) for path in sorted(folder.glob("nodes/*.pub"), key=_in_order)}
        lines = (folder / REMOVED).read_bytes().splitlines() if (folder / REMOVED).exists() else []
        removed = {key_in(line): line.split()[2].decode() for line in lines if len(line.split()) > 2}
        return cls(folder, keys, removed)

    @property
    def removed_nodes(self) -> list[str]:
        """The names of nodes that were removed and have not come back with another key."""
        return [name for name in self.removed.values() if self.keys.get(name) in (None, *self.removed)]

    def key_of(self, name: str) -> bytes:
        """The key of a node, also of one that was removed; a `UserError` if there never was one of this name."""
        gone = {name: key for key, name in self.removed.items()}
        if name not in self.keys and name not in gone:
            remedy = nearest(name, self.keys)
            raise UserError(name, f"the name of a node in {self.folder / 'nodes'}", "another one", remedy)
        return self.keys.get(name, gone.get(name, b""))

    def without(self, name: str) -> None:
        """Notes that a node is removed, and takes its key from those that are registered."""
        key = self.key_of(name)
        if key not in self.removed:
            path = self.folder / REMOVED
            before = path.read_bytes() if path.exists() else b""
            write_atomically(path, before + key + f" {name} {datetime.date.today().isoformat()}\n".encode())
        if name in self.keys:
            (self.folder / "nodes" / f"{name}.pub").unlink(missing_ok=True)


def key_in(line: bytes) -> bytes:
    """Kind and key of a line in OpenSSH's form, without the comment."""
    return b" ".join(line.split()[:2])


def _in_order(path: Path) -> tuple[int, str]:
    return len(path.name), path.name

"""A server's memory of its clients' ledgers: the newest signed head of each, over all runs of a deployment.

A client that shows up with a ledger that is behind its own head refuses (`fedpriv.deploy.device.heads`). The file is
not secret, and nobody can forge an entry. Where it is lost, clients are only as safe as their own files.
"""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fedpriv.deploy.device.heads import Head
from fedpriv.errors import UserError
from fedpriv.files import lock_file, write_atomically

__all__ = ["HEADS_FILE", "HeadBook", "newer_heads"]

HEADS_FILE = "client-heads.json"

_log = logging.getLogger("flwr")


def newer_heads(known: Mapping[int, Head], found: Mapping[int, Head]) -> dict[int, Head]:
    """Return the newest head of each client.

    Of two by one key the longer is newer. A head by another key replaces what was known, with a line in the log: the
    client's folder, and with it its ledger, may be lost.

    Args:
        known: By client.
        found: The same, seen later.
    """
    newest = dict(known)
    for client, head in found.items():
        before = newest.get(client, head)
        if before.key != head.key:
            _log.warning("client %d signs its ledger with another key than before: the former may be lost", client)
        if before.key != head.key or head.lines >= before.lines:
            newest[client] = head
    return newest


@dataclass
class HeadBook:
    """The newest heads, in a file or, without one, for as long as this object lives.

    Args:
        path: The file; None for none.
        heads: By client.
    """

    path: Path | None = None
    heads: dict[int, Head] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.heads = newer_heads(self.heads, self._read())

    @classmethod
    def of_deployment(cls, run_directory: Path) -> "HeadBook":
        """Return the book of a deployment: in the server's own folder, or beside the run directory where there is none.

        Args:
            run_directory: Where the run is recorded.
        """
        home = os.environ.get("FLWR_HOME")
        return cls((Path(home) if home else run_directory.parent) / HEADS_FILE)

    def keep(self, found: Mapping[int, Head]) -> None:
        """Take note of heads; they are on the disk when this returns.

        Raises:
            UserError: If the file cannot be read or written.
        """
        if not found or self.path is None:
            self.heads = newer_heads(self.heads, found)
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_suffix(".lock").open("w") as lock:  # another run of the deployment may write, too
            lock_file(lock)
            self.heads = newer_heads(self._read(), found)
            rows = {str(client): head.to_json() for client, head in sorted(self.heads.items())}
            write_atomically(self.path, json.dumps(rows, indent=1) + "\n")

    def _read(self) -> dict[int, Head]:
        if self.path is None or not self.path.exists():
            return {}
        try:
            rows = json.loads(self.path.read_bytes())
            found = {int(client): Head.of_json(row) for client, row in rows.items()}
        except (ValueError, AttributeError):
            remedy = "Put back a copy, or remove it: clients then go by their own files alone"
            raise UserError(str(self.path), "the heads of clients' ledgers", "something else", remedy) from None
        return {client: head for client, head in found.items() if head is not None}

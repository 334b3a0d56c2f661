"""Newest signed head of each client's ledger, kept by the server over all runs of a deployment.

A client refuses if its ledger is behind its signed head (`fedpriv.deploy.device.heads`). The file of heads is not
secret, and its entries cannot be forged. If it is lost, clients rely on their own files alone.
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

    Of two heads with the same key, the longer one is newer. A head with another key replaces the known one, with a
    warning in the log: the client's folder, and with it its ledger, may be lost.

    Args:
        known: Known heads by client.
        found: Heads seen later, by client.
    """
    newest = dict(known)
    for client, head in found.items():
        before = newest.get(client, head)
        if before.key != head.key:
            _log.warning("client %d signs its ledger with a new key: the previous ledger may be lost", client)
        if before.key != head.key or head.lines >= before.lines:
            newest[client] = head
    return newest


@dataclass
class HeadBook:
    """Collection of the newest heads, stored in a file, or in memory only.

    Args:
        path: File of the heads; None for memory only.
        heads: Heads by client.
    """

    path: Path | None = None
    heads: dict[int, Head] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.heads = newer_heads(self.heads, self._read())

    @classmethod
    def of_deployment(cls, run_directory: Path) -> "HeadBook":
        """Return the heads of a deployment, stored in $FLWR_HOME or, if that is not set, next to the run directory.

        Args:
            run_directory: Run directory of the deployment.
        """
        home = os.environ.get("FLWR_HOME")
        return cls((Path(home) if home else run_directory.parent) / HEADS_FILE)

    def keep(self, found: Mapping[int, Head]) -> None:
        """Record heads; they are on disk when this returns.

        Raises:
            UserError: If the file cannot be read or written.
        """
        if not found or self.path is None:
            self.heads = newer_heads(self.heads, found)
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_suffix(".lock").open("w") as lock:  # other runs of the deployment may also write
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
            remedy = "Restore a copy, or remove the file: clients then rely on their own files alone"
            raise UserError(str(self.path), "the heads of clients' ledgers", "invalid content", remedy) from None
        return {client: head for client, head in found.items() if head is not None}

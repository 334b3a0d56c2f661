"""Operation of one party of a deployment, a server, a node or a helper: its log, its metrics and its warnings."""

import sys
from pathlib import Path

from fedpriv.deploy.operate.expiry import warn_daily
from fedpriv.deploy.operate.logs import log_as
from fedpriv.deploy.operate.metrics import node_budgets, serve_metrics
from fedpriv.deploy.operate.tally import all_counts
from fedpriv.errors import UserError

__all__ = ["operate"]


def operate(folder: Path, log_format: str = "text", metrics_port: int | None = None, host: str = "127.0.0.1") -> None:
    """Begin the operation of the party that this process is about to run.

    Args:
        folder: Folder of the party.
        log_format: `text` or `json`.
        metrics_port: Port of its Prometheus metrics, 0 for a free one; None for no metrics.
        host: Address at which they are served.

    Raises:
        UserError: If an option is invalid, or the port is not free.
    """
    folder = folder.resolve()
    kind = _kind(folder)
    log_as(log_format, kind, folder.name)
    superlink = _superlink(folder, kind)
    if metrics_port is not None:
        port = serve_metrics(
            folder,
            metrics_port,
            host,
            superlink=superlink,
            counts=(lambda: all_counts(folder / "flower")) if kind == "server" else None,
            budgets=(lambda: node_budgets(folder)) if kind == "node" else None,
        )
        print(f"metrics at http://{host}:{port}/metrics", file=sys.stderr, flush=True)
    warn_daily(folder, superlink)


def _kind(folder: Path) -> str:
    if (folder / "server.toml").is_file():
        return "server"
    return "helper" if (folder / "helper.toml").is_file() else "node"


def _superlink(folder: Path, kind: str) -> str:
    """Return the address of a node's server; empty for a server, and if the settings cannot be read."""
    if kind == "server":
        return ""
    from fedpriv.deploy.device.folder import NODE_TOML, NodeSettings
    from fedpriv.deploy.helper.folder import HELPER_TOML, HelperSettings

    try:
        if kind == "helper":
            return HelperSettings.read(folder / HELPER_TOML).superlink
        return NodeSettings.read(folder / NODE_TOML).superlink
    except UserError:  # the checks before the start report it
        return ""

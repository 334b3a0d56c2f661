"""Operation of one party of a deployment, a server, a node or a helper: its log, its metrics and its warnings."""

import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from fedpriv.deploy.kinds import kind_of
from fedpriv.deploy.operate.expiry import warn_daily
from fedpriv.deploy.operate.logs import log_as
from fedpriv.deploy.operate.metrics import node_budgets, serve_metrics
from fedpriv.deploy.operate.tally import all_counts
from fedpriv.errors import UserError
from fedpriv.flower.companion import LOCK, PREPARED
from fedpriv.flower.forked import forked_ahead

if TYPE_CHECKING:
    from fedpriv.deploy.device.folder import NodeSettings
    from fedpriv.deploy.helper.folder import HelperSettings

__all__ = ["operate"]


@contextmanager
def operate(
    folder: Path, log_format: str = "text", metrics_port: int | None = None, host: str = "127.0.0.1"
) -> Iterator[None]:
    """Operate the party that this process runs in the block.

    Args:
        folder: Folder of the party.
        log_format: `text` or `json`.
        metrics_port: Port of its Prometheus metrics, 0 for a free one; None for no metrics.
        host: Address at which they are served.

    Raises:
        UserError: If an option is invalid, or the port is not free.
    """
    folder = folder.resolve()
    kind = kind_of(folder)
    log_as(log_format, kind or "node", folder.name)
    settings = _node_settings(folder, kind)
    superlink = "" if settings is None else settings.superlink
    with _prepared(folder, kind, settings):
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
        yield


def _node_settings(folder: Path, kind: str) -> "NodeSettings | HelperSettings | None":
    """Return the settings of a node or helper; None for others, and if they cannot be read."""
    from fedpriv.deploy.device.folder import NODE_TOML, NodeSettings
    from fedpriv.deploy.helper.folder import HELPER_TOML, HelperSettings

    try:
        if kind == "helper":
            return HelperSettings.read(folder / HELPER_TOML)
        return NodeSettings.read(folder / NODE_TOML) if kind == "node" else None
    except UserError:  # the checks before the start report it
        return None


def _prepared(
    folder: Path, kind: str, settings: "NodeSettings | HelperSettings | None"
) -> AbstractContextManager[None]:
    """Prepare the processes in which Flower runs apps, in the environment and, where possible, by forking them."""
    if kind == "server":
        shared, programs = "superlink", ["flwr-serverapp"]
    elif settings is not None:
        shared, programs = "supernode", ["flwr-clientapp", "clients.client_app"]
    else:
        return nullcontext()
    # Another app may have packages of fedpriv's names.
    foreign = settings is None or bool(getattr(settings, "accepted_apps", ()))
    if foreign:
        del programs[1:]
    os.environ[PREPARED] = " ".join(programs)
    os.environ["FLWR_HOME"] = str(folder / "flower")  # Flower reads it at import
    return forked_ahead(folder / "flower" / LOCK, programs, [f"fedpriv.flower.internals.{shared}"], foreign=foreign)

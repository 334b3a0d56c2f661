"""`fedpriv deploy health`: return whether a server, a node or a helper works, for a container's health check."""

import time
from pathlib import Path

from fedpriv.deploy.checks import call_server, split_address
from fedpriv.deploy.kinds import wrong_kind
from fedpriv.errors import UserError
from fedpriv.files import lock_file
from fedpriv.flower.companion import ALIVE, LOCK

__all__ = ["health"]

# A connected node hears from the server every few seconds, and sends a heartbeat every 30 s.
MAX_SILENCE_SECONDS = 90.0

_ANYWHERE = ("0.0.0.0", "::")


def health(folder: Path) -> str:
    """Return a line that confirms that the server, node or helper of a folder works.

    A server is healthy if it answers over TLS. A node is healthy if its process runs and has had an answer from the
    server within 90 seconds.

    Raises:
        UserError: If it does not work.
    """
    folder = folder.resolve()
    if (folder / "server.toml").is_file():
        from fedpriv.deploy.setup.superlink import SERVER_TOML, ServerSettings

        settings = ServerSettings.read(folder / SERVER_TOML)
        host, port = split_address(settings.address, "address")
        host = "127.0.0.1" if settings.listen in _ANYWHERE else host
        call_server(host, port, folder / "ca.crt")
        return f"the server answers at {host}:{port}"
    if not any((folder / name).is_file() for name in ("node.toml", "helper.toml")):
        raise wrong_kind(folder, "server", "node", "helper")
    _refuse_stopped(folder / "flower" / LOCK)
    return _recent(folder / "flower" / ALIVE)


def _refuse_stopped(lock: Path) -> None:
    try:
        with lock.open() as file:
            lock_file(file, wait=False)
    except BlockingIOError:
        return
    except FileNotFoundError:
        pass
    raise UserError(str(lock.parent.parent), "a running node", "a stopped one", "Start it, and read its log")


def _recent(path: Path) -> str:
    try:
        silence = time.time() - path.stat().st_mtime
    except FileNotFoundError:
        raise UserError(
            "this node", "an answer from the server", "silence since the start", "Wait, and read its log"
        ) from None
    if silence > MAX_SILENCE_SECONDS:
        expected = f"an answer from the server within {MAX_SILENCE_SECONDS:g} s"
        raise UserError("this node", expected, f"silence for {silence:.0f} s", "Read its log, and check the network")
    return f"the server answered {silence:.0f} s ago"

"""Ends of the certificates that a server, a node or a helper relies on, and warnings before they come."""

import datetime
import http.client
import socket
import ssl
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fedpriv.deploy.checks import load_certificate, split_address
from fedpriv.errors import UserError

__all__ = ["WARNING_DAYS", "Ending", "endings", "warn_daily", "warnings"]

WARNING_DAYS = 30

_DAY_SECONDS = 86_400.0
_CALL_SECONDS = 10.0

_REMEDIES = {
    "server": "Run `fedpriv deploy renew DIR` next to ca/, copy server.pem and server.key, and restart the server",
    "ca": "Create a new deployment: nodes trust this CA alone",
}


@dataclass(frozen=True)
class Ending:
    """End of a certificate.

    Args:
        certificate: `server` or `ca`.
        at: Its last moment.
    """

    certificate: str
    at: datetime.datetime

    def days(self, now: datetime.datetime | None = None) -> float:
        """Return the days until the end, negative after it."""
        return (self.at - (now or datetime.datetime.now(datetime.UTC))).total_seconds() / _DAY_SECONDS


def endings(folder: Path, superlink: str = "") -> list[Ending]:
    """Return the ends of the certificates in a folder, and of the one that the server shows.

    Args:
        folder: Folder of a server, node or helper.
        superlink: HOST:PORT of the server, for a node; a server that does not answer is skipped.
    """
    files = {"server": folder / "server.pem", "ca": folder / "ca.crt"}
    found: list[Ending] = []
    for name, path in files.items():
        with suppress(UserError):
            found.append(Ending(name, load_certificate(path).not_valid_after_utc))
    if superlink:
        with suppress(OSError, http.client.HTTPException, UserError, KeyError):
            found.append(Ending("server", _shown(*split_address(superlink, "superlink"), folder / "ca.crt")))
    return found


def warnings(found: list[Ending], now: datetime.datetime | None = None) -> list[str]:
    """Return a line for each certificate that ends within `WARNING_DAYS` days."""
    soon = [(ending, ending.days(now)) for ending in found if ending.days(now) < WARNING_DAYS]
    names = {"server": "the server's certificate", "ca": "the certificate of the deployment's CA"}
    return [f"{names[e.certificate]} {_when(e.at, days)}. {_REMEDIES[e.certificate]}." for e, days in soon]


def warn_daily(folder: Path, superlink: str = "") -> None:
    """Print the warnings now, and then once a day for as long as this process runs."""

    def watch() -> None:
        while True:
            for line in warnings(endings(folder, superlink)):
                print(f"fedpriv: {line}", file=sys.stderr, flush=True)
            pause.wait(_DAY_SECONDS)

    pause = threading.Event()
    threading.Thread(target=watch, daemon=True).start()


def _when(at: datetime.datetime, days: float) -> str:
    if days < 0:
        return f"ended on {at:%Y-%m-%d}"
    return f"ends in {int(days)} day{'' if int(days) == 1 else 's'}, on {at:%Y-%m-%d}"


def _shown(host: str, port: int, ca: Path) -> datetime.datetime:
    """Return the end of the certificate that a server shows."""
    context = ssl.create_default_context(cafile=str(ca))
    with (
        socket.create_connection((host, port), _CALL_SECONDS) as plain,
        context.wrap_socket(plain, server_hostname=host) as secure,
    ):
        end = (secure.getpeercert() or {})["notAfter"]
    return datetime.datetime.fromtimestamp(ssl.cert_time_to_seconds(str(end)), datetime.UTC)

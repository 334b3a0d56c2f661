"""Private interfaces of Flower that the server of a deployment uses; no other module uses them.

A SuperLink serves three APIs on one port. Nodes need one of them and authenticate with keys. The other two ask for no
password. With the Control API, anyone who reaches the port can register nodes and start runs, which are code that the
server executes. With the Runtime API, anyone can impersonate a run and read its clients' messages. Here both answer
only to listed addresses, by default only to the machine itself. `tests/deploy/test_deploy_server.py` fails if Flower
changes any of this.
"""

import importlib
import ipaddress
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI
from flwr.superlink import main
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from fedpriv.flower.internals.control import Administrator, KnownNode, administering
from fedpriv.flower.internals.supernode import accompanied, run_flower

__all__ = ["Administrator", "KnownNode", "OnlyFor", "administering", "guarded", "run_superlink"]

# A function of the same name hides the module in its package.
_PROGRAM = importlib.import_module("flwr.superlink.cli.flower_superlink")

_FOR_ALL = ("/v1/fleet/", "/health")


class OnlyFor:
    """Middleware that opens the nodes' API to everyone, and all other paths to listed networks only.

    Args:
        app: Application behind it.
        networks: Addresses and networks, such as "127.0.0.1" and "10.0.0.0/24".
    """

    def __init__(self, app: ASGIApp, networks: Sequence[str]) -> None:
        self.app = app
        self.networks = [ipaddress.ip_network(network) for network in networks]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or answer that it is forbidden."""
        if scope["type"] == "lifespan" or self._may(scope):
            await self.app(scope, receive, send)
        else:
            await PlainTextResponse("Forbidden from this address: see admin-from in server.toml", 403)(
                scope, receive, send
            )

    def _may(self, scope: Scope) -> bool:
        path = scope.get("path", "")
        if path == _FOR_ALL[1] or path.startswith(_FOR_ALL[0]):
            return True
        try:
            caller = ipaddress.ip_address((scope.get("client") or ("", 0))[0])
        except ValueError:
            return False
        mapped = caller.ipv4_mapped if isinstance(caller, ipaddress.IPv6Address) else None
        return any((mapped or caller) in network for network in self.networks)


@contextmanager
def guarded(networks: Sequence[str]) -> Iterator[None]:
    """Restrict the Control and Runtime APIs of this process's SuperLink to some networks."""
    create = main.create_app

    def create_guarded(*arguments: Any, **named: Any) -> FastAPI:
        app = create(*arguments, **named)
        app.add_middleware(OnlyFor, networks=networks)
        return app

    main.create_app = create_guarded
    try:
        yield
    finally:
        main.create_app = create


def run_superlink(options: Sequence[str], networks: Sequence[str]) -> int:
    """Run Flower's SuperLink in this process until it ends; return its exit code.

    Args:
        options: Command-line options of `flower-superlink`.
        networks: Networks from which it may be administered.
    """
    with guarded(networks), accompanied(_PROGRAM):
        return run_flower("flower-superlink", _PROGRAM.flower_superlink, options)

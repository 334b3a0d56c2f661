"""Everything that a deployment's server needs of Flower and that Flower does not publish: no other place touches it.

A SuperLink serves three APIs on one port. Nodes need one of them, and have keys for it. The other two ask for no
password: with the Control API whoever reaches the port registers nodes and starts runs, which are code that the
server executes; with the Runtime API it takes a run's place and reads its clients' messages. Here both answer to
listed addresses only, by default to the machine itself. `tests/deploy/test_deploy_server.py` fails when Flower moves
any of it.
"""

import ipaddress
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key
from fastapi import FastAPI
from flwr.cli.flower_config import read_superlink_connection
from flwr.cli.utils import init_http_client_from_connection
from flwr.proto.control_pb2 import ListNodesRequest
from flwr.superlink import main
from flwr.superlink.cli.flower_superlink import flower_superlink
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from clients.supernode_internals import run_flower

__all__ = ["OnlyFor", "guarded", "registered_keys", "run_superlink"]

_FOR_ALL = ("/v1/fleet/", "/health")


class OnlyFor:
    """Lets everyone reach what nodes need, and listed networks the rest.

    Args:
        app: What is guarded.
        networks: Addresses and networks, such as "127.0.0.1" and "10.0.0.0/24".
    """

    def __init__(self, app: ASGIApp, networks: Sequence[str]) -> None:
        self.app = app
        self.networks = [ipaddress.ip_network(network) for network in networks]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request, or answers that it is forbidden."""
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
    """Makes this process's SuperLink answer its Control and Runtime APIs to some networks only."""
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
    """Runs Flower's SuperLink in this process until it ends; returns its exit code.

    Args:
        options: Those of `flower-superlink`.
        networks: Who may administer it.
    """
    with guarded(networks):
        return run_flower("flower-superlink", flower_superlink, options)


def registered_keys(admin: Path, connection: str) -> dict[bytes, str]:
    """What a SuperLink knows of its nodes: the status of each, by its public key in OpenSSH's form.

    Args:
        admin: The folder with Flower's `config.toml`.
        connection: The name of a connection in it.
    """
    os.environ["FLWR_HOME"] = str(admin)
    client = init_http_client_from_connection(read_superlink_connection(connection))
    try:
        nodes = client.ListNodes(ListNodesRequest()).nodes_info
    finally:
        client.close()
    status = sorted((node.registered_at, bytes(node.public_key), node.status) for node in nodes)
    return {_openssh(key): state for _, key, state in status}


def _openssh(pem: bytes) -> bytes:
    return load_pem_public_key(pem).public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)

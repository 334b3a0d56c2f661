"""Private interfaces of Flower that the server of a deployment uses; no other module uses them.

A SuperLink serves three APIs on one port. Nodes need one of them and authenticate with keys. The other two ask for no
password. With the Control API, anyone who reaches the port can register nodes and start runs, which are code that the
server executes. With the Runtime API, anyone can impersonate a run and read its clients' messages. Here both answer
only to listed addresses, by default only to the machine itself. `tests/deploy/test_deploy_server.py` fails if Flower
changes any of this.
"""

import importlib
import io
import ipaddress
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_public_key,
    load_ssh_public_key,
)
from fastapi import FastAPI
from flwr.cli.flower_config import read_superlink_connection
from flwr.cli.utils import flwr_cli_exc_handler, init_http_client_from_connection
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, UnregisterNodeRequest
from flwr.supercore.constant import NodeStatus
from flwr.supercore.control import ControlHttpClient
from flwr.superlink import main
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from fedpriv.errors import UserError
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


@dataclass(frozen=True)
class KnownNode:
    """Node in the records of a SuperLink.

    Args:
        id: Number that the SuperLink assigned to it.
        status: registered, online, offline or unregistered.
    """

    id: int
    status: str

    @property
    def welcome(self) -> bool:
        """True if the SuperLink accepts the node. It never accepts an unregistered key again."""
        return self.status != NodeStatus.UNREGISTERED


class Administrator:
    """Administrator's connection to a SuperLink. Keys are public keys in OpenSSH's format, without comments.

    Each method raises a `UserError` if the SuperLink does not carry out the request.
    """

    def __init__(self, client: ControlHttpClient) -> None:
        self._client = client

    def nodes(self) -> dict[bytes, KnownNode]:
        """Return every node, past and present, in the records of the SuperLink, by its key."""
        with _in_one_line():
            found = self._client.ListNodes(ListNodesRequest()).nodes_info
        in_order = sorted(found, key=lambda node: node.registered_at)
        return {_openssh(bytes(node.public_key)): KnownNode(node.node_id, node.status) for node in in_order}

    def register(self, key: bytes, name: str) -> None:
        """Register the key of a node with the SuperLink."""
        with _in_one_line():
            pem = load_ssh_public_key(key).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
            self._client.RegisterNode(RegisterNodeRequest(public_key=pem, name=name))

    def unregister(self, node: KnownNode) -> None:
        """Make the SuperLink reject a node permanently."""
        with _in_one_line():
            self._client.UnregisterNode(UnregisterNodeRequest(node_id=node.id))


@contextmanager
def administering(admin: Path, connection: str) -> Iterator[Administrator]:
    """Open a connection to a SuperLink for the block.

    Args:
        admin: Folder with Flower's `config.toml`.
        connection: Name of a connection in it.

    Raises:
        UserError: If there is no such connection.
    """
    os.environ["FLWR_HOME"] = str(admin)
    with _in_one_line():
        client = init_http_client_from_connection(read_superlink_connection(connection))
    try:
        yield Administrator(client)
    finally:
        client.close()


@contextmanager
def _in_one_line() -> Iterator[None]:
    """Turn Flower's exceptions into a `UserError`, and suppress its output."""
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), flwr_cli_exc_handler():
            yield
    except (click.ClickException, OSError, RuntimeError, ValueError, UnsupportedAlgorithm) as error:
        reason = error.format_message() if isinstance(error, click.ClickException) else str(error)
        remedy = "See `fedpriv deploy check` of this folder, and admin-from in the server's server.toml"
        raise UserError("the server", "it to accept the request", reason.strip().rstrip("."), remedy) from None


def _openssh(pem: bytes) -> bytes:
    return load_pem_public_key(pem).public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)

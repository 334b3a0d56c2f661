"""Private interfaces of Flower that administrators of a deployment use; no other module uses them.

They are apart from those of the server, because importing a server takes seconds.
`tests/deploy/test_deploy_keys.py` fails if Flower changes any of this.
"""

import io
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TypeVar

import click
import httpx
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_public_key,
    load_ssh_public_key,
)
from flwr.cli.flower_config import read_superlink_connection
from flwr.cli.run_utils import format_runs
from flwr.cli.utils import flwr_cli_exc_handler, init_http_client_from_connection
from flwr.common.constant import HEARTBEAT_PATIENCE
from flwr.common.serde import run_from_proto
from flwr.proto.control_pb2 import ListNodesRequest, ListRunsRequest, RegisterNodeRequest, UnregisterNodeRequest
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.constant import NodeStatus
from flwr.supercore.control import ControlHttpClient

from fedpriv.errors import UserError

__all__ = ["Administrator", "KnownNode", "KnownRun", "SilentServerError", "administering", "once_it_answers"]

AnswerT = TypeVar("AnswerT")


@dataclass(frozen=True)
class KnownNode:
    """Node in the records of a SuperLink.

    Args:
        id: Number that the SuperLink assigned to it.
        status: registered, online, offline or unregistered.
        seen: Time of its last sign of life, in seconds since 1970; None if it never connected.
    """

    id: int
    status: str
    seen: float | None = None

    @property
    def welcome(self) -> bool:
        """True if the SuperLink accepts the node. It never accepts an unregistered key again."""
        return self.status != NodeStatus.UNREGISTERED


@dataclass(frozen=True)
class KnownRun:
    """Run in the records of a SuperLink.

    Args:
        id: Number that the SuperLink assigned to it.
        status: Flower's words, such as `running` or `finished:completed`.
        details: Reason of a failure; empty if there is none.
    """

    id: int
    status: str
    details: str


class SilentServerError(UserError):
    """Error for a SuperLink that does not answer."""


class Administrator:
    """Administrator's connection to a SuperLink. Keys are public keys in OpenSSH's format, without comments.

    Each method raises a `UserError` if the SuperLink does not carry out the request.
    """

    def __init__(self, client: ControlHttpClient, address: str = "") -> None:
        self._client, self._address = client, address

    def nodes(self) -> dict[bytes, KnownNode]:
        """Return every node, past and present, in the records of the SuperLink, by its key."""
        with _in_one_line(self._address):
            found = self._client.ListNodes(ListNodesRequest()).nodes_info
        in_order = sorted(found, key=lambda node: node.registered_at)
        return {
            _openssh(bytes(node.public_key)): KnownNode(node.node_id, node.status, _seen(node)) for node in in_order
        }

    def runs(self) -> list[KnownRun]:
        """Return every run in the records of the SuperLink."""
        with _in_one_line(self._address):
            answer = self._client.ListRuns(ListRunsRequest())
            rows = format_runs([run_from_proto(run) for run in answer.run_dict.values()], answer.now)
        return [KnownRun(row.run_id, row.status_text, row.details) for row in rows]

    def register(self, key: bytes, name: str) -> None:
        """Register the key of a node with the SuperLink."""
        with _in_one_line(self._address):
            pem = load_ssh_public_key(key).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
            self._client.RegisterNode(RegisterNodeRequest(public_key=pem, name=name))

    def unregister(self, node: KnownNode) -> None:
        """Make the SuperLink reject a node permanently."""
        with _in_one_line(self._address):
            self._client.UnregisterNode(UnregisterNodeRequest(node_id=node.id))


@contextmanager
def administering(admin: Path, connection: str) -> Iterator[Administrator]:
    """Open a connection to a SuperLink for the block.

    Args:
        admin: Folder with Flower's `config.toml`.
        connection: Name of a connection in it.

    Raises:
        UserError: If there is no such connection.
        SilentServerError: From its methods, if the SuperLink does not answer.
    """
    os.environ["FLWR_HOME"] = str(admin)
    with _in_one_line():
        found = read_superlink_connection(connection)
        client = init_http_client_from_connection(found)
    try:
        yield Administrator(client, str(found.address or ""))
    finally:
        client.close()


@contextmanager
def _in_one_line(address: str = "") -> Iterator[None]:
    """Turn Flower's exceptions into a `UserError`, and suppress its output."""

    def silent(error: Exception) -> None:
        if isinstance(error, httpx.RequestError):
            remedy = "Start it with server/start-superlink.sh, or correct its address in admin/config.toml"
            raise SilentServerError(f"the server at {address}", "an answer", "silence", remedy) from None

    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), flwr_cli_exc_handler(silent):
            yield
    except UserError:
        raise
    except (click.ClickException, OSError, RuntimeError, ValueError, UnsupportedAlgorithm) as error:
        reason = error.format_message() if isinstance(error, click.ClickException) else str(error)
        remedy = "See `fedpriv deploy check` of this folder, and admin-from in the server's server.toml"
        raise UserError("the server", "it to accept the request", reason.strip().rstrip("."), remedy) from None


def once_it_answers(ask: Callable[[], AnswerT], seconds: float, say: Callable[[str], None]) -> AnswerT:
    """Return the value of `ask()`, called again as long as the server is silent, for at most `seconds`.

    Args:
        ask: Asks the server.
        seconds: The longest wait.
        say: Called once with a line if the server is silent at first.

    Raises:
        UserError: If the server still does not answer, or refuses.
    """
    if not seconds >= 0.0:
        raise UserError("--wait", "seconds from 0", seconds, "Give the longest wait")
    end, told = time.monotonic() + seconds, False
    while True:
        try:
            return ask()
        except SilentServerError:
            if time.monotonic() >= end:
                raise
        if not told:
            say(f"waiting     for the server's answer, at most {seconds:g} s")
            told = True
        time.sleep(1.0)


def _seen(node: NodeInfo) -> float | None:
    """Return when a node was last heard. Until two heartbeats are missing, the SuperLink considers it online."""
    if not node.last_activated_at:
        return None
    ended = datetime.fromisoformat(node.last_deactivated_at).timestamp() if node.last_deactivated_at else 0.0
    began = datetime.fromisoformat(node.last_activated_at).timestamp()
    beat = node.online_until - HEARTBEAT_PATIENCE * node.heartbeat_interval
    return max(ended, began, beat if node.status == NodeStatus.ONLINE or not ended else 0.0)


def _openssh(pem: bytes) -> bytes:
    return load_pem_public_key(pem).public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)

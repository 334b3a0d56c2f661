"""`fedpriv deploy server`: run the server of a deployment, Flower's SuperLink with TLS, node keys and a guard."""

import ipaddress
import socket
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from fedpriv.deploy.checks import (
    MANIFEST,
    VERSIONS,
    Finding,
    check_certificate,
    check_manifest,
    check_permissions,
    check_presence,
    check_space,
    check_versions,
    covers,
    judge,
    load_certificate,
    refuse_wrong,
    split_address,
)
from fedpriv.deploy.device.policy import Accepts
from fedpriv.deploy.kinds import in_file, require_kind
from fedpriv.deploy.setup.supernode import flower_home, held_alone
from fedpriv.errors import UserError
from fedpriv.experiment.config import read_config_file
from fedpriv.experiment.schema import read_table

__all__ = ["SERVER_FILES", "SERVER_TOML", "ServerSettings", "check_server_folder", "run_server"]

SERVER_TOML = "server.toml"
SERVER_FILES = ("ca.crt", "server.pem", "server.key", SERVER_TOML, "start-superlink.sh", VERSIONS, MANIFEST)


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Settings in `server.toml`; in the file, keys have hyphens.

    Args:
        address: HOST:PORT at which nodes reach the server.
        listen: Address of this machine at which it listens.
        admin_from: Addresses and networks from which runs are started and nodes registered.
    """

    address: str
    listen: str = "0.0.0.0"
    admin_from: tuple[str, ...] = ("127.0.0.1", "::1")

    def __post_init__(self) -> None:
        split_address(self.address, "address")
        for key, value, kind in [
            ("listen", self.listen, ipaddress.ip_address),
            *(("admin-from", network, ipaddress.ip_network) for network in self.admin_from),
        ]:
            try:
                kind(value)
            except ValueError as error:
                raise UserError(key, "an IP address, or for admin-from a network", error, "Edit server.toml") from None

    @classmethod
    def read(cls, path: Path) -> "ServerSettings":
        """Read `server.toml`.

        Raises:
            UserError: If the file is missing or invalid.
        """
        table = {key.replace("-", "_"): value for key, value in read_config_file(path).items()}
        with in_file(path):
            return read_table(cls, table, "")


def run_server(folder: Path) -> int:
    """Run a deployment's server until it is stopped.

    Args:
        folder: The folder `server`, created by `fedpriv deploy init`.

    Returns:
        Exit code of the SuperLink.

    Raises:
        UserError: If the folder fails a check, or the server already runs.
    """
    folder = folder.resolve()
    require_kind(folder, "server")
    refuse_wrong(folder, check_server_folder(folder))
    settings = ServerSettings.read(folder / SERVER_TOML)
    with held_alone(flower_home(folder)):
        _refuse_used(settings)
        from fedpriv.flower.internals.superlink import run_superlink

        options = [
            *("--ssl-ca-certfile", str(folder / "ca.crt")),
            *("--ssl-certfile", str(folder / "server.pem")),
            *("--ssl-keyfile", str(folder / "server.key")),
            *("--host", settings.listen, "--port", str(split_address(settings.address, "address")[1])),
            *("--database", str(folder / "flower" / "superlink.db")),
            *("--isolation", "subprocess"),
            *("--enable-supernode-auth", "--disable-runtime-dependency-installation"),
        ]
        # The run's own process reaches the SuperLink at the address at which it listens.
        return run_superlink(options, [*settings.admin_from, "127.0.0.1", "::1", settings.listen])


def _refuse_used(settings: ServerSettings) -> None:
    """Raise a `UserError` if another program listens at the server's port."""
    port = split_address(settings.address, "address")[1]
    family = socket.AF_INET6 if ":" in settings.listen else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((settings.listen, port))
    except OSError as error:
        where, remedy = f"{settings.listen}:{port}", "Stop the program that listens there, or change server.toml"
        raise UserError(where, "a free port of this machine", error.strerror or error, remedy) from None


def check_server_folder(folder: Path) -> list[Finding]:
    """Run all checks of a server's folder that need no other machine."""
    findings = [
        *check_presence(folder, SERVER_FILES),
        *check_manifest(folder),
        *check_permissions(folder, ["server.key"]),
        *judge(SERVER_TOML, lambda: f"for {ServerSettings.read(folder / SERVER_TOML).address}"),
        *judge("server key", lambda: _key_pair(folder)),
        *check_versions(folder),
    ]
    if all((folder / name).is_file() for name in ("ca.crt", "server.pem")):
        findings += check_certificate("CA certificate", folder / "ca.crt", folder / "ca.crt")
        findings += check_certificate("server certificate", folder / "server.pem", folder / "ca.crt")
        findings += judge("server name", lambda: _own_name(folder))
    return findings + _space(folder)


# Flower stores a turn's messages in its database, here for the largest model that default policies accept.
_PARAMETERS = Accepts().max_parameters


def _space(folder: Path) -> list[Finding]:
    nodes = max(len(list(folder.parent.glob("admin/nodes/*.pub"))), 1)
    what = f"a turn of {nodes} node{'s' if nodes > 1 else ''} with a model of {_PARAMETERS:,} parameters"
    return check_space(folder / "flower", 4.0 * _PARAMETERS * (nodes + 1), what)


def _own_name(folder: Path) -> str:
    address = ServerSettings.read(folder / SERVER_TOML).address
    return covers(folder / "server.pem", split_address(address, "address")[0])


def _key_pair(folder: Path) -> str:
    path = folder / "server.key"
    remedy = "Copy both again from their origin"
    certificate = load_certificate(folder / "server.pem")
    try:
        public = load_pem_private_key(path.read_bytes(), None).public_key()
    except OSError as error:
        raise UserError(str(path), "a readable key", error.strerror or error, remedy) from None
    except (ValueError, TypeError):
        raise UserError(str(path), "a key in PEM format without a passphrase", "a different format", remedy) from None
    form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if public.public_bytes(*form) != certificate.public_key().public_bytes(*form):
        raise UserError(str(path), "the key of server.pem", "a different key", remedy)
    return "matches server.pem"

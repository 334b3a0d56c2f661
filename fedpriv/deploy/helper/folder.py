"""Folder of a helper: its identity key, its list of clients, and its records (`fedpriv.secure.log`).

The helper's operator fills the list of clients, with keys that the clients' operators hand over. A list from the
server's operator could hold puppets.
"""

from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from fedpriv.checks import is_whole
from fedpriv.deploy.checks import (
    MANIFEST,
    VERSIONS,
    Finding,
    check_certificate,
    check_manifest,
    check_permissions,
    check_presence,
    check_versions,
    judge,
    split_address,
)
from fedpriv.deploy.device.folder import key_pair
from fedpriv.deploy.helper.messages import HELPER_HOME
from fedpriv.errors import UserError, number_of
from fedpriv.experiment.config import read_config_file
from fedpriv.experiment.schema import read_table
from fedpriv.files import replace_durably
from fedpriv.secure import Helper

__all__ = [
    "CLIENTS_TOML",
    "HELPER_TOML",
    "IDENTITY_FILE",
    "SIGNING_FILE",
    "HelperSettings",
    "check_helper_folder",
    "load_helper",
    "make_signing_key",
    "read_clients",
    "read_signing_key",
]

HELPER_TOML = "helper.toml"
CLIENTS_TOML = "clients.toml"
IDENTITY_FILE = "helper.key"
SIGNING_FILE = "signing.key"
"""In the folder of a client: the key with which it signs sealed seeds."""

STATE_FOLDER = "state"
HELPER_FILES = ("ca.crt", "node.key", "node.pub", HELPER_TOML, CLIENTS_TOML, IDENTITY_FILE, VERSIONS, MANIFEST)


@dataclass(frozen=True, kw_only=True)
class HelperSettings:
    """Settings in `helper.toml`; in the file, keys have hyphens.

    Args:
        superlink: HOST:PORT of the server.
        min_clients: Least number of clients in a sum.
        runtime_port: Port between the helper and its own processes, on this machine only; 0 for a free port.
    """

    superlink: str
    min_clients: int
    runtime_port: int = 0

    def __post_init__(self) -> None:
        split_address(self.superlink, "superlink")
        if not is_whole(self.min_clients, 2):
            raise UserError("min-clients", "a whole number of at least 2", repr(self.min_clients), "Edit helper.toml")
        if not 0 <= self.runtime_port < 65536:
            raise UserError("runtime-port", "a port, or 0 for a free port", self.runtime_port, "Edit helper.toml")

    @classmethod
    def read(cls, path: Path) -> "HelperSettings":
        """Read `helper.toml`.

        Raises:
            UserError: If the file is missing or invalid.
        """
        return read_table(cls, {key.replace("-", "_"): value for key, value in read_config_file(path).items()}, "")

    def node_config(self, folder: Path) -> dict[str, object]:
        """Return the node config for the ClientApp.

        Raises:
            UserError: If the identity key cannot be read.
        """
        identity = read_signing_key(folder / IDENTITY_FILE).public_key().public_bytes_raw()
        return {HELPER_HOME: str(folder), "fedpriv-helper": identity.hex()}


def check_helper_folder(folder: Path) -> list[Finding]:
    """Run all checks of a helper's folder that need no other machine."""
    findings = [
        *check_presence(folder, HELPER_FILES),
        *check_manifest(folder),
        *check_permissions(folder, ["node.key", IDENTITY_FILE]),
        *judge(HELPER_TOML, lambda: f"for {HelperSettings.read(folder / HELPER_TOML).superlink}"),
        *judge("node key", lambda: key_pair(folder)),
        *judge("helper", lambda: _helper(folder)),
        *check_versions(folder),
    ]
    if (folder / "ca.crt").is_file():
        findings += check_certificate("CA certificate", folder / "ca.crt", folder / "ca.crt")
    return findings


def _helper(folder: Path) -> str:
    helper = load_helper(folder)
    if len(helper.enrolled) < helper.min_clients:
        expected = f"at least min-clients = {number_of(helper.min_clients, 'client')}"
        raise UserError(CLIENTS_TOML, expected, len(helper.enrolled), "Add the keys of the clients")
    identity = helper.identity.public_key().public_bytes_raw().hex()
    return f"identity {identity}, {number_of(len(helper.enrolled), 'client')}, at least {helper.min_clients} in a sum"


def load_helper(folder: Path) -> Helper:
    """Return the helper of a folder.

    Raises:
        UserError: If one of its files is missing or invalid.
    """
    return Helper(
        folder / STATE_FOLDER,
        read_signing_key(folder / IDENTITY_FILE),
        read_clients(folder / CLIENTS_TOML),
        HelperSettings.read(folder / HELPER_TOML).min_clients,
    )


def read_clients(path: Path) -> dict[int, bytes]:
    """Return the public keys in a helper's list, by client.

    Raises:
        UserError: If the file is missing or invalid.
    """
    table = read_config_file(path)
    clients = table.get("clients")
    if set(table) != {"clients"} or not isinstance(clients, dict):
        raise UserError(str(path), "one table [clients]", ", ".join(map(str, table)) or "an empty file", "Edit it")
    found: dict[int, bytes] = {}
    for client, key in clients.items():
        if not (client.isascii() and client.isdigit() and str(int(client)) == client):
            raise UserError(f"{path}: {client}", "the number of a client", repr(client), "Edit the file")
        if not isinstance(key, str) or len(key) != 64 or set(key) - set("0123456789abcdef"):
            raise UserError(f"{path}: {client}", "a public key, 64 digits of 0-9a-f", repr(key), "Edit the file")
        found[int(client)] = bytes.fromhex(key)
    return found


def make_signing_key(path: Path) -> Ed25519PrivateKey:
    """Make an Ed25519 key that only the owner of its file can read.

    Raises:
        UserError: If the file exists, or cannot be written.
    """
    if path.exists():
        raise UserError(str(path), "a new file", "a file", "Remove it if the key may be lost")
    private = Ed25519PrivateKey.generate()
    replace_durably(path, private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return private


def read_signing_key(path: Path) -> Ed25519PrivateKey:
    """Return the Ed25519 key in a file.

    Raises:
        UserError: If the file is missing, or does not hold such a key.
    """
    remedy = "Restore a copy, or enroll a new key with the other parties"
    try:
        private = load_pem_private_key(path.read_bytes(), None)
    except OSError as error:
        raise UserError(str(path), "a readable key", error.strerror or error, remedy) from None
    except (ValueError, TypeError):
        private = None
    if not isinstance(private, Ed25519PrivateKey):
        raise UserError(str(path), "an Ed25519 key in PEM format, without a passphrase", "a different format", remedy)
    return private

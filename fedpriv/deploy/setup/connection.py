"""Flower's connection to the server of a deployment, in `config.toml` of the folder `admin`."""

from pathlib import Path

from fedpriv.deploy.checks import load_certificate, split_address
from fedpriv.deploy.kinds import text_of
from fedpriv.deploy.setup.roster import CONNECTION
from fedpriv.errors import UserError
from fedpriv.experiment.config import read_config_file
from fedpriv.files import write_atomically

__all__ = ["connection_of", "update_connection"]


def connection_of(folder: Path) -> str:
    """Return the address of the secure connection in Flower's `config.toml`, in the folder `admin`.

    Raises:
        UserError: If there is none, or it does not trust this folder's `ca.crt` alone.
    """
    path = folder / "config.toml"
    superlink = read_config_file(path).get("superlink", {})
    connection = superlink.get(CONNECTION, {}) if isinstance(superlink, dict) else {}
    if not isinstance(connection, dict):
        connection = {}
    remedy = "Run ./register.sh, which writes it, or restore a copy of the file"
    address, certificate = str(connection.get("address", "")), str(connection.get("root-certificates", ""))
    if connection.get("insecure"):
        raise UserError(f"{path}: insecure", "no such key", "true", "Remove the key, because it disables TLS")
    if not Path(certificate).is_absolute() or not Path(certificate).is_file():
        expected = "the absolute path of ca.crt"
        raise UserError(f"{path}: root-certificates", expected, repr(certificate), remedy)
    if load_certificate(Path(certificate)) != load_certificate(folder / "ca.crt"):
        raise UserError(f"{path}: root-certificates", "this folder's ca.crt", "a different certificate", remedy)
    split_address(address, f"{path}: address")
    return address


def update_connection(admin: Path) -> None:
    """Update the absolute path of `ca.crt` in Flower's `config.toml`, and check the connection.

    Raises:
        UserError: See `connection_of`.
    """
    path = admin / "config.toml"
    lines = text_of(path, "Flower's connection to the server", "Restore a copy of admin/").splitlines()
    right = f"root-certificates = '{admin / 'ca.crt'}'"
    changed = [right if line.startswith("root-certificates") else line for line in lines]
    if changed != lines:
        write_atomically(path, "\n".join(changed) + "\n")
    connection_of(admin)

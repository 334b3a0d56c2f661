"""Folder of a node in a deployment: its files, and all checks that need no other machine.

`fedpriv deploy init` creates such a folder for each node. `fedpriv deploy node` runs one, unless a check fails.
"""

import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

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
    judge,
    split_address,
)
from fedpriv.deploy.device.policy import POLICY_FILE, Policy, load_policy
from fedpriv.deploy.kinds import in_file
from fedpriv.errors import UserError
from fedpriv.experiment.config import read_config_file
from fedpriv.experiment.schema import read_table

__all__ = ["NODE_FILES", "NODE_TOML", "NodeSettings", "check_node_folder", "key_pair"]

NODE_TOML = "node.toml"
NODE_FILES = ("ca.crt", "node.key", "node.pub", NODE_TOML, POLICY_FILE, VERSIONS, MANIFEST)


@dataclass(frozen=True, kw_only=True)
class NodeSettings:
    """Settings in `node.toml`; in the file, keys have hyphens.

    Args:
        superlink: HOST:PORT of the server.
        partition_id: Client id of this node.
        num_partitions: Number of clients.
        runtime_port: Port between the node and its own processes, on this machine only; 0 for a free port.
        data_root: Folder of the data sets; empty for the environment's choice.
        device: Device for gradients; empty for the run's choice.
        accepted_apps: SHA-256 hashes of bundles that may run besides fedpriv's own bundle.
    """

    superlink: str
    partition_id: int
    num_partitions: int
    runtime_port: int = 0
    data_root: str = ""
    device: str = ""
    accepted_apps: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        split_address(self.superlink, "superlink")
        if not 0 <= self.partition_id < self.num_partitions:
            expected = f"a whole number from 0, below num-partitions ({self.num_partitions})"
            raise UserError("partition-id", expected, self.partition_id, "Give each node a different number")
        if not 0 <= self.runtime_port < 65536:
            raise UserError("runtime-port", "a port, or 0 for a free port", self.runtime_port, "Edit node.toml")
        for app in self.accepted_apps:
            if len(app) != 64 or set(app) - set("0123456789abcdef"):
                raise UserError("accepted-apps", "SHA-256 hashes, 64 digits of 0-9a-f", repr(app), "Edit node.toml")

    @classmethod
    def read(cls, path: Path) -> "NodeSettings":
        """Read `node.toml`.

        Raises:
            UserError: If the file is missing or invalid.
        """
        table = {key.replace("-", "_"): value for key, value in read_config_file(path).items()}
        with in_file(path):
            return read_table(cls, table, "")

    def node_config(self, folder: Path) -> dict[str, object]:
        """Return the node config for the ClientApp."""
        given = {"data-root": self.data_root, "device": self.device}
        return {
            "partition-id": self.partition_id,
            "num-partitions": self.num_partitions,
            "fedpriv-home": str(folder),
            **{key: value for key, value in given.items() if value},
        }


def check_node_folder(folder: Path) -> list[Finding]:
    """Run all checks of a node's folder that need no other machine."""
    findings = [
        *check_presence(folder, NODE_FILES),
        *check_manifest(folder),
        *check_permissions(folder, ["node.key", "signing.key"]),
        *judge(NODE_TOML, lambda: f"for {NodeSettings.read(folder / NODE_TOML).superlink}"),
        *judge("node key", lambda: key_pair(folder)),
        *judge("policy", lambda: _policy(folder)),
        *_device(folder),
        *_data(folder),
        *check_versions(folder),
    ]
    if (folder / "ca.crt").is_file():
        findings += check_certificate("CA certificate", folder / "ca.crt", folder / "ca.crt")
    with suppress(UserError):  # already a finding
        findings += _space(folder, load_policy(folder / POLICY_FILE))
    return findings


def _device(folder: Path) -> list[Finding]:
    """Check the name of the device in `node.toml`, without a use of it: forked processes could not use a GPU then."""
    from fedpriv.experiment.build import check_device_name  # imports torch

    def usable() -> str:
        check_device_name(device, "device")
        return device

    device = ""
    with suppress(UserError):  # already a finding
        device = NodeSettings.read(folder / NODE_TOML).device
    return judge("device", usable) if device else []


def _data(folder: Path) -> list[Finding]:
    """Check that the data that `node.toml` and the policy name are there."""
    found: list[Finding] = []
    with suppress(UserError):  # already a finding
        if root := NodeSettings.read(folder / NODE_TOML).data_root:
            found += judge("data-root", lambda: _existing_folder(Path(root)))
    with suppress(UserError):
        if own := load_policy(folder / POLICY_FILE).data.own:
            found += judge("own data", lambda: _own_arrays(folder / Path(own).expanduser()))
    return found


def _existing_folder(root: Path) -> str:
    if not root.is_dir():
        remedy = f"Correct it in {NODE_TOML}, or mount the disk"
        raise UserError("data-root", "an existing folder", str(root), remedy)
    return str(root)


def _own_arrays(path: Path) -> str:
    """Return a line about a client's own file, without reading its arrays.

    Raises:
        UserError: If it is missing, or not an .npz with the three arrays.
    """
    remedy = f"Write it with numpy.savez(path, inputs=..., labels=..., classes=...), or correct `own` in {POLICY_FILE}"
    try:
        with zipfile.ZipFile(path) as file:
            names = {Path(name).stem for name in file.namelist()}
    except FileNotFoundError:
        raise UserError(str(path), "this client's own data", "a missing file", remedy) from None
    except OSError as error:
        raise UserError(str(path), "a readable file", error.strerror or error, remedy) from None
    except zipfile.BadZipFile:
        raise UserError(str(path), "an .npz file", "a file of a different format", remedy) from None
    if missing := {"inputs", "labels", "classes"} - names:
        raise UserError(str(path), "inputs, labels and classes", f"a file without {', '.join(sorted(missing))}", remedy)
    return f"{path.name} has inputs, labels and classes"


# A memory is two states and a message, in float32, and is rewritten next to the previous one; bytes of a ledger line.
_BYTES_A_PARAMETER, _BYTES_A_LINE = 2 * 3 * 4, 1000


def _space(folder: Path, policy: Policy) -> list[Finding]:
    accepts, limits = policy.accepts, policy.limits
    wanted = _BYTES_A_PARAMETER * accepts.max_parameters + _BYTES_A_LINE * limits.max_rounds
    what = f"a run as large as the policy accepts ({accepts.max_parameters:,} parameters, {limits.max_rounds:,} rounds)"
    kept = [path.stat().st_size for path in folder.glob("state/*/memory")]
    return check_space(folder / "state", wanted, what, least=max(kept, default=0))


def key_pair(folder: Path) -> str:
    """Return a line about the key with which a node authenticates.

    Raises:
        UserError: If `node.key` and `node.pub` are not the halves of one key.
    """
    path, public = folder / "node.key", folder / "node.pub"
    remedy = "Copy both again, or run `ssh-keygen -y -f node.key > node.pub` and register the new node.pub"
    try:
        key, half = load_ssh_private_key(path.read_bytes(), None), load_ssh_public_key(public.read_bytes())
    except OSError as error:
        raise UserError(str(error.filename), "a readable key", error.strerror or error, remedy) from None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise UserError(str(path), "OpenSSH keys without a passphrase", "a different format", remedy) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(half, ec.EllipticCurvePublicKey):
        raise UserError(str(path), "an elliptic-curve key (ecdsa)", type(key).__name__, remedy)
    if key.public_key() != half:
        raise UserError(str(path), "the private half of node.pub", "a different key", remedy)
    return f"matches node.pub, {key.curve.name}"


def _policy(folder: Path) -> str:
    policy = load_policy(folder / POLICY_FILE)
    return f"trust {policy.accepts.trust}, at most epsilon {policy.limits.epsilon:g} at delta {policy.limits.delta:g}"

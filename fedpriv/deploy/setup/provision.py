"""`fedpriv deploy init`, `add` and `renew`: create the folders of a deployment, with keys and certificates."""

import hashlib
import re
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import tomli_w

from fedpriv.checks import at_least_one, positive_real, real_within, whole_within
from fedpriv.deploy.checks import MANIFEST, VERSIONS, load_certificate, manifest_of, versions
from fedpriv.deploy.device.folder import NODE_TOML
from fedpriv.deploy.device.policy import POLICY_FILE
from fedpriv.deploy.helper.folder import (
    CLIENTS_TOML,
    HELPER_TOML,
    IDENTITY_FILE,
    SIGNING_FILE,
    make_signing_key,
    read_clients,
)
from fedpriv.deploy.kinds import described, in_file, text_of
from fedpriv.deploy.parties import HELPERS_FOLDER, parties_config
from fedpriv.deploy.setup.certificates import Authority, Pair, make_node_key, refuse_host
from fedpriv.deploy.setup.compose import COMPOSE, metrics_port, whole_compose
from fedpriv.deploy.setup.roster import Roster
from fedpriv.deploy.setup.superlink import SERVER_TOML
from fedpriv.deploy.setup.texts import (
    ADMIN_CONFIG,
    COMPOSE_TEXT,
    DOCKERFILE,
    DOCKERIGNORE,
    HELPER_TOML_TEXT,
    NODE_TOML_TEXT,
    POLICY,
    README,
    REGISTER,
    SERVER_TOML_TEXT,
    SERVICE,
    START,
)
from fedpriv.errors import UserError, nearest
from fedpriv.experiment.config import read_config_file
from fedpriv.experiment.schema import NAMED, read_table
from fedpriv.files import write_atomically
from fedpriv.privacy import TRUSTS, UNITS, TrustName, UnitName, by_reliance

__all__ = [
    "BUNDLES",
    "DEPLOYMENT",
    "Deployment",
    "add_nodes",
    "init_deployment",
    "make_deployment",
    "read_deployment",
    "renew_certificate",
    "seal_again",
]

DEPLOYMENT = "deployment.toml"
BUNDLES = "bundles.sha256"

_MAX_NODES = 100_000
_MAX_HELPERS = 100
_PRIVATE, _PUBLIC, _PROGRAM = 0o600, 0o644, 0o755


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """Parameters of a deployment, stored as `deployment.toml` in its folder.

    Args:
        host: Name or address of the server.
        port: Port of the server.
        nodes: Number of nodes.
        trust: Trust in the policies.
        unit: Unit of privacy in the policies.
        epsilon: Privacy budget in the policies.
        delta: Delta of the budget.
        helpers: Number of helpers of secure aggregation.
    """

    host: str
    port: int = 9092
    nodes: int
    trust: TrustName = field(default="local", metadata=NAMED)
    unit: UnitName = field(default="client", metadata=NAMED)
    epsilon: float = 8.0
    delta: float = 1e-5
    helpers: int = 0

    def __post_init__(self) -> None:
        refuse_host(self.host)
        offered = [name for name in by_reliance() if self.helpers or not TRUSTS[name].secure_sums]
        if self.trust not in offered:
            expected = " or ".join(f'"{name}"' for name in offered)
            remedy = "Change the value" if self.helpers else "Change the value, or give --helpers"
            raise UserError("--trust", expected, repr(self.trust), remedy)
        if self.unit not in UNITS:
            raise UserError("--unit", '"client" or "example"', repr(self.unit), nearest(self.unit, UNITS))
        whole_within("--nodes", self.nodes, 1, _MAX_NODES, "Give one node for each client")
        whole_within("--helpers", self.helpers, 0, _MAX_HELPERS, "One honest helper is enough")
        if self.helpers and self.nodes < 2:
            raise UserError("--nodes", "at least 2 with helpers", self.nodes, "A sum over one client hides nothing")
        real_within("--port", self.port, 1, 65535, "Use 9092 if it is free")
        positive_real("--epsilon", self.epsilon, "Set it to each client's total budget")
        if not 0.0 < self.delta < 1.0:
            raise UserError("--delta", "a number between 0 and 1", self.delta, "Set it well below 1 / clients")

    @property
    def address(self) -> str:
        """HOST:PORT of the server."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def make_deployment(**values: object) -> Deployment:
    """Return a deployment with the values from the command line.

    Raises:
        UserError: If a value is invalid; the error names its option.
    """
    return read_table(Deployment, values, "")


def init_deployment(folder: Path, deployment: Deployment, days: int = 365) -> None:
    """Create all folders of a deployment, or none if anything fails.

    Args:
        folder: Folder of the deployment, which must be empty or not exist.
        deployment: Parameters of the deployment.
        days: Validity of the server's certificate, in days.

    Raises:
        UserError: If the folder is not empty.
    """
    folder = folder.resolve()
    _refuse_days(days)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        got = "a folder with files" if folder.is_dir() else "a file"
        raise UserError(str(folder), "an empty folder, or a new one", got, "Choose another DIR")
    if "'" in str(folder) or "\n" in str(folder):
        raise UserError(str(folder), "a path without quotes", "a path with quotes", "Choose another DIR")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        authority = Authority.make()
        _write(part / "ca" / "ca.key", authority.pair.private, _PRIVATE)
        _write(part / "ca" / "ca.crt", authority.pair.public)
        _write_server(part / "server", deployment, authority, days)
        _write_admin(part / "admin", deployment, authority, folder / "admin")
        for helper in range(deployment.helpers):
            _write_identity(part, helper)
        for node in range(deployment.nodes):
            _write_node(part, deployment, node)
        for helper in range(deployment.helpers):
            _write_helper(part, deployment, helper)
        _write(part / DEPLOYMENT, tomli_w.dumps(asdict(deployment)))
        _seal(part, deployment)
        part.replace(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def add_nodes(folder: Path, count: int) -> list[str]:
    """Create the folders of additional nodes in a deployment; return their names.

    Raises:
        UserError: If `folder` was not created by `init_deployment`, a file that the nodes need is damaged, or a folder
            has the name of a new node. Nothing has changed.
    """
    deployment = read_deployment(folder)
    at_least_one("--nodes", count, "Give the number of nodes to add")
    larger = Deployment(**{**asdict(deployment), "nodes": deployment.nodes + count})
    added = range(deployment.nodes, larger.nodes)
    _refuse_unready(folder, larger, [f"node-{node}" for node in added])
    for node in added:
        _write_node(folder, larger, node)
    _write(folder / DEPLOYMENT, tomli_w.dumps(asdict(larger)))
    _seal(folder, larger)
    return [f"node-{node}" for node in added]


def renew_certificate(folder: Path, days: int, host: str | None = None) -> None:
    """Create a new key and certificate for the server of a deployment.

    Args:
        folder: Folder of the deployment, with `ca/`.
        days: Validity of the certificate, in days.
        host: New name or address of the server; None for the current one.

    Raises:
        UserError: If `folder` was not created by `init_deployment`.
    """
    _refuse_days(days)
    deployment = read_deployment(folder)
    if host is not None:
        deployment = Deployment(**{**asdict(deployment), "host": host})
    settings = _with_address(folder / "server" / SERVER_TOML, deployment)
    _refuse_unreadable(folder)
    _write_pair(folder / "server", _authority(folder).server_pair(deployment.host, days), "server.key", "server.pem")
    if host is not None:
        _write(folder / "server" / SERVER_TOML, settings)
        _write(folder / DEPLOYMENT, tomli_w.dumps(asdict(deployment)))
    _seal(folder, deployment)


def _with_address(path: Path, deployment: Deployment) -> str:
    """Return `server.toml` with the server's address; its other lines belong to the administrator."""
    if not path.exists():
        return SERVER_TOML_TEXT.substitute(address=deployment.address, port=deployment.port)
    text = text_of(path, "the server's settings", "Restore a copy, or remove the file to get a new one")
    return re.sub(r'^address\s*=\s*"[^"]*"', f'address = "{deployment.address}"', text, flags=re.MULTILINE)


def _refuse_unready(folder: Path, larger: Deployment, names: list[str]) -> None:
    """Raise a `UserError` if nodes could not be added completely, before anything is written."""
    _authority(folder)
    admin = folder / "admin"
    Roster.read(folder)
    _identities(folder)
    if larger.helpers:
        read_clients(admin / CLIENTS_TOML)
    _refuse_unreadable(folder)
    for name in names:
        if (folder / name).exists():
            remedy = "Move it away, for instance if an earlier command was interrupted"
            raise UserError(str(folder / name), "no folder of a new node", "an existing one", remedy)


def _refuse_unreadable(folder: Path) -> None:
    """Raise a `UserError` if a file that `_seal` reads is damaged."""
    _sealed(folder)
    if (folder / "admin" / "register.sh").is_file():
        Roster.read(folder)
    if (folder / "server" / "server.pem").exists():
        load_certificate(folder / "server" / "server.pem")


def seal_again(folder: Path) -> None:
    """Rewrite the README and the list of manifests after a node was removed, if `folder` is a deployment's folder."""
    if (folder / DEPLOYMENT).is_file():
        _seal(folder, read_deployment(folder))


def _refuse_days(days: int) -> None:
    whole_within("--days", days, 1, 3650, "Use 365 if unsure")


def read_deployment(folder: Path) -> Deployment:
    """Return the parameters of the deployment in a folder.

    Raises:
        UserError: If `folder` was not created by `init_deployment`, or its file is damaged.
    """
    if not (folder / DEPLOYMENT).is_file():
        remedy = "Give the folder that `fedpriv deploy init` made, with ca/ in it"
        raise UserError(str(folder), f"a deployment's folder, with {DEPLOYMENT}", described(folder), remedy)
    with in_file(folder / DEPLOYMENT):
        return read_table(Deployment, read_config_file(folder / DEPLOYMENT), "")


def _authority(folder: Path) -> Authority:
    """Return the CA; its key may be stored elsewhere until it is needed."""
    remedy = "Move the folder ca/ back into the deployment's folder"
    try:
        pair = Pair((folder / "ca" / "ca.key").read_bytes(), (folder / "ca" / "ca.crt").read_bytes())
        return Authority.read(pair)
    except OSError as error:
        raise UserError(str(error.filename), "the CA's file", error.strerror or error, remedy) from None
    except ValueError:
        expected = "the CA's key and its certificate"
        got = "damaged files, or the key of another certificate"
        raise UserError(str(folder / "ca"), expected, got, "Restore a copy of ca/") from None


def _write_server(folder: Path, deployment: Deployment, authority: Authority, days: int) -> None:
    _write(folder / "ca.crt", authority.pair.public)
    _write_pair(folder, authority.server_pair(deployment.host, days), "server.key", "server.pem")
    text = SERVER_TOML_TEXT.substitute(address=deployment.address, port=deployment.port)
    _write(folder / SERVER_TOML, text)
    _write_programs(folder, "start-superlink.sh", "fedpriv-superlink", "server", "/opt/fedpriv/server")
    _write_manifest(folder, _public_files(folder))


def _write_admin(folder: Path, deployment: Deployment, authority: Authority, final: Path) -> None:
    """Write the administrator's folder, which will be moved to `final`."""
    _write(folder / "ca.crt", authority.pair.public)
    _write(folder / "config.toml", ADMIN_CONFIG.substitute(port=deployment.port, ca=final / "ca.crt"))
    _write(folder / "register.sh", REGISTER.substitute(), _PROGRAM)
    _write(folder / VERSIONS, tomli_w.dumps(versions()))
    _write_manifest(folder, _public_files(folder))


def _write_node(root: Path, deployment: Deployment, node: int) -> None:
    folder, key = root / f"node-{node}", make_node_key()
    _write(folder / "ca.crt", (root / "ca" / "ca.crt").read_bytes())
    _write_pair(folder, key, "node.key", "node.pub")
    _write(root / "admin" / "nodes" / f"node-{node}.pub", key.public)
    values = {"address": deployment.address, "node": node, "nodes": deployment.nodes}
    _write(folder / NODE_TOML, NODE_TOML_TEXT.substitute(values))
    if deployment.helpers:
        public = make_signing_key(folder / SIGNING_FILE).public_key().public_bytes_raw().hex()
        _enroll(root / "admin" / CLIENTS_TOML, node, public)
    limits = {"epsilon": repr(deployment.epsilon), "delta": repr(deployment.delta)}
    limits["helpers"] = ", ".join(f'"{identity}"' for identity in _identities(root))
    _write(folder / POLICY_FILE, POLICY.substitute(trust=deployment.trust, unit=deployment.unit, **limits))
    _write_programs(folder, "start-node.sh", "fedpriv-node", "node", "/opt/fedpriv/node")
    _write_manifest(folder, _public_files(folder))


def _write_identity(root: Path, helper: int) -> None:
    """Write the identity key of a helper, which the policies of nodes pin."""
    folder = root / f"helper-{helper}"
    folder.mkdir(mode=0o700)
    identity = make_signing_key(folder / IDENTITY_FILE).public_key().public_bytes_raw().hex()
    _write(root / "admin" / HELPERS_FOLDER / f"helper-{helper}.pub", f"{identity}\n")


def _identities(root: Path) -> list[str]:
    """Return the identity keys of all helpers."""
    return [key for key in str(parties_config(root / "admin").get("helpers", "")).split(",") if key]


def _write_helper(root: Path, deployment: Deployment, helper: int) -> None:
    """Write the folder of a helper, with the clients that have a folder here in its list."""
    folder, key = root / f"helper-{helper}", make_node_key()
    _write(folder / "ca.crt", (root / "ca" / "ca.crt").read_bytes())
    _write_pair(folder, key, "node.key", "node.pub")
    _write(root / "admin" / "nodes" / f"helper-{helper}.pub", key.public)
    _write(folder / CLIENTS_TOML, (root / "admin" / CLIENTS_TOML).read_bytes())
    values = {"address": deployment.address, "least": max(2, deployment.nodes // 2 + 1)}
    _write(folder / HELPER_TOML, HELPER_TOML_TEXT.substitute(values))
    _write_programs(folder, "start-helper.sh", "fedpriv-helper", "node", "/opt/fedpriv/helper")
    _write_manifest(folder, _public_files(folder))


def _enroll(path: Path, client: int, public: str) -> None:
    """Add the public key of a client to the list for helpers."""
    head = "# Public keys of the clients that may count in a sum, by their numbers.\n[clients]\n"
    before = path.read_text(encoding="utf-8") if path.exists() else head
    kept = "".join(line for line in before.splitlines(keepends=True) if not line.startswith(f"{client} = "))
    _write(path, f'{kept}{client} = "{public}"\n')


def _write_programs(folder: Path, start: str, unit: str, command: str, home: str) -> None:
    """Write the files that start a server or node: a script, a systemd unit, a Dockerfile and the versions."""
    made = versions()
    what = f"the {command}" if command == "server" else "a node"
    # In a container with a separate network, the server would see another address of its administrator.
    options = " --network host" if command == "server" else ""
    _write(folder / start, START.substitute(what=what, command=command), _PROGRAM)
    wheel = f"fedpriv-{made['fedpriv']}-py3-none-any.whl"
    names = {"unit": unit, "command": command, "home": home, "what": command, "options": options, "wheel": wheel}
    _write(folder / f"{unit}.service", SERVICE.substitute(names))
    _write(folder / "Dockerfile", DOCKERFILE.substitute(names, **made))
    _write(folder / ".dockerignore", DOCKERIGNORE.substitute())
    service = {"name": folder.name, "metrics_port": metrics_port(folder.name), "fedpriv": made["fedpriv"]}
    _write(folder / COMPOSE, COMPOSE_TEXT.substitute(names, **service))
    _write(folder / VERSIONS, tomli_w.dumps(made))


# Files that their operators edit, that Flower rewrites, or that another check covers.
_CHANGING = (
    NODE_TOML,
    SERVER_TOML,
    POLICY_FILE,
    VERSIONS,
    MANIFEST,
    "node.key",
    "node.pub",
    "server.key",
    "server.pem",
    "config.toml",
    COMPOSE,
    HELPER_TOML,
    CLIENTS_TOML,
    IDENTITY_FILE,
    SIGNING_FILE,
)


def _public_files(folder: Path) -> list[str]:
    """Return the files of a folder that users do not edit."""
    files = [path for path in folder.iterdir() if path.is_file()]
    return [path.name for path in files if path.name not in _CHANGING]


def _write_manifest(folder: Path, names: Iterable[str]) -> None:
    _write(folder / MANIFEST, manifest_of(folder, names))


def _seal(folder: Path, deployment: Deployment) -> None:
    """Write the README of all folders, and the list of their manifests."""
    gone = Roster.read(folder / "admin").removed_nodes if (folder / "admin" / "register.sh").is_file() else []
    nodes = (f"node-{node}" for node in range(deployment.nodes))
    helpers = (f"helper-{helper}" for helper in range(deployment.helpers))
    kinds = ["server", "admin", *(name for name in (*nodes, *helpers) if name not in gone)]
    present = [kind for kind in kinds if (folder / kind / MANIFEST).is_file()]
    digests = {kind: hashlib.sha256((folder / kind / MANIFEST).read_bytes()).hexdigest() for kind in present}
    kept = _sealed(folder)
    lines = {**{kind: kept[kind] for kind in kinds if kind in kept}, **digests}
    _write(folder / BUNDLES, "".join(f"{lines[k]}  {k}/{MANIFEST}\n" for k in kinds if k in lines))
    _write(folder / COMPOSE, whole_compose(kind for kind in kinds if (folder / kind / COMPOSE).is_file()))
    certificate = folder / "server" / "server.pem"
    until = f"{load_certificate(certificate).not_valid_after_utc:%Y-%m-%d}" if certificate.exists() else "its expiry"
    values = {"address": deployment.address, "host": deployment.host, "port": deployment.port}
    values |= {"nodes": deployment.nodes, "last": deployment.nodes - 1, "until": until}
    _write(folder / "README.md", README.substitute(values, **versions()))
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        path.chmod(0o700)


def _sealed(folder: Path) -> dict[str, str]:
    """Return the current content of `bundles.sha256`, also for folders that may have been handed out."""
    if not (folder / BUNDLES).exists():
        return {}
    lines = text_of(folder / BUNDLES, "checksums of the manifests", "Restore a copy").splitlines()
    return {name.partition("/")[0]: digest for digest, _, name in (line.partition("  ") for line in lines)}


def _write_pair(folder: Path, pair: Pair, private: str, public: str) -> None:
    _write(folder / private, pair.private, _PRIVATE)
    _write(folder / public, pair.public)


def _write(path: Path, content: bytes | str, mode: int = _PUBLIC) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomically(path, content, mode)
    path.chmod(mode)  # restore the bits that the umask removed

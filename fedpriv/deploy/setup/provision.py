"""`fedpriv deploy init`, `add` and `renew`: the folders of a deployment, with keys and certificates, ready to copy."""

import hashlib
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import tomli_w

from fedpriv.checks import at_least_one, positive_real, real_within, whole_within
from fedpriv.deploy.checks import MANIFEST, VERSIONS, load_certificate, manifest_of, versions
from fedpriv.deploy.device.folder import NODE_TOML
from fedpriv.deploy.device.policy import POLICY_FILE
from fedpriv.deploy.setup.certificates import Authority, Pair, make_node_key, refuse_host
from fedpriv.deploy.setup.roster import Roster
from fedpriv.deploy.setup.superlink import SERVER_TOML
from fedpriv.deploy.setup.texts import (
    ADMIN_CONFIG,
    DOCKERFILE,
    NODE_TOML_TEXT,
    POLICY,
    README,
    REGISTER,
    SERVER_TOML_TEXT,
    SERVICE,
    START,
)
from fedpriv.errors import UserError
from fedpriv.experiment.config import read_config_file
from fedpriv.experiment.schema import read_table
from fedpriv.files import write_atomically
from fedpriv.privacy import Local, by_reliance

__all__ = [
    "BUNDLES",
    "DEPLOYMENT",
    "Deployment",
    "add_nodes",
    "init_deployment",
    "make_deployment",
    "renew_certificate",
    "seal_again",
]

DEPLOYMENT = "deployment.toml"
BUNDLES = "bundles.sha256"

_MOST_NODES = 100_000
_PRIVATE, _PUBLIC, _PROGRAM = 0o600, 0o644, 0o755


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """What a deployment was made for; `deployment.toml` in its folder.

    Args:
        host: The server's name or address.
        port: Its port.
        nodes: How many nodes there are.
        trust: What the policies say, as are the next two.
        epsilon: Most that may be spent on a client's data.
        delta: The delta of that.
    """

    host: str
    port: int = 9092
    nodes: int
    trust: str = Local.name
    epsilon: float = 8.0
    delta: float = 1e-5

    def __post_init__(self) -> None:
        refuse_host(self.host)
        if self.trust not in by_reliance():
            expected = " or ".join(f'"{name}"' for name in by_reliance())
            raise UserError("trust", expected, repr(self.trust), "Change the value")
        whole_within("--nodes", self.nodes, 1, _MOST_NODES, "Give one a client")
        real_within("--port", self.port, 1, 65535, "9092 is usual")
        positive_real("--epsilon", self.epsilon, "Give each client's whole budget")
        if not 0.0 < self.delta < 1.0:
            raise UserError("--delta", "a number between 0 and 1", self.delta, "Well below 1 / clients is usual")

    @property
    def address(self) -> str:
        """HOST:PORT of the server."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def make_deployment(**values: object) -> Deployment:
    """A deployment of what the command line gave.

    Raises:
        UserError: If a value is not right; it is named as its option.
    """
    return read_table(Deployment, values, "")


def init_deployment(folder: Path, deployment: Deployment, days: int = 365) -> None:
    """Makes the folders of a deployment; all of them or, if anything fails, none.

    Args:
        folder: Where to; it must be empty, or not there.
        deployment: What for.
        days: How long the server's certificate is valid.

    Raises:
        UserError: If the folder holds anything.
    """
    folder = folder.resolve()
    _refuse_days(days)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(str(folder), "an empty folder, or none", "one that holds something", "Choose another DIR")
    if "'" in str(folder) or "\n" in str(folder):
        raise UserError(str(folder), "a path without quotes", "one with them", "Choose another DIR")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        authority = Authority.make()
        _write(part / "ca" / "ca.key", authority.pair.private, _PRIVATE)
        _write(part / "ca" / "ca.crt", authority.pair.public)
        _write_server(part / "server", deployment, authority, days)
        _write_admin(part / "admin", deployment, authority, folder / "admin")
        for node in range(deployment.nodes):
            _write_node(part, deployment, node)
        _write(part / DEPLOYMENT, tomli_w.dumps(asdict(deployment)))
        _seal(part, deployment)
        part.replace(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def add_nodes(folder: Path, count: int) -> list[str]:
    """Makes the folders of further nodes in a deployment; returns their names.

    Raises:
        UserError: If `folder` is not one that `init_deployment` made.
    """
    deployment = _read(folder)
    at_least_one("--nodes", count, "Give how many to add")
    larger = Deployment(**{**asdict(deployment), "nodes": deployment.nodes + count})
    added = range(deployment.nodes, larger.nodes)
    _authority(folder)
    for node in added:
        _write_node(folder, larger, node)
    _write(folder / DEPLOYMENT, tomli_w.dumps(asdict(larger)))
    _seal(folder, larger)
    return [f"node-{node}" for node in added]


def renew_certificate(folder: Path, days: int, host: str | None = None) -> None:
    """Gives the server of a deployment a new key and certificate.

    Args:
        folder: The deployment's folder, with `ca/`.
        days: How long the certificate is valid.
        host: Another name or address of the server; None for the same.

    Raises:
        UserError: If `folder` is not one that `init_deployment` made.
    """
    _refuse_days(days)
    deployment = _read(folder)
    if host is not None:
        deployment = Deployment(**{**asdict(deployment), "host": host})
    _write_pair(folder / "server", _authority(folder).server_pair(deployment.host, days), "server.key", "server.pem")
    if host is not None:
        text = SERVER_TOML_TEXT.substitute(address=deployment.address, port=deployment.port)
        _write(folder / "server" / SERVER_TOML, text)
        _write(folder / DEPLOYMENT, tomli_w.dumps(asdict(deployment)))
    _seal(folder, deployment)


def seal_again(folder: Path) -> None:
    """Writes what is about all folders once more, if this is a deployment's folder: after a node was removed."""
    if (folder / DEPLOYMENT).is_file():
        _seal(folder, _read(folder))


def _refuse_days(days: int) -> None:
    whole_within("--days", days, 1, 3650, "365 is usual")


def _read(folder: Path) -> Deployment:
    if not (folder / DEPLOYMENT).is_file():
        remedy = "Give the folder that `fedpriv deploy init` made, with ca/ in it"
        raise UserError(str(folder), f"a deployment's folder, with {DEPLOYMENT}", "another one", remedy)
    return read_table(Deployment, read_config_file(folder / DEPLOYMENT), "")


def _authority(folder: Path) -> Authority:
    """The CA, whose key may lie elsewhere until it is needed."""
    remedy = "Bring the folder ca/ back to where it was made"
    try:
        pair = Pair((folder / "ca" / "ca.key").read_bytes(), (folder / "ca" / "ca.crt").read_bytes())
        return Authority.read(pair)
    except OSError as error:
        raise UserError(str(error.filename), "the CA's file", error.strerror or error, remedy) from None
    except ValueError:
        raise UserError(str(folder / "ca"), "the CA's key and certificate", "something else", remedy) from None


def _write_server(folder: Path, deployment: Deployment, authority: Authority, days: int) -> None:
    _write(folder / "ca.crt", authority.pair.public)
    _write_pair(folder, authority.server_pair(deployment.host, days), "server.key", "server.pem")
    text = SERVER_TOML_TEXT.substitute(address=deployment.address, port=deployment.port)
    _write(folder / SERVER_TOML, text)
    _write_programs(folder, "start-superlink.sh", "fedpriv-superlink", "server", "/opt/fedpriv/server")
    _write_manifest(folder, _public_files(folder))


def _write_admin(folder: Path, deployment: Deployment, authority: Authority, final: Path) -> None:
    """`final` is where the folder will be."""
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
    limits = {"epsilon": repr(deployment.epsilon), "delta": repr(deployment.delta)}
    _write(folder / POLICY_FILE, POLICY.substitute(trust=deployment.trust, **limits))
    _write_programs(folder, "start-node.sh", "fedpriv-node", "node", "/opt/fedpriv/node")
    _write_manifest(folder, _public_files(folder))


def _write_programs(folder: Path, start: str, unit: str, command: str, home: str) -> None:
    """What starts a server or node: a script, a unit of systemd, an image; and the versions that it needs."""
    made = versions()
    what = f"the {command}" if command == "server" else "a node"
    # A server in a container of its own network would see its administrator come from another address.
    options = " --network host" if command == "server" else ""
    _write(folder / start, START.substitute(what=what, command=command), _PROGRAM)
    wheel = f"fedpriv-{made['fedpriv']}-py3-none-any.whl"
    names = {"unit": unit, "command": command, "home": home, "what": command, "options": options, "wheel": wheel}
    _write(folder / f"{unit}.service", SERVICE.substitute(names))
    _write(folder / "Dockerfile", DOCKERFILE.substitute(names, **made))
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
)


def _public_files(folder: Path) -> list[str]:
    """The files of a folder that nobody has to change."""
    files = [path for path in folder.iterdir() if path.is_file()]
    return [path.name for path in files if path.name not in _CHANGING]


def _write_manifest(folder: Path, names: Iterable[str]) -> None:
    _write(folder / MANIFEST, manifest_of(folder, names))


def _seal(folder: Path, deployment: Deployment) -> None:
    """Writes what is about all folders: how to use them, and what their manifests are."""
    gone = Roster.read(folder / "admin").removed_nodes if (folder / "admin" / "register.sh").is_file() else []
    nodes = (f"node-{node}" for node in range(deployment.nodes))
    kinds = ["server", "admin", *(name for name in nodes if name not in gone)]
    present = [kind for kind in kinds if (folder / kind / MANIFEST).is_file()]
    digests = {kind: hashlib.sha256((folder / kind / MANIFEST).read_bytes()).hexdigest() for kind in present}
    kept = _sealed(folder)
    lines = {**{kind: kept[kind] for kind in kinds if kind in kept}, **digests}
    _write(folder / BUNDLES, "".join(f"{lines[k]}  {k}/{MANIFEST}\n" for k in kinds if k in lines))
    certificate = folder / "server" / "server.pem"
    until = f"{load_certificate(certificate).not_valid_after_utc:%Y-%m-%d}" if certificate.exists() else "its end"
    values = {"address": deployment.address, "host": deployment.host, "port": deployment.port}
    values |= {"nodes": deployment.nodes, "last": deployment.nodes - 1, "until": until}
    _write(folder / "README.md", README.substitute(values, **versions()))
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        path.chmod(0o700)


def _sealed(folder: Path) -> dict[str, str]:
    """What `bundles.sha256` says so far, of folders that may have been handed out."""
    try:
        lines = (folder / BUNDLES).read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    return {name.partition("/")[0]: digest for digest, _, name in (line.partition("  ") for line in lines)}


def _write_pair(folder: Path, pair: Pair, private: str, public: str) -> None:
    _write(folder / private, pair.private, _PRIVATE)
    _write(folder / public, pair.public)


def _write(path: Path, content: bytes | str, mode: int = _PUBLIC) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomically(path, content, mode)
    path.chmod(mode)  # whatever the umask took off

"""`fedpriv deploy node`: run one node of a deployment, a client or a helper; it executes only its own installed code.

The node is Flower's SuperNode, in this process. It checks the server's certificate against the deployment's CA, and
authenticates with its key. It runs `clients.client_app` and refuses bundles with any other content, except those that
`accepted-apps` lists. A helper runs `clients.client_app` in every run, and never receives the run's bundle.
"""

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tomli_w

from fedpriv.deploy.checks import WrongServerError, call_server, refuse_wrong, split_address
from fedpriv.deploy.device.folder import NODE_TOML, NodeSettings, check_node_folder
from fedpriv.deploy.helper.folder import HELPER_TOML, HelperSettings, check_helper_folder
from fedpriv.deploy.kinds import require_kind
from fedpriv.errors import UserError
from fedpriv.files import lock_file, write_atomically
from fedpriv.flower.bundle import app_files, app_hash
from fedpriv.flower.companion import LOCK

__all__ = ["flower_home", "held_alone", "run_node"]


def run_node(bundle: Path) -> int:
    """Run a node until it is stopped.

    Args:
        bundle: Folder of the node, created by `fedpriv deploy init`.

    Returns:
        Exit code of the SuperNode.

    Raises:
        UserError: If the folder fails a check, the server is not authentic, or the node already runs.
    """
    bundle = bundle.resolve()
    require_kind(bundle, "node", "helper")
    helps = (bundle / HELPER_TOML).is_file()
    refuse_wrong(bundle, check_helper_folder(bundle) if helps else check_node_folder(bundle))
    settings = HelperSettings.read(bundle / HELPER_TOML) if helps else NodeSettings.read(bundle / NODE_TOML)
    _refuse_impostor(settings, bundle / "ca.crt")
    home = flower_home(bundle)
    with held_alone(home):
        config = home / "node-config.toml"
        write_atomically(config, tomli_w.dumps(settings.node_config(bundle)))
        from fedpriv.flower.internals.supernode import own_bundle, run_supernode

        options = [
            *("--superlink", settings.superlink),
            *("--root-certificates", str(bundle / "ca.crt")),
            *("--auth-supernode-private-key", str(bundle / "node.key")),
            *("--node-config", str(config)),
            *("--host", "127.0.0.1", "--port", str(settings.runtime_port or _free_port())),
        ]
        accepted = settings.accepted_apps if isinstance(settings, NodeSettings) else ()
        return run_supernode(options, {app_hash(), *accepted}, own_bundle(app_files()) if helps else None)


def flower_home(folder: Path) -> Path:
    """Create the folder for Flower's files, and set it in the environment of Flower's processes."""
    home = folder / "flower"
    home.mkdir(mode=0o700, exist_ok=True)
    home.chmod(0o700)
    os.environ["FLWR_HOME"] = str(home)
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return home


@contextmanager
def held_alone(home: Path) -> Iterator[None]:
    """Lock a folder for the block.

    Raises:
        UserError: If another process has locked it: two nodes would corrupt their common memory.
    """
    with (home / LOCK).open("w") as lock:
        try:
            lock_file(lock, wait=False)
        except BlockingIOError:
            remedy = "Stop the other process first"
            expected = "a folder that no other process uses"
            raise UserError(str(home.parent), expected, "a folder in use", remedy) from None
        yield


def _refuse_impostor(settings: NodeSettings | HelperSettings, ca: Path) -> None:
    """Raise a `UserError` if the server has a wrong certificate. If the server is not up yet, Flower waits for it."""
    host, port = split_address(settings.superlink, "superlink")
    try:
        call_server(host, port, ca)
    except WrongServerError:
        raise
    except UserError as error:
        print(f"fedpriv: {error} Waiting for it.", file=sys.stderr)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]

"""Flower app that runs an experiment in a deployment or a simulation: a few lines that call the installed fedpriv.

In a deployment the app is identical on every machine, so that each node can compute the hash of its bundle. A node that
accepts only this bundle runs its own installed fedpriv and never executes code from a server.
"""

from collections.abc import Mapping
from pathlib import Path

import tomli_w

from fedpriv.files import write_atomically
from fedpriv.version import __version__

__all__ = ["app_files", "app_hash", "write_app"]

SERVER_MODULE = "from strategies.server_app import app\n\n__all__ = ['app']\n"
CLIENT_MODULE = "from clients.client_app import app\n\n__all__ = ['app']\n"

# Keys of the run config in a deployment, with their defaults.
_DEPLOYED: dict[str, object] = {
    "config-toml": "",
    "out": "",
    "device": "cpu",
    "data-root": "",
    "deployed": True,
    "resume": False,
    "claimed": False,
    "wait": False,
    "failure-report": "",
    "helpers": "",
    "enrolled": "",
    "test-seeded": False,
}


def app_files(run_config: Mapping[str, object] | None = None) -> dict[str, bytes]:
    """Return the app's files by name.

    Args:
        run_config: The table `[tool.flwr.app.config]`; None for that of a deployment.
    """
    components = {"serverapp": "fedpriv_server:app", "clientapp": "fedpriv_client:app"}
    config = dict(_DEPLOYED if run_config is None else run_config)
    tables = {
        "project": {"name": "fedpriv-run", "version": __version__, "license": "Apache-2.0", "description": "One run"},
        "tool": {"flwr": {"app": {"publisher": "fedpriv", "components": components, "config": config}}},
    }
    return {
        "pyproject.toml": tomli_w.dumps(tables).encode(),
        "fedpriv_server.py": SERVER_MODULE.encode(),
        "fedpriv_client.py": CLIENT_MODULE.encode(),
    }


def write_app(folder: Path, run_config: Mapping[str, object] | None = None) -> None:
    """Write the app.

    Args:
        folder: The app's folder, which is created if it does not exist.
        run_config: See `app_files`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in app_files(run_config).items():
        write_atomically(folder / name, content)


def app_hash() -> str:
    """Return the SHA-256 of the bundle that Flower builds from a deployment's app; it is reproducible."""
    from fedpriv.flower.internals.supernode import bundle_hash

    return bundle_hash(app_files())

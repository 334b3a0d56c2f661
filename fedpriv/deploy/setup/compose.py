"""Files for `docker compose`: one for each folder, and one for the whole deployment that includes them."""

from collections.abc import Iterable

__all__ = ["COMPOSE", "metrics_port", "whole_compose"]

COMPOSE = "compose.yaml"

_FIRST = {"server": 9109, "helper": 9110, "node": 9210}
_PORTS = 10_000

_HEAD = """\
# Runs all parties of the deployment on this machine. On separate machines, use the compose.yaml of each folder.
# Copy the wheel into every folder first (see server/Dockerfile), and: export FEDPRIV_USER="$(id -u):$(id -g)"
"""


def metrics_port(name: str) -> int:
    """Return the default port of a party's metrics, so that all parties of a small deployment fit on one machine.

    Args:
        name: `server`, `helper-J` or `node-I`.
    """
    kind, _, number = name.partition("-")
    return _FIRST[kind] + (int(number) % _PORTS if number else 0)


def whole_compose(names: Iterable[str]) -> str:
    """Return the compose file that includes those of folders.

    Args:
        names: Names of the folders.
    """
    return _HEAD + "include:\n" + "".join(f"  - {name}/{COMPOSE}\n" for name in names)

"""`fedpriv deploy register` and `remove`: register the keys of nodes with a deployment's server, and remove them.

A SuperLink never accepts an unregistered key again, so that a removed node can return only with a new key. `check`,
`register` and `remove` are consistent about each key, because all of them use `compared`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedpriv.deploy.setup.connection import update_connection
from fedpriv.deploy.setup.provision import seal_again
from fedpriv.deploy.setup.roster import CONNECTION, Roster
from fedpriv.errors import UserError
from fedpriv.flower.internals.control import KnownNode, administering

__all__ = ["Comparison", "compared", "register_nodes", "remove_node", "replace_key"]

_NEW_KEY = "A removed key is never accepted again: put a new key of the node there, or run: fedpriv deploy remove"


@dataclass(frozen=True)
class Comparison:
    """Comparison of a roster with the nodes of a server; names are in the roster's order.

    Args:
        registered: Names that the server accepts, with their status.
        absent: Names that the server does not know yet.
        gone: Names in the roster that were removed, here or on the server.
        lingering: Removed names that the server still accepts.
        strangers: The server's numbers of nodes that it accepts and that are not in the roster.
    """

    registered: dict[str, str]
    absent: list[str]
    gone: list[str]
    lingering: list[str]
    strangers: list[int]

    @property
    def faults(self) -> list[str]:
        """Lines about nodes that need action by a person, except for absent nodes."""
        gone = [f"{name}: not registered. {_NEW_KEY} {name}" for name in self.gone]
        again = [f"{name}: removed, but still registered. Run: fedpriv deploy remove {name}" for name in self.lingering]
        return gone + again


def compared(roster: Roster, known: Mapping[bytes, KnownNode]) -> Comparison:
    """Compare a roster with the nodes that a server knows, by key."""
    welcome = {key: node for key, node in known.items() if node.welcome}
    kept = {name: key for name, key in roster.keys.items() if key not in roster.removed}
    gone = [name for name, key in roster.keys.items() if key in roster.removed or (key in known and key not in welcome)]
    return Comparison(
        registered={name: welcome[key].status for name, key in kept.items() if key in welcome},
        absent=[name for name, key in kept.items() if key not in known],
        gone=gone,
        lingering=[name for key, name in roster.removed.items() if key in welcome],
        strangers=[node.id for key, node in welcome.items() if key not in {*kept.values(), *roster.removed}],
    )


def register_nodes(folder: Path) -> tuple[list[str], list[str]]:
    """Register the keys in `nodes/` with a deployment's server.

    Args:
        folder: Folder of the deployment, or `admin` in it.

    Returns:
        A line for each key that the server accepts, and a line for each that it rejects.

    Raises:
        UserError: If the server does not answer.
    """
    roster = Roster.read(folder)
    update_connection(roster.folder)
    lines, faults = [], []
    with administering(roster.folder, CONNECTION) as server:
        found = compared(roster, server.nodes())
        for name in roster.keys:
            if name in found.registered:
                lines.append(f"{name}: already registered")
            elif name in roster.damaged:
                path = roster.folder / "nodes" / f"{name}.pub"
                faults.append(f"{name}: not registered. {path} holds no public key: copy node.pub of the node again")
            elif name in found.absent:
                try:
                    server.register(roster.keys[name], name)
                    lines.append(f"{name}: registered")
                except UserError as error:
                    faults.append(f"{name}: not registered. {error}")
    return lines, faults + found.faults


def remove_node(name: str, folder: Path) -> str:
    """Remove a node permanently: the server rejects it from now on, and the roster records the removal.

    The server is changed first, so that the roster never claims a removal that has not happened. This function may be
    called again at any time.

    Args:
        name: Name of the node, as in `nodes/NAME.pub`.
        folder: Folder of the deployment, or `admin` in it.

    Returns:
        A line about the result.

    Raises:
        UserError: If there is no such node, or the server does not answer; then nothing has changed.
    """
    roster = Roster.read(folder)
    key = roster.key_of(name)
    update_connection(roster.folder)
    with administering(roster.folder, CONNECTION) as server:
        node = server.nodes().get(key)
        if node is not None and node.welcome:
            server.unregister(node)
    roster.without(name)
    seal_again(roster.folder.parent)
    if node is None:
        return f"{name}: removed; its key was never registered with the server"
    return f"{name}: removed" if node.welcome else f"{name}: already removed"


def replace_key(roster: Roster, name: str, old: bytes, new: bytes) -> None:
    """Register the new key of a node with the server, and remove the old one, in steps that may be repeated.

    Args:
        roster: Keys of the deployment.
        name: Name of the node.
        old: Key to remove.
        new: Key to register.

    Raises:
        UserError: If the server does not carry it out.
    """
    update_connection(roster.folder)
    with administering(roster.folder, CONNECTION) as server:
        known = server.nodes()
        if new not in known:
            server.register(new, name)
        if old in known and known[old].welcome:
            server.unregister(known[old])
    roster.replace(name, old, new)
    seal_again(roster.folder.parent)

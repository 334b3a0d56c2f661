"""`fedpriv deploy register` and `remove`: which keys a deployment's server takes, and which it takes no more.

A SuperLink never takes a key back that it has unregistered, so that a removed node comes back with a new key only.
`check`, `register` and `remove` agree about each key, because all of them ask `compared`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedpriv.deploy.setup.provision import seal_again
from fedpriv.deploy.setup.roster import CONNECTION, Roster
from fedpriv.errors import UserError
from fedpriv.files import write_atomically
from fedpriv.flower.internals.superlink import KnownNode, administering

__all__ = ["Comparison", "compared", "register_nodes", "remove_node"]

_NEW_KEY = "A key that was removed is taken no more: put a new key of the node there, or run: fedpriv deploy remove"


@dataclass(frozen=True)
class Comparison:
    """What a roster and a server say of the same keys; names in the roster's order.

    Args:
        registered: Those that the server takes, with their status.
        absent: Those that it does not know yet.
        gone: Those in the roster that were removed, here or at the server.
        lingering: Removed ones that it still takes.
        strangers: The server's numbers of nodes that it takes and that are not in the roster.
    """

    registered: dict[str, str]
    absent: list[str]
    gone: list[str]
    lingering: list[str]
    strangers: list[int]

    @property
    def faults(self) -> list[str]:
        """What a person has to do something about, but for registering those that are absent."""
        gone = [f"{name}: not registered. {_NEW_KEY} {name}" for name in self.gone]
        again = [f"{name}: removed, but still registered. Run: fedpriv deploy remove {name}" for name in self.lingering]
        return gone + again


def compared(roster: Roster, known: Mapping[bytes, KnownNode]) -> Comparison:
    """Compares a roster with the nodes that a server knows, by key."""
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
    """Tells a deployment's server the keys in `nodes/`.

    Args:
        folder: `admin`, or the deployment's folder.

    Returns:
        A line for each key, and a line for each that the server does not take.

    Raises:
        UserError: If the server does not answer.
    """
    roster = Roster.read(folder)
    _bring_connection_along(roster.folder)
    lines, faults = [], []
    with administering(roster.folder, CONNECTION) as server:
        found = compared(roster, server.nodes())
        for name in roster.keys:
            if name in found.registered:
                lines.append(f"{name}: was registered before")
            elif name in found.absent:
                try:
                    server.register(roster.keys[name], name)
                    lines.append(f"{name}: registered")
                except UserError as error:
                    faults.append(f"{name}: not registered. {error}")
    return lines, faults + found.faults


def remove_node(name: str, folder: Path) -> str:
    """Takes a node away: the server takes nothing more from it, for ever, and the roster says so.

    The server comes first, so that nothing says that a node is removed that is not. It may be called again at any time.

    Args:
        name: The node's, as in `nodes/NAME.pub`.
        folder: `admin`, or the deployment's folder.

    Returns:
        What was done.

    Raises:
        UserError: If there is no such node, or the server does not answer; then nothing has changed.
    """
    roster = Roster.read(folder)
    key = roster.key_of(name)
    _bring_connection_along(roster.folder)
    with administering(roster.folder, CONNECTION) as server:
        node = server.nodes().get(key)
        if node is not None and node.welcome:
            server.unregister(node)
    roster.without(name)
    seal_again(roster.folder.parent)
    if node is None:
        return f"{name}: removed; the server never knew its key, and will not be told"
    return f"{name}: removed" if node.welcome else f"{name}: was removed before"


def _bring_connection_along(admin: Path) -> None:
    """Writes where `ca.crt` is now, which Flower wants as an absolute path, into its `config.toml`."""
    path = admin / "config.toml"
    lines = path.read_text(encoding="utf-8").splitlines()
    right = f"root-certificates = '{admin / 'ca.crt'}'"
    changed = [right if line.startswith("root-certificates") else line for line in lines]
    if changed != lines:
        write_atomically(path, "\n".join(changed) + "\n")

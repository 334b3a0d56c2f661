"""`fedpriv deploy add`: add nodes to a deployment, also while its server runs, and say when they take part."""

from pathlib import Path

from fedpriv.deploy.parties import HELPERS_FOLDER
from fedpriv.deploy.setup.keys import register_nodes
from fedpriv.deploy.setup.provision import add_nodes
from fedpriv.deploy.setup.roster import CONNECTION, Roster
from fedpriv.deploy.status.view import RunView, view_of
from fedpriv.errors import UserError, number_of
from fedpriv.flower.internals.control import SilentServerError, administering

__all__ = ["join_nodes", "part_in_words", "registered_by_name"]


def join_nodes(folder: Path, count: int, *, register: bool = True) -> tuple[list[str], list[str]]:
    """Add nodes to a deployment, without a change to the other nodes.

    Args:
        folder: Folder of the deployment, created by `fedpriv deploy init`.
        count: Number of nodes.
        register: Register their keys with the server.

    Returns:
        Lines about the new nodes, their registration, and when they take part; and a line for each key that is not
        registered although it should be.

    Raises:
        UserError: If nodes cannot be added to `folder`; then nothing has changed.
    """
    added = add_nodes(folder, count)
    lines, faults = [f"made        {', '.join(added)} in {folder}"], list[str]()
    if register:
        registered, faults = _registered(folder, added)
        lines += [f"registered  {', '.join(registered)}"] if registered else []
        if set(added) - set(registered):
            return lines, faults
    else:
        lines.append(f"next        fedpriv deploy register {folder}: the server does not accept the keys before that")
    lines.append("next        copy each folder to its client's machine, and run start-node.sh there")
    if any((folder / "admin" / HELPERS_FOLDER).glob("*.pub")):
        lines.append("helpers     add the new lines of admin/clients.toml to clients.toml of each helper")
    runs = view_of(folder, connect=False).runs
    clients = [int(name.rpartition("-")[2]) for name in added]
    return [*lines, *(f"takes part  {line}" for line in part_in_words(clients, runs))], faults


def _registered(folder: Path, added: list[str]) -> tuple[list[str], list[str]]:
    """Register all keys; return the names among `added` that the server accepts, and a line for each fault."""
    try:
        said, faults = register_nodes(folder)
    except SilentServerError as error:
        remedy = f"Start server/start-superlink.sh, then run: fedpriv deploy register {folder}"
        return [], [f"{', '.join(added)}: not registered, because {error.where} does not answer. {remedy}"]
    except UserError as error:
        return [], [f"{', '.join(added)}: not registered. {error} Then run: fedpriv deploy register {folder}"]
    return [name for name in added if f"{name}: registered" in said], faults


def part_in_words(clients: list[int], runs: list[RunView]) -> list[str]:
    """Return when new clients take part: one line for each unfinished run, and one for later runs.

    A plan is for a number of clients. One with a smaller number may connect at any time; others are not in the plan,
    because noise and epsilon of the run were computed without them.

    Args:
        clients: Numbers of the new clients.
        runs: The runs of the server.
    """
    lines = []
    for run in runs:
        inside = [client for client in clients if client < run.clients]
        if run.state == "finished":
            continue
        if inside:
            names = ", ".join(f"node-{client}" for client in inside)
            lines.append(f"{names}: at once in {run.name}, whose plan has {number_of(run.clients, 'client')}")
        if len(inside) < len(clients):
            names = ", ".join(f"node-{client}" for client in clients if client >= run.clients)
            lines.append(
                f"{names}: not in {run.name}, whose plan has {number_of(run.clients, 'client')} and does not change"
            )
    return [*dict.fromkeys(lines), f"in the next run with clients = {max(clients) + 1} or more in [data]"]


def registered_by_name(admin: Path, clients: int) -> dict[str, str]:
    """Return the server's status of each client's node: online, offline, registered, or "not registered".

    Args:
        admin: Folder `admin` of the deployment.
        clients: Number of clients.

    Raises:
        UserError: If there is no such folder, or if the server does not answer.
    """
    roster = Roster.read(admin)
    with administering(roster.folder, CONNECTION) as server:
        known = server.nodes()
    names = [f"node-{client}" for client in range(clients)]
    keys = {name: roster.keys.get(name) for name in names}
    return {
        name: known[key].status if key is not None and key in known else "not registered" for name, key in keys.items()
    }

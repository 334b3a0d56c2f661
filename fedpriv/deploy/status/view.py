"""View of a deployment: its server, its certificates, its runs, and each node by name.

The view is put together from files that others may replace at any time (read without locks), and from the server's
answers if it runs.
"""

import datetime
import ssl
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from fedpriv.deploy.checks import call_server, load_certificate, split_address
from fedpriv.deploy.kinds import described
from fedpriv.deploy.status.record import NODES_FILE, SeenNodes, known_runs, read_seen
from fedpriv.errors import UserError
from fedpriv.experiment.config import read_config_file
from fedpriv.experiment.run_directory import RunDirectory
from fedpriv.tables import Record

__all__ = ["DAMAGED", "DeploymentView", "NodeView", "RunView", "budget_left", "view_of"]

_PARTICIPATION = "participation.jsonl"
_ELSEWHERE = "at the node"
_POLICY = "fedpriv-client.toml"
DAMAGED = "damaged "
"""The budget of a node without a readable policy or ledger, before the name of the file."""


@dataclass(frozen=True, kw_only=True)
class NodeView:
    """One node. Rounds are those of the shown run.

    Args:
        name: Name of the node.
        state: online, offline, registered (never connected), not registered, removed, absent or unknown.
        last_seen: Time at which it was last connected, in seconds since 1970; None if unknown.
        asked: Rounds in which it was asked.
        counted: Rounds in which its message counted.
        missed: Rounds without a usable answer from it, refusals apart.
        refused: Number of refusals by kind.
        budget: Privacy budget left, in words.
        fault: The error of a damaged policy or ledger; empty if there is none.
    """

    name: str
    state: str
    last_seen: float | None = None
    asked: int = 0
    counted: int = 0
    missed: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    budget: str = _ELSEWHERE
    fault: str = ""


@dataclass(frozen=True, kw_only=True)
class RunView:
    """One run.

    Args:
        path: The run directory.
        name: Name of the experiment.
        state: running, stopped or finished.
        clients: Number of clients in the plan.
        turn: Last finished turn.
        turns: Number of turns.
        failed: Number of turns without a used message.
        written: Time of the newest information, in seconds since 1970.
    """

    path: str
    name: str
    state: str
    clients: int
    turn: int
    turns: int
    failed: int
    written: float


@dataclass(frozen=True, kw_only=True)
class DeploymentView:
    """A deployment, or one run directory.

    Args:
        server: State of the server, in words.
        certificates: End of validity by file, as dates.
        runs: The runs, oldest first.
        shown: Path of the run that the nodes' rounds belong to; empty if there is none.
        nodes: The nodes, in the order of their names.
        now: Time of the view, in seconds since 1970.
    """

    server: str
    certificates: dict[str, str]
    runs: list[RunView]
    shown: str
    nodes: list[NodeView]
    now: float


def view_of(folder: Path, run: Path | None = None, *, connect: bool = True) -> DeploymentView:
    """Return the view of a deployment or of one run.

    Args:
        folder: Folder of a deployment, `admin` or `server` in it, or a run directory.
        run: Run directory to show; None for the newest one.
        connect: Ask the server.

    Raises:
        UserError: If `folder` or `run` is none of these.
    """
    folder, now = folder.resolve(), time.time()
    if run is not None and not (run / NODES_FILE).is_file():
        raise UserError("--run", f"a run directory of a deployment, with {NODES_FILE}", run, "Give the run's --out")
    if (folder / NODES_FILE).is_file():
        shown = _run_view(folder, now)
        return DeploymentView(
            server=f"{shown.state} ({folder})",
            certificates={},
            runs=[shown],
            shown=str(folder),
            nodes=_nodes(None, {}, folder, now),
            now=now,
        )
    root = _root(folder)
    found = known_runs(root / "server" / "flower") if (root / "server" / "flower").is_dir() else []
    if run is not None and run.resolve() not in found:
        found.append(run.resolve())
    runs = [_run_view(path, now) for path in found if read_seen(path) is not None]
    runs.sort(key=lambda one: one.written)
    chosen = run.resolve() if run is not None else next((Path(one.path) for one in reversed(runs)), None)
    address, certificate = _address(root), root / "admin" / "ca.crt"
    if not certificate.is_file():
        certificate = root / "server" / "ca.crt"
    server, known = _asked(root, address, certificate) if connect else ("not asked", {})
    return DeploymentView(
        server=server,
        certificates=_ends(root, certificate, address if connect and server.startswith("running") else ""),
        runs=runs,
        shown="" if chosen is None else str(chosen),
        nodes=_nodes(root, known, chosen, now),
        now=now,
    )


def _root(folder: Path) -> Path:
    """Return the folder of a deployment, which contains `admin` or `server`."""
    if (folder / "admin" / "register.sh").is_file() or (folder / "server" / "server.toml").is_file():
        return folder
    if (folder / "register.sh").is_file() or (folder / "server.toml").is_file():
        return folder.parent
    remedy = "Give the folder that `fedpriv deploy init` made, server or admin in it, or the --out of a run"
    raise UserError(str(folder), "a folder of a deployment, or a run directory", described(folder), remedy)


def _address(root: Path) -> str:
    for path, tables in ((root / "admin" / "config.toml", True), (root / "server" / "server.toml", False)):
        with suppress(UserError):
            table = read_config_file(path)
            given = table.get("superlink", {}) if tables else table
            found = given.get("deployment", {}) if tables and isinstance(given, dict) else given
            if isinstance(found, dict) and found.get("address"):
                return str(found["address"])
    return ""


def _asked(root: Path, address: str, certificate: Path) -> tuple[str, dict[str, tuple[str, float | None]]]:
    """Return the server's state in words, and states and times of nodes by name if it reports them."""
    try:
        host, port = split_address(address, "address")
        call_server(host, port, certificate)
    except UserError as error:
        return f"stopped, or not reachable: {error}", {}
    if not (root / "admin" / "register.sh").is_file():
        return f"running at {address}", {}
    from fedpriv.deploy.setup.roster import CONNECTION, Roster
    from fedpriv.flower.internals.control import administering

    roster = Roster.read(root)
    try:
        with administering(roster.folder, CONNECTION) as server:
            nodes = server.nodes()
    except UserError as error:
        return f"running at {address}; it names no nodes: {error}", {}
    found: dict[str, tuple[str, float | None]] = dict.fromkeys(roster.keys, ("not registered", None))
    found |= {name: (nodes[key].status, nodes[key].seen) for name, key in roster.keys.items() if key in nodes}
    return f"running at {address}", found


def _ends(root: Path, certificate: Path, address: str) -> dict[str, str]:
    """Return the ends of the certificates of the server and the CA."""
    ends = {}
    with suppress(UserError):
        path = root / "server" / "server.pem"
        if path.is_file():
            ends["server"] = load_certificate(path).not_valid_after_utc
        elif address:
            from cryptography import x509

            with suppress(OSError, ValueError):
                pem = ssl.get_server_certificate(split_address(address, "address"), ca_certs=str(certificate))
                ends["server"] = x509.load_pem_x509_certificate(pem.encode()).not_valid_after_utc
    with suppress(UserError):
        ends["CA"] = load_certificate(certificate).not_valid_after_utc
    return {what: _days(end) for what, end in ends.items()}


def _days(end: datetime.datetime) -> str:
    days = (end - datetime.datetime.now(datetime.UTC)).days
    return f"{end:%Y-%m-%d} ({days} days)" if days >= 0 else f"{end:%Y-%m-%d} (expired)"


def _run_view(path: Path, now: float) -> RunView:
    seen = read_seen(path)
    if seen is None:
        remedy = "It is written while a run is in progress; see participation.jsonl"
        raise UserError(str(path / NODES_FILE), "the nodes of a run", "a damaged file", remedy)
    rows = _rows(path)
    return RunView(
        path=str(path),
        name=seen.name,
        state=seen.state(path, now),
        clients=seen.population,
        turn=seen.turn,
        turns=seen.turns,
        failed=sum(row["happened"] != "applied" for row in rows),
        written=seen.written,
    )


def _rows(path: Path) -> list[Record]:
    try:
        return RunDirectory(path).rows(_PARTICIPATION)
    except UserError:
        return []


def _nodes(
    root: Path | None, known: Mapping[str, tuple[str, float | None]], run: Path | None, now: float
) -> list[NodeView]:
    seen = None if run is None else read_seen(run)
    rows = [] if run is None else _rows(run)
    names = [f"node-{client}" for client in range(0 if seen is None else seen.population)]
    removed: Sequence[str] = ()
    if root is not None and (root / "admin" / "register.sh").is_file():
        from fedpriv.deploy.setup.roster import Roster

        roster = Roster.read(root)
        names, removed = list(dict.fromkeys([*roster.keys, *names])), roster.removed_nodes
        names += [name for name in removed if name not in names]
    found = []
    for name in sorted(names, key=lambda one: (one.rpartition("-")[0] == "helper", len(one), one)):
        node = _of_run(name, seen, rows, run, now)
        if name in known:
            state, last = known[name]
            moments = [moment for moment in (last, node.last_seen) if moment is not None]
            node = replace(node, state=state, last_seen=max(moments, default=None))
        node = replace(node, state="removed") if name in removed else node
        budget, fault = _budget(root, name, node)
        found.append(replace(node, budget=budget, fault=fault))
    return found


def _of_run(name: str, seen: SeenNodes | None, rows: Sequence[Record], run: Path | None, now: float) -> NodeView:
    """Return the state and the rounds of a node according to a run's files."""
    number = name.rpartition("-")[2]
    if seen is None or run is None or not name.startswith("node-") or not number.isdigit():
        return NodeView(name=name, state="unknown")
    client = int(number)
    running = seen.state(run, now) == "running"
    state = "unknown"
    if client < seen.population and running:
        state = "online" if client in seen.online else ("offline" if number in seen.seen else "absent")
    kinds: Counter[str] = Counter()
    for row in rows:
        if number in row["refused"]:
            kinds[str(row["refused"][number]["kind"])] += 1
    without = ("late", "gone")
    missed = sum(
        any(client in row[key] for key in without) or number in row["invalid"] or number in row["failed"]
        for row in rows
    )
    return NodeView(
        name=name,
        state=state,
        last_seen=seen.seen.get(number),
        asked=sum(client in row["asked"] for row in rows),
        counted=sum(client in row["counted"] for row in rows),
        missed=missed,
        refused=dict(sorted(kinds.items())),
    )


def _number(value: float) -> str:
    """Return a number with four digits, and without an exponent."""
    return f"{value:.0f}" if value >= 1000.0 else f"{value:.4g}"


def budget_left(folder: Path) -> str:
    """Return the epsilon that the ledger in a node's folder leaves, of the total of its policy.

    Raises:
        UserError: If the policy or the ledger is damaged.
    """
    from fedpriv.deploy.device.ledger import Ledger, spent
    from fedpriv.deploy.device.policy import load_policy

    policy = load_policy(folder / _POLICY)
    limits, unit = policy.limits, policy.accepts.unit
    ledger = Ledger(folder / "state")
    used = spent(ledger.entries(), ledger.share(limits.delta), limits.adjacency, unit) + ledger.charged
    return f"{_number(max(limits.epsilon - used, 0.0))} of {_number(limits.epsilon)}"


def _budget(root: Path | None, name: str, node: NodeView) -> tuple[str, str]:
    """Return the budget left, from the node's own folder if it is here, otherwise from its refusals; and the fault."""
    if name.startswith("helper-"):
        return "none needed", ""
    if root is None or not (root / name / _POLICY).is_file():
        return ("used up" if node.refused.get("budget") else _ELSEWHERE), ""
    try:
        return budget_left(root / name), ""
    except UserError as error:
        file, fault = error.where, str(error)
    except OSError as error:
        file = str(error.filename or root / name)
        fault = f"{file}: {error.strerror or error}"
    return f"{DAMAGED}{'policy' if _POLICY in file else 'ledger'}", fault

"""`fedpriv deploy check`: check that a folder of a deployment is complete, secure and matches the server."""

import contextlib
import hashlib
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fedpriv.deploy.checks import (
    MANIFEST,
    VERSIONS,
    Finding,
    check_certificate,
    check_manifest,
    check_permissions,
    check_presence,
    check_server,
    check_versions,
    covers,
    judge,
    split_address,
)
from fedpriv.deploy.device.folder import NODE_TOML, NodeSettings, check_node_folder
from fedpriv.deploy.helper.folder import (
    HELPER_TOML,
    SIGNING_FILE,
    HelperSettings,
    check_helper_folder,
    read_signing_key,
)
from fedpriv.deploy.kinds import described
from fedpriv.deploy.setup.connection import connection_of
from fedpriv.deploy.setup.provision import BUNDLES, DEPLOYMENT, read_deployment
from fedpriv.deploy.setup.roster import CONNECTION, REMOVED, Roster, key_in
from fedpriv.deploy.setup.superlink import SERVER_TOML, ServerSettings, check_server_folder
from fedpriv.deploy.status.view import budget_left
from fedpriv.errors import UserError, number_of

__all__ = ["check_folder", "print_findings"]

ADMIN_FILES = ("ca.crt", "config.toml", "register.sh", VERSIONS, MANIFEST)

_STYLES = {"ok": "green", "note": "yellow", "wrong": "bold red"}


def check_folder(folder: Path, connect: bool = True) -> dict[str, list[Finding]]:
    """Return the findings by folder.

    Args:
        folder: Folder of a deployment, or server, admin or node-I in it.
        connect: Connect to the server.

    Raises:
        UserError: If `folder` is not one of these.
    """
    folder = folder.resolve()
    if (folder / DEPLOYMENT).is_file():
        return _check_deployment(folder, connect)
    kinds = {
        NODE_TOML: _check_node,
        HELPER_TOML: _check_helper,
        "server.toml": _check_server,
        "register.sh": _check_admin,
    }
    for mark, check in kinds.items():
        if (folder / mark).is_file():
            return {folder.name: check(folder, connect)}
    remedy = "Give the folder that `fedpriv deploy init` made, or server, admin, node-I or helper-J in it"
    raise UserError(str(folder), "a folder of a deployment", described(folder), remedy)


def print_findings(findings: dict[str, list[Finding]]) -> bool:
    """Print a table for each folder; return whether no finding is wrong."""
    console = Console()
    for name, found in findings.items():
        table = Table(title=name, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
        for column in ("check", "state", "result"):
            table.add_column(column, overflow="fold")
        for finding in found:
            style = _STYLES[finding.state]
            table.add_row(finding.what, f"[{style}]{finding.state}[/{style}]", _plain(finding.line))
        console.print(table)
        console.print()
    return not any(finding.state == "wrong" for found in findings.values() for finding in found)


def _plain(text: str) -> str:
    """Return text with escaped markup."""
    return text.replace("[", r"\[")


def _check_deployment(folder: Path, connect: bool) -> dict[str, list[Finding]]:
    found = {"ca": _check_authority(folder / "ca"), "folders": [*_check_bundles(folder), *_check_settings(folder)]}
    for name in ("server", "admin"):
        if (folder / name).is_dir():
            # Connect to the server once, from the folder that starts runs.
            check = _check_server if name == "server" else _check_admin
            found[name] = check(folder / name, connect and name == "admin")
    removed: Collection[bytes] = ()
    if (folder / "admin" / "register.sh").is_file():
        with contextlib.suppress(UserError):  # a finding of `admin`
            removed = Roster.read(folder).removed
    nodes = (path for path in folder.glob("node-*") if path.is_dir())
    for node in sorted(nodes, key=lambda path: (len(path.name), path.name)):
        if (node / "node.pub").is_file() and key_in((node / "node.pub").read_bytes()) in removed:
            found[node.name] = [Finding("node", "note", f"removed: its key is in admin/{REMOVED}")]
            continue
        found[node.name] = _check_node(node, connect=False)
        certificate = folder / "server" / "server.pem"
        if certificate.is_file():
            found[node.name] += judge("server name", lambda n=node, c=certificate: _called_name(n, c))
    for helper in sorted(path for path in folder.glob("helper-*") if path.is_dir()):
        found[helper.name] = _check_helper(helper, connect=False)
    return found


def _check_authority(folder: Path) -> list[Finding]:
    if not folder.is_dir():
        return [Finding("files", "note", "stored elsewhere, as recommended")]
    findings = [*check_presence(folder, ["ca.key", "ca.crt"]), *check_permissions(folder, ["ca.key"])]
    if (folder / "ca.crt").is_file():
        findings += check_certificate("CA certificate", folder / "ca.crt", folder / "ca.crt")
    return findings


def _check_bundles(folder: Path) -> list[Finding]:
    """Check that the manifests themselves are unchanged."""
    try:
        lines = (folder / BUNDLES).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        return [Finding("manifests", "wrong", f"{folder / BUNDLES}: {error.strerror or error}; restore it from a copy")]
    except UnicodeDecodeError:
        return [Finding("manifests", "wrong", f"{folder / BUNDLES} is damaged; restore it from a copy")]
    changed = []
    for digest, _, name in (line.partition("  ") for line in lines):
        file = folder / name
        if file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            changed.append(name)
    if changed:
        line = f"{', '.join(changed)} changed since creation: find out who changed it, and recreate the deployment"
        return [Finding("manifests", "wrong", line)]
    return [Finding("manifests", "ok", "unchanged")]


def _check_settings(folder: Path) -> list[Finding]:
    return judge(DEPLOYMENT, lambda: f"for {read_deployment(folder).nodes} nodes")


def _check_node(folder: Path, connect: bool) -> list[Finding]:
    findings = [*check_node_folder(folder), *judge("ledger", lambda: _ledger(folder))]
    return [*findings, *_check_connection(folder, lambda: NodeSettings.read(folder / NODE_TOML).superlink, connect)]


def _ledger(folder: Path) -> str:
    """Return a line about the records of a node, in which nothing is missing."""
    from fedpriv.deploy.device.heads import KEY_FILE, LedgerKey
    from fedpriv.deploy.device.ledger import Ledger

    if (folder / KEY_FILE).exists():
        LedgerKey.at(folder)
    if (folder / SIGNING_FILE).exists():
        read_signing_key(folder / SIGNING_FILE)
    if (folder / "state").exists() and not (folder / "state").is_dir():
        raise UserError(str(folder / "state"), "a folder", "a file", "Restore it: fedpriv deploy restore")
    ledger = Ledger(folder / "state")
    ledger.entries()
    lines = f"complete, with {number_of(ledger.lines, 'line')}"
    with contextlib.suppress(UserError):  # a finding about the policy
        return f"{lines}; epsilon left: {budget_left(folder)}"
    return lines


def _check_helper(folder: Path, connect: bool) -> list[Finding]:
    findings = check_helper_folder(folder)
    return [*findings, *_check_connection(folder, lambda: HelperSettings.read(folder / HELPER_TOML).superlink, connect)]


def _check_connection(folder: Path, superlink: Callable[[], str], connect: bool) -> list[Finding]:
    if connect:
        with contextlib.suppress(UserError):  # settings that cannot be read are already a finding
            return check_server(superlink(), folder / "ca.crt")
    return []


def _called_name(folder: Path, certificate: Path) -> str:
    return covers(certificate, split_address(NodeSettings.read(folder / NODE_TOML).superlink, "superlink")[0])


def _check_server(folder: Path, connect: bool) -> list[Finding]:
    findings = check_server_folder(folder)
    if connect:
        with contextlib.suppress(UserError):  # already a finding
            findings += check_server(ServerSettings.read(folder / SERVER_TOML).address, folder / "ca.crt")
    return findings


def _check_admin(folder: Path, connect: bool) -> list[Finding]:
    findings = [
        *check_presence(folder, ADMIN_FILES),
        *check_manifest(folder),
        *check_permissions(folder, []),
        *judge("connection", lambda: f"to {connection_of(folder)}"),
        *judge("keys of nodes", lambda: _keys(folder)),
        *check_versions(folder),
    ]
    if (folder / "ca.crt").is_file():
        findings += check_certificate("CA certificate", folder / "ca.crt", folder / "ca.crt")
    certificate = folder.parent / "server" / "server.pem"
    right = findings[3].state == "ok"
    if right and certificate.is_file():
        findings += judge(
            "server name", lambda: covers(certificate, split_address(connection_of(folder), "address")[0])
        )
    if right and connect:
        findings += check_server(connection_of(folder), folder / "ca.crt")
        if findings[-1].state == "ok":
            findings += _check_registered(folder)
    return findings


def _keys(folder: Path) -> str:
    roster = Roster.read(folder)
    if roster.damaged:
        path, remedy = folder / "nodes" / f"{roster.damaged[0]}.pub", "Copy node.pub of the node again"
        raise UserError(str(path), "a public key in OpenSSH's format", "a different content", remedy)
    return f"{len(roster.keys)} readable"


def _check_registered(folder: Path) -> list[Finding]:
    """Check that the server knows every key in `nodes/`, and no removed key."""
    from fedpriv.deploy.setup.keys import compared
    from fedpriv.flower.internals.control import administering

    roster = Roster.read(folder)
    try:
        with administering(folder, CONNECTION) as server:
            found = compared(roster, server.nodes())
    except UserError as error:
        return [Finding("nodes", "note", f"the server does not list its nodes: {error}")]
    wrong = found.faults
    if found.absent:
        wrong = [f"not registered: {_listed(found.absent)}. Run ./register.sh", *wrong]
    if wrong:
        findings = [Finding("nodes", "wrong", line) for line in wrong]
    else:
        online = [name for name, status in found.registered.items() if status == "online"]
        findings = [Finding("nodes", "ok", f"all {len(found.registered)} registered; online: {_listed(online)}")]
    if roster.removed:
        findings.append(Finding("removed nodes", "ok", _listed([*roster.removed.values()])))
    if found.strangers:
        numbers = _listed([str(number) for number in found.strangers])
        line = f"registered nodes without a key in nodes/, by the server's numbers: {numbers}. See README.md"
        findings.append(Finding("other nodes", "note", line))
    return findings


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:10]) or "none"
    return shown if len(names) <= 10 else f"{shown} and {len(names) - 10} more"

"""`fedpriv deploy backup` and `restore`: copies of a server's, a node's or a helper's folder.

A copy of a ledger is safe only as long as it is the newest. An older one lacks the releases since, and would let the
client spend their budget twice. The client notices by the signed head that the server sends with its next instructions,
but not if the server shows none, because it lost them too. `restore` therefore demands a proof or a charge:

| evidence | condition |
|---|---|
| the folder still holds the client's ledger | the copy has the same ledger |
| `--heads FILE`, the server's client-heads.json | the last line of the copy's ledger is this client's head |
| `--charge all` | the whole budget counts as spent: a client never releases beyond it |
| `--charge EPSILON` | the operator states the maximum cost of the missing releases, at half of the policy's delta |

A further charge is stated at half of the delta that earlier ones left. An estimate is refused while the folder still
holds an intact ledger with more lines than the copy. A charge is a line of the ledger. It brings a new `ledger.key`:
heads beyond the copy would stop the client for good.
"""

import io
import json
import math
import os
import shutil
import sqlite3
import tarfile
import tempfile
import time
from contextlib import closing, suppress
from pathlib import Path

from fedpriv.deploy.device.folder import NODE_TOML, NodeSettings
from fedpriv.deploy.device.heads import KEY_FILE, Head, LedgerKey
from fedpriv.deploy.device.ledger import Ledger
from fedpriv.deploy.device.memory import remembered_ledgers
from fedpriv.deploy.heads import HEADS_FILE, HeadBook, newer_heads
from fedpriv.deploy.helper.folder import HELPER_TOML
from fedpriv.deploy.kinds import described, kind_of, wrong_kind
from fedpriv.errors import UserError, naming, shown_as
from fedpriv.files import only_one, sync_folder, write_atomically
from fedpriv.flower.companion import LOCK

__all__ = ["back_up", "restore"]

_SERVER_TOML = "server.toml"
_DATABASE = "superlink.db"
_KIND = "fedpriv-backup.json"
_FLOWER = "flower"
_STATE = "state"


def back_up(folder: Path, file: Path) -> str:
    """Copy the folder of a server, a node or a helper into a new tar file, readable by its owner alone.

    A server may run. A node must be stopped. A helper's `state/` is left out: an old copy of it forgets answers.

    Returns:
        A line about the copy.

    Raises:
        UserError: If the folder is none of these, the file exists, the node runs, or the ledger is damaged.
    """
    folder, file = folder.resolve(), file.resolve()
    kind = _kind_of(folder)
    if file.exists() or file.is_relative_to(folder):
        got = "an existing file" if file.exists() else "a file in the folder"
        raise UserError(str(file), "a new file outside of the folder", got, "Choose another FILE")
    if kind != "server":
        _refuse_running(folder)
    facts: dict[str, object] = {"kind": kind, "name": folder.name, "time": time.time()}
    if kind == "node":
        facts["lines"] = _intact(folder).lines
    if not file.parent.is_dir():
        raise UserError(str(file), "a new file in an existing folder", "a missing folder", f"Create {file.parent}")
    part = file.with_name(f"{file.name}.part")
    part.unlink(missing_ok=True)
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with (
            shown_as(part, file),
            naming(file),
            os.fdopen(descriptor, "wb") as opened,
            tarfile.open(fileobj=opened, mode="w") as archive,
        ):
            _add_bytes(archive, _KIND, json.dumps(facts).encode())
            for path in sorted(folder.iterdir()):
                if path.name != _FLOWER and not (kind == "helper" and path.name == _STATE):
                    archive.add(path, path.name)
            if kind == "server":
                _add_flower(archive, folder / _FLOWER)
            archive.close()
            opened.flush()
            os.fsync(opened.fileno())
        part.replace(file)
        sync_folder(file.parent)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    about = f", with a ledger of {facts['lines']} lines" if kind == "node" else ""
    return f"copied {folder.name} to {file}{about}"


def restore(file: Path, folder: Path, heads: Path | None = None, charge: float | None = None) -> str:
    """Restore the copy of a server's, a node's or a helper's folder. The folder's previous content is moved aside.

    Args:
        file: File from `back_up`.
        folder: Folder of the party, which must be stopped; it may be missing.
        heads: For a node: the server's newest `client-heads.json`.
        charge: For a node: epsilon that releases after the copy cost at most; infinite for the whole budget.

    Returns:
        A line about the result.

    Raises:
        UserError: If a client's ledger may lack releases, and nothing proves or charges them. Nothing has changed.
    """
    folder = folder.resolve()
    if charge is not None and not charge > 0.0:
        raise UserError("--charge", "a number above 0, or all", charge, "Give the maximum spent since the copy")
    if folder.exists():
        if not folder.is_dir():
            raise UserError(str(folder), "the folder of the party, or a new one", "a file", "Give FILE, then DIR")
        _refuse_running(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with shown_as(part, file):
            kind = _unpack(file, part)
        if folder.exists() and any(folder.iterdir()) and kind_of(folder) != kind:
            expected, remedy = f"the folder of a {kind}, as in the copy", "Give the folder that was copied"
            raise UserError(str(folder), expected, described(folder), remedy)
        with shown_as(part, file):
            line = _settle(kind, part, folder, heads, charge)
        aside = _move_aside(folder)
        part.replace(folder)
        sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    kept = f". The folder from before is {aside}: remove it once all is well" if aside is not None else ""
    return f"restored {folder}{line}{kept}"


def _settle(kind: str, part: Path, folder: Path, heads: Path | None, charge: float | None) -> str:
    """Make the content of a copy safe to use; return the rest of the line about the result."""
    if kind == "server":
        _keep_heads(part, folder)
        return ". Run admin/register.sh and fedpriv deploy check admin: nodes removed since must be removed again"
    if kind == "helper":
        return ", without its answers: it makes new keys for runs, and an open turn is void"
    ledger = _intact(part)
    if charge is None and not _is_newest(ledger, part, folder, heads):
        expected = "proof that the ledger of the copy is the newest, or a charge for missing releases"
        remedy = (
            "Give --heads client-heads.json of the server, --charge EPSILON, the maximum spent since, "
            "or --charge all to spend the whole budget"
        )
        raise UserError(str(folder), expected, f"a copy with {ledger.lines} lines, and no proof", remedy)
    if charge is None:
        return f", with a ledger of {ledger.lines} lines that is the newest"
    if math.isfinite(charge):
        _refuse_known_releases(ledger, folder)
    state = part / _STATE
    state.mkdir(mode=0o700, exist_ok=True)
    with only_one(state / "lock"):
        ledger.charge(charge, "restored from a copy that may lack releases")
    (part / KEY_FILE).unlink(missing_ok=True)
    much = "The whole budget" if math.isinf(charge) else f"Epsilon {charge:g}"
    return f". {much} is charged for releases that the copy may lack"


def _is_newest(ledger: Ledger, part: Path, folder: Path, heads: Path | None) -> bool:
    """Return whether the ledger of a copy is known to be the newest.

    Raises:
        UserError: If it is known to be older than another one.
    """
    proven = False
    if (folder / _STATE).is_dir():
        here = _intact(folder)
        ledger.refuse_without(here.lines, here.last_hash, f" of the ledger in {folder}, which is newer")
        proven = here.lines == ledger.lines > 0
    if heads is not None:
        if not heads.is_file():
            raise UserError("--heads", "the server's client-heads.json", str(heads), "Copy it from server/flower")
        client = NodeSettings.read(part / NODE_TOML).partition_id
        head = HeadBook(heads).heads.get(client)
        if head is not None:
            _refuse_foreign(head, part)
            ledger.refuse_without(head.lines, head.hash, " according to the server's heads")
            proven |= head.lines == ledger.lines
    return proven


def _refuse_known_releases(ledger: Ledger, folder: Path) -> None:
    """Raise a `UserError` if the folder holds a ledger with releases that the copy lacks: they need no estimate."""
    if not (folder / _STATE).is_dir():
        return
    try:
        here = _intact(folder)
    except UserError:  # a damaged ledger is why an operator restores
        return
    if here.lines > ledger.lines:
        expected = "a copy of its newest ledger, or none in the folder"
        got = f"a copy with {ledger.lines} lines beside an intact ledger with {here.lines}"
        raise UserError(str(folder), expected, got, "Keep its state/, or give --charge all")


def _refuse_foreign(head: Head, part: Path) -> None:
    """Raise a `UserError` if a head is signed with another key than that of the copy."""
    if not (part / KEY_FILE).exists() or LedgerKey.at(part).public != head.key:
        raise UserError(
            "--heads", "a head signed by this client", "one with another ledger.key", "Use --charge instead"
        )


def _intact(folder: Path) -> Ledger:
    """Return the ledger in a node's folder, after its lines were read.

    Raises:
        UserError: If it is damaged, or shorter than a memory beside it says.
    """
    ledger = Ledger(folder / _STATE)
    ledger.entries()
    for path, lines, digest in remembered_ledgers(folder / _STATE) if (folder / _STATE).is_dir() else []:
        ledger.refuse_without(lines, digest, f" according to {path}")
    return ledger


def _keep_heads(part: Path, folder: Path) -> None:
    """Keep the newest heads of clients, whether they are in the copy or in the folder that it replaces."""
    book, here = HeadBook(part / _FLOWER / HEADS_FILE), folder / _FLOWER / HEADS_FILE
    if here.is_file():
        found = newer_heads(book.heads, HeadBook(here).heads)
        rows = {str(client): head.to_json() for client, head in sorted(found.items())}
        (part / _FLOWER).mkdir(mode=0o700, exist_ok=True)
        write_atomically(part / _FLOWER / HEADS_FILE, json.dumps(rows, indent=1) + "\n")


def _kind_of(folder: Path) -> str:
    kinds = {_SERVER_TOML: "server", NODE_TOML: "node", HELPER_TOML: "helper"}
    for name, kind in kinds.items():
        if (folder / name).is_file():
            return kind
    raise wrong_kind(folder, "server", "node", "helper")


def _refuse_running(folder: Path) -> None:
    from fedpriv.files import lock_file

    path = folder / _FLOWER / LOCK
    with suppress(FileNotFoundError), path.open() as lock:
        try:
            lock_file(lock, wait=False)
        except BlockingIOError:
            raise UserError(str(folder), "a stopped process", "one that runs", "Stop it first") from None


def _add_bytes(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = len(content), 0o600, int(time.time())
    archive.addfile(info, io.BytesIO(content))


def _add_flower(archive: tarfile.TarFile, flower: Path) -> None:
    """Add Flower's database, in a consistent state even while it is in use, and the heads of ledgers."""
    if (flower / HEADS_FILE).is_file():
        archive.add(flower / HEADS_FILE, f"{_FLOWER}/{HEADS_FILE}")
    if (flower / _DATABASE).is_file():
        with tempfile.TemporaryDirectory() as name:
            copy = Path(name) / _DATABASE
            try:
                with closing(sqlite3.connect(flower / _DATABASE)) as source, closing(sqlite3.connect(copy)) as target:
                    source.backup(target)
            except sqlite3.DatabaseError as error:
                remedy = "Restore an older copy, or move the file away and register the nodes again"
                raise UserError(str(flower / _DATABASE), "Flower's database", f"({error})", remedy) from None
            copy.chmod(0o600)
            archive.add(copy, f"{_FLOWER}/{_DATABASE}")


def _unpack(file: Path, part: Path) -> str:
    """Unpack a copy into an empty folder; return its kind."""
    try:
        with tarfile.open(file) as archive:
            archive.extractall(part, filter="data")
        if not (part / _KIND).is_file():
            raise KeyError(_KIND)
        kind = str(json.loads((part / _KIND).read_bytes())["kind"])
        (part / _KIND).unlink()
    except OSError as error:
        expected, remedy = "a file from fedpriv deploy backup", "Give FILE, then DIR"
        raise UserError(str(file), expected, error.strerror or error, remedy) from None
    except (tarfile.TarError, ValueError, KeyError, TypeError):
        remedy = "Give a file from fedpriv deploy backup"
        raise UserError(str(file), "a copy of a folder", "a damaged or different file", remedy) from None
    if _kind_of(part) != kind:
        raise UserError(
            str(file), f"the copy of a {kind}", "that of a different one", "Give a file from fedpriv deploy backup"
        )
    if (part / _FLOWER).is_dir():
        (part / _FLOWER).chmod(0o700)
    return kind


def _move_aside(folder: Path) -> Path | None:
    if not folder.exists():
        return None
    if not any(folder.iterdir()):
        folder.rmdir()
        return None
    aside = folder.with_name(f"{folder.name}.before-{time.strftime('%Y%m%d-%H%M%S')}")
    folder.replace(aside)
    return aside

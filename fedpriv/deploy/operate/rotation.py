"""`fedpriv deploy rotate`: replace the key with which a node or helper authenticates, and keep its ledger.

    fedpriv deploy rotate key NODE_DIR          a new key, beside the one in use, and a handover
    fedpriv deploy rotate accept FILE DIR       the server registers the new key and removes the old one
    fedpriv deploy rotate finish NODE_DIR       the new key takes the place of the old one, which is kept
    fedpriv deploy rotate finish NODE_DIR       once the node has connected with it: the old key is deleted

A node may release between the first two steps. The server then knows newer releases, and refuses the handover. The
third step, for which the node is stopped, updates it.

A handover is signed with the old key. It names the new key, the client, and the signed head of the client's ledger.
The budget belongs to the client, not to its key: policy, ledger and `ledger.key` stay, and the server keeps heads by
client. A handover is accepted only if its ledger is the one that the server knows, at its newest head or beyond. An
attacker with the node's key alone, or beside an empty or older ledger, therefore gets no new budget.
"""

import base64
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from fedpriv.deploy.device.folder import NODE_TOML, NodeSettings, key_pair
from fedpriv.deploy.device.heads import KEY_FILE, Head, LedgerKey
from fedpriv.deploy.device.ledger import Ledger
from fedpriv.deploy.device.memory import remembered_ledgers
from fedpriv.deploy.heads import HEADS_FILE, HeadBook
from fedpriv.deploy.helper.folder import HELPER_TOML
from fedpriv.deploy.kinds import require_kind
from fedpriv.deploy.setup.certificates import make_node_key
from fedpriv.deploy.setup.keys import replace_key
from fedpriv.deploy.setup.roster import Roster, key_in
from fedpriv.errors import UserError
from fedpriv.experiment.schema import read_table
from fedpriv.files import make_private_folder, replace_durably
from fedpriv.flower.companion import ALIVE

__all__ = ["HANDOVER", "Handover", "accept_handover", "begin_rotation", "finish_rotation", "refuse_unproven"]

HANDOVER = "handover.json"
ROTATION = "rotation"
"""Folder, in that of a node, of the new key and, once that is in use, of the old one, until the rotation ends."""

_KEYS = ("node.pub", "node.key")
_OLD = "old-"
"""Prefix, in that folder, of the files of the old key."""

_HASH = hashes.SHA384()
_ASK = "Ask the node's operator for a new one: fedpriv deploy rotate key NODE_DIR"


@dataclass(frozen=True, kw_only=True)
class Handover:
    """Statement that a node's key is replaced.

    Args:
        old: Public key in use, in OpenSSH's format.
        new: New public key.
        client: Client id of the node; -1 for a helper.
        head: Signed head of the client's ledger, as JSON; empty if it has released nothing, and for a helper.
        signature: Signature of all of these by the old key, in Base64.
    """

    old: str
    new: str
    client: int
    head: str = ""
    signature: str = ""

    @property
    def ledger_head(self) -> Head | None:
        """Head of the client's ledger; None if there is none, or if its signature is invalid."""
        return Head.of_json(json.loads(self.head)) if self.head else None

    def signed_by(self, key: ec.EllipticCurvePrivateKey) -> "Handover":
        """Return this handover with the signature of a key."""
        signature = base64.b64encode(key.sign(self._content, ec.ECDSA(_HASH))).decode()
        return Handover(**{**asdict(self), "signature": signature})

    @property
    def valid(self) -> bool:
        """True if the old key has signed it."""
        try:
            key = load_ssh_public_key(self.old.encode())
            if isinstance(key, ec.EllipticCurvePublicKey):
                key.verify(base64.b64decode(self.signature, validate=True), self._content, ec.ECDSA(_HASH))
                return True
        except (ValueError, InvalidSignature):
            pass
        return False

    @property
    def _content(self) -> bytes:
        fields = {name: value for name, value in asdict(self).items() if name != "signature"}
        return b"fedpriv handover 1\n" + json.dumps(fields, sort_keys=True).encode()

    @classmethod
    def read(cls, path: Path) -> "Handover":
        """Return the handover in a file.

        Raises:
            UserError: If the file does not hold one, or the old key has not signed it.
        """
        try:
            found = read_table(cls, json.loads(path.read_bytes()), "")
            right = found.valid and (not found.head or found.ledger_head is not None)
        except OSError as error:
            raise UserError(str(path), "a handover", error.strerror or error, _ASK) from None
        except (UserError, ValueError, TypeError):
            right, found = False, None
        if not right or found is None:
            raise UserError(str(path), "a handover signed with the old key", "a damaged or forged one", _ASK)
        return found


def begin_rotation(folder: Path) -> Path:
    """Make a new key for a node or a helper, beside the one in use; return the file of the handover.

    Args:
        folder: Folder of the node, which may run.

    Raises:
        UserError: If a rotation is open, or a file, among them the ledger, is damaged.
    """
    folder = folder.resolve()
    require_kind(folder, "node", "helper")
    place = folder / ROTATION
    if place.exists():
        remedy = f"Run fedpriv deploy rotate finish {folder}"
        if not (place / f"{_OLD}node.key").exists():
            remedy += f", or remove {place} to start again"
        raise UserError(str(folder), "no open rotation", f"one in {place}", remedy)
    key_pair(folder)
    old = load_ssh_private_key((folder / "node.key").read_bytes(), None)
    if not isinstance(old, ec.EllipticCurvePrivateKey):
        raise RuntimeError("not an elliptic-curve key")  # key_pair has refused it
    pair = make_node_key()
    handover = _signed(folder, (folder / "node.pub").read_bytes(), old, pair.public)
    part = folder / f"{ROTATION}.part"
    shutil.rmtree(part, ignore_errors=True)
    make_private_folder(part)
    replace_durably(part / "node.key", pair.private)
    replace_durably(part / "node.pub", pair.public)
    replace_durably(part / HANDOVER, json.dumps(asdict(handover), indent=1).encode())
    part.replace(place)
    return place / HANDOVER


def _signed(folder: Path, old: bytes, key: ec.EllipticCurvePrivateKey, new: bytes) -> Handover:
    """Return a handover from a node's old public key to a new one, with its ledger as it is now."""
    client, head = _ledger_of(folder)
    signed = "" if head is None else json.dumps(head.to_json())
    return Handover(old=key_in(old).decode(), new=key_in(new).decode(), client=client, head=signed).signed_by(key)


def accept_handover(path: Path, folder: Path) -> str:
    """Register the new key of a handover with the server, under the name of the old one, which is then removed.

    The command may be repeated after a failure.

    Args:
        path: File of the handover.
        folder: Folder of the deployment, or `admin` in it, on the server's machine.

    Returns:
        A line about the result.

    Raises:
        UserError: If the handover, or its ledger, is not that of a registered node; then nothing has changed.
    """
    handover, roster = Handover.read(path), Roster.read(folder)
    old, new = handover.old.encode(), handover.new.encode()
    names = [name for name, key in roster.keys.items() if key == new or (key == old and old not in roster.removed)]
    if not names:
        remedy = "A removed key hands nothing over: register a new one, as the deployment's README says"
        raise UserError(str(path), "the handover of a registered key", "an unknown or removed key", remedy)
    refuse_unproven(names[0], handover, _heads(roster.folder))
    replace_key(roster, names[0], old, new)
    return f"{names[0]}: its new key is registered, and the old one removed"


def refuse_unproven(name: str, handover: Handover, known: dict[int, Head]) -> None:
    """Raise a `UserError` unless a handover's ledger agrees with the head that the server knows, or extends it.

    Args:
        name: Name of the node.
        handover: The handover.
        known: Newest head of each client.
    """
    kind, _, number = name.partition("-")
    expected = int(number) if kind == "node" and number.isdigit() else handover.client
    if handover.client != (-1 if kind == "helper" else expected):
        remedy = "Compare partition-id in node.toml with the name of the node"
        raise UserError(name, f"a handover of client {expected}", f"one of client {handover.client}", remedy)
    before, head = known.get(handover.client), handover.ledger_head
    if before is None:
        return
    remedy = (
        "If the node has released since, stop it, run fedpriv deploy rotate finish NODE_DIR, and accept the handover "
        "that this updates; a new key brings no new budget"
    )
    if head is None or head.key != before.key:
        got = "one without releases" if head is None else "one signed with a different ledger.key"
        raise UserError(name, f"the ledger with {before.lines} releases that the server knows", got, remedy)
    if head.lines < before.lines or (head.lines == before.lines and head.hash != before.hash):
        got = f"an older or changed copy with {head.lines} releases"
        raise UserError(name, f"a ledger with at least {before.lines} releases", got, remedy)


def finish_rotation(folder: Path, *, force: bool = False) -> str:
    """Put the new key of a node in the place of the old one, or end the rotation; return a line about it.

    The old key and the handover are kept until the node has connected with the new key; then a second call deletes
    them.

    Args:
        folder: Folder of the node; it must be stopped until the new key is in use.
        force: Delete the old key and the handover even if the server has not accepted the new key.

    Raises:
        UserError: If no rotation is open, the node runs with the old key, or it has not connected with the new one.
    """
    folder = folder.resolve()
    require_kind(folder, "node", "helper")
    place = folder / ROTATION
    if not (place / HANDOVER).is_file():
        remedy = f"Run fedpriv deploy rotate key {folder} first"
        raise UserError(str(folder), "an open rotation", "a folder without one", remedy)
    key_pair(place)
    if not (place / f"{_OLD}node.key").exists():  # otherwise an earlier call may have been interrupted
        key_pair(folder)
    used = all(_same(folder / name, place / name) for name in _KEYS)
    if not used:
        _use_new_key(folder, place)
    elif not force and not (folder / "flower" / ALIVE).is_file():
        remedy = f"Start the node once the server has accepted {place / HANDOVER}, or add --force to delete the old key"
        _renew_handover(folder, place)
        raise UserError(str(folder), "an answer of the server to the new key", "a missing one", remedy)
    if not used and not force:
        return (
            "the new key is in use, the old one is kept, and the handover has the newest ledger. Start the node; it "
            "connects once the server has run fedpriv deploy rotate accept. Then run this command again: it deletes "
            "the old key"
        )
    key_pair(folder)
    shutil.rmtree(place)
    return "the rotation has ended: the old key and the handover are deleted"


def _same(one: Path, other: Path) -> bool:
    return one.is_file() and one.read_bytes() == other.read_bytes()


def _use_new_key(folder: Path, place: Path) -> None:
    """Keep the old key of a stopped node in the folder of the rotation, and put the new one in its place."""
    from fedpriv.deploy.setup.supernode import flower_home, held_alone

    before = os.environ.get("FLWR_HOME")
    try:
        home = flower_home(folder)
        with held_alone(home):  # each step may be repeated
            if not (place / f"{_OLD}node.key").exists():
                for name in _KEYS:
                    replace_durably(place / f"{_OLD}{name}", (folder / name).read_bytes())
            (home / ALIVE).unlink(missing_ok=True)  # from now on, it says that the server has answered the new key
            for name in _KEYS:
                replace_durably(folder / name, (place / name).read_bytes())
            (folder / "node.pub").chmod(0o644)
            key_pair(folder)
            _renew_handover(folder, place)
    finally:
        os.environ.pop("FLWR_HOME", None)
        if before is not None:
            os.environ["FLWR_HOME"] = before


def _renew_handover(folder: Path, place: Path) -> None:
    """Write the handover of a node that uses its new key again, with the releases since it was made."""
    if not (place / f"{_OLD}node.key").is_file():  # the operator has put the new key in use by hand
        return
    old = load_ssh_private_key((place / f"{_OLD}node.key").read_bytes(), None)
    if not isinstance(old, ec.EllipticCurvePrivateKey):
        raise RuntimeError("not an elliptic-curve key")  # it was in use
    public = (place / f"{_OLD}node.pub").read_bytes(), (folder / "node.pub").read_bytes()
    handover = _signed(folder, public[0], old, public[1])
    replace_durably(place / HANDOVER, json.dumps(asdict(handover), indent=1).encode())


def _ledger_of(folder: Path) -> tuple[int, Head | None]:
    """Return the client id of a node and the signed head of its intact ledger; -1 and None for a helper."""
    if (folder / HELPER_TOML).is_file():
        return -1, None
    client, state = NodeSettings.read(folder / NODE_TOML).partition_id, folder / "state"
    ledger = Ledger(state)
    ledger.entries()
    for path, lines, digest in remembered_ledgers(state) if state.is_dir() else []:
        ledger.refuse_without(lines, digest, f" according to {path}")
    if not ledger.lines:
        if (folder / KEY_FILE).exists():
            remedy = "Restore it: fedpriv deploy restore, or lower the budget as README says"
            raise UserError(
                str(state), "the ledger with the heads that ledger.key has signed", "an empty ledger", remedy
            )
        return client, None
    return client, LedgerKey.at(folder).sign(ledger.lines, ledger.last_hash)


def _heads(admin: Path) -> dict[int, Head]:
    """Return the newest heads that the server of this machine knows, or none if another machine has them."""
    path = admin.parent / "server" / "flower" / HEADS_FILE
    return HeadBook(path).heads if path.is_file() else {}

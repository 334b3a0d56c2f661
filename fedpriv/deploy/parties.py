"""Helpers and clients of a deployment, as the folder `admin`, a run config or a strategy names them."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from fedpriv.deploy.helper.folder import CLIENTS_TOML, read_clients
from fedpriv.deploy.kinds import text_of
from fedpriv.deploy.sums import HelperList
from fedpriv.errors import UserError

__all__ = [
    "HELPERS_FOLDER",
    "HelperNames",
    "client_in_words",
    "clients_in_words",
    "helper_list",
    "named_helpers",
    "parties_config",
    "reasons_in_words",
]

HelperNames = str | Path | Sequence[str]
"""Helpers in the words of a strategy's user; see `named_helpers`."""

HELPERS_FOLDER = "helpers"
"""In the folder `admin`: the identity keys of the helpers, one file each."""


# Maximum number of clients in a line.
_MAX_NAMED = 20


def client_in_words(client: int) -> str:
    """Return the number of a client, and the name of its node."""
    return f"client {client} (node-{client})"


def clients_in_words(clients: Sequence[int]) -> str:
    """Return the numbers of the first clients, and the names of their nodes, and how many more there are."""
    named = ", ".join(f"{client} (node-{client})" for client in clients[:_MAX_NAMED])
    more = f" and {len(clients) - _MAX_NAMED} more" if len(clients) > _MAX_NAMED else ""
    return f"client{'s' if len(clients) > 1 else ''} {named}{more}"


def reasons_in_words(reasons: Mapping[int, str]) -> str:
    """Return all reasons in one line, each once, after the clients and nodes that it concerns.

    Args:
        reasons: Reason by client.
    """
    alike: dict[str, list[int]] = {}
    for client, reason in reasons.items():
        alike.setdefault(reason, []).append(client)
    return "; ".join(f"{clients_in_words(clients)}: {reason}" for reason, clients in alike.items())


def parties_config(admin: Path) -> dict[str, object]:
    """Return the keys of the run config for the folder `admin` of a deployment; empty without helpers.

    `helpers` holds the identity keys. `enrolled` is the path of the list of clients, which counts if the server's
    machine has it: the server then drops a message with a wrong signature, instead of losing the turn at a helper.

    Raises:
        UserError: If a file does not hold a key.
    """
    remedy = "Copy it again from the helper's operator"
    keys = [_key(text_of(path, "an identity key", remedy).strip(), str(path)) for path in _files(admin)]
    if not keys:
        return {}
    return {"helpers": ",".join(key.hex() for key in keys), "enrolled": str(admin / CLIENTS_TOML)}


def helper_list(run_config: Mapping[str, object]) -> HelperList:
    """Return the helpers and clients in a run config.

    Raises:
        UserError: If a key, or the list of clients, is invalid.
    """
    given = [part for part in str(run_config.get("helpers", "")).split(",") if part]
    path = Path(str(run_config.get("enrolled", "")))
    pinned = tuple(_key(part, "run config helpers") for part in given)
    if not (path.is_absolute() and path.is_file()):
        return HelperList(pinned)
    return HelperList(pinned, read_clients(path), lambda: read_clients(path))


def named_helpers(given: HelperNames) -> HelperList:
    """Return the helpers, and the clients if they are known, that a strategy's user names.

    Args:
        given: The helpers' identity keys, 64 hexadecimal digits each: a sequence, or one text with commas. Or the
            folder `admin` of a deployment, which has the keys of helpers and clients.

    Raises:
        UserError: If there is no such folder, if a key is invalid, or if there is none.
    """
    where = "helpers"
    if isinstance(given, Path) or (isinstance(given, str) and Path(given).is_absolute()):
        config = parties_config(Path(given))
        where = f"{given}/{HELPERS_FOLDER}"
        found = helper_list(config)
    else:
        keys = given.split(",") if isinstance(given, str) else given if isinstance(given, Iterable) else [given]
        found = HelperList(tuple(_key(str(key).strip(), where) for key in keys if key))
    if not found.pinned or len(set(found.pinned)) != len(found.pinned):
        got = "one of them twice" if found.pinned else "an empty list"
        remedy = "Give the identity keys that the helpers' operators read out, or the folder admin of a deployment"
        raise UserError(where, "the identity key of each helper", got, remedy)
    return found


def _files(admin: Path) -> list[Path]:
    return sorted((admin / HELPERS_FOLDER).glob("*.pub"))


def _key(text: str, where: str) -> bytes:
    if len(text) != 64 or set(text) - set("0123456789abcdef"):
        remedy = "Copy it again from the helper's operator"
        raise UserError(where, "an identity key, 64 digits of 0-9a-f", repr(text[:80]), remedy)
    return bytes.fromhex(text)

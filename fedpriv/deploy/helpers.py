"""Server's side of the helpers of a deployment: their keys for a run, and their answers about a round."""

from collections.abc import Callable, Collection, Mapping
from typing import Protocol, TypeVar

from flwr.app import RecordDict

from fedpriv.deploy.helper.messages import content_of, helper_content
from fedpriv.errors import UserError
from fedpriv.secure import Answer, Closed, HelperKey

__all__ = ["HelperNetwork", "end_run", "helper_answers", "helper_keys"]

T = TypeVar("T")


class HelperNetwork(Protocol):
    """A connection to helpers; see `fedpriv.deploy.server.Network`."""

    def ask_helpers(
        self, contents: Mapping[str, RecordDict], read: Callable[[str, RecordDict], T], seconds: float, group: str
    ) -> tuple[dict[str, T], dict[str, str]]:
        """See `Network.ask_helpers`."""
        ...


def helper_keys(network: HelperNetwork, run: str, pinned: Collection[bytes], seconds: float) -> list[HelperKey]:
    """Return the key of each helper for a run, ordered by identity.

    Args:
        network: The nodes.
        run: Name of the run.
        pinned: Public identity keys of the helpers.
        seconds: Time until the deadline.

    Raises:
        UserError: If a helper does not answer in time.
    """

    def read(identity: str, content: RecordDict) -> HelperKey:
        key = HelperKey.from_bytes(content_of(content, "key"))
        if (key.identity.hex(), key.run) != (identity, run) or not key.is_valid:
            got = "a wrong run, key or signature"
            raise UserError("key of a helper", f"a signed key for run {run!r}", got, "Ask again")
        return key

    question = helper_content("key", run.encode())
    found, missing = network.ask_helpers({one.hex(): question for one in pinned}, read, seconds, "keys")
    _refuse_missing(missing)
    return [found[identity] for identity in sorted(found)]


def helper_answers(network: HelperNetwork, closed: Closed, seconds: float) -> list[Answer]:
    """Return the answers of all helpers about a round. The bytes of `closed` are on disk before this is called.

    Args:
        network: The nodes.
        closed: The round, after U was fixed.
        seconds: Time until the deadline.

    Raises:
        UserError: If a helper refuses, or does not answer in time: the round is then void.
    """
    queries = {query.identity.hex(): query for query in closed.queries}

    def read(identity: str, content: RecordDict) -> Answer:
        answer = Answer.from_bytes(content_of(content, "sum"))
        if not answer.answers(queries[identity]):
            got = "a wrong signature, query or length"
            raise UserError("answer of a helper", "its signed answer to this query", got, "Ask it again")
        return answer

    contents = {identity: helper_content("sum", query.to_bytes()) for identity, query in queries.items()}
    found, missing = network.ask_helpers(contents, read, seconds, str(closed.facts.round))
    _refuse_missing(missing)
    return list(found.values())


def end_run(network: HelperNetwork, run: str, pinned: Collection[bytes], seconds: float) -> dict[str, str]:
    """Ask all helpers to erase their keys for a run; return the reasons of those that did not, by identity.

    Args:
        network: The nodes.
        run: Name of the run.
        pinned: Public identity keys of the helpers.
        seconds: Time until the deadline.
    """
    question = helper_content("end", run.encode())
    contents = {one.hex(): question for one in pinned}
    return network.ask_helpers(contents, lambda _, content: content_of(content, "end"), seconds, "end")[1]


def _refuse_missing(missing: dict[str, str]) -> None:
    for identity, reason in sorted(missing.items()):
        remedy = "Start the helper, or see its log"
        raise UserError(f"helper {identity[:16]}", "an answer in time", reason.rstrip("."), remedy)

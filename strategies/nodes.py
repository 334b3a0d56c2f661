"""Which Flower node is which client, and what it means that one does not answer."""

import logging
import time
from collections.abc import Iterable, Sequence

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from clients.wire import Introduction, introduction
from fedpriv.errors import UserError

__all__ = ["answers_by_client", "find_clients"]

_log = logging.getLogger("flwr")

# Nodes join one after the other. Without a number to wait for, they are all there when none came for so long.
_SETTLED_SECONDS = 3.0
_POLL_SECONDS = 0.1


def find_clients(grid: Grid, expected: int | None, join_timeout: float, timeout: float) -> list[int]:
    """The node of each client, by client id.

    Each node is asked for its `partition-id`, which becomes its client id. Where no node has one, clients are numbered
    by ascending node id (node ids are random, so such a run cannot be reproduced).

    Args:
        grid: Reaches the nodes.
        expected: How many clients there are; None for as many as there are nodes.
        join_timeout: Seconds to wait for nodes to join.
        timeout: Seconds to wait for their answers.

    Raises:
        UserError: If there are fewer or more nodes, if one does not answer, if one has no `private_mod`, or if ids are
            not 0 to n - 1.
    """
    nodes = _joined(grid, expected, join_timeout)
    asked = [Message(introduction(), node, MessageType.TRAIN) for node in nodes]
    answers = list(grid.send_and_receive(asked, timeout=timeout))
    who = [f"node {node}" for node in nodes]
    introduced = answers_by_client(
        asked, answers, who, "introduction (is there a ClientApp(mods=[private_mod])?)", timeout
    )
    ids = [_introduced(answer, name).client for answer, name in zip(introduced, who, strict=True)]
    return _numbered(nodes, ids)


def _joined(grid: Grid, expected: int | None, timeout: float) -> list[int]:
    """The node ids, ascending, once all have joined."""
    began = changed = time.monotonic()
    nodes: set[int] = set()
    while time.monotonic() - began < timeout and not (expected is not None and len(nodes) >= expected):
        found = set(grid.get_node_ids())
        if found != nodes:
            nodes, changed = found, time.monotonic()
        elif expected is None and nodes and time.monotonic() - changed >= _SETTLED_SECONDS:
            break
        else:
            time.sleep(_POLL_SECONDS)
    if not nodes or (expected is not None and len(nodes) != expected):
        raise UserError(
            "Flower nodes",
            f"{expected or 'some'}, one for each client",
            f"{len(nodes)} after {time.monotonic() - began:.0f} s",
            f'In simulation use flwr run --federation-config "num-supernodes={expected or 10} '
            f'client-resources-num-cpus=1"; else start as many SuperNodes as there are clients',
        )
    return sorted(nodes)


def _introduced(answer: Message, who: str) -> Introduction:
    found = Introduction.of_answer(answer.content)
    if found is None:
        raise UserError(who, "a ClientApp with private_mod", "one without", "Write ClientApp(mods=[private_mod])")
    return found


def _numbered(nodes: Sequence[int], ids: Sequence[int | None]) -> list[int]:
    if all(i is None for i in ids):
        _log.info("no node has a partition-id: clients are numbered by ascending node id")
        return list(nodes)
    known = [i for i in ids if i is not None]
    if sorted(known) != list(range(len(nodes))):
        raise UserError(
            "partition-id of the nodes",
            f"each of 0 to {len(nodes) - 1} once",
            ", ".join("none" if i is None else str(i) for i in ids[:20]),
            'Start each SuperNode with its own --node-config "partition-id=I"',
        )
    return [node for _, node in sorted(zip(known, nodes, strict=True))]


def answers_by_client(
    asked: Sequence[Message], answers: Iterable[Message], who: Sequence[str], what: str, timeout: float
) -> list[Message]:
    """The answers in the order in which clients were asked; there is one of each.

    An error does not always say which node it is from, so answers are told apart by the message that they answer.

    Args:
        asked: The messages that were sent.
        answers: What came back.
        who: Whom each message went to, in words.
        what: What for, in words.
        timeout: How many seconds were waited.

    Raises:
        UserError: If an answer is missing or an error: it says whose, and why. Going on without a client would change
            the sum that the privacy plan and the memories speak of.
    """
    answer_to = {answer.metadata.reply_to_message_id: answer for answer in answers}
    found = [answer_to.get(message.metadata.message_id) for message in asked]
    failed = [
        f"{name}: {_reason(answer, timeout)}"
        for name, answer in zip(who, found, strict=True)
        if answer is None or answer.has_error()
    ]
    if failed:
        more = f" (and {len(failed) - 3} more)" if len(failed) > 3 else ""
        raise UserError(
            what,
            f"an answer from each of {len(asked)} clients",
            "; ".join(failed[:3]) + more,
            "Mend these clients and start the run again",
        )
    return [answer for answer in found if answer is not None]


def _reason(answer: Message | None, timeout: float) -> str:
    """Why a client failed, without the traceback that Flower wraps around it."""
    if answer is None:
        return f"no answer within {timeout:g} s"
    reason = answer.error.reason or f"error {answer.error.code}"
    return reason.rsplit("Message: ", 1)[-1].removesuffix("'>").strip().rstrip(".") or "an error without a reason"

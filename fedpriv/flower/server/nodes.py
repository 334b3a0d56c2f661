"""Mapping between Flower's nodes and clients, and sorting of their answers."""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedpriv.errors import UserError, number_of
from fedpriv.flower.client_errors import reason_in_short
from fedpriv.flower.internals.app import joins_at_once
from fedpriv.flower.messages import NodeInfo, ask_node_info, printable, refused

__all__ = [
    "MAX_REASON",
    "REJOIN_SECONDS",
    "Nodes",
    "by_client",
    "find_nodes",
    "find_rejoined",
    "in_words",
    "read_answers",
    "sort_answers",
]

T = TypeVar("T")

_log = logging.getLogger("flwr")

MAX_REASON = 600
"""Maximum number of characters shown of a client's error."""

# Nodes join one after the other. Without an expected number, and in Flower's simulation, all have joined if none came
# for so long.
_SETTLED_SECONDS = 3.0
_POLL_SECONDS = 0.1

REJOIN_SECONDS = 60.0
"""Seconds to wait for the ids of nodes that joined later."""

_MAX_LISTED = 3
_MAX_KEYS = 10


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """Nodes of a run.

    Args:
        clients: Node of each client, indexed by client id.
        helpers: Identity key of each node that names itself a helper of secure aggregation, in hexadecimal digits.
        guarded: Clients on nodes with a home, ascending. The others are simulated: no other node answers without one.
    """

    clients: list[int]
    helpers: dict[int, str]
    guarded: list[int]


def find_nodes(grid: Grid, expected: int | None, join_timeout: float, timeout: float, helpers: int = 0) -> Nodes:
    """Return the nodes of a run.

    Each node of a client reports its `partition-id`, which becomes its client id. If no node has one, clients are
    numbered by ascending node id (node ids are random, so such a run cannot be reproduced).

    Args:
        grid: Connection to the nodes.
        expected: Number of clients; None for the number of nodes without helpers.
        join_timeout: Seconds to wait for nodes to join.
        timeout: Seconds to wait for their answers.
        helpers: Number of helpers' nodes.

    Raises:
        UserError: If there are fewer or more nodes, if a node does not answer or has no `private_mod`, or if the ids
            are not 0 to n - 1. No privacy is spent in that case.
    """
    nodes = _joined(grid, expected, join_timeout, helpers)
    asked = {node: Message(ask_node_info(), node, MessageType.TRAIN) for node in nodes}
    contents, failures = sort_answers(asked, grid.send_and_receive(list(asked.values()), timeout=timeout), timeout)
    if failures:
        raise UserError(
            "nodes (is there a ClientApp(mods=[private_mod])?)",
            f"an answer from each of {number_of(len(nodes), 'client')}",
            in_words({node: f"node {node}: {reason}" for node, reason in failures.items()}, "node"),
            "Fix these clients and start the run again",
        )
    found = {node: _introduced(contents[node], f"node {node}") for node in nodes}
    named = {node: info.helper for node, info in found.items() if info.helper}
    others = [node for node in nodes if node not in named]
    if not others:
        raise UserError("Flower nodes", "nodes of clients", "helpers alone", "Start the clients' nodes")
    clients = _numbered(others, [found[node].client for node in others])
    return Nodes(clients=clients, helpers=named, guarded=[i for i, node in enumerate(clients) if found[node].guarded])


def find_rejoined(grid: Grid, nodes: Sequence[int], seen: set[int], seconds: float = REJOIN_SECONDS) -> list[int]:
    """Return the node of each client, after a search for clients that came back with new node ids.

    A node that restarts may get another id. The server recognizes it by its `partition-id`.

    Args:
        grid: Connection to the nodes.
        nodes: Node of each client, indexed by client id.
        seen: Nodes that were asked before; nodes asked now are added.
        seconds: Seconds to wait for their answers.
    """
    online = set(grid.get_node_ids())
    new = [] if online.issuperset(nodes) else sorted(online - set(nodes) - seen)
    if not new:
        return list(nodes)
    seen.update(new)
    asked = {node: Message(ask_node_info(), node, MessageType.TRAIN) for node in new}
    contents, _ = sort_answers(asked, grid.send_and_receive(list(asked.values()), timeout=seconds), 0.0)
    found = list(nodes)
    for node, content in contents.items():
        who = NodeInfo.of_answer(content)
        client = None if who is None else who.client
        if client is not None and 0 <= client < len(found) and found[client] not in online:
            _log.info("client %d is back as node %d", client, node)
            found[client] = node
    return found


def sort_answers(
    asked: Mapping[int, Message], answers: Iterable[Message], timeout: float
) -> tuple[dict[int, RecordDict], dict[int, str]]:
    """Return the contents of answers, and the reasons for missing ones, each by key and in the order of `asked`.

    Answers are matched by the message that they answer, because an error on behalf of a dead node does not name the
    node. Answers from another node and second answers do not count.

    Args:
        asked: Messages that were sent.
        answers: Messages that came back.
        timeout: Time waited, in seconds, for the reasons.
    """
    node_of = {message.metadata.message_id: message.metadata.dst_node_id for message in asked.values()}
    others = set(node_of.values())
    answer_to: dict[str, Message] = {}
    for answer in answers:
        to, by = answer.metadata.reply_to_message_id, answer.metadata.src_node_id
        if by == node_of.get(to) or (answer.has_error() and by not in others):
            answer_to.setdefault(to, answer)
    contents: dict[int, RecordDict] = {}
    failures: dict[int, str] = {}
    for key, message in asked.items():
        answer = answer_to.get(message.metadata.message_id)
        if answer is None:
            failures[key] = f"no answer within {timeout:g} s"
        elif answer.has_error():
            failures[key] = printable(reason_in_short(answer.error), MAX_REASON) or "an error without a reason"
        else:
            contents[key] = answer.content
    return contents, failures


def read_answers(
    asked: Mapping[int, Message],
    answers: Iterable[Message],
    timeout: float,
    read: Callable[[int, RecordDict], T],
) -> tuple[dict[int, RecordDict], dict[int, T], dict[int, str], list[int]]:
    """Return answers, usable messages and reasons of failures by client, and the clients with a lost memory.

    Anything that a client sends becomes a message that `read` returns, or a failure.

    Args:
        asked: Messages that were sent, by client.
        answers: Messages that came back.
        timeout: Time waited, in seconds, for the reasons.
        read: Returns the message in a client's answer.
    """
    contents, reasons = sort_answers(asked, answers, timeout)
    messages, failures, lost = dict[int, T](), by_client(reasons), list[int]()
    for client, content in contents.items():
        try:
            no = refused(content)
            if no is None:
                messages[client] = read(client, content)
            else:
                failures[client] = f"client {client}: refuses ({no[0]}): {no[1]}"
                lost += [client] if no[0] == "lost" else []
        except UserError as error:
            failures[client] = printable(error, MAX_REASON)
        except Exception as error:
            failures[client] = f"client {client}: an answer that cannot be read ({type(error).__name__})"
    return contents, messages, failures, lost


def by_client(reasons: Mapping[int, str]) -> dict[int, str]:
    """Return reasons that begin with their client."""
    return {client: f"client {client}: {reason}" for client, reason in reasons.items()}


def in_words(failures: Mapping[int, str], who: str = "client") -> str:
    """Return the first failures in one line, and the number of others; equal failures are grouped.

    Args:
        failures: One line for each key, which may begin with the key, such as `client 3: `.
        who: Noun for the keys.
    """
    alike: dict[str, list[int]] = {}
    for key, line in failures.items():
        alike.setdefault(line.removeprefix(f"{who} {key}: "), []).append(key)
    lines, groups = [], list(alike.values())
    for keys in groups[:_MAX_LISTED]:
        others = ", ".join(map(str, keys[1:_MAX_KEYS])) + (", ..." if len(keys) > _MAX_KEYS else "")
        lines.append(failures[keys[0]] + (f" (also {who} {others})" if others else ""))
    more = sum(map(len, groups[_MAX_LISTED:]))
    return "; ".join(lines) + (f" (and {more} more)" if more else "")


def _joined(grid: Grid, clients: int | None, timeout: float, helpers: int) -> list[int]:
    """Return the node ids, ascending, once all have joined."""
    if getattr(grid, "all_are_there", False):  # `fedpriv.flower.apps.grid.AppGrid`
        return _right_number(list(grid.get_node_ids()), clients, "", f"Start it with --clients {clients}")
    expected = None if clients is None else clients + helpers
    settles = expected is None or joins_at_once(grid)
    began = changed = time.monotonic()
    nodes: set[int] = set()
    while time.monotonic() - began < timeout and not (expected is not None and len(nodes) >= expected):
        found = set(grid.get_node_ids())
        if found != nodes:
            nodes, changed = found, time.monotonic()
        elif settles and nodes and time.monotonic() - changed >= _SETTLED_SECONDS:
            break
        else:
            time.sleep(_POLL_SECONDS)
    remedy = (
        f'In simulation use flwr run --federation-config "num-supernodes={expected or 10} '
        f'client-resources-num-cpus=1"; otherwise start as many SuperNodes as there are clients'
    )
    if helpers:
        remedy = "Start the nodes of all clients and helpers; a simulation has no helpers: remove helpers"
    return _right_number(nodes, expected, f" after {time.monotonic() - began:.0f} s", remedy, helpers)


def _right_number(nodes: Iterable[int], expected: int | None, waited: str, remedy: str, helpers: int = 0) -> list[int]:
    found = sorted(nodes)
    if not found or (expected is not None and len(found) != expected):
        each = "one for each client and helper" if helpers else "one for each client"
        wanted = "at least one" if expected is None else f"{expected}, {each}"
        remedy += f", or give the strategy num_clients={len(found) - helpers}" if len(found) > helpers else ""
        raise UserError("Flower nodes", wanted, f"{len(found)}{waited}", remedy)
    return found


def _introduced(content: RecordDict, who: str) -> NodeInfo:
    found = NodeInfo.of_answer(content)
    if found is None:
        raise UserError(who, "a ClientApp with private_mod", "an app without it", "Write ClientApp(mods=[private_mod])")
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
            ", ".join("a missing one" if i is None else str(i) for i in ids[:20]),
            'Start each SuperNode with its own --node-config "partition-id=I"',
        )
    return [node for _, node in sorted(zip(known, nodes, strict=True))]

"""Flower `Grid` on which an unmodified ServerApp talks to clients in this process or on Ray workers.

This grid passes each message directly to its client and returns the reply. It skips the overhead of `flwr run` (a
scanned store, two polls, pickling in both directions). An app sees only one difference: replies come in the order of
the messages, and not in a random order.
"""

import logging
import math
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from flwr.app import Error, Message, Metadata, RecordDict
from flwr.serverapp import Grid

from fedpriv.flower.client_errors import reason_in_short, traceback_of
from fedpriv.flower.internals.app import Run, number_message, unavailable_reply

__all__ = ["Answers", "AppGrid", "Backend"]

_log = logging.getLogger("flwr")


class Backend(Protocol):
    """Interface of the part that runs the clients."""

    workers: int

    def push(self, messages: Sequence[Message]) -> None:
        """Accept messages. The sender may change them afterwards."""
        ...

    def advance(self, until: float = -math.inf) -> list[tuple[float, Message]]:
        """Return the replies that arrive until a time of the monotonic clock, each with its time of arrival."""
        ...

    def close(self) -> None:
        """Release all resources."""
        ...


@dataclass
class Answers:
    """Statistics of the answers to messages of one type.

    Args:
        messages: Number of answers.
        failed: Number of errors among them.
        reason: First error, in one line.
        client: Partition id of its client.
        error: First error in full.
    """

    messages: int = 0
    failed: int = 0
    reason: str = ""
    client: int = field(default=-1, compare=False)
    error: Error | None = field(default=None, compare=False)

    def count(self, reply: Message, client: int) -> None:
        """Count an answer, and log errors: the first in full, later ones in one line if they differ from it."""
        self.messages += 1
        if not reply.has_error():
            return
        self.failed += 1
        reason, known = reason_in_short(reply.error), self.error is not None
        if not known:
            self.reason, self.client, self.error = reason, client, reply.error
            _log.error("client %d: %s", client, "\n".join(filter(None, [reason, traceback_of(reply.error)])))
        else:
            _log.log(logging.DEBUG if reason == self.reason else logging.WARNING, "client %d: %s", client, reason)


@dataclass
class _Asked:
    """Message without a delivered reply."""

    metadata: Metadata
    expires: float
    arrived: float = math.inf
    reply: Message | None = None


class AppGrid(Grid):
    """Grid for the clients of one run. Threads may share it, as in Flower's legacy server.

    Node ids are ascending and the same in every run. A timeout ends the wait, not the client: a late client completes
    its work and keeps its state, and its reply waits for `pull_messages`, as in Flower. In one process, clients run one
    after the other; clients that did not run before the timeout run before the next messages.

    Args:
        run: Description of the run.
        nodes: Node ids in the order of partition ids.
        backend: Backend that runs the clients.

    Attributes:
        answers: Statistics of the answers by message type.
        all_are_there: True, because all nodes have joined from the beginning.
    """

    all_are_there = True

    def __init__(self, run: Run, nodes: Sequence[int], backend: Backend) -> None:
        self.answers: dict[str, Answers] = {}
        self._run = run
        self._nodes = nodes
        self._backend = backend
        self._asked: dict[str, _Asked] = {}
        self._sent = 0
        self._books = threading.Lock()
        self._pump = threading.Lock()

    def set_run(self, run: Run) -> None:
        """Set the description of the run; Flower calls this, apps do not."""
        if not isinstance(run, Run):
            raise TypeError(f"`run` must be an instance of Run, got {type(run).__name__}")
        self._run = run

    @property
    def run(self) -> Run:
        """Description of the run."""
        return Run(**vars(self._run))

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a new message; current apps call `Message` instead. See `flwr.serverapp.Grid`."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """Return the node ids, ascending, in the order of partition ids. All nodes are online from the beginning."""
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send messages and return their ids. Messages to unknown nodes are dropped with a line in the log.

        Raises:
            ValueError: If a message is a reply, or its time to live is not positive.
        """
        accepted = [message for message in messages if self._accepts(message)]
        with self._books:
            for message in accepted:
                self._sent += 1
                number_message(message, str(self._sent))
                left = message.metadata.created_at + message.metadata.ttl - time.time()
                self._asked[str(self._sent)] = _Asked(message.metadata, time.monotonic() + left)
            ids = [message.metadata.message_id for message in accepted]
            self._backend.push(accepted)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the available replies, in the order of `message_ids`; each reply is returned once.

        In one process, the clients run now. The reply for an id that is unknown, or no longer known, is an error.
        """
        ids = list(dict.fromkeys(message_ids))
        with self._pump:
            while any(self._is_missing(i) for i in ids) and (replies := self._backend.advance()):
                self._book(replies)
        self._expire(ids)
        unknown = {i: unavailable_reply(self._run.run_id, i) for i in ids if i not in self._asked}
        there = dict(zip(ids, self._take(ids, math.inf), strict=True))
        found = [unknown.get(i) or there[i] for i in ids]
        return [reply for reply in found if reply is not None]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send messages and return the replies, in the order of the messages.

        Args:
            messages: Messages to send.
            timeout: Seconds to wait; None for no limit. Later replies are not returned.
        """
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        ids = self.push_messages(messages)
        self._wait(ids, deadline)
        return [reply for reply in self._take(ids, deadline) if reply is not None]

    def _accepts(self, message: Message) -> bool:
        metadata = message.metadata
        if metadata.reply_to_message_id or metadata.ttl <= 0 or not message.has_content():
            raise ValueError(f"Invalid message: {message}")
        if metadata.dst_node_id not in self._nodes:
            _log.error("Invalid destination node ID for Message: %s", metadata.dst_node_id)
            return False
        return True

    def _wait(self, ids: Sequence[str], deadline: float) -> None:
        """Wait until each message has a reply or has expired, or until the deadline. One thread at a time works."""
        with _held(self._pump, deadline) as mine:
            missing = {i for i in ids if self._is_missing(i)}
            expiry = self._first_expiry(missing)
            while mine and missing and time.monotonic() < deadline:
                replies = self._backend.advance(min(deadline, expiry))
                self._book(replies)
                missing -= {reply.metadata.reply_to_message_id for _, reply in replies}
                if time.monotonic() >= expiry:
                    self._expire(missing)
                    missing = {i for i in missing if self._is_missing(i)}
                    expiry = self._first_expiry(missing)

    def _first_expiry(self, ids: Iterable[str]) -> float:
        return min((self._asked[i].expires for i in ids), default=math.inf)

    def _is_missing(self, message_id: str) -> bool:
        asked = self._asked.get(message_id)
        return asked is not None and asked.reply is None

    def _book(self, replies: Iterable[tuple[float, Message]]) -> None:
        for arrived, reply in replies:
            asked = self._asked.get(reply.metadata.reply_to_message_id)
            if asked is None or asked.reply is not None:
                continue
            if arrived > asked.expires:
                reply = unavailable_reply(self._run.run_id, reply.metadata.reply_to_message_id, asked.metadata)
            asked.arrived, asked.reply = arrived, reply
            number_message(reply, f"{reply.metadata.reply_to_message_id}-reply")
            client = self._nodes.index(asked.metadata.dst_node_id)
            self.answers.setdefault(asked.metadata.message_type, Answers()).count(reply, client)

    def _expire(self, ids: Iterable[str]) -> None:
        """Answer expired messages on behalf of the server."""
        now = time.monotonic()
        for i in ids:
            asked = self._asked.get(i)
            if asked is not None and asked.reply is None and asked.expires <= now:
                self._book([(now, unavailable_reply(self._run.run_id, i, asked.metadata))])

    def _take(self, ids: Iterable[str], deadline: float) -> list[Message | None]:
        """Return the replies that came by `deadline`, and forget them; None for the others."""
        taken: list[Message | None] = []
        for i in ids:
            asked = self._asked.get(i)
            here = asked is not None and asked.reply is not None and asked.arrived <= deadline
            taken.append(self._asked.pop(i).reply if here else None)
        return taken


@contextmanager
def _held(lock: threading.Lock, until: float) -> Iterator[bool]:
    """Hold a lock if it becomes free in time; yield whether it did."""
    held = lock.acquire(timeout=max(0.0, min(until - time.monotonic(), threading.TIMEOUT_MAX)))
    try:
        yield held
    finally:
        if held:
            lock.release()

"""A Flower `Grid` of our own: an unmodified ServerApp talks to clients in this process, or on Ray's workers.

What `flwr run` does with a message (a store that is scanned, two polls, pickle both ways) is not done here: a message
goes to its client and the reply comes back. What an app can see is the same, and the order of replies, which Flower
leaves to chance, is the order in which messages were sent.
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
    """Whoever runs the clients."""

    workers: int

    def push(self, messages: Sequence[Message]) -> None:
        """Takes messages. The sender may change them afterwards."""
        ...

    def advance(self, until: float = -math.inf) -> list[tuple[float, Message]]:
        """The replies that come until a moment of the monotonic clock, each with its time; none if none came."""
        ...

    def close(self) -> None:
        """Lets go of everything."""
        ...


@dataclass
class Answers:
    """How messages of one type were answered.

    Args:
        messages: How many were.
        failed: How many of the answers were errors.
        reason: The first of these errors, in short.
        client: Which client it was, by partition id.
        error: The whole of it.
    """

    messages: int = 0
    failed: int = 0
    reason: str = ""
    client: int = field(default=-1, compare=False)
    error: Error | None = field(default=None, compare=False)

    def count(self, reply: Message, client: int) -> None:
        """Counts one more, and logs errors: the first in full, further ones in a line if they are others."""
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
    """A message on its way."""

    metadata: Metadata
    expires: float
    arrived: float = math.inf
    reply: Message | None = None


class AppGrid(Grid):
    """Reaches the clients of one run; threads may share it, as Flower's legacy server does.

    Node ids are ascending and the same in every run. A timeout ends the waiting, not the client: one that is late has
    done its work and keeps its state, and its reply waits for `pull_messages`, as in Flower. In one process clients are
    played one after the other, so those whose turn did not come are played before the next messages.

    Args:
        run: The run.
        nodes: The node ids, in the order of partition ids.
        backend: Runs the clients.

    Attributes:
        answers: How messages were answered, by message type.
        all_are_there: That nobody needs to wait for nodes to join.
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
        """Sets the description of the run; Flower calls it, apps do not."""
        if not isinstance(run, Run):
            raise TypeError(f"`run` must be an instance of Run, got {type(run).__name__}")
        self._run = run

    @property
    def run(self) -> Run:
        """A description of the run."""
        return Run(**vars(self._run))

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """A message; apps of today call `Message` instead. See `flwr.serverapp.Grid`."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """The node ids, ascending, in the order of partition ids. All nodes are there from the beginning."""
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Sends messages and returns their ids. Messages to unknown nodes are dropped with a line in the log.

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
        """The replies that are there, in the order of `message_ids`; each is given once.

        In one process, the clients are played now. An id that is not, or no longer, known has an error for its reply.
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
        """The replies to messages, in the order of the messages.

        Args:
            messages: What to send.
            timeout: Seconds to wait; None for as long as it takes. Replies that come later are not returned.
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
        """Waits until each message has a reply or has expired, or time is up. One thread at a time does the work."""
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
        """Answers, in the name of the server, what nobody else may answer any more."""
        now = time.monotonic()
        for i in ids:
            asked = self._asked.get(i)
            if asked is not None and asked.reply is None and asked.expires <= now:
                self._book([(now, unavailable_reply(self._run.run_id, i, asked.metadata))])

    def _take(self, ids: Iterable[str], deadline: float) -> list[Message | None]:
        """The replies that came by `deadline`, which are then forgotten; None for the others."""
        taken: list[Message | None] = []
        for i in ids:
            asked = self._asked.get(i)
            here = asked is not None and asked.reply is not None and asked.arrived <= deadline
            taken.append(self._asked.pop(i).reply if here else None)
        return taken


@contextmanager
def _held(lock: threading.Lock, until: float) -> Iterator[bool]:
    """Holds a lock if it becomes free in time; yields whether it did."""
    held = lock.acquire(timeout=max(0.0, min(until - time.monotonic(), threading.TIMEOUT_MAX)))
    try:
        yield held
    finally:
        if held:
            lock.release()

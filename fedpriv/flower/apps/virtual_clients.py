"""Clients of a Flower app that live in one process: what each keeps, and how it is kept apart from everyone else.

Flower gives a ClientApp copies (through pickle) of the message and of its context, and takes both back as copies. So
here, but only containers are copied: the bytes of an array cannot be changed, so that everyone may share them.
"""

import hashlib
import math
import random
import secrets
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedpriv.engines import one_thread
from fedpriv.flower.internals.app import (
    copy_context,
    copy_message,
    error_of_exception,
    error_reply,
    unavailable_reply,
)
from fedpriv.flower.simulation import playing_clients

__all__ = ["FIRST_NODE", "ClientSeeds", "InProcessClients", "Population", "VirtualClients", "generators_kept"]

FIRST_NODE = 1_000_000
"""Node ids are this number plus the partition id: no node is mistaken for the server, nor an id for a partition."""


@dataclass(frozen=True)
class ClientSeeds:
    """Where the global random generators of a client begin, by generator.

    Each message to a client starts Python's, NumPy's and PyTorch's generators from its address: these numbers, the
    client, and how many messages it has had. What an app draws does then not depend on who shares a process with whom.
    """

    python: int
    numpy: int
    torch: int

    @classmethod
    def drawn(cls) -> "ClientSeeds":
        """Seeds drawn from the generators as they are: an app that seeds one on import has reproducible clients."""
        return cls(
            python=random.getrandbits(63),
            numpy=int(np.random.randint(2**63 - 1, dtype=np.int64)),  # noqa: NPY002
            torch=int(torch.randint(2**63 - 1, (), dtype=torch.int64)),
        )

    @classmethod
    def fresh(cls) -> "ClientSeeds":
        """Seeds that nobody can guess."""
        return cls(*(secrets.randbits(63) for _ in range(3)))

    def start(self, client: int, messages: int) -> None:
        """Starts the global generators for a client's message.

        Args:
            client: The client.
            messages: How many messages it has had before.
        """
        python, numpy, torch_ = (_address(seed, client, messages) for seed in (self.python, self.numpy, self.torch))
        random.seed(python)
        np.random.seed(numpy % 2**32)  # noqa: NPY002
        torch.default_generator.manual_seed(torch_)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(torch_)


def _address(seed: int, client: int, messages: int) -> int:
    text = f"{seed}/{client}/{messages}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


@contextmanager
def generators_kept() -> Iterator[None]:
    """Leaves the global random generators as they were, as if what ran in between had a process of its own."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    torch_ = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(torch_)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


@dataclass(frozen=True)
class Population:
    """Who the clients of a run are.

    Args:
        run_id: The run.
        size: How many clients there are.
        run_config: What each finds in `context.run_config`.
        seeds: Where their random generators begin.
    """

    run_id: int
    size: int
    run_config: dict[str, Any]
    seeds: ClientSeeds

    @property
    def nodes(self) -> range:
        """The node id of every client."""
        return range(FIRST_NODE, FIRST_NODE + self.size)

    def new_context(self, client: int) -> Context:
        """What a client begins with."""
        return Context(
            run_id=self.run_id,
            node_id=FIRST_NODE + client,
            node_config={"partition-id": client, "num-partitions": self.size},
            state=RecordDict(),
            run_config=dict(self.run_config),
        )


class VirtualClients:
    """Plays any of the clients of a population, and keeps the context of each that it has played.

    Args:
        app: What every client runs.
        population: Who they are.
    """

    def __init__(self, app: ClientApp, population: Population) -> None:
        self._app = app
        self._population = population
        self._contexts: dict[int, Context] = {}
        self._played: dict[int, int] = {}

    def play(self, message: Message) -> Message:
        """What the client to whom `message` is addressed answers, an error if it raised one.

        Its context is kept if the app came to its end, and else stays as it was before the message.

        Args:
            message: Nobody else may hold it: the app may do with it what it likes.
        """
        if _expired(message):
            return unavailable_reply(message.metadata.run_id, message.metadata.message_id, message.metadata)
        client = message.metadata.dst_node_id - FIRST_NODE
        before = self._contexts.get(client) or self._population.new_context(client)
        self._population.seeds.start(client, self._played.get(client, 0))
        self._played[client] = self._played.get(client, 0) + 1
        context, asked = copy_context(before), message.metadata.message_id
        try:
            with playing_clients():
                reply = self._app(message, context)
        except (Exception, SystemExit) as error:
            return Message(error_of_exception(error), reply_to=message)
        refusal = _refusal(reply, asked, context, before)
        if refusal:
            return error_reply(message, refusal)
        self._contexts[client] = copy_context(context)
        return copy_message(reply)


def _refusal(reply: object, asked: str, context: Context, before: Context) -> str:
    """Why what a ClientApp did cannot be accepted; empty if it can."""
    if not isinstance(reply, Message):
        return f"The ClientApp must return a Message, it returned {type(reply).__name__}"
    if reply.metadata.reply_to_message_id != asked:
        return "The ClientApp must return a reply: Message(content, reply_to=message)"
    if context.run_config != before.run_config:
        return "The `run_config` field of the `Context` object cannot be modified"
    return ""


def _expired(message: Message) -> bool:
    return message.metadata.created_at + message.metadata.ttl <= time.time()


class InProcessClients:
    """All clients in this process, one after the other, in the order of their messages.

    Clients run on one thread of PyTorch, as on Flower's and Ray's workers: the number of threads decides how sums are
    rounded. The server's random generators do not notice them.
    """

    workers = 1

    def __init__(self, clients: VirtualClients) -> None:
        self._clients = clients
        self._queue: deque[Message] = deque()

    def push(self, messages: Sequence[Message]) -> None:
        """Takes messages; they are played when replies are asked for."""
        self._queue.extend(map(copy_message, messages))

    def advance(self, until: float = -math.inf) -> list[tuple[float, Message]]:
        """Plays messages, at least one if there is one, for as long as there is time.

        Args:
            until: When to stop, on the monotonic clock, in seconds. A client at work is not interrupted.

        Returns:
            When each reply came, and the reply.
        """
        replies: list[tuple[float, Message]] = []
        with generators_kept(), one_thread():
            while self._queue and (not replies or replies[-1][0] < until):
                reply = self._clients.play(self._queue.popleft())
                replies.append((time.monotonic(), reply))
        return replies

    def close(self) -> None:
        """Forgets what nobody asked for."""
        self._queue.clear()

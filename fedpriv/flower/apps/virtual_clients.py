"""Isolated clients of a Flower app within one process.

Flower passes a ClientApp pickled copies of the message and of its context, and copies both again on return. This module
does the same but copies only containers: the bytes of an array are immutable, so that all clients can share them.
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
"""Node ids are this number plus the partition id, so that they differ from the server's id and from partition ids."""


@dataclass(frozen=True)
class ClientSeeds:
    """Seeds of the global random generators of clients.

    Each message to a client seeds Python's, NumPy's and PyTorch's generators from its address: these seeds, the client
    and the number of its earlier messages. An app's random numbers then do not depend on which clients share a process.
    """

    python: int
    numpy: int
    torch: int

    @classmethod
    def drawn(cls) -> "ClientSeeds":
        """Return seeds drawn from the current generators: an app that seeds one on import has reproducible clients."""
        return cls(
            python=random.getrandbits(63),
            numpy=int(np.random.randint(2**63 - 1, dtype=np.int64)),  # noqa: NPY002
            torch=int(torch.randint(2**63 - 1, (), dtype=torch.int64)),
        )

    @classmethod
    def fresh(cls) -> "ClientSeeds":
        """Return unpredictable seeds."""
        return cls(*(secrets.randbits(63) for _ in range(3)))

    def start(self, client: int, messages: int) -> None:
        """Seed the global generators for a client's message.

        Args:
            client: Id of the client.
            messages: Number of its earlier messages.
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
    """Restore the global random generators after the block, as if it had run in another process."""
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
    """Clients of a run.

    Args:
        run_id: Id of the run.
        size: Number of clients.
        run_config: `context.run_config` of each client.
        seeds: Seeds of their random generators.
    """

    run_id: int
    size: int
    run_config: dict[str, Any]
    seeds: ClientSeeds

    @property
    def nodes(self) -> range:
        """Node ids of all clients."""
        return range(FIRST_NODE, FIRST_NODE + self.size)

    def new_context(self, client: int) -> Context:
        """Return the initial context of a client."""
        return Context(
            run_id=self.run_id,
            node_id=FIRST_NODE + client,
            node_config={"partition-id": client, "num-partitions": self.size},
            state=RecordDict(),
            run_config=dict(self.run_config),
        )


class VirtualClients:
    """Simulation of the clients of a population, with the context of each client that has run.

    Args:
        app: App of every client.
        population: Clients of the run.
    """

    def __init__(self, app: ClientApp, population: Population) -> None:
        self._app = app
        self._population = population
        self._contexts: dict[int, Context] = {}
        self._played: dict[int, int] = {}

    def play(self, message: Message) -> Message:
        """Return the answer of the client to which `message` is addressed; an error if its app raised an exception.

        The client's new context is kept if the app succeeds; otherwise the context stays unchanged.

        Args:
            message: Message that is not shared, because the app may modify it.
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
    """Return the reason why the result of a ClientApp is invalid; empty if it is valid."""
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
    """Backend that runs all clients in this process, one after the other, in the order of their messages.

    Clients use one PyTorch thread, as on Flower's and Ray's workers, because the number of threads affects the rounding
    of sums. They do not change the server's random generators.
    """

    workers = 1

    def __init__(self, clients: VirtualClients) -> None:
        self._clients = clients
        self._queue: deque[Message] = deque()

    def push(self, messages: Sequence[Message]) -> None:
        """Accept messages, which run when replies are requested."""
        self._queue.extend(map(copy_message, messages))

    def advance(self, until: float = -math.inf) -> list[tuple[float, Message]]:
        """Run messages, at least one if there is one, until the time is up.

        Args:
            until: Time to stop, on the monotonic clock, in seconds. A running client is not interrupted.

        Returns:
            The replies, each with its time.
        """
        replies: list[tuple[float, Message]] = []
        with generators_kept(), one_thread():
            while self._queue and (not replies or replies[-1][0] < until):
                reply = self._clients.play(self._queue.popleft())
                replies.append((time.monotonic(), reply))
        return replies

    def close(self) -> None:
        """Drop messages that have not run."""
        self._queue.clear()

"""A round of secure aggregation without a network: clients, helpers and a server in one process."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from fedpriv.secure import Closed, Collector, Helper, HelperKey, Masked, Query, RoundFacts, mask_message

MAX_TOTAL = 2**31 - 1

Values = NDArray[np.int64]


def tape(name: str) -> Callable[[int], bytes]:
    """Return a source of bytes that are always the same."""
    drawn = 0

    def random(length: int) -> bytes:
        nonlocal drawn
        drawn += 1
        return hashlib.shake_256(f"{name} {drawn}".encode()).digest(length)

    return random


def signing_key(name: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest())


def public_key(name: str) -> bytes:
    return signing_key(name).public_key().public_bytes_raw()


def some_values(size: int, client: int = 0) -> Values:
    """Values of one client; partial sums leave the range of 32 bits, the sum of clients 0 to 4 does not."""
    values = np.random.default_rng(client).integers(-(2**20), 2**20, size)
    return values + (-1) ** client * (2**31 - 2**24)


FACTS = RoundFacts(
    run="run-1",
    round=1,
    least_survivors=3,
    colluders=1,
    share_stddev=0.75,
    grid=2.0**-20,
    size=7,
    digest=bytes(range(32)),
)


@dataclass
class World:
    """Five clients and some helpers, which have enrolled them."""

    home: Path
    helpers: int = 1
    clients: int = 5
    min_clients: int = 3
    facts: RoundFacts = FACTS

    @property
    def enrolled(self) -> dict[int, bytes]:
        return {client: public_key(f"client {client}") for client in range(self.clients)}

    @property
    def pinned(self) -> list[bytes]:
        return [public_key(f"helper {j}") for j in range(self.helpers)]

    def helper(self, j: int = 0) -> Helper:
        """Return a helper as after a restart: with its files, and nothing in memory."""
        return Helper(self.home / f"helper-{j}", signing_key(f"helper {j}"), self.enrolled, self.min_clients)

    def keys(self, run: str | None = None) -> list[HelperKey]:
        return [self.helper(j).key(run or self.facts.run) for j in range(self.helpers)]

    def at(self, **changes: object) -> RoundFacts:
        return replace(self.facts, **changes)

    def message(self, client: int, values: Values | None = None, facts: RoundFacts | None = None) -> Masked:
        facts = facts or self.facts
        values = some_values(facts.size, client) if values is None else values
        signer = signing_key(f"client {client}")
        return mask_message(values, facts, client, signer, self.keys(facts.run), self.pinned)

    def collector(self, facts: RoundFacts | None = None, enrolled: Mapping[int, bytes] | None = None) -> Collector:
        facts = facts or self.facts
        return Collector(facts, self.keys(facts.run), self.pinned, enrolled)

    def closed(self, messages: Iterable[Masked], facts: RoundFacts | None = None) -> Closed:
        """Return the round after U was fixed and stored, and the server has restarted."""
        collector = self.collector(facts)
        for message in messages:
            collector.add(message)
        return Closed.from_bytes(collector.close())

    def query(self, clients: Iterable[int] = range(5), facts: RoundFacts | None = None) -> Query:
        """Return the query of an honest server to the first helper."""
        return self.closed([self.message(client, facts=facts) for client in clients], facts).queries[0]

    def total(self, closed: Closed, max_total: int = MAX_TOTAL) -> Values:
        answers = [self.helper(j).answer(self.query_of(closed, j)) for j in range(self.helpers)]
        return closed.total(answers, max_total)

    def query_of(self, closed: Closed, j: int) -> Query:
        return next(query for query in closed.queries if query.identity == self.pinned[j])

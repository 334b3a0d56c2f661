"""Server's half: add up masked messages, fix U, ask the helpers, and subtract their answers."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedpriv.errors import UserError
from fedpriv.secure.masks import Words, words_from, words_to_bytes
from fedpriv.secure.messages import (
    Answer,
    HelperKey,
    Masked,
    Member,
    Query,
    RoundFacts,
    Sealed,
    require_pinned,
)
from fedpriv.secure.wire import Fields, pack

__all__ = ["Closed", "Collector", "VoidRoundError"]


class VoidRoundError(UserError):
    """A round without a result. Its messages were sent and are charged; no memory moves."""


@dataclass
class Collector:
    """Sum of the masked messages of one round, in any order.

    Args:
        facts: Facts of the round.
        helpers: Keys of all helpers for the run.
        pinned: Public identity keys of the helpers.
        enrolled: Public Ed25519 keys of clients. A message without a valid signature is refused here, and does not void
            the round at a helper; None leaves that check to the helpers.

    Raises:
        UserError: If the helpers are not the pinned ones.
    """

    facts: RoundFacts
    helpers: Sequence[HelperKey]
    pinned: Iterable[bytes]
    enrolled: Mapping[int, bytes] | None = None
    _words: Words = field(init=False, repr=False)
    _digests: dict[int, bytes] = field(init=False, repr=False, default_factory=dict[int, bytes])
    _sealed: dict[int, tuple[Sealed, ...]] = field(
        init=False, repr=False, default_factory=dict[int, tuple[Sealed, ...]]
    )
    _closed: bytes | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        require_pinned(self.helpers, frozenset(self.pinned), self.facts.run)
        self.helpers = sorted(self.helpers, key=lambda helper: helper.identity)
        self._words = np.zeros(self.facts.size, dtype=np.uint32)

    @property
    def clients(self) -> list[int]:
        """The clients in the sum, in ascending order: U, once the round is closed."""
        return sorted(self._digests)

    def add(self, message: Masked) -> bool:
        """Add a client's message. Return False for the same bytes again, which change nothing.

        Raises:
            UserError: If the message is of another round, has other facts or helpers, has an invalid signature, differs
                from an earlier one of the same client, or comes after U was fixed.
        """
        client, name = message.client, f"message of client {message.client}"
        digest = hashlib.sha256(message.to_bytes()).digest()
        if client in self._digests:
            if self._digests[client] == digest:
                return False
            raise UserError(name, "one message in a round", "a second one", "Send the stored message again")
        if self._closed is not None:
            raise UserError(name, "a message before the helpers are asked", "a late one", "Drop it: it does not count")
        if message.facts != self.facts:
            raise UserError(name, "the facts of this round", "different facts", "Follow the instructions of this round")
        if [(one.identity, one.key) for one in message.sealed] != [(one.identity, one.key) for one in self.helpers]:
            raise UserError(
                name, "a seed for each helper's key of this run", "seeds for different keys", "Use the keys of this run"
            )
        if self.enrolled is not None and not self._is_signed(message):
            raise UserError(name, "the signature of an enrolled client", "a wrong signature", "Enroll the client's key")
        self._words += message.words
        self._digests[client], self._sealed[client] = digest, message.sealed
        return True

    def close(self) -> bytes:
        """Fix U and return the bytes of `Closed`; only these bytes lead to queries.

        The caller stores them before it sends the first query. A server that forgot U could only ask about another one,
        which every helper refuses, and the round would be lost.

        Raises:
            VoidRoundError: If fewer than `least_survivors` clients answered.
        """
        if self._closed is None:
            if len(self._digests) < self.facts.least_survivors:
                expected = f"messages from at least {self.facts.least_survivors} clients"
                raise VoidRoundError(f"round {self.facts.round}", expected, len(self._digests), "Start another round")
            self._closed = Closed(facts=self.facts, words=self._words, queries=self._queries()).to_bytes()
        return self._closed

    def _queries(self) -> tuple[Query, ...]:
        queries: list[Query] = []
        for position, helper in enumerate(self.helpers):
            sealed = [(client, self._sealed[client][position]) for client in self.clients]
            members = tuple(Member(client=client, box=one.box, signature=one.signature) for client, one in sealed)
            queries.append(Query(facts=self.facts, identity=helper.identity, key=helper.key, members=members))
        return tuple(queries)

    def _is_signed(self, message: Masked) -> bool:
        public = (self.enrolled or {}).get(message.client, b"")
        return all(one.is_signed_by(public, self.facts, message.client) for one in message.sealed)


@dataclass(frozen=True, kw_only=True, eq=False)
class Closed:
    """A round after U was fixed: the masked sum and the queries.

    Args:
        facts: Facts of the round.
        words: Sum of the masked messages modulo 2^32, `[size]`.
        queries: One query for each helper, with the same clients.
    """

    facts: RoundFacts
    words: Words
    queries: tuple[Query, ...]

    @property
    def clients(self) -> list[int]:
        """U, in ascending order."""
        return [member.client for member in self.queries[0].members]

    def total(self, answers: Iterable[Answer], max_total: int) -> NDArray[np.int64]:
        """Return the sum of the clients' values, in units of the grid, `[size]`.

        Args:
            answers: The answers of all helpers, in any order.
            max_total: The largest absolute value that the plan allows in a sum, below 2^31. Values between it and 2^31
                are the guard band. After a true overflow nothing can be counted, so the round is void before that.

        Raises:
            UserError: If an answer is missing, or is not a helper's answer to its query.
            VoidRoundError: If a coordinate is in the guard band.
        """
        if not 0 < max_total < 2**31:
            raise UserError("max_total", "a whole number from 1 to 2^31 - 1", max_total, "Choose a coarser grid")
        given = {answer.identity: answer for answer in answers}
        words = self.words.copy()
        for query in self.queries:
            answer, name = given.get(query.identity), f"answer of helper {query.identity.hex()[:16]}"
            if answer is None:
                raise UserError(name, f"an answer about round {self.facts.round}", "silence", "Ask the helper again")
            if not answer.answers(query):
                expected = f"its signed answer to the query of round {self.facts.round}"
                raise UserError(name, expected, "a wrong signature, query or length", "Ask the helper again")
            words -= answer.words
        total = words.view(np.int32).astype(np.int64)
        beyond = int(np.count_nonzero(np.abs(total) > max_total))
        if beyond:
            expected = f"sums of at most {max_total} grid units"
            got = f"{beyond} of {self.facts.size} coordinates beyond it"
            raise VoidRoundError(f"round {self.facts.round}", expected, got, "Start another round")
        return total

    def to_bytes(self) -> bytes:
        """Return the encoding."""
        encoded = [query.to_bytes() for query in self.queries]
        queries = [part for content in encoded for part in (len(content), content)]
        return pack("closed round", *self.facts.values, words_to_bytes(self.words), *queries)

    @classmethod
    def from_bytes(cls, content: bytes) -> "Closed":
        """Return the round in an encoding.

        Raises:
            UserError: If the bytes are not a closed round.
        """
        found = Fields("closed round", content)
        facts = RoundFacts.read(found)
        words = words_from(found.octets(4 * facts.size))
        queries: list[Query] = []
        while found.remaining() or not queries:
            queries.append(Query.from_bytes(bytes(found.octets(found.whole()))))
        return cls(facts=facts, words=words, queries=tuple(queries))

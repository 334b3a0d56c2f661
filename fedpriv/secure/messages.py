"""Objects that clients, server and helpers exchange; each has one encoding, `to_bytes` and `from_bytes`."""

import hashlib
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import pairwise

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedpriv.errors import UserError
from fedpriv.secure.masks import Words, words_from, words_to_bytes
from fedpriv.secure.sealing import BOX_BYTES
from fedpriv.secure.wire import MAX_WHOLE, Fields, pack

__all__ = ["Answer", "HelperKey", "Masked", "Member", "Query", "RoundFacts", "Sealed", "is_signed"]

KEY_BYTES = 32
SIGNATURE_BYTES = 64
DIGEST_BYTES = 32

_MAX_SIZE = 2**33


@dataclass(frozen=True, kw_only=True)
class RoundFacts:
    """The facts of a round that every client signs; a helper accepts a round only if they are the same for all.

    Args:
        run: Name of the run.
        round: Number of the round. A deployment gives the number of the turn, which is never repeated: a round that
            is asked again is another release, with fresh noise and fresh seeds.
        least_survivors: t, the least number of clients in a sum.
        colluders: c, the number of clients that may collude with the server or leave their noise out.
        share_stddev: Standard deviation of the noise of one client, per coordinate.
        grid: The unit of the integers, a power of two.
        size: Number of coordinates.
        digest: SHA-256 of the instructions and the model of the round.

    Raises:
        UserError: If a value is out of range.
    """

    run: str
    round: int
    least_survivors: int
    colluders: int
    share_stddev: float
    grid: float
    size: int
    digest: bytes

    def __post_init__(self) -> None:
        _require(0 < len(self.run.encode()) <= 256, "run", "a name of at most 256 bytes", repr(self.run))
        _require(0 <= self.round <= MAX_WHOLE, "round", "a whole number from 0", self.round)
        _require(2 <= self.least_survivors <= MAX_WHOLE, "least_survivors", "at least 2", self.least_survivors)
        below = f"a whole number from 0, below least_survivors = {self.least_survivors}"
        _require(0 <= self.colluders < self.least_survivors, "colluders", below, self.colluders)
        _require(0.0 < self.share_stddev < math.inf, "share_stddev", "a finite number above 0", self.share_stddev)
        power = 0.0 < self.grid < math.inf and math.frexp(self.grid)[0] == 0.5
        _require(power, "grid", "a power of two", self.grid)
        _require(1 <= self.size <= _MAX_SIZE, "size", "a whole number from 1 to 2^33", self.size)
        _require(len(self.digest) == DIGEST_BYTES, "digest", "32 bytes", f"{len(self.digest)} bytes")

    @property
    def values(self) -> tuple[int | float | str | bytes, ...]:
        """All facts, in the order of the fields."""
        return tuple(getattr(self, field.name) for field in fields(self))

    @classmethod
    def read(cls, content: Fields) -> "RoundFacts":
        """Return the facts that come next in an encoding."""
        return cls(
            run=content.text(),
            round=content.whole(),
            least_survivors=content.whole(),
            colluders=content.whole(),
            share_stddev=content.real(),
            grid=content.real(),
            size=content.whole(),
            digest=bytes(content.octets(DIGEST_BYTES)),
        )

    def context(self, client: int, identity: bytes, key: bytes) -> bytes:
        """Return the bytes that bind a sealed seed: all facts, the client, the helper, and its key for the run.

        Args:
            client: Id of the client that seals.
            identity: Public identity key of the helper, 32 bytes (Ed25519).
            key: The helper's public key for the run, 32 bytes (X25519).
        """
        return pack("context", *self.values, client, identity, key)


@dataclass(frozen=True, kw_only=True)
class HelperKey:
    """A helper's key for one run, signed by its identity key.

    Args:
        run: Name of the run.
        key: Public X25519 key.
        identity: Public Ed25519 key of the helper.
        signature: Signature of run and key by the identity key.
    """

    run: str
    key: bytes
    identity: bytes
    signature: bytes

    @classmethod
    def signed(cls, run: str, key: bytes, identity: Ed25519PrivateKey) -> "HelperKey":
        """Return a key with its signature.

        Args:
            run: Name of the run.
            key: Public key for the run, 32 bytes (X25519).
            identity: The helper's private identity key, which signs.
        """
        signature = identity.sign(pack("helper key", run, key))
        return cls(run=run, key=key, identity=identity.public_key().public_bytes_raw(), signature=signature)

    @property
    def is_valid(self) -> bool:
        """True if the signature is valid."""
        return is_signed(self.identity, self.signature, pack("helper key", self.run, self.key))

    def to_bytes(self) -> bytes:
        """Return the encoding."""
        return pack("signed helper key", self.run, self.key, self.identity, self.signature)

    @classmethod
    def from_bytes(cls, content: bytes) -> "HelperKey":
        """Return the key in an encoding. Its signature is not checked.

        Raises:
            UserError: If the bytes are not a key.
        """
        found = Fields("signed helper key", content)
        read = cls(
            run=found.text(),
            key=bytes(found.octets(KEY_BYTES)),
            identity=bytes(found.octets(KEY_BYTES)),
            signature=bytes(found.octets(SIGNATURE_BYTES)),
        )
        found.end()
        return read


def require_pinned(helpers: Sequence[HelperKey], pinned: Collection[bytes], run: str) -> None:
    """Raise UserError unless each pinned helper, and no other, has one valid key for the run.

    Args:
        helpers: Keys of the helpers, as the server shows them.
        pinned: Public identity keys of the helpers, from a client's or a server's own files.
        run: The run.
    """
    remedy = "Ask the server's operator, and compare the pinned keys"
    if not pinned or sorted(helper.identity for helper in helpers) != sorted(set(pinned)):
        names = ", ".join(sorted(helper.identity.hex()[:16] for helper in helpers)) or "an empty list"
        wanted = ", ".join(sorted(identity.hex()[:16] for identity in pinned)) or "at least one"
        raise UserError("helpers", f"one key from each pinned helper ({wanted})", names, remedy)
    if len({helper.key for helper in helpers}) != len(helpers):
        raise UserError("helpers", "distinct keys", "one key of two helpers", remedy)
    for helper in helpers:
        if helper.run != run or not helper.is_valid:
            name = f"key of helper {helper.identity.hex()[:16]}"
            raise UserError(name, f"a key for run {run!r} with its signature", "a wrong run, key or signature", remedy)


@dataclass(frozen=True, kw_only=True)
class Sealed:
    """The seed of a client's mask, sealed for one helper and signed by the client.

    Args:
        identity: Public identity key of the helper.
        key: Public key of the helper for the run.
        box: The sealed seed.
        signature: The client's signature of the box and all facts. The helper verifies it: only the client can make a
            box under its name.
    """

    identity: bytes
    key: bytes
    box: bytes
    signature: bytes

    def is_signed_by(self, public: bytes, facts: RoundFacts, client: int) -> bool:
        """Return True if the client with this public key signed the box under these facts.

        Args:
            public: The client's public signing key, 32 bytes (Ed25519), from the verifier's own files.
            facts: Facts of the round.
            client: Id of the client.
        """
        return is_signed(public, self.signature, signed_bytes(self.box, facts.context(client, self.identity, self.key)))


@dataclass(frozen=True, kw_only=True, eq=False)
class Masked:
    """One client's message: its masked integers and its sealed seeds.

    The bytes are stored, and a resend has the same bytes: another message of the same round would be another release.

    Args:
        facts: Facts of the round.
        client: Number of the client.
        words: Masked integers, `[size]`.
        sealed: One sealed seed for each helper, ordered by identity.
    """

    facts: RoundFacts
    client: int
    words: Words
    sealed: tuple[Sealed, ...]

    def to_bytes(self) -> bytes:
        """Return the encoding."""
        seals = [part for one in self.sealed for part in (one.identity, one.key, one.box, one.signature)]
        return pack("message", *self.facts.values, self.client, words_to_bytes(self.words), *seals)

    @classmethod
    def from_bytes(cls, content: bytes) -> "Masked":
        """Return the message in an encoding.

        Raises:
            UserError: If the bytes are not a message.
        """
        found = Fields("message", content)
        facts = RoundFacts.read(found)
        client, words = found.whole(), words_from(found.octets(4 * facts.size))
        sealed: list[Sealed] = []
        while found.remaining() or not sealed:
            sealed.append(
                Sealed(
                    identity=bytes(found.octets(KEY_BYTES)),
                    key=bytes(found.octets(KEY_BYTES)),
                    box=bytes(found.octets(BOX_BYTES)),
                    signature=bytes(found.octets(SIGNATURE_BYTES)),
                )
            )
        _require_ascending("message", "helpers", [one.identity for one in sealed])
        return cls(facts=facts, client=client, words=words, sealed=tuple(sealed))


@dataclass(frozen=True, kw_only=True)
class Member:
    """A client of a query.

    Args:
        client: Number of the client.
        box: Its sealed seed for the helper.
        signature: Its signature.
    """

    client: int
    box: bytes
    signature: bytes


@dataclass(frozen=True, kw_only=True)
class Query:
    """A server's question to one helper: the sum of the masks of some clients.

    Args:
        facts: Facts of the round, which every member has signed.
        identity: Public identity key of the helper.
        key: Public key of the helper for the run.
        members: The clients, in ascending order.
    """

    facts: RoundFacts
    identity: bytes
    key: bytes
    members: tuple[Member, ...]

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the encoding: facts, clients, boxes and signatures."""
        return hashlib.sha256(self.to_bytes()).digest()

    def to_bytes(self) -> bytes:
        """Return the encoding."""
        parts = [part for one in self.members for part in (one.client, one.box, one.signature)]
        return pack("query", *self.facts.values, self.identity, self.key, *parts)

    @classmethod
    def from_bytes(cls, content: bytes) -> "Query":
        """Return the query in an encoding.

        Raises:
            UserError: If the bytes are not a query, or if its clients are not in ascending order.
        """
        found = Fields("query", content)
        facts = RoundFacts.read(found)
        identity, key = bytes(found.octets(KEY_BYTES)), bytes(found.octets(KEY_BYTES))
        members: list[Member] = []
        while found.remaining():
            client = found.whole()
            box, signature = bytes(found.octets(BOX_BYTES)), bytes(found.octets(SIGNATURE_BYTES))
            members.append(Member(client=client, box=box, signature=signature))
        _require_ascending("query", "clients", [one.client for one in members])
        return cls(facts=facts, identity=identity, key=key, members=tuple(members))


@dataclass(frozen=True, kw_only=True, eq=False)
class Answer:
    """A helper's answer: the sum of the masks of a query's clients, signed by its identity key.

    The server checks the signature, which covers the digest of the query. Without it, a stale answer, or one about
    another U, would turn the sum into uniform noise, and nothing about the result would show the reason. This protects
    the model; the privacy of clients does not depend on it. It costs 64 bytes.

    Args:
        run: Name of the run.
        round: Number of the round.
        query: Digest of the query.
        words: Sum of the masks modulo 2^32, `[size]`.
        identity: Public identity key of the helper.
        signature: Signature of all the above.
    """

    run: str
    round: int
    query: bytes
    words: Words
    identity: bytes
    signature: bytes

    @classmethod
    def signed(cls, query: Query, words: Words, identity: Ed25519PrivateKey) -> "Answer":
        """Return the answer to a query with its signature.

        Args:
            query: The query.
            words: Sum of the masks of its clients modulo 2^32, `[size]`.
            identity: The helper's private identity key, which signs.
        """
        public, facts = identity.public_key().public_bytes_raw(), query.facts
        signature = identity.sign(_answered_bytes(facts.run, facts.round, query.digest, words))
        return cls(
            run=facts.run, round=facts.round, query=query.digest, words=words, identity=public, signature=signature
        )

    def answers(self, query: Query) -> bool:
        """Return True if it is the answer of the query's helper to this query."""
        same = (self.identity, self.query, len(self.words)) == (query.identity, query.digest, query.facts.size)
        signed = _answered_bytes(query.facts.run, query.facts.round, query.digest, self.words)
        return same and is_signed(self.identity, self.signature, signed)

    def to_bytes(self) -> bytes:
        """Return the encoding."""
        words = words_to_bytes(self.words)
        return pack("answer", self.run, self.round, self.query, len(self.words), words, self.identity, self.signature)

    @classmethod
    def from_bytes(cls, content: bytes) -> "Answer":
        """Return the answer in an encoding. Its signature is not checked.

        Raises:
            UserError: If the bytes are not an answer.
        """
        found = Fields("answer", content)
        run, round, query = found.text(), found.whole(), bytes(found.octets(DIGEST_BYTES))
        words = words_from(found.octets(4 * found.whole()))
        identity, signature = bytes(found.octets(KEY_BYTES)), bytes(found.octets(SIGNATURE_BYTES))
        found.end()
        return cls(run=run, round=round, query=query, words=words, identity=identity, signature=signature)


def signed_bytes(box: bytes, context: bytes) -> bytes:
    """Return the bytes of a sealed seed that its client signs."""
    return pack("sealed seed", box, context)


def is_signed(public: bytes, signature: bytes, content: bytes) -> bool:
    """Return True if the holder of an Ed25519 key signed the content.

    Args:
        public: The public key, 32 bytes; False for bytes that are not one.
        signature: The signature, 64 bytes.
        content: The signed bytes.
    """
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, content)
    except (ValueError, InvalidSignature):
        return False
    return True


def _answered_bytes(run: str, round: int, query: bytes, words: Words) -> bytes:
    return pack("signed answer", run, round, query, hashlib.sha256(words_to_bytes(words)).digest())


def _require(holds: bool, name: str, expected: str, got: object) -> None:
    if not holds:
        raise UserError(name, expected, got, f"Change {name}")


def _require_ascending(kind: str, names: str, found: Sequence[int] | Sequence[bytes]) -> None:
    if any(later <= earlier for earlier, later in pairwise(found)):  # type: ignore[operator]
        remedy = "Send each once, in ascending order"
        raise UserError(kind, f"distinct {names} in ascending order", "a wrong order, or the same one twice", remedy)

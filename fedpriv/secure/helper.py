"""Helper's half: reveal one sum of masks for each round, over enough enrolled clients, and never another."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedpriv.errors import UserError
from fedpriv.files import make_private_folder, only_one
from fedpriv.secure.log import Answered, Record, RunLog
from fedpriv.secure.masks import Words, add_mask
from fedpriv.secure.messages import Answer, HelperKey, Query, Sealed
from fedpriv.secure.sealing import open_seed

__all__ = ["Helper"]

LOCK_FILE = "lock"


@dataclass(frozen=True)
class Helper:
    """A helper with a folder for its records.

    Processes and threads may share the folder: one query at a time is answered. The folder keeps all answers of a run,
    four bytes for each coordinate and round, until `erase`.

    Args:
        folder: Folder of the records; it must never be restored from a backup (`fedpriv.secure.log`).
        identity: The key that clients pin.
        enrolled: Public Ed25519 keys of the clients, from the helper's own files: a list from the server could hold
            puppets, and a sum over one client and puppets reveals that client.
        min_clients: Least number of clients in a sum, in addition to the number that the clients signed.

    Raises:
        UserError: If a key is invalid or enrolled twice, or if `min_clients` is below 2.
    """

    folder: Path
    identity: Ed25519PrivateKey
    enrolled: Mapping[int, bytes]
    min_clients: int

    def __post_init__(self) -> None:
        if self.min_clients < 2:
            raise UserError("min_clients", "at least 2", self.min_clients, "Change min_clients")
        object.__setattr__(self, "enrolled", dict(self.enrolled))
        owners: dict[bytes, int] = {}
        for client, key in self.enrolled.items():
            try:
                Ed25519PublicKey.from_public_bytes(key)
            except ValueError:
                remedy = "Correct the list of clients"
                raise UserError(f"key of client {client}", "an Ed25519 key", key.hex(), remedy) from None
            if owners.setdefault(key, client) != client:
                got, remedy = f"the key of client {owners[key]}", "Remove one of the two"
                raise UserError(f"key of client {client}", "a key that no other client has", got, remedy)

    def key(self, run: str) -> HelperKey:
        """Return this helper's key for a run, signed; the first call makes it, and it is on disk when this returns.

        If the records of a run are lost, a new key is made. Messages that were sealed for the lost one are void.

        Raises:
            UserError: If the record is damaged, or the disk is full.
        """
        make_private_folder(self.folder)
        with only_one(self.folder / LOCK_FILE):
            log = RunLog(self.folder, run)
            record = log.read()
            if record is None:
                record = Record(run, X25519PrivateKey.generate().private_bytes_raw())
                log.write(record)
        return HelperKey.signed(run, record.key.public_key().public_bytes_raw(), self.identity)

    def answer(self, query: Query) -> Answer:
        """Return the sum of the masks of a query's clients; the answer is recorded on disk when this returns.

        The same query gets the same stored answer. Another query about an answered round is refused, even one about the
        same clients. A refused query leaves no trace, so a server may ask again without a client that is at fault.

        Raises:
            UserError: If the query is refused, or the disk is full.
        """
        make_private_folder(self.folder)
        with only_one(self.folder / LOCK_FILE):
            log = RunLog(self.folder, query.facts.run)
            record = log.read()
            if record is None:
                expected, got = "a run with a key at this helper", "a run that is unknown, lost or erased"
                raise UserError(f"run {query.facts.run!r}", expected, got, "Start a new run, with a new key")
            answered = record.answered.get(query.facts.round)
            if answered is not None:
                if answered.query != query.digest:
                    where, got = f"query about round {query.facts.round}", "a different query"
                    raise UserError(
                        where, "the query that was answered", got, "A round is answered once: start another"
                    )
                return Answer.from_bytes(log.kept_answer(query.facts.round, answered.answer))
            self._check(query, record)
            answer = Answer.signed(query, self._masks(query, record.key), self.identity)
            content = answer.to_bytes()
            log.keep_answer(query.facts.round, content)
            log.write(record.with_answer(query.facts.round, Answered(query.digest, hashlib.sha256(content).digest())))
        return answer

    def erase(self, run: str) -> None:
        """Delete key and records of a run that has ended. Nothing that was sealed for it can be opened any more."""
        make_private_folder(self.folder)
        with only_one(self.folder / LOCK_FILE):
            RunLog(self.folder, run).erase()

    def _check(self, query: Query, record: Record) -> None:
        """Raise UserError unless the clients of a query are enough, distinct, enrolled, and signed these facts."""
        where = f"query about round {query.facts.round}"
        own = (self.identity.public_key().public_bytes_raw(), record.key.public_key().public_bytes_raw())
        if (query.identity, query.key) != own:
            raise UserError(
                where, "this helper's key for the run", f"the key {query.key.hex()[:16]}", "Use the key that it shows"
            )
        least = max(self.min_clients, query.facts.least_survivors)
        if len(query.members) < least:
            raise UserError(where, f"at least {least} clients", len(query.members), "The round is void: start another")
        clients = [member.client for member in query.members]
        if any(later <= earlier for earlier, later in pairwise(clients)):
            raise UserError(where, "distinct clients in ascending order", clients, "Name each client once, in order")
        for member in query.members:
            public = self.enrolled.get(member.client)
            if public is None:
                raise UserError(where, "enrolled clients", f"client {member.client}", "Enroll the client here first")
            sealed = Sealed(identity=query.identity, key=query.key, box=member.box, signature=member.signature)
            if not sealed.is_signed_by(public, query.facts, member.client):
                expected, got = (
                    "each client's signature of its seed and the facts",
                    f"a wrong one for client {member.client}",
                )
                raise UserError(where, expected, got, "Ask without this client, or have it enroll its key")

    def _masks(self, query: Query, private: X25519PrivateKey) -> Words:
        facts = query.facts
        words = np.zeros(facts.size, dtype=np.uint32)
        for member in query.members:
            seed = open_seed(member.box, private, facts.context(member.client, query.identity, query.key))
            if seed is None:
                where, got = f"query about round {facts.round}", f"a wrong one for client {member.client}"
                raise UserError(where, "a sealed seed of these facts", got, "Ask without this client")
            add_mask(words, seed, run=facts.run, round=facts.round, client=member.client, helper=query.identity)
        return words

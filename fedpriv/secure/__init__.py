"""Secure aggregation with helpers: the server learns the sum of a round's messages, and no single message.

The protocol of `trust = "aggregator"`, without a network. Each client sends one message, and dropouts cost nothing:

1. A helper makes a key for the run and signs it with its identity key, which clients pin (`Helper.key`).
2. A client adds to its noised integers one mask for each helper, modulo 2^32. It seals the seed of each mask for its
   helper, and signs each sealed seed together with the facts of the round (`mask_message`). The server gets `Masked`.
3. The server adds up the masked vectors of the clients that answered, U, and fixes U (`Collector`). It sends the sealed
   seeds of U to the helpers (`Query`).
4. A helper checks U and all signatures, records its answer durably, and returns the sum of the masks (`Answer`).
5. The server subtracts the answers. The sum of the noised integers is left (`Closed.total`).

Each masked vector is uniform to everyone who lacks the seed of one helper. An honest helper reveals one sum for each
round, over at least its minimum of enrolled clients. So one honest helper suffices: the server and all other
helpers learn the sum over U only. If two helpers are asked about different U, the result stays masked.

Without the signatures, the server could seal seeds that it made itself under the names of all clients but one, and so
isolate that client. Without the durable record, it could ask about U, then about U without one client.

The package imports numpy and `cryptography` only.
"""

from fedpriv.secure.client import mask_message
from fedpriv.secure.helper import Helper
from fedpriv.secure.messages import Answer, HelperKey, Masked, Query, RoundFacts, Sealed
from fedpriv.secure.server import Closed, Collector, VoidRoundError

__all__ = [
    "Answer",
    "Closed",
    "Collector",
    "Helper",
    "HelperKey",
    "Masked",
    "Query",
    "RoundFacts",
    "Sealed",
    "VoidRoundError",
    "mask_message",
]

"""Client's half: mask a noised vector of integers."""

import os
from collections.abc import Callable, Collection, Sequence

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from fedpriv.errors import UserError
from fedpriv.secure.masks import SEED_BYTES, add_mask
from fedpriv.secure.messages import HelperKey, Masked, RoundFacts, Sealed, require_pinned, signed_bytes
from fedpriv.secure.sealing import seal_seed

__all__ = ["mask_message"]


def mask_message(
    values: NDArray[np.int64],
    facts: RoundFacts,
    client: int,
    signer: Ed25519PrivateKey,
    helpers: Sequence[HelperKey],
    pinned: Collection[bytes],
    random: Callable[[int], bytes] = os.urandom,
) -> Masked:
    """Return a client's message for a round.

    The caller has checked the facts against its policy. It stores the bytes of the message before it sends them, and
    resends only them: a second call is a second release, and needs fresh noise and another round.

    Args:
        values: Rounded message plus noise in units of the grid, `[size]`. Only the sum over clients has to fit into 32
            bits.
        facts: Facts of the round.
        client: Number of the client.
        signer: Key of the client; helpers have its public half in their lists.
        helpers: Keys of the helpers for the run, as the server shows them.
        pinned: Public identity keys of all helpers, from the client's own policy: the server may leave none of them
            out.
        random: Source of seeds and ephemeral keys; any source other than the operating system is for tests.

    Raises:
        UserError: If the vector has another shape or type, or if the helpers are not the pinned ones.
    """
    if values.dtype != np.int64 or values.shape != (facts.size,):
        got = f"{values.dtype} {list(values.shape)}"
        raise UserError("values", f"int64 [{facts.size}]", got, "Round the message to the grid first")
    require_pinned(helpers, pinned, facts.run)
    words = (values & 0xFFFFFFFF).astype(np.uint32)
    sealed: list[Sealed] = []
    for helper in sorted(helpers, key=lambda helper: helper.identity):
        seed = random(SEED_BYTES)
        add_mask(words, seed, run=facts.run, round=facts.round, client=client, helper=helper.identity)
        context = facts.context(client, helper.identity, helper.key)
        box = seal_seed(seed, helper.key, context, random)
        signature = signer.sign(signed_bytes(box, context))
        sealed.append(Sealed(identity=helper.identity, key=helper.key, box=box, signature=signature))
    return Masked(facts=facts, client=client, words=words, sealed=tuple(sealed))

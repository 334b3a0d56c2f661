"""Sealed seeds: readable by one helper only, and bound to the facts of one client's message.

An ephemeral X25519 key and the helper's key for the run give a shared secret. HKDF-SHA256 derives the key of a
ChaCha20-Poly1305 box from it, with both public keys in its input. A key seals one seed, so the nonce is zero. The
associated data are the client's facts: under other facts, the box does not open.

A box does not authenticate its sender. The client's signature does (`fedpriv.secure.messages.Sealed`).
"""

import os
from collections.abc import Callable

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedpriv.errors import UserError
from fedpriv.secure.masks import SEED_BYTES
from fedpriv.secure.wire import pack

__all__ = ["BOX_BYTES", "open_seed", "seal_seed"]

BOX_BYTES = 32 + SEED_BYTES + 16
"""Ephemeral public key, encrypted seed, tag."""

_NONCE = bytes(12)


def seal_seed(seed: bytes, key: bytes, context: bytes, random: Callable[[int], bytes] = os.urandom) -> bytes:
    """Return a seed sealed for a helper, `BOX_BYTES` bytes.

    Args:
        seed: The seed.
        key: Public X25519 key of the helper.
        context: The facts that the box is bound to.
        random: Source of the ephemeral key.

    Raises:
        UserError: If `key` is not a usable public key.
    """
    ephemeral = X25519PrivateKey.from_private_bytes(random(32))
    public = ephemeral.public_key().public_bytes_raw()
    try:
        shared = ephemeral.exchange(X25519PublicKey.from_public_bytes(key))
    except ValueError:
        raise UserError("helper's key", "an X25519 key", key.hex(), "Remove this helper") from None
    return public + _box(shared, public, key).encrypt(_NONCE, seed, context)


def open_seed(box: bytes, private: X25519PrivateKey, context: bytes) -> bytes | None:
    """Return the seed in a box; None if it was not sealed for this key under these facts.

    Args:
        box: The sender's one-time public key, 32 bytes, and the encrypted seed.
        private: The helper's private key for the run.
        context: See `RoundFacts.context`.
    """
    public = box[:32]
    try:
        shared = private.exchange(X25519PublicKey.from_public_bytes(public))
        seed = _box(shared, public, private.public_key().public_bytes_raw()).decrypt(_NONCE, box[32:], context)
    except (ValueError, InvalidTag):
        return None
    return seed if len(seed) == SEED_BYTES else None


def _box(shared: bytes, ephemeral: bytes, key: bytes) -> ChaCha20Poly1305:
    info = pack("box", ephemeral, key)
    return ChaCha20Poly1305(HKDF(algorithm=SHA256(), length=32, salt=None, info=info).derive(shared))

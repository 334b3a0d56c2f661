"""Masks: uniform 32-bit integers from a seed, the same for the client that draws it and the helper that gets it.

A mask is the keystream of AES-256 in counter mode, from a counter of zero, read as little-endian 32-bit integers. Its
key is HKDF-SHA256(seed, info). `info` holds the run, the round, the client and the helper. A key is therefore used
for one mask only, even if a seed were drawn twice.
"""

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from fedpriv.secure.wire import pack

__all__ = ["SEED_BYTES", "Words", "add_mask", "words_from", "words_to_bytes"]

SEED_BYTES = 32

Words = NDArray[np.uint32]
"""Integers modulo 2^32, `[size]`."""

_BLOCK = 2**16  # integers; bounds the memory of any mask
_ZEROS = bytes(4 * _BLOCK)


def add_mask(total: Words, seed: bytes, *, run: str, round: int, client: int, helper: bytes) -> None:
    """Add the mask of a seed to `total` in place, modulo 2^32.

    Args:
        total: The integers, `[size]`.
        seed: The seed, 32 bytes.
        run: The run.
        round: The round.
        client: The client that drew the seed.
        helper: Public identity key of the helper that gets the seed.
    """
    info = pack("mask", run, round, client, helper)
    key = HKDF(algorithm=SHA256(), length=32, salt=None, info=info).derive(seed)
    encryptor = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()
    stream = bytearray(4 * min(_BLOCK, len(total)) + 15)
    for start in range(0, len(total), _BLOCK):
        part = total[start : start + _BLOCK]
        encryptor.update_into(memoryview(_ZEROS)[: 4 * len(part)], stream)
        part += np.frombuffer(stream, dtype="<u4", count=len(part))


def words_to_bytes(words: Words) -> memoryview:
    """Return integers modulo 2^32 as little-endian bytes."""
    return np.ascontiguousarray(words, dtype="<u4").data.cast("B")


def words_from(content: memoryview) -> Words:
    """Return the integers of `words_to_bytes`; the array is read-only if the bytes are."""
    return np.frombuffer(content, dtype="<u4").astype(np.uint32, copy=False)

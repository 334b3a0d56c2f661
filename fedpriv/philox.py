"""The words of numpy's Philox generator in C, for streams that are made by the thousand; the same words as numpy's."""

import ctypes
from functools import cache
from pathlib import Path

import numpy as np

from fedpriv.native import address_of, native_library

__all__ = ["PhiloxInC", "philox_in_c"]

_SOURCE = Path(__file__).with_name("philox.c")
_POOL = 4  # SeedSequence pads its entropy to this many numbers.


class PhiloxInC:
    """The functions of `philox.c`.

    Args:
        library: The compiled file.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._key, self._words = library.philox_key, library.philox_words
        self.address = ctypes.cast(library.philox_words, ctypes.c_void_p).value
        """Address of the C function that writes words, for other C functions."""

    def key(self, entropy: int, address: tuple[int, ...]) -> tuple[int, int]:
        """Return the key of `numpy.random.Philox(SeedSequence(entropy, spawn_key=address))`.

        Args:
            entropy: At least 0.
            address: At least one number, each at least 0.
        """
        numbers = _words_of(entropy)
        numbers += [0] * (_POOL - len(numbers))
        for part in address:
            numbers += _words_of(part)
        key = (ctypes.c_uint64 * 2)()
        self._key((ctypes.c_uint32 * len(numbers))(*numbers), len(numbers), key)
        return key[0], key[1]

    def words(self, key: tuple[int, int], position: int, size: int) -> np.ndarray:
        """Return `size` words from number `position` on, uint64 `[size]`."""
        words = np.empty(size, dtype=np.uint64)
        self._words(*key, position, size, address_of(words))
        return words


def _words_of(number: int) -> list[int]:
    """Return the digits of a number to base 2^32, the lowest first; one digit at least."""
    if number < 0:
        raise ValueError("expected non-negative integer")
    digits = [number & 0xFFFFFFFF]
    while number := number >> 32:
        digits.append(number & 0xFFFFFFFF)
    return digits


def _declare(library: ctypes.CDLL) -> None:
    address, word = ctypes.c_void_p, ctypes.c_uint64
    library.philox_key.argtypes = [address, ctypes.c_size_t, address]
    library.philox_words.argtypes = [word, word, word, ctypes.c_size_t, address]
    library.philox_key.restype = library.philox_words.restype = None


@cache
def philox_in_c() -> PhiloxInC | None:
    """Return the C form; None if there is no compiler, or if it and numpy disagree on this machine."""
    library = native_library(_SOURCE, _declare)
    if library is None:
        return None
    in_c = PhiloxInC(library)
    for entropy, address in ((0, (0,)), (2**255 + 7, (3, 2**40, 5))):
        raw = np.random.Philox(np.random.SeedSequence(entropy, spawn_key=address)).random_raw(64)
        key = in_c.key(entropy, address)
        if not all(np.array_equal(in_c.words(key, start, 64 - start), raw[start:]) for start in range(5)):
            return None
    return in_c

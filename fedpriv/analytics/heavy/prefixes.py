"""Words as numbers: the prefixes of a tree in an alphabet of fixed size.

A word has the letters a to z and the apostrophe, and ends with the symbol 0, written `$`. A prefix of length l is its
first l symbols, padded with 0 after the end: the number sum_j symbol_j 28^(l - j). So a prefix that ends with 0 is a
whole word, and every longer prefix of the word is that one with more zeros.
"""

from collections.abc import Sequence

import numpy as np

from fedpriv.data.text.words import LETTERS, WORD_LENGTH

__all__ = [
    "ALPHABET",
    "END",
    "MAX_LENGTH",
    "SYMBOLS",
    "children",
    "encoded",
    "is_whole",
    "of_length",
    "read",
    "written",
]

END = "$"
ALPHABET = LETTERS
"""The letters, with the symbols 1 to 27."""

SYMBOLS = len(ALPHABET) + 1
MAX_LENGTH = WORD_LENGTH
"""The largest length for which numbers fit an int64."""

_SYMBOL_OF = {letter: number for number, letter in enumerate(END + ALPHABET)}


def encoded(symbols: np.ndarray) -> np.ndarray:
    """Return the numbers of words of length l, int64 `[words]`, from their symbols `[words, l]`."""
    found = np.zeros(len(symbols), dtype=np.int64)
    for column in symbols.T:
        found = found * SYMBOLS + column.astype(np.int64)
    return found


def of_length(items: np.ndarray, whole: int, length: int) -> np.ndarray:
    """Return the prefixes of some length of items that are prefixes of the length `whole`, int64 `[items]`."""
    return items // SYMBOLS ** (whole - length)


def is_whole(prefixes: np.ndarray) -> np.ndarray:
    """Return True for the prefixes that are whole words, bool `[prefixes]`."""
    return prefixes % SYMBOLS == 0


def children(prefixes: np.ndarray, letters: int) -> np.ndarray:
    """Return all prefixes that are longer by some letters, ascending; one for each whole word.

    Args:
        prefixes: Different prefixes of one length, int64 `[prefixes]`.
        letters: Number of further letters.
    """
    for _ in range(letters):
        ended = prefixes[is_whole(prefixes)] * SYMBOLS
        grown = (prefixes[~is_whole(prefixes)][:, None] * SYMBOLS + np.arange(SYMBOLS)).ravel()
        prefixes = np.sort(np.concatenate([ended, grown]))
    return prefixes


def written(prefix: int, length: int) -> str:
    """Return a prefix of some length as letters; a whole word ends with `$`."""
    symbols: list[int] = []
    for _ in range(length):
        prefix, symbol = divmod(prefix, SYMBOLS)
        symbols.insert(0, symbol)
    letters = "".join((END + ALPHABET)[symbol] for symbol in symbols)
    stem = letters.rstrip(END)
    return stem if len(stem) == length else stem + END


def read(prefixes: Sequence[str], length: int) -> np.ndarray:
    """Return the numbers of prefixes of one length, int64 `[prefixes]`; see `written`.

    Raises:
        ValueError: If a prefix has another length or other characters.
    """
    found: list[int] = []
    for prefix in prefixes:
        stem = prefix.removesuffix(END)
        if not set(stem) <= set(ALPHABET) or not stem or len(stem) > length or (len(stem) < length) != (stem != prefix):
            raise ValueError(prefix)
        number = 0
        for letter in stem.ljust(length, END):
            number = number * SYMBOLS + _SYMBOL_OF[letter]
        found.append(number)
    return np.array(found, dtype=np.int64)

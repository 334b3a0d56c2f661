"""The client step in C, compiled once on the user's machine; without a C compiler, torch does the step.

The step reads a signal and a memory and writes the memory and the sum. Memory bandwidth limits its speed, so that every
further pass of a tensor library adds the same cost again. The file `feedback.c` makes two passes.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from torch import Tensor

from fedpriv.feedback import Feedback
from fedpriv.native import native_library

__all__ = ["FeedbackInC", "feedback_in_c"]


class _RoundParameters(ctypes.Structure):
    """`struct round_parameters` of `feedback.c`."""

    _fields_ = (
        ("sum", ctypes.c_void_p),
        ("size", ctypes.c_size_t),
        ("map", ctypes.c_double * 4),
        ("shift", ctypes.c_double),
        ("forget", ctypes.c_float),
        ("beta", ctypes.c_float),
        ("round", ctypes.c_float),
    )


class FeedbackInC:
    """The functions of `feedback.c` for the clients of one round; vectors are addresses of float32 `[params]`.

    Args:
        library: The compiled file.
        total: The sum of the round's messages, float64 `[params]`, which must live as long as this.
        rule: The clients' rule.
        shift: See `ExactSum.shift`.
        round: The round's number.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        total: Tensor,
        rule: Feedback,
        shift: float,
        round: int,
    ) -> None:
        self._parameters = _RoundParameters(
            total.data_ptr(),
            total.numel(),
            (ctypes.c_double * 4)(*rule.bounded.coefficients),
            shift,
            1.0 - rule.damping,
            rule.beta or 0.0,
            round,
        )
        self._round = ctypes.addressof(self._parameters)
        self._feed_back, self._add_bounded = library.feed_back, library.add_bounded
        self._feed_back_rows, self._add_bounded_rows = library.feed_back_rows, library.add_bounded_rows
        self._bound_rows, self._add_sent_rows = library.bound_rows, library.add_sent_rows

    def feed_back(self, signal: int, memory: int, updated: int, following: int) -> float:
        """Add the message B(signal - kept memory) to the sum and update `memory` in place.

        Args:
            signal: Address of the signal.
            memory: Address of the client's memory.
            updated: Address of the round of the memory's last change, which becomes this round; 0 for none.
            following: Address of the next client's memory, which is prefetched; or this client's.

        Returns:
            The signal's norm; -1 if the residual's norm is not a normal number, and nothing is changed then.
        """
        return self._feed_back(self._round, signal, memory, updated, following)

    def add_bounded(self, signal: int) -> float:
        """Add B(signal) to the sum; see `feed_back` for the returned value."""
        return self._add_bounded(self._round, signal)

    def add_bounded_rows(self, signals: int, count: int) -> list[float]:
        """Do the same for `count` signals, the rows of a contiguous matrix, and return their norms."""
        norms = (ctypes.c_double * count)()
        self._add_bounded_rows(self._round, signals, count, norms)
        return list(norms)

    def feed_back_rows(self, signals: int, memories: Sequence[int], updated: Sequence[int]) -> list[float]:
        """Do the same as `feed_back` for several signals, the rows of a contiguous matrix, and return their norms.

        Args:
            signals: Address of the matrix.
            memories: Addresses of the clients' memories, each another.
            updated: See `feed_back`; empty for none.
        """
        count = len(memories)
        norms = (ctypes.c_double * count)()
        self._feed_back_rows(self._round, signals, count, _places(memories), _places(updated), norms)
        return list(norms)

    def bound_rows(self, signals: int, count: int, memories: Sequence[int], updated: Sequence[int]) -> list[float]:
        """Turn signals into the messages B(signal - kept memory) in place, and return the signals' norms.

        Args:
            signals: Address of a contiguous matrix of `count` rows.
            count: Its rows.
            memories: See `feed_back_rows`; empty for none.
            updated: See `feed_back_rows`.

        Returns:
            The norms; -1 for a row that is left as it is, as in `feed_back`.
        """
        norms = (ctypes.c_double * count)()
        self._bound_rows(self._round, signals, count, _places(memories), _places(updated), norms)
        return list(norms)

    def add_sent_rows(
        self, sent: int, remembered: int, count: int, memories: Sequence[int], updated: Sequence[int]
    ) -> None:
        """Add the rows of `sent` to the sum, and update memories by the rows of `remembered`; see `bound_rows`."""
        self._add_sent_rows(self._round, sent, remembered, count, _places(memories), _places(updated))


def _places(addresses: Sequence[int]) -> "ctypes.Array[ctypes.c_void_p] | None":
    return (ctypes.c_void_p * len(addresses))(*addresses) if addresses else None


def _declare(library: ctypes.CDLL) -> None:
    address = ctypes.c_void_p
    library.feed_back.argtypes = [address] * 5
    library.add_bounded.argtypes = [address, address]
    library.add_bounded_rows.argtypes = [address, address, ctypes.c_size_t, address]
    library.feed_back_rows.argtypes = [address, address, ctypes.c_size_t, address, address, address]
    library.bound_rows.argtypes = [address, address, ctypes.c_size_t, address, address, address]
    library.add_sent_rows.argtypes = [address, address, address, ctypes.c_size_t, address, address]
    library.feed_back_rows.restype = library.add_bounded_rows.restype = None
    library.bound_rows.restype = library.add_sent_rows.restype = None
    library.feed_back.restype = library.add_bounded.restype = ctypes.c_double


@cache
def feedback_in_c() -> ctypes.CDLL | None:
    """Return the compiled step; None without a compiler, or if FEDPRIV_NATIVE is 0."""
    return native_library(Path(__file__).with_name("feedback.c"), _declare)

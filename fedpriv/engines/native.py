"""The client step in C, compiled once on the user's machine where there is a C compiler; else torch does it.

The step reads a signal and a memory and writes the memory and the sum. At full speed that is limited by the machine's
memory, and every further pass of a tensor library costs as much again; the file `feedback.c` makes two.
"""

import ctypes
from functools import cache
from pathlib import Path

from torch import Tensor

from fedpriv.feedback import Feedback
from fedpriv.native import native_library

__all__ = ["FeedbackInC", "feedback_in_c"]


class _Figures(ctypes.Structure):
    """`struct round_figures` of `feedback.c`."""

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
    """The functions of `feedback.c`, for the clients of one round; vectors are given by address, float32 `[params]`.

    Args:
        library: The compiled file.
        total: The sum of the round's messages, float64 `[params]`, which must live as long as this.
        rule: What clients do.
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
        self._figures = _Figures(
            total.data_ptr(),
            total.numel(),
            (ctypes.c_double * 4)(*rule.bounded.coefficients),
            shift,
            1.0 - rule.damping,
            rule.beta or 0.0,
            round,
        )
        self._round = ctypes.addressof(self._figures)
        self._feed_back, self._add_bounded = library.feed_back, library.add_bounded

    def feed_back(self, signal: int, memory: int, updated: int, following: int) -> float:
        """Adds the message B(signal - kept memory) to the sum and moves `memory` in place.

        Args:
            signal: Address of the signal.
            memory: Address of the client's memory.
            updated: Address of the round after which the memory was so, which becomes this one; 0 for none.
            following: Address of the next client's memory, which is fetched meanwhile; or this one's.

        Returns:
            The signal's norm; -1, and nothing is done, if the residual's is no ordinary number.
        """
        return self._feed_back(self._round, signal, memory, updated, following)

    def add_bounded(self, signal: int) -> float:
        """Adds B(signal) to the sum; returns as `feed_back` does."""
        return self._add_bounded(self._round, signal)


def _declare(library: ctypes.CDLL) -> None:
    address = ctypes.c_void_p
    library.feed_back.argtypes = [address] * 5
    library.add_bounded.argtypes = [address, address]
    library.feed_back.restype = library.add_bounded.restype = ctypes.c_double


@cache
def feedback_in_c() -> ctypes.CDLL | None:
    """The compiled step; None without a compiler, or where FEDPRIV_NATIVE is 0."""
    return native_library(Path(__file__).with_name("feedback.c"), _declare)

"""The engine with Ray actors as workers."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar

__all__ = ["KEPT", "one_ray"]

KEPT: ContextVar[ExitStack | None] = ContextVar("KEPT", default=None)
"""Closes, at its end, the connection that the current context keeps; None outside of `one_ray`."""


@contextmanager
def one_ray() -> Iterator[None]:
    """Start or join Ray at most once within the context, for all engines there, and end it with the context.

    Starts nothing itself, and imports no Ray: the first engine that uses Ray does.
    """
    with ExitStack() as stack:
        token = KEPT.set(stack)
        try:
            yield
        finally:
            KEPT.reset(token)

"""The interface of callbacks that watch a run and may stop it."""

from collections.abc import Callable

from fedpriv.tables import Record

__all__ = ["StopRun", "Watcher"]

# Called with the released row and the diagnostics row of every recorded round. May raise `StopRun`.
Watcher = Callable[[Record, Record], None]


class StopRun(Exception):  # noqa: N818
    """Raise this in a watcher to save and end the run after this round. Resuming gives bit-identical results."""

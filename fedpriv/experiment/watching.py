"""Who looks on while an experiment runs, and may stop it."""

from collections.abc import Callable
from typing import Any

__all__ = ["StopRun", "Watcher"]

# Sees every recorded round as it happens: the released row and the diagnostics row. It may raise `StopRun`.
Watcher = Callable[[dict[str, Any], dict[str, Any]], None]


class StopRun(Exception):  # noqa: N818
    """Raised by a watcher: the run ends after this round, saved, and can be gone on with to the same bits."""

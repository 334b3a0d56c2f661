"""How long a round lasts: until its last answer, or always equally long, so that its length shows no secret cohort."""

import logging
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

from flwr.app import Message
from flwr.serverapp import Grid

from fedpriv.errors import UserError

__all__ = ["Pace"]

_log = logging.getLogger("flwr")

# At a round's end, for what begins when its answers are there: Flower's grid looks for them every 3 s, and adding up.
_ENDING_SHARE, _ENDING_SECONDS = 0.05, 5.0
_LEAST_SECONDS = 10.0


@dataclass
class Pace:
    """The length of a run's rounds, each of which is between `begin` and `end`.

    Args:
        seconds: How long each of them lasts; None for as long as answers take.
    """

    seconds: float | None
    _began: float = -math.inf

    def __post_init__(self) -> None:
        if self.seconds is not None and not _LEAST_SECONDS <= self.seconds < 1e9:
            remedy = "Give what the slowest client needs and some seconds, or leave it out"
            raise UserError("round_seconds", f"seconds from {_LEAST_SECONDS:g}", self.seconds, remedy)

    @property
    def window(self) -> float:
        """Seconds from a round's beginning until answers count no more; infinite where nothing is fixed."""
        return math.inf if self.seconds is None else self.seconds * (1.0 - _ENDING_SHARE) - _ENDING_SECONDS

    @property
    def ttl(self) -> float | None:
        """Seconds after which nobody works on a message any more; None for Flower's own choice."""
        return None if self.seconds is None else self.window

    def begin(self) -> None:
        """Takes note that a round begins."""
        self._began = time.monotonic()

    def end(self) -> None:
        """Waits until the round has lasted as long as every other."""
        if self.seconds is None:
            return
        left = self._began + self.seconds - time.monotonic()
        if left < 0.0:
            _log.warning(
                "a round took %.1f s more than round_seconds = %g, and may show who took part: give more seconds",
                -left,
                self.seconds,
            )
        time.sleep(max(left, 0.0))

    def on(self, grid: Grid) -> Grid:
        """Return the grid, which waits for answers no longer than the window of the round that has begun."""
        return grid if self.seconds is None else cast(Grid, _WindowedGrid(grid, self))

    def left(self) -> float:
        """Return the seconds that are left of the window; 0 if none are."""
        return max(self._began + self.window - time.monotonic(), 0.0)


class _WindowedGrid:
    """A grid that waits for answers until a window closes; in all else it is the grid that it was made of."""

    def __init__(self, grid: Grid, pace: Pace) -> None:
        self._grid = grid
        self._pace = pace

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """See `flwr.serverapp.Grid`."""
        asked = list(messages)  # before the time is taken: a strategy begins its round as it makes them
        left = self._pace.left()
        return self._grid.send_and_receive(asked, timeout=left if timeout is None else min(timeout, left))

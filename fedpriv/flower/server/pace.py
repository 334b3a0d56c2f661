"""Duration of rounds: until the last answer, or always the same, so that it does not reveal a secret cohort."""

import logging
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

from flwr.app import Message
from flwr.serverapp import Grid

from fedpriv.errors import UserError

__all__ = ["Pace"]

_log = logging.getLogger("flwr")

# Reserved at the end of a round: Flower's grid polls for answers every 3 s, and their sum takes time.
_ENDING_SHARE, _ENDING_SECONDS = 0.05, 5.0
_MIN_SECONDS = 10.0


@dataclass
class Pace:
    """Duration of a run's rounds. A round starts with `begin` and ends with `end`.

    Args:
        seconds: Duration of every round; None if a round ends with its last answer.
    """

    seconds: float | None
    _began: float = -math.inf

    def __post_init__(self) -> None:
        if self.seconds is not None and not _MIN_SECONDS <= self.seconds < 1e9:
            remedy = "Set it to a few seconds more than the slowest client needs, or remove it"
            raise UserError("round_seconds", f"seconds from {_MIN_SECONDS:g} to 1e9", self.seconds, remedy)

    @property
    def window(self) -> float:
        """Seconds from the beginning of a round until answers no longer count; infinite without a fixed duration."""
        return math.inf if self.seconds is None else self.seconds * (1.0 - _ENDING_SHARE) - _ENDING_SECONDS

    @property
    def ttl(self) -> float | None:
        """Seconds after which a message expires; None for Flower's default."""
        return None if self.seconds is None else self.window

    def begin(self) -> None:
        """Record the beginning of a round."""
        self._began = time.monotonic()

    def end(self) -> None:
        """Wait until the fixed duration of the round is over."""
        if self.seconds is None:
            return
        left = self._began + self.seconds - time.monotonic()
        if left < 0.0:
            _log.warning(
                "a round took %.1f s more than round_seconds = %g, which may reveal who took part: increase it",
                -left,
                self.seconds,
            )
        time.sleep(max(left, 0.0))

    def on(self, grid: Grid) -> Grid:
        """Return a grid that waits for answers at most until the window of the current round closes."""
        return grid if self.seconds is None else cast(Grid, _WindowedGrid(grid, self))

    def left(self) -> float:
        """Return the remaining seconds of the window, at least 0."""
        return max(self._began + self.window - time.monotonic(), 0.0)


class _WindowedGrid:
    """Wrapper of a grid that waits for answers at most until a window closes."""

    def __init__(self, grid: Grid, pace: Pace) -> None:
        self._grid = grid
        self._pace = pace

    def __getattr__(self, name: str) -> object:
        return getattr(self._grid, name)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send messages and return their answers; see `flwr.serverapp.Grid`."""
        asked = list(messages)  # before reading the clock: a strategy begins its round while it creates them
        left = self._pace.left()
        return self._grid.send_and_receive(asked, timeout=left if timeout is None else min(timeout, left))

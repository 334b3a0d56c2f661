"""A live table of a sweep: running trials, progress, failures, early stops, and the time left."""

import time
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedpriv.sweeps.run import SweepState

__all__ = ["SweepTable"]

# Maximum number of running trials in the table.
_SHOWN = 12
# Maximum number of lines about the best settings.
_LEADERS = 3
# Seconds between two lines of progress, if the output is a file instead of a terminal.
_PAUSE = 30.0


class SweepTable:
    """A table of a sweep on stderr, or from time to time a line in a file; call it with the sweep's state."""

    def __init__(self) -> None:
        self._live = Live(console=Console(stderr=True), refresh_per_second=2, transient=False)
        self._started = False
        self._wrote_at = time.monotonic()

    def __enter__(self) -> "SweepTable":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._started:
            self._live.stop()
            if not self._live.console.is_terminal:
                self._live.console.print()  # start later output on a new line

    def __call__(self, state: SweepState) -> None:
        """Show the progress. Nothing is shown before the first call, so an early error is the only output."""
        if not self._started:
            self._live.start()
            self._started = True
        self._live.update(self._render(state))
        now = time.monotonic()
        if not self._live.console.is_terminal and now - self._wrote_at >= _PAUSE:
            self._live.console.print(_progress(state))
            for best in state.best[:_LEADERS]:
                self._live.console.print(Text(f"best so far: {best}"))
            self._wrote_at = now

    def _render(self, state: SweepState) -> Group:
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        for name, label in list(state.running.items())[:_SHOWN]:
            table.add_row(Text(name), Text(label))
        bar = Table.grid()
        bar.add_row(ProgressBar(total=max(state.total, 1), completed=state.ended, width=40))
        return Group(bar, _progress(state), *(Text(f"best so far: {best}") for best in state.best[:_LEADERS]), table)


def _progress(state: SweepState) -> Text:
    left = state.seconds_left
    time_left = "" if left is None or state.ended == state.total else f", {_duration(left)} left"
    stopped = f", {state.stopped} stopped early" if state.stopped else ""
    counts = f"{state.done} done, {state.failed} failed{stopped}{time_left}"
    return Text(f"{state.ended} of {state.total} trials: {counts}")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"

"""A progress bar for a run: round, loss, accuracy, epsilon spent, clients per second, time left; and warnings."""

import math
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fedpriv.experiment.learned import Complaints
from fedpriv.privacy import rounded_up
from fedpriv.tables import Record

__all__ = ["RoundProgress", "pace"]


def pace(clients_per_second: float) -> str:
    """Return a speed as text: clients per second, or the seconds of a client if that is slow; empty for no client."""
    if clients_per_second <= 0.0:
        return ""
    slow = clients_per_second < 1.0
    number = 1.0 / clients_per_second if slow else clients_per_second
    return f"{number:.{0 if number >= 10.0 else 1}f} {'s/client' if slow else 'clients/s'}"


class RoundProgress:
    """A progress bar on stderr; call it with the two rows of every recorded round.

    Args:
        rounds: Total number of rounds.
    """

    def __init__(self, rounds: int) -> None:
        self._progress = Progress(
            BarColumn(bar_width=5),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TextColumn("left"),
            TimeRemainingColumn(compact=True),
            console=Console(stderr=True),
        )
        self._task = self._progress.add_task("", total=rounds)
        self._latest: Record = {}
        self._complaints = Complaints()

    def __enter__(self) -> "RoundProgress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress.live.is_started:
            self._progress.stop()

    def __call__(self, released: Record, diagnostics: Record) -> None:
        """Show one recorded round. Nothing is shown before the first, so an early error is the only output."""
        self._progress.start()
        complaint = self._complaints(diagnostics)
        if complaint:
            whole = not self._progress.console.is_terminal  # terminals break lines within words
            self._progress.console.print(f"warning     {complaint}", style="yellow", highlight=False, soft_wrap=whole)
        self._latest |= {key: value for key, value in {**diagnostics, **released}.items() if value is not None}
        self._progress.update(self._task, completed=released["round"], description=self._description())

    def _description(self) -> str:
        shown = dict(self._latest)
        if math.isfinite(shown.get("epsilon", math.inf)):
            shown["epsilon"] = rounded_up(shown["epsilon"])
        scores = (key for key in shown if key.startswith("test_") and key != "test_loss")
        metrics = (
            ("loss {:.3f}", "test_loss"),
            *((f"{key.removeprefix('test_')} {{:.3f}}", key) for key in scores),
            ("eps {}", "epsilon"),
            ("clock {:.0f} s", "simulated_seconds"),
        )
        unprotected = self._latest.get("not_covered", ())
        parts = [
            form.format(shown[key]) + (" (not covered)" if key in unprotected else "")
            for form, key in metrics
            if key in shown
        ]
        return " ".join(filter(None, (*parts, pace(shown.get("clients_per_second", 0.0)))))

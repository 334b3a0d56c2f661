"""Counts of a run for its server's metrics, kept in a file that the server reads.

Each run is a separate process. It writes its counts, after each turn, into the folder `metrics` of $FLWR_HOME, where
`fedpriv deploy server --metrics-port` finds them. All counts concern messages; none is computed from a client's data or
from a value without noise. If epsilon relies on secret cohorts, the numbers of answers, refusals and bytes would show
who takes part: they are then left out.
"""

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from flwr.app import Array, RecordDict

from fedpriv.files import write_atomically

__all__ = ["Counts", "Tally", "all_counts", "bytes_of"]

FOLDER = "metrics"
_MAX_RUNS = 20


@dataclass(kw_only=True)
class Counts:
    """Counts of one run; those of messages are None if cohorts are secret.

    Args:
        run: Name of its run directory.
        id: First digits of the run's random name.
        turns: Number of turns of the run.
        finished: Finished turns by outcome.
        seconds: Time in turns.
        epsilon: Promised epsilon; None without a guarantee.
        epsilon_left: The part of it that later turns may still use.
        answers: Usable messages.
        refusals: Refusals by kind.
        unusable: Answers that could not be used.
        missing: Requests without an answer in time.
        sent: Bytes of requests.
        received: Bytes of answers.
    """

    run: str
    id: str
    turns: int
    finished: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    epsilon: float | None = None
    epsilon_left: float | None = None
    answers: int | None = 0
    refusals: dict[str, int] | None = field(default_factory=dict)
    unusable: int | None = 0
    missing: int | None = 0
    sent: int | None = 0
    received: int | None = 0


_OF_MESSAGES = ("answers", "refusals", "unusable", "missing", "sent", "received")


@dataclass
class Tally:
    """Counter of a run's turns and messages.

    Args:
        counts: The counts so far.
        secret: True if the numbers of messages must not be shown.
        path: File of the counts; None to keep none.
    """

    counts: Counts
    secret: bool = False
    path: Path | None = None

    @classmethod
    def of_run(cls, counts: Counts, secret: bool) -> "Tally":
        """Return the tally of a run of this process's SuperLink; counts from before a resumption stay."""
        home = os.environ.get("FLWR_HOME")
        path = Path(home, FOLDER, f"{counts.id}.json") if home else None
        tally = cls(counts, secret, path)
        before = None if path is None else _read(path)
        if before is not None:
            for name in ("finished", "seconds", *_OF_MESSAGES):
                setattr(counts, name, getattr(before, name))
        if secret:
            for name in _OF_MESSAGES:
                setattr(counts, name, None)
        return tally

    def sent(self, contents: Iterable[RecordDict]) -> None:
        """Count requests."""
        if self.counts.sent is not None:
            self.counts.sent += sum(map(bytes_of, contents))

    def received(self, contents: Iterable[RecordDict]) -> None:
        """Count answers."""
        if self.counts.received is not None:
            self.counts.received += sum(map(bytes_of, contents))

    def turn(self, happened: str, seconds: float, epsilon_left: float | None, messages: Mapping[str, object]) -> None:
        """Count a turn, and write the counts. A disk that is full loses them, and does not stop the run.

        Args:
            happened: Outcome of the turn.
            seconds: Its length.
            epsilon_left: The part of the run's epsilon that later turns may still use.
            messages: The numbers `answers`, `unusable` and `missing`, and `refusals`, a list of kinds.
        """
        counts = self.counts
        counts.finished[happened] = counts.finished.get(happened, 0) + 1
        counts.seconds += seconds
        counts.epsilon_left = epsilon_left
        if not self.secret:
            for name in ("answers", "unusable", "missing"):
                setattr(counts, name, (getattr(counts, name) or 0) + int(str(messages[name])))
            kinds = messages["refusals"]
            refusals = counts.refusals if counts.refusals is not None else {}
            for kind in kinds if isinstance(kinds, list) else []:
                refusals[str(kind)] = refusals.get(str(kind), 0) + 1
            counts.refusals = refusals
        self.save()

    def save(self) -> None:
        """Write the counts."""
        if self.path is not None:
            with suppress(OSError):
                self.path.parent.mkdir(mode=0o700, exist_ok=True)
                write_atomically(self.path, json.dumps(asdict(self.counts)), 0o600)


def all_counts(home: Path) -> list[Counts]:
    """Return the counts of the newest runs in a server's $FLWR_HOME, the oldest first."""
    paths = sorted((home / FOLDER).glob("*.json"), key=_age)[-_MAX_RUNS:]
    return [counts for path in paths if (counts := _read(path)) is not None]


def bytes_of(content: RecordDict) -> int:
    """Return the size of the names and values in a message's records in bytes.

    Flower's `count_bytes` raises an error at an empty value, which a node may send.
    """
    return sum(len(name) + _size(value) for record in content.values() for name, value in record.items())


def _size(value: object) -> int:
    """Return the size of one value; a list has that of its elements."""
    match value:
        case Array():
            return len(value.data)
        case str() | bytes():
            return len(value)
        case list():
            return sum(_size(element) for element in value)
        case _:
            return 1 if isinstance(value, bool) else 8


def _age(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _read(path: Path) -> Counts | None:
    """Return the counts in a file; None if it does not hold any, for metrics must not stop a run."""
    try:
        row = json.loads(path.read_bytes())
        return Counts(**{name: row[name] for name in (part.name for part in fields(Counts))})
    except (OSError, ValueError, KeyError, TypeError):
        return None

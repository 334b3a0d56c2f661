"""Send a run's rows to TensorBoard, MLflow or Weights & Biases. The run directory remains the authoritative record.

Each tracker's store is asked which values it has, metric by metric. A resumed run therefore sends nothing twice, and
rows lost to a crash or a broken connection are sent later, from the files.
"""

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple, Protocol

from fedpriv.checks import a_path, an_object, one_of, shown
from fedpriv.errors import UserError, nearest, require_extra
from fedpriv.experiment.config import Config
from fedpriv.experiment.run_directory import DIAGNOSTICS_FILE, RunDirectory, flat_tables
from fedpriv.experiment.watching import StopRun, Watcher
from fedpriv.privacy.released import VALUES, Kind
from fedpriv.tables import Record, Table

__all__ = [
    "TRACKERS",
    "Ended",
    "RunLog",
    "Taken",
    "Tracked",
    "Tracker",
    "check_trackers",
    "run_log",
    "track",
    "watched_by",
]

Ended = Literal["finished", "stopped", "failed", "killed"]
"""How a run ended."""

DIAGNOSTICS, NOT_COVERED = "diagnostics/", "not_covered/"

# The durations in a summary.
TIMINGS = tuple(key for key, kind in VALUES.items() if kind is Kind.TIMING and key != "execution")

# Name of a tracker, also that of the extra it needs, and the module with its `prepare` and `Tracker`.
TRACKERS: dict[str, str] = {
    "tensorboard": "fedpriv.tracking.tensorboard",
    "mlflow": "fedpriv.tracking.mlflow",
    "wandb": "fedpriv.tracking.wandb",
}


@dataclass(frozen=True, kw_only=True)
class Tracked:
    """The facts about a run that a tracker receives before the first row.

    Args:
        name: The run's name.
        group: The run's sweep, if any.
        folder: The run directory.
        digest: Digest of the config.
        parameters: The config as `table.key`, with values that JSON can represent.
        store: The destination, as returned by `prepare`.
        not_covered: Names of the scores that the run's guarantee does not cover. They are sent as `not_covered/NAME`.
        diagnostics: True if rows contain values that are not released; their files are then owner-only.
        scores: Names of the scores on test examples.
    """

    name: str
    group: str | None
    folder: Path
    digest: str
    parameters: dict[str, object]
    store: str
    not_covered: tuple[str, ...] = ()
    diagnostics: bool = False
    scores: tuple[str, ...] = ("test_accuracy", "test_loss")

    def name_of(self, key: str) -> str:
        """Return the name of a released value in a tracker."""
        return NOT_COVERED + key if key in self.not_covered else key


class Taken(NamedTuple):
    """The progress of a run in a tracker: the last round, per metric or for all, and if the run is finished there."""

    metrics: dict[str, int]
    rounds: int = -1
    finished: bool = False


class Tracker(Protocol):
    """One run in one tracker."""

    def begin(self, run: Tracked) -> Taken:
        """Resume the run, or begin it."""
        ...

    def row(self, round: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of a round."""
        ...

    def end(self, status: Ended, texts: Mapping[str, str], summary: Table) -> None:
        """End the session as `finished`, `stopped`, `failed` or `killed`; `texts` are by file name."""
        ...


def check_trackers(names: Sequence[str]) -> dict[str, str]:
    """Import the trackers' packages and return each tracker's store by name.

    Raises:
        UserError: If a tracker is unknown, its package is missing, or its store does not answer.
    """
    stores = {}
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise UserError("--log", "a list of trackers", shown(names), 'Write it as ["tensorboard"]')
    for name in names:
        if name not in TRACKERS:
            raise UserError("--log", "a known tracker", repr(name), nearest(name, TRACKERS))
        require_extra(f"--log {name}", name)
        try:
            stores[name] = import_module(TRACKERS[name]).prepare()
        except Exception as error:
            raise UserError(
                f"--log {name}", "a store that answers", _first_line(error), f"Repair it, or remove --log {name}"
            ) from None
    return stores


def track(
    names: Sequence[str] | Mapping[str, str],
    config: Config,
    out: Path | str,
    *,
    name: str | None = None,
    group: str | None = None,
    diagnostics: bool | None = None,
) -> "RunLog":
    """Return a context in which a run is sent to trackers; pass it to `run_experiment` as `watch`.

    Args:
        names: Keys of `TRACKERS`, or the result of `check_trackers`.
        config: The run's config.
        out: The run directory.
        name: The run's name in the trackers; None for the config's name.
        group: The run's sweep.
        diagnostics: True to send values that are not released too, as `diagnostics/...`; None sends them only for runs
            without `[privacy]`.

    Raises:
        UserError: See `check_trackers`.
    """
    stores = names if isinstance(names, Mapping) else check_trackers(names)
    for key in stores:
        one_of("names", key, tuple(TRACKERS))
    an_object("config", config, "digest", "that of fedpriv.load_config")
    out = a_path("out", out)
    parameters = {key: value for key, value in flat_tables(config.tables).items() if value is not None}
    called = {"name": name or config.name, "group": group, "folder": out, "digest": config.digest}
    sent = config.privacy is None if diagnostics is None else diagnostics
    scores = tuple(f"test_{score}" for score in config.task.scores)
    common = {"parameters": parameters, "not_covered": config.not_covered, "diagnostics": sent, **called}
    common |= {"scores": scores}
    return run_log(stores, lambda store: Tracked(store=store, **common), out)


def run_log(stores: Mapping[str, str], facts: Callable[[str], Tracked], out: Path) -> "RunLog":
    """Return the context of a run whose facts are given; see `track`.

    Args:
        stores: The result of `check_trackers`.
        facts: Returns the facts about the run for a store.
        out: The run directory.
    """
    return RunLog([_Sender(key, facts(store)) for key, store in stores.items()], out)


def watched_by(*watchers: Watcher) -> Watcher:
    """Combine watchers into one that calls them in turn."""

    def watch(released: Record, diagnostics: Record) -> None:
        for watcher in watchers:
            watcher(released, diagnostics)

    return watch


class RunLog:
    """A watcher that sends each recorded round and, on exit, missing rows, the summary and the privacy statement."""

    def __init__(self, senders: Sequence["_Sender"], out: Path) -> None:
        self._senders, self._directory = senders, RunDirectory(out)

    @property
    def complaints(self) -> list[str]:
        """The errors, as printed on stderr."""
        return [complaint for sender in self._senders for complaint in sender.complaints]

    def __call__(self, released: Record, diagnostics: Record) -> None:
        """See `watching.Watcher`."""
        for sender in self._senders:
            sender.send(released, diagnostics)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._senders:
            return
        summary = self._directory.read_json("summary.json") if kind is None else None
        diagnostics = self._directory.read_json(DIAGNOSTICS_FILE) if summary else None
        status: Ended = (
            "finished" if summary else "stopped" if kind is not None and issubclass(kind, StopRun) else "failed"
        )
        if kind is not None and not issubclass(kind, Exception):
            status = "killed"
        files = {name: self._directory.file(name) for name in ("privacy.txt", "config.toml", "summary.json")}
        texts = {name: path.read_text(encoding="utf-8") for name, path in files.items() if path.exists()}
        for sender in self._senders:
            if sender.begun or summary:
                sender.end(status, texts, summary or {}, diagnostics or {})


class _Sender:
    """A sender of rows to one tracker. Errors do not end the run: they are reported, and rows are sent at the end."""

    def __init__(self, name: str, run: Tracked) -> None:
        self._name, self._run = name, run
        self._tracker: Tracker = import_module(TRACKERS[name]).Tracker()
        self._taken: Taken | None = None
        self._broken = False
        self.complaints: list[str] = []

    @property
    def begun(self) -> bool:
        """True if the tracker has begun the run or failed to."""
        return self._taken is not None or self._broken

    def send(self, released: Record, diagnostics: Record) -> None:
        """Send a row; the first call also sends the recorded rows that the tracker lacks."""
        if not self._broken:
            first = self._taken is None
            self._guarded(lambda: self._catch_up() if first else self._row(released["round"], released, diagnostics))

    def end(self, status: Ended, texts: Mapping[str, str], summary: Table, diagnostics: Table) -> None:
        """Send missing rows, texts and summary."""

        def rest() -> None:
            if self._broken or self._taken is None:
                self._catch_up()
            if self._taken is not None and not self._taken.finished:
                if self._run.diagnostics:
                    sent = texts, {**summary, **({"diagnostics": diagnostics} if diagnostics else {})}
                else:
                    sent = _released(texts, summary)
                self._tracker.end(status, sent[0], {self._run.name_of(key): value for key, value in sent[1].items()})

        self._guarded(rest)

    def _guarded(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:
            self._broken = True
            later = "Rows are kept in the run directory; missing rows are sent at the end, or by another --resume"
            self.complaints.append(f"--log {self._name}: {_first_line(error)}. {later}.")
            print(f"fedpriv: {self.complaints[-1]}", file=sys.stderr)

    def _catch_up(self) -> None:
        if self._taken is None:
            self._taken = self._tracker.begin(self._run)
        directory = RunDirectory(self._run.folder)
        diagnostics = {row["round"]: row for row in directory.rows("diagnostics.jsonl")}
        for released in directory.rows("rounds.jsonl"):
            number: int = released["round"]
            self._row(number, released, diagnostics.get(number, {}))

    def _row(self, number: int, released: Table, diagnostics: Table) -> None:
        taken = self._taken
        assert taken is not None
        if number <= taken.rounds or taken.finished:
            return
        metrics = {self._run.name_of(key): value for key, value in _numbers(released)}
        if self._run.diagnostics:
            metrics |= {DIAGNOSTICS + key: value for key, value in _numbers(diagnostics)}
        new = {key: value for key, value in metrics.items() if number > taken.metrics.get(key, -1)}
        if new:
            self._tracker.row(number, new)
            taken.metrics.update((key, number) for key in new)


def _released(texts: Mapping[str, str], summary: Table) -> tuple[dict[str, str], Table]:
    """Return texts and summary without values that are not released."""
    kept = {key: value for key, value in summary.items() if key not in TIMINGS}
    execution = kept.get("execution")
    if isinstance(execution, Mapping):
        kept["execution"] = {key: value for key, value in execution.items() if key != "seconds_per_client"}
    file = {"summary.json": json.dumps(kept, indent=2) + "\n"} if "summary.json" in texts else {}
    return {**texts, **file}, kept


def _numbers(row: Table, above: str = "") -> Iterator[tuple[str, float]]:
    """Yield the finite numbers of a row except its round; nested tables become table/key."""
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{above}{key}/")
        elif isinstance(value, int | float) and math.isfinite(value) and above + key != "round":
            yield above + key, float(value)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")

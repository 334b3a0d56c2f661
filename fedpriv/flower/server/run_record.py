"""Run directory of a strategy in a user's app: the rows, statement, pictures and checkpoints of ordinary runs.

The order of writing keeps the accounting right if the process ends at any time:

| moment | saved before it | after a restart |
|---|---|---|
| clients are asked for a round | "round k is open" | the round is void: charged, and without effect on the model |
| the model of a round is released | the state after it | the round counts, and a missing row is written |

No round is ever repeated, because a second release of a round would cost privacy a second time. Runs without privacy
save the state after every round only, and repeat a round that was cut off.

Flower keeps clients' memories for one run of an app. After a restart they are lost, except on nodes with a home. All
memories are then reset as after a loss, before the first round. This reveals nothing: it depends on the restart alone.
"""

import json
import logging
import re
import secrets
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import tomli_w
import torch
from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp.strategy import Result
from torch import Tensor

from fedpriv.errors import UserError, has_extra
from fedpriv.experiment.config import digest_of_tables, method_tables
from fedpriv.experiment.learned import warnings_of
from fedpriv.experiment.pictures.curves import plot_curves
from fedpriv.experiment.recorder import RunFacts, diagnostics_row, no_promise, summary_of, terms_in_words
from fedpriv.experiment.run_directory import DIAGNOSTICS_FILE, RunDirectory, flat_tables
from fedpriv.experiment.schema import write_table
from fedpriv.flower.server.attendance import Attendance
from fedpriv.flower.server.promise import Privacy
from fedpriv.flower.trained import TrainedArrays, digest_of
from fedpriv.methods import METHODS, ServerState, bare
from fedpriv.privacy import NoiseChoice, rounded_up
from fedpriv.rounds import Agreement, Total, signal_to_noise, skip_round
from fedpriv.streams import SeededStreams
from fedpriv.tables import Record
from fedpriv.tasks.metrics import METRICS, Metric, known_metric
from fedpriv.tracking.trackers import RunLog, Tracked, check_trackers, run_log
from fedpriv.vectors import Layout

__all__ = ["AppRun", "RunFolder", "RunRecord", "Running", "opened"]

_log = logging.getLogger("flwr")

_FACTS = "strategy"
_TEST = "test_"
_REMEDY = "Start the strategy as before, or choose another out"

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]


@dataclass(frozen=True)
class RunFolder:
    """The run directory of a strategy, for `out=`.

    Args:
        path: The directory. A new one is created; the run of an unfinished one is resumed. `flwr run` starts apps in a
            folder of Flower's, so give it an absolute path there.
        log: Trackers that receive the rows: `tensorboard`, `mlflow` or `wandb`.
        name: The run's name in pictures and trackers; None for the directory's.
    """

    path: Path | str
    log: tuple[str, ...] = ()
    name: str | None = None


@dataclass(frozen=True, kw_only=True)
class AppRun:
    """The facts of a start that are not attributes of the strategy.

    Args:
        run: The run's id for nodes with a home, if the run is new.
        rounds: Number of rounds.
        settings: The app's settings for training.
        terms: Further options of the strategy that a resumed run must repeat.
        initial: The first model, with all arrays.
        layout: Layout of the trained arrays.
        remembered: True if clients keep their memories when the server restarts.
    """

    run: str
    rounds: int
    settings: Mapping[str, object]
    terms: Mapping[str, object]
    initial: ArrayRecord
    layout: Layout
    remembered: bool


class Running(Protocol):
    """The strategy of a run; see `strategies.MethodStrategy`."""

    agreement: Agreement
    arrays: TrainedArrays
    state: ServerState
    total: Total
    attendance: Attendance
    statement: str
    result: Result
    privacy: Privacy | None
    noise: NoiseChoice | None


@contextmanager
def opened(out: "RunFolder | Path | str | None") -> "Iterator[RunRecord | None]":
    """Lock the run directory within the context, and yield its record; None without a directory."""
    if out is None:
        yield None
        return
    folder = out if isinstance(out, RunFolder) else RunFolder(out)
    with _called_as_arguments(), ExitStack() as stack:
        stores = check_trackers([folder.log] if isinstance(folder.log, str) else list(folder.log))
        directory = RunDirectory(Path(folder.path).expanduser().resolve())
        with directory.locked():
            yield RunRecord(directory, folder.name, stores, stack)


@contextmanager
def _called_as_arguments() -> "Iterator[None]":
    """Name the arguments of a strategy in the place of the command's options."""
    try:
        yield
    except UserError as error:
        line = re.sub(r"--(out|log)\b", r"\1", str(error))
        if line == str(error):
            raise
        error.args, error.where = (line,), error.where.removeprefix("--")
        raise


class RunRecord:
    """The writer of a strategy's run directory.

    Attributes:
        done: The last round before this start; 0 for a new run.

    Args:
        directory: The directory, locked.
        name: The run's name; None for the directory's.
        stores: Trackers and their stores, as `check_trackers` returns them.
        stack: Ends the trackers' sessions.
    """

    def __init__(self, directory: RunDirectory, name: str | None, stores: Mapping[str, str], stack: ExitStack) -> None:
        self._directory, self._stores, self._stack = directory, stores, stack
        self._name = name or directory.path.name
        self._watch = RunLog([], directory.path)
        self._rows: dict[int, Record] = {}
        self._began = time.monotonic()
        self._digest = self._promise = ""
        self._seed, self._run_id = 0, ""
        self._same: dict[str, str] = {}
        self.done = 0

    @property
    def path(self) -> Path:
        """The directory."""
        return self._directory.path

    def begin(self, strategy: Running, run: AppRun) -> str:
        """Claim the directory, bring the strategy to the last saved state, and return the run's id.

        Raises:
            UserError: If the directory holds a finished run, another one, or one that cannot be resumed.
        """
        self._run = run
        began = self._directory.file("config.toml").exists()
        tables = self._tables(strategy)
        self._digest = digest_of_tables(tables if self._is_seeded(strategy) else {**tables, "seed": 0})
        if self._directory.claim(tomli_w.dumps(tables), self._digest, resume=True) is not None:
            raise UserError(str(self.path), "a folder without a finished run", "a finished run", "Choose another out")
        self._promise = "data of the app" + terms_in_words(strategy.agreement.plan)
        self._same = {
            "list of arrays": digest_of_tables({"arrays": list(map(repr, run.layout.entries))}),
            "content of fixed arrays": digest_of(
                ArrayRecord({name: run.initial[name] for name in strategy.arrays.fixed})
            ),
            "first model of a seeded run": digest_of(run.initial) if self._is_seeded(strategy) else "",
        }
        self._run_id = run.run
        if began:
            self._resumed(strategy)
        self._write_promise(strategy)
        model = strategy.state.model
        self._directory.write_model("initial.safetensors", model, run.layout) if not self.done else None
        self._watch = self._stack.enter_context(self._tracked(tables, strategy))
        _log.info("The run is in %s", self.path)
        return self._run_id

    def replays(self, round: int) -> bool:
        """Return True for a round before this start, of which no client is asked."""
        return round <= self.done

    def open(self, round: int, strategy: Running) -> None:
        """Save that clients are about to be asked for a round."""
        self._began = time.monotonic()
        if strategy.agreement.plan is not None:
            self._save(round, strategy, opened=True)

    def close(self, round: int, strategy: Running) -> None:
        """Save the state after a round, before anything of it is released."""
        self._seconds = time.monotonic() - self._began
        self._save(round, strategy, opened=False)

    def evaluating(self, strategy: Running, evaluate_fn: EvaluateFn | None) -> EvaluateFn:
        """Return a function that evaluates a model and records its row; recorded rounds are not evaluated again."""

        def evaluate(round: int, arrays: ArrayRecord) -> MetricRecord | None:
            known = self._rows.get(round)
            if known is not None:
                found = {name.removeprefix(_TEST): value for name, value in known.items() if name.startswith(_TEST)}
                found = {name: value for name, value in found.items() if value is not None}
                return MetricRecord(found) if found else None
            metrics = None if evaluate_fn is None else evaluate_fn(round, arrays)
            self._record(round, strategy, metrics)
            return metrics

        return evaluate

    def finish(self, strategy: Running) -> None:
        """Write the last model, the picture if possible and, last of all, the summary."""
        directory, agreement = self._directory, strategy.agreement
        directory.write_model("model.safetensors", strategy.state.model, self._run.layout)
        rows, diagnostics = directory.rows("rounds.jsonl"), directory.rows("diagnostics.jsonl")
        scored = _Scored.of(rows)
        if has_extra("report"):
            plot_curves(rows, directory.file("curves.png"), title=self._title(strategy), metric=scored.selects)
        totals = {"messages": sum(row["cohort_size"] for row in diagnostics)}
        totals["non_finite"] = sum(row["non_finite"] for row in diagnostics)
        directory.write_json(DIAGNOSTICS_FILE, {**totals, "warnings": warnings_of(diagnostics)})
        plan, sampling = agreement.plan, agreement.server.sampling
        facts = RunFacts(
            name=self._name,
            method=_method_name(strategy),
            digest=self._digest,
            seed=self._seed,
            rounds=self._run.rounds,
            population=sampling.population,
            expected_cohort=sampling.expected_size,
            parameters=self._run.layout.size,
            plan=plan,
            ran={"engine": "flower"},
        )
        keeps = plan is not None and plan.trust_rules.charges_participations
        counts = strategy.attendance.times_asked() if keeps else None
        directory.write_json("summary.json", summary_of(facts, rows[-1], diagnostics, scored.table, counts))
        directory.checkpoint.path.unlink(missing_ok=True)

    def _resumed(self, strategy: Running) -> None:
        """Restore the last saved state."""
        if strategy.agreement.client.sums is not None:
            expected = "a folder without a run: under secure aggregation, runs of strategies cannot be resumed"
            raise UserError(str(self.path), expected, "a run that was started", "Choose another out")
        saved = self._directory.saved(self._digest, self._promise)
        recorded = max((row["round"] for row in self._directory.rows("rounds.jsonl")), default=0)
        last = 0 if saved is None else saved[0]
        if recorded > last:
            got = f"rows up to round {recorded}, and " + (
                f"a checkpoint of round {last}" if saved else "a missing checkpoint"
            )
            remedy = "Restore it, because its rounds are paid for, or choose another out"
            raise UserError(str(self._directory.checkpoint.path), "the newest checkpoint", got, remedy)
        for name in ("rounds.jsonl", "diagnostics.jsonl"):
            rows = self._directory.keep_rows(name, last if saved else -1)
            self._rows |= {row["round"]: row for row in rows} if name == "rounds.jsonl" else {}
        if saved is None:
            return
        facts = json.loads(saved[2][_FACTS].numpy().tobytes())
        for what, digest in self._same.items():
            if facts["same"][what] != digest:
                raise UserError(
                    f"{self.path}: {what}", "that of the run that was started", f"digest {digest[:12]}", _REMEDY
                )
        strategy.state, self._run_id = type(strategy.state)(**saved[1]), facts["run"]
        strategy.attendance.restore(facts["attendance"])
        self.done = last
        if facts["opened"]:
            strategy.state = skip_round(strategy.agreement.server, strategy.state)
            strategy.attendance.voids += 1
            _log.warning("round %d was cut off: it is charged, and leaves the model as it is", last)
        self._reset_memories(strategy)
        self._seconds = 0.0
        self._save(last, strategy, opened=False)
        _log.info("The run is resumed after round %d of %d", last, self._run.rounds)

    def _reset_memories(self, strategy: Running) -> None:
        """Reset all clients' memories, as after their loss; the module says why this is private."""
        server, client = strategy.agreement.server, strategy.agreement.client
        if self._run.remembered or not client.init_client(0)._fields:  # pyright: ignore[reportPrivateUsage]
            return
        if server.method.lost_memory == "reset-all":
            strategy.state = server.reset_memories(strategy.state)
            strategy.attendance.resets += 1
        strategy.attendance.last_round = {}
        _log.warning("clients' memories are lost with the process that ended: all are reset")

    def _save(self, round: int, strategy: Running, *, opened: bool) -> None:
        facts = {"run": self._run_id, "opened": opened, "same": self._same, "attendance": strategy.attendance.save()}
        tensor = torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)
        state: dict[str, Tensor] = strategy.state._asdict()
        self._directory.save(self._digest, self._promise, round, state, {_FACTS: tensor})

    def _record(self, round: int, strategy: Running, metrics: MetricRecord | None) -> None:
        """Write the rows of a round; the round of a missing row before this start has no diagnostics."""
        agreement, plan = strategy.agreement, strategy.agreement.plan
        known = round > self.done
        void = strategy.total.void if known and round else bool(round)
        released = {"round": round, "epsilon": None if plan is None else plan.epsilon_after(round), "void": void}
        released |= {_TEST + name.removeprefix(_TEST): value for name, value in _numbers(metrics).items()}
        self._directory.append("rounds.jsonl", released)
        row: dict[str, object] = {"round": round}
        if known and round:
            total, bare_sum = strategy.total, plan is not None and not self._is_seeded(strategy)
            stddev = agreement.server.last_stddev(strategy.state)
            noise = None if bare_sum else signal_to_noise(total, stddev, agreement.client.noise_stddev)
            row = diagnostics_row(round, strategy.state.model, total, self._seconds, noise=noise, bare=bare_sum)
            row |= _prefixed("trained_", strategy.result.train_metrics_clientapp.get(round))
            row |= _prefixed("evaluated_", strategy.result.evaluate_metrics_clientapp.get(round))
            self._directory.append("diagnostics.jsonl", row)
        self._watch(released, row)

    def _write_promise(self, strategy: Running) -> None:
        plan = strategy.agreement.plan
        promise = no_promise() if plan is None else plan.as_dict()
        self._directory.write_json("privacy.json", {**promise, "statement": strategy.statement})
        self._directory.write_text("privacy.txt", strategy.statement)

    def _tables(self, strategy: Running) -> dict[str, object]:
        """Return the run's settings as the tables of `config.toml`."""
        run, agreement = self._run, strategy.agreement
        sampling, streams = agreement.server.sampling, agreement.server.streams
        self._seed = streams.seed if isinstance(streams, SeededStreams) else self._repetition()
        cohort = {"sampling": sampling.name, **write_table(sampling, ("population",))}
        local = {
            key: value if isinstance(value, int | float | str) else repr(value) for key, value in run.settings.items()
        }
        privacy, noise = strategy.privacy, strategy.noise
        return {
            "name": self._name,
            "seed": self._seed,
            "randomness": "seeded" if self._is_seeded(strategy) else "system",
            "data": {"name": "app", "clients": sampling.population, "partition": "natural"},
            "model": {"name": "app", "parameters": run.layout.size},
            **({"local": local} if local else {}),
            "cohort": cohort,
            **method_tables(agreement.server.method),
            **({} if privacy is None else {"privacy": write_table(privacy)}),
            **({} if noise is None else {"noise": write_table(noise)}),
            "training": {"rounds": run.rounds, **run.terms},
        }

    def _repetition(self) -> int:
        """Return a number that tells repetitions of one setting apart, if randomness has no seed."""
        try:
            found = tomllib.loads(self._directory.file("config.toml").read_text(encoding="utf-8"))["seed"]
            return int(found)
        except (OSError, ValueError, KeyError):
            return secrets.randbelow(10**6)

    @staticmethod
    def _is_seeded(strategy: Running) -> bool:
        return isinstance(strategy.agreement.server.streams, SeededStreams)

    def _title(self, strategy: Running) -> str:
        plan, promise = strategy.agreement.plan, "not private"
        if plan is not None and plan.private:
            promise = f"{plan.trust} trust, ({rounded_up(plan.epsilon)}, {plan.delta:g})-DP"
        return f"{self._name}: {_method_name(strategy)}, {promise}"

    def _tracked(self, tables: dict[str, object], strategy: Running) -> RunLog:
        def facts(store: str) -> Tracked:
            return Tracked(
                name=self._name,
                group=None,
                folder=self.path,
                digest=self._digest,
                parameters={key: value for key, value in flat_tables(tables).items() if value is not None},
                store=store,
                diagnostics=strategy.agreement.plan is None,
            )

        return run_log(self._stores, facts, self.path)


@dataclass(frozen=True)
class _Scored:
    """The scores of an app's `evaluate_fn`.

    Args:
        measured: Its metrics beside the loss; the first one selects among runs.
        selects: That metric, or the loss.
    """

    measured: tuple[Metric, ...]
    selects: Metric

    @classmethod
    def of(cls, rows: list[Record]) -> "_Scored":
        """Return the scores in the rows of a run: built-in metrics come first."""
        names = dict.fromkeys(key.removeprefix(_TEST) for row in rows for key in row if key.startswith(_TEST))
        names.pop("loss", None)
        first = sorted(names, key=lambda name: name not in METRICS)
        measured = tuple(map(known_metric, first))
        return cls(measured, (*measured, METRICS["loss"])[0])

    @property
    def table(self) -> dict[str, object]:
        """The metrics and their directions, for the summary; empty for accuracy alone."""
        better = {metric.name: metric.better for metric in self.measured}
        return {} if list(better) in ([], ["accuracy"]) else {"metrics": better}


def _method_name(strategy: Running) -> str:
    return METHODS.name_of(bare(strategy.agreement.server.method))


def _numbers(metrics: MetricRecord | None) -> dict[str, float | int]:
    return {key: value for key, value in (metrics or {}).items() if isinstance(value, int | float)}


def _prefixed(prefix: str, metrics: MetricRecord | None) -> dict[str, object]:
    return {prefix + key: value for key, value in _numbers(metrics).items()}

"""A Flower strategy that runs any of fedpriv's methods.

Each round is `begin_round`, Flower's network, `finish_round`, for every method alike. The strategy holds the model and
the server's memory; the arrays that Flower passes around are copies. Methods see trained arrays only
(`fedpriv.flower.trained`), and clients may fail (`fedpriv.flower.server.attendance`).
"""

import logging
import math
import secrets
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor

from fedpriv.checks import is_whole
from fedpriv.deploy.device.heads import HEAD, Head
from fedpriv.deploy.heads import HeadBook
from fedpriv.deploy.masked_rounds import MaskedRounds, masked_message, refuse_other_nodes
from fedpriv.deploy.sums import HelperList
from fedpriv.errors import UserError
from fedpriv.flower.legacy import NotLegacy
from fedpriv.flower.messages import (
    ARRAYS,
    CONFIG,
    FEDPRIV,
    TERMS,
    ClientInstructions,
    MessageFormat,
    ModelArrays,
    RunTerms,
    method_name,
    refused,
)
from fedpriv.flower.privacy_terms import promised
from fedpriv.flower.server.arguments import checked_evaluation, refuse_start
from fedpriv.flower.server.attendance import Attendance
from fedpriv.flower.server.drop_in_statement import drop_in_statement, warnings_of
from fedpriv.flower.server.faults import message_fault, norm_limit
from fedpriv.flower.server.metrics import average_metrics, metrics_of_app, total_of_answers, warn_of_total
from fedpriv.flower.server.nodes import (
    REJOIN_SECONDS,
    by_client,
    find_nodes,
    find_rejoined,
    in_words,
    read_answers,
    sort_answers,
)
from fedpriv.flower.server.pace import Pace
from fedpriv.flower.server.promise import Privacy
from fedpriv.flower.server.rescue import rescue
from fedpriv.flower.server.run_record import AppRun, RunFolder, RunRecord, opened
from fedpriv.flower.trained import TRAINED, Patterns, TrainedArrays
from fedpriv.methods import ServerState
from fedpriv.privacy import NoiseChoice, PrivacyPlan
from fedpriv.rounds import Agreement, Total, begin_round, counted_total, finish_round, skip_round
from fedpriv.streams import Randomness, SeededStreams

__all__ = ["MethodStrategy"]

T = TypeVar("T")

_log = logging.getLogger("flwr")

# The key for the number of the round in an app's settings.
_ROUND = "server-round"


class MethodStrategy(NotLegacy, Strategy):
    """A strategy that runs a method under an agreement.

    A client that fails or sends an unusable message counts with a message of zero. The sum of a round's messages is
    divided by the expected cohort size, so that the noise is right for any number of answers.

    Attributes (set by `start`):
        agreement: The two halves of the rules, and the plan.
        arrays: The trained arrays.
        statement: The privacy statement, which is also logged.
        state: The server's state: `state.model` `[params]`, the trained arrays, and the method's memory.
        total: The sum of the last round's messages, with their number and norm.
        attendance: The participation and the failures of clients.
        result: The value that `start` returns; after an error, the model and the metrics of the finished rounds.
        rescue_folder: The folder for the model of the last finished round if the run ends with an error; by default
            the current directory. Set it before `start`.
        helpers: The helpers of secure aggregation, for real nodes; None for other trusts, and for a simulation. Set it
            before `start`. The run ends if one of them is not connected for `join_timeout`.
        out: The run directory; None for none. Set it before `start`, which resumes the unfinished run in it. See
            `fedpriv.flower.server.run_record`.
        privacy: The requested privacy, for the record of the run; `noise` likewise.

    Args:
        agree: Makes the agreement from the population's size and the number of rounds.
        num_clients: Number of clients; None for the number of nodes that have joined at the start.
        evaluate: Let all clients evaluate the model after every round, and average their metrics by `num-examples`. Off
            by default: metrics that clients report about their data are *not* protected.
        join_timeout: Seconds to wait for all clients at the start.
        max_failures: Largest share of a round's clients that may fail before the run ends with an error, from 0 to 1.
            None is a half, or no limit if the privacy guarantee relies on secret cohorts (see
            `fedpriv.flower.server.attendance`).
        trainable: Names of the arrays that the app trains, or patterns such as `head.*`; all others are then frozen.
        frozen: Names or patterns of the arrays that it does not train. Give one of the two if not all are trained.
        heads: A file to store the heads of clients' ledgers, and to show them in later runs; None to keep them for this
            run alone. See `fedpriv.deploy.device.heads`.
        round_seconds: Duration of every round and of every evaluation by clients. Answers count until 5 s and a
            twentieth of the duration before the end. None ends a round when all have answered, which shows who took
            part: if epsilon relies on secret cohorts, the statement then excludes observers who can time rounds.
    """

    rescue_folder = Path()
    helpers: HelperList | None = None
    out: RunFolder | Path | str | None = None
    privacy: Privacy | None = None
    noise: NoiseChoice | None = None
    _record: RunRecord | None = None

    def __init__(
        self,
        make_agreement: Callable[[int, int], Agreement],
        *,
        num_clients: int | None = None,
        evaluate: bool = False,
        join_timeout: float = 120.0,
        max_failures: float | None = None,
        trainable: Patterns | None = None,
        frozen: Patterns | None = None,
        heads: str | Path | None = None,
        round_seconds: float | None = None,
    ) -> None:
        if num_clients is not None and not is_whole(num_clients, 1):
            remedy = "Give the number of clients, or omit it to count the nodes that have joined"
            raise UserError("num_clients", "a whole number from 1", repr(num_clients), remedy)
        if max_failures is not None and not 0.0 <= max_failures <= 1.0:
            raise UserError("max_failures", "a share from 0 to 1", max_failures, "Give a share such as 0.5")
        self._agree = make_agreement
        self._heads = HeadBook(None if heads is None else Path(heads))
        self._masked: MaskedRounds | None = None
        self._num_clients = num_clients
        self._evaluate = evaluate
        self._join_timeout = join_timeout
        self._max_failures = max_failures
        self._declared = trainable, frozen
        self._settings: list[tuple[str, Any]] = []
        self._pace = Pace(round_seconds)
        self._timeout = math.inf
        self._nodes: list[int] = []
        self._seen: set[int] = set()
        self._asked: dict[int, Message] = {}
        self._finished = 0
        self.result = Result()

    @property
    def plan(self) -> PrivacyPlan | None:
        """The privacy plan; None for a run without privacy."""
        return self.agreement.plan

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run all rounds; see `flwr.serverapp.strategy.Strategy.start`.

        If anything ends the run early, the strategy first stores the model of the last finished round. A round waits
        `timeout` seconds for clients that do not answer, unless `round_seconds` ends it earlier.

        Raises:
            UserError: If the model cannot be trained privately, if clients are missing at the start, if too many fail,
                or if no client's message counted in the whole run.
        """
        refuse_start(initial_arrays, num_rounds, timeout)
        self._settings = sorted((key, value) for key, value in (train_config or {}).items() if key != _ROUND)
        with opened(self.out) as self._record:
            self.prepare(grid, initial_arrays, num_rounds, timeout)
            record, watch = self._record, checked_evaluation(evaluate_fn)
            if record is not None:
                self.rescue_folder, watch = record.path, record.evaluating(self, watch)
            try:
                paced = self._pace.on(grid)
                found = super().start(paced, initial_arrays, num_rounds, timeout, train_config, evaluate_config, watch)
                self.refuse_nothing_learned()
                if record is not None:
                    record.finish(self)
            except BaseException:
                rescue(self.result.arrays, self._finished, self.rescue_folder)
                raise
            finally:
                if self._masked is not None:
                    self._masked.end()
        self.result = found
        return found

    def prepare(self, grid: Grid, initial_arrays: ArrayRecord, num_rounds: int, timeout: float) -> None:
        """Prepare the first round: wait for all clients, make the agreement and the server's state."""
        if hasattr(self, "agreement"):
            raise UserError(
                "strategy.start",
                "one start of a strategy",
                "a second start",
                "Make a new strategy for a new run; two runs on the same clients' data add up their epsilon",
            )
        self.arrays = TrainedArrays.of_model(initial_arrays, *self._declared)
        self._initial = initial_arrays
        trained = self.arrays.part(initial_arrays)
        self._layout = ModelArrays.of(trained)
        model = self._layout.vector(trained)
        self._timeout = min(timeout, self._pace.window)
        expected = 0 if self.helpers is None else len(self.helpers.pinned)
        found = find_nodes(grid, self._num_clients, self._join_timeout, timeout, expected)
        self._nodes, self._run = found.clients, secrets.token_hex(16)
        self._seen |= set(found.helpers)
        self.agreement = self._agree(len(self._nodes), num_rounds)
        refuse_other_nodes(found, self.plan, self.helpers, self.agreement.server.streams)
        if self.helpers is not None:
            patience = min(timeout, self._join_timeout)
            self._masked = MaskedRounds.of(grid, found, self.plan, self.helpers, self._run, patience)
        noiseless = self.agreement.server.noise_stddev == self.agreement.client.noise_stddev == 0.0
        self._declared_arrays = replace(self.arrays, declared=True) if noiseless else self.arrays
        self.attendance = self._new_attendance(num_rounds)
        self.state: ServerState = self.agreement.server.init(model)
        self.total = Total(model.new_zeros(0), 0, 0, math.nan)
        self._turns = num_rounds
        self.statement = drop_in_statement(
            self.plan,
            method=method_name(self.agreement.server.method),
            randomness=self._randomness,
            arrays=self.arrays,
            size=self._layout.layout.size,
            app=None if self._is_simulated else "supplied",
            evaluated=self._evaluate,
            round_seconds=self._pace.seconds,
            recorded=self._record is not None,
        )
        if self._record is not None:
            run = AppRun(
                run=self._run,
                rounds=num_rounds,
                settings=dict(self._settings),
                terms={"evaluate": self._evaluate, "round_seconds": self._pace.seconds or 0.0},
                initial=initial_arrays,
                layout=self._layout.layout,
                remembered=len(found.guarded) == len(found.clients),
            )
            self._run = self._record.begin(self, run)

    def summary(self) -> None:
        """Log the participants, the privacy statement and warnings."""
        server = self.agreement.server
        _log.info("\t├──> Method: %s", server.method)
        _log.info("\t├──> Cohorts: %s", server.sampling)
        _log.info("\t├──> Trained: %s", self.arrays)
        _log.info("\t└──> Privacy:")
        for line in self.statement.splitlines():
            _log.info("\t\t%s", line)
        for warning in warnings_of(self.plan, self._layout.layout.size, self.arrays, self._randomness, self._evaluate):
            _log.warning("%s", warning)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return one message to each client of the round's cohort, in the order of their ids."""
        if self._record is not None and self._record.replays(server_round):
            return []
        self._pace.begin()
        self._nodes = find_rejoined(grid, self._nodes, self._seen, min(REJOIN_SECONDS, 0.25 * self._pace.window))
        broadcast = self._broadcast = begin_round(self.agreement.server, self.state, server_round)
        config[_ROUND] = server_round
        shared = {
            **self._layout.question(broadcast.model, broadcast.shared),
            ARRAYS: self._model(broadcast.model),
            CONFIG: config,
            TRAINED: self._declared_arrays.to_record(),
        }
        last_round, asked = self.attendance.last_round, self.attendance.asked(self._cohort())
        if self._record is not None:
            self._record.open(server_round, self)
        helpers = self._masked.shown() if self._masked is not None and asked else ()
        told = {last: self._terms(server_round, last, helpers) for last in {0, *last_round.values()}}
        terms = {last: found.to_record() for last, found in told.items()}
        if self._masked is not None and asked:
            sent = self._layout.vector(self._layout.model(broadcast.model))  # the numbers as clients read them
            one = self._instructions(asked[0], server_round)
            self._masked.open(one, told[0], sent, RecordDict(shared), broadcast.shared)
        self._asked = {
            client: Message(
                RecordDict(
                    {
                        **shared,
                        FEDPRIV: self._instructions(client, server_round).to_record(),
                        TERMS: terms[last_round.get(client, 0)],
                        **self._shown(client),
                    }
                ),
                self._nodes[client],
                MessageType.TRAIN,
                ttl=self._pace.ttl,
                group_id=str(server_round),
            )
            for client in asked
        }
        return list(self._asked.values())

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord, MetricRecord | None]:
        """Sum the messages and apply the method's server rule to the sum."""
        if self._record is not None and self._record.replays(server_round):
            self._finished, self.result.arrays = server_round, self._model(self.state.model)
            return self.result.arrays, None
        messages: dict[int, Tensor] = {}
        if self._masked is None:
            contents, messages, failures, lost = read_answers(self._asked, replies, self._timeout, self._message)
            counted = list(messages)
        else:
            contents, masked, failures, lost = read_answers(
                self._asked, replies, self._timeout, lambda _, content: masked_message(content)
            )
            counted, invalid = self._masked.close(masked)
            failures |= by_client(invalid)
        heads = {client: Head.of(content) for client, content in contents.items()}
        self._heads.keep({client: head for client, head in heads.items() if head is not None})
        if failures:
            of, shown = len(self._asked), in_words(failures)
            _log.warning("round %d: %d of %d clients fail: %s", server_round, len(failures), of, shown)
        if self.attendance.judge(server_round, counted, failures, lost):
            self.total = self._total(contents, messages) if self._masked is None else self._masked.total()
            self.attendance.count(server_round, counted, void=self.total.void)
            if self.total.void:
                self.state = skip_round(self.agreement.server, self.state)
                why = "a sum of too few clients, or beyond its range" if self._masked is None else self._masked.reason
                _log.warning("round %d is void: %s", server_round, why)
            else:
                self.state = finish_round(self.agreement.server, self.state, server_round, self.total.sum)
        else:
            _log.warning("round %d: memories are lost: all are reset, and the round is not used", server_round)
            self.total = Total(torch.zeros_like(self.state.model, dtype=torch.float64), 0, 0, math.nan)
            self.state = skip_round(self.agreement.server, self.agreement.server.reset_memories(self.state))
        self.attendance.note(self.total)
        warn_of_total(server_round, self.total)
        if self._record is not None:
            self._record.close(server_round, self)
        self._finished, self.result.arrays = server_round, self._model(self.state.model)
        metrics = self._average({c: metrics_of_app(contents[c]) for c in counted}, f"round {server_round}")
        if metrics is not None:
            self.result.train_metrics_clientapp[server_round] = metrics
        self._pace.end()
        return self.result.arrays, metrics

    def _cohort(self) -> list[int]:
        """Return the cohort of the round; empty if a sum under secure aggregation would be over too few clients."""
        cohort, sums = self._broadcast.cohort.tolist(), self.agreement.client.sums
        return [] if sums is not None and len(cohort) < sums.least else cohort

    def _total(self, contents: dict[int, RecordDict], messages: dict[int, Tensor]) -> Total:
        """Return the total of the round's messages; under simulated secure aggregation, it may be void."""
        summed = self._broadcast.empty_sum(self.agreement.client)
        for message in messages.values():
            summed.add(message)
        total = total_of_answers(summed.value, [contents[client] for client in messages])
        return counted_total(total, self.agreement.client.sums, len(messages))

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return one message to every client if federated evaluation is on; otherwise none."""
        if not self._evaluates(server_round):
            return []
        self._pace.begin()
        config[_ROUND] = server_round
        content = RecordDict({ARRAYS: arrays, CONFIG: config})
        self._asked = {
            client: Message(content, node, MessageType.EVALUATE, ttl=self._pace.ttl, group_id=str(server_round))
            for client, node in enumerate(self._nodes)
        }
        return list(self._asked.values())

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return the clients' metrics, averaged by `num-examples` over those who answer.

        See `fedpriv.flower.server.metrics`.
        """
        if not self._evaluates(server_round):
            return None
        event = f"evaluation after round {server_round}"
        contents, reasons = sort_answers(self._asked, replies, self._timeout)
        refusals = {client: no[1] for client, content in contents.items() if (no := refused(content)) is not None}
        failures = by_client({**reasons, **refusals})
        if failures:
            _log.warning("%s: %d of %d clients fail: %s", event, len(failures), len(self._asked), in_words(failures))
        metrics = self._average({client: contents[client] for client in contents if client not in refusals}, event)
        if metrics is None:
            _log.warning("%s: there are no metrics to average", event)
        else:
            self.result.evaluate_metrics_clientapp[server_round] = metrics
        self._pace.end()
        return metrics

    def _evaluates(self, server_round: int) -> bool:
        return self._evaluate and not (self._record is not None and self._record.replays(server_round))

    def refuse_nothing_learned(self) -> None:
        """Raise UserError if no message of the whole run counted, or if no message is known to be finite."""
        self.attendance.refuse_nothing()

    def _message(self, client: int, content: RecordDict) -> Tensor:
        """Return a client's message; raise UserError if no honest client may send it."""
        rules, size = self.agreement.client, self._layout.layout.size
        message = self._layout.received(content, MessageFormat.of(rules))
        fault = message_fault(message, rules, size)
        if fault:
            expected = f"l2 norm of at most {norm_limit(rules, size):g}"
            remedy = "Nothing may change a message after private_mod: put it first in the list of mods"
            raise UserError(f"message of client {client}", expected, fault, remedy)
        return message

    def _average(self, contents: dict[int, RecordDict], event: str) -> MetricRecord | None:
        metrics, left_out = average_metrics(contents)
        if left_out:
            _log.warning("%s: %s", event, in_words(by_client(left_out)))
        return metrics

    def _model(self, vector: Tensor) -> ArrayRecord:
        """Return the app's model: trained arrays from `[params]`, and the other arrays of the first model."""
        return self.arrays.whole(self._layout.model(vector), self._initial)

    def _terms(self, server_round: int, last_round: int, helpers: tuple[str, ...]) -> RunTerms:
        """Return the terms of a round, shared by all clients that last took part in `last_round`."""
        return RunTerms(
            run=self._run,
            turn=server_round,
            last_turn=last_round,
            epoch=self.attendance.resets,
            digest="",
            helpers=helpers,
            **promised(self.plan, self.agreement.server.sampling, self._turns),
        )

    def _shown(self, client: int) -> dict[str, ConfigRecord]:
        head = self._heads.heads.get(client)
        return {} if head is None else {HEAD: head.to_record()}

    def _instructions(self, client: int, server_round: int) -> ClientInstructions:
        rules = self.agreement.client
        sums = rules.sums if self._masked is None else None  # nodes with a policy take them from the terms
        streams = rules.streams if rules.draws_secrets else None
        seeded = isinstance(streams, SeededStreams)
        return ClientInstructions(
            method=rules.method,
            round=self._broadcast.round,
            turn=0 if sums is None else server_round,
            grid=0.0 if sums is None else sums.grid,
            client=client,
            last_round=self.attendance.last_round.get(client, 0),
            noise_stddev=rules.noise_stddev,
            examples="" if rules.examples is None else rules.examples.as_text(),
            step_stddev=rules.step_stddev,
            seed=streams.seed if seeded else None,
            noise_id=streams.noise_id if seeded else "",
            private=self.plan is not None,
            diagnostics=self.plan is None or self._randomness == "seeded",
        )

    @property
    def _helpers_in_plan(self) -> int:
        return 1 if self.helpers is None else len(self.helpers.pinned)

    @property
    def _is_simulated(self) -> bool:
        """True if the run is certainly a simulation: seeded, or with integer shares and no helpers."""
        sums = self.agreement.client.sums is not None
        return self._randomness == "seeded" or (sums and self._masked is None)

    @property
    def _randomness(self) -> Randomness:
        return "seeded" if isinstance(self.agreement.server.streams, SeededStreams) else "system"

    def _new_attendance(self, rounds: int) -> Attendance:
        server, seeded = self.agreement.server, self._randomness == "seeded"
        return Attendance.of(server, self.plan, len(self._nodes), rounds, self._max_failures, seeded=seeded)

"""A Flower strategy that runs any of fedpriv's methods.

Each round is `begin_round`, Flower's network, `finish_round`; nothing here knows which method it is. The model and the
server's memory stay in the strategy: the arrays that Flower passes around are copies.
"""

import logging
import math
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords
from torch import Tensor

from clients.heads import HEAD, Head
from clients.promise import promised
from clients.wire import (
    ARRAYS,
    CONFIG,
    DIAGNOSTICS,
    FEDPRIV,
    TERMS,
    MessageFormat,
    ModelArrays,
    Order,
    Terms,
    method_name,
)
from fedpriv.errors import UserError
from fedpriv.methods import ServerState
from fedpriv.privacy import PrivacyPlan, privacy_statement
from fedpriv.rounds import ClientRules, ServerRules, Total, begin_round, finish_round
from fedpriv.streams import SeededStreams
from strategies.heads import HeadBook
from strategies.nodes import answers_by_client, find_clients

__all__ = ["Agreement", "MethodStrategy"]

_log = logging.getLogger("flwr")


class Agreement(NamedTuple):
    """What both sides hold to: the server's rules, the clients' rules, and what is promised (None: nothing)."""

    server: ServerRules
    client: ClientRules
    plan: PrivacyPlan | None


class MethodStrategy(Strategy):
    """Runs a method under an agreement; every client of a cohort answers, or the run ends with an error.

    Attributes (known from `start` on):
        agreement: The two halves of the rules, and the plan.
        statement: The privacy statement, which is also logged.
        state: The server's state: `state.model` `[params]` and what the method remembers.
        total: The sum of the last round's messages, and figures about them.

    Args:
        agree: Makes the agreement from the population's size and the number of rounds.
        num_clients: How many clients there are; None for as many nodes as have joined at the start.
        evaluate: Whether all clients evaluate the model after every round, and their metrics are averaged by
            `num-examples`. Off by default: what clients report about their data is *not* protected.
        join_timeout: Seconds to wait for all clients at the start.
        heads: A file in which to keep the heads of clients' ledgers, and to show them in later runs; None to keep them
            for this run alone. See `clients.heads`.
    """

    def __init__(
        self,
        agree: Callable[[int, int], Agreement],
        *,
        num_clients: int | None = None,
        evaluate: bool = False,
        join_timeout: float = 120.0,
        heads: str | Path | None = None,
    ) -> None:
        self._agree = agree
        self._heads = HeadBook(None if heads is None else Path(heads))
        self._num_clients = num_clients
        self._evaluate = evaluate
        self._join_timeout = join_timeout
        self._timeout = math.inf
        self._nodes: list[int] = []
        self._asked: dict[int, Message] = {}
        self._last_round: dict[int, int] = {}

    @property
    def plan(self) -> PrivacyPlan | None:
        """What is promised."""
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
        """Runs all rounds; see `flwr.serverapp.strategy.Strategy.start`.

        Raises:
            UserError: If the model cannot be trained privately, if clients are missing, or if one fails.
        """
        self.prepare(grid, initial_arrays, num_rounds, timeout)
        return super().start(grid, initial_arrays, num_rounds, timeout, train_config, evaluate_config, evaluate_fn)

    def prepare(self, grid: Grid, initial_arrays: ArrayRecord, num_rounds: int, timeout: float) -> None:
        """What comes before the first round: waits for all clients, makes the agreement and the server's state."""
        if hasattr(self, "agreement"):
            raise UserError(
                "strategy.start",
                "one start of a strategy",
                "a second",
                "Make a new strategy for a new run; what two runs spend on the same clients' data adds up",
            )
        self._arrays = ModelArrays.of(initial_arrays)
        model = self._arrays.vector(initial_arrays)
        self._timeout = timeout
        self._nodes = find_clients(grid, self._num_clients, self._join_timeout, timeout)
        self.agreement = self._agree(len(self._nodes), num_rounds)
        self.state: ServerState = self.agreement.server.method.init_server(model)
        self.total = Total(model.new_zeros(0), 0, 0, math.nan)
        self._run = secrets.token_hex(16)
        self._turns = num_rounds
        self._last_round = {}
        self.statement = privacy_statement(
            self.plan,
            method=method_name(self.agreement.server.method),
            randomness=self._randomness,
            app="supplied" if self._randomness == "system" else None,
            evaluated=self._evaluate,
        )

    def summary(self) -> None:
        """Logs who takes part and what is promised to them."""
        server = self.agreement.server
        _log.info("\t├──> Method: %s", server.method)
        _log.info("\t├──> Cohorts: %s", server.sampling)
        _log.info("\t└──> Privacy:")
        for line in self.statement.splitlines():
            _log.info("\t\t%s", line)
        if self._randomness == "seeded":
            _log.warning("Randomness comes from a seed: whoever knows it can take the noise off. Simulation only.")
        if self._evaluate and self.plan is not None:
            _log.warning("Clients report metrics of their data, which the privacy statement does not cover.")

    def configure_train(
        self,
        server_round: int,
        arrays: ArrayRecord,  # noqa: ARG002
        config: ConfigRecord,
        grid: Grid,  # noqa: ARG002
    ) -> Iterable[Message]:
        """One message to each client of the round's cohort, in the order of their ids."""
        broadcast = self._broadcast = begin_round(self.agreement.server, self.state, server_round)
        config["server-round"] = server_round
        shared = {ARRAYS: self._arrays.model(broadcast.model), CONFIG: config}
        terms = {last: self._terms(server_round, last) for last in {0, *self._last_round.values()}}
        self._asked = {
            client: Message(
                RecordDict(
                    {
                        **shared,
                        FEDPRIV: self._order(client, server_round).to_record(),
                        TERMS: terms[self._last_round.get(client, 0)],
                        **self._shown(client),
                    }
                ),
                self._nodes[client],
                MessageType.TRAIN,
                group_id=str(server_round),
            )
            for client in broadcast.cohort.tolist()
        }
        return list(self._asked.values())

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord, MetricRecord | None]:
        """Sums the messages and lets the method's server rule act on the sum."""
        answers = [answer.content for answer in self._answers(replies, f"round {server_round}")]
        messages = [self._message(client, content) for client, content in zip(self._asked, answers, strict=True)]
        heads = {client: Head.of(content) for client, content in zip(self._asked, answers, strict=True)}
        self._heads.keep({client: head for client, head in heads.items() if head is not None})
        summed = self._broadcast.empty_sum(self.agreement.client)
        for message in messages:
            summed.add(message)
        self.total = _total(summed.value, answers)
        self.state = finish_round(self.agreement.server, self.state, server_round, self.total.sum)
        self._last_round |= dict.fromkeys(self._asked, server_round)
        if self.total.non_finite:
            _log.warning("%d updates were not finite and count as nothing", self.total.non_finite)
        return self._arrays.model(self.state.model), _average([_metrics_of_app(content) for content in answers])

    def configure_evaluate(
        self,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,
        grid: Grid,  # noqa: ARG002
    ) -> Iterable[Message]:
        """One message to every client if federated evaluation is on, else none."""
        if not self._evaluate:
            return []
        config["server-round"] = server_round
        content = RecordDict({ARRAYS: arrays, CONFIG: config})
        self._asked = {
            client: Message(content, node, MessageType.EVALUATE, group_id=str(server_round))
            for client, node in enumerate(self._nodes)
        }
        return list(self._asked.values())

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The clients' metrics, averaged by `num-examples`."""
        if not self._evaluate:
            return None
        answers = self._answers(replies, f"evaluation after round {server_round}")
        return _average([answer.content for answer in answers])

    def _message(self, client: int, content: RecordDict) -> Tensor:
        """A client's message; the server that must keep the promise (trust central) checks that it is bounded."""
        message = self._arrays.received(content, MessageFormat.of(self.agreement.client))
        plan = self.plan
        if plan is not None and plan.trust == "central":
            norm = float(torch.linalg.vector_norm(message, dtype=torch.float64))
            if not norm <= plan.l2_bound:
                raise UserError(
                    f"message of client {client}",
                    f"l2 norm of at most {plan.l2_bound:g}",
                    norm,
                    "Nothing may change a message after private_mod: put it first in the list of mods",
                )
        return message

    def _answers(self, replies: Iterable[Message], what: str) -> list[Message]:
        who = [f"client {client}" for client in self._asked]
        return answers_by_client(list(self._asked.values()), replies, who, what, self._timeout)

    def _terms(self, server_round: int, last_round: int) -> ConfigRecord:
        """The terms of a round for the clients that took part last in `last_round`, which all of them may share."""
        terms = Terms(
            run=self._run,
            turn=server_round,
            last_turn=last_round,
            epoch=0,
            digest="",
            **promised(self.plan, self.agreement.server.sampling, self._turns),
        )
        return terms.to_record()

    def _shown(self, client: int) -> dict[str, ConfigRecord]:
        head = self._heads.heads.get(client)
        return {} if head is None else {HEAD: head.to_record()}

    def _order(self, client: int, server_round: int) -> Order:
        rules = self.agreement.client
        streams = rules.streams if rules.noise_stddev > 0.0 else None
        seeded = isinstance(streams, SeededStreams)
        return Order(
            method=rules.method,
            round=server_round,
            client=client,
            last_round=self._last_round.get(client, 0),
            noise_stddev=rules.noise_stddev,
            seed=streams.seed if seeded else None,
            noise_id=streams.noise_id if seeded else "",
            private=self.plan is not None,
            diagnostics=self._randomness == "seeded",
        )

    @property
    def _randomness(self) -> str:
        return "seeded" if isinstance(self.agreement.server.streams, SeededStreams) else "system"


def _total(summed: Tensor, answers: list[RecordDict]) -> Total:
    """The sum with the figures that clients reported about their signals, if they were asked to."""
    reports = [content.metric_records[DIAGNOSTICS] for content in answers if DIAGNOSTICS in content.metric_records]
    norms = [cast(float, report["signal-norm"]) for report in reports]
    finite = [norm for norm in norms if math.isfinite(norm)]
    mean = math.fsum(finite) / len(finite) if finite else math.nan
    return Total(summed, len(answers), len(norms) - len(finite), mean)


def _metrics_of_app(content: RecordDict) -> RecordDict:
    return RecordDict({name: record for name, record in content.metric_records.items() if name != DIAGNOSTICS})


def _average(contents: list[RecordDict], weight: str = "num-examples") -> MetricRecord | None:
    """The average of the clients' metrics by number of examples; None if a client sent none or no number."""
    records = [next(iter(content.metric_records.values()), None) for content in contents]
    if not records or any(record is None or not record.get(weight) for record in records):
        return None
    return aggregate_metricrecords(contents, weight)

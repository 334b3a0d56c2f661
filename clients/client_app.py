"""The ClientApp that runs fedpriv's experiments: `clientapp = "clients.client_app:app"`."""

import os
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from clients.answers import refusal, send_message
from clients.member import Member
from clients.own_data import own_signal
from clients.refusals import Refusal
from clients.run_config import RunConfig
from clients.wire import ARRAYS, CONFIG, Introduction, ModelArrays, Order, Terms, asks_who, refusal_record
from fedpriv.engines import Population, one_thread
from fedpriv.errors import UserError
from fedpriv.streams import SeededStreams, Streams

__all__ = ["TEST_SEEDED", "app"]

TEST_SEEDED = "FEDPRIV_TEST_SEEDED"
"""The environment variable that lets a seed decide the noise of a deployment: for tests, never for people."""

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answers with the client's message of one round, or says which client it is."""
    try:
        if asks_who(message.content):
            return Message(Introduction.of_node(context.node_config).to_content(), reply_to=message)
        return _train(message, context)
    except UserError as error:
        return refusal(message, str(error))


def _train(message: Message, context: Context) -> Message:
    order, terms = Order.of(message.content), Terms.of(message.content)
    home = context.node_config.get("fedpriv-home")
    if terms is not None and not home:
        remedy = "Start nodes of a deployment with: fedpriv deploy node BUNDLE"
        raise UserError("node", "one with a home of its own, and a policy in it", "one without", remedy)
    if terms is None and home:
        raise UserError("order", "terms, as deployments have them", "none", "Run it with fedpriv run --deploy")
    received = message.content.array_records[ARRAYS]
    model = ModelArrays.of(received)
    if terms is not None:
        return _deployed(message, context, Path(str(home)), order, terms)
    population = _population_of(message, context)
    with one_thread():
        x = model.vector(received).to(population.task.device)
        signal = population.signal(order.client, x, order.round).cpu()
    return Message(send_message(order, signal, model, context), reply_to=message)


def _deployed(message: Message, context: Context, home: Path, order: Order, terms: Terms) -> Message:
    """The answer of a device that guards itself; a refusal is an answer, too."""
    try:
        if order.client != _own_id(context):
            raise Refusal("model", "order", f"one for client {_own_id(context)}", order.client, "It is another's")
        order, streams = _streams(order)
        member = Member.at(home, streams)
        received = message.content.array_records[ARRAYS]
        model = ModelArrays.of(received)
        run = RunConfig.of(context.run_config, context.node_config)
        vector = model.vector(received)
        answer = member.answer(order, terms, vector, lambda: own_signal(member, run, order, terms, vector))
    except UserError as error:
        kind = error.kind if isinstance(error, Refusal) else "trouble"
        return Message(refusal_record(kind, str(error)), reply_to=message)
    return Message(RecordDict({ARRAYS: model.message(answer)}), reply_to=message)


def _own_id(context: Context) -> int | None:
    return Introduction.of_node(context.node_config).client


def _streams(order: Order) -> tuple[Order, Streams | None]:
    """The order and where its noise comes from: a seed is followed only where a test has switched that on."""
    if order.seed is not None and os.environ.get(TEST_SEEDED) == "1":
        return replace(order, seed=None), SeededStreams(order.seed)
    return order, None


def _population_of(message: Message, context: Context) -> Population:
    digest: Any = message.content.config_records[CONFIG]["experiment"]
    return _load(digest, RunConfig.of(context.run_config, context.node_config))


@lru_cache(maxsize=1)
def _load(digest: str, run: RunConfig) -> Population:
    """The experiment's clients; loaded once in a process, however many of them it plays."""
    config = run.load()
    if config.digest != digest:
        raise UserError(
            str(Path(run.config)),
            f"the server's experiment {digest[:12]}",
            f"another one, {config.digest[:12]}",
            "Give clients and server the same config and settings",
        )
    return run.assemble_clients(config)

"""The ClientApp that runs fedpriv's experiments: `clientapp = "clients.client_app:app"`."""

import logging
import os
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from flwr.app import ArrayRecord, Context, Message
from flwr.clientapp import ClientApp

from fedpriv.deploy.device.guard import HOME, answer_content, own_id, refuse_unless_simulated, terms_of
from fedpriv.deploy.device.heads import Head
from fedpriv.deploy.device.member import Member
from fedpriv.deploy.device.own_data import own_signal
from fedpriv.engines import Population, one_thread
from fedpriv.errors import UserError
from fedpriv.flower.answers import refusal, send_message
from fedpriv.flower.messages import (
    ARRAYS,
    CONFIG,
    TERMS,
    Introduction,
    ModelArrays,
    Order,
    Terms,
    asks_who,
    refusal_record,
)
from fedpriv.flower.refusals import Refusal
from fedpriv.flower.run_config import TEST_SEEDED, RunConfig
from fedpriv.streams import SeededStreams, Streams

__all__ = ["app"]

_log = logging.getLogger("flwr")

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
    home = context.node_config.get(HOME)
    if home:
        try:
            return _deployed(message, context, Path(str(home)))
        except Exception:  # what it says may speak of data, and Flower would send it to the server
            _log.exception("the order could not be followed")
            return Message(refusal_record("trouble", Refusal.because("trouble", "").told), reply_to=message)
    refuse_unless_simulated()
    if message.content.config_records.get(TERMS, {}).get("digest"):  # the terms of strategies name no experiment
        remedy = "Start nodes of a deployment with: fedpriv deploy node BUNDLE"
        raise UserError("node", "one with a home of its own, and a policy in it", "one without", remedy)
    received = message.content.array_records[ARRAYS]
    model = ModelArrays.of(received)
    population = _population_of(message, context)
    order = Order.of(message.content)  # may name a class of a file, which is known once the experiment is read
    with one_thread():
        x = model.vector(received).to(population.task.device)
        signal = population.signal(order.client, x, order.round).cpu()
    return Message(send_message(order, signal, model, context), reply_to=message)


def _deployed(message: Message, context: Context, home: Path) -> Message:
    """The answer of a device that guards itself; a refusal is an answer, too."""
    try:
        order, terms = _order_of(message)
        if order.client != own_id(context):
            raise Refusal("model", "order", f"one for client {own_id(context)}", order.client, "It is another's")
        order, streams = _streams(order)
        member = Member.at(home, streams)
        received, model = _model_of(message)
        run = RunConfig.of_device(context.run_config, context.node_config)
        vector = model.vector(received)
        shown = Head.of(message.content)
        answer = member.answer(order, terms, vector, lambda: own_signal(member, run, order, terms, vector), shown)
        content = answer_content(member, order, model, answer)
    except Refusal as refusal:
        no = refusal
    except UserError as error:
        no = Refusal.because("trouble", str(error))
    else:
        return Message(content, reply_to=message)
    _log.warning("refused (%s): %s", no.kind, no)
    return Message(refusal_record(no.kind, no.told), reply_to=message)


def _order_of(message: Message) -> tuple[Order, Terms]:
    try:
        order = Order.of(message.content)
    except UserError as error:
        raise Refusal.because("model", str(error)) from None
    return order, terms_of(message)


def _model_of(message: Message) -> tuple[ArrayRecord, ModelArrays]:
    try:
        received = message.content.array_records[ARRAYS]
        return received, ModelArrays.of(received)
    except KeyError:
        raise Refusal("model", "order", f"the model, a record {ARRAYS!r}", "none", "Start the run again") from None
    except UserError as error:
        raise Refusal.because("model", str(error)) from None


def _streams(order: Order) -> tuple[Order, Streams | None]:
    """The order and where its noise comes from: a seed is followed only where a test has switched that on."""
    if order.seed is not None and os.environ.get(TEST_SEEDED) == "1":
        return replace(order, seed=None), SeededStreams(order.seed, order.noise_id)
    return order, None


def _population_of(message: Message, context: Context) -> Population:
    digest = message.content.config_records.get(CONFIG, {}).get("experiment")
    if digest is None:
        remedy = "Use fedpriv's own ServerApp, or private_mod with the ClientApp of your app"
        raise UserError("message", "the digest of an experiment", "none", remedy)
    return _load(str(digest), RunConfig.of(context.run_config, context.node_config))


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

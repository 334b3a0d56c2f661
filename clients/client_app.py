"""ClientApp that runs fedpriv's experiments: `clientapp = "clients.client_app:app"`."""

import logging
import os
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from flwr.app import ArrayRecord, Context, Message
from flwr.clientapp import ClientApp
from torch import Tensor

from fedpriv.deploy.device.device import Device
from fedpriv.deploy.device.guard import HOME, answer_content, own_id, refuse_unless_simulated, terms_of
from fedpriv.deploy.device.heads import Head
from fedpriv.deploy.device.own_data import own_signal
from fedpriv.deploy.device.policy import POLICY_FILE, load_policy
from fedpriv.deploy.helper.answers import answer_query
from fedpriv.deploy.helper.messages import ACTION
from fedpriv.engines import Population, one_thread
from fedpriv.errors import UserError
from fedpriv.flower.answers import refusal, send_message
from fedpriv.flower.messages import (
    ARRAYS,
    CONFIG,
    TERMS,
    ClientInstructions,
    ModelArrays,
    NodeInfo,
    RunTerms,
    asks_node_info,
    refusal_record,
)
from fedpriv.flower.refusals import Refusal
from fedpriv.flower.run_config import TEST_SEEDED, RunConfig
from fedpriv.flower.state import load_state
from fedpriv.methods import own_signal_of, owns_steps
from fedpriv.streams import SeededStreams, Streams

__all__ = ["app"]

_log = logging.getLogger("flwr")

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Return the client's message of one round, or its id if the server asks for it."""
    try:
        if asks_node_info(message.content):
            return Message(NodeInfo.of_node(context.node_config).to_content(), reply_to=message)
        return _train(message, context)
    except UserError as error:
        return refusal(message, str(error))


@app.query(ACTION)
def query(message: Message, context: Context) -> Message:
    """Return the answer of a helper of secure aggregation; other nodes refuse."""
    return answer_query(message, context)


def _train(message: Message, context: Context) -> Message:
    home = context.node_config.get(HOME)
    if home:
        try:
            return _deployed(message, context, Path(str(home)))
        except Exception:  # its text may mention data, and Flower would send it to the server
            _log.exception("the instructions could not be followed")
            return Message(refusal_record("trouble", Refusal.because("trouble", "").public_line), reply_to=message)
    refuse_unless_simulated()
    if message.content.config_records.get(TERMS, {}).get("digest"):  # the terms of strategies name no experiment
        remedy = "Start nodes of a deployment with: fedpriv deploy node BUNDLE"
        raise UserError("node", "a home with a policy", "a node without a home", remedy)
    received = message.content.array_records[ARRAYS]
    model = ModelArrays.of(received)
    population = _population_of(message, context)
    # It may name a class of a file, which is known once the experiment is read.
    instructions = ClientInstructions.of(message.content)
    with one_thread():
        x = model.vector(received).to(population.task.device)
        method, shared, offset = instructions.method, model.shared(message.content, instructions.method), None
        needed = owns_steps(method) or own_signal_of(method) is not None
        state = load_state(context, instructions, model.layout.size) if needed else None
        if state is not None:
            offset = method.step_offset(state, shared)
        offset = None if offset is None else offset.to(x.device)
        rules = instructions.rules
        signal = population.signal(instructions.client, x, instructions.round, rules, offset, state).cpu()
    return Message(send_message(instructions, signal, model, context, shared), reply_to=message)


def _deployed(message: Message, context: Context, home: Path) -> Message:
    """Return the answer of a device that follows its own policy; a refusal is an answer, too."""
    try:
        load_policy(home / POLICY_FILE)  # only classes that it names are known when the instructions are read
        instructions, terms = _instructions_of(message)
        if instructions.client != own_id(context):
            remedy = "Check the partition-id of the nodes"
            raise Refusal("model", "instructions", f"client {own_id(context)}", instructions.client, remedy)
        instructions, streams = _streams(instructions)
        device = Device.at(home, streams)
        received, model = _model_of(message)
        run = RunConfig.of_device(context.run_config, context.node_config)
        vector = model.vector(received)
        shown = Head.of(message.content)
        answer = device.answer(
            instructions,
            terms,
            vector,
            lambda offset=None, state=None: own_signal(device, run, instructions, terms, vector, offset, state),
            shown,
            shared=_shared_of(message, model, instructions),
        )
        content = answer_content(device, instructions, model, answer)
    except Refusal as refusal:
        no = refusal
    except UserError as error:
        no = Refusal.because("trouble", str(error))
    else:
        return Message(content, reply_to=message)
    _log.warning("refused (%s): %s", no.kind, no)
    return Message(refusal_record(no.kind, no.public_line), reply_to=message)


def _instructions_of(message: Message) -> tuple[ClientInstructions, RunTerms]:
    try:
        instructions = ClientInstructions.of(message.content)
    except UserError as error:
        raise Refusal.because("model", str(error)) from None
    return instructions, terms_of(message)


def _model_of(message: Message) -> tuple[ArrayRecord, ModelArrays]:
    try:
        received = message.content.array_records[ARRAYS]
        return received, ModelArrays.of(received)
    except KeyError:
        raise Refusal(
            "model", "instructions", f"a record {ARRAYS!r}", "a message without it", "Start the run again"
        ) from None
    except UserError as error:
        raise Refusal.because("model", str(error)) from None


def _shared_of(message: Message, model: ModelArrays, instructions: ClientInstructions) -> Tensor | None:
    try:
        return model.shared(message.content, instructions.method)
    except UserError as error:
        raise Refusal.because("model", str(error)) from None


def _streams(instructions: ClientInstructions) -> tuple[ClientInstructions, Streams | None]:
    """Return the instructions and the source of their noise: a seed counts only if a test has enabled that."""
    if instructions.seed is not None and os.environ.get(TEST_SEEDED) == "1":
        return replace(instructions, seed=None), SeededStreams(instructions.seed, instructions.noise_id)
    return instructions, None


def _population_of(message: Message, context: Context) -> Population:
    digest = message.content.config_records.get(CONFIG, {}).get("experiment")
    if digest is None:
        remedy = "Use fedpriv's own ServerApp, or private_mod with the ClientApp of your app"
        raise UserError("message", "the digest of an experiment", "a message without it", remedy)
    return _load(str(digest), RunConfig.of(context.run_config, context.node_config))


@lru_cache(maxsize=1)
def _load(digest: str, run: RunConfig) -> Population:
    """Return the experiment's clients, which each process loads once."""
    config = run.load()
    if config.digest != digest:
        raise UserError(
            str(Path(run.config)),
            f"the server's experiment {digest[:12]}",
            f"experiment {config.digest[:12]}",
            "Give clients and server the same config and settings",
        )
    return run.assemble_clients(config)

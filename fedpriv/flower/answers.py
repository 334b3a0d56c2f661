"""Answers of clients to training messages."""

import logging
import math

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from torch import Tensor

from fedpriv.engines import one_thread
from fedpriv.flower.messages import DIAGNOSTICS, ClientInstructions, MessageFormat, ModelArrays
from fedpriv.flower.state import keep_state, load_state
from fedpriv.rounds import client_round

__all__ = ["refusal", "send_message"]

_log = logging.getLogger("flwr")


def send_message(
    instructions: ClientInstructions,
    signal: Tensor,
    model: ModelArrays,
    context: Context,
    shared: Tensor | None = None,
) -> RecordDict:
    """Return the content of an answer: the message as arrays, and diagnostics if the server asks for them.

    Args:
        instructions: Instructions to the client for this round.
        signal: The message without privacy, `[params]`; longer for a method with its own signal.
        model: Layout of the message in arrays.
        context: Stores the client's state.
        shared: The vector that the client received beside the model, `[params]`; None for none.
    """
    with one_thread():
        state = load_state(context, instructions, model.layout.size)
        sound = all(bool(torch.isfinite(field).all()) for field in state)
        message, state = client_round(
            instructions.rules, instructions.client, state, signal, instructions.round, instructions.address, shared
        )
        counted = signal[: model.layout.size]
        norm = float(torch.linalg.vector_norm(counted, dtype=torch.float64)) if sound else math.inf
    keep_state(context, instructions, state)
    if not math.isfinite(norm):
        part = "update" if sound else "memory"
        _log.warning("client %d: its %s is not finite and counts as zero", instructions.client, part)
    content: dict[str, ArrayRecord | MetricRecord | ConfigRecord] = {
        **model.message(message, MessageFormat.of(instructions.rules))
    }
    if instructions.diagnostics:
        content[DIAGNOSTICS] = MetricRecord({"signal-norm": norm})
    return RecordDict(content)


def refusal(message: Message, reason: str) -> Message:
    """Return the answer of a client that cannot take part."""
    return Message(Error(code=ErrorCode.MOD_FAILED_PRECONDITION, reason=reason), reply_to=message)

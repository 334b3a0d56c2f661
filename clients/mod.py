"""Mod that makes an existing Flower app private.

    app = ClientApp(mods=[private_mod])

The app trains as before and returns its local model. The mod computes the signal x - x_local over all trained arrays as
one vector (`fedpriv.flower.trained`). It applies the client rule of the strategy's method: it bounds the signal, adds
noise if trust is local, and keeps the memory. It sends the resulting message instead of the local model.

On a node with a home, the mod enforces the client's own policy, ledger and memory. Without a home it works only in
simulations and keeps the memory in `context.state`. See `fedpriv.deploy.device.guard`.

In a private run, nothing else in the answer leaves the client. Losses, accuracies and numbers of examples are not
protected by the bound and noise of the message. (The strategies give all clients equal weight and need none of them.)
The text of an exception does not leave either: the client logs it and sends a fixed line. Under local trust, a guarded
client instead sends a message as for an update of zero (`fedpriv.deploy.device.guard`). In a run without privacy, the
mod passes the app's metrics on.

Put this mod first in the list of mods, so that it processes the answer last. The mods after it see the local model, and
their changes are bounded together with the rest.
"""

import logging
from collections.abc import Callable
from typing import Any

from flwr.app import ArrayRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp.typing import ClientAppCallable
from torch import Tensor

from fedpriv.deploy.device.guard import Guard, content_of, guard_of
from fedpriv.errors import UserError
from fedpriv.flower.answers import refusal, send_message
from fedpriv.flower.legacy import trained_by
from fedpriv.flower.messages import (
    ARRAYS,
    FEDPRIV,
    SHARED,
    ClientInstructions,
    ModelArrays,
    NodeInfo,
    asks_node_info,
    method_name,
    refusal_record,
)
from fedpriv.flower.refusals import Refusal
from fedpriv.flower.trained import TrainedArrays, check_training
from fedpriv.methods import own_signal_of, owns_steps, side_values_of

__all__ = ["private_mod"]

_log = logging.getLogger("flwr")


def private_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Bound the answer of a ClientApp's train function by the client rule of the strategy's method.

    The mod refuses training messages that do not come from a fedpriv strategy, and answers that do not hold exactly one
    model like the one received. In simulations, messages of other types pass through. A node with a home answers
    evaluations if its policy accepts them, and no other type.
    """
    guard = None
    try:
        guard = guard_of(context)
        if message.metadata.message_type.split(".")[0] == MessageType.TRAIN:
            return _train(message, context, call_next, guard)
        return call_next(message, context) if guard is None else guard.evaluate(message, context, call_next)
    except Refusal as no:
        return _refused(message, no)
    except UserError as error:
        if guard is None:
            return refusal(message, f"private_mod: {error}")
        return _refused(message, Refusal.because("trouble", str(error)))
    except Exception as error:
        if guard is None:
            raise
        return _refused(message, Refusal.because("trouble", f"{type(error).__name__}: {error}"), error)


def _train(message: Message, context: Context, call_next: ClientAppCallable, guard: Guard | None) -> Message:
    if asks_node_info(message.content):
        return Message(NodeInfo.of_node(context.node_config).to_content(), reply_to=message)
    try:
        instructions = ClientInstructions.of(message.content)
        _refuse_corrections(instructions)
        received = _only_model(message.content, "message", beside=(SHARED,))
        arrays = TrainedArrays.of_message(message.content, received)
        model = ModelArrays.of(arrays.part(received))
        start = model.vector(arrays.part(received))
        shared = model.shared(message.content, instructions.method)
        message.content.pop(SHARED, None)  # the app's own train function expects one model
    except UserError as error:
        raise Refusal.because("model", str(error)) from None
    if instructions.examples:
        remedy = "Ask the server's operator for a run whose unit is the client"
        raise Refusal("model", "examples", "a run that protects clients", "an app that bounds no examples", remedy)
    if own_signal_of(instructions.method) is not None:
        remedy = "Ask the server's operator for another method: this one needs gradients at models that it chooses"
        raise Refusal(
            "model", "method", "a method that bounds an app's update", method_name(instructions.method), remedy
        )
    fixed = {name: received[name] for name in arrays.fixed}  # copied before the app can change them
    metrics: dict[str, Any] = {}

    def make_signal() -> Tensor:
        content = content_of(trained_by(call_next, message, context))
        metrics.update(content.metric_records)
        returned = _only_model(content, "answer of the train function")
        signal = start - model.vector(arrays.part(returned))
        try:
            check_training(arrays, instructions, model, fixed, returned, signal)
        except UserError as error:  # raised only if it reveals nothing to an adversary
            raise Refusal.because("model", str(error)) from None
        return signal

    if guard is None:
        signal = _in_private(make_signal) if instructions.private else make_signal()
        content = send_message(instructions, signal, model, context, shared)
    else:
        content = guard.train(message, instructions, model, start, lambda: _in_private(make_signal), shared)
    released = {} if instructions.private or (guard and not guard.releases_metrics(message)) else metrics
    return Message(RecordDict({**released, **content}), reply_to=message)


def _refuse_corrections(instructions: ClientInstructions) -> None:
    """Raise UserError for a method with its own local steps or metrics: those of an app are inside its functions."""
    if owns_steps(instructions.method):
        expected, got = "a method that leaves local steps alone", f"{method_name(instructions.method)}, which does not"
        raise UserError("method", expected, got, "Choose another, or run the experiment with fedpriv's own ClientApp")
    side = side_values_of(instructions.method)
    if side is not None and side.metrics is not None:
        remedy = "Leave privacy.metrics_share out, or run the experiment with fedpriv's own ClientApp"
        raise UserError("method", "no private metrics in an app that computes its own", "metrics", remedy)


def _in_private(make_signal: Callable[[], Tensor]) -> Tensor:
    """Return the signal.

    Raises:
        Refusal: Of kind `app` if the app fails. The server does not see the app's error text.
    """
    try:
        return make_signal()
    except Refusal:
        raise
    except (Exception, SystemExit) as error:
        raise Refusal.because("app", f"{type(error).__name__}: {error}") from error


def _refused(message: Message, no: Refusal, cause: Exception | None = None) -> Message:
    """Return the answer of a client that refuses. Its own log has the full reason."""
    client = message.content.config_records.get(FEDPRIV, {}).get("client", "?")
    _log.warning("client %s refused (%s): %s", client, no.kind, no, exc_info=cause or no.__cause__)
    line = f"private_mod: {no.public_line}"
    if FEDPRIV not in message.content.config_records:  # another strategy, which understands only errors
        return refusal(message, line)
    return Message(refusal_record(no.kind, line), reply_to=message)


def _only_model(content: RecordDict, where: str, beside: tuple[str, ...] = ()) -> ArrayRecord:
    """Return the only ArrayRecord, not counting those named `beside`."""
    records = [record for name, record in content.array_records.items() if name not in beside]
    if len(records) != 1:
        found = ", ".join(content.array_records) or "0 records"
        raise UserError(where, "one ArrayRecord", found, f"Send the model as RecordDict({{{ARRAYS!r}: ...}})")
    return records[0]

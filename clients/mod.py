"""The mod that makes an existing Flower app private.

    app = ClientApp(mods=[private_mod])

The app trains as ever and answers with its new local model. The mod takes what the app learned, the signal x - x_local
over all trained arrays as one vector (`fedpriv.flower.trained`), follows the client rule of the strategy's method
(bounds it, adds noise where trust is local, keeps the memory) and sends that message in place of the local model.

On a node with a home the client's own policy, ledger and memory stand behind the mod; without one it works in
simulations only, and keeps the memory in `context.state`. `fedpriv.deploy.device.guard` has the rule.

Of everything else in the answer nothing leaves the client in a private run: losses, accuracies and numbers of examples
are not protected by the message's bound and noise. (The strategies weigh all clients alike and need none of them.) Nor
does the text of an exception: the client logs it, and a fixed line is sent, or, by a guarded client under local trust,
a message as of an update of zero (`fedpriv.deploy.device.guard`). In a run without privacy the app's metrics
are passed on.

Put it first in the list of mods: it is then the last to touch what is sent. Mods behind it see the local model, and
what they change is bounded with the rest.
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
from fedpriv.flower.messages import (
    ARRAYS,
    FEDPRIV,
    ClientInstructions,
    ModelArrays,
    NodeInfo,
    asks_node_info,
    refusal_record,
)
from fedpriv.flower.refusals import Refusal
from fedpriv.flower.trained import TrainedArrays, check_training

__all__ = ["private_mod"]

_log = logging.getLogger("flwr")


def private_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Bounds what a ClientApp's train function sends, as the strategy's method says.

    A training message that does not come from one of fedpriv's strategies, or an answer that does not hold one model
    like the one received, is refused. Messages of other types pass through in simulations; a node with a
    home answers evaluations if its policy accepts them, and nothing else.
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
        received = _only_model(message.content, "message")
        arrays = TrainedArrays.of_message(message.content, received)
        model = ModelArrays.of(arrays.part(received))
        start = model.vector(arrays.part(received))
    except UserError as error:
        raise Refusal.because("model", str(error)) from None
    fixed = {name: received[name] for name in arrays.fixed}  # before an app may change it
    metrics: dict[str, Any] = {}

    def make_signal() -> Tensor:
        content = content_of(call_next(message, context))
        metrics.update(content.metric_records)
        returned = _only_model(content, "answer of the train function")
        signal = start - model.vector(arrays.part(returned))
        try:
            check_training(arrays, instructions, model, fixed, returned, signal)
        except UserError as error:  # which it raises only if that tells nothing to an adversary
            raise Refusal.because("model", str(error)) from None
        return signal

    if guard is None:
        signal = _in_private(make_signal) if instructions.private else make_signal()
        content = send_message(instructions, signal, model, context)
    else:
        content = guard.train(message, instructions, model, start, lambda: _in_private(make_signal))
    released = {} if instructions.private or (guard and not guard.releases_metrics(message)) else metrics
    return Message(RecordDict({**released, **content}), reply_to=message)


def _in_private(make_signal: Callable[[], Tensor]) -> Tensor:
    """The signal; a refusal of the kind `app` if the app fails, of which the server hears no word that the app says."""
    try:
        return make_signal()
    except Refusal:
        raise
    except (Exception, SystemExit) as error:
        raise Refusal.because("app", f"{type(error).__name__}: {error}") from error


def _refused(message: Message, no: Refusal, cause: Exception | None = None) -> Message:
    """The answer of a client that does not follow an order. Its own log has the whole reason."""
    client = message.content.config_records.get(FEDPRIV, {}).get("client", "?")
    _log.warning("client %s refused (%s): %s", client, no.kind, no, exc_info=cause or no.__cause__)
    told = f"private_mod: {no.told}"
    if FEDPRIV not in message.content.config_records:  # a strategy of somebody else's, which knows errors alone
        return refusal(message, told)
    return Message(refusal_record(no.kind, told), reply_to=message)


def _only_model(content: RecordDict, where: str) -> ArrayRecord:
    if len(content.array_records) != 1:
        found = ", ".join(content.array_records) or "none"
        raise UserError(where, "one ArrayRecord", found, f"Send the model as RecordDict({{{ARRAYS!r}: ...}})")
    return next(iter(content.array_records.values()))

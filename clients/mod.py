"""The mod that makes an existing Flower app private.

    app = ClientApp(mods=[private_mod])

The app trains as ever and answers with its new local model. The mod takes what the app learned, the signal x - x_local
over all trained arrays as one vector (`clients.trained`), follows the client rule of the strategy's method (bounds it,
adds noise where trust is local, keeps the memory in `context.state`) and sends that message instead of the local model.

Of everything else in the answer nothing leaves the client in a private run: losses, accuracies and numbers of examples
are not protected by the message's bound and noise. (The strategies weigh all clients alike and need none of them.) In a
run without privacy the app's metrics are passed on.

Put it first in the list of mods: it is then the last to touch what is sent. Mods behind it see the local model, and
what they change is bounded with the rest.
"""

from flwr.app import ArrayRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp.typing import ClientAppCallable

from clients.answers import refusal, send_message
from clients.refusals import Refusal
from clients.trained import TrainedArrays, check_training
from clients.wire import ARRAYS, Introduction, ModelArrays, Order, asks_who, refusal_record
from fedpriv.errors import UserError

__all__ = ["private_mod"]


def private_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Bounds what a ClientApp's train function sends, as the strategy's method says.

    Messages of other types than training pass through. A message that does not come from one of fedpriv's strategies,
    or an answer that does not hold one model like the one received, becomes an error reply.
    """
    if message.metadata.message_type.split(".")[0] != MessageType.TRAIN:
        return call_next(message, context)
    try:
        return _train(message, context, call_next)
    except Refusal as no:
        return Message(refusal_record(no.kind, no.told), reply_to=message)
    except UserError as error:
        return refusal(message, f"private_mod: {error}")


def _train(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    if asks_who(message.content):
        return Message(Introduction.of_node(context.node_config).to_content(), reply_to=message)
    order = Order.of(message.content)
    received = _only_model(message.content, "message")
    arrays = TrainedArrays.of_message(message.content, received)
    model = ModelArrays.of(arrays.part(received))
    start, fixed = model.vector(arrays.part(received)), {name: received[name] for name in arrays.fixed}
    answer = call_next(message, context)
    if answer.has_error():
        return answer
    returned = _only_model(answer.content, "answer of the train function")
    signal = start - model.vector(arrays.part(returned))
    check_training(arrays, order, model, fixed, returned, signal)
    content = send_message(order, signal, model, context)
    metrics = {} if order.private else dict(answer.content.metric_records)
    return Message(RecordDict({**metrics, **content}), reply_to=message)


def _only_model(content: RecordDict, where: str) -> ArrayRecord:
    if len(content.array_records) != 1:
        found = ", ".join(content.array_records) or "none"
        raise UserError(where, "one ArrayRecord", found, f"Send the model as RecordDict({{{ARRAYS!r}: ...}})")
    return next(iter(content.array_records.values()))

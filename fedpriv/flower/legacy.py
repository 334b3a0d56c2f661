"""Clients of Flower's older interface: `ClientApp(client_fn, mods=[private_mod, legacy_mod])`.

The servers of that interface are in `fedpriv.flower.legacy_server`.
"""

from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp.typing import ClientAppCallable

from fedpriv.errors import UserError
from fedpriv.flower.refusals import Refusal

__all__ = ["NotLegacy", "legacy_mod", "trained_by"]

# The names of records in the older messages: of the question, and of the answer.
_NAMES = {MessageType.TRAIN: ("fitins", "fitres"), MessageType.EVALUATE: ("evaluateins", "evaluateres")}


def legacy_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Translate a strategy's messages for a `NumPyClient`, and its answers. Place it after `private_mod`.

    The client gets the model's arrays in their order, and returns as many in the same order.
    """
    names = _NAMES.get(message.metadata.message_type.split(".")[0])
    if names is None or f"{names[0]}.parameters" in message.content.array_records:
        return call_next(message, context)
    (asked, answered), (model,) = names, message.content.array_records.values()
    settings = [record for name, record in message.content.config_records.items() if name == "config"]
    numbered = ArrayRecord({str(place): array for place, array in enumerate(model.values())})
    message.content = RecordDict(
        {f"{asked}.parameters": numbered, f"{asked}.config": settings[0] if settings else ConfigRecord()}
    )
    answer = call_next(message, context)
    if answer.has_error():
        return answer
    content = answer.content
    status = content.config_records[f"{answered}.status"]
    if status["code"] != 0:
        raise UserError("client", "status OK", f"{status['code']}: {status['message']}", "Fix the client")
    numbers: dict[str, Any] = {"num-examples": content.metric_records[f"{answered}.num_examples"]["num_examples"]}
    if answered == "evaluateres":
        numbers["loss"] = content.metric_records["evaluateres.loss"]["loss"]
    told = content.config_records[f"{answered}.metrics"]
    numbers |= {key: value for key, value in told.items() if type(value) in (int, float)}
    records: dict[str, Any] = {"metrics": MetricRecord(numbers)}
    if answered == "fitres":
        arrays = [Array(array.numpy()) for array in content.array_records["fitres.parameters"].values()]
        if len(arrays) != len(model):
            remedy = "Return all arrays of the model, in their order"
            raise UserError("answer of fit", f"{len(model)} arrays, as the model has", len(arrays), remedy)
        records["arrays"] = ArrayRecord(dict(zip(model.keys(), arrays, strict=True)))
    return Message(RecordDict(records), reply_to=message)


def trained_by(call_next: ClientAppCallable, message: Message, context: Context) -> Message:
    """Return an app's answer to a question to train.

    Raises:
        Refusal: If the app is a `NumPyClient` without `legacy_mod`.
    """
    try:
        return call_next(message, context)
    except KeyError as error:
        if error.args != ("fitins.parameters",):
            raise
        remedy = "Write ClientApp(client_fn, mods=[private_mod, legacy_mod]); both are in fedpriv.flower"
        got = "a NumPyClient alone"
        raise Refusal("model", "ClientApp", "a train function, or legacy_mod", got, remedy) from None


class NotLegacy:
    """Refuses what Flower's older server would call on a strategy."""

    def initialize_parameters(self, client_manager: object) -> None:
        """Raise UserError: the older server cannot run the strategy by itself."""
        remedy = (
            "Write ServerAppComponents(server=PrivateServer(strategy, initial_parameters=...), config=...) with "
            "PrivateServer of fedpriv.flower, or call strategy.start in a function of ServerApp.main"
        )
        raise UserError("strategy", "PrivateServer around it", f"ServerAppComponents(strategy={self!r})", remedy)

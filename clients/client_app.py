"""The ClientApp that runs fedpriv's experiments: `clientapp = "clients.client_app:app"`."""

from functools import lru_cache
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from clients.answers import refusal, send_message
from clients.run_config import RunConfig
from clients.wire import ARRAYS, CONFIG, Introduction, ModelArrays, Order, asks_who
from fedpriv.engines import Population, one_thread
from fedpriv.errors import UserError

__all__ = ["app"]

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
    order = Order.of(message.content)
    received = message.content.array_records[ARRAYS]
    model = ModelArrays.of(received)
    population = _population_of(message, context)
    with one_thread():
        x = model.vector(received).to(population.task.device)
        signal = population.signal(order.client, x, order.round).cpu()
    return Message(send_message(order, signal, model, context), reply_to=message)


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
    return run.assemble(config).population

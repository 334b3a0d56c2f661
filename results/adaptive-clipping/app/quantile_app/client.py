"""Clients whose updates have fixed lengths with median 1; the environment chooses whose mod clips them."""

import os

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import adaptiveclipping_mod

from fedpriv.flower import private_mod

SIZE = 100
RULE = os.environ.get("QUANTILE_RULE", "fedpriv")

app = ClientApp(mods=[adaptiveclipping_mod if RULE == "flower" else private_mod])


def update_of(client: int) -> np.ndarray:
    """Return the update of a client, `[SIZE]`: a random direction, and a length of median 1 over all clients."""
    rng = np.random.default_rng(client)
    direction = rng.standard_normal(SIZE)
    length = np.exp(0.5 * np.random.default_rng(10_000 + client).standard_normal())
    return direction / np.linalg.norm(direction) * length


@app.train()
def train(message: Message, context: Context) -> Message:
    """Return the model after a step of the client's length."""
    received = message.content.array_records["arrays"]["model"].numpy()
    moved = (received - update_of(int(context.node_config["partition-id"]))).astype(np.float32)
    metrics = MetricRecord({"num-examples": 1})
    return Message(RecordDict({"arrays": ArrayRecord({"model": Array(moved)}), "metrics": metrics}), reply_to=message)

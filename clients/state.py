"""A client's state between rounds, in Flower's `context.state`; to the bit.

Flower keeps it in memory only: a node that restarts has lost it. The server knows in which round a client last took
part, the client keeps the same number beside its state, and a round in which the two differ fails loudly. (The server's
memory is the mean of the clients' memories only while none is lost.)
"""

import torch
from flwr.app import Array, ArrayRecord, Context

from clients.wire import FEDPRIV, Order
from fedpriv.errors import UserError
from fedpriv.methods import ClientState

__all__ = ["keep_state", "load_state"]

_ROUND = "round"


def load_state(context: Context, order: Order, size: int) -> ClientState:
    """The client's state before the order's round; a fresh one for a model of `size` parameters in its first.

    Raises:
        UserError: If the state is not the one of the round in which the server last heard of the client.
    """
    fresh = order.method.init_client(size)
    record = context.state.array_records.get(FEDPRIV)
    last_round = 0 if record is None else int(record[_ROUND].numpy())
    if fresh._fields and last_round != order.last_round:
        raise UserError(
            f"memory of client {order.client}",
            f"its state after round {order.last_round}",
            f"its state after round {last_round}" if last_round else "none",
            "A node that restarts, or that answers too late, parts from the server: start the run again",
        )
    if record is None:
        return fresh
    return type(fresh)(*(torch.from_numpy(record[field].numpy()) for field in fresh._fields))


def keep_state(context: Context, order: Order, state: ClientState) -> None:
    """Keeps the client's state after the order's round."""
    tensors = {**state._asdict(), _ROUND: torch.tensor(order.round)}
    record = {name: Array(tensor.detach().cpu().numpy()) for name, tensor in tensors.items()}
    context.state[FEDPRIV] = ArrayRecord(record)

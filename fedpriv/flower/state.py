"""A client's state between rounds, in Flower's `context.state`; to the bit, and in two phases.

A client that has answered does not know whether its message counted: it may come too late, be lost, or be one that the
server cannot use. So it keeps the committed state, from before, and the pending one, from after. The server's next
order says which round's message counted last, and that settles it, as in a deployment (`fedpriv.deploy.device.memory`):

| the order says | then |
|---|---|
| the pending round counted | the pending state is committed |
| the committed round counted last | the pending state is dropped |
| no round counted yet, 0 | the client starts afresh |
| anything else | the memories have parted: the client says so, and the server goes by its rule for lost memories |

Flower keeps `context.state` in memory only: a node that restarts has lost it.
"""

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Context

from fedpriv.flower.messages import FEDPRIV, ClientInstructions
from fedpriv.flower.refusals import Refusal
from fedpriv.methods import ClientState

__all__ = ["keep_state", "load_state"]

_ROUNDS = "rounds"
_COMMITTED, _PENDING = "committed.", "pending."

# The fields of a client state by name.
_Fields = dict[str, Array]


def load_state(context: Context, instructions: ClientInstructions, size: int) -> ClientState:
    """Return the client's state before the order's round; a fresh one for a model of `size` parameters in its first.

    Raises:
        Refusal: If it has no state of the round whose message of this client counted last.
    """
    fresh = instructions.method.init_client(size)
    if not fresh._fields:
        return fresh
    _, fields = _settled(context, instructions)
    return type(fresh)(*(torch.from_numpy(fields[name].numpy()) for name in fresh._fields)) if fields else fresh


def keep_state(context: Context, instructions: ClientInstructions, state: ClientState) -> None:
    """Keep the client's state after the order's round as pending, beside the one that is committed."""
    if not state._fields:
        return
    committed_round, committed = _settled(context, instructions)
    record = {_ROUNDS: Array(np.array([committed_round, instructions.round], dtype=np.int64))}
    record |= {_COMMITTED + name: array for name, array in committed.items()}
    record |= {_PENDING + name: Array(tensor.detach().cpu().numpy()) for name, tensor in state._asdict().items()}
    context.state[FEDPRIV] = ArrayRecord(record)


def _settled(context: Context, instructions: ClientInstructions) -> tuple[int, _Fields]:
    """Return the round that is known to have counted last, and the state after it; empty for a fresh one."""
    if instructions.last_round == 0:
        return 0, {}
    record = context.state.array_records.get(FEDPRIV)
    committed, pending = (0, 0) if record is None else record[_ROUNDS].numpy().tolist()
    if record is not None and instructions.last_round in (committed, pending):
        side = _PENDING if instructions.last_round == pending else _COMMITTED
        return instructions.last_round, {k.removeprefix(side): v for k, v in record.items() if k.startswith(side)}
    raise Refusal(
        "lost",
        f"memory of client {instructions.client}",
        f"its state after round {instructions.last_round}",
        f"that after round {max(committed, pending)}" if record is not None else "none",
        "A node that restarts has lost it; the server goes by its rule for lost memories",
    )

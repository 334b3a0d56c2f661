"""Client state between rounds in Flower's `context.state`, exact to the bit and committed in two phases.

After a client has answered, it does not know whether its message counted: the message may be late, lost or invalid. The
client therefore keeps both the committed state from before the round and the pending state from after it. The next
instructions name the last round that counted, which decides, as in a deployment (`fedpriv.deploy.device.memory`):

| last round that counted | action |
|---|---|
| the pending round | the pending state is committed |
| the committed round | the pending state is dropped |
| 0: no round counted yet | the client restarts with a new state |
| any other | the memories diverge: the client refuses, and the server applies its rule for lost memories |

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
    """Return the client's state before this round; before its first, a new state for `size` parameters.

    Raises:
        Refusal: If the client has no state from the last round in which its message counted.
    """
    fresh = instructions.rules.init_client(size)
    if not fresh._fields:
        return fresh
    _, fields = _settled(context, instructions)
    return type(fresh)(*(torch.from_numpy(fields[name].numpy()) for name in fresh._fields)) if fields else fresh


def keep_state(context: Context, instructions: ClientInstructions, state: ClientState) -> None:
    """Store the client's state after this round as pending, next to the committed one."""
    if not state._fields:
        return
    committed_round, committed = _settled(context, instructions)
    record = {_ROUNDS: Array(np.array([committed_round, instructions.address], dtype=np.int64))}
    record |= {_COMMITTED + name: array for name, array in committed.items()}
    record |= {_PENDING + name: Array(tensor.detach().cpu().numpy()) for name, tensor in state._asdict().items()}
    context.state[FEDPRIV] = ArrayRecord(record)


def _settled(context: Context, instructions: ClientInstructions) -> tuple[int, _Fields]:
    """Return the last round known to have counted, and the state after it; empty for a new state."""
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
        f"that after round {max(committed, pending)}" if record is not None else "a lost memory",
        "The server applies its rule for lost memories; a node loses its memory when it restarts",
    )

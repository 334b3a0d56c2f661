"""Private interfaces of Flower that the grid uses; no other module uses them.

`TaskIdentity` must be set before a `Message` can be created, and only `Run.create_empty` creates a `Run`. Numbering and
copying a message, and answering it on behalf of the server, all require its `__dict__`.
`tests/flower/test_flower_grid.py` fails if Flower changes any of this.
"""

import copy
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from flwr.app import Array, ArrayRecord, Context, Error, Message, Metadata, RecordDict
from flwr.clientapp.client_app import ClientAppException
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedpriv.flower.client_errors import reason_in_short

__all__ = [
    "SERVER_NODE",
    "Run",
    "copy_context",
    "copy_message",
    "copy_records",
    "empty_run",
    "error_of_exception",
    "error_reply",
    "grid_behind",
    "inside_a_run",
    "joins_at_once",
    "number_message",
    "reason_in_short",
    "unavailable_reply",
]

SERVER_NODE: int = SUPERLINK_NODE_ID
"""Node id of the server, which also sends replies on behalf of nodes that cannot answer."""

_TASK_ID = 1


def empty_run(run_id: int) -> Run:
    """Return the description of a run with nothing but its id."""
    run = Run.create_empty(run_id)
    run.primary_task_id = _TASK_ID
    return run


def grid_behind(client: Any) -> Grid:
    """Return the grid over which Flower's older server reaches a client, a `GridClientProxy`."""
    grid: Grid = client.grid
    return grid


def joins_at_once(grid: Grid) -> bool:
    """Return whether a grid is that of Flower's simulation, in which all nodes join at the start."""
    return type(grid).__name__ == "InMemoryGrid"


@contextmanager
def inside_a_run(run_id: int, node_id: int = SERVER_NODE) -> Iterator[None]:
    """Allow the creation of a `Message`, as in the process of a ServerApp."""
    before = TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = _TASK_ID, run_id, node_id
    try:
        yield
    finally:
        TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id = before


def number_message(message: Message, message_id: str) -> None:
    """Set the id of a message."""
    message.metadata.__dict__["_message_id"] = message_id


def copy_message(message: Message) -> Message:
    """Return a copy of a message that shares only immutable values, such as the bytes of arrays."""
    twin = copy.copy(message)
    twin.__dict__["_metadata"] = copy.copy(message.metadata)
    if message.has_content():
        twin.__dict__["_content"] = copy_records(message.content)
    return twin


def copy_context(context: Context) -> Context:
    """Return a copy of a context that shares only immutable values."""
    twin = copy.copy(context)
    twin.node_config, twin.run_config = dict(context.node_config), dict(context.run_config)
    twin.state = copy_records(context.state)
    return twin


def copy_records(records: RecordDict) -> RecordDict:
    """Return copies of the records that share the bytes of their arrays."""
    twin = records.copy()
    data = twin.__dict__["_data"]
    for name, record in records.items():
        data[name] = held = record.copy()
        values = held.__dict__["_data"]
        for key, value in values.items():
            if isinstance(record, ArrayRecord):
                values[key] = _copy_array(cast(Array, value))
            elif isinstance(value, list):
                values[key] = list(value)
    return twin


def _copy_array(array: Array) -> Array:
    """Copy an array without Flower's constructor, which infers its arguments' types and would dominate the cost."""
    twin = Array.__new__(Array)
    twin.__dict__.update(
        dtype=array.dtype, shape=tuple(array.shape), stype=array.stype, data=bytes(array.data), _is_dirty=True
    )
    return twin


def error_of_exception(exception: BaseException) -> Error:
    """Return the error of Flower's simulation for a ClientApp that raised `exception`: its traceback, then its text."""
    wrapped = ClientAppException(str(exception))
    wrapped.__cause__ = exception
    text = "".join(traceback.format_exception(wrapped)).rstrip()
    return Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=f"{type(wrapped)}:<'{text}'>")


def error_reply(message: Message, reason: str) -> Message:
    """Return the reply for a client with an unusable answer."""
    return Message(Error(code=ErrorCode.UNKNOWN, reason=reason), reply_to=message)


def unavailable_reply(run_id: int, message_id: str, asked: Metadata | None = None) -> Message:
    """Return the server's reply to a message that has expired or does not exist.

    Args:
        run_id: Id of the run.
        message_id: Id of the message.
        asked: Metadata of the message; None if it does not exist.
    """
    metadata = Metadata(
        run_id=run_id,
        message_id="",
        src_node_id=SERVER_NODE,
        dst_node_id=SERVER_NODE,
        reply_to_message_id=message_id,
        group_id=asked.group_id if asked else "",
        created_at=time.time(),
        ttl=0.0,
        message_type=asked.message_type if asked else "query",
    )
    error = Error(code=ErrorCode.MESSAGE_UNAVAILABLE, reason="The message has expired, was answered, or does not exist")
    return Message(metadata=metadata, error=error)  # type: ignore[call-overload]

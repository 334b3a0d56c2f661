"""Everything that the grid needs of Flower and that Flower does not publish: the only place that touches it.

`TaskIdentity` must be set before a `Message` can be made, `Run.create_empty` is the only way to have a `Run`, and a
message is numbered, copied or answered in the name of the server only through its `__dict__`.
`tests/flower/test_flower_grid.py` fails when Flower moves any of it.
"""

import copy
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from flwr.app import Array, ArrayRecord, Context, Error, Message, Metadata, RecordDict
from flwr.clientapp.client_app import ClientAppException
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
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
    "inside_a_run",
    "number_message",
    "reason_in_short",
    "unavailable_reply",
]

SERVER_NODE: int = SUPERLINK_NODE_ID
"""The node id of the server. Replies in the name of a node that cannot answer come from it."""

_TASK_ID = 1


def empty_run(run_id: int) -> Run:
    """The description of a run about which nothing is known but its id."""
    run = Run.create_empty(run_id)
    run.primary_task_id = _TASK_ID
    return run


@contextmanager
def inside_a_run(run_id: int, node_id: int = SERVER_NODE) -> Iterator[None]:
    """Makes `Message` usable, as in a ServerApp's process."""
    before = TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = _TASK_ID, run_id, node_id
    try:
        yield
    finally:
        TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id = before


def number_message(message: Message, message_id: str) -> None:
    """Gives a message its id."""
    message.metadata.__dict__["_message_id"] = message_id


def copy_message(message: Message) -> Message:
    """A message that shares nothing with `message` that can be changed; the bytes of arrays cannot, and are shared."""
    twin = copy.copy(message)
    twin.__dict__["_metadata"] = copy.copy(message.metadata)
    if message.has_content():
        twin.__dict__["_content"] = copy_records(message.content)
    return twin


def copy_context(context: Context) -> Context:
    """A context that shares nothing with `context` that can be changed."""
    twin = copy.copy(context)
    twin.node_config, twin.run_config = dict(context.node_config), dict(context.run_config)
    twin.state = copy_records(context.state)
    return twin


def copy_records(records: RecordDict) -> RecordDict:
    """The same records in containers of their own, over the same bytes."""
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
    """Flower's constructor guesses what it is given, which costs more than everything else here."""
    twin = Array.__new__(Array)
    twin.__dict__.update(
        dtype=array.dtype, shape=tuple(array.shape), stype=array.stype, data=bytes(array.data), _is_dirty=True
    )
    return twin


def error_of_exception(exception: BaseException) -> Error:
    """What Flower's simulation answers for a ClientApp that raised `exception`: its traceback and, last, its words."""
    wrapped = ClientAppException(str(exception))
    wrapped.__cause__ = exception
    text = "".join(traceback.format_exception(wrapped)).rstrip()
    return Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=f"{type(wrapped)}:<'{text}'>")


def error_reply(message: Message, reason: str) -> Message:
    """The reply for a client whose answer cannot be used."""
    return Message(Error(code=ErrorCode.UNKNOWN, reason=reason), reply_to=message)


def unavailable_reply(run_id: int, message_id: str, asked: Metadata | None = None) -> Message:
    """The reply, in the name of the server, to a message that has expired or never was.

    Args:
        run_id: The run.
        message_id: Which message is answered.
        asked: Its metadata, if it was.
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
    error = Error(code=ErrorCode.MESSAGE_UNAVAILABLE, reason="The message has expired, was answered, or never was")
    return Message(metadata=metadata, error=error)  # type: ignore[call-overload]

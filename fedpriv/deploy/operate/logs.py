"""Logs of servers, nodes and helpers: text, or JSON with one object for each event."""

import atexit
import os
import subprocess
import sys
from contextlib import suppress

from fedpriv.deploy.operate import json_lines
from fedpriv.errors import UserError, nearest

__all__ = ["LOG_FORMATS", "log_as"]

LOG_FORMATS = ("text", "json")

_DRAIN_SECONDS = 2.0


def log_as(log_format: str, source: str, name: str) -> None:
    """Choose the format of the output of this process and of all processes that it starts, until it ends.

    JSON comes from a separate process (`fedpriv.deploy.operate.json_lines`) behind a pipe, so that nothing of a process
    that fails is lost or in another format.

    Args:
        log_format: `text` or `json`.
        source: server, node or helper.
        name: Name of its folder.

    Raises:
        UserError: If there is no such format.
    """
    if log_format not in LOG_FORMATS:
        raise UserError("--log-format", "text or json", repr(log_format), nearest(log_format, LOG_FORMATS))
    if log_format == "text":
        return
    reading, writing = os.pipe()
    command = [sys.executable, "-P", json_lines.__file__, source, name]
    writer = subprocess.Popen(command, stdin=reading)
    os.close(reading)
    sys.stdout.flush()
    sys.stderr.flush()
    for descriptor in (1, 2):
        os.dup2(writing, descriptor)
    os.close(writing)
    atexit.register(_drain, writer, os.getpid())


def _drain(writer: "subprocess.Popen[bytes]", pid: int) -> None:
    """Close this process's output and wait until it is written; other processes may still hold the pipe."""
    if os.getpid() != pid:  # a fork
        return
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    null = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(null, descriptor)
    with suppress(subprocess.TimeoutExpired):
        writer.wait(_DRAIN_SECONDS)

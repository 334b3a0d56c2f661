"""Program that turns the output of a server, a node or a helper into JSON, one object for each event.

    python -P json_lines.py SOURCE NAME < OUTPUT

It reads the output of all processes of a server or node from one pipe. Records of Flower's log begin with a level,
those of its HTTP server with a time and a level; lines that continue a record, and tracebacks, are part of its message.
Any other line is an event of level `info`, or `warning` if fedpriv printed it. Times are those of arrival, in UTC.

The program is run by its path and imports nothing but the standard library. It ends with the last writer of the pipe,
so that the last words of a process that was killed are still written.
"""

import json
import os
import re
import selectors
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime

__all__ = ["Events", "main"]

_COLORS = re.compile(r"\x1b\[[0-9;]*m")
_LEVEL = "(DEBUG|INFO|WARNING|ERROR|CRITICAL)"
_RECORD = re.compile(rf"{_LEVEL}(?: [0-9][0-9:, .-]*)? *: *(.*)")
_SERVER_RECORD = re.compile(rf"[0-9T:.-]+Z {_LEVEL} (\[[\w.]+\] .*)")
_TRACEBACK = "Traceback (most recent call last):"
_OWN = "fedpriv: "

# A record arrives in one piece; a traceback in several, shortly after one another.
_PAUSE_SECONDS = 0.2
_MAX_BYTES = 2**20


@dataclass
class Events:
    """Assembles lines into events.

    Args:
        source: server, node or helper.
        name: Name of its folder, such as node-3.
    """

    source: str
    name: str
    _level: str = "info"
    _at: str = ""
    _lines: list[str] = field(default_factory=list)
    _in_traceback: bool = False
    _in_record: bool = False

    def lines(self, text: str) -> Iterator[str]:
        """Take one line of output, without its line break; yield the event before it, if the line begins a new one."""
        line = _COLORS.sub("", text).rstrip()
        record = _RECORD.fullmatch(line) or _SERVER_RECORD.fullmatch(line)
        continues = self._in_traceback or line[:1] in (" ", "\t") or not line
        continues |= self._in_record and line.startswith(_TRACEBACK)
        if self._lines and record is None and continues:
            self._in_traceback |= line.startswith(_TRACEBACK)
            self._lines.append(line)
            return
        yield from self.end()
        self._at = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        if record is not None:
            self._level, line = record[1].lower(), record[2]
        elif line.startswith(_TRACEBACK):
            self._level, self._in_traceback = "error", True
        elif line.startswith(_OWN):
            self._level, line = "warning", line.removeprefix(_OWN)
        self._lines, self._in_record = [line], record is not None

    def end(self) -> Iterator[str]:
        """Yield the open event, unless it is empty, as a line of JSON."""
        message = "\n".join(self._lines).strip()
        level, at = self._level, self._at
        self._level, self._lines, self._in_traceback = "info", [], False
        if message:
            yield json.dumps(
                {"time": at, "level": level, "source": self.source, "name": self.name, "message": message},
                ensure_ascii=False,
            )


def main(source: str, name: str) -> None:
    """Turn the standard input into events on the standard output until it ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the processes behind the pipe end first
    events, rest = Events(source, name), b""
    with selectors.DefaultSelector() as ready:
        ready.register(0, selectors.EVENT_READ)
        while True:
            if not ready.select(_PAUSE_SECONDS):
                _write(events.end())
                continue
            found = os.read(0, 2**16)
            whole, _, rest = (rest + found).rpartition(b"\n")
            if not found or len(rest) > _MAX_BYTES:
                whole, rest = whole + b"\n" + rest, b""
            for line in whole.split(b"\n") if whole.strip() else []:
                _write(events.lines(line.decode(errors="replace")))
            if not found:
                _write(events.end())
                return


def _write(lines: Iterator[str]) -> None:
    for line in lines:
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Text for terminals: lines break between words. Files and pipes get every line whole."""

import logging
import re
import shutil
import sys
import textwrap
from typing import TextIO

__all__ = ["PAGE", "fitted", "is_terminal", "log_to_terminal", "say", "unwrapped"]

PAGE = 100
"""The width of statements (columns)."""

# The start of a line below which its rest is set: an indent, then a label or the mark of a list.
_LABEL = re.compile(r" *(?:\* |\w[\w ]{0,10} {2,})?")
# Textwrap also breaks a line after a hyphen.
_PIECE = re.compile(r"[^\s-]+-?|\S+")


def fitted(text: str, columns: int) -> str:
    """Return text with its longer lines broken between words, each below the part behind its label.

    Args:
        text: Lines.
        columns: The width. Longer words, such as paths, stay whole.
    """
    lines = []
    for line in text.split("\n"):
        label = _LABEL.match(line)
        indent = " " * min(len(label[0]) if label else 0, columns // 2)
        broken = textwrap.wrap(line, columns, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
        lines += broken if len(line) > columns else [line]
    return "\n".join(lines)


def unwrapped(text: str, width: int = PAGE) -> str:
    """Return text that was broken at `width` with the lines of each paragraph joined again."""
    lines: list[str] = []
    room = 0  # of the last line, before lines were joined to it
    for line in text.split("\n"):
        piece = _PIECE.match(line.lstrip())
        hang = "  " if lines and lines[-1].startswith("* ") else ""
        goes_on = piece is not None and line.startswith(hang) and not line.startswith(("* ", hang + " "))
        if lines and lines[-1] and piece is not None and goes_on and room < len(piece[0]):
            lines[-1] += ("" if lines[-1].endswith("-") else " ") + line.lstrip()
        else:
            lines.append(line)
        room = width - len(line) - (not line.endswith("-"))
    return "\n".join(lines)


def is_terminal(stream: TextIO) -> bool:
    """Return whether lines of a stream are shown in columns."""
    return stream.isatty()


def say(text: str, *, error: bool = False, paragraphs: bool = False) -> None:
    """Print text, with lines broken between words if the output is a terminal.

    Args:
        text: Lines.
        error: Print to stderr instead of stdout.
        paragraphs: True if lines are already broken, at the width of a page, which is then the maximum.
    """
    stream = sys.stderr if error else sys.stdout
    if is_terminal(stream):
        columns = shutil.get_terminal_size().columns
        text = fitted(unwrapped(text), min(columns, PAGE)) if paragraphs else fitted(text, columns)
    print(text, file=stream)


class _Said(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(f"{record.levelname.lower():11} {record.getMessage()}", error=True)


def log_to_terminal() -> None:
    """Show warnings of fedpriv as other lines are shown."""
    log = logging.getLogger("fedpriv")
    if not any(isinstance(handler, _Said) for handler in log.handlers):
        log.addHandler(_Said(logging.WARNING))

"""Exceptions behind error replies of clients, as written by Flower's simulation, its SuperNodes and fedpriv's grid."""

import re
from pathlib import Path

from flwr.app import Error

__all__ = ["place_of", "reason_in_short", "traceback_of"]

_PACKAGES = "site-packages"
_CAUSE_OF = "\n\nThe above exception was the direct cause of the following exception:\n\n"
_DURING = "\n\nDuring handling of the above exception, another exception occurred:\n\n"

# Flower wraps an exception: its class, in simulations the text of Flower's own exception, and a traceback.
_IN_ITS_CLASS = re.compile(r"<class '(?P<kind>[^']*)'>:<'(?P<text>.*)'>\s*", re.DOTALL)
_WRAPPED = re.compile(r"(?:[\w.]*ClientAppException: *\n+)?Exception ClientAppException occurred\. Message: ?")
_FRAME = re.compile(r'^ +File "(?P<file>.*)", line (?P<line>\d+), in ', re.MULTILINE)


def reason_in_short(error: Error) -> str:
    """Return the exception behind an error reply as one line: its class and text, without the traceback."""
    inner = _inner(error)
    traceback_ = traceback_of(error)
    if traceback_:
        inner = _frames_and_words(traceback_)[1]
    elif (wrapped := _WRAPPED.search(inner)) is not None:
        inner = inner[wrapped.end() :]
    elif (known := _IN_ITS_CLASS.fullmatch(error.reason or "")) is not None:
        inner = f"{known['kind'].rpartition('.')[2]}: {inner}"
    return " ".join(inner.split()).rstrip(".") or f"error {error.code}"


def traceback_of(error: Error) -> str:
    """Return the traceback of the exception behind an error reply, with its text; empty if there is none."""
    inner = _inner(error)
    wrapped = _WRAPPED.search(inner)
    if wrapped is None:
        return ""
    cause, found, _ = inner[: wrapped.start()].rpartition(_CAUSE_OF)
    return cause if found else ""


def place_of(error: Error, folder: Path) -> str:
    """Return the place at which the exception behind an error reply was raised, if possible in the app's own files.

    Args:
        error: The error.
        folder: The app's folder.

    Returns:
        File and line; empty if the error has no traceback.
    """
    frames = [
        (Path(frame["file"]), frame["line"]) for frame in _FRAME.finditer(_frames_and_words(traceback_of(error))[0])
    ]
    own = [frame for frame in frames if _is_own(folder, frame[0])]
    return _place(folder, *(own or frames)[-1]) if frames else ""


def _is_own(folder: Path, file: Path) -> bool:
    return file.is_relative_to(folder) and _PACKAGES not in file.relative_to(folder).parts


def _place(folder: Path, file: Path, line: str) -> str:
    """Return file and line, with the file relative to the app's folder or to that of installed packages."""
    parts = file.relative_to(folder).parts if _is_own(folder, file) else file.parts
    parts = parts[parts.index(_PACKAGES) + 1 :] if _PACKAGES in parts else parts
    return f"{Path(*parts)}, line {line}"


def _inner(error: Error) -> str:
    """Return Flower's text without the class around it."""
    reason = error.reason or ""
    known = _IN_ITS_CLASS.fullmatch(reason)
    return known["text"] if known else reason


def _frames_and_words(text: str) -> tuple[str, str]:
    """Return the frames of the last exception in a traceback, and its class and text.

    The frames of a traceback are indented. The text of the exception follows at the margin. It may have any number of
    lines, indented or not, and may itself contain a traceback.
    """
    last = max(text.rfind(between) + len(between) if between in text else 0 for between in (_CAUSE_OF, _DURING))
    lines = text[last:].splitlines()
    begins = next((i for i, line in enumerate(lines[1:], 1) if line.strip() and not line[0].isspace()), len(lines) - 1)
    return "\n".join(lines[:begins]), "\n".join(lines[begins:])

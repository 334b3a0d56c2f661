"""Files that survive a crash: whole or not there, with their mode from the first byte on, and on the disk.

Each is written beside its place, as `NAME.part`, and then takes it. What a run writes raises `OSError` where it cannot
be written; what a client of a deployment keeps (`make_private_folder` to `only_one`) is its owner's alone, and a full
disk is one `UserError`.
"""

import errno
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

from fedpriv.errors import UserError

__all__ = [
    "append_durably",
    "finish_replacing",
    "lock_file",
    "make_owners_folder",
    "make_private_folder",
    "only_one",
    "open_to_append",
    "prepare_replacing",
    "replace_durably",
    "sync_folder",
    "unfinished",
    "write_atomically",
    "write_pieces_atomically",
]

_OWNER_ONLY = 0o600
# What the umask is taken off.
_ANYONE = 0o666
# Windows cannot open a folder, and needs no flush of one.
_FOLDERS_OPEN = os.name != "nt"
# Windows would write a line feed as two bytes.
_BINARY = getattr(os, "O_BINARY", 0)


def write_atomically(path: Path, content: bytes | str, mode: int | None = None) -> None:
    """Writes a file that appears whole or not at all, also if the machine stops in between.

    Args:
        path: The file.
        content: What it holds.
        mode: Who may read it, from its first byte on; None leaves that to the umask.
    """
    write_pieces_atomically(path, [content.encode() if isinstance(content, str) else content], mode)


def write_pieces_atomically(
    path: Path, pieces: Iterable[bytes | memoryview], mode: int | None = None, *, durable: bool = True
) -> None:
    """The same for a content that comes in pieces, of which only one is in memory at a time.

    Args:
        path: The file.
        pieces: What it holds, one after the other.
        mode: As in `write_atomically`.
        durable: Whether it must outlive a stop of the machine; False is faster, for what is worth nothing after one.
    """
    _write_beside(path, pieces, _ANYONE if mode is None else mode, durable)
    _take_place(path, durable)


def open_to_append(path: Path, mode: int | None = None) -> BinaryIO:
    """A file to add to, created with `mode`, or as the umask says, if it is not there."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | _BINARY
    return os.fdopen(os.open(path, flags, _ANYONE if mode is None else mode), "ab")


def make_owners_folder(path: Path) -> None:
    """Makes a folder that its owner alone can enter, or closes one to others before more is written to it."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.chmod(0o700)


def sync_folder(path: Path) -> None:
    """Puts on the disk which files a folder holds."""
    if not _FOLDERS_OPEN:
        return
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def make_private_folder(path: Path) -> None:
    """Makes a folder, and those above it that are missing; only their owner can enter them."""
    with _explained(path):
        for folder in reversed([path, *path.parents]):
            if not folder.exists():
                folder.mkdir(exist_ok=True, mode=0o700)
                sync_folder(folder.parent)


def replace_durably(path: Path, content: bytes) -> None:
    """Replaces a file by another content, or leaves it as it was.

    Raises:
        UserError: If the disk is full or cannot be written to.
    """
    prepare_replacing(path, content)
    finish_replacing(path)


def prepare_replacing(path: Path, content: bytes) -> None:
    """Writes a file's new content beside it. Only this takes up room, and only `finish_replacing` changes the file.

    Raises:
        UserError: If the disk is full or cannot be written to.
    """
    with _explained(path):
        _write_beside(path, [content], _OWNER_ONLY)


def finish_replacing(path: Path) -> None:
    """Gives a file the content that `prepare_replacing` wrote beside it."""
    with _explained(path):
        _take_place(path)


def unfinished(path: Path) -> Path:
    """Where the new content of a file is until it takes the file's place."""
    return path.with_name(path.name + ".part")


def append_durably(path: Path, line: bytes, length: int) -> None:
    """Adds a line to a file of `length` bytes; what a crash left beyond them is taken off, as is what fails half way.

    Raises:
        UserError: If the disk is full or cannot be written to.
    """
    with _explained(path):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, _OWNER_ONLY)
        try:
            os.ftruncate(file, length)
            try:
                _write_all(file, line)
                os.fsync(file)
                sync_folder(path.parent)
            except OSError:
                os.ftruncate(file, length)
                raise
        finally:
            os.close(file)


def lock_file(file: IO[Any] | int, *, wait: bool = True) -> None:
    """Lock an open file for this process, until it is closed.

    Args:
        file: The file, or its descriptor.
        wait: Whether to wait for another process that holds the lock.

    Raises:
        BlockingIOError: If another process holds the lock, and `wait` is False.
        UserError: If the system has no such locks (Windows). Reading results, reports and plans needs none.
    """
    try:
        import fcntl
    except ImportError:
        remedy = "Run it on Linux or macOS; results, reports and plans can be read on any system"
        raise UserError("fedpriv", "a system with file locks (fcntl)", sys.platform, remedy) from None
    fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def only_one(path: Path) -> Iterator[None]:
    """Holds a lock file meanwhile; another process waits for it."""
    with _explained(path):
        file = os.open(path, os.O_WRONLY | os.O_CREAT, _OWNER_ONLY)
    try:
        lock_file(file)
        yield
    finally:
        os.close(file)


def _write_beside(path: Path, pieces: Iterable[bytes | memoryview], mode: int, durable: bool = True) -> None:
    """Writes what shall take the place of `path`; what fails half way takes up no room."""
    part = unfinished(path)
    part.unlink(missing_ok=True)  # one that a crash left keeps its mode
    file = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _BINARY, mode)
    try:
        for piece in pieces:
            _write_all(file, piece)
        if durable:
            os.fsync(file)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    finally:
        os.close(file)


def _take_place(path: Path, durable: bool = True) -> None:
    unfinished(path).replace(path)
    if durable:
        sync_folder(path.parent)


def _write_all(file: int, content: bytes | memoryview) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(file, rest) :]


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = "no space left" if error.errno == errno.ENOSPC else (error.strerror or str(error))
        remedy = "Free some space, or mend the folder; nothing was sent and nothing is lost"
        raise UserError(str(path), "room for the client's records", reason, remedy) from None

"""Durable files: complete or absent after a crash, with their mode set from the first byte.

Each file is written next to its destination as `NAME.part`, then renamed. Functions for run outputs raise `OSError` if
a file cannot be written. Functions for a deployment client's files (`make_private_folder` to `only_one`) create
owner-only files and report a full disk as one `UserError`.
"""

import errno
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

from fedpriv.errors import UserError, naming

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
# The mode before the umask is applied.
_ANYONE = 0o666
# Windows cannot open a folder, and needs no flush of one.
_FOLDERS_OPEN = os.name != "nt"
# Windows would write a line feed as two bytes.
_BINARY = getattr(os, "O_BINARY", 0)


def write_atomically(path: Path, content: bytes | str, mode: int | None = None) -> None:
    """Write a file atomically: after a crash it is complete or absent.

    Args:
        path: The file.
        content: Its contents.
        mode: Permissions, set from the first byte on; None leaves them to the umask.
    """
    write_pieces_atomically(path, [content.encode() if isinstance(content, str) else content], mode)


def write_pieces_atomically(
    path: Path, pieces: Iterable[bytes | memoryview], mode: int | None = None, *, durable: bool = True
) -> None:
    """Write a file atomically from pieces, with only one piece in memory at a time.

    Args:
        path: The file.
        pieces: Its contents, in order.
        mode: As in `write_atomically`.
        durable: Sync the file to disk. False is faster, for files that are worthless after a system crash.
    """
    with naming(path):
        _write_beside(path, pieces, _ANYONE if mode is None else mode, durable)
        _take_place(path, durable)


def open_to_append(path: Path, mode: int | None = None) -> BinaryIO:
    """Open a file for appending. If it is missing, create it with `mode`, or as the umask says if `mode` is None."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | _BINARY
    return os.fdopen(os.open(path, flags, _ANYONE if mode is None else mode), "ab")


def make_owners_folder(path: Path) -> None:
    """Create a folder with owner-only access, or restrict an existing one before more is written to it."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.chmod(0o700)


def sync_folder(path: Path) -> None:
    """Sync a folder's list of files to disk."""
    if not _FOLDERS_OPEN:
        return
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def make_private_folder(path: Path) -> None:
    """Create a folder and its missing parents with owner-only access."""
    with _explained(path):
        for folder in reversed([path, *path.parents]):
            if not folder.exists():
                folder.mkdir(exist_ok=True, mode=0o700)
                sync_folder(folder.parent)


def replace_durably(path: Path, content: bytes) -> None:
    """Replace a file's contents atomically, or leave it as it was.

    Raises:
        UserError: If the disk is full or cannot be written to.
    """
    prepare_replacing(path, content)
    finish_replacing(path)


def prepare_replacing(path: Path, content: bytes) -> None:
    """Write a file's new contents next to it. Only this step needs space; only `finish_replacing` changes the file.

    Raises:
        UserError: If the disk is full or cannot be written to.
    """
    with _explained(path):
        _write_beside(path, [content], _OWNER_ONLY)


def finish_replacing(path: Path) -> None:
    """Replace a file by the contents that `prepare_replacing` wrote next to it."""
    with _explained(path):
        _take_place(path)


def unfinished(path: Path) -> Path:
    """Return the path that holds a file's new contents until they replace the file."""
    return path.with_name(path.name + ".part")


def append_durably(path: Path, line: bytes, length: int) -> None:
    """Append a line to a file of `length` bytes. Truncates leftovers of a crash beyond `length`, and a failed write.

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
    """Hold a lock file within the context; other processes wait for it."""
    with _explained(path):
        file = os.open(path, os.O_WRONLY | os.O_CREAT, _OWNER_ONLY)
    try:
        lock_file(file)
        yield
    finally:
        os.close(file)


def _write_beside(path: Path, pieces: Iterable[bytes | memoryview], mode: int, durable: bool = True) -> None:
    """Write the file that will replace `path`; delete it if writing fails."""
    part = unfinished(path)
    part.unlink(missing_ok=True)  # a leftover of a crash would keep its mode
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
        remedy = "Free some space, or repair the folder; nothing was sent and nothing is lost"
        raise UserError(str(path), "room for the client's records", reason, remedy) from None

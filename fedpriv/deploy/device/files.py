"""Private files that survive a crash: whole or not there, and on the disk before anything else happens."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedpriv.errors import UserError
from fedpriv.experiment.run_directory import sync_folder

__all__ = [
    "append_durably",
    "finish_replacing",
    "make_private_folder",
    "only_one",
    "prepare_replacing",
    "replace_durably",
    "unfinished",
]


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
    part = unfinished(path)
    with _explained(path):
        try:
            _write_new(part, content)
        except OSError:
            part.unlink(missing_ok=True)
            raise


def finish_replacing(path: Path) -> None:
    """Gives a file the content that `prepare_replacing` wrote beside it."""
    with _explained(path):
        unfinished(path).replace(path)
        sync_folder(path.parent)


def unfinished(path: Path) -> Path:
    """Where the new content of a file is until it takes the file's place."""
    return path.with_name(path.name + ".part")


def append_durably(path: Path, line: bytes, length: int) -> None:
    """Adds a line to a file of `length` bytes; what a crash left beyond them is taken off, as is what fails half way.

    Raises:
        UserError: If the disk is full or cannot be written to.
    """
    with _explained(path):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
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


@contextmanager
def only_one(path: Path) -> Iterator[None]:
    """Holds a lock file meanwhile; another process waits for it."""
    with _explained(path):
        file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def _write_new(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)  # one that a crash left keeps its mode
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        _write_all(file, content)
        os.fsync(file)
    finally:
        os.close(file)


def _write_all(file: int, content: bytes) -> None:
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

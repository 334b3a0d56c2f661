"""Atomic files: one mechanism for the files of runs and of deployment clients."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from fedpriv import files
from fedpriv.errors import UserError

WRITERS = {
    "a run's": (lambda path, content: files.write_atomically(path, content, 0o600), OSError),
    "a snapshot": (lambda path, content: files.write_pieces_atomically(path, [content], 0o600, durable=False), OSError),
    "a client's": (files.replace_durably, UserError),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_disk_that_fills_up_half_way_changes_nothing_and_leaves_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, error = WRITERS[name]
    path = tmp_path / "file"
    write(path, b"old")
    real, calls = os.write, []

    def torn(file: int, content: bytes) -> int:
        calls.append(file)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return real(file, content[:2])

    with monkeypatch.context() as patched:
        patched.setattr(files.os, "write", torn)
        with pytest.raises(error, match=r"(?i)no space left"):
            write(path, b"newer")
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == {"file": b"old"}


@pytest.mark.parametrize("name", WRITERS)
def test_an_owners_file_is_so_from_its_first_byte_on_whatever_a_crash_left(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, part = tmp_path / "file", tmp_path / "file.part"
    part.write_bytes(b"torn and open to all")
    part.chmod(0o644)
    real, seen = os.write, []

    def write(file: int, content: bytes) -> int:
        seen.append(stat.S_IMODE(os.fstat(file).st_mode))
        return real(file, content[:3])

    monkeypatch.setattr(files.os, "write", write)
    WRITERS[name][0](path, b"secret")
    assert seen == [0o600, 0o600]
    assert (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) == (b"secret", 0o600)
    assert not part.exists()


@pytest.mark.parametrize(("name", "durable"), [("a run's", True), ("a snapshot", False), ("a client's", True)])
def test_file_and_folder_are_on_the_disk(
    name: str, durable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync: Callable[[int], None] = os.fsync

    def noted(file: int) -> None:
        synced.append(Path(f"/proc/self/fd/{file}").readlink().name)
        fsync(file)

    monkeypatch.setattr(files.os, "fsync", noted)
    WRITERS[name][0](tmp_path / "file", b"content")
    assert synced == (["file.part", tmp_path.name] if durable else [])


def test_without_a_mode_the_umask_decides(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        files.write_atomically(tmp_path / "file", "text")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640

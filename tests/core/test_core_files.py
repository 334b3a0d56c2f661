"""Atomic files: one mechanism for the files of runs and of deployment clients."""

import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from fedpriv import files
from fedpriv.data.dataset import Dataset
from fedpriv.data.federation import Federation, plot_who_holds_what
from fedpriv.errors import UserError
from fedpriv.experiment import run_directory
from fedpriv.experiment.pictures.tradeoff import plot_trade_off
from fedpriv.privacy import Everyone, make_plan
from fedpriv.report.figures import save_figure

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
        with pytest.raises(error, match=r"(?i)no space left") as caught:
            write(path, b"newer")
    named = caught.value.filename if isinstance(caught.value, OSError) else str(caught.value)
    assert str(path) in named
    assert ".part" not in named
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


def full_disk(folder: Path, name: str) -> Path:
    """Return a file that can be opened, and not written."""
    path = folder / name
    path.symlink_to("/dev/full")
    return path


def pictured(path: Path) -> None:
    plan = make_plan(trust="central", sampling=Everyone(9), rounds=3, delta=1e-5, l2_bound=1.0, epsilon=1.0)
    plot_trade_off(plan, path, "dp-fedavg")


def held(path: Path) -> None:
    inputs, labels = torch.zeros(40, 2), torch.arange(40) % 4
    data = Dataset(
        name="tiny",
        train_inputs=inputs,
        train_labels=labels,
        test_inputs=inputs[:4],
        test_labels=labels[:4],
        classes=4,
    )
    plot_who_holds_what(Federation(dataset=data, offsets=np.array([0, 20, 40]), rows=np.arange(40)), path)


def reported(path: Path) -> None:
    save_figure(Figure(), path.parent, path.stem)


FULL = {"tradeoff.png": pictured, "who.png": held, "figure.png": reported}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("name", FULL)
def test_an_error_of_a_full_disk_names_the_file(name: str, tmp_path: Path) -> None:
    path = full_disk(tmp_path, name)
    with pytest.raises(OSError, match="No space left") as caught:
        FULL[name](path)
    assert caught.value.filename == str(path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_an_error_of_a_full_disk_names_a_file_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rounds.jsonl").touch()
    monkeypatch.setattr(run_directory, "open_to_append", lambda *_: os.fdopen(os.open("/dev/full", os.O_WRONLY), "ab"))
    with pytest.raises(OSError, match="No space left") as caught:
        run_directory.RunDirectory(tmp_path).append("rounds.jsonl", {"round": 0})
    assert caught.value.filename == str(tmp_path / "rounds.jsonl")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("command", [["list"], ["--help"]])
def test_a_full_disk_below_the_standard_output_is_named(command: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "fedpriv", *command], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert ended.returncode == 2
    assert ended.stderr.startswith("fedpriv: standard output: No space left on device. ")


def test_files_are_written_by_functions_that_name_them() -> None:
    """`Path.write_text` on a full disk raises an error without the file."""
    root = Path(files.__file__).parents[1]
    wrong = re.compile(r"\.write_bytes\(|\.write_text\([^\n]*encoding=")
    found = {
        str(path.relative_to(root))
        for package in ("fedpriv", "strategies", "clients")
        for path in (root / package).rglob("*.py")
        if wrong.search(path.read_text(encoding="utf-8"))
    }
    assert found == {"fedpriv/cli/catalogue.py"}  # for developers

"""A helper's record: on disk before the reply, lost together with the key, and never a second answer."""

import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support.secure_round import World

from fedpriv.errors import UserError
from fedpriv.files import only_one
from fedpriv.secure import Answer, Query
from fedpriv.secure import log as log_module
from fedpriv.secure.helper import LOCK_FILE
from fedpriv.secure.log import LOG_FILE, RunLog


class Killed(BaseException):
    """The process ends here."""


def answered(world: World, query: Query) -> Answer | None:
    """Return a restarted helper's answer; None if it refuses."""
    try:
        return world.helper().answer(query)
    except UserError:
        return None


def without(query: Query, position: int) -> Query:
    return replace(query, members=(*query.members[:position], *query.members[position + 1 :]))


def log_of(world: World, run: str = "run-1") -> Path:
    return RunLog(world.home / "helper-0", run).folder / LOG_FILE


def test_a_restarted_helper_has_its_key_and_its_answers(tmp_path: Path) -> None:
    world = World(tmp_path)
    key, query = world.helper().key("run-1"), world.query()
    answer = world.helper().answer(query)
    assert world.helper().key("run-1") == key
    assert world.helper().answer(query).to_bytes() == answer.to_bytes()
    assert answered(world, without(query, 0)) is None


def test_an_answer_is_on_disk_before_the_reply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file first, then, after it took its place, its folder."""
    world = World(tmp_path)
    query, synced, sync = world.query(), [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(os.fstat(file).st_ino), sync(file)))
    world.helper().answer(query)
    log, answer = log_of(world), log_of(world).parent / "1.answer"
    wanted = [answer.stat().st_ino, log.parent.stat().st_ino, log.stat().st_ino, log.parent.stat().st_ino]
    assert synced == wanted


def test_a_key_is_on_disk_before_it_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world, synced, sync = World(tmp_path), [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(os.fstat(file).st_ino), sync(file)))
    world.helper().key("run-1")
    log = log_of(world)
    assert synced[-2:] == [log.stat().st_ino, log.parent.stat().st_ino]
    assert log.parent.parent.stat().st_ino in synced


@pytest.mark.parametrize("moment", range(4))
def test_a_helper_killed_at_any_moment_answers_one_query(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    """Killed before and after each of its two writes: of two different queries, one gets answers at most."""
    world = World(tmp_path)
    query, writes, write = world.query(), [], log_module.replace_durably

    def killed_write(path: Path, content: bytes) -> None:
        writes.append(path)
        if len(writes) == moment // 2 + 1:
            if moment % 2:
                write(path, content)
            raise Killed
        write(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(log_module, "replace_durably", killed_write)
        with pytest.raises(Killed):
            world.helper().answer(query)
    recorded = moment == 3
    other = answered(world, without(query, 1))
    assert (other is None) == recorded
    assert (answered(world, query) is None) != recorded
    assert answered(world, without(query, 2)) is None


@pytest.mark.parametrize("lost", ["log", "folder", "everything"])
def test_a_lost_record_loses_the_key_and_voids_the_run(tmp_path: Path, lost: str) -> None:
    world = World(tmp_path)
    key, query = world.helper().key("run-1"), world.query()
    world.helper().answer(query)
    later = world.query(facts=world.at(round=2))
    log = log_of(world)
    if lost == "log":
        log.unlink()
    else:
        shutil.rmtree(log.parent if lost == "folder" else log.parent.parent)
    asked = [query, without(query, 0), later]
    assert [answered(world, one) for one in asked] == [None, None, None]
    new = world.helper().key("run-1")
    assert new.key != key.key
    assert new.is_valid
    assert [answered(world, one) for one in asked] == [None, None, None]
    assert [answered(world, replace(one, key=new.key)) for one in asked] == [None, None, None]
    assert answered(world, world.query(facts=world.at(round=3))) is not None


def test_a_damaged_record_voids_the_run(tmp_path: Path) -> None:
    world = World(tmp_path)
    query = world.query()
    world.helper().answer(query)
    log = log_of(world)
    content = log.read_bytes()
    for position in range(0, len(content), 11):
        damaged = bytearray(content)
        damaged[position] ^= 1
        log.write_bytes(damaged)
        assert answered(world, query) is None
        assert answered(world, without(query, 0)) is None
        with pytest.raises(UserError, match=r"helper's record|a wrong checksum"):
            world.helper().key("run-1")
    log.write_bytes(content[:-1])
    assert answered(world, without(query, 0)) is None
    log.write_bytes(content)
    assert answered(world, query) is not None


def test_a_record_of_another_run_is_refused(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.helper().key("run-1")
    world.helper().key("run-2")
    shutil.copy(log_of(world, "run-1"), log_of(world, "run-2"))
    with pytest.raises(UserError, match="expected the record of run 'run-2', got 'run-1'"):
        world.helper().key("run-2")


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"x")])
def test_a_lost_answer_is_not_made_again(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    world = World(tmp_path)
    query = world.query()
    world.helper().answer(query)
    damage(log_of(world).parent / "1.answer")
    with pytest.raises(UserError, match="expected the answer about round 1, got a lost or damaged one"):
        world.helper().answer(query)
    assert answered(world, without(query, 0)) is None


def test_each_run_has_its_key(tmp_path: Path) -> None:
    helper = World(tmp_path).helper()
    runs = ["run-1", "run-2", "../run-1", "a" * 256, "Läufe/1"]
    assert len({helper.key(run).key for run in runs}) == len(runs)
    assert all(path.parent == tmp_path / "helper-0" for path in (tmp_path / "helper-0").iterdir())


def test_an_erased_run_is_closed_for_ever(tmp_path: Path) -> None:
    world = World(tmp_path)
    query, other = world.query(), world.query(facts=world.at(run="run-2"))
    world.helper().answer(query)
    folder = log_of(world).parent
    world.helper().erase("run-1")
    world.helper().erase("run-1")
    assert not folder.exists()
    assert answered(world, query) is None
    world.helper().key("run-1")
    assert answered(world, query) is None
    assert answered(world, other) is not None


def test_a_query_waits_for_the_one_before(tmp_path: Path) -> None:
    world = World(tmp_path)
    query, found = world.query(), []
    thread = threading.Thread(target=lambda: found.append(answered(world, query)))
    with only_one(world.home / "helper-0" / LOCK_FILE):
        thread.start()
        thread.join(0.1)
        assert thread.is_alive()
        assert found == []
    thread.join(30.0)
    assert found[0] is not None


def test_of_different_queries_at_the_same_time_one_is_answered(tmp_path: Path) -> None:
    world = World(tmp_path)
    query, found = world.query(), []
    start = threading.Barrier(5)

    def ask(position: int) -> None:
        asked = without(query, position)
        start.wait()
        found.append(answered(world, asked))

    threads = [threading.Thread(target=ask, args=(position,)) for position in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30.0)
    assert sum(answer is not None for answer in found) == 1
    assert len(found) == 5

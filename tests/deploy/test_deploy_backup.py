"""Backup and restore: an older copy of a ledger lets no client spend its budget twice."""

import math
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from test_deploy_member import ask, instructions, policy, terms, turn

from fedpriv.cli import main
from fedpriv.deploy.device.device import Device
from fedpriv.deploy.device.heads import KEY_FILE, Head
from fedpriv.deploy.device.ledger import Ledger, account_of, spent
from fedpriv.deploy.heads import HEADS_FILE, HeadBook
from fedpriv.deploy.operate.backup import back_up, restore
from fedpriv.deploy.setup.check import check_folder
from fedpriv.errors import UserError
from fedpriv.files import lock_file
from fedpriv.flower.refusals import Refusal


@pytest.fixture
def node(deployment: Path) -> Path:
    """Return a node with two releases, copied after the first."""
    folder = deployment / "node-0"
    ask(device_of(folder), *turn(1, 0))
    back_up(folder, deployment / "copy.tar")
    ask(device_of(folder), *turn(2, 1))
    return folder


def device_of(folder: Path, epsilon: float = 1000.0) -> Device:
    return Device(policy(epsilon=epsilon), folder / "state")


def head_of(folder: Path) -> Head:
    head = device_of(folder).head()
    assert head is not None
    return head


def heads_file(folder: Path, head: Head) -> Path:
    HeadBook(folder / HEADS_FILE).keep({0: head})
    return folder / HEADS_FILE


def content(folder: Path) -> Iterator[tuple[str, bytes]]:
    return iter(sorted((str(p.relative_to(folder)), p.read_bytes()) for p in folder.rglob("*") if p.is_file()))


@pytest.mark.parametrize("lost", [False, True])
def test_an_older_copy_without_proof_is_refused_and_changes_nothing(node: Path, lost: bool) -> None:
    copy = node.parent / "copy.tar"
    if lost:
        shutil.rmtree(node)
    before = dict(content(node))
    with pytest.raises(UserError, match=r"proof that the ledger of the copy is the newest|the original line of the"):
        restore(copy, node)
    assert dict(content(node)) == before
    assert node.exists() != lost
    assert [path.name for path in node.parent.glob(".node-0-*")] == []


def test_an_older_copy_is_refused_by_the_servers_newest_head(node: Path, tmp_path: Path) -> None:
    heads = heads_file(tmp_path, head_of(node))
    shutil.rmtree(node)
    with pytest.raises(UserError, match="according to the server's heads"):
        restore(node.parent / "copy.tar", node, heads)


def test_the_newest_copy_is_restored_with_proof_and_goes_on(node: Path, tmp_path: Path) -> None:
    back_up(node, tmp_path / "newest.tar")
    heads, before = heads_file(tmp_path, head_of(node)), dict(content(node))
    restore(tmp_path / "newest.tar", node)  # beside the same ledger, which is proof enough
    shutil.rmtree(node)
    assert "that is the newest" in restore(tmp_path / "newest.tar", node, heads)
    assert dict(content(node)) == before
    assert (node.stat().st_mode & 0o777, (node / "node.key").stat().st_mode & 0o777) == (0o700, 0o600)
    ask(device_of(node), *turn(3, 2))


def test_heads_of_another_key_or_of_no_client_prove_nothing(node: Path, tmp_path: Path) -> None:
    back_up(node, tmp_path / "newest.tar")
    other = tmp_path / "other"
    for number in (1, 2):
        ask(device_of(other), *turn(number, number - 1))
    shutil.rmtree(node)
    with pytest.raises(UserError, match="expected a head signed by this client"):
        restore(tmp_path / "newest.tar", node, heads_file(tmp_path, head_of(other)))
    (tmp_path / "empty.json").write_text("{}")
    with pytest.raises(UserError, match="expected proof"):
        restore(tmp_path / "newest.tar", node, tmp_path / "empty.json")


def test_after_a_charge_of_all_nothing_more_is_released(node: Path) -> None:
    """All missing releases were within the budget, so the whole budget covers them."""
    shutil.rmtree(node)
    main_code(["deploy", "restore", str(node.parent / "copy.tar"), str(node), "--charge", "all"])
    assert math.isinf(charged(node))
    for epsilon in (5.0, 1e6):
        with pytest.raises(Refusal, match="epsilon after another message") as caught:
            ask(device_of(node, epsilon), instructions(), terms(run="another"))
        assert caught.value.kind == "budget"
    assert "charged     the whole budget for releases" in account_of(node / "state", 8.0, 1e-5, "replace")
    assert "epsilon left: 0 of 8" in " ".join(finding.line for finding in check_folder(node, connect=False)[node.name])


def test_a_charge_counts_in_every_later_release(node: Path) -> None:
    shutil.rmtree(node)
    restore(node.parent / "copy.tar", node, charge=3.0)
    assert not (node / KEY_FILE).exists()
    entries = Ledger(node / "state").entries()
    more = spent([*entries, *entries], 0.5e-5, "replace")
    with pytest.raises(Refusal, match="epsilon after another message"):
        ask(device_of(node, more + 2.9), instructions(), terms(run="another"))
    ask(device_of(node, more + 3.1), instructions(), terms(run="another"))
    assert charged(node) == 3.0


def test_an_estimate_does_not_replace_releases_that_the_folder_still_records(node: Path) -> None:
    copy = node.parent / "copy.tar"
    with pytest.raises(UserError, match="beside an intact ledger with 2"):
        restore(copy, node, charge=1e-6)
    assert Ledger(node / "state").entries()[-1].turn == 2
    (node / "state" / "ledger.jsonl").write_bytes(b"damaged\n")
    restore(copy, node, charge=1e-6)


def test_all_charges_and_releases_together_have_the_delta_of_the_policy(node: Path) -> None:
    state = node / "state"
    for _ in range(2):
        Ledger(state).charge(1.0, "lost")
    ledger = Ledger(state)
    ledger.entries()
    assert 1e-5 / 2 + 1e-5 / 4 + ledger.share(1e-5) == pytest.approx(1e-5)


def test_a_charge_is_removed_no_more_than_a_release(node: Path) -> None:
    shutil.rmtree(node)
    restore(node.parent / "copy.tar", node, charge=3.0)
    path = node / "state" / "ledger.jsonl"
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    with pytest.raises(UserError, match="expected the original line"):
        charged(node)


def charged(folder: Path) -> float:
    ledger = Ledger(folder / "state")
    ledger.entries()
    return ledger.charged


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "some"])
def test_a_charge_is_a_number_above_0_or_all(node: Path, value: str) -> None:
    shutil.rmtree(node)
    with pytest.raises(SystemExit) as end:
        main(["deploy", "restore", str(node.parent / "copy.tar"), str(node), "--charge", value])
    assert (end.value.code, node.exists()) == (2, False)


def main_code(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 0


def test_a_running_node_is_neither_copied_nor_replaced(node: Path, tmp_path: Path) -> None:
    (node / "flower").mkdir()
    with (node / "flower" / "lock").open("w") as lock:
        lock_file(lock)
        for call in (lambda: back_up(node, tmp_path / "a.tar"), lambda: restore(node.parent / "copy.tar", node)):
            with pytest.raises(UserError, match="expected a stopped process"):
                call()


def test_a_helper_is_copied_without_the_answers_that_it_must_not_forget(deployment: Path, tmp_path: Path) -> None:
    helper = deployment / "node-1"
    (helper / "node.toml").rename(helper / "helper.toml")
    (helper / "state").mkdir()
    (helper / "state" / "answer").write_text("answer")
    back_up(helper, tmp_path / "helper.tar")
    shutil.rmtree(helper)
    restore(tmp_path / "helper.tar", helper)
    assert (helper / "node.key").is_file()
    assert not (helper / "state").exists()


def test_a_server_is_copied_while_it_runs_and_keeps_the_newest_heads(
    deployment: Path, node: Path, tmp_path: Path
) -> None:
    flower = deployment / "server" / "flower"
    flower.mkdir(mode=0o700)
    with closing(sqlite3.connect(flower / "superlink.db")) as base:
        base.execute("PRAGMA journal_mode=WAL")
        base.execute("CREATE TABLE t (x)")
        base.execute("INSERT INTO t VALUES (1)")
        base.commit()
        back_up(deployment / "server", tmp_path / "server.tar")  # the row is still in the database's log
    heads_file(flower, head_of(node))
    restore(tmp_path / "server.tar", deployment / "server")
    with closing(sqlite3.connect(flower / "superlink.db")) as base:
        assert base.execute("SELECT x FROM t").fetchall() == [(1,)]
    assert HeadBook(flower / HEADS_FILE).heads[0].lines == 2
    assert (tmp_path / "server.tar").stat().st_mode & 0o777 == 0o600
    assert [path for path in deployment.glob("server.before-*") if (path / "server.key").is_file()]


def test_a_damaged_or_foreign_file_is_one_line(node: Path, tmp_path: Path) -> None:
    (tmp_path / "no.tar").write_bytes(b"no")
    with pytest.raises(UserError, match="a damaged or different file"):
        restore(tmp_path / "no.tar", tmp_path / "new")
    with pytest.raises(UserError, match="expected the folder of a node"):
        restore(node.parent / "copy.tar", node.parent / "server", charge=1.0)

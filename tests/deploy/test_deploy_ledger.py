"""All runs detect a ledger that was lost, or restored to an earlier state."""

import json
import logging
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from deploy_in_process import DeploymentGrid, run_server
from flwr.app import ConfigRecord, Message, RecordDict
from test_deploy_app import config, rows
from test_deploy_member import SIZE, ask, instructions, policy, terms, turn

from fedpriv.deploy import server as deployment
from fedpriv.deploy.coordinator import Coordinator
from fedpriv.deploy.device.device import Device
from fedpriv.deploy.device.heads import HEAD, KEY_FILE, Head, LedgerKey
from fedpriv.deploy.device.ledger import Ledger, account_of
from fedpriv.deploy.device.memory import remembered_ledgers
from fedpriv.deploy.heads import HEADS_FILE, HeadBook, newer_heads
from fedpriv.errors import UserError
from fedpriv.experiment.deployment import DeploymentChoice
from fedpriv.flower.messages import TERMS
from fedpriv.flower.refusals import Refusal
from fedpriv.methods import DPFedAvg
from fedpriv.privacy import Everyone
from fedpriv.rounds import make_agreement
from fedpriv.streams import SystemStreams


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return Device(policy(), tmp_path / "home" / "state")


def shown_to(device: Device, o: Any, t: Any, shown: Head | None) -> torch.Tensor:
    return device.answer(o, t, torch.zeros(SIZE), lambda: torch.ones(SIZE), shown)


def head_of(device: Device) -> Head:
    head = device.head()
    assert head is not None
    return head


def forget(device: Device, how: str) -> None:
    """Damage the ledger after three releases of run r1; its memory files stay."""
    path = Ledger(device.folder).path
    lines = path.read_bytes().splitlines(keepends=True)
    path.with_name("ledger.head").unlink()
    if how == "lost":
        path.unlink()
    elif how == "rolled back":
        path.write_bytes(lines[0])
    else:
        (device.folder / "ledger.jsonl").write_bytes(b"")


@pytest.mark.parametrize("how", ["lost", "rolled back", "emptied"])
def test_a_client_that_lost_its_ledger_is_noticed_by_a_run_of_another_name(device: Device, how: str) -> None:
    for number in (1, 2, 3):
        ask(device, *turn(number, number - 1))
    forget(device, how)
    before = Ledger(device.folder).lines
    with pytest.raises(Refusal, match=r"the original line according to .*r1-0/memory") as caught:
        ask(device, instructions(), terms(run="another"))
    assert caught.value.kind == "trouble"
    assert "r1" not in caught.value.public_line
    assert Ledger(device.folder).lines == before
    with pytest.raises(UserError, match=r"according to .*r1-0/memory"):
        account_of(device.folder, 8.0, 1e-5, "replace")


def test_any_run_s_memory_is_a_witness_not_only_the_newest(device: Device) -> None:
    for run in ("r1", "r2", "r3"):
        ask(device, instructions(), terms(run=run))
    assert [lines for _, lines, _ in remembered_ledgers(device.folder)] == [1, 2, 3]
    for run in ("r1", "r2"):
        shutil.rmtree(device.folder / f"{run}-0")
    forget(device, "rolled back")
    with pytest.raises(Refusal, match=r"according to .*r3-0/memory"):
        ask(device, instructions(), terms(run="r4"))


def test_a_witness_that_cannot_be_read_is_no_reason_to_go_on(device: Device) -> None:
    ask(device, *turn(1, 0))
    (device.folder / "r1-0" / "memory").write_bytes(b"fedpriv-memory 1 x\n\x09")
    with pytest.raises(Refusal, match="expected an intact memory file, got a file without the length of the ledger"):
        ask(device, instructions(), terms(run="another"))


def test_only_facts_of_other_runs_memories_are_read(device: Device) -> None:
    """Their tensors may be large, and damage to them does not affect this run."""
    ask(device, *turn(1, 0))
    path = device.folder / "r1-0" / "memory"
    content = bytearray(path.read_bytes())
    content[content.rindex(b'{"epoch"') - 3] ^= 1
    path.write_bytes(bytes(content))
    ask(device, instructions(), terms(run="another"))
    assert [lines for _, lines, _ in remembered_ledgers(device.folder)] == [2, 1]


@pytest.mark.parametrize("how", ["all records lost", "all records rolled back"])
def test_records_that_are_lost_as_a_whole_are_noticed_by_the_head_that_the_server_shows(
    device: Device, how: str, tmp_path: Path
) -> None:
    ask(device, *turn(1, 0))
    shutil.copytree(device.folder, tmp_path / "snapshot")
    ask(device, *turn(2, 1))
    shown = head_of(device)
    shutil.rmtree(device.folder)
    if how == "all records rolled back":
        shutil.copytree(tmp_path / "snapshot", device.folder)
    with pytest.raises(Refusal, match="according to this client's signed head from the server") as caught:
        shown_to(device, instructions(), terms(run="another"), shown)
    assert caught.value.kind == "trouble"


def test_a_head_that_the_ledger_has_or_has_gone_beyond_is_no_trouble(device: Device) -> None:
    assert device.head() is None
    ask(device, *turn(1, 0))
    first = head_of(device)
    shown_to(device, *turn(2, 1), first)
    shown_to(device, *turn(3, 2), head_of(device))
    shown_to(device, *turn(4, 3), first)
    assert (first.lines, head_of(device).lines) == (1, 4)


def test_a_server_that_shows_no_head_is_answered_as_before(device: Device) -> None:
    """Older servers sent no heads; a loss that only a head reveals is then not detected."""
    ask(device, *turn(1, 0))
    shutil.rmtree(device.folder)
    ask(device, instructions(), terms(run="another"))


def test_the_same_order_gets_the_same_bytes_whichever_head_is_shown(device: Device) -> None:
    first = shown_to(device, *turn(1, 0), None)
    again = shown_to(device, *turn(1, 0), head_of(device))
    assert torch.equal(first, again)
    assert len(Ledger(device.folder).entries()) == 1


@pytest.mark.parametrize("change", [{"lines": 9}, {"hash": "0" * 64}, {"signature": "0" * 128}, {"key": "0" * 64}])
def test_a_head_that_the_client_did_not_sign_is_not_believed(
    device: Device, change: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    ask(device, *turn(1, 0))
    forged = replace(head_of(device), **change)
    assert not forged.valid
    assert Head.of(RecordDict({HEAD: forged.to_record()})) is None
    with caplog.at_level(logging.WARNING, "flwr"):
        shown_to(device, *turn(2, 1), forged)
    assert "another key's signature" in caplog.text


def test_a_head_of_another_client_is_not_believed(device: Device, tmp_path: Path) -> None:
    other = LedgerKey.at(tmp_path / "other").sign(5, "a" * 64)
    assert other.valid
    shown_to(device, *turn(1, 0), other)


@pytest.mark.parametrize(
    "record", [{}, {"lines": 1}, {"lines": "1", "hash": "", "key": "", "signature": ""}, {"lines": b"1", "key": [1.0]}]
)
def test_a_record_that_is_no_head_is_none(record: dict[str, Any]) -> None:
    assert Head.of(RecordDict({HEAD: ConfigRecord(record)})) is None
    assert Head.of(RecordDict()) is None


def test_the_key_is_the_client_s_alone_and_stays(device: Device) -> None:
    ask(device, *turn(1, 0))
    path = device.folder.parent / KEY_FILE
    assert path.stat().st_mode & 0o777 == 0o600
    before = path.read_bytes()
    ask(device, *turn(2, 1))
    assert path.read_bytes() == before
    path.write_bytes(b"none")
    with pytest.raises(Refusal, match="expected an Ed25519 key"):
        ask(device, *turn(3, 2))


def heads(tmp_path: Path, lines: int, name: str = "a") -> Head:
    return LedgerKey.at(tmp_path / name).sign(lines, f"{lines:064x}")


def test_the_newest_head_of_a_client_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    early, late = heads(tmp_path, 1), heads(tmp_path, 2)
    assert newer_heads({0: early}, {0: late}) == newer_heads({0: late}, {0: early}) == {0: late}
    assert newer_heads({0: late}, {1: early}) == {0: late, 1: early}
    assert not caplog.records
    assert newer_heads({0: late}, {0: heads(tmp_path, 1, "b")})[0].lines == 1
    assert "client 0 signs its ledger with a new key" in caplog.text


def test_heads_outlive_the_server_and_a_damaged_book_is_said(tmp_path: Path) -> None:
    path = tmp_path / "deployment" / HEADS_FILE
    HeadBook(path).keep({3: heads(tmp_path, 2)})
    HeadBook(path).keep({4: heads(tmp_path, 1), 3: heads(tmp_path, 1)})
    assert HeadBook(path).heads == {3: heads(tmp_path, 2), 4: heads(tmp_path, 1)}
    rows = json.loads(path.read_text())
    rows["3"]["lines"] = 7
    path.write_text(json.dumps(rows))
    assert HeadBook(path).heads == {4: heads(tmp_path, 1)}
    path.write_text("[]")
    with pytest.raises(UserError, match="expected the heads of clients' ledgers"):
        HeadBook(path)


def test_a_server_that_is_restored_still_knows_its_clients_heads(tmp_path: Path) -> None:
    method, sampling = DPFedAvg(clip_norm=1.0), Everyone(2)
    server, client, _ = make_agreement(method, sampling, None, SystemStreams())

    def fresh() -> Coordinator:
        return Coordinator(
            server=server,
            client=client,
            plan=None,
            choice=DeploymentChoice(),
            turns=5,
            digest="d",
            state=method.init_server(torch.zeros(SIZE)),
        )

    one, other = fresh(), fresh()
    one.begin()
    one.finish({0: torch.zeros(SIZE)}, {1: ("budget", "none left")}, {0: heads(tmp_path, 2), 1: heads(tmp_path, 9)})
    other.restore(one.state, one.save())
    assert other.heads == {0: heads(tmp_path, 2), 1: heads(tmp_path, 9)}
    saved = json.loads(one.save()["coordinator"].numpy().tobytes())
    del saved["heads"]  # the format of servers before heads existed
    other.restore(
        one.state, {"coordinator": torch.frombuffer(bytearray(json.dumps(saved).encode()), dtype=torch.uint8)}
    )
    assert other.heads == {}


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployment, "_POLL_SECONDS", 0.001)
    monkeypatch.setattr(deployment, "_RETRY_SECONDS", 0.01)


@pytest.mark.usefixtures("_quick")
def test_a_deployment_notices_clients_that_lost_all_records_between_two_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, 13 messages left although the budget allowed 4: the second run did not know about the first."""
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "superlink"))
    grid = DeploymentGrid(tmp_path / "nodes", 4, {}, trust="local")
    run_server(grid, config(rounds=2), tmp_path / "runs" / "one")
    book = HeadBook(tmp_path / "superlink" / HEADS_FILE)
    assert {client: head.lines for client, head in book.heads.items()} == dict.fromkeys(range(4), 2)
    for node in (0, 2):
        shutil.rmtree(tmp_path / "nodes" / f"node-{node}" / "state")
    again = config(rounds=1).replace('name = "devices"', 'name = "another"')
    run_server(grid, again, tmp_path / "runs" / "two")
    (row,) = rows(tmp_path / "runs" / "two")
    assert row["counted"] == [1, 3]
    assert {client: no["kind"] for client, no in row["refused"].items()} == {"0": "trouble", "2": "trouble"}
    assert "ledger" not in str(row["refused"])


@pytest.mark.usefixtures("_quick")
def test_a_resumed_run_shows_the_heads_of_before_the_server_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FLWR_HOME", raising=False)
    away = [True]

    def hook(partition: int, message: Message) -> bool:
        told = message.content.config_records.get(TERMS)
        return not (partition == 2 and told is not None and told["turn"] == 2 and away[0])

    toml = config("dp-fedavg", rules='min_participants = 4\ntoo_few = "stop"', deadline=0.5, rounds=3)
    grid = DeploymentGrid(tmp_path / "nodes", 4, {}, trust="local", hook=hook)
    with pytest.raises(UserError, match="turn 2"):
        run_server(grid, toml, tmp_path / "out")
    (tmp_path / HEADS_FILE).unlink()  # only the run's own checkpoint still has it
    away[0] = False
    shutil.rmtree(tmp_path / "nodes" / "node-2" / "state")
    with pytest.raises(UserError, match="turn 2: expected at least 4 valid messages, got 3"):
        run_server(grid, toml, tmp_path / "out", resume=True)
    shown = [m.content.config_records.get(HEAD) for m in grid.seen if TERMS in m.content.config_records]
    assert shown[-1] is not None


@pytest.mark.parametrize("charge", [math.nan, -1.0, "some"])
def test_a_charge_that_is_no_number_from_0_is_a_damaged_line(charge: object, tmp_path: Path) -> None:
    """A sum with NaN is below no budget and above none."""
    line = {"charge": charge, "reason": "restored", "time": 0.0, "before": "0" * 64}
    Ledger(tmp_path).path.write_text(json.dumps(line) + "\n")
    with pytest.raises(UserError):
        Ledger(tmp_path).entries()

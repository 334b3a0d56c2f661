"""Rotation of a node's key: the ledger stays with the client, and a new key brings no new budget."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from test_deploy_keys import deployment, known, served
from test_deploy_member import ask, instructions, policy, terms, turn

from fedpriv.cli import main
from fedpriv.deploy.device.device import Device
from fedpriv.deploy.device.folder import key_pair
from fedpriv.deploy.device.heads import KEY_FILE
from fedpriv.deploy.device.ledger import Ledger
from fedpriv.deploy.heads import HEADS_FILE, HeadBook
from fedpriv.deploy.operate.rotation import HANDOVER, Handover, accept_handover, begin_rotation, finish_rotation
from fedpriv.deploy.setup.keys import register_nodes, remove_node
from fedpriv.deploy.setup.roster import Roster
from fedpriv.errors import UserError
from fedpriv.flower.companion import ALIVE
from fedpriv.flower.refusals import Refusal

__all__ = ["deployment", "served"]


def device_of(folder: Path, epsilon: float = 1000.0) -> Device:
    return Device(policy(epsilon=epsilon), folder / "state")


def released(deployment: Path, turns: int = 2) -> Path:
    """Let client 0 release some messages, and give the server its head; return its folder."""
    node = deployment / "node-0"
    device = device_of(node)
    for number in range(1, turns + 1):
        ask(device, *turn(number, number - 1))
    head = device.head()
    assert head is not None
    HeadBook(deployment / "server" / "flower" / HEADS_FILE).keep({0: head})
    return node


def budget(folder: Path) -> float:
    """Return a budget that the releases in a ledger have used up."""
    device = device_of(folder, 5.0)
    with pytest.raises(Refusal, match="epsilon after another message"):
        ask(device, instructions(), terms(run="another"))
    return 5.0


def test_a_rotated_client_goes_on_with_its_ledger_and_its_budget(deployment: Path) -> None:
    register_nodes(deployment)
    node = released(deployment)
    lines, old = Ledger(node / "state").noted(), Roster.read(deployment).keys["node-0"]
    main_code(["deploy", "rotate", "key", str(node)])
    assert key_pair(node) == "matches node.pub, secp384r1"
    assert Roster.read(deployment).keys["node-0"] == old
    main_code(["deploy", "rotate", "accept", str(node / "rotation" / HANDOVER), str(deployment)])
    accept_handover(node / "rotation" / HANDOVER, deployment)  # it may run again
    main_code(["deploy", "rotate", "finish", str(node)])
    assert key_pair(node) == "matches node.pub, secp384r1"
    roster = Roster.read(deployment)
    assert roster.keys["node-0"] + b"\n" == (node / "node.pub").read_bytes() != old + b"\n"
    assert (known(deployment, "node-0"), roster.removed) == ("registered", {old: "node-0"})
    assert register_nodes(deployment)[1] == []
    assert Ledger(node / "state").noted() == lines
    (node / "flower" / ALIVE).touch()  # as a node does when the server answers
    main_code(["deploy", "rotate", "finish", str(node)])
    assert not (node / "rotation").exists()
    budget(node)
    ask(device_of(node), *turn(3, 2))
    assert len(Ledger(node / "state").entries()) == 3


def main_code(arguments: list[str], code: int = 0) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == code


def test_the_old_key_is_kept_until_the_server_has_answered_the_new_one(
    deployment: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The server may be down when its administrator accepts the new key, which is then registered nowhere."""
    node, rotation = deployment / "node-0", deployment / "node-0" / "rotation"
    (node / "flower").mkdir(exist_ok=True)
    (node / "flower" / ALIVE).touch()  # of a connection with the old key
    old = (node / "node.key").read_bytes()
    begin_rotation(node)
    main_code(["deploy", "rotate", "finish", str(node)])
    for _ in range(2):
        capsys.readouterr()
        main_code(["deploy", "rotate", "finish", str(node)], 2)
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "expected an answer of the server to the new key" in said
        assert "--force" in said
    assert (rotation / "old-node.key").read_bytes() == old != (node / "node.key").read_bytes()
    with pytest.raises(UserError, match=r"rotate finish \S+node-0\.$"):  # no word of removing the old key
        begin_rotation(node)
    Handover.read(rotation / HANDOVER)
    main_code(["deploy", "rotate", "finish", str(node), "--force"])
    assert not rotation.exists()


def test_a_handover_is_updated_after_releases_once_the_node_is_stopped(deployment: Path) -> None:
    """The server knows newer releases than a handover that was made while the node took part in rounds."""
    register_nodes(deployment)
    node = released(deployment)
    file = begin_rotation(node)
    ask(device_of(node), *turn(3, 2))
    head = device_of(node).head()
    assert head is not None
    HeadBook(deployment / "server" / "flower" / HEADS_FILE).keep({0: head})
    with pytest.raises(UserError, match=r"at least 3 releases, got an older .* run fedpriv deploy rotate finish"):
        accept_handover(file, deployment)
    assert "the newest ledger" in finish_rotation(node)
    accept_handover(file, deployment)
    assert Roster.read(deployment).keys["node-0"] + b"\n" == (node / "node.pub").read_bytes()
    ask(device_of(node), *turn(4, 3))
    main_code(["deploy", "rotate", "finish", str(node)], 2)  # not connected yet; the handover follows the ledger
    assert Handover.read(file).ledger_head == device_of(node).head()


@pytest.mark.parametrize("how", ["no ledger", "another ledger", "an older ledger", "another client"])
def test_who_rotates_beside_another_ledger_gets_no_new_budget(deployment: Path, how: str, tmp_path: Path) -> None:
    """The attacker has the node's key, or the whole folder, and wants the client's history to begin again."""
    register_nodes(deployment)
    node = released(deployment, turns=1)
    shutil.copytree(node, tmp_path / "older")
    ask(device_of(node), *turn(2, 1))
    head = device_of(node).head()
    assert head is not None
    HeadBook(deployment / "server" / "flower" / HEADS_FILE).keep({0: head})
    attack = tmp_path / "older" if how == "an older ledger" else node
    if how != "an older ledger":
        shutil.rmtree(node / "state")
        (node / KEY_FILE).unlink()
    if how == "another ledger":
        for number in range(1, 5):
            ask(device_of(node), *turn(number, number - 1))
    if how == "another client":
        text = (node / "node.toml").read_text()
        (node / "node.toml").write_text(text.replace("partition-id = 0", "partition-id = 1"))
    before = Roster.read(deployment).keys
    with pytest.raises(UserError, match=r"node-0: expected (the ledger with 2|a ledger with at least 2|a handover of)"):
        accept_handover(begin_rotation(attack), deployment)
    assert Roster.read(deployment).keys == before
    assert known(deployment, "node-0") == "registered"


def test_a_key_hands_over_only_if_it_has_signed_and_was_not_removed(deployment: Path, tmp_path: Path) -> None:
    register_nodes(deployment)
    file = begin_rotation(deployment / "node-1")
    right = Handover.read(file)
    other = load_ssh_private_key((deployment / "node-2" / "node.key").read_bytes(), None)
    forged = [replace(right, new=Handover.read(begin_rotation(deployment / "node-2")).new), replace(right, client=0)]
    for number, handover in enumerate([*forged, right.signed_by(other)]):  # type: ignore[arg-type]
        (tmp_path / str(number)).write_text(json.dumps(asdict(handover)))
        with pytest.raises(UserError, match="expected a handover signed with the old key"):
            accept_handover(tmp_path / str(number), deployment)
    remove_node("node-1", deployment)
    with pytest.raises(UserError, match="expected the handover of a registered key"):
        accept_handover(file, deployment)


def test_a_ledger_that_is_gone_or_damaged_is_not_handed_over(deployment: Path) -> None:
    node = released(deployment)
    shutil.rmtree(node / "state")
    with pytest.raises(UserError, match="expected the ledger with the heads"):
        begin_rotation(node)
    assert not (node / "rotation").exists()
    with pytest.raises(UserError, match="expected an open rotation"):
        finish_rotation(node)


def test_a_second_rotation_waits_for_the_first(deployment: Path) -> None:
    begin_rotation(deployment / "node-0")
    with pytest.raises(UserError, match="expected no open rotation"):
        begin_rotation(deployment / "node-0")

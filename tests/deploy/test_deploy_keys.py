"""Registration and removal of nodes with Flower's own server: it, `check` and `register` agree about each key."""

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from flwr.superlink import main as superlink
from loopback import free_port

from fedpriv.cli import main
from fedpriv.deploy.setup.certificates import make_node_key
from fedpriv.deploy.setup.check import check_folder
from fedpriv.deploy.setup.keys import compared, register_nodes, remove_node
from fedpriv.deploy.setup.provision import Deployment, add_nodes, init_deployment
from fedpriv.deploy.setup.roster import CONNECTION, Roster, key_in
from fedpriv.errors import UserError
from fedpriv.flower.internals import superlink as superlink_internals
from fedpriv.flower.internals.control import SilentServerError, once_it_answers
from fedpriv.flower.internals.superlink import KnownNode, administering


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return the folder of a deployment with a SuperLink in a thread, which starts no process for runs."""
    folder, port = tmp_path_factory.mktemp("served") / "d", free_port()
    init_deployment(folder, Deployment(host="127.0.0.1", port=port, nodes=3))
    place = folder / "server"
    options = [
        *("--ssl-ca-certfile", str(place / "ca.crt"), "--ssl-certfile", str(place / "server.pem")),
        *("--ssl-keyfile", str(place / "server.key"), "--host", "127.0.0.1", "--port", str(port)),
        *("--isolation", "process", "--enable-supernode-auth", "--disable-runtime-dependency-installation"),
    ]
    program = superlink_internals._PROGRAM
    before, sys.argv = sys.argv, ["flower-superlink", *options]
    try:
        config = program._parse_superlink_lifespan_config()
    finally:
        sys.argv = before
    app = superlink.create_app(config, program.SuperLinkLifespan)
    files: dict[str, Any] = {"ssl_keyfile": str(place / "server.key"), "ssl_certfile": str(place / "server.pem")}
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error", ws="none", **files))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.05)
    yield folder
    server.should_exit = True
    thread.join(timeout=10.0)


@pytest.fixture
def deployment(served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a deployment with keys that are new to the server."""
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    folder = tmp_path / "deployment"
    shutil.copytree(served, folder)
    for path in (folder / "admin" / "nodes").iterdir():
        key = make_node_key()
        path.write_bytes(key.public)
        (folder / path.stem / "node.pub").write_bytes(key.public)
        (folder / path.stem / "node.key").write_bytes(key.private)
    config = folder / "admin" / "config.toml"
    config.write_text(config.read_text().replace(str(served), str(folder)))
    return folder


def said(folder: Path) -> dict[str, list[tuple[str, str]]]:
    """Return the findings of `check` about nodes: states and lines by kind."""
    found: dict[str, list[tuple[str, str]]] = {}
    for finding in check_folder(folder / "admin")["admin"]:
        found.setdefault(finding.what, []).append((finding.state, finding.line))
    return found


def known(folder: Path, name: str) -> str | None:
    """Return the server's status of a key; None if it never saw it."""
    with administering(folder / "admin", CONNECTION) as server:
        node = server.nodes().get(Roster.read(folder).key_of(name))
    return None if node is None else node.status


def test_each_key_is_registered_once(deployment: Path) -> None:
    assert said(deployment)["nodes"] == [("wrong", "not registered: node-0, node-1, node-2. Run ./register.sh")]
    assert register_nodes(deployment) == ([f"node-{i}: registered" for i in range(3)], [])
    assert register_nodes(deployment / "admin") == ([f"node-{i}: already registered" for i in range(3)], [])
    assert said(deployment)["nodes"] == [("ok", "all 3 registered; online: none")]


@pytest.mark.slow
def test_the_script_registers_from_wherever_its_folder_has_moved(deployment: Path) -> None:
    moved = deployment.parent / "moved here"
    (deployment / "admin").rename(moved)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    ended = subprocess.run(
        [moved / "register.sh"], env={**os.environ, "PATH": path}, capture_output=True, text=True, cwd="/"
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == "".join(f"node-{i}: registered\n" for i in range(3))
    assert f"root-certificates = '{moved}/ca.crt'" in (moved / "config.toml").read_text()
    without = {"PATH": "/usr/bin:/bin", "FEDPRIV": "no-such-fedpriv"}
    ended = subprocess.run([moved / "register.sh"], env=without, capture_output=True, text=True)
    assert (ended.returncode, "fedpriv is not on the PATH" in ended.stderr) == (2, True)


def test_a_node_is_taken_away_by_its_name_and_all_agree(
    deployment: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    register_nodes(deployment)
    monkeypatch.chdir(deployment)
    with pytest.raises(SystemExit) as end:
        main(["deploy", "remove", "node-1"])
    printed = capsys.readouterr().out
    assert (end.value.code, printed.splitlines()[0]) == (0, "node-1: removed")
    assert "the number of clients stays as planned" in printed
    assert known(deployment, "node-1") == "unregistered"
    assert not (deployment / "admin" / "nodes" / "node-1.pub").exists()
    assert said(deployment)["nodes"] == [("ok", "all 2 registered; online: none")]
    assert said(deployment)["removed nodes"] == [("ok", "node-1")]
    assert register_nodes(deployment) == (["node-0: already registered", "node-2: already registered"], [])
    assert remove_node("node-1", deployment / "admin") == "node-1: already removed"
    whole = check_folder(deployment, connect=False)
    assert [(f.state, f.line) for f in whole["node-1"]] == [("note", "removed: its key is in admin/removed-keys")]
    assert "wrong" not in {finding.state for found in whole.values() for finding in found}
    assert "node-1" not in (deployment / "bundles.sha256").read_text()
    add_nodes(deployment, 1)
    assert "node-1" not in (deployment / "bundles.sha256").read_text()
    assert "node-3" in (deployment / "bundles.sha256").read_text()


def test_a_removed_node_comes_back_with_a_new_key_only(deployment: Path) -> None:
    register_nodes(deployment)
    path = deployment / "admin" / "nodes" / "node-1.pub"
    old = path.read_bytes()
    remove_node("node-1", deployment)
    path.write_bytes(old)
    lines, faults = register_nodes(deployment)
    assert lines == ["node-0: already registered", "node-2: already registered"]
    assert said(deployment)["nodes"] == [("wrong", fault) for fault in faults]
    assert faults == [
        "node-1: not registered. A removed key is never accepted again: put a new key of the node there, or run: "
        "fedpriv deploy remove node-1"
    ]
    path.write_bytes(make_node_key().public)
    assert register_nodes(deployment)[0][1] == "node-1: registered"
    assert said(deployment)["nodes"][0][0] == "ok"
    remove_node("node-1", deployment)
    assert len((deployment / "admin" / "removed-keys").read_text().splitlines()) == 2


def test_a_key_that_somebody_else_unregistered_sends_nobody_in_circles(deployment: Path) -> None:
    register_nodes(deployment)
    with administering(deployment / "admin", CONNECTION) as server:
        server.unregister(server.nodes()[Roster.read(deployment).key_of("node-2")])
    _, faults = register_nodes(deployment)
    assert said(deployment)["nodes"] == [("wrong", fault) for fault in faults]
    assert faults[0].endswith("fedpriv deploy remove node-2")
    assert remove_node("node-2", deployment) == "node-2: already removed"
    assert register_nodes(deployment)[1] == []
    assert said(deployment)["nodes"][0][0] == "ok"


def test_a_removed_key_that_the_server_still_takes_is_wrong_until_it_is_removed_there(deployment: Path) -> None:
    """This happens if `admin` or the server's database was restored from a copy."""
    register_nodes(deployment)
    Roster.read(deployment).without("node-0")
    _, faults = register_nodes(deployment)
    assert faults == ["node-0: removed, but still registered. Run: fedpriv deploy remove node-0"]
    assert said(deployment)["nodes"] == [("wrong", faults[0])]
    assert remove_node("node-0", deployment) == "node-0: removed"
    assert known(deployment, "node-0") == "unregistered"


def test_a_key_that_is_in_no_roster_is_said(deployment: Path) -> None:
    stranger = key_in(make_node_key().public)
    with administering(deployment / "admin", CONNECTION) as server:
        server.register(stranger, "stranger")
        number, roster = server.nodes()[stranger].id, Roster.read(deployment)
        assert number in compared(roster, server.nodes()).strangers
        assert compared(roster, {stranger: KnownNode(number, "unregistered")}).strangers == []
    register_nodes(deployment)
    assert said(deployment)["other nodes"][0][0] == "note"


def test_a_node_that_never_was_is_one_line(deployment: Path) -> None:
    with pytest.raises(
        UserError, match=r"^NAME: expected the name of a node in .*, got 'nod-1'. Did you mean 'node-1'\?"
    ):
        remove_node("nod-1", deployment)
    with pytest.raises(UserError, match="expected a folder of a deployment"):
        remove_node("node-1", deployment / "node-1")


def test_a_server_that_does_not_answer_changes_nothing(deployment: Path) -> None:
    config = deployment / "admin" / "config.toml"
    lines = [f'address = "127.0.0.1:{free_port()}"' if "address" in x else x for x in config.read_text().splitlines()]
    config.write_text("\n".join(lines) + "\n")
    before = {path: path.read_bytes() for path in (deployment / "admin").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"^the server at 127.0.0.1:\d+: expected an answer") as caught:
        remove_node("node-1", deployment)
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in (deployment / "admin").rglob("*") if path.is_file()} == before


def test_a_file_that_is_no_key_keeps_the_others_from_nothing(deployment: Path) -> None:
    (deployment / "admin" / "nodes" / "node-0.pub").write_text("ssh-rsa none of ours\n")
    lines, faults = register_nodes(deployment)
    assert lines == ["node-1: registered", "node-2: registered"]
    assert [fault.split(":")[0] for fault in faults] == ["node-0"]


def test_registration_waits_for_a_server_that_starts() -> None:
    said: list[str] = []
    answers = iter([SilentServerError("s", "an answer", "silence", "Start it"), ["node-0: registered"]])

    def ask() -> list[str]:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert once_it_answers(ask, 30.0, said.append) == ["node-0: registered"]
    assert said == ["waiting     for the server's answer, at most 30 s"]


@pytest.mark.parametrize("seconds", [-1.0, float("nan")])
def test_a_wait_is_a_number_of_seconds(seconds: float) -> None:
    with pytest.raises(UserError, match="--wait: expected seconds from 0"):
        once_it_answers(lambda: None, seconds, print)


def test_a_wait_ends_and_other_refusals_are_not_waited_out() -> None:
    for error in (SilentServerError("s", "an answer", "silence", "Start it"), UserError("s", "a", "b", "c")):

        def ask(error: UserError = error) -> None:
            raise error

        with pytest.raises(UserError) as refused:
            once_it_answers(ask, 0.0 if isinstance(error, SilentServerError) else 60.0, lambda _: None)
        assert refused.value is error

"""`fedpriv deploy status`, `list` and `add`: from files alone, without a server or a network."""

import json
import os
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from loopback import free_port

from fedpriv.cli import main
from fedpriv.deploy.parties import reasons_in_words
from fedpriv.deploy.server import Network
from fedpriv.deploy.setup import membership
from fedpriv.deploy.setup.membership import join_nodes, part_in_words
from fedpriv.deploy.setup.provision import Deployment, init_deployment
from fedpriv.deploy.status import record
from fedpriv.deploy.status.record import NODES_FILE, RUNS_FILE, StatusWriter, known_runs, note_run, read_seen
from fedpriv.deploy.status.view import DeploymentView, NodeView, RunView, view_of
from fedpriv.errors import UserError
from fedpriv.experiment.run_directory import RunDirectory

ROW = {"happened": "applied", "late": [], "gone": [], "refused": {}, "invalid": {}, "failed": {}}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("status") / "d"
    init_deployment(folder, Deployment(host="127.0.0.1", port=free_port(), nodes=3))
    return folder


@pytest.fixture
def folder(template: Path, tmp_path: Path) -> Path:
    made = tmp_path / "d"
    shutil.copytree(template, made)
    (made / "server" / "flower").mkdir()
    return made


def run_in(folder: Path, *, population: int = 3, finished: bool = False) -> Path:
    """Write a run with two rounds: node-1 refuses once, node-2 is late, then fails."""
    directory = RunDirectory(folder.parent / "run")
    directory.path.mkdir()
    writer = StatusWriter(directory, "devices", population, 5)
    writer.note(0, {0: 11, 1: 12, 2: 13}, {})
    writer.note(2, {0: 11, 1: 12}, {}, now=True)
    refused = {"1": {"kind": "budget", "reason": "used up"}}
    rows = [
        {**ROW, "round": 1, "asked": [0, 1, 2], "counted": [0, 1], "late": [2]},
        {**ROW, "round": 2, "asked": [0, 1, 2], "counted": [0], "refused": refused, "failed": {"2": "an error"}},
    ]
    for row in rows:
        directory.append("participation.jsonl", row)
    (folder / "server" / "flower" / RUNS_FILE).write_text(f"{directory.path}\n")
    if finished:
        directory.file("summary.json").write_text("{}")
    return directory.path


def by_name(view: DeploymentView) -> dict[str, NodeView]:
    return {node.name: node for node in view.nodes}


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(["deploy", *arguments])
    printed = capsys.readouterr()
    return int(end.value.code or 0), printed.out, printed.err


def test_rounds_and_refusals_of_each_node_are_those_of_the_runs_files(folder: Path) -> None:
    run = run_in(folder)
    for place in (folder, folder / "admin", folder / "server", run):
        nodes = by_name(view_of(place, connect=False))
        assert [nodes[f"node-{i}"].asked for i in range(3)] == [2, 2, 2]
        assert [nodes[f"node-{i}"].counted for i in range(3)] == [2, 1, 0]
        assert [nodes[f"node-{i}"].missed for i in range(3)] == [0, 0, 2]
        assert nodes["node-1"].refused == {"budget": 1}
        assert [nodes[f"node-{i}"].state for i in range(3)] == ["online", "online", "offline"]
        assert nodes["node-2"].last_seen is not None


def test_a_client_that_never_connected_is_absent(folder: Path) -> None:
    nodes = by_name(view_of(run_in(folder, population=5), connect=False))
    assert (nodes["node-4"].state, nodes["node-4"].last_seen) == ("absent", None)


@pytest.mark.parametrize("how", ["finished", "process ended", "silent on another machine", "running elsewhere"])
def test_a_server_that_stopped_is_said_to_have_stopped(how: str, folder: Path) -> None:
    run = run_in(folder, finished=how == "finished")
    changes: dict[str, Any] = {"process ended": {"pid": 2**22 + 1}}
    changes["silent on another machine"] = {"host": "another", "written": time.time() - 90.0}
    changes["running elsewhere"] = {"host": "another", "pid": 2**22 + 1}
    path = run / NODES_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes.get(how, {})}))
    expected = {"finished": "finished", "running elsewhere": "running"}.get(how, "stopped")
    view = view_of(folder, connect=False)
    assert [one.state for one in view.runs] == [expected]
    if expected == "stopped":
        assert {node.state for node in view.nodes} == {"unknown"}


def test_the_table_says_that_no_server_answers_and_when_certificates_end(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "110")
    run_in(folder, finished=True)
    code, out, _ = said(capsys, "status", str(folder))
    assert code == 0
    assert "server      stopped, or not reachable: 127.0.0.1:" in out
    assert "certificate server until 20" in out
    assert "devices: finished, round 2 of 5" in " ".join(out.split())
    assert any(line.split()[0] == "node-1" and "budget 1" in line for line in out.splitlines() if line.strip())
    assert "8 of 8" in out  # its folder is here, with an empty ledger
    shutil.rmtree(folder / "node-1")
    shutil.rmtree(folder / "node-0")
    out = said(capsys, "status", str(folder))[1]
    assert "used up" in out
    assert "at the node" in out


def test_the_json_has_all_of_it_and_the_list_names_removed_nodes(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fedpriv.deploy.setup.roster import Roster

    Roster.read(folder).without("node-2")
    run = run_in(folder)
    view = json.loads(said(capsys, "status", str(folder), "--json")[1])
    assert view["shown"] == str(run)
    assert [node["name"] for node in view["nodes"]] == ["node-0", "node-1", "node-2"]
    assert (view["nodes"][2]["state"], view["runs"][0]["turns"]) == ("removed", 5)
    assert "removed" in said(capsys, "list", str(folder))[1]
    code, _, error = said(capsys, "status", str(folder), "--json", "--watch")
    assert (code, error.count("\n")) == (2, 1)


@pytest.mark.parametrize("arguments", [["status", "PLACE"], ["list", "PLACE"], ["status", "DIR", "--run", "PLACE"]])
def test_another_folder_is_one_line(
    arguments: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {"PLACE": str(tmp_path), "DIR": str(folder)}
    code, _, error = said(capsys, *(words.get(word, word) for word in arguments))
    assert (code, error.count("\n")) == (2, 1)


def test_a_torn_file_of_nodes_is_no_error(folder: Path) -> None:
    run = run_in(folder)
    (run / NODES_FILE).write_text('{"written": 1')
    assert read_seen(run) is None
    assert view_of(folder, connect=False).runs == []


def test_the_server_writes_every_few_seconds_for_its_owner_alone(tmp_path: Path) -> None:
    now = [1000.0]
    writer = StatusWriter(RunDirectory(tmp_path), "devices", 2, 3, clock=lambda: now[0])
    network = Network(grid=None, population=2)  # type: ignore[arg-type]
    written = []
    for second in range(8):
        now[0] = 1000.0 + second
        network.nodes = {0: 7} if second else {0: 7, 1: 8}
        writer.note(0, network.nodes, {})
        seen = read_seen(tmp_path)
        assert seen is not None
        written.append(seen.written)
    assert written == [1000.0] * 5 + [1005.0] * 3
    assert (tmp_path / NODES_FILE).stat().st_mode & 0o077 == 0
    seen = read_seen(tmp_path)
    assert seen is not None
    assert (seen.seen, seen.online, seen.pid, seen.host) == (
        {"0": 1005.0, "1": 1000.0},
        [0],
        os.getpid(),
        socket.gethostname(),
    )
    assert StatusWriter(RunDirectory(tmp_path), "devices", 2, 3)._seen == seen.seen  # a resumed run remembers


def test_a_full_disk_stops_no_run_for_its_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(record, "write_pieces_atomically", full)
    StatusWriter(RunDirectory(tmp_path), "devices", 2, 3).note(0, {}, {})


def test_a_server_lists_its_run_directories_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, run = tmp_path / "flower", tmp_path / "run"
    home.mkdir()
    run.mkdir()
    monkeypatch.setenv("FLWR_HOME", str(home))
    for _ in range(2):
        note_run(run)
    assert (home / RUNS_FILE).read_text() == f"{run}\n"
    assert known_runs(home) == [run]
    run.rmdir()
    assert known_runs(home) == []


def run_view(name: str, clients: int, state: str = "running") -> RunView:
    return RunView(path=name, name=name, state=state, clients=clients, turn=1, turns=9, failed=0, written=0.0)


def test_a_new_client_takes_part_where_the_plan_has_its_number() -> None:
    runs = [run_view("small", 3), run_view("large", 4), run_view("old", 9, "finished")]
    assert part_in_words([3], runs) == [
        "node-3: not in small, whose plan has 3 clients and does not change",
        "node-3: at once in large, whose plan has 4 clients",
        "in the next run with clients = 4 or more in [data]",
    ]
    assert part_in_words([3], [run_view("small", 3, "stopped"), run_view("small", 3)]) == [
        "node-3: not in small, whose plan has 3 clients and does not change",
        "in the next run with clients = 4 or more in [data]",
    ]


def test_a_node_is_added_and_registered_and_no_other_file_of_a_node_changes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_in(folder)
    before = {path: path.read_bytes() for path in folder.glob("node-*/*")}
    monkeypatch.setattr(
        membership, "register_nodes", lambda _: (["node-0: already registered", "node-3: registered"], [])
    )
    lines, faults = join_nodes(folder, 1)
    assert faults == []
    assert all(path.read_bytes() == content for path, content in before.items())
    assert "registered  node-3" in lines
    assert "takes part  node-3: not in devices, whose plan has 3 clients and does not change" in lines
    assert not any("register.sh" in line for line in lines)


def test_without_a_server_the_folders_are_made_and_the_key_waits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(_: Path) -> None:
        raise UserError("the server", "an answer", "silence", "Start it")

    monkeypatch.setattr(membership, "register_nodes", silent)
    lines, faults = join_nodes(folder, 2)
    assert (folder / "node-4" / "node.key").is_file()
    assert len(lines) == len(faults) == 1
    assert faults[0].startswith("node-3, node-4: not registered. the server: ")
    assert faults[0].endswith(f"Then run: fedpriv deploy register {folder}")
    assert any("fedpriv deploy register" in line for line in join_nodes(folder, 1, register=False)[0])


def test_all_reasons_are_named_with_clients_and_nodes() -> None:
    reasons = {0: "refuses: a", 3: "no usable answer", 1: "refuses: b", 2: "refuses: c", 4: "no usable answer"}
    assert reasons_in_words(reasons) == (
        "client 0 (node-0): refuses: a; clients 3 (node-3), 4 (node-4): no usable answer; "
        "client 1 (node-1): refuses: b; client 2 (node-2): refuses: c"
    )


def test_waiting_is_for_deployments_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["run", "sim_configs/quickstart.toml", "--wait", "--out", str(tmp_path / "run")])
    assert end.value.code == 2
    assert "--wait" in capsys.readouterr().err


def test_the_budget_counts_charges_of_restored_ledgers_and_has_no_exponent(folder: Path) -> None:
    from fedpriv.deploy.device.ledger import Ledger

    policy = folder / "node-0" / "fedpriv-client.toml"
    Ledger(folder / "node-0" / "state").charge(3.0, "restored")
    assert by_name(view_of(folder, connect=False))["node-0"].budget == "5 of 8"
    policy.write_text(policy.read_text().replace("epsilon = 8.0", "epsilon = 12345.0"))
    assert by_name(view_of(folder, connect=False))["node-0"].budget == "12342 of 12345"


@pytest.mark.parametrize(
    ("file", "content", "budget", "said"),
    [
        ("fedpriv-client.toml", b"\xff\xfe", "damaged policy", "expected a TOML file"),
        ("fedpriv-client.toml", b"[limits]\nepsilon = 'all'\n", "damaged policy", "limits.epsilon: expected a number"),
        ("state/ledger.jsonl", b"{\n", "damaged ledger", "expected"),
    ],
)
def test_a_damaged_file_of_a_node_is_named(
    folder: Path, file: str, content: bytes, budget: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "node-1" / file
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    nodes = by_name(view_of(folder, connect=False))
    assert nodes["node-1"].budget == budget
    assert nodes["node-1"].fault.startswith(str(path))
    assert said in nodes["node-1"].fault
    assert nodes["node-0"].fault == ""
    with pytest.raises(SystemExit):
        main(["deploy", "status", str(folder)])
    out = "".join(capsys.readouterr().out.split())  # lines are broken at the terminal's width
    assert f"faultnode-1:{path}" in out
    assert budget.replace(" ", "") in out

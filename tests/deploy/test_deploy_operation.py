"""Operation of a deployment: logs in JSON, metrics, warnings before certificates end, containers."""

import datetime
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
import yaml
from deploy_names import HOST
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from loopback import FEDPRIV, Loopback, free_port, wait_until
from test_deploy_member import ask, policy, turn

from fedpriv.cli import app
from fedpriv.deploy.checks import load_certificate
from fedpriv.deploy.device.device import Device
from fedpriv.deploy.operate import json_lines
from fedpriv.deploy.operate import party as party_module
from fedpriv.deploy.operate.expiry import Ending, endings, warnings
from fedpriv.deploy.operate.health import health
from fedpriv.deploy.operate.metrics import NodeBudget, node_budgets, serve_metrics
from fedpriv.deploy.operate.party import operate
from fedpriv.deploy.operate.tally import Counts, Tally, all_counts, bytes_of
from fedpriv.deploy.setup.compose import metrics_port
from fedpriv.deploy.setup.provision import Deployment, add_nodes, init_deployment
from fedpriv.errors import UserError
from fedpriv.files import lock_file
from fedpriv.flower.companion import PREPARED

KEYS = {"time", "level", "source", "name", "message"}
NOW = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)

OUTPUT = b"""\x1b[92mINFO \x1b[0m:      Starting Flower SuperLink
2026-11-29T15:59:10.772Z INFO [uvicorn.error] Uvicorn running on https://127.0.0.1:9092
2026-11-29T15:59:11.000Z \x1b[31mERROR\x1b[0m [uvicorn.error] Exception in ASGI application
\x1b[93mWARNING \x1b[0m:   turn 2: client 1 refuses (budget): epsilon
    continued
fedpriv: the server's certificate ends in 3 days
a line that is no record
Traceback (most recent call last):
  File "x.py", line 1, in <module>
ValueError: "quoted" and \xc3\xa4
ERROR :     after it
no line break"""


def test_every_event_is_one_json_object_with_the_same_keys_and_a_time() -> None:
    command = [sys.executable, "-P", json_lines.__file__, "node", "node-3"]
    done = subprocess.run(command, input=OUTPUT, capture_output=True, check=True, timeout=60)
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(set(event) == KEYS for event in events)
    assert {(event["source"], event["name"]) for event in events} == {("node", "node-3")}
    for event in events:
        at = datetime.datetime.fromisoformat(event["time"])
        assert abs((datetime.datetime.now(datetime.UTC) - at).total_seconds()) < 60
    assert [(event["level"], event["message"]) for event in events] == [
        ("info", "Starting Flower SuperLink"),
        ("info", "[uvicorn.error] Uvicorn running on https://127.0.0.1:9092"),
        ("error", "[uvicorn.error] Exception in ASGI application"),
        ("warning", "turn 2: client 1 refuses (budget): epsilon\n    continued"),
        ("warning", "the server's certificate ends in 3 days"),
        ("info", "a line that is no record"),
        ("error", 'Traceback (most recent call last):\n  File "x.py", line 1, in <module>\nValueError: "quoted" and ä'),
        ("error", "after it"),
        ("info", "no line break"),
    ]


@pytest.mark.parametrize(("days", "said"), [(31, 0), (29.5, 1), (0.5, 1), (-1, 1)])
def test_a_certificate_is_announced_before_it_ends(days: float, said: int) -> None:
    lines = warnings([Ending(name, NOW + datetime.timedelta(days=days)) for name in ("server", "ca")], NOW)
    assert len(lines) == 2 * said
    if said:
        assert ("ended on" if days < 0 else f"ends in {int(days)} days") in lines[0]
        assert "fedpriv deploy renew" in lines[0]
        assert "new deployment" in lines[1]


def test_the_ends_are_those_in_the_files(made: Path) -> None:
    found = {ending.certificate: ending.at for ending in endings(made / "server")}
    assert found == {
        "server": load_certificate(made / "server" / "server.pem").not_valid_after_utc,
        "ca": load_certificate(made / "ca" / "ca.crt").not_valid_after_utc,
    }
    assert [ending.certificate for ending in endings(made / "node-0", f"127.0.0.1:{free_port()}")] == ["ca"]


def turns(tally: Tally) -> None:
    tally.sent([RecordDict({"a": ConfigRecord({"b": b"x" * 100})})])
    tally.received([RecordDict({"a": ConfigRecord({"b": b"x" * 10, "none": "", "nothing": []})})])
    tally.turn("applied", 2.5, 3.0, {"answers": 3, "unusable": 1, "missing": 2, "refusals": ["budget", "budget"]})
    tally.turn("too few", 1.5, 2.0, {"answers": 1, "unusable": 0, "missing": 5, "refusals": ["policy"]})


def tally(home: Path, monkeypatch: pytest.MonkeyPatch, secret: bool) -> Tally:
    monkeypatch.setenv("FLWR_HOME", str(home))
    return Tally.of_run(Counts(run="first", id="abc", turns=4, epsilon=4.0), secret)


def shown(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        lines = [line for line in answer.read().decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_sizes_of_messages_include_empty_texts_and_lists() -> None:
    values = {"text": "", "other": "ab", "list": [], "numbers": [1.0, 2.0], "flag": True, "bytes": b"abc"}
    content = RecordDict({"a": ConfigRecord(values), "b": ConfigRecord({})})
    assert bytes_of(content) == len("".join(values)) + 2 + 16 + 1 + 3


def test_metrics_of_a_run_are_its_counts_also_after_a_resumption(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns(tally(tmp_path, monkeypatch, secret=False))
    resumed = tally(tmp_path, monkeypatch, secret=False)
    resumed.turn("applied", 1.0, 1.0, {"answers": 4, "unusable": 0, "missing": 0, "refusals": []})
    port = serve_metrics(made / "server", 0, "127.0.0.1", counts=lambda: all_counts(tmp_path))
    found, of = shown(port), '{id="abc",run="first"}'
    assert found[f"fedpriv_run_answers_total{of}"] == 8
    assert found[f"fedpriv_run_missing_total{of}"] == 7
    assert found[f"fedpriv_run_unusable_total{of}"] == 1
    assert found[f"fedpriv_run_seconds_total{of}"] == 5
    assert found[f"fedpriv_run_epsilon{of}"] == 4
    assert found[f"fedpriv_run_epsilon_left{of}"] == 1
    assert found[f"fedpriv_run_sent_bytes_total{of}"] >= 100 > found[f"fedpriv_run_received_bytes_total{of}"] >= 10
    assert found['fedpriv_run_refusals_total{id="abc",kind="budget",run="first"}'] == 2
    assert found['fedpriv_run_turns_total{id="abc",outcome="applied",run="first"}'] == 2
    assert found['fedpriv_certificate_end_timestamp_seconds{certificate="server"}'] > time.time()


def test_metrics_do_not_show_who_takes_part_if_cohorts_are_secret(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns(tally(tmp_path, monkeypatch, secret=True))
    port = serve_metrics(made / "server", 0, "127.0.0.1", counts=lambda: all_counts(tmp_path))
    names = {re.split(r"[{ ]", name)[0].removesuffix("_total") for name in shown(port)}
    runs = {name for name in names if name.startswith("fedpriv_run")}
    assert runs == {
        *("fedpriv_run_turns", "fedpriv_run_planned_turns", "fedpriv_run_seconds"),
        *("fedpriv_run_epsilon", "fedpriv_run_epsilon_left"),
    }
    kept = json.loads((tmp_path / "metrics" / "abc.json").read_text())
    assert {kept[name] for name in ("answers", "unusable", "missing", "sent", "received", "refusals")} == {None}


def test_a_run_whose_counts_cannot_be_read_or_written_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "abc.json").write_text("no")
    assert all_counts(tmp_path) == []
    counted = tally(tmp_path, monkeypatch, secret=False)
    monkeypatch.setattr("fedpriv.deploy.operate.tally.write_atomically", fails)
    turns(counted)
    assert counted.counts.answers == 4


def test_the_size_of_a_message_is_that_of_its_names_and_values() -> None:
    """Nodes may send empty values, and lists of any kind."""
    arrays = ArrayRecord({"w": Array(np.zeros(4))})
    values = ConfigRecord({"a": "", "b": [], "c": True, "d": [b"", b"xyz"], "e": 2.0})
    assert bytes_of(RecordDict({"a": values, "m": MetricRecord({"f": [1, 2], "g": 3})})) == 5 + 1 + 3 + 8 + 2 + 24
    assert bytes_of(RecordDict({"a": arrays})) == 1 + len(arrays["w"].data)


def fails(*_: Any) -> None:
    raise OSError(28, "no space left on device")


def test_a_node_shows_its_budget_unless_that_could_show_that_it_took_part(deployment: Path) -> None:
    node = deployment / "node-0"
    (before,) = node_budgets(node)
    assert before == NodeBudget("client", 8.0, 8.0)
    ask(Device(policy(), node / "state"), *turn(1, 0))
    port = serve_metrics(node, 0, "127.0.0.1", budgets=lambda: node_budgets(node))
    assert shown(port)['fedpriv_budget_epsilon{unit="client"}'] == 8
    first = shown(port)['fedpriv_budget_left_epsilon{unit="client"}']
    ask(Device(policy(), node / "state"), *turn(2, 1))
    assert 8 > first > shown(port)['fedpriv_budget_left_epsilon{unit="client"}'] >= 0
    text = (node / "fedpriv-client.toml").read_text()
    (node / "fedpriv-client.toml").write_text(text.replace('trust = "local"', 'trust = "central"'))
    assert node_budgets(node) == [NodeBudget("client", 8.0, None)]
    assert 'fedpriv_budget_left_epsilon{unit="client"}' not in shown(port)


def test_a_port_in_use_is_one_line(made: Path) -> None:
    port = serve_metrics(made / "server", 0, "127.0.0.1")
    with pytest.raises(UserError, match=r"--metrics-port: expected a free port at 127\.0\.0\.1"):
        serve_metrics(made / "server", port, "127.0.0.1")


def test_a_node_is_healthy_while_it_runs_and_hears_from_the_server(deployment: Path) -> None:
    node = deployment / "node-0"
    with pytest.raises(UserError, match="expected a running node"):
        health(node)
    (node / "flower").mkdir()
    with (node / "flower" / "lock").open("w") as lock:
        lock_file(lock)
        with pytest.raises(UserError, match="expected an answer from the server"):
            health(node)
        (node / "flower" / "alive").touch()
        assert health(node) == "the server answered 0 s ago"
        long_ago = time.time() - 100
        os.utime(node / "flower" / "alive", (long_ago, long_ago))
        with pytest.raises(UserError, match="silence for 100 s"):
            health(node)


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("composed") / "d"
    init_deployment(folder, Deployment(host=HOST, nodes=2, helpers=1, trust="aggregator"))
    add_nodes(folder, 1)
    return folder


def services(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the services of all included files, by name."""
    whole = yaml.safe_load((folder / "compose.yaml").read_text())
    assert set(whole) == {"include"}
    found: dict[str, dict[str, Any]] = {}
    for name in whole["include"]:
        one = yaml.safe_load((folder / name).read_text())
        assert set(one) == {"services"}
        (service,) = one["services"]
        assert service == name.split("/")[0]
        found |= one["services"]
    return found


def image(folder: Path) -> tuple[list[str], list[str], str]:
    """Return the entry point, the health check and the wheel of a Dockerfile."""
    text = (folder / "Dockerfile").read_text().replace("\\\n", " ")
    entry = json.loads(re.findall(r"^ENTRYPOINT (.*)$", text, re.MULTILINE)[0])
    check = json.loads(re.findall(r"^HEALTHCHECK .*CMD (\[.*\])$", text, re.MULTILINE)[0])
    return entry, check, re.findall(r"^COPY (\S+)", text, re.MULTILINE)[0]


def accepted(arguments: list[str]) -> dict[str, Any]:
    """Parse a command line of fedpriv without running it."""
    program, *rest = arguments
    assert program == "fedpriv"
    command: Any = typer.main.get_command(app)
    context, name = None, program
    while hasattr(command, "commands"):
        name, *rest = rest
        command = command.commands[name]
    context = command.make_context(name, rest, parent=context)
    return context.params


def test_the_compose_files_name_parties_commands_and_checks_that_exist(composed: Path) -> None:
    found = services(composed)
    assert list(found) == ["server", "node-0", "node-1", "node-2", "helper-0"]
    ports = set()
    for name, service in found.items():
        folder = composed / name
        entry, check, wheel = image(folder)
        params = accepted([*entry, *service["command"]])
        assert entry[2] == ("server" if name == "server" else "node")
        assert params["log_format"] == "json"
        assert params["metrics_host"] == "127.0.0.1"
        assert params["metrics_port"] == metrics_port(name)
        ports.add(params["metrics_port"])
        (mount,) = service["volumes"]
        assert mount.split(":") == [".", entry[3]]
        assert service["network_mode"] == "host"
        assert "ports" not in service
        assert service["build"] == "."
        assert service["image"].split(":")[0] == ("fedpriv-superlink" if name == "server" else f"fedpriv-{name[:-2]}")
        assert "FEDPRIV_USER" in service["user"]
        assert service["healthcheck"]["test"] == ["CMD", *check]
        assert accepted(check) == {"folder": entry[3]}
        assert check[-1] == entry[3]
        ignored = (folder / ".dockerignore").read_text().splitlines()
        assert [line for line in ignored if not line.startswith("#")] == ["*", "!fedpriv-*.whl"]
        assert re.fullmatch(r"fedpriv-.*\.whl", wheel)
    assert len(ports) == len(found)
    assert not ports & {9092}


def test_nothing_in_a_compose_file_is_left_to_fill_in(composed: Path) -> None:
    for path in composed.rglob("compose.yaml"):
        values = yaml.safe_load(path.read_text())
        assert re.findall(r"\$", json.dumps(values).replace("${FEDPRIV_USER:?", "")) == [], path


@pytest.mark.slow
def test_the_entry_points_of_the_images_run_report_and_are_healthy(tmp_path: Path) -> None:
    """Runs the commands of the containers of a server and a node, with the mounted folder's own path."""
    party = Loopback(tmp_path / "d", nodes=1, seeded=False)
    party.make()
    started: dict[str, Any] = {}
    try:
        for name in ("server", "node-0"):
            entry, _, _ = image(party.folder / name)
            port = free_port()
            options = [str(port) if part.isdigit() else part for part in services(party.folder)[name]["command"]]
            command = [*FEDPRIV, *entry[1:3], str(party.folder / name), *options]
            with (party.folder / f"{name}.log").open("wb") as log:
                process = subprocess.Popen(command, env=party.environment, stdout=log, stderr=subprocess.STDOUT)
            started[name] = (process, port)
            if name == "server":
                wait_until(party._listens, 300.0, party.log(name))
                party.register()
        wait_until(lambda: healthy(party.folder / "node-0"), 300.0, party.log("node-0"))
        assert "the server answers at 127.0.0.1" in health(party.folder / "server")
        for name, (_, port) in started.items():
            assert 'fedpriv_certificate_end_timestamp_seconds{certificate="server"}' in shown(port)
            assert ('fedpriv_budget_left_epsilon{unit="client"}' in shown(port)) == (name == "node-0")
        for name, (process, _) in reversed(started.items()):
            process.terminate()
            process.wait(60.0)
            wait_until(lambda name=name: not party.processes(name), 30.0, party.log(name))
    finally:
        for process, _ in started.values():
            process.kill()
    for name in started:
        events = [json.loads(line) for line in party.log(name).splitlines()]
        assert {*events[0]} == KEYS
        assert {(event["source"], event["name"]) for event in events} == {(name.split("-")[0], name)}
        assert [e["level"] for e in events if "metrics at http://" in e["message"]] == ["info"]
        assert len(events) > 2


def healthy(folder: Path) -> bool:
    try:
        return bool(health(folder))
    except UserError:
        return False


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str], bool]]:
    """Note what would be forked, and for whom."""
    calls: list[tuple[str, list[str], bool]] = []

    def ahead(lock: Path, prepared: list[str], shared: list[str], *, foreign: bool) -> nullcontext[None]:
        calls.append((str(lock), prepared, foreign))
        assert len(shared) == 1
        return nullcontext()

    monkeypatch.setattr(party_module, "forked_ahead", ahead)
    monkeypatch.setattr(party_module, "warn_daily", lambda *_: None)
    monkeypatch.setenv(PREPARED, "")
    return calls


def test_only_a_node_of_our_own_app_forks_its_apps_with_our_packages(
    tmp_path: Path, forked: list[tuple[str, list[str], bool]]
) -> None:
    """An accepted app, and the server's app of a user, may have packages of the same names."""
    init_deployment(tmp_path / "d", Deployment(host=HOST, nodes=2, trust="aggregator", helpers=1))
    with (tmp_path / "d" / "node-1" / "node.toml").open("a") as file:
        file.write(f'accepted-apps = ["{"0" * 64}"]\n')
    own = ["flwr-clientapp", "clients.client_app"]
    for name, prepared, foreign in (
        ("server", ["flwr-serverapp"], True),
        ("node-0", own, False),
        ("node-1", own[:1], True),
        ("helper-0", own, False),
    ):
        with operate(tmp_path / "d" / name):
            assert os.environ[PREPARED].split() == prepared
        assert forked.pop() == (str(tmp_path / "d" / name / "flower" / "lock"), prepared, foreign)
    with operate(tmp_path):
        assert not forked

"""`fedpriv flower APP_DIR`: apps that do not know this project, on fedpriv's grid."""

import dataclasses
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flower_existing_app import CLIENTS as EXISTING_CLIENTS
from flower_existing_app import app as existing_app
from flower_existing_app import initial_net
from flower_in_process import InProcessGrid
from flower_plain_app import CLIENT, CLIENTS, LEGACY_CLIENT, LEGACY_SERVER, SERVER, write_app
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedpriv.cli import main
from fedpriv.errors import UserError
from fedpriv.flower.apps.folder import AppFolder
from fedpriv.flower.apps.grid import Answers, AppGrid
from fedpriv.flower.apps.run import run_app
from fedpriv.flower.apps.virtual_clients import FIRST_NODE, ClientSeeds, InProcessClients, Population, VirtualClients
from fedpriv.flower.internals.app import (
    SERVER_NODE,
    copy_context,
    copy_message,
    empty_run,
    error_of_exception,
    inside_a_run,
    number_message,
    reason_in_short,
    unavailable_reply,
)
from fedpriv.flower.launch import FlowerRun
from strategies import AlphaNormEC, Privacy

ROOT = Path(__file__).parents[2]
RUN = 7


@pytest.fixture
def plain(tmp_path) -> Path:
    return write_app(tmp_path / "app")


@pytest.fixture
def _in_a_run():
    with inside_a_run(RUN):
        yield


def found(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray], kind: str = "") -> bool:
    keys = [key for key in a if key.startswith(kind)]
    return bool(keys) and a.keys() == b.keys() and all(a[key].tobytes() == b[key].tobytes() for key in keys)


# ---------------------------------------------------------------- whole apps


@pytest.mark.slow
def test_results_are_those_of_flwr_run(plain, tmp_path):
    """FedAvg adds replies in their order of arrival, which is random in Flower (it takes them from a set), so that the
    results agree up to rounding. An app that sorts its replies agrees to the bit."""
    home, out = tmp_path / "home", tmp_path / "flower.npz"
    home.mkdir()
    (home / "work").mkdir()
    write_app(home / "app", out=str(out))
    run = FlowerRun(home, CLIENTS, "cpu", tmp_path / "flower.log")
    with run.running() as process:
        assert process.wait(timeout=120) == 0, run.log.read_text()
        assert out.exists(), run.log.read_text()
    run_app(plain, CLIENTS, [f"out='{tmp_path / 'ours.npz'}'"])
    flower, ours = found(out), found(tmp_path / "ours.npz")
    assert same(flower, ours, "sorted")
    assert flower.keys() == ours.keys()
    for key, value in flower.items():
        np.testing.assert_allclose(ours[key], value, rtol=1e-5, atol=1e-6, err_msg=key)


def in_a_process(*arguments: object, cwd: Path) -> subprocess.Popen[str]:
    """Run in another process, since Ray leaves open files in the process that starts it, which are errors here."""
    command = [sys.executable, "-m", "fedpriv.cli", "flower", *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "FEDPRIV_TEST": str(cwd), "TMPDIR": str(cwd)}
    return subprocess.Popen(command, cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.slow
def test_one_process_and_two_workers_agree_to_the_bit_even_if_clients_draw_without_a_seed(plain, tmp_path):
    """The client module seeds PyTorch only on import; each client still has independent random numbers."""
    arguments = [plain, "--clients", CLIENTS, "--workers", 2, "-c", "seeded=false out='two.npz'"]
    output, errors = in_a_process(*arguments, cwd=tmp_path).communicate(timeout=120)
    assert output.splitlines()[-1].endswith(" messages/s, 2 workers"), errors
    for name, config in {"one": "seeded=false", "again": "seeded=false", "seeded": "seeded=true"}.items():
        made = run_app(plain, CLIENTS, [config, f"out='{tmp_path / name}.npz'"])
        assert (made.messages, made.failed, made.workers) == (4 * 3 * CLIENTS, 0, 1)
    one = found(tmp_path / "one.npz")
    assert same(one, found(tmp_path / "again.npz"))
    assert same(one, found(tmp_path / "two.npz"))
    assert not same(one, found(tmp_path / "seeded.npz"), "sorted")
    assert processes_with(tmp_path) == []


def test_a_client_keeps_its_state_from_round_to_round(plain, tmp_path):
    run_app(plain, CLIENTS, [f"out='{tmp_path / 'out.npz'}' rounds=2"])
    counts = [float(v) for k, v in found(tmp_path / "out.npz").items() if " count " in k]
    assert counts == [1, 2, 3, 4]


def test_a_run_config_is_overridden_as_flwr_run_does(plain, tmp_path):
    assert AppFolder.read(plain).run_config["model.width"] == 8
    read = AppFolder.read(plain, ["lr=1.5 out='a b'", "model.width=9", "seeded=false"]).run_config
    assert read == {"rounds": 3, "lr": 1.5, "clients": CLIENTS, "seeded": False, "out": "a b", "model.width": 9}
    (tmp_path / "more.toml").write_text("rounds = 1\n[model]\nwidth = 2\n")
    read = AppFolder.read(plain, [str(tmp_path / "more.toml")]).run_config
    assert (read["rounds"], read["model.width"]) == (1, 2)


def test_files_with_relative_names_land_where_the_user_is(plain, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as leaving:
        main(["flower", str(plain), "--clients", str(CLIENTS), "-c", "rounds=1"])
    assert leaving.value.code == 0
    assert (tmp_path / "out.npz").exists()
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("20 messages in ")
    assert line.endswith(" messages/s, 1 worker")


def test_legacy_apps_run_too(tmp_path):
    app = write_app(tmp_path / "app", client=LEGACY_CLIENT, server=LEGACY_SERVER)
    made = run_app(app, CLIENTS, [f"out='{tmp_path / 'out.npz'}'"])
    assert made.failed == 0
    # Flower adds legacy replies in the order in which threads end.
    assert found(tmp_path / "out.npz")["arr_0"].tolist() == pytest.approx([4.0] * 4, rel=1e-12)


def test_the_next_app_does_not_find_the_modules_of_the_last(plain, tmp_path):
    before = list(sys.path)
    run_app(plain, 2, [f"out='{tmp_path / 'a.npz'}' rounds=1 clients=2"])
    assert sys.path == before
    assert "plain.server" not in sys.modules
    other = write_app(tmp_path / "other", server="from flwr.serverapp import ServerApp\nraise OSError('mine')\n")
    with pytest.raises(UserError, match="mine"):
        run_app(other, 2)


def test_lifespans_and_mods_are_called(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spans = """
from pathlib import Path

def note(text):
    with Path("notes").open("a") as file:
        file.write(text + " ")
"""
    client = spans + CLIENT.replace(
        "app = ClientApp()", "app = ClientApp(mods=[lambda m, c, n: (note('mod'), n(m, c))[1]])"
    )
    client += "\n@app.lifespan()\ndef lifespan(context):\n    note('client')\n    yield\n    note('bye')\n"
    server = (
        spans + SERVER + "\n@app.lifespan()\ndef lifespan(context):\n    note('server')\n    yield\n    note('end')\n"
    )
    run_app(write_app(tmp_path / "app", client=client, server=server), 2, ["rounds=1 clients=2"])
    assert Path("notes").read_text().split() == ["server", *["client", "mod", "bye"] * 8, "end"]


def test_ours_and_deployed_nodes_give_a_private_strategy_the_same(tmp_path):  # noqa: ARG001
    def train(grid: Grid) -> torch.Tensor:
        strategy = AlphaNormEC(
            alpha=0.5, beta=0.2, server_lr=0.3, privacy=Privacy(epsilon=20.0), num_clients=EXISTING_CLIENTS, seed=3
        )
        arrays = ArrayRecord(initial_net().state_dict())
        with inside_a_run(RUN):
            strategy.start(grid, arrays, num_rounds=3, timeout=60, train_config=ConfigRecord({"lr": 0.1}))
        return strategy.state.model

    assert torch.equal(
        train(grid_of(existing_app, EXISTING_CLIENTS)), train(InProcessGrid(existing_app, EXISTING_CLIENTS))
    )


# ---------------------------------------------------------------- mistakes of users


def refused(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as leaving:
        main(["flower", *map(str, arguments)])
    assert leaving.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert "Traceback" not in lines
    assert lines[-1].startswith("fedpriv: ")
    return lines[-1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--clients", "0"], "--clients: expected at least 1, got 0"),
        (["--clients", "2", "-c", "rouds=3"], "got rouds. Did you mean 'rounds'?"),
        (["--clients", "2", "-c", "out=somewhere"], "--run-config out: expected valid TOML"),
        (["--clients", "2", "-c", "nonsense"], "expected key=value pairs, got 'nonsense'"),
        (["--clients", "2", "-c", "lr=[1,2]"], "expected a bool, number or string, got list"),
        (["--clients", "2", "-c", "no.toml"], "expected an existing TOML file"),
        (["--clients", "2", "--workers", "0"], "--workers: expected at least 1, got 0"),
        (["--clients", "2", "--gpus-per-worker", "0.5"], "--gpus-per-worker: expected --workers above 1, got 1"),
        (["--clients", "2", "--workers", "2", "--gpus-per-worker", "-1"], "--gpus-per-worker: expected 0 or more"),
        (["--clients", "2", "--ray-address", "nowhere"], "--ray-address: expected HOST:PORT or auto, got nowhere"),
        (["--clients", "2", "--ray-address", "127.0.0.1:1"], "a Ray cluster that answers, got 127.0.0.1:1: "),
    ],
)
def test_a_wrong_option_is_one_line(arguments, words, plain, capsys):
    assert words in refused(capsys, plain, *arguments)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda _: "", 'tool.flwr.app.components.serverapp: expected "module:attribute", got a missing key'),
        (lambda text: text.replace("plain.server:app", "plain.server"), "got 'plain.server'"),
        (lambda text: text + "]", "expected valid TOML"),
        (lambda text: text.replace("plain.client:app", "plain.cliemt:app"), "No module named 'plain.cliemt'"),
        (lambda text: text.replace("plain.client:app", "plain.client:ap"), "has no attribute 'ap'"),
        (lambda text: text.replace("plain.client:app", "plain.server:app"), "expected a ClientApp, got ServerApp"),
        (lambda text: text.replace("rounds = 3", "rounds = [3]"), "config.rounds: expected a bool, number or string"),
    ],
    ids=["empty", "no attribute", "no TOML", "no module", "no such attribute", "other app", "a list"],
)
def test_a_wrong_pyproject_is_one_line(change, words, plain, capsys):
    file = plain / "pyproject.toml"
    file.write_text(change(file.read_text()))
    assert words in refused(capsys, plain, "--clients", 2)


def test_a_folder_without_an_app_is_one_line(tmp_path, capsys):
    assert "expected a folder with a pyproject.toml, got a folder without it" in refused(
        capsys, tmp_path, "--clients", 2
    )


RAISING = "\n@app.main()\ndef main(grid, context):\n    raise LookupError('nothing here')\n"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"server": "import nonsense\n"}, "ModuleNotFoundError: No module named 'nonsense' (server.py, line 1)"),
        ({"client": "x = 1 / 0\n"}, "ZeroDivisionError: division by zero (client.py, line 1)"),
        ({"server": SERVER + RAISING}, "expected it to complete, got LookupError: nothing here (server.py, line "),
        (
            {"client": CLIENT.replace("count =", "count = 1 / 0 #")},
            "errors, the first: ZeroDivisionError: division by zero",
        ),
    ],
    ids=["server import", "client import", "server raises", "all clients raise"],
)
def test_an_app_that_fails_is_one_line(given, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    app = write_app(tmp_path / "app", **given)
    assert words in refused(capsys, app, "--clients", CLIENTS)


def test_a_package_named_like_one_of_ours_is_refused_instead_of_mistaken(plain, capsys):
    (plain / "clients").mkdir()
    (plain / "clients" / "__init__.py").write_text("")
    assert "package names that fedpriv does not use, got clients" in refused(capsys, plain, "--clients", 2)


@pytest.mark.slow
def test_ray_refuses_more_than_it_has(plain, tmp_path):
    arguments = [plain, "--clients", 4, "--workers", 2, "--gpus-per-worker", 1000]
    process = in_a_process(*arguments, cwd=tmp_path)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "expected a share for each of 2 workers, got 1000 of " in errors.splitlines()[-1]
    assert processes_with(tmp_path) == []


@pytest.mark.slow
def test_a_worker_that_dies_ends_the_run_since_its_clients_forgot(tmp_path):
    dying = CLIENT.replace("    net, partition, x, y = asked(msg, context)", "    __import__('os')._exit(1)", 1)
    app = write_app(tmp_path / "app", client=dying)
    process = in_a_process(app, "--clients", CLIENTS, "--workers", 2, cwd=tmp_path)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    line = errors.splitlines()[-1]
    assert line.startswith("fedpriv: a worker of --workers: expected it to run until the end, got ")
    assert "Traceback" not in errors
    assert processes_with(tmp_path) == []


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
def test_a_run_that_is_stopped_takes_its_workers_with_it(tmp_path):
    sleeping = CLIENT.replace(
        "    count =", "    open('began', 'w').close(); __import__('time').sleep(60)\n    count =", 1
    )
    app = write_app(tmp_path / "app", client=sleeping)
    process = in_a_process(app, "--clients", CLIENTS, "--workers", 2, cwd=tmp_path)
    until = time.monotonic() + 120
    while not (tmp_path / "began").exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert (tmp_path / "began").exists(), errors
    assert process.returncode > 0
    assert "Traceback" not in errors
    assert processes_with(tmp_path) == []


def processes_with(cwd: Path) -> list[str]:
    """Return the processes started in a folder that remain after a moment."""
    until = time.monotonic() + 15
    while (left := _processes_with(f"FEDPRIV_TEST={cwd}".encode())) and time.monotonic() < until:
        time.sleep(0.2)
    return left


def _processes_with(mark: bytes) -> list[str]:
    names = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in path.read_bytes().split(b"\0"):
                names.append((path.parent / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return names


# ---------------------------------------------------------------- the grid


def grid_of(app: ClientApp, size: int, seeds: ClientSeeds | None = None) -> AppGrid:
    population = Population(RUN, size, {"lr": 0.5}, seeds or ClientSeeds(1, 2, 3))
    return AppGrid(empty_run(RUN), population.nodes, InProcessClients(VirtualClients(app, population)))


def client_of(function) -> ClientApp:
    app = ClientApp()
    app.train()(function)
    return app


def echo(message: Message, context: Context) -> Message:  # noqa: ARG001
    return Message(message.content, reply_to=message)


def records() -> RecordDict:
    arrays = ArrayRecord([np.arange(3.0)])
    return RecordDict({"a": arrays, "c": ConfigRecord({"l": [1, 2]}), "m": MetricRecord({"x": [0.5]})})


def to(client: int, content: RecordDict | None = None, ttl: float | None = None) -> Message:
    return Message(records() if content is None else content, FIRST_NODE + client, "train", ttl=ttl, group_id="4")


@pytest.mark.usefixtures("_in_a_run")
def test_replies_come_in_the_order_of_messages_and_say_what_they_reply_to():
    grid = grid_of(client_of(echo), 6)
    nodes = list(grid.get_node_ids())
    assert nodes == [node.node_id for node in grid.get_nodes()] == list(range(FIRST_NODE, FIRST_NODE + 6))
    asked = [to(client) for client in (3, 0, 5, 3)]
    replies = grid.send_and_receive(asked)
    ids = [message.metadata.message_id for message in asked]
    assert len(set(ids)) == 4
    assert [reply.metadata.reply_to_message_id for reply in replies] == ids
    assert [reply.metadata.src_node_id - FIRST_NODE for reply in replies] == [3, 0, 5, 3]
    assert {reply.metadata.dst_node_id for reply in replies} == {SERVER_NODE}
    assert all(reply.metadata.message_id for reply in replies)
    assert replies[0].metadata.group_id == "4"
    assert grid.run.run_id == replies[0].metadata.run_id == RUN


@pytest.mark.usefixtures("_in_a_run")
def test_a_client_can_change_neither_the_server_nor_another_client():
    kept = []

    def spoil(message: Message, context: Context) -> Message:
        kept.append((message, context))
        arrays = message.content.array_records["a"]
        assert arrays["0"].numpy().tolist() == [0, 1, 2]
        assert message.content.config_records["c"]["l"] == [1, 2]
        arrays["0"].data = Array(np.full(3, 9.0)).data
        arrays["more"] = Array(np.zeros(1))
        message.content["c"]["l"].append(3)  # type: ignore[union-attr, index]
        message.content["new"] = MetricRecord()
        message.metadata.group_id = "other"
        context.node_config["partition-id"] = 77
        return Message(RecordDict(), reply_to=message)

    content = records()
    asked = [to(client, content) for client in range(3)]
    grid = grid_of(client_of(spoil), 3)
    assert not any(reply.has_error() for reply in grid.send_and_receive(asked))
    assert content == records()
    assert {message.metadata.group_id for message in asked} == {"4"}
    assert len({id(message.content) for message, _ in kept}) == 3


@pytest.mark.usefixtures("_in_a_run")
def test_an_array_that_a_client_or_server_unpacks_is_its_own():
    def fill(message: Message, context: Context) -> Message:  # noqa: ARG001
        values = message.content.array_records["a"]["0"].numpy()
        values.fill(9.0)
        message.content.array_records["a"].to_numpy_ndarrays()[0].fill(8.0)
        return Message(message.content, reply_to=message)

    content = records()
    replies = grid_of(client_of(fill), 2).send_and_receive([to(0, content), to(1, content)])
    assert content == records()
    replies[0].content.array_records["a"]["0"].numpy().fill(7.0)
    assert [reply.content for reply in replies] == [records()] * 2


@pytest.mark.usefixtures("_in_a_run")
def test_a_state_is_its_clients_alone():
    """Neither the server, through a reply with the state, nor another client, through a global, can change it."""
    globals_ = []

    def remember(message: Message, context: Context) -> Message:
        for state in globals_:
            state["kept"]["l"].append(99)
        if "kept" not in context.state:
            context.state["kept"] = ConfigRecord({"l": []})
        context.state["kept"]["l"].append(len(context.state["kept"]["l"]))  # type: ignore[union-attr, index, arg-type]
        globals_.append(context.state)
        return Message(RecordDict({"kept": context.state["kept"]}), reply_to=message)

    grid = grid_of(client_of(remember), 2)
    for k in range(3):
        replies = grid.send_and_receive([to(0), to(1)])
        assert [reply.content.config_records["kept"]["l"] for reply in replies] == [list(range(k + 1))] * 2
        for reply in replies:
            reply.content["kept"]["l"].append(5)  # type: ignore[union-attr, index]


@pytest.mark.usefixtures("_in_a_run")
def test_messages_are_as_they_were_when_they_were_sent():
    content = RecordDict({"c": ConfigRecord({"client": -1})})

    def addressed():
        for client in range(3):
            content["c"]["client"] = client  # type: ignore[index]
            yield to(client, content)

    grid = grid_of(client_of(echo), 3)
    ids = [i for message in addressed() for i in grid.push_messages([message])]
    replies = grid.pull_messages(ids)
    assert [reply.content.config_records["c"]["client"] for reply in replies] == [0, 1, 2]


def fails_for(*clients: int):
    def train(message: Message, context: Context) -> Message:
        seen = context.state.config_records.get("seen") or ConfigRecord({"count": 0})
        context.state["seen"] = ConfigRecord({"count": seen["count"] + 1})  # type: ignore[operator]
        if context.node_config["partition-id"] in clients and "fail" in message.content:
            raise OSError("the disk is full")
        return Message(RecordDict({"seen": context.state["seen"]}), reply_to=message)

    return client_of(train)


@pytest.mark.usefixtures("_in_a_run")
def test_an_exception_is_an_error_reply_as_in_flower_and_undoes_what_it_did_to_the_state():
    grid = grid_of(fails_for(1), 3)
    fail = RecordDict({"fail": ConfigRecord()})
    replies = grid.send_and_receive([to(client, fail) for client in range(3)])
    assert [reply.has_error() for reply in replies] == [False, True, False]
    error = replies[1].error
    assert error.code == 2
    assert "ClientAppException" in str(error.reason)
    assert str(error.reason).endswith("Message: the disk is full'>")
    assert "line " in str(error.reason)
    assert reason_in_short(error) == "OSError: the disk is full"
    assert replies[1].metadata.src_node_id == FIRST_NODE + 1
    counts = [r.content.config_records["seen"]["count"] for r in grid.send_and_receive([to(i) for i in range(3)])]
    assert counts == [2, 1, 2]
    assert grid.answers == {"train": Answers(6, 1, "OSError: the disk is full")}


@pytest.mark.usefixtures("_in_a_run")
@pytest.mark.parametrize(
    ("train", "words"),
    [
        (lambda message, context: None, "must return a Message, it returned NoneType"),  # noqa: ARG005
        (lambda message, context: Message(RecordDict(), 5, "train"), "must return a reply"),  # noqa: ARG005
        (lambda message, context: context.run_config.update(lr=1) or echo(message, context), "cannot be modified"),
        (lambda message, context: sys.exit(3), "SystemExit: 3"),  # noqa: ARG005
    ],
)
def test_a_client_that_breaks_the_rules_has_an_error_for_a_reply(train, words):
    (reply,) = grid_of(client_of(train), 1).send_and_receive([to(0)])
    assert reply.has_error()
    assert words in reason_in_short(reply.error)


@pytest.mark.usefixtures("_in_a_run")
def test_a_timeout_ends_the_waiting_and_not_the_client(monkeypatch):
    clock = SimpleNamespace(now=time.monotonic(), monotonic=lambda: clock.now, time=time.time)
    for module in ("grid", "virtual_clients"):
        monkeypatch.setattr(f"fedpriv.flower.apps.{module}.time", clock)

    def slow(message: Message, context: Context) -> Message:
        context.state["seen"] = MetricRecord({"count": len(context.state) + 1})
        clock.now += 0.05
        return echo(message, context)

    grid = grid_of(client_of(slow), 4)
    asked = [to(client) for client in range(4)]
    began = clock.now
    early = grid.send_and_receive(asked, timeout=0.12)
    assert clock.now - began == pytest.approx(0.15)
    assert len(early) == 2
    late = grid.pull_messages([message.metadata.message_id for message in asked[len(early) :]])
    assert [reply.metadata.src_node_id - FIRST_NODE for reply in late] == list(range(len(early), 4))
    assert grid.send_and_receive([to(0)], timeout=0) == []


@pytest.mark.usefixtures("_in_a_run")
def test_a_message_that_has_expired_is_not_played_and_its_reply_says_so():
    played = []

    def slow(message: Message, context: Context) -> Message:
        played.append(context.node_config["partition-id"])
        time.sleep(0.1)
        return echo(message, context)

    grid = grid_of(client_of(slow), 2)
    replies = grid.send_and_receive([to(0), to(1, ttl=0.05)])
    assert played == [0]
    assert [reply.has_error() for reply in replies] == [False, True]
    assert replies[1].error.code == 3
    assert replies[1].metadata.src_node_id == SERVER_NODE
    (late,) = grid.send_and_receive([to(1, ttl=0.05)])
    assert late.has_error()


@pytest.mark.usefixtures("_in_a_run")
def test_a_reply_is_given_once_and_unknown_ids_have_errors():
    grid = grid_of(client_of(echo), 1)
    ids = grid.push_messages([to(0)])
    assert [reply.has_error() for reply in grid.pull_messages([*ids, "no such"])] == [False, True]
    (again,) = grid.pull_messages(ids)
    assert again.has_error()
    assert again.metadata.reply_to_message_id == ids[0]


@pytest.mark.usefixtures("_in_a_run")
def test_a_message_to_nobody_is_dropped_and_an_impossible_one_refused(caplog):
    grid = grid_of(client_of(echo), 2)
    (reply,) = grid.send_and_receive([to(0), to(2)])
    assert "Invalid destination node ID" in caplog.text
    with pytest.raises(ValueError, match="Invalid message"):
        grid.push_messages([Message(RecordDict(), reply_to=reply)])
    with pytest.raises(TypeError):
        grid.set_run("run")  # type: ignore[arg-type]


@pytest.mark.usefixtures("_in_a_run")
def test_threads_may_share_a_grid():
    grid = grid_of(fails_for(), 8)
    counts: list[float] = []

    def talk(client: int) -> None:
        for _ in range(10):
            (reply,) = grid.send_and_receive([to(client)])
        counts.append(reply.content.config_records["seen"]["count"])  # type: ignore[arg-type]

    threads = [threading.Thread(target=talk, args=(client,)) for client in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == [10] * 8


def drawing(message: Message, context: Context) -> Message:  # noqa: ARG001
    drawn = [random.random(), float(np.random.rand()), float(torch.rand(()))]  # noqa: NPY002
    return Message(RecordDict({"m": MetricRecord({"drawn": drawn})}), reply_to=message)


@pytest.mark.usefixtures("_in_a_run")
def test_what_a_client_draws_is_its_own_and_the_server_does_not_notice():
    def run(*orders: list[int], seeds: ClientSeeds | None = None) -> dict[int, list[list[float]]]:
        grid, drawn = grid_of(client_of(drawing), 3, seeds), {i: [] for i in range(3)}
        for order in orders:
            for client, reply in zip(order, grid.send_and_receive([to(i) for i in order]), strict=True):
                drawn[client].append(reply.content.metric_records["m"]["drawn"])
        return drawn

    states = random.getstate(), str(np.random.get_state()), torch.get_rng_state()  # noqa: NPY002
    drawn = run([0, 1, 2], [0, 1, 2])
    assert (random.getstate(), str(np.random.get_state())) == states[:2]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])
    assert drawn == run([2, 0], [1, 1, 0, 2])
    assert drawn != run([0, 1, 2], [0, 1, 2], seeds=ClientSeeds.fresh())
    numbers = [number for lists in drawn.values() for numbers in lists for number in numbers]
    assert len(set(numbers)) == 18


# ---------------------------------------------------------------- private interfaces of Flower


def test_flower_has_what_the_grid_needs_where_the_grid_looks():
    with pytest.raises(RuntimeError, match="not set"):
        Message(RecordDict(), 1, "train")
    with inside_a_run(RUN):
        message = to(0)
        assert (message.metadata.run_id, message.metadata.src_node_id) == (RUN, SERVER_NODE)
        number_message(message, "17")
        reply = Message(error_of_exception(KeyError("x")), reply_to=message)
    with pytest.raises(RuntimeError, match="not set"):
        Message(RecordDict(), 1, "train")
    assert reply.metadata.reply_to_message_id == "17"
    assert empty_run(RUN).run_id == RUN
    assert unavailable_reply(RUN, "17").has_error()
    twin = copy_message(message)
    assert twin.content == message.content
    assert vars(twin).keys() == vars(message).keys() == {"_metadata", "_content", "_error"}
    assert vars(twin.metadata) == vars(message.metadata)
    assert vars(RecordDict()).keys() == {"_check_key_fn", "_check_value_fn", "_data"}
    array = Array(np.arange(3.0))
    assert {field.name for field in dataclasses.fields(Array)} == {"dtype", "shape", "stype", "data"}
    assert array.object_id == copy_message(message).content.array_records["a"]["0"].object_id
    context = Context(RUN, 5, {"partition-id": 1}, records(), {"lr": 0.1})
    assert copy_context(context) == context
    assert Grid.__abstractmethods__ == {
        *("set_run", "run", "create_message", "get_node_ids"),
        *("push_messages", "pull_messages", "send_and_receive"),
    }
    assert math.isfinite(message.metadata.ttl)

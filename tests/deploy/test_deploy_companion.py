"""Flower's own processes end with the node or server that started them, even if it is killed."""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from flwr.supercore.constant import ExecutorType, TaskType
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.superexec.executor import get_executor
from flwr.supercore.superexec.executor.types import ExecutionSpec
from flwr.supernode import start_client_internal as supernode
from flwr.supernode.nodestate import NodeStateFactory
from loopback import wait_until

from fedpriv.flower import companion
from fedpriv.flower.companion import companion_of, starting_companions
from fedpriv.flower.internals import superlink as superlink_internals
from fedpriv.flower.internals.supernode import accompanied

ROOT = Path(__file__).parents[2]

# Holds the lock, starts a companion, prints its number, and waits.
KEEPER = """
import fcntl, subprocess, sys, time
lock = open(sys.argv[1], "w")
fcntl.flock(lock, fcntl.LOCK_EX)
child = subprocess.Popen(sys.argv[2:], start_new_session=True)
print(child.pid, flush=True)
time.sleep(600)
"""
# Flower's program, which keeps calling an absent server for minutes.
SUPEREXEC = ["flower-superexec", "--insecure", "--runtime-api-address", "127.0.0.1:1"]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked for in /proc")
@pytest.mark.parametrize("when", ["at once", "in the middle of its work"])
def test_a_killed_keeper_takes_its_companions_along(when: str, tmp_path: Path) -> None:
    """No process waits for the keeper here, so that its number stays in use: Flower's own watch would see it alive."""
    lock = tmp_path / "lock"
    command = [sys.executable, "-c", KEEPER, str(lock), *companion_of(str(lock), SUPEREXEC)]
    keeper = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert keeper.stdout is not None
    pid = int(keeper.stdout.readline())
    try:
        if when != "at once":
            wait_until(lambda: "retrying" in keeper.stdout.readline(), 120.0)  # type: ignore[union-attr]
        assert alive(pid)
        keeper.kill()
        wait_until(lambda: not alive(pid), 10.0, "the companion lives on")
    finally:
        keeper.kill()
        keeper.wait()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        keeper.stdout.close()


def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    commands: list[list[str]] = []

    def start(command: Sequence[str], **_: Any) -> SimpleNamespace:
        commands.append(list(command))
        return SimpleNamespace(stdin=None)

    monkeypatch.setattr(companion.subprocess, "Popen", start)
    return commands


def test_flowers_node_and_server_start_companions(monkeypatch: pytest.MonkeyPatch) -> None:
    """This fails if Flower starts its processes in another way."""
    commands = started(monkeypatch)
    monkeypatch.setenv("FLWR_HOME", "/home/flower")

    class Stopped(BaseException):
        pass

    def connect(**_: Any) -> None:
        raise Stopped

    monkeypatch.setattr(supernode, "_init_connection", connect)
    monkeypatch.setattr(supernode, "register_signal_handlers", lambda **_: None)
    with accompanied(supernode), contextlib.suppress(Stopped):
        supernode.start_client_internal(
            state_factory=NodeStateFactory(ObjectStoreFactory()), server_address="x:1", node_config={}, insecure=True
        )
    program = superlink_internals._PROGRAM
    config = SimpleNamespace(isolation="subprocess", host="127.0.0.1", port=1, certificates=None)
    config.ssl_ca_certfile, config.runtime_dependency_install = None, False
    life = program.SuperLinkLifespan(config, SimpleNamespace(objectstore_factory=None))
    with accompanied(program):
        life._start_superexec_if_needed()
    assert [command[4] for command in commands] == ["flower-superexec"] * 2
    assert all(command[3] == "/home/flower/lock" for command in commands)
    assert vars(supernode)["subprocess"] is program.subprocess is subprocess


def test_what_runs_an_app_is_a_companion_too(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = started(monkeypatch)
    module: Any = importlib.import_module("flwr.supercore.superexec.executor.subprocess_executor")
    monkeypatch.setattr(module, "subprocess", starting_companions("/the/lock"))
    given: dict[str, Any] = {
        "task_id": 1,
        "task_type": TaskType.CLIENT_APP,
        "token": "t",
        "runtime_api_address": "127.0.0.1:1",
    }
    given |= {"insecure": True, "root_certificates_path": None, "runtime_dependency_install": False, "parent_pid": 1}
    executor = get_executor(ExecutorType.SUBPROCESS, executor_config=None, insecure=True, root_certificates_path=None)
    executor.launch(ExecutionSpec(**given, suppress_output=False))
    assert [command[3:5] for command in commands] == [["/the/lock", "flwr-clientapp"]]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere, processes are not forked")
@pytest.mark.parametrize("named", [None, "flwr-clientapp clients.client_app", "flwr-serverapp"])
def test_apps_are_imported_before_their_first_message_if_the_node_names_them(
    named: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise every client of the first round would wait for these imports."""
    commands = started(monkeypatch)
    if named is None:
        monkeypatch.delenv(companion.PREPARED, raising=False)
    else:
        monkeypatch.setenv(companion.PREPARED, named)
    companion._for_superexec("/the/lock")
    assert [command[4:] for command in commands] == ([] if named is None else [["fork-client-apps", *named.split()]])


def test_a_companion_leaves_the_names_of_packages_to_the_app(tmp_path: Path) -> None:
    """An accepted app may have packages with fedpriv's names, or with the names of files next to the companion."""
    lock = tmp_path / "lock"
    ours = "[name for name in sys.modules if name.split('.')[0] in ('clients', 'fedpriv', 'strategies')]"
    seen = f"import sys; print({ours}, sys.path)"
    (tmp_path / "sitecustomize.py").write_text(f"import atexit; atexit.register(lambda: exec({seen!r}))")
    command = companion_of(str(lock), ["flower-superexec", "--help"])
    lock.touch()
    keeper = [sys.executable, "-c", KEEPER.replace("time.sleep(600)", "child.wait()"), str(lock), *command]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    printed = subprocess.run(keeper, env=environment, capture_output=True, text=True, timeout=120).stdout
    assert "--runtime-api-address" in printed
    assert "[] [" in printed
    assert str(Path(companion.__file__).parent) not in printed


def test_a_heartbeat_that_the_server_refuses_is_one_line_and_other_failures_of_threads_are_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The server refuses those of a removed node's client app, which Flower leaves to Python's report of a thread."""

    monkeypatch.setattr(companion, "end_with", lambda _: None)
    monkeypatch.setattr(companion, "entry_of", lambda _: lambda: None)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    with pytest.raises(SystemExit):
        companion.run("/the/lock", ["flwr-clientapp"])
    response = httpx.Response(401, request=httpx.Request("POST", "http://127.0.0.1:1/heartbeat"))

    def refused() -> bool:
        response.raise_for_status()
        return True

    def wrong() -> None:
        raise ValueError("a fault of the app")

    sender = HeartbeatSender(refused)
    sender.start()
    sender._thread.join()
    said = capsys.readouterr().err
    assert said.startswith("fedpriv: the server did not accept a heartbeat: Client error '401 Unauthorized'")
    assert said.count("\n") == 1
    other = threading.Thread(target=wrong)
    other.start()
    other.join()
    assert "Traceback" in capsys.readouterr().err


# Holds the lock and starts three programs, one of them without output; the one that forks is killed after the first.
FORKER = """
import fcntl, os, signal, subprocess, sys, time
from fedpriv.flower.companion import ForkedApps
lock = open(sys.argv[1], "w")
fcntl.flock(lock, fcntl.LOCK_EX)
apps, program = ForkedApps(sys.argv[1]), ["flwr-clientapp", "--help"]
apps.start(program)
apps.start(program, stdout=subprocess.DEVNULL)
apps.start(program)
while not os.path.exists(ended := sys.argv[1] + ".ended") or os.stat(ended).st_size < 3:
    time.sleep(0.05)
apps._parent.kill()
apps._parent.wait()
apps.start(program)
apps._parent.stdin.close()
apps._parent.wait()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere, processes are not forked")
def test_client_apps_are_forked_by_one_process_that_may_be_killed(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    said = (
        "print('by', os.getppid(), flush=True); "
        "os.getppid() == KEEPER or os.write(os.open(LOCK + '.ended', os.O_WRONLY | os.O_APPEND | os.O_CREAT), b'x')"
    )
    (tmp_path / "sitecustomize.py").write_text(
        f"import atexit, os, sys; LOCK = {str(lock)!r}\n"
        "KEEPER = int(os.environ.setdefault('KEEPER', str(os.getpid())))\n"
        f"atexit.register(lambda: exec({said!r}))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    call = [sys.executable, "-c", FORKER, str(lock)]
    done = subprocess.run(call, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.count("usage: flwr-clientapp") == 3
    parents = Counter(line for line in done.stdout.splitlines() if line.startswith("by "))
    assert sorted(parents.values()) == [1, 1, 1, 2]  # the first two, the last, the second that forks, and the keeper


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked for in /proc")
def test_a_killed_keeper_takes_forked_client_apps_along(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    command = [sys.executable, "-c", KEEPER, str(lock), *companion_of(str(lock), ["fork-client-apps"])]
    keeper = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert keeper.stdout is not None
    assert keeper.stdin is not None
    parent = int(keeper.stdout.readline())
    children = Path(f"/proc/{parent}/task/{parent}/children")
    app = ["flwr-clientapp", "--insecure", "--runtime-api-address", "127.0.0.1:1", "--token", "t"]
    try:
        keeper.stdin.write(json.dumps({"command": app, "quiet": True}) + "\n")
        keeper.stdin.flush()
        wait_until(lambda: children.read_text() != "", 120.0)
        pid = int(children.read_text())
        keeper.kill()
        keeper.stdin.close()
        wait_until(lambda: not alive(pid), 10.0, "the app lives on")
        wait_until(lambda: not alive(parent), 10.0, "the process that forks lives on")
    finally:
        keeper.kill()
        keeper.wait()
        keeper.stdout.close()

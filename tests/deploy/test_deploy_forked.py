"""Flower's processes of a node or server are forked from it, and behave as if they had been started."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from loopback import wait_until
from test_deploy_companion import alive

from fedpriv.deploy.operate import logs
from fedpriv.flower import companion
from fedpriv.flower.companion import AHEAD, QUIET, starting_companions
from fedpriv.flower.forked import ForkedProcess, forked_ahead

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere, processes are not forked")

# A node with a SuperExec and an app in place of Flower's: they print their state, and the node prints their codes.
NODE = """
import atexit, fcntl, json, logging.handlers, multiprocessing, os, sys, tempfile, threading, time, types
from pathlib import Path
from fedpriv.flower import companion, forked
for name in ("torch", "scipy.special", "pydantic"):
    sys.modules[name] = types.ModuleType(name)
executor = sys.modules["flwr.supercore.superexec.executor.subprocess_executor"] = types.ModuleType("executor")
lock, foreign, mode = Path(sys.argv[1]), sys.argv[2] == "foreign", sys.argv[3]

def say(who, **facts):
    facts |= {"who": who, "pid": os.getpid(), "parent": os.getppid(), "path": sys.path, "argv": sys.argv}
    facts |= {"names": Path("/proc/self/comm").read_text().strip(), "set": os.environ.get("SET_LATER")}
    facts |= {"quiet": os.environ.get("FLWR_TELEMETRY_ENABLED"), "session": os.getsid(0)}
    facts["finders"] = [type(finder).__module__ for finder in sys.meta_path]
    facts["ours"] = [name for name in sys.modules if name.split(".")[0] == "fedpriv"]
    os.write(1, (json.dumps(facts) + "\\n").encode())

def superexec():
    say("superexec")
    atexit.register(say, "end of superexec")
    executor.subprocess.Popen(["flwr-clientapp", "--token", "t"])
    if mode == "kill":
        time.sleep(600)
    alive = lock.with_name("alive")
    while not alive.exists():
        time.sleep(0.01)
    with alive.open("r+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # once the app has ended: it is killed when the node ends
    sys.exit(7)

def client():
    say("app")
    held = os.open(lock.with_name("held"), os.O_CREAT | os.O_RDWR)  # until this process is gone
    fcntl.flock(held, fcntl.LOCK_EX)
    lock.with_name("held").rename(lock.with_name("alive"))
    app = sys.modules["app"] = types.ModuleType("app")
    app.kept = open(lock.with_name("kept.txt"), "w")  # closed at the end of Python
    app.kept.write("kept")
    app.folder = tempfile.TemporaryDirectory(dir=lock.parent, prefix="temporary-")
    logs = logging.handlers.MemoryHandler(100, target=logging.FileHandler(lock.with_name("log.txt")))
    logging.getLogger("app").addHandler(logs)
    logging.getLogger("app").warning("logged")
    worker = multiprocessing.get_context("spawn").Process(target=os.getpid)
    worker.start()
    worker.join()
    say("worker", code=worker.exitcode, main=sys.modules["__main__"].__file__)
    if mode == "kill":
        time.sleep(600)

programs = {"flower-superexec": superexec, "flwr-clientapp": client}
companion.entry_of = forked.entry_of = lambda program: programs[program]
node = os.getpid()
atexit.register(lambda: say("end of the node") if os.getpid() == node else None)
with forked.forked_ahead(lock, ["flwr-clientapp"], foreign=foreign):
    os.environ[companion.PREPARED] = "flwr-clientapp"
    os.environ["SET_LATER"] = "seen"
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        if mode == "wait":
            say("node")
            sys.stdin.read()
            sys.exit(0)
        process = companion.starting_companions(str(lock)).Popen(["flower-superexec", "-x"], start_new_session=True)
        code = process.wait()
        say("node", code=code, again=process.poll(), child=process.pid)
"""


def command(folder: Path, *options: str) -> list[str]:
    script = folder / "scripts" / "node.py"
    script.parent.mkdir()
    script.write_text(NODE)
    return [sys.executable, str(script), str(folder / "lock"), *options]


def started(folder: Path, *options: str) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command(folder, *options),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )


def heard(folder: Path, *options: str) -> dict[str, dict[str, Any]]:
    node = started(folder, *options)
    printed, _ = node.communicate(timeout=60)
    said = [json.loads(line) for line in printed.splitlines()]
    found = {one["who"]: one for one in said}
    assert len(said) == len(found), "each of them speaks once"
    return found


def test_a_forked_superexec_runs_as_a_started_one(tmp_path: Path) -> None:
    said = heard(tmp_path, "own", "run")
    node, superexec, app = said["node"], said["superexec"], said["app"]
    assert node["code"] == node["again"] == 7
    assert superexec["pid"] == node["child"] == superexec["session"] == app["session"]  # as Flower's server asks
    assert superexec["parent"] == node["pid"]
    assert app["parent"] not in (node["pid"], superexec["pid"])  # the process that forks apps is a third one
    assert superexec["argv"] == ["flower-superexec", "-x"]
    assert app["argv"] == ["flwr-clientapp", "--token", "t"]
    for one in (superexec, app):
        assert one["set"] == "seen"  # a variable that was set after the fork
        assert one["quiet"] == QUIET["FLWR_TELEMETRY_ENABLED"]
        assert str(tmp_path / "scripts") not in one["path"]
    assert str(tmp_path / "scripts") in node["path"]
    assert superexec["names"] == "flower-superexe"
    assert app["ours"]  # the app is fedpriv's own, and finds its modules imported
    assert said["end of superexec"]["pid"] == superexec["pid"]


@pytest.mark.parametrize("whose", ["own", "foreign"])
def test_a_forked_app_ends_as_a_program_of_its_own(tmp_path: Path, whose: str) -> None:
    """Files are closed at the end, and processes that the app spawns do not run the node's command again."""
    said = heard(tmp_path, whose, "run")
    assert (tmp_path / "kept.txt").read_text() == "kept"
    assert (tmp_path / "log.txt").read_text() == "logged\n"
    assert not list(tmp_path.glob("temporary-*"))
    assert said["worker"]["code"] == 0
    assert said["worker"]["main"] == companion.__file__


def test_another_app_does_not_meet_our_packages(tmp_path: Path) -> None:
    """An accepted app may have packages of these names."""
    said = heard(tmp_path, "foreign", "run")
    assert said["app"]["ours"] == []
    assert not any(name.startswith("fedpriv") for name in said["app"]["finders"])
    assert said["superexec"]["ours"]


def tree(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(found for child in children for found in tree(int(child)))]


@pytest.mark.parametrize("mode", ["wait", "kill"])
def test_a_killed_node_takes_its_forks_along(tmp_path: Path, mode: str) -> None:
    """Also those which still wait for a command, and do not watch the lock yet."""
    node = started(tmp_path, "own", mode)
    assert node.stdout is not None
    assert node.stdin is not None
    try:
        last = "node" if mode == "wait" else "worker"  # of the app, which has ended
        while json.loads(node.stdout.readline())["who"] != last:
            pass
        forked = tree(node.pid)
        assert len(forked) == (2 if mode == "wait" else 5)  # the fifth tracks the resources of workers
        node.kill()
        node.wait()
        wait_until(lambda: not any(alive(pid) for pid in forked), 10.0, "some live on")
    finally:
        node.kill()
        node.wait()
        node.stdin.close()
        node.stdout.close()


def test_ctrl_c_and_an_end_without_a_command_are_silent(tmp_path: Path) -> None:
    """As when a node refuses its folder after the fork; Ctrl-C reaches all processes of a terminal."""
    node = started(tmp_path, "own", "wait")
    assert node.stdout is not None
    node.stdout.readline()
    forked = tree(node.pid)
    for pid in forked[1:]:
        os.kill(pid, signal.SIGINT)
    time.sleep(0.3)
    assert all(map(alive, forked))
    printed, _ = node.communicate("", timeout=60)
    assert [json.loads(line)["who"] for line in printed.splitlines()] == ["end of the node"]
    wait_until(lambda: not any(map(alive, forked)), 10.0, "some live on")


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_nothing_is_forked_from_a_process_with_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """A thread may hold a lock that its copy would wait for."""
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("forked"))
    over = threading.Event()
    threads: list[threading.Thread] = []

    def begin(_: str) -> None:
        threads.append(threading.Thread(target=over.wait))
        threads[0].start()

    if when == "before":
        begin("")
    else:
        monkeypatch.setattr("fedpriv.flower.forked.importlib.import_module", begin)
    monkeypatch.setattr("fedpriv.flower.forked.entry_of", lambda _: None)
    try:
        with forked_ahead(tmp_path / "lock", ["flwr-clientapp"], ["shared"] * (when == "meanwhile"), foreign=False):
            assert not AHEAD
    finally:
        over.set()
        threads[0].join()


def test_a_system_without_room_for_a_process_is_left_to_flower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The programs that Flower starts fail then, and say so."""

    def full() -> int:
        raise BlockingIOError

    monkeypatch.setattr(os, "fork", full)
    monkeypatch.setattr(threading, "active_count", lambda: 1)
    monkeypatch.setattr("fedpriv.flower.forked.entry_of", lambda _: None)
    descriptors = Path("/proc/self/fd")
    before = sorted(path.name for path in descriptors.iterdir())
    with forked_ahead(tmp_path / "lock", ["flwr-clientapp"], foreign=False):
        assert not AHEAD
    assert sorted(path.name for path in descriptors.iterdir()) == before


def test_a_program_that_was_forked_is_started_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AHEAD, "flower-superexec", lambda *_, **__: "ahead")
    monkeypatch.setattr("fedpriv.flower.companion.subprocess.Popen", lambda *_, **__: "started")
    popen = starting_companions("/the/lock").Popen
    found = [popen([program]) for program in ("flower-other", "flower-superexec", "flower-superexec")]
    assert found == ["started", "ahead", "started"]


def test_a_program_that_was_killed_before_its_command_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: Any, **__: Any) -> Any:
        raise BrokenPipeError

    monkeypatch.setitem(AHEAD, "flower-superexec", gone)
    monkeypatch.setattr("fedpriv.flower.companion.subprocess.Popen", lambda *_, **__: "started")
    assert starting_companions("/the/lock").Popen(["flower-superexec"]) == "started"


def test_a_forked_process_is_waited_for_and_ended_like_any_other() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    process = ForkedProcess(child.pid)
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.05)
    codes: list[int] = []
    waiting = [threading.Thread(target=lambda: codes.append(process.wait())) for _ in range(3)]
    for thread in waiting:
        thread.start()
    process.terminate()
    for thread in waiting:
        thread.join(10.0)
    assert codes == [-signal.SIGTERM] * 3
    assert process.wait(timeout=1.0) == process.returncode == -signal.SIGTERM
    process.kill()  # its number may be another process's by now
    child.returncode = process.returncode  # it was waited for here


def test_the_code_of_a_process_that_the_system_reaped_is_lost_and_nothing_else() -> None:
    """A shell may have asked for this, for all programs that it starts."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    process = ForkedProcess(child.pid)
    assert process.wait() == process.poll() == 0
    process.terminate()


def test_a_fork_does_not_wait_for_the_writer_of_the_nodes_log() -> None:
    writer = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        began = time.monotonic()
        logs._drain(writer, os.getpid() + 1)
        assert time.monotonic() - began < 1.0
        print("the output is still open")
    finally:
        writer.kill()
        writer.wait()

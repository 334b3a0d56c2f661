"""`fedpriv run CONFIG --engine flower`: a whole `flwr run`, started, watched and cleared away.

Flower's simulation is a SuperLink (a server), a run that is submitted to it, a process for the run, and Ray's processes
under that. Here all of them belong to one run: they have a home, a port and a working directory of their own, so that
they neither meet nor disturb another SuperLink, and none of them outlives the run.

The app that is submitted is made on the spot, four lines in a temporary folder: it works from a checkout as from an
installed package, and no file of the user's can get into it.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from fedpriv.errors import UserError, require_extra
from fedpriv.experiment.build import assemble
from fedpriv.experiment.config import Config
from fedpriv.experiment.execution import cores
from fedpriv.experiment.run_directory import RunDirectory
from fedpriv.experiment.watching import Watcher
from fedpriv.files import open_to_append
from fedpriv.flower.bundle import write_app
from fedpriv.privacy.released import OWNER_ONLY

__all__ = ["RecordedRounds", "failure_in", "run_with_flower"]

LOG = "flower.log"

_POLL_SECONDS = 0.1
_START_SECONDS = 120.0
_END_SECONDS = 5.0
_STOP_SECONDS = 1.0
_KILL_SECONDS = 10.0
_GPU_SHARE = 0.25

# Ray puts sockets some 70 characters below its folder, and a socket's path has at most 107.
_LONGEST_FOR_SOCKETS = 36


def run_with_flower(
    config: Config,
    out: Path,
    *,
    device: str = "cpu",
    data_root: Path | None = None,
    resume: bool = False,
    watch: Watcher | None = None,
) -> dict[str, Any]:
    """Runs an experiment in Flower's simulation and returns its summary.

    Args:
        config: The experiment.
        out: The run directory; the run's log is `flower.log` in it.
        device: Where gradients are computed.
        data_root: Where data sets lie; None for the environment's choice.
        resume: Whether `out` may hold this experiment, finished. A part of it cannot be gone on with: the clients'
            memories lived in the Flower run that ended.
        watch: Called after every round with what was recorded.

    Raises:
        UserError: On anything that the user can mend, failing clients included; no process is left behind.
    """
    require_extra("--engine flower", "flower")
    config.check_unclocked()
    out = Path(out).resolve()
    population = assemble(config, device=device, data_root=data_root).population.federation.population
    directory = RunDirectory(out)
    done = _claim(directory, config, resume)
    if done is not None:
        return done
    with _on_signal(_exit, signal.SIGTERM), tempfile.TemporaryDirectory(prefix="fedpriv-flower-") as home:
        run_config = {
            "config": str(directory.file("config.toml")),
            "settings": "",
            "data-root": str(data_root.resolve()) if data_root else "",
            "device": device.partition(":")[0],  # Ray gives each actor its GPU, as the only one it sees
            "out": str(out),
            "claimed": True,
            "failure-report": str(Path(home) / "failure.txt"),
        }
        run = FlowerRun(Path(home), population, device, directory.file(LOG))
        run.write_app(run_config)
        _follow(run, directory, watch)
    return directory.read_json("summary.json")


def _claim(directory: RunDirectory, config: Config, resume: bool) -> dict[str, Any] | None:
    """Makes the directory this run's; returns the summary of a run that is finished."""
    with directory.locked():
        begun = directory.file("config.toml").exists()
        summary = directory.claim(config.to_toml(), config.digest, resume=resume)
    if begun and summary is None:
        raise UserError(
            str(directory.path),
            "an empty folder, or this experiment done",
            "a part of it",
            "Clients' memories live only as long as their Flower run: choose another --out",
        )
    return summary


@dataclass
class FlowerRun:
    """The processes of one simulation.

    Args:
        home: A folder of their own, whose path marks all of them.
        population: How many nodes.
        device: Where their gradients are computed.
        log: The file for what they print.
    """

    home: Path
    population: int
    device: str
    log: Path
    _processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """What Flower's and Ray's processes find in their environment."""
        here = str(Path(__file__).parents[2])
        paths = [] if "site-packages" in here else [here]
        return {
            **os.environ,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
            "PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])]),
            "FLWR_HOME": str(self.home),
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_TELEMETRY_ENABLED": "0",
            "RAY_ADDRESS": "local",
            "RAY_TMPDIR": str(self.home) if len(str(self.home)) <= _LONGEST_FOR_SOCKETS else "/tmp",
            "RAY_USAGE_STATS_ENABLED": "0",
        }

    def write_app(self, run_config: dict[str, Any]) -> None:
        """Writes the app that is submitted, and an empty working directory."""
        (self.home / "work").mkdir()
        write_app(self.home / "app", run_config)

    @contextmanager
    def running(self) -> Iterator[subprocess.Popen[bytes]]:
        """Starts a SuperLink and the run; yields the process that lives as long as the run does."""
        try:
            address = self._start_superlink()
            connection = {"address": address, "insecure": True}
            tables = {"superlink": {"default": "fedpriv", "fedpriv": connection}}
            (self.home / "config.toml").write_text(tomli_w.dumps(tables), encoding="utf-8")
            yield self._start(["run", str(self.home / "app"), "--stream", "--federation-config", self._resources()])
        finally:
            with _on_signal(signal.SIG_IGN, signal.SIGINT, signal.SIGTERM):
                self._stop()

    def end(self) -> None:
        """Lets a run that has written everything end by itself, for a while."""
        until = time.monotonic() + _END_SECONDS
        while self.alive() and time.monotonic() < until:
            time.sleep(_POLL_SECONDS)

    def alive(self) -> bool:
        """Whether all processes that were started here are still at work."""
        return all(process.poll() is None for process in self._processes)

    def status_details(self) -> str:
        """What Flower says about the last run; empty if it says nothing."""
        command = [*_FLWR, "ls", "--format", "json"]
        try:
            text = subprocess.run(
                command, env=self.environment, cwd=self.home / "work", capture_output=True, timeout=60, check=True
            ).stdout
            return str(json.loads(text)["runs"][0]["status-details"])
        except (subprocess.SubprocessError, ValueError, LookupError):
            return ""

    def _start_superlink(self) -> str:
        port = _free_port()
        options = ["--insecure", "--simulation", "--isolation", "subprocess", "--host", "127.0.0.1"]
        superlink = self._start([*options, "--port", str(port)], _SUPERLINK)
        until = time.monotonic() + _START_SECONDS
        while not _answers(f"http://127.0.0.1:{port}/health"):
            if superlink.poll() is not None or time.monotonic() > until:
                raise UserError("Flower's SuperLink", "one that starts", "none", f"See {self.log}")
            time.sleep(_POLL_SECONDS)
        return f"127.0.0.1:{port}"

    def _start(self, arguments: Sequence[str], program: Sequence[str] | None = None) -> subprocess.Popen[bytes]:
        with open_to_append(self.log, OWNER_ONLY) as log:
            process = subprocess.Popen(
                [*(program or _FLWR), *arguments],
                env=self.environment,
                cwd=self.home / "work",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._processes.append(process)
        return process

    def _resources(self) -> str:
        """One CPU for each client at work, and no more actors than there are clients."""
        gpus = _GPU_SHARE if self.device.startswith("cuda") else 0.0
        cpus = min(self.population, cores())
        return (
            f"num-supernodes={self.population} client-resources-num-cpus=1 "
            f"client-resources-num-gpus={gpus} init-args-num-cpus={cpus}"
        )

    def _stop(self) -> None:
        """Ends every process of this run: politely, and then for certain."""
        for process in self._processes:
            process.terminate()
        began = time.monotonic()
        while (left := self._left()) and time.monotonic() - began < _KILL_SECONDS:
            if time.monotonic() - began > _STOP_SECONDS:
                for pid in left:
                    _kill(pid)
            time.sleep(_POLL_SECONDS)

    def _left(self) -> list[int]:
        """The processes that are still there. Where /proc is missing, only those that were started here."""
        mark = f"FLWR_HOME={self.home}".encode()
        started = [process.pid for process in self._processes if process.poll() is None]
        return sorted({*started, *_processes_with(mark)})


_SUPERLINK = [sys.executable, "-c", "from flwr.superlink.cli import flower_superlink as main; main()"]
_FLWR = [sys.executable, "-c", "from flwr.cli.app import app; app()"]


def _follow(run: FlowerRun, directory: RunDirectory, watch: Watcher | None) -> None:
    """Runs to the end, and calls `watch` as rounds are recorded."""
    rounds = RecordedRounds(directory, watch)
    with run.running():
        while run.alive() and not directory.file("summary.json").exists():
            rounds.show()
            time.sleep(_POLL_SECONDS)
        if not directory.file("summary.json").exists():
            raise failure_in(run.home / "failure.txt", run.log, run.status_details())
        rounds.show()
        run.end()


def failure_in(report: Path, log: Path, details: str) -> UserError:
    """Why a run ended without a summary.

    Args:
        report: The file for the ServerApp's own line.
        log: Flower's log.
        details: What Flower says about the run.
    """
    if report.exists():
        return _ServerAppError(report.read_text(encoding="utf-8"))
    reason = first_error(log) or details or "it ended without a reason"
    return UserError("Flower's run", "one that completes", reason.rstrip("."), f"See {log}")


def first_error(log: Path) -> str:
    """The exception that a log shows first, which is the cause of those below it; empty if it shows none."""
    found = re.search(r"^[\w.]+(Error|Exception): .+", log.read_text(errors="replace"), re.MULTILINE)
    return found.group() if found else ""


class _ServerAppError(UserError):
    """A line that the ServerApp has written already."""

    def __init__(self, line: str) -> None:
        ValueError.__init__(self, line)
        self.where = line.split(":", 1)[0]


class RecordedRounds:
    """Hands recorded rounds to a watcher, each once."""

    def __init__(self, directory: RunDirectory, watch: Watcher | None) -> None:
        self._directory = directory
        self._watch = watch
        self._shown = 0

    def show(self) -> None:
        """Shows what was recorded since the last time."""
        if self._watch is None:
            return
        released = self._directory.rows("rounds.jsonl")
        if len(released) == self._shown:
            return
        diagnostics = {row["round"]: row for row in self._directory.rows("diagnostics.jsonl")}
        for row in released[self._shown :]:
            if row["round"] > 0 and row["round"] not in diagnostics:
                return
            self._watch(row, diagnostics.get(row["round"], {"round": 0}))
            self._shown += 1


@contextmanager
def _on_signal(handler: Callable[..., Any] | signal.Handlers, *numbers: signal.Signals) -> Iterator[None]:
    """Handles signals for a while, where that can be done (the main thread)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


def _exit(number: int, frame: object) -> None:  # noqa: ARG001
    """Leaves by an exception, so that whatever was started is cleared away on the way out."""
    raise SystemExit(128 + number)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1.0) as answer:
            return answer.status == 200
    except OSError:
        return False


def _processes_with(mark: bytes) -> list[int]:
    """Ids of the processes, zombies aside, whose environment holds `mark`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return

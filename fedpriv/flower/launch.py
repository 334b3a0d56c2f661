"""`fedpriv run CONFIG --engine flower`: start, follow and clean up a complete `flwr run`.

Flower's simulation consists of a SuperLink (a server), a submitted run, a process for it, and Ray's processes under
it. Here all of them belong to one run. They have a separate home, port and working directory, so that they do not
interfere with another SuperLink, and none of them outlives the run.

The submitted app is four lines in a temporary folder. It works from a checkout and from an installed package, and never
includes the user's files.
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

import tomli_w

from fedpriv.errors import UserError, require_extra
from fedpriv.experiment.build import assemble
from fedpriv.experiment.config import Config
from fedpriv.experiment.execution import cores
from fedpriv.experiment.run_directory import RunDirectory
from fedpriv.experiment.watching import Watcher
from fedpriv.files import open_to_append, write_atomically
from fedpriv.flower.bundle import write_app
from fedpriv.privacy.released import OWNER_ONLY
from fedpriv.tables import Record, Table

__all__ = ["RecordedRounds", "failure_in", "run_with_flower"]

LOG = "flower.log"

_POLL_SECONDS = 0.1
_START_SECONDS = 120.0
_END_SECONDS = 5.0
_STOP_SECONDS = 1.0
_KILL_SECONDS = 10.0
_GPU_SHARE = 0.25
_RAY_TIMED_OUT = "timed out during startup"

# Ray adds about 70 characters to its folder for the paths of sockets, which are limited to 107.
_MAX_FOLDER_FOR_SOCKETS = 36


def run_with_flower(
    config: Config,
    out: Path,
    *,
    device: str = "cpu",
    data_root: Path | None = None,
    resume: bool = False,
    watch: Watcher | None = None,
) -> Record:
    """Run an experiment in Flower's simulation and return its summary.

    Args:
        config: The experiment.
        out: The run directory, which also holds the log `flower.log`.
        device: Device for gradients.
        data_root: Folder of the data sets; None for the environment's choice.
        resume: Accept this experiment in `out` if it is finished. An unfinished run cannot be resumed, because the
            clients' memories ended with its Flower run.
        watch: Called after every round with its records.

    Raises:
        UserError: On any error that the user can fix, including failing clients. No process is left running.
    """
    require_extra("--engine flower", "flower")
    config.check_unclocked()
    config.check_only_sampled_answer()
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


def _claim(directory: RunDirectory, config: Config, resume: bool) -> Record | None:
    """Claim the directory for this run; return the summary if the run is already finished."""
    with directory.locked():
        begun = directory.file("config.toml").exists()
        summary = directory.claim(config.to_toml(), config.digest, resume=resume)
    if begun and summary is None:
        raise UserError(
            str(directory.path),
            "an empty folder, or a finished run of this experiment",
            "an unfinished run without its client memories",
            "Choose another --out",
        )
    return summary


@dataclass
class FlowerRun:
    """Processes of one simulation.

    Args:
        home: Their separate folder; its path, in their environment, identifies all of them.
        population: Number of nodes.
        device: Device for gradients.
        log: File for their output.
    """

    home: Path
    population: int
    device: str
    log: Path
    _processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables of Flower's and Ray's processes."""
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
            "RAY_TMPDIR": str(self.home) if len(str(self.home)) <= _MAX_FOLDER_FOR_SOCKETS else "/tmp",
            "RAY_USAGE_STATS_ENABLED": "0",
        }

    def write_app(self, run_config: Table) -> None:
        """Write the submitted app, and create an empty working directory."""
        (self.home / "work").mkdir()
        write_app(self.home / "app", run_config)

    @contextmanager
    def running(self) -> Iterator[subprocess.Popen[bytes]]:
        """Start a SuperLink and the run; yield the process that lives as long as the run."""
        try:
            address = self._start_superlink()
            connection = {"address": address, "insecure": True}
            tables = {"superlink": {"default": "fedpriv", "fedpriv": connection}}
            write_atomically(self.home / "config.toml", tomli_w.dumps(tables))
            yield self._start(["run", str(self.home / "app"), "--stream", "--federation-config", self._resources()])
        finally:
            with _on_signal(signal.SIG_IGN, signal.SIGINT, signal.SIGTERM):
                self._stop()

    def end(self) -> None:
        """Give a run that has written everything some time to end by itself."""
        until = time.monotonic() + _END_SECONDS
        while self.alive() and time.monotonic() < until:
            time.sleep(_POLL_SECONDS)

    def alive(self) -> bool:
        """Return whether all processes that were started here are still running."""
        return all(process.poll() is None for process in self._processes)

    def status_details(self) -> str:
        """Return Flower's status details of the last run; empty if there are none."""
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
                raise UserError(
                    "Flower's SuperLink", f"an answer within {_START_SECONDS:g} s", "silence", f"See {self.log}"
                )
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
        """Return options for one CPU for each active client, and at most as many actors as clients."""
        gpus = _GPU_SHARE if self.device.startswith("cuda") else 0.0
        cpus = min(self.population, cores())
        return (
            f"num-supernodes={self.population} client-resources-num-cpus=1 "
            f"client-resources-num-gpus={gpus} init-args-num-cpus={cpus}"
        )

    def _stop(self) -> None:
        """End every process of this run: terminate it, and kill it if it does not end."""
        for process in self._processes:
            process.terminate()
        began = time.monotonic()
        while (left := self._left()) and time.monotonic() - began < _KILL_SECONDS:
            if time.monotonic() - began > _STOP_SECONDS:
                for pid in left:
                    _kill(pid)
            time.sleep(_POLL_SECONDS)

    def _left(self) -> list[int]:
        """Return the ids of the processes still running; without /proc, only of those that were started here."""
        mark = f"FLWR_HOME={self.home}".encode()
        started = [process.pid for process in self._processes if process.poll() is None]
        return sorted({*started, *_processes_with(mark)})


_SUPERLINK = [sys.executable, "-c", "from flwr.superlink.cli import flower_superlink as main; main()"]
_FLWR = [sys.executable, "-c", "from flwr.cli.app import app; app()"]


def _follow(run: FlowerRun, directory: RunDirectory, watch: Watcher | None) -> None:
    """Follow the run to its end, and call `watch` as rounds are recorded."""
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
    """Return the reason why a run ended without a summary.

    Args:
        report: File for the error line of the ServerApp.
        log: Flower's log.
        details: Flower's status details of the run.
    """
    if report.exists():
        return _ServerAppError(report.read_text(encoding="utf-8"))
    if _RAY_TIMED_OUT in log.read_text(errors="replace"):
        remedy = "Run again while the computer has less to do, or use another engine"
        return UserError("--engine", "Ray, which Flower uses, to start within 30 seconds", "a slower computer", remedy)
    reason = first_error(log) or details or "an end without a reason"
    return UserError("Flower's run", "it to complete", reason.rstrip("."), f"See {log}")


def first_error(log: Path) -> str:
    """Return the first exception in a log, which is the cause of later ones; empty if there is none."""
    found = re.search(r"^[\w.]+(Error|Exception): .+", log.read_text(errors="replace"), re.MULTILINE)
    return found.group() if found else ""


class _ServerAppError(UserError):
    """An error line that the ServerApp has written."""

    def __init__(self, line: str) -> None:
        ValueError.__init__(self, line)
        self.where = line.split(":", 1)[0]


class RecordedRounds:
    """Calls a watcher once for each recorded round."""

    def __init__(self, directory: RunDirectory, watch: Watcher | None) -> None:
        self._directory = directory
        self._watch = watch
        self._shown = 0

    def show(self) -> None:
        """Call the watcher for the rounds recorded since the last call."""
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
def _on_signal(handler: Callable[[int, object], None] | signal.Handlers, *numbers: signal.Signals) -> Iterator[None]:
    """Handle signals within the block; do nothing outside the main thread, which Python does not support."""
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
    """Raise an exception, so that all started processes are cleaned up."""
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
    """Return the ids of the processes, except zombies, with `mark` in their environment."""
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

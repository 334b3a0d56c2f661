"""`fedpriv run CONFIG --deploy CONNECTION`: start and follow a run on devices, and stop it if the user interrupts.

The server's half runs on the SuperLink's machine, which also has the run directory. On that machine, rounds are shown
as they are recorded; on other machines, Flower's log is shown.
"""

import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import tomli_w

from fedpriv.checks import a_path
from fedpriv.deploy.parties import clients_in_words, parties_config
from fedpriv.deploy.setup.membership import registered_by_name
from fedpriv.errors import UserError, require_extra
from fedpriv.experiment.build import check_device_name
from fedpriv.experiment.config import Config, read_config_file
from fedpriv.experiment.deployment import DeploymentChoice
from fedpriv.experiment.run_directory import RunDirectory
from fedpriv.experiment.watching import Watcher
from fedpriv.files import write_atomically
from fedpriv.flower.bundle import write_app
from fedpriv.flower.internals.control import KnownRun, administering
from fedpriv.flower.launch import RecordedRounds, failure_in
from fedpriv.tables import Record

__all__ = ["Connection", "run_deployed"]

_log = logging.getLogger("fedpriv")
_POLL_SECONDS = 0.2
_WAITED_FOR = 'a round that asks them lasts until its deadline, unless deployment.absent = "leave-out"'
_FLWR = [sys.executable, "-c", "from flwr.cli.app import app; app()"]


@dataclass(frozen=True)
class Connection:
    """Connection to a SuperLink.

    Args:
        home: Folder of Flower's `config.toml`.
        name: Name of the connection in it.
        address: Host and port.
        seeded: For tests: cohorts and noise follow the config's seed, if server and nodes allow that.
        wait: The first turn waits for all clients.
    """

    home: Path
    name: str
    address: str
    seeded: bool = False
    wait: bool = False

    @classmethod
    def of(cls, given: str) -> "Connection":
        """Read it from a deployment's folder, from `admin` in it, or by its name from $FLWR_HOME/config.toml.

        Raises:
            UserError: If there is no such connection, or if it is not encrypted.
        """
        folder = Path(given).expanduser()
        if (folder / "admin" / "config.toml").is_file():
            folder /= "admin"
        elif folder.is_dir() and not (folder / "config.toml").is_file():
            remedy = "Give the folder that `fedpriv deploy init` made, or admin in it"
            raise UserError("--deploy", "the folder of a deployment", f"{folder} without a config.toml", remedy)
        home = folder.resolve() if folder.is_dir() else Path(os.environ.get("FLWR_HOME") or Path.home() / ".flwr")
        superlink = read_config_file(home / "config.toml").get("superlink", {})
        tables = superlink if isinstance(superlink, dict) else {}
        name = str(tables.get("default", "")) if folder.is_dir() else given
        found = tables.get(name)
        if not isinstance(found, dict) or "address" not in found:
            known = ", ".join(key for key, value in tables.items() if isinstance(value, dict)) or "none"
            remedy = f"Give the folder of a deployment, admin in it, or a connection of {home / 'config.toml'}: {known}"
            raise UserError("--deploy", "a connection with an address", repr(given), remedy)
        if found.get("insecure"):
            remedy = "Set up TLS with fedpriv deploy init, or use --engine flower for a simulation"
            raise UserError(f"connection {name}", "TLS", "insecure = true", remedy)
        return cls(home, name, str(found["address"]))


@dataclass
class _FlowerRun:
    """One `flwr run` on a connection."""

    connection: Connection
    folder: Path
    log: Path
    _process: subprocess.Popen[bytes] | None = None
    _known: set[int] = field(default_factory=set)

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "FLWR_HOME": str(self.connection.home),
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_TELEMETRY_ENABLED": "0",
        }

    def start(self, run_config: dict[str, object]) -> None:
        """Submit the app.

        Raises:
            UserError: If the SuperLink does not answer.
        """
        self._known = {run.id for run in self._runs()}
        write_app(self.folder / "app")
        changes = self.folder / "changes.toml"
        write_atomically(changes, tomli_w.dumps(run_config))
        arguments = ["run", str(self.folder / "app"), self.connection.name, "--stream", "-c", str(changes)]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [*_FLWR, *arguments],
                env=self.environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def known(self) -> KnownRun | None:
        """Return Flower's description of this run; None if Flower does not know the run."""
        return next((run for run in self._runs() if run.id not in self._known), None)

    def alive(self) -> bool:
        """Return whether the run may still be in progress."""
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """End the run, also on the server."""
        with suppress(UserError):  # a server that is gone must not hide the reason for the end
            if self.alive() and (run := self.known()) is not None:
                self._flwr(["stop", str(run.id), self.connection.name])
        if self._process is not None:
            self._process.terminate()
            self._process.wait(timeout=10.0)

    def _runs(self) -> list[KnownRun]:
        try:
            with administering(self.connection.home, self.connection.name) as server:
                return server.runs()
        except UserError as error:
            remedy = f"Start it, and run: fedpriv deploy check {self.connection.home}"
            raise UserError(f"SuperLink {self.connection.address}", "an answer", f"({error})", remedy) from None

    def _flwr(self, arguments: Sequence[str]) -> str:
        try:
            done = subprocess.run(
                [*_FLWR, *arguments], env=self.environment, cwd=self.folder, capture_output=True, timeout=120, text=True
            )
        except subprocess.TimeoutExpired:
            return ""
        return done.stdout or done.stderr


def run_deployed(
    config: Config,
    out: Path,
    connection: str | Connection,
    *,
    device: str = "cpu",
    data_root: Path | None = None,
    resume: bool = False,
    watch: Watcher | None = None,
) -> Record | None:
    """Run an experiment on the devices of a deployment.

    Args:
        config: The experiment.
        out: The run directory, on the SuperLink's machine.
        connection: Connection to the SuperLink, or an argument of `Connection.of`.
        device: Compute device of nodes that do not set one themselves.
        data_root: Folder of the data sets, on the SuperLink's machine and on nodes that do not set one themselves.
        resume: Resume this run from `out`, if `out` holds a part of it.
        watch: Called after every round with its records, if the SuperLink is on this machine.

    Returns:
        The summary; None if the SuperLink, and with it the run directory, is on another machine.

    Raises:
        UserError: On any error that the user can fix. Saved turns are kept, and `resume` continues from them.
    """
    require_extra("--deploy", "deploy")
    config.check_deployable()
    check_device_name(device, "--device")
    way = connection if isinstance(connection, Connection) else Connection.of(str(a_path("deploy", connection)))
    out = Path(out).resolve()
    with tempfile.TemporaryDirectory(prefix="fedpriv-deploy-") as name:
        folder = Path(name)
        report = folder / "failure.txt"
        run = _FlowerRun(way, folder, folder / "flower.log")
        directory = RunDirectory(out)
        if directory.file("digest.txt").exists() and not resume:
            remedy = "Add --resume to continue the run, or choose another --out"
            raise UserError(str(out), "a folder without a run", "a run in progress or finished", remedy)
        _warn_of_missing(config, way)
        run.start(
            {
                "config-toml": config.to_toml(),
                "out": str(out),
                "device": device,
                "data-root": str(data_root.resolve()) if data_root else "",
                "resume": resume,
                "wait": way.wait,
                "failure-report": str(report),
                "test-seeded": way.seeded,
                **parties_config(way.home),
            }
        )
        try:
            return _follow(run, directory, report, watch)
        finally:
            run.stop()


def _warn_of_missing(config: Config, way: Connection) -> None:
    """Name the clients that cannot answer: their keys are not registered, or their nodes are not connected."""
    clients = config.data.clients
    try:
        found = registered_by_name(way.home, clients or 0)
    except UserError:  # not the folder of a deployment; the server names absent clients in its log
        return
    unknown = [int(name.rpartition("-")[2]) for name, state in found.items() if state == "not registered"]
    away = [int(name.rpartition("-")[2]) for name, state in found.items() if state not in ("not registered", "online")]
    if unknown:
        _log.warning("not registered with the server: %s. Run admin/register.sh", clients_in_words(unknown))
    if away:
        _log.warning("not connected: %s", clients_in_words(away))
    if unknown or away:
        choice = config.deployment or DeploymentChoice()
        others = "rounds do not wait for them" if choice.absent == "leave-out" else _WAITED_FOR
        _log.warning(*(("waiting for them",) if way.wait else ("%s; add --wait to begin with all clients", others)))


def _follow(run: _FlowerRun, directory: RunDirectory, report: Path, watch: Watcher | None) -> Record | None:
    rounds, shown = RecordedRounds(directory, watch), 0
    while run.alive():
        if directory.file("digest.txt").exists():  # the SuperLink runs on this machine
            rounds.show()
        else:
            shown = _print_log(run.log, shown)
        time.sleep(_POLL_SECONDS)
    known = run.known()
    if report.exists() or known is None or not known.status.startswith("finished:completed"):
        raise failure_in(report, run.log, "" if known is None else known.details)
    rounds.show()
    return directory.read_json("summary.json")


def _print_log(log: Path, shown: int) -> int:
    with log.open("rb") as file:
        file.seek(shown)
        text = file.read()
    sys.stdout.write(text.decode(errors="replace"))
    sys.stdout.flush()
    return shown + len(text)

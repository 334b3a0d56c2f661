"""A federation that is operated for two hours: five nodes and a helper on this machine, and everything that happens.

    python results/deployment/two_hours.py FOLDER [--minutes 120]    the deployment lives in FOLDER
    python results/deployment/two_hours.py FOLDER --again            starts all parties again, and holds the last run
    python results/deployment/two_hours_page.py FOLDER               compares models and ledgers, fills the page

`SESSIONS` is the timetable: eleven runs of secure aggregation with seeded noise, and the actions on server, nodes and
helper after a number of rounds. Every action is logged with its time, exit code and output in
`events.jsonl`, every new line of a party's log in `seen.jsonl`. One node has its folder on a tmpfs, so that its disk
can be filled; that takes root.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "tests" / "deploy"))

from loopback import FEDPRIV, Loopback, wait_until  # noqa: E402

from fedpriv.experiment.run_directory import RunDirectory  # noqa: E402

PORT = 19492
SMALL_DISK, SMALL_BYTES = "node-3", "96m"
RESUMPTIONS = 3

CONFIG = """
name = "{name}"
seed = {seed}
[data]
name = "digits"
partition = "dirichlet"
concentration = 0.5
clients = {clients}
[model]
name = "softmax"
[local]
work = "minibatch-gradient"
batch_size = 32
[cohort]
sampling = "everyone"
[method]
name = "alpha-normec"
alpha = 1.0
beta = 0.2
server_lr = 1.0
damping = 0.1
[privacy]
trust = "aggregator"
noise_multiplier = 0.5
delta = 1e-7
[aggregation]
helpers = 1
least_survivors = 3
[training]
rounds = {rounds}
[deployment]
deadline = {deadline}
absent = "leave-out"
"""


@dataclass(frozen=True)
class Session:
    """One run, and the actions during it.

    Args:
        minute: Planned start, in minutes of two hours.
        name: Name of the run.
        clients: Number of clients of its plan.
        events: Pairs of a number of finished rounds, and the actions taken then; 0 is before the run starts, and a
            number above `rounds` after it has ended.
        rounds: Number of rounds.
    """

    minute: float
    name: str
    clients: int
    events: tuple[tuple[int, str], ...] = ()
    rounds: int = 6


AFTER = 99
SESSIONS = (
    Session(0, "quiet", 5, ((0, "deploy check {d}"), (1, "deploy status {d}"), (AFTER, "deploy list {d}"))),
    Session(11, "killed-nodes", 5, (
        (1, "kill node-2"), (1, "start node-2"),
        (3, "kill node-0"), (3, "kill node-4"), (4, "deploy status {d}"), (4, "start node-0"), (4, "start node-4"),
    )),
    Session(23, "killed-helper", 5, (
        (2, "kill helper-0"), (2, "start helper-0"),
        (4, "kill helper-0"), (4, "wait 45"), (4, "start helper-0"),
    )),
    Session(35, "killed-server", 5, (
        (3, "kill server"), (3, "deploy status {d}"), (3, "wait 20"), (3, "start server"), (3, "resume"),
        (5, "deploy backup {d}/server {b}/server.tar"),
    )),
    Session(47, "added-node", 6, (
        (0, "deploy status {d}"),
        (2, "deploy add {d}"), (2, "enroll helper-0"), (2, "start node-5"),
        (5, "deploy status {d}"),
    )),
    Session(59, "full-disk", 6, (
        (2, "fill node-3"), (3, "deploy check {d}/node-3"), (4, "deploy status {d}"), (5, "free node-3"),
    )),
    Session(71, "new-certificate", 6, (
        (2, "deploy renew {d} --days 20"), (3, "stop server"), (3, "start server"), (3, "resume"),
        (5, "deploy status {d}"), (AFTER, "deploy renew {d}"), (AFTER, "stop server"), (AFTER, "start server"),
    )),
    Session(82, "new-key", 6, (
        (1, "deploy rotate key {d}/node-4"), (2, "deploy rotate accept {d}/node-4/rotation/handover.json {d}"),
        (2, "stop node-4"), (2, "deploy rotate finish {d}/node-4"), (2, "start node-4"),
        (5, "deploy rotate finish {d}/node-4"), (5, "deploy check {d}/node-4"),
    )),
    Session(93, "restored", 6, (
        (0, "stop node-0"), (0, "deploy backup {d}/node-0 {b}/node-0.tar"), (0, "start node-0"), (0, "wait 20"),
        (2, "kill node-0"), (2, "deploy restore {b}/node-0.tar {d}/node-0"), (2, "lose node-0"),
        (2, "deploy restore {b}/node-0.tar {d}/node-0 --heads {d}/server/flower/client-heads.json"),
        (2, "deploy restore {b}/node-0.tar {d}/node-0 --charge 50"), (2, "start node-0"),
        (AFTER, "stop node-1"), (AFTER, "deploy backup {d}/node-1 {b}/node-1.tar"), (AFTER, "lose node-1"),
        (AFTER, "deploy restore {b}/node-1.tar {d}/node-1 --heads {d}/server/flower/client-heads.json"),
        (AFTER, "start node-1"),
    )),
    Session(105, "removed-node", 6, (
        (1, "pause node-2"), (2, "continue node-2"),
        (4, "deploy remove node-1 {d}"), (5, "deploy status {d}"), (AFTER, "deploy list {d}"),
    )),
)  # fmt: skip

# After all parties were stopped, as for an upgrade. A rotation, refused because the node had released since, ends.
AGAIN = Session(112, "started-again", 6, (
    (0, "deploy status {d}"), (0, "stop node-4"), (0, "deploy rotate finish {d}/node-4"),
    (0, "deploy rotate accept {d}/node-4/rotation/handover.json {d}"), (0, "start node-4"), (0, "wait 45"),
    (3, "deploy rotate finish {d}/node-4"), (5, "deploy status {d}"), (AFTER, "deploy list {d}"),
))  # fmt: skip


@dataclass
class Federation:
    """The deployment, the clock and the log of events."""

    folder: Path
    scale: float
    deadline: float
    sessions: tuple[Session, ...]
    again: bool = False
    began: float = field(default_factory=time.time)
    run: subprocess.Popen[bytes] | None = None
    _read: dict[Path, int] = field(default_factory=dict)
    _session: str = ""

    def __post_init__(self) -> None:
        self.parties = Loopback(self.folder / "deployment", nodes=5, helpers=1, port=PORT)
        self.backups = self.folder / "backups"
        if self.again:
            self.began = json.loads((self.folder / "origin.json").read_text(encoding="utf-8"))["began"]
            return
        self.backups.mkdir(parents=True)
        (self.folder / "origin.json").write_text(json.dumps({"began": self.began}), encoding="utf-8")

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """Rows of the participation of the session's run."""
        return RunDirectory(self.out).rows("participation.jsonl") if self.out.is_dir() else []

    @property
    def out(self) -> Path:
        """Run directory of the session."""
        return self.folder / "runs" / self._session

    def note(self, action: str, code: int | None = None, output: str = "") -> None:
        """Append an event to the log."""
        row = {"seconds": round(time.time() - self.began, 1), "clock": time.strftime("%H:%M:%S")}
        row |= {"session": self._session, "rounds": len(self.rounds), "action": action, "code": code, "output": output}
        print(row["clock"], self._session, action, code if code is not None else "", output[:300], flush=True)
        with (self.folder / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def listen(self) -> None:
        """Log the new lines of every party and run, with the time at which they were read."""
        paths = [*self.parties.folder.glob("*.log"), *self.folder.glob("*.out")]
        for path in paths:
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                new = file.read()
            whole = new[: new.rfind(b"\n") + 1]
            self._read[path] = self._read.get(path, 0) + len(whole)
            with (self.folder / "seen.jsonl").open("a", encoding="utf-8") as file:
                for line in whole.decode(errors="replace").splitlines():
                    row = {"seconds": round(time.time() - self.began, 1), "party": path.stem, "line": line}
                    file.write(json.dumps(row) + "\n")

    def rest(self, seconds: float) -> None:
        """Wait, and log the output of the parties."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0.0:
            time.sleep(min(left, 2.0))
            self.listen()

    def act(self, action: str) -> None:
        """Take one action of the timetable."""
        words = action.format(d=self.parties.folder, b=self.backups).split()
        verb, *rest = words
        try:
            if verb == "deploy":
                done = self.parties.deploy(*rest)
                output = (done.stdout + done.stderr).replace(str(self.folder), "FOLDER").strip()
                self.note(action, done.returncode, output)
            else:
                code = self._verbs()[verb](*rest)
                self.note(action, code)
        except (AssertionError, OSError, KeyError, subprocess.SubprocessError) as error:
            self.note(action, None, f"failed: {type(error).__name__}: {error}"[:2000])

    def _verbs(self) -> dict[str, Callable[..., int | None]]:
        return {
            "kill": self._kill,
            "start": self.parties.start,
            "stop": self._stop,
            "pause": lambda name: self._signal(name, signal.SIGSTOP),
            "continue": lambda name: self._signal(name, signal.SIGCONT),
            "wait": lambda seconds: self.rest(float(seconds)),
            "fill": self._fill,
            "free": lambda name: (self.parties.folder / name / "filler").unlink(),
            "lose": self._lose,
            "enroll": self._enroll,
            "resume": self._resume,
        }

    def _kill(self, name: str) -> None:
        """Send SIGKILL; the processes that it has started have to end by themselves."""
        self.parties._processes[name].kill()
        self.parties.ends(name, 60.0)
        wait_until(lambda: not self.parties.processes(name), 60.0, f"{name} left {self.parties.processes(name)}")

    def _stop(self, name: str) -> int:
        """Ask a process to end, as systemd does; return its exit code."""
        self.parties._processes[name].terminate()
        return self.parties.ends(name, 60.0)

    def _signal(self, name: str, number: int) -> None:
        """Send a signal to all processes of a node."""
        for pid in {self.parties._processes[name].pid, *self.parties.pids(name)}:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def _fill(self, name: str) -> None:
        """Fill the disk of a node to the last byte."""
        with suppress(OSError), (self.parties.folder / name / "filler").open("wb", buffering=0) as file:
            for size in (65536, 512, 1):
                with suppress(OSError):
                    while file.write(b"\0" * size):
                        pass

    def _lose(self, name: str) -> None:
        """Take a node's folder away, as if its disk was lost."""
        (self.parties.folder / name).rename(self.folder / f"lost-{name}")

    def _enroll(self, helper: str) -> None:
        """Give a helper the new list of clients."""
        shutil.copy(self.parties.folder / "admin" / "clients.toml", self.parties.folder / helper / "clients.toml")

    def _start_run(self, config: Path, *more: str) -> None:
        arguments = ["run", str(config), "--deploy", str(self.parties.folder), "--out", str(self.out)]
        with (self.folder / f"run-{self._session}.out").open("ab") as file:
            self.run = subprocess.Popen(
                [*FEDPRIV, *arguments, "--test-seeded", *more],
                env=self.parties.environment,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def _resume(self) -> int:
        """Wait until the command of a run that lost its server ends, and start it again."""
        assert self.run is not None
        code = self.run.wait(timeout=400.0)
        self._start_run(self.folder / f"{self._session}.toml", "--resume")
        return code

    def hold(self, session: Session) -> None:
        """Run one session."""
        self._session = session.name
        config = self.folder / f"{session.name}.toml"
        values = {"name": session.name, "clients": session.clients, "rounds": session.rounds}
        seed = 100 + (*SESSIONS, AGAIN).index(session)
        config.write_text(CONFIG.format(**values, seed=seed, deadline=self.deadline), encoding="utf-8")
        waiting = list(session.events)
        resumed = 0

        def take(rounds: int) -> None:
            while waiting and waiting[0][0] <= rounds:
                self.act(waiting.pop(0)[1])

        take(0)
        self._start_run(config)
        self.note("run")
        while self.run is not None:
            self.rest(2.0)
            take(min(len(self.rounds), AFTER - 1))
            code = self.run.poll()
            if code is None:
                continue
            self.listen()
            self.note("run ended", code)
            if code == 0 or resumed == RESUMPTIONS:
                break
            resumed += 1
            self.rest(20.0)
            self._start_run(config, "--resume")
            self.note("run --resume")
        take(AFTER)

    def _examine(self) -> None:
        """Show all ledgers, and check the deployment."""
        for node in range(6):
            self.act(f"deploy ledger {{d}}/node-{node}")
        self.act("deploy check {d}")

    def live_again(self) -> None:
        """Start all parties of the deployment that are not removed, and hold the last session."""
        parties = ["server", "helper-0", *(f"node-{number}" for number in (0, 2, 3, 4, 5))]
        try:
            for name in parties:
                self.parties.start(name)
            self.note("started again")
            self.rest(30.0)
            self.hold(AGAIN)
            self._examine()
        finally:
            for name in list(self.parties._processes):
                self.act(f"stop {name}")
            self.listen()
        self.note("stopped")

    def live(self) -> None:
        """Set up the deployment, hold all sessions, and stop."""
        small = self.parties.folder / SMALL_DISK
        self.parties.make()
        kept = small.with_name("kept")
        small.rename(kept)
        small.mkdir(mode=0o700)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SMALL_BYTES},mode=700", "tmpfs", str(small)], check=True)
        for path in kept.iterdir():
            shutil.move(path, small / path.name)
        kept.rmdir()
        try:
            self.parties.start_all()
            self.note("started")
            self.rest(30.0)
            for session in self.sessions:
                self.rest(self.began + 60.0 * session.minute * self.scale - time.time())
                self.hold(session)
            self._examine()
        finally:
            for name in list(self.parties._processes):
                self.act(f"kill {name}")
            self.listen()
            shutil.copytree(small, small.with_name("copy"))
            subprocess.run(["umount", str(small)], check=False)
            small.rmdir()
            small.with_name("copy").rename(small)
        self.note("stopped")


def main() -> None:
    """Run the timetable."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument("--deadline", type=float, default=75.0)
    parser.add_argument("--only", default="", help="names of sessions, for a rehearsal")
    parser.add_argument("--again", action="store_true", help="start all parties again, and hold the last run")
    found = parser.parse_args()
    names = found.only.split(",")
    sessions = tuple(one for one in SESSIONS if not found.only or one.name in names)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    federation = Federation(found.folder.resolve(), found.minutes / 120.0, found.deadline, sessions, found.again)
    (federation.live_again if found.again else federation.live)()


if __name__ == "__main__":
    main()

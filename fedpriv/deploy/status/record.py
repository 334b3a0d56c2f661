"""`nodes.json` in the run directory: the nodes that a running server sees, and when it last saw each of them.

The server replaces the file every few seconds. Readers need no lock, and decide by its age, and by its process if they
are on the same machine, whether the server still runs.
"""

import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from fedpriv.deploy.kinds import text_of
from fedpriv.experiment.run_directory import RunDirectory
from fedpriv.files import open_to_append, write_pieces_atomically
from fedpriv.privacy.released import OWNER_ONLY, mode_of

__all__ = ["NODES_FILE", "RUNS_FILE", "RunState", "SeenNodes", "StatusWriter", "known_runs", "note_run", "read_seen"]

NODES_FILE = "nodes.json"

RUNS_FILE = "run-directories"
"""In the folder of the server's Flower files: the paths of its run directories, one a line."""

RunState = Literal["running", "stopped", "finished"]

_INTERVAL_SECONDS = 5.0
# A server that sums a large turn writes nothing meanwhile.
_SILENT_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class SeenNodes:
    """Content of `nodes.json`. Times are seconds since 1970.

    Args:
        written: Time of this content.
        pid: Process that runs the turns.
        host: Its machine.
        name: Name of the experiment.
        population: Number of clients in the plan.
        turn: Last finished turn.
        turns: Number of turns of the run.
        seen: Time at which each client that has connected was last connected, by client number.
        online: Connected clients, ascending.
        helpers: Identity keys of connected helpers.
    """

    written: float
    pid: int
    host: str
    name: str
    population: int
    turn: int
    turns: int
    seen: dict[str, float] = field(default_factory=dict)
    online: list[int] = field(default_factory=list)
    helpers: list[str] = field(default_factory=list)

    def state(self, directory: Path, now: float) -> RunState:
        """Return whether the run is in progress.

        Args:
            directory: The run directory.
            now: The current time.
        """
        if (directory / "summary.json").exists():
            return "finished"
        if self.host == socket.gethostname() and not _alive(self.pid):
            return "stopped"
        return "running" if now - self.written < _SILENT_SECONDS else "stopped"


@dataclass
class StatusWriter:
    """Writer of `nodes.json`, at most every few seconds.

    Args:
        directory: The run directory.
        name: Name of the experiment.
        population: Number of clients.
        turns: Number of turns.
        clock: Returns the time; for tests.
    """

    directory: RunDirectory
    name: str
    population: int
    turns: int
    clock: Callable[[], float] = time.time
    _seen: dict[str, float] = field(default_factory=dict)
    _written: float = 0.0

    def __post_init__(self) -> None:
        before = read_seen(self.directory.path)
        self._seen = {} if before is None else dict(before.seen)

    def note(self, turn: int, nodes: Mapping[int, int], helpers: Mapping[int, str], *, now: bool = False) -> None:
        """Record the connected nodes.

        A failure to write is ignored: a full disk ends the run where it would lose something.

        Args:
            turn: Last finished turn.
            nodes: Connected nodes by client.
            helpers: Identity keys of connected helpers by node.
            now: Write at once.
        """
        moment = self.clock()
        self._seen |= {str(client): moment for client in nodes}
        if not now and 0.0 <= moment - self._written < _INTERVAL_SECONDS:
            return
        self._written = moment
        content = SeenNodes(
            written=moment,
            pid=os.getpid(),
            host=socket.gethostname(),
            name=self.name,
            population=self.population,
            turn=turn,
            turns=self.turns,
            seen=dict(sorted(self._seen.items(), key=lambda pair: int(pair[0]))),
            online=sorted(nodes),
            helpers=sorted(set(helpers.values())),
        )
        with suppress(OSError):
            text = json.dumps(asdict(content), indent=1) + "\n"
            path = self.directory.file(NODES_FILE)
            write_pieces_atomically(path, [text.encode()], mode_of(NODES_FILE), durable=False)


def read_seen(directory: Path) -> SeenNodes | None:
    """Return the content of a run directory's `nodes.json`; None if there is none, or if it is damaged."""
    try:
        return SeenNodes(**json.loads((directory / NODES_FILE).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def note_run(directory: Path) -> None:
    """Add a run directory to the server's list, if this process belongs to a server of a deployment."""
    home = os.environ.get("FLWR_HOME")
    if not home or not Path(home).is_dir() or directory in known_runs(Path(home)):
        return
    with suppress(OSError), open_to_append(Path(home) / RUNS_FILE, OWNER_ONLY) as file:
        file.write(f"{directory}\n".encode())


def known_runs(home: Path) -> list[Path]:
    """Return the run directories in a server's list, oldest first, without those that were removed.

    Args:
        home: Folder of the server's Flower files.

    Raises:
        UserError: If the list cannot be read.
    """
    path = home / RUNS_FILE
    if not path.exists():
        return []
    lines = text_of(path, "a list of run directories", "Remove the file, or restore a copy").splitlines()
    return [Path(line) for line in dict.fromkeys(lines) if Path(line).is_dir()]


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's process
        return True
    return True

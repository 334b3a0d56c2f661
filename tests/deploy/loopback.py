"""Deployment of real processes on this machine: one SuperLink and some SuperNodes, with TLS and node keys."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from fedpriv.deploy.setup.provision import init_deployment, make_deployment

FEDPRIV = [sys.executable, "-m", "fedpriv.cli"]


@dataclass
class Loopback:
    """Controller of the processes.

    Args:
        folder: Folder of the deployment.
        nodes: Number of nodes.
        seeded: Allow tests to seed the noise.
        helpers: Number of helpers; with some, policies accept secure aggregation.
    """

    folder: Path
    nodes: int
    seeded: bool = True
    helpers: int = 0
    port: int = field(default_factory=lambda: free_port())
    _processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def make(self) -> None:
        """Create the folders."""
        facts = {"trust": "aggregator" if self.helpers else "local", "helpers": self.helpers, "epsilon": 1e4}
        init_deployment(self.folder, make_deployment(host="127.0.0.1", port=self.port, nodes=self.nodes, **facts))

    @property
    def environment(self) -> dict[str, str]:
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        seeded = {"FEDPRIV_TEST_SEEDED": "1"} if self.seeded else {}
        return {**os.environ, **seeded, "PATH": path, "OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0"}

    def start(self, name: str) -> None:
        """Start `server`, `node-I` or `helper-J`."""
        command = "server" if name == "server" else "node"
        with (self.folder / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [*FEDPRIV, "deploy", command, str(self.folder / name)],
                env=self.environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        if name == "server":
            wait_until(self._listens, 240.0, self.log(name))

    def start_all(self) -> None:
        """Start the server, register all keys, and start the nodes."""
        self.start("server")
        self.register()
        for i in range(self.nodes):
            self.start(f"node-{i}")
        for j in range(self.helpers):
            self.start(f"helper-{j}")

    def register(self) -> None:
        """Register the nodes' keys with the server."""
        subprocess.run(["sh", "register.sh"], cwd=self.folder / "admin", env=self.environment, check=True, timeout=300)

    def deploy(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `fedpriv deploy`."""
        command = [*FEDPRIV, "deploy", *arguments]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=300)

    def kill(self, name: str) -> None:
        """Send SIGKILL to `server` or `node-I`; its own processes have to end by themselves."""
        process = self._processes.pop(name)
        process.kill()
        process.wait(timeout=30.0)
        wait_until(lambda: not self.processes(name), 10.0, f"{name} left {self.processes(name)}: {self.log(name)}")

    def ends(self, name: str, seconds: float) -> int:
        """Wait until `server` or `node-I` has ended; return its exit code."""
        code = self._processes[name].wait(timeout=seconds)
        del self._processes[name]
        return code

    def pids(self, name: str) -> list[int]:
        """Return all processes of `server` or `node-I`: those started with its folder, or forked from them."""
        folder = str(self.folder / name).encode()
        found: list[int] = []
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                arguments = (path / "cmdline").read_bytes().split(b"\0")
                variables = (path / "environ").read_bytes().split(b"\0")
                if folder in arguments or b"FLWR_HOME=" + folder + b"/flower" in variables:
                    found.append(int(path.name))
        return found

    def processes(self, name: str) -> list[str]:
        """Return the names of the processes of `pids`."""
        found: list[str] = []
        for pid in self.pids(name):
            with suppress(OSError):
                found.append(Path(f"/proc/{pid}/comm").read_text().strip())
        return found

    def close(self) -> None:
        """End all processes."""
        for name in list(self._processes):
            self.kill(name)

    def log(self, name: str) -> str:
        """Return the output of a process."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def run(self, config: Path, out: Path, *more: str) -> subprocess.Popen[str]:
        """Start `fedpriv run --deploy`, with seeded noise."""
        return subprocess.Popen(
            [*FEDPRIV, "run", str(config), "--deploy", str(self.folder / "admin"), "--out", str(out), *more],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def _listens(self) -> bool:
        with socket.socket() as probe:
            probe.settimeout(0.5)
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


def free_port() -> int:
    """Return an unused port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(holds: Callable[[], bool], seconds: float, what: str = "") -> None:
    """Wait until a condition holds; fail if it does not hold in time."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"not within {seconds:g} s: {what[-2000:]}"
        time.sleep(0.1)

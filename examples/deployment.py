"""A deployment in one script: a server and two nodes, with TLS and node keys, as processes of this machine.

    python examples/deployment.py [FOLDER]

On real machines each process is started by its own operator; docs/guides/deployment.md has the steps.
"""

import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONFIG = """
name = "two-devices"
seed = 7
[data]
name = "digits"
clients = 2
[model]
name = "softmax"
[method]
name = "dp-fedavg"
[privacy]
trust = "local"
epsilon = 100.0  # two clients cannot hide each other: this shows the steps, and is no protection
[training]
rounds = 2
[deployment]
deadline = 60.0
"""
FEDPRIV = [sys.executable, "-m", "fedpriv.cli"]


def fedpriv(*arguments: str | Path) -> None:
    """Run a command of fedpriv, and stop if it fails."""
    subprocess.run([*FEDPRIV, *map(str, arguments)], check=True)


def start(kind: str, folder: Path) -> subprocess.Popen[bytes]:
    """Start a server or a node; its log is beside its folder."""
    with folder.with_suffix(".log").open("wb") as log:
        return subprocess.Popen([*FEDPRIV, "deploy", kind, str(folder)], stdout=log, stderr=subprocess.STDOUT)


def free_port() -> int:
    """Return a port that is free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(port: int, seconds: float = 60.0) -> None:
    """Wait until a server listens."""
    end = time.monotonic() + seconds
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        if time.monotonic() > end:
            raise TimeoutError("the server did not start; see server.log")
        time.sleep(0.2)


def main(folder: Path) -> None:
    """Make the folders, start the processes, train, and show the statement and a client's ledger."""
    deployment, port = folder / "deployment", free_port()
    fedpriv(
        "deploy", "init", deployment, "--nodes", "2", "--host", "127.0.0.1", "--port", str(port), "--epsilon", "100"
    )
    config = folder / "two-devices.toml"
    config.write_text(CONFIG, encoding="utf-8")
    for policy in deployment.glob("node-*/fedpriv-client.toml"):  # each client's own decision: accept this little noise
        text = policy.read_text(encoding="utf-8").replace("min_noise_multiplier = 0.3", "min_noise_multiplier = 0.05")
        policy.write_text(text, encoding="utf-8")

    processes = [start("server", deployment / "server")]
    try:
        wait_for(port)
        fedpriv("deploy", "register", deployment / "admin")
        processes += [start("node", deployment / name) for name in ("node-0", "node-1")]
        fedpriv("run", config, "--deploy", deployment / "admin", "--out", folder / "run")
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(timeout=60)
    fedpriv("deploy", "ledger", deployment / "node-0")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp()))

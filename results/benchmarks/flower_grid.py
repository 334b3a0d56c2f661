"""Cost of a message to a client of an unmodified Flower app: `flwr run` against `fedpriv flower`, on one app.

    python results/benchmarks/flower_grid.py [--repeats 3]

The app's clients train nothing. An `echo` sends back the records that it receives, so that nothing but the way there
and back is measured; a `repack` unpacks the arrays and packs them again, as every real client does, at a cost that is
Flower's own and the same wherever the app runs. One number is the shortest of all rounds of all repeats, divided by the
number of clients: milliseconds for each client's message and reply. Start-up is not in it. Writes `flower-grid.csv`
beside this file. Ten minutes on two cores; nothing else should run meanwhile.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
import tomli_w

from fedpriv.flower.launch import FlowerRun

HERE = Path(__file__).parent
SIZES = (10_000, 300_000, 1_000_000)
CLIENTS = (10, 100)
ROUNDS = 5

CLIENT = """
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message, context):
    arrays = message.content["arrays"]
    if message.content["config"]["client"] == "repack":
        arrays = ArrayRecord(arrays.to_numpy_ndarrays())
    return Message(RecordDict({"arrays": arrays}), reply_to=message)
"""

SERVER = """
import json
import time
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()


@app.main()
def main(grid, context):
    config = context.run_config
    while len(nodes := list(grid.get_node_ids())) < config["clients"]:
        time.sleep(0.1)
    seconds = []
    for size in map(int, config["sizes"].split()):
        arrays = ArrayRecord([np.random.default_rng(0).standard_normal(size, dtype=np.float32)])
        for client in ("echo", "repack"):
            content = RecordDict({"arrays": arrays, "config": ConfigRecord({"client": client})})
            for k in range(config["rounds"] + 1):
                began = time.perf_counter()
                replies = list(grid.send_and_receive([Message(content, node, "train") for node in nodes]))
                if k:
                    seconds.append([client, size, time.perf_counter() - began])
                assert len(replies) == len(nodes) and not any(reply.has_error() for reply in replies)
                del replies
    Path(config["out"]).write_text(json.dumps(seconds))
"""


def write_app(folder: Path, clients: int, out: Path) -> Path:
    """Write the app and return its folder."""
    (folder / "echo").mkdir(parents=True)
    for name, text in {"__init__": "", "client": CLIENT, "server": SERVER}.items():
        (folder / "echo" / f"{name}.py").write_text(text, encoding="utf-8")
    components = {"serverapp": "echo.server:app", "clientapp": "echo.client:app"}
    config = {"clients": clients, "rounds": ROUNDS, "sizes": " ".join(map(str, SIZES)), "out": str(out)}
    tables = {
        "project": {"name": "echo-app", "version": "1.0.0", "license": "Apache-2.0", "description": "Echo"},
        "tool": {"flwr": {"app": {"publisher": "me", "components": components, "config": config}}},
    }
    (folder / "pyproject.toml").write_text(tomli_w.dumps(tables), encoding="utf-8")
    return folder


def with_flwr_run(home: Path, clients: int, out: Path) -> None:
    """Run the app as Flower does."""
    (home / "work").mkdir()
    write_app(home / "app", clients, out)
    run = FlowerRun(home, clients, "cpu", home / "flower.log")
    with run.running() as process:
        process.wait()
    if not out.exists():
        raise SystemExit(run.log.read_text())


def with_fedpriv(home: Path, clients: int, out: Path, workers: int) -> None:
    """Run the app on our grid."""
    app = write_app(home / "app", clients, out)
    command = [sys.executable, "-m", "fedpriv.cli", "flower", str(app), "--clients", str(clients)]
    subprocess.run([*command, "--workers", str(workers)], check=True, cwd=home, stdout=subprocess.DEVNULL)


RUNS = {
    "flwr run": with_flwr_run,
    "fedpriv flower": lambda home, clients, out: with_fedpriv(home, clients, out, 1),
    "fedpriv flower --workers 2": lambda home, clients, out: with_fedpriv(home, clients, out, 2),
}


def measure(name: str, clients: int) -> list[tuple[str, int, float]]:
    """Return a row for each round: the kind of client, the size of the model, seconds."""
    with tempfile.TemporaryDirectory(prefix="echo-") as folder:
        home, out = Path(folder), Path(folder) / "seconds.json"
        RUNS[name](home, clients, out)
        return json.loads(out.read_text())


def main() -> None:
    """Measure everything `repeats` times, and keep the shortest times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    rows = [
        {"run with": name, "client": client, "parameters": size, "clients": clients, "ms": seconds / clients * 1e3}
        for _ in range(repeats)
        for name in RUNS
        for clients in CLIENTS
        for client, size, seconds in measure(name, clients)
    ]
    table = pd.DataFrame(rows).groupby(["run with", "client", "parameters", "clients"])["ms"].min().round(3)
    table = table.rename("ms a message").reset_index()
    table.to_csv(HERE / "flower-grid.csv", index=False)
    print(table.pivot(index=["client", "parameters", "clients"], columns="run with", values="ms a message").to_string())
    print(f"{os.cpu_count()} cores, the shortest round of {repeats} runs of {ROUNDS}")


if __name__ == "__main__":
    main()

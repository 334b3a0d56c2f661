"""Seconds until the first round of a fresh deployment ends: three tiny clients, and two versions of fedpriv in turns.

    python results/deployment/first_round.py compare OLD NEW [--pairs 3]      folders of two checkouts

Nodes, server and run start one right after the other, as on a machine that has just booted. CPU seconds are those of
all processes of the deployment and of the run, from their start to the end of the first round. Fills
`first-rounds.csv` and the page.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

HERE = Path(__file__).parent
NODES = 3
SECONDS = 600.0
CONFIG = """
name = "first"
seed = 7
[data]
name = "digits"
partition = "iid"
clients = 3
[model]
name = "softmax"
[method]
name = "alpha-normec"
alpha = 1.0
beta = 0.2
server_lr = 1.0
[privacy]
trust = "local"
noise_multiplier = 1.0
[training]
rounds = 1
[deployment]
deadline = 500
min_participants = 3
"""


def cpu_seconds() -> float:
    """Return the CPU seconds of this process's children, their children, and all that these have waited for."""
    parents: dict[int, int] = {}
    used: dict[int, float] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            parents[int(path.parent.name)] = int(fields[1])
            used[int(path.parent.name)] = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    ours = {os.getpid()}
    for _ in range(20):  # deeper than any tree of these processes
        ours |= {pid for pid, parent in parents.items() if parent in ours}
    return sum(used.get(pid, 0.0) for pid in ours)


def first_round(tree: Path) -> None:
    """Print wall and CPU seconds until the first round ends, and wall seconds since the run was started."""
    sys.path[:0] = [str(tree), str(HERE.parents[1] / "tests" / "deploy")]
    from loopback import Loopback, wait_until

    with tempfile.TemporaryDirectory(prefix="fedpriv-first-") as name:
        folder = Path(name)
        config, rows = folder / "first.toml", folder / "run" / "participation.jsonl"
        config.write_text(CONFIG, encoding="utf-8")
        deployment = Loopback(folder / "deployment", NODES, seeded=False)
        deployment.make()
        try:
            before, began = cpu_seconds(), time.monotonic()
            deployment.start_all()
            started = time.monotonic()
            run = deployment.run(config, folder / "run")
            wait_until(lambda: (rows.is_file() and rows.read_text().count("\n") > 0) or run.poll() is not None, SECONDS)
            ended, after = time.monotonic(), cpu_seconds()
            printed, _ = run.communicate(timeout=SECONDS)
            assert run.returncode == 0, printed
        finally:
            deployment.close()
    print(ended - began, ended - started, after - before)


def compare(old: Path, new: Path, pairs: int) -> None:
    """Run both versions in turns, and write the rows."""
    import pandas as pd

    rows = []
    for pair in range(pairs):
        order = (("before", old), ("now", new))
        for version, tree in order if pair % 2 == 0 else reversed(order):
            environment = {**os.environ, "PYTHONPATH": str(tree.resolve())}
            command = [sys.executable, str(HERE / "first_round.py"), "one", str(tree.resolve())]
            done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True, cwd=tree)
            whole, run, cpu = map(float, done.stdout.split()[-3:])
            facts = {"seconds": whole, "run_seconds": run, "cpu_seconds": cpu, "load": os.getloadavg()[0]}
            rows.append({"pair": pair, "version": version, **facts})
            print(rows[-1], flush=True)
    pd.DataFrame(rows).to_csv(HERE / "first-rounds.csv", index=False, float_format="%.4g")


def write_table() -> None:
    """Fill the page from `first-rounds.csv`."""
    sys.path.insert(0, str(HERE.parent / "benchmarks"))
    import pandas as pd
    from page import fill, table

    lines = []
    for version, part in pd.read_csv(HERE / "first-rounds.csv").groupby("version"):
        columns = [part[name] for name in ("seconds", "run_seconds", "cpu_seconds")]
        lines.append([version, *(f"{c.median():.0f} ({c.min():.0f} to {c.max():.0f})" for c in columns), len(part)])
    head = ("version", "seconds from the start", "seconds from the run's start", "CPU seconds", "starts")
    fill("first-rounds", table(head, lines), HERE / "README.md")


def main() -> None:
    """Measure one start, or compare two versions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["one", "compare"])
    parser.add_argument("trees", type=Path, nargs="+")
    parser.add_argument("--pairs", type=int, default=3)
    found = parser.parse_args()
    if found.command == "one":
        first_round(found.trees[0])
    else:
        compare(found.trees[0], found.trees[1], found.pairs)
        write_table()


if __name__ == "__main__":
    main()

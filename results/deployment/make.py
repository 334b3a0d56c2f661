"""Cost of a deployment beyond Flower's own: seconds a round, and bytes a client.

    python results/deployment/make.py [--rounds 8] [--pairs 3]

A SuperLink and four SuperNodes on this machine, with TLS and node keys. Two apps take turns on them: fedpriv's, and a
plain Flower app (`plain/`). Its clients compute the same full-batch gradient of the same softmax regression on their
quarter of scikit-learn's digits; its server averages them, without privacy, policy or memory. A round is measured from
one broadcast to the next, as the servers see it; the first is left out. Fills `rounds.csv`, `bytes.csv` and the page.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import tomli_w
import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1] / "tests" / "deploy"), str(HERE.parents[0] / "benchmarks")]

from loopback import Loopback  # noqa: E402
from page import fill, table  # noqa: E402

from fedpriv.deploy.coordinator import Coordinator  # noqa: E402
from fedpriv.experiment.config import parse_config  # noqa: E402
from fedpriv.experiment.deployment import DeploymentChoice  # noqa: E402
from fedpriv.flower.internals.supernode import bundle_hash  # noqa: E402
from fedpriv.flower.messages import ARRAYS, CONFIG, FEDPRIV, TERMS, MessageFormat, ModelArrays  # noqa: E402
from fedpriv.methods import AlphaNormEC  # noqa: E402
from fedpriv.privacy import Everyone, make_plan  # noqa: E402
from fedpriv.rounds import make_agreement  # noqa: E402
from fedpriv.streams import SystemStreams  # noqa: E402

NODES = 4
SIZES = (650, 61_794, 973_674, 10_000_000)
CONFIG_TABLES: dict[str, Any] = {
    "name": "overhead",
    "seed": 7,
    "data": {"name": "digits", "partition": "iid", "clients": NODES},
    "model": {"name": "softmax"},
    "method": {"name": "alpha-normec", "alpha": 1.0, "beta": 0.2, "server_lr": 1.0},
    "privacy": {"trust": "local", "noise_multiplier": 1.0},
    "training": {"rounds": 1},
    "deployment": {"deadline": 120.0, "min_participants": NODES},
}


def plain_files() -> dict[str, bytes]:
    """Return the plain app."""
    return {path.name: path.read_bytes() for path in sorted((HERE / "plain").iterdir()) if path.is_file()}


def rounds_of(deployment: Loopback, app: str, rounds: int, folder: Path) -> list[float]:
    """Return seconds of each round but the first."""
    stamps = folder / "stamps.jsonl"
    stamps.unlink(missing_ok=True)
    if app == "fedpriv":
        tables = {**CONFIG_TABLES, "training": {"rounds": rounds}}
        config = folder / "config.toml"
        config.write_text(tomli_w.dumps(parse_config(tables).tables), encoding="utf-8")
        out = folder / f"run-{time.monotonic_ns()}"
        run = deployment.run(config, out)
        printed, _ = run.communicate(timeout=120.0 * rounds)
        if run.returncode:
            raise SystemExit(printed)
        rows = [json.loads(line) for line in (out / "diagnostics.jsonl").read_text().splitlines()]
        return [row["seconds"] for row in rows][1:]
    command = [sys.executable, "-c", "from flwr.cli.app import app; app()", "run", str(HERE / "plain"), "deployment"]
    changes = folder / "plain.toml"
    changes.write_text(tomli_w.dumps({"rounds": rounds, "stamps": str(stamps)}), encoding="utf-8")
    environment = {**os.environ, "FLWR_HOME": str(deployment.folder / "admin"), "FLWR_TELEMETRY_ENABLED": "0"}
    subprocess.run([*command, "--stream", "-c", str(changes)], env=environment, check=True, stdout=subprocess.DEVNULL)
    times = [json.loads(line)["time"] for line in stamps.read_text().splitlines()]
    return [b - a for a, b in pairwise(times)][1:]


def measure(rounds: int, pairs: int) -> pd.DataFrame:
    """Run both apps in turns on one deployment."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="fedpriv-overhead-") as name:
        folder = Path(name)
        deployment = Loopback(folder / "deployment", NODES, seeded=False)
        deployment.make()
        accept = f'accepted-apps = ["{bundle_hash(plain_files())}"]\n'
        for i in range(NODES):
            settings = deployment.folder / f"node-{i}" / "node.toml"
            kept = [line for line in settings.read_text().splitlines() if not line.startswith("accepted-apps")]
            settings.write_text("\n".join([accept, *kept]) + "\n")
        try:
            deployment.start_all()
            time.sleep(20.0)
            for pair in range(pairs):
                for app in ("plain", "fedpriv"):
                    for seconds in rounds_of(deployment, app, rounds, folder):
                        rows.append({"pair": pair, "app": app, "seconds": seconds})
                        print(rows[-1], flush=True)
        finally:
            deployment.close()
    return pd.DataFrame(rows)


def one_message(app: str) -> float:
    """CPU seconds of a client's process for one message."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(HERE / "one_message.py"), app, folder]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return float(done.stdout.strip().splitlines()[-1])


def processes(pairs: int) -> pd.DataFrame:
    """Run both apps' processes in turns."""
    rows = [
        {"pair": i, "app": app, "cpu_seconds": one_message(app)} for i in range(pairs) for app in ("plain", "fedpriv")
    ]
    return pd.DataFrame(rows)


def size_of(content: RecordDict) -> int:
    """Return the bytes that Flower sends for a content, with all objects in it."""
    return sum(len(part.deflate()) for part in get_all_nested_objects(content).values())


def sizes() -> pd.DataFrame:
    """Return bytes down and up, for a client and a round, beside those of the bare arrays."""
    rows = []
    method, sampling = AlphaNormEC(), Everyone(NODES)
    plan = make_plan(trust="local", sampling=sampling, rounds=9, delta=1e-5, l2_bound=1.0, noise_multiplier=1.0)
    server, client, _ = make_agreement(method, sampling, plan, SystemStreams())
    for size in SIZES:
        state = method.init_server(torch.randn(size))
        coordinator = Coordinator(
            server=server, client=client, plan=plan, choice=DeploymentChoice(), turns=9, digest="0" * 64, state=state
        )
        coordinator.begin()
        order, terms = coordinator.order(0)
        model = ArrayRecord({ARRAYS: state.model})
        arrays = ModelArrays.of(model)
        config = ConfigRecord({"experiment": "0" * 64})
        down = RecordDict({ARRAYS: model, CONFIG: config, FEDPRIV: order.to_record(), TERMS: terms.to_record()})
        up = RecordDict({**arrays.message(torch.zeros(size), MessageFormat.of(client))})
        bare = size_of(RecordDict({ARRAYS: model}))
        rows.append({"parameters": size, "bare": bare, "down": size_of(down), "up": size_of(up)})
    return pd.DataFrame(rows)


def markdown(rounds: pd.DataFrame) -> str:
    """Return both apps' rounds and their ratio."""
    by_pair = rounds.groupby(["pair", "app"])["seconds"].mean().unstack()
    ratios = by_pair["fedpriv"] / by_pair["plain"]
    lines = [
        [app, f"{part.mean():.2f}", f"{part.median():.2f}", f"{part.min():.2f} to {part.max():.2f}", len(part)]
        for app, part in rounds.groupby("app")["seconds"]
    ]
    head = ("app", "mean s/round", "median", "range", "rounds")
    ratio = f"{ratios.median():.3f} ({ratios.min():.3f} to {ratios.max():.3f})"
    return (
        f"{table(head, lines)}\nfedpriv over plain, mean rounds of each pair: median {ratio} of {len(ratios)} pairs.\n"
    )


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument(
        "--processes", action="store_true", help="bytes, and one client's process for one message, alone"
    )
    parser.add_argument("--bytes", action="store_true", help="the table of bytes alone")
    found = parser.parse_args()
    page = HERE / "README.md"
    frame = sizes()
    frame.to_csv(HERE / "bytes.csv", index=False)
    lines = [[f"{int(value):,}" for value in row] for row in frame.to_numpy()]
    head = ("parameters", "the bare model", "order, down", "answer, up")
    fill("bytes", table(head, lines), page)
    if found.bytes:
        return
    cpu = processes(10)
    cpu.to_csv(HERE / "processes.csv", index=False, float_format="%.4g")
    by_pair = cpu.pivot(index="pair", columns="app", values="cpu_seconds")
    ratio = (by_pair["fedpriv"] / by_pair["plain"]).describe()
    middles = ", ".join(f"{app} {by_pair[app].median():.2f} s" for app in ("plain", "fedpriv"))
    over = f"{ratio['50%']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f})"
    text = f"{middles}; fedpriv over plain: {over}, {len(by_pair)} pairs.\n"
    fill("processes", text, page)
    print(text)
    if found.processes:
        return
    rounds = measure(found.rounds, found.pairs)
    rounds.to_csv(HERE / "rounds.csv", index=False, float_format="%.4g")
    fill("rounds", markdown(rounds), page)
    print(markdown(rounds))


if __name__ == "__main__":
    main()

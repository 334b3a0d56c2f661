"""Real processes: a user's app, fixed by the nodes, under secure aggregation with a helper that refuses the app."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomli_w
from loopback import Loopback, wait_until

from fedpriv.flower.bundle import app_hash
from fedpriv.flower.internals.supernode import bundle_hash

pytestmark = pytest.mark.xdist_group("loopback")

ROUNDS = 3
FILES = {
    "pyproject.toml": b"""
[project]
name = "my-app"
version = "1.0.0"
license = "Apache-2.0"
description = "An app"
[tool.flwr.app]
publisher = "me"
[tool.flwr.app.components]
serverapp = "my_server:app"
clientapp = "my_client:app"
[tool.flwr.app.config]
helpers = ""
out = ""
""",
    "my_client.py": b"""
import torch
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.clientapp import ClientApp

from fedpriv.flower import private_mod

app = ClientApp(mods=[private_mod])


@app.train()
def train(message, context):
    state = message.content["arrays"].to_torch_state_dict()
    part = float(context.node_config["partition-id"])
    trained = {name: value - 0.1 * (value - part - 1.0) for name, value in state.items()}
    return Message(RecordDict({"arrays": ArrayRecord(trained)}), reply_to=message)
""",
    "my_server.py": b"""
import json
from pathlib import Path

import torch
from flwr.app import ArrayRecord
from flwr.serverapp import ServerApp

from fedpriv.flower import AlphaNormEC, Privacy

app = ServerApp()


@app.main()
def main(grid, context):
    out = Path(context.run_config["out"])
    privacy = Privacy(noise_multiplier=0.5, trust="aggregator", least_survivors=2)
    strategy = AlphaNormEC(privacy=privacy, num_clients=2, helpers=context.run_config["helpers"], damping=0.1)

    def note(number, arrays):
        with out.open("a") as file:
            total = 0.0 if number == 0 else float(strategy.total.sum.norm())
            counted = strategy.attendance.counted
            row = {"round": number, "norm": total, "counted": counted, "statement": strategy.statement}
            file.write(json.dumps(row) + "\\n")

    arrays = ArrayRecord({"weight": torch.zeros(10, 4), "bias": torch.zeros(10)})
    strategy.start(grid, arrays, num_rounds=%d, timeout=180, evaluate_fn=note)
"""
    % ROUNDS,
}


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    made = Loopback(tmp_path_factory.mktemp("deployment") / "d", nodes=2, helpers=1, seeded=False)
    made.make()
    for node in range(2):
        settings = made.folder / f"node-{node}" / "node.toml"
        settings.write_text(f'accepted-apps = ["{bundle_hash(FILES)}"]\n{settings.read_text()}')
    made.start_all()
    yield made
    made.close()


@pytest.mark.slow
def test_an_app_of_real_processes_is_summed_with_a_helper_that_never_runs_it(
    deployment: Loopback, tmp_path: Path
) -> None:
    app, out = tmp_path / "app", tmp_path / "out.jsonl"
    app.mkdir()
    for name, content in FILES.items():
        (app / name).write_bytes(content)
    flwr = [sys.executable, "-c", "from flwr.cli.app import app; app()"]
    environment = {**deployment.environment, "FLWR_HOME": str(deployment.folder / "admin")}
    subprocess.run([*flwr, "build", "--app", str(app)], cwd=tmp_path, env=environment, check=True, timeout=120)
    (built,) = tmp_path.glob("*.fab")
    assert hashlib.sha256(built.read_bytes()).hexdigest() == bundle_hash(FILES)
    changes = tmp_path / "changes.toml"
    key = (deployment.folder / "admin" / "helpers" / "helper-0.pub").read_text().strip()
    changes.write_text(tomli_w.dumps({"helpers": key, "out": str(out)}))
    run = subprocess.Popen(
        [*flwr, "run", str(app), "deployment", "--stream", "-c", str(changes)],
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait_until(lambda: out.exists() or run.poll() is not None, 300.0)
        printed, _ = run.communicate(timeout=500)
    finally:
        run.kill()
    assert out.exists(), printed + deployment.log("helper-0") + deployment.log("node-0")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["round"] for row in rows] == list(range(ROUNDS + 1)), printed + deployment.log("helper-0")
    assert rows[-1]["counted"] == 2 * ROUNDS
    assert all(row["norm"] < 20.0 for row in rows)  # a sum that is still masked is about 100 times as long
    assert "Masks: every message was masked" in rows[-1]["statement"]
    wait_until(lambda: not list((deployment.folder / "helper-0" / "state").glob("*/run.log")), 60.0)
    installed = {path.name for path in (deployment.folder / "helper-0" / "flower").glob("apps/*")}
    assert installed
    assert all(app_hash()[:8] in name for name in installed), installed
    ledger = deployment.folder / "node-0" / "state" / "ledger.jsonl"
    assert [json.loads(line)["trust"] for line in ledger.read_text().splitlines()] == ["aggregator"] * ROUNDS

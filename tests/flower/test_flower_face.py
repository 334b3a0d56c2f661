"""Apps import `fedpriv.flower`, even if they have their own packages `clients` and `strategies`."""

import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tomli_w

import fedpriv.flower
from fedpriv.flower.launch import FlowerRun

CLIENT = """
from flwr.app import Array, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedpriv.flower import private_mod

app = ClientApp(mods=[private_mod])


@app.train()
def train(msg, context):
    arrays = msg.content["arrays"]
    arrays["w"] = Array(arrays["w"].numpy() - 1.0)
    content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})})
    return Message(content, reply_to=msg)
"""
SERVER = """
import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.serverapp import ServerApp

from fedpriv.flower import AlphaNormEC, Privacy
from strategies.weights import START

app = ServerApp()


@app.main()
def main(grid, context):
    strategy = AlphaNormEC(
        alpha=1.0, beta=0.5, server_lr=0.1, privacy=Privacy(epsilon=1e5), num_clients=3, seed=7
    )
    start = ArrayRecord({"w": Array(np.array(START, np.float32))})
    result = strategy.start(grid=grid, initial_arrays=start, num_rounds=2)
    np.savez(context.run_config["out"], w=result.arrays["w"].numpy(), module=np.array(type(strategy).__module__))
"""


@pytest.fixture
def colliding(tmp_path: Path) -> Path:
    """Write an app with the same package names as fedpriv."""
    app = tmp_path / "home" / "app"
    for package in ("clients", "strategies"):
        (app / package).mkdir(parents=True)
        (app / package / "__init__.py").write_text("MINE = True\n")
    (app / "clients" / "client.py").write_text(CLIENT)
    (app / "strategies" / "server.py").write_text(SERVER)
    (app / "strategies" / "weights.py").write_text("START = [3.0, 2.0, 1.0]\n")
    components = {"serverapp": "strategies.server:app", "clientapp": "clients.client:app"}
    tables = {
        "project": {"name": "colliding", "version": "1.0.0", "license": "Apache-2.0", "description": "Own names"},
        "tool": {"flwr": {"app": {"publisher": "me", "components": components, "config": {"out": ""}}}},
    }
    (app / "pyproject.toml").write_text(tomli_w.dumps(tables))
    return app


def found(path: Path) -> tuple[np.ndarray, str]:
    with np.load(path) as file:
        return file["w"], str(file["module"])


@pytest.mark.slow
def test_an_app_with_packages_of_the_same_names_runs_with_fedpriv_flower_and_with_flwr_run(
    colliding: Path, tmp_path: Path
) -> None:
    ours, theirs = tmp_path / "ours.npz", tmp_path / "theirs.npz"
    command = [sys.executable, "-m", "fedpriv.cli", "flower", str(colliding), "--clients", "3", "-c", f"out='{ours}'"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    pyproject = colliding / "pyproject.toml"
    pyproject.write_text(pyproject.read_text().replace('out = ""', f'out = "{theirs}"'))
    (tmp_path / "home" / "work").mkdir()
    run = FlowerRun(tmp_path / "home", 3, "cpu", tmp_path / "flower.log")
    with run.running() as process:
        assert process.wait(timeout=180) == 0, run.log.read_text()
    assert theirs.exists(), run.log.read_text()
    model, module = found(ours)
    assert module == "fedpriv.flower.beside.strategies.named"
    assert found(theirs) == (pytest.approx(model, abs=0.0), module)
    assert not np.allclose(model, [3.0, 2.0, 1.0])


def test_without_such_packages_it_is_the_same_class_as_that_of_strategies_and_clients() -> None:
    for package in ("strategies", "clients"):
        module = importlib.import_module(package)
        for name in module.__all__:
            assert getattr(fedpriv.flower, name) is getattr(module, name)
    assert set(fedpriv.flower.__all__) <= set(dir(fedpriv.flower))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fedpriv.flower.nothing

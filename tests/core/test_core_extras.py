"""Features that work without the extras; all others name the extra to install, in one line."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fedpriv
import fedpriv.flower
from fedpriv.cli import main
from fedpriv.data.files import locate, read_libsvm
from fedpriv.errors import EXTRAS, UserError
from fedpriv.experiment.execution import Execution

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "sim_configs" / "quickstart.toml")
PACKAGES = sorted({package for packages in EXTRAS.values() for package in packages})

OWN = """
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedpriv.data.dataset import Dataset


@dataclass(frozen=True, kw_only=True)
class Stripes:
    natural: ClassVar[bool] = False
    test: ClassVar[str] = "public"

    def load(self, data_root):
        inputs = torch.rand(90, 3, generator=torch.Generator().manual_seed(0))
        labels = inputs.argmax(1)
        return Dataset(
            name="stripes", train_inputs=inputs, train_labels=labels, test_inputs=inputs, test_labels=labels, classes=3
        )
"""
CONFIG = """
name = "own"
seed = 1
data = { name = "./own.py:Stripes", clients = 5 }
model = { name = "softmax" }
method = { name = "dp-fedavg", clip_norm = 1.0, server_lr = 0.5 }
privacy = { trust = "central", adjacency = "add-or-remove", epsilon = 8.0, delta = 1e-5 }
training = { rounds = 2 }
"""

# A process that can import only the core; it runs a user-defined experiment.
CORE_ALONE = f"""
import json, sys
for name in {PACKAGES!r}:
    sys.modules[name] = None
import fedpriv, fedpriv.plugins, fedpriv.methods, fedpriv.engines, fedpriv.sweeps.run, fedpriv.audit
import fedpriv.experiment.pictures.tradeoff, fedpriv.report.spent, fedpriv.tracking.trackers
from fedpriv.privacy import make_plan
from fedpriv.cli import main
from fedpriv.privacy.sampling import Everyone

plan = make_plan(
    trust="central", adjacency="add-or-remove", sampling=Everyone(population=10), rounds=3, l2_bound=1.0,
    epsilon=8.0, delta=1e-5,
)
found = {{"epsilon": plan.epsilon}}
for engine in ("loop", "vectorized"):
    found[engine] = fedpriv.run_experiment("own.toml", engine, engine=engine)["test_accuracy"]
try:
    main(["run", "own.toml", "--out", "cli"])
except SystemExit as stopped:
    found["code"] = stopped.code
print(json.dumps(found))
"""


@pytest.fixture
def nothing_but_the_core(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in PACKAGES:
        monkeypatch.setitem(sys.modules, package, None)


def test_the_core_alone_makes_a_plan_and_trains(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "own.toml").write_text(CONFIG)
    done = subprocess.run(
        [sys.executable, "-c", CORE_ALONE], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    *printed, last = done.stdout.splitlines()
    found = json.loads(last)
    assert 7.9 < found["epsilon"] <= 8.0
    assert 0.0 <= found["loop"] <= 1.0
    assert found["loop"] == pytest.approx(found["vectorized"], abs=0.05)
    assert found["code"] == 0
    assert "picture     none: install 'fedpriv[report]' to draw it" in printed
    assert not list(tmp_path.rglob("curves.png"))


@pytest.mark.usefixtures("nothing_but_the_core")
@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (("run", QUICKSTART), "data"),
        (("run", QUICKSTART, "--engine", "flower"), "flower"),
        (("run", QUICKSTART, "--engine", "ray"), "ray"),
        (("run", QUICKSTART, "--workers", "2"), "ray"),
        (("run", QUICKSTART, "--deploy", "deployment"), "deploy"),
        (("run", QUICKSTART, "--log", "tensorboard"), "tensorboard"),
        (("run", QUICKSTART, "--log", "mlflow"), "mlflow"),
        (("sweep", str(ROOT / "sim_configs" / "sweeps" / "quickstart.toml"), "--ray"), "ray"),
        (("report", "."), "report"),
        (("audit", QUICKSTART), "data"),
        (("privacy", QUICKSTART, "--plot", "curve.png"), "report"),
        (("data", QUICKSTART), "data"),
        (("flower", ".", "--clients", "2"), "flower"),
        (("deploy", "init", "d", "--nodes", "2", "--host", "fl.example.org"), "deploy"),
        (("deploy", "node", "d"), "deploy"),
        (("deploy", "check", "d"), "deploy"),
    ],
)
def test_what_needs_an_extra_is_one_line_and_exit_code_2(
    arguments: tuple[str, ...], extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fedpriv: ")
    assert line.endswith(f"Install it with pip install 'fedpriv[{extra}]'.")
    assert not any(path for path in tmp_path.rglob("*") if path.suffix in (".json", ".jsonl", ".png"))


@pytest.mark.usefixtures("nothing_but_the_core")
def test_functions_say_so_too(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"fedpriv\[report\]"):
        _ = fedpriv.write_report
    with pytest.raises(UserError, match=r"fedpriv\[flower\]"):
        _ = fedpriv.flower.private_mod
    with pytest.raises(UserError, match=r"fedpriv\[data\]"):
        read_libsvm(tmp_path / "absent")
    with pytest.raises(UserError, match=r"fedpriv\[ray\]"):
        Execution(engine="ray")
    with pytest.raises(UserError, match=r"fedpriv\[vision\]"):
        locate(tmp_path, "MNIST/raw", ["images"], "MNIST")


@pytest.mark.usefixtures("nothing_but_the_core")
def test_who_holds_what_is_shown_without_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "own.toml").write_text(CONFIG)
    with pytest.raises(SystemExit) as stopped:
        main(["data", "own.toml", "--out", "found"])
    assert stopped.value.code == 0
    assert "picture     none: install 'fedpriv[report]' to draw it" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "found").iterdir()] == ["clients.csv"]

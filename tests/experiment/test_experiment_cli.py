"""Command line: exit codes, one line on stderr, JSON for other programs."""

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from fedpriv.cli import catalogue, main
from fedpriv.cli.catalogue import FILE, described
from fedpriv.clock import DEVICES
from fedpriv.data.augment import AUGMENTATIONS
from fedpriv.data.dataset import DATASETS
from fedpriv.data.partitions import PARTITIONS
from fedpriv.data.shifts import SHIFTS
from fedpriv.mechanisms.controllers import CONTROLLERS
from fedpriv.methods import METHODS, SERVER_OPTIMIZERS
from fedpriv.tasks.kinds import TASKS
from fedpriv.tasks.local_work import LOCAL_WORKS
from fedpriv.tasks.models import MODELS

QUICKSTART = str(Path(__file__).parents[2] / "sim_configs" / "quickstart.toml")

ANALYSIS = str(Path(QUICKSTART).parent / "analysis.toml")
SWEEP = str(Path(QUICKSTART).parent / "sweeps" / "quickstart.toml")


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    code = stopped.value.code
    assert isinstance(code, int)
    return code


@pytest.mark.parametrize(
    "arguments",
    [("run", QUICKSTART), ("check", QUICKSTART), ("audit", QUICKSTART), ("sweep", SWEEP), ("analyze", ANALYSIS)],
)
@pytest.mark.parametrize("device", ["gpu", "GPU:0"])
def test_a_wrong_name_of_a_device_is_a_short_line(
    arguments: tuple[str, ...], device: str, capsys: pytest.CaptureFixture[str], tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    assert call(*arguments, "--device", device) == 2
    line = f"fedpriv: --device: expected cpu, cuda, cuda:0, mps, ..., got {device!r}. Write cuda."
    assert " ".join(capsys.readouterr().err.split()).endswith(line.removeprefix("fedpriv: "))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("run", "absent.toml"), "absent.toml"),
        (("run", QUICKSTART, "-s", "method.bta=1"), "beta"),
        (("run", SWEEP), "Use fedpriv sweep"),
        (("sweep", QUICKSTART), "Use fedpriv run"),
        (("run", QUICKSTART, "--engine", "lop"), "loop"),
        (("run", QUICKSTART, "--device", "warp"), "--device"),
        (("run", QUICKSTART, "--device", "cuda:99"), "--device cpu"),
        (("run", QUICKSTART, "--engin", "loop"), "--engin"),
        (("run", QUICKSTART, "--checkpoint-every", "0"), "--checkpoint-every"),
        (("run", QUICKSTART, "-s", "method.memory=sent"), "local"),
        (("run", QUICKSTART, "--device", "meta"), "--device"),
        (("run", QUICKSTART, "-s", "model.name=mlp", "-s", "model.hidden=[1000000000]"), "[model]"),
        (("run", QUICKSTART, "-s", "model.name=mlp", "-s", "model.hidden=[200000, 200000]"), "GiB free"),
        (("run", QUICKSTART, "-s", "privacy.epsilon=", "-s", "privacy.noise_multiplier=1e300"), "noise_multiplier"),
        (("privacy", QUICKSTART, "-s", "privacy.delta=1e-320"), "privacy.delta"),
        (("privacy", QUICKSTART, "-s", "method.memory=sent"), "local"),
        (("run", QUICKSTART, "-s", "name=.."), "name"),
        (("run", QUICKSTART, "-s", "seed=" + 5000 * "9"), "-s"),
        (("run",), "CONFIG"),
        (("rum", QUICKSTART), "rum"),
        (("privacy", QUICKSTART, "-s", "privacy.unit=examples"), "privacy.unit"),
        (("data", QUICKSTART, "-s", "data.clients=100000"), "data.clients"),
    ],
)
def test_a_mistake_is_exit_2_and_one_line(arguments: tuple[str, ...], says: str, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(*arguments) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.strip()]
    assert len(lines) == 1, captured.err
    assert says in lines[0]
    assert "Traceback" not in captured.err
    assert not any(tmp_path.rglob("summary.json"))


def test_the_plan_as_json_has_what_others_build_on(capsys):
    assert call("privacy", QUICKSTART, "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    wanted = "epsilon delta noise_multiplier noise_stddev l2_sensitivity trust adjacency accountant"
    assert set(wanted.split()) <= set(plan)
    assert 7.9 < plan["epsilon"] <= 8.0
    assert plan["noise_stddev"] == pytest.approx(plan["noise_multiplier"] * plan["l2_sensitivity"])


def test_the_statement_names_the_adversary_and_the_number(capsys):
    assert call("privacy", QUICKSTART) == 0
    text = capsys.readouterr().out
    for words in ("add-or-remove", "server", "one Gaussian, exactly", "1e-05"):
        assert words in text


def test_a_plan_without_privacy_says_so(capsys):
    assert call("privacy", QUICKSTART, "--json", "-s", "privacy=") == 0
    assert json.loads(capsys.readouterr().out)["private"] is False


def test_the_list_names_everything_a_config_can(capsys):
    assert call("list", "--json") == 0
    names = json.loads(capsys.readouterr().out)
    assert {"alpha-normec", "normalized-sgd", "clip21", "dp-fedavg", "fed-alpha-normec"} <= set(names["methods"])
    assert {"momentum", "adam", "yogi", "adagrad"} <= set(names["server"])
    assert {"full-gradient", "minibatch-gradient", "local-steps", "local-epochs"} <= set(names["local"])
    assert {"digits", "mnist", "fashion-mnist", "cifar10", "mnist-by-writer", "libsvm"} <= set(names["data"])
    assert {"softmax", "mlp", "cnn", "resnet20"} <= set(names["models"])
    assert {"loop", "vectorized", "flower"} <= set(names["engines"])
    assert call("list") == 0


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"FEDPRIV_NATIVE": "0"}, "missing (FEDPRIV_NATIVE is 0)"),
        ({"FEDPRIV_NATIVE": "1", "CC": "", "PATH": ""}, "missing (no C compiler here; install gcc or clang)"),
        ({"FEDPRIV_NATIVE": "1", "CC": "/bin/false"}, "missing (the C compiler here cannot compile it)"),
    ],
)
def test_the_list_says_what_is_not_compiled_and_why(
    environment: dict[str, str], says: str, capsys, tmp_path, monkeypatch
):
    for name, value in {"XDG_CACHE_HOME": str(tmp_path), **environment}.items():
        monkeypatch.setenv(name, value)
    assert call("list", "--json") == 0
    in_c = json.loads(capsys.readouterr().out)["in C"]
    assert {name: entry["about"].partition(":")[0] for name, entry in in_c.items()} == {
        "client step": says,
        "noise": says,
        "softmax": says,
        "pooling": says,
        "convolution": says,
    }


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_the_list_says_what_is_compiled(capsys, monkeypatch):
    monkeypatch.delenv("FEDPRIV_NATIVE", raising=False)
    assert call("list", "--json") == 0
    in_c = json.loads(capsys.readouterr().out)["in C"]
    assert {entry["about"] for entry in in_c.values()} == {"compiled"}


def test_who_holds_what_is_a_table_and_a_picture(tmp_path: Path, capsys):
    assert call("data", QUICKSTART, "--out", str(tmp_path)) == 0
    assert "clients.png" in capsys.readouterr().out
    assert (tmp_path / "clients.png").read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "clients.csv").read_text().splitlines()) == 101


def test_a_run_prints_accuracy_epsilon_with_its_adversary_and_the_picture(tmp_path: Path, capsys):
    assert call("run", QUICKSTART, "--out", str(tmp_path), "-s", "training.rounds=2") == 0
    out = capsys.readouterr().out
    for word in ("accuracy", "epsilon", "adversary", "curves.png"):
        assert word in out


HEAVY = ["torch", "numpy", "scipy", "pandas", "matplotlib", "dp_accounting", "sklearn", "flwr", "ray", "pydantic"]


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["list"], ["list", "--json"], ["new", "mine"]])
def test_commands_that_compute_nothing_import_nothing_heavy(tmp_path, arguments):
    code = f"""
import sys
from fedpriv.cli import main
try:
    main({arguments})
finally:
    print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.strip() == "[]"


def test_the_catalogue_is_what_the_classes_say():
    """If this fails, run python -m fedpriv.cli.catalogue."""
    assert json.loads(FILE.read_text()) == json.loads(json.dumps(described()))


def test_names_that_packages_add_are_listed_without_importing_them(monkeypatch):
    entry = EntryPoint("mine", "not_installed:Method", "fedpriv.methods")
    monkeypatch.setattr(catalogue, "entry_points", lambda group: [entry] if group == "fedpriv.methods" else [])
    assert catalogue.catalogue()["methods"]["mine"]["about"] == "not_installed:Method"


def test_every_kind_that_packages_can_add_to_is_listed():
    registries = (METHODS, SERVER_OPTIMIZERS, DATASETS, PARTITIONS, SHIFTS, MODELS, TASKS, LOCAL_WORKS, DEVICES)
    registries += (AUGMENTATIONS, CONTROLLERS)
    assert set(catalogue.GROUPS) == {registry.group for registry in registries}


def test_the_shell_completes_commands():
    environment = {**os.environ, "_FEDPRIV_COMPLETE": "complete_bash", "COMP_WORDS": "fedpriv sw", "COMP_CWORD": "1"}
    program = str(Path(sys.executable).parent / "fedpriv")
    ran = subprocess.run([program], env=environment, capture_output=True, text=True, check=False)
    assert ran.stdout.split() == ["sweep"]

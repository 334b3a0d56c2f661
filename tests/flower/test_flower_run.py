"""`fedpriv run --engine flower` with real processes: SuperLink, run, Ray."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import zipfile
from importlib import import_module
from pathlib import Path

import pytest
from support.own_folder import own_folder
from support.wheels import build_wheel

from fedpriv.cli import main
from fedpriv.experiment.config import Config, parse_config
from fedpriv.experiment.execution import Execution
from fedpriv.experiment.run import run_experiment
from fedpriv.experiment.run_directory import RunDirectory
from fedpriv.flower import bundle, launch
from fedpriv.flower.launch import run_with_flower
from fedpriv.flower.run_config import RunConfig
from fedpriv.privacy.released import OUTPUTS, Kind

ROOT = Path(__file__).parents[2]
TABLES = {
    "name": "six",
    "seed": 7,
    "data": {"name": "digits", "clients": 6, "partition": "dirichlet", "concentration": 0.5},
    "model": {"name": "softmax"},
    "cohort": {"sampling": "poisson", "probability": 0.7},
    "method": {"name": "alpha-normec", "memory": "sent", "damping": 0.1},
    "privacy": {"trust": "local", "epsilon": 50.0},
    "training": {"rounds": 3},
}


@pytest.fixture
def config() -> Config:
    return parse_config(TABLES)


@pytest.fixture
def toml(config, tmp_path) -> Path:
    path = tmp_path / "six.toml"
    path.write_text(config.to_toml(), encoding="utf-8")
    return path


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """Return the folder of a run's temporary files, which identifies its processes."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr("tempfile.tempdir", None)
    return folder


def processes_of(home: Path) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"FLWR_HOME={home}/".encode() in path.read_bytes():
                found.append((path.parent / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


def fedpriv(*arguments: object, cwd: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fedpriv.cli", *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
def test_a_flower_run_gives_the_loops_files_and_leaves_nothing_running(config, toml, tmp_path, home):
    run_experiment(config, tmp_path / "loop", engine="loop")
    process = fedpriv("run", toml, "--engine", "flower", "--out", "flower", cwd=tmp_path)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "engine flower" in output
    assert processes_of(home) == []
    assert list(home.iterdir()) == []
    loop, flower = RunDirectory(tmp_path / "loop"), RunDirectory(tmp_path / "flower")
    for name in ("model.safetensors", "initial.safetensors", "config.toml", "privacy.json", "rounds.jsonl"):
        assert loop.file(name).read_bytes() == flower.file(name).read_bytes(), name
    timeless = [
        [{k: v for k, v in row.items() if "second" not in k} for row in run.rows("diagnostics.jsonl")]
        for run in (loop, flower)
    ]
    assert timeless[0] == timeless[1]
    assert "ROUND 3/3" in flower.file("flower.log").read_text()
    owners = {path.name for path in flower.path.iterdir() if not path.stat().st_mode & 0o077}
    assert owners == {
        output.name for output in OUTPUTS if output.kind is Kind.OWNER and flower.file(output.name).exists()
    }
    assert "flower.log" in owners
    assert run_with_flower(config, flower.path, resume=True) == flower.read_json("summary.json")


@pytest.mark.slow
def test_a_users_own_folder_runs_in_flowers_processes_to_the_bit(tmp_path):
    toml = own_folder(tmp_path)
    run_experiment(toml, tmp_path / "loop", engine="loop", execution=Execution(client_noise="faithful"))
    process = fedpriv("run", toml, "--engine", "flower", "--out", "flower", cwd=tmp_path)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    for name in ("model.safetensors", "config.toml", "rounds.jsonl"):
        assert (tmp_path / "loop" / name).read_bytes() == (tmp_path / "flower" / name).read_bytes(), name


FAILING = """
from clients.client_app import app as sound
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message, context):
    if context.node_config["partition-id"] == 4 and "arrays" in message.content:
        raise OSError("the disk of this client is full")
    return sound(message, context)
"""


def test_a_simulations_app_is_a_deployments_with_another_run_config(tmp_path):
    run_config = {"config": "/somewhere/config.toml", "claimed": True}
    launch.FlowerRun(tmp_path, 3, "cpu", tmp_path / "flower.log").write_app(run_config)
    written = {path.name: path.read_bytes() for path in (tmp_path / "app").iterdir()}
    deployed = bundle.app_files()
    tables, theirs = (tomllib.loads(files.pop("pyproject.toml").decode()) for files in (written, deployed))
    assert written == deployed
    assert tables["tool"]["flwr"]["app"].pop("config") == run_config
    assert theirs["tool"]["flwr"]["app"].pop("config")["deployed"]
    assert tables == theirs
    assert (tmp_path / "work").is_dir()


@pytest.mark.slow
def test_a_failing_client_ends_the_run_with_its_reason_in_one_line(toml, tmp_path, home, monkeypatch, capsys):
    monkeypatch.setattr(bundle, "CLIENT_MODULE", FAILING)
    arguments = ["run", str(toml), "--engine", "flower", "--out", str(tmp_path / "out"), "-s", "cohort.sampling="]
    with pytest.raises(SystemExit) as leaving:
        main([*arguments, "-s", "cohort.probability="])
    assert leaving.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fedpriv:")]
    assert "round 1: expected an answer from each of 6 clients, got client 4: OSError: the disk of this client" in line
    assert "the disk of this client is full" in line
    assert processes_of(home) == []
    assert not (tmp_path / "out" / "summary.json").exists()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
def test_a_run_that_is_stopped_takes_its_processes_with_it(toml, tmp_path, home):
    process = fedpriv("run", toml, "--engine", "flower", "--out", "out", cwd=tmp_path)
    until = time.monotonic() + 120
    while len(processes_of(home)) < 3 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.1)
    assert len(processes_of(home)) >= 3
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "Traceback" not in errors
    assert processes_of(home) == []
    assert list(home.iterdir()) == []


def test_a_part_of_a_run_is_not_gone_on_with(config, tmp_path):
    RunDirectory(tmp_path).claim(config.to_toml(), config.digest, resume=False)
    with pytest.raises(ValueError, match="this experiment, started or finished"):
        run_with_flower(config, tmp_path)
    with pytest.raises(ValueError, match="an unfinished run without its client memories"):
        run_with_flower(config, tmp_path, resume=True)


def test_the_directory_of_another_experiment_is_refused(config, tmp_path):
    other = parse_config({**TABLES, "seed": 8})
    RunDirectory(tmp_path).claim(other.to_toml(), other.digest, resume=False)
    with pytest.raises(ValueError, match="a different experiment"):
        run_with_flower(config, tmp_path, resume=True)


def test_rounds_are_shown_once_and_only_when_all_of_them_is_there(tmp_path):
    directory, seen = RunDirectory(tmp_path), []
    rounds = launch.RecordedRounds(directory, lambda released, diagnostics: seen.append((released, diagnostics)))
    rounds.show()
    directory.append("rounds.jsonl", {"round": 0})
    directory.append("rounds.jsonl", {"round": 1})
    rounds.show()
    assert seen == [({"round": 0}, {"round": 0})]
    directory.append("diagnostics.jsonl", {"round": 1, "messages": 3})
    rounds.show()
    rounds.show()
    assert seen[1:] == [({"round": 1}, {"round": 1, "messages": 3})]


def test_flower_finds_its_app_in_pyproject():
    with (ROOT / "pyproject.toml").open("rb") as file:
        flower = tomllib.load(file)["tool"]["flwr"]["app"]
    for component in flower["components"].values():
        module, name = component.split(":")
        assert hasattr(import_module(module), name)
    assert RunConfig.of(flower["config"]).load().name == "quickstart"
    for pattern in flower["fab-include"]:
        assert list(ROOT.glob(pattern)), pattern


def test_the_run_config_is_read_with_a_nodes_own_data_and_device(tmp_path):
    run = RunConfig.of({"config": "a.toml", "out": "", "other": 3}, {"data-root": "/data", "partition-id": 2})
    assert run == RunConfig(config="a.toml", data_root="/data")
    assert run.run_directory("name") == Path.home() / "fedpriv-runs" / "name"
    assert RunConfig(config="", out=str(tmp_path)).run_directory("name") == tmp_path
    with pytest.raises(ValueError, match="run config out: expected an absolute path"):
        RunConfig(config="", out="runs/x").run_directory("name")


def test_settings_change_the_experiment_of_the_run_config(toml):
    run = RunConfig(config=str(toml), settings='training.rounds=9 name="two words"')
    assert run.load().training.rounds == 9
    assert json.dumps(run.load().name) == '"two words"'


def test_a_computer_on_which_ray_starts_too_slowly_is_named(tmp_path):
    log = tmp_path / "flower.log"
    log.write_text(
        "Exception: The current node timed out during startup. This could happen because some raylet failed.\n"
        "RuntimeError: Simulation Runtime crashed.\n"
    )
    error = launch.failure_in(tmp_path / "failure.txt", log, "")
    assert "--engine: expected Ray, which Flower uses, to start within 30 seconds, got a slower computer" in str(error)


@pytest.mark.slow
def test_flwr_run_of_this_folder_runs_a_shipped_experiment(tmp_path, monkeypatch):
    """The bundle that Flower builds from a clone contains everything that its processes need."""
    home, out, start = tmp_path / "home", tmp_path / "out", launch.FlowerRun._start
    (home / "work").mkdir(parents=True)
    (home / "app").symlink_to(ROOT)
    settings = "training.rounds=2 data.clients=6 cohort.sampling= cohort.probability="

    def with_settings(self, arguments, *more):
        asked = ["-c", f'settings="{settings}" out="{out}"'] if arguments[0] == "run" else []
        return start(self, [*arguments, *asked], *more)

    monkeypatch.setattr(launch.FlowerRun, "_start", with_settings)
    run = launch.FlowerRun(home, 6, "cpu", tmp_path / "flower.log")
    with run.running() as process:
        assert process.wait(timeout=240) == 0, run.log.read_text()
    summary = RunDirectory(out).read_json("summary.json")
    assert summary is not None, run.log.read_text()
    assert (summary["engine"], summary["rounds"], summary["population"]) == ("flower", 2, 6)


@pytest.mark.slow
def test_flwr_run_of_this_folder_answers_an_analysis(tmp_path, monkeypatch):
    """`flwr run` takes a config with questions, and its server writes the answers."""
    home, out, start = tmp_path / "home", tmp_path / "out", launch.FlowerRun._start
    (home / "work").mkdir(parents=True)
    (home / "app").symlink_to(ROOT)
    asked = ["-c", f'config="sim_configs/analysis.toml" settings="data.clients=4" out="{out}"']

    def with_config(self, arguments, *more):
        return start(self, [*arguments, *(asked if arguments[0] == "run" else [])], *more)

    monkeypatch.setattr(launch.FlowerRun, "_start", with_config)
    run = launch.FlowerRun(home, 4, "cpu", tmp_path / "flower.log")
    with run.running() as process:
        assert process.wait(timeout=240) == 0, run.log.read_text()
    found = RunDirectory(out).read_json("analysis.json")
    assert found is not None, run.log.read_text()
    assert (found["clients"], sorted(found["answers"])) == (4, ["digits", "pixels"])
    assert found["epsilon"] == pytest.approx(2.0, rel=0.01)


WITH_THE_WHEEL = """
import sys
from pathlib import Path

home, out, site = map(Path, sys.argv[1:])
sys.path.insert(0, str(site))
from fedpriv.flower import launch

start = launch.FlowerRun._start


def with_settings(self, arguments, *more):
    asked = ["-c", f'clients=6 rounds=2 out="{out}"'] if arguments[0] == "run" else []
    return start(self, [*arguments, *asked], *more)


launch.FlowerRun._start = with_settings
run = launch.FlowerRun(home, 6, "cpu", home / "flower.log")
with run.running() as process:
    code = process.wait(timeout=240)
print(run.log.read_text())
raise SystemExit(code)
"""


@pytest.mark.slow
def test_flwr_run_of_an_app_works_with_an_installed_wheel(tmp_path):
    """The app is a user's own, far from this folder; fedpriv comes from the unpacked wheel alone."""
    home, out = tmp_path / "h", tmp_path / "model.pt"
    (home / "work").mkdir(parents=True)
    with zipfile.ZipFile(build_wheel(tmp_path / "built")) as archive:
        archive.extractall(tmp_path / "site")
    shutil.copytree(ROOT / "examples" / "flower_app", home / "app")
    server = home / "app" / "private_app" / "server.py"
    server.write_text(server.read_text() + "\nimport fedpriv\n\nprint('fedpriv of', fedpriv.__file__)\n")
    call = [sys.executable, "-P", "-c", WITH_THE_WHEEL, str(home), str(out), str(tmp_path / "site")]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"fedpriv of {tmp_path / 'site' / 'fedpriv' / '__init__.py'}" in done.stdout
    assert "at epsilon 8.000, delta 1e-05" in done.stdout
    assert out.is_file()

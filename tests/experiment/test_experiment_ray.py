"""Whole runs on Ray workers: the same files and bits as with the loop engine, even after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.helpers import same
from support.own_folder import own_folder

from fedpriv.cli import main
from fedpriv.experiment.execution import Execution
from fedpriv.experiment.results import load_model
from fedpriv.experiment.run import run_experiment

pytestmark = pytest.mark.xdist_group("ray")

CONFIG = """
name = "small"
seed = 3
[data]
name = "digits"
clients = 20
partition = "dirichlet"
[model]
name = "softmax"
[cohort]
sampling = "poisson"
probability = 0.5
[method]
name = "alpha-normec"
damping = 0.1
[privacy]
trust = "local"
noise_multiplier = 0.5
[training]
rounds = {rounds}
evaluate_every = 100
"""


def fedpriv(config: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fedpriv.cli", "run", str(config), "--out", str(out), *options]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def run_here(config: Path, out: Path, *options: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["run", str(config), "--out", str(out), *options])
    assert ended.value.code == 0


def done(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output


def config_in(folder: Path, rounds: int) -> Path:
    path = folder / "config.toml"
    path.write_text(CONFIG.format(rounds=rounds), encoding="utf-8")
    return path


def assert_same_model(one: Path, other: Path) -> None:
    first, second = load_model(one), load_model(other)
    assert all(same(first[key], second[key]) for key in second)


def workers_of(session: int) -> list[int]:
    """Return the Ray workers of a run: processes of its session with such a name."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            mine = os.getsid(int(folder.name)) == session
            if mine and b"Host" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except (OSError, ProcessLookupError):
            continue
    return found


def rounds_in(out: Path) -> int:
    path = out / "rounds.jsonl"
    return path.read_text(encoding="utf-8").count("\n") if path.exists() else 0


@pytest.mark.slow
def test_a_run_on_workers_is_the_loops_to_the_bit_also_when_one_is_killed(tmp_path: Path) -> None:
    """A worker is killed during the run; the run still finishes with the same result, and records its execution."""
    config = config_in(tmp_path, 400)
    run_here(config, tmp_path / "loop", "--engine", "loop")
    options = ("--engine", "ray", "--workers", "2", "--compute", "loop", "--checkpoint-every", "7")
    run = fedpriv(config, tmp_path / "ray", *options)
    until = time.monotonic() + 90
    victims: list[int] = []
    while not victims and time.monotonic() < until and run.poll() is None:
        time.sleep(0.02)
        # A worker rewrites its name with every task: one look may come in between.
        victims = workers_of(run.pid) if rounds_in(tmp_path / "ray") >= 20 else []
    assert victims, f"no worker was found to kill after {rounds_in(tmp_path / 'ray')} rounds"
    os.kill(victims[0], signal.SIGKILL)
    assert rounds_in(tmp_path / "ray") < 400
    assert "ray with 2 workers, loop inside" in done(run)
    assert_same_model(tmp_path / "ray", tmp_path / "loop")
    ran = json.loads((tmp_path / "ray" / "engine.json").read_text(encoding="utf-8"))
    assert (ran["engine"], ran["workers"], ran["client_noise"]) == ("ray", 2, "fused")
    until = time.monotonic() + 60  # a worker without its driver ends by itself, on a busy machine not at once
    while workers_of(run.pid) and time.monotonic() < until:
        time.sleep(0.1)
    assert workers_of(run.pid) == []


@pytest.mark.slow
def test_a_run_on_workers_that_was_killed_goes_on_to_the_bit(tmp_path: Path) -> None:
    """SIGKILL everything, then --resume without engine options: engine.json has them."""
    config = config_in(tmp_path, 300)
    run = fedpriv(config, tmp_path / "part", "--engine", "ray", "--workers", "2", "--compute", "loop")
    until = time.monotonic() + 90
    while rounds_in(tmp_path / "part") < 20 and time.monotonic() < until and run.poll() is None:
        time.sleep(0.02)
    os.killpg(run.pid, signal.SIGKILL)
    run.communicate()
    done(fedpriv(config, tmp_path / "part", "--resume"))
    assert json.loads((tmp_path / "part" / "summary.json").read_text())["engine"] == "ray"
    done(fedpriv(config, tmp_path / "whole", "--engine", "loop"))
    assert_same_model(tmp_path / "part", tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--ray-address", "127.0.0.1:1"), "127.0.0.1:1"),
        pytest.param(("--gpus-per-worker", "1"), "GPU", marks=pytest.mark.slow),
        pytest.param(("--workers", "1000"), "1000", marks=pytest.mark.slow),
    ],
)
def test_what_ray_cannot_give_is_one_line(options: tuple[str, str], line: str, tmp_path: Path) -> None:
    run = fedpriv(config_in(tmp_path, 3), tmp_path / "out", "--engine", "ray", "--compute", "loop", *options)
    output, _ = run.communicate(timeout=90)
    assert run.returncode == 2, output
    said = output.strip().splitlines()
    assert line in said[-1]
    assert said[-1].startswith("fedpriv: ")
    assert "Traceback" not in output


@pytest.mark.slow
@pytest.mark.parametrize("limit", [9_000, 30_000])
def test_a_full_disk_is_one_line_and_the_run_goes_on_once_there_is_room(limit: int, tmp_path: Path) -> None:
    """Files may not grow beyond a limit, which the states' file or the checkpoint reaches. No bit is lost."""
    config = config_in(tmp_path, 30)
    options = ("--engine", "loop", "--state-memory", "6KB", "--checkpoint-every", "1", "-s", "cohort.probability=0.1")
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, "
        f"({limit}, resource.RLIM_INFINITY)); from fedpriv.cli import main; main(sys.argv[1:])"
    )
    arguments = ["run", str(config), "--out", str(tmp_path / "full"), *options]
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=90)
    assert run.returncode == 2, run.stderr
    said = run.stderr.strip().splitlines()[-1]
    assert said.startswith("fedpriv: ")
    assert "File too large" in said
    assert "--resume" in said
    assert "Traceback" not in run.stderr
    assert 0 < rounds_in(tmp_path / "full") < 31
    for out, *more in (("full", "--resume"), ("whole",)):
        run_here(config, tmp_path / out, *options, *more)
    assert_same_model(tmp_path / "full", tmp_path / "whole")


@pytest.mark.slow
def test_a_users_own_folder_runs_on_workers_to_the_bit(tmp_path: Path) -> None:
    """Its modules have no name that a worker could import."""
    config = own_folder(tmp_path)
    run_experiment(config, tmp_path / "loop", engine="loop", execution=Execution(client_noise="faithful"))
    options = ("--engine", "ray", "--workers", "2", "--client-noise", "faithful")
    done(fedpriv(config, tmp_path / "ray", *options))
    models = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("loop", "ray")]
    assert models[0] == models[1]
    assert json.loads((tmp_path / "ray" / "engine.json").read_text())["workers"] == 2

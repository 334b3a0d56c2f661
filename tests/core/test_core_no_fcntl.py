"""Systems without file locks (Windows): results, reports and plans can be read; a run is refused in one line."""

import subprocess
import sys
from pathlib import Path

import pytest

from fedpriv.experiment.config import load_config
from fedpriv.experiment.run import run_experiment

QUICKSTART = Path(__file__).parents[2] / "sim_configs" / "quickstart.toml"
WITHOUT = "import sys; sys.modules['fcntl'] = None; "


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "quickstart"
    config = load_config(QUICKSTART, ["training.rounds=2", "data.clients=10"])
    run_experiment(config, out, engine="loop")
    return out


def without_locks(code: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT + code, *map(str, arguments)], capture_output=True, text=True, check=False
    )


COMMAND = "from fedpriv.cli import main; sys.exit(main(sys.argv[1:]))"


READING = """
from pathlib import Path
import fedpriv, strategies, clients
from fedpriv.experiment.results import compare_runs
from fedpriv.report.spent import spent_below

run, report = map(Path, sys.argv[1:])
assert fedpriv.load_results(run)["round"].max() == 2
assert fedpriv.load_model(run)
assert len(compare_runs([run]))
assert len(spent_below(run)) == 1
fedpriv.write_report(run, report)
assert fedpriv.run_experiment and fedpriv.track and strategies.DPFedAvg and clients.private_mod
"""


def test_results_and_reports_are_read(finished: Path, tmp_path: Path) -> None:
    done = without_locks(READING, finished, tmp_path / "report")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report" / "report.html").is_file()


@pytest.mark.slow
def test_plans_are_made() -> None:
    done = without_locks(COMMAND, "privacy", QUICKSTART)
    assert done.returncode == 0, done.stderr


def test_a_run_is_refused_in_one_line(tmp_path: Path) -> None:
    done = without_locks(COMMAND, "run", QUICKSTART, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "a system with file locks" in done.stderr

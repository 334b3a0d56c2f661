"""A user's own folder, with every command that needs no other process.

The same folder runs on Ray in test_experiment_ray.py, in Flower's simulation in test_flower_run.py, and on real nodes
in test_deploy_loopback.py: each time with the model of the loop engine, to the bit.
"""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.own_folder import DATA, METHOD, NET, own_folder

import fedpriv
from fedpriv.cli import main
from fedpriv.experiment.execution import Execution

pytestmark = pytest.mark.xdist_group("own-folder")  # its runs are made once


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder, with a run and a sweep."""
    made = tmp_path_factory.mktemp("own")
    config = own_folder(made)
    assert command("run", config, "--engine", "loop", "--client-noise", "faithful", "--out", made / "loop") == 0
    assert command("sweep", made / "widths.toml", "--out", made / "sweep", "--jobs", "1") == 0
    return made


def command(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def test_the_files_are_short() -> None:
    assert [len(text.strip().splitlines()) for text in (NET, DATA, METHOD)] == [
        pytest.approx(n, abs=8) for n in (30, 20, 42)
    ]


def test_engines_in_process_agree(folder: Path) -> None:
    execution = Execution(client_noise="faithful")
    fedpriv.run_experiment(folder / "corners.toml", folder / "batched", engine="vectorized", execution=execution)
    one, other = (load_file(folder / name / "model.safetensors") for name in ("loop", "batched"))
    assert all(abs(one[name] - other[name]).max() < 1e-4 for name in one)


def test_the_sweep_has_twelve_trials_and_a_report(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(list(folder.glob("sweep/trials/*/summary.json"))) == 12
    assert command("report", folder / "sweep", "--out", folder / "report") == 0
    capsys.readouterr()
    page = "".join(path.read_text(encoding="utf-8") for path in folder.glob("report/*.html"))
    assert "method.py:Shifted" in page
    assert "net.py:Net" in page


def test_its_privacy_is_printed_and_audited(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("privacy", folder / "corners.toml") == 0
    assert "epsilon" in capsys.readouterr().out
    options = ("-s", "training.rounds=6", "--canaries", "40", "--out", folder / "audit")
    assert command("audit", folder / "corners.toml", *options) == 0
    audited = json.loads((folder / "audit" / "audit.json").read_text())
    assert audited["verdict"] == "not guilty"


def test_check_finds_nothing_and_a_run_repeats_from_its_own_directory(folder: Path) -> None:
    assert command("check", folder / "corners.toml") == 0
    again = ("--engine", "loop", "--client-noise", "faithful", "--out", folder / "again")
    assert command("run", folder / "loop" / "config.toml", *again) == 0
    models = [(folder / name / "model.safetensors").read_bytes() for name in ("loop", "again")]
    assert models[0] == models[1]

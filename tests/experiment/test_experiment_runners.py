"""One function runs an experiment on any engine, with everything that the command line can do."""

from pathlib import Path
from typing import Any

import pytest

import fedpriv
from fedpriv.deploy import run as deployed
from fedpriv.errors import UserError
from fedpriv.experiment.config import parse_config
from fedpriv.flower import launch

TABLES: dict[str, Any] = {
    "name": "a",
    "seed": 1,
    "data": {"name": "digits", "clients": 4},
    "model": {"name": "softmax"},
    "method": {"name": "dp-fedavg"},
    "training": {"rounds": 1},
}


def test_engines_in_process_give_the_summary_of_the_run_directory(tmp_path: Path) -> None:
    summary = fedpriv.run_experiment(parse_config(TABLES), tmp_path / "out", engine="loop")
    assert summary is not None
    assert summary["engine"] == "loop"
    assert (tmp_path / "out" / "summary.json").exists()


def test_flower_and_devices_are_asked_with_the_same_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
    monkeypatch.setattr(
        launch, "run_with_flower", lambda *a, **k: asked.append(("flower", a, k)) or {"engine": "flower"}
    )
    monkeypatch.setattr(deployed, "run_deployed", lambda *a, **k: asked.append(("deploy", a, k)))
    config, out = parse_config(TABLES), tmp_path / "out"
    options = {"device": "cpu", "data_root": tmp_path, "resume": True, "watch": print}
    assert fedpriv.run_experiment(config, out, engine="flower", **options) == {"engine": "flower"}
    assert fedpriv.run_experiment(config, str(out), deploy="admin", **options) is None
    assert asked == [("flower", (config, out), options), ("deploy", (config, out, "admin"), options)]


def test_a_number_of_rounds_that_is_none_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--checkpoint-every: expected at least 1, got 0"):
        fedpriv.run_experiment(parse_config(TABLES), tmp_path / "out", checkpoint_every=0)

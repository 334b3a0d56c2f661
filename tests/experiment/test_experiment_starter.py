"""`fedpriv new`: a first experiment from the shipped ones, ready to run."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from fedpriv.cli import main
from fedpriv.errors import UserError
from fedpriv.experiment.config import load_config
from fedpriv.experiment.starter import SHIPPED, starters, write_starter


def call(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    return stopped.value.code


def test_a_new_experiment_runs_with_the_one_command_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("new", "my first") == 0
    assert capsys.readouterr().out == "made        my first.toml\nnext        fedpriv run 'my first.toml'\n"
    text = (tmp_path / "my first.toml").read_text()
    assert text.count("#") > 8, "a starter explains its keys"
    assert call("run", "my first.toml", "-s", "training.rounds=1") == 0
    assert (tmp_path / "runs" / "my first" / "summary.json").is_file()


def test_what_is_there_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text("mine")
    assert call("new", "mine") == 2
    assert "mine.toml: expected a new file" in capsys.readouterr().err
    assert (tmp_path / "mine.toml").read_text() == "mine"


@pytest.mark.parametrize("source", sorted(starters()))
def test_every_starter_is_the_shipped_experiment_under_another_name(source: str, tmp_path: Path) -> None:
    made = load_config(write_starter('a "new" one', source, tmp_path))
    shipped = load_config(SHIPPED / f"{source}.toml")
    assert made.name == 'a "new" one'
    assert {**made.tables, "name": shipped.name} == shipped.tables


def test_starters_need_no_other_shipped_file(tmp_path: Path) -> None:
    assert {"quickstart", "local-trust", "devices"} <= set(starters())
    assert "devices-fedfix" not in starters(), "it reads a trace beside it"
    with pytest.raises(UserError, match="Did you mean 'quickstart'"):
        write_starter("mine", "quickstrat", tmp_path)


@pytest.mark.parametrize("name", ["", "..", "a/b", "a\nb"])
def test_a_name_that_no_experiment_can_have_writes_nothing(name: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match=r"^name: "):
        write_starter(name, folder=tmp_path)
    shutil.rmtree(tmp_path / "a")
    assert not list(tmp_path.iterdir())

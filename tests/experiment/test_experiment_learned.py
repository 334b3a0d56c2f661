"""A run with non-finite updates reports them as they happen, records them, and fails if it learned nothing."""

import json

import pytest

from fedpriv.cli import main
from fedpriv.cli.sweep import trial_warnings
from fedpriv.experiment.learned import Complaints, learned_nothing, warnings_of
from fedpriv.experiment.run import run_experiment
from fedpriv.experiment.run_directory import RunDirectory

EXPERIMENT = """
name = "small"
seed = 7
[data]
name = "digits"
clients = 4
partition = "iid"
[model]
name = "mlp"
[local]
work = "local-steps"
steps = 5
client_lr = {lr}
[cohort]
sampling = "everyone"
[method]
name = "dp-fedavg"
[privacy]
trust = "central"
noise_multiplier = 1.0
delta = 1e-5
[training]
rounds = 3
"""


def rows(*counts):
    return [{"round": k, "cohort_size": size, "non_finite": bad} for k, (size, bad) in enumerate(counts, 1)]


def recorded(folder):
    """Return the warnings in a run's diagnostics: in a separate file, or in the summary."""
    own = folder / "diagnostics.json"
    return json.loads(own.read_text())["warnings"] if own.exists() else summary_of(folder)["diagnostics"]["warnings"]


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture
def config(tmp_path):
    def write(lr):
        (tmp_path / "small.toml").write_text(EXPERIMENT.format(lr=lr))
        return tmp_path / "small.toml"

    return write


@pytest.mark.parametrize("engine", ["loop", "vectorized"])
def test_a_run_that_learned_nothing_exits_with_an_error_and_loses_nothing(config, engine, tmp_path, capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["run", str(config("1e20")), "--out", str(tmp_path / "out"), "--engine", engine])
    assert leaving.value.code == 2
    said = capsys.readouterr()
    assert "warning     round 1: 4 of 4 updates were not finite and counted as zero" in said.err
    assert said.err.count("warning     round") == 1
    assert said.err.splitlines()[-1].startswith(
        "fedpriv: the run: expected updates of finite numbers, got only NaN or infinity. None of 12"
    )
    assert "accuracy" in said.out
    assert (tmp_path / "out" / "model.safetensors").exists()
    (warning,) = recorded(tmp_path / "out")
    assert warning.startswith("None of 12 updates was finite; all counted as zero")


def test_an_ordinary_run_has_nothing_to_say(config, tmp_path, capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["run", str(config("0.1")), "--out", str(tmp_path / "out"), "--engine", "loop"])
    assert leaving.value.code == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert all(line.split(maxsplit=1)[1].startswith("The noise on the mean message is") for line in said)
    assert recorded(tmp_path / "out") == []


def test_a_run_from_python_records_it_and_returns(config, tmp_path):
    assert run_experiment(config("1e20"), tmp_path / "out", engine="loop")["rounds"] == 3
    assert len(recorded(tmp_path / "out")) == 1


def test_a_sweep_names_the_trials_that_learned_nothing(tmp_path):
    for name, bad in (("one", 0), ("two", 4)):
        (tmp_path / name).mkdir()
        for row in rows((4, bad), (4, bad)):
            RunDirectory(tmp_path / name).append("diagnostics.jsonl", row)
    (line,) = trial_warnings(tmp_path, ["one", "", "two", "not begun"])
    assert line.startswith("warning     two: None of 8 updates was finite")


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ([], []),
        ([(4, 0), (4, 0)], []),
        ([(4, 4), (3, 3)], ["None of 7 updates was finite; all counted as zero"]),
        ([(4, 1), (4, 0)], ["1 of 8 updates was not finite and counted as zero. Lower"]),
        ([(4, 0), (4, 4), (0, 0), (4, 4)], ["8 of 12 updates were not finite and counted as zero. From round 2 on"]),
        ([(4, 0), (4, 4), (0, 0)], ["4 of 8 updates were not finite and counted as zero. From round 2 on no update"]),
        ([(4, 0), (4, 4), (4, 1)], ["5 of 12 updates were not finite and counted as zero. Lower"]),
        ([(0, 0), (0, 0)], ["No client's message counted in 2 rounds"]),
    ],
)
def test_a_runs_rows_say_what_to_warn_of(counts, words):
    found = warnings_of(rows(*counts))
    assert len(found) == len(words)
    assert all(line.startswith(word) for line, word in zip(found, words, strict=True))


@pytest.mark.parametrize(("voids", "words"), [(3, ["Void rounds: 3 of 3,"]), (2, ["Void rounds: 2 of 3,"]), (1, [])])
def test_rounds_that_do_not_count_are_warned_of_if_they_are_many(voids, words):
    found = warnings_of([row | {"void": row["round"] <= voids} for row in rows((4, 0), (4, 0), (4, 0))])
    assert len(found) == len(words)
    assert all(line.startswith(word) for line, word in zip(found, words, strict=True))


def test_learning_nothing_takes_messages_none_of_which_was_finite():
    assert learned_nothing(rows((4, 4), (0, 0)))
    assert not learned_nothing(rows((4, 4), (4, 3)))
    assert not learned_nothing(rows((0, 0)))
    assert not learned_nothing([])


def test_complaints_come_once_for_some_and_once_for_all():
    complain = Complaints()
    said = [complain(row) for row in [{"round": 0}, *rows((4, 0), (4, 1), (4, 2), (4, 4), (4, 4))]]
    assert [bool(line) for line in said] == [False, False, True, False, True, False]
    assert said[2] == "round 2: 1 of 4 updates was not finite and counted as zero"

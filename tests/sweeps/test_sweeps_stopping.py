"""Early stopping: which trials a rule stops and compares; stopped trials are neither failed nor damaged."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.sweep_files import in_process, sweep_file

from fedpriv import load_results, run_experiment
from fedpriv.cli import main
from fedpriv.experiment.config import parse_config
from fedpriv.experiment.run_directory import RunDirectory
from fedpriv.report.study import HYPERPARAMETERS
from fedpriv.sweeps.config import load_sweep
from fedpriv.sweeps.files import TUNED
from fedpriv.sweeps.run import run_sweep
from fedpriv.sweeps.stopping import Halving, Median, Stopping, group_of

__all__ = ["in_process"]

# A step of 1e-6 learns nothing; 0.5 reaches 0.7 after a few rounds.
HOPELESS = """
[set]
"training.rounds" = 9
[[axis]]
key = "method.server_lr"
values = [0.5, 0.4, 0.6, 1e-6, 0.3]
[stop]
rule = "median"
grace = 4
least = 3
"""


def curve(*figures: float) -> list[tuple[int, float]]:
    return list(enumerate(figures, 1))


def test_median_rule_is_its_definition() -> None:
    """Averages of the others by round 2 are 0.2, 0.3 and 0.6, with median 0.3; a later jump is ignored."""
    rule = Median(grace=2, least=3)
    others = [curve(0.1, 0.3, 9.0), curve(0.3, 0.3, 9.0), curve(0.6, 0.6)]
    assert rule.verdict(curve(0.1, 0.29), others, 2) is not None
    assert rule.verdict(curve(0.3, 0.1), others, 2) is None, "the best so far counts, and an equal one continues"
    assert rule.verdict(curve(0.0, 0.0), others[:2], 2) is None, "too few"
    assert rule.verdict([], others, 2) is None
    assert [n for n in range(12) if Median(grace=4, every=3).looks(n)] == [4, 7, 10]


def test_halving_keeps_the_best_part_at_its_rungs() -> None:
    rule = Halving(grace=2, factor=3, least=3)
    assert [n for n in range(60) if rule.looks(n)] == [2, 6, 18, 54]
    others = [curve(0.0, figure, 9.0) for figure in (0.1, 0.2, 0.3, 0.4, 0.5)]
    assert rule.verdict(curve(0.9, 0.45), others, 2) is None, "second of six, of which two continue"
    assert rule.verdict(curve(0.9, 0.35), others, 2) is not None
    assert rule.verdict(curve(0.0, 0.0), others[:2], 2) is None, "too few"
    assert rule.verdict(curve(0.0, 0.5), others, 2) is None, "the first of equals"


def tables(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "name": "a",
        "seed": 1,
        "data": {"name": "digits", "clients": 6},
        "model": {"name": "softmax"},
        "local": {"work": "local-steps", "steps": 2, "client_lr": 0.1},
        "method": {"name": "dp-fedavg", "clip_norm": 1.0, "server_lr": 0.5},
        "privacy": {"epsilon": 8.0},
        "training": {"rounds": 3},
    }
    for address, value in changes.items():
        table, _, key = address.partition("__")
        base[table] = {**base[table], key: value} if key else value
    return base


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"seed": 2}, True),
        ({"name": "b"}, True),
        ({"method__server_lr": 0.1}, True),
        ({"method__clip_norm": 0.1}, True),
        ({"local__client_lr": 0.2}, True),
        ({"server": {"optimizer": "adam"}}, False),
        ({"privacy__epsilon": 4.0}, False),
        ({"privacy__trust": "local"}, False),
        ({"data__clients": 7}, False),
        ({"data__partition": "dirichlet"}, False),
        ({"training__rounds": 4}, False),
        ({"cohort": {"sampling": "fixed", "size": 3}}, False),
        ({"method": {"name": "normalized-sgd"}}, False),
    ],
)
def test_only_trials_of_equal_data_privacy_and_method_are_compared(change: dict[str, Any], same: bool) -> None:
    assert (group_of(parse_config(tables(**change))) == group_of(parse_config(tables()))) is same


def test_numbers_of_the_server_optimiser_are_tuned_like_the_others() -> None:
    adam = group_of(parse_config(tables(server={"optimizer": "adam"})))
    assert group_of(parse_config(tables(server={"optimizer": "adam", "tau": 0.1}))) == adam
    assert group_of(parse_config(tables(server={"optimizer": "yogi"}))) != adam
    assert HYPERPARAMETERS == ("method.", "local.", "server.", "training.")
    assert {f"{table}." for table in TUNED} < set(HYPERPARAMETERS)


def bits(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("rounds.jsonl", "model.safetensors", "privacy.txt")}


@pytest.mark.usefixtures("in_process")
def test_a_hopeless_trial_is_stopped_counted_apart_and_can_be_finished_to_the_bit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = sweep_file(tmp_path, HOPELESS), tmp_path / "out"
    with pytest.raises(SystemExit) as caught:
        main(["sweep", str(path), "--out", str(out)])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "5: 4 done, 0 failed, 1 stopped early" in shown
    assert "failed      " not in shown
    table = run_sweep(load_sweep(path), out, resume=True)
    rows = table.to_dict("records")
    stopped = [row for row in rows if row["status"] == "stopped"]
    assert [row["method.server_lr"] for row in stopped] == [1e-6]
    for row in stopped:
        folder = out / "trials" / row["trial"]
        record = json.loads((folder / "stopped.json").read_text())
        assert record["round"] == row["rounds"] == 4
        assert row["reason"] == record["reason"]
        assert "finished trials' averages" in row["reason"]
        assert not (folder / "failure.json").exists()
        assert [row["round"] for row in RunDirectory(folder).rows("rounds.jsonl")] == [0, 1, 2, 3, 4]
    assert set(load_results(out)["round"]) == set(range(10))
    at = [(out / "trials" / row["trial"] / "rounds.jsonl").stat().st_mtime_ns for row in stopped]
    run_sweep(load_sweep(path), out, resume=True, retry=True)
    assert [(out / "trials" / row["trial"] / "rounds.jsonl").stat().st_mtime_ns for row in stopped] == at
    table = run_sweep(load_sweep(path), out, resume=True, stop=False)
    assert set(table["status"]) == {"done"}
    for row in stopped:
        whole = tmp_path / "whole" / row["trial"]
        run_experiment(out / "trials" / row["trial"] / "config.toml", whole, engine="vectorized")
        assert bits(out / "trials" / row["trial"]) == bits(whole)


@pytest.mark.usefixtures("in_process")
def test_a_hopeless_trial_that_nothing_can_be_compared_with_is_run_to_its_end(tmp_path: Path) -> None:
    """The last trial has other data than the rest."""
    axis = 'key = ["data.clients", "method.server_lr"]\nvalues = [[6, 0.5], [6, 0.4], [6, 0.6], [6, 1e-6], [7, 1e-6]]'
    text = HOPELESS.replace('key = "method.server_lr"\nvalues = [0.5, 0.4, 0.6, 1e-6, 0.3]', axis)
    table = run_sweep(load_sweep(sweep_file(tmp_path, text)), tmp_path / "out")
    assert list(table["status"]) == ["done", "done", "done", "stopped", "done"]


@pytest.mark.usefixtures("in_process")
def test_a_sweep_that_was_interrupted_stops_the_same_trials_at_the_same_rounds(tmp_path: Path) -> None:
    """With one job at a time: between any two trials, and within a stopped trial."""
    plan = load_sweep(sweep_file(tmp_path, HOPELESS.replace("median", "halving").replace("grace = 4", "grace = 2")))
    whole = run_sweep(plan, tmp_path / "whole")
    assert 0 < list(whole["status"]).count("stopped") < 5
    out = tmp_path / "out"

    class Interrupted(Exception):  # noqa: N818
        pass

    def interrupt(state: Any) -> None:
        if state.ended - state.before == 1:
            raise Interrupted

    for _ in range(3):
        with pytest.raises(Interrupted):
            run_sweep(plan, out, resume=True, watch=interrupt)
    again = run_sweep(plan, out, resume=True)
    assert again.drop(columns="seconds").equals(whole.drop(columns="seconds"))


def test_validation_is_looked_at_where_there_is_one_and_damage_of_another_trial_is_its_own(tmp_path: Path) -> None:
    def write(name: str, test: float, validation: float | None) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        row = {"test_accuracy": test} | ({} if validation is None else {"validation_accuracy": validation})
        (folder / "rounds.jsonl").write_text("".join(json.dumps({"round": n, **row}) + "\n" for n in range(3)))
        (folder / "summary.json").write_text("{}")
        return folder

    others = [write("a", 0.1, 0.9), write("b", 0.1, 0.8), write("damaged", 0.1, 0.7), tmp_path / "none"]
    (tmp_path / "damaged" / "rounds.jsonl").write_text("{\n")
    mine = write("mine", 0.5, 0.5)
    rule = Median(grace=2, least=2)
    row = {"round": 2, "test_accuracy": 0.5, "validation_accuracy": 0.5}
    with pytest.raises(Exception, match=r"best 0\.5000 by round 2"):
        Stopping(rule, mine, others, rounds=5)(row, {})
    Stopping(rule, mine, others, rounds=2)(row, {})  # the last round
    Stopping(Median(grace=2, least=3), mine, others, rounds=5)(row, {})

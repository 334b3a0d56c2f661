"""A run directory for strategies in users' apps: its files, and runs that end early and are resumed."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from flower_existing_app import CLIENTS, app, initial_net
from flower_in_process import InProcessGrid, inside_a_run
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord

from fedpriv.errors import UserError
from fedpriv.experiment.config import load_config
from fedpriv.experiment.results import compare_runs, load_model, load_results
from fedpriv.flower import AlphaNormEC, DPFedAvg, MethodStrategy, Privacy, RunFolder
from fedpriv.flower.messages import FEDPRIV, asks_node_info
from fedpriv.flower.server.drop_in_statement import RECORDED
from fedpriv.privacy import NoiseChoice, Separated
from fedpriv.report.spent_runs import read_run
from fedpriv.report.write import write_report

ROUNDS = 4
LR = ConfigRecord({"lr": 0.1})


class Killed(BaseException):
    """An end that no code expects."""


def evaluated(round: int, arrays: ArrayRecord) -> MetricRecord:
    total = sum(float(array.numpy().sum()) for array in arrays.values())
    return MetricRecord({"accuracy": 1.0 / (2 + round), "loss": total})


def strategy_in(out: Any, **options: Any) -> DPFedAvg:
    given: dict[str, Any] = {"privacy": Privacy(epsilon=8.0), "num_clients": CLIENTS, "clip_norm": 0.3, **options}
    return DPFedAvg(out=out, join_timeout=5.0, **given)


def start(
    strategy: MethodStrategy,
    hook: Callable[[int, Message], bool] = lambda *_: True,
    rounds: int = ROUNDS,
    look: Any = evaluated,
    scale: float = 1.0,
    **options: Any,
) -> tuple[Any, InProcessGrid]:
    grid = InProcessGrid(app, CLIENTS, hook=hook)
    arrays = ArrayRecord({**initial_net().state_dict(), "scale": torch.tensor(scale)})
    with inside_a_run():
        given = {"train_config": LR, "evaluate_fn": look, **options}
        return strategy.start(grid, arrays, num_rounds=rounds, timeout=5.0, **given), grid


def killed_at(round: int) -> Callable[[int, Message], bool]:
    """Return a hook that ends the process when the first client is asked for a round."""

    def hook(_: int, message: Message) -> bool:
        if not asks_node_info(message.content) and message.content[FEDPRIV]["round"] == round:
            raise Killed
        return True

    return hook


def killed_after(round: int) -> Callable[[int, ArrayRecord], MetricRecord]:
    """Return an evaluation that ends the process after a round, before its row is written."""

    def look(number: int, arrays: ArrayRecord) -> MetricRecord:
        if number == round:
            raise Killed
        return evaluated(number, arrays)

    return look


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]


def rounds_asked(grid: InProcessGrid) -> set[int]:
    return {m.content[FEDPRIV]["round"] for m in grid.seen if not asks_node_info(m.content)}  # type: ignore[index, misc]


def test_a_strategy_fills_a_run_directory_that_every_reader_of_runs_takes(tmp_path: Path) -> None:
    for name, clip in (("one", 0.3), ("two", 0.6)):
        strategy = strategy_in(tmp_path / name, clip_norm=clip)
        result, _ = start(strategy)
        assert {file.name for file in (tmp_path / name).iterdir()} <= set(RECORDED)
    out = tmp_path / "two"
    assert [row["round"] for row in rows(out)] == list(range(ROUNDS + 1))
    assert rows(out)[-1]["epsilon"] == strategy.plan.epsilon  # type: ignore[union-attr]
    assert rows(out)[-1]["test_accuracy"] == result.evaluate_metrics_serverapp[ROUNDS]["accuracy"]
    assert (out / "privacy.txt").read_text() == strategy.statement
    assert all(name in strategy.statement for name in ("rounds.jsonl", "checkpoint.safetensors"))
    assert "participation.jsonl" not in strategy.statement
    assert json.loads((out / "privacy.json").read_text())["epsilon"] == strategy.plan.epsilon  # type: ignore[union-attr]
    assert (out / "curves.png").stat().st_size > 1000
    assert not (out / "checkpoint.safetensors").exists()
    assert "sum_norm" not in (out / "diagnostics.jsonl").read_text()
    net = initial_net()
    net.load_state_dict(load_model(out))
    assert torch.equal(torch.cat([part.reshape(-1) for part in net.state_dict().values()]), strategy.state.model)
    compared = compare_runs([tmp_path / "one", out])
    assert list(compared.loc["method.clip_norm"]) == [0.3, 0.6]
    assert list(compared.loc["method"]) == ["dp-fedavg", "dp-fedavg"]
    found = load_results(tmp_path)
    assert len(found) == 2 * (ROUNDS + 1)
    assert pd.api.types.is_float_dtype(found["test_loss"])
    page = write_report(tmp_path, tmp_path / "page").read_text()
    assert "dp-fedavg" in page
    spent = read_run(out, tmp_path)
    assert (spent.state, spent.rounds, spent.noise) == ("finished", ROUNDS, spent.noise)
    assert spent.noise != read_run(tmp_path / "one", tmp_path).noise
    with pytest.raises(UserError, match="expected a folder without a finished run, got a finished run"):
        start(strategy_in(out, clip_norm=0.6))


@pytest.mark.parametrize("seed", [None, 3])
def test_a_round_that_was_cut_off_is_charged_and_never_asked_again(tmp_path: Path, seed: int | None) -> None:
    with pytest.raises(Killed):
        start(strategy_in(tmp_path, seed=seed), hook=killed_at(3))
    before = rows(tmp_path)
    assert [row["round"] for row in before] == [0, 1, 2]
    assert read_run(tmp_path, tmp_path).rounds == 3  # the open round is charged from its first message on
    strategy = strategy_in(tmp_path, seed=seed)
    result, grid = start(strategy)
    assert rounds_asked(grid) == {4}
    after = rows(tmp_path)
    assert after[:3] == before
    assert [row["void"] for row in after] == [False, False, False, True, False]
    assert after[3]["test_loss"] == after[2]["test_loss"]
    assert [row["epsilon"] for row in after] == [strategy.plan.epsilon_after(k) for k in range(ROUNDS + 1)]  # type: ignore[union-attr]
    assert sorted(result.evaluate_metrics_serverapp) == list(range(ROUNDS + 1))
    assert json.loads((tmp_path / "summary.json").read_text())["epsilon"] == strategy.plan.epsilon  # type: ignore[union-attr]


@pytest.mark.parametrize("noise", [None, pytest.param(NoiseChoice(kind="banded"), marks=pytest.mark.slow)])
def test_a_run_that_ends_between_rounds_is_resumed_to_the_bit(tmp_path: Path, noise: NoiseChoice | None) -> None:
    more: dict[str, Any] = {"noise": noise, "cohort": Separated(CLIENTS, 2)} if noise else {}
    whole, resumed = strategy_in(tmp_path / "a", seed=3, **more), strategy_in(tmp_path / "b", seed=3, **more)
    start(whole)
    with pytest.raises(Killed):
        start(strategy_in(tmp_path / "b", seed=3, **more), look=killed_after(2))
    assert [row["round"] for row in rows(tmp_path / "b")] == [0, 1]  # the state of round 2 is saved before its row
    _, grid = start(resumed)
    assert rounds_asked(grid) == {3, 4}
    for ours, theirs in zip(resumed.state, whole.state, strict=True):
        assert torch.equal(ours, theirs)
    assert [row["test_loss"] for row in rows(tmp_path / "b")] == [row["test_loss"] for row in rows(tmp_path / "a")]
    assert not any(row["void"] for row in rows(tmp_path / "b") if row["round"] != 2)


def test_memories_that_ended_with_the_process_are_reset_on_both_sides(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def made() -> AlphaNormEC:
        given: dict[str, Any] = {"privacy": Privacy(epsilon=8.0), "num_clients": CLIENTS, "seed": 3}
        return AlphaNormEC(alpha=0.5, beta=0.2, server_lr=0.3, out=tmp_path, **given)

    logging.getLogger("flwr").propagate = True
    with pytest.raises(Killed):
        start(made(), look=killed_after(2))
    strategy = made()
    start(strategy)
    assert "memories are lost" in caplog.text
    assert "fail" not in caplog.text
    assert strategy.attendance.last_round == dict.fromkeys(range(CLIENTS), ROUNDS)
    assert not any(row["void"] for row in rows(tmp_path)[3:])


def test_a_run_that_differs_or_lost_its_checkpoint_is_not_resumed(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        start(strategy_in(tmp_path, seed=3), look=killed_after(2))
    kept = {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
    for options, line in (
        ({"clip_norm": 0.4}, r"a different experiment \(method\.clip_norm is 0.3 there and 0.4 here\)"),
        ({"privacy": Privacy(epsilon=9.0)}, r"privacy\.epsilon is 8.0 there and 9.0 here"),
        ({"evaluate": True}, r"training\.evaluate is False there and True here"),
    ):
        with pytest.raises(UserError, match=line):
            start(strategy_in(tmp_path, seed=3, **options))
    with pytest.raises(UserError, match=r"local\.lr is 0.1 there and 0.2 here"):
        start(strategy_in(tmp_path, seed=3), train_config=ConfigRecord({"lr": 0.2}))
    with pytest.raises(UserError, match=r"training\.rounds is 4 there and 9 here"):
        start(strategy_in(tmp_path, seed=3), rounds=9)
    with pytest.raises(UserError, match=r"model\.parameters is 22 there and 21 here"):
        start(strategy_in(tmp_path, seed=3, frozen="scale"))
    with pytest.raises(UserError, match="first model of a seeded run: expected that of the run that was started"):
        start(strategy_in(tmp_path, seed=3), scale=2.0)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()} == kept
    (tmp_path / "checkpoint.safetensors").unlink()
    with pytest.raises(UserError, match="got rows up to round 1, and a missing checkpoint"):
        start(strategy_in(tmp_path, seed=3))


def test_refusals_name_the_arguments_of_a_strategy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file: expected a writable folder, .* Choose another out\.$"):
        start(strategy_in(tmp_path / "file"))
    with pytest.raises(UserError, match=r"^log: expected a known tracker, got 'mlflw'") as refused:
        start(strategy_in(RunFolder(tmp_path / "run", log=("mlflw",))))
    assert refused.value.where == "log"


def test_an_evaluation_without_a_record_ends_the_run_before_its_first_round(tmp_path: Path) -> None:
    asked: list[int] = []
    with pytest.raises(
        UserError, match=r"evaluate_fn: expected a MetricRecord or None, got 0\.5\. Return MetricRecord"
    ):
        start(strategy_in(tmp_path), look=lambda *_: 0.5, hook=lambda *_: asked.append(1) is None)
    assert len(asked) == CLIENTS  # the questions about the nodes
    assert not (tmp_path / "rounds.jsonl").exists() or not rows(tmp_path)


def test_the_description_of_a_run_is_no_experiment(tmp_path: Path) -> None:
    start(strategy_in(tmp_path), rounds=1)
    with pytest.raises(UserError, match="expected an experiment, got the description of a run of a Flower app"):
        load_config(tmp_path / "config.toml")


def test_an_older_checkpoint_than_the_rows_would_spend_twice_and_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        start(strategy_in(tmp_path), look=killed_after(1))
    older = (tmp_path / "checkpoint.safetensors").read_bytes()
    with pytest.raises(Killed):
        start(strategy_in(tmp_path), look=killed_after(4))
    (tmp_path / "checkpoint.safetensors").write_bytes(older)
    with pytest.raises(UserError, match="expected the newest checkpoint, got rows up to round 3, and a checkpoint of"):
        start(strategy_in(tmp_path))


def test_a_simulated_secure_sum_is_recorded_and_not_resumed(tmp_path: Path) -> None:
    privacy = Privacy(epsilon=8.0, trust="aggregator")
    with pytest.raises(Killed):
        start(strategy_in(tmp_path, privacy=privacy), look=killed_after(2))
    with pytest.raises(UserError, match="under secure aggregation, runs of strategies cannot be resumed"):
        start(strategy_in(tmp_path, privacy=privacy))


def test_a_run_without_privacy_repeats_its_round_and_a_tracker_has_all_rows(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    out = RunFolder(tmp_path, log=("tensorboard",), name="plain")
    with pytest.raises(Killed):
        start(strategy_in(out, privacy=None), hook=killed_at(3), look=None)
    _, grid = start(strategy_in(out, privacy=None), look=None)
    assert rounds_asked(grid) == {3, 4}
    assert not any(row["void"] for row in rows(tmp_path))
    assert list((tmp_path / "tensorboard").rglob("events*"))
    assert "trained_train_loss" in (tmp_path / "diagnostics.jsonl").read_text()

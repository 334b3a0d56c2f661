"""Metrics of tasks: their values, and their direction in records, sweeps, early stopping and reports."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from fedpriv import load_results, write_report
from fedpriv.cli import main
from fedpriv.data.dataset import HeldOut
from fedpriv.errors import UserError
from fedpriv.experiment.config import Config, parse_config
from fedpriv.experiment.results import compare_runs
from fedpriv.experiment.run import run_experiment
from fedpriv.experiment.run_directory import RunDirectory
from fedpriv.experiment.watching import StopRun
from fedpriv.privacy.tuning import ScoreNoise
from fedpriv.report.study import load_study
from fedpriv.sweeps.stopping import Median, Stopping
from fedpriv.sweeps.tuning import score_of
from fedpriv.sweeps.tuning_score import UNITS, sum_of_scores
from fedpriv.tasks.kinds import Classification, MultiLabel, NextToken, Regression, TaskKind
from fedpriv.tasks.metrics import METRICS, meter_of
from fedpriv.tasks.task import Task

LOGITS = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.1, 0.0], [0.0, 1.0, 3.0], [1.0, 2.0, 0.0], [0.3, 0.2, 0.1]])
CLASSES = torch.tensor([0, 1, 2, 1, 0])


def value_of(name: str, kind: TaskKind, outputs: Tensor, labels: Tensor) -> float:
    """Return the metric, given in two pieces."""
    meter = meter_of(METRICS[name], kind)
    for part in (slice(0, 2), slice(2, None)):
        meter.update(outputs[part], labels[part])
    return meter.value()


def auc(scores: Tensor, positive: Tensor) -> float:
    pairs = scores[positive][:, None] - scores[~positive][None]
    return float(((pairs > 0) + 0.5 * (pairs == 0)).double().mean())


def test_metrics_of_classification() -> None:
    kind, shares = Classification(), LOGITS.softmax(1)
    assert value_of("accuracy", kind, LOGITS, CLASSES) == 0.8
    expected = np.mean([auc(shares[:, c], torch.eq(CLASSES, c)) for c in range(3)])
    assert value_of("auroc", kind, LOGITS, CLASSES) == pytest.approx(expected)
    assert value_of("f1", kind, LOGITS, CLASSES) == pytest.approx(np.mean([4 / 5, 2 / 3, 1.0]))
    confidence, right = shares.max(1).values, LOGITS.argmax(1) == CLASSES
    bins = (confidence * 15).long()
    off = [confidence[bins == b].sum() - right[bins == b].sum() for b in bins.unique()]
    gap = float(torch.stack(off).abs().sum()) / 5
    assert value_of("ece", kind, LOGITS, CLASSES) == pytest.approx(gap, rel=1e-5)


def test_labels_without_examples_are_left_out_of_a_mean() -> None:
    wide = torch.cat([LOGITS, torch.full((5, 1), -9.0)], dim=1)
    for name in ("auroc", "f1"):
        one, other = (value_of(name, Classification(), logits, CLASSES) for logits in (LOGITS, wide))
        assert other == pytest.approx(one)
    alone = value_of("auroc", Classification(), LOGITS, torch.zeros(5, dtype=torch.int64))
    assert math.isnan(alone)


def test_metrics_of_the_other_tasks() -> None:
    flags = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
    out = LOGITS[:, :2] - 0.4
    assert value_of("accuracy", MultiLabel(), out, flags) == pytest.approx(
        float(((out > 0) == (flags > 0)).float().mean())
    )
    expected = np.mean([auc(out[:, c], flags[:, c] > 0) for c in range(2)])
    assert value_of("auroc", MultiLabel(), out, flags) == pytest.approx(expected)
    assert 0.0 < value_of("f1", MultiLabel(), out, flags) < 1.0
    assert 0.0 < value_of("ece", MultiLabel(), out, flags) < 1.0
    kind = Regression(center=10.0, scale=2.0)
    target = torch.tensor([10.0, 12.0, 8.0, 11.0, 10.0])
    error = (2.0 * LOGITS[:, 0] + 10.0 - target).double()
    assert value_of("rmse", kind, LOGITS[:, :1], target) == pytest.approx(float(error.square().mean().sqrt()))
    assert value_of("mae", kind, LOGITS[:, :1], target) == pytest.approx(float(error.abs().mean()))
    tokens = torch.tensor([[0, 2], [1, -100], [-100, -100], [2, 2], [0, 1]])
    out = torch.stack([LOGITS, LOGITS.flip(0)], dim=1)
    losses = torch.nn.functional.cross_entropy(out.flatten(0, 1), tokens.flatten(), reduction="none")
    count = int((tokens != -100).sum())
    assert value_of("perplexity", NextToken(), out, tokens) == pytest.approx(
        math.exp(float(losses.sum()) / count), rel=1e-5
    )
    right = ((out.argmax(2) == tokens) & (tokens != -100)).sum()
    assert value_of("accuracy", NextToken(), out, tokens) == pytest.approx(int(right) / count)


def test_outputs_that_are_not_finite_have_no_value() -> None:
    assert math.isnan(value_of("auroc", Classification(), LOGITS / 0.0, CLASSES))


def config_of(folder: Path, seed: int = 1, lr: float = 0.3, **more: Any) -> Config:
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(90, 3)).astype(np.float32)
    labels = inputs @ np.array([1.0, -2.0, 0.5]) + 3.0
    np.savez(folder / "data.npz", inputs=inputs, labels=labels, client_ids=np.arange(90) % 6)
    tables: dict[str, Any] = {
        "name": "line",
        "seed": seed,
        "data": {"name": "npz", "file": str(folder / "data.npz"), "partition": "natural", "test": "within"},
        "model": {"name": "softmax"},
        "task": {"name": "regression", "metrics": ["rmse", "mae"]},
        "local": {"work": "local-steps", "steps": 2, "client_lr": lr},
        "method": {"name": "dp-fedavg"},
        "training": {"rounds": 3},
    }
    return parse_config(tables | more)


def test_metrics_are_in_records_and_the_lower_error_is_the_best_setting(tmp_path: Path) -> None:
    summaries = [
        run_experiment(config_of(tmp_path, 1, lr), tmp_path / "runs" / str(lr), engine="loop") for lr in (0.01, 0.3)
    ]
    assert list(summaries[0]["metrics"].items()) == [("rmse", "lower"), ("mae", "lower")]
    assert "test_accuracy" not in summaries[0]
    assert summaries[1]["test_rmse"] < summaries[0]["test_rmse"]
    table = load_results(tmp_path / "runs")
    assert {"test_rmse", "test_mae", "test_loss"} <= set(table.columns)
    assert np.allclose(table["test_loss"], table["test_rmse"] ** 2 / 2, rtol=1e-4)
    shown = compare_runs([tmp_path / "runs" / "0.01", tmp_path / "runs" / "0.3"])
    assert bool(shown.loc["test_rmse"].notna().to_numpy().all())
    page = write_report(tmp_path / "runs", tmp_path / "report").read_text()
    best = pd.read_csv(tmp_path / "report" / "tables" / "best.csv")
    assert best["hyperparameters"].tolist() == ["client_lr=0.3"]
    assert "the lowest test RMSE" in page
    assert "RMSE (lower is better)" in page
    assert "accuracy" not in page.partition("<body")[2].partition("<script")[0].partition("Privacy guarantees")[0]
    near = pd.read_csv(tmp_path / "report" / "tables" / "near_best.csv")
    assert near["near_own"].tolist()[0] == 0.5
    write_report(tmp_path / "runs", tmp_path / "other", select="mae")
    with pytest.raises(UserError, match="--select"):
        write_report(tmp_path / "runs", tmp_path / "other", select="accuracy")


def test_runs_with_different_metrics_need_a_choice(tmp_path: Path) -> None:
    for name, task in (("a", {"name": "regression"}), ("b", {"name": "regression", "metrics": ["mae", "rmse"]})):
        run_experiment(config_of(tmp_path, task=task, training={"rounds": 1}), tmp_path / "runs" / name, engine="loop")
    with pytest.raises(UserError, match=r"judged by one metric.*rmse, mae"):
        load_study(tmp_path / "runs")
    assert load_study(tmp_path / "runs", "rmse").metric.name == "rmse"
    assert load_study(tmp_path / "runs", "loss").scores[:2] == ("test_loss", "test_rmse")


def test_early_stopping_stops_the_larger_error(tmp_path: Path) -> None:
    def rows(values: list[float]) -> list[dict[str, Any]]:
        return [{"round": number, "test_rmse": value} for number, value in enumerate(values, 1)]

    others = [tmp_path / str(number) for number in range(3)]
    for other in others:
        other.mkdir()
        (other / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows([2.0, 1.0])))
        (other / "summary.json").write_text("{}")
    for name, value, stops in (("good", 0.5, False), ("bad", 3.0, True)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "rounds.jsonl").write_text(json.dumps(rows([value])[0]) + "\n")
        watch = Stopping(Median(grace=1, least=3), folder, others, 9, METRICS["rmse"])
        if stops:
            with pytest.raises(StopRun, match="-rmse"):
                watch(rows([value])[0], {})
        else:
            watch(rows([value])[0], {})


def test_only_metrics_in_zero_to_one_can_be_released_with_noise(tmp_path: Path) -> None:
    private: Any = {"privacy": {"noise_multiplier": 1.0}}
    with pytest.raises(UserError, match=r"scores from 0 to 1 of each client.*rmse"):
        score_of(config_of(tmp_path, **private), ScoreNoise(multiplier=5.0))
    task = Task(torch.nn.Identity(), kind=Classification(metrics=("ece",)))
    owners = HeldOut(np.array([0, 0, 1, 1, 1]), 3)
    for logits in (LOGITS, LOGITS * torch.nan):
        total = sum_of_scores(task, torch.zeros(0), logits, CLASSES, owners)
        assert 0 <= total <= 2 * UNITS
    assert total == 2 * UNITS  # undefined scores count as the worst


def test_the_command_line_shows_the_metric(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(tmp_path)
    (tmp_path / "line.toml").write_text(config.to_toml())
    with pytest.raises(SystemExit, match="0"):
        main(["run", str(tmp_path / "line.toml"), "--out", str(tmp_path / "run"), "--engine", "loop"])
    printed = capsys.readouterr().out
    assert "rmse        " in printed
    assert "accuracy" not in printed
    kept = RunDirectory(tmp_path / "run").rows("rounds.jsonl")
    assert list(kept[0]) == ["round", "epsilon", "test_rmse", "test_mae", "test_loss"]
    with pytest.raises(SystemExit, match="0"):
        main(["check", str(tmp_path / "line.toml")])
    assert "1 number to predict" in capsys.readouterr().out

"""Whole runs under a privacy filter: records, an early end, resumption to the bit, engines, and refusals."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedpriv
from fedpriv.audit.run import run_audit
from fedpriv.cli import main
from fedpriv.errors import UserError
from fedpriv.experiment.config import Config, load_config
from fedpriv.experiment.execution import EngineName, Execution
from fedpriv.experiment.run import run_experiment
from fedpriv.experiment.run_directory import RunDirectory
from fedpriv.experiment.watching import StopRun
from fedpriv.mechanisms.controllers import LinearDecay
from fedpriv.methods import DPFedAvg
from fedpriv.privacy import read_plan
from fedpriv.report.spent import spent_below

SHIPPED = Path(__file__).parents[2] / "sim_configs" / "privacy-filter.toml"
FAST = ["data.clients=12", "training.rounds=8", "training.evaluate_every=100", "privacy.epsilon=3"]
SHORT = [*FAST, "controller=", "controller.kind=signal-to-noise"]
"""Noise that falls to a half of the planned noise: the run stops after four of eight rounds."""


def config_of(*settings: str) -> Config:
    return load_config(SHIPPED, settings)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return RunDirectory(folder).rows("rounds.jsonl")


def test_a_run_that_spends_all_has_all_rounds(tmp_path: Path) -> None:
    config = config_of(*FAST)
    summary = run_experiment(config, tmp_path, engine="loop")
    rows = rows_of(tmp_path)
    noises = [row["noise_multiplier"] for row in rows[1:]]
    assert [row["round"] for row in rows] == list(range(9))
    assert np.allclose(np.diff(noises), noises[0] * (0.5 - 1.0) / 7.0)
    assert [row["epsilon"] for row in rows] == sorted({row["epsilon"] for row in rows})
    assert rows[0]["epsilon"] == 0.0
    assert rows[-1]["epsilon"] == pytest.approx(summary["epsilon"], rel=1e-9)
    assert summary["epsilon_spent"] == rows[-1]["epsilon"] <= summary["epsilon"] <= 3.0
    assert (summary["rounds"], summary["rounds_planned"]) == (8, 8)


def test_a_run_that_ends_early_says_what_it_promised_and_what_it_spent(tmp_path: Path) -> None:
    config = config_of(*SHORT)
    summary = run_experiment(config, tmp_path, engine="loop")
    rows, promise = rows_of(tmp_path), json.loads((tmp_path / "privacy.json").read_text())
    text = " ".join((tmp_path / "privacy.txt").read_text().split())
    assert 1 < rows[-1]["round"] == summary["rounds"] < 8
    assert rows[-1]["test_loss"] is not None
    assert rows[-2]["test_loss"] is None
    assert summary["test_loss"] == rows[-1]["test_loss"]
    assert summary["epsilon"] == promise["epsilon"] == pytest.approx(3.0, rel=1e-6)
    assert summary["epsilon_spent"] == promise["spent"]["epsilon_spent"] < summary["epsilon"]
    assert promise["spent"]["rounds"] == summary["rounds"]
    assert promise["rounds"] == summary["rounds_planned"] == 8
    assert f"{summary['rounds']} of at most 8 rounds" in text
    assert "with epsilon = 3 at delta" in text
    assert not (tmp_path / "checkpoint.safetensors").exists()
    plan = read_plan(promise, "privacy.json")
    assert plan is not None
    assert plan.filtered
    [group] = spent_below(tmp_path)
    assert group.total.epsilon == summary["epsilon"]
    again = run_experiment(config, tmp_path, engine="loop", resume=True)
    assert again == summary


@pytest.mark.parametrize(("engine", "settings"), [("loop", FAST), ("loop", SHORT), ("vectorized", SHORT)])
def test_a_run_goes_on_from_its_checkpoint_to_the_bit(tmp_path: Path, engine: EngineName, settings: list[str]) -> None:
    def stop(released: dict[str, Any], _: dict[str, Any]) -> None:
        if released["round"] == 2:
            raise StopRun("enough")

    config = config_of(*settings)
    run_experiment(config, tmp_path / "whole", engine=engine)
    with pytest.raises(StopRun):
        run_experiment(config, tmp_path / "parts", engine=engine, watch=stop)
    saved = (tmp_path / "parts" / "checkpoint.safetensors").read_bytes()
    assert all(f"server.filter_{name}".encode() in saved for name in ("spent", "last", "next"))
    run_experiment(config, tmp_path / "parts", engine=engine, resume=True)
    models = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert models[0] == models[1]
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "parts")


def test_a_run_that_was_stopped_after_its_last_round_only_finishes(tmp_path: Path) -> None:
    """The checkpoint is of a state in which the filter has stopped: resuming releases nothing more."""

    def stop(released: dict[str, Any], _: dict[str, Any]) -> None:
        if released["test_loss"] is not None and released["round"]:
            raise StopRun("enough")

    config = config_of(*SHORT)
    whole = run_experiment(config, tmp_path / "whole", engine="loop")
    with pytest.raises(StopRun):
        run_experiment(config, tmp_path / "parts", engine="loop", watch=stop)
    parts = run_experiment(config, tmp_path / "parts", engine="loop", resume=True)
    assert parts["rounds"] == whole["rounds"]
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "parts")


def test_the_bound_may_change_beside_the_noise(tmp_path: Path) -> None:
    """Messages with side values have length 1 for every bound, so the sensitivity that the filter charges stays 1."""
    config = config_of(*FAST, "adaptive.rate=1.0", "method.clip_norm=0.01")
    run_experiment(config, tmp_path, engine="loop")
    rows = rows_of(tmp_path)[1:]
    assert len({row["bound"] for row in rows}) == len({row["noise_multiplier"] for row in rows}) == 8
    plan = read_plan(json.loads((tmp_path / "privacy.json").read_text()), "privacy.json")
    assert plan is not None
    assert plan.l2_sensitivity == 1.0
    assert sum(row["noise_multiplier"] ** -2 for row in rows) == pytest.approx(2.0 * plan.as_dict()["zcdp_rho"])


@pytest.mark.slow
def test_ray_is_equal_to_the_loop(tmp_path: Path) -> None:
    config = config_of(*SHORT)
    run_experiment(config, tmp_path / "loop", engine="loop")
    run_experiment(config, tmp_path / "ray", engine="ray", execution=Execution(compute="loop", workers=2))
    models = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("loop", "ray")]
    assert models[0] == models[1]
    assert rows_of(tmp_path / "loop") == rows_of(tmp_path / "ray")


def test_a_controller_of_a_users_own_sees_no_more(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        """
from dataclasses import dataclass

@dataclass(frozen=True)
class Steps:
    after: int = 2

    def noise_multiplier(self, seen):
        assert type(seen).__name__ == "Seen"
        return seen.planned * (2.0 if seen.round <= self.after else 0.8)
"""
    )
    config = config_of(*FAST, "controller=", f"controller.kind={tmp_path / 'own.py'}:Steps", "controller.after=3")
    assert set(config.sources) == {"controller.kind"}
    run_experiment(config, tmp_path / "run", engine="loop")
    rows = rows_of(tmp_path / "run")
    noises = [row["noise_multiplier"] for row in rows[1:]]
    plan = config.plan(config.cohort.of(12))
    assert plan is not None
    assert np.array(noises) == pytest.approx(plan.noise_multiplier * np.array([2.0] * 3 + [0.8] * 4), rel=1e-9)
    assert len(rows) - 1 == 7  # 3 / 4 + 4 * 1.5625 = 7 of 8 units; another 1.5625 is too much


def test_experiments_in_python_have_controllers(tmp_path: Path) -> None:
    experiment = fedpriv.Experiment(
        model=fedpriv.load_config(SHIPPED).model,
        data=fedpriv.load_config(SHIPPED).data.dataset,
        clients=12,
        method=DPFedAvg(clip_norm=1.0),
        rounds=3,
        privacy=fedpriv.Privacy(epsilon=2.0),
        controller=LinearDecay(ratio=0.25),
    )
    plan = experiment.plan()
    assert plan is not None
    assert plan.filtered
    assert experiment.run(tmp_path, engine="loop")["rounds"] == 3
    noises = [row["noise_multiplier"] for row in rows_of(tmp_path)[1:]]
    assert noises[2] / noises[0] == pytest.approx(0.25)


def test_controllers_are_part_of_the_experiment() -> None:
    plain, other = config_of(), config_of("controller.ratio=0.4")
    assert load_config(plain.tables) == plain
    assert plain.tables["controller"] == {"kind": "linear-decay", "ratio": 0.5}
    assert plain.digest != other.digest
    assert plain.noise_id != other.noise_id
    assert config_of("controller=").controller is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["privacy.trust=local"], r"\[controller\]: expected privacy.trust = \"central\""),
        (["privacy.trust=aggregator"], r"\[controller\]: expected privacy.trust = \"central\""),
        (["privacy.unit=example", "privacy.example_clip=1.0"], r"\[controller\]: expected privacy.unit = \"client\""),
        (["privacy="], r"\[controller\]: expected a \[privacy\] table"),
        (
            ["devices.kind=same", *(f"devices.{key}=10.0" for key in ("speed", "download", "upload"))],
            r"\[devices\]: expected no such table with",
        ),
        (["noise.kind=banded"], r"\[noise\]: expected no such table with \[controller\]"),
        (["cohort.sampling=separated", "cohort.min_separation=4"], r"cohort.sampling: expected clients that may be in"),
        (["controller.kind=decay"], r"controller.kind: expected a known name"),
        (["controller.ratio=1.5"], r"controller.ratio: expected a number from 0.01 to 1"),
        (["controller.most=1.5"], r"controller.most"),
    ],
    ids=["local", "aggregator", "example", "not-private", "clock", "noise", "turns", "name", "number", "key"],
)
def test_what_has_no_filter_is_refused(settings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_of(*settings)


def test_noise_is_needed_and_one_target() -> None:
    sampling = config_of().cohort.of(100)
    with pytest.raises(UserError, match=r"noise_multiplier: expected above 0 with \[controller\]"):
        config_of("privacy.epsilon=", "privacy.noise_multiplier=0").plan(sampling)
    with pytest.raises(UserError, match="exactly one of epsilon and noise_multiplier"):
        config_of("privacy.noise_multiplier=1.0").plan(sampling)
    plan = config_of("privacy.epsilon=", "privacy.noise_multiplier=2.0").plan(sampling)
    assert plan is not None
    assert plan.noise_multiplier == 2.0


def test_flower_deployments_and_audits_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(*FAST)
    for check in (config.check_only_sampled_answer, config.check_deployable):
        with pytest.raises(UserError, match="no such table with Flower and in deployments"):
            check()
    with pytest.raises(UserError, match="no such table in an audit"):
        run_audit(config, tmp_path / "audit")
    with pytest.raises(SystemExit):
        main(["run", str(SHIPPED), "--out", str(tmp_path / "run"), "--engine", "flower"])
    assert "no such table with Flower" in capsys.readouterr().err


def test_the_command_line_says_what_is_promised_and_what_is_spent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [part for setting in SHORT for part in ("-s", setting)]
    with pytest.raises(SystemExit):
        main(["check", str(SHIPPED), *settings])
    assert "epsilon     3 at delta = 1e-05 after at most 8 rounds" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["run", str(SHIPPED), "--out", str(tmp_path / "run"), "--engine", "loop", *settings])
    said = capsys.readouterr().out
    rows = rows_of(tmp_path / "run")
    assert "epsilon     3 at delta" in said
    assert f"of it in {rows[-1]['round']} of at most 8 rounds" in said
    with pytest.raises(SystemExit):
        main(["privacy", str(SHIPPED), "--json", *settings])
    assert json.loads(capsys.readouterr().out)["filtered"] is True

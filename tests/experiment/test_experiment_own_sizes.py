"""Epsilon of records by client: a client with more examples than the fewest divides by its own number."""

import json
import math
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpriv.cli.print_privacy import print_plan
from fedpriv.experiment.build import assemble
from fedpriv.experiment.config import parse_config
from fedpriv.experiment.run import run_experiment
from fedpriv.privacy import Everyone, ExampleTerms, PrivacyPlan, make_plan
from fedpriv.privacy.gaussian import gaussian_epsilon
from fedpriv.privacy.own_sizes import ledgers_of, of_sizes, plan_for
from fedpriv.privacy.records import ROUNDING, RecordBound

FULL: dict[str, Any] = {"work": "full-gradient"}


def tables(local: dict[str, Any] = FULL, method: str = "dp-gd", **privacy: Any) -> dict[str, Any]:
    return {
        "name": "sizes",
        "seed": 3,
        "data": {"name": "digits", "clients": 6, "partition": "dirichlet", "concentration": 0.5},
        "model": {"name": "softmax"},
        "local": local,
        "cohort": {"sampling": "poisson", "probability": 0.7},
        "method": {"name": method},
        "privacy": {"unit": "example", "example_clip": 0.5, "noise_multiplier": 3.0, "trust": "local", **privacy},
        "training": {"rounds": 4},
    }


def plan_of(examples: int = 50, rounds: int = 9, **change: Any) -> PrivacyPlan:
    terms = ExampleTerms(**{"clip": 0.5, "examples": examples, **change})
    return make_plan(
        trust="local",
        sampling=Everyone(3),
        rounds=rounds,
        delta=1e-5,
        l2_bound=1.0,
        noise_multiplier=4.0,
        record=RecordBound(terms=terms, l2_bound=1.0),
    )


def test_the_epsilon_of_a_client_is_that_of_the_same_noise_over_its_own_part() -> None:
    plan = plan_of()
    assert plan_for(plan, 50) == plan
    assert plan_for(plan, 20) == plan  # nobody has fewer than the fewest
    for own in (51, 300):
        found = plan_for(plan, own)
        assert found.noise_stddev == pytest.approx(plan.noise_stddev, rel=1e-12)
        mu = 2.0 * 0.5 / own * (1.0 + ROUNDING) * math.sqrt(9) / plan.noise_stddev
        assert found.epsilon == pytest.approx(gaussian_epsilon(mu, 1e-5), rel=1e-9)
        made = plan_of(own)
        assert found.l2_sensitivity == made.l2_sensitivity


@pytest.mark.parametrize("change", [{"declared": True}, {"steps": 3, "rate": 0.1}])
def test_a_public_number_or_noise_on_steps_is_the_same_for_all(change: dict[str, Any]) -> None:
    plan = plan_of(**change)
    assert plan_for(plan, 500) == plan
    assert of_sizes(plan, [50, 500]) == {}


def test_least_median_and_largest_are_those_of_clients_with_records() -> None:
    plan = plan_of()
    rows = of_sizes(plan, [0, 400, 50, 100, 90, 0])["clients"]
    assert [rows[who]["examples"] for who in ("min", "median", "max")] == [400, 90, 50]
    assert rows["max"]["epsilon"] == plan.epsilon > rows["median"]["epsilon"] > rows["min"]["epsilon"]
    assert of_sizes(plan, [50, 50]) == of_sizes(None, [50]) == {}


def test_a_memory_beyond_its_slack_is_charged_as_one_of_fewer_examples() -> None:
    bound = RecordBound(terms=ExampleTerms(clip=0.5, examples=50), l2_bound=1.0, beta=0.5, cocoercive=1.0)
    plan = make_plan(
        trust="local", sampling=Everyone(3), rounds=1000, delta=1e-5, l2_bound=1.0, noise_multiplier=4.0, record=bound
    )
    most = int(bound.most_examples(1000))
    assert plan_for(plan, 10 * most) == plan_for(plan, most)
    assert plan_for(plan, most).l2_sensitivity < plan_for(plan, most // 2).l2_sensitivity


def test_a_run_tells_its_clients_apart_and_keeps_single_ledgers_to_its_owner(tmp_path: Path) -> None:
    config = parse_config(tables())
    run_experiment(config, tmp_path / "run", engine="loop")
    said = json.loads((tmp_path / "run" / "privacy.json").read_text())
    sizes = np.asarray(assemble(config).population.federation.sizes)
    assert said["clients"]["max"] == {"examples": int(sizes.min()), "epsilon": said["epsilon"]}
    assert said["clients"]["min"]["examples"] == sizes.max()
    assert said["clients"]["min"]["epsilon"] < said["epsilon"]
    for line in (said["statement"], (tmp_path / "run" / "privacy.txt").read_text()):
        assert f"({sizes.max()} examples) at least" in line
    path = tmp_path / "run" / "ledgers.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    rows = json.loads(path.read_text())["clients"]
    assert [row["examples"] for row in rows] == sizes.tolist()
    plan = assemble(config).plan
    assert plan is not None
    for row in rows:
        alone = plan_for(plan, row["examples"]).epsilon_of_participations(row["participations"])
        assert row["epsilon"] == pytest.approx(alone)
    assert {row["participations"] for row in rows} - {4}


@pytest.mark.parametrize("change", [{"examples": 100}, {"trust": "central"}])
def test_single_ledgers_are_those_of_local_trust_and_own_sizes(change: dict[str, Any], tmp_path: Path) -> None:
    run_experiment(parse_config(tables(**change)), tmp_path / "run", engine="loop")
    assert not (tmp_path / "run" / "ledgers.json").exists()
    said = json.loads((tmp_path / "run" / "privacy.json").read_text())
    assert ("clients" in said) == ("trust" in change)


def test_the_command_shows_the_same_before_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    print_plan(parse_config(tables()), None, None, as_json=True)
    shown = json.loads(capsys.readouterr().out)
    assert shown["clients"]["max"]["epsilon"] == pytest.approx(shown["epsilon"])
    print_plan(parse_config(tables()), None, None, as_json=False)
    assert "by client" in capsys.readouterr().out
    print_plan(parse_config(tables(examples=100)), None, None, as_json=False)
    assert "by client" not in capsys.readouterr().out


def test_ledgers_that_would_take_long_are_left_out() -> None:
    plan = plan_of(rate=0.1)
    assert ledgers_of(plan, list(range(50, 70)), [9] * 20) == []
    whole = ledgers_of(plan_of(), [50, 0, 60], [9, 9, 0])
    assert [row["epsilon"] for row in whole][1:] == [0.0, 0.0]

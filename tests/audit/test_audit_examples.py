"""Audits of runs that protect single examples."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from audit_cases import CLIENTS, halved, quick_audit, quick_config, quick_experiment
from support.noise_faults import replace_noise

from fedpriv.audit import AuditChoice, run_audit
from fedpriv.audit.attack import start_attack
from fedpriv.audit.canaries import CanaryPopulation, draw_canaries
from fedpriv.audit.records import with_weights
from fedpriv.engines import LoopEngine
from fedpriv.errors import UserError
from fedpriv.mechanisms.noise import StepNoise
from fedpriv.privacy.records import RecordBound
from fedpriv.rounds import Broadcast

PRIVACY: dict[str, Any] = {"unit": "example", "example_clip": 1.0, "epsilon": 8.0, "trust": "local"}
FULL = {"work": "full-gradient"}
DPGD = {"name": "dp-gd"}
NORMEC = {"name": "alpha-normec", "alpha": 1.0, "beta": 1.0, "server_normalization": False}


def audited(method: dict[str, Any], trust: str = "local", **change: Any) -> tuple[Any, dict[str, Any]]:
    changes = {"local": FULL, "method": method, "privacy": {**PRIVACY, "trust": trust}} | change
    return quick_audit(changes, canaries=100)


@pytest.mark.parametrize(
    ("method", "trust", "least"), [(DPGD, "central", 4.0), (DPGD, "local", 4.0), (NORMEC, "central", 0.5)]
)
@pytest.mark.sampled
def test_a_correct_run_is_not_convicted_and_its_claim_is_approached(
    method: dict[str, Any], trust: str, least: float
) -> None:
    findings, record = audited(method, trust)
    assert not findings.guilty
    assert least < findings.best.estimate
    assert findings.best.lower < findings.claimed == pytest.approx(8.0, rel=1e-3)
    assert "canary examples" in record["words"]
    assert record["unit"] == "example"
    assert record["population"] == CLIENTS


def test_half_the_noise_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_noise(monkeypatch, halved)
    assert audited(DPGD)[0].guilty


def test_a_sensitivity_that_forgets_that_examples_are_replaced_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    true = RecordBound.sensitivity
    monkeypatch.setattr(RecordBound, "sensitivity", lambda self, _, rounds: true(self, "add-or-remove", rounds))
    assert audited(DPGD)[0].guilty


def test_cohorts_count_the_rounds_of_a_clients_example() -> None:
    cohort = {"sampling": "poisson", "probability": 0.4}
    findings, record = audited(DPGD, "central", cohort=cohort)
    assert not findings.guilty
    assert record["claim"].startswith("epsilon of an example in its client's participations")
    assert record["epsilon_estimate"] > 0.0


DIFF = {"name": "diff2", "clip_norm": 1.0, "period": 4}
DICE = {"name": "dice-sgd", "clip_norm": 1.0, "feedback_clip": 0.001, "gradient_cap": 1.1}
BATCHES = {"work": "poisson-gradient", "rate": 0.3}
STEPS = {"work": "dp-sgd", "rate": 0.6, "steps": 2, "client_lr": 0.1, "signal": "gradient-mean"}
FREE = {"name": "dp-gd", "max_norm": 100.0}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "differences": ({**DIFF, "restart_weight": 2.0}, FULL, 1.0),
    "differences of batches": (DIFF, BATCHES, 1.0),
    "residuals": (DICE, FULL, 1.1),
    "batches": (DPGD, BATCHES, 1.0),
    "steps": (FREE, STEPS, 1.0),
}


def changes_of(case: str, rounds: int = 30, **privacy: Any) -> dict[str, Any]:
    method, local, clip = CASES[case]
    table = {**PRIVACY, "example_clip": clip, **privacy}
    return {"local": local, "method": method, "privacy": table, "training": {"rounds": rounds}}


@pytest.mark.parametrize("case", CASES)
def test_canaries_push_through_the_clients_code_as_far_as_the_auditor_says(case: str) -> None:
    experiment, rounds = quick_experiment(changes_of(case, 9)), 9
    people, size = experiment.population, experiment.population.task.layout.size
    drawn = draw_canaries(seed=1, count=20, size=size, rounds=rounds, sampling_prob=1.0, replace=True, local=True)
    canaries = with_weights(drawn, experiment)
    assert experiment.plan is not None
    assert experiment.plan.record is not None
    rules = dataclasses.replace(people.rules, noise_stddev=0.0, step_stddev=0.0)
    unit = experiment.plan.record.terms.alone * (1.0 / 2.0 if case == "steps" else 1.0)
    with start_attack(experiment, canaries, "loop") as attack:
        federation = attack.planted._population.federation  # type: ignore[attr-defined]
    made = LoopEngine(
        CanaryPopulation(
            rules=rules, task=people.task, federation=federation, work=people.work, streams=people.streams,
            canaries=canaries, first=CLIENTS, scale=1.0,
        )
    )  # fmt: skip
    cohort = np.arange(len(canaries.planted))
    for k in range(1, rounds + 1):
        sent = made.sum_messages(Broadcast(k, experiment.initial_model + float(k % 2), CLIENTS + cohort, 100)).sum
        lengths = np.ones(len(cohort)) if canaries.weights is None else canaries.weights[canaries.planted, k - 1]
        pushes = torch.stack([canaries.push(int(canaries.planted[i]), k).double() * lengths[i] for i in cohort])
        assert float(lengths.max()) > 0.0
        assert torch.allclose(sent / unit, pushes.sum(dim=0), rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("case", ["differences", "residuals", "batches", "steps"])
@pytest.mark.parametrize("faulty", [False, True])
@pytest.mark.slow
def test_half_the_noise_of_every_record_level_mechanism_is_found(
    case: str, faulty: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if faulty:
        halve_all_noise(monkeypatch)
    findings, record = quick_audit(changes_of(case), canaries=100 if case == "residuals" else 60)
    assert findings.guilty == faulty
    assert faulty or findings.best.lower < findings.claimed
    assert "batches" in record["claim"] or case in ("differences", "residuals")


def halve_all_noise(patch: pytest.MonkeyPatch) -> None:
    made = StepNoise.__init__
    replace_noise(patch, halved)
    patch.setattr(StepNoise, "__init__", lambda self, streams, stddev, *at: made(self, streams, 0.5 * stddev, *at))


def test_half_the_noise_of_differences_is_found_in_a_short_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not quick_audit(changes_of("differences", 8), canaries=50)[0].guilty
    halve_all_noise(monkeypatch)
    assert quick_audit(changes_of("differences", 8), canaries=50)[0].guilty


def test_a_residual_whose_cost_is_that_of_plain_clipping_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A canary's parts return in the next rounds, so that it moves messages by its whole gradient."""

    def plain(_: RecordBound, share: float, clip_norm: float, __: float, rounds: int) -> float:
        return share * clip_norm * math.sqrt(rounds)

    method = {**DICE, "gradient_cap": 4.0, "feedback_clip": 0.5}
    changes = changes_of("residuals", 8) | {"method": method, "privacy": {**PRIVACY, "example_clip": 4.0}}
    assert not quick_audit(changes, canaries=40)[0].guilty
    monkeypatch.setattr(RecordBound, "_of_feedback", plain)
    assert quick_audit(changes, canaries=40)[0].guilty


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"privacy": {**PRIVACY, "trust": "central"}}, 'privacy\\.trust: expected "local" in an audit of "dp-sgd"'),
        ({"local": {**STEPS, "ascent": 0.1}}, "local\\.ascent: expected 0 in an audit"),
    ],
)
def test_steps_that_messages_do_not_show_are_refused(change: dict[str, Any], line: str) -> None:
    config = quick_config({"local": STEPS, "method": FREE, "privacy": PRIVACY} | change)
    with pytest.raises(UserError, match=line):
        run_audit(config, "nowhere", AuditChoice())

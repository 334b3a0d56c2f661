"""Audits of runs that protect single examples."""

from typing import Any

import pytest
from audit_cases import CLIENTS, halved, quick_audit, quick_config

import fedpriv.mechanisms.noise
from fedpriv.audit import AuditChoice, run_audit
from fedpriv.errors import UserError
from fedpriv.privacy.records import RecordBound

PRIVACY: dict[str, Any] = {"unit": "example", "example_clip": 1.0, "epsilon": 8.0, "trust": "local"}
FULL = {"work": "full-gradient"}
DPGD = {"name": "dp-gd"}
NORMEC = {"name": "alpha-normec", "alpha": 1.0, "beta": 1.0, "server_normalization": False}


def audited(method: dict[str, Any], trust: str = "local", **change: Any) -> tuple[Any, dict[str, Any]]:
    changes = {"local": FULL, "method": method, "privacy": {**PRIVACY, "trust": trust}} | change
    return quick_audit(changes, canaries=100)


@pytest.mark.parametrize(
    ("method", "trust", "least"), [(DPGD, "local", 4.0), (DPGD, "central", 4.0), (NORMEC, "central", 0.5)]
)
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
    released = fedpriv.mechanisms.noise._released
    monkeypatch.setattr(fedpriv.mechanisms.noise, "_released", lambda *a, **more: halved(released, *a, **more))
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


def test_batches_are_refused() -> None:

    config = quick_config({"local": {"work": "poisson-gradient", "rate": 0.5}, "method": DPGD, "privacy": PRIVACY})
    with pytest.raises(UserError, match="full-gradient"):
        run_audit(config, "nowhere", AuditChoice())

"""Audits find the product guilty with injected faults, and not guilty without."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from audit_cases import (
    NOISE_FAULTS,
    PRIVACY,
    Changes,
    forgotten_by_one,
    in_every_other,
    in_half,
    quick_audit,
    quick_experiment,
    seed_bound_fault,
    seed_noise_fault,
)
from support.noise_faults import Share, replace_shares
from torch import Tensor

import fedpriv.privacy.correlation
from fedpriv.audit.statistics import epsilon_of, largest_lower, mean_lower
from fedpriv.errors import UserError
from fedpriv.mechanisms.base import Mechanism
from fedpriv.mechanisms.shares import IntegerSums
from fedpriv.methods import SideValues
from fedpriv.privacy.correlation import Banded
from fedpriv.streams import Streams

CENTRAL: Changes = {"privacy": PRIVACY}
REPLACE: Changes = {"privacy": {**PRIVACY, "adjacency": "replace"}}
LOCAL: Changes = {"privacy": {**PRIVACY, "trust": "local"}}
MEMORYLESS: Changes = {"method": {"name": "dp-fedavg", "clip_norm": 0.5}}
FULL_MEMORY: Changes = {"method": {"name": "clip21", "clip_norm": 0.5}}
SENT: Changes = {
    "method": {"name": "alpha-normec", "beta": 0.1, "server_normalization": False, "memory": "sent"},
    "privacy": {**PRIVACY, "trust": "local"},
}
AGGREGATOR: Changes = {
    "privacy": {**PRIVACY, "trust": "aggregator"},
    "aggregation": {"least_survivors": 10},
}
SIDE_VALUES: Changes = {"adaptive": {"share": 0.2}, "privacy": {**PRIVACY, "metrics_share": 0.2}}
POISSON: Changes = {"cohort": {"sampling": "poisson", "probability": 0.5}}
FIXED: Changes = {"cohort": {"sampling": "fixed", "size": 4}}

SEPARATED: Changes = {"cohort": {"sampling": "separated", "min_separation": 5}}
BANDED: Changes = {**SEPARATED, "noise": {"kind": "banded"}}
CYCLIC: Changes = {
    "cohort": {"sampling": "separated", "min_separation": 3, "probability": 0.25},
    "noise": {"kind": "cyclic-banded"},
}

RIGHT: dict[str, Changes] = {
    "central, fading memory": CENTRAL,
    "central, no memory": MEMORYLESS,
    "central, full memory": FULL_MEMORY,
    "central, replace": REPLACE,
    "central, poisson": POISSON,
    "central, poisson, no memory, replace": POISSON | MEMORYLESS | REPLACE,
    "central, fixed": FIXED,
    "local": LOCAL,
    "local, add-or-remove": {"privacy": {**PRIVACY, "trust": "local", "adjacency": "add-or-remove"}},
    "local, sent memory": SENT,
    "local, no memory, poisson": LOCAL | MEMORYLESS | POISSON,
    "central, server adam": MEMORYLESS | {"server": {"optimizer": "adam"}},
    "aggregator": AGGREGATOR,
    "aggregator, no memory": AGGREGATOR | MEMORYLESS,
    "central, public memory": {"method": {"name": "centered-clip", "clip_norm": 0.5}},
    "central, side values": FULL_MEMORY | SIDE_VALUES,
    "local, side values": MEMORYLESS | {"adaptive": {}} | LOCAL,
    "central, turns": SEPARATED | MEMORYLESS,
    "central, banded": BANDED,
    "central, banded, no memory, replace": BANDED | MEMORYLESS | REPLACE,
    "central, cyclic-banded": CYCLIC,
    "central, geometric schedule": {"noise": {"kind": "geometric-schedule"}},
    "central, small epsilon": {"privacy": {**PRIVACY, "epsilon": 0.5}},
}
SHORT: Changes = {"training": {"rounds": 12}}
LONG: Changes = {"training": {"rounds": 50}}


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.sampled
def test_a_correct_mechanism_is_not_guilty_whatever_the_canaries(name: str) -> None:
    """Directions in no run also score as they should."""
    for seed in range(1 if "local" in name else 3):
        findings, record = quick_audit(SHORT | RIGHT[name], canaries=40, seed=seed)
        assert record["verdict"] == "not guilty"
        assert record["null"]["deviation"] == pytest.approx(1.0, abs=0.1)
        assert all(finding.convicting <= finding.lower for finding in findings.scores)


def test_a_verdict_takes_999_in_a_thousand_over_all_scores_and_a_bound_what_was_asked_for() -> None:
    findings, _ = quick_audit(SHORT, canaries=40)
    whitened, largest = findings.scores[0], findings.scores[2]
    for significance, found in ((0.05 / 2, whitened.lower), (0.001 / 6, whitened.convicting)):
        assert found == pytest.approx(epsilon_of(mean_lower(findings.whitened, significance), 1e-5), abs=1e-6)
    alike = np.ones(len(findings.whitened))
    for significance, found in ((0.05, largest.lower), (0.001 / 6, largest.convicting)):
        assert found == pytest.approx(epsilon_of(largest_lower(findings.whitened, alike, significance), 1e-5), abs=1e-6)
    assert findings.best.lower == max(finding.lower for finding in findings.scores[:2])


def test_the_bound_of_a_correct_mechanism_is_near_its_claim() -> None:
    records = [quick_audit(canaries=150, seed=seed)[1] for seed in range(3)]
    assert all(record["verdict"] == "not guilty" for record in records)
    assert np.mean([record["epsilon_lower"] for record in records]) > 0.7 * records[0]["epsilon_claimed"]


def test_the_last_model_shows_a_steady_client_if_the_server_adds_the_noise_and_not_if_clients_do() -> None:
    """A sum over rounds does not hide a client that always pushes the same way; other clients' noise does."""
    central = quick_audit(MEMORYLESS, canaries=150)[1]
    assert 2.0 < central["final_model"]["epsilon_lower"] <= central["final_model"]["epsilon_estimate"]
    assert central["final_model"]["epsilon_lower"] < central["epsilon_claimed"]
    assert quick_audit(SHORT | LOCAL, canaries=40)[1]["final_model"]["epsilon_lower"] < 0.5


@pytest.mark.parametrize("fault", NOISE_FAULTS.values(), ids=NOISE_FAULTS.keys())
@pytest.mark.parametrize("plan", [CENTRAL, LONG | MEMORYLESS | REPLACE], ids=["central", "replace, no memory"])
@pytest.mark.sampled
def test_noise_that_is_wrong_at_the_server_is_found_guilty(
    plan: Changes, fault: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    seed_noise_fault(monkeypatch, fault)
    assert quick_audit(plan, canaries=100)[1]["verdict"] == "guilty"


@pytest.mark.parametrize("fault", NOISE_FAULTS.values(), ids=NOISE_FAULTS.keys())
def test_noise_that_is_wrong_at_clients_is_found_guilty(
    fault: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    seed_noise_fault(monkeypatch, fault)
    in_few_coordinates = fault in (in_half, in_every_other)  # the score of a coordinate is at most sqrt(rounds)
    plan = LOCAL if in_few_coordinates else SHORT | LOCAL
    assert quick_audit(plan, canaries=30 if in_few_coordinates else 50)[1]["verdict"] == "guilty"


def test_the_server_with_all_helpers_is_attacked_by_the_messages_and_their_own_shares() -> None:
    findings, record = quick_audit(AGGREGATOR, canaries=60, against="all-helpers")
    plan = quick_experiment(AGGREGATOR).plan
    assert plan is not None
    (sums, _, alone) = plan.adversaries()
    assert record["epsilon_claimed"] == findings.claimed == pytest.approx(alone["epsilon"], rel=1e-12)
    assert record["verdict"] == "not guilty"
    assert sums["epsilon"] < 0.6 * alone["epsilon"] < record["epsilon_lower"] <= alone["epsilon"]
    assert (record["against"], record["trust"]) == ("all-helpers", "aggregator")
    assert "all helpers" in record["adversary"]
    with pytest.raises(UserError, match="--against: expected plan"):
        quick_audit(CENTRAL, against="all-helpers")


def test_a_share_that_is_too_small_is_found_guilty_by_the_server_with_all_helpers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def half(drawn: Share, sums: IntegerSums, streams: Streams, stddev: float, *which: Any) -> Tensor:
        return drawn(sums, streams, 0.5 * stddev, *which)

    replace_shares(monkeypatch, half)
    assert quick_audit(SHORT | AGGREGATOR, canaries=50, against="all-helpers")[1]["verdict"] == "guilty"


@pytest.mark.parametrize("fault", ["half", "the same each round"])
def test_shares_that_are_wrong_are_found_guilty_in_the_sum(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(
        drawn: Share, sums: IntegerSums, streams: Streams, stddev: float, message: Tensor, round: int, client: int
    ) -> Tensor:
        if fault == "half":
            return drawn(sums, streams, 0.5 * stddev, message, round, client)
        return drawn(sums, streams, stddev, message, 1, client)

    replace_shares(monkeypatch, faulty)
    assert quick_audit(AGGREGATOR, canaries=150)[1]["verdict"] == "guilty"


@pytest.mark.parametrize("plan", [CENTRAL, LOCAL, POISSON], ids=["central", "local", "poisson"])
def test_messages_longer_than_their_bound_are_found_guilty(plan: Changes, monkeypatch: pytest.MonkeyPatch) -> None:
    seed_bound_fault(monkeypatch, 3.0)
    assert quick_audit(SHORT | plan, canaries=40)[1]["verdict"] == "guilty"


def test_bounds_that_adapt_in_the_clients_units_alone_are_found_guilty(monkeypatch: pytest.MonkeyPatch) -> None:
    """The noise is for messages of length 1, so one that is sent in units of the bound is too long."""

    def joined(self: SideValues, message: Tensor, values: Tensor) -> Tensor:
        return join(self, message, values) * 4.0

    join = SideValues.join
    monkeypatch.setattr(SideValues, "join", joined)
    plan: Changes = {"method": {"name": "dp-fedavg", "clip_norm": 4.0}}
    assert quick_audit(SHORT | plan | SIDE_VALUES, canaries=40)[1]["verdict"] == "guilty"


def test_a_bound_that_is_ignored_in_c_is_found_guilty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model large enough that the vectorized engine takes a client's step in C."""
    large: Changes = {"model": {"name": "mlp", "hidden": [224]}, "training": {"rounds": 6}, "data": DATA}
    assert quick_audit(large, canaries=40)[1]["verdict"] == "not guilty"
    seed_bound_fault(monkeypatch, 3.0)
    assert quick_audit(large, canaries=40)[1]["verdict"] == "guilty"


DATA = {"name": "digits", "clients": 8, "partition": "iid"}


@pytest.mark.parametrize("plan", [REPLACE, LOCAL], ids=["central", "local"])
def test_replace_that_is_counted_as_add_or_remove_is_found_guilty(
    plan: Changes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedpriv.privacy.plan.REPLACE_FACTOR", 1.0)
    assert quick_audit(SHORT | plan, canaries=80)[1]["verdict"] == "guilty"


def test_the_sensitivity_of_one_message_where_all_of_a_client_belong_is_found_guilty_by_the_whitened_score(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A client has six turns: the noise is sqrt(6) times too small. Weights that ignore correlation see less of it."""

    def of_one(coefficients: tuple[float, ...], rounds: int, separation: int) -> float:  # noqa: ARG001
        return sum(c * c for c in coefficients)

    assert quick_audit(BANDED | MEMORYLESS, canaries=100)[1]["verdict"] == "not guilty"
    monkeypatch.setattr("fedpriv.privacy.correlation.squared_sensitivity", of_one)
    findings, record = quick_audit(BANDED | MEMORYLESS, canaries=100)
    assert record["verdict"] == "guilty"
    assert record["epsilon_claimed"] == pytest.approx(8.0, rel=0.01)
    assert findings.best.name == "whitened"
    assert findings.scores[0].lower > 1.4 * findings.scores[1].lower


def test_a_claim_about_correlated_noise_counts_the_rounds_that_a_message_reaches() -> None:
    """The last turn of a run reaches fewer rounds, by which the claim is a little lower."""
    findings, record = quick_audit(CYCLIC, canaries=60)
    plan = quick_experiment(CYCLIC).plan
    assert plan is not None
    assert plan.noise is not None
    turns = record["participations"]["mean"] ** 0.5
    assert plan.noise.column > 1.12
    assert findings.score_claimed == pytest.approx(plan.noise.column * turns / plan.noise_multiplier, rel=0.04)


@pytest.mark.parametrize("plan", [BANDED, CYCLIC], ids=["banded", "cyclic-banded"])
def test_noise_that_takes_back_more_than_is_charged_is_found_guilty(
    plan: Changes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all coefficients at 1, sums over five rounds have the noise of one."""
    made = fedpriv.privacy.correlation.Banded.mechanism

    def all_back(self: Banded, stddev: float, bound: float, messages: int) -> Mechanism:
        return made(replace(self, coefficients=(1.0,) * 5), stddev, bound, messages)

    def not_charged(self: Banded, patterns: np.ndarray) -> np.ndarray:
        return patterns * self.column

    monkeypatch.setattr(Banded, "mechanism", all_back)
    monkeypatch.setattr(Banded, "applied", not_charged)
    assert quick_audit(LONG | plan, canaries=200)[1]["verdict"] == "guilty"


def test_noise_forgotten_by_one_client_is_found_by_the_largest_score_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seed_noise_fault(monkeypatch, forgotten_by_one)
    findings, record = quick_audit(SHORT | LOCAL, canaries=40)
    assert record["verdict"] == "guilty"
    assert [finding.name for finding in findings.scores if finding.guilty] == ["largest"]

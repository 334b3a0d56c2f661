"""A client whose operator protects single examples: the policy, the budgets of both units, and the ledger."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from fedpriv.deploy.device.device import Device
from fedpriv.deploy.device.ledger import Ledger, account_of, spent, surely_within
from fedpriv.deploy.device.policy import Accepts, Limits, Policy, load_policy
from fedpriv.errors import UserError
from fedpriv.flower.messages import ClientInstructions, RunTerms
from fedpriv.flower.privacy_terms import promised
from fedpriv.flower.refusals import Refusal
from fedpriv.methods import DPGD, Clip21, Method
from fedpriv.privacy import Everyone, ExampleTerms, PrivacyPlan, make_plan
from fedpriv.rounds import record_bound

SIZE, ROUNDS = 5, 9
EVERYONE = Everyone(4)


def plan_of(method: Method[Any, Any], trust: str = "local", **change: Any) -> PrivacyPlan:
    terms = ExampleTerms(**{"clip": 1.0, "examples": 200, "declared": True, **change})
    return make_plan(
        trust=trust,
        sampling=EVERYONE,
        rounds=ROUNDS,
        delta=1e-5,
        l2_bound=method.bounded.l2_bound,
        noise_multiplier=4.0,
        record=record_bound(method, terms),
    )


def asked(method: Method[Any, Any], plan: PrivacyPlan, turn: int = 1) -> tuple[ClientInstructions, RunTerms]:
    assert plan.record is not None
    noise = plan.message_stddev if plan.trust == "local" else 0.0
    instructions = ClientInstructions(
        method=method,
        round=turn,
        client=0,
        noise_stddev=noise,
        examples=plan.record.terms.as_text(),
        step_stddev=plan.noise_stddev if plan.record.terms.steps else 0.0,
    )
    told = {"run": "r1", "turn": turn, "last_turn": turn - 1, "epoch": 0, "digest": "d"}
    return instructions, RunTerms(**told, **promised(plan, EVERYONE, ROUNDS))


def device_of(tmp_path: Path, unit: str = "example", trust: str = "local", **limits: Any) -> Device:
    accepts = Accepts(unit=cast(Any, unit), trust=trust)
    policy = Policy(accepts=accepts, limits=Limits(**{"epsilon": 5.0, "delta": 1e-5, **limits}))
    return Device(policy, tmp_path / "home" / "state")


def send(device: Device, instructions: ClientInstructions, terms: RunTerms) -> torch.Tensor:
    return device.answer(instructions, terms, torch.zeros(SIZE), lambda: torch.full((SIZE,), 1e-3).double())


METHODS_AND_WORK = [
    pytest.param(Clip21(), {}, id="memory"),
    pytest.param(DPGD(), {"rate": 0.1}, id="batches"),
    pytest.param(DPGD(), {"rate": 0.1, "steps": 3}, id="steps"),
]


@pytest.mark.parametrize(("method", "work"), METHODS_AND_WORK)
def test_the_ledger_counts_up_to_the_plans_epsilon(
    method: Method[Any, Any], work: dict[str, Any], tmp_path: Path
) -> None:
    device, plan = device_of(tmp_path, epsilon=100.0), plan_of(method, **work)
    for turn in range(1, ROUNDS + 1):
        send(device, *asked(method, plan, turn))
    entries = Ledger(device.folder).entries()
    total = spent(entries, 1e-5, "replace", "example")
    assert total == pytest.approx(plan.epsilon, rel=1e-3)
    assert surely_within(entries, 100.0, 1e-5, "replace", "example")
    assert not surely_within(entries, 0.9 * total, 1e-5, "replace", "example")
    assert spent(entries, 1e-5, "replace", "client") > 10.0 * total
    assert "for one example" in account_of(device.folder, 100.0, 1e-5, "replace", "example")
    row = json.loads((device.folder / "ledger.jsonl").read_text().splitlines()[0])
    assert row["noise_stddev"] == plan.noise_stddev
    assert row["unit"] == "example"


@pytest.mark.parametrize("trust", ["local", "central"])
def test_a_client_protects_all_its_examples_together_unless_its_operator_says_otherwise(
    trust: str, tmp_path: Path
) -> None:
    method = Clip21()
    device = device_of(tmp_path, unit="client", trust="central")
    with pytest.raises(Refusal, match=r"accepts\.unit: expected runs that protect clients"):
        send(device, *asked(method, plan_of(method, trust)))


def test_both_budgets_hold(tmp_path: Path) -> None:
    method, plan = Clip21(), plan_of(Clip21())
    with pytest.raises(Refusal, match="for one example, over all runs"):
        send(device_of(tmp_path / "one", epsilon=0.01), *asked(method, plan))
    with pytest.raises(Refusal, match="for one client, over all runs"):
        send(device_of(tmp_path / "all", client_epsilon=8.0), *asked(method, plan))
    send(device_of(tmp_path / "both", client_epsilon=1e5), *asked(method, plan))


def test_a_run_for_clients_counts_in_the_budget_of_examples(tmp_path: Path) -> None:
    method = Clip21()
    plan = replace(plan_of(method), unit="client", record=None)
    instructions = ClientInstructions(method=method, round=1, client=0, noise_stddev=plan.noise_stddev)
    told = {"run": "r2", "turn": 1, "last_turn": 0, "epoch": 0, "digest": "d"}
    device = device_of(tmp_path)
    send(device, instructions, RunTerms(**told, **promised(plan, EVERYONE, ROUNDS)))
    entries = Ledger(device.folder).entries()
    assert spent(entries, 1e-5, "replace", "example") == spent(entries, 1e-5, "replace", "client") > 0.0


@pytest.mark.parametrize(
    ("line", "change"),
    [
        ("examples: expected gradients bounded as in the terms", {"examples": ""}),
        ("examples: expected gradients bounded as in the terms", {"examples": '{"clip": 9.0, "examples": 200}'}),
        ("noise: expected a standard deviation", {"noise_stddev": 1.0}),
        ("step_stddev|noise: expected a deviation", {"step_stddev": 1.0}),
        ("record: expected the sensitivity of this method", {"method": Clip21(clip_norm=1.0), "swap": DPGD()}),
    ],
)
def test_instructions_that_promise_more_than_they_do_are_refused(
    line: str, change: dict[str, Any], tmp_path: Path
) -> None:
    method = change.pop("method", None) or Clip21()
    plan = plan_of(change.pop("swap", None) or method)
    instructions, terms = asked(method, plan)
    with pytest.raises(Refusal, match=line):
        send(device_of(tmp_path), replace(instructions, **change), terms)


def test_a_server_must_name_the_number_that_sums_are_divided_by(tmp_path: Path) -> None:
    method = Clip21()
    with pytest.raises(Refusal, match=r"a public number of examples in the terms"):
        send(device_of(tmp_path), *asked(method, plan_of(method, declared=False)))


def test_the_unit_is_read_from_the_policy(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text('[accepts]\nunit = "example"\n[limits]\nepsilon = 3.0\ndelta = 1e-5\nclient_epsilon = 50.0\n')
    assert load_policy(path).budgets == {"example": 3.0, "client": 50.0}
    path.write_text('[accepts]\nunit = "person"\n[limits]\nepsilon = 3.0\ndelta = 1e-5\n')
    with pytest.raises(UserError, match=r"accepts\.unit"):
        load_policy(path)

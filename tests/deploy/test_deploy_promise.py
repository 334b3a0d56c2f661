"""Server and client compute the same guarantee from the same terms."""

import dataclasses
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedpriv.deploy.coordinator import Coordinator
from fedpriv.deploy.device.device import Device
from fedpriv.deploy.device.ledger import Entry, Ledger, spent
from fedpriv.deploy.device.policy import Accepts, Limits, Policy
from fedpriv.experiment.deployment import DeploymentChoice
from fedpriv.flower.messages import RunTerms
from fedpriv.flower.privacy_terms import PrivacyTerms, promised
from fedpriv.flower.refusals import Refusal
from fedpriv.methods import AlphaNormEC, DPFedAvg, Method, has_memory
from fedpriv.privacy import (
    SAMPLINGS,
    Adjacency,
    Everyone,
    ExampleTerms,
    FixedSize,
    Poisson,
    PrivacyPlan,
    RecordBound,
    Sampling,
    TrustName,
    make_plan,
)
from fedpriv.rounds import make_agreement
from fedpriv.streams import SystemStreams

SIZE, CLIENTS, ROUNDS = 3, 12, 3
SAMPLED: dict[str, Sampling] = {
    "everyone": Everyone(CLIENTS),
    "poisson": Poisson(CLIENTS, 0.3),
    "fixed": FixedSize(CLIENTS, 4),
}
METHODS: dict[str, Method] = {"memory": AlphaNormEC(alpha=1.0, beta=0.5), "none": DPFedAvg(clip_norm=0.7)}

# For each field another value than in `plan`, or the only value if a field has just one.
OTHER: dict[str, Any] = {
    "trust": "local",
    "adjacency": "replace",
    "sampling": SAMPLED["fixed"],
    "rounds": 7,
    "delta": 1e-6,
    "l2_bound": 2.5,
    "noise_multiplier": 3.0,
    "client_memory": False,
    "unit": "client",  # `example` comes with a record
    "record": RecordBound(terms=ExampleTerms(clip=0.5, examples=9, declared=True), l2_bound=1.0),
}


def plan(**changes: Any) -> PrivacyPlan:
    given: dict[str, Any] = {"trust": "central", "adjacency": "add-or-remove", "sampling": SAMPLED["poisson"]}
    given |= {"rounds": ROUNDS, "delta": 1e-5, "l2_bound": 1.0, "noise_multiplier": 1.5}
    return make_plan(**given | changes)


def test_every_field_of_a_plan_is_in_the_test_below() -> None:
    """A new field of the plan must be sent to clients, too: add it to `PrivacyTerms`, and here.

    Other files test aggregation, correlated noise and turns; deployments refuse plans under a filter.
    """
    assert {*OTHER, "aggregation", "noise", "filtered"} == {field.name for field in dataclasses.fields(PrivacyPlan)}
    assert {"everyone", "poisson", "fixed", "separated"} == set(SAMPLINGS)


@pytest.mark.parametrize("field", OTHER)
def test_every_fact_of_a_plan_reaches_the_client_and_its_ledger(field: str) -> None:
    made = plan(**({} if field == "unit" else {field: OTHER[field]}))
    facts = promised(made, made.sampling, made.rounds)
    assert PrivacyTerms(**facts).plan(made.l2_bound) == made
    entry = Entry(**facts, run="r", client=0, turn=1, request="", method="m", l2_bound=made.l2_bound, noise_stddev=0.0)
    assert entry.plan(entry.l2_bound) == made


@pytest.mark.parametrize("name", SAMPLED)
def test_every_fact_of_the_cohorts_reaches_the_client(name: str) -> None:
    made = plan(sampling=SAMPLED[name])
    assert PrivacyTerms(**promised(made, made.sampling, made.rounds)).plan(1.0).sampling == SAMPLED[name]


def served(
    method: Method, trust: TrustName, adjacency: Adjacency, sampling: Sampling, folder: Path
) -> tuple[PrivacyPlan, Device]:
    """Return a client that has answered all turns of a run with a plan."""
    made = make_plan(
        trust=trust,
        adjacency=adjacency,
        sampling=sampling,
        rounds=ROUNDS,
        delta=1e-5,
        l2_bound=method.bounded.l2_bound,
        noise_multiplier=1.5,
        client_memory=has_memory(method),
    )
    server, client, _ = make_agreement(method, sampling, made, SystemStreams())
    limits = Limits(epsilon=1e4, delta=1e-5, adjacency=adjacency)  # type: ignore[arg-type]
    device = Device(Policy(accepts=Accepts(trust="central"), limits=limits), folder / "state")
    coordinator = Coordinator(
        server=server,
        client=client,
        plan=made,
        choice=DeploymentChoice(),
        turns=ROUNDS,
        digest="d",
        state=method.init_server(torch.zeros(SIZE)),
    )
    while not coordinator.done:
        broadcast = coordinator.begin()
        instructions, terms = coordinator.instructions(0)
        answer = device.answer(instructions, terms, broadcast.model, lambda: torch.ones(SIZE))
        coordinator.last_turn[0] = broadcast.round
        coordinator.finish({}, {})
        coordinator.applied = broadcast.round  # as if it had counted
        assert len(answer) == SIZE
    return made, device


@pytest.mark.parametrize(
    ("trust", "adjacency", "sampling", "method"),
    list(itertools.product(("central", "local"), ("add-or-remove", "replace"), SAMPLED, METHODS)),
)
def test_the_ledger_charges_a_client_in_all_rounds_what_the_server_states(
    trust: TrustName, adjacency: Adjacency, sampling: str, method: str, tmp_path: Path
) -> None:
    made, device = served(METHODS[method], trust, adjacency, SAMPLED[sampling], tmp_path)
    entries = Ledger(device.folder).entries()
    assert len(entries) == ROUNDS
    assert spent(entries, made.delta, adjacency) == pytest.approx(made.epsilon, rel=1e-9)


def test_a_fixed_cohort_without_memory_is_charged_with_its_sampling() -> None:
    """Before, the ledger had 80.3 and the server 2.80, because the ledger counted every client as one with memory."""
    sampling = FixedSize(1000, 20)
    made = make_plan(
        trust="central",
        sampling=sampling,
        rounds=100,
        delta=1e-5,
        l2_bound=1.0,
        epsilon=2.8,
        client_memory=False,
    )
    facts = promised(made, sampling, 100)
    entry = Entry(**facts, run="r", client=0, turn=1, request="", method="m", l2_bound=1.0, noise_stddev=0.0)
    assert spent([entry], 1e-5, "replace") == made.epsilon <= 2.8
    remembers = replace(entry, client_memory=True)
    assert spent([remembers], 1e-5, "replace") > 10.0


def test_a_promise_from_before_memory_was_written_down_is_charged_as_with_memory() -> None:
    made = plan(sampling=SAMPLED["fixed"], client_memory=False)
    facts = promised(made, made.sampling, made.rounds)
    del facts["client_memory"], facts["unit"]
    assert PrivacyTerms(**facts).plan(1.0) == replace(made, client_memory=True)


def test_a_server_that_denies_the_memory_of_its_method_is_refused(tmp_path: Path) -> None:
    """Fixed cohorts of clients with memory are not amplified, even if the terms claim it."""
    method = METHODS["memory"]
    made = plan(sampling=SAMPLED["fixed"], client_memory=False)
    terms = RunTerms(run="r", turn=1, last_turn=0, epoch=0, digest="d", **promised(made, made.sampling, made.rounds))
    server, client, _ = make_agreement(method, made.sampling, plan(sampling=made.sampling), SystemStreams())
    coordinator = Coordinator(
        server=server,
        client=client,
        plan=plan(sampling=made.sampling),
        choice=DeploymentChoice(),
        turns=ROUNDS,
        digest="d",
        state=method.init_server(torch.zeros(SIZE)),
    )
    coordinator.begin()
    instructions, right = coordinator.instructions(0)
    device = Device(
        Policy(accepts=Accepts(trust="central"), limits=Limits(epsilon=1e4, delta=1e-4)), tmp_path / "state"
    )
    with pytest.raises(Refusal, match="client_memory: expected true with a method that has a memory"):
        device.answer(instructions, terms, torch.zeros(SIZE), lambda: torch.ones(SIZE))
    assert len(device.answer(instructions, right, torch.zeros(SIZE), lambda: torch.ones(SIZE))) == SIZE


def test_a_run_of_more_turns_than_were_accounted_does_not_begin() -> None:
    method = METHODS["none"]
    made = plan(l2_bound=0.7, client_memory=False)
    server, client, _ = make_agreement(method, made.sampling, made, SystemStreams())
    with pytest.raises(ValueError, match="the plan is for 3 turns, and the run has 4"):
        Coordinator(
            server=server,
            client=client,
            plan=made,
            choice=DeploymentChoice(),
            turns=4,
            digest="d",
            state=method.init_server(torch.zeros(SIZE)),
        )

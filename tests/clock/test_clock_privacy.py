"""The privacy cost of a timeline: per client, by participations and weights; and of rounds with a deadline."""

import itertools
import json
from dataclasses import dataclass, replace
from typing import Any

import dp_accounting as dpa
import numpy as np
import pytest
import torch
from dp_accounting.pld import PLDAccountant
from support.clocks import FREE, SCHEDULES, STEADY, UNEQUAL, clock, entries, sampling_of, timeline
from torch import Tensor

from fedpriv.clock import FedBuff, FedFix, Synchronous, Timeline
from fedpriv.engines.fused_noise import FusedNoise
from fedpriv.errors import UserError
from fedpriv.experiment.timing import Versions
from fedpriv.mechanisms.noise import Gaussian, release_clients_sum
from fedpriv.methods import DPFedAvg
from fedpriv.privacy import (
    Everyone,
    FixedSize,
    PrivacyPlan,
    Sampling,
    Scheduled,
    Simulated,
    TrustName,
    make_plan,
    privacy_statement,
)
from fedpriv.rounds import Broadcast, ClientRules, ServerRules, Total
from fedpriv.streams import SeededStreams

every_free_schedule = pytest.mark.parametrize("name", FREE)


def plan_of(sampling: Sampling, rounds: int, trust: TrustName = "central", **change: Any) -> PrivacyPlan:
    given = {"delta": 1e-5, "l2_bound": 0.5, "noise_multiplier": 2.0, **change}
    return make_plan(trust=trust, sampling=sampling, rounds=rounds, **given)


def composed(noise_multiplier: float, weights: list[float], delta: float = 1e-5) -> float:
    """Return epsilon of sequential Gaussian releases, by dp-accounting, with sensitivity `weight` each."""
    accountant = PLDAccountant(value_discretization_interval=1e-3)
    events: list[dpa.DpEvent] = [dpa.GaussianDpEvent(noise_multiplier / weight) for weight in weights]
    return accountant.compose(dpa.ComposedDpEvent(events)).get_epsilon(delta)


@pytest.mark.parametrize("seed", [1, 2])
@every_free_schedule
def test_the_worst_clients_weights_composed_one_by_one_cost_the_same(name: str, seed: int) -> None:
    made = timeline(name, seed=seed, steps=14)
    plan = plan_of(made.scheduled(), 14, noise_multiplier=3.0)
    for after in (3, 14):
        weights = [[w for step, _, w in steps if step <= after] for steps in entries(made).values()]
        worst = max(weights, key=lambda mine: sum(w**2 for w in mine))
        expected = composed(3.0, worst) if worst else 0.0
        assert plan.epsilon_after(after) == pytest.approx(expected, rel=0.01, abs=1e-3)


@every_free_schedule
def test_charges_are_those_of_a_count_by_hand(name: str) -> None:
    made = timeline(name)
    scheduled = made.scheduled()
    for step in range(1, 26):
        squares = [sum(w**2 for k, _, w in steps if k <= step) for steps in entries(made).values()]
        sent = np.bincount(np.concatenate([one.sent for one in made.steps[:step]]), minlength=16)
        assert scheduled.charge(step, each_message=False) == pytest.approx(max(squares, default=0.0), rel=1e-12)
        assert scheduled.charge(step, each_message=True) == sent.max()
    assert scheduled.charge(0, each_message=True) == 0.0
    with pytest.raises(ValueError, match="25"):
        scheduled.charge(26, each_message=False)


@pytest.mark.parametrize("trust", ["central", "local"])
@every_free_schedule
def test_epsilon_never_falls_and_ends_at_the_plans(name: str, trust: TrustName) -> None:
    plan = plan_of(timeline(name).scheduled(), 25, trust)
    spent = [plan.epsilon_after(step) for step in range(26)]
    assert spent[0] == 0.0
    assert all(before <= after for before, after in itertools.pairwise(spent))
    assert spent[-1] == plan.epsilon > 0.0


@every_free_schedule
def test_noise_for_a_target_follows_what_a_client_does_and_not_the_number_of_steps(name: str) -> None:
    scheduled = timeline(name).scheduled()
    plan = plan_of(scheduled, 25, epsilon=4.0, noise_multiplier=None)
    assert 3.9 < plan.epsilon <= 4.0
    once = plan_of(Everyone(16), 1, adjacency="replace", epsilon=4.0, noise_multiplier=None)
    expected = once.noise_multiplier * np.sqrt(scheduled.squares[-1])
    assert plan.noise_multiplier == pytest.approx(expected, rel=0.01)
    always = plan_of(Everyone(16), 25, adjacency="replace", epsilon=4.0, noise_multiplier=None)
    assert abs(plan.noise_multiplier / always.noise_multiplier - 1.0) > 0.02


def test_weights_are_not_forgotten() -> None:
    windows = FedFix(window=1.0).timeline(clock(STEADY, 12), Everyone(12), 25, memory=False, hidden=False)
    equal = FedFix(window=1.0).timeline(clock(STEADY, 12), Everyone(12), 25, memory=True, hidden=False)
    assert plan_of(windows.scheduled(), 25).epsilon > 1.5 * plan_of(equal.scheduled(), 25).epsilon
    stale, fresh = (
        FedBuff(buffer_size=2, concurrency=12, staleness_exponent=a).timeline(
            clock(STEADY, 12), Everyone(12), 25, memory=False, hidden=False
        )
        for a in (2.0, 0.0)
    )
    assert plan_of(stale.scheduled(), 25).epsilon < 0.8 * plan_of(fresh.scheduled(), 25).epsilon


def test_over_selection_gets_no_amplification_although_its_cohorts_are_drawn() -> None:
    sampled = FixedSize(400, 20)
    made = Synchronous(over_select=1.2).timeline(clock(UNEQUAL, 400), sampled, 25, memory=False, hidden=True)
    first = plan_of(made.scheduled(), 25, client_memory=False)
    assert not first.amplification
    drawn = plan_of(sampled, 25, adjacency="replace", client_memory=False)
    assert drawn.amplification
    worst = max(len(steps) for steps in entries(made).values())
    whole = plan_of(Everyone(400), worst, adjacency="replace")
    assert first.epsilon == pytest.approx(whole.epsilon, rel=1e-9)
    assert first.epsilon > drawn.epsilon


@every_free_schedule
@pytest.mark.parametrize("trust", ["central", "local"])
def test_only_replace_is_offered_and_is_the_default(name: str, trust: TrustName) -> None:
    scheduled = timeline(name).scheduled()
    assert plan_of(scheduled, 25, trust).adjacency == "replace"
    with pytest.raises(UserError, match=r"privacy\.adjacency"):
        plan_of(scheduled, 25, trust, adjacency="add-or-remove")
    with pytest.raises(ValueError, match="replace"):
        replace(plan_of(scheduled, 25, trust).releases, adjacency="add-or-remove").epsilon(1.0, rounds=3)


def test_where_the_server_sees_messages_those_it_did_not_use_are_charged() -> None:
    made = timeline("over-selection", devices=STEADY)
    plan = plan_of(made.scheduled(), 25, "local")
    asked = np.bincount(np.concatenate([step.asked for step in made.steps]), minlength=16)
    counted = max(len(steps) for steps in entries(made).values())
    assert counted < asked.max()
    assert plan.epsilon == plan.epsilon_of_participations(int(asked.max()))
    assert plan.epsilon == plan_of(Everyone(16), int(asked.max()), "local").epsilon


def test_where_the_server_sees_messages_weights_do_not_count() -> None:
    made = FedFix(window=1.0).timeline(clock(STEADY, 12), Everyone(12), 25, memory=False, hidden=False)
    most = np.bincount(np.concatenate([step.sent for step in made.steps])).max()
    assert plan_of(made.scheduled(), 25, "local").epsilon == plan_of(Everyone(12), int(most), "local").epsilon


def test_where_the_server_sees_messages_those_still_on_their_way_at_the_end_are_charged() -> None:
    made = FedBuff(buffer_size=10, concurrency=300).timeline(
        clock(STEADY, 300), Everyone(300), 20, memory=False, hidden=False
    )
    counted = [len(entries(made).get(client, ())) for client in range(300)]
    sent = np.array(counted) + np.isin(np.arange(300), made.steps[-1].late)
    assert len(made.steps[-1].late) == 290
    plan = plan_of(made.scheduled(), 20, "local")
    assert sent.max() == max(counted) + 1
    assert plan.epsilon == plan.epsilon_of_participations(int(sent.max()))
    assert plan.epsilon_after(19) < plan.epsilon


@pytest.mark.parametrize("sampling", [Everyone(16), FixedSize(16, 8)])
def test_rounds_with_a_deadline_keep_the_account_of_their_cohorts(sampling: Sampling) -> None:
    rule = Synchronous(deadline=5.0)
    assert rule.draws_cohorts
    made = rule.timeline(clock(UNEQUAL, 16), sampling, 10, memory=False, hidden=True)
    assert made.expected_size == sampling.expected_size
    assert sum(len(step.counted) for step in made.steps) < 10 * sampling.expected_size


def test_a_release_moves_by_exactly_what_is_charged() -> None:
    """Two populations differ in one client with messages B e and -B e: return the squared move of all sums."""
    for name in FREE:
        made = timeline(name)
        worst = max(_moved(made, client) for client in range(16))
        assert worst == pytest.approx(4.0 * made.scheduled().squares[-1], rel=1e-12)


@dataclass
class _Told:
    """An engine with clients that send 1, except for one that sends the opposite."""

    other: int | None
    name: str = "told"
    forward: None = None

    def sum_messages(self, broadcast: Broadcast) -> Total:
        messages = [-1.0 if client == self.other else 1.0 for client in broadcast.cohort.tolist()]
        total = torch.full_like(broadcast.model, sum(messages), dtype=torch.float64)
        return Total(total, len(messages), 0, 1.0)

    def save(self) -> dict[str, Tensor]:
        return {}

    def restore(self, tensors: dict[str, Tensor]) -> None: ...

    def close(self) -> None: ...


def _moved(made: Timeline, client: int) -> float:
    rules = ServerRules(
        method=DPFedAvg(clip_norm=1.0), sampling=made.scheduled(), mechanism=Gaussian(0.0), streams=SeededStreams(0)
    )
    squared = 0.0
    versions = Versions(made)
    for step in made.steps:
        versions.moved(step.number - 1, torch.zeros(1))
        ours, theirs = (versions.total(_Told(other), rules, step.number).sum for other in (None, client))
        squared += float(((ours - theirs) ** 2).sum())
    return squared


def test_every_part_of_a_step_has_noise_of_its_own() -> None:
    streams = SeededStreams(3)
    zero = torch.zeros(50, dtype=torch.float64)
    first, second = (release_clients_sum(streams, 1.0, zero, 4, 9, part) for part in (0, 1))
    assert torch.equal(first, release_clients_sum(streams, 1.0, zero, 4, 9))
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 0.8
    rules = ClientRules(method=DPFedAvg(clip_norm=1.0), noise_stddev=1.0, streams=streams)
    engine, ids = FusedNoise(_Told(None), rules), np.arange(9)
    sums = [engine.sum_messages(Broadcast(4, torch.zeros(50), ids, 9, part)).sum for part in (0, 1, 0)]
    assert torch.equal(sums[0], sums[2])
    assert not torch.equal(sums[0], sums[1])


@every_free_schedule
@pytest.mark.parametrize("trust", ["central", "local"])
def test_the_statement_names_the_scheme_and_claims_nothing_for_chance(name: str, trust: TrustName) -> None:
    plan = plan_of(timeline(name).scheduled(), 25, trust, noise_multiplier=8.0)
    text = " ".join(
        privacy_statement(plan, method="a method", randomness="seeded", simulated=Simulated(clock=True)).split()
    )
    words = {
        "over-selection": "the first to answer count",
        "fedbuff": "FedBuff",
        "fedfix": "FedFix",
        "token": "along a graph",
    }
    assert words[timeline(name).scheme] in text
    for part in ("no amplification by sampling", "participation is visible", "numbers of examples", "public"):
        assert part in text
    assert trust == "central" or "every round" not in text
    assert ("the client that sends the most messages in this timeline" in text) == (trust == "local")
    json.dumps(plan.as_dict(), allow_nan=False)
    assert plan.as_dict()["sampling"]["scheme"] == timeline(name).scheme


def test_a_timeline_is_an_address_and_its_account_cannot_be_faulty() -> None:
    good = timeline("fedbuff").scheduled()
    assert good == timeline("fedbuff").scheduled()
    assert hash(good) == hash(timeline("fedbuff").scheduled())
    assert good.sampling_prob == 4 / 16
    for change in ({"squares": ()}, {"squares": good.squares[::-1]}, {"expected_size": 0.0}, {"sent": good.sent[1:]}):
        with pytest.raises(ValueError, match=r"timeline|falls"):
            replace(good, **change)
    with pytest.raises(ValueError, match="finite"):
        replace(good, squares=(float("nan"), *good.squares[1:]))
    with pytest.raises(ValueError, match="no cohort is drawn"):
        good.cohort(SeededStreams(0).source(0))  # pyright: ignore[reportArgumentType]
    nobody = Scheduled(4, 1.0, "fedfix", (0.0,), (0,))
    assert plan_of(nobody, 1).epsilon == 0.0
    with pytest.raises(ValueError, match="nothing to calibrate"):
        plan_of(nobody, 1, epsilon=1.0, noise_multiplier=None)


def test_all_schedules_are_looked_at() -> None:
    assert {timeline(name).scheme for name in FREE} == {"over-selection", "fedbuff", "fedfix", "token"}
    assert all(SCHEDULES[name][0].draws_cohorts == (name not in FREE) for name in SCHEDULES)
    assert sampling_of("everyone", 3) == Everyone(3)

"""The privacy filter: its accounting against exact sums, adversarial controllers, and what a controller sees."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import dp_accounting
import numpy as np
import pytest
import torch
from dp_accounting.pld.pld_privacy_accountant import PLDAccountant
from scipy.stats import norm as normal
from support.helpers import same
from torch import Tensor

import fedpriv.mechanisms.filtered
from fedpriv.errors import UserError
from fedpriv.mechanisms.controllers import CONTROLLERS, Controller, LinearDecay, Seen, SignalToNoise
from fedpriv.mechanisms.filtered import UNITS, Filtered, FilterState
from fedpriv.mechanisms.noise import release_sum
from fedpriv.methods import Clip21, DPFedAvg
from fedpriv.privacy import Everyone, FixedSize, Poisson, PrivacyPlan, make_plan, privacy_statement, read_plan
from fedpriv.rounds import begin_round, finish_round, make_agreement
from fedpriv.streams import SeededStreams

STREAMS = SeededStreams(5)
MOVED = 0.7


@dataclass(frozen=True)
class Does:
    """A controller that asks for what a function of its sight says, as a multiple of the planned noise."""

    factor: Callable[[Seen], float]
    seen: list[Seen] = field(default_factory=list)

    def noise_multiplier(self, seen: Seen) -> float:
        self.seen.append(seen)
        return self.factor(seen) * seen.planned


def filtered(controller: Controller, rounds: int = 20, planned: float = 1.3) -> Filtered:
    return Filtered(controller=controller, planned=planned, moved=MOVED, rounds=rounds)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The standard deviations with which sums were really released."""
    found: list[float] = []

    def watched(streams: Any, stddev: float, total: Tensor, round: int) -> Tensor:
        found.append(stddev)
        return release_sum(streams, stddev, total, round)

    monkeypatch.setattr(fedpriv.mechanisms.filtered, "release_sum", watched)
    return found


def played(mechanism: Filtered, total: Tensor | None = None, rounds: int | None = None) -> list[FilterState]:
    """Run until the filter stops; return the states."""
    total = torch.zeros(8, dtype=torch.float64) if total is None else total
    states = [mechanism.init(len(total))]
    while not states[-1].stopped and len(states) <= (mechanism.rounds if rounds is None else rounds):
        states.append(mechanism.noise(states[-1], total, STREAMS, len(states))[1])
    return states


def cost(stddevs: list[float]) -> Fraction:
    """Return the sum of the squares of sensitivity over deviation, exactly."""
    return sum((Fraction(MOVED) / Fraction(stddev)) ** 2 for stddev in stddevs) or Fraction(0)


def budget(mechanism: Filtered) -> Fraction:
    return mechanism.rounds / Fraction(mechanism.planned) ** 2


@pytest.mark.parametrize("seed", range(25))
def test_no_controller_passes_the_budget_and_none_is_stopped_before(seed: int, used: list[float]) -> None:
    """The reference adds exact fractions of the deviations that were really used."""
    rng = np.random.default_rng(seed)
    spread = rng.choice([0.01, 0.5, 3.0])
    wild = Does(lambda seen: float(np.clip(np.exp(spread * rng.normal()) * (seen.ratio or 1.0), 2e-3, 500.0)))
    mechanism = filtered(wild, rounds=int(rng.integers(1, 60)), planned=float(rng.choice([1e-2, 1.3, 4e5])))
    states = played(mechanism)
    assert cost(used) <= budget(mechanism)
    assert [state.share for state in states] == sorted({state.share for state in states})
    spent = cost(used) / budget(mechanism)
    assert states[-1].share == pytest.approx(float(spent), rel=1e-9)
    asked = [seen for seen in wild.seen if seen.round <= mechanism.rounds]
    assert len(asked) == len(used) + (len(used) < mechanism.rounds)
    assert states[-1].stopped


def test_a_run_stops_exactly_before_the_round_that_it_cannot_pay(used: list[float]) -> None:
    """Half of the noise costs four times: five of 20 rounds; a sixth, or a bit less noise, is too much."""
    assert len(played(filtered(Does(lambda _: 0.5)))) - 1 == len(used) == 5
    assert cost(used) == pytest.approx(float(budget(filtered(LinearDecay()))), rel=1e-12)
    assert len(played(filtered(Does(lambda _: 0.5 * (1.0 - 1e-6))))) - 1 == 4
    assert len(played(filtered(Does(lambda seen: 1.0 if seen.round < 20 else 0.999)))) - 1 == 19


@pytest.mark.parametrize("rounds", [1, 2, 3, 7, 10, 49, 64, 200])
@pytest.mark.parametrize("ratio", [0.01, 0.3, 0.5, 0.999, 1.0])
def test_linear_decay_spends_the_budget_in_exactly_its_rounds(rounds: int, ratio: float, used: list[float]) -> None:
    mechanism = filtered(LinearDecay(ratio=ratio), rounds=rounds)
    assert len(played(mechanism)) - 1 == rounds
    assert float(cost(used) / budget(mechanism)) == pytest.approx(1.0, rel=1e-9)
    if rounds > 2:
        assert used[-1] / used[0] == pytest.approx(ratio, rel=1e-9)
        assert np.allclose(np.diff(used), (used[-1] - used[0]) / (rounds - 1), rtol=1e-4, atol=1e-9 * used[0])


@pytest.mark.parametrize("rounds", [3, 10, 100])
def test_constant_noise_is_the_plans_and_costs_what_another_accountant_says(rounds: int, used: list[float]) -> None:
    plan = planned(rounds=rounds, epsilon=3.0)
    mechanism = Filtered(
        controller=LinearDecay(ratio=1.0), planned=plan.noise_multiplier, moved=plan.l2_sensitivity, rounds=rounds
    )
    played(mechanism)
    assert used == pytest.approx([plan.noise_stddev] * rounds, rel=1e-12)
    assert min(used) >= plan.noise_stddev
    accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    accountant.compose(dp_accounting.GaussianDpEvent(plan.noise_multiplier), rounds)
    assert plan.epsilon <= 3.0
    assert accountant.get_epsilon(1e-5) == pytest.approx(plan.epsilon, rel=2e-3)
    half = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    half.compose(dp_accounting.GaussianDpEvent(plan.noise_multiplier * math.sqrt(2.0)), rounds)
    assert half.get_epsilon(1e-5) == pytest.approx(plan.epsilon_of_share(0.5), rel=2e-3)


@pytest.mark.parametrize("goal", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("stops", [True, False])
def test_an_adversary_that_chooses_noise_by_luck_learns_no_more_than_one_gaussian(goal: float, stops: bool) -> None:
    """It spends more when its loss is small. If it also stops when the loss is large, it learns less."""
    rounds, runs, mu = 12, 200_000, 1.2
    rng, losses, spent = np.random.default_rng(1), np.zeros(runs), np.zeros(runs)
    for number in range(rounds):
        squares = np.where(losses < 0.0, 3.0, 0.5) * mu**2 / rounds
        squares = np.minimum(squares if number < rounds - 1 else mu**2, mu**2 - spent)
        squares = np.where(losses > goal, 0.0, squares) if stops else squares
        losses += np.sqrt(squares) * rng.normal(size=runs) + 0.5 * squares
        spent += squares
    excess = np.maximum(-np.expm1(goal - losses), 0.0)
    exact = normal.cdf(mu / 2 - goal / mu) - math.exp(goal) * normal.cdf(-mu / 2 - goal / mu)
    error = 4.0 * excess.std() / math.sqrt(runs)
    if stops:
        assert 0.0 < excess.mean() < exact
    else:
        assert excess.mean() == pytest.approx(exact, abs=error)


def test_a_controller_sees_a_few_numbers_that_follow_from_the_noised_sum() -> None:
    """Two sums that round to the same release show the same numbers, and there is nothing else to see."""
    total = torch.linspace(-2.0, 2.0, 8, dtype=torch.float64)
    other = total + 1e-12 * torch.sin(torch.arange(8, dtype=torch.float64))
    views: list[list[Seen]] = []
    ends: list[tuple[Tensor, FilterState]] = []
    for sums in (total, other):
        controller = Does(lambda seen: 0.9 if seen.ratio is None else min(max(seen.ratio, 0.5), 1.5))
        mechanism = filtered(controller)
        state = mechanism.init(8)
        for number in (1, 2, 3):
            released, state = mechanism.noise(state, sums, STREAMS, number)
        views.append(controller.seen)
        ends.append((released, state))
    assert not torch.equal(total, other)
    assert torch.equal(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]
    assert views[0] == views[1]
    assert {type(value) for seen in views[0] for value in dataclasses.astuple(seen)} == {int, float, type(None)}
    names = ("round", "rounds", "planned", "left", "last", "ratio")
    assert tuple(part.name for part in dataclasses.fields(Seen)) == names
    with pytest.raises(dataclasses.FrozenInstanceError):
        views[0][0].round = 3  # type: ignore[misc]


def test_what_it_sees_is_right() -> None:
    controller = Does(lambda _: 0.8)
    mechanism = filtered(controller, rounds=4)
    total = torch.full((400,), 2.0, dtype=torch.float64)
    released, _ = mechanism.noise(mechanism.init(400), total, STREAMS, 1)
    first, second = controller.seen
    stddev = 0.8 * 1.3 * MOVED
    assert first == Seen(round=1, rounds=4, planned=1.3, left=1.0)
    assert (second.round, second.rounds, second.planned) == (2, 4, 1.3)
    assert second.left == pytest.approx(1.0 - 1.0 / 0.64 / 4.0)
    assert second.last == pytest.approx(0.8 * 1.3)
    assert second.ratio == pytest.approx(float(released.norm()) / stddev / 20.0)
    assert second.ratio == pytest.approx(math.hypot(1.0, 2.0 / stddev), rel=0.1)


def test_signal_to_noise_follows_the_signal_within_its_limits() -> None:
    rule = SignalToNoise(target=2.0, rate=1.5, least=0.25, most=3.0)
    seen = Seen(round=5, rounds=9, planned=4.0, left=0.5, last=5.0, ratio=math.sqrt(1.0 + 2.4**2))
    assert rule.noise_multiplier(seen) == pytest.approx(5.0 * 1.2)
    assert rule.noise_multiplier(replace(seen, ratio=9.0)) == pytest.approx(5.0 * 1.5)
    assert rule.noise_multiplier(replace(seen, ratio=9.0, last=11.0)) == 12.0
    assert rule.noise_multiplier(replace(seen, ratio=0.9)) == pytest.approx(5.0 / 1.5)
    assert rule.noise_multiplier(replace(seen, ratio=0.9, last=1.2)) == 1.0
    assert rule.noise_multiplier(Seen(round=1, rounds=9, planned=4.0, left=1.0)) == 4.0
    loud, silent = (played(filtered(SignalToNoise()), torch.full((64,), size)) for size in (50.0, 0.0))
    assert len(loud) - 1 == 20
    assert loud[-1].share < 0.5
    assert 5 <= len(silent) - 1 < 10


@pytest.mark.parametrize("asked", [math.nan, math.inf, 0.0, -1.0, 1e-4, 1e4, True, "1"])
def test_noise_out_of_range_is_refused(asked: Any) -> None:
    class Wrong:
        def noise_multiplier(self, seen: Seen) -> float:
            return asked

    with pytest.raises(UserError, match=r"controller.kind: expected a noise multiplier from 0.0013 to 1300 in round 1"):
        filtered(Wrong()).init(3)


def test_a_stopped_filter_releases_nothing() -> None:
    mechanism, total = filtered(LinearDecay(), rounds=3), torch.zeros(4, dtype=torch.float64)
    stopped = played(mechanism)[-1]
    begun = mechanism.init(4)
    wrong = [
        stopped,
        begun._replace(filter_spent=torch.tensor([UNITS])),
        begun._replace(filter_next=torch.tensor([-5])),
    ]
    for state in wrong:
        with pytest.raises(ValueError, match="nothing more may be released"):
            mechanism.noise(state, total, STREAMS, 4)
    assert filtered(LinearDecay(), rounds=0).init(4).stopped
    assert mechanism.multiplier(0) == math.inf


def planned(rounds: int = 10, epsilon: float = 2.0, **changes: Any) -> PrivacyPlan:
    table: dict[str, Any] = {"trust": "central", "sampling": Everyone(50), "delta": 1e-5, "l2_bound": 0.5}
    plan = make_plan(**{**table, "rounds": rounds, "noise_multiplier": 1.0, **changes})
    return plan.under_filter(epsilon)


def test_the_promise_is_the_budget_and_credits_no_sampling() -> None:
    whole = planned()
    for sampling in (Poisson(50, 0.1), FixedSize(50, 5)):
        plan = planned(sampling=sampling)
        assert plan.noise_multiplier == whole.noise_multiplier
        assert not plan.amplification
    assert 1.99 < whole.epsilon <= 2.0
    assert whole.epsilon_after(0) == 0.0
    assert whole.mu_after(0) == 0.0
    assert whole.epsilon_after(1) == whole.epsilon_after(7) == whole.epsilon
    assert whole.mu_after(1) == whole.gaussian_dp_mu == pytest.approx(math.sqrt(10.0) / whole.noise_multiplier)
    assert whole.epsilon_of_share(0.0) == 0.0
    assert whole.epsilon_of_share(1.0) == whole.epsilon
    assert read_plan(whole.as_dict(), "privacy.json") == whole
    mechanism = Filtered(controller=LinearDecay(), planned=whole.noise_multiplier, moved=0.5, rounds=10)
    assert mechanism.event(0.5, 1) == pytest.approx(whole.gaussian_dp_mu)
    assert mechanism.event(0.5, 0) == mechanism.sensitivity(0.5, 0) == 0.0
    assert mechanism.stddev == whole.noise_stddev
    text = " ".join(privacy_statement(planned(sampling=Poisson(50, 0.1)), method="m", randomness="seeded").split())
    assert f"exceeds the square of mu = {whole.gaussian_dp_mu:.6g} (rho = {whole.zcdp_rho:.6g}" in text
    assert "fully adaptive" in text
    assert "Epsilon relies on the adversary not knowing who took part" not in text


def test_a_filter_is_offered_for_central_trust_alone() -> None:
    with pytest.raises(ValueError, match=r"^filtered: expected .*, got trust local"):
        planned(trust="local")
    with pytest.raises(UserError, match=r"noise_multiplier: expected above 0 with \[controller\]"):
        make_plan(
            trust="central", sampling=Everyone(5), rounds=1, delta=1e-5, l2_bound=1.0, noise_multiplier=0.0
        ).under_filter(None)


def test_plan_and_controller_come_together() -> None:
    method, plan = DPFedAvg(clip_norm=0.5), planned()
    with pytest.raises(ValueError, match="a controller needs a plan with a filter"):
        make_agreement(method, Everyone(50), plan, STREAMS)
    with pytest.raises(ValueError, match="a controller needs a plan with a filter"):
        make_agreement(method, Everyone(50), replace(plan, filtered=False), STREAMS, LinearDecay())


def test_the_spent_budget_is_in_the_servers_state_and_stays_when_memories_are_reset() -> None:
    plan = planned(rounds=3)
    server = make_agreement(Clip21(clip_norm=0.5), Everyone(50), plan, STREAMS, LinearDecay()).server
    state: Any = server.init(torch.zeros(6))
    assert server.filtered(state) is not None
    for number in (1, 2):
        begin_round(server, state, number)
        state = finish_round(server, state, number, torch.zeros(6, dtype=torch.float64))
    spent = server.filtered(state)
    assert spent is not None
    assert not spent.stopped
    assert 0.3 < spent.share < 0.7
    assert server.last_stddev(state) == pytest.approx(server.noise_stddev * 0.75 * math.sqrt((1 + 1 / 0.5625 + 4) / 3))
    again = server.filtered(server.reset_memories(state))
    assert again is not None
    assert all(same(a, b) for a, b in zip(again, spent, strict=True))
    plain = make_agreement(Clip21(clip_norm=0.5), Everyone(50), replace(plan, filtered=False), STREAMS).server
    assert plain.filtered(plain.init(torch.zeros(6))) is None
    assert plain.last_stddev(plain.init(torch.zeros(6))) == plain.noise_stddev


def test_controllers_have_names() -> None:
    assert {name: CONTROLLERS[name] for name in CONTROLLERS} == {
        "linear-decay": LinearDecay,
        "signal-to-noise": SignalToNoise,
    }

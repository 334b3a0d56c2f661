"""One round: the sum over the expected cohort, noise on exactly one side, and never the same noise twice."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from support.federations import advance, client_rules, models_of, setting
from support.helpers import EXAMPLES, FALSE_ALARM, LINEAR, accepts_variance, fresh_clients, same
from torch import Tensor

import strategies
from fedpriv.engines import LoopEngine
from fedpriv.errors import UserError
from fedpriv.mechanisms.noise import Gaussian
from fedpriv.methods import AlphaNormEC, Clip21, DPFedAvg, Method, NormalizedSGD, server_step
from fedpriv.methods.memoryless import NoMemory
from fedpriv.privacy import Everyone, FixedSize, Poisson, Sampling, TrustName, make_plan
from fedpriv.rounds import (
    Broadcast,
    ClientRules,
    ServerRules,
    Total,
    apply_client_rule,
    begin_round,
    client_round,
    finish_round,
    make_agreement,
    signal_to_noise,
)
from fedpriv.streams import Purpose, SeededStreams, SystemStreams

SIZE = 50_000
SENT = AlphaNormEC(alpha=1.0, beta=0.5, memory="sent")
STREAMS = SeededStreams(1)
every_method = pytest.mark.parametrize("method", EXAMPLES.values(), ids=EXAMPLES.keys())


def plan_of(method: Method, sampling: Sampling, trust: TrustName, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "rounds": 10,
        "delta": 1e-5,
        "l2_bound": method.bounded.l2_bound,
        "noise_multiplier": 0.8,
    }
    return make_plan(trust=trust, sampling=sampling, **settings | changes)


def trust_for(method: Method) -> TrustName:
    return "local" if method.needs_client_noise else "central"


class TestAgreement:
    @every_method
    @pytest.mark.parametrize("sampling", [Everyone(20), Poisson(20, 0.25), FixedSize(20, 4)])
    def test_noise_goes_to_exactly_one_side_by_trust(self, method: Method, sampling: Sampling) -> None:
        local = plan_of(method, sampling, "local")
        server, client, _ = make_agreement(method, sampling, local, STREAMS)
        assert (server.noise_stddev, client.noise_stddev) == (0.0, local.noise_stddev)
        if not method.needs_client_noise:
            central = plan_of(method, sampling, "central")
            server, client, _ = make_agreement(method, sampling, central, STREAMS)
            assert (server.noise_stddev, client.noise_stddev) == (central.noise_stddev, 0.0)

    def test_it_is_one_value_for_engines_and_strategies(self) -> None:
        method = NormalizedSGD()
        plan = plan_of(method, Everyone(3), "local")
        agreed = make_agreement(method, Everyone(3), plan, STREAMS)
        assert agreed.plan is plan
        assert strategies.Agreement is type(agreed)
        assert (
            agreed
            == make_agreement(method, Everyone(3), plan, STREAMS)
            != make_agreement(method, Everyone(3), None, STREAMS)
        )

    @every_method
    def test_without_a_plan_nobody_adds_noise(self, method: Method) -> None:
        server, client, _ = make_agreement(method, Everyone(3), None, STREAMS)
        assert (server.noise_stddev, client.noise_stddev) == (0.0, 0.0)

    @every_method
    @pytest.mark.parametrize(
        ("trust", "adjacency", "factor"), [("central", "add-or-remove", 1.0), ("local", "replace", 2.0)]
    )
    def test_the_noise_is_the_multiplier_times_the_sensitivity(
        self, method: Method, trust: TrustName, adjacency: str, factor: float
    ) -> None:
        if method.needs_client_noise and trust == "central":
            return
        plan = plan_of(method, Everyone(3), trust, adjacency=adjacency)
        server, client, _ = make_agreement(method, Everyone(3), plan, STREAMS)
        wanted = 0.8 * factor * method.bounded.l2_bound
        assert server.noise_stddev + client.noise_stddev == pytest.approx(wanted, rel=1e-12)

    def test_both_sides_follow_the_same_method_and_streams(self) -> None:
        method = Clip21(clip_norm=0.3)
        server, client, _ = make_agreement(method, Everyone(3), None, STREAMS)
        assert server.method is client.method is method
        assert server.streams is client.streams is STREAMS
        assert server.sampling == Everyone(3)

    @pytest.mark.parametrize("damping", [0.0, 0.1])
    def test_sent_memory_with_central_trust_is_refused_in_one_line(self, damping: float) -> None:
        method = dataclasses.replace(SENT, damping=damping)
        plan = plan_of(method, Everyone(3), "central")
        with pytest.raises(UserError, match=r'^method\.memory: expected privacy\.trust = "local"') as caught:
            make_agreement(method, Everyone(3), plan, STREAMS)
        assert "\n" not in str(caught.value)

    def test_sent_memory_without_a_plan_is_the_non_private_method(self) -> None:
        make_agreement(SENT, Everyone(3), None, STREAMS)

    @pytest.mark.parametrize("bound", [0.5, 0.999, 1.001, 2.0])
    def test_a_plan_for_another_bound_is_refused(self, bound: float) -> None:
        for trust in ("central", "local"):
            plan = plan_of(NormalizedSGD(), Everyone(3), trust, l2_bound=bound)
            with pytest.raises(ValueError, match="another"):
                make_agreement(NormalizedSGD(), Everyone(3), plan, STREAMS)

    @pytest.mark.parametrize("other", [Everyone(4), Poisson(3, 0.5), FixedSize(3, 1)])
    def test_a_plan_for_another_cohort_is_refused(self, other: Sampling) -> None:
        plan = plan_of(NormalizedSGD(), other, "central")
        with pytest.raises(ValueError, match="another"):
            make_agreement(NormalizedSGD(), Everyone(3), plan, STREAMS)


class TestBegin:
    def test_the_broadcast_is_the_round_the_model_and_the_cohort_of_that_round(self) -> None:
        sampling = Poisson(1000, 0.02)
        rules = ServerRules(method=Clip21(), sampling=sampling, mechanism=Gaussian(0.0), streams=STREAMS)
        state = rules.method.init_server(torch.arange(4.0))
        cohorts = []
        for k in (1, 2, 3):
            broadcast = begin_round(rules, state, k)
            assert broadcast.round == k
            assert same(broadcast.model, state.model)
            wanted = sampling.cohort(STREAMS.source(Purpose.COHORT, k))
            assert broadcast.cohort.tolist() == wanted.tolist()
            assert (np.diff(broadcast.cohort) > 0).all()
            cohorts.append(tuple(broadcast.cohort.tolist()))
        assert len(set(cohorts)) == 3


class TestClient:
    @every_method
    def test_the_noise_on_a_message_has_the_agreed_deviation(self, method: Method) -> None:
        plan = plan_of(method, Everyone(3), "local")
        rules = make_agreement(method, Everyone(3), plan, STREAMS).client
        state = fresh_clients(method, 0, SIZE, torch.float32)
        signal = torch.randn(SIZE, generator=torch.Generator().manual_seed(1)) / SIZE**0.5
        quiet, _ = method.client_rule(state, signal, None, 2)
        message, _ = client_round(rules, 1, state, signal, 2)
        noise = (message - quiet).numpy()
        assert accepts_variance(noise, plan.noise_stddev**2)
        assert not accepts_variance(noise, (plan.noise_stddev * 1.05) ** 2)
        assert not accepts_variance(noise, (plan.noise_stddev / 1.05) ** 2)

    def test_no_two_clients_and_no_two_rounds_share_noise(self) -> None:
        method = NormalizedSGD(alpha=1.0)
        rules = make_agreement(method, Everyone(9), plan_of(method, Everyone(9), "local"), STREAMS).client
        zero = torch.zeros(40)
        found = [
            client_round(rules, client, method.init_client(40), zero, k)[0] for client in range(9) for k in range(1, 8)
        ]
        assert _independent(found)

    def test_deployed_clients_never_repeat_their_noise(self) -> None:
        method = NormalizedSGD(alpha=1.0)
        rules = ClientRules(method=method, noise_stddev=1.0, streams=SystemStreams())
        once, again = (client_round(rules, 0, method.init_client(9), torch.zeros(9), 1)[0] for _ in range(2))
        assert not torch.equal(once, again)

    @every_method
    def test_without_noise_a_round_is_the_rule_to_the_bit(self, method: Method) -> None:
        rules = make_agreement(method, Everyone(3), None, STREAMS).client
        state, signal = method.init_client(7), torch.linspace(-3.0, 2.0, 7)
        message, after = client_round(rules, 2, state, signal, 4)
        wanted, wanted_after = method.client_rule(state, signal, None, 4)
        assert same(message, wanted)
        assert all(same(one, other) for one, other in zip(after, wanted_after, strict=True))


class TestFinish:
    @every_method
    @pytest.mark.parametrize("sampling", [Everyone(8), Poisson(80, 0.1), FixedSize(80, 8)])
    def test_the_sum_is_divided_by_the_expected_cohort(self, method: Method, sampling: Sampling) -> None:
        rules = make_agreement(method, sampling, None, STREAMS).server
        state = method.init_server(torch.linspace(0.0, 1.0, 5))
        total = torch.tensor([3.0, -1.0, 0.0, 4.0, 2.0])
        found = finish_round(rules, state, 1, total)
        wanted = server_step(method, state, total / 8.0, sampling.sampling_prob)
        assert all(torch.allclose(one, other, rtol=1e-6) for one, other in zip(found, wanted, strict=True))

    def test_an_unlucky_cohort_is_still_divided_by_the_expected_one(self) -> None:
        """Messages of length one in one direction: the step shows how many there were, and that q n divides them."""
        method, sampling = DPFedAvg(clip_norm=1.0, server_lr=1.0), Poisson(60, 0.1)
        made = setting(method, federation=None, sampling=Poisson(12, 0.25))
        assert made.server.sampling.expected_size == 3.0
        rules = make_agreement(method, sampling, None, STREAMS).server
        sizes = set()
        for k in range(1, 30):
            state = method.init_server(torch.zeros(2))
            broadcast = begin_round(rules, state, k)
            sizes.add(len(broadcast.cohort))
            total = float(len(broadcast.cohort)) * torch.tensor([1.0, 0.0])
            step = state.model - finish_round(rules, state, k, total).model
            assert step[0].item() == pytest.approx(len(broadcast.cohort) / 6.0, rel=1e-6)
        assert min(sizes) < 4
        assert max(sizes) > 8

    def test_a_direction_that_is_not_shaped_like_the_model_is_refused(self) -> None:
        class Mean(DPFedAvg):
            def server_rule(self, state: Any, mean_message: Tensor, sampling_prob: float) -> Any:
                return mean_message.mean(), state

        rules = ServerRules(method=Mean(), sampling=Everyone(2), mechanism=Gaussian(0.0), streams=STREAMS)
        with pytest.raises(ValueError, match=r"direction of shape \[\] for a model of \[3\]"):
            finish_round(rules, rules.init(torch.zeros(3)), 1, torch.ones(3))

    def test_a_sum_is_not_rounded_before_the_noise_is_on_it(self) -> None:
        """One message among a hundred million counts in full, up to the one rounding at the end."""
        rules = ServerRules(
            method=DPFedAvg(server_lr=1.0), sampling=Everyone(10**8), mechanism=Gaussian(0.3), streams=STREAMS
        )
        state = rules.method.init_server(torch.zeros(1000, dtype=torch.float64))
        total = torch.full((1000,), 1e8, dtype=torch.float64)
        moved = (finish_round(rules, state, 1, total).model - finish_round(rules, state, 1, total + 1.0).model) * 1e8
        assert torch.allclose(moved, torch.ones(1000, dtype=torch.float64), rtol=1e-6)

    @pytest.mark.parametrize("method", LINEAR.values(), ids=LINEAR.keys())
    def test_the_servers_noise_has_the_agreed_deviation_on_the_sum(self, method: Method) -> None:
        if method.needs_client_noise:
            return
        sampling = Poisson(1000, 0.05)
        plan = plan_of(method, sampling, "central")
        rules = make_agreement(method, sampling, plan, STREAMS).server
        plain = dataclasses.replace(rules, mechanism=Gaussian(0.0))
        if getattr(method, "server_normalization", False):
            return
        state = method.init_server(torch.zeros(SIZE))
        total = torch.linspace(-1.0, 1.0, SIZE)
        moved = finish_round(rules, state, 3, total).model - finish_round(plain, state, 3, total).model
        probe = server_step(method, state, torch.ones(SIZE), sampling.sampling_prob).model[0]
        noise = moved.double().numpy() / float(probe) * sampling.expected_size
        assert accepts_variance(noise, plan.noise_stddev**2)
        assert not accepts_variance(noise, (1.05 * plan.noise_stddev) ** 2)

    def test_no_two_rounds_share_the_servers_noise_and_it_is_no_clients(self) -> None:
        method = DPFedAvg(clip_norm=1.0, server_lr=1.0)
        rules = ServerRules(method=method, sampling=Everyone(1), mechanism=Gaussian(1.0), streams=STREAMS)
        clients = ClientRules(method=method, noise_stddev=1.0, streams=STREAMS)
        zero = torch.zeros(40)
        found = [-finish_round(rules, method.init_server(zero), k, zero).model for k in range(1, 30)]
        found += [client_round(clients, 0, method.init_client(40), zero, k)[0] for k in range(1, 30)]
        assert _independent(found)

    @every_method
    def test_finishing_leaves_the_total_and_the_state_alone(self, method: Method) -> None:
        rules = ServerRules(method=method, sampling=Everyone(2), mechanism=Gaussian(0.5), streams=STREAMS)
        state, total = method.init_server(torch.ones(5)), torch.arange(5.0)
        first = finish_round(rules, state, 1, total)
        assert same(state.model, torch.ones(5))
        assert same(total, torch.arange(5.0))
        again = finish_round(rules, state, 1, total)
        assert all(same(one, other) for one, other in zip(first, again, strict=True))

    def test_in_an_empty_round_only_the_noise_moves_the_model(self) -> None:
        method = DPFedAvg(clip_norm=0.5, server_lr=1.0)
        sampling = Poisson(12, 0.05)
        for trust in (None, "central", "local"):
            made = setting(method, sampling=sampling, trust=trust)
            state = method.init_server(made.initial_model)
            empty = next(k for k in range(1, 100) if not len(begin_round(made.server, state, k).cohort))
            after, _, totals = advance(LoopEngine(made.population), made.server, state, empty, empty)
            assert totals[0].messages == totals[0].non_finite == 0
            assert not totals[0].sum.any()
            assert np.isnan(totals[0].signal_norm)
            moved = (after.model - state.model) * sampling.expected_size
            if trust == "central":
                assert accepts_variance(moved.numpy(), made.server.noise_stddev**2)
            else:
                assert not moved.any()


@every_method
def test_with_everyone_and_zero_noise_a_private_run_is_the_non_private_one_to_the_bit(method: Method) -> None:
    trust = trust_for(method)
    private = setting(method, trust=trust, noise_multiplier=1.0)
    silent = dataclasses.replace(
        private,
        server=dataclasses.replace(private.server, mechanism=Gaussian(0.0)),
        population=dataclasses.replace(
            private.population, rules=dataclasses.replace(client_rules(private), noise_stddev=0.0)
        ),
    )
    plain = models_of(setting(method), rounds=4)
    assert all(same(one, other) for one, other in zip(models_of(silent, rounds=4), plain, strict=True))
    assert not any(same(one, other) for one, other in zip(models_of(private, rounds=4), plain, strict=True))


def test_the_signal_to_noise_ratio_is_of_the_sum() -> None:
    total = Total(torch.tensor([3.0, 4.0]), 2, 0, 1.0)
    assert signal_to_noise(total, 0.0, 0.0) is None
    assert signal_to_noise(total, 0.5, 0.0) == pytest.approx(5.0 / (0.5 * 2**0.5))
    assert signal_to_noise(total, 0.0, 0.5) == pytest.approx(((25.0 - 1.0) / 1.0) ** 0.5)
    assert signal_to_noise(total, 0.0, 50.0) == 0.0
    assert signal_to_noise(Total(torch.zeros(2), 0, 0, float("nan")), 0.0, 0.5) is None


def test_a_cohort_under_local_trust_carries_the_noise_of_its_members() -> None:
    method = NormalizedSGD(alpha=1e6)
    rules = make_agreement(method, Everyone(6), plan_of(method, Everyone(6), "local"), STREAMS).client
    total = sum(
        (client_round(rules, i, method.init_client(SIZE), torch.zeros(SIZE), 1)[0] for i in range(6)), torch.zeros(1)
    )
    assert accepts_variance(_numpy(total), 6 * rules.noise_stddev**2)


def _independent(found: list[Tensor]) -> bool:
    """Return True if vectors of forty numbers on the grid are all different."""
    together = torch.stack(found).double()
    likeness = np.corrcoef(together.numpy()) - np.eye(len(found))
    return len(together.unique(dim=0)) == len(found) and bool(np.abs(likeness).max() < 0.9)


def _numpy(tensor: Tensor | int) -> np.ndarray:
    assert isinstance(tensor, Tensor)
    return tensor.numpy()


def test_the_false_alarm_rate_is_small() -> None:
    assert FALSE_ALARM <= 1e-9


def test_a_broadcast_says_nothing_of_who_else_might_have_come() -> None:
    assert Broadcast._fields == ("round", "model", "cohort", "capacity", "part", "turn", "shared")


def test_a_message_of_another_shape_is_refused_before_it_is_spread_over_the_parameters() -> None:
    class Shrunk(DPFedAvg):
        def client_rule(self, state, signal, release, round):
            message, state = super().client_rule(state, signal, release, round)
            return message[..., :1], state

    with pytest.raises(ValueError, match="a message of shape"):
        apply_client_rule(Shrunk(), NoMemory(), torch.ones(5), None, 1)


def test_a_plan_for_clients_without_memory_is_refused_for_a_method_that_has_one() -> None:
    """Fixed-size cohorts are amplified only without memory: otherwise the plan would promise too small an epsilon."""
    sampling = FixedSize(100, 5)
    plan = make_plan(
        trust="central",
        sampling=sampling,
        rounds=10,
        delta=1e-5,
        l2_bound=1.0,
        noise_multiplier=2.0,
        client_memory=False,
    )
    with pytest.raises(ValueError, match="without memory"):
        make_agreement(AlphaNormEC(), sampling, plan, SeededStreams(1))
    make_agreement(NormalizedSGD(), sampling, plan, SeededStreams(1))

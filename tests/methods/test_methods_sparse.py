"""Sparse regression under local privacy: the threshold, both algorithms, their accounts and refusals."""

from pathlib import Path
from typing import Any

import dp_accounting as dpa
import numpy as np
import pytest
import torch
from dp_accounting.pld import PLDAccountant

from fedpriv.analytics import SparseMoments
from fedpriv.errors import UserError
from fedpriv.experiment.config import Config, parse_config
from fedpriv.methods import DPFedAvg, PrivateIHT, optimized, server_step
from fedpriv.methods.server_optimizers import Momentum
from fedpriv.methods.sparse import hard_threshold
from fedpriv.privacy import Everyone, Separated, make_plan
from fedpriv.streams import SeededStreams

SEPARATED = {"sampling": "separated", "min_separation": 4}
LOCAL = {"trust": "local", "epsilon": 8.0, "delta": 1e-5}


def config(**changes: Any) -> Config:
    tables: dict[str, Any] = {
        "name": "x",
        "seed": 1,
        "data": {"name": "digits", "clients": 12},
        "model": {"name": "softmax"},
        "local": {"work": "full-gradient"},
        "cohort": SEPARATED,
        "method": {"name": "private-iht", "sparsity": 5},
        "privacy": LOCAL,
        "training": {"rounds": 4},
        **changes,
    }
    return parse_config({key: table for key, table in tables.items() if table is not None})


def problem(users: int, size: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    theta = torch.zeros(size)
    theta[[1, 4]] = torch.tensor([0.8, -0.6])
    inputs = torch.randn(users, size, generator=draw)
    return inputs, inputs @ theta + 0.1 * torch.randn(users, generator=draw), theta


@pytest.mark.parametrize(
    ("vector", "kept"),
    [([1.0, -3.0, 2.0], [0.0, -3.0, 2.0]), ([1.0, 1.0, -1.0], [1.0, 1.0, 0.0]), ([0.0, 0.0, 5.0], [0.0, 0.0, 5.0])],
)
def test_the_threshold_keeps_the_largest_and_of_equals_the_first(vector: list[float], kept: list[float]) -> None:
    assert hard_threshold(torch.tensor(vector), 2).tolist() == kept
    assert hard_threshold(torch.tensor(vector), 3).tolist() == vector


def test_a_step_is_gradient_then_threshold_and_its_zeros_are_exact() -> None:
    method, draw = PrivateIHT(sparsity=3, step_size=0.37), torch.Generator().manual_seed(1)
    model, mean = torch.randn(40, generator=draw), torch.randn(40, generator=draw)
    after = server_step(method, method.init_server(model), mean, 0.25).model
    plain = server_step(DPFedAvg(server_lr=0.37), DPFedAvg().init_server(model), mean, 0.25).model
    largest = set(np.argsort(-plain.abs().numpy())[:3].tolist())
    assert set(torch.nonzero(after).flatten().tolist()) == largest
    assert torch.allclose(after, hard_threshold(plain, 3), atol=1e-6)


def test_without_noise_it_finds_the_parameters() -> None:
    inputs, targets, theta = problem(2000)
    method = PrivateIHT(sparsity=2, clip_norm=50.0, step_size=0.7)
    state = method.init_server(torch.zeros(6))
    for round in range(1, 15):
        signals = (inputs @ state.model - targets).unsqueeze(1) * inputs
        messages, _ = method.client_rule(method.init_client(6), signals, None, round)
        state = server_step(method, state, messages.mean(dim=0), 0.125)
    assert float((state.model - theta).norm()) < 0.02


def test_a_server_optimizer_would_leave_the_sparse_models() -> None:
    with pytest.raises(UserError, match=r"\[server\].*nonzero parameters"):
        optimized(PrivateIHT(), Momentum())
    with pytest.raises(UserError, match=r"\[server\]") as caught:
        config(server={"optimizer": "adam"})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("groups", "turns"), [(4, 1), (2, 2), (3, 2)])
def test_a_client_of_a_group_pays_for_its_turns_alone(groups: int, turns: int) -> None:
    made = config(cohort={"sampling": "separated", "min_separation": groups})
    plan = made.plan(Separated(12, groups))
    assert plan is not None
    accountant = PLDAccountant(value_discretization_interval=1e-3)
    event = dpa.SelfComposedDpEvent(dpa.GaussianDpEvent(plan.noise_multiplier), turns)
    assert plan.epsilon == pytest.approx(accountant.compose(event).get_epsilon(1e-5), rel=0.01)
    assert plan.shares.client == pytest.approx(plan.noise_multiplier * 2.0 * made.method.bounded.l2_bound)
    drawn = [Separated(12, groups).drawn(SeededStreams(3), round) for round in range(1, 5)]
    assert np.bincount(np.concatenate(drawn), minlength=12).max() <= turns


def test_devices_refuse_groups_with_local_noise_for_now() -> None:
    with pytest.raises(UserError, match=r"cohort\.sampling.*for now"):
        config().check_deployable()


@pytest.mark.parametrize(
    ("method", "key"),
    [
        ({"sparsity": 0}, "method.sparsity"),
        ({"clip_norm": -1.0}, "method.clip_norm"),
        ({"step_size": 0.0}, "step_size"),
    ],
)
def test_wrong_values_are_one_line(method: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match=key) as caught:
        config(method={"name": "private-iht", **method})
    assert "\n" not in str(caught.value)


def test_a_run_ends_with_a_sparse_model(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from fedpriv.experiment.run import run_experiment

    summary = run_experiment(config(), tmp_path)
    model = load_file(tmp_path / "model.safetensors")["model"]
    assert int((model != 0.0).sum()) <= 5
    assert summary["epsilon"] == pytest.approx(8.0, rel=0.02)


# Moments.


def test_messages_are_bounded_for_any_example_and_as_long_as_the_docs_say() -> None:
    method = SparseMoments(sparsity=2, clip_norm=3.0)
    inputs = torch.tensor([[1.0, 0.5], [1e19, -3.0], [float("nan"), 0.0], [0.0, 0.0], [1e-20, 1e-30]])
    targets = torch.tensor([0.5, 1.0, 1.0, 2.0, 1e30])
    lengths = method.messages(inputs, targets).norm(dim=1)
    assert bool((lengths <= 3.0).all())
    x, y = inputs[0].norm(), targets[0]
    assert float(lengths[0]) == pytest.approx(float(x * (x**2 + y**2).sqrt()), rel=1e-5)
    assert lengths[2] == 0.0


def test_without_noise_the_estimate_is_that_of_thresholded_least_squares() -> None:
    inputs, targets, theta = problem(3000)
    method = SparseMoments(sparsity=2, clip_norm=1e6, floor=1e-6)
    found = method.estimate(method.messages(inputs, targets).double().mean(dim=0))
    solved = np.linalg.lstsq(inputs.double().numpy(), targets.double().numpy(), rcond=None)[0]
    np.testing.assert_allclose(found.numpy(), hard_threshold(torch.as_tensor(solved), 2).numpy(), atol=1e-4)
    assert float((found - theta).norm()) < 0.02


def test_the_simulated_mean_is_that_of_the_messages_and_its_noise_that_of_all_users() -> None:
    inputs, targets, _ = problem(4000)
    inputs[3, 2] = float("nan")
    method = SparseMoments(sparsity=2, clip_norm=8.0)
    plan = method.plan(4000, epsilon=4.0, delta=1e-6)
    mean = method.messages(inputs, targets).double().mean(dim=0)
    scaled = torch.stack([method.simulate(inputs, targets, plan, SeededStreams(seed)) - mean for seed in range(60)])
    scaled = scaled * 4000**0.5 / plan.shares.client
    assert 0.94 < float(scaled.std()) < 1.06
    assert abs(float(scaled.mean())) < 4.0 / (60 * 27) ** 0.5


def test_the_simulated_sum_is_that_of_the_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedpriv.analytics.moments.release_clients_sum", lambda *given: given[2])
    inputs, targets, _ = problem(50)
    inputs[3, 2] = float("nan")
    method = SparseMoments(clip_norm=5.0)
    found = method.simulate(inputs, targets, method.plan(50, epsilon=4.0, delta=1e-6), SeededStreams(1))
    assert torch.allclose(found, method.messages(inputs, targets).double().mean(dim=0), atol=1e-5)


def test_every_user_adds_its_own_noise_once() -> None:
    inputs, targets, _ = problem(120)
    method = SparseMoments(sparsity=2, clip_norm=2.0)
    plan = method.plan(120, epsilon=4.0, delta=1e-6)
    sent = torch.stack(list(method.release(inputs, targets, plan, SeededStreams(5))))
    noise = (sent - method.messages(inputs, targets)) / plan.shares.client
    assert 0.94 < float(noise.std()) < 1.06
    assert len(torch.unique(noise, dim=0)) == 120
    assert plan.adjacency == "replace"
    by_hand = PLDAccountant(value_discretization_interval=1e-4).compose(
        dpa.GaussianDpEvent(plan.shares.client / (2.0 * method.clip_norm))
    )
    assert by_hand.get_epsilon(1e-6) == pytest.approx(4.0, rel=0.01)


def test_a_plan_for_other_messages_is_not_used() -> None:
    inputs, targets, _ = problem(10)
    method = SparseMoments(clip_norm=2.0)
    others = [method.plan(11, epsilon=4.0, delta=1e-6), SparseMoments(clip_norm=1.0).plan(10, epsilon=4.0, delta=1e-6)]
    central = make_plan(trust="central", sampling=Everyone(10), rounds=1, delta=1e-6, l2_bound=2.0, epsilon=4.0)
    for plan in (*others, central):
        with pytest.raises(ValueError, match="plan"):
            method.simulate(inputs, targets, plan, SeededStreams(1))

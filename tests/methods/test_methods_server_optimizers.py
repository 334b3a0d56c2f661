"""Server optimizers: equal to PyTorch's on the same directions, for any method, without an effect on clients."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from support.federations import Setting, advance, ragged_digits, setting
from support.helpers import EXAMPLES, same
from torch import Tensor

from fedpriv.engines import LoopEngine
from fedpriv.errors import UserError
from fedpriv.methods import (
    DIFF2,
    Constrained,
    DPFedAvg,
    Method,
    ServerOptimized,
    feedback_of,
    has_memory,
    optimized,
    own_signal_of,
    server_step,
)
from fedpriv.methods.memoryless import ModelOnly
from fedpriv.methods.server_optimizers import SERVER_OPTIMIZERS, Adagrad, Adam, Momentum, ServerOptimizer, Yogi
from fedpriv.privacy import Poisson
from fedpriv.rounds import make_agreement
from fedpriv.streams import SeededStreams
from fedpriv.tasks.local_work import LocalSteps

LR, ROUNDS = 0.05, 30
PLAIN = {name: one for name, one in EXAMPLES.items() if not isinstance(one, ServerOptimized | Constrained)}
every_plain_method = pytest.mark.parametrize("method", PLAIN.values(), ids=PLAIN.keys())
every_optimizer = pytest.mark.parametrize("kind", SERVER_OPTIMIZERS.values(), ids=SERVER_OPTIMIZERS.keys())

TORCH: dict[str, tuple[ServerOptimizer, Callable[[Sequence[Tensor]], torch.optim.Optimizer]]] = {
    "momentum": (Momentum(momentum=0.8), lambda x: torch.optim.SGD(x, lr=LR, momentum=0.8)),
    "adam": (Adam(beta2=0.95, tau=0.01), lambda x: torch.optim.Adam(x, lr=LR, betas=(0.9, 0.95), eps=0.01)),
    "adagrad": (Adagrad(tau=0.01), lambda x: torch.optim.Adagrad(x, lr=LR, eps=0.01)),
}


def noisy(method: Method) -> Setting:
    return setting(method, sampling=Poisson(ragged_digits().population, 0.4), trust="central", noise_multiplier=0.3)


def torchs(
    start: Tensor, make: Callable[[Sequence[Tensor]], torch.optim.Optimizer], means: list[Tensor]
) -> list[Tensor]:
    """Return the models of a PyTorch optimizer on given gradients, in float64."""
    x = start.double().clone().requires_grad_()
    optimizer, models = make([x]), []
    for mean in means:
        x.grad = mean.double()
        optimizer.step()
        models.append(x.detach().clone())
    return models


@pytest.mark.parametrize("name", TORCH)
def test_on_dp_fedavgs_mean_messages_it_is_pytorchs(name: str) -> None:
    """Thirty noised rounds with some of the clients: the run in float32 compared with PyTorch in float64."""
    optimizer, make = TORCH[name]
    seen: list[Tensor] = []

    class Watched(DPFedAvg):
        def server_rule(self, state: ModelOnly, mean_message: Tensor, sampling_prob: float) -> tuple[Tensor, ModelOnly]:
            seen.append(mean_message.clone())
            return super().server_rule(state, mean_message, sampling_prob)

    made = noisy(optimized(Watched(clip_norm=0.5, server_lr=LR), optimizer))
    start = made.server.method.init_server(made.initial_model)
    _, models, _ = advance(LoopEngine(made.population), made.server, start, 1, ROUNDS)
    assert len(seen) == ROUNDS
    for ours, theirs in zip(models, torchs(made.initial_model, make, seen), strict=True):
        assert float((ours - theirs).abs().max()) < 1e-6
    assert float((models[-1] - made.initial_model).abs().max()) > 0.05


@pytest.mark.parametrize("name", TORCH)
def test_in_float64_it_is_pytorchs_to_twelve_digits(name: str) -> None:
    optimizer, make = TORCH[name]
    generator = torch.Generator().manual_seed(1)
    start, *means = torch.randn(41, 20, generator=generator, dtype=torch.float64)
    means[7] = torch.zeros(20, dtype=torch.float64)
    method = optimized(DPFedAvg(server_lr=LR), optimizer)
    state, wanted = method.init_server(start), torchs(start, make, means)
    for mean, model in zip(means, wanted, strict=True):
        state = server_step(method, state, mean, 0.3)
        assert torch.allclose(state.model, model, rtol=1e-12, atol=1e-12)


@every_plain_method
def test_momentum_of_zero_is_the_method_to_the_bit(method: Method) -> None:
    trust = "local" if method.needs_client_noise else "central"
    found = []
    for one in (method, optimized(method, Momentum(momentum=0.0))):
        made = setting(one, sampling=Poisson(ragged_digits().population, 0.4), trust=trust)
        found.append(advance(LoopEngine(made.population), made.server, one.init_server(made.initial_model), 1, 8))
    (plain, models, _), (wrapped, others, _) = found
    assert all(same(first, second) for first, second in zip(models, others, strict=True))
    assert all(same(getattr(plain, name), getattr(wrapped, name)) for name in plain._fields)


@every_plain_method
@every_optimizer
def test_clients_notice_nothing(method: Method, kind: type) -> None:
    """Clients follow the method's rule and keep its state; bound, trust and lost memory are also the method's."""
    wrapped = optimized(method, kind())
    assert (wrapped.bounded, wrapped.needs_client_noise, wrapped.lost_memory) == (
        method.bounded,
        method.needs_client_noise,
        method.lost_memory,
    )
    assert feedback_of(wrapped) == feedback_of(method)
    assert own_signal_of(wrapped) is own_signal_of(method)
    assert method.step_prox > 0.0 or (own_signal_of(method) is None) == (feedback_of(method) is not None)
    assert wrapped.step_prox == method.step_prox
    assert has_memory(wrapped) == has_memory(method)
    assert type(wrapped.init_client(3)) is type(method.init_client(3))
    server, client, _ = make_agreement(wrapped, Poisson(10, 0.5), None, SeededStreams(1))
    assert server.method is wrapped
    assert client.method is method
    assert wrapped.client_part is method
    signal = torch.linspace(-1.0, 1.0, 5)
    for one, other in zip(
        wrapped.client_rule(wrapped.init_client(5), signal, None, 1),
        method.client_rule(method.init_client(5), signal, None, 1),
        strict=True,
    ):
        assert all(same(a, b) for a, b in zip(one, other, strict=True))


def test_a_rule_that_does_not_run_in_place_does_not_do_so_with_an_optimizer_either() -> None:
    class Louder(DPFedAvg):
        def client_rule(self, state, signal, release, round):
            return torch.ones_like(signal), state

    assert feedback_of(optimized(Louder(), Adam())) is None


@every_plain_method
@every_optimizer
def test_the_methods_own_memory_is_what_it_is_without(method: Method, kind: type) -> None:
    wrapped = optimized(method, kind())
    model = torch.linspace(-1.0, 1.0, 6)
    state: Any = wrapped.init_server(model)
    plain: Any = method.init_server(model)
    for k in range(4):
        mean = torch.sin(torch.arange(6.0) * (k + 1))
        state, plain = server_step(wrapped, state, mean, 0.3), server_step(method, plain, mean, 0.3)
        for name in plain._fields:
            # Differences of gradients are in units of the last step's length, which the optimizer changes.
            if name not in ("model", *(("previous", "estimate") if isinstance(method, DIFF2) else ())):
                assert same(getattr(state, name), getattr(plain, name))
    assert same(state.model, state[0])
    assert not torch.equal(state.model, plain.model)


def test_a_direction_far_below_the_models_last_digit_is_not_lost() -> None:
    """Momentum of steps of 1e-9 on a model near 1: single steps vanish in float32, but the momentum keeps them."""
    method = optimized(DPFedAvg(server_lr=1e-3), Momentum(momentum=0.999))
    state = method.init_server(torch.ones(3))
    for _ in range(2000):
        state = server_step(method, state, torch.full((3,), 1e-6), 1.0)
    velocity = 1e-6 * (1.0 - 0.999**2000) / (1.0 - 0.999)
    assert torch.allclose(state.optimizer_mean, torch.full((3,), velocity), rtol=1e-4)


def test_adam_needs_no_tuning_to_the_length_of_messages_and_momentum_does() -> None:
    """The first rounds' steps are equal for messages a thousand times as long, up to tau."""
    for optimizer, alike in ((Adam(tau=1e-9), True), (Yogi(tau=1e-9), True), (Momentum(), False)):
        models = []
        for scale in (1.0, 1e3):
            method = optimized(DPFedAvg(server_lr=0.1), optimizer)
            state = method.init_server(torch.zeros(4))
            for k in range(5):
                state = server_step(method, state, scale * torch.tensor([1.0, -2.0, 3.0, 0.5]) * (k + 1), 1.0)
            models.append(state.model)
        assert torch.allclose(*models, rtol=1e-4) == alike


@pytest.mark.parametrize("kind", [Adam, Yogi, Adagrad])
@pytest.mark.parametrize("length", [0.0, 1e-44, 1e-30, 1e-22, 1e-10])
def test_directions_of_next_to_no_length_leave_every_figure_finite(kind: type, length: float) -> None:
    """Uses the smallest tau, then zeros only, so that the squares fade away."""
    method = optimized(DPFedAvg(server_lr=1.0), kind(tau=1e-12))
    state = method.init_server(torch.zeros(3))
    for k in range(300):
        mean = torch.tensor([1.0, -1.0, 0.0]) * (length if k < 3 else 0.0)
        state = server_step(method, state, mean, 1.0)
        assert all(bool(figure.isfinite().all()) for figure in state)
    assert float(state.model[2]) == 0.0


@pytest.mark.parametrize("optimizer", [kind() for kind in SERVER_OPTIMIZERS.values()], ids=SERVER_OPTIMIZERS.keys())
def test_a_run_goes_on_from_its_state_to_the_bit(optimizer: ServerOptimizer) -> None:
    """Resumes from the tensors of a state alone, as in a checkpoint."""
    made = noisy(optimized(DPFedAvg(server_lr=0.05), optimizer))
    made = dataclasses.replace(
        made, population=dataclasses.replace(made.population, work=LocalSteps(steps=2, client_lr=0.1))
    )
    start, engine = made.server.method.init_server(made.initial_model), LoopEngine(made.population)
    whole, _, _ = advance(engine, made.server, start, 1, 8)
    half, _, _ = advance(engine, made.server, start, 1, 4)
    kept = {name: tensor.clone() for name, tensor in half._asdict().items()}
    rest, _, _ = advance(engine, made.server, type(start)(**kept), 5, 8)
    assert all(same(one, other) for one, other in zip(whole, rest, strict=True))


@pytest.mark.parametrize(
    ("kind", "key", "wrong"),
    [
        (Momentum, "momentum", 1.0),
        (Momentum, "momentum", -0.1),
        (Adam, "beta1", 1.0),
        (Adam, "beta2", float("nan")),
        (Adam, "tau", 0.0),
        (Adam, "tau", 1e-300),
        (Yogi, "tau", 9e-13),
        (Adagrad, "tau", float("nan")),
        (Yogi, "beta2", 1.5),
        (Yogi, "tau", float("inf")),
        (Adagrad, "beta1", -1.0),
        (Adagrad, "tau", -1e-3),
    ],
)
def test_figures_out_of_range_are_refused(kind: type, key: str, wrong: float) -> None:
    with pytest.raises(UserError, match=rf"^server\.{key}: expected a (positive )?number"):
        kind(**{key: wrong})

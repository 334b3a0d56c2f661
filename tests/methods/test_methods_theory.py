"""Numerical checks of results in the papers and in privacy.md: fixed points, rates, stalls, noise.

The counter-example, on which methods without memory stop away from the optimum and methods with memory do not: three
clients on a line,

    f_1(x) = (x - p)^2 / 2,     f_2(x) = f_3(x) = x^2 / 2,     p > 0.

The mean of the gradients x - p, x, x is x - p/3, so the optimum is x* = p/3. There, the gradients -2p/3, p/3, p/3 do
not vanish. A method without memory stops if the mean *message* vanishes, 2 B(x) = B(p - x) for odd B:

* B = N_alpha: 2x / (alpha + x) = (p - x) / (alpha + p - x), that is x^2 - (p + 3 alpha) x + alpha p = 0, and the root
  between 0 and p is  x = (p + 3 alpha - sqrt((p + 3 alpha)^2 - 4 alpha p)) / 2.
* B = clip_C: x = C/2 if C <= 2p/3 (then client 1 is clipped and the others are not), and otherwise x = x*.

The left side minus the right increases strictly in x (for clipping, at its zero), so there is no other such point, and
no step size has another fixed point. As alpha or C go to zero, the stall goes to 0, the median of the clients' optima.
(Two clients are not enough for N_alpha: it is odd and one-to-one, so B(g_1) + B(g_2) = 0 means g_1 + g_2 = 0.)
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.helpers import accepts_variance, adding, descend, fresh_clients, thorough
from torch import Tensor

from fedpriv.methods import (
    AlphaNormEC,
    CenteredClip,
    Clip21,
    Clip21SGD2M,
    DPFedAvg,
    DPScaffold,
    FedSpeed,
    Method,
    NormalizedSGD,
    server_step,
)
from fedpriv.tasks.local_work import LocalSGD, LocalSteps

P = 6.0
OPTIMUM = P / 3.0
CENTRES = torch.tensor([[P], [0.0], [0.0]], dtype=torch.float64)


def pulls(x: Tensor) -> Tensor:
    """Return the three clients' gradients `[3, 1]`."""
    return x - CENTRES


def mean_gradient(x: Tensor) -> float:
    return float((x - OPTIMUM).norm())


def start(x: float = 5.0) -> Tensor:
    return torch.tensor([x], dtype=torch.float64)


def last_model(method: Method, rounds: int, first: float = 5.0, lr_decay: float = 1.0) -> Tensor:
    return descend(method, pulls, start(first), rounds, lr_decay)[0][-1].model


def normalized_stall(alpha: float) -> float:
    b = P + 3.0 * alpha
    return (b - math.sqrt(b * b - 4.0 * alpha * P)) / 2.0


class TestStalls:
    @pytest.mark.parametrize("alpha", [0.1, 1.0, 10.0])
    @pytest.mark.parametrize("first", [-3.0, 2.0, 20.0])
    @pytest.mark.parametrize("step", [0.2, 1.0, 1.9])
    @pytest.mark.sampled
    def test_normalized_sgd_stalls_at_the_closed_form_for_every_stable_step(
        self, alpha: float, first: float, step: float
    ) -> None:
        method = NormalizedSGD(alpha=alpha, server_lr=step * alpha)
        found = float(last_model(method, int((40 / alpha + 700) / min(step, 1.0)), first))
        assert found == pytest.approx(normalized_stall(alpha), abs=1e-8)
        assert abs(found - OPTIMUM) > 0.05

    @pytest.mark.parametrize("clip_norm", [0.1, 1.0, 3.5])
    @pytest.mark.parametrize("first", [-3.0, 2.0, 20.0])
    @pytest.mark.parametrize("step", [0.2, 1.0, 1.9])
    def test_clipping_stalls_at_half_the_clip_norm_for_every_stable_step(
        self, clip_norm: float, first: float, step: float
    ) -> None:
        method = DPFedAvg(clip_norm=clip_norm, server_lr=step)
        found = float(last_model(method, int((60 / clip_norm + 100) / step), first))
        assert found == pytest.approx(clip_norm / 2.0, abs=2e-6)
        assert abs(found - OPTIMUM) > 0.2

    def test_clipping_beyond_every_gradient_at_the_optimum_finds_it(self) -> None:
        found = float(last_model(DPFedAvg(clip_norm=4.5, server_lr=0.5), 400))
        assert found == pytest.approx(OPTIMUM, abs=1e-8)

    @pytest.mark.parametrize("lr", [0.001, 0.1, 1.0, 10.0, 100.0])
    @pytest.mark.parametrize(
        ("method", "message"),
        [
            (NormalizedSGD(alpha=1.0), (2 * 2 / (1 + 2) - 4 / (1 + 4)) / 3),
            (NormalizedSGD(alpha=0.01), (2 * 2 / (0.01 + 2) - 4 / (0.01 + 4)) / 3),
            (DPFedAvg(clip_norm=1.0), (2 * 1 - 1) / 3),
        ],
    )
    @pytest.mark.sampled
    def test_without_memory_the_optimum_is_left_whatever_the_step(
        self, method: NormalizedSGD | DPFedAvg, message: float, lr: float
    ) -> None:
        """The mean message at the optimum is not zero, so no step size makes it a fixed point."""
        stepped = dataclasses.replace(method, server_lr=lr)
        after = float(last_model(stepped, 1, OPTIMUM))
        assert OPTIMUM - after == pytest.approx(lr * message, rel=1e-6)
        models = [state.model for state in descend(stepped, pulls, start(OPTIMUM), 3000)[0][-100:]]
        assert min(mean_gradient(model) for model in models) > 0.1

    @pytest.mark.parametrize("beta", [0.3, 0.6])
    def test_centered_clip_stalls_where_methods_without_memory_do(self, beta: float) -> None:
        """Its memory is then zero: it removes no bias, and per-client memory does."""
        clipped = descend(CenteredClip(clip_norm=1.0, beta=beta, server_lr=0.1), pulls, start(1.5), 500)[0][-1]
        assert (float(clipped.model), float(clipped.memory)) == pytest.approx((0.5, 0.0), abs=2e-6)
        normalized = CenteredClip(bound="normalize", alpha=1.0, beta=beta, server_lr=0.2)
        assert float(last_model(normalized, 800, 1.5)) == pytest.approx(normalized_stall(1.0), abs=1e-6)
        assert mean_gradient(last_model(Clip21(clip_norm=1.0, server_lr=0.2), 400, 1.5)) < 1e-6

    @pytest.mark.parametrize("alpha", [0.3, 1.0])
    @pytest.mark.parametrize("first", [-3.0, 5.0])
    @pytest.mark.parametrize("ratio", [0.3, 1.0])
    def test_alpha_normec_finds_the_optimum(self, alpha: float, first: float, ratio: float) -> None:
        method = AlphaNormEC(alpha=alpha, beta=ratio * alpha, server_lr=0.1 * ratio * alpha, server_normalization=False)
        assert mean_gradient(last_model(method, int(400 / (ratio * alpha)), first)) < 1e-4

    @pytest.mark.parametrize("alpha", [0.1, 1.0])
    def test_alpha_normec_with_normalized_and_descending_steps_finds_the_optimum(self, alpha: float) -> None:
        method = AlphaNormEC(alpha=alpha, beta=alpha, server_lr=0.02)
        assert mean_gradient(last_model(method, 8000, 5.0, lr_decay=0.9985)) < 1e-4

    def test_normalized_steps_of_constant_length_come_within_their_length(self) -> None:
        method = AlphaNormEC(alpha=1.0, beta=1.0, server_lr=0.01)
        states = descend(method, pulls, start(), 3000)[0]
        assert 0.0 < max(mean_gradient(state.model) for state in states[-200:]) < 0.1

    @pytest.mark.parametrize("tau", [0.05, 0.5, 5.0])
    @pytest.mark.parametrize("first", [-3.0, 5.0])
    def test_clip21_finds_the_optimum(self, tau: float, first: float) -> None:
        method = Clip21(clip_norm=tau, server_lr=min(0.3, 0.3 * tau))
        assert mean_gradient(last_model(method, int(800 / min(tau, 1.0)), first)) < 1e-4

    def test_memories_end_at_the_clients_own_gradients_which_do_not_vanish(self) -> None:
        methods: list[Method] = [
            AlphaNormEC(alpha=1.0, beta=1.0, server_lr=0.1, server_normalization=False),
            Clip21(clip_norm=0.5, server_lr=0.1),
        ]
        for method in methods:
            server, clients = method.init_server(start()), fresh_clients(method, 3, 1)
            for k in range(1, 3000):
                messages, clients = method.client_rule(clients, pulls(server.model), None, k)
                server = server_step(method, server, messages.mean(dim=0), 1.0)
            assert torch.allclose(clients.memory[:, 0], torch.tensor([-4.0, 2.0, 2.0], dtype=torch.float64), atol=1e-6)


class TestPublicMemory:
    """Constant signals: the memory is the minimizer of the Huber loss or of its smooth kin, and not the mean."""

    def memory(self, method: CenteredClip | Clip21, signals: Tensor, rounds: int = 600) -> Tensor:
        return descend(method, lambda _: signals, torch.zeros_like(signals[0]), rounds)[0][-1].memory

    def test_skewed_signals_bias_a_public_memory_and_not_those_of_clients(self) -> None:
        signals = torch.tensor([[0.0], [0.0], [3.0]], dtype=torch.float64)
        assert float(self.memory(CenteredClip(clip_norm=1.0), signals)) == pytest.approx(0.5, abs=1e-6)
        assert float(self.memory(Clip21(clip_norm=1.0), signals)) == pytest.approx(1.0, abs=1e-9)

    def test_signals_within_the_clip_norm_of_their_mean_are_averaged(self) -> None:
        signals = 50.0 + torch.tensor([[0.5, -0.1], [-0.2, 0.3], [0.1, 0.4]], dtype=torch.float64)
        assert torch.allclose(self.memory(CenteredClip(clip_norm=0.7), signals), signals.mean(dim=0), atol=1e-9)
        one = self.memory(CenteredClip(clip_norm=200.0, beta=1.0), signals, rounds=1)
        assert torch.allclose(one, signals.mean(dim=0), atol=1e-9)

    @pytest.mark.parametrize("size", [1, 5])
    def test_the_memory_minimizes_its_loss(self, size: int) -> None:
        rng = torch.Generator().manual_seed(size)
        signals = 3.0 * torch.randn(9, size, generator=rng, dtype=torch.float64)
        signals[-1] += 20.0
        for method in (CenteredClip(clip_norm=0.8), CenteredClip(bound="normalize", alpha=0.4)):
            found = self.memory(method, signals).requires_grad_()
            r = (signals - found).norm(dim=1)
            huber = torch.where(r <= 0.8, r**2 / 2.0, 0.8 * r - 0.32)
            loss = huber if method.bound == "clip" else r - 0.4 * (1.0 + r / 0.4).log()
            (slope,) = torch.autograd.grad(loss.mean(), found)
            assert float(slope.norm()) < 2e-6
            assert float((found.detach() - signals.mean(dim=0)).norm()) > 0.3


class TestRates:
    @thorough
    @given(
        alpha=st.floats(0.01, 10.0),
        ratio=st.floats(0.01, 1.0),
        residual=st.lists(st.floats(-100.0, 100.0), min_size=1, max_size=4),
    )
    def test_one_step_with_beta_up_to_alpha_contracts_every_residual(
        self, alpha: float, ratio: float, residual: list[float]
    ) -> None:
        """The factor along itself is 1 - beta / (alpha + ||r||), between 0 and 1."""
        method = AlphaNormEC(alpha=alpha, beta=ratio * alpha)
        signal = torch.tensor(residual, dtype=torch.float64)
        norm = float(signal.norm())
        _, after = method.client_rule(fresh_clients(method, 0, len(residual)), signal, None, 1)
        factor = 1.0 - ratio * alpha / (alpha + norm)
        # Far beyond alpha, the bound's margin, two parts in a million, shortens the message.
        assert torch.allclose(signal - after.memory, factor * signal, rtol=1e-9, atol=1e-6 * ratio * alpha)
        assert norm <= 1e-9 or float((signal - after.memory).norm()) < norm

    @pytest.mark.parametrize(
        ("ratio", "contracts"), [(0.5, True), (1.0, True), (1.9, True), (2.1, False), (4.0, False)]
    )
    def test_small_residuals_shrink_by_one_minus_beta_over_alpha_in_each_round(
        self, ratio: float, contracts: bool
    ) -> None:
        method = AlphaNormEC(alpha=2.0, beta=2.0 * ratio)
        state, signal = fresh_clients(method, 0, 1), torch.tensor([1e-7], dtype=torch.float64)
        for k in range(1, 4):
            _, state = method.client_rule(state, signal, None, k)
        left = float(signal - state.memory)
        assert left == pytest.approx(1e-7 * (1.0 - ratio) ** 3, rel=1e-3, abs=1e-13)
        assert (abs(left) < 1e-7) == contracts

    def test_beta_equal_to_alpha_halves_a_residual_of_length_alpha(self) -> None:
        method = AlphaNormEC(alpha=3.0, beta=3.0)
        message, state = method.client_rule(
            fresh_clients(method, 0, 1), torch.tensor([3.0], dtype=torch.float64), None, 1
        )
        assert float(message) == pytest.approx(0.5, rel=1e-12)
        assert float(state.memory) == pytest.approx(1.5, rel=1e-12)

    @pytest.mark.parametrize("tau", [0.5, 0.25, 0.125])
    def test_clip21_catches_a_fixed_signal_after_its_length_over_tau_rounds(self, tau: float) -> None:
        method = Clip21(clip_norm=tau)
        signal, state = torch.tensor([3.0, -4.0], dtype=torch.float64), fresh_clients(method, 0, 2)
        needed = math.ceil(4.9 / tau)
        for k in range(1, needed + 2):
            message, state = method.client_rule(state, signal, None, k)
            wanted = min(tau, max(5.0 - (k - 1) * tau, 0.0))
            assert float(message.norm()) == pytest.approx(wanted, abs=1e-4)
        assert torch.allclose(state.memory, signal, rtol=1e-14)

    def test_clip21_stops_clipping_after_rounds_in_inverse_proportion_to_tau(self) -> None:
        """From then on, the server's memory is the mean gradient, and the method is gradient descent."""
        active = {}
        for tau in (0.2, 0.1, 0.05):
            method = Clip21(clip_norm=tau, server_lr=0.1 * tau)
            states, sent = descend(method, pulls, start(), int(200 / tau))
            lengths = torch.stack([messages.norm(dim=-1).max() for messages in sent])
            clipped = torch.nonzero(lengths >= tau * (1.0 - 1e-6))
            active[tau] = int(clipped.max()) + 1
            assert active[tau] < 100 / tau
            for before, after in zip(states[active[tau] + 1 : -1], states[active[tau] + 2 :], strict=True):
                gradient = before.model - OPTIMUM
                assert torch.allclose(after.memory, gradient, rtol=1e-9, atol=1e-12)
                assert torch.allclose(after.model, before.model - method.server_lr * gradient, rtol=1e-12, atol=1e-12)
        for tau in (0.2, 0.1):
            assert 1.7 < active[tau / 2.0] / active[tau] < 2.3

    @pytest.mark.parametrize("damping", [0.01, 0.1, 0.3])
    @pytest.mark.parametrize("ratio", [0.2, 1.0])
    def test_damped_memories_end_at_a_shorter_signal(self, damping: float, ratio: float) -> None:
        """The fixed point is signal / (1 + alpha lambda / beta) in the linear regime."""
        method = AlphaNormEC(alpha=2.0, beta=2.0 * ratio, damping=damping)
        signal, state = torch.tensor([3e-7, -4e-7], dtype=torch.float64), fresh_clients(method, 0, 2)
        for k in range(1, 400):
            _, state = method.client_rule(state, signal, None, k)
        assert torch.allclose(state.memory, signal / (1.0 + damping / ratio), rtol=1e-6)


Adversary = Callable[[Tensor, Tensor, float, int, torch.Generator], tuple[Tensor, Tensor]]
"""From both memories, the largest distance, the round and randomness to the signals of two neighboring clients."""


def random_pair(v: Tensor, _: Tensor, distance: float, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    signal = torch.randn(v.shape, dtype=v.dtype, generator=generator) * 10.0 ** ((k * 7) % 5 - 2)
    way = torch.randn(v.shape, dtype=v.dtype, generator=generator)
    return signal, signal + distance * way / way.norm()


def alternating_pair(v: Tensor, w: Tensor, distance: float, k: int, _: torch.Generator) -> tuple[Tensor, Tensor]:
    """Keep both residuals small and push to alternating sides: the worst case in the linear regime."""
    push = torch.zeros_like(v)
    push[0] = distance * (-1.0) ** k
    apart = push - (w - v)
    return v - apart / 2.0, v - apart / 2.0 + push


def greedy_pair(v: Tensor, w: Tensor, distance: float, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Push against the difference of the memories, which makes the messages differ the most in this round."""
    between = v - w
    if float(between.norm()) == 0.0:
        return random_pair(v, w, distance, 2, generator)
    push = distance * between / between.norm()
    middle = (v + w) / 2.0 if k % 3 else v + 0.3 * torch.randn(v.shape, dtype=v.dtype, generator=generator)
    return middle - push / 2.0, middle + push / 2.0


ADVERSARIES: dict[str, Adversary] = {"random": random_pair, "alternating": alternating_pair, "greedy": greedy_pair}
THEOREM: dict[str, tuple[Method, float, float]] = {
    "alpha-normec, beta = alpha": (AlphaNormEC(alpha=0.5, beta=0.5), 0.5, 0.5),
    "alpha-normec, small beta": (AlphaNormEC(alpha=0.5, beta=0.05), 0.5, 0.05),
    "alpha-normec, beta near 2 alpha": (AlphaNormEC(alpha=0.5, beta=0.9), 0.5, 0.9),
    "clip21": (Clip21(clip_norm=0.7), 1.0, 1.0),
    "clip21, tight": (Clip21(clip_norm=0.01), 1.0, 1.0),
}
every_theorem = pytest.mark.parametrize(("method", "a", "beta"), THEOREM.values(), ids=THEOREM.keys())


def sensitivities(method: Method, adversary: Adversary, distance: float, rounds: int, seed: int) -> Tensor:
    """Return distances `[rounds]` of the messages of two clients with signals at most `distance` apart."""
    generator = torch.Generator().manual_seed(seed)
    one = other = fresh_clients(method, 0, 3)
    found = []
    for k in range(1, rounds + 1):
        first, second = adversary(one.memory, other.memory, distance, k, generator)
        assert float((first - second).norm()) <= distance * (1.0 + 1e-9)
        sent, one = method.client_rule(one, first, None, k)
        sent_other, other = method.client_rule(other, second, None, k)
        found.append((sent - sent_other).norm())
    return torch.stack(found)


class TestRecordLevelPrivacy:
    """privacy.md: over K rounds sqrt(sum_k s_k^2) <= 2 D sqrt(K) / (2a - beta), a = alpha, and 1 for clipping."""

    @every_theorem
    @pytest.mark.parametrize("adversary", ADVERSARIES.values(), ids=ADVERSARIES.keys())
    @pytest.mark.parametrize("distance", [1e-3, 0.1, 5.0])
    def test_no_adversary_exceeds_the_theorem_in_any_number_of_rounds(
        self, method: Method, a: float, beta: float, adversary: Adversary, distance: float
    ) -> None:
        for seed in range(2):
            squares = sensitivities(method, adversary, distance, 150, seed) ** 2
            rounds = torch.arange(1, 151, dtype=torch.float64)
            bound = 2.0 * distance * rounds.sqrt() / (2.0 * a - beta)
            # One part in a million for the margin that clipping leaves below its radius.
            assert (squares.cumsum(dim=0).sqrt() <= bound * (1.0 + 1e-6)).all()

    @every_theorem
    def test_an_adversary_comes_near_the_theorem(self, method: Method, a: float, beta: float) -> None:
        """For alternating signals, memories settle beta D / (2a - beta) apart, each s_k at 2D / (2a - beta)."""
        found = sensitivities(method, alternating_pair, 1e-5, 1500, 0)
        bound = 2.0 * 1e-5 * 1500**0.5 / (2.0 * a - beta)
        assert 0.98 * bound <= float((found**2).sum().sqrt()) <= bound * (1.0 + 1e-6)
        assert float(found[-1]) == pytest.approx(2e-5 / (2.0 * a - beta), rel=1e-2)

    @pytest.mark.parametrize("alpha", [0.1, 1.0])
    def test_without_memory_the_bound_has_no_factor_for_feedback(self, alpha: float) -> None:
        normalize = NormalizedSGD(alpha=alpha).bounded
        generator = torch.Generator().manual_seed(1)
        first = torch.randn(3000, 3, dtype=torch.float64, generator=generator)
        first = first * 10.0 ** torch.empty(3000, 1, dtype=torch.float64).uniform_(-6, 2, generator=generator)
        way = torch.nn.functional.normalize(torch.randn(3000, 3, dtype=torch.float64, generator=generator), dim=-1)
        moved = (normalize(first) - normalize(first + 1e-3 * way)).norm(dim=-1)
        assert 0.98 * 1e-3 / alpha <= float(moved.max()) <= 1e-3 / alpha * (1.0 + 1e-9)


SIGMA = 0.3
D = 20_000


def noise_of(k: int, clients: int, size: int) -> Tensor:
    return SIGMA * torch.from_numpy(np.random.default_rng([4, k]).normal(size=(clients, size)))


def carried_noise(method: Method, clients: int, rounds: list[int]) -> dict[int, np.ndarray]:
    """Return the server's memory after some rounds minus that of a noiseless run; signals do not change."""
    signal = torch.linspace(-1.0, 1.0, D, dtype=torch.float64).expand(clients, D) / D**0.5
    quiet = loud = method.init_server(torch.zeros(D, dtype=torch.float64))
    calm = rough = fresh_clients(method, clients, D)
    found = {}
    for k in range(1, max(rounds) + 1):
        messages, calm = method.client_rule(calm, signal, None, k)
        noised, rough = method.client_rule(rough, signal, adding(noise_of(k, clients, D)), k)
        quiet, loud = (
            server_step(method, quiet, messages.mean(dim=0), 1.0),
            server_step(method, loud, noised.mean(dim=0), 1.0),
        )
        if k in rounds:
            found[k] = (loud.memory - quiet.memory).numpy()
    return found


def accepts_only(noise: np.ndarray, variance: float) -> bool:
    """Return True if the variance is accepted and a variance a tenth larger or smaller is rejected."""
    wrong = accepts_variance(noise, 1.1 * variance) or accepts_variance(noise, variance / 1.1)
    return accepts_variance(noise, variance) and not wrong


class TestNoise:
    def test_noise_in_the_published_memory_is_a_random_walk(self) -> None:
        """Its standard deviation is beta sigma sqrt(k / n) per coordinate, its length beta sigma sqrt(k d / n)."""
        method, n = AlphaNormEC(alpha=1.0, beta=0.25), 3
        for k, noise in carried_noise(method, n, [1, 5, 40]).items():
            assert accepts_only(noise, 0.25**2 * SIGMA**2 * k / n)
            length = 0.25 * SIGMA * math.sqrt(k * D / n)
            assert float(np.linalg.norm(noise)) == pytest.approx(length, rel=0.03)

    def test_noise_in_clip21s_memory_is_a_random_walk(self) -> None:
        for k, noise in carried_noise(Clip21(clip_norm=0.3), 3, [1, 5, 40]).items():
            assert accepts_only(noise, SIGMA**2 * k / 3)

    @pytest.mark.parametrize("damping", [0.05, 0.3])
    def test_noise_in_a_damped_memory_is_bounded(self, damping: float) -> None:
        """Its variance is (beta sigma)^2 / n (1 - (1 - lambda)^2k) / (lambda (2 - lambda)): about 1 / (2 lambda)."""
        method, n = AlphaNormEC(alpha=1.0, beta=0.25, damping=damping), 2
        for k, noise in carried_noise(method, n, [1, 5, 60]).items():
            grown = (1.0 - (1.0 - damping) ** (2 * k)) / (damping * (2.0 - damping))
            assert accepts_only(noise, 0.25**2 * SIGMA**2 / n * grown)
            limit = 0.25 * SIGMA / math.sqrt(2.0 * damping * n) / math.sqrt(1.0 - damping / 2.0)
            assert float(noise.std()) <= limit * 1.03

    @pytest.mark.parametrize("ratio", [0.05, 0.3, 1.0])
    def test_noise_in_a_sent_memory_is_stationary(self, ratio: float) -> None:
        """A linear-regime autoregression: variance sigma^2 alpha beta / (2 - beta / alpha), about half of it."""
        alpha, size, clients, sigma = 1.0, 4, 4000, 1e-4
        method = AlphaNormEC(alpha=alpha, beta=ratio * alpha, memory="sent")
        state, rng = fresh_clients(method, clients, size), np.random.default_rng(2)
        signal = torch.full((clients, size), 1e-4, dtype=torch.float64)
        rounds = int(12 / ratio) + 1
        for k in range(1, rounds + 1):
            _, state = method.client_rule(
                state, signal, adding(sigma * torch.from_numpy(rng.normal(size=(clients, size)))), k
            )
        noise = (state.memory - signal).numpy()
        variance = sigma**2 * alpha * method.beta / (2.0 - ratio)
        assert accepts_only(noise, variance)
        assert float(noise.std()) == pytest.approx(sigma * math.sqrt(alpha * method.beta / 2.0), rel=0.6 * ratio + 0.02)
        walk = sigma * method.beta * math.sqrt(rounds)
        assert float(noise.std()) < walk

    def test_published_memories_of_clients_carry_no_noise(self) -> None:
        method = AlphaNormEC(alpha=1.0, beta=0.5)
        state, signal = fresh_clients(method, 2, 50), torch.full((2, 50), 0.1, dtype=torch.float64)
        for k in range(1, 400):
            _, state = method.client_rule(state, signal, adding(noise_of(k, 2, 50)), k)
        assert torch.allclose(state.memory, signal, rtol=1e-10)


class TestDrift:
    """Local steps on f_i(x) = a_i (x - b_i)^2 / 2: after K steps of length h, x - T_i(x) = w_i (x - b_i).

    Here w_i = 1 - (1 - h a_i)^K, so FedAvg stops at sum w_i b_i / sum w_i, for any server step. SCAFFOLD stops at the
    optimum sum a_i b_i / sum a_i, if control variates are the clients' gradients and no corrected step moves.
    """

    CURVES = torch.tensor([[0.5], [1.0], [4.0]], dtype=torch.float64)
    CENTERS = torch.tensor([[3.0], [-1.0], [2.0]], dtype=torch.float64)
    WORK = LocalSteps(steps=5, client_lr=0.1, signal="gradient-mean")

    def last(self, method: Method, rounds: int = 400, work: LocalSteps = WORK) -> float:
        server, clients = method.init_server(start()), fresh_clients(method, 3, 1)
        for k in range(1, rounds + 1):
            offset = method.step_offset(clients, method.shared(server))
            local = LocalSGD(work, server.model, offset, method.step_prox)
            for _ in range(work.steps):
                local.step(lambda at: self.CURVES * (at - self.CENTERS))
            messages, clients = method.client_rule(clients, local.signal(work.steps), None, k)
            server = server_step(method, server, messages.mean(dim=0), 1.0)
        return float(server.model)

    def test_fedavg_stops_at_its_drift_and_scaffold_at_the_optimum(self) -> None:
        weights = 1.0 - (1.0 - 0.1 * self.CURVES) ** 5
        drift = float((weights * self.CENTERS).sum() / weights.sum())
        optimum = float((self.CURVES * self.CENTERS).sum() / self.CURVES.sum())
        assert abs(drift - optimum) > 0.05
        assert self.last(DPFedAvg(clip_norm=100.0, server_lr=0.3)) == pytest.approx(drift, abs=1e-9)
        for clip_norm in (0.1, 100.0):  # a tight clip only delays it
            assert self.last(DPScaffold(clip_norm=clip_norm, server_lr=0.3)) == pytest.approx(optimum, abs=1e-9)

    @pytest.mark.parametrize("steps", [1, 5, 50])
    def test_fedspeed_reaches_the_optimum_unless_its_clip_is_shorter_than_gradients_there(self, steps: int) -> None:
        """At the optimum, h_i is the gradient over prox, up to 3.7 for these clients."""
        optimum = float((self.CURVES * self.CENTERS).sum() / self.CURVES.sum())
        work = LocalSteps(steps=steps, client_lr=0.1)
        found = [self.last(FedSpeed(clip_norm=clip, prox=0.7), 1500, work) for clip in (100.0, 0.5)]
        assert found[0] == pytest.approx(optimum, abs=1e-9)
        assert abs(found[1] - optimum) > 0.05


class TestAveragedSignals:
    @pytest.mark.parametrize("clip_norm", [0.2, 10.0])
    def test_clip21_sgd2m_reaches_the_optimum_that_clipping_misses(self, clip_norm: float) -> None:
        method = Clip21SGD2M(clip_norm=clip_norm, weight=0.3, beta=0.5, server_lr=0.05)
        assert mean_gradient(last_model(method, 3000)) < 1e-9

    def test_with_both_shares_at_one_it_is_clip21(self) -> None:
        one = descend(Clip21SGD2M(clip_norm=0.5, weight=1.0, beta=1.0, server_lr=0.1), pulls, start(), 60)[0]
        other = descend(Clip21(clip_norm=0.5, server_lr=0.1), pulls, start(), 60)[0]
        assert all(torch.equal(a.model, b.model) for a, b in zip(one, other, strict=True))

    def test_no_change_of_signals_moves_messages_by_more_than_the_theorem_says(self) -> None:
        """Gradient ascent on signals that differ by D = 1 in each of ten rounds, and nowhere else.

        Alternating changes are a good start: a memory follows constant ones, and an average damps others.
        """
        method, rounds, used = Clip21SGD2M(clip_norm=1.5, weight=0.9, beta=0.8), 14, 10
        generator, best = torch.Generator().manual_seed(3), 0.0
        base = 0.1 * torch.randn(rounds, 2, generator=generator, dtype=torch.float64)
        change = 0.3 * torch.randn(rounds, 2, generator=generator, dtype=torch.float64)
        change = (change + (-1.0) ** torch.arange(rounds).unsqueeze(1)).requires_grad_()
        limit = 2.0 * math.sqrt(used) / (2.0 - method.beta)
        for _ in range(40):
            moved = change / change.norm(dim=1, keepdim=True) * (torch.arange(rounds) < used).unsqueeze(1)
            sent = []
            for signals in (base, base + moved):
                state = fresh_clients(method, 1, 2)
                for k in range(rounds):
                    message, state = method.client_rule(state, signals[k : k + 1], None, k + 1)
                    sent.append(message)
            apart = (torch.stack(sent[:rounds]) - torch.stack(sent[rounds:])).norm()
            (slope,) = torch.autograd.grad(apart, change)
            with torch.no_grad():
                change += slope / slope.norm()
            best = max(best, float(apart.detach()))
        assert 0.75 * limit < best <= limit

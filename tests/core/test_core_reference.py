"""The product against an independent implementation in numpy: the same models, round after round."""

import dataclasses
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import reference
import torch
from federations import models_of, ragged_digits, setting
from helpers import fresh_clients
from reference import Rounds, SoftmaxRegression

from fedpriv.methods import AlphaNormEC, Clip21, DPFedAvg, Method, NormalizedSGD

CLIP_MARGIN = 1.0 - 2.0**-21
"""Clipping stays this much below its radius, so that rounding cannot lift a message over the bound."""

METHODS: dict[str, Method] = {
    "alpha-normec": AlphaNormEC(alpha=1.0, beta=0.2, server_lr=0.1),
    "alpha-normec, small alpha": AlphaNormEC(alpha=0.1, beta=0.1, server_lr=0.05),
    "alpha-normec without server normalization": AlphaNormEC(
        alpha=0.5, beta=0.5, server_lr=0.5, server_normalization=False
    ),
    "alpha-normec damped": AlphaNormEC(alpha=0.5, beta=0.3, server_lr=0.5, server_normalization=False, damping=0.1),
    "alpha-normec damped and normalized": AlphaNormEC(alpha=0.5, beta=0.3, server_lr=0.1, damping=0.02),
    "alpha-normec sent": AlphaNormEC(alpha=0.5, beta=0.3, server_lr=0.5, server_normalization=False, memory="sent"),
    "alpha-normec sent and damped": AlphaNormEC(
        alpha=0.5, beta=0.3, server_lr=0.5, server_normalization=False, memory="sent", damping=0.1
    ),
    "clip21": Clip21(clip_norm=0.2, server_lr=0.5),
    "clip21 hardly clipping": Clip21(clip_norm=2.0, server_lr=0.5),
    "normalized-sgd": NormalizedSGD(alpha=0.3, server_lr=0.5),
    "dp-fedavg": DPFedAvg(clip_norm=0.3, server_lr=0.5),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())


def wanted(method: Method, problem: SoftmaxRegression, start: np.ndarray, rounds: Rounds) -> list[np.ndarray]:
    """The reference's models."""
    if isinstance(method, AlphaNormEC):
        return reference.alpha_normec(
            problem.gradients,
            start,
            rounds,
            alpha=method.alpha,
            beta=method.beta,
            gamma=method.server_lr,
            server_normalization=method.server_normalization,
            sent=method.memory == "sent",
            damping=method.damping,
        )
    if isinstance(method, Clip21):
        tau = method.clip_norm * CLIP_MARGIN
        return reference.clip21(problem.gradients, start, rounds, tau=tau, gamma=method.server_lr)
    bounded: Callable[[np.ndarray], np.ndarray]
    if isinstance(method, NormalizedSGD):
        alpha = method.alpha
        bounded = lambda vector: reference.normalize(vector, alpha)  # noqa: E731
    else:
        assert isinstance(method, DPFedAvg)
        radius = method.clip_norm * CLIP_MARGIN
        bounded = lambda vector: reference.clip(vector, radius)  # noqa: E731
    return reference.memoryless(problem.gradients, start, rounds, bounded=bounded, gamma=method.server_lr)


@cache
def digits() -> SoftmaxRegression:
    federation = ragged_digits()
    inputs, labels = federation.dataset.train_inputs.numpy(), federation.dataset.train_labels.numpy()
    parts = [federation.rows_of(client) for client in range(federation.population)]
    return SoftmaxRegression([inputs[part] for part in parts], [labels[part] for part in parts], 10)


@cache
def blobs() -> SoftmaxRegression:
    """Five clients of different sizes and labels, three classes, four features."""
    rng = np.random.default_rng(3)
    labels = [rng.choice(3, size, p=rng.dirichlet([0.4] * 3)) for size in (4, 9, 15, 2, 30)]
    return SoftmaxRegression([rng.normal(size=(len(y), 4)) + y[:, None] for y in labels], labels, 3)


def test_the_references_gradient_is_the_slope_of_its_loss() -> None:
    problem, rng = blobs(), np.random.default_rng(0)
    x, way = rng.normal(size=(2, problem.size))
    for client in range(5):
        ahead, behind = problem.loss(x + 1e-5 * way, client), problem.loss(x - 1e-5 * way, client)
        assert (ahead - behind) / 2e-5 == pytest.approx(float(problem.gradient(x, client) @ way), rel=1e-7)


@every_method
def test_models_in_a_loop_over_digits_are_the_references(method: Method) -> None:
    """Fifty rounds of everyone's full gradients without noise, in float32 against float64."""
    made = setting(method)
    found = models_of(made, rounds=50)
    start = made.initial_model.numpy().astype(np.float64)
    models = wanted(method, digits(), start, Rounds(50, made.population.federation.population))
    assert np.abs(models[-1]).max() > 0.02
    for one, other in zip(found, models[1:], strict=True):
        assert np.abs(one.numpy() - other).max() < 1e-5


def rules_alone(method: Method, problem: SoftmaxRegression, start: np.ndarray, rounds: Rounds) -> list[np.ndarray]:
    """The product's rules in float64 on the reference's gradients."""
    clients = fresh_clients(method, rounds.clients, len(start))
    server, models = method.init_server(torch.from_numpy(start.copy())), [start]
    for k in range(rounds.count):
        members = rounds.cohort(k)
        signals = torch.from_numpy(problem.gradients(server.model.numpy()))[members]
        noise = torch.from_numpy(np.array([rounds.noise(k, i) + np.zeros(len(start)) for i in members]))
        noise = noise.reshape(len(members), len(start))
        own = type(clients)(*(field[members] for field in clients))
        messages, own = method.client_rule(own, signals, noise, k + 1)
        for field, new in zip(clients, own, strict=True):
            field[members] = new
        mean = messages.sum(dim=0) / (rounds.prob * rounds.clients)
        server = method.server_rule(server, mean, rounds.prob)
        models.append(server.model.numpy())
    return models


@every_method
@pytest.mark.parametrize("cohort", ["everyone", "some"])
@pytest.mark.parametrize("noisy", [False, True])
def test_rules_in_float64_are_the_references_to_ten_digits(method: Method, cohort: str, noisy: bool) -> None:
    problem, rng, count = blobs(), np.random.default_rng(5), 50
    prob = 1.0 if cohort == "everyone" else 0.4
    cohorts = [np.arange(5) if k == 0 or prob == 1.0 else np.flatnonzero(rng.random(5) < prob) for k in range(count)]
    noise = list(rng.normal(size=(count, 5, problem.size)) * 0.05) if noisy else []
    rounds = Rounds(count, 5, prob, cohorts, noise)
    start = rng.normal(size=problem.size)
    models = wanted(method, problem, start, rounds)
    for one, other in zip(rules_alone(method, problem, start, rounds), models, strict=True):
        assert np.abs(one - other).max() < 1e-10


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("alpha-normec", {"beta": 0.202}),
        ("alpha-normec", {"alpha": 1.02}),
        ("alpha-normec without server normalization", {"server_lr": 0.505}),
        ("alpha-normec damped", {"damping": 0.101}),
        ("clip21", {"clip_norm": 0.202}),
        ("normalized-sgd", {"alpha": 0.303}),
        ("dp-fedavg", {"clip_norm": 0.303}),
    ],
)
def test_the_comparison_would_notice_one_percent(name: str, change: dict[str, float]) -> None:
    method = METHODS[name]
    changed = dataclasses.replace(method, **change)  # type: ignore[type-var]
    made = setting(method)
    start = made.initial_model.numpy().astype(np.float64)
    models = wanted(changed, digits(), start, Rounds(20, made.population.federation.population))
    assert np.abs(models_of(made)[-1].numpy() - models[-1]).max() > 5e-5

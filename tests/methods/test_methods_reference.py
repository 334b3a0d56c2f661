"""The methods compared with an independent numpy implementation: the same models, round after round."""

import dataclasses
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from support import reference
from support.federations import MakeEngine, models_of, ragged_digits, setting
from support.helpers import adding, fresh_clients
from support.reference import Rounds, SoftmaxRegression

from fedpriv.engines import LoopEngine, VectorizedEngine
from fedpriv.methods import (
    AlphaNormEC,
    CenteredClip,
    Clip21,
    Clip21SGD2M,
    DPFedAvg,
    DPScaffold,
    FedAlphaNormEC,
    Method,
    NormalizedSGD,
    ServerOptimized,
    optimized,
    server_step,
)
from fedpriv.methods.server_optimizers import Adagrad, Adam, Momentum, Yogi
from fedpriv.privacy import Poisson
from fedpriv.rounds import begin_round, finish_round
from fedpriv.tasks.local_work import LocalEpochs, LocalWork

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
    "dp-fedavg with server momentum": optimized(DPFedAvg(clip_norm=0.3, server_lr=0.1), Momentum(momentum=0.9)),
    "dp-fedavg with server adam": optimized(DPFedAvg(clip_norm=0.3, server_lr=0.01), Adam(tau=0.01)),
    "alpha-normec with server adam, normalized": optimized(AlphaNormEC(beta=0.2, server_lr=0.01), Adam(tau=0.1)),
    "clip21 with FedAdam": optimized(Clip21(clip_norm=0.2, server_lr=0.01), Adam(tau=0.02, bias_correction=False)),
    "normalized-sgd with server yogi": optimized(NormalizedSGD(alpha=0.3, server_lr=0.01), Yogi(beta1=0.8, tau=0.01)),
    "dp-fedavg with server adagrad": optimized(DPFedAvg(clip_norm=0.3, server_lr=0.02), Adagrad(beta1=0.5, tau=0.01)),
    "clip21-sgd2m": Clip21SGD2M(clip_norm=0.2, weight=0.4, beta=0.6, server_lr=0.5),
    "dp-scaffold, one gradient": DPScaffold(clip_norm=0.2, server_lr=0.3),
    "centered-clip": CenteredClip(clip_norm=0.2, beta=0.4, server_lr=0.3),
    "centered-clip normalized, with server momentum": optimized(
        CenteredClip(bound="normalize", alpha=0.3, beta=0.2, server_lr=0.05), Momentum(momentum=0.5)
    ),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())


def wanted(method: Method, problem: SoftmaxRegression, start: np.ndarray, rounds: Rounds) -> list[np.ndarray]:
    """Return the reference's models."""
    turn = turn_of(method)
    method = method.client_part
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
            turn=turn,
        )
    if isinstance(method, Clip21SGD2M):
        tau, b, b_hat = method.clip_norm * CLIP_MARGIN, method.weight, method.beta
        gamma = method.server_lr
        return reference.clip21_sgd2m(problem.gradients, start, rounds, tau=tau, b=b, b_hat=b_hat, gamma=gamma)
    if isinstance(method, DPScaffold):
        radius = method.clip_norm * CLIP_MARGIN
        return reference.scaffold(
            lambda x, i, *_: problem.gradient(x, i), start, rounds, radius=radius, gamma=method.server_lr
        )
    if isinstance(method, Clip21):
        tau = method.clip_norm * CLIP_MARGIN
        return reference.clip21(problem.gradients, start, rounds, tau=tau, gamma=method.server_lr, turn=turn)
    bounded: Callable[[np.ndarray], np.ndarray]
    beta = method.beta if isinstance(method, CenteredClip) else None
    if isinstance(method, NormalizedSGD) or (isinstance(method, CenteredClip) and method.bound == "normalize"):
        alpha = method.alpha
        bounded = lambda vector: reference.normalize(vector, alpha)  # noqa: E731
    else:
        assert isinstance(method, DPFedAvg | CenteredClip)
        radius = method.clip_norm * CLIP_MARGIN
        bounded = lambda vector: reference.clip(vector, radius)  # noqa: E731
    gamma = method.server_lr
    return reference.memoryless(problem.gradients, start, rounds, bounded=bounded, gamma=gamma, turn=turn, beta=beta)


def turn_of(method: Method) -> reference.Turn:
    """Return the reference's server optimizer."""
    if not isinstance(method, ServerOptimized):
        return reference.as_it_is
    optimizer = method.optimizer
    if isinstance(optimizer, Momentum):
        return reference.momentum(optimizer.momentum)
    assert isinstance(optimizer, Adam | Yogi | Adagrad)
    kind, beta2 = type(optimizer).__name__.lower(), getattr(optimizer, "beta2", 0.0)
    corrected = getattr(optimizer, "bias_correction", False)
    return reference.adaptive(kind, optimizer.beta1, beta2, optimizer.tau, bias_correction=corrected)


@cache
def digits() -> SoftmaxRegression:
    federation = ragged_digits()
    inputs, labels = federation.dataset.train_inputs.numpy(), federation.dataset.train_labels.numpy()
    parts = [federation.rows_of(client) for client in range(federation.population)]
    return SoftmaxRegression([inputs[part] for part in parts], [labels[part] for part in parts], 10)


@cache
def blobs() -> SoftmaxRegression:
    """Return five clients of different sizes and labels, with three classes and four features."""
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
@pytest.mark.sampled
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
    """Return the models of the product's rules in float64 on the reference's gradients."""
    clients = fresh_clients(method, rounds.clients, len(start))
    server, models = method.init_server(torch.from_numpy(start.copy())), [start]
    for k in range(rounds.count):
        members = rounds.cohort(k)
        signals = torch.from_numpy(problem.gradients(server.model.numpy()))[members]
        noise = torch.from_numpy(np.array([rounds.noise(k, i) + np.zeros(len(start)) for i in members]))
        noise = noise.reshape(len(members), len(start))
        own = type(clients)(*(field[members] for field in clients))
        shared = method.shared(server)
        rule = method if shared is None else method.in_round(shared)
        messages, own = rule.client_rule(own, signals, adding(noise), k + 1)
        for field, new in zip(clients, own, strict=True):
            field[members] = new
        mean = messages.sum(dim=0) / (rounds.prob * rounds.clients)
        server = server_step(method, server, mean, rounds.prob)
        models.append(server.model.numpy())
    return models


@every_method
@pytest.mark.parametrize("cohort", ["everyone", "some"])
@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.sampled
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
        ("clip21-sgd2m", {"weight": 0.404}),
        ("clip21-sgd2m", {"beta": 0.606}),
        ("dp-scaffold, one gradient", {"clip_norm": 0.202}),
        ("centered-clip", {"clip_norm": 0.202}),
        ("centered-clip", {"beta": 0.404}),
        ("normalized-sgd", {"alpha": 0.303}),
        ("dp-fedavg", {"clip_norm": 0.303}),
        ("dp-fedavg with server momentum", {"momentum": 0.909}),
        ("dp-fedavg with server adam", {"beta1": 0.909}),
        ("dp-fedavg with server adam", {"tau": 0.0101}),
        ("normalized-sgd with server yogi", {"beta2": 0.98}),
        ("dp-fedavg with server adagrad", {"tau": 0.0101}),
    ],
)
def test_the_comparison_would_notice_one_percent(name: str, change: dict[str, float]) -> None:
    method = METHODS[name]
    if isinstance(method, ServerOptimized):
        changed: Method = optimized(method.method, dataclasses.replace(method.optimizer, **change))  # type: ignore[type-var]
    else:
        changed = dataclasses.replace(method, **change)  # type: ignore[type-var]
    made = setting(method)
    start = made.initial_model.numpy().astype(np.float64)
    models = wanted(changed, digits(), start, Rounds(20, made.population.federation.population))
    assert np.abs(models_of(made)[-1].numpy() - models[-1]).max() > 5e-5


WALKS: dict[str, LocalWork] = {
    "descent": LocalEpochs(epochs=3, client_lr=0.2, signal="gradient-sum"),
    "incremental gradient": LocalEpochs(epochs=2, client_lr=0.1, batch_size=16, order="fixed", signal="gradient-mean"),
}


@pytest.mark.parametrize("work", WALKS)
def test_local_steps_with_some_clients_a_round_are_the_references(work: str) -> None:
    """Fed-alpha-NormEC over fifty Poisson rounds on ragged clients: d_i = (x - T_i(x)) / eta, in float64.

    After every round, the server's memory is the mean of the clients'.
    """
    method, local = FedAlphaNormEC(alpha=0.3, beta=0.2, server_lr=0.05), WALKS[work]
    assert isinstance(local, LocalEpochs)
    problem, clients = digits(), ragged_digits().population
    made = setting(method, work=local, sampling=Poisson(clients, 0.4))
    engine, state = LoopEngine(made.population), method.init_server(made.initial_model)
    sizes = [len(y) for y in problem.labels]
    batches = [fixed_batches(size, local.batch_size or size, local.epochs) for size in sizes]
    etas = [local.client_lr * (1 if local.signal == "gradient-sum" else len(b)) for b in batches]
    assert len({len(b) for b in batches}) == (1 if local.batch_size is None else 5)

    def signals(x: np.ndarray) -> np.ndarray:
        walks = [problem.walk(x, i, local.client_lr, batches[i]) for i in range(clients)]
        return np.stack([(x - end) / eta for end, eta in zip(walks, etas, strict=True)])

    models, cohorts, memory = [], [], torch.zeros(0)
    for k in range(1, 51):
        broadcast = begin_round(made.server, state, k)
        cohorts.append(broadcast.cohort)
        state = finish_round(made.server, state, k, engine.sum_messages(broadcast).sum)
        models.append(state.model.numpy())
        mean = engine.save()["memory"].double().sum(dim=0) / clients
        memory = state._asdict()["memory"]
        assert float((memory - mean).abs().max()) < 1e-6
    assert min(len(members) for members in cohorts) < clients / 4
    assert float(memory.norm()) > 0.05

    start = made.initial_model.numpy().astype(np.float64)
    wanted = reference.alpha_normec(
        signals, start, Rounds(50, clients, 0.4, cohorts), alpha=0.3, beta=0.2, gamma=0.05, server_normalization=True
    )
    for one, other in zip(models, wanted[1:], strict=True):
        assert np.abs(one - other).max() < 1e-5
    assert np.abs(models[-1]).max() > 0.1


def fixed_batches(examples: int, size: int, epochs: int) -> list[np.ndarray]:
    """Return the batches of a fixed order."""
    once = np.array_split(np.arange(examples), range(size, examples, size))
    return once * epochs


@pytest.mark.parametrize("engine", [LoopEngine, VectorizedEngine])
@pytest.mark.parametrize("clip_norm", [0.3, 5.0])
def test_dp_scaffold_with_local_steps_is_its_reference(engine: MakeEngine, clip_norm: float) -> None:
    """Run Poisson rounds of ragged clients with different numbers of steps, in float32 against float64."""
    method = DPScaffold(clip_norm=clip_norm, server_lr=0.4)
    work = LocalEpochs(epochs=2, client_lr=0.2, batch_size=16, order="fixed", signal="gradient-mean")
    problem, clients, count = digits(), ragged_digits().population, 12
    made = setting(method, work=work, sampling=Poisson(clients, 0.6))
    batches = [fixed_batches(len(y), 16, 2) for y in problem.labels]
    found = models_of(made, engine, rounds=count)
    empty = method.init_server(made.initial_model)
    cohorts = [begin_round(made.server, empty, k).cohort for k in range(1, count + 1)]

    def steps(x: np.ndarray, client: int, _: int, correction: np.ndarray) -> np.ndarray:
        gradients, y = [], x
        for batch in batches[client]:
            gradients.append(problem.gradient(y, client, batch))
            y = y - 0.2 * (gradients[-1] + correction)
        return np.mean(gradients, axis=0)

    start = made.initial_model.numpy().astype(np.float64)
    rounds, radius = Rounds(count, clients, 0.6, cohorts), clip_norm * CLIP_MARGIN
    models = reference.scaffold(steps, start, rounds, radius=radius, gamma=method.server_lr)
    bare = reference.scaffold(
        lambda x, i, k, c: steps(x, i, k, 0.0 * c), start, rounds, radius=radius, gamma=method.server_lr
    )
    for one, other in zip(found, models[1:], strict=True):
        assert np.abs(one.numpy() - other).max() < 1e-5
    assert np.abs(models[-1] - bare[-1]).max() > 1e-3  # corrections matter

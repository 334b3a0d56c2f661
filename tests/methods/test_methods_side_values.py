"""Side values: their bound, their arithmetic against an independent reference, and the refusals."""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import numpy as np
import pytest
import torch
from support.federations import advance, models_of, setting
from support.helpers import EXAMPLES, WITH_SIDE_VALUES, adding, fresh_clients
from torch import Tensor

from fedpriv.bounding import Clip
from fedpriv.data.augment import ImageVariants
from fedpriv.engines.loop import LoopEngine
from fedpriv.engines.vectorized import VectorizedEngine
from fedpriv.errors import UserError
from fedpriv.experiment.config import parse_config
from fedpriv.feedback import RoundedRelease
from fedpriv.methods import (
    AdaptiveBound,
    AlphaNormEC,
    CenteredClip,
    Clip21,
    DPFedAvg,
    Method,
    NormalizedSGD,
    PrivateMetrics,
    SideValues,
    optimized,
    server_step,
    side_values_of,
    with_side_values,
)
from fedpriv.methods.memoryless import Memoryless
from fedpriv.methods.server_optimizers import Momentum
from fedpriv.privacy import Poisson, privacy_statement
from fedpriv.rounds import ClientRules, client_round
from fedpriv.streams import SeededStreams

METRICS = PrivateMetrics(share=0.1, max_loss=4.0)
MARGIN = 1.0 - 2.0**-20
"""Messages with side values stay this much below 1."""


def side(method: Method, adaptive: AdaptiveBound | None = None, metrics: PrivateMetrics | None = None) -> SideValues:
    return SideValues(method=method, adaptive=adaptive, metrics=metrics)


@pytest.mark.parametrize("inner", [DPFedAvg(clip_norm=3.0), NormalizedSGD(alpha=0.2)], ids=["clip", "normalize"])
@pytest.mark.parametrize("adaptive", [None, AdaptiveBound(share=0.3)], ids=["fixed", "adaptive"])
@pytest.mark.parametrize("metrics", [None, METRICS], ids=["silent", "metrics"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_message_with_side_values_is_longer_than_one(
    inner: Method, adaptive: AdaptiveBound | None, metrics: PrivateMetrics | None, dtype: torch.dtype
) -> None:
    if adaptive is None and metrics is None:
        assert with_side_values(inner) is inner
        return
    method, rng = side(inner, adaptive, metrics), torch.Generator().manual_seed(1)
    lengths = torch.logspace(-3.0, 6.0, 200).unsqueeze(1)
    signals = torch.nn.functional.normalize(torch.randn(200, 50, generator=rng)) * lengths
    values = torch.randn(200, method.given, generator=rng) * 100.0
    if metrics is not None:
        values[:3] = torch.tensor([[math.nan, 0.0], [math.inf, -math.inf], [0.0, 1.0]])
    given = torch.cat([signals, values], dim=1).to(dtype)
    messages, _ = method.client_rule(method.init_client(50), given, None, 1)
    assert messages.shape == (200, 50 + method.count)
    longest = messages.double().norm(dim=1).max()
    assert MARGIN - 1e-5 < float(longest) <= 1.0
    assert method.bounded.l2_bound == 1.0


@pytest.mark.parametrize("share", [0.01, 0.05, 0.5])
@pytest.mark.parametrize("multiplier", [0.3, 1.0, 7.0])
def test_the_shares_split_one_noise_as_the_paper_does(share: float, multiplier: float) -> None:
    """Noise z on a message with side values is z_Delta on the vector and sigma_b on the count: z^-2 is their sum."""
    method, size, clients = side(DPFedAvg(clip_norm=2.0), AdaptiveBound(share=share)), 4, 40
    state = method.init_server(torch.zeros(size, dtype=torch.float64))
    clean, noisy = (
        method.server_rule(state, torch.full((size + 1,), noise, dtype=torch.float64), 1.0)
        for noise in (0.0, multiplier / clients)
    )
    on_vector = float(noisy[0][0] - clean[0][0]) * clients / 2.0  # in units of the clip norm
    on_count = float(noisy[1].side_values[0] - clean[1].side_values[0]) * clients  # type: ignore[attr-defined]
    assert on_vector**-2 + (2.0 * on_count) ** -2 == pytest.approx(multiplier**-2, rel=1e-5)
    assert on_count == pytest.approx(multiplier / (2.0 * math.sqrt(share)), rel=1e-5)


@dataclass
class Reference:
    """The methods with an adaptive bound in plain numpy, written from the formulas of `side_values.py`."""

    method: Any
    adaptive: AdaptiveBound
    size: int
    clients: int

    def run(self, x: np.ndarray, signals: Any, cohorts: list[np.ndarray], q: float, noise: np.ndarray) -> Any:
        method, share = self.method, self.adaptive.share
        smooth = isinstance(method.bounded, NormalizedSGD().bounded.__class__)
        bound = method.alpha if smooth else method.clip_norm
        kappa = getattr(method, "beta", 0.0) / bound
        memories, v = np.zeros((self.clients, self.size)), np.zeros(self.size)
        weight, bounds, models = math.sqrt(1.0 - share) * MARGIN, [bound], [x]
        for k, cohort in enumerate(cohorts):
            total = noise[k].copy()
            beta = kappa * bound if smooth else getattr(method, "beta", 1.0)
            for i in cohort:
                u = signals(x)[i] - (v if isinstance(method, CenteredClip) else memories[i])
                length = np.linalg.norm(u)
                message = u / (bound + length) if smooth else u * min(1.0, bound * (1.0 - 2.0**-21) / length)
                total[:-1] += message * weight / (1.0 if smooth else bound)
                total[-1] += math.sqrt(share) * MARGIN * (1.0 if length <= bound else -1.0)
                if isinstance(method, AlphaNormEC | Clip21):
                    memories[i] += (beta if smooth else 1.0) * message
            mean = total / (q * self.clients)
            step = mean[:-1] * (1.0 if smooth else bound) / weight
            if isinstance(method, CenteredClip):
                v = v + beta * step
            elif isinstance(method, AlphaNormEC | Clip21):
                v = v + (beta if smooth else 1.0) * q * step
            else:
                v = step
            x = x - method.server_lr * v
            fraction = (mean[-1] / (math.sqrt(share) * MARGIN) + 1.0) / 2.0
            bound *= math.exp(-self.adaptive.rate * (fraction - self.adaptive.quantile))
            bounds.append(bound)
            models.append(x)
        return models, bounds


@pytest.mark.parametrize("q", [1.0, 0.4])
@pytest.mark.parametrize(
    "inner",
    [
        DPFedAvg(clip_norm=0.5, server_lr=0.4),
        Clip21(clip_norm=0.3, server_lr=0.3),
        CenteredClip(clip_norm=0.5, beta=0.4, server_lr=0.3),
        CenteredClip(bound="normalize", alpha=0.5, beta=0.2, server_lr=0.3),
        AlphaNormEC(alpha=0.5, beta=0.3, server_lr=0.3, server_normalization=False),
        NormalizedSGD(alpha=0.5, server_lr=0.3),
    ],
    ids=lambda method: f"{type(method).__name__} {getattr(method, 'bound', '')}",
)
def test_models_and_bounds_are_the_references(inner: Method, q: float) -> None:
    adaptive, clients, size, rounds = AdaptiveBound(quantile=0.6, rate=0.4, share=0.1), 9, 5, 40
    rng = np.random.default_rng(4)
    centers = rng.normal(size=(clients, size)) * np.linspace(0.2, 4.0, clients)[:, None]
    signals = lambda x: x - centers  # noqa: E731
    cohorts = [np.flatnonzero(rng.random(clients) < q) for _ in range(rounds)]
    noise = rng.normal(size=(rounds, size + 1)) * 0.1
    reference = Reference(inner, adaptive, size, clients)
    models, bounds = reference.run(np.full(size, 2.0), signals, cohorts, q, noise)
    method = side(inner, adaptive)
    server = method.init_server(torch.full((size,), 2.0, dtype=torch.float64))
    states = fresh_clients(method, clients, size)
    for k, cohort in enumerate(cohorts):
        assert float(server.side_bound) == pytest.approx(bounds[k], rel=1e-9)  # type: ignore[attr-defined]
        shared = method.shared(server)
        assert shared is not None
        own = type(states)(*(field[cohort] for field in states))
        given = torch.from_numpy(signals(server.model.numpy()))[cohort]
        messages, own = method.in_round(shared).client_rule(own, given, None, k + 1)
        for field, new in zip(states, own, strict=True):
            field[cohort] = new
        mean = (messages.sum(dim=0) + torch.from_numpy(noise[k])) / (q * clients)
        server = server_step(method, server, mean, q)
        assert np.abs(server.model.numpy() - models[k + 1]).max() < 1e-9


@pytest.mark.parametrize("first", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("inner", [DPFedAvg(), NormalizedSGD()], ids=["clip", "normalize"])
def test_the_bound_reaches_the_median_in_fifty_rounds(inner: Method, first: float) -> None:
    """Signals of lengths with median 1, 400 clients, half of them sampled, and the noise of a private run."""
    rng = torch.Generator().manual_seed(7)
    lengths = torch.exp(torch.randn(400, 1, generator=rng, dtype=torch.float64))
    lengths = lengths / lengths.median()
    signals = torch.nn.functional.normalize(torch.randn(400, 30, generator=rng, dtype=torch.float64)) * lengths
    key = "clip_norm" if isinstance(inner, DPFedAvg) else "alpha"
    method = side(replace(cast(Any, inner), **{key: first}), AdaptiveBound())
    server = method.init_server(torch.zeros(30, dtype=torch.float64))
    for k in range(1, 51):
        shared = method.shared(server)
        assert shared is not None
        cohort = torch.rand(400, generator=rng) < 0.5
        messages, _ = method.in_round(shared).client_rule(method.init_client(30), signals[cohort], None, k)
        noise = torch.randn(31, generator=rng, dtype=torch.float64)
        server = server_step(method, server, (messages.sum(dim=0) + noise) / 200.0, 0.5)
    assert float(server.side_bound) == pytest.approx(1.0, rel=0.1)  # type: ignore[attr-defined]


def test_a_round_in_which_nothing_is_finite_or_nobody_came_takes_the_ordinary_way() -> None:
    """A bound that did not move would reveal such a round without noise."""
    method = side(DPFedAvg(clip_norm=2.0), AdaptiveBound())
    server = method.init_server(torch.zeros(3))
    broken, _ = method.client_rule(method.init_client(3), torch.full((4, 3), math.nan), None, 1)
    zero, _ = method.client_rule(method.init_client(3), torch.zeros(4, 3), None, 1)
    assert torch.equal(broken, zero)
    everyone_short = server_step(method, server, broken.mean(dim=0), 1.0)
    assert float(everyone_short.side_bound) == pytest.approx(2.0 * math.exp(-0.1), rel=1e-5)  # type: ignore[attr-defined]
    assert not everyone_short.model.any()
    nobody = server_step(method, server, torch.zeros(4), 1.0)
    assert float(nobody.side_bound) == pytest.approx(2.0)  # type: ignore[attr-defined]


@pytest.mark.parametrize("huge", [-1e30, 1e30])
def test_the_bound_stays_within_a_factor_of_the_first(huge: float) -> None:
    method = side(Clip21(clip_norm=3.0), AdaptiveBound(rate=2.0))
    server = method.init_server(torch.zeros(3))
    for _ in range(5):
        server = server_step(method, server, torch.tensor([0.0, 0.0, 0.0, huge]), 1.0)
    assert float(server.side_bound) == pytest.approx(3e6 if huge < 0 else 3e-6, rel=1e-5)  # type: ignore[attr-defined]


@pytest.mark.parametrize("memory", ["noiseless", "sent"])
def test_memories_take_messages_in_their_own_units(memory: str) -> None:
    """A noiseless memory sees no noise; a sent one sees it in the units of the method's messages."""
    inner = AlphaNormEC(alpha=1.0, beta=0.5, memory=cast(Any, memory))
    method = side(inner, AdaptiveBound(share=0.19))  # a weight of 0.9
    signal, noise = torch.tensor([3.0, 4.0], dtype=torch.float64), torch.tensor([0.09, 0.0, 7.0], dtype=torch.float64)
    state = fresh_clients(method, 0, 2)
    sent, after = method.client_rule(state, signal, adding(noise), 1)
    plain, _ = inner.client_rule(fresh_clients(inner, 0, 2), signal, None, 1)
    share = math.sqrt(0.19)
    assert torch.allclose(sent, torch.cat([0.9 * plain, torch.tensor([-share]).double()]) + noise, rtol=2e-6)
    expected = plain + (torch.tensor([0.1, 0.0]).double() if memory == "sent" else 0.0)
    assert torch.allclose(after.memory, 0.5 * expected, rtol=2e-6)  # type: ignore[attr-defined]


def test_under_secure_aggregation_memories_take_the_rounded_message_and_no_noise() -> None:
    step, calls = 2.0**-6, list[Tensor]()

    def rounded(message: Tensor) -> Tensor:
        calls.append(message)
        return torch.round(message / step) * step

    release = RoundedRelease(rounded=rounded, noised=lambda message: message.double() + 100.0 * step, step=step)
    method = side(Clip21(clip_norm=3.0), AdaptiveBound(share=0.19))
    sent, after = method.client_rule(method.init_client(2), torch.tensor([0.3, 9.0]), release, 1)
    assert len(calls) == 1
    levels = (sent - 100.0 * step) / step
    assert torch.equal(levels, levels.round())
    own = (sent - 100.0 * step)[:2] * 3.0 / (0.9 * MARGIN)
    assert torch.allclose(after.memory.double(), own, rtol=1e-6)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", WITH_SIDE_VALUES)
def test_engines_agree(name: str) -> None:
    method = WITH_SIDE_VALUES[name]
    made = setting(method, sampling=Poisson(12, 0.5), trust="local" if method.needs_client_noise else "central")
    one, other = models_of(made, rounds=4), models_of(made, partial(VectorizedEngine, chunk=5), rounds=4)
    assert float((one[-1] - made.initial_model).abs().max()) > 1e-3
    assert max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True)) <= 1e-6


def test_private_metrics_are_those_of_the_clients() -> None:
    """Without noise, they are the mean loss (capped) and accuracy of the clients at the model that they received."""
    method = optimized(side(EXAMPLES["clip21"], AdaptiveBound(), METRICS), Momentum())
    made = setting(method)
    state, _, _ = advance(LoopEngine(made.population), made.server, made.server.init(made.initial_model), 1, 1)
    people = made.population
    found = [people.task.evaluate(made.initial_model, *people.examples(i)) for i in range(12)]
    names = side_values_of(method)
    assert names is not None
    released = names.released(state._asdict())
    assert released["client_loss"] == pytest.approx(np.mean([each["loss"] for each in found]), rel=1e-4)
    assert released["client_accuracy"] == pytest.approx(np.mean([each["accuracy"] for each in found]), abs=1e-4)
    assert released["bound"] != 0.5
    other = models_of(made, VectorizedEngine, rounds=2)
    for one, twin in zip(models_of(made, rounds=2), other, strict=True):
        assert float((one - twin).abs().max()) <= 1e-6


def test_a_message_without_its_side_values_is_not_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the sum, it would be broadcast or shifted."""
    method = side(DPFedAvg(), AdaptiveBound())
    rules = ClientRules(method=method, noise_stddev=0.0, streams=SeededStreams(1))
    monkeypatch.setattr(SideValues, "join", lambda _, message, __: message)
    with pytest.raises(ValueError, match=r"a message of shape \[3\] for a signal of \[3\]"):
        client_round(rules, 0, method.init_client(3), torch.ones(3), 1)


def test_private_metrics_are_of_the_examples_without_augmentation() -> None:
    made = setting(with_side_values(DPFedAvg(), None, METRICS))
    people = replace(made.population, augment=ImageVariants(rotate=180.0))
    model = torch.randn(len(made.initial_model), generator=torch.Generator().manual_seed(2))
    plain = people.task.evaluate(model, *people.examples(1))
    for round in range(1, 5):
        signal = people.signal(1, model, round)
        assert signal[-2:].tolist() == pytest.approx([plain["loss"], plain["accuracy"]], rel=1e-5)


class Own(Memoryless):
    server_lr = 1.0

    @property
    def bounded(self) -> Clip:
        return Clip(clip_norm=1.0)


@pytest.mark.parametrize("inner", [EXAMPLES["dice-sgd"], EXAMPLES["dp-gd"], Own()], ids=["dice-sgd", "dp-gd", "own"])
def test_methods_without_such_a_bound_are_refused(inner: Method) -> None:
    with pytest.raises(UserError, match=r"^\[adaptive\]: expected a method of fedpriv that bounds one vector"):
        side(inner, AdaptiveBound())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"adaptive": {"quantile": 0.0}}, r"^adaptive\.quantile: expected a number from 0\.01 to 0\.99, got 0"),
        ({"adaptive": {"share": 1.0}}, r"^adaptive\.share"),
        ({"adaptive": {"sigma_b": 1.0}}, r"^adaptive\.sigma_b"),
        (
            {"adaptive": {}, "method": {"name": "alpha-normec", "alpha": 0.1, "beta": 0.3}},
            r"^method\.beta: expected at most alpha with \[adaptive\].*got 3 alpha",
        ),
        (
            {"adaptive": {"share": 0.6}, "privacy": {"epsilon": 8.0, "metrics_share": 0.5}},
            r"^privacy\.metrics_share: expected shares of at most 0\.9",
        ),
        (
            {"privacy": {"epsilon": 8.0, "metrics_share": 0.1, "metrics_max_loss": 0.0}},
            r"^privacy\.metrics_max_loss: expected a number from 1e-06 to 1e\+06, got 0\.0",
        ),
        ({"privacy": {"epsilon": 8.0, "metrics_max_loss": 3.0}}, r"^privacy\.metrics_max_loss: expected no value"),
        (
            {"adaptive": {}, "privacy": {"epsilon": 8.0, "unit": "example", "example_clip": 1.0}},
            r'^\[adaptive\]: expected privacy\.unit = "client"',
        ),
        (
            {"privacy": {"epsilon": 8.0, "unit": "example", "example_clip": 1.0, "metrics_share": 0.1}},
            r'^privacy\.metrics_share: expected privacy\.unit = "client"',
        ),
    ],
)
def test_what_cannot_be_is_one_line(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_config({**TABLES, **changes})


TABLES: dict[str, Any] = {
    "name": "small",
    "seed": 1,
    "data": {"name": "digits", "clients": 8},
    "model": {"name": "softmax"},
    "method": {"name": "dp-fedavg"},
    "training": {"rounds": 2},
}


def test_the_statement_names_the_values_that_clients_send() -> None:
    full = {"adaptive": {}, "privacy": {"epsilon": 8.0, "metrics_share": 0.1}}
    said = [
        " ".join(
            privacy_statement(
                config.plan(Poisson(8, 0.5)), method="dp-fedavg", randomness="seeded", data=config.facts
            ).split()
        )
        for config in (parse_config({**TABLES, **full}), parse_config({**TABLES, "privacy": {"epsilon": 8.0}}))
    ]
    assert "every client also sends: whether its message was shortened, its loss, its accuracy." in said[0]
    assert "every client also sends" not in said[1]


def test_a_config_is_read_again_as_it_was_written() -> None:
    full = {"adaptive": {"quantile": 0.4}, "privacy": {"epsilon": 8.0, "metrics_share": 0.1}, "server": {}}
    config = parse_config({**TABLES, **full, "server": {"optimizer": "momentum"}})
    again = parse_config(config.tables)
    assert again.method == config.method
    assert again.digest == config.digest
    assert config.tables["adaptive"] == {"quantile": 0.4, "rate": 0.2, "share": 0.05}
    plain = parse_config({**TABLES, "privacy": {"epsilon": 8.0}})
    assert "adaptive" not in plain.tables
    assert plain.plan(Poisson(8, 0.5)).l2_bound == 1.0  # type: ignore[union-attr]

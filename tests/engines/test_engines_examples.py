"""Runs that protect single examples: against a reference in numpy, between engines, and under attack."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from support.reference import clipped, rows_of

from fedpriv.engines import LoopEngine, VectorizedEngine
from fedpriv.errors import UserError
from fedpriv.experiment.build import Experiment, assemble
from fedpriv.experiment.config import parse_config
from fedpriv.methods import DPFedAvg, DPScaffold, Method
from fedpriv.privacy import privacy_statement
from fedpriv.rounds import begin_round, client_round, finish_round, make_agreement
from fedpriv.streams import Purpose, SeededStreams
from fedpriv.tasks.local_work import DPSGD, LocalSteps, LocalWork, PoissonGradient, batches_of, make_signal

ROUNDS = 4
FULL = {"work": "full-gradient"}
POISSON = {"work": "poisson-gradient", "rate": 0.3}
STEPS = {"work": "dp-sgd", "rate": 0.3, "steps": 3, "client_lr": 0.5, "signal": "gradient-mean"}
NORMEC = {"name": "alpha-normec", "alpha": 0.5, "beta": 0.2, "damping": 0.1, "server_lr": 5.0}
NORMEC["server_normalization"] = False
CLIP21 = {"name": "clip21", "clip_norm": 0.3, "server_lr": 1.0}
PLAIN = {"name": "dp-gd", "server_lr": 2.0}
SCAFFOLD = {"name": "dp-scaffold", "clip_norm": 0.3, "server_lr": 1.0}
SAM = {**STEPS, "steps": 2, "ascent": 0.4, "prox": 0.5}
SPEED = {"name": "fedspeed", "clip_norm": 0.5, "prox": 0.5, "server_lr": 1.0}
SGD2M = {"name": "clip21-sgd2m", "clip_norm": 0.3, "weight": 0.4, "beta": 0.5, "server_lr": 1.0}


def made(method: dict[str, Any], local: dict[str, Any], clients: int = 5, **privacy: Any) -> Experiment:
    promised = {"unit": "example", "example_clip": 0.7, "noise_multiplier": 0.0, "trust": "local", **privacy}
    tables = {
        "name": "records",
        "seed": 3,
        "data": {"name": "digits", "clients": clients, "partition": "dirichlet", "concentration": 0.5},
        "model": {"name": "softmax"},
        "local": local,
        "method": method,
        "privacy": promised,
        "training": {"rounds": ROUNDS},
    }
    return assemble(parse_config(tables))


def models_of(experiment: Experiment, engine: Any = LoopEngine) -> list[torch.Tensor]:
    running, state = engine(experiment.population), experiment.server.init(experiment.initial_model)
    models = []
    for k in range(1, ROUNDS + 1):
        state = finish_round(
            experiment.server, state, k, running.sum_messages(begin_round(experiment.server, state, k)).sum
        )
        models.append(state.model)
    return models


# The reference: softmax regression, one gradient at a time.


def reference(experiment: Experiment, local: dict[str, Any], method: dict[str, Any]) -> list[np.ndarray]:
    """The models without noise, in numpy and float64, with the batches of the experiment's seed."""
    people = experiment.population
    model, clients = experiment.initial_model.double().numpy(), range(5)
    memories, mean_memory, models = [np.zeros_like(model) for _ in clients], np.zeros_like(model), []
    averages, corrects = [np.zeros_like(model) for _ in clients], method["name"] == "dp-scaffold"
    for k in range(1, ROUNDS + 1):
        messages = []
        for client in clients:
            inputs, labels = (
                part.double().flatten(1).numpy() if part.dim() > 1 else part.numpy() for part in people.examples(client)
            )
            source, at, gradients = people.streams.source(Purpose.LOCAL_WORK, k, client), model, []
            for _ in range(local.get("steps", 1)):
                rate, place, slope = local.get("rate", 1.0), at, at
                for last in (True,) if "ascent" not in local else (False, True):
                    chosen = source.uniform(len(labels)) < rate if rate < 1.0 else np.ones(len(labels), dtype=bool)
                    total = clipped(rows_of(place, inputs[chosen], labels[chosen]), 0.7).sum(axis=0)
                    slope = total / (rate * len(labels))
                    place = place if last else at + local["ascent"] * slope / np.linalg.norm(slope)
                gradients.append(slope + local.get("prox", 0.0) * (at - model))
                correction = mean_memory - memories[client] if corrects else 0.0
                at = at - local.get("client_lr", 0.0) * (gradients[-1] + correction)
            weight = method.get("weight", 1.0)
            averages[client] = (1.0 - weight) * averages[client] + weight * np.mean(gradients, axis=0)
            signal = averages[client]
            if method["name"] == "dp-gd":
                messages.append(clipped(signal[None], 1.0)[0])
                continue
            damping, beta = method.get("damping", 0.0), method.get("beta", 1.0)
            residual = signal - memories[client]
            length = float(np.linalg.norm(residual))
            scale = min(1.0, 0.3 / length) if "clip_norm" in method else 1.0 / (0.5 + length)
            messages.append(scale * residual)
            memories[client] = (1.0 - damping) * memories[client] + beta * messages[-1]
        mean = np.mean(messages, axis=0)
        damping, beta = method.get("damping", 0.0), method.get("beta", 1.0)
        mean_memory = mean if method["name"] == "dp-gd" else (1.0 - damping) * mean_memory + beta * mean
        model = model - method.get("server_lr", 0.1) * mean_memory  # c + mean, if all take part
        models.append(model)
    return models


@pytest.mark.parametrize(
    ("method", "local"), [(NORMEC, FULL), (CLIP21, FULL), (SGD2M, FULL), (PLAIN, FULL), (PLAIN, POISSON)]
)
def test_every_route_is_its_reference_in_numpy(method: dict[str, Any], local: dict[str, Any]) -> None:
    experiment = made(method, local)
    expected = reference(experiment, local, method)
    for ours, theirs in zip(models_of(experiment), expected, strict=True):
        assert np.allclose(ours.numpy(), theirs, rtol=0.0, atol=3e-6)
    assert not np.allclose(expected[-1], experiment.initial_model.numpy(), atol=1e-2)


@pytest.mark.parametrize("local", [STEPS, SAM], ids=["plain", "uphill"])
@pytest.mark.parametrize("method", [PLAIN, SCAFFOLD])
def test_dp_sgd_is_its_reference_up_to_a_little_noise(method: dict[str, Any], local: dict[str, Any]) -> None:
    experiment = made(method, local, noise_multiplier=1e-6)
    for ours, theirs in zip(models_of(experiment), reference(experiment, local, method), strict=True):
        assert np.allclose(ours.numpy(), theirs, rtol=0.0, atol=1e-5)


def test_a_step_uphill_costs_as_much_as_two_and_draws_noise_and_batch_for_each_gradient() -> None:
    plans = [made(PLAIN, local, noise_multiplier=1.0).plan for local in (SAM, {**STEPS, "steps": 4})]
    assert plans[0] is not None
    assert plans[1] is not None
    assert plans[0].record == plans[1].record
    assert plans[0].epsilon == plans[1].epsilon > made(PLAIN, {**STEPS, "steps": 2}, noise_multiplier=1.0).plan.epsilon  # type: ignore[union-attr]
    assert "use 4 sums of bounded" in " ".join(privacy_statement(plans[0], method="dp-gd", randomness="seeded").split())
    experiment = made(PLAIN, SAM, noise_multiplier=1.0)
    work, people = experiment.config.local, experiment.population
    batches = batches_of(work, people.rules.streams, 100, 1, 0)
    assert len({tuple(batch.tolist()) for batch in batches if batch is not None}) == 4
    given = people.task, experiment.initial_model, *people.examples(0)
    level = dataclasses.replace(work, ascent=0.0)  # type: ignore[type-var]
    with pytest.raises(ValueError, match="is not the work that"):
        make_signal(*given, level, batches[:2], people.rules.clipped(1, 0))


def test_fedspeed_runs_on_noised_steps_alone() -> None:
    local = {"work": "dp-sgd", "rate": 0.3, "steps": 2, "client_lr": 0.5, "ascent": 0.3}
    experiment = made(SPEED, local, noise_multiplier=0.5)
    for one, other in zip(models_of(experiment), models_of(experiment, VectorizedEngine), strict=True):
        assert torch.equal(one, other)
    plans = [experiment.plan, made(PLAIN, local, noise_multiplier=0.5).plan]
    assert plans[0] is not None
    assert plans[1] is not None
    assert plans[0].epsilon == plans[1].epsilon


def models_under(method: Method, experiment: Experiment, rounds: int) -> list[torch.Tensor]:
    """The models of another method with the plan, clients and noise of an experiment."""
    people, plan = experiment.population, experiment.plan
    assert plan is not None
    server, client, _ = make_agreement(method, plan.sampling, plan, people.rules.streams)
    running, models = LoopEngine(dataclasses.replace(people, rules=client)), list[torch.Tensor]()
    state = server.init(people.task.initial_model())
    for k in range(1, rounds + 1):
        state = finish_round(server, state, k, running.sum_messages(begin_round(server, state, k)).sum)
        models.append(state.model)
    return models


def test_dp_scaffold_is_dp_fedavg_in_the_first_round_and_for_a_single_client_in_all() -> None:
    """All control variates start at zero; one client's is the server's, so that corrections vanish."""
    scaffold, fedavg = DPScaffold(clip_norm=100.0, server_lr=0.5), DPFedAvg(clip_norm=100.0, server_lr=0.5)
    given = {**SCAFFOLD, "clip_norm": 100.0}
    for clients, equal in ((5, 1), (1, ROUNDS)):
        experiment = made(given, STEPS, clients=clients, noise_multiplier=2.0)
        one, other = (models_under(method, experiment, ROUNDS) for method in (scaffold, fedavg))
        apart = [float((first - second).abs().max()) for first, second in zip(one, other, strict=True)]
        assert max(apart[:equal]) < 1e-5
        assert all(gap > 1e-4 for gap in apart[equal:])


def test_the_noise_of_dp_scaffold_is_that_of_dp_sgd() -> None:
    """Everything after a step's noise is post-processing: the plans of the two methods are equal."""
    plans = [made(method, STEPS, noise_multiplier=1.0).plan for method in (SCAFFOLD, {**PLAIN, "max_norm": 0.7})]
    assert plans[0] is not None
    assert plans[1] is not None
    assert plans[0].epsilon == plans[1].epsilon
    assert plans[0].noise_stddev == plans[1].noise_stddev
    assert plans[0].shares == plans[1].shares == (0.0, 0.0)


def test_the_noise_of_a_step_is_on_the_sum_and_fresh_in_every_step_round_and_client() -> None:
    """With 650 coordinates and 60 steps, the deviation of the noise is known within two percent."""
    experiment = made(PLAIN, {**STEPS, "rate": 1.0, "steps": 4}, noise_multiplier=30.0)
    bare = made(PLAIN, {**STEPS, "rate": 1.0, "steps": 4})
    plan, found = experiment.plan, []
    assert plan is not None
    for client in range(5):
        for k in range(1, 4):
            noisy, clean = (
                one.population.signal(client, one.initial_model, k) * len(one.population.examples(client)[1])
                for one in (experiment, bare)
            )
            found.append((noisy - clean).double().numpy())
    stacked = np.stack(found) * math.sqrt(4)  # a mean of four steps
    assert stacked.std() == pytest.approx(plan.noise_stddev, rel=0.03)
    correlations = np.corrcoef(stacked) - np.eye(len(stacked))
    assert np.abs(correlations).max() < 5.0 / math.sqrt(stacked.shape[1])


@pytest.mark.parametrize("trust", ["central", "local"])
@pytest.mark.parametrize(
    ("method", "local"),
    [
        (NORMEC, FULL),
        (SGD2M, FULL),
        (SCAFFOLD, STEPS),
        (PLAIN, POISSON),
        ({"name": "alpha-normec", "memory": "sent"}, POISSON),
    ],
)
def test_engines_agree(method: dict[str, Any], local: dict[str, Any], trust: str) -> None:
    if trust == "central" and "memory" in method:
        method = {key: value for key, value in method.items() if key != "memory"}
        local = FULL
    experiment = made(method, local, trust="local" if local is STEPS else trust, noise_multiplier=0.5)
    for one, other in zip(models_of(experiment), models_of(experiment, VectorizedEngine), strict=True):
        assert torch.equal(one, other)


def test_memories_and_messages_are_float64() -> None:
    experiment = made(NORMEC, FULL)
    engine = LoopEngine(experiment.population)
    engine.sum_messages(begin_round(experiment.server, experiment.server.init(experiment.initial_model), 1))
    assert {name: part.dtype for name, part in engine.save().items()} == {
        "clients": torch.int64,
        "memory": torch.float64,
        "updated": torch.float64,
    }


# Neighbors: one example of one client is another.


@pytest.mark.parametrize(
    ("method", "least"), [(PLAIN, 0.98), (CLIP21, 0.25), (SGD2M, 0.1), ({**NORMEC, "damping": 0.0}, 0.1)]
)
def test_no_other_example_moves_a_clients_messages_by_more_than_the_plan_says(
    method: dict[str, Any], least: float
) -> None:
    """A search over contents of one example, through all rounds of the client's rule."""
    experiment = made(method, FULL, example_clip=0.05)
    plan, people = experiment.plan, experiment.population
    assert plan is not None
    assert plan.record is not None
    client = int(np.argmin(people.federation.sizes))
    inputs, labels = people.examples(client)
    given = experiment.initial_model
    models = [given + 0.01 * torch.randn(given.shape, generator=torch.Generator().manual_seed(k)) for k in range(3)]

    def messages(content: torch.Tensor, label: int) -> torch.Tensor:
        changed = inputs.clone(), labels.clone()
        changed[0][0], changed[1][0] = content, label
        state, sent = people.rules.init_client(len(given)), []
        for k, model in enumerate(models, 1):
            batches = batches_of(people.work, people.streams, len(labels), k, client)
            signal = make_signal(people.task, model, *changed, people.work, batches, people.rules.clipped(k, client))
            message, state = client_round(people.rules, client, state, signal, k)
            sent.append(message)
        return torch.stack(sent)

    limit, before = plan.record.sensitivity("replace", len(models)), messages(inputs[0], int(labels[0]))
    if plan.record.route == "fresh":
        limit *= math.sqrt(len(models))
    best = 0.0
    for label in range(10):
        for scale in (0.0, 1.0, 30.0):
            for content in (inputs[0] * scale, -inputs[0] * scale, torch.ones_like(inputs[0]) * scale):
                best = max(best, float(torch.linalg.vector_norm(messages(content, label) - before)))
    assert least * limit < best <= limit


def test_a_row_that_is_not_finite_counts_as_zero_and_no_other_row_changes() -> None:
    experiment = made(PLAIN, FULL)
    people, model = experiment.population, experiment.initial_model
    inputs, labels = people.examples(0)
    broken = inputs.clone()
    broken[2] = math.nan
    terms = people.rules.clipped(1, 0)
    assert terms is not None
    with_nan = terms.gradient(people.task, model, broken, labels, None)
    rest = np.delete(np.arange(len(labels)), 2)
    without = terms.gradient(people.task, model, inputs, labels, rest)
    assert bool(torch.isfinite(with_nan).all())
    assert torch.allclose(with_nan, without, rtol=0.0, atol=1e-8)


def test_an_empty_batch_still_gets_noise() -> None:
    experiment = made(PLAIN, {**POISSON, "rate": 1e-6}, noise_multiplier=1.0)
    people = experiment.population
    signal = people.signal(0, experiment.initial_model, 1)
    assert not bool(signal.any())
    message, _ = client_round(people.rules, 0, people.rules.init_client(len(signal)), signal, 1)
    assert bool(message.any())


@pytest.mark.parametrize(
    "work",
    [PoissonGradient(rate=0.3), DPSGD(rate=1.0, steps=2, client_lr=0.1), LocalSteps(steps=2, client_lr=0.1)],
)
def test_clients_refuse_work_that_the_plan_does_not_account_for(work: LocalWork) -> None:
    experiment = made(PLAIN, FULL)
    people = dataclasses.replace(experiment.population, work=work)
    with pytest.raises(ValueError, match="is not the work that"):
        people.signal(0, experiment.initial_model, 1)


def test_a_plan_for_another_memory_is_refused() -> None:
    """The noise of a method without memory would be too little for one that remembers its messages."""
    plan, other = made(PLAIN, FULL).plan, made(CLIP21, FULL)
    assert plan is not None
    bound = other.config.method.bounded.l2_bound
    plan = dataclasses.replace(plan, l2_bound=bound, client_memory=True)
    with pytest.raises(ValueError, match="another client rule"):
        make_agreement(other.config.method, plan.sampling, plan, SeededStreams(0))


# Settings that do not fit are refused before anything is computed.


@pytest.mark.parametrize(
    ("line", "method", "local", "privacy"),
    [
        ("dp-sgd for local steps", PLAIN, {"work": "local-steps", "steps": 2, "client_lr": 0.1}, {}),
        ('"gradient-mean" with dp-scaffold', SCAFFOLD, {**STEPS, "signal": "gradient-sum"}, {}),
        ('trust = "local"', SCAFFOLD, STEPS, {"trust": "central"}),
        ("full gradients with a noiseless memory", SCAFFOLD, POISSON, {}),
        ("full gradients with a noiseless memory", SGD2M, POISSON, {}),
        ("dp-sgd for local steps", PLAIN, {"work": "local-epochs", "epochs": 1, "client_lr": 0.1}, {}),
        ("poisson-gradient", PLAIN, {"work": "minibatch-gradient", "batch_size": 4}, {}),
        ('"full-gradient"', CLIP21, POISSON, {}),
        (
            "local.order: expected no order by loss",
            PLAIN,
            {"work": "local-epochs", "epochs": 1, "client_lr": 0.1, "order": "by-loss"},
            {},
        ),
        ("local steps with fedspeed", SPEED, FULL, {}),
        ('privacy.trust = "local"', PLAIN, STEPS, {"trust": "central"}),
        ("privacy.unit", PLAIN, STEPS, {"unit": "client", "example_clip": None}),
        ("privacy.example_clip", PLAIN, FULL, {"unit": "client"}),
        ("privacy.examples", PLAIN, FULL, {"adjacency": "add-or-remove"}),
        ("method.max_norm", {**PLAIN, "max_norm": 0.1}, FULL, {}),
        ("local.rate", PLAIN, {**POISSON, "rate": 0.0}, {}),
        ("example_normalization", PLAIN, FULL, {"example_clip": None}),
    ],
)
def test_a_combination_without_accounting_is_refused_in_one_line(
    line: str, method: dict[str, Any], local: dict[str, Any], privacy: dict[str, Any]
) -> None:
    with pytest.raises(UserError) as caught:
        made(method, local, **privacy)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_map_that_shrinks_an_example_below_the_rounding_of_sums_is_refused() -> None:
    flat = {**NORMEC, "alpha": 1e12}
    made(flat, FULL)
    experiment = made(flat, FULL, trust="central")
    with pytest.raises(UserError, match=r"Use a smaller method\.max_norm or method\.alpha, cohort or model: rounding"):
        models_of(experiment)


WITHIN = {"name": "mnist-by-writer", "partition": "natural", "test": "within"}


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"data": WITHIN}, r"data\.test: expected no examples held out within clients"),
        ({"data": {**WITHIN, "test": "public", "validation": 0.1}}, r"data\.validation: expected no examples held out"),
        ({"augment": {"name": "images", "flip": True}}, r"\[augment\]: expected no"),
    ],
)
def test_one_example_more_must_not_change_the_use_of_others(changed: dict[str, Any], line: str) -> None:
    tables = {
        "name": "records",
        "seed": 3,
        "data": {"name": "digits", "clients": 5},
        "model": {"name": "softmax"},
        "method": PLAIN,
        "privacy": {"unit": "example", "example_clip": 0.7, "noise_multiplier": 1.0, "examples": 100},
        "training": {"rounds": ROUNDS},
        **changed,
    }
    parse_config(tables)
    tables["privacy"]["adjacency"] = "add-or-remove"
    with pytest.raises(UserError, match=line):
        parse_config(tables)


def test_no_examples_are_no_public_number() -> None:
    with pytest.raises(UserError, match=r"privacy\.examples: expected a whole number of at least 1"):
        made(PLAIN, FULL, examples=0)


def test_late_messages_must_not_be_missing_in_a_noiseless_memory() -> None:
    tables: dict[str, Any] = {
        "name": "records",
        "seed": 3,
        "data": {"name": "digits", "clients": 5},
        "model": {"name": "softmax"},
        "method": CLIP21,
        "privacy": {"unit": "example", "example_clip": 0.3, "noise_multiplier": 1.0, "trust": "central"},
        "training": {"rounds": ROUNDS},
        "devices": {"kind": "uniform", "speed": [1.0, 2.0], "download": [1.0, 2.0], "upload": [1.0, 2.0]},
        "schedule": {"kind": "synchronous", "deadline": 5.0},
    }
    parse_config(tables)
    tables["privacy"]["trust"] = "local"
    with pytest.raises(UserError, match=r"schedule\.deadline: expected no deadline with a noiseless memory"):
        parse_config(tables)
    parse_config({**tables, "method": {**NORMEC, "memory": "sent"}})
    parse_config({**tables, "method": {**PLAIN}})

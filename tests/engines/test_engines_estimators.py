"""Methods with their own signal (DIFF2, Private SpiderBoost, DiceSGD): references, engines, sensitivities, refusals."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import dp_accounting as dpa
import numpy as np
import pytest
import torch
from support.helpers import same
from support.reference import clipped, rows_of
from torch import Tensor

from fedpriv.engines import LoopEngine, VectorizedEngine
from fedpriv.errors import UserError
from fedpriv.experiment.build import Experiment, assemble
from fedpriv.experiment.config import parse_config
from fedpriv.experiment.run import run_experiment
from fedpriv.methods import DIFF2, DPGD, DiceSGD, PrivateSpiderBoost, server_step
from fedpriv.methods.difference_estimators import ServerEstimate
from fedpriv.privacy import Everyone, ExampleTerms, Poisson, PrivacyPlan, RecordBound, make_plan
from fedpriv.privacy.records import ROUNDING
from fedpriv.rounds import Broadcast, begin_round, client_round, finish_round, make_agreement, record_bound
from fedpriv.streams import Purpose, SeededStreams

ROUNDS, CLIP = 5, 0.7
FULL: dict[str, Any] = {"work": "full-gradient"}
POISSON: dict[str, Any] = {"work": "poisson-gradient", "rate": 0.3}
DIFF: dict[str, Any] = {"name": "diff2", "clip_norm": CLIP, "smoothness": 0.4, "period": 3, "server_lr": 1.0}
WEIGHTED = {**DIFF, "restart_weight": 2.0}
BOOST = {**DIFF, "name": "private-spiderboost", "smoothness": 50.0, "server_lr": 2.0}
DICE: dict[str, Any] = {"name": "dice-sgd", "clip_norm": 0.2, "feedback_clip": 0.05, "gradient_cap": CLIP}
DICE["server_lr"] = 1.0
PLAIN: dict[str, Any] = {"name": "dp-gd", "server_lr": 1.0}


def tables_of(method: dict[str, Any], local: dict[str, Any] = FULL, **privacy: Any) -> dict[str, Any]:
    return {
        "name": "records",
        "seed": 3,
        "data": {"name": "digits", "clients": 5, "partition": "dirichlet", "concentration": 0.5},
        "model": {"name": "softmax"},
        "local": local,
        "method": method,
        "privacy": {"unit": "example", "example_clip": CLIP, "noise_multiplier": 0.0, "trust": "local", **privacy},
        "training": {"rounds": ROUNDS},
    }


def made(method: dict[str, Any], local: dict[str, Any] = FULL, **privacy: Any) -> Experiment:
    return assemble(parse_config(tables_of(method, local, **privacy)))


def models_of(experiment: Experiment, engine: Any = LoopEngine, rounds: int = ROUNDS) -> list[Tensor]:
    running, state = engine(experiment.population), experiment.server.init(experiment.initial_model)
    models = []
    for k in range(1, rounds + 1):
        total = running.sum_messages(begin_round(experiment.server, state, k))
        state = finish_round(experiment.server, state, k, total.sum)
        models.append(state.model)
    return models


# The references: softmax regression, one gradient at a time, in numpy and float64.


def batch(experiment: Experiment, local: dict[str, Any], client: int, k: int) -> tuple[np.ndarray, np.ndarray, float]:
    """The inputs and labels of a client's batch, and the number that their sum is divided by."""
    people, rate = experiment.population, local.get("rate", 1.0)
    inputs, labels = people.examples(client)
    source = people.streams.source(Purpose.LOCAL_WORK, k, client)
    chosen = source.uniform(len(labels)) < rate if rate < 1.0 else np.ones(len(labels), dtype=bool)
    return inputs.double().flatten(1).numpy()[chosen], labels.numpy()[chosen], rate * len(labels)


def differences(experiment: Experiment, local: dict[str, Any], method: dict[str, Any]) -> list[np.ndarray]:
    model = experiment.initial_model.double().numpy()
    previous, estimate, models, bound = model, np.zeros_like(model), [], []
    for k in range(1, ROUNDS + 1):
        means, radius = [], method["smoothness"] * float(np.linalg.norm(model - previous))
        if method["name"] == "private-spiderboost":
            radius = min(radius, 2.0 * CLIP)
        for client in range(5):
            inputs, labels, divisor = batch(experiment, local, client, k)
            if k % method["period"] == 1:
                sent = clipped(rows_of(model, inputs, labels), CLIP)
            else:
                moved = rows_of(model, inputs, labels) - rows_of(previous, inputs, labels)
                sent = clipped(moved, radius)
                bound += list(np.linalg.norm(moved, axis=1) > radius)
            means.append(sent.sum(axis=0) / divisor)
        estimate = np.mean(means, axis=0) + (0.0 if k % method["period"] == 1 else estimate)
        previous, model = model, model - method["server_lr"] * estimate
        models.append(model)
    assert any(bound) == (method["name"] == "diff2")
    assert not all(bound)
    return models


def feedback(experiment: Experiment, local: dict[str, Any], method: dict[str, Any]) -> list[np.ndarray]:
    model = experiment.initial_model.double().numpy()
    residuals, models = [np.zeros_like(model) for _ in range(5)], []
    for k in range(1, ROUNDS + 1):
        messages = []
        for client in range(5):
            rows = clipped(rows_of(model, *batch(experiment, local, client, k)[:2]), CLIP)
            returned = clipped(residuals[client][None], method["feedback_clip"])[0]
            messages.append(clipped(rows, method["clip_norm"]).mean(axis=0) + returned)
            residuals[client] = residuals[client] + rows.mean(axis=0) - messages[-1]
        model = model - method["server_lr"] * np.mean(messages, axis=0)
        models.append(model)
    assert min(float(np.linalg.norm(residual)) for residual in residuals) > method["feedback_clip"]
    return models


@pytest.mark.parametrize(
    ("method", "local"),
    [(DIFF, FULL), (DIFF, POISSON), (WEIGHTED, FULL), (BOOST, FULL), (BOOST, POISSON), (DICE, FULL)],
)
def test_every_estimator_is_its_reference_in_numpy(method: dict[str, Any], local: dict[str, Any]) -> None:
    experiment = made(method, local)
    expected = (feedback if method["name"] == "dice-sgd" else differences)(experiment, local, method)
    for ours, theirs in zip(models_of(experiment), expected, strict=True):
        assert np.allclose(ours.numpy(), theirs, rtol=0.0, atol=5e-6)
    assert not np.allclose(expected[-1], experiment.initial_model.numpy(), atol=1e-2)


def test_a_restart_in_every_round_is_dp_gd() -> None:
    alone = made({**DIFF, "period": 1})
    for one, other in zip(models_of(alone), models_of(made(PLAIN)), strict=True):
        assert torch.allclose(one, other, rtol=0.0, atol=1e-6)


def test_nothing_cut_off_is_nothing_to_feed_back() -> None:
    alone = made({**DICE, "clip_norm": CLIP, "server_lr": 1.0})
    for one, other in zip(models_of(alone), models_of(made(PLAIN)), strict=True):
        assert torch.allclose(one, other, rtol=0.0, atol=1e-6)


def test_without_clipping_and_noise_differences_are_gradient_descent() -> None:
    """The differences add up: v is the gradient at every model, not only at restarts."""
    free = {**DIFF, "clip_norm": 1e3, "smoothness": 1e3, "period": 50}
    plain = {**PLAIN, "max_norm": 1e3}
    given: dict[str, Any] = {"example_clip": 1e3}
    for one, other in zip(models_of(made(free, **given)), models_of(made(plain, **given)), strict=True):
        assert torch.allclose(one, other, rtol=0.0, atol=2e-6)


def test_the_residual_takes_away_the_bias_of_clipping() -> None:
    """One client, nine examples that pull a little to the right and one far to the left: the mean gradient is zero.

    With clipped gradients alone, the model leaves this optimum for ever; with feedback it stays near it.
    """
    pulls = np.array([[1.0]] * 9 + [[-9.0]])
    wanders = {}
    for method in (DPGD(max_norm=1.0, server_lr=0.1), DiceSGD(clip_norm=1.0, gradient_cap=9.0, server_lr=0.1)):
        state: Any = method.init_client(1)
        server: Any = method.init_server(torch.zeros(1))
        for k in range(1, 101):
            rows = pulls + 0.1 * float(server.model)
            means = [torch.tensor(clipped(rows, c).mean(axis=0), dtype=torch.float32) for c in (1.0, 9.0)]
            signal = means[0] if isinstance(method, DPGD) else torch.cat([means[0], means[1] - means[0]])
            message, state = method.client_rule(state, signal, None, k)
            server = server_step(method, server, message, 1.0)
        wanders[type(method)] = abs(float(server.model))
    assert wanders[DPGD] > 3.0
    assert wanders[DiceSGD] < 0.5


# Engines, states and restarts.


@pytest.mark.parametrize(("method", "local", "trust"), [(DIFF, POISSON, "central"), (DICE, FULL, "local")])
def test_engines_agree(method: dict[str, Any], local: dict[str, Any], trust: str) -> None:
    experiment = made(method, local, trust=trust, noise_multiplier=0.5)
    for one, other in zip(models_of(experiment), models_of(experiment, VectorizedEngine), strict=True):
        assert same(one, other)


def test_states_are_float64_and_hold_the_public_model() -> None:
    experiment = made(DIFF, noise_multiplier=0.5)
    engine, state = LoopEngine(experiment.population), experiment.server.init(experiment.initial_model)
    engine.sum_messages(begin_round(experiment.server, state, 1))
    saved = engine.save()
    assert saved["previous"].dtype == saved["updated"].dtype == torch.float64
    assert all(same(row, experiment.initial_model.double()) for row in saved["previous"])
    engine = LoopEngine(made(DICE).population)
    engine.sum_messages(begin_round(experiment.server, state, 1))
    assert engine.save()["residual"].dtype == torch.float64


@pytest.mark.parametrize("method", [DIFF, DICE], ids=["diff2", "dice-sgd"])
@pytest.mark.sampled
def test_a_run_that_stops_between_restarts_resumes_to_the_bit(method: dict[str, Any], tmp_path: Path) -> None:
    class StopHereError(Exception):
        pass

    def stop(released: dict[str, Any], _: dict[str, Any]) -> None:
        if released["round"] == 2:
            raise StopHereError

    config = parse_config(tables_of(method, noise_multiplier=0.5))
    run_experiment(config, tmp_path / "whole", engine="loop")
    with pytest.raises(StopHereError):
        run_experiment(config, tmp_path / "parts", engine="loop", watch=stop, checkpoint_every=1)
    run_experiment(config, tmp_path / "parts", engine="loop", resume=True)
    whole, parts = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parts


def test_a_client_without_the_last_model_sends_only_noise_in_that_round() -> None:
    experiment = made(DIFF, noise_multiplier=0.5)
    people, model = experiment.population, experiment.initial_model
    rules = people.rules
    lost, kept = rules.init_client(len(model)), rules.init_client(len(model))
    signal = people.signal(0, model, 1, state=kept)
    _, kept = client_round(rules, 0, kept, signal, 1)
    for k in (2, 3):
        moved = model + torch.linspace(0.0, 0.01 * k, len(model))
        assert bool(people.signal(0, moved, k, state=kept)[: len(model)].any()) == (k == 2)  # it misses round 2
        signal = people.signal(0, moved, k, state=lost)
        assert not bool(signal[: len(model)].any())
        message, after = client_round(rules, 0, lost, signal, k)
        assert bool(message.any())
        assert same(after.previous, moved.double())  # type: ignore[attr-defined]
        assert bool(people.signal(0, model, k + 1, state=after)[: len(model)].any())
    assert bool(people.signal(0, model, 4, state=lost)[: len(model)].any())
    assert DIFF2().lost_memory == DiceSGD().lost_memory == "reset-one"


def test_noise_is_in_units_of_the_rounds_bound_and_none_remains_if_the_model_rests() -> None:
    method = PrivateSpiderBoost(clip_norm=0.5, smoothness=2.0, period=3, restart_weight=4.0)
    model, noise = torch.tensor([3.0, 4.0]), torch.tensor([0.1, -0.2])
    near, far = torch.tensor([3.0, 3.9]), torch.zeros(2)
    for rounds, previous, factor in [
        (3.0, near, 0.5 / 4.0),
        (1.0, near, 2.0 * 0.1),
        (1.0, far, 1.0),
        (2.0, model, 0.0),
    ]:
        state = ServerEstimate(model, previous, torch.ones(2), torch.tensor([rounds]))
        estimate, after = method.server_rule(state, noise, 1.0)
        kept = 0.0 if rounds == 3.0 else 1.0
        assert torch.allclose(estimate, kept + factor * noise, rtol=1e-6)
        assert same(after.previous, model)
    assert method.server_rule(state, 1e6 * noise, 1.0)[0].tolist() == [1.0, 1.0]


# Neighbors: one example of one client is another.


class Rows:
    """Gradients of a client with given gradients of its examples, `[examples, params]` by model."""

    def __init__(self, at: dict[float, np.ndarray]) -> None:
        self._at = at

    def mean(self, at: Tensor, clip_norm: float) -> Tensor:
        return torch.from_numpy(clipped(self._at[float(at[0])], clip_norm).mean(axis=0))

    def change(self, at: Tensor, before: Tensor, radius: float) -> Tensor:
        moved = self._at[float(at[0])] - self._at[float(before[0])]
        return torch.from_numpy(clipped(moved / radius, 1.0).mean(axis=0))


def sent(method: Any, rows: np.ndarray) -> np.ndarray:
    """A client's messages at the models 1, 2, ..., from gradients `[rounds, examples, params]`."""
    state = type(method.init_client(0))(*(field.double() for field in method.init_client(rows.shape[2])))
    gradients, found = Rows({float(k): each for k, each in enumerate(rows, 1)}), []
    for k in range(1, len(rows) + 1):
        model = torch.full((rows.shape[2],), float(k), dtype=torch.float64)
        message, state = method.client_rule(state, method.own_signal(state, model, gradients, k), None, k)
        found.append(message.numpy())
    return np.stack(found)


def climbed(method: Any, rows: np.ndarray, other: np.ndarray, seed: int) -> float:
    """Hill climbing on the contents of all rows and on those `[rounds, params]` of the example that is replaced."""
    rng, best = np.random.default_rng(seed), 0.0

    def moved(rows: np.ndarray, other: np.ndarray) -> float:
        replaced = rows.copy()
        replaced[:, 0] = other
        difference = sent(method, rows) - sent(method, replaced)
        costs = np.ones(len(rows))
        if isinstance(method, DIFF2):
            costs[:: method.period] = method.restart_weight
        return float(np.sqrt(np.square(difference).sum() / np.square(costs).sum() * len(rows)))

    for _ in range(100):
        tried = rows + 0.4 * rng.normal(size=rows.shape), other + 0.4 * rng.normal(size=other.shape)
        found = moved(*tried)
        if found > best:
            best, (rows, other) = found, tried
    return best


@pytest.mark.parametrize(
    "method",
    [DIFF2(period=3, smoothness=0.5), PrivateSpiderBoost(period=3, restart_weight=2.0), DiceSGD(feedback_clip=0.3)],
)
def test_no_replaced_example_moves_messages_by_more_than_stated(method: Any) -> None:
    """The search starts at an example and its opposite, and reaches nearly the bound of differences."""
    dice, rounds, examples = isinstance(method, DiceSGD), 5, 3
    clip = method.gradient_cap if dice else method.clip_norm
    record = record_bound(method, ExampleTerms(clip=clip, examples=examples))
    limit = record.sensitivity("replace", rounds) * (1.0 if dice else math.sqrt(rounds))
    signs = np.array([1.0, -1.0, 1.0, -1.0, 1.0])[:, None] if not dice else np.ones((rounds, 1))
    for seed in range(2):
        rows = np.random.default_rng(seed).normal(size=(rounds, examples, 2))
        rows[:, 0] = 9.0 * signs * np.array([0.6, 0.8])
        best = climbed(method, rows, -rows[:, 0], seed)
        assert best <= limit
        assert best > (0.4 if dice else 0.99) * limit


def test_the_price_of_feedback_is_real() -> None:
    """Others push the residual far out, and clipping hides the example's part; at the end they let all of it go."""
    rounds, examples = 10, 4000
    method = DiceSGD(clip_norm=1.0, gradient_cap=3.0, feedback_clip=10.0 * 2.0 / examples * 1.05)
    record = record_bound(method, ExampleTerms(clip=3.0, examples=examples))
    rows = np.zeros((rounds, examples, 2))
    rows[:, 0] = [0.0, 3.0]
    push = 2.0 - method.feedback_clip  # of clipping a gradient of 3 to 1, as seen in the residual
    residual = 0.0
    for k in range(rounds - 1):
        returned = min(abs(residual), method.feedback_clip) * np.sign(residual)
        wanted = 1.0 if k < (rounds - 1) // 2 else 0.0
        step = push if wanted else -(residual - returned) / max(rounds - 1 - k, 1)
        step = float(np.clip(step, -1.99, 1.99))
        rows[k, 1:, 0] = np.sign(step) * (1.0 + abs(step) * examples / (examples - 1))
        residual = residual - returned + step
    replaced = rows.copy()
    replaced[:, 0] *= -1.0
    moved = float(np.linalg.norm(sent(method, rows) - sent(method, replaced)))
    limit = record.sensitivity("replace", rounds)
    assert 0.8 * limit < moved <= limit
    assert moved > 5.0 * (2.0 / examples) * math.sqrt(rounds)  # the sensitivity of dp-gd with the same clip


@pytest.mark.parametrize(("method", "least"), [(DIFF, 0.6), (DICE, 0.2)])
def test_no_other_example_moves_a_clients_messages_by_more_than_the_plan_says(
    method: dict[str, Any], least: float
) -> None:
    """A search over contents of one example, through all of a client's computation."""
    experiment = made({**method, "smoothness": 0.05} if method is DIFF else method)
    plan, people = experiment.plan, experiment.population
    assert plan is not None
    assert plan.record is not None
    client = int(np.argmin(people.federation.sizes))
    given, (inputs, labels) = experiment.initial_model, people.examples(client)
    models = [given + 0.01 * torch.randn(given.shape, generator=torch.Generator().manual_seed(k)) for k in range(3)]

    def messages(content: Tensor, label: int) -> Tensor:
        before, label_before = inputs[0].clone(), int(labels[0])
        inputs[0], labels[0] = content, label
        try:
            state, found = people.rules.init_client(len(given)), []
            for k, model in enumerate(models, 1):
                signal = people.signal(client, model, k, state=state)
                message, state = client_round(people.rules, client, state, signal, k)
                found.append(message)
            return torch.stack(found)
        finally:
            inputs[0], labels[0] = before, label_before

    first = messages(30.0 * inputs[0], int(labels[0]))
    limit = plan.record.sensitivity("replace", len(models)) * (1.0 if method is DICE else math.sqrt(len(models)))
    contents = [inputs[0] * scale for scale in (0.0, 1.0, 30.0, -30.0)]
    best = max(
        float(torch.linalg.vector_norm(messages(content, label) - first)) for label in range(10) for content in contents
    )
    assert least * limit < best <= limit


# Accounting, composed by hand.

ADD = dpa.NeighboringRelation.ADD_OR_REMOVE_ONE


def composed(events: list[tuple[dpa.DpEvent, int]], relation: dpa.NeighboringRelation = ADD) -> float:
    accountant = dpa.pld.PLDAccountant(relation)
    for event, count in events:
        if count:
            accountant.compose(event, count)
    return accountant.get_epsilon(1e-5)


def plan_of(method: Any, clip: float, rounds: int = 25, **change: Any) -> PrivacyPlan:
    rate = change.pop("rate", 1.0)
    record = record_bound(method, ExampleTerms(clip=clip, examples=500, rate=rate, declared=True))
    given: dict[str, Any] = {"trust": "central", "sampling": Everyone(10), "delta": 1e-5, "noise_multiplier": 3.0}
    return make_plan(**{**given, **change}, rounds=rounds, l2_bound=method.bounded.l2_bound, record=record)


@pytest.mark.parametrize(("rounds", "restarts", "weight"), [(25, 3, 2.0), (20, 2, 0.5), (1, 1, 1.0)])
def test_restarts_and_differences_are_one_composition(rounds: int, restarts: int, weight: float) -> None:
    """Message and noise are over the bound of their round, so that C1 and C2 do not matter."""
    plan = plan_of(DIFF2(clip_norm=0.3, period=10, restart_weight=weight), 0.3, rounds)
    assert plan.l2_sensitivity == pytest.approx(2.0 / 500, rel=2 * ROUNDING)
    stddev = plan.noise_stddev * 500 / 2.0
    by_hand = composed(
        [(dpa.GaussianDpEvent(stddev / weight), restarts), (dpa.GaussianDpEvent(stddev), rounds - restarts)]
    )
    assert plan.epsilon == pytest.approx(by_hand, rel=2e-3)
    assert [plan.epsilon_after(k) for k in range(rounds)] == sorted(plan.epsilon_after(k) for k in range(rounds))
    fitted = plan_of(
        DIFF2(clip_norm=0.3, period=10, restart_weight=weight), 0.3, rounds, epsilon=1.0, noise_multiplier=None
    )
    assert 0.99 < fitted.epsilon <= 1.0
    assert RecordBound.read(plan.as_dict()["record"]) == plan.record
    assert {promise["unit"] for promise in plan.promises()} == {"example", "client"}
    whole = plan.of_clients()
    assert whole is not None
    assert whole.l2_sensitivity == max(weight, 1.0)


def test_secret_batches_amplify_differences_in_full() -> None:
    plan = plan_of(PrivateSpiderBoost(clip_norm=0.3), 0.3, rate=0.1)
    event = dpa.PoissonSampledDpEvent(0.1, dpa.GaussianDpEvent(plan.noise_stddev * 0.1 * 500))
    by_hand = composed([(event, 25)], dpa.NeighboringRelation.REPLACE_ONE)
    assert plan.epsilon == pytest.approx(by_hand, rel=2e-3)


@pytest.mark.parametrize(("cap", "feedback_clip"), [(3.0, 1.0), (3.0, 0.001), (1.0, 1.0)])
def test_feedback_costs_one_gaussian_of_its_sensitivity(cap: float, feedback_clip: float) -> None:
    plan = plan_of(DiceSGD(gradient_cap=cap, feedback_clip=feedback_clip), cap)
    by_hand = (2.0 / 500) * math.sqrt(25) + min(25 * (2.0 / 500) * (cap - 1.0), 2.0 * feedback_clip * math.sqrt(25))
    slack = (2.0 / 500) * ROUNDING * (5.0 + cap * 25) * 1.01
    assert by_hand <= plan.l2_sensitivity <= by_hand + slack
    expected = composed([(dpa.GaussianDpEvent(plan.noise_stddev / by_hand), 1)])
    assert plan.epsilon == pytest.approx(expected, rel=5e-3)
    assert RecordBound.read(plan.as_dict()["record"]) == plan.record
    assert "clip_norm" not in RecordBound(terms=ExampleTerms(clip=1.0, examples=5), l2_bound=1.0).as_dict()


def test_at_ten_rounds_and_three_clips_feedback_costs_seven_times_the_plain_mean() -> None:
    plan, plain = plan_of(DiceSGD(), 3.0, 10), plan_of(DPGD(max_norm=1.0), 1.0, 10)
    ratio = plan.l2_sensitivity / (plain.l2_sensitivity * math.sqrt(10))
    assert ratio == pytest.approx(1.0 + 2.0 * math.sqrt(10), rel=1e-3)


# Settings that cannot be accounted or computed are refused in one line.


@pytest.mark.parametrize(
    ("line", "method", "local", "change"),
    [
        ("privacy.example_clip", {**DIFF, "clip_norm": 0.6}, FULL, {}),
        ("privacy.example_clip", {**DICE, "gradient_cap": 0.6}, FULL, {}),
        ("privacy.example_clip", DIFF, FULL, {"example_clip": None, "example_normalization": 0.1}),
        ("method.gradient_cap", {**DICE, "clip_norm": 0.8}, FULL, {}),
        ("privacy.adjacency", DIFF, FULL, {"adjacency": "add-or-remove", "examples": 100}),
        ("method.restart_weight", WEIGHTED, POISSON, {}),
        ("method.restart_weight", {**DIFF, "restart_weight": 0.0}, FULL, {}),
        ("method.period", {**DIFF, "period": 0}, FULL, {}),
        ('"full-gradient"', DICE, POISSON, {}),
        ("local.work", DIFF, {"work": "dp-sgd", "rate": 0.3, "steps": 2, "client_lr": 0.1}, {}),
        ("local.work", DICE, {"work": "dp-sgd", "rate": 0.3, "steps": 2, "client_lr": 0.1}, {}),
        ("local.work", DIFF, {"work": "local-steps", "steps": 2, "client_lr": 0.1}, {}),
    ],
)
def test_a_combination_without_accounting_is_refused_in_one_line(
    line: str, method: dict[str, Any], local: dict[str, Any], change: dict[str, Any]
) -> None:
    with pytest.raises(UserError) as caught:
        made(method, local, **change)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_proof_of_a_class_is_not_that_of_its_subclasses() -> None:
    class Louder(DiceSGD):
        def own_signal(self, state: Any, model: Tensor, gradients: Any, round: int) -> Tensor:
            return 2.0 * super().own_signal(state, model, gradients, round)

    with pytest.raises(UserError, match=r"method\.name: expected a method with an accounted signal"):
        record_bound(Louder(), ExampleTerms(clip=3.0, examples=100))


@pytest.mark.parametrize("clip", [1.0, 1e6])
def test_the_grid_of_sums_is_fine_enough_for_one_example_in_the_units_of_messages(clip: float) -> None:
    """Messages are in units of the clip, so the limit must not depend on it."""
    method = DIFF2(clip_norm=clip, smoothness=2.0, period=3, server_lr=0.5)
    plan = plan_of(method, clip, trust="central")
    assert plan.record is not None
    rules = make_agreement(method, plan.sampling, plan, SeededStreams(0)).client
    terms = dataclasses.replace(plan.record.terms, examples=10**6)
    many = Broadcast(1, torch.zeros(10**6), np.arange(1), capacity=10_000)
    with pytest.raises(UserError, match="rounding could lengthen"):
        many.empty_sum(dataclasses.replace(rules, examples=terms))


def test_absent_clients_are_refused_where_differences_need_their_last_model() -> None:
    tables = tables_of(DIFF)
    tables["cohort"] = {"sampling": "poisson", "probability": 0.5}
    with pytest.raises(UserError, match=r'cohort\.sampling: expected "everyone" with diff2'):
        parse_config(tables)
    parse_config({**tables, "method": DICE})
    timed = {"kind": "uniform", "speed": [1.0, 2.0], "download": [1.0, 2.0], "upload": [1.0, 2.0]}
    with pytest.raises(UserError, match=r"\[devices\]: expected no such table with diff2"):
        parse_config({**tables_of(DIFF), "devices": timed})
    with pytest.raises(UserError, match=r"method\.restart_weight: expected 1 unless everyone takes part"):
        plan_of(DIFF2(clip_norm=0.3, restart_weight=2.0), 0.3, sampling=Poisson(10, 0.5))

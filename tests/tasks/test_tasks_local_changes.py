"""Changes of local steps: the proximal term, the ascent, and examples in the order of their loss."""

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from support.federations import AnyFederation, MakeEngine, Setting, dataset_of, models_of, ragged_digits, setting
from support.helpers import same
from support.reference import Rounds, SoftmaxRegression, clip, fedspeed, local_steps

from fedpriv.engines import LoopEngine, VectorizedEngine
from fedpriv.errors import UserError
from fedpriv.experiment.timing import gradient_examples
from fedpriv.methods import DPFedAvg, DPScaffold, FedSpeed, Method
from fedpriv.privacy import Everyone, Poisson
from fedpriv.rounds import begin_round
from fedpriv.streams import SeededStreams
from fedpriv.tasks.curricula import by_loss, share_of
from fedpriv.tasks.local_work import DPSGD, LocalEpochs, LocalSteps, LocalWork, batches_of
from fedpriv.tasks.models import Cnn, Mlp, Softmax

CLIP_MARGIN = 1.0 - 2.0**-20
ENGINES: dict[str, MakeEngine] = {"loop": LoopEngine, "vectorized": partial(VectorizedEngine, chunk=5)}
every_engine = pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES.keys())


def problem() -> SoftmaxRegression:
    """Return the ragged digits in numpy."""
    federation = ragged_digits()
    inputs, labels = federation.dataset.train_inputs.numpy(), federation.dataset.train_labels.numpy()
    parts = [federation.rows_of(client) for client in range(federation.population)]
    return SoftmaxRegression([inputs[part] for part in parts], [labels[part] for part in parts], 10)


def fixed(examples: int, size: int, epochs: int) -> list[np.ndarray | None]:
    """Return the batches of a fixed order."""
    return [*np.array_split(np.arange(examples), range(size, examples, size))] * epochs


def away(made: Setting) -> torch.Tensor:
    """Return a model away from the first."""
    return made.initial_model + 0.3 * torch.sin(torch.arange(len(made.initial_model)))


@every_engine
@pytest.mark.parametrize(
    ("signal", "prox", "ascent"),
    [
        ("pseudo-gradient", 2.0, 0.0),
        ("pseudo-gradient", 0.0, 0.7),
        ("gradient-sum", 2.0, 0.7),
        ("gradient-mean", 2.0, 0.7),
    ],
)
def test_local_steps_are_their_reference(engine: MakeEngine, signal: Any, prox: float, ascent: float) -> None:
    """Run five rounds of ragged clients with different numbers of steps, in float32 against float64."""
    lr, size, count, of = 0.2, 16, 5, problem()
    given = {"client_lr": lr, "batch_size": size, "order": "fixed", "signal": signal}
    work = LocalEpochs(epochs=2, prox=prox, ascent=ascent, **given)  # type: ignore[arg-type]
    method = DPFedAvg(clip_norm=0.5, server_lr=0.7)
    made = setting(method, work=work)
    x = made.initial_model.numpy().astype(np.float64)
    bare = x
    for model in models_of(made, engine, rounds=count):
        steps = []
        for at, pull, uphill in ((x, prox, ascent), (bare, 0.0, 0.0)):
            messages = []
            for i, labels in enumerate(of.labels):
                own = partial(lambda y, batch, i: of.gradient(y, i, batch), i=i)
                y, taken = local_steps(own, at, fixed(len(labels), size, 2), lr=lr, prox=pull, ascent=uphill)
                move = {"pseudo-gradient": at - y, "gradient-sum": sum(taken), "gradient-mean": np.mean(taken, axis=0)}
                messages.append(clip(move[signal], 0.5 * CLIP_MARGIN))  # type: ignore[arg-type]
            steps.append(at - 0.7 * np.mean(messages, axis=0))
        x, bare = steps
        assert np.abs(model.numpy() - x).max() < 1e-5
    assert np.abs(x - bare).max() > 1e-3


@every_engine
@pytest.mark.parametrize("clip_norm", [0.3, 50.0])
@pytest.mark.parametrize("rho", [0.0, 0.5])
def test_fedspeed_is_its_reference(engine: MakeEngine, clip_norm: float, rho: float) -> None:
    """Run Poisson rounds; the reference has the paper's letters, and memories have the length of gradients."""
    method, count, of, clients = FedSpeed(clip_norm=clip_norm, prox=0.5, server_lr=0.8), 8, problem(), 12
    work = LocalEpochs(epochs=2, client_lr=0.2, batch_size=16, order="fixed", ascent=rho)
    made = setting(method, work=work, sampling=Poisson(clients, 0.6))
    start = method.init_server(made.initial_model)
    cohorts = [begin_round(made.server, start, k).cohort for k in range(1, count + 1)]
    models = fedspeed(
        of.gradient,
        lambda i: fixed(len(of.labels[i]), 16, 2),
        made.initial_model.numpy().astype(np.float64),
        Rounds(count, clients, 0.6, cohorts),
        radius=clip_norm * CLIP_MARGIN,
        lam=1.0 / 0.5,
        rho=rho,
        lr=0.2,
        gamma=0.8,
    )
    for one, other in zip(models_of(made, engine, rounds=count), models[1:], strict=True):
        assert np.abs(one.numpy() - other).max() < 2e-5
    assert np.abs(models[-1]).max() > 0.05


def test_fedspeed_in_its_first_round_is_the_double_move_of_fedprox() -> None:
    """Without an earlier move, s + h_i = 2 s; the proximal term of the local work adds to the method's."""
    steps: dict[str, Any] = {"steps": 4, "client_lr": 0.2}
    plain = setting(DPFedAvg(clip_norm=100.0), work=LocalSteps(**steps, prox=1.5))
    speed = setting(FedSpeed(clip_norm=100.0, prox=0.5, server_lr=0.5), work=LocalSteps(**steps, prox=1.0))
    one, other = models_of(plain, rounds=1)[0], models_of(speed, rounds=1)[0]
    assert float((one - other).abs().max()) < 1e-6
    assert float((one - plain.initial_model).abs().max()) > 1e-2


def test_a_message_of_fedspeed_is_within_its_bound_for_any_memory_and_a_bad_signal_changes_none() -> None:
    method = FedSpeed(clip_norm=0.5)
    memory = method.init_client(3)._replace(moves=torch.tensor([3e38, -1.0, 2.0]))
    for signal in ([3e38, 0.0, 0.0], [math.nan, 0.0, 0.0], [math.inf, 1.0, 1.0]):
        message, after = method.client_rule(memory, torch.tensor(signal), None, 1)
        assert float(message.double().norm()) <= 0.5
        assert same(after.moves, memory.moves)
    message, after = method.client_rule(memory, torch.tensor([0.0, 1.0, 1.0]), None, 1)
    assert 0.499 < float(message.double().norm()) <= 0.5
    assert after.moves.tolist()[1:] == [0.0, 3.0]


# Engines.

STEPS: dict[str, LocalWork] = {
    "uphill and drawn back": LocalSteps(steps=3, client_lr=0.1, batch_size=20, prox=0.5, ascent=0.3),
    "mean gradients": LocalEpochs(epochs=2, client_lr=0.1, batch_size=15, prox=0.5, ascent=0.3, signal="gradient-mean"),
    "by loss": LocalEpochs(epochs=2, client_lr=0.1, batch_size=15, order="by-loss"),
    "by loss, growing": LocalEpochs(
        epochs=2,
        client_lr=0.1,
        batch_size=15,
        order="by-loss",
        pacing="linear",
        pacing_start=0.3,
        pacing_rounds=4,
        ascent=0.3,
    ),
}
MODELS = {
    "softmax": lambda: Softmax().build((1, 8, 8), 10, 0),
    "mlp": lambda: Mlp(hidden=(16, 8)).build((1, 8, 8), 10, 3),
    "cnn": lambda: Cnn(width=2).build((1, 8, 8), 10, 3),
}
METHODS: dict[str, Method] = {
    "dp-fedavg": DPFedAvg(clip_norm=0.5),
    "fedspeed": FedSpeed(clip_norm=0.5, prox=0.3),
    "dp-scaffold": DPScaffold(clip_norm=0.5, server_lr=0.3),
}


@pytest.mark.parametrize(("work", "method"), [(w, m) for w in STEPS for m in METHODS])
def test_engines_agree_on_every_change_of_local_steps(work: str, method: str) -> None:
    made = setting(METHODS[method], work=STEPS[work], sampling=Poisson(12, 0.5))
    one, other = models_of(made, rounds=6), models_of(made, ENGINES["vectorized"], rounds=6)
    assert float((one[-1] - made.initial_model).abs().max()) > 1e-3
    assert max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True)) <= 1e-6


@pytest.mark.parametrize("model", ["mlp", "cnn"])
@pytest.mark.parametrize("work", ["uphill and drawn back", "by loss, growing"])
def test_engines_agree_on_other_models(model: str, work: str) -> None:
    made = setting(METHODS["fedspeed"], module=MODELS[model](), work=STEPS[work], sampling=Poisson(12, 0.4))
    one = models_of(made, rounds=2)
    for batched in (True, False):
        other = models_of(made, partial(VectorizedEngine, chunk=3, batched=batched), rounds=2)
        assert float((one[-1] - other[-1]).abs().max()) <= 1e-6
    assert float((one[-1] - made.initial_model).abs().max()) > 1e-3


def test_a_client_without_a_slope_or_without_examples_stands_still() -> None:
    """Gradients of zero have no direction: the ascent stays where it is, instead of giving NaN."""
    dataset = dataset_of(torch.zeros(4, 1, 8, 8), torch.tensor([0, 1, 2, 3]), classes=4)
    crowd = AnyFederation(dataset, [np.arange(4), np.array([], dtype=np.int64)])
    for work in (
        LocalSteps(steps=2, client_lr=0.1, ascent=0.5, prox=1.0),
        LocalEpochs(epochs=2, client_lr=0.1, batch_size=2, order="by-loss", ascent=0.5),
    ):
        made = setting(DPFedAvg(), federation=crowd, work=work, sampling=Everyone(2))
        for make in ENGINES.values():
            model = models_of(made, make, rounds=2)[-1]
            assert torch.isfinite(model).all()
        assert not made.population.signal(1, made.initial_model, 1).any()
    assert (
        not setting(DPFedAvg(), federation=crowd, work=LocalSteps(steps=2, client_lr=0.1, ascent=0.5))
        .population.signal(0, made.initial_model, 1)
        .any()
    )


# Curricula.

PACED: dict[str, Any] = {"order": "by-loss", "pacing": "linear", "pacing_start": 0.5, "pacing_rounds": 3}


def losses_of(of: SoftmaxRegression, x: np.ndarray, client: int) -> np.ndarray:
    """Return the losses of a client's examples, one at a time."""
    one = SoftmaxRegression([a[None] for a in of.inputs[client]], [y[None] for y in of.labels[client]], 10)
    return np.array([one.loss(x, i) for i in range(len(one.labels))])


@every_engine
@pytest.mark.parametrize(
    ("pacing", "shares"), [(None, [1.0] * 5), ("linear", [0.2, 0.4, 0.6, 0.8, 1.0]), ("step", [0.2] * 4 + [1.0])]
)
def test_a_curriculum_is_its_reference(engine: MakeEngine, pacing: Any, shares: list[float]) -> None:
    paced: dict[str, Any] = {} if pacing is None else {"pacing": pacing, "pacing_start": 0.2, "pacing_rounds": 4}
    work = LocalEpochs(epochs=2, client_lr=0.2, batch_size=6, order="by-loss", **paced)
    made, of = setting(DPFedAvg(clip_norm=0.5), work=work), problem()
    x = made.initial_model.numpy().astype(np.float64)
    for model, share in zip(models_of(made, engine, rounds=5), shares, strict=True):
        messages = []
        for i, labels in enumerate(of.labels):
            losses = losses_of(of, x, i).astype(np.float32)  # the first model gives all examples one loss
            easiest = sorted(range(len(labels)), key=lambda j: losses[j])[: math.ceil(round(share * len(labels), 9))]
            batches = [np.array(easiest[start : start + 6]) for start in range(0, len(easiest), 6)] * 2
            own = partial(lambda y, batch, i: of.gradient(y, i, batch), i=i)
            y, _ = local_steps(own, x, batches, lr=0.2)
            messages.append(clip(x - y, 0.5 * CLIP_MARGIN))
        x = x - np.mean(messages, axis=0)
        assert np.abs(model.numpy() - x).max() < 1e-5


def test_the_order_is_by_loss_with_ties_in_place_and_nan_last() -> None:
    losses = np.array([2.0, 0.5, math.nan, 0.5, math.inf, 0.1])
    assert [batch.tolist() for batch in by_loss(losses, 1.0, 1) if batch is not None] == [[5], [1], [3], [0], [4], [2]]
    assert [batch.tolist() for batch in by_loss(losses, 0.5, 2) if batch is not None] == [[1, 5], [3]]
    assert [batch.tolist() for batch in by_loss(losses, 1e-6, None) if batch is not None] == [[5]]
    assert by_loss(losses, 1.0, None) == by_loss(losses, 1.0, 6) == [None]
    assert by_loss(losses[:0], 0.5, 3) == [None]


@pytest.mark.parametrize(
    ("pacing", "expected"), [("linear", [0.1, 0.4, 0.7, 1.0, 1.0]), ("step", [0.1, 0.1, 0.1, 1.0, 1.0])]
)
def test_the_share_grows_from_its_start_to_all(pacing: Any, expected: list[float]) -> None:
    assert [share_of(pacing, 0.1, 3, k) for k in range(1, 6)] == pytest.approx(expected)
    assert share_of(None, None, None, 1) == 1.0


@pytest.mark.parametrize("pacing", ["linear", "step"])
def test_a_pass_by_loss_uses_each_of_its_examples_once(pacing: Any) -> None:
    work = LocalEpochs(
        epochs=2, client_lr=0.1, batch_size=4, order="by-loss", pacing=pacing, pacing_start=0.37, pacing_rounds=10
    )
    losses = np.random.default_rng(1).random(29)
    for round in (1, 4, 10, 11, 50):
        batches = batches_of(work, SeededStreams(1), 29, round, 0, lambda: torch.from_numpy(losses))
        used = np.concatenate([np.arange(29) if b is None else b for b in batches[: len(batches) // 2]])
        count = math.ceil(29 * share_of(pacing, 0.37, 10, round))
        assert sorted(used.tolist()) == sorted(np.argsort(losses)[:count].tolist())
    assert int(work.walked(np.array([29]))[0]) == 58
    with pytest.raises(ValueError, match="needs the losses"):
        batches_of(work, SeededStreams(1), 29, 1, 0)


def test_clocks_and_costs_count_both_gradients_of_an_ascent_and_no_losses() -> None:
    by_order = LocalEpochs(epochs=2, client_lr=0.1, batch_size=4, **PACED)
    assert gradient_examples(by_order, 29) == 58
    assert gradient_examples(LocalSteps(steps=3, client_lr=0.1, batch_size=4), 29) == 12
    assert gradient_examples(LocalSteps(steps=3, client_lr=0.1, batch_size=4, ascent=0.1), 29) == 24
    level, uphill = (DPSGD(rate=1.0, steps=3, client_lr=0.1, ascent=ascent) for ascent in (0.0, 0.1))
    assert (gradient_examples(level, 29), gradient_examples(uphill, 29)) == (3 * 29, 6 * 29)


def test_other_orders_compute_no_losses() -> None:
    def refuse() -> torch.Tensor:
        raise AssertionError

    for order in ("fixed", "reshuffled"):
        work = LocalEpochs(epochs=1, client_lr=0.1, batch_size=4, order=order)  # type: ignore[arg-type]
        assert len(batches_of(work, SeededStreams(1), 9, 1, 0, refuse)) == 3


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"prox": -1.0}, r"^local\.prox: expected a positive number"),
        ({"ascent": 1e30}, r"^local\.ascent: expected a number from 1e-20 to 1e20"),
        ({"ascent": math.nan}, r"^local\.ascent: expected a positive number"),
        ({**PACED, "pacing": "root"}, r'^local\.pacing: expected "linear" or "step"'),
        ({**PACED, "order": "fixed"}, r'^local\.pacing: expected no value unless local\.order = "by-loss"'),
        ({**PACED, "pacing": None}, r"^local\.pacing_start: expected a value together with local\.pacing, got 0\.5"),
        ({**PACED, "pacing_start": None}, r"^local\.pacing_start: .*, got a missing key"),
        ({**PACED, "pacing_rounds": None}, r"^local\.pacing_rounds: .*, got a missing key"),
        ({**PACED, "pacing_start": 0.0}, r"^local\.pacing_start: expected a number from 1e-06 to 1"),
        ({**PACED, "pacing_rounds": 0}, r"^local\.pacing_rounds: expected a whole number of at least 1"),
        ({"pacing_rounds": 3}, r'^local\.pacing_rounds: expected no value unless local\.order = "by-loss"'),
    ],
)
def test_wrong_numbers_are_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        LocalEpochs(**{"epochs": 1, "client_lr": 0.1, **wrong})

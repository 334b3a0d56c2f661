"""Local work: the batches of a pass, the signal of local steps, and the equality of one step and one gradient."""

from typing import Any

import numpy as np
import pytest
import torch
from support.federations import Setting, models_of, ragged_digits, setting
from support.helpers import same

from fedpriv.engines import LoopEngine, VectorizedEngine
from fedpriv.errors import UserError
from fedpriv.methods import AlphaNormEC, FedAlphaNormEC
from fedpriv.privacy import Poisson
from fedpriv.streams import SeededStreams
from fedpriv.tasks.local_work import (
    FullGradient,
    LocalEpochs,
    LocalSGD,
    LocalSteps,
    LocalWork,
    MinibatchGradient,
    Signal,
    batches_of,
)

ENGINES = {"loop": LoopEngine, "vectorized": VectorizedEngine}


def passes_of(work: LocalEpochs, examples: int, round: int = 1, client: int = 0) -> list[list[np.ndarray]]:
    """Return the batches of each pass."""
    batches = batches_of(work, SeededStreams(3), examples, round, client)
    each = len(batches) // work.epochs
    assert len(batches) == each * work.epochs
    whole = [np.arange(examples) if batch is None else batch for batch in batches]
    return [whole[start : start + each] for start in range(0, len(whole), each)]


@pytest.mark.parametrize("order", ["fixed", "reshuffled"])
@pytest.mark.parametrize(
    ("examples", "size"), [(10, 3), (10, 5), (10, 1), (10, 9), (10, 10), (3, 10), (1, 1), (7, None)]
)
def test_a_pass_uses_every_example_once(order: str, examples: int, size: int | None) -> None:
    work = LocalEpochs(epochs=3, client_lr=0.1, batch_size=size, order=order)  # type: ignore[arg-type]
    for batches in passes_of(work, examples):
        assert sorted(np.concatenate(batches).tolist()) == list(range(examples))
        assert all(len(batch) == min(size or examples, examples) for batch in batches[:-1])
        assert 0 < len(batches[-1]) <= (size or examples)


def test_a_fixed_order_is_that_of_the_data_in_every_pass_round_and_client() -> None:
    work = LocalEpochs(epochs=2, client_lr=0.1, batch_size=4, order="fixed")
    for round, client in ((1, 0), (2, 0), (1, 5)):
        for batches in passes_of(work, 10, round, client):
            assert [batch.tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_a_reshuffled_order_is_another_one_in_every_pass_round_and_client_and_is_drawn_again() -> None:
    work = LocalEpochs(epochs=2, client_lr=0.1, batch_size=4)
    found = [
        tuple(np.concatenate(batches).tolist())
        for round, client in ((1, 0), (2, 0), (1, 5))
        for batches in passes_of(work, 40, round, client)
    ]
    assert len(set(found)) == 6
    assert found[:2] == [tuple(np.concatenate(batches).tolist()) for batches in passes_of(work, 40)]


def of_works(*works: LocalWork) -> list[Setting]:
    return [setting(AlphaNormEC(), work=work) for work in works]


def signals(made: Setting, round: int = 2) -> torch.Tensor:
    """Return all clients' signals `[clients, params]` at a model away from the first."""
    model = made.initial_model + 0.1 * torch.sin(torch.arange(len(made.initial_model)))
    people = made.population
    return torch.stack([people.signal(client, model, round) for client in range(people.federation.population)])


@pytest.mark.parametrize(
    "given", [{"steps": 3, "batch_size": 5}, {"steps": 3}, {"epochs": 2, "batch_size": 7}, {"epochs": 3}]
)
def test_the_signals_of_a_walk_are_its_move_that_by_its_length_and_by_its_steps(given: dict[str, int]) -> None:
    kind = LocalSteps if "steps" in given else LocalEpochs
    move, total, mean = (
        signals(made)
        for made in of_works(
            *(kind(client_lr=0.05, signal=s, **given) for s in ("pseudo-gradient", "gradient-sum", "gradient-mean"))  # type: ignore[arg-type]
        )
    )
    assert torch.allclose(total, move / 0.05, rtol=1e-4, atol=2e-5)
    sizes = ragged_digits().sizes
    steps = np.full(len(sizes), 3)
    if "epochs" in given:
        steps = given["epochs"] * np.ceil(sizes / given.get("batch_size", 10**6)).astype(int)
    assert torch.allclose(mean * torch.tensor(steps, dtype=torch.float32)[:, None], total, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "work",
    [
        FullGradient(),
        MinibatchGradient(batch_size=7),
        LocalSteps(steps=3, client_lr=0.1),
        LocalSteps(steps=3, client_lr=0.1, batch_size=7),
        LocalEpochs(epochs=3, client_lr=0.1),
        LocalEpochs(epochs=3, client_lr=0.1, batch_size=7),
    ],
)
def test_what_is_walked_through_is_what_the_batches_hold(work: LocalWork) -> None:
    sizes = np.array([1, 6, 7, 8, 30])
    for examples, walked in zip(sizes.tolist(), work.walked(sizes).tolist(), strict=True):
        batches = batches_of(work, SeededStreams(3), examples, 1, 0)
        assert sum(examples if batch is None else len(batch) for batch in batches) == walked


def test_a_pass_over_one_batch_of_everything_is_a_step_of_descent_to_the_bit() -> None:
    descent, passes = of_works(LocalSteps(steps=3, client_lr=0.1), LocalEpochs(epochs=3, client_lr=0.1))
    assert same(signals(descent), signals(passes))


@pytest.mark.parametrize("kind", ["gradient-sum", "gradient-mean"])
@pytest.mark.parametrize("client_lr", [0.1, 1e-6])
def test_the_gradient_of_one_step_on_everything_is_the_full_gradient_to_the_bit(kind: str, client_lr: float) -> None:
    """It holds for a step too short for float32, too: the sum is not computed from the models."""
    given: dict[str, Any] = {"client_lr": client_lr, "signal": kind}
    works = LocalSteps(steps=1, **given), LocalEpochs(epochs=1, **given)
    whole, *single = of_works(FullGradient(), *works)
    assert all(same(signals(one), signals(whole)) for one in single)


@pytest.mark.parametrize("engine", ENGINES)
def test_fed_alpha_normec_with_one_step_on_everything_is_alpha_normec_to_the_bit(engine: str) -> None:
    """Run twenty rounds with some clients each and the server's noise; compare models and memories."""
    figures: dict[str, Any] = {"alpha": 0.5, "beta": 0.2, "server_lr": 0.1}
    one_step = LocalSteps(steps=1, client_lr=0.05, signal="gradient-sum")
    sampling = Poisson(ragged_digits().population, 0.4)
    plain = setting(AlphaNormEC(**figures), sampling=sampling, trust="central")
    federated = setting(FedAlphaNormEC(**figures), work=one_step, sampling=sampling, trust="central")
    for one, other in zip(models_of(plain, ENGINES[engine]), models_of(federated, ENGINES[engine]), strict=True):
        assert same(one, other)


def test_bare_moves_are_fed_alpha_normec_with_figures_by_the_length_of_a_step() -> None:
    """N_alpha(eta u) = N_{alpha / eta}(u): models are equal up to rounding over twenty rounds."""
    eta, sampling = 0.05, Poisson(ragged_digits().population, 0.4)
    steps = {"steps": 3, "client_lr": eta, "batch_size": 10}
    divided = setting(
        FedAlphaNormEC(alpha=0.5, beta=0.2, server_lr=0.1),
        work=LocalSteps(**steps, signal="gradient-sum"),  # type: ignore[arg-type]
        sampling=sampling,
    )
    bare = AlphaNormEC(alpha=0.5 * eta, beta=0.2 * eta, server_lr=0.1)
    moves = setting(bare, work=LocalSteps(**steps), sampling=sampling)  # type: ignore[arg-type]
    for one, other in zip(models_of(divided), models_of(moves), strict=True):
        assert float((one - other).abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"epochs": 0}, r"^local\.epochs: expected a whole number of at least 1"),
        ({"client_lr": 0.0}, r"^local\.client_lr: expected a positive number"),
        ({"batch_size": 0}, r"^local\.batch_size: expected a whole number of at least 1"),
        ({"order": "random"}, r'^local\.order: expected "fixed" or "reshuffled"'),
        ({"signal": "step"}, r'^local\.signal: expected "pseudo-gradient" or "gradient-sum" or "gradient-mean"'),
    ],
)
def test_a_wrong_figure_is_refused(wrong: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        LocalEpochs(**{"epochs": 1, "client_lr": 0.1, **wrong})


@pytest.mark.parametrize(("examples", "size"), [(15, 5), (17, 5), (6, 4), (3, 1)])
def test_the_batches_of_passes_are_sorted_pieces_of_each_order(examples: int, size: int) -> None:
    work = LocalEpochs(epochs=3, client_lr=0.1, batch_size=size)
    found, rng = work.batches(examples, np.random.default_rng(7)), np.random.default_rng(7)
    orders = [rng.permutation(examples) for _ in range(3)]
    expected = [np.sort(order[start : start + size]) for order in orders for start in range(0, examples, size)]
    assert len(found) == len(expected)
    assert all(a is not None and np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("signal", ["pseudo-gradient", "gradient-sum"])
def test_steps_in_place_leave_the_round_s_model_and_the_gradients_alone(signal: Signal) -> None:
    start, gradients = torch.zeros(3), [torch.ones(3), torch.full((3,), 2.0), torch.full((3,), 4.0)]
    kept = [gradient.clone() for gradient in gradients]
    local = LocalSGD(LocalSteps(steps=3, client_lr=0.5, signal=signal), start)
    for gradient in gradients:
        local.step(lambda _, gradient=gradient: gradient)
    assert torch.equal(start, torch.zeros(3))
    assert all(torch.equal(a, b) for a, b in zip(gradients, kept, strict=True))
    assert torch.equal(local.signal(3), torch.full((3,), 7.0 if signal == "gradient-sum" else 3.5))

"""All engines run the same experiment: the loop is the reference; chunks and restarts change nothing."""

import contextlib
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from support.federations import (
    AnyFederation,
    MakeEngine,
    Setting,
    advance,
    dataset_of,
    models_of,
    ragged_digits,
    setting,
)
from support.helpers import EXAMPLES, same
from torch import Tensor

from fedpriv.bounding import Clip
from fedpriv.engines import LoopEngine, Population, VectorizedEngine, one_thread
from fedpriv.methods import AlphaNormEC, Clip21, DPFedAvg, Method, NormalizedSGD, own_signal_of
from fedpriv.privacy import Everyone, FixedSize, Poisson, Sampling, TrustName
from fedpriv.rounds import Broadcast, begin_round
from fedpriv.streams import SeededStreams
from fedpriv.tasks.local_work import FullGradient, LocalEpochs, LocalSteps, LocalWork, MinibatchGradient
from fedpriv.tasks.models import Cnn, Mlp, Softmax
from fedpriv.tasks.task import Task

CLIENTS = 12
ENGINES: dict[str, MakeEngine] = {
    "loop": LoopEngine,
    "vectorized": VectorizedEngine,
    "vectorized in chunks": partial(VectorizedEngine, chunk=5),
}
WORKS: dict[str, LocalWork] = {
    "full gradient": FullGradient(),
    "minibatch": MinibatchGradient(batch_size=20),
    "local steps": LocalSteps(steps=3, client_lr=0.1, batch_size=20),
    "local steps on all examples": LocalSteps(steps=2, client_lr=0.1),
    "epochs": LocalEpochs(epochs=2, client_lr=0.05, batch_size=20),
    "epochs, mean gradient": LocalEpochs(epochs=2, client_lr=0.05, batch_size=20, signal="gradient-mean"),
    "epochs in a fixed order, sum of gradients": LocalEpochs(
        epochs=1, client_lr=0.05, batch_size=15, order="fixed", signal="gradient-sum"
    ),
}
COHORTS: dict[str, Sampling] = {
    "everyone": Everyone(CLIENTS),
    "poisson": Poisson(CLIENTS, 0.3),
    "fixed": FixedSize(CLIENTS, 4),
}
MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "softmax": lambda: Softmax().build((1, 8, 8), 10, 0),
    "mlp": lambda: Mlp(hidden=(16, 8)).build((1, 8, 8), 10, 3),
    "cnn": lambda: Cnn(width=2).build((1, 8, 8), 10, 3),
}
every_engine = pytest.mark.parametrize("make", ENGINES.values(), ids=ENGINES.keys())


def covering() -> list[tuple[str, str, TrustName | None, str]]:
    """Return methods, works, trust and cohorts that cover every valid pair of values for some method."""
    found = []
    for shift, name in enumerate(EXAMPLES):
        trusts: list[TrustName | None] = ["local"] if EXAMPLES[name].needs_client_noise else [None, "central", "local"]
        for turn in range(3):
            work = list(WORKS)[(shift + turn) % len(WORKS)]
            cohort = list(COHORTS)[(shift // len(WORKS) + turn) % len(COHORTS)]
            found.append((name, work, trusts[(shift + 2 * turn) % len(trusts)], cohort))
    return found


def states_of(engine: LoopEngine | VectorizedEngine, rules: Method) -> dict[int, tuple[Tensor, ...]]:
    """Return the saved state of each client seen."""
    saved = engine.save()
    fields = rules.init_client(0)._fields
    return {
        client: tuple(saved[field][row] for field in fields) for row, client in enumerate(saved["clients"].tolist())
    }


@pytest.mark.parametrize(("name", "work", "trust", "cohort"), covering())
@pytest.mark.sampled
def test_vectorized_is_the_loop_up_to_rounding(
    name: str, work: str, trust: TrustName | None, cohort: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare the models of twenty rounds within 1e-6, and the states of all clients seen.

    Noise rounds to a grid. So with noise, torch computes all gradients here; see the test below for those of C.
    """
    if trust is not None:
        monkeypatch.setattr("fedpriv.tasks.dense.softmax_in_c", lambda: None)
    method, rounds = EXAMPLES[name], 20
    made = setting(method, work=WORKS[work], sampling=COHORTS[cohort], trust=trust, noise_multiplier=0.05)
    start = method.init_server(made.initial_model)
    loop, vectorized = LoopEngine(made.population), VectorizedEngine(made.population, chunk=5)
    _, one, totals = advance(loop, made.server, start, 1, rounds)
    _, other, totals_other = advance(vectorized, made.server, start, 1, rounds)
    assert float((one[-1] - made.initial_model).abs().max()) > 1e-3
    for first, second in zip(one, other, strict=True):
        assert float((first - second).abs().max()) <= 1e-6
    for total, twin in zip(totals, totals_other, strict=True):
        assert (total.messages, total.non_finite) == (twin.messages, twin.non_finite)
        assert total.signal_norm == pytest.approx(twin.signal_norm, rel=1e-4, nan_ok=True)
    states, twins = states_of(loop, method), states_of(vectorized, method)
    assert states.keys() == twins.keys()
    for client, fields in states.items():
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(fields, twins[client], strict=True))


@pytest.mark.parametrize("trust", ["central", "local"])
@pytest.mark.parametrize("name", ["alpha-normec with a small alpha", "clip21"])
def test_gradients_of_c_with_noise_move_few_numbers_to_the_next_grid_point(name: str, trust: TrustName) -> None:
    """A number with other last bits may be rounded to the next point of the noise's grid, but hardly ever is."""
    made = setting(EXAMPLES[name], work=WORKS["local steps"], trust=trust, noise_multiplier=0.05)
    one, other = models_of(made, rounds=10), models_of(made, partial(VectorizedEngine, chunk=5), rounds=10)
    moved = float((one[-1] - made.initial_model).abs().max())
    for first, second in zip(one, other, strict=True):
        apart = (first - second).abs()
        assert float((apart > 1e-6).float().mean()) <= 0.005
        assert float(apart.max()) <= 0.01 * moved


@pytest.mark.parametrize("work", WORKS)
@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.sampled
def test_every_method_with_every_local_work_is_the_loop_up_to_rounding(name: str, work: str) -> None:
    """Run three rounds of ragged clients, in chunks of clients with different numbers of steps."""
    made = setting(EXAMPLES[name], work=WORKS[work], sampling=COHORTS["poisson"])
    one, other = models_of(made, rounds=3), models_of(made, partial(VectorizedEngine, chunk=5), rounds=3)
    moved = float((one[-1] - made.initial_model).abs().max())
    assert moved > 1e-5
    apart = [float((first - second).abs().max()) for first, second in zip(one, other, strict=True)]
    assert max(apart) <= min(1e-6, 0.01 * moved)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_loop_asks_the_method_once_per_client_and_round(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference is the paper: the loop calls its client rule, for one client at a time."""
    made, asked = setting(EXAMPLES[name], sampling=COHORTS["fixed"]), []
    kind = type(made.population.rules.method)
    rule = kind.client_rule

    def counted(self: Method, state: Any, signal: Tensor, release: Any, round: int) -> Any:
        asked.append((round, tuple(signal.shape), [tuple(field.shape) for field in state]))
        return rule(self, state, signal, release, round)

    monkeypatch.setattr(kind, "client_rule", counted)
    size = len(made.initial_model)
    shapes = [tuple(field.shape) for field in made.population.rules.method.init_client(size)]
    models_of(made, LoopEngine, rounds=3)
    own = own_signal_of(EXAMPLES[name])
    assert asked == [(number, (size * (own.vectors if own else 1),), shapes) for number in (1, 2, 3) for _ in range(4)]


def test_the_covering_covers() -> None:
    cases = covering()
    assert {case[0] for case in cases} == set(EXAMPLES)
    for first, second in ((1, 2), (1, 3), (2, 3)):
        kinds = (list(EXAMPLES), list(WORKS), [None, "central", "local"], list(COHORTS))
        missing = {(a, b) for a in kinds[first] for b in kinds[second]} - {
            (case[first], case[second]) for case in cases
        }
        assert not missing


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("work", ["full gradient", "local steps"])
def test_engines_agree_on_every_kind_of_model(model: str, work: str) -> None:
    method = Clip21(clip_norm=0.5, server_lr=0.3)
    made = setting(method, module=MODELS[model](), work=WORKS[work], sampling=COHORTS["fixed"])
    one, other = models_of(made, rounds=8), models_of(made, partial(VectorizedEngine, chunk=3), rounds=8)
    assert float((one[-1] - made.initial_model).abs().max()) > 1e-3
    assert float((one[-1] - other[-1]).abs().max()) <= 1e-6


@pytest.mark.parametrize("chunk", [1, 2, 7, 12, 100])
def test_the_size_of_a_chunk_changes_nothing_beyond_rounding(chunk: int) -> None:
    for work in ("full gradient", "local steps"):
        made = setting(EXAMPLES["alpha-normec sent"], work=WORKS[work], trust="local")
        whole = models_of(made, VectorizedEngine, rounds=6)
        parts = models_of(made, partial(VectorizedEngine, chunk=chunk), rounds=6)
        for one, other in zip(whole, parts, strict=True):
            assert float((one - other).abs().max()) <= 1e-6


@every_engine
def test_an_engine_repeats_itself_to_the_bit(make: MakeEngine) -> None:
    made = setting(EXAMPLES["alpha-normec"], work=WORKS["minibatch"], sampling=COHORTS["poisson"], trust="central")
    first, second = models_of(made, make, 6), models_of(made, make, 6)
    assert all(same(one, other) for one, other in zip(first, second, strict=True))
    other_seed = setting(
        EXAMPLES["alpha-normec"], work=WORKS["minibatch"], sampling=COHORTS["poisson"], trust="central", seed=6
    )
    assert not same(models_of(other_seed, make, 6)[-1], first[-1])


def test_the_loop_gives_the_same_bits_for_any_number_of_threads() -> None:
    made = setting(EXAMPLES["clip21"], sampling=COHORTS["fixed"])
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(models_of(made, rounds=4)[-1])
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert same(*found)


def test_one_thread_gives_the_threads_back_also_after_an_error() -> None:
    torch.set_num_threads(2)
    inside = 0
    with contextlib.suppress(KeyError), one_thread():
        inside = torch.get_num_threads()
        raise KeyError
    assert (inside, torch.get_num_threads()) == (1, 2)


@pytest.mark.parametrize(
    "name", ["alpha-normec damped", "alpha-normec sent", "clip21", "dp-fedavg", "clip21-sgd2m", "dp-scaffold"]
)
@pytest.mark.parametrize("first", ["loop", "vectorized"])
@pytest.mark.parametrize("second", ["loop", "vectorized"])
def test_a_run_that_was_saved_and_restored_is_the_uninterrupted_one(name: str, first: str, second: str) -> None:
    """Results are equal to the bit in one engine, and up to rounding between engines."""
    method = EXAMPLES[name]
    trust = "local" if method.needs_client_noise else "central"
    work = WORKS["epochs, mean gradient" if method.corrects_steps else "minibatch"]
    made = setting(method, work=work, sampling=COHORTS["poisson"], trust=trust)
    start = method.init_server(made.initial_model)
    _, whole, _ = advance(ENGINES[second](made.population), made.server, start, 1, 8)
    engine = ENGINES[first](made.population)
    state, _, _ = advance(engine, made.server, start, 1, 4)
    fresh = ENGINES[second](made.population)
    fresh.restore({key: tensor.clone() for key, tensor in engine.save().items()})
    _, rest, _ = advance(fresh, made.server, state, 5, 8)
    if first == second:
        assert all(same(one, other) for one, other in zip(whole[4:], rest, strict=True))
    assert all(float((one - other).abs().max()) <= 1e-6 for one, other in zip(whole[4:], rest, strict=True))


@every_engine
@pytest.mark.parametrize("name", ["alpha-normec damped", "clip21", "dp-fedavg"])
def test_saving_gives_back_what_was_restored_to_the_bit(make: MakeEngine, name: str) -> None:
    made = setting(EXAMPLES[name], sampling=COHORTS["poisson"])
    engine = make(made.population)
    advance(engine, made.server, made.server.method.init_server(made.initial_model), 1, 3)
    saved = engine.save()
    for other in ENGINES.values():
        twin = other(made.population)
        twin.restore(saved)
        again = twin.save()
        assert again.keys() == saved.keys()
        assert all(same(again[key], saved[key]) for key in saved)
    assert all(tensor.device.type == "cpu" for tensor in saved.values())


@every_engine
def test_what_was_saved_does_not_change_while_the_run_goes_on(make: MakeEngine) -> None:
    made = setting(EXAMPLES["alpha-normec"])
    engine = make(made.population)
    state, _, _ = advance(engine, made.server, made.server.method.init_server(made.initial_model), 1, 2)
    saved = engine.save()
    kept = {key: tensor.clone() for key, tensor in saved.items()}
    twin = make(made.population)
    twin.restore(saved)
    advance(engine, made.server, state, 3, 4)
    advance(twin, made.server, state, 3, 4)
    assert all(same(saved[key], kept[key]) for key in saved)


@every_engine
def test_restoring_replaces_all_that_was_there(make: MakeEngine) -> None:
    """An empty state replaces all states, too: clients that it does not contain start fresh."""
    made = setting(EXAMPLES["clip21"], sampling=COHORTS["fixed"])
    start = made.server.method.init_server(made.initial_model)
    empty = make(made.population).save()
    assert len(empty["clients"]) == 0
    engine = make(made.population)
    _, wanted, _ = advance(engine, made.server, start, 1, 3)
    engine.restore(empty)
    _, found, _ = advance(engine, made.server, start, 1, 3)
    assert all(same(one, other) for one, other in zip(found, wanted, strict=True))


@every_engine
def test_states_exist_only_for_clients_that_were_seen(make: MakeEngine) -> None:
    made = setting(EXAMPLES["alpha-normec"], sampling=Poisson(CLIENTS, 0.15))
    engine, state = make(made.population), made.server.method.init_server(made.initial_model)
    seen: set[int] = set()
    for k in range(1, 6):
        seen |= set(begin_round(made.server, state, k).cohort.tolist())
        state, _, _ = advance(engine, made.server, state, k, k)
        assert engine.save()["clients"].tolist() == sorted(seen)
    assert 0 < len(seen) < CLIENTS


@every_engine
def test_totals_are_float64_on_the_cpu(make: MakeEngine) -> None:
    made = setting(DPFedAvg(clip_norm=0.5))
    engine = make(made.population)
    whole = engine.sum_messages(Broadcast(1, made.initial_model, np.arange(CLIENTS))).sum
    parts = [engine.sum_messages(Broadcast(1, made.initial_model, np.array([client]))).sum for client in range(CLIENTS)]
    assert (whole.dtype, whole.device.type) == (torch.float64, "cpu")
    assert torch.allclose(whole, torch.stack(parts).sum(dim=0), rtol=1e-5, atol=1e-8)


class Kept(NamedTuple):
    """The client's last signal."""

    signal: Tensor


@dataclasses.dataclass(frozen=True)
class KeepSignal(DPFedAvg):
    """A method that stores its signals, so that tests can read them."""

    clip_norm: float = 1e6

    def init_client(self, size: int) -> Kept:  # type: ignore[override]
        return Kept(torch.zeros(size))

    def client_rule(self, state, signal, release, round):  # type: ignore[no-untyped-def,override]
        return Clip(clip_norm=self.clip_norm)(signal), Kept(signal)


def signals_of(made: Setting, make: MakeEngine, cohort: list[int], round: int = 1) -> dict[int, Tensor]:
    """Return each client's signal as the engine computed it."""
    engine = make(made.population)
    engine.sum_messages(Broadcast(round, made.initial_model, np.array(cohort, dtype=np.int64)))
    saved = engine.save()
    return dict(zip(saved["clients"].tolist(), saved["signal"], strict=True))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("work", WORKS)
def test_each_clients_signal_is_its_own_whatever_the_chunk_it_is_in(model: str, work: str) -> None:
    """Padding of ragged clients does not leak: signals are within 1e-6 of the client alone."""
    made = setting(KeepSignal(), module=MODELS[model](), work=WORKS[work])
    task, federation = made.population.task, made.population.federation
    sizes = federation.sizes
    assert sizes.min() * 5 < sizes.max()
    together = signals_of(made, VectorizedEngine, list(range(CLIENTS)))
    for client in range(CLIENTS):
        alone = made.population.signal(client, made.initial_model, 1)
        assert float((together[client] - alone).abs().max()) <= 1e-6
        if work == "full gradient":
            rows = torch.from_numpy(federation.rows_of(client))
            exact = task.gradient(
                made.initial_model.double(), made.population.inputs[rows].double(), made.population.labels[rows]
            )
            assert float((together[client] - exact).abs().max()) <= 1e-6


@pytest.mark.parametrize("poison", [float("nan"), 1e4, -3.0])
def test_other_clients_data_do_not_touch_a_clients_signal_to_the_bit(poison: float) -> None:
    federation = ragged_digits()
    clean = federation.dataset
    dirty = dataset_of(clean.train_inputs.clone(), clean.train_labels)
    victim = int(np.argmin(federation.sizes))
    others = np.setdiff1d(np.arange(clean.examples), federation.rows_of(victim))
    dirty.train_inputs[others] = poison
    parts = [federation.rows_of(client) for client in range(CLIENTS)]
    for make in ENGINES.values():
        one = setting(KeepSignal(), federation=AnyFederation(clean, parts))
        other = setting(KeepSignal(), federation=AnyFederation(dirty, parts))
        everyone = list(range(CLIENTS))
        assert same(signals_of(one, make, everyone)[victim], signals_of(other, make, everyone)[victim])


@pytest.mark.parametrize("name", ["alpha-normec", "alpha-normec damped", "clip21", "dp-fedavg", "normalized-sgd"])
@every_engine
def test_nan_in_one_clients_data_is_counted_and_leaves_the_others_alone(make: MakeEngine, name: str) -> None:
    federation, bad = ragged_digits(), 4
    clean = federation.dataset
    dirty = dataset_of(clean.train_inputs.clone(), clean.train_labels)
    dirty.train_inputs[federation.rows_of(bad)[0]] = float("nan")
    parts = [federation.rows_of(client) for client in range(CLIENTS)]
    method = EXAMPLES[name]
    made = setting(method, federation=AnyFederation(dirty, parts))
    without = setting(method, federation=AnyFederation(clean, parts))
    cohort = [client for client in range(CLIENTS) if client != bad]
    engine, twin = make(made.population), make(without.population)
    for k in (1, 2):
        everyone = engine.sum_messages(Broadcast(k, made.initial_model, np.arange(CLIENTS)))
        rest = twin.sum_messages(Broadcast(k, made.initial_model, np.array(cohort)))
        assert (everyone.messages, everyone.non_finite) == (CLIENTS, 1)
        assert (rest.messages, rest.non_finite) == (CLIENTS - 1, 0)
        assert torch.allclose(everyone.sum, rest.sum, rtol=1e-5, atol=1e-6)
        assert everyone.signal_norm == pytest.approx(rest.signal_norm, rel=1e-5)
    saved = engine.save()
    for field in method.init_client(0)._fields:
        assert torch.isfinite(saved[field]).all()
        if field == "memory":
            assert not saved[field][bad].any()


@every_engine
@pytest.mark.parametrize("work", WORKS)
@pytest.mark.parametrize("model", ["softmax", "cnn"])
@pytest.mark.parametrize("cohort", [[0], [0, 1, 2], [2]])
@pytest.mark.sampled
def test_a_client_without_examples_sends_a_bounded_message(
    make: MakeEngine, work: str, model: str, cohort: list[int]
) -> None:
    clean = ragged_digits().dataset
    federation = AnyFederation(clean, [np.arange(0), np.arange(30), np.arange(0)])
    for method in (NormalizedSGD(alpha=0.1), AlphaNormEC(alpha=1.0, beta=0.5)):
        made = setting(method, federation=federation, module=MODELS[model](), work=WORKS[work])
        engine = make(made.population)
        total = engine.sum_messages(Broadcast(1, made.initial_model, np.array(cohort)))
        assert (total.messages, total.non_finite) == (len(cohort), 0)
        alone = make(made.population).sum_messages(Broadcast(1, made.initial_model, np.array([1])))
        wanted = alone.sum if 1 in cohort else torch.zeros_like(total.sum)
        assert torch.allclose(total.sum, wanted, rtol=1e-5, atol=1e-6)


@every_engine
def test_a_client_without_examples_does_not_borrow_anothers_nan(make: MakeEngine) -> None:
    clean = ragged_digits().dataset
    dirty = dataset_of(clean.train_inputs.clone(), clean.train_labels)
    dirty.train_inputs[0] = float("nan")
    made = setting(KeepSignal(), federation=AnyFederation(dirty, [np.arange(0), np.arange(1, 30)]))
    assert not signals_of(made, make, [0, 1])[0].any()


@every_engine
def test_an_empty_cohort_sums_to_zero(make: MakeEngine) -> None:
    made = setting(EXAMPLES["alpha-normec"])
    engine = make(made.population)
    total = engine.sum_messages(Broadcast(1, made.initial_model, np.arange(0)))
    assert same(total.sum, torch.zeros_like(made.initial_model, dtype=torch.float64))
    assert (total.messages, total.non_finite) == (0, 0)
    assert np.isnan(total.signal_norm)
    assert engine.save()["clients"].tolist() == []


class Crowd:
    """A million clients that share a few examples; no array is as large as the population."""

    population = 1_000_000
    dataset = ragged_digits().dataset
    sizes = np.broadcast_to(np.int64(3), (1_000_000,))

    def rows_of(self, client: int) -> np.ndarray:
        return (np.arange(3) + client) % self.dataset.examples


@every_engine
@pytest.mark.parametrize("name", ["alpha-normec damped", "clip21", "dp-fedavg"])
def test_costs_follow_the_cohort_and_not_the_population(make: MakeEngine, name: str) -> None:
    crowd = Crowd()
    made = setting(EXAMPLES[name], federation=crowd, sampling=Poisson(crowd.population, 1e-5), trust="local")
    engine, state = make(made.population), made.server.method.init_server(made.initial_model)
    seen: set[int] = set()
    for k in range(1, 4):
        cohort = begin_round(made.server, state, k).cohort
        seen |= set(cohort.tolist())
        state, _, totals = advance(engine, made.server, state, k, k)
        assert totals[0].messages == len(cohort)
    assert 5 < len(seen) < 80
    saved = engine.save()
    assert saved["clients"].tolist() == sorted(seen)
    held = len(saved["clients"]) * (made.initial_model.numel() + 2)
    assert sum(tensor.numel() for tensor in saved.values()) <= held
    assert isinstance(engine, LoopEngine | VectorizedEngine)
    assert floats_in(engine) <= 2 * held


def floats_in(engine: LoopEngine | VectorizedEngine) -> int:
    """Return how many numbers the engine stores for its clients' states."""
    return sum(field.numel() for slab in engine._states._slabs for field in slab)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("own_models", [False, True])
def test_batched_gradients_are_the_single_ones(model: str, own_models: bool) -> None:
    task = Task(MODELS[model]())
    generator = torch.Generator().manual_seed(2)
    x, labels = torch.rand(4, 6, 1, 8, 8, generator=generator), torch.randint(10, (4, 6), generator=generator)
    shift = 0.05 * torch.randn(4, task.layout.size, generator=generator)
    models = task.initial_model() + (shift if own_models else shift[0])
    counts = torch.tensor([6, 1, 4, 0])
    weights = (torch.arange(6) < counts[:, None]) / counts.clamp(min=1)[:, None]
    together = task.gradients(models, x, labels, weights)
    assert together.shape == (4, task.layout.size)
    for row, count in enumerate(counts.tolist()):
        own = models[row] if own_models else models
        alone = task.gradient(own, x[row, :count], labels[row, :count])
        assert float((together[row] - alone).abs().max()) <= 1e-6
        assert bool(alone.any()) == (count > 0)


@pytest.mark.parametrize("model", MODELS)
def test_a_gradient_is_the_slope_of_the_mean_loss(model: str) -> None:
    module = MODELS[model]().double()
    task = Task(module)
    generator = torch.Generator().manual_seed(4)
    x = torch.rand(9, 1, 8, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(10, (9,), generator=generator)
    at = task.initial_model() + 0.01 * torch.randn(task.layout.size, generator=generator, dtype=torch.float64)
    way = torch.randn(task.layout.size, generator=generator, dtype=torch.float64)
    weights = torch.full((9,), 1.0 / 9.0, dtype=torch.float64)
    ahead, behind = (task.loss(at + step * way, x, labels, weights) for step in (1e-6, -1e-6))
    assert float(ahead - behind) / 2e-6 == pytest.approx(float(task.gradient(at, x, labels) @ way), rel=1e-5)


def test_local_work_sends_the_way_that_the_client_walked() -> None:
    """Return x_0 - x_T of gradient descent on the seed's batches, or the gradient itself without steps."""
    made = setting(KeepSignal(), work=LocalSteps(steps=3, client_lr=0.1, batch_size=7), seed=9)
    task, federation, model = made.population.task, made.population.federation, made.initial_model
    rng_rows = made.population.work.batches(len(federation.rows_of(2)), _rng(9, 4, 2))
    local = model
    for batch in rng_rows:
        assert batch is not None
        assert len(batch) == 7
        rows = torch.from_numpy(federation.rows_of(2)[batch])
        local = local - 0.1 * task.gradient(local, made.population.inputs[rows], made.population.labels[rows])
    for make in ENGINES.values():
        assert float((signals_of(made, make, [2], 4)[2] - (model - local)).abs().max()) <= 1e-6


def _rng(seed: int, round: int, client: int) -> np.random.Generator:
    from fedpriv.streams import Purpose

    return SeededStreams(seed).source(Purpose.LOCAL_WORK, round, client).rng


def test_one_full_local_step_of_length_one_is_the_full_gradient() -> None:
    step = setting(KeepSignal(), work=LocalSteps(steps=1, client_lr=1.0))
    whole = setting(KeepSignal(), work=FullGradient())
    for make in ENGINES.values():
        one, other = signals_of(step, make, [1, 5]), signals_of(whole, make, [1, 5])
        assert all(torch.allclose(one[client], other[client], rtol=1e-5, atol=1e-7) for client in (1, 5))


def test_batches_differ_between_rounds_and_clients_and_are_of_the_clients_own_examples() -> None:
    made = setting(KeepSignal(), work=MinibatchGradient(batch_size=5))
    work: LocalWork = made.population.work
    found = []
    for round, client in ((1, 0), (2, 0), (1, 1)):
        (batch,) = work.batches(40, _rng(5, round, client))
        assert batch is not None
        assert len(np.unique(batch)) == 5
        assert 0 <= batch.min() <= batch.max() < 40
        found.append(tuple(batch.tolist()))
    assert len(set(found)) == 3
    assert work.batches(5, _rng(5, 1, 0)) == [None]
    assert work.batches(3, _rng(5, 1, 0)) == [None]


def test_a_population_keeps_its_examples_where_gradients_are_computed() -> None:
    population: Population = setting(KeepSignal()).population
    assert population.inputs.device == population.task.device
    assert len(population.inputs) == len(population.labels) == population.federation.dataset.examples


def test_data_in_the_clients_order_are_the_same_data() -> None:
    """Compare signals to the bit, for clients with scattered rows and for steps on batches."""
    for work in (FullGradient(), MinibatchGradient(batch_size=7)):
        people = setting(EXAMPLES["dp-fedavg"], work=work).population
        ordered = people.in_client_order()
        assert not np.array_equal(people.federation.rows_of(1), ordered.federation.rows_of(1))
        assert ordered.in_client_order() is ordered
        model = torch.randn(people.task.layout.size, generator=torch.Generator().manual_seed(2))
        for client in range(CLIENTS):
            inputs, labels = people.examples(client)
            rows = people.federation.rows_of(client)
            assert same(inputs, people.inputs[rows])
            assert same(labels, people.labels[rows])
            assert same(people.signal(client, model, 3), ordered.signal(client, model, 3))

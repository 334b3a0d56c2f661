"""The client step in place is the method's client rule, operation by operation."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from support.helpers import EXAMPLES, WITH_MEMORY, same
from torch import Tensor

from fedpriv.bounding import Clip, SmoothedNormalization
from fedpriv.engines.in_place import ClientStep
from fedpriv.engines.native import feedback_in_c
from fedpriv.engines.states import StateStore
from fedpriv.errors import UserError
from fedpriv.methods import Clip21, DPFedAvg, feedback_of, own_signal_of
from fedpriv.rounds import Broadcast, ClientRules, client_round
from fedpriv.streams import SeededStreams

SIZE = 300


def signals_of(kind: str, rng: np.random.Generator, clients: int, size: int = SIZE) -> Tensor:
    signals = torch.tensor(rng.standard_normal((clients, size)), dtype=torch.float32)
    if kind == "awkward":
        signals[0, 3], signals[1, 5] = torch.nan, torch.inf
        signals[2] = 0.0
        signals[3] *= 1e30
        signals[4] *= 1e-30
    return signals


@pytest.mark.parametrize("kind", ["ordinary", "awkward"])
@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.sampled
def test_in_place_is_the_client_rule(name: str, rows: int, noise: float, kind: str) -> None:
    """Run five rounds; some clients skip some. One client is equal to the bit, several at once up to rounding."""
    method = EXAMPLES[name]
    rules = ClientRules(method=method, noise_stddev=noise, streams=SeededStreams(4))
    rng, clients = np.random.default_rng(8), 6
    states = {client: method.init_client(SIZE) for client in range(clients)}
    stacked = type(method.init_client(0))(*(torch.stack([f] * clients) for f in method.init_client(SIZE)))
    for number in (1, 2, 4, 7):
        signals = signals_of(kind, rng, clients)
        broadcast = Broadcast(number, torch.zeros(SIZE), np.arange(clients))
        step, wanted = ClientStep(rules, broadcast, torch.device("cpu")), broadcast.empty_sum(rules)
        for client in range(clients):
            message, states[client] = client_round(rules, client, states[client], signals[client], number)
            wanted.add(message)
        for start in range(0, clients, rows):
            few = list(range(start, start + rows))
            part = type(stacked)(*(field[start : start + rows] for field in stacked))
            step.take(few, signals[start : start + rows].clone(), part)
        total = step.total()
        assert (total.messages, total.non_finite) == (clients, 2 if kind == "awkward" else 0)
        if rows == 1:
            assert same(total.sum, wanted.value)
        assert torch.allclose(total.sum, wanted.value, rtol=1e-6, atol=1e-7)
        for client, state in states.items():
            for field, mine in zip(state, stacked, strict=True):
                assert same(field, mine[client]) if rows == 1 else torch.allclose(field, mine[client], atol=1e-6)


def by_its_own_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make steps call `client_rule`, as for a method of an unknown form."""
    monkeypatch.setattr("fedpriv.engines.in_place.feedback_of", lambda _: None)


@pytest.mark.parametrize("how", ["several at once", "alone", "in C", "by its own rule"])
@pytest.mark.parametrize("name", WITH_MEMORY)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, 3e38])
@pytest.mark.sampled
def test_a_client_whose_memory_is_not_finite_is_counted(
    name: str, how: str, poison: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message of such a client is always zero. 3e38 is finite, but its distance from the signal is not."""
    method, clients = EXAMPLES[name], 4
    form = feedback_of(method)
    if how == "by its own rule" or (form is not None and form.weight is not None):
        by_its_own_rule(monkeypatch)
        poison = torch.nan if poison == 3e38 else poison
    rules = ClientRules(method=method, noise_stddev=0.0, streams=SeededStreams(4))
    signals = torch.full((clients, SIZE), -3e38) if poison == 3e38 else torch.ones(clients, SIZE)
    store = StateStore(method, SIZE)
    with store.borrowed(list(range(clients))) as state:
        state._asdict()["memory"][2, 7] = poison
    step = ClientStep(rules, Broadcast(1, torch.zeros(SIZE), np.arange(clients)), torch.device("cpu"), how == "in C")
    if how == "several at once":
        with store.borrowed(list(range(clients))) as state:
            step.take(list(range(clients)), signals.clone(), state)
    else:
        for client in range(clients):
            step.take_alone(client, signals[client].clone(), store)
    total = step.total()
    assert (total.messages, total.non_finite) == (clients, 1)
    assert total.signal_norm == pytest.approx(float(signals[0].double().norm()))


def test_every_method_of_ours_runs_in_place() -> None:
    slower = {name for name, method in EXAMPLES.items() if feedback_of(method) is None}
    others = {name for name in slower if own_signal_of(EXAMPLES[name]) is None}
    assert others == {"fedspeed"}  # it remembers its signals, not its messages


def test_a_subclass_with_a_rule_of_its_own_is_not_taken_for_its_parent() -> None:
    class Louder(DPFedAvg):
        def client_rule(self, state, signal, release, round):
            return torch.ones_like(signal) / signal.shape[-1], state

    assert feedback_of(Louder()) is None
    rules = ClientRules(method=Louder(), noise_stddev=0.0, streams=SeededStreams(0))
    broadcast = Broadcast(1, torch.zeros(SIZE), np.arange(2))
    step = ClientStep(rules, broadcast, torch.device("cpu"))
    step.take([0, 1], torch.zeros(2, SIZE), Louder().init_client(SIZE))
    assert float(step.total().sum[0]) == pytest.approx(2.0 / SIZE)


def test_a_subclass_that_changes_only_figures_still_runs_in_place() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Half(DPFedAvg):
        @property
        def bounded(self) -> Clip:
            return Clip(clip_norm=self.clip_norm / 2)

    form = feedback_of(Half())
    assert form is not None
    assert type(form.bounded) is Clip
    assert form.bounded.l2_bound == 0.5


native = pytest.mark.skipif(feedback_in_c() is None, reason="no C compiler")


@native
@pytest.mark.parametrize(("memory", "size"), [(None, 300), (None, 1030), (3 * 5000, 1030)])
@pytest.mark.parametrize("kind", ["ordinary", "awkward"])
@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.sampled
def test_the_step_in_c_is_the_step_in_torch(name: str, kind: str, memory: int | None, size: int) -> None:
    """Compare messages, memories and counts of rounds with gaps, to the bit; in general, a norm's last bit differs."""
    method, clients = EXAMPLES[name], 6
    rules = ClientRules(method=method, noise_stddev=0.0, streams=SeededStreams(4))
    rng = np.random.default_rng(8)
    stores = [StateStore(method, size, memory=memory) for _ in range(3)]
    for number in (1, 2, 4, 7):
        signals = signals_of(kind, rng, clients, size)
        shared = torch.linspace(-0.1, 0.1, size) if method.needs_shared else None
        broadcast = Broadcast(number, torch.zeros(size), np.arange(clients), shared=shared)
        steps = [ClientStep(rules, broadcast, torch.device("cpu"), native=native) for native in (True, True, False)]
        for step, store in zip(steps[1:], stores[1:], strict=True):
            for client, following in zip(range(clients), [*range(1, clients), None], strict=True):
                step.take_alone(client, signals[client].clone(), store, following)
        steps[0].take_many(range(clients), signals.clone(), stores[0])
        *in_c, other = (step.total() for step in steps)
        *mine, theirs = (store.save() for store in stores)
        for one, saved in zip(in_c, mine, strict=True):
            assert (one.messages, one.non_finite) == (other.messages, other.non_finite)
            assert one.signal_norm == pytest.approx(other.signal_norm, rel=1e-5)
            assert same(one.sum, other.sum)
            assert saved.keys() == theirs.keys()
            assert all(same(saved[field], theirs[field]) for field in saved)


@native
@pytest.mark.parametrize(("memory", "size"), [(None, 300), (3 * 5000, 1030)])
@pytest.mark.parametrize("kind", ["ordinary", "awkward"])
@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.sampled
def test_rows_with_noise_in_c_are_those_of_torch(name: str, kind: str, memory: int | None, size: int) -> None:
    """Compare messages, memories and counts of rounds with gaps, to the bit, with clients alone in torch."""
    method, clients = EXAMPLES[name], 6
    rules = ClientRules(method=method, noise_stddev=0.3, streams=SeededStreams(4))
    rng = np.random.default_rng(8)
    stores = [StateStore(method, size, memory=memory) for _ in range(2)]
    for number in (1, 2, 4, 7):
        signals = signals_of(kind, rng, clients, size)
        shared = torch.linspace(-0.1, 0.1, size) if method.needs_shared else None
        broadcast = Broadcast(number, torch.zeros(size), np.arange(clients), shared=shared)
        steps = [ClientStep(rules, broadcast, torch.device("cpu"), native=native) for native in (True, False)]
        rows = min(stores[0].capacity or 3, 3)
        for start in range(0, clients, rows):
            few = range(start, min(start + rows, clients))
            steps[0].take_rows(few, signals[few.start : few.stop].clone(), stores[0])
        for client in range(clients):
            steps[1].take_alone(client, signals[client].clone(), stores[1])
        in_c, other = (step.total() for step in steps)
        assert (in_c.messages, in_c.non_finite) == (other.messages, other.non_finite)
        assert in_c.signal_norm == pytest.approx(other.signal_norm, rel=1e-5)
        assert same(in_c.sum, other.sum)
        mine, theirs = (store.save() for store in stores)
        assert mine.keys() == theirs.keys()
        assert all(same(mine[field], theirs[field]) for field in mine)


@native
@pytest.mark.parametrize("name", ["dp-fedavg", "alpha-normec", "alpha-normec sent, damped and normalized"])
def test_c_is_used_for_rows_with_noise(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise AssertionError("torch took the step")

    monkeypatch.setattr(ClientStep, "take", refused)
    rules = ClientRules(method=EXAMPLES[name], noise_stddev=0.3, streams=SeededStreams(4))
    step = ClientStep(rules, Broadcast(1, torch.zeros(SIZE), np.arange(2)), torch.device("cpu"), native=True)
    step.take_rows((0, 1), torch.ones(2, SIZE), StateStore(EXAMPLES[name], SIZE))
    assert step.total().messages == 2


@native
def test_c_is_used_for_clients_alone_without_noise_and_only_then(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    monkeypatch.setattr(ClientStep, "_take_in_c", lambda *given: used.append(len(given)) or -1.0)
    broadcast = Broadcast(1, torch.zeros(SIZE), np.arange(2))
    for noise, wanted, expected in [(0.0, True, 1), (0.3, True, 0), (0.0, False, 0)]:
        rules = ClientRules(method=DPFedAvg(), noise_stddev=noise, streams=SeededStreams(4))
        used.clear()
        step = ClientStep(rules, broadcast, torch.device("cpu"), native=wanted)
        step.take_alone(0, torch.ones(SIZE), StateStore(DPFedAvg(), SIZE))
        assert len(used) == expected
        assert step.total().messages == 1


def test_without_a_compiler_torch_does_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for variable, value in (("FEDPRIV_NATIVE", "0"), ("CC", str(tmp_path / "none"))):
        with monkeypatch.context() as patch:
            patch.setenv(variable, value)
            feedback_in_c.cache_clear()
            assert feedback_in_c() is None
    feedback_in_c.cache_clear()
    assert list((tmp_path / "fedpriv").iterdir()) == []


@native
def test_the_compiled_file_is_kept_and_used_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    feedback_in_c.cache_clear()
    assert feedback_in_c() is not None
    (made,) = (tmp_path / "fedpriv").iterdir()
    before = made.stat().st_mtime_ns
    feedback_in_c.cache_clear()
    assert feedback_in_c() is not None
    assert made.stat().st_mtime_ns == before
    feedback_in_c.cache_clear()


@pytest.mark.parametrize("bounded", [Clip(clip_norm=0.7), SmoothedNormalization(alpha=0.3)])
@pytest.mark.parametrize("norm", [1e-20, 0.3, 0.7, 1.0, 1e20])
def test_the_figures_of_a_map_are_the_map(bounded: Clip | SmoothedNormalization, norm: float) -> None:
    p, q, r, t = bounded.coefficients
    row = torch.zeros(3)
    row[1] = norm
    norm = float(row[1])
    scale = torch.tensor(min(p / (q + norm), r, t / norm), dtype=torch.float32)
    assert float(bounded(row)[1]) == float(row[1] * scale)


class Two(NamedTuple):
    """Two vectors; the second shares the tensor of the first."""

    memory: Tensor
    previous: Tensor


class Shifts(DPFedAvg):
    """Send the state and store the message, so that states and messages share tensors."""

    def init_client(self, size: int) -> Any:
        return Two(torch.zeros(size), torch.zeros(size))

    def client_rule(self, state: Any, signal, release, round) -> Any:
        return state.previous, Two(self.bounded(signal), state.memory)


def test_a_rule_whose_tensors_are_one_anothers_is_followed() -> None:
    """Compare three rounds with the rule itself: round k sends the message of round k - 2."""
    method = Shifts(clip_norm=5.0)
    rules = ClientRules(method=method, noise_stddev=0.0, streams=SeededStreams(4))
    store = StateStore(method, SIZE)
    state = method.init_client(SIZE)
    for number in (1, 2, 3, 4):
        signal = torch.full((SIZE,), 0.1 * number)
        wanted, state = client_round(rules, 0, state, signal, number)
        step = ClientStep(rules, Broadcast(number, torch.zeros(SIZE), np.arange(1)), torch.device("cpu"), native=True)
        step.take_alone(0, signal.clone(), store)
        assert torch.allclose(step.total().sum, wanted.double())
        with store.borrowed([0]) as kept:
            assert all(same(mine[0], theirs) for mine, theirs in zip(kept, state, strict=True))


class HalfClip(Clip):
    """A map with half the bound, which only a call of it reveals."""

    @property
    def l2_bound(self) -> float:
        return self.clip_norm / 2

    def __call__(self, vectors: Tensor) -> Tensor:
        return super().__call__(vectors) / 2


@pytest.mark.parametrize("native", [False, True])
def test_a_map_derived_of_ours_is_asked_itself_for_its_bound(native: bool) -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Half(DPFedAvg):
        @property
        def bounded(self) -> HalfClip:
            return HalfClip(clip_norm=1.0)

    assert feedback_of(Half()) is None
    rules = ClientRules(method=Half(), noise_stddev=0.0, streams=SeededStreams(4))
    step = ClientStep(rules, Broadcast(1, torch.zeros(SIZE), np.arange(1)), torch.device("cpu"), native=native)
    step.take_alone(0, torch.ones(SIZE), StateStore(Half(), SIZE))
    assert float(torch.linalg.vector_norm(step.total().sum)) <= 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_memories_of_another_type_are_not_given_to_c(dtype: torch.dtype) -> None:
    class Other(Clip21):
        def init_client(self, size: int):
            return type(super().init_client(1))(torch.zeros(size, dtype=dtype))

    rules = ClientRules(method=Other(), noise_stddev=0.0, streams=SeededStreams(4))
    found = []
    for native in (True, False):
        step = ClientStep(rules, Broadcast(1, torch.zeros(SIZE), np.arange(2)), torch.device("cpu"), native=native)
        store = StateStore(Other(), SIZE)
        for client in (0, 1):
            step.take_alone(client, torch.full((SIZE,), 0.1), store)
        found.append((step.total().sum, store.save()["memory"].double()))
    assert all(same(one, other) for one, other in zip(*found, strict=True))


def test_a_cohort_so_large_that_rounding_would_lengthen_messages_is_refused() -> None:
    rules = ClientRules(method=DPFedAvg(), noise_stddev=0.0, streams=SeededStreams(4))
    Broadcast(1, torch.zeros(10**6), np.arange(1), capacity=10**5).empty_sum(rules)
    with pytest.raises(UserError, match=r"cohort: expected fewer than 10,000,000 clients per round with 1,000,000"):
        Broadcast(1, torch.zeros(10**6), np.arange(1), capacity=10**7).empty_sum(rules)

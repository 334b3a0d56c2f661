"""The contract of every method: bounded, pure, equal for one client and many; and consistent memories."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.helpers import (
    EXAMPLES,
    LINEAR,
    NON_FINITE,
    WITH_MEMORY,
    adding,
    brief,
    damping_of,
    fresh_clients,
    memories_after,
    numbers,
    row_of,
    rows,
    same,
    within,
)
from torch import Tensor

from fedpriv.bounding import Clip, SmoothedNormalization
from fedpriv.errors import UserError
from fedpriv.methods import METHODS, AlphaNormEC, Clip21, DPFedAvg, Method, NormalizedSGD, feedback_of, server_step
from fedpriv.methods.base import direction

SIZE = 3
CLIENTS = 4

every_method = pytest.mark.parametrize("method", EXAMPLES.values(), ids=EXAMPLES.keys())
every_memory = pytest.mark.parametrize("method", WITH_MEMORY.values(), ids=WITH_MEMORY.keys())
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
examples = st.sampled_from(list(EXAMPLES.values()))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


def reached(method: Method, seed: int, dtype: torch.dtype = torch.float64, rounds: int = 5) -> Any:
    """Return states `[clients, ...]` after some rounds of large and small signals, with noise on the messages."""
    state = fresh_clients(method, CLIENTS, SIZE, dtype)
    for k in range(1, rounds + 1):
        signal = normal(seed + k, CLIENTS, SIZE, dtype=dtype) * 10.0 ** (k % 4 - 1)
        _, state = method.client_rule(
            state, signal, adding(0.1 * normal(900 + seed + k, CLIENTS, SIZE, dtype=dtype)), k
        )
    return state


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_an_example(name: str) -> None:
    assert name in EXAMPLES, f"add an instance of {name!r} to EXAMPLES in tests/support/helpers.py"
    assert all(type(method.client_part) is METHODS[key.split(" ")[0]] for key, method in EXAMPLES.items())


@pytest.mark.parametrize("kind", METHODS.values(), ids=METHODS.keys())
def test_a_method_is_a_frozen_keyword_only_dataclass_that_needs_no_argument(kind: type) -> None:
    method = kind()
    fields = dataclasses.fields(kind)
    assert fields
    assert all(field.kw_only for field in fields)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(method, fields[0].name, 1.0)
    assert hash(method) == hash(kind())


@every_method
def test_a_client_starts_at_zero_whatever_its_data(method: Method) -> None:
    for size in (0, 1, 17):
        state: Any = method.init_client(size)
        assert type(state).__mro__[1] is tuple
        assert hasattr(state, "_fields")
        assert all(not field.any() and field.dtype == torch.float32 for field in state)
        if "memory" in state._fields:
            assert state.memory.shape == (size,)


@every_method
def test_the_server_starts_at_the_model_and_remembers_nothing(method: Method) -> None:
    model = normal(1, 9, dtype=torch.float32)
    state = method.init_server(model)
    assert hasattr(state, "_fields")
    assert same(state.model, model)
    others = [getattr(state, name) for name in state._fields if name != "model"]
    assert all(field.shape in (model.shape, (1,)) and not field.any() for field in others)


@st.composite
def histories(draw: st.DrawFn) -> tuple[Method, list[tuple[int, Tensor, Tensor]]]:
    """A method, and some rounds with adversarial signals and harmless noise of a few clients."""
    dtype, clients = draw(st.sampled_from([torch.float32, torch.float64])), draw(st.integers(1, 3))
    steps, k = [], 0
    for _ in range(draw(st.integers(1, 5))):
        k += draw(st.integers(1, 3))
        cells = draw(st.lists(numbers(dtype), min_size=clients * SIZE, max_size=clients * SIZE))
        signal = torch.tensor(cells, dtype=dtype).reshape(clients, SIZE)
        steps.append((k, signal, normal(draw(st.integers(0, 99)), clients, SIZE, dtype=dtype)))
    return draw(examples), steps


@pytest.mark.parametrize("noisy", [False, True])
def test_every_message_is_bounded_in_every_state(noisy: bool) -> None:
    @brief
    @given(history=histories())
    def law(history: tuple[Method, list[tuple[int, Tensor, Tensor]]]) -> None:
        method, steps = history
        state = fresh_clients(method, len(steps[0][1]), SIZE, steps[0][1].dtype)
        for k, signal, noise in steps:
            message, after = method.client_rule(state, signal, None, k)
            assert all(within(row, method.bounded.l2_bound) for row in message)
            state = method.client_rule(state, signal, adding(noise), k)[1] if noisy else after
            assert all(torch.isfinite(field).all() for field in state)

    law()


@every_method
@every_dtype
def test_bounded_messages_use_the_room_that_they_have(method: Method, dtype: torch.dtype) -> None:
    """In the second of two equal rounds: the part that clipping cut off in the first may be in the message."""
    state, signal = fresh_clients(method, CLIENTS, SIZE, dtype), 1e6 * normal(2, CLIENTS, SIZE, dtype=dtype)
    _, state = method.client_rule(state, signal, None, 1)
    message, _ = method.client_rule(state, signal, None, 2)
    assert (message.norm(dim=-1) > 0.999 * method.bounded.l2_bound).all()


@every_method
def test_a_message_with_noise_is_the_bounded_message_plus_the_noise(method: Method) -> None:
    for seed in range(5):
        state, signal = reached(method, seed), normal(50 + seed, CLIENTS, SIZE)
        noise = normal(70 + seed, CLIENTS, SIZE) * 10.0**seed
        quiet, _ = method.client_rule(state, signal, None, 6)
        loud, _ = method.client_rule(state, signal, adding(noise), 6)
        assert torch.allclose(loud - quiet, noise, rtol=1e-14, atol=1e-15 * 10.0**seed)


@every_method
@every_dtype
def test_zero_noise_is_no_noise_to_the_bit(method: Method, dtype: torch.dtype) -> None:
    state, signal = reached(method, 3, dtype), normal(4, CLIENTS, SIZE, dtype=dtype)
    quiet, after_quiet = method.client_rule(state, signal, None, 6)
    zero, after_zero = method.client_rule(state, signal, adding(torch.zeros_like(signal)), 6)
    assert torch.equal(quiet, zero)
    assert all(torch.equal(one, other) for one, other in zip(after_quiet, after_zero, strict=True))


@every_method
@every_dtype
def test_rules_leave_their_arguments_alone(method: Method, dtype: torch.dtype) -> None:
    state, signal, noise = reached(method, 5, dtype), normal(6, CLIENTS, SIZE, dtype=dtype), normal(7, CLIENTS, SIZE)
    noise = noise.to(dtype)
    before = [tensor.clone() for tensor in (*state, signal, noise)]
    message, after = method.client_rule(state, signal, adding(noise), 6)
    message += 1.0
    again, after_again = method.client_rule(state, signal, adding(noise), 6)
    assert all(same(tensor, kept) for tensor, kept in zip((*state, signal, noise), before, strict=True))
    assert same(again + 1.0, message)
    assert all(same(one, other) for one, other in zip(after, after_again, strict=True))

    server, mean = method.init_server(normal(8, SIZE, dtype=dtype)), normal(9, SIZE, dtype=dtype)
    server = server_step(method, server, mean, 0.5)
    before = [tensor.clone() for tensor in (*server, mean)]
    first, second = server_step(method, server, mean, 0.5), server_step(method, server, mean, 0.5)
    assert all(same(tensor, kept) for tensor, kept in zip((*server, mean), before, strict=True))
    assert all(same(one, other) for one, other in zip(first, second, strict=True))


@brief
@given(
    method=examples,
    signal=rows(size=SIZE),
    noise=rows(size=SIZE, dtype=torch.float64, finite=True),
    k=st.integers(1, 9),
)
def test_a_batch_of_clients_is_each_alone_to_the_bit(method: Method, signal: Tensor, noise: Tensor, k: int) -> None:
    clients = min(len(signal), len(noise))
    signal, noise = signal[:clients], noise[:clients].to(signal.dtype).nan_to_num(0.0, 1.0, -1.0)
    state = reached(method, k, signal.dtype)
    state = type(state)(*(field[:clients] for field in state))
    for z in (None, noise):
        messages, after = method.client_rule(state, signal, adding(z), 5 + k)
        for row in range(clients):
            own = None if z is None else z[row]
            message, single = method.client_rule(row_of(state, row), signal[row], adding(own), 5 + k)
            assert same(message, messages[row])
            assert all(same(one, other) for one, other in zip(single, row_of(after, row), strict=True))


@every_method
@every_dtype
@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
def test_shapes_and_kinds_of_states_are_kept(method: Method, dtype: torch.dtype, lead: tuple[int, ...]) -> None:
    kind = method.init_client(SIZE)
    state = type(kind)(*(field.to(dtype).expand(*lead, *field.shape) for field in kind))
    message, after = method.client_rule(state, normal(1, *lead, SIZE, dtype=dtype), None, 1)
    assert type(after) is type(kind)
    assert message.shape == (*lead, SIZE)
    assert message.dtype == dtype
    assert [field.shape for field in after] == [field.shape for field in state]
    assert [field.dtype for field in after] == [field.dtype for field in state]
    server = method.init_server(normal(2, SIZE, dtype=dtype))
    stepped = server_step(method, server, normal(3, SIZE, dtype=dtype), 0.1)
    assert type(stepped) is type(server)
    assert [(field.shape, field.dtype) for field in stepped] == [(field.shape, field.dtype) for field in server]


@pytest.mark.parametrize("method", LINEAR.values(), ids=LINEAR.keys())
def test_the_server_rule_is_linear_but_for_the_direction_of_a_normalized_step(method: Method) -> None:
    normalized = getattr(method, "server_normalization", False)
    start = server_step(method, method.init_server(normal(1, SIZE)), normal(2, SIZE), 0.3)
    other = server_step(method, method.init_server(normal(3, SIZE)), normal(4, SIZE), 0.3)
    mixed = type(start)(*(2.0 * one - 0.5 * two for one, two in zip(start, other, strict=True)))
    first, second = normal(5, SIZE), normal(6, SIZE)
    one, two = server_step(method, start, first, 0.3), server_step(method, other, second, 0.3)
    both = server_step(method, mixed, 2.0 * first - 0.5 * second, 0.3)
    for name in both._fields:
        wanted = 2.0 * getattr(one, name) - 0.5 * getattr(two, name)
        if name != "model" or not normalized:
            assert torch.allclose(getattr(both, name), wanted, rtol=1e-13, atol=1e-14)
    if normalized:
        step = mixed.model - both.model
        assert step.norm().item() == pytest.approx(method.server_lr, rel=1e-12)  # type: ignore[attr-defined]
        assert torch.allclose(step / step.norm(), both.memory / both.memory.norm(), rtol=1e-12, atol=1e-14)


@every_method
def test_a_mean_of_nothing_moves_nothing_that_has_no_memory(method: Method) -> None:
    server = method.init_server(normal(1, SIZE))
    after = server_step(method, server, torch.zeros(SIZE, dtype=torch.float64), 0.2)
    counted = [name for name in server._fields if getattr(server, name).shape == (1,)]
    others = [name for name in server._fields if name not in (*counted, "previous")]  # the public model of before
    assert all(torch.equal(getattr(server, name), getattr(after, name)) for name in others)
    assert counted in ([], ["rounds"], ["optimizer_rounds"])


@every_method
@every_dtype
@pytest.mark.parametrize("poison", NON_FINITE)
def test_a_signal_that_is_not_finite_is_the_zero_message_and_is_not_remembered(
    method: Method, dtype: torch.dtype, poison: float
) -> None:
    state = reached(method, 8, dtype)
    signal = normal(9, CLIENTS, SIZE, dtype=dtype)
    signal[1, 2] = poison
    message, after = method.client_rule(state, signal, None, 6)
    assert torch.equal(message[1], torch.zeros(SIZE, dtype=dtype))
    assert (message[[0, 2, 3]] != 0).any(dim=-1).all()
    noise = normal(10, CLIENTS, SIZE, dtype=dtype)
    assert torch.equal(method.client_rule(state, signal, adding(noise), 6)[0][1], noise[1])
    assert bool(method.client_rule(after, torch.ones_like(signal), None, 7)[0][1].any())
    if "memory" in state._fields:
        kept = memories_after(method, state, 6)[1]
        assert torch.allclose(
            memories_after(method, after, 6)[1], kept, rtol=1e-6 if damping_of(method) else 0.0, atol=0.0
        )


@every_memory
def test_a_noiseless_memory_never_sees_the_noise_and_a_sent_memory_always_does(method: Method) -> None:
    quiet = loud = fresh_clients(method, CLIENTS, SIZE)
    for k in range(1, 8):
        signal = normal(k, CLIENTS, SIZE)
        _, quiet = method.client_rule(quiet, signal, None, k)
        _, loud = method.client_rule(loud, signal, adding(normal(100 + k, CLIENTS, SIZE)), k)
        equal = same(quiet.memory, loud.memory)
        assert equal != method.needs_client_noise


def cohorts_of(kind: str, seed: int, population: int, rounds: int) -> tuple[float, list[np.ndarray]]:
    """Return the sampling probability and the cohort of each round."""
    rng = np.random.default_rng(seed)
    if kind == "everyone":
        return 1.0, [np.arange(population)] * rounds
    if kind == "poisson":
        return 0.25, [np.flatnonzero(rng.random(population) < 0.25) for _ in range(rounds)]
    return 3 / population, [np.sort(rng.choice(population, 3, replace=False)) for _ in range(rounds)]


@every_memory
@pytest.mark.parametrize("cohort", ["everyone", "poisson", "fixed"])
@pytest.mark.parametrize("noisy", [False, True])
def test_server_memory_is_the_mean_of_client_memories(method: Method, cohort: str, noisy: bool) -> None:
    """Holds after every round: without noise for every method, with noise for methods with sent memory."""
    population, rounds = 7, 60
    prob, cohorts = cohorts_of(cohort, 1, population, rounds)
    assert cohort != "poisson" or any(len(members) == 0 for members in cohorts)
    clients = fresh_clients(method, population, SIZE)
    server = method.init_server(normal(1, SIZE))
    largest = 0.0
    for k, members in enumerate(cohorts, start=1):
        own = type(clients)(*(field[members] for field in clients))
        signal = normal(k, len(members), SIZE) * 10.0 ** (k % 4 - 1) + 3.0
        noise = normal(1000 + k, len(members), SIZE) if noisy else None
        messages, own = method.client_rule(own, signal, adding(noise), k)
        for field, new in zip(clients, own, strict=True):
            field[members] = new
        server = server_step(method, server, messages.sum(dim=0) / (prob * population), prob)
        gap = server.memory - memories_after(method, clients, k).mean(dim=0)
        largest = max(largest, float(gap.abs().max()))
        if not noisy or method.needs_client_noise:
            assert largest <= 1e-12
    assert float(server.memory.norm()) > 1e-3
    assert largest <= 1e-12 or (noisy and not method.needs_client_noise)
    assert not (noisy and not method.needs_client_noise and largest <= 1e-6)


@pytest.mark.parametrize("damping", [0.0, 0.15])
def test_without_noise_sent_memory_is_noiseless_memory_to_the_bit(damping: float) -> None:
    noiseless = AlphaNormEC(alpha=0.7, beta=0.4, damping=damping)
    sent = dataclasses.replace(noiseless, memory="sent")
    one, other = fresh_clients(noiseless, CLIENTS, SIZE), fresh_clients(sent, CLIENTS, SIZE)
    for k in range(1, 10):
        signal = normal(k, CLIENTS, SIZE)
        first, one = noiseless.client_rule(one, signal, None, k)
        second, other = sent.client_rule(other, signal, None, k)
        assert same(first, second)
        assert same(one.memory, other.memory)


@pytest.mark.parametrize("damping", [0.0, 0.15])
def test_sent_memory_is_a_function_of_what_was_sent(damping: float) -> None:
    """So a memory adds no information: two clients with different data that sent the same have the same memory."""
    method = AlphaNormEC(alpha=0.7, beta=0.4, memory="sent", damping=damping)
    state = fresh_clients(method, CLIENTS, SIZE)
    wanted = torch.zeros(CLIENTS, SIZE, dtype=torch.float64)
    for k in (1, 2, 5, 6, 9):
        message, state = method.client_rule(state, normal(k, CLIENTS, SIZE), adding(normal(50 + k, CLIENTS, SIZE)), k)
        skipped = k - 1 - {1: 0, 2: 1, 5: 2, 6: 5, 9: 6}[k]
        wanted = wanted * (1.0 - damping) ** (skipped + 1) + 0.4 * message
        assert torch.allclose(state.memory, wanted, rtol=1e-13, atol=1e-15)


@every_memory
@pytest.mark.parametrize("skipped", [1, 2, 10])
def test_skipping_rounds_is_forgetting_once_for_each(method: Method, skipped: int) -> None:
    state = reached(method, 4)
    aged = state._replace(memory=state.memory * (1.0 - damping_of(method)) ** skipped)
    if "updated" in state._fields:
        aged = aged._replace(updated=state.updated + skipped)
    signal = normal(1, CLIENTS, SIZE)
    late, after_late = method.client_rule(state, signal, None, 6 + skipped)
    prompt, after_prompt = method.client_rule(aged, signal, None, 6 + skipped)
    assert torch.allclose(late, prompt, rtol=1e-13, atol=1e-15)
    assert torch.allclose(after_late.memory, after_prompt.memory, rtol=1e-13, atol=1e-15)


@every_memory
def test_feedback_is_from_the_memory_towards_the_signal(method: Method) -> None:
    """Each message points from the memory to the signal; a memory without damping approaches it.

    If clients average their signals, the average takes the signal's place.
    """
    state, signal = reached(method, 2), normal(3, CLIENTS, SIZE)
    form = feedback_of(method)
    weight = 1.0 if form is None or form.weight is None else form.weight
    aim = signal if weight == 1.0 else (1.0 - weight) * state.average + weight * signal
    residual = aim - state.memory
    message, after = method.client_rule(state, signal, None, 6)
    assert torch.allclose(message / message.norm(dim=-1, keepdim=True), residual / residual.norm(dim=-1, keepdim=True))
    if damping_of(method) == 0.0:
        assert ((aim - after.memory).norm(dim=-1) < residual.norm(dim=-1)).all()


@every_method
def test_the_bounded_map_of_a_method_is_its_papers(method: Method) -> None:
    method = method.client_part
    if isinstance(method, AlphaNormEC | NormalizedSGD):
        assert method.bounded == SmoothedNormalization(alpha=method.alpha)
    elif isinstance(method, Clip21 | DPFedAvg):
        assert method.bounded == Clip(clip_norm=method.clip_norm)
    assert method.needs_client_noise == (getattr(method, "memory", None) == "sent")


@every_method
@pytest.mark.parametrize("wrong", [0.0, -1.0, *NON_FINITE])
def test_hyperparameters_that_must_be_positive_are_checked_when_the_method_is_made(
    method: Method, wrong: float
) -> None:
    for field in dataclasses.fields(method):  # type: ignore[arg-type]
        if field.name in ("alpha", "beta", "server_lr", "clip_norm"):
            with pytest.raises(UserError, match=rf"^method\.{field.name}: expected a positive number, got"):
                dataclasses.replace(method, **{field.name: wrong})  # type: ignore[type-var]


@pytest.mark.parametrize("wrong", [-0.1, 1.0, 2.0, *NON_FINITE])
def test_damping_outside_zero_to_one_is_refused(wrong: float) -> None:
    with pytest.raises(UserError, match=r"^method\.damping: expected a number from 0"):
        AlphaNormEC(damping=wrong)


def test_a_memory_of_another_kind_is_refused() -> None:
    with pytest.raises(UserError, match=r'^method\.memory: expected "noiseless" or "sent", got \'both\'\.'):
        AlphaNormEC(memory="both")  # type: ignore[arg-type]


@every_dtype
@pytest.mark.parametrize("norm", [1e-44, 1e-40, 1e-30, 1e-6, 1.0, 1e30])
def test_a_direction_has_length_one_and_zero_has_none(dtype: torch.dtype, norm: float) -> None:
    vector = torch.tensor([0.6, 0.0, -0.8], dtype=torch.float64).mul(norm).to(dtype)
    step = direction(vector).double()
    assert torch.isfinite(step).all()
    assert float(step.norm()) == pytest.approx(1.0, rel=1e-6)
    assert float(step @ vector.double()) > 0.0
    assert torch.equal(direction(torch.zeros(4, dtype=dtype)), torch.zeros(4, dtype=dtype))

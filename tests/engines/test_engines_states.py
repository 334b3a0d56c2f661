"""Client states: only those of clients seen, within a memory bound, equal from disk and from memory."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from support.federations import advance, ragged_digits, setting
from support.helpers import EXAMPLES, same

from fedpriv.engines import LoopEngine, StateStore, VectorizedEngine
from fedpriv.errors import UserError
from fedpriv.methods import AlphaNormEC, Clip21, DPFedAvg
from fedpriv.methods.alpha_normec import ClientMemory
from fedpriv.privacy import FixedSize

SIZE = 5
ROW = 4 * (SIZE + 1)  # alpha-normec: a memory, and the round of its last change


def store_of(rows: int | None, folder: Path | None = None) -> StateStore[ClientMemory]:
    return StateStore(AlphaNormEC(), SIZE, memory=None if rows is None else rows * ROW, folder=folder)


def write(store: StateStore[ClientMemory], clients: list[int], value: float) -> None:
    """Write client + value to the memory of every client, and the value to its round."""
    with store.borrowed(clients) as state:
        state.memory.copy_(torch.tensor(clients).unsqueeze(1) + torch.full((len(clients), SIZE), value))
        state.updated.fill_(value)


def read(store: StateStore[ClientMemory], client: int) -> tuple[float, float]:
    with store.borrowed([client]) as state:
        assert bool((state.memory == state.memory[0, 0]).all())
        return float(state.memory[0, 0]), float(state.updated[0, 0])


@pytest.mark.parametrize("rows", [None, 1, 3, 7, 100])
def test_states_are_the_same_for_every_bound(rows: int | None, tmp_path: Path) -> None:
    """Write and read random clients; a dictionary holds the expected states."""
    rng = np.random.default_rng(5)
    store, wanted = store_of(rows, tmp_path), {}
    for step in range(1, 400):
        client = int(rng.integers(20))
        assert read(store, client) == wanted.get(client, (0.0, 0.0))
        wanted.setdefault(client, (0.0, 0.0))
        if rng.random() < 0.5:
            write(store, [client], step)
            wanted[client] = (client + step, float(step))
    assert len(store) == len(wanted)
    saved = store.save()
    assert saved["clients"].tolist() == sorted(wanted)
    assert saved["memory"][:, 0].tolist() == [wanted[c][0] for c in sorted(wanted)]
    assert saved["updated"][:, 0].tolist() == [wanted[c][1] for c in sorted(wanted)]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rows", [None, 4])
def test_several_at_once_scattered_and_side_by_side(rows: int | None) -> None:
    store = store_of(rows)
    for clients in ([3, 1, 2], [9, 3], [1, 2], [2, 9, 3, 1]):
        write(store, clients, 10.0 * len(clients))
        assert [read(store, c)[0] for c in clients] == [c + 10.0 * len(clients) for c in clients]


def test_a_client_that_was_evicted_does_not_leave_its_memory_to_the_next() -> None:
    store = store_of(1)
    write(store, [1], 5.0)
    assert read(store, 2) == (0.0, 0.0)
    assert read(store, 1) == (6.0, 5.0)


@pytest.mark.parametrize("rows", [None, 2])
def test_saved_states_stay_as_they_were_and_restore_everywhere(rows: int | None) -> None:
    store = store_of(rows)
    for client in (4, 0, 7):
        write(store, [client], 1.0)
    saved = store.save()
    write(store, [0], 9.0)
    assert saved["memory"][:, 0].tolist() == [1.0, 5.0, 8.0]
    for other in (store_of(None), store_of(1), store_of(2)):
        write(other, [5], 3.0)
        other.restore(saved)
        again = other.save()
        assert all(same(again[key], saved[key]) for key in saved)
        assert read(other, 5) == (0.0, 0.0)


def test_a_bound_that_holds_no_state_is_refused() -> None:
    with pytest.raises(UserError, match=r"--state-memory.*24 bytes"):
        StateStore(AlphaNormEC(), SIZE, memory=ROW - 1)
    with pytest.raises(UserError, match="room for 3 clients"), store_of(2).borrowed([1, 2, 3]):
        pass


@pytest.mark.parametrize("size", [SIZE, 3000])
def test_clients_in_any_order_and_over_several_pieces_of_memory(size: int) -> None:
    """Short rows are copied by an index, long ones row by row."""
    rng, store, wanted = np.random.default_rng(6), StateStore(AlphaNormEC(), size), np.zeros(60)
    for step in range(1, 30):
        clients = rng.choice(2 * step + 1, size=min(step, 25), replace=False)
        with store.borrowed(clients.tolist()) as state:
            assert state.memory.shape == (len(clients), size)
            assert (state.memory == torch.from_numpy(wanted[clients]).unsqueeze(1)).all()
            wanted[clients] = 100 * clients + step
            state.memory.copy_(torch.from_numpy(wanted[clients]).unsqueeze(1).expand(-1, size))
    saved = store.save()
    assert saved["memory"][:, 0].tolist() == wanted[saved["clients"]].tolist()


def test_a_method_without_memory_needs_no_room() -> None:
    store = StateStore(DPFedAvg(), SIZE, memory=0)
    with store.borrowed([3, 1]) as state:
        assert state == ()
    assert store.save()["clients"].tolist() == [1, 3]


def test_a_full_disk_is_one_clear_line_and_no_state_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_of(2, tmp_path)
    write(store, [1, 2], 1.0)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(UserError, match=rf"{tmp_path}: expected room .* no space left.*--resume"):
            write(store, [3], 1.0)
    assert [read(store, client) for client in (1, 2)] == [(2.0, 1.0), (3.0, 1.0)]
    write(store, [3], 2.0)
    assert [read(store, client)[0] for client in (1, 2, 3)] == [2.0, 3.0, 5.0]


def test_a_write_that_stops_half_way_is_gone_on_with(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: whole(file, data[:7], at))
    store = store_of(1)
    write(store, [1], 5.0)
    write(store, [2], 5.0)
    assert read(store, 1) == (6.0, 5.0)


@pytest.mark.parametrize("name", ["alpha-normec damped", "alpha-normec sent", "clip21"])
@pytest.mark.parametrize("make", [LoopEngine, VectorizedEngine], ids=["loop", "vectorized"])
def test_a_bound_changes_no_bit_of_a_run(name: str, make: type) -> None:
    """With three states in memory and twelve clients, five at a time, nearly every state comes from disk."""
    method = EXAMPLES[name]
    trust = "local" if method.needs_client_noise else None
    made = setting(method, sampling=FixedSize(12, 5), trust=trust)
    start = method.init_server(made.initial_model)
    row = sum(4 * field.numel() for field in method.init_client(len(made.initial_model)))
    bounded = make(made.population, states=made.population.state_store(memory=3 * row))
    free = make(made.population)
    _, models, _ = advance(bounded, made.server, start, 1, 8)
    _, wanted, _ = advance(free, made.server, start, 1, 8)
    if make is LoopEngine:
        assert all(same(one, other) for one, other in zip(models, wanted, strict=True))
    assert all(float((one - other).abs().max()) <= 1e-6 for one, other in zip(models, wanted, strict=True))
    saved, other = bounded.save(), free.save()
    assert all(torch.allclose(saved[key], other[key], atol=1e-6) for key in other)


def test_memory_follows_the_bound_and_not_the_clients() -> None:
    """Slabs are as large as the bound; a thousand clients pass through ten rows."""
    store = StateStore(Clip21(), 1000, memory=10 * 4000)
    for client in range(1000):
        with store.borrowed([client]) as state:
            state.memory.fill_(client)
    held = sum(field.numel() * 4 for slab in store._slabs for field in slab)
    assert held <= 10 * 4000
    assert len(store) == 1000
    assert [float(store.save()["memory"][c, 0]) for c in (0, 500, 999)] == [0.0, 500.0, 999.0]


def test_the_federation_is_ragged() -> None:
    assert len(set(ragged_digits().sizes.tolist())) > 5

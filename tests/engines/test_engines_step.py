"""The client step in place is the method's client rule, operation by operation."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers import EXAMPLES, same
from torch import Tensor

from fedpriv.bounding import Clip
from fedpriv.engines.step import ClientStep
from fedpriv.methods import DPFedAvg, feedback_of
from fedpriv.rounds import Broadcast, ClientRules, client_round
from fedpriv.streams import SeededStreams

SIZE = 300


def signals_of(kind: str, rng: np.random.Generator, clients: int) -> Tensor:
    signals = torch.tensor(rng.standard_normal((clients, SIZE)), dtype=torch.float32)
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
def test_in_place_is_the_client_rule(name: str, rows: int, noise: float, kind: str) -> None:
    """Five rounds, skipped by some clients. A client alone: to the bit; several at once: up to rounding."""
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


def test_every_method_of_ours_runs_in_place() -> None:
    assert all(feedback_of(method) is not None for method in EXAMPLES.values())


def test_a_subclass_with_a_rule_of_its_own_is_not_taken_for_its_parent() -> None:
    class Louder(DPFedAvg):
        def client_rule(self, state, signal, noise, round):  # noqa: A002, ARG002
            return torch.ones_like(signal), state

    assert feedback_of(Louder()) is None
    rules = ClientRules(method=Louder(), noise_stddev=0.0, streams=SeededStreams(0))
    broadcast = Broadcast(1, torch.zeros(SIZE), np.arange(2))
    step = ClientStep(rules, broadcast, torch.device("cpu"))
    step.take([0, 1], torch.zeros(2, SIZE), Louder().init_client(SIZE))
    assert float(step.total().sum[0]) == 2.0


def test_a_subclass_that_changes_only_figures_still_runs_in_place() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Half(DPFedAvg):
        @property
        def bounded(self) -> Clip:
            return Clip(clip_norm=self.clip_norm / 2)

    form = feedback_of(Half())
    assert form is not None
    assert form.bounded.l2_bound == 0.5

"""Methods are generic in their states: a type checker distinguishes them, and rules are written for their own."""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from typing import assert_type, get_type_hints

import pytest
import torch
from support.helpers import EXAMPLES

from fedpriv.methods import AlphaNormEC, Clip21, DPFedAvg, Method, ServerOptimizer, optimized, server_step
from fedpriv.methods import alpha_normec as normec
from fedpriv.methods import clip21 as clip
from fedpriv.methods.memoryless import ModelOnly, NoMemory
from fedpriv.methods.server_optimizers import Momentum, Velocity
from fedpriv.rounds import ClientRules, apply_client_rule, client_round
from fedpriv.streams import SeededStreams


@pytest.mark.parametrize("method", EXAMPLES.values(), ids=EXAMPLES.keys())
def test_rules_name_the_states_of_their_method(method: Method) -> None:
    kind, part = type(method.client_part), method.client_part
    states = (part.init_client(1), part.init_server(torch.zeros(1)))
    rules = (get_type_hints(kind.client_rule), get_type_hints(kind.server_rule))
    for state, hints in zip(states, rules, strict=True):
        assert hints["state"] is type(state)
        assert hints["return"] == tuple[torch.Tensor, type(state)]


def test_a_checker_knows_the_states_of_a_method() -> None:
    memory: Method[normec.ClientMemory, normec.ServerMemory] = AlphaNormEC()
    none: Method[NoMemory, ModelOnly] = DPFedAvg()
    any_states: list[Method] = [memory, none, Clip21(), optimized(memory, Momentum())]
    of_others: Method[clip.ClientMemory, clip.ServerMemory] = AlphaNormEC()  # pyright: ignore[reportAssignmentType]
    assert any_states[0] == of_others
    assert_type(memory.init_client(2), normec.ClientMemory)
    assert_type(memory.client_part.init_client(2), normec.ClientMemory)
    assert_type(optimized(memory, Momentum()).init_client(2), normec.ClientMemory)
    after = server_step(none, none.init_server(torch.ones(2)), torch.ones(2), 1.0)
    assert_type(after, ModelOnly)
    assert after.model.tolist() == [0.0, 0.0]


def test_a_checker_knows_the_state_of_an_optimizer() -> None:
    optimizer: ServerOptimizer[Velocity] = Momentum()
    assert_type(optimizer.init(torch.zeros(2)), Velocity)


def test_a_checker_knows_the_state_after_a_round_of_a_client() -> None:
    method, signal = AlphaNormEC(), torch.ones(2)
    rules = ClientRules(method=method, noise_stddev=0.0, streams=SeededStreams(1))
    assert_type(rules.init_client(2), normec.ClientMemory)
    _, after = client_round(rules, 0, rules.init_client(2), signal, 1)
    assert_type(after, normec.ClientMemory)
    _, same = apply_client_rule(method, method.init_client(2), signal, None, 1)
    assert_type(same, normec.ClientMemory)
    assert torch.equal(after.memory, same.memory)
    with pytest.raises(AttributeError):
        client_round(rules, 0, NoMemory(), signal, 1)  # pyright: ignore[reportArgumentType]

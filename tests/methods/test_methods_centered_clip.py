"""centered-clip: its options, and how clients use the memory that they are sent."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.helpers import EXAMPLES
from torch import Tensor

from fedpriv.bounding import Clip
from fedpriv.errors import UserError
from fedpriv.methods import CenteredClip, DPFedAvg, has_memory
from fedpriv.privacy import ExampleTerms, FixedSize, make_plan
from fedpriv.rounds import ClientRules, client_round, record_bound
from fedpriv.streams import SeededStreams


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bound": "l1"}, '^method.bound: expected "clip" or "normalize", got \'l1\''),
        ({"alpha": 0.5}, '^method.alpha: expected 1 with bound = "clip", got 0.5'),
        ({"bound": "normalize", "clip_norm": 2.0}, '^method.clip_norm: expected 1 with bound = "normalize", got 2'),
        ({"beta": 0.0}, "^method.beta"),
        ({"clip_norm": -1.0}, "^method.clip_norm"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        CenteredClip(**options)


def test_a_client_bounds_the_difference_to_the_memory_that_it_is_sent() -> None:
    method = CenteredClip(clip_norm=1.0)
    rules = ClientRules(method=method, noise_stddev=0.0, streams=SeededStreams(1))
    signal, memory = torch.tensor([5.0, 1.0]), torch.tensor([5.0, 0.5])
    near, _ = client_round(rules, 0, method.init_client(2), signal, 1, shared=memory)
    assert torch.equal(near, torch.tensor([0.0, 0.5]))
    alone, _ = client_round(rules, 0, method.init_client(2), signal, 1)
    assert float(alone.norm()) == pytest.approx(1.0, rel=1e-6)
    assert method.in_round(memory) == method  # the memory is no hyperparameter
    broken, _ = client_round(rules, 0, method.init_client(2), torch.tensor([torch.nan, 0.0]), 1, shared=memory)
    assert torch.equal(broken, torch.zeros(2))


def test_a_method_keeps_its_bound_in_a_round() -> None:
    class Wider(DPFedAvg):
        def in_round(self, shared: Tensor) -> "Wider":
            return replace(self, clip_norm=2.0)

    rules = ClientRules(method=Wider(clip_norm=1.0), noise_stddev=0.0, streams=SeededStreams(1))
    with pytest.raises(ValueError, match="another l2_bound in a round: 2"):
        rules.in_round(torch.zeros(2))


def test_an_own_map_of_a_subclass_stays_its_map_in_a_round() -> None:
    class Halved(Clip):
        def __call__(self, vectors: Tensor) -> Tensor:
            return super().__call__(vectors) / 2.0

    class Own(CenteredClip):
        @property
        def bounded(self) -> Clip:
            return Halved(clip_norm=self.clip_norm)

    message, _ = Own().in_round(torch.ones(2)).client_rule(Own().init_client(2), torch.ones(2) * 1.5, None, 1)
    assert torch.allclose(message, torch.full((2,), 0.25))


def test_cohorts_of_a_fixed_size_are_credited_and_single_examples_cost_as_without_memory() -> None:
    method = EXAMPLES["centered-clip"]
    terms = ExampleTerms(clip=1.0, examples=100)
    assert record_bound(method, terms) == record_bound(DPFedAvg(clip_norm=method.bounded.l2_bound), terms)
    facts: dict[str, Any] = {"trust": "central", "rounds": 20, "delta": 1e-5, "noise_multiplier": 1.0, "l2_bound": 0.5}
    plan, other = (
        make_plan(**facts, sampling=FixedSize(100, 5), client_memory=has_memory(each))
        for each in (method, EXAMPLES["clip21"])
    )
    assert plan.epsilon < 0.5 * other.epsilon

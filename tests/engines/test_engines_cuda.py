"""Engines, evaluation and sums over examples on a GPU; skipped without one."""

import dataclasses

import pytest
import torch
from support.federations import MakeEngine, models_of, setting

from fedpriv.bounding import Clip
from fedpriv.engines import LoopEngine, VectorizedEngine
from fedpriv.methods import AlphaNormEC
from fedpriv.tasks.local_work import FullGradient, LocalEpochs, LocalWork
from fedpriv.tasks.models import Cnn
from fedpriv.tasks.task import Task

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.mark.parametrize("work", [FullGradient(), LocalEpochs(epochs=2, client_lr=0.05, batch_size=20)], ids=type)
@pytest.mark.parametrize("make", [LoopEngine, VectorizedEngine])
@pytest.mark.parametrize("trust", [None, "local"])
def test_engines_on_a_gpu_are_the_loop_on_a_cpu_up_to_rounding(make: MakeEngine, work: LocalWork, trust) -> None:
    made = setting(AlphaNormEC(), module=Cnn(width=2).build((1, 8, 8), 10, 3), work=work, trust=trust)
    expected = models_of(made, LoopEngine, rounds=2)
    there = dataclasses.replace(made, population=made.population.on(torch.device("cuda")))
    for found, wanted in zip(models_of(there, make, rounds=2), expected, strict=True):
        assert torch.allclose(found.cpu(), wanted, atol=1e-3)


def test_evaluation_and_sums_over_examples_are_those_of_a_cpu_up_to_rounding() -> None:
    here = Task(Cnn(width=2).build((3, 12, 12), 10, 0))
    there, model = here.on(torch.device("cuda")), here.initial_model()
    inputs, labels = torch.randn(40, 3, 12, 12), torch.randint(10, (40,))
    assert there.evaluate(model, inputs, labels)["loss"] == pytest.approx(here.evaluate(model, inputs, labels)["loss"])
    wanted = here.clipped_sum(model, inputs, labels, Clip(clip_norm=0.1))
    found = there.clipped_sum(model.cuda(), inputs.cuda(), labels.cuda(), Clip(clip_norm=0.1))
    assert torch.allclose(found.cpu(), wanted, atol=1e-3)

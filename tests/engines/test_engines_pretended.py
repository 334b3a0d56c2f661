"""Engines, evaluation and sums over examples on a pretended device, for mistakes with devices."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from support.federations import MakeEngine, Setting, models_of, ragged_digits, setting
from support.helpers import EXAMPLES, same
from support.pretended import OnDevice, pretended_device

from fedpriv.bounding import Clip
from fedpriv.data.federation import shifted
from fedpriv.data.shifts import Rotation
from fedpriv.engines import LoopEngine, VectorizedEngine
from fedpriv.methods import Method
from fedpriv.privacy import AggregationChoice, FixedSize
from fedpriv.rounds import Broadcast
from fedpriv.streams import SeededStreams
from fedpriv.tasks.local_work import FullGradient, LocalEpochs, LocalSteps, LocalWork, MinibatchGradient
from fedpriv.tasks.models import Cnn, Mlp
from fedpriv.tasks.task import Task


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    with pretended_device(monkeypatch) as found:
        yield found


def moved(made: Setting, device: torch.device) -> Setting:
    return dataclasses.replace(made, population=made.population.on(device))


def assert_equal_models(made: Setting, make: MakeEngine, device: torch.device, tolerance: float = 1e-5) -> None:
    expected = models_of(made, LoopEngine, rounds=2)
    for found, wanted in zip(models_of(moved(made, device), make, rounds=2), expected, strict=True):
        assert torch.allclose(found.cpu(), wanted, atol=tolerance)


def test_mixed_devices_are_errors_here_as_on_a_gpu(device: torch.device) -> None:
    there, here = torch.ones(3, device=device), torch.ones(3)
    assert isinstance(there, OnDevice)
    assert same((there + here.to(device)).cpu(), here + here)
    assert same(there[torch.tensor([0, 2])].cpu(), here[:2])  # indices may be on the CPU
    for wrong in (lambda: there + here, lambda: here.add_(there), lambda: here[there.long()], lambda: there.numpy()):
        with pytest.raises((RuntimeError, TypeError), match="device"):
            wrong()


@pytest.mark.sampled
@pytest.mark.parametrize("make", [LoopEngine, VectorizedEngine])
@pytest.mark.parametrize("method", EXAMPLES.values(), ids=EXAMPLES.keys())
def test_methods_on_the_device_are_those_on_the_cpu(method: Method, make: MakeEngine, device: torch.device) -> None:
    assert_equal_models(setting(method, trust="local"), make, device)


WORKS = {
    "gradient": FullGradient(),
    "minibatch": MinibatchGradient(batch_size=20),
    "steps": LocalSteps(steps=2, client_lr=0.05, batch_size=20),
    "epochs": LocalEpochs(epochs=1, client_lr=0.05, batch_size=20),
    "moves": LocalEpochs(epochs=1, client_lr=0.1, batch_size=20, order="by-loss", ascent=0.1),
}


@pytest.mark.sampled
@pytest.mark.parametrize("model", [Mlp(hidden=(8,)), Cnn(width=2)], ids=["mlp", "cnn"])
@pytest.mark.parametrize("make", [LoopEngine, VectorizedEngine])
@pytest.mark.parametrize("work", WORKS.values(), ids=WORKS.keys())
def test_local_work_on_the_device_is_that_on_the_cpu(
    work: LocalWork, make: MakeEngine, model: Mlp | Cnn, device: torch.device
) -> None:
    module = model.build((1, 8, 8), 10, 3)
    made = setting(EXAMPLES["clip21"], module=module, work=work, trust="central", sampling=FixedSize(12, 4))
    assert_equal_models(made, make, device, 1e-4)


@pytest.mark.parametrize("make", [LoopEngine, VectorizedEngine])
def test_integer_sums_and_shifts_on_the_device(make: MakeEngine, device: torch.device) -> None:
    federation = shifted(ragged_digits(), Rotation(), SeededStreams(3))
    choice = AggregationChoice(least_survivors=4)
    made = setting(EXAMPLES["dp-fedavg"], federation=federation, trust="aggregator", aggregation=choice)
    broadcast = Broadcast(1, made.initial_model, np.arange(12), 12)
    found, expected = (
        each.sum_messages(broadcast) for each in (make(moved(made, device).population), LoopEngine(made.population))
    )
    assert found.messages == expected.messages == 12
    assert (found.sum - expected.sum).abs().max() <= 12.0  # integers: rounding moves a message by one step at most


def test_examples_are_bounded_and_tested_on_the_device(device: torch.device) -> None:
    here = Task(Cnn(width=2).build((3, 12, 12), 10, 0))
    there, model = here.on(device), here.initial_model()
    inputs, labels = torch.randn(40, 3, 12, 12), torch.randint(10, (40,))
    assert there.evaluate(model, inputs, labels)["loss"] == pytest.approx(here.evaluate(model, inputs, labels)["loss"])
    bound = Clip(clip_norm=0.1)
    found = there.clipped_sum(model.to(device), inputs.to(device), labels.to(device), bound)
    assert torch.allclose(found.cpu(), here.clipped_sum(model, inputs, labels, bound), atol=1e-4)


def test_states_on_the_device_are_saved_and_restored(device: torch.device) -> None:
    made = moved(setting(EXAMPLES["alpha-normec damped"], trust="central"), device)
    one, other = VectorizedEngine(made.population), LoopEngine(made.population)
    first, second = (Broadcast(round, made.initial_model, np.arange(4), 12) for round in (1, 2))
    one.sum_messages(first)
    other.restore(one.save())
    assert all(tensor.device.type == "cpu" for tensor in one.save().values())
    assert torch.allclose(one.sum_messages(second).sum, other.sum_messages(second).sum, atol=1e-5)

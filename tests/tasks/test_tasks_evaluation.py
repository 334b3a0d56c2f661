"""Evaluation in pieces and with channels innermost: the metrics of the plain logits."""

import pytest
import torch
from torch import Tensor, nn

from fedpriv.tasks.models import Cnn, Mlp
from fedpriv.tasks.pooling import MaxPoolReLU
from fedpriv.tasks.task import MAX_PIECE_FLOATS, Task


def examples_of(shape: tuple[int, ...], count: int = 30) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(count, *shape, generator=generator), torch.randint(10, (count,), generator=generator)


@pytest.mark.parametrize("shape", [(3, 12, 12), (1, 8, 8)])
def test_metrics_are_those_of_the_plain_logits(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    task = Task(Cnn(width=2).build(shape, 10, 0))
    model, (inputs, labels) = task.initial_model(), examples_of(shape)
    logits = task.logits(model, inputs)
    loss = float(task.losses(logits, labels).mean())
    right = float((logits.argmax(dim=1) == labels).double().mean())
    for most in (10, 8_000_000):
        monkeypatch.setattr("fedpriv.tasks.task._MAX_OUTPUT_FLOATS", most)
        assert task.evaluate(model, inputs, labels) == {
            "accuracy": right,
            "loss": pytest.approx(loss, rel=1e-5),
        }


def test_pieces_follow_the_largest_output_of_a_layer() -> None:
    shape = (3, 32, 32)
    task, inputs = Task(Cnn().build(shape, 10, 0)), torch.zeros(3, *shape)
    assert MAX_PIECE_FLOATS // task._evaluation_width(inputs) == 8_000_000 // (8 * 32 * 32)  # the first convolution
    task, inputs = Task(Mlp().build(shape, 10, 0)), torch.zeros(3, *shape)
    assert task._evaluation_width(inputs) == inputs[0].numel()


def test_a_module_with_views_is_evaluated_in_the_usual_order() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.last = nn.Conv2d(3, 4, 3), nn.Linear(4 * 6 * 6, 10)

        def forward(self, images: Tensor) -> Tensor:
            return self.last(self.conv(images).view(len(images), -1))

    task = Task(Own())
    inputs, labels = examples_of((3, 8, 8))
    found = task.evaluate(task.initial_model(), inputs, labels)
    assert found["loss"] == pytest.approx(float(task.losses(task.logits(task.initial_model(), inputs), labels).mean()))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_pooling_before_relu_is_pooling_after_it_to_the_bit(channels_last: bool, scale: float) -> None:
    """With ties, too: in a window of equal numbers both take the first."""
    new = Cnn(width=3).build((3, 12, 12), 10, 0)
    usual = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2))
    layers = [usual if isinstance(layer, MaxPoolReLU) else layer for layer in new.children()]
    assert layers.count(usual) == 2
    inputs, labels = examples_of((3, 12, 12))
    inputs = (scale * inputs).round()
    tasks = [Task(module, channels_last=channels_last) for module in (new, nn.Sequential(*layers))]
    gradients = [task.gradient(tasks[0].initial_model(), inputs, labels) for task in tasks]
    assert torch.equal(*gradients)

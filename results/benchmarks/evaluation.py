"""Evaluation of test examples, as `Task.evaluate` does it and as it was once done, by turns in one process.

python results/benchmarks/evaluation.py [--turns 5]
"""

import argparse
import time
from collections.abc import Callable

import torch
from page import fill, table
from torch import Tensor, nn
from workloads import median, one_thread

from fedpriv.tasks.convolution import DirectConv2d
from fedpriv.tasks.models import Cnn, Mlp, ModelSource, ResNet20
from fedpriv.tasks.pooling import MaxPoolReLU
from fedpriv.tasks.task import MAX_PIECE_FLOATS, Task

CASES: tuple[tuple[str, ModelSource, tuple[int, ...], int], ...] = (
    ("cnn", Cnn(), (3, 32, 32), 3000),
    ("cnn", Cnn(), (1, 28, 28), 6000),
    ("resnet20", ResNet20(), (3, 32, 32), 300),
    ("mlp", Mlp(), (1, 28, 28), 10000),
)


def in_torch(module: nn.Module) -> nn.Module:
    """Return a module with PyTorch's convolutions and pooling in place of those in C."""
    for name, layer in module.named_children():
        if isinstance(layer, MaxPoolReLU):
            setattr(module, name, nn.Sequential(nn.MaxPool2d(2), nn.ReLU()))
        if isinstance(layer, DirectConv2d):
            setattr(module, name, nn.Conv2d(layer.in_channels, layer.out_channels, 5, padding=2))
    return module


def earlier(task: Task, model: Tensor, inputs: Tensor, labels: Tensor) -> float:
    """Return the mean loss, evaluated as it was before."""
    size, loss = MAX_PIECE_FLOATS // inputs[0].numel(), 0.0
    with torch.no_grad():
        for x, y in zip(inputs.split(size), labels.split(size), strict=True):
            outputs = task.logits(model, x)
            loss += float(task.losses(outputs, y).sum())
            outputs.argmax(dim=1).eq(y).sum().item()
    return loss / len(labels)


def seconds(work: Callable[[], object]) -> float:
    """Return the processor time of some work."""
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    """Measure, and fill the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    found = parser.parse_args()
    one_thread()
    lines = []
    for name, source, shape, count in CASES:
        inputs, labels = torch.randn(count, *shape), torch.randint(10, (count,))
        task = Task(source.build(shape, 10, 0))
        once = Task(in_torch(source.build(shape, 10, 0)))
        model, times = task.initial_model(), []
        for _ in range(found.turns + 1):
            before = seconds(lambda t=once, m=model, x=inputs, y=labels: earlier(t, m, x, y))
            times.append((before, seconds(lambda t=task, m=model, x=inputs, y=labels: t.evaluate(m, x, y))))
        ratios = [after / before for before, after in times[1:]]
        cells = [f"{1e4 / count * median(part):.2f}" for part in zip(*times[1:], strict=True)]
        ratio = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append([f"{name} {list(shape)}", *cells, ratio])
        print(lines[-1], flush=True)
    fill("evaluation", table(("model", "before, s", "now, s", "now over before"), lines))


if __name__ == "__main__":
    main()

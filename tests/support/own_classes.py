"""A method, a model, a data set and a loss in a file of a user's own, and an experiment of them."""

from pathlib import Path

OWN = '''
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from fedpriv.bounding import Clip
from fedpriv.data.dataset import Dataset
from fedpriv.methods.memoryless import Memoryless


def focal(outputs, labels, power: float = 1.0):
    """Weighs examples that are right already less."""
    losses = nn.functional.cross_entropy(outputs, labels, reduction="none")
    return (1.0 - torch.exp(-losses)) ** power * losses


@dataclass(frozen=True, kw_only=True)
class HalfClip(Memoryless):
    """Clips to a half."""

    server_lr: float = 1.0

    @property
    def bounded(self) -> Clip:
        return Clip(clip_norm=0.5)


@dataclass(frozen=True, kw_only=True)
class Line:
    """One layer without a bias."""

    dense: ClassVar[bool] = True
    scale: float = 0.1

    def parameters(self, input_shape, classes):
        return input_shape[0] * classes

    def build(self, input_shape, classes, seed):
        layer = nn.Linear(input_shape[0], classes, bias=False)
        with torch.no_grad():
            layer.weight.copy_(self.scale * torch.eye(classes, input_shape[0]))
        return nn.Sequential(nn.Flatten(), layer)


@dataclass(frozen=True, kw_only=True)
class Stripes:
    """Which of three features is largest."""

    natural: ClassVar[bool] = False
    test: ClassVar[str] = "public"
    examples: int = 60

    def load(self, data_root: Path | None) -> Dataset:
        inputs = torch.rand(self.examples, 3, generator=torch.Generator().manual_seed(0))
        labels = inputs.argmax(1)
        return Dataset(
            name="stripes", train_inputs=inputs, train_labels=labels, test_inputs=inputs, test_labels=labels, classes=3
        )
'''
CONFIG = """
name = "own"
seed = 1
[data]
name = "./own.py:Stripes"
examples = 90
clients = 5
[model]
name = "./own.py:Line"
scale = 0.2
[task]
name = "./own.py:focal"
power = 2.0
metrics = ["accuracy"]
[method]
name = "./own.py:HalfClip"
server_lr = 0.5
[training]
rounds = 2
"""


def own_config(folder: Path) -> Path:
    """The config, with the file beside it."""
    (folder / "own.py").write_text(OWN)
    path = folder / "own.toml"
    path.write_text(CONFIG)
    return path

"""A user's folder outside of the repository: a model, data and a method in files, an experiment and a sweep of them."""

from pathlib import Path

NET = '''
"""A small network of convolutions."""

import torch
from torch import nn


class Net(nn.Module):
    """Two convolutions, group normalization and a linear layer.

    Args:
        input_shape: Channels, height and width.
        classes: Number of labels.
        width: Channels of the second convolution.
    """

    def __init__(self, input_shape: tuple[int, ...], classes: int, width: int = 4):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(input_shape[0], 2, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(2, width, 3, stride=2, padding=1),
            nn.GroupNorm(2, width),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
        )
        self.last = nn.Linear(4 * width, classes)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.last(self.layers(inputs).flatten(1))
'''

DATA = '''
"""Bright corners: which quarter of a small image is the brightest?"""

import numpy as np


def load(people: int = 3, examples: int = 24):
    """Each person has their own light."""
    rng = np.random.default_rng(0)
    rows = people * examples
    labels = rng.integers(0, 4, rows)
    images = rng.normal(size=(rows, 1, 6, 6))
    for image, label in zip(images, labels):
        image[0, 3 * (label // 2) :, 3 * (label % 2) :][:3, :3] += 2.0
    who = np.arange(rows) % people
    images += rng.normal(size=people)[who, None, None, None] * 0.2
    held = rows // 4
    return {
        "inputs": images[held:], "labels": labels[held:], "client_ids": who[held:],
        "test_inputs": images[:held], "test_labels": labels[:held],
    }
'''

METHOD = '''
"""Clipped differences to a shift that client and server remember."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fedpriv.bounding import Clip
from fedpriv.feedback import sent_message
from fedpriv.methods import PlainMethod


class Shift(NamedTuple):
    shift: Tensor


class Server(NamedTuple):
    model: Tensor
    shift: Tensor


@dataclass(frozen=True, kw_only=True)
class Shifted(PlainMethod):
    clip_norm: float = 1.0
    beta: float = 0.1
    server_lr: float = 0.5
    lost_memory = "reset-all"

    @property
    def bounded(self) -> Clip:
        return Clip(clip_norm=self.clip_norm)

    def init_client(self, size: int) -> Shift:
        return Shift(torch.zeros(size))

    def init_server(self, model: Tensor) -> Server:
        return Server(model, torch.zeros_like(model))

    def client_rule(self, state, signal, release, round):
        message = self.bounded(signal - state.shift)
        return sent_message(message, release), Shift(state.shift + self.beta * message)

    def server_rule(self, state, mean_message, sampling_prob):
        shift = state.shift + self.beta * sampling_prob * mean_message
        return state.shift + mean_message, Server(state.model, shift)
'''

EXPERIMENT = """
name = "corners"
seed = 3

[data]
name = "./data.py:load"
partition = "natural"

[augment]
name = "images"
flip = false
crop = 1
rotate = 5.0

[model]
name = "./net.py:Net"

[local]
work = "local-epochs"
epochs = 1
client_lr = 0.1
batch_size = 6
signal = "gradient-mean"

[method]
name = "./method.py:Shifted"

[privacy]
trust = "local"
noise_multiplier = 0.5

[training]
rounds = 2

[deployment]
deadline = 90
min_participants = 3
"""

SWEEP = """
name = "widths"
base = "corners.toml"

[set]
"training.rounds" = 1

[[axis]]
key = "seed"
values = [1, 2, 3]

[[axis]]
key = "model.width"
values = [2, 4]

[[axis]]
key = "method.beta"
values = [0.1, 1.0]
"""

FILES = {
    "net.py": NET,
    "data.py": DATA,
    "method.py": METHOD,
    "corners.toml": EXPERIMENT,
    "widths.toml": SWEEP,
}


def own_folder(folder: Path, people: int = 3) -> Path:
    """Write the files, with as many clients as `people`; return the path of the experiment."""
    for name, text in FILES.items():
        for three in ("people: int = 3", "min_participants = 3"):
            text = text.replace(three, three.replace("3", str(people)))
        (folder / name).write_text(text.lstrip(), encoding="utf-8")
    return folder / "corners.toml"

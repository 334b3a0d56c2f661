"""CIFAR-10 for the study: the images at half size, so that two cores suffice."""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from fedpriv.data.datasets import Cifar10


def small_cifar10(data_root: Path, train_examples: int = 5000, test_examples: int = 2000) -> dict[str, Tensor | int]:
    """Return the first images of CIFAR-10 as `[3, 16, 16]`: the mean of each 2x2 block of normalized pixels."""
    data = Cifar10(train_examples=train_examples, test_examples=test_examples).load(data_root)
    half = [avg_pool2d(torch.as_tensor(inputs), 2) for inputs in (data.train_inputs, data.test_inputs)]
    return {"inputs": half[0], "labels": data.train_labels, "test_inputs": half[1], "test_labels": data.test_labels}

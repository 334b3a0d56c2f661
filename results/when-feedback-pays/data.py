"""The data sets of the map, for `[data] name`, and shards of a regression's targets, for `partition`.

Everything is scaled by public constants so that an input is about 3 to 5 long. Each function reads its files once in a
process, because thousands of trials use the same arrays.
"""

import csv
import zlib
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch

from fedpriv.data.dataset import Dataset
from fedpriv.data.datasets import Digits, Libsvm, Mnist
from fedpriv.data.partitions import LabelShards

Arrays = dict[str, np.ndarray]
WORDS = 300
_CATEGORIES = {
    1: ("Private", "Self-emp-not-inc", "Self-emp-inc", "Federal-gov", "Local-gov", "State-gov"),
    5: ("Never-married", "Married-civ-spouse", "Divorced", "Separated", "Widowed", "Married-spouse-absent"),
    7: ("Husband", "Wife", "Own-child", "Not-in-family", "Other-relative", "Unmarried"),
    8: ("White", "Black", "Asian-Pac-Islander", "Amer-Indian-Eskimo", "Other"),
    9: ("Female", "Male"),
}
_NUMBERS = {0: (40, 15), 4: (10, 3), 10: (0, 10_000), 11: (0, 1000)}
_HOURS = 12
_MOST = 3.0


@cache
def digits() -> Dataset:
    """Return scikit-learn's digits, 8 x 8."""
    return Digits().load(None)


@cache
def mnist(data_root: Path, images: int = 10_000) -> Dataset:
    """Return MNIST's first training images at 14 x 14 pixels: the means of 2 x 2 pixels, from 0 to 1."""
    found = Mnist(train_examples=images).load(data_root)
    train, test = (
        torch.nn.functional.avg_pool2d(part * 0.3081 + 0.1307, 2) for part in (found.train_inputs, found.test_inputs)
    )
    return replace(found, train_inputs=train, test_inputs=test)


@cache
def a9a(data_root: Path) -> Dataset:
    """Return Adult as 123 flags; the label is an income above 50,000."""
    return Libsvm(file="libsvm/a9a", test_file="libsvm/a9a.t").load(data_root)


@cache
def mushrooms(data_root: Path) -> Dataset:
    """Return mushrooms as 112 flags; the label is whether they can be eaten."""
    return Libsvm(file="libsvm/mushrooms").load(data_root)


@cache
def sst2(data_root: Path, sentences: int = 20_000) -> Arrays:
    """Return SST-2's first training sentences as counts of words, hashed to `WORDS` numbers; the label is praise."""
    train, test = (_sentences(data_root / "sst2" / f"{part}.tsv", sentences) for part in ("train", "dev"))
    return {"inputs": train[0], "labels": train[1], "test_inputs": test[0], "test_labels": test[1]}


@cache
def hours(data_root: Path) -> Arrays:
    """Return Adult as numbers and flags; the target is the number of hours of work a week."""
    train, test = (_people(data_root / "adult" / name) for name in ("adult.data", "adult.test"))
    return {"inputs": train[0], "labels": train[1], "test_inputs": test[0], "test_labels": test[1]}


@dataclass(frozen=True, kw_only=True)
class TargetShards:
    """Targets sorted and cut into equal shards, which are assigned at random; see `LabelShards`.

    Args:
        shards_per_client: Shards for each client.
    """

    shards_per_client: int = 2

    def split(
        self, labels: np.ndarray, groups: np.ndarray | None, clients: int | None, rng: np.random.Generator
    ) -> list[np.ndarray]:
        """See `Partition.split`."""
        return LabelShards(shards_per_client=self.shards_per_client).split(labels, groups, clients, rng)


def _sentences(file: Path, most: int) -> tuple[np.ndarray, np.ndarray]:
    lines = [line.rsplit("\t", 1) for line in file.read_text(encoding="utf-8").splitlines()[1 : most + 1]]
    counts = np.zeros((len(lines), WORDS), dtype=np.float32)
    for row, (sentence, _) in enumerate(lines):
        for word in sentence.split():
            hashed = zlib.crc32(word.encode())
            counts[row, hashed % WORDS] += 1 - 2 * (hashed >> 31)
    return counts, np.array([int(label) for _, label in lines])


def _people(file: Path) -> tuple[np.ndarray, np.ndarray]:
    with file.open(encoding="utf-8") as text:
        rows = [row for row in csv.reader(text, skipinitialspace=True) if len(row) == 15 and "?" not in row]
    columns = [
        np.minimum((np.array([float(row[at]) for row in rows]) - center) / scale, _MOST)
        for at, (center, scale) in _NUMBERS.items()
    ]
    columns += [
        np.array([row[at] == value for row in rows], float) for at, each in _CATEGORIES.items() for value in each
    ]
    return np.stack(columns, axis=1).astype(np.float32), np.array([float(row[_HOURS]) for row in rows])

"""Data sets in memory: one frozen dataclass per data set, which loads it from disk.

Images are normalized with published constants of each data set, never with statistics of the loaded examples, so
loading releases nothing about any client. (For a LIBSVM file, the number of features and the labels are read from the
data and count as public; `features` can state the former.) The data sets' standard splits into training and test
examples are fixed: they depend on neither the experiment's seed nor its population. With natural clients, an experiment
can test on other examples; see `fedpriv.data.validation`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from fedpriv.checks import positive_int, real_within, refuse_beyond_memory
from fedpriv.data.dataset import Dataset, Declared
from fedpriv.data.files import default_data_root, locate, read_cifar_batch, read_digits, read_idx, read_libsvm
from fedpriv.data.natural_files import (
    ALPHABET,
    HOSPITALS,
    next_characters,
    one_hot_contexts,
    read_patients,
    read_speeches,
)
from fedpriv.errors import UserError
from fedpriv.privacy.released import Whose

__all__ = [
    "Cifar10",
    "Digits",
    "FashionMnist",
    "HeartDisease",
    "Libsvm",
    "Mnist",
    "MnistByWriter",
    "TinyShakespeare",
    "every_fifth_of_each_label",
]

IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
WRITER_FILE = "qmnist-train-labels-idx2-int"
# Inputs and labels of a split.
Examples = tuple[np.ndarray, np.ndarray]
_DIGITS = tuple(map(str, range(10)))
# The names are those of the authors, in the order of the labels.
_CLOTHES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_FILES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")


@dataclass(frozen=True, kw_only=True)
class Digits:
    """scikit-learn's 1,797 handwritten digits, `[1, 8, 8]` in [0, 1]; needs no file. Test: a fixed fifth.

    Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998 (its test part).
    """

    natural: ClassVar[bool] = False
    test: ClassVar[Whose] = "public"
    declared: ClassVar[Declared] = Declared(class_names=_DIGITS, scale=16.0)

    def load(self, data_root: Path | None) -> Dataset:
        """Load the digits from the file in scikit-learn; see `DatasetSource.load`."""
        table = read_digits()
        inputs = (table[:, :-1] / 16.0).astype(np.float32).reshape(-1, 1, 8, 8)
        return _split("digits", inputs, table[:, -1].astype(np.int64), 10)


@dataclass(frozen=True, kw_only=True)
class _ImageSource:
    """Common settings of image data sets: use only some of the examples, for smaller studies.

    Args:
        train_examples: Use only this many training examples, from the first; None for all.
        test_examples: The same for test examples.

    Raises:
        UserError: If a number is not positive or, on loading, exceeds the number of examples.
    """

    natural: ClassVar[bool] = False
    test: ClassVar[Whose] = "public"
    train_examples: int | None = None
    test_examples: int | None = None

    def __post_init__(self) -> None:
        for key in ("train_examples", "test_examples"):
            if getattr(self, key) is not None:
                positive_int(f"data.{key}", getattr(self, key))

    def _taken(self, train: Examples, test: Examples) -> tuple[Examples, Examples]:
        return _first("train", train, self.train_examples), _first("test", test, self.test_examples)


@dataclass(frozen=True, kw_only=True)
class Mnist(_ImageSource):
    """MNIST: 60,000 + 10,000 handwritten digits `[1, 28, 28]`, normalized.

    Mean 0.1307, deviation 0.3081. Source: LeCun, Bottou, Bengio and Haffner, Gradient-based learning applied
    to document recognition, 1998.
    """

    declared: ClassVar[Declared] = Declared(class_names=_DIGITS, scale=255.0, mean=(0.1307,), std=(0.3081,))

    def load(self, data_root: Path | None) -> Dataset:
        """Load `MNIST/raw/*ubyte`, plain or .gz; see `DatasetSource.load`.

        Raises:
            UserError: If files are missing and cannot be downloaded, or are damaged.
        """
        return _idx_images("mnist", data_root or default_data_root(), "MNIST", self.declared, self._taken)


@dataclass(frozen=True, kw_only=True)
class FashionMnist(_ImageSource):
    """Fashion-MNIST: 60,000 + 10,000 articles of clothing `[1, 28, 28]`, normalized.

    Mean 0.2860, deviation 0.3530. Source: Xiao, Rasul and Vollgraf, Fashion-MNIST, arXiv:1708.07747.
    """

    declared: ClassVar[Declared] = Declared(class_names=_CLOTHES, scale=255.0, mean=(0.2860,), std=(0.3530,))

    def load(self, data_root: Path | None) -> Dataset:
        """Load `FashionMNIST/raw/*ubyte`, plain or .gz; see `DatasetSource.load`.

        Raises:
            UserError: If files are missing and cannot be downloaded, or are damaged.
        """
        root = data_root or default_data_root()
        return _idx_images("fashion-mnist", root, "FashionMNIST", self.declared, self._taken)


@dataclass(frozen=True, kw_only=True)
class MnistByWriter:
    """MNIST with the writer of each training image as its natural client: 539 writers of 19 to 131 images.

    Test examples: MNIST's standard test images, by other writers.

    Source: Yadav and Bottou, Cold Case: the Lost MNIST Digits, NeurIPS 2019 (QMNIST, label column 2).
    """

    natural: ClassVar[bool] = True
    test: ClassVar[Whose] = "public"
    declared: ClassVar[Declared] = Declared(class_names=_DIGITS, scale=255.0, mean=(0.1307,), std=(0.3081,))

    def load(self, data_root: Path | None) -> Dataset:
        """Load `MNIST/raw/*ubyte` and `QMNIST/raw/qmnist-train-labels-idx2-int`; see `DatasetSource.load`.

        Raises:
            UserError: If files are missing and cannot be downloaded, are damaged, or describe other images.
        """
        root = data_root or default_data_root()
        [path] = locate(root, "QMNIST/raw", [WRITER_FILE], "QMNIST")
        images = _idx_images("mnist-by-writer", root, "MNIST", self.declared)
        facts = read_idx(path)
        if facts.shape != (images.examples, 8) or (facts[:, 0] != images.train_labels.numpy()).any():
            expected = f"{images.examples} rows of 8 facts, each with the label of its MNIST image"
            raise UserError(str(path), expected, f"rows of shape {facts.shape}", "Replace the file")
        groups = np.unique(facts[:, 2], return_inverse=True)[1].astype(np.int64)
        return Dataset(**{**vars(images), "groups": groups})


@dataclass(frozen=True, kw_only=True)
class Cifar10(_ImageSource):
    """CIFAR-10: 50,000 + 10,000 color images `[3, 32, 32]`, normalized per channel.

    Means 0.4914, 0.4822, 0.4465; deviations 0.2470, 0.2435, 0.2616. Source: Krizhevsky, Learning
    Multiple Layers of Features from Tiny Images, 2009.
    """

    declared: ClassVar[Declared] = Declared(
        class_names=_CIFAR10, scale=255.0, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)
    )

    def load(self, data_root: Path | None) -> Dataset:
        """Load `cifar-10-batches-py/data_batch_1` to `5` and `test_batch`; see `DatasetSource.load`.

        Raises:
            UserError: If files are missing and cannot be downloaded, are damaged, or contain anything but arrays.
        """
        root = data_root or default_data_root()
        paths = locate(root, "cifar-10-batches-py", CIFAR10_FILES, "CIFAR10")
        images, labels = zip(*map(read_cifar_batch, paths), strict=True)
        parts = self._taken((np.concatenate(images[:-1]), np.concatenate(labels[:-1])), (images[-1], labels[-1]))
        train, test = ((_normalized(pixels, self.declared.mean, self.declared.std), labels) for pixels, labels in parts)
        return _dataset("cifar10", train, test, 10)


@dataclass(frozen=True, kw_only=True)
class HeartDisease:
    """Patients of four hospitals, the natural clients: 33 numbers each; the label is heart disease.

    Cleveland, Budapest, Zurich with Basel, and Long Beach: 303, 294, 123 and 200 patients. Test examples: a fixed fifth
    of each hospital's sick and of its healthy patients, unless `[data] test` says otherwise. Missing attributes are
    zeros and scales are round numbers of medical practice, so nothing is imputed or scaled by statistics of the data;
    see `read_patients` in `natural_files`. Source: Detrano et al., International application of a new probability
    algorithm for the diagnosis of coronary artery disease, American Journal of Cardiology 64, 1989; UCI, 1988, CC BY
    4.0.
    """

    natural: ClassVar[bool] = True
    test: ClassVar[Whose] = "within"
    declared: ClassVar[Declared] = Declared(class_names=("healthy", "heart disease"))

    def load(self, data_root: Path | None) -> Dataset:
        """Load `heart_disease/processed.*.data`; see `DatasetSource.load`.

        Raises:
            UserError: If files are missing or damaged.
        """
        names = [f"processed.{hospital}.data" for hospital in HOSPITALS]
        parts = [read_patients(path) for path in locate(data_root or default_data_root(), "heart_disease", names, None)]
        inputs, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        groups = np.repeat(np.arange(len(parts)), [len(part[1]) for part in parts])
        test = every_fifth_of_each_label(labels + 2 * groups)
        if not test.any():
            remedy = "Replace the files by the published ones"
            raise UserError(
                "dataset heart-disease", "five patients of one hospital with the same label", len(labels), remedy
            )
        train, held = (inputs[~test], labels[~test]), (inputs[test], labels[test])
        return _dataset("heart-disease", train, held, 2, Owners(groups[~test], groups[test], len(HOSPITALS)))


@dataclass(frozen=True, kw_only=True)
class TinyShakespeare:
    """Prediction of the next character in a speech by Shakespeare: 65 characters, 299 speakers as natural clients.

    An input is the speaker's last `context` characters, one-hot encoded as `[context, 65]`; all zeros stand for
    positions before the first character. At most `speaker_examples` are taken of each speaker, evenly spaced over the
    speeches. Test examples: all examples of a fifth of the speakers, who do not take part in training. With `[data]
    test = "within"`, or if the clients are not speakers: the last fifth of each speaker's examples. Equal names are one
    speaker, even across plays (`First Citizen`). Source: Karpathy, The Unreasonable Effectiveness of Recurrent Neural
    Networks, 2015; speakers as clients: McMahan et al., AISTATS 2017.

    Args:
        context: Number of preceding characters, 1 to 64.
        speaker_examples: Maximum number of examples per speaker, at least 1.

    Raises:
        UserError: If a number is out of range.
    """

    natural: ClassVar[bool] = True
    test: ClassVar[Whose] = "clients"
    declared: ClassVar[Declared] = Declared(class_names=tuple(ALPHABET))
    context: int = 5
    speaker_examples: int = 200

    def __post_init__(self) -> None:
        positive_int("data.speaker_examples", self.speaker_examples)
        positive_int("data.context", self.context)
        real_within("data.context", self.context, 1, 64)

    def load(self, data_root: Path | None) -> Dataset:
        """Load `tinyshakespeare/input.txt`; see `DatasetSource.load`.

        Raises:
            UserError: If the file is missing or damaged.
        """
        [path] = locate(data_root or default_data_root(), "tinyshakespeare", ["input.txt"], None)
        parts: list[list[np.ndarray]] = [[], []]
        groups: list[list[int]] = [[], []]
        speakers = read_speeches(path)
        for speaker, said in enumerate(speakers.values()):
            seen, following = next_characters(said, self.context, self.speaker_examples)
            kept = len(following) - len(following) // 5
            for part, owner, rows in zip(parts, groups, (slice(kept), slice(kept, None)), strict=True):
                part.append(np.column_stack([seen[rows], following[rows]]))
                owner += [speaker] * len(following[rows])
        train, test = ((one_hot_contexts(rows[:, :-1]), rows[:, -1]) for rows in map(np.concatenate, parts))
        if not len(test[1]):
            raise UserError(
                str(path), "a speaker with at least five characters", "shorter speeches only", "Replace the file"
            )
        in_train, in_test = (np.array(part, dtype=np.int64) for part in groups)
        owners = Owners(in_train, in_test, len(speakers))
        return _dataset("tiny-shakespeare", train, test, len(ALPHABET), owners)


@dataclass(frozen=True, kw_only=True)
class Libsvm:
    """A classification problem in LIBSVM's sparse text format, stored densely; sorted labels become 0, 1, ...

    Args:
        file: The training examples; a path relative to the data root.
        test_file: The test examples; None holds out a fixed fifth of `file`.
        features: Number of features; None uses the largest index in the files.

    Raises:
        UserError: If a value has the wrong type.
    """

    natural: ClassVar[bool] = False
    test: ClassVar[Whose] = "public"
    file: str = ""
    test_file: str | None = None
    features: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.file, str) or not self.file:
            raise UserError("data.file", "a path relative to the data root", repr(self.file), "Name a LIBSVM text file")
        if self.features is not None:
            positive_int("data.features", self.features)

    def load(self, data_root: Path | None) -> Dataset:
        """Load the file or files; see `DatasetSource.load`.

        Raises:
            UserError: If a file is missing or damaged, labels are not whole numbers, or `features` is too small.
        """
        root = data_root or default_data_root()
        parts = [read_libsvm(root / file) for file in (self.file, self.test_file) if file]
        inputs = _dense([matrix for matrix, _ in parts], self.features)
        labels, classes = _numbered([labels for _, labels in parts], self.file)
        name = Path(self.file).name
        if len(parts) == 1:
            return _split(name, inputs[0], labels[0], classes)
        return _dataset(name, (inputs[0], labels[0]), (inputs[1], labels[1]), classes)


def every_fifth_of_each_label(labels: np.ndarray) -> np.ndarray:
    """Return a bool mask `[examples]` that selects the fifth, tenth, ... example of each label for testing.

    Args:
        labels: int64 `[examples]`.
    """
    order = np.argsort(labels, kind="stable")
    in_order = labels[order]
    place = np.arange(len(labels)) - np.searchsorted(in_order, in_order)
    chosen = np.zeros(len(labels), dtype=bool)
    chosen[order] = place % 5 == 4
    return chosen


class Owners(NamedTuple):
    """The natural client of each training and of each test example, and the number of natural clients."""

    train: np.ndarray
    test: np.ndarray
    clients: int


def _dataset(
    name: str,
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    classes: int,
    owners: Owners | None = None,
) -> Dataset:
    tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in (*train, *test)]
    fields = ("train_inputs", "train_labels", "test_inputs", "test_labels")
    made = Dataset(name=name, classes=classes, **dict(zip(fields, tensors, strict=True)))
    if owners is None:
        return made
    return replace(made, groups=owners.train, test_groups=owners.test, natural_clients=owners.clients)


def _split(name: str, inputs: np.ndarray, labels: np.ndarray, classes: int) -> Dataset:
    test = every_fifth_of_each_label(labels)
    if not test.any():
        remedy = "Set data.test_file, or add examples"
        raise UserError(f"dataset {name}", "five examples of one label, one of them for testing", len(labels), remedy)
    return _dataset(name, (inputs[~test], labels[~test]), (inputs[test], labels[test]), classes)


def _all(train: Examples, test: Examples) -> tuple[Examples, Examples]:
    return train, test


def _first(split: str, examples: Examples, number: int | None) -> Examples:
    inputs, labels = examples
    if number is not None and number > len(labels):
        remedy = f"Lower data.{split}_examples, or remove it to use all"
        raise UserError(f"data.{split}_examples", f"at most {len(labels):,}", f"{number:,}", remedy)
    return inputs[:number], labels[:number]


def _idx_images(
    name: str,
    data_root: Path,
    folder: str,
    declared: Declared,
    taken: Callable[[Examples, Examples], tuple[Examples, Examples]] = _all,
) -> Dataset:
    paths = locate(data_root, f"{folder}/raw", IDX_FILES, source=folder)
    parts = taken(_idx_examples(paths[0], paths[1]), _idx_examples(paths[2], paths[3]))
    normalized = [(_normalized(images, declared.mean, declared.std), labels) for images, labels in parts]
    return _dataset(name, normalized[0], normalized[1], 10)


def _idx_examples(image_file: Path, label_file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return images uint8 `[examples, 1, height, width]` and labels int64 `[examples]`."""
    images, labels = read_idx(image_file), read_idx(label_file)
    if images.dtype != np.uint8 or images.ndim != 3 or len(images) == 0:
        raise UserError(str(image_file), "images of bytes", f"shape {images.shape}", "Replace the file")
    if labels.shape != images.shape[:1] or labels.min() < 0 or labels.max() > 9:
        expected = f"{len(images)} labels from 0 to 9, one for each image of {image_file.name}"
        span = f" from {labels.min()} to {labels.max()}" if labels.size else ""
        raise UserError(
            str(label_file),
            expected,
            f"labels of shape {labels.shape}{span}",
            "Replace both files",
        )
    return images[:, None], labels.astype(np.int64)


def _normalized(images: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """Return float32 (pixel / 255 - mean) / std, `[examples, channels, height, width]`, per channel."""
    pixels = images.astype(np.float32)
    pixels /= 255
    pixels -= np.array(mean, dtype=np.float32)[:, None, None]
    pixels /= np.array(std, dtype=np.float32)[:, None, None]
    return pixels


def _dense(matrices: list[Any], features: int | None) -> list[np.ndarray]:
    """Return float32 `[examples, features]` for each matrix; indices start at one unless some file uses index 0."""
    first = 0 if any((matrix.indices == 0).any() for matrix in matrices) else 1
    found = max(matrix.shape[1] for matrix in matrices) - first
    if features is not None and features < found:
        raise UserError(
            "data.features", f"at least {found}, the largest index", features, "Raise data.features, or remove it"
        )
    width = max(features or found, 1) + first
    rows = sum(matrix.shape[0] for matrix in matrices)
    refuse_beyond_memory("data.features", 4 * rows * width, "Choose fewer features, or a file with smaller indices")
    for matrix in matrices:
        matrix.resize(matrix.shape[0], width)
    return [matrix.toarray()[:, first:] for matrix in matrices]


def _numbered(labels: list[np.ndarray], file: str) -> tuple[list[np.ndarray], int]:
    """Return the int64 rank of each label among all values, and the number of values."""
    values = np.unique(np.concatenate(labels))
    if len(values) < 2 or (values != np.round(values)).any():
        got = f"{len(values)} values, {values[0]:g} to {values[-1]:g}"
        raise UserError(f"data.file {file}", "two or more labels, all whole numbers", got, "Choose another file")
    return [np.searchsorted(values, part).astype(np.int64) for part in labels], len(values)

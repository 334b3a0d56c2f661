"""Examples in memory, and the interface of data set loaders."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from fedpriv.data.labels import LabelKind, fault_of
from fedpriv.errors import UserError
from fedpriv.plugins import Registry
from fedpriv.privacy.released import Whose
from fedpriv.tables import Table

__all__ = ["DATASETS", "Dataset", "DatasetSource", "Declared", "HeldOut", "declared_by"]


class HeldOut(NamedTuple):
    """The owners of examples that are held out from natural clients.

    Args:
        owners: int64 `[examples]`, the client of each example, from 0 to `clients - 1`.
        clients: Maximum number of clients that hold some; independent of the clients' examples.
    """

    owners: np.ndarray
    clients: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """Training and test examples.

    Args:
        name: The name in reports.
        train_inputs: float32 `[examples, *input_shape]`; or inputs on the disk, see `fedpriv.data.mapped`.
        train_labels: int64 `[examples]`, 0 to `classes - 1`; or labels of another `kind`, see `labels.LabelKind`.
        test_inputs: float32 `[test_examples, *input_shape]`.
        test_labels: Labels of the test examples, of the same kind.
        classes: Number of labels or tokens, at least 2; for `numbers`, of targets.
        groups: int64 `[examples]`, the natural client 0 to g-1 of each training example; None if there are none.
        natural_clients: Number g of natural clients, including those without examples; None if each of them has some.
        test_groups: int64 `[test_examples]`, the natural client of each test example; None if the test examples
            belong to no client.
        validation_inputs: Inputs held out of the training examples, float32; None if there are none. See `hold_out`.
        validation_labels: Their labels.
        tested: The owners of the test examples; None if they belong to no client. See `evaluated_on`.
        validated: The owners of the validation examples, likewise.
        kind: The kind of labels.

    Raises:
        UserError: If shapes, types or ranges are wrong.
    """

    name: str
    train_inputs: Tensor
    train_labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor
    classes: int
    groups: np.ndarray | None = None
    natural_clients: int | None = None
    test_groups: np.ndarray | None = None
    validation_inputs: Tensor | None = None
    validation_labels: Tensor | None = None
    tested: HeldOut | None = None
    validated: HeldOut | None = None
    kind: LabelKind = "classes"

    def __post_init__(self) -> None:
        self._check_examples("train", self.train_inputs, self.train_labels)
        self._check_examples("test", self.test_inputs, self.test_labels)
        if self.validation_inputs is not None and self.validation_labels is not None:
            self._check_examples("validation", self.validation_inputs, self.validation_labels)
        if self.train_inputs.shape[1:] != self.test_inputs.shape[1:]:
            raise self._wrong("equal shapes of training and test inputs", list(self.test_inputs.shape[1:]))
        if self.groups is not None:
            self._check_groups("training", self.groups, self.examples)
            if self.natural_clients is None and not np.bincount(self.groups).all():
                raise self._wrong("natural clients numbered from 0 without gaps", "numbers with gaps")
        if self.groups is not None and self.test_groups is not None:
            self._check_groups("test", self.test_groups, len(self.test_labels))

    @property
    def natural_population(self) -> int:
        """Number of natural clients, 0 if there are none."""
        if self.groups is None:
            return 0
        return int(self.groups.max()) + 1 if self.natural_clients is None else self.natural_clients

    @property
    def examples(self) -> int:
        """Number of training examples."""
        return len(self.train_labels)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return tuple(self.train_inputs.shape[1:])

    def _check_examples(self, split: str, inputs: Tensor, labels: Tensor) -> None:
        of_classes = self.kind == "classes"
        if inputs.dtype != torch.float32 or (of_classes and labels.dtype != torch.int64):
            raise self._wrong(f"float32 {split} inputs and int64 labels", (inputs.dtype, labels.dtype))
        paired = labels.shape == inputs.shape[:1] if of_classes else labels.shape[:1] == inputs.shape[:1]
        if not paired or len(labels) == 0:
            raise self._wrong(f"one label for each {split} example", (list(inputs.shape), list(labels.shape)))
        fault = fault_of(self.kind, split, labels, self.classes)
        if fault is not None:
            raise self._wrong(*fault)

    def _check_groups(self, split: str, groups: np.ndarray, examples: int) -> None:
        if groups.dtype != np.int64 or groups.shape != (examples,):
            raise self._wrong(f"one int64 natural client for each {split} example", (groups.dtype, groups.shape))
        if groups.min() < 0 or groups.max() >= self.natural_population:
            raise self._wrong(
                f"natural clients from 0 to {self.natural_population - 1}", f"{groups.min()} to {groups.max()}"
            )

    def _wrong(self, expected: str, got: object) -> UserError:
        return UserError(f"dataset {self.name}", expected, got, "Correct the arrays of the data set")


@dataclass(frozen=True, kw_only=True)
class Declared:
    """The public constants of a data set: none is computed from its examples, so a run may release them.

    Prepared inputs are (input / scale - mean) / std. `mean` and `std` have one number per channel, or per feature.

    Args:
        class_names: Names of the labels 0, 1, ...; None if none are declared.
        scale: Divisor of all inputs.
        mean: Subtracted after that; empty for zeros.
        std: Divides after that; empty for ones.
        columns: The columns of a table, in place of these numbers: the keys `numeric`, `categories`, `missing`, `fill`,
            `target` and `labels` of `[data]`. None for arrays.
    """

    class_names: tuple[str, ...] | None = None
    scale: float = 1.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    columns: Table | None = None


def declared_by(source: object) -> Declared:
    """Return the `declared` constants of the settings of a data set; without that attribute, none."""
    found = getattr(source, "declared", None)
    return found if isinstance(found, Declared) else Declared()


class DatasetSource(Protocol):
    """Settings that locate a data set; read from the table `[data]`.

    `natural` is True if it has natural clients. `test` names the default test examples of experiments: see
    `validation.evaluated_on`. An attribute `declared` may hold its public constants: see `Declared`.
    """

    natural: ClassVar[bool]
    test: ClassVar[Whose]

    def load(self, data_root: Path | None) -> Dataset:
        """Load the data set; `data_root` None means FEDPRIV_DATA, or `./data` if that is not set."""
        ...


DATASETS: Registry[DatasetSource] = Registry(
    "data set",
    {
        "digits": "fedpriv.data.datasets:Digits",
        "mnist": "fedpriv.data.datasets:Mnist",
        "fashion-mnist": "fedpriv.data.datasets:FashionMnist",
        "mnist-by-writer": "fedpriv.data.datasets:MnistByWriter",
        "cifar10": "fedpriv.data.datasets:Cifar10",
        "heart-disease": "fedpriv.data.datasets:HeartDisease",
        "tiny-shakespeare": "fedpriv.data.datasets:TinyShakespeare",
        "libsvm": "fedpriv.data.datasets:Libsvm",
        "csv": "fedpriv.data.user_files:Csv",
        "parquet": "fedpriv.data.user_files:Parquet",
        "npz": "fedpriv.data.user_files:Npz",
        "npy": "fedpriv.data.user_files:Npy",
        "leaf": "fedpriv.data.user_files:Leaf",
        "text": "fedpriv.data.text.tokens:Texts",
        "words": "fedpriv.data.text.words:Words",
        "image-folder": "fedpriv.data.user_files:ImageFolder",
    },
    protocol=DatasetSource,
    group="fedpriv.datasets",
    wrap="fedpriv.data.own:OwnData",
)

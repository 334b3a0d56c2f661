import gzip
import os
import pickle
import struct
import subprocess
import urllib.error
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpriv.data import files, torchvision_cpu
from fedpriv.data.dataset import DATASETS, Dataset
from fedpriv.data.datasets import (
    IDX_FILES,
    Cifar10,
    Digits,
    FashionMnist,
    Libsvm,
    Mnist,
    MnistByWriter,
    every_fifth_of_each_label,
)
from fedpriv.data.files import default_data_root, read_cifar_batch, read_digits, read_idx
from fedpriv.errors import UserError

BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
TRAIN_LABELS = np.arange(12, dtype=np.uint8) % 10
WRITERS = np.array([700, 30, 700, 30, 41, 41, 41, 700, 30, 30, 41, 41])


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: str, _data_root: Path) -> None:
        raise urllib.error.URLError(f"no network for {source}")

    monkeypatch.setattr(torchvision_cpu, "download", refuse)


def idx(array: np.ndarray) -> bytes:
    kind = {"u1": 0x08, "i4": 0x0C}[array.dtype.str[1:]]
    header = struct.pack(f">BBBB{array.ndim}i", 0, 0, kind, array.ndim, *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


def images(examples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (examples, 28, 28), dtype=np.uint8)


def write_mnist(root: Path, folder: str = "MNIST", packed: bool = False) -> Path:
    raw = root / folder / "raw"
    raw.mkdir(parents=True)
    arrays = (images(12), TRAIN_LABELS, images(4, 1), np.array([3, 1, 0, 9], dtype=np.uint8))
    for name, array in zip(IDX_FILES, arrays, strict=True):
        content = idx(array)
        (raw / (name + ".gz" * packed)).write_bytes(gzip.compress(content) if packed else content)
    return raw


def write_writers(root: Path, labels: np.ndarray = TRAIN_LABELS) -> Path:
    facts = np.zeros((len(labels), 8), dtype=np.int32)
    facts[:, 0], facts[:, 2] = labels, WRITERS[: len(labels)]
    path = root / "QMNIST" / "raw" / "qmnist-train-labels-idx2-int"
    path.parent.mkdir(parents=True)
    path.write_bytes(idx(facts))
    return path


def cifar_batch(i: int, as_bytes: bool = False) -> dict[Any, Any]:
    data = np.random.default_rng(i).integers(0, 256, (3, 3072), dtype=np.uint8)
    batch: dict[Any, Any] = {"data": data, "labels": [i, 9, 0]}
    return {key.encode(): value for key, value in batch.items()} if as_bytes else batch


def write_cifar(root: Path, protocol: int = 4, as_bytes: bool = False) -> Path:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for i, name in enumerate(BATCHES):
        (folder / name).write_bytes(pickle.dumps(cifar_batch(i, as_bytes), protocol=protocol))
    return folder


def python2_batch(data: np.ndarray, labels: list[int]) -> bytes:
    """Return a pickle as numpy wrote it under Python 2, like the original files: byte strings, old module names."""

    def text(value: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(value)) + value

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    reconstruct = b"cnumpy.core.multiarray\n_reconstruct\n"
    reconstruct += b"(cnumpy\nndarray\n(" + number(0) + b"t" + text(b"b") + b"tR"
    dtype = b"cnumpy\ndtype\n(" + text(b"u1") + number(0) + number(1) + b"tR("
    dtype += number(3) + text(b"|") + b"NNN" + number(-1) * 2 + number(0) + b"tb"
    shape = b"(" + number(data.shape[0]) + number(data.shape[1]) + b"t"
    state = b"(" + number(1) + shape + dtype + b"I00\n" + text(data.tobytes()) + b"tb"
    listed = b"(l" + b"".join(number(label) + b"a" for label in labels)
    return b"\x80\x02}(" + text(b"data") + reconstruct + state + text(b"labels") + listed + b"u."


# Digits


def test_digits_need_no_file_and_are_split_for_good():
    one, two = Digits().load(None), Digits().load(Path("/nowhere"))
    assert one.input_shape == (1, 8, 8)
    assert one.examples + len(one.test_labels) == 1797
    assert torch.equal(one.train_inputs, two.train_inputs)
    assert one.train_inputs.min() == 0
    assert one.train_inputs.max() == 1


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    table = read_digits()
    assert np.array_equal(table[:, :-1], pixels)
    assert np.array_equal(table[:, -1], labels)


@pytest.mark.parametrize("content", [None, b"", b"1,2\n3,4\n", b"a,b\n"])
def test_damaged_digits_are_one_line(monkeypatch, tmp_path, content):
    place = tmp_path / "datasets" / "data"
    place.mkdir(parents=True)
    if content is not None:
        (place / "digits.csv.gz").write_bytes(gzip.compress(content))
    package = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(files, "require_extra", lambda *_: None)
    monkeypatch.setattr(files.importlib.util, "find_spec", lambda _: package)
    with pytest.raises(UserError, match=r"digits\.csv\.gz"):
        read_digits()


def test_every_digit_has_a_fifth_of_its_examples_held_out():
    digits = Digits().load(None)
    train, test = (torch.bincount(labels) for labels in (digits.train_labels, digits.test_labels))
    assert torch.equal(test, (train + test) // 5)


@settings(deadline=None)
@given(st.lists(st.integers(0, 4), max_size=60))
def test_the_held_out_examples_are_the_fifth_tenth_and_so_on_of_each_label(labels):
    seen = dict.fromkeys(range(5), 0)
    expected = []
    for label in labels:
        seen[label] += 1
        expected.append(seen[label] % 5 == 0)
    assert every_fifth_of_each_label(np.array(labels, dtype=np.int64)).tolist() == expected


# MNIST and similar data sets


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("source", "folder", "mean", "std"),
    [(Mnist(), "MNIST", 0.1307, 0.3081), (FashionMnist(), "FashionMNIST", 0.2860, 0.3530)],
)
def test_idx_images_are_normalized_by_published_constants(tmp_path, source, folder, mean, std, packed):
    write_mnist(tmp_path, folder, packed)
    data = source.load(tmp_path)
    expected = (torch.from_numpy(images(12)).double() / 255 - mean) / std
    assert torch.allclose(data.train_inputs.double(), expected[:, None], atol=1e-5)
    assert data.train_labels.tolist() == TRAIN_LABELS.tolist()
    assert data.test_inputs.shape == (4, 1, 28, 28)
    assert data.test_labels.tolist() == [3, 1, 0, 9]
    assert data.groups is None


def test_a_part_of_the_images_is_the_first_of_them(tmp_path):
    write_mnist(tmp_path)
    whole, part = Mnist().load(tmp_path), Mnist(train_examples=7, test_examples=3).load(tmp_path)
    assert torch.equal(part.train_inputs, whole.train_inputs[:7])
    assert torch.equal(part.train_labels, whole.train_labels[:7])
    assert torch.equal(part.test_inputs, whole.test_inputs[:3])
    with pytest.raises(UserError, match=r"data\.train_examples: expected at most 12, got 13"):
        Mnist(train_examples=13).load(tmp_path)
    with pytest.raises(UserError, match=r"data\.test_examples: expected a whole number of at least 1"):
        Cifar10(test_examples=0)


def test_missing_files_are_named_with_their_place_and_the_ways_to_set_it(tmp_path):
    (write_mnist(tmp_path) / IDX_FILES[2]).unlink()
    with pytest.raises(UserError) as caught:
        Mnist().load(tmp_path)
    line = str(caught.value)
    assert "\n" not in line
    for part in (IDX_FILES[2], str(tmp_path / "MNIST" / "raw"), "no network for MNIST", "--data-root", "FEDPRIV_DATA"):
        assert part in line
    assert IDX_FILES[0] not in line


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "mnist-by-writer", "cifar10"])
def test_every_downloadable_dataset_says_what_is_missing(tmp_path, name):
    with pytest.raises(UserError, match=r"^data\.name: expected the files .*the download failed"):
        DATASETS[name]().load(tmp_path)


def test_missing_files_are_downloaded_into_the_data_root(tmp_path, monkeypatch):
    asked = []

    def download(source: str, data_root: Path) -> None:
        asked.append((source, data_root))
        write_mnist(data_root, source)

    monkeypatch.setattr(torchvision_cpu, "download", download)
    assert FashionMnist().load(tmp_path).examples == 12
    assert FashionMnist().load(tmp_path).examples == 12
    assert asked == [("FashionMNIST", tmp_path)]


def test_a_download_that_brings_nothing_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision_cpu, "download", lambda _source, _data_root: None)
    with pytest.raises(UserError, match=r"got 4 missing\."):
        Mnist().load(tmp_path)


def test_the_data_root_is_the_variable_else_the_folder_data(tmp_path, monkeypatch):
    write_mnist(tmp_path)
    monkeypatch.setenv("FEDPRIV_DATA", str(tmp_path))
    assert Mnist().load(None).examples == 12
    monkeypatch.delenv("FEDPRIV_DATA")
    assert default_data_root() == Path("data")


@settings(deadline=None)
@given(cut=st.integers(0, len(idx(TRAIN_LABELS)) - 1))
def test_a_truncated_idx_file_is_named(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("idx") / "labels"
    path.write_bytes(idx(TRAIN_LABELS)[:cut])
    with pytest.raises(UserError, match=str(path)):
        read_idx(path)


@settings(deadline=None)
@given(content=st.binary(max_size=40))
def test_an_idx_file_of_anything_is_read_or_named(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("idx") / "anything"
    path.write_bytes(content)
    try:
        read_idx(path)
    except UserError as error:
        named = str(error)
    else:
        named = str(path)
    assert str(path) in named


@pytest.mark.parametrize(
    "array", [np.arange(-3, 9, dtype=np.int32).reshape(3, 4), np.arange(24, dtype=np.uint8).reshape(2, 3, 4)]
)
def test_idx_arrays_come_back_as_written(tmp_path, array):
    (tmp_path / "a.gz").write_bytes(gzip.compress(idx(array)))
    found = read_idx(tmp_path / "a.gz")
    assert np.array_equal(found, array)
    assert found.dtype == array.dtype


@pytest.mark.parametrize("damage", [lambda c: c[: len(c) // 2], lambda c: b"not gzip" + c, lambda _: b""])
def test_a_damaged_gz_file_is_named(tmp_path, damage):
    raw = write_mnist(tmp_path, packed=True)
    path = raw / (IDX_FILES[0] + ".gz")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=path.name):
        Mnist().load(tmp_path)


@pytest.mark.parametrize("labels", [TRAIN_LABELS[:-1], TRAIN_LABELS + 1, TRAIN_LABELS[:, None]])
def test_labels_that_do_not_belong_to_the_images_are_refused(tmp_path, labels):
    (write_mnist(tmp_path) / IDX_FILES[1]).write_bytes(idx(labels))
    with pytest.raises(UserError, match=IDX_FILES[1]):
        Mnist().load(tmp_path)


def test_writers_become_groups_in_ascending_order(tmp_path):
    write_mnist(tmp_path)
    write_writers(tmp_path)
    data = MnistByWriter().load(tmp_path)
    assert data.groups is not None
    assert data.groups.tolist() == [{30: 0, 41: 1, 700: 2}[writer] for writer in WRITERS]
    assert torch.equal(data.train_inputs, Mnist().load(tmp_path).train_inputs)
    assert data.name == "mnist-by-writer"


@pytest.mark.parametrize("labels", [TRAIN_LABELS[::-1], TRAIN_LABELS[:5]])
def test_writers_of_other_images_are_refused(tmp_path, labels):
    write_mnist(tmp_path)
    path = write_writers(tmp_path, labels)
    with pytest.raises(UserError, match=path.name):
        MnistByWriter().load(tmp_path)


# CIFAR-10


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("as_bytes", [False, True])
def test_cifar_batches_are_read_in_order_whatever_their_keys(tmp_path, protocol, as_bytes):
    write_cifar(tmp_path, protocol, as_bytes)
    data = Cifar10().load(tmp_path)
    assert data.train_inputs.shape == (15, 3, 32, 32)
    assert data.train_labels.tolist() == [label for i in range(5) for label in (i, 9, 0)]
    assert data.test_labels.tolist() == [5, 9, 0]
    pixel = cifar_batch(0)["data"][0].reshape(3, 32, 32)[2, 31, 0]
    assert data.train_inputs[0, 2, 31, 0] == pytest.approx((pixel / 255 - 0.4465) / 0.2616, abs=1e-5)


def test_a_batch_as_python_2_wrote_it_is_read(tmp_path):
    batch = cifar_batch(2)
    (tmp_path / "batch").write_bytes(python2_batch(batch["data"], batch["labels"]))
    data, labels = read_cifar_batch(tmp_path / "batch")
    assert np.array_equal(data.reshape(3, 3072), batch["data"])
    assert labels.tolist() == batch["labels"]


class Payload:
    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call, self.arguments


@pytest.mark.parametrize("call", [os.mkdir, eval, getattr, np.load, subprocess.check_call])
def test_a_pickle_that_would_act_is_refused_before_it_does(tmp_path, call):
    folder, mark = write_cifar(tmp_path), tmp_path / "mark"
    payload = Payload(call, str(mark))
    (folder / "data_batch_3").write_bytes(pickle.dumps(cifar_batch(3) | {"extra": payload}))
    with pytest.raises(UserError, match=r"data_batch_3: .*which no array needs"):
        Cifar10().load(tmp_path)
    assert not mark.exists()


@settings(deadline=None)
@given(cut=st.integers(0, len(pickle.dumps(cifar_batch(0))) - 1))
def test_a_truncated_batch_is_named(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("cifar") / "data_batch_1"
    path.write_bytes(pickle.dumps(cifar_batch(0))[:cut])
    with pytest.raises(UserError, match=str(path)):
        read_cifar_batch(path)


@pytest.mark.parametrize(
    "batch",
    [
        [],
        None,
        {},
        {"data": np.zeros((2, 3072), dtype=np.uint8)},
        {"data": np.zeros((2, 3072), dtype=np.uint8), "labels": [1]},
        {"data": np.zeros((2, 3072), dtype=np.uint8), "labels": [1, 10]},
        {"data": np.zeros((2, 3072), dtype=np.uint8), "labels": [1, -1]},
        {"data": np.zeros((2, 3072), dtype=np.uint8), "labels": ["1", "2"]},
        {"data": np.zeros((2, 3072)), "labels": [1, 2]},
        {"data": np.zeros((2, 3071), dtype=np.uint8), "labels": [1, 2]},
        {"data": np.zeros((0, 3072), dtype=np.uint8), "labels": []},
    ],
)
def test_a_pickle_that_is_no_batch_is_named(tmp_path, batch):
    path = tmp_path / "data_batch_1"
    path.write_bytes(pickle.dumps(batch))
    with pytest.raises(UserError, match=str(path)):
        read_cifar_batch(path)


# LIBSVM

TEXT = "".join(f"{'+1' if i % 2 else '-1'} 1:{i} 3:0.5\n" for i in range(10))


def test_libsvm_text_becomes_dense_with_labels_in_ascending_order(tmp_path):
    (tmp_path / "train.txt").write_text(TEXT)
    (tmp_path / "test.txt").write_text("-1 4:2\n+1 1:1\n")
    data = Libsvm(file="train.txt", test_file="test.txt").load(tmp_path)
    assert data.train_inputs.tolist() == [[i, 0, 0.5, 0] for i in range(10)]
    assert data.test_inputs.tolist() == [[0, 0, 0, 2], [1, 0, 0, 0]]
    assert data.train_labels.tolist() == [0, 1] * 5
    assert data.test_labels.tolist() == [0, 1]
    assert (data.name, data.classes) == ("train.txt", 2)


def test_libsvm_without_a_test_file_holds_out_the_fifth_of_each_label(tmp_path):
    (tmp_path / "train.txt").write_text(TEXT)
    data = Libsvm(file="train.txt").load(tmp_path)
    assert data.test_inputs[:, 0].tolist() == [8, 9]
    assert data.train_inputs[:, 0].tolist() == list(range(8))


def test_libsvm_features_widen_the_inputs_but_cannot_narrow_them(tmp_path):
    (tmp_path / "train.txt").write_text(TEXT)
    assert Libsvm(file="train.txt", features=7).load(tmp_path).input_shape == (7,)
    with pytest.raises(UserError, match=r"^data\.features: expected at least 3"):
        Libsvm(file="train.txt", features=2).load(tmp_path)


def test_libsvm_indices_may_count_from_zero(tmp_path):
    (tmp_path / "train.txt").write_text(TEXT.replace(" 1:", " 0:"))
    assert Libsvm(file="train.txt").load(tmp_path).input_shape == (4,)


def test_libsvm_labels_of_several_classes_are_ranked(tmp_path):
    (tmp_path / "train.txt").write_text("".join(f"{(7, 2, 30)[i % 3]} 1:1\n" for i in range(15)))
    data = Libsvm(file="train.txt").load(tmp_path)
    assert data.classes == 3
    assert data.train_labels[:3].tolist() == [1, 0, 2]


@pytest.mark.parametrize(
    "text",
    ["", "no numbers\n", "1 1:x\n", "1 1:nan\n-1 1:0\n", "nan 1:1\n", "1 -1:2\n", "1 3:1 2:1\n", "\0\1\2", "1,2 1:1\n"],
)
def test_a_damaged_libsvm_file_is_named(tmp_path, text):
    (tmp_path / "train.txt").write_text(text)
    with pytest.raises(UserError, match=str(tmp_path / "train.txt")):
        Libsvm(file="train.txt").load(tmp_path)


@pytest.mark.parametrize("text", ["1 1:1\n" * 10, "".join(f"{i / 7} 1:1\n" for i in range(10))])
def test_a_libsvm_problem_that_is_no_classification_is_refused(tmp_path, text):
    (tmp_path / "train.txt").write_text(text)
    with pytest.raises(UserError, match=r"two or more labels, all whole numbers"):
        Libsvm(file="train.txt").load(tmp_path)


def test_a_libsvm_file_too_small_to_split_asks_for_a_test_file(tmp_path):
    (tmp_path / "train.txt").write_text("1 1:1\n-1 1:1\n")
    with pytest.raises(UserError, match=r"data\.test_file"):
        Libsvm(file="train.txt").load(tmp_path)


def test_a_missing_libsvm_file_is_named_with_the_data_root(tmp_path):
    with pytest.raises(UserError, match=r"^data\.file: .*--data-root or FEDPRIV_DATA"):
        Libsvm(file="absent").load(tmp_path)


@pytest.mark.parametrize("fields", [{}, {"file": 3}, {"file": "a", "features": 0}, {"file": "a", "features": 1.5}])
def test_libsvm_settings_without_meaning_are_refused(fields):
    with pytest.raises(UserError, match=r"^data\.(file|features): "):
        Libsvm(**fields)


# All data sets


def dataset(**changes: Any) -> Dataset:
    fields: dict[str, Any] = {
        "name": "tiny",
        "train_inputs": torch.zeros(3, 2),
        "train_labels": torch.tensor([0, 1, 0]),
        "test_inputs": torch.zeros(1, 2),
        "test_labels": torch.tensor([1]),
        "classes": 2,
        "groups": np.array([0, 1, 1]),
    }
    return Dataset(**(fields | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"train_inputs": torch.zeros(3, 2).double()},
        {"train_inputs": torch.zeros(2, 2)},
        {"train_labels": torch.tensor([0, 1, 2])},
        {"train_labels": torch.tensor([0, 1, -1])},
        {"train_labels": torch.tensor([0.0, 1.0, 0.0])},
        {"test_inputs": torch.zeros(1, 3)},
        {"test_inputs": torch.zeros(0, 2), "test_labels": torch.zeros(0, dtype=torch.int64)},
        {"classes": 1},
        {"groups": np.array([0, 2, 2])},
        {"groups": np.array([0, 1, -1])},
        {"groups": np.array([0, 1])},
        {"groups": np.array([0.0, 1.0, 1.0])},
    ],
)
def test_a_dataset_that_contradicts_itself_is_refused(changes):
    assert dataset().input_shape == (2,)
    with pytest.raises(UserError, match=r"^dataset tiny: "):
        dataset(**changes)

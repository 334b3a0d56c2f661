"""Partitioners of flwr-datasets."""

import sys
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

from fedpriv import load_config
from fedpriv.data.partitions import PARTITIONS
from fedpriv.errors import UserError
from fedpriv.experiment.build import make_federation

pytestmark = [
    pytest.mark.skipif(find_spec("flwr_datasets") is None, reason="flwr-datasets is not installed"),
    pytest.mark.xdist_group("flwr-datasets"),  # imported by one worker alone, since that takes seconds
]

DATA = """
import numpy as np


def load(rows: int = 300):
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(rows, 4))
    labels = np.sort(rng.integers(0, 5, rows))
    return dict(inputs=inputs, labels=labels, test_inputs=inputs[:20], test_labels=labels[:20])


def people():
    return load() | {"client_ids": np.arange(300) % 30}
"""

EXPERIMENT = """
name = "flwr"
seed = 4
model = { name = "softmax" }
method = { name = "dp-fedavg" }
training = { rounds = 2 }

[data]
name = "./data.py:load"
clients = 6
partition = "flwr_datasets.partitioner:DirichletPartitioner"
partition_by = "label"
alpha = 0.5
"""

HERE = "data.partition=flwr_datasets.partitioner:"
BARE = ["data.partition_by=", "data.alpha="]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data.py").write_text(DATA)
    (tmp_path / "own.toml").write_text(EXPERIMENT)
    return tmp_path


def clients_of(folder, *settings):
    federation = make_federation(load_config(folder / "own.toml", settings))
    return federation, [federation.rows_of(client).tolist() for client in range(federation.population)]


def test_a_partitioner_divides_the_examples_by_the_experiments_seed(folder):
    config = load_config(folder / "own.toml")
    assert config.tables["data"]["alpha"] == 0.5
    assert config.tables["data"]["min_partition_size"] == 10
    assert config.sources["data.partition"]["module"] == "flwr_datasets.partitioner"
    federation, rows = clients_of(folder)
    assert sorted(row for part in rows for row in part) == list(range(300))
    assert all(part == sorted(part) for part in rows)
    assert (federation.label_counts().min(axis=1) < 5).all(), "labels are skewed"
    assert clients_of(folder)[1] == rows
    assert clients_of(folder, "seed=5")[1] != rows
    assert load_config(config.tables).digest == config.digest


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        ([HERE + "IidPartitioner", *BARE], [50] * 6),
        ([HERE + "LinearPartitioner", *BARE], [14, 28, 42, 57, 71, 88]),
        ([HERE + "PathologicalPartitioner", "data.alpha=", "data.num_classes_per_partition=2"], None),
        ([HERE + "SizePartitioner", *BARE, "data.clients=", "data.partition_sizes=[10, 20, 30]"], [10, 20, 30]),
        (
            [HERE + "GroupedNaturalIdPartitioner", "data.alpha=", "data.group_size=10", "data.clients=3",
             "data.name={folder}/data.py:people", "data.partition_by=client"],
            [100] * 3,
        ),
    ],
)  # fmt: skip
def test_partitioners_have_their_own_keys(folder, settings, sizes):
    federation, _ = clients_of(folder, *(setting.format(folder=folder) for setting in settings))
    assert sizes is None or federation.sizes.tolist() == sizes
    labels = (federation.label_counts() > 0).sum(axis=1)
    assert labels.max() <= 2 if sizes is None else labels.min() >= 2, "contiguous pieces of shuffled rows"


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (["data.alpha="], r"^data\.alpha: expected .*, got a missing key"),
        (["data.alpha=many"], r"^data\.alpha: expected .*, got 'many'"),
        (["data.alpha=-1.0"], r"^data\.partition: expected a partitioner that can divide 300 examples, got ValueError"),
        (["data.clients="], r"^data\.clients: expected a whole number, got a missing key"),
        (["data.partition_by=client"], r"^data\.partition_by: expected 'label', got 'client'"),
        (["data.min_partition_size=200"], r"^data\.partition: expected a partitioner that can divide .*number of att"),
        ([HERE + "NaturalIdPartitioner", "data.alpha="], r'expected a partitioner that simulates .*"natural"'),
        ([HERE + "VerticalEvenPartitioner", *BARE], r"^data\.partition: expected a partitioner that divides examples"),
        ([HERE + "SizePartitioner", *BARE, "data.partition_sizes=[9, 9]"], r"^data\.clients: expected 2, as the"),
        (
            ["data.min_partition_size=0", "data.alpha=0.001", "data.clients=40"],
            "an example for each client, got client",
        ),
        (["data.partition=json:loads"], r"^data\.partition: expected a dataclass that is a partition"),
        ([HERE + "DistributionPartitioner", *BARE], "a type for its parameter distribution_array that a config can"),
    ],
)
def test_a_partition_that_cannot_be_made_is_one_line(folder, settings, line):
    with pytest.raises(UserError, match=line) as caught:
        clients_of(folder, *settings)
    assert "\n" not in str(caught.value)


def test_a_partitioner_can_be_an_object_in_python():
    kind: type[Any] = PARTITIONS.resolve("flwr_datasets.partitioner:ShardPartitioner", "partition")
    rule = kind(partition_by="label", num_shards_per_partition=2)
    parts = rule.split(np.arange(60) % 6, None, 6, np.random.default_rng(0))
    assert [len(part) for part in parts] == [10] * 6


def test_a_missing_package_names_the_extra_to_install(folder, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("flwr_datasets")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "flwr_datasets", None)
    monkeypatch.setattr(PARTITIONS, "_referred", {})
    with pytest.raises(UserError, match=r"^data\.partition: .*Install it with pip install 'fedpriv\[datasets\]'"):
        load_config(folder / "own.toml")

import dataclasses

import numpy as np
import pytest
import torch

from fedpriv.data.dataset import Dataset
from fedpriv.data.datasets import Digits
from fedpriv.data.federation import Federation, federate, plot_who_holds_what, spread, who_holds_what
from fedpriv.data.partitions import PARTITIONS, Dirichlet, Iid, LabelShards, Natural, Resampled
from fedpriv.errors import UserError


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return Digits().load(None)


def tiny(classes: int = 3, examples: int = 12, groups: np.ndarray | None = None) -> Dataset:
    labels = torch.arange(examples) % classes
    return Dataset(
        name="tiny",
        train_inputs=torch.zeros(examples, 2),
        train_labels=labels,
        test_inputs=torch.zeros(1, 2),
        test_labels=labels[:1],
        classes=classes,
        groups=groups,
    )


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize("name", sorted(set(PARTITIONS) - {"natural", "resampled"}))
def test_a_federation_holds_what_its_partition_split(digits, name):
    rule = PARTITIONS[name]()
    federation = federate(digits, rule, 20, rng())
    parts = rule.split(digits.train_labels.numpy(), None, 20, rng())
    assert federation.population == 20
    assert federation.sizes.tolist() == [len(part) for part in parts]
    assert federation.sizes.dtype == federation.offsets.dtype == federation.rows.dtype == np.int64
    assert all(np.array_equal(federation.rows_of(i), part) for i, part in enumerate(parts))


def test_label_counts_are_those_of_each_client(digits):
    federation = federate(digits, Dirichlet(concentration=0.1), 30, rng())
    labels = digits.train_labels.numpy()
    expected = [np.bincount(labels[federation.rows_of(i)], minlength=10) for i in range(30)]
    assert np.array_equal(federation.label_counts(), expected)


def test_natural_clients_may_be_fewer_than_all():
    data = tiny(groups=np.arange(12) % 4)
    assert federate(data, Natural(), None, rng()).population == 4
    assert federate(data, Natural(), 3, rng()).rows.tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10]


def test_natural_clients_without_data_keep_their_places(tmp_path):
    data = dataclasses.replace(tiny(), groups=np.repeat([0, 2], 6), natural_clients=4)
    federation = federate(data, Natural(), None, rng())
    assert federation.sizes.tolist() == [6, 0, 6, 0]
    assert federation.rows_of(2).tolist() == list(range(6, 12))
    assert federation.label_counts().sum(axis=1).tolist() == [6, 0, 6, 0]
    plot_who_holds_what(federation, tmp_path / "who.png")
    with pytest.raises(UserError, match=r"natural clients from 0 to 2"):
        dataclasses.replace(data, groups=np.repeat([0, 3], 6), natural_clients=3)


@pytest.mark.parametrize("client", [-1, 3])
def test_there_is_no_client_outside_the_population(client):
    with pytest.raises(IndexError, match=f"client {client} of a population of 3"):
        federate(tiny(), Iid(), 3, rng()).rows_of(client)


@pytest.mark.parametrize(
    ("offsets", "rows"),
    [
        ([0], []),
        ([1, 2], [0, 1]),
        ([0, 1], [0, 1]),
        ([0, 0, 0], []),
        ([0, 2, 1], [0]),
        ([0, 2], [3, 3]),
        ([0, 1], [12]),
        ([0, 1], [-1]),
    ],
)
def test_a_federation_that_contradicts_itself_is_refused(offsets, rows):
    with pytest.raises(UserError, match=r"^federation: "):
        Federation(dataset=tiny(), offsets=np.array(offsets), rows=np.array(rows, dtype=np.int64))


def test_the_table_has_a_row_for_each_client_and_a_column_for_each_label():
    table = who_holds_what(federate(tiny(), Iid(), 4, rng()))
    assert list(table.columns) == ["client", "examples", "label_0", "label_1", "label_2"]
    assert table["client"].tolist() == [0, 1, 2, 3]
    assert (table.filter(like="label_").sum(axis=1) == table["examples"]).all()


@pytest.mark.parametrize(
    ("classes", "clients"), [(3, 1), (10, 12), (10, 150), (12, 5)], ids=["one", "bars", "many", "labels"]
)
def test_every_federation_can_be_drawn(tmp_path, classes, clients):
    federation = federate(tiny(classes, 240), LabelShards(shards_per_client=1), clients, rng())
    plot_who_holds_what(federation, tmp_path / "who.png", partition="shards")
    assert (tmp_path / "who.png").read_bytes().startswith(b"\x89PNG")


def test_resampled_clients_hold_what_their_number_says(digits):
    """Any number of clients on few examples; the same rows on every access, and as a list."""
    rule = Resampled(examples=15)
    many = spread(digits, rule, 1_000_000, rng())
    assert (many.population, many.sizes.shape, many.sizes.strides) == (1_000_000, (1_000_000,), (0,))
    assert int(many.sizes[999_999]) == 15
    few = spread(digits, rule, 40, rng())
    listed = rule.split(digits.train_labels.numpy(), None, 40, rng())
    for client, rows in enumerate(listed):
        assert np.array_equal(few.rows_of(client), rows)
        assert np.array_equal(many.rows_of(client), rows)
        assert len(rows) == 15
        assert (np.diff(rows) >= 0).all()
    drawn = np.concatenate([many.rows_of(client) for client in range(4000)])
    counts = np.bincount(drawn, minlength=digits.examples)
    expected = 60_000 / digits.examples
    assert abs(((counts - expected) ** 2).sum() / expected - digits.examples) < 6 * (2 * digits.examples) ** 0.5
    assert few.label_counts().sum(axis=1).tolist() == [15] * 40


def test_resampled_clients_need_a_number_and_are_told_apart(digits):
    with pytest.raises(UserError, match=r"data\.clients: expected a whole number, got a missing key"):
        spread(digits, Resampled(), None, rng())
    with pytest.raises(UserError, match=r"data\.examples"):
        Resampled(examples=0)
    prints = {
        spread(digits, Resampled(examples=k), n, np.random.default_rng(seed)).fingerprint
        for k, n, seed in ((15, 30, 0), (16, 30, 0), (15, 31, 0), (15, 30, 1), (15, 30, 0))
    }
    assert len(prints) == 4
    with pytest.raises(IndexError, match="client 30 of a population of 30"):
        spread(digits, Resampled(), 30, rng()).rows_of(30)

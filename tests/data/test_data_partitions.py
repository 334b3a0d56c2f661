import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.helpers import accepts_variance

from fedpriv.data.partitions import (
    PARTITIONS,
    Dirichlet,
    Iid,
    LabelShards,
    Natural,
    Partition,
    QuantitySkew,
    mean_total_variation,
)
from fedpriv.errors import UserError

RULES: dict[str, Partition] = {
    "iid": Iid(),
    "dirichlet": Dirichlet(concentration=0.1),
    "dirichlet, extreme": Dirichlet(concentration=1e-6),
    "dirichlet, even": Dirichlet(concentration=1e9),
    "shards": LabelShards(shards_per_client=1),
    "quantity": QuantitySkew(),
    "quantity, extreme": QuantitySkew(size_spread=5),
    "natural": Natural(),
}
LABELS = np.random.default_rng(5).integers(0, 10, 50_000)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def counts_of(parts: list[np.ndarray], labels: np.ndarray, classes: int = 10) -> np.ndarray:
    return np.stack([np.bincount(labels[rows], minlength=classes) for rows in parts])


def heterogeneity(rule: Partition, clients: int) -> float:
    return mean_total_variation(counts_of(rule.split(LABELS, None, clients, rng()), LABELS))


@st.composite
def divisions(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int, int]:
    clients = draw(st.integers(1, 30))
    examples = draw(st.integers(clients, 200))
    seed = draw(st.integers(0, 2**32 - 1))
    labels = np.sort(rng(seed).integers(0, draw(st.integers(1, 12)), examples))
    groups = rng(seed).permutation(np.arange(examples) % clients)
    return labels, groups, clients, seed


@pytest.mark.parametrize("name", RULES)
@settings(deadline=None)
@given(division=divisions())
def test_every_example_has_one_client_and_every_client_an_example(name, division):
    labels, groups, clients, seed = division
    parts = RULES[name].split(labels, groups, clients, rng(seed))
    assert len(parts) == clients
    assert all(len(part) > 0 and part.dtype == np.int64 and (np.diff(part) > 0).all() for part in parts)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))


@pytest.mark.parametrize("name", RULES)
@settings(deadline=None)
@given(division=divisions())
def test_equal_generators_give_equal_splits_and_arguments_stay_as_they_were(name, division):
    labels, groups, clients, seed = division
    before = labels.copy(), groups.copy()
    one, two = (RULES[name].split(labels, groups, clients, rng(seed)) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    assert np.array_equal(labels, before[0])
    assert np.array_equal(groups, before[1])


@settings(deadline=None)
@given(division=divisions())
def test_iid_sizes_differ_by_at_most_one(division):
    labels, _, clients, seed = division
    sizes = [len(part) for part in Iid().split(labels, None, clients, rng(seed))]
    assert max(sizes) - min(sizes) <= 1


@settings(deadline=None)
@given(division=divisions(), shards=st.integers(1, 4))
def test_shards_add_at_most_one_label_for_each_border_between_labels(division, shards):
    labels, _, clients, seed = division
    classes = len(np.unique(labels))
    if clients * shards > len(labels):
        return
    parts = LabelShards(shards_per_client=shards).split(labels, None, clients, rng(seed))
    held = [len(np.unique(labels[part])) for part in parts]
    assert sum(held) <= clients * shards + classes - 1
    assert max(held) <= shards + classes - 1


def test_shards_that_divide_the_labels_evenly_hold_one_label_each():
    labels = np.repeat(np.arange(10), 60)
    parts = LabelShards(shards_per_client=2).split(rng().permutation(labels), None, 100, rng())
    assert {len(part) for part in parts} == {6}
    assert max(len(np.unique(labels[part])) for part in LabelShards().split(labels, None, 100, rng())) <= 2


def test_label_skew_grows_as_the_concentration_falls():
    iid, even, mild, strong = (
        heterogeneity(rule, 100)
        for rule in (
            Iid(),
            Dirichlet(concentration=100),
            Dirichlet(concentration=1),
            Dirichlet(concentration=0.1),
        )
    )
    assert max(iid, even) < mild < strong
    assert heterogeneity(LabelShards(shards_per_client=1), 100) > strong


def test_skewed_sizes_are_log_normal_and_labels_stay_alike():
    # 2,000 clients of 500 examples on average: log sizes are normal up to rounding to whole examples.
    labels = np.tile(np.arange(10), 100_000)
    for spread in (0.5, 1.0):
        parts = QuantitySkew(size_spread=spread).split(labels, None, 2_000, rng(1))
        logs = np.log([len(part) for part in parts])
        assert accepts_variance(logs - logs.mean(), spread**2)
        assert not accepts_variance(logs - logs.mean(), (1.3 * spread) ** 2)
    assert heterogeneity(QuantitySkew(size_spread=1.0), 50) < heterogeneity(Dirichlet(concentration=10), 50)


@settings(deadline=None)
@given(division=divisions())
def test_sizes_without_spread_differ_by_at_most_one(division):
    labels, _, clients, seed = division
    sizes = [len(part) for part in QuantitySkew(size_spread=0).split(labels, None, clients, rng(seed))]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("value", [-0.1, 5.1, float("nan"), True, "1"])
def test_a_spread_without_meaning_is_refused(value):
    with pytest.raises(UserError, match=r"^data\.size_spread: expected a number from 0 to 5"):
        QuantitySkew(size_spread=value)


def test_dirichlet_shares_have_the_variance_of_the_distribution():
    # One label: shares of 2,000 clients have mean 1/n and variance (1/n)(1 - 1/n)/(n c + 1); the estimate's relative
    # error has a standard deviation below 0.07 for c = 2, so 5 of these are a false alarm of less than 1e-6.
    clients, concentration = 2_000, 2.0
    labels = np.zeros(2_000_000, dtype=np.int64)
    parts = Dirichlet(concentration=concentration).split(labels, None, clients, rng(1))
    shares = np.array([len(part) for part in parts]) / len(labels)
    expected = (1 / clients) * (1 - 1 / clients) / (clients * concentration + 1)
    assert shares.var() == pytest.approx(expected, rel=0.35)
    assert shares.var() != pytest.approx(2 * expected, rel=0.35)


def test_even_shares_of_different_labels_meet_different_clients():
    labels = np.repeat(np.arange(10), 100)
    parts = Dirichlet(concentration=1e9).split(labels, None, 500, rng())
    assert max(len(part) for part in parts) <= 8


def test_an_empty_client_takes_from_the_largest():
    labels = np.zeros(100, dtype=np.int64)
    sizes = sorted(len(p) for p in Dirichlet(concentration=1e-6).split(labels, None, 11, rng()))
    assert sizes == [1] * 10 + [90]


def test_natural_clients_hold_their_groups_and_fewer_clients_are_the_first():
    groups = np.array([2, 0, 1, 1, 0, 2, 2])
    labels = np.zeros(7, dtype=np.int64)
    everyone = Natural().split(labels, groups, None, rng())
    assert [part.tolist() for part in everyone] == [[1, 4], [2, 3], [0, 5, 6]]
    assert [part.tolist() for part in Natural().split(labels, groups, 2, rng())] == [[1, 4], [2, 3]]


def test_natural_refuses_more_clients_than_groups():
    with pytest.raises(UserError, match=r"data\.clients: expected at most 2, .* got 3"):
        Natural().split(np.zeros(4, dtype=np.int64), np.array([0, 0, 1, 1]), 3, rng())


def test_natural_names_the_datasets_with_natural_clients():
    with pytest.raises(UserError, match=r"data\.partition: .*mnist-by-writer"):
        Natural().split(np.zeros(4, dtype=np.int64), None, None, rng())


@pytest.mark.parametrize("rule", [Iid(), Dirichlet(), LabelShards(shards_per_client=1), QuantitySkew()], ids=repr)
@pytest.mark.parametrize("clients", [None, 0, -1, 5, True])
def test_a_population_that_cannot_be_served_is_refused_by_its_key(rule, clients):
    with pytest.raises(UserError, match=r"^data\.clients: "):
        rule.split(np.zeros(4, dtype=np.int64), None, clients, rng())


def test_more_shards_than_examples_are_refused():
    with pytest.raises(UserError, match=r"^data\.shards_per_client: expected at most 1 "):
        LabelShards(shards_per_client=2).split(np.zeros(5, dtype=np.int64), None, 3, rng())


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), 1e-300, True, "0.5"])
def test_a_concentration_without_meaning_is_refused(value):
    with pytest.raises(UserError, match=r"^data\.concentration: "):
        Dirichlet(concentration=value)


@pytest.mark.parametrize("value", [0, -1, 1.0, True])
def test_a_number_of_shards_without_meaning_is_refused(value):
    with pytest.raises(UserError, match=r"^data\.shards_per_client: "):
        LabelShards(shards_per_client=value)


def test_total_variation_of_alike_clients_is_zero():
    assert mean_total_variation(np.array([[1, 2, 3], [2, 4, 6], [0, 0, 0]])) == pytest.approx(0, abs=1e-15)


def test_total_variation_of_clients_with_one_label_each_is_one_minus_the_label_share():
    assert mean_total_variation(5 * np.eye(4)) == pytest.approx(0.75)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_total_variation_lies_between_zero_and_one_and_forgets_the_order_of_clients(seed):
    counts = rng(seed).integers(0, 4, (6, 3)) + np.eye(6, 3, dtype=np.int64)
    counts[:, 0] += 1
    value = mean_total_variation(counts)
    assert 0 <= value < 1
    assert mean_total_variation(counts[::-1]) == pytest.approx(value)


@pytest.mark.parametrize("name", ["iid", "dirichlet", "shards", "quantity"])
def test_a_hundred_thousand_clients_are_no_trouble(name):
    labels = rng().integers(0, 10, 200_000)
    assert len(PARTITIONS[name]().split(labels, None, 100_000, rng())) == 100_000

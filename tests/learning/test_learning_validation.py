import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedpriv.errors import UserError
from fedpriv.learning.datasets import Dataset, Digits, every_fifth_of_each_label
from fedpriv.learning.validation import hold_out


def dataset(labels: np.ndarray, groups: np.ndarray | None = None) -> Dataset:
    """Each input is the example's number, so that examples can be told apart."""
    numbers = torch.arange(len(labels), dtype=torch.float32)[:, None]
    return Dataset(
        name="made",
        train_inputs=numbers,
        train_labels=torch.from_numpy(labels),
        test_inputs=numbers[:1],
        test_labels=torch.zeros(1, dtype=torch.int64),
        classes=4,
        groups=groups,
    )


def held(data: Dataset) -> np.ndarray:
    assert data.validation_inputs is not None
    return data.validation_inputs[:, 0].numpy().astype(np.int64)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(20, 120), st.floats(0.05, 0.9), st.integers(1, 9))
def test_every_example_is_either_kept_or_held_out_with_its_label_and_its_client(seed, examples, share, clients):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, examples)
    groups = rng.permutation(np.arange(examples) % clients)
    whole = dataset(labels, groups)
    try:
        split = hold_out(whole, share)
    except UserError:
        assume(False)
        raise
    kept, out = split.train_inputs[:, 0].numpy().astype(np.int64), held(split)
    assert np.array_equal(np.sort(np.concatenate([kept, out])), np.arange(examples))
    assert np.array_equal(split.train_labels.numpy(), labels[kept])
    assert split.validation_labels is not None
    assert np.array_equal(split.validation_labels.numpy(), labels[out])
    assert split.groups is not None
    assert np.array_equal(split.groups, groups[kept])
    assert len(np.unique(split.groups)) == clients
    assert torch.equal(split.test_inputs, whole.test_inputs)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.1, 0.25, 0.3, 0.5]))
def test_each_label_gives_its_share_within_one_example(seed, share):
    labels = np.random.default_rng(seed).integers(0, 4, 200)
    counts, given_ = (
        np.bincount(labels, minlength=4),
        np.bincount(labels[held(hold_out(dataset(labels), share))], minlength=4),
    )
    assert (np.abs(given_ - share * counts) < 1).all()


def test_a_fifth_is_every_fifth_of_each_label():
    labels = np.random.default_rng(3).integers(0, 4, 500)
    assert np.array_equal(held(hold_out(dataset(labels), 0.2)), np.flatnonzero(every_fifth_of_each_label(labels)))


def test_natural_clients_give_alike_and_keep_their_first_example():
    groups = np.repeat(np.arange(10), 20)
    split = hold_out(dataset(np.zeros(200, dtype=np.int64), groups), 0.1)
    assert np.bincount(groups[held(split)]).tolist() == [2] * 10
    alone = hold_out(dataset(np.zeros(20, dtype=np.int64), np.minimum(np.arange(20), 15)), 0.5)
    assert held(alone).min() > 15


def test_what_is_held_out_is_the_same_for_everyone_who_asks():
    one, two = (hold_out(Digits().load(None), 0.1) for _ in range(2))
    assert one.validation_inputs is not None
    assert two.validation_inputs is not None
    assert torch.equal(one.validation_inputs, two.validation_inputs)
    assert (one.examples, len(one.validation_inputs)) == (1302, 140)


@pytest.mark.parametrize("share", [0.001, 0.9999999])
def test_a_share_that_is_none_or_all_of_the_examples_is_refused(share):
    labels = np.zeros(3, dtype=np.int64)
    if share > 0.5:
        with pytest.raises(UserError, match=r"^data\.validation: expected a share that is some"):
            hold_out(dataset(labels), 1.0 - 1e-12)
    else:
        with pytest.raises(UserError, match=r"^data\.validation: expected a share that is some"):
            hold_out(dataset(labels), share)

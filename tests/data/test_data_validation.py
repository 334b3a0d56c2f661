"""Held-out examples: from a pool, from each natural client, and of whole clients."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedpriv.data.dataset import Dataset
from fedpriv.data.datasets import Digits, every_fifth_of_each_label
from fedpriv.data.validation import evaluated_on, hold_out
from fedpriv.errors import UserError


def dataset(labels: np.ndarray, groups: np.ndarray | None = None, test_groups: np.ndarray | None = None) -> Dataset:
    """Each input is the example's number, to identify examples; test examples come last."""
    tested = 1 if test_groups is None else len(test_groups)
    numbers = torch.arange(len(labels) + tested, dtype=torch.float32)[:, None]
    return Dataset(
        name="made",
        train_inputs=numbers[: len(labels)],
        train_labels=torch.from_numpy(labels),
        test_inputs=numbers[len(labels) :],
        test_labels=torch.arange(tested) % 4,
        classes=4,
        groups=groups,
        test_groups=test_groups,
    )


def numbers_of(inputs: torch.Tensor | None) -> np.ndarray:
    assert inputs is not None
    return inputs[:, 0].numpy().astype(np.int64)


def held(data: Dataset) -> np.ndarray:
    return numbers_of(data.validation_inputs)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


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
    kept, out = numbers_of(split.train_inputs), held(split)
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
def test_each_label_of_a_pool_gives_its_share_within_one_example(seed, share):
    labels = np.random.default_rng(seed).integers(0, 4, 200)
    counts, given_ = (
        np.bincount(labels, minlength=4),
        np.bincount(labels[held(hold_out(dataset(labels), share))], minlength=4),
    )
    assert (np.abs(given_ - share * counts) < 1).all()


def test_a_fifth_of_a_pool_is_every_fifth_of_each_label():
    labels = np.random.default_rng(3).integers(0, 4, 500)
    assert np.array_equal(held(hold_out(dataset(labels), 0.2)), np.flatnonzero(every_fifth_of_each_label(labels)))


# Natural clients


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.floats(0.05, 0.9), st.integers(2, 9))
def test_what_is_held_out_of_a_client_follows_from_its_number_and_its_number_of_examples(seed, share, clients):
    """For any labels, and any data of other clients."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 30, clients)
    chosen = []
    for _ in range(2):
        groups = rng.permutation(np.repeat(np.arange(clients), sizes))
        try:
            out = held(hold_out(dataset(rng.integers(0, 4, len(groups)), groups), share))
        except UserError:
            assume(False)
            raise
        place = np.searchsorted(np.flatnonzero(groups == 0), out[groups[out] == 0])
        chosen.append((place.tolist(), int((groups[out] == 0).sum())))
        sizes[1:] = rng.integers(1, 30, clients - 1)
    assert chosen[0] == chosen[1]
    assert chosen[0][1] < sizes[0]


def test_natural_clients_of_any_size_give_their_share_in_the_mean():
    groups = np.repeat(np.arange(400), 4)
    given_ = np.bincount(groups[held(hold_out(dataset(np.zeros(1600, dtype=np.int64), groups), 0.1))], minlength=400)
    assert set(given_.tolist()) == {0, 1}
    assert 120 < given_.sum() < 200  # mean 160, standard deviation 9.8
    many = np.repeat(np.arange(10), 20)
    assert np.bincount(many[held(hold_out(dataset(np.zeros(200, dtype=np.int64), many), 0.1))]).tolist() == [2] * 10


def test_natural_clients_keep_an_example():
    alone = hold_out(dataset(np.zeros(20, dtype=np.int64), np.minimum(np.arange(20), 15)), 0.9)
    assert held(alone).min() > 14
    assert len(held(alone)) == 4


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
        with pytest.raises(UserError, match=r"^data\.validation: expected a share that holds out some"):
            hold_out(dataset(labels), 1.0 - 1e-12)
    else:
        with pytest.raises(UserError, match=r"^data\.validation: expected a share that holds out some"):
            hold_out(dataset(labels), share)


def natural(clients: int = 10, *, own_test: bool = True) -> Dataset:
    groups = np.arange(8 * clients) % clients
    return dataset(groups % 4, groups, np.arange(2 * clients) % clients if own_test else None)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 99), st.integers(3, 12), st.sampled_from([None, 0.1, 0.3]), st.booleans())
def test_clients_that_are_tested_on_take_no_part_with_any_example(seed, clients, validation, own_test):
    whole = natural(clients, own_test=own_test)
    owners = np.arange(8 * clients + 2 * clients) % clients
    split = evaluated_on(whole, "clients", validation, rng(seed))
    parts = [numbers_of(split.train_inputs), numbers_of(split.test_inputs)]
    parts += [] if validation is None else [held(split)]
    seen = [set(owners[part].tolist()) for part in parts]
    assert sum(map(len, seen)) == len(set().union(*seen)) == clients
    assert sum(map(len, parts)) == (10 if own_test else 8) * clients
    assert len(seen[1]) == max(round(0.2 * clients), 1)
    assert split.groups is not None
    assert np.array_equal(np.array(sorted(seen[0]))[split.groups], owners[parts[0]])
    assert split.natural_population == len(seen[0])
    assert split.test_groups is None
    for part, kept, said in ((1, parts[1], split.tested), (2, parts[2:] and parts[2], split.validated)):
        assert (said is None) == (part == len(seen))
        if said is not None:
            assert said.clients == len(seen[part])
            assert np.array_equal(np.array(sorted(seen[part]))[said.owners], owners[kept])


def test_clients_that_are_tested_on_are_chosen_by_the_seed():
    chosen = [
        numbers_of(evaluated_on(natural(), "clients", None, rng(seed)).test_inputs).tolist() for seed in (1, 1, 2)
    ]
    assert chosen[0] == chosen[1] != chosen[2]


def test_within_are_the_data_sets_own_test_examples_or_a_fifth_of_each_client():
    own, made = (evaluated_on(natural(own_test=own_test), "within", None, rng()) for own_test in (True, False))
    assert numbers_of(own.test_inputs).tolist() == list(range(80, 100))
    out = numbers_of(made.test_inputs)
    assert set(np.bincount(out % 10, minlength=10).tolist()) <= {1, 2}
    assert sorted([*out, *numbers_of(made.train_inputs)]) == list(range(80))
    for split in (own, made):
        assert split.tested is not None
        assert split.tested.clients == 10
        assert np.array_equal(split.tested.owners, numbers_of(split.test_inputs) % 10)
        assert split.test_groups is split.validated is None


def test_examples_to_test_and_to_validate_on_are_chosen_apart():
    """With one draw for both, the same share of a client would hold out the same places twice."""
    split = evaluated_on(natural(40, own_test=False), "within", 0.2, rng())
    assert split.validated is not None
    assert np.array_equal(split.validated.owners, held(split) % 40)
    assert split.validated.clients == 40
    assert not set(numbers_of(split.test_inputs)) & set(held(split))
    alone = hold_out(natural(40, own_test=False), 0.2)
    assert set(numbers_of(split.test_inputs)) != set(held(alone))


def test_public_are_the_data_sets_own_unless_they_are_clients():
    public = evaluated_on(natural(own_test=False), "public", None, rng())
    assert numbers_of(public.test_inputs).tolist() == [80]
    assert public.tested is None
    with pytest.raises(UserError, match=r"^data\.test: expected a data set with public test examples"):
        evaluated_on(natural(), "public", None, rng())


@pytest.mark.parametrize(("clients", "validation"), [(1, None), (2, 0.1), (3, 0.9)])
def test_too_few_clients_to_hold_some_out_are_refused(clients, validation):
    with pytest.raises(UserError, match=r"^data\.test: expected clients left for training"):
        evaluated_on(natural(clients), "clients", validation, rng())

"""Examples held out of training: to test, and to choose by without looking at the test data.

From natural clients they are held out in one of three ways; see `evaluated_on`. None of them lets one client decide
about another: which examples are held out of a client follows from its number and its number of examples alone, and
which clients are held out as a whole, from the seed and the number of clients.

Clients that are simulated share a pool. What is held out of the pool, before it is divided, is nobody's.
"""

from dataclasses import replace
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from fedpriv.data.dataset import Dataset, HeldOut
from fedpriv.errors import UserError
from fedpriv.privacy.released import Whose

__all__ = ["TESTS", "evaluated_on", "hold_out", "test_rows_within"]

TESTS: tuple[Whose, ...] = get_args(Whose)
"""On whose examples a model of natural clients can be tested; see `evaluated_on`."""

# Share of the clients, or of each client's examples, that are held out to test on.
_TEST_SHARE = 0.2
# Set apart what is held out for one purpose from what is held out for another.
_TO_TEST, _TO_VALIDATE = 0, 1


def test_rows_within(groups: np.ndarray) -> np.ndarray:
    """Return which examples, bool `[examples]`, are held out to test on: a fifth of each natural client's own.

    Args:
        groups: int64 `[examples]`, the natural client of each.
    """
    return _held_out_of_clients(groups, _TEST_SHARE, _TO_TEST)


def hold_out(dataset: Dataset, share: float) -> Dataset:
    """The data set with a share of its training examples moved to `validation_inputs` and `validation_labels`.

    Which ones is fixed: neither the experiment's seed nor its population matters, so that all runs are compared on the
    same examples. A natural client gives its share of its own examples, and keeps one at least. Without natural
    clients, each label gives its share.

    Args:
        dataset: The examples.
        share: Of the training examples, above 0 and below 1.

    Raises:
        UserError: If that is none of the examples, or all.
    """
    if dataset.groups is None:
        held = _held_out_of_labels(dataset.train_labels.numpy(), share)
    else:
        held = _held_out_of_clients(dataset.groups, share, _TO_VALIDATE)
    if not 0 < held.sum() < len(held):
        got = f"{held.sum()} of {len(held)} examples at {share:g}"
        raise UserError("data.validation", "a share that is some of the examples", got, "Change data.validation")
    inputs, labels = _rows(dataset, held)
    validated = None if dataset.groups is None else HeldOut(dataset.groups[held], dataset.natural_population)
    return replace(_kept(dataset, ~held), validation_inputs=inputs, validation_labels=labels, validated=validated)


def evaluated_on(dataset: Dataset, test: Whose, validation: float | None, rng: np.random.Generator) -> Dataset:
    """The data set of natural clients, with examples held out to test on and, if asked for, to validate on.

    Args:
        dataset: The examples, each with its natural client.
        test: `public`: the data set's own test examples, which belong to no client. `clients`: all examples of a fifth
            of the clients, who take no part. `within`: some of each client's own, those that the data set names or
            otherwise a fifth.
        validation: Share held out to choose by, None for none: with `clients` of the clients, who take no part either,
            otherwise of each client's own examples.
        rng: Chooses the clients that take no part.

    Raises:
        UserError: If there are no such test examples, or too few clients or examples.
    """
    if dataset.groups is None:
        return dataset  # which the partition refuses
    if test == "clients":
        return _without_some_clients(dataset, validation, rng)
    if test == "public" and dataset.test_groups is not None:
        remedy = 'Choose "clients" or "within"'
        raise UserError("data.test", f"a data set with public test examples, for {test!r}", dataset.name, remedy)
    if test == "within" and dataset.test_groups is None:
        held = test_rows_within(dataset.groups)
        if not held.any():
            remedy = 'Choose "public" or "clients"'
            raise UserError("data.test", "clients of several examples, for 'within'", dataset.examples, remedy)
        inputs, labels, owners = *_rows(dataset, held), dataset.groups[held]
        dataset = replace(_kept(dataset, ~held), test_inputs=inputs, test_labels=labels, test_groups=owners)
    tested = None if dataset.test_groups is None else HeldOut(dataset.test_groups, dataset.natural_population)
    dataset = replace(dataset, test_groups=None, tested=tested)
    return dataset if validation is None else hold_out(dataset, validation)


def _without_some_clients(dataset: Dataset, validation: float | None, rng: np.random.Generator) -> Dataset:
    """Tests on a fifth of the clients, validates on a share of them, and numbers the others in their order."""
    whole, found = _with_own_tests(dataset), dataset.natural_population
    tested = max(round(_TEST_SHARE * found), 1)
    validated = 0 if validation is None else max(round(validation * found), 1)
    if tested + validated >= found:
        got = f"{found} natural clients, of whom {tested + validated} would be held out"
        remedy = 'Lower data.validation, or choose data.test = "within"'
        raise UserError("data.test", "clients that are left to train on", got, remedy)
    chosen = np.split(rng.permutation(found), [tested, tested + validated])
    groups = _groups(whole)
    to_test, to_validate, to_train = (np.isin(groups, clients) for clients in chosen)
    if not to_test.any() or not to_train.any() or not (to_validate.any() or validation is None):
        raise UserError("data.test", "clients that hold examples in each part", "none", "Choose another seed")
    inputs, labels = _rows(whole, to_test)
    tested_on = HeldOut(_numbered(groups[to_test], chosen[0]), tested)
    made = replace(_kept(whole, to_train), test_inputs=inputs, test_labels=labels, tested=tested_on)
    made = replace(made, groups=_numbered(_groups(made), chosen[2]), natural_clients=len(chosen[2]))
    if validation is None:
        return made
    inputs, labels = _rows(whole, to_validate)
    validated_on = HeldOut(_numbered(groups[to_validate], chosen[1]), validated)
    return replace(made, validation_inputs=inputs, validation_labels=labels, validated=validated_on)


def _numbered(groups: np.ndarray, clients: np.ndarray) -> np.ndarray:
    """The place of each example's client among `clients` in ascending order."""
    return np.searchsorted(np.sort(clients), groups)


def _with_own_tests(dataset: Dataset) -> Dataset:
    """All that clients hold as training examples, those included that the data set would test on."""
    groups, of_test = _groups(dataset), dataset.test_groups
    if of_test is None:
        return dataset
    return replace(
        dataset,
        train_inputs=torch.cat([dataset.train_inputs, dataset.test_inputs]),
        train_labels=torch.cat([dataset.train_labels, dataset.test_labels]),
        groups=np.concatenate([groups, of_test]),
        natural_clients=dataset.natural_population,
        test_groups=None,
    )


def _groups(dataset: Dataset) -> np.ndarray:
    if dataset.groups is None:
        raise ValueError(f"{dataset.name} has no natural clients")
    return dataset.groups


def _rows(dataset: Dataset, chosen: np.ndarray) -> tuple[Tensor, Tensor]:
    """Inputs and labels of the chosen training examples, bool `[examples]`."""
    at = torch.from_numpy(np.flatnonzero(chosen))
    return dataset.train_inputs[at], dataset.train_labels[at]


def _kept(dataset: Dataset, chosen: np.ndarray) -> Dataset:
    """The data set with the chosen training examples alone, of as many natural clients as before."""
    inputs, labels = _rows(dataset, chosen)
    made = {"train_inputs": inputs, "train_labels": labels}
    if dataset.groups is None:
        return replace(dataset, **made)
    return replace(dataset, **made, groups=dataset.groups[chosen], natural_clients=dataset.natural_population)


def _held_out_of_labels(labels: np.ndarray, share: float) -> np.ndarray:
    """Which examples, bool `[examples]`: evenly spaced in each label."""
    order = np.argsort(labels, kind="stable")
    in_order = labels[order]
    place = np.arange(len(labels)) - np.searchsorted(in_order, in_order)
    held = np.zeros(len(labels), dtype=bool)
    # The least that makes 0.1 of ten examples one example in floating point.
    held[order] = np.floor((place + 1) * share + 1e-9) > np.floor(place * share + 1e-9)
    return held


def _held_out_of_clients(groups: np.ndarray, share: float, purpose: int) -> np.ndarray:
    """Which examples, bool `[examples]`, by the client's number and its number of examples alone.

    Of n examples share * n are held out in the mean over clients, so that small clients give their part, too; one at
    least is kept.
    """
    held = np.zeros(len(groups), dtype=bool)
    order = np.argsort(groups, kind="stable")
    ends = np.cumsum(np.bincount(groups))
    for client, rows in enumerate(np.split(order, ends[:-1])):
        rng = np.random.default_rng(np.random.SeedSequence(0, spawn_key=(purpose, client)))
        count = min(int(share * len(rows) + rng.random()), len(rows) - 1)
        if count > 0:
            held[rng.choice(rows, count, replace=False)] = True
    return held

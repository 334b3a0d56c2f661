"""Hold examples out of training, for testing and for model selection without the test data.

With natural clients there are three ways to hold out; see `evaluated_on`. In none of them does one client's data affect
another client. The examples held out from a client depend only on its number and its number of examples. The clients
held out as a whole depend only on the seed and the number of clients.

Simulated clients share a pool. Examples held out from the pool before it is divided belong to no client.
"""

from dataclasses import replace
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from fedpriv.data.dataset import Dataset, HeldOut
from fedpriv.data.mapped import chosen_rows, joined_rows
from fedpriv.errors import UserError
from fedpriv.privacy.released import Whose

__all__ = ["TESTS", "evaluated_on", "hold_out", "test_rows_within"]

TESTS: tuple[Whose, ...] = get_args(Whose)
"""The possible sources of test examples for a model of natural clients; see `evaluated_on`."""

# Share of the clients, or of each client's examples, held out for testing.
_TEST_SHARE = 0.2
# Keep the random choices for the two purposes independent.
_TO_TEST, _TO_VALIDATE = 0, 1


def test_rows_within(groups: np.ndarray) -> np.ndarray:
    """Return which examples, bool `[examples]`, are held out to test on: a fifth of each natural client's own.

    Args:
        groups: int64 `[examples]`, the natural client of each.
    """
    return _held_out_of_clients(groups, _TEST_SHARE, _TO_TEST)


def hold_out(dataset: Dataset, share: float) -> Dataset:
    """Return the data set with a share of its training examples moved to `validation_inputs` and `validation_labels`.

    The choice is fixed: it depends on neither the experiment's seed nor its population, so all runs are compared on the
    same examples. Each natural client gives this share of its examples and keeps at least one. Without natural clients,
    each label gives this share.

    Args:
        dataset: The examples.
        share: Share of the training examples, above 0 and below 1.

    Raises:
        UserError: If no example, or every example, would be held out.
    """
    if dataset.groups is None:
        held = _held_out_of_labels(_classes(dataset), share)
    else:
        held = _held_out_of_clients(dataset.groups, share, _TO_VALIDATE)
    if not 0 < held.sum() < len(held):
        got = f"{held.sum()} of {len(held)} examples at {share:g}"
        raise UserError(
            "data.validation", "a share that holds out some but not all examples", got, "Change data.validation"
        )
    inputs, labels = _rows(dataset, held)
    validated = None if dataset.groups is None else HeldOut(dataset.groups[held], dataset.natural_population)
    return replace(_kept(dataset, ~held), validation_inputs=inputs, validation_labels=labels, validated=validated)


def evaluated_on(dataset: Dataset, test: Whose, validation: float | None, rng: np.random.Generator) -> Dataset:
    """Return the data set of natural clients, with examples held out for testing and, on request, for validation.

    Args:
        dataset: The examples, each with its natural client.
        test: `public`: the data set's standard test examples, which belong to no client. `clients`: all examples of a
            fifth of the clients, who do not train. `within`: some of each client's examples, as defined by the data set
            or otherwise a fifth.
        validation: Share held out for validation; None for none. With `clients`, a share of the clients, who do not
            train either; otherwise a share of each client's examples.
        rng: Selects the clients to hold out.

    Raises:
        UserError: If there are no such test examples, or too few clients or examples.
    """
    if dataset.groups is None:
        return dataset  # the partition raises the error
    if test == "clients":
        return _without_some_clients(dataset, validation, rng)
    if test == "public" and dataset.test_groups is not None:
        remedy = 'Choose "clients" or "within"'
        raise UserError("data.test", f"a data set with public test examples, for {test!r}", dataset.name, remedy)
    if test == "within" and dataset.test_groups is None:
        held = test_rows_within(dataset.groups)
        if not held.any():
            remedy = 'Choose "public" or "clients"'
            raise UserError("data.test", "clients with several examples, for 'within'", dataset.examples, remedy)
        inputs, labels, owners = *_rows(dataset, held), dataset.groups[held]
        dataset = replace(_kept(dataset, ~held), test_inputs=inputs, test_labels=labels, test_groups=owners)
    tested = None if dataset.test_groups is None else HeldOut(dataset.test_groups, dataset.natural_population)
    dataset = replace(dataset, test_groups=None, tested=tested)
    return dataset if validation is None else hold_out(dataset, validation)


def _without_some_clients(dataset: Dataset, validation: float | None, rng: np.random.Generator) -> Dataset:
    """Test on a fifth of the clients, validate on a share of them, and renumber the others in order."""
    whole, found = _with_own_tests(dataset), dataset.natural_population
    tested = max(round(_TEST_SHARE * found), 1)
    validated = 0 if validation is None else max(round(validation * found), 1)
    if tested + validated >= found:
        got = f"{found} natural clients, {tested + validated} of them held out"
        remedy = 'Lower data.validation, or choose data.test = "within"'
        raise UserError("data.test", "clients left for training", got, remedy)
    chosen = np.split(rng.permutation(found), [tested, tested + validated])
    groups = _groups(whole)
    to_test, to_validate, to_train = (np.isin(groups, clients) for clients in chosen)
    if not to_test.any() or not to_train.any() or not (to_validate.any() or validation is None):
        raise UserError("data.test", "clients with examples in each part", "an empty part", "Choose another seed")
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
    """Return the index of each example's client among `clients` in ascending order."""
    return np.searchsorted(np.sort(clients), groups)


def _with_own_tests(dataset: Dataset) -> Dataset:
    """Return the data set with its test examples added to the clients' training examples."""
    groups, of_test = _groups(dataset), dataset.test_groups
    if of_test is None:
        return dataset
    return replace(
        dataset,
        train_inputs=joined_rows(dataset.train_inputs, dataset.test_inputs),
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
    """Return inputs and labels of the training examples selected by the bool mask `[examples]`."""
    at = np.flatnonzero(chosen)
    return chosen_rows(dataset.train_inputs, at), dataset.train_labels[torch.from_numpy(at)]


def _kept(dataset: Dataset, chosen: np.ndarray) -> Dataset:
    """Return the data set with only the selected training examples and an unchanged number of natural clients."""
    inputs, labels = _rows(dataset, chosen)
    made = {"train_inputs": inputs, "train_labels": labels}
    if dataset.groups is None:
        return replace(dataset, **made)
    return replace(dataset, **made, groups=dataset.groups[chosen], natural_clients=dataset.natural_population)


def _classes(dataset: Dataset) -> np.ndarray:
    """Return the class of each training example, int64; labels that are not classes count as one."""
    labels = dataset.train_labels
    return labels.numpy() if dataset.kind == "classes" else np.zeros(len(labels), dtype=np.int64)


def _held_out_of_labels(labels: np.ndarray, share: float) -> np.ndarray:
    """Return a bool mask `[examples]` of evenly spaced examples of each label."""
    order = np.argsort(labels, kind="stable")
    in_order = labels[order]
    place = np.arange(len(labels)) - np.searchsorted(in_order, in_order)
    held = np.zeros(len(labels), dtype=bool)
    # The smallest margin for which 0.1 of ten examples is one example in floating point.
    held[order] = np.floor((place + 1) * share + 1e-9) > np.floor(place * share + 1e-9)
    return held


def _held_out_of_clients(groups: np.ndarray, share: float, purpose: int) -> np.ndarray:
    """Return a bool mask `[examples]` that depends only on the clients' numbers and their numbers of examples.

    Of n examples, share * n are held out on average over clients, so small clients contribute too. Each client keeps at
    least one example.
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

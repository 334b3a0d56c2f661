"""Sums of messages are bit-identical for every order and grouping, and close to the true sum."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.helpers import same

from fedpriv.aggregation.exact import ExactSum, grid_step


def summed(messages: torch.Tensor, limit: float, capacity: int, groups: list[int]) -> torch.Tensor:
    """Return the sum of group sums, each group added as one batch."""
    total = torch.zeros(messages.shape[1], dtype=torch.float64)
    for group in set(groups):
        part = ExactSum(messages.shape[1], limit, capacity)
        part.add(messages[[i for i, g in enumerate(groups) if g == group]])
        total = total + part.value
    return total


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.floats(1e-20, 1e20), st.integers(1, 40), st.integers(1, 5))
def test_order_and_grouping_change_no_bit(seed: int, limit: float, count: int, parts: int) -> None:
    """Coordinates of every magnitude up to the limit: as batches, one by one, in reverse and in parts."""
    rng = np.random.default_rng(seed)
    scale = limit * 2.0 ** rng.uniform(-40, 0, (count, 7))
    messages = torch.tensor(rng.uniform(-1, 1, (count, 7)) * scale, dtype=torch.float32)
    whole = ExactSum(7, limit, count)
    whole.add(messages)
    single = ExactSum(7, limit, count)
    for row in messages.flip(0):
        single.add(row)
    grouped = summed(messages, limit, count, rng.integers(0, parts, count).tolist())
    assert same(whole.value, single.value)
    assert same(whole.value, grouped)
    true = np.array([math.fsum(column) for column in messages.double().numpy().T])
    assert np.abs(whole.value.numpy() - true).max() <= count * grid_step(limit, count)


def test_plain_float64_sums_would_depend_on_order() -> None:
    """The test above can fail: without the grid, the sum in reverse order has other bits."""
    rng = np.random.default_rng(3)
    messages = torch.tensor(rng.standard_normal((200, 1)) * 2.0 ** rng.uniform(-30, 0, (200, 1)), dtype=torch.float64)
    forwards, backwards = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for row in messages:
        forwards = forwards + row
    for row in messages.flip(0):
        backwards = backwards + row
    assert not same(forwards, backwards)


@pytest.mark.parametrize("blocks", [1, 3])
def test_blocks_of_a_long_batch_change_nothing(blocks: int) -> None:
    messages = torch.randn(blocks * 40 + 1, 2000)
    batch, rows = ExactSum(2000, 8.0, 200), ExactSum(2000, 8.0, 200)
    batch.add(messages)
    for row in messages:
        rows.add(row)
    assert same(batch.value, rows.value)
    assert not messages.isnan().any()


def test_the_grid_is_far_finer_than_a_message_and_wide_enough_for_all() -> None:
    for limit in (1e-20, 0.3, 1.0, 7.0, 1e20):
        for count in (1, 50, 10**6, 10**9):
            step = grid_step(limit, count)
            assert math.log2(step).is_integer()
            assert count * limit / step <= 2.0**51
            assert count * limit / step > 2.0**50


def test_one_more_message_moves_a_sum_by_that_message() -> None:
    """Rounded to float32, a long sum could move by more than the bound of a message."""
    messages = torch.tensor([[1e8], [1.0], [-1e8]])
    for order in ([2, 0, 1], [0, 1, 2]):
        total = ExactSum(1, 1e8, 3)
        total.add(messages[order])
        assert total.value.item() == 1.0


def test_no_message_is_zero_and_no_parameters_are_none() -> None:
    assert same(ExactSum(3, 1.0, 0).value, torch.zeros(3, dtype=torch.float64))
    empty = ExactSum(0, 1.0, 2)
    empty.add(torch.zeros(2, 0))
    assert empty.value.shape == (0,)


def test_the_messages_are_not_changed() -> None:
    messages = torch.randn(4, 5)
    before = messages.clone()
    total = ExactSum(5, 8.0, 4)
    total.add(messages)
    total.add(messages[0])
    assert same(messages, before)

"""Blocks for heads of unequal length."""

import pytest
import torch
from conftest import DEVICE

from kvevict.paged.blocks import allot_blocks


def int32(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def test_by_hand():
    table = torch.empty(2, 2, 3, dtype=torch.int32, device=DEVICE)
    taken = allot_blocks(int32([[4, 0], [9, 5]]), int32([7, 3, 9, 0, 4, 1, 8]), 10, 4, table)
    assert table.tolist() == [[[7, -1, -1], [-1, -1, -1]], [[3, 9, 0], [4, 1, -1]]]
    assert taken.tolist() == [6] and taken.dtype == torch.int32


def test_to_the_last_block():
    table = torch.empty(1, 2, 2, dtype=torch.int32, device=DEVICE)
    assert allot_blocks(int32([[1, 2]]).long(), int32([5, 6]), 7, 2, table).tolist() == [2]
    assert table.tolist() == [[[5, -1], [6, -1]]]


def test_of_the_free_blocks_those_that_are_not_taken_may_be_any():
    table = torch.empty(1, 1, 2, dtype=torch.int32, device=DEVICE)
    assert allot_blocks(int32([[5]]), int32([2, 0, -1, 2, 99]), 3, 4, table).tolist() == [2]
    assert table.tolist() == [[[2, 0]]]


@pytest.mark.skipif(DEVICE != "cpu", reason="asserted on the device")
@pytest.mark.parametrize(
    ("counts", "free", "message"),
    [([[5, 4]], [1, 2], "free is .*expected enough blocks for the kept tokens, more than these 2"),
     ([[5, 4]], [1, 2, 6], "free is .*expected blocks from 0 to 5"),
     ([[5, 4]], [1, -1, 2], "free is .*expected blocks from 0 to 5"),
     ([[5, 4]], [1, 2, 1], "free is .*expected no block twice"),
     ([[13, 0]], [1, 2, 3, 4], "counts is .*expected values from 0 to 12"),
     ([[-1, 0]], [1, 2, 3, 4], "counts is .*expected values from 0 to 12"),
     ([[1], [1]], [1, 2], "out has shape .*expected .2, 1, 'columns'.")],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_anything_is_written(counts, free, message):
    table = torch.full((1, 2, 3), 42, dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        allot_blocks(int32(counts), int32(free), 6, 4, table)
    assert (table == 42).all()

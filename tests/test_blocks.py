"""Blocks for heads of unequal length."""

import pytest
import torch
from conftest import DEVICE

from kvevict.backends import reference, triton
from kvevict.paged.blocks import allot_blocks


def int32(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def test_by_hand():
    table = torch.empty(2, 2, 3, dtype=torch.int32, device=DEVICE)
    taken = allot_blocks(int32([[4, 0], [9, 5]]), int32([7, 3, 9, 0, 4, 1, 8]), 4, table)
    assert table.tolist() == [[[7, -1, -1], [-1, -1, -1]], [[3, 9, 0], [4, 1, -1]]]
    assert taken.tolist() == [6] and taken.dtype == torch.int32


def test_to_the_last_block():
    table = torch.empty(1, 2, 2, dtype=torch.int32, device=DEVICE)
    assert allot_blocks(int32([[1, 2]]).long(), int32([5, 6]), 2, table).tolist() == [2]
    assert table.tolist() == [[[5, -1], [6, -1]]]


@pytest.mark.skipif(DEVICE != "cpu", reason="asserted on the device")
@pytest.mark.parametrize(
    ("counts", "free", "message"),
    [([[5, 4]], [1, 2], "taken is .*expected at most 2, the free blocks"),
     ([[13, 0]], [1, 2, 3, 4], "counts is .*expected values from 0 to 12"),
     ([[-1, 0]], [1, 2, 3, 4], "counts is .*expected values from 0 to 12"),
     ([[1], [1]], [1, 2], "out has shape .*expected .2, 1, 'columns'.")],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_anything_is_written(counts, free, message):
    table = torch.full((1, 2, 3), 42, dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        allot_blocks(int32(counts), int32(free), 4, table)
    assert (table == 42).all()


@pytest.mark.parametrize("backend", [reference, triton], ids=["reference", "triton"])
def test_a_dense_cache_cut_into_pages_per_head(backend):
    """Unequal heads, one with nothing: counts, then blocks, then one copy. No block without a token is touched."""
    B, H, S, n, D, block_size = 2, 3, 30, 12, 16, 4
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(B, H, S, D, generator=generator).to(DEVICE) for _ in range(2))
    counts = int32([[12, 0, 5], [4, 8, 1]])
    slots = torch.stack([torch.randperm(S, generator=generator)[:n].sort()[0] for _ in range(B * H)]).view(B, H, n)
    slots = slots.to(DEVICE).masked_fill(torch.arange(n, device=DEVICE) >= counts[..., None], -1)
    free = torch.randperm(20, generator=generator).int().to(DEVICE)
    table = torch.empty(B, H, 3, dtype=torch.int32, device=DEVICE)
    taken = int(allot_blocks(counts, free, block_size, table))
    assert taken == 3 + 0 + 2 + 1 + 2 + 1
    pages = [torch.full((20, 1, block_size, D), 7.0, device=DEVICE) for _ in range(2)]
    backend.copy_rows(keys, values, slots, *pages, None, table)
    for rows, cache in zip((keys, values), pages, strict=True):
        for b in range(B):
            for h in range(H):
                for j in range(int(counts[b, h])):
                    found = cache[table[b, h, j // block_size], 0, j % block_size]
                    assert torch.equal(found, rows[b, h, slots[b, h, j]])
        assert (cache == 7.0).sum() == cache.numel() - int(counts.sum()) * D
        assert (cache[free[taken:].long()] == 7.0).all()

"""Blocks for heads of unequal length, allotted on the device and filled from a dense cache, without a host read: a CUDA
graph can hold it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvevict import ops, validate
from kvevict.paged.ops import _heads_first


class PagedRows(NamedTuple):
    """Heads of unequal length in a paged cache: what the paged ops take beside it."""

    block_tables: Tensor  # [B, H, columns] int32, -1 behind a head's blocks
    lengths: Tensor  # [B, H] int32
    taken: Tensor  # [1] int32: so many blocks were taken, from the front of the free ones


def allot_blocks(counts: Tensor, free: Tensor, num_blocks: int, block_size: int, out: Tensor) -> Tensor:
    """Fill a block table with blocks for each head's tokens, from the front of a list of free blocks.

    Args:
        counts: [B, H] int32 or int64, tokens of each head, from 0 to columns · block_size.
        free: [F] int32, the free blocks' numbers; those that are not taken may be any.
        num_blocks: blocks of the cache.
        block_size: tokens in a block.
        out: [B, H, columns] int32, written: ceil(count / block_size) blocks for each head, in row order, -1 behind.

    Returns:
        [1] int32: how many blocks were taken; free[taken:] are still free.

    Raises:
        TypeError, ValueError: wrong types or shapes; counts beyond the table, too few free blocks, one that the cache
            lacks or that is there twice (on a GPU these are asserted on the device, ahead of the first write).
    """
    counts = validate.tensor("counts", counts, 2, (torch.int32, torch.int64))
    free = validate.tensor("free", free, 1, (torch.int32,), counts)
    out = validate.tensor("out", out, 3, (torch.int32,), counts)
    validate.integer("num_blocks", num_blocks, 1)
    validate.integer("block_size", block_size, 1)
    if out.shape[:2] != counts.shape:
        raise ValueError(f"out has shape {tuple(out.shape)}: expected {(*counts.shape, 'columns')}, as counts have")
    taken = torch.empty(1, dtype=torch.int32, device=counts.device)
    torch.ops.kvevict.allot_blocks(counts, free, num_blocks, block_size, out, taken)
    return taken


def compact_to_pages(
    keys: Tensor,
    values: Tensor,
    indices: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    free: Tensor,
    *,
    columns: int | None = None,
) -> PagedRows:
    """Copy the rows of the kept tokens out of a dense cache into free blocks, as many for each head as it needs.

    The dense cache stays as it is. Blocks that are not taken are not written, nor is a block behind its last token.

    Args:
        keys, values: [B, H, S, D], [B, H, S, Dv], any strides with a contiguous last dimension.
        indices: [B, H, m] int64, strictly ascending, -1 only as padding at a row's end; a head may keep nothing.
        key_cache, value_cache: [num_blocks, block_size, 1, D] and [..., Dv], of the dtype of keys.
        free: [F] int32, numbers of free blocks; those that are not taken may be any.
        columns: of the block table; None is ceil(m / block_size).

    Returns:
        PagedRows.

    Raises:
        TypeError, ValueError: see kvevict.ops; too few free blocks or columns; a free block that the cache lacks or
            that is there twice; caches that share memory. Values of tensors on a GPU are asserted on the device.
    """
    cache = ops._dense(keys, None, values, validate.ROW_DTYPES)
    indices = ops._indices(indices, cache)
    for name, rows, pages in (("key_cache", keys, key_cache), ("value_cache", values, value_cache)):
        validate.tensor(name, pages, 4, (keys.dtype,), keys)
        if pages.shape[2:] != (1, rows.shape[3]):
            raise ValueError(
                f"{name} has shape {tuple(pages.shape)}: expected (num_blocks, block_size, 1, {rows.shape[3]})"
            )
    new_keys = _heads_first("key_cache", key_cache, (keys.dtype,))
    new_values = _heads_first("value_cache", value_cache, (keys.dtype,), new_keys)
    num_blocks, block_size = key_cache.shape[:2]
    B, H, m = indices.shape
    if columns is None:
        columns = -(-m // block_size)
    validate.integer("columns", columns, 1)

    counts = (indices >= 0).sum(-1, dtype=torch.int32)
    table = torch.empty((B, H, columns), dtype=torch.int32, device=keys.device)
    taken = allot_blocks(counts, free, num_blocks, block_size, table)
    torch.ops.kvevict.copy_rows(keys, values, indices, None, False, new_keys, new_values, table)
    return PagedRows(table, counts, taken)

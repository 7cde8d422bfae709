"""Blocks for heads of unequal length, allotted on the device without a host read: a CUDA graph can hold it."""

from __future__ import annotations

import torch
from torch import Tensor

from kvevict import validate


def allot_blocks(counts: Tensor, free: Tensor, block_size: int, out: Tensor) -> Tensor:
    """Fill a block table with blocks for each head's tokens, from the front of a list of free blocks.

    Args:
        counts: [B, H] int32 or int64, tokens of each head, from 0 to columns · block_size.
        free: [F] int32, the free blocks' numbers.
        block_size: tokens in a block.
        out: [B, H, columns] int32, written: ceil(count / block_size) blocks for each head, in row order, -1 behind.

    Returns:
        [1] int32: how many blocks were taken; free[taken:] are still free.

    Raises:
        TypeError, ValueError: wrong types or shapes; counts beyond the table, too few free blocks (on a GPU both are
        asserted on the device, ahead of the first write).
    """
    counts = validate.tensor("counts", counts, 2, (torch.int32, torch.int64))
    free = validate.tensor("free", free, 1, (torch.int32,), counts)
    out = validate.tensor("out", out, 3, (torch.int32,), counts)
    validate.integer("block_size", block_size, 1)
    if out.shape[:2] != counts.shape:
        raise ValueError(f"out has shape {tuple(out.shape)}: expected {(*counts.shape, 'columns')}, as counts have")
    validate.no_internal_overlap("out", out)
    columns = out.shape[2]
    most = columns * block_size
    validate.require(((counts >= 0) & (counts <= most)).all(), "counts", counts, f"values from 0 to {most}")

    needed = (counts.long() + block_size - 1) // block_size
    ends = needed.flatten().cumsum(0).view_as(needed)
    taken = ends[-1, -1:]
    validate.require((taken <= free.shape[0]).all(), "taken", taken, f"at most {free.shape[0]}, the free blocks")

    column = torch.arange(columns, device=counts.device)
    blocks = free[((ends - needed)[..., None] + column).clamp(max=free.shape[0] - 1)]
    out.copy_(torch.where(column < needed[..., None], blocks, -1))
    return taken.int()

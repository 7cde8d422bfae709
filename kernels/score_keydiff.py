"""KeyDiff scores: -cos(key, anchor), where the anchor is the mean of a head's keys (arXiv 2504.15364, eq. 4).

    partial_anchor_kernel   [rows, splits, D] float32: each program sums one run of a row's (unit) keys
    keydiff_scores_kernel   [B, H, S] float32: each program adds up the partial sums of its row, divides by the
                            number of tokens, and scores its own run of keys
    keydiff_row_kernel      both in one launch, a program per row: short rows, or more rows than the device has room for

Shapes: keys [B, H, S, D], dense or paged (rows.py); a row is one (batch, head).
Bytes per row, e per element: K is read twice, 2·S·D·e, or once when the caller gives the anchor. The second pass
walks the rows and their tokens from the end, where the first one stopped, so that it finds the end of K in L2.
Beside K: 4·S of scores, and the partial sums, splits·4D written and splits²·4D read from L2.
Launch: rows × splits programs each, twice; rows programs once where splits is 1. Splits do not depend on values, so the
order of every sum is fixed.
"""

import torch
import triton
import triton.language as tl

from .launch_config import multiprocessors, score_config
from .primitives import row_pointers
from .rows import cache_shape, load_float32, per_row, row_length, rows_at, rows_of

_LENGTH_DEPENDENT = ["S", "H", "splits", "chunk"]


@triton.jit
def _sum_keys(
    keys, b, h, begin, end, columns, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, UNIT: tl.constexpr
):  # fmt: skip
    """[BLOCK_D]: the sum of the (unit) keys of tokens [begin, end)."""
    total = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_S):
        tokens = start + tl.arange(0, BLOCK_S)
        here = tokens < end
        key = load_float32(keys, rows_at(keys, b, h, tokens, here), here, columns)
        if UNIT:
            norm = tl.sqrt_rn(tl.sum(key * key, 1))
            key = key * (1.0 / tl.maximum(norm, 1e-12))[:, None]
        total += key
    return tl.sum(total, 0)


@triton.jit
def _score_keys(keys, scores_ptr, b, h, begin, end, length, anchor, columns, BLOCK_S: tl.constexpr):
    """Write the scores of tokens [begin, end) of a row with that many valid tokens."""
    anchor_norm = tl.maximum(tl.sqrt_rn(tl.sum(anchor * anchor, 0)), 1e-8)
    for start in range(begin, end, BLOCK_S):
        tokens = start + tl.arange(0, BLOCK_S)
        here = tokens < tl.minimum(end, length)
        key = load_float32(keys, rows_at(keys, b, h, tokens, here), here, columns)
        norm = tl.maximum(tl.sqrt_rn(tl.sum(key * key, 1)), 1e-8)
        score = -tl.sum(key * anchor[None, :], 1) / (norm * anchor_norm)
        score = tl.where(tokens < length, score, float("-inf"))
        tl.store(scores_ptr + tokens, score, mask=tokens < end)


@triton.jit(do_not_specialize=["S", "H"])
def keydiff_row_kernel(
    keys, lengths, scores_ptr, S, H, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, UNIT: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, h = row // H, row % H
    length = row_length(lengths, b, h, S)
    columns = tl.arange(0, BLOCK_D)
    anchor = _sum_keys(keys, b, h, 0, length, columns, BLOCK_D, BLOCK_S, UNIT) / length.to(tl.float32)
    _score_keys(keys, scores_ptr + row * S, b, h, 0, S, length, anchor, columns, BLOCK_S)


@triton.jit(do_not_specialize=_LENGTH_DEPENDENT)
def partial_anchor_kernel(
    keys, lengths, partial_ptr, S, H, splits, chunk,
    BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // splits).to(tl.int64)
    split = tl.program_id(0) % splits
    b, h = row // H, row % H
    begin = split * chunk
    end = tl.minimum(begin + chunk, row_length(lengths, b, h, S))
    columns = tl.arange(0, BLOCK_D)
    total = _sum_keys(keys, b, h, begin, end, columns, BLOCK_D, BLOCK_S, UNIT)
    tl.store(partial_ptr + (row * splits + split) * keys.width + columns, total, mask=columns < keys.width)


@triton.jit(do_not_specialize=_LENGTH_DEPENDENT + ["anchor_splits"])
def keydiff_scores_kernel(
    keys, lengths, anchor_ptr, scores_ptr, S, H, splits, chunk, anchor_splits,
    BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    row = (program // splits).to(tl.int64)
    split = program % splits
    b, h = row // H, row % H
    length = row_length(lengths, b, h, S)
    columns = tl.arange(0, BLOCK_D)

    GROUP: tl.constexpr = 8  # partial sums loaded together: 8 loads in flight, few registers at any head_dim
    sums = tl.zeros([GROUP, BLOCK_D], tl.float32)
    for start in range(0, anchor_splits, GROUP):
        parts = start + tl.arange(0, GROUP)
        mask = (parts < anchor_splits)[:, None] & (columns < keys.width)[None, :]
        pointers = row_pointers(anchor_ptr + row * anchor_splits * keys.width, parts, keys.width, columns)
        sums += tl.load(pointers, mask=mask, other=0.0)
    anchor = tl.sum(sums, 0)
    if MEAN:
        anchor = anchor / length.to(tl.float32)
    begin = split * chunk
    end = tl.minimum(begin + chunk, S)
    _score_keys(keys, scores_ptr + row * S, b, h, begin, end, length, anchor, columns, BLOCK_S)


def keydiff_scores(
    keys: torch.Tensor,
    anchor: torch.Tensor | None,
    unit: bool,
    lengths: torch.Tensor | None,
    out: torch.Tensor,
    table: torch.Tensor | None = None,
) -> None:
    """Fill out [B, H, S] float32 with -cos(key, anchor); -inf at and beyond a row's length.

    anchor [B, H, D], or None for the mean of the keys (`unit`: of the keys over their norms).
    """
    B, H, S, D = cache_shape(keys, table)
    config = score_config(B * H, S, D, multiprocessors(keys.device))
    tile = dict(BLOCK_D=config.block_dim, BLOCK_S=config.block_tokens, num_warps=config.num_warps)
    rows, lengths = rows_of(keys, table), per_row(lengths)
    if anchor is None and config.splits == 1:
        keydiff_row_kernel[(B * H,)](rows, lengths, out, S, H, UNIT=unit, **tile)
        return
    grid, split = (B * H * config.splits,), (config.splits, config.chunk)
    if anchor is None:
        partial = torch.empty((B * H, config.splits, D), dtype=torch.float32, device=keys.device)
        partial_anchor_kernel[grid](rows, lengths, partial, S, H, *split, UNIT=unit, **tile)
    else:
        partial = anchor.to(torch.float32).reshape(B * H, 1, D).contiguous()
    keydiff_scores_kernel[grid](
        rows, lengths, partial, out, S, H, *split, partial.shape[1], MEAN=anchor is None, **tile
    )

"""KeyDiff scores: -cos(key, anchor), where the anchor is the mean of a head's keys (arXiv 2504.15364, eq. 4).

    partial_anchor_kernel   [rows, splits, D] float32: each program sums one run of a row's (unit) keys
    keydiff_scores_kernel   [B, H, S] float32: each program adds up the partial sums of its row, divides by the
                            number of tokens, and scores its own run of keys
    keydiff_row_kernel      both in one launch, a program per row: short rows, or more rows than the device has room for

Shapes: keys [B, H, S, D], any strides with a contiguous last dimension, or paged [blocks, H, block_size, D] under a
block table; a row is one (batch, head).
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
from .primitives import PAGING, cache_shape, paging, plain_bytes, row_length, row_pointers, to_float32, token_pointers

_LENGTH_DEPENDENT = ["S", "H", "splits", "chunk", *PAGING]


@triton.jit
def _sum_keys(
    keys_ptr, table_ptr, table_stride, block_size, b, h, begin, end, stride_b, stride_h, stride_s, columns, inside,
    BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, UNIT: tl.constexpr, DECODE_E4M3: tl.constexpr,
):  # fmt: skip
    """[BLOCK_D]: the sum of the (unit) keys of tokens [begin, end)."""
    total = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_S):
        tokens = start + tl.arange(0, BLOCK_S)
        here = tokens < end
        pointers = token_pointers(
            keys_ptr, table_ptr, table_stride, block_size, b, h, tokens, here, stride_b, stride_h, stride_s, columns
        )
        key = tl.load(pointers, mask=here[:, None] & inside[None, :], other=0.0)
        key = to_float32(key, DECODE_E4M3)
        if UNIT:
            norm = tl.sqrt_rn(tl.sum(key * key, 1))
            key = key * (1.0 / tl.maximum(norm, 1e-12))[:, None]
        total += key
    return tl.sum(total, 0)


@triton.jit
def _score_keys(
    keys_ptr, table_ptr, table_stride, block_size, scores_ptr, b, h, begin, end, length, stride_b, stride_h, stride_s,
    anchor, columns, inside, BLOCK_S: tl.constexpr, DECODE_E4M3: tl.constexpr,
):  # fmt: skip
    """Write the scores of tokens [begin, end) of a row with that many valid tokens."""
    anchor_norm = tl.maximum(tl.sqrt_rn(tl.sum(anchor * anchor, 0)), 1e-8)
    for start in range(begin, end, BLOCK_S):
        tokens = start + tl.arange(0, BLOCK_S)
        here = tokens < tl.minimum(end, length)
        pointers = token_pointers(
            keys_ptr, table_ptr, table_stride, block_size, b, h, tokens, here, stride_b, stride_h, stride_s, columns
        )
        key = tl.load(pointers, mask=here[:, None] & inside[None, :], other=0.0)
        key = to_float32(key, DECODE_E4M3)
        norm = tl.maximum(tl.sqrt_rn(tl.sum(key * key, 1)), 1e-8)
        score = -tl.sum(key * anchor[None, :], 1) / (norm * anchor_norm)
        score = tl.where(tokens < length, score, float("-inf"))
        tl.store(scores_ptr + tokens, score, mask=tokens < end)


@triton.jit(do_not_specialize=["S", "H", *PAGING])
def keydiff_row_kernel(
    keys_ptr, table_ptr, lengths_ptr, scores_ptr, S, H, table_stride, block_size, stride_b, stride_h, stride_s,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, UNIT: tl.constexpr, DECODE_E4M3: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, h = row // H, row % H
    length = row_length(lengths_ptr, b, S)
    columns = tl.arange(0, BLOCK_D)
    inside = columns < D
    anchor = _sum_keys(
        keys_ptr, table_ptr, table_stride, block_size, b, h, 0, length, stride_b, stride_h, stride_s, columns, inside,
        BLOCK_D, BLOCK_S, UNIT, DECODE_E4M3,
    ) / length.to(tl.float32)  # fmt: skip
    _score_keys(
        keys_ptr, table_ptr, table_stride, block_size, scores_ptr + row * S, b, h, 0, S, length,
        stride_b, stride_h, stride_s, anchor, columns, inside, BLOCK_S, DECODE_E4M3,
    )  # fmt: skip


@triton.jit(do_not_specialize=_LENGTH_DEPENDENT)
def partial_anchor_kernel(
    keys_ptr, table_ptr, lengths_ptr, partial_ptr, S, H, table_stride, block_size,
    stride_b, stride_h, stride_s, splits, chunk,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, UNIT: tl.constexpr, DECODE_E4M3: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // splits).to(tl.int64)
    split = tl.program_id(0) % splits
    b, h = row // H, row % H
    begin = split * chunk
    end = tl.minimum(begin + chunk, row_length(lengths_ptr, b, S))
    columns = tl.arange(0, BLOCK_D)
    inside = columns < D
    total = _sum_keys(
        keys_ptr, table_ptr, table_stride, block_size, b, h, begin, end, stride_b, stride_h, stride_s, columns, inside,
        BLOCK_D, BLOCK_S, UNIT, DECODE_E4M3,
    )  # fmt: skip
    tl.store(partial_ptr + (row * splits + split) * D + columns, total, mask=inside)


@triton.jit(do_not_specialize=_LENGTH_DEPENDENT + ["anchor_splits"])
def keydiff_scores_kernel(
    keys_ptr, table_ptr, lengths_ptr, anchor_ptr, scores_ptr, S, H, table_stride, block_size,
    stride_b, stride_h, stride_s, splits, chunk, anchor_splits,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, MEAN: tl.constexpr, DECODE_E4M3: tl.constexpr,
):  # fmt: skip
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    row = (program // splits).to(tl.int64)
    split = program % splits
    b, h = row // H, row % H
    length = row_length(lengths_ptr, b, S)
    columns = tl.arange(0, BLOCK_D)
    inside = columns < D

    GROUP: tl.constexpr = 8  # partial sums loaded together: 8 loads in flight, few registers at any head_dim
    sums = tl.zeros([GROUP, BLOCK_D], tl.float32)
    for start in range(0, anchor_splits, GROUP):
        parts = start + tl.arange(0, GROUP)
        mask = (parts < anchor_splits)[:, None] & inside[None, :]
        sums += tl.load(row_pointers(anchor_ptr + row * anchor_splits * D, parts, D, columns), mask=mask, other=0.0)
    anchor = tl.sum(sums, 0)
    if MEAN:
        anchor = anchor / length.to(tl.float32)
    begin = split * chunk
    end = tl.minimum(begin + chunk, S)
    _score_keys(
        keys_ptr, table_ptr, table_stride, block_size, scores_ptr + row * S, b, h, begin, end, length,
        stride_b, stride_h, stride_s, anchor, columns, inside, BLOCK_S, DECODE_E4M3,
    )  # fmt: skip


def keydiff_scores(
    keys: torch.Tensor,
    anchor: torch.Tensor | None,
    unit: bool,
    lengths: torch.Tensor | None,
    out: torch.Tensor,
    table: torch.Tensor | None = None,
) -> None:
    """Fill out [B, H, S] float32 with -cos(key, anchor); -inf at and beyond a row's length.

    keys [B, H, S, D], or [blocks, H, block_size, D] under a block table [B, columns] int32.
    anchor [B, H, D], or None for the mean of the keys (`unit`: of the keys over their norms).
    """
    B, H, S, D = cache_shape(keys, table)
    config = score_config(B * H, S, D, multiprocessors(keys.device))
    grid = (B * H * config.splits,)
    strides = (*paging(keys, table), *keys.stride()[:3])
    keys, decode = plain_bytes(keys)
    tile = dict(D=D, BLOCK_D=config.block_dim, BLOCK_S=config.block_tokens, DECODE_E4M3=decode)

    if anchor is None and config.splits == 1:
        keydiff_row_kernel[(B * H,)](
            keys, table, lengths, out, S, H, *strides, UNIT=unit, num_warps=config.num_warps, **tile
        )  # fmt: skip
        return
    if anchor is None:
        partial = torch.empty((B * H, config.splits, D), dtype=torch.float32, device=keys.device)
        partial_anchor_kernel[grid](
            keys, table, lengths, partial, S, H, *strides, config.splits, config.chunk,
            UNIT=unit, num_warps=config.num_warps, **tile,
        )  # fmt: skip
    else:
        partial = anchor.to(torch.float32).reshape(B * H, 1, D).contiguous()
    keydiff_scores_kernel[grid](
        keys, table, lengths, partial, out, S, H, *strides, config.splits, config.chunk, partial.shape[1],
        MEAN=anchor is None, num_warps=config.num_warps, **tile,
    )  # fmt: skip

"""The most attention that any of the last queries gives a token or its neighbours (DefensiveKV, arXiv 2510.13334).

    row_sums_kernel   [splits, B, Hq, W, 2] float32: over one run of the keys, the sum of each query's weights, and what
                      their average over neighbours adds up to
    peaks_kernel      [B, H, S]: each program averages the weights of a block of tokens over their neighbours, scales
                      every row of them back to its own sum, and keeps the largest

Only the n = length - W tokens before the queries' own count, which all queries see; beyond them neighbours are 0.

Shapes: queries [B, Hq, W, D], the last W; keys [B, H, S, D], any strides (rows.py); the G query heads of a KV head are
one matrix of W·G rows, as in score_attention.py.
Bytes per (batch, KV head): K once for the sums and once for the peaks, there `pool` times from L1; Q again for every
block of keys, from L2; 4·S of peaks. Operations: 2·D per (query, key) pair, and 2·D·pool, on tensor cores in 16 bits.
Launch: one program per block of queries and run of keys; one per block of keys.
"""

import torch
import triton
import triton.language as tl

from .launch_config import cdiv, lse_config, multiprocessors, peaks_config
from .primitives import dot_type
from .rows import per_row, row_length, rows_at, rows_of
from .score_attention import group_rows_at, load_tile, product

_LOG2_E = tl.constexpr(1.4426950408889634)
_LENGTH_DEPENDENT = ["W", "S", "H"]


@triton.jit(do_not_specialize=[*_LENGTH_DEPENDENT, "row_blocks", "splits", "chunk"])
def row_sums_kernel(
    queries, keys, lse_ptr, lengths, sums_ptr, scale, W, S, H, row_blocks, splits, chunk,
    G: tl.constexpr, POOL: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    row_count = tl.num_programs(0) // splits // row_blocks
    split = tl.program_id(0) % splits
    row = (tl.program_id(0) // splits % row_count).to(tl.int64)
    b, h = row // H, row % H
    length = row_length(lengths, b, h, S)
    n = tl.maximum(length - W, 0)
    rows = tl.program_id(0) // splits // row_count * BLOCK_R + tl.arange(0, BLOCK_R)
    is_query = rows < tl.minimum(W, length) * G
    pointers = group_rows_at(queries, b, h, rows, is_query, G)
    query = load_tile(queries, pointers, is_query, tl.arange(0, BLOCK_D), COMPUTE)
    of_row = (row * G + rows % G) * W + rows // G
    lse = tl.load(lse_ptr + of_row, mask=is_query, other=float("inf")) * _LOG2_E  # padding weighs 0

    begin = split * chunk
    end = tl.minimum(begin + chunk, n)
    total, pooled = tl.zeros([BLOCK_R], tl.float32), tl.zeros([BLOCK_R], tl.float32)
    for start in range(begin, end, BLOCK_S):
        tokens = start + tl.arange(0, BLOCK_S)
        inside = tokens < end
        key_pointers = rows_at(keys, b, h, tokens, inside)
        logits = scale * product(query, queries, pointers, is_query, keys, key_pointers, inside, BLOCK_D, COMPUTE)
        weights = tl.where(inside[None, :], tl.exp2(logits - lse[:, None]), 0.0)
        shares = tl.minimum(tokens + POOL // 2, n - 1) - tl.maximum(tokens - POOL // 2, 0) + 1
        total += tl.sum(weights, 1)
        pooled += tl.sum(weights * (shares.to(tl.float32) / POOL)[None, :], 1)
    sums_ptr += (split * row_count * G * W + of_row) * 2
    tl.store(sums_ptr, total, mask=rows < W * G)
    tl.store(sums_ptr + 1, pooled, mask=rows < W * G)


@triton.jit(do_not_specialize=_LENGTH_DEPENDENT)
def peaks_kernel(
    queries, keys, lse_ptr, rescale_ptr, lengths, out_ptr, scale, W, S, H,
    G: tl.constexpr, POOL: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(S, BLOCK_S)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = row // H, row % H
    length = row_length(lengths, b, h, S)
    n = tl.maximum(length - W, 0)
    first = tl.program_id(0) % blocks * BLOCK_S
    tokens = first + tl.arange(0, BLOCK_S)
    columns = tl.arange(0, BLOCK_D)
    most = tl.zeros([BLOCK_S, BLOCK_R], tl.float32)
    for start in range(0, tl.where(first < n, tl.minimum(W, length) * G, 0), BLOCK_R):
        rows = start + tl.arange(0, BLOCK_R)
        is_query = rows < tl.minimum(W, length) * G
        pointers = group_rows_at(queries, b, h, rows, is_query, G)
        of_row = (row * G + rows % G) * W + rows // G
        lse = tl.load(lse_ptr + of_row, mask=is_query, other=float("inf")) * _LOG2_E
        rescale = tl.load(rescale_ptr + of_row, mask=is_query, other=0.0)
        pooled = tl.zeros([BLOCK_S, BLOCK_R], tl.float32)
        for shift in range(0, POOL):
            neighbours = tokens + (shift - POOL // 2)
            there = (neighbours >= 0) & (neighbours < n)
            key_pointers = rows_at(keys, b, h, neighbours, there)
            key = load_tile(keys, key_pointers, there, columns, COMPUTE)
            logits = scale * product(key, keys, key_pointers, there, queries, pointers, is_query, BLOCK_D, COMPUTE)
            pooled += tl.where(there[:, None], tl.exp2(logits - lse[None, :]), 0.0)
        most = tl.maximum(most, pooled * rescale[None, :] / POOL, propagate_nan=tl.PropagateNan.ALL)
    peak = tl.where(tl.sum((most != most).to(tl.int32), 1) > 0, float("nan"), tl.max(most, 1))  # tl.max drops NaN
    tl.store(out_ptr + row * S + tokens, tl.where(tokens < n, peak, float("-inf")), mask=tokens < S)


def attention_peaks(
    queries: torch.Tensor,
    keys: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    pool: int,
    lengths: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Fill out [B, H, S] float32 with the largest of the group's pooled rows of attention; -inf for the queries' own
    tokens and beyond. lse [B, Hq, W] float32, contiguous; pool: odd."""
    (B, HQ, W, _), (_, H, S, D) = queries.shape, keys.shape
    G = HQ // H
    compute, size = dot_type(queries)
    config = lse_config(B * H, W * G, S, D, size, multiprocessors(keys.device))
    row_blocks = cdiv(W * G, config.block_rows)
    where = rows_of(queries), rows_of(keys)
    sums = torch.empty((config.splits, B, HQ, W, 2), dtype=torch.float32, device=keys.device)
    row_sums_kernel[(B * H * row_blocks * config.splits,)](
        *where, lse, per_row(lengths), sums, scale * _LOG2_E.value, W, S, H, row_blocks, config.splits, config.chunk,
        G=G, POOL=pool, BLOCK_D=config.block_dim, BLOCK_R=config.block_rows, BLOCK_S=config.block_tokens,
        COMPUTE=compute, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    total, pooled = sums.sum(0).unbind(-1)
    rescale = total / pooled.clamp(min=1e-30)
    config = peaks_config(W * G, D, size)
    peaks_kernel[(B * H * cdiv(S, config.block_tokens),)](
        *where, lse, rescale, per_row(lengths), out, scale * _LOG2_E.value, W, S, H,
        G=G, POOL=pool, BLOCK_D=config.block_dim, BLOCK_R=config.block_rows, BLOCK_S=config.block_tokens,
        COMPUTE=compute, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip

"""One decode step of attention that also tracks which tokens it used (flash decoding).

    decode_run_kernel    each program attends one run of the tokens: unnormalised output, maximum and sum per query
                         head; and, to track, the logits [B, Hq, S] float32, which the last kernel reads from L2
    merge_decode_kernel  [B, Hq, 1, Dv]: the runs of a query merged, and each query's LSE [B, Hq]
    track_kernel         mass ← decay · mass + mean weight over the GQA group; last_used ← step where that mean
                         reaches the threshold

Shapes: queries [B, Hq, 1, D], keys [B, H, S, D], values [B, H, S, Dv], dense or paged (rows.py); mass [B, H, S] float32
and last_used [B, H, S] int32, rows contiguous. The G = Hq/H queries of a KV head are one tile, padded to 16 rows, so K
and V are read once.
Bytes per (batch, KV head): (D + Dv)·S·e; to track, 4·G·S of logits written and read (in L2), 8·S of mass, 4·S of
last_used where written. Beside that, splits · G · (Dv + 2) floats of partial results.
Launch: runs × (batch, KV head), then 1 program per (batch, KV head), then one per 1,024 tokens if anything is tracked.
"""

import torch
import triton
import triton.language as tl

from .launch_config import cdiv, decode_config, multiprocessors
from .primitives import dot_type, row_pointers
from .rows import cache_shape, per_row, row_length, rows_at, rows_of
from .score_attention import _LOG2_E, group_rows_at, load_tile, product

_LENGTH_DEPENDENT = ["S", "H", "splits", "chunk"]
_MASS_STRIDES = ["mass_stride_b", "mass_stride_h", "used_stride_b", "used_stride_h"]


@triton.jit(do_not_specialize=_LENGTH_DEPENDENT)
def decode_run_kernel(
    queries, keys, values, lengths, logits_ptr, sums_ptr, best_ptr, total_ptr, scale, S, H, splits, chunk,
    G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    VALUE_BLOCKS: tl.constexpr = (values.width + BLOCK_DV - 1) // BLOCK_DV
    value_block = tl.program_id(0) % VALUE_BLOCKS
    split = tl.program_id(0) // VALUE_BLOCKS % splits
    row = (tl.program_id(0) // VALUE_BLOCKS // splits).to(tl.int64)
    b, h = row // H, row % H
    begin = split * chunk
    end = tl.minimum(begin + chunk, row_length(lengths, b, h, S))
    heads = tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_D)
    value_columns = value_block * BLOCK_DV + tl.arange(0, BLOCK_DV)

    in_group = heads < G
    query_pointers = group_rows_at(queries, b, h, heads, in_group, G)
    query = load_tile(queries, query_pointers, in_group, columns, COMPUTE)

    best = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    sums = tl.zeros([BLOCK_R, BLOCK_DV], tl.float32)
    for start in range(begin, end, BLOCK_S):
        tokens = start + tl.arange(0, BLOCK_S)
        inside = tokens < end
        logits = scale * product(
            query,
            queries,
            query_pointers,
            in_group,
            keys,
            rows_at(keys, b, h, tokens, inside),
            inside,
            BLOCK_D,
            COMPUTE,
        )
        if logits_ptr is not None:
            pointers = row_pointers(logits_ptr + row * G * S, heads, S, tokens)
            tl.store(pointers, logits, mask=in_group[:, None] & inside[None, :] & (value_block == 0))
        logits = tl.where(inside[None, :], logits, float("-inf"))
        best_after = tl.maximum(best, tl.max(logits, 1))
        weights = tl.exp2(logits - best_after[:, None])
        shrink = tl.exp2(best - best_after)
        total = total * shrink + tl.sum(weights, 1)
        value = load_tile(values, rows_at(values, b, h, tokens, inside), inside, value_columns, COMPUTE)
        sums = tl.dot(weights.to(COMPUTE), value, sums * shrink[:, None], input_precision="ieee")
        best = best_after

    part = (row * splits + split) * G + heads
    tl.store(best_ptr + part, best, mask=in_group & (value_block == 0))
    tl.store(total_ptr + part, total, mask=in_group & (value_block == 0))
    pointers = row_pointers(sums_ptr, part, values.width, value_columns)
    tl.store(pointers, sums, mask=in_group[:, None] & (value_columns < values.width)[None, :])


@triton.jit(do_not_specialize=["splits"])
def merge_decode_kernel(
    sums_ptr, best_ptr, total_ptr, out_ptr, lse_ptr, splits,
    G: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    query = tl.program_id(0).to(tl.int64)  # of B · Hq
    row, g = query // G, query % G
    columns = tl.arange(0, BLOCK_DV)
    best = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    sums = tl.zeros([BLOCK_DV], tl.float32)
    for split in range(0, splits):
        part = (row * splits + split) * G + g
        part_best = tl.load(best_ptr + part)
        best_after = tl.maximum(best, part_best)  # finite from the first run on: every request has a token in it
        grow, shrink = tl.exp2(part_best - best_after), tl.exp2(best - best_after)
        total = total * shrink + tl.load(total_ptr + part) * grow
        sums = sums * shrink + tl.load(sums_ptr + part * DV + columns, mask=columns < DV, other=0.0) * grow
        best = best_after
    tl.store(out_ptr + query * DV + columns, (sums / total).to(out_ptr.dtype.element_ty), mask=columns < DV)
    tl.store(lse_ptr + query, best + tl.log2(total))


@triton.jit(do_not_specialize=["S", "H", "blocks", "step", *_MASS_STRIDES])
def track_kernel(
    logits_ptr, lse_ptr, lengths, mass_ptr, last_used_ptr, decay, threshold, step, S, H, blocks,
    mass_stride_b, mass_stride_h, used_stride_b, used_stride_h, G: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = row // H, row % H
    tokens = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = tokens < row_length(lengths, b, h, S)
    weight = tl.zeros([BLOCK], tl.float32)
    for g in range(0, G):
        logits = tl.load(logits_ptr + (row * G + g) * S + tokens, mask=inside, other=0.0)
        weight += tl.exp2(logits - tl.load(lse_ptr + row * G + g))
    weight = weight / G
    if mass_ptr is not None:
        pointers = mass_ptr + b * mass_stride_b + h * mass_stride_h + tokens
        mass = tl.load(pointers, mask=inside, other=0.0)
        tl.store(pointers, mass * decay + weight, mask=inside)
    if last_used_ptr is not None:
        pointers = last_used_ptr + b * used_stride_b + h * used_stride_h + tokens
        tl.store(pointers, step + tl.zeros([BLOCK], tl.int32), mask=inside & (weight >= threshold))


def decode_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    lengths: torch.Tensor | None,
    mass: torch.Tensor | None,
    decay: float,
    last_used: torch.Tensor | None,
    step: int,
    threshold: float,
    out: torch.Tensor,
    table: torch.Tensor | None = None,
) -> None:
    """Fill out [B, Hq, 1, Dv] with softmax(scale · q·K) · V; update mass and last_used [B, H, S] where given."""
    HQ, DV, (B, H, S, D) = queries.shape[1], values.shape[3], cache_shape(keys, table)
    G, rows = HQ // H, B * H
    config = decode_config(rows, G, S, D, DV, queries.element_size(), multiprocessors(keys.device))

    def workspace(*shape):
        return torch.empty(shape, dtype=torch.float32, device=keys.device)

    logits = None if mass is None and last_used is None else workspace(B, HQ, S)
    sums = workspace(rows, config.splits, G, DV)
    best, total = workspace(2, rows, config.splits, G)
    lse = workspace(B, HQ)
    lengths = per_row(lengths)
    decode_run_kernel[(rows * config.splits * cdiv(DV, config.block_value_dim),)](
        rows_of(queries), rows_of(keys, table), rows_of(values, table), lengths, logits, sums, best, total,
        scale * _LOG2_E.value, S, H, config.splits, config.chunk,
        G=G, BLOCK_D=config.block_dim, BLOCK_DV=config.block_value_dim, BLOCK_R=config.block_rows,
        BLOCK_S=config.block_tokens, COMPUTE=dot_type(queries),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    merge_decode_kernel[(B * HQ,)](
        sums, best, total, out, lse, config.splits, G=G, DV=DV, BLOCK_DV=triton.next_power_of_2(DV),
    )  # fmt: skip
    if logits is not None:
        BLOCK = 1024  # 8 tokens a thread: enough loads in flight for a few floats a token
        blocks = cdiv(S, BLOCK)
        mass_strides = (0, 0) if mass is None else mass.stride()[:2]
        used_strides = (0, 0) if last_used is None else last_used.stride()[:2]
        track_kernel[(rows * blocks,)](
            logits, lse, lengths, mass, last_used, decay, threshold, step, S, H, blocks, *mass_strides, *used_strides,
            G=G, BLOCK=BLOCK,
        )  # fmt: skip

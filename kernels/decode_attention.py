"""Attention of a request's last W queries over its cache, which also tracks which tokens they used (flash decoding).

    decode_run_kernel    each program attends one run of the tokens: unnormalised output, maximum and sum per query row;
                         and, to track, the logits [B, H, W·G, S] float32, which the last kernel reads from L2
    merge_decode_kernel  [B, Hq, W, Dv]: the runs of a query merged, and each query's LSE [B, Hq, W]
    track_kernel         mass ← decay · mass + the queries' weights, mean over the GQA group; last_used ← step where one
                         of these means reaches the threshold

Shapes: queries [B, Hq, W, D], keys [B, H, S, D], values [B, H, S, Dv], dense or paged (rows.py); mass [B, H, S] float32
and last_used [B, H, S] int32, rows contiguous. The W·G queries of a KV head are the rows of a matrix as in
score_attention.py, padded to 16, so a decode step reads K and V once. Of a request of `length` tokens, query w belongs
to token max(length - W, 0) + w and sees no later one; rows beyond its last are padding: output 0, LSE -inf.
Bytes per (batch, KV head) and tile of rows: (D + Dv)·S·e; to track, 4·W·G·S of logits written and read (in L2), 8·S of
mass, 4·S of last_used where written. Beside that, splits · W · G · (Dv + 2) floats of partial results.
Launch: runs × tiles of rows × (batch, KV head), then 1 program per query, then one per 1,024 tokens to track. There are
runs for the longest row; those that lie behind a shorter one end at once, and are not merged.
"""

import torch
import triton
import triton.language as tl

from .launch_config import cdiv, decode_config, multiprocessors
from .primitives import dot_type, row_pointers
from .rows import cache_shape, per_row, row_length, rows_at, rows_of
from .score_attention import _LN_2, _LOG2_E, group_rows_at, load_tile, product

_LENGTH_DEPENDENT = ["S", "W", "H", "splits", "chunk", "row_blocks"]
_MASS_STRIDES = ["mass_stride_b", "mass_stride_h", "used_stride_b", "used_stride_h"]


@triton.jit(do_not_specialize=_LENGTH_DEPENDENT)
def decode_run_kernel(
    queries, keys, values, lengths, logits_ptr, sums_ptr, best_ptr, total_ptr,
    scale, W, S, H, splits, chunk, row_blocks,
    G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
    CAUSAL: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    VALUE_BLOCKS: tl.constexpr = (values.width + BLOCK_DV - 1) // BLOCK_DV
    value_block = tl.program_id(0) % VALUE_BLOCKS
    program = tl.program_id(0) // VALUE_BLOCKS
    split = program % splits
    row_block = program // splits % row_blocks
    row = (program // splits // row_blocks).to(tl.int64)
    b, h = row // H, row % H
    length = row_length(lengths, b, h, S)
    begin = split * chunk
    if begin >= length:  # the merge does not ask for it
        return
    offset = tl.maximum(length - W, 0)
    columns = tl.arange(0, BLOCK_D)
    value_columns = value_block * BLOCK_DV + tl.arange(0, BLOCK_DV)

    rows = row_block * BLOCK_R + tl.arange(0, BLOCK_R)
    own = rows // G  # the query that a row belongs to
    is_query = own < tl.minimum(W, length)
    query_pointers = group_rows_at(queries, b, h, rows, is_query, G)
    query = load_tile(queries, query_pointers, is_query, columns, COMPUTE)

    end = tl.minimum(begin + chunk, length)
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
            is_query,
            keys,
            rows_at(keys, b, h, tokens, inside),
            inside,
            BLOCK_D,
            COMPUTE,
        )
        visible = inside[None, :]
        if CAUSAL:
            visible = visible & (tokens[None, :] <= offset + own[:, None])
        logits = tl.where(visible, logits, float("-inf"))
        if logits_ptr is not None:
            if value_block == 0:
                pointers = row_pointers(logits_ptr + row * W * G * S, rows, S, tokens)
                tl.store(pointers, logits, mask=is_query[:, None] & inside[None, :])
        best_after = tl.maximum(best, tl.max(logits, 1))
        shift = best_after
        if CAUSAL:  # a row may have seen nothing yet: no -inf minus -inf
            shift = tl.where(best_after == float("-inf"), 0.0, best_after)
        weights = tl.exp2(logits - shift[:, None])
        shrink = tl.exp2(best - shift)
        total = total * shrink + tl.sum(weights, 1)
        value = load_tile(values, rows_at(values, b, h, tokens, inside), inside, value_columns, COMPUTE)
        sums = tl.dot(weights.to(COMPUTE), value, sums * shrink[:, None], input_precision="ieee")
        best = best_after

    in_group = rows < W * G
    part = (row * splits + split) * W * G + rows
    if value_block == 0:
        tl.store(best_ptr + part, tl.where(is_query, best, float("-inf")), mask=in_group)
        tl.store(total_ptr + part, tl.where(is_query, total, 0.0), mask=in_group)
    pointers = row_pointers(sums_ptr, part, values.width, value_columns)
    tl.store(pointers, sums, mask=in_group[:, None] & (value_columns < values.width)[None, :])


@triton.jit(do_not_specialize=["W", "S", "H", "splits", "chunk"])
def merge_decode_kernel(
    sums_ptr, best_ptr, total_ptr, lengths, out_ptr, given_lse_ptr, lse_ptr, W, S, H, splits, chunk,
    G: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    query = tl.program_id(0).to(tl.int64)  # of B · Hq · W
    head, w = query // W, query % W
    row = head // G  # of B · H
    columns = tl.arange(0, BLOCK_DV)
    length = row_length(lengths, row // H, row % H, S)
    runs = (length + chunk - 1) // chunk  # a short row has fewer than the longest
    # Run j goes to lane j % BLOCK_P; the lanes meet once, at the end.
    best = tl.full([BLOCK_P], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_P], tl.float32)
    sums = tl.zeros([BLOCK_P, BLOCK_DV], tl.float32)
    for first in range(0, runs, BLOCK_P):
        run = first + tl.arange(0, BLOCK_P)
        part = ((row * splits + run) * W + w) * G + head % G
        part_best = tl.load(best_ptr + part, mask=run < runs, other=float("-inf"))
        part_total = tl.load(total_ptr + part, mask=run < runs, other=0.0)
        mask = (run < runs)[:, None] & (columns < DV)[None, :]
        part_sums = tl.load(row_pointers(sums_ptr, part, DV, columns), mask=mask, other=0.0)
        best_after = tl.maximum(best, part_best)
        shift = tl.where(best_after == float("-inf"), 0.0, best_after)  # no token seen yet
        grow, shrink = tl.exp2(part_best - shift), tl.exp2(best - shift)
        total = total * shrink + part_total * grow
        sums = sums * shrink[:, None] + part_sums * grow[:, None]
        best = best_after
    lanes_best, best = best, tl.max(best, 0)
    grow = tl.exp2(lanes_best - tl.where(best == float("-inf"), 0.0, best))
    total = tl.sum(total * grow, 0)
    sums = tl.sum(sums * grow[:, None], 0)
    if given_lse_ptr is None:
        out = sums / total
        lse = (best + tl.log2(total)) * _LN_2
    else:
        lse = tl.load(given_lse_ptr + query)
        out = sums * tl.exp2(best - lse * _LOG2_E)
    nothing_seen = total == 0.0  # padding, or no token
    out = tl.where(nothing_seen, 0.0, out)
    tl.store(out_ptr + query * DV + columns, out.to(out_ptr.dtype.element_ty), mask=columns < DV)
    tl.store(lse_ptr + query, tl.where(nothing_seen, float("-inf"), lse))


@triton.jit(do_not_specialize=["S", "W", "H", "blocks", "step", *_MASS_STRIDES])
def track_kernel(
    logits_ptr, lse_ptr, lengths, mass_ptr, last_used_ptr, decay, threshold, step, W, S, H, blocks,
    mass_stride_b, mass_stride_h, used_stride_b, used_stride_h, G: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = row // H, row % H
    tokens = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    length = row_length(lengths, b, h, S)
    inside = tokens < length
    drawn = tl.zeros([BLOCK], tl.float32)
    most = tl.zeros([BLOCK], tl.float32)
    for w in range(0, tl.minimum(W, length)):
        weight = tl.zeros([BLOCK], tl.float32)
        for g in range(0, G):
            logits = tl.load(logits_ptr + ((row * W + w) * G + g) * S + tokens, mask=inside, other=float("-inf"))
            weight += tl.exp2(logits - tl.load(lse_ptr + (row * G + g) * W + w) * _LOG2_E)
        drawn += weight / G
        most = tl.maximum(most, weight / G)
    if mass_ptr is not None:
        pointers = mass_ptr + b * mass_stride_b + h * mass_stride_h + tokens
        mass = tl.load(pointers, mask=inside, other=0.0)
        tl.store(pointers, mass * decay + drawn, mask=inside)
    if last_used_ptr is not None:
        pointers = last_used_ptr + b * used_stride_b + h * used_stride_h + tokens
        tl.store(pointers, step + tl.zeros([BLOCK], tl.int32), mask=inside & (most >= threshold))


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
    given_lse: torch.Tensor | None = None,
    out_lse: torch.Tensor | None = None,
) -> None:
    """Fill out [B, Hq, W, Dv] with the causal softmax(scale · q·K) · V of the last W queries, out_lse [B, Hq, W] with
    their log-sum-exps; update mass and last_used [B, H, S] where given. given_lse [B, Hq, W], contiguous: weights are
    exp(logit - given_lse)."""
    (_, HQ, W, _), DV, (B, H, S, D) = queries.shape, values.shape[3], cache_shape(keys, table)
    G, rows = HQ // H, B * H
    compute, size = dot_type(queries)
    config = decode_config(rows, W * G, S, D, DV, size, multiprocessors(keys.device), ragged=lengths is not None)
    row_blocks = cdiv(W * G, config.block_rows)

    def workspace(*shape):
        return torch.empty(shape, dtype=torch.float32, device=keys.device)

    logits = None if mass is None and last_used is None else workspace(B, H, W * G, S)
    sums = workspace(rows, config.splits, W * G, DV)
    best, total = workspace(2, rows, config.splits, W * G)
    lse = workspace(B, HQ, W) if out_lse is None else out_lse
    per_head = per_row(lengths)
    decode_run_kernel[(rows * row_blocks * config.splits * cdiv(DV, config.block_value_dim),)](
        rows_of(queries), rows_of(keys, table), rows_of(values, table), per_head, logits, sums, best, total,
        scale * _LOG2_E.value, W, S, H, config.splits, config.chunk, row_blocks,
        G=G, BLOCK_D=config.block_dim, BLOCK_DV=config.block_value_dim, BLOCK_R=config.block_rows,
        BLOCK_S=config.block_tokens, CAUSAL=W > 1, COMPUTE=compute,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    BLOCK_DV = triton.next_power_of_2(DV)
    # Parts at a time: few round trips to L2, and 32 floats of them a thread; of a row that is hardly cut, few lanes.
    BLOCK_P = min(32, max(1, 4096 // BLOCK_DV)) if config.splits > 4 else 4
    merge_decode_kernel[(B * HQ * W,)](
        sums, best, total, per_head, out, given_lse, lse, W, S, H, config.splits, config.chunk,
        G=G, DV=DV, BLOCK_DV=BLOCK_DV, BLOCK_P=BLOCK_P,
    )  # fmt: skip
    if logits is not None:
        BLOCK = 1024  # 8 tokens a thread: enough loads in flight for a few floats a token
        blocks = cdiv(S, BLOCK)
        mass_strides = (0, 0) if mass is None else mass.stride()[:2]
        used_strides = (0, 0) if last_used is None else last_used.stride()[:2]
        track_kernel[(rows * blocks,)](
            logits, lse, per_head, mass, last_used, decay, threshold, step, W, S, H, blocks,
            *mass_strides, *used_strides, G=G, BLOCK=BLOCK,
        )  # fmt: skip

"""Attention mass: how much attention each key draws, summed over queries and the GQA group, in O(S) memory.

    attention_lse_kernel    [splits, B, Hq, W] float32: log-sum-exp of every query's logits over one run of the keys
    merge_lse_kernel        [B, Hq, W]: the runs of a query merged
    attention_mass_kernel   [B, H, S]: each program holds a block of keys, recomputes its logits against all queries
                            that see it, exponentiates them against the LSE and adds them up

Shapes: queries [B, Hq, W, D], the last W of the sequence; keys [B, H, S, D], or paged [blocks, H, block_size, D] under
a block table; any strides with a contiguous last dimension. The G = Hq/H query heads of a KV head are one matrix of W·G
rows, queries slowest, so a tile of K is read once for the group, a single query still makes a tile (padded to 16 rows),
and the causal limit rises along the rows.
Of a request of `length` tokens, query w belongs to token max(length - W, 0) + w; rows beyond its last are padding.
Bytes per (batch, KV head): K once for the LSE (whole prompt: its blocks again, from L2, for every block of queries)
and once for the mass; Q once and then again from L2 for every block of keys; 4·S of mass. Operations: 2·D per
visible (query, key) pair for the LSE and 2·D for the mass, on tensor cores in 16 bits; float32 in full precision.
Launch: one program per block of queries (and run of keys, for a short window), one per block of keys; those with most
work first. Each sum has one owner and a fixed order.
"""

import torch
import triton
import triton.language as tl

from .launch_config import cdiv, lse_config, mass_config, multiprocessors
from .primitives import PAGING, cache_shape, dot_type, paging, plain_bytes, row_length, to_float32, token_pointers

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_LENGTH_DEPENDENT = ["W", "S", "H", *PAGING]
_LSE_STRIDES = ["lse_stride_b", "lse_stride_h"]


@triton.jit
def query_pointers(group_ptr, rows, stride_w, stride_h, columns, G: tl.constexpr):
    """Addresses [rows, columns] of a group's queries: row w·G + g is query w of head g."""
    offsets = (rows // G).to(tl.int64) * stride_w + (rows % G).to(tl.int64) * stride_h
    return group_ptr + offsets[:, None] + columns[None, :]


@triton.jit
def load_tile(pointers, mask, COMPUTE: tl.constexpr, DECODE_E4M3: tl.constexpr):
    """Rows in the type that tl.dot multiplies."""
    return to_float32(tl.load(pointers, mask=mask, other=0.0), DECODE_E4M3).to(COMPUTE)


@triton.jit
def product(
    a, a_pointers, a_mask, b_pointers, b_mask, D: tl.constexpr, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr,
    DECODE_A: tl.constexpr, DECODE_B: tl.constexpr,
):  # fmt: skip
    """a · bᵀ in float32. If a row's D columns fit one tile, `a` is that tile, loaded before; else chunks of both."""
    columns = tl.arange(0, BLOCK_D)[None, :]
    total = tl.zeros([a_mask.shape[0], b_mask.shape[0]], tl.float32)
    if D <= BLOCK_D:
        b = load_tile(b_pointers, b_mask & (columns < D), COMPUTE, DECODE_B)
        total = tl.dot(a, tl.trans(b), total, input_precision="ieee")
    else:
        for chunk in range(0, D, BLOCK_D):
            inside = columns < D - chunk
            part = load_tile(a_pointers + chunk, a_mask & inside, COMPUTE, DECODE_A)
            b = load_tile(b_pointers + chunk, b_mask & inside, COMPUTE, DECODE_B)
            total = tl.dot(part, tl.trans(b), total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=_LENGTH_DEPENDENT + ["splits", "chunk", "row_blocks"])
def attention_lse_kernel(
    queries_ptr, keys_ptr, table_ptr, lengths_ptr, lse_ptr, scale, W, S, H, row_blocks, splits, chunk,
    table_stride, block_size,
    query_stride_b, query_stride_h, query_stride_w, key_stride_b, key_stride_h, key_stride_s,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
    CAUSAL: tl.constexpr, COMPUTE: tl.constexpr, DECODE_Q: tl.constexpr, DECODE_K: tl.constexpr,
):  # fmt: skip
    program = tl.num_programs(0) - 1 - tl.program_id(0)  # the last queries see most keys
    row_count = tl.num_programs(0) // splits // row_blocks
    split = program % splits
    row = (program // splits % row_count).to(tl.int64)
    row_block = program // splits // row_count
    b, h = row // H, row % H
    length = row_length(lengths_ptr, b, S)
    offset = tl.maximum(length - W, 0)
    columns = tl.arange(0, BLOCK_D)

    rows = row_block * BLOCK_R + tl.arange(0, BLOCK_R)
    queries = rows // G
    seen_rows = queries < tl.minimum(W, length)
    query_pointers_ = query_pointers(
        queries_ptr + b * query_stride_b + h * G * query_stride_h, rows, query_stride_w, query_stride_h, columns, G
    )
    query = load_tile(query_pointers_, seen_rows[:, None] & (columns < D)[None, :], COMPUTE, DECODE_Q)

    begin = split * chunk
    end = tl.minimum(begin + chunk, length)
    if CAUSAL:
        end = tl.minimum(end, offset + (row_block * BLOCK_R + BLOCK_R - 1) // G + 1)
    best = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    for start in range(begin, end, BLOCK_S):
        tokens = start + tl.arange(0, BLOCK_S)
        inside = tokens < end
        key_pointers = token_pointers(
            keys_ptr, table_ptr, table_stride, block_size, b, h, tokens, inside,
            key_stride_b, key_stride_h, key_stride_s, columns,
        )  # fmt: skip
        logits = scale * product(
            query, query_pointers_, seen_rows[:, None], key_pointers, inside[:, None],
            D, BLOCK_D, COMPUTE, DECODE_Q, DECODE_K,
        )  # fmt: skip
        visible = inside[None, :]
        if CAUSAL:
            visible = visible & (tokens[None, :] <= offset + queries[:, None])
        logits = tl.where(visible, logits, float("-inf"))
        best_after = tl.maximum(best, tl.max(logits, 1))
        shift = tl.where(best_after == float("-inf"), 0.0, best_after)  # nothing seen yet: no -inf minus -inf
        total = total * tl.exp2(best - shift) + tl.sum(tl.exp2(logits - shift[:, None]), 1)
        best = best_after

    lse = (best + tl.log2(total)) * _LN_2
    lse = tl.where(seen_rows, lse, float("-inf"))
    heads = (split * row_count + row) * G + rows % G
    tl.store(lse_ptr + heads * W + queries, lse, mask=rows < W * G)


@triton.jit(do_not_specialize=["n", "splits"])
def merge_lse_kernel(parts_ptr, lse_ptr, n, splits, BLOCK: tl.constexpr):
    queries = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = queries < n
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(0, splits):
        lse = tl.load(parts_ptr + queries, mask=inside, other=0.0)
        parts_ptr += n
        best_after = tl.maximum(best, lse)
        shift = tl.where(best_after == float("-inf"), 0.0, best_after)
        total = total * tl.exp(best - shift) + tl.exp(lse - shift)
        best = best_after
    tl.store(lse_ptr + queries, best + tl.log(total), mask=inside)


@triton.jit
def _reduce(sums, weights, REDUCE: tl.constexpr):
    if REDUCE == "max":
        sums = tl.maximum(sums, weights)
    elif REDUCE == "square":
        sums += weights * weights
    else:
        sums += weights
    return sums


@triton.jit
def _add_queries(
    sums, key, key_pointers, key_mask, tokens, group_ptr, lse_ptr, begin, end, scale, offset, valid,
    query_stride_w, query_stride_h, lse_stride_h,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, MASKED: tl.constexpr,
    REDUCE: tl.constexpr, COMPUTE: tl.constexpr, DECODE_Q: tl.constexpr, DECODE_K: tl.constexpr,
):  # fmt: skip
    """Add the weights of the query rows [begin, end) to `sums` [tokens, rows of a tile]. MASKED: some keys are later
    than some of these queries."""
    columns = tl.arange(0, BLOCK_D)
    for start in range(begin, end, BLOCK_R):
        rows = start + tl.arange(0, BLOCK_R)
        seen_rows = rows < valid * G
        lse_pointers = lse_ptr + (rows % G) * lse_stride_h + rows // G
        # Padding rows have an infinite LSE, so their weights are 0.
        lse = tl.load(lse_pointers, mask=seen_rows, other=float("inf")) * _LOG2_E
        logits = scale * product(
            key, key_pointers, key_mask,
            query_pointers(group_ptr, rows, query_stride_w, query_stride_h, columns, G), seen_rows[:, None],
            D, BLOCK_D, COMPUTE, DECODE_K, DECODE_Q,
        )  # fmt: skip
        weights = tl.exp2(logits - lse[None, :])
        if MASKED:
            weights = tl.where(tokens[:, None] <= offset + (rows // G)[None, :], weights, 0.0)
        sums = _reduce(sums, weights, REDUCE)
    return sums


@triton.jit(do_not_specialize=_LENGTH_DEPENDENT + _LSE_STRIDES)
def attention_mass_kernel(
    queries_ptr, keys_ptr, table_ptr, lse_ptr, lengths_ptr, mass_ptr, scale, W, S, H, table_stride, block_size,
    query_stride_b, query_stride_h, query_stride_w, key_stride_b, key_stride_h, key_stride_s,
    lse_stride_b, lse_stride_h,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
    CAUSAL: tl.constexpr, REDUCE: tl.constexpr, COUNT: tl.constexpr, COMPUTE: tl.constexpr,
    DECODE_Q: tl.constexpr, DECODE_K: tl.constexpr,
):  # fmt: skip
    row_count = tl.num_programs(0) // ((S + BLOCK_S - 1) // BLOCK_S)
    row = (tl.program_id(0) % row_count).to(tl.int64)
    first = tl.program_id(0) // row_count * BLOCK_S  # the first keys are seen by most queries
    b, h = row // H, row % H
    length = row_length(lengths_ptr, b, S)
    offset = tl.maximum(length - W, 0)
    valid = tl.minimum(length, W)  # queries of this request
    tokens = first + tl.arange(0, BLOCK_S)
    columns = tl.arange(0, BLOCK_D)
    key_mask = (tokens < length)[:, None]
    key_pointers = token_pointers(
        keys_ptr, table_ptr, table_stride, block_size, b, h, tokens, tokens < length,
        key_stride_b, key_stride_h, key_stride_s, columns,
    )  # fmt: skip
    key = load_tile(key_pointers, key_mask & (columns < D)[None, :], COMPUTE, DECODE_K)
    group_ptr = queries_ptr + b * query_stride_b + h * G * query_stride_h
    lse_ptr += b * lse_stride_b + h * G * lse_stride_h

    sums = tl.zeros([BLOCK_S, BLOCK_R], tl.float32)
    all_see = tl.full([], 0, tl.int32)  # from this row on, every query sees every key of the block
    rows = tl.where(first < length, valid * G, 0)  # a block of padding has nothing to add up
    if CAUSAL:
        some_see = tl.maximum(first - offset, 0) * G // BLOCK_R * BLOCK_R
        all_see = tl.maximum(first + BLOCK_S - 1 - offset, 0) * G
        all_see = tl.minimum((all_see + BLOCK_R - 1) // BLOCK_R * BLOCK_R, (rows + BLOCK_R - 1) // BLOCK_R * BLOCK_R)
        sums = _add_queries(
            sums, key, key_pointers, key_mask, tokens, group_ptr, lse_ptr, some_see, all_see, scale, offset, valid,
            query_stride_w, query_stride_h, lse_stride_h,
            G, D, BLOCK_D, BLOCK_R, True, REDUCE, COMPUTE, DECODE_Q, DECODE_K,
        )  # fmt: skip
    sums = _add_queries(
        sums, key, key_pointers, key_mask, tokens, group_ptr, lse_ptr, all_see, rows, scale, offset, valid,
        query_stride_w, query_stride_h, lse_stride_h,
        G, D, BLOCK_D, BLOCK_R, False, REDUCE, COMPUTE, DECODE_Q, DECODE_K,
    )  # fmt: skip

    if REDUCE == "max":
        mass = tl.max(sums, 1)
    else:
        mass = tl.sum(sums, 1)
    count = valid + tl.zeros([BLOCK_S], tl.int32)  # queries that see a key
    if CAUSAL:
        count = tl.maximum(tl.minimum(length - tokens, count), 1)
    if REDUCE == "mean":
        mass = mass / ((count if COUNT else valid) * G).to(tl.float32)
    elif COUNT:
        mass = mass / count.to(tl.float32)
    tl.store(mass_ptr + row * S + tokens, tl.where(tokens < length, mass, float("-inf")), mask=tokens < S)


def attention_lse(
    queries: torch.Tensor,
    keys: torch.Tensor,
    scale: float,
    causal: bool,
    lengths: torch.Tensor | None,
    out: torch.Tensor,
    table: torch.Tensor | None = None,
) -> None:
    """Fill out [B, Hq, W] float32 with ln Σ_i exp(scale · q·k_i) over the keys that a query sees; -inf for padding."""
    (_, HQ, W, _), (B, H, S, D) = queries.shape, cache_shape(keys, table)
    G = HQ // H
    config = lse_config(B * H, W * G, S, D, queries.element_size(), multiprocessors(keys.device))
    row_blocks = cdiv(W * G, config.block_rows)
    parts = out
    if config.splits > 1:
        parts = torch.empty((config.splits, B, HQ, W), dtype=torch.float32, device=keys.device)
    strides = (*paging(keys, table), *queries.stride()[:3], *keys.stride()[:3])
    compute = dot_type(queries)
    (queries, decode_q), (keys, decode_k) = plain_bytes(queries), plain_bytes(keys)
    attention_lse_kernel[(B * H * row_blocks * config.splits,)](
        queries, keys, table, lengths, parts, scale * _LOG2_E.value, W, S, H, row_blocks, config.splits, config.chunk,
        *strides, G=G, D=D, BLOCK_D=config.block_dim, BLOCK_R=config.block_rows, BLOCK_S=config.block_tokens,
        CAUSAL=causal, COMPUTE=compute, DECODE_Q=decode_q, DECODE_K=decode_k, num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip
    if config.splits > 1:
        BLOCK = 128  # one query a thread: the parts are few and in L2
        merge_lse_kernel[(cdiv(out.numel(), BLOCK),)](parts, out, out.numel(), config.splits, BLOCK=BLOCK)


def attention_mass(
    queries: torch.Tensor,
    keys: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    causal: bool,
    reduce: str,
    count: bool,
    lengths: torch.Tensor | None,
    out: torch.Tensor,
    table: torch.Tensor | None = None,
) -> None:
    """Fill out [B, H, S] float32 with the weights exp(scale · q·k_i - lse) reduced over queries and group; -inf at and
    beyond a row's length. lse [B, Hq, W], last dimension contiguous; count: divide by the queries that see a key."""
    (_, HQ, W, _), (B, H, S, D) = queries.shape, cache_shape(keys, table)
    G = HQ // H
    config = mass_config(W * G, D, queries.element_size())
    strides = (*paging(keys, table), *queries.stride()[:3], *keys.stride()[:3], *lse.stride()[:2])
    compute = dot_type(queries)
    (queries, decode_q), (keys, decode_k) = plain_bytes(queries), plain_bytes(keys)
    attention_mass_kernel[(B * H * cdiv(S, config.block_tokens),)](
        queries, keys, table, lse, lengths, out, scale * _LOG2_E.value, W, S, H, *strides,
        G=G, D=D, BLOCK_D=config.block_dim, BLOCK_R=config.block_rows, BLOCK_S=config.block_tokens,
        CAUSAL=causal, REDUCE=reduce, COUNT=count, COMPUTE=compute, DECODE_Q=decode_q, DECODE_K=decode_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip

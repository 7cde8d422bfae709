"""Attention mass: how much attention each key draws, summed over queries and the GQA group, in O(S) memory.

    attention_lse_kernel    [splits, B, Hq, W] float32: log-sum-exp of every query's logits over one run of the keys
    merge_lse_kernel        [B, Hq, W]: the runs of a query merged, where window_mass_kernel does not do it itself
    attention_mass_kernel   [B, H, S]: each program holds a block of keys, recomputes its logits against all queries
                            that see it, exponentiates them against the LSE and adds them up
    window_mass_kernel      the same for so few queries that they are one tile: each program holds them, and a run of
                            the keys streams past

Shapes: queries [B, Hq, W, D], the last W of the sequence; keys [B, H, S, D], dense or paged (rows.py). The G = Hq/H
query heads of a KV head are one matrix of W·G rows, queries slowest, so a tile of K is read once for the group, a
single query still makes a tile (padded to 16 rows), and the causal limit rises along the rows.
Of a request of `length` tokens, query w belongs to token max(length - W, 0) + w; rows beyond its last are padding.
Bytes per (batch, KV head): K once for the LSE (whole prompt: its blocks again, from L2, for every block of queries)
and once for the mass; Q once and then again from L2 for every block of keys, or once per run of them; 4·S of mass.
Operations: 2·D per visible (query, key) pair for the LSE and 2·D for the mass, on tensor cores in 16 bits; float32 in
full precision.
Launch: one program per block of queries (and run of keys, for a short window), one per block or run of keys; those with
most work first. Each sum has one owner and a fixed order.
"""

import torch
import triton
import triton.language as tl

from .launch_config import cdiv, lse_config, mass_config, multiprocessors, window_mass_config
from .primitives import dot_type
from .rows import cache_shape, load_float32, per_row, row_length, rows_at, rows_of

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_LENGTH_DEPENDENT = ["W", "S", "H"]
_LSE_STRIDES = ["lse_stride_b", "lse_stride_h"]
_INFINITE = tl.constexpr(float("inf"))


@triton.jit
def group_rows_at(queries, b, h, rows, inside, G: tl.constexpr):
    """Addresses [rows] of a group's queries: row w·G + g is query w of head g of KV head h."""
    return rows_at(queries, b, h * G + rows % G, rows // G, inside)


@triton.jit
def load_tile(rows, pointers, inside, columns, COMPUTE: tl.constexpr):
    """Rows in the type that tl.dot multiplies."""
    return load_float32(rows, pointers, inside, columns).to(COMPUTE)


@triton.jit
def product(
    a, a_rows, a_pointers, a_inside, b_rows, b_pointers, b_inside, BLOCK_D: tl.constexpr, COMPUTE: tl.constexpr
):  # fmt: skip
    """a · bᵀ in float32. If a row's columns fit one tile, `a` is that tile, loaded before; else chunks of both."""
    columns = tl.arange(0, BLOCK_D)
    total = tl.zeros([a_inside.shape[0], b_inside.shape[0]], tl.float32)
    if a_rows.width <= BLOCK_D:
        b = load_tile(b_rows, b_pointers, b_inside, columns, COMPUTE)
        total = tl.dot(a, tl.trans(b), total, input_precision="ieee")
    else:
        for chunk in range(0, a_rows.width, BLOCK_D):
            part = load_tile(a_rows, a_pointers, a_inside, chunk + columns, COMPUTE)
            b = load_tile(b_rows, b_pointers, b_inside, chunk + columns, COMPUTE)
            total = tl.dot(part, tl.trans(b), total, input_precision="ieee")
    return total


@triton.jit
def _add_keys(
    best, total, query, queries, query_pointers, is_query, own, keys, b, h, begin, end, scale, offset,
    BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Running maximum and sum of the rows' logits after the keys [begin, end). MASKED: the last tile is not full, or
    some rows do not see all of its keys."""
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
        if MASKED:
            visible = inside[None, :]
            if CAUSAL:
                visible = visible & (tokens[None, :] <= offset + own[:, None])
            logits = tl.where(visible, logits, float("-inf"))
        best_after = tl.maximum(best, tl.max(logits, 1))
        shift = tl.where(best_after == float("-inf"), 0.0, best_after)  # nothing seen yet: no -inf minus -inf
        total = total * tl.exp2(best - shift) + tl.sum(tl.exp2(logits - shift[:, None]), 1)
        best = best_after
    return best, total


@triton.jit(do_not_specialize=_LENGTH_DEPENDENT + ["splits", "chunk", "row_blocks"])
def attention_lse_kernel(
    queries, keys, lengths, lse_ptr, scale, W, S, H, row_blocks, splits, chunk,
    G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
    CAUSAL: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    program = tl.num_programs(0) - 1 - tl.program_id(0)  # the last queries see most keys
    row_count = tl.num_programs(0) // splits // row_blocks
    split = program % splits
    row = (program // splits % row_count).to(tl.int64)
    row_block = program // splits // row_count
    b, h = row // H, row % H
    length = row_length(lengths, b, h, S)
    offset = tl.maximum(length - W, 0)
    columns = tl.arange(0, BLOCK_D)

    rows = row_block * BLOCK_R + tl.arange(0, BLOCK_R)
    own = rows // G  # the query that a row belongs to
    is_query = own < tl.minimum(W, length)
    query_pointers = group_rows_at(queries, b, h, rows, is_query, G)
    query = load_tile(queries, query_pointers, is_query, columns, COMPUTE)

    begin = split * chunk
    end = tl.minimum(begin + chunk, length)
    if CAUSAL:
        end = tl.minimum(end, offset + (row_block * BLOCK_R + BLOCK_R - 1) // G + 1)
    best = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    whole = end  # every row of the tile sees every key before it
    if CAUSAL:
        whole = tl.minimum(end, offset + row_block * BLOCK_R // G + 1)
    whole = begin + tl.maximum(whole - begin, 0) // BLOCK_S * BLOCK_S
    best, total = _add_keys(
        best, total, query, queries, query_pointers, is_query, own, keys, b, h, begin, whole, scale, offset,
        BLOCK_D, BLOCK_S, CAUSAL, False, COMPUTE,
    )  # fmt: skip
    best, total = _add_keys(
        best, total, query, queries, query_pointers, is_query, own, keys, b, h, whole, end, scale, offset,
        BLOCK_D, BLOCK_S, CAUSAL, True, COMPUTE,
    )  # fmt: skip

    lse = (best + tl.log2(total)) * _LN_2
    lse = tl.where(is_query, lse, float("-inf"))
    heads = (split * row_count + row) * G + rows % G
    tl.store(lse_ptr + heads * W + own, lse, mask=rows < W * G)


@triton.jit
def _merged_lse(pointers, inside, step, splits):
    """The log-sum-exp of each query, from those of `splits` runs of its keys, `step` numbers apart. Of a single run it
    is what it was."""
    best = tl.full([inside.shape[0]], float("-inf"), tl.float32)
    total = tl.zeros([inside.shape[0]], tl.float32)
    for _ in range(0, splits):
        lse = tl.load(pointers, mask=inside, other=0.0)
        pointers += step
        best_after = tl.maximum(best, lse)
        shift = tl.where(tl.abs(best_after) == _INFINITE, 0.0, best_after)
        total = total * tl.exp(best - shift) + tl.exp(lse - shift)
        best = best_after
    return best + tl.log(total)


@triton.jit(do_not_specialize=["n", "splits"])
def merge_lse_kernel(parts_ptr, lse_ptr, n, splits, BLOCK: tl.constexpr):
    queries = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = queries < n
    tl.store(lse_ptr + queries, _merged_lse(parts_ptr + queries, inside, n, splits), mask=inside)


@triton.jit
def _reduce(sums, weights, REDUCE: tl.constexpr):
    if REDUCE == "max":
        sums = tl.maximum(sums, weights, propagate_nan=tl.PropagateNan.ALL)
    elif REDUCE == "square":
        sums += weights * weights
    else:
        sums += weights
    return sums


@triton.jit
def _add_queries(
    sums, key, keys, key_pointers, is_key, tokens, queries, b, h, lse_ptr, lse_stride_h, begin, end, scale, offset,
    valid, G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, MASKED: tl.constexpr,
    REDUCE: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Add the weights of the query rows [begin, end) to `sums` [tokens, rows of a tile]. MASKED: some of these queries
    do not count for some keys. offset: the last key that query 0 counts for."""
    for start in range(begin, end, BLOCK_R):
        rows = start + tl.arange(0, BLOCK_R)
        is_query = rows < valid * G
        query_pointers = group_rows_at(queries, b, h, rows, is_query, G)
        lse_pointers = lse_ptr + (rows % G) * lse_stride_h + rows // G
        # Padding rows have an infinite LSE, so their weights are 0.
        lse = tl.load(lse_pointers, mask=is_query, other=float("inf")) * _LOG2_E
        logits = scale * product(
            key, keys, key_pointers, is_key, queries, query_pointers, is_query, BLOCK_D, COMPUTE
        )  # fmt: skip
        weights = tl.exp2(logits - lse[None, :])
        if MASKED:
            weights = tl.where(tokens[:, None] <= offset + (rows // G)[None, :], weights, 0.0)
        sums = _reduce(sums, weights, REDUCE)
    return sums


@triton.jit
def _finished(
    sums, tokens, length, W, min_distance,
    G: tl.constexpr, CAUSAL: tl.constexpr, REDUCE: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """The mass of `tokens` from what was reduced [tokens, rows of a tile]."""
    valid = tl.minimum(length, W)  # queries of this request
    if REDUCE == "max":  # tl.max drops NaN
        mass = tl.where(tl.sum((sums != sums).to(tl.int32), 1) > 0, float("nan"), tl.max(sums, 1))
    else:
        mass = tl.sum(sums, 1)
    count = valid + tl.zeros_like(tokens)  # queries that count for a key
    if CAUSAL:
        seen_by = length - tokens
        if min_distance is not None:
            seen_by -= min_distance
        count = tl.maximum(tl.minimum(seen_by, count), 1)
    if REDUCE == "mean":
        mass = mass / ((count if COUNT else valid) * G).to(tl.float32)
    elif COUNT:
        mass = mass / count.to(tl.float32)
    return tl.where(tokens < length, mass, float("-inf"))


@triton.jit(do_not_specialize=_LENGTH_DEPENDENT + _LSE_STRIDES + ["min_distance"])
def attention_mass_kernel(
    queries, keys, lse_ptr, lengths, mass_ptr, scale, W, S, H, lse_stride_b, lse_stride_h, min_distance,
    G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
    CAUSAL: tl.constexpr, REDUCE: tl.constexpr, COUNT: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    row_count = tl.num_programs(0) // ((S + BLOCK_S - 1) // BLOCK_S)
    row = (tl.program_id(0) % row_count).to(tl.int64)
    first = tl.program_id(0) // row_count * BLOCK_S  # the first keys are seen by most queries
    b, h = row // H, row % H
    length = row_length(lengths, b, h, S)
    offset = tl.maximum(length - W, 0)
    valid = tl.minimum(length, W)  # queries of this request
    if min_distance is not None:
        offset -= min_distance
    tokens = first + tl.arange(0, BLOCK_S)
    columns = tl.arange(0, BLOCK_D)
    is_key = tokens < length
    key_pointers = rows_at(keys, b, h, tokens, is_key)
    key = load_tile(keys, key_pointers, is_key, columns, COMPUTE)
    lse_ptr += b * lse_stride_b + h * G * lse_stride_h

    sums = tl.zeros([BLOCK_S, BLOCK_R], tl.float32)
    all_see = tl.full([], 0, tl.int32)  # from this row on, every query counts for every key of the block
    rows = tl.where(first < length, valid * G, 0)  # a block of padding has nothing to add up
    if CAUSAL:
        some_see = tl.maximum(first - offset, 0) * G // BLOCK_R * BLOCK_R
        all_see = tl.maximum(first + BLOCK_S - 1 - offset, 0) * G
        all_see = tl.minimum((all_see + BLOCK_R - 1) // BLOCK_R * BLOCK_R, (rows + BLOCK_R - 1) // BLOCK_R * BLOCK_R)
        sums = _add_queries(
            sums, key, keys, key_pointers, is_key, tokens, queries, b, h, lse_ptr, lse_stride_h, some_see, all_see,
            scale, offset, valid, G, BLOCK_D, BLOCK_R, True, REDUCE, COMPUTE,
        )  # fmt: skip
    sums = _add_queries(
        sums, key, keys, key_pointers, is_key, tokens, queries, b, h, lse_ptr, lse_stride_h, all_see, rows,
        scale, offset, valid, G, BLOCK_D, BLOCK_R, False, REDUCE, COMPUTE,
    )  # fmt: skip

    mass = _finished(sums, tokens, length, W, min_distance, G, CAUSAL, REDUCE, COUNT)
    tl.store(mass_ptr + row * S + tokens, mass, mask=tokens < S)


@triton.jit(
    do_not_specialize=_LENGTH_DEPENDENT + _LSE_STRIDES + ["min_distance", "lse_step", "lse_splits", "splits", "chunk"]
)
def window_mass_kernel(
    queries, keys, lse_ptr, lengths, mass_ptr, scale, W, S, H, lse_stride_b, lse_stride_h, min_distance,
    lse_step, lse_splits, splits, chunk,
    G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
    CAUSAL: tl.constexpr, REDUCE: tl.constexpr, COUNT: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // splits).to(tl.int64)
    b, h = row // H, row % H
    length = row_length(lengths, b, h, S)
    offset = tl.maximum(length - W, 0)
    if min_distance is not None:
        offset -= min_distance
    columns = tl.arange(0, BLOCK_D)
    rows = tl.arange(0, BLOCK_R)
    is_query = rows < tl.minimum(length, W) * G
    query_pointers = group_rows_at(queries, b, h, rows, is_query, G)
    query = load_tile(queries, query_pointers, is_query, columns, COMPUTE)
    lse_ptr += b * lse_stride_b + h * G * lse_stride_h + (rows % G) * lse_stride_h + rows // G
    lse = tl.where(is_query, _merged_lse(lse_ptr, is_query, lse_step, lse_splits), _INFINITE) * _LOG2_E

    begin = tl.program_id(0) % splits * chunk
    end = tl.minimum(begin + chunk, S)
    for start in range(begin, end, BLOCK_S):
        tokens = start + tl.arange(0, BLOCK_S)
        is_key = tokens < tl.minimum(length, end)
        key = load_tile(keys, rows_at(keys, b, h, tokens, is_key), is_key, columns, COMPUTE)
        logits = scale * tl.dot(key, tl.trans(query), input_precision="ieee")
        weights = tl.exp2(logits - lse[None, :])
        if CAUSAL:
            weights = tl.where(tokens[:, None] <= offset + (rows // G)[None, :], weights, 0.0)
        if REDUCE == "square":
            weights = weights * weights
        mass = _finished(weights, tokens, length, W, min_distance, G, CAUSAL, REDUCE, COUNT)
        tl.store(mass_ptr + row * S + tokens, mass, mask=tokens < end)


def _lse_runs(
    queries: torch.Tensor, keys: torch.Tensor, scale: float, causal: bool, lengths: torch.Tensor | None,
    out: torch.Tensor | None, table: torch.Tensor | None, query_table: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """[splits, B, Hq, W] float32: the log-sum-exps over each of the runs into which the keys are cut. out: taken for
    those of a single run."""
    (_, HQ, W, _), (B, H, S, D) = cache_shape(queries, query_table), cache_shape(keys, table)
    G = HQ // H
    compute, size = dot_type(queries)
    config = lse_config(B * H, W * G, S, D, size, multiprocessors(keys.device))
    row_blocks = cdiv(W * G, config.block_rows)
    if config.splits > 1 or out is None:
        out = torch.empty((config.splits, B, HQ, W), dtype=torch.float32, device=keys.device)
    attention_lse_kernel[(B * H * row_blocks * config.splits,)](
        rows_of(queries, query_table), rows_of(keys, table), per_row(lengths), out,
        scale * _LOG2_E.value, W, S, H, row_blocks, config.splits, config.chunk,
        G=G, CAUSAL=causal, COMPUTE=compute, **config.tiles,
    )  # fmt: skip
    return out.view(config.splits, B, HQ, W)


def attention_lse(
    queries: torch.Tensor,
    keys: torch.Tensor,
    scale: float,
    causal: bool,
    lengths: torch.Tensor | None,
    out: torch.Tensor,
    table: torch.Tensor | None = None,
    query_table: torch.Tensor | None = None,
) -> None:
    """Fill out [B, Hq, W] float32 with ln Σ_i exp(scale · q·k_i) over the keys that a query sees; -inf for padding."""
    runs = _lse_runs(queries, keys, scale, causal, lengths, out, table, query_table)
    if len(runs) > 1:
        BLOCK = 128  # one query a thread: the parts are few and in L2
        merge_lse_kernel[(cdiv(out.numel(), BLOCK),)](runs, out, out.numel(), len(runs), BLOCK=BLOCK)


def attention_mass(
    queries: torch.Tensor,
    keys: torch.Tensor,
    lse: torch.Tensor | None,
    scale: float,
    causal: bool,
    reduce: str,
    count: bool,
    lengths: torch.Tensor | None,
    out: torch.Tensor,
    table: torch.Tensor | None = None,
    min_distance: int = 0,
    query_table: torch.Tensor | None = None,
) -> None:
    """Fill out [B, H, S] float32 with the weights exp(scale · q·k_i - lse) reduced over queries and group; -inf at and
    beyond a row's length. lse [B, Hq, W], last dimension contiguous, None: `attention_lse`; count: divide by the
    queries that count for a key, those that see it. min_distance > 0, with causal: only those at least so many tokens
    later count. query_table: queries are paged."""
    (_, HQ, W, _), (B, H, S, D) = cache_shape(queries, query_table), cache_shape(keys, table)
    G = HQ // H
    compute, size = dot_type(queries)
    window = window_mass_config(B * H, W * G, S, D, size, multiprocessors(keys.device))
    runs = None if lse is None else lse[None]
    if runs is None and window is not None:
        runs = _lse_runs(queries, keys, scale, causal, lengths, None, table, query_table)
    elif runs is None:
        runs = torch.empty((1, B, HQ, W), dtype=torch.float32, device=keys.device)
        attention_lse(queries, keys, scale, causal, lengths, runs[0], table, query_table)
    options = dict(G=G, CAUSAL=causal, REDUCE=reduce, COUNT=count, COMPUTE=compute)
    distance = min(min_distance, S) or None  # int32; None leaves it out of the code
    sizes = (scale * _LOG2_E.value, W, S, H, *runs.stride()[1:3], distance)
    rows = (rows_of(queries, query_table), rows_of(keys, table), runs, per_row(lengths), out)
    if window is not None:
        window_mass_kernel[(B * H * window.splits,)](
            *rows, *sizes, runs.stride(0), len(runs), window.splits, window.chunk, **window.tiles, **options
        )
        return
    config = mass_config(W * G, D, size)
    attention_mass_kernel[(B * H * cdiv(S, config.block_tokens),)](*rows, *sizes, **config.tiles, **options)

"""Exact selection in a row: the k-th best score by radix search, then the kept tokens' indices in ascending order;
or, the other way round (WORST), the tokens to give up.

    mean_heads_kernel       [B, 1, S]: the mean over KV heads, added in head order (heads="shared")
    select_row_kernel       one program per row, everything in one launch: short rows, or many of them
    count_digits_kernel     long rows: 8 bits of the k-th key per launch, one program per run of the row
    write_kept_kernel       long rows: each run writes its kept tokens at the offset that the runs before it leave

A score becomes an int32 key whose ascending order is the order of selection (primitives.descending_key). Four
digits of 8 bits, each found from a histogram of the keys that share the digits before it, give the k-th key exactly
and how many of its ties to take, lowest index first. 256 bins, because tl.histogram spends work per warp in
proportion to the bins. Protected tokens (the first `sink`, the last `recent`) are outside the candidates' range
[sink, length - recent): a predicate on the index, never a score. WORST reverses the keys and takes the ties with the
highest index, so it picks exactly the tokens that keeping the others would leave out.

Shapes: scores [B, H, S] float32, last dimension contiguous; out [B, H or 1, n] int64, -1 beyond a row's own count.
Bytes per row: the scores are read five times (4·5·S, from L2 after the first), 8·n written; split rows add
splits² · 256 · 4 bytes of histograms per digit, all in L2. No atomics and nothing to clear: each histogram has one
owner, so the result cannot depend on the order in which programs run.
Launch: 1 for short rows, 5 for split ones, 1 more for heads="shared".
"""

import torch
import triton
import triton.language as tl

from .launch_config import MAX_SELECT_SPLITS, cdiv, multiprocessors, select_config
from .primitives import descending_key
from .rows import per_row, row_length

_LENGTH_DEPENDENT = ["S", "H", "n", "sink", "recent", "splits", "chunk", "stride_b", "stride_h"]
_DIGIT_BINS = tl.constexpr(256)
_MAX_SPLITS = tl.constexpr(MAX_SELECT_SPLITS)


@triton.jit
def _row_bounds(lengths, keep, b, h, S, n, sink, recent, WORST: tl.constexpr):
    """length, tokens to write, candidates to choose, sink and recent of one row.

    A ragged row that keeps fewer than sink + recent tokens keeps its first `sink`, then its most recent; one with
    fewer than n unprotected tokens gives up only those.
    """
    length = row_length(lengths, b, h, S)
    if WORST:
        sink = tl.minimum(sink, length)
        recent = tl.minimum(recent, length - sink)
        need = tl.minimum(n, length - sink - recent)
        written = need
    else:
        written = row_length(keep, b, h, n)
        sink = tl.minimum(sink, written)
        recent = tl.minimum(recent, written - sink)
        need = written - sink - recent
    return length, written, need, sink, recent


@triton.jit
def _candidate_keys(scores_ptr, tokens, first, last, WORST: tl.constexpr):
    """Keys of a tile of tokens, and which of them compete: those in [first, last)."""
    competes = (tokens >= first) & (tokens < last)
    keys = descending_key(tl.load(scores_ptr + tokens, mask=competes, other=0.0))
    if WORST:
        keys = -1 - keys
    return keys, competes


@triton.jit
def _count_digits(
    scores_ptr, begin, end, first, last, prefix, DIGIT: tl.constexpr, BLOCK: tl.constexpr, WORST: tl.constexpr
):  # fmt: skip
    """Histogram of the DIGIT-th byte over the candidates whose more significant bytes equal `prefix`, and how many
    candidates have a better (smaller) prefix."""
    counts = tl.zeros([_DIGIT_BINS], tl.int32)
    better = tl.zeros([BLOCK], tl.int32)
    for start in range(begin, end, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        keys, competes = _candidate_keys(scores_ptr, tokens, first, tl.minimum(last, end), WORST)
        if DIGIT == 0:
            digits = (keys >> 24) + 128  # the sign bit makes the first byte signed
        else:
            digits = (keys >> (24 - 8 * DIGIT)) & 255
            better += (competes & ((keys >> (32 - 8 * DIGIT)) < prefix)).to(tl.int32)
            competes = competes & ((keys >> (32 - 8 * DIGIT)) == prefix)
        counts += tl.histogram(digits, _DIGIT_BINS, mask=competes)
    return counts, tl.sum(better, 0)


@triton.jit
def _next_digit(counts, prefix, need, DIGIT: tl.constexpr):
    """The prefix one byte longer, how many keys with exactly that prefix are still needed, and how many there are."""
    bins = tl.arange(0, _DIGIT_BINS)
    digit = tl.sum((tl.cumsum(counts, 0) < need).to(tl.int32), 0)
    need -= tl.sum(tl.where(bins < digit, counts, 0), 0)
    alike = tl.sum(tl.where(bins == digit, counts, 0), 0)
    if DIGIT == 0:
        prefix = digit - 128
    else:
        prefix = prefix * 256 + digit
    return prefix, need, alike


@triton.jit
def _write_kept(
    scores_ptr, out_ptr, begin, end, n, length, written, sink, recent, kth, need, ties, better_before, ties_before,
    BLOCK: tl.constexpr, WORST: tl.constexpr,
):  # fmt: skip
    """Write the chosen tokens of [begin, end), given how many better and tied candidates lie before `begin`."""
    first, last = sink, length - recent
    if WORST:
        first_tie = ties - need
        kept_before = better_before + tl.maximum(ties_before - first_tie, 0)
    else:
        protected_before = tl.minimum(begin, sink) + tl.minimum(tl.maximum(begin - last, 0), recent)
        kept_before = protected_before + better_before + tl.minimum(ties_before, need)
    for start in range(begin, end, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        keys, competes = _candidate_keys(scores_ptr, tokens, first, tl.minimum(last, end), WORST)
        tied = (competes & (keys == kth)).to(tl.int32)
        tie_rank = ties_before + tl.cumsum(tied, 0) - tied
        keep = competes & (keys < kth)
        if WORST:
            keep = keep | ((tied == 1) & (tie_rank >= first_tie))
        else:
            keep = keep | ((tied == 1) & (tie_rank < need))
            keep = keep | (tokens < sink) | ((tokens >= last) & (tokens < length))
        keep = keep & (tokens < end)
        kept_here = keep.to(tl.int32)
        slots = kept_before + tl.cumsum(kept_here, 0) - kept_here
        tl.store(out_ptr + slots, tokens.to(tl.int64), mask=keep)
        # n <= S, so the run of tokens is a run of slots as well: those beyond the row's count are its padding.
        padding = tl.full([BLOCK], -1, tl.int64)
        tl.store(out_ptr + tokens, padding, mask=(tokens >= written) & (tokens < tl.minimum(n, end)))
        kept_before += tl.sum(kept_here, 0)
        ties_before += tl.sum(tied, 0)


@triton.jit(do_not_specialize=_LENGTH_DEPENDENT)
def mean_heads_kernel(scores_ptr, out_ptr, S, H, stride_b, stride_h, splits, BLOCK: tl.constexpr):
    b = (tl.program_id(0) // splits).to(tl.int64)
    tokens = (tl.program_id(0) % splits) * BLOCK + tl.arange(0, BLOCK)
    head_ptr = scores_ptr + b * stride_b
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(0, H):
        total += tl.load(head_ptr + tokens, mask=tokens < S, other=0.0)
        head_ptr += stride_h
    tl.store(out_ptr + b * S + tokens, tl.div_rn(total, H.to(tl.float32)), mask=tokens < S)


@triton.jit(do_not_specialize=_LENGTH_DEPENDENT)
def select_row_kernel(
    scores_ptr, lengths, keep, out_ptr, S, H, n, sink, recent, stride_b, stride_h,
    BLOCK: tl.constexpr, WORST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, h = row // H, row % H
    row_ptr = scores_ptr + b * stride_b + h * stride_h
    length, written, need, sink, recent = _row_bounds(lengths, keep, b, h, S, n, sink, recent, WORST)
    prefix, ties = 0, 0
    for digit in tl.static_range(4):
        counts, _ = _count_digits(row_ptr, 0, S, sink, length - recent, prefix, digit, BLOCK, WORST)
        prefix, need, ties = _next_digit(counts, prefix, need, digit)
    none = tl.full([], 0, tl.int32)  # nothing lies before the row
    _write_kept(
        row_ptr, out_ptr + row * n, 0, S, n, length, written, sink, recent, prefix, need, ties, none, none, BLOCK, WORST
    )


@triton.jit
def _state_ptr(states_ptr, row, DIGIT: tl.constexpr):
    """(prefix, need) before byte DIGIT was looked at: [rows, 4, 2] int32."""
    return states_ptr + (row * 4 + DIGIT) * 2


@triton.jit
def _load_counts(histograms_ptr, row, splits, DIGIT: tl.constexpr):
    """[MAX_SPLITS, 256] digit counts of all runs of a row, from [rows, 4, splits, 256] int32."""
    runs = tl.arange(0, _MAX_SPLITS)[:, None]
    offsets = ((row * 4 + DIGIT) * splits + runs) * _DIGIT_BINS + tl.arange(0, _DIGIT_BINS)[None, :]
    return tl.load(histograms_ptr + offsets, mask=runs < splits, other=0)


@triton.jit
def _advance(histograms_ptr, states_ptr, row, splits, DIGIT: tl.constexpr):
    """_next_digit after byte DIGIT, from the state before it and the counts of all runs."""
    counts = tl.sum(_load_counts(histograms_ptr, row, splits, DIGIT), 0)
    state_ptr = _state_ptr(states_ptr, row, DIGIT)
    return _next_digit(counts, tl.load(state_ptr), tl.load(state_ptr + 1), DIGIT)


@triton.jit(do_not_specialize=_LENGTH_DEPENDENT)
def count_digits_kernel(
    scores_ptr, lengths, keep, histograms_ptr, states_ptr, better_ptr,
    S, H, n, sink, recent, stride_b, stride_h, splits, chunk,
    DIGIT: tl.constexpr, BLOCK: tl.constexpr, WORST: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // splits).to(tl.int64)
    split = tl.program_id(0) % splits
    b, h = row // H, row % H
    length, _, need, sink, recent = _row_bounds(lengths, keep, b, h, S, n, sink, recent, WORST)
    prefix = 0
    if DIGIT > 0:
        prefix, need, _ = _advance(histograms_ptr, states_ptr, row, splits, DIGIT - 1)
    if split == 0:
        state_ptr = _state_ptr(states_ptr, row, DIGIT)
        tl.store(state_ptr, prefix)
        tl.store(state_ptr + 1, need)
    begin = split * chunk
    end = tl.minimum(begin + chunk, S)
    counts, better = _count_digits(
        scores_ptr + b * stride_b + h * stride_h, begin, end, sink, length - recent, prefix, DIGIT, BLOCK, WORST
    )
    offsets = ((row * 4 + DIGIT) * splits + split) * _DIGIT_BINS + tl.arange(0, _DIGIT_BINS)
    tl.store(histograms_ptr + offsets, counts)
    if DIGIT == 3:
        tl.store(better_ptr + row * splits + split, better)


@triton.jit(do_not_specialize=_LENGTH_DEPENDENT)
def write_kept_kernel(
    scores_ptr, lengths, keep, histograms_ptr, states_ptr, better_ptr, out_ptr,
    S, H, n, sink, recent, stride_b, stride_h, splits, chunk, BLOCK: tl.constexpr, WORST: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // splits).to(tl.int64)
    split = tl.program_id(0) % splits
    b, h = row // H, row % H
    length, written, _, sink, recent = _row_bounds(lengths, keep, b, h, S, n, sink, recent, WORST)
    kth, need, ties = _advance(histograms_ptr, states_ptr, row, splits, 3)

    # What the runs before this one hold: candidates better in the first three bytes, or in the last one, and ties.
    runs, bins = tl.arange(0, _MAX_SPLITS), tl.arange(0, _DIGIT_BINS)[None, :]
    counts = tl.where((runs < split)[:, None], _load_counts(histograms_ptr, row, splits, 3), 0)
    better = tl.load(better_ptr + row * splits + runs, mask=runs < split, other=0)
    digit = kth & 255
    better_before = tl.sum(better, 0) + tl.sum(tl.sum(tl.where(bins < digit, counts, 0), 1), 0)
    ties_before = tl.sum(tl.sum(tl.where(bins == digit, counts, 0), 1), 0)

    begin = split * chunk
    _write_kept(
        scores_ptr + b * stride_b + h * stride_h, out_ptr + row * n, begin, tl.minimum(begin + chunk, S), n,
        length, written, sink, recent, kth, need, ties, better_before, ties_before, BLOCK, WORST,
    )  # fmt: skip


def _mean_heads(scores: torch.Tensor) -> torch.Tensor:
    B, H, S = scores.shape
    mean = torch.empty((B, 1, S), dtype=torch.float32, device=scores.device)
    BLOCK = 1024  # 8 scores a thread and head: enough loads in flight for what is a small share of the work
    splits = cdiv(S, BLOCK)
    mean_heads_kernel[(B * splits,)](scores, mean, S, H, *scores.stride()[:2], splits, BLOCK=BLOCK)
    return mean


def topk_indices(
    scores: torch.Tensor,
    keep_lengths: torch.Tensor | None,
    sink: int,
    recent: int,
    shared: bool,
    lengths: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Fill out [B, H, n] (shared: [B, 1, n]) int64 with the kept tokens, ascending; -1 beyond keep_lengths[b]."""
    if shared:
        scores = _mean_heads(scores)
    _select(scores, keep_lengths, sink, recent, lengths, out, worst=False)


def evict_slots(scores: torch.Tensor, sink: int, recent: int, lengths: torch.Tensor | None, out: torch.Tensor) -> None:
    """Fill out [B, H, n] int64 with the n worst unprotected tokens, ascending; -1 where a row has fewer."""
    _select(scores, None, sink, recent, lengths, out, worst=True)


def _select(scores, keep_lengths, sink: int, recent: int, lengths, out, worst: bool) -> None:
    B, H, S = scores.shape
    n = out.shape[2]
    config = select_config(B * H, S, multiprocessors(scores.device))
    sizes = (S, H, n, sink, recent, *scores.stride()[:2])
    launch = dict(BLOCK=config.block, WORST=worst, num_warps=config.num_warps)
    lengths, keep_lengths = per_row(lengths), per_row(keep_lengths)
    if config.splits == 1:
        select_row_kernel[(B * H,)](scores, lengths, keep_lengths, out, *sizes, **launch)
        return

    def workspace(*shape):
        return torch.empty(shape, dtype=torch.int32, device=scores.device)

    rows, splits = B * H, config.splits
    found = (workspace(rows, 4, splits, 256), workspace(rows, 4, 2), workspace(rows, splits))
    sizes += (splits, config.chunk)
    for digit in range(4):
        count_digits_kernel[(rows * splits,)](scores, lengths, keep_lengths, *found, *sizes, DIGIT=digit, **launch)
    write_kept_kernel[(rows * splits,)](scores, lengths, keep_lengths, *found, out, *sizes, **launch)

"""Exact selection in a row: the k-th best score, then the kept tokens' indices in ascending order; or, the other way
round, the tokens to give up; or the best of all heads together.

    select_row_kernel   rows up to 8,192, or many up to 32,768: one program holds the row in registers and finds the key
                        bit by bit
    select_runs_kernel  longer rows: several programs a row, 8 bits of the key at a time
    split_heads_kernel  a selection over a request's heads laid end to end, back to one list per head

A score becomes an int32 key whose ascending order is the order of selection (primitives.descending_key): the k-th key
is found exactly, and how many of its ties to take, lowest index first. Protected tokens (the first `sink`, the last
`recent`) are outside the candidates' range [first, last): a predicate on the index, never a score. What is done with
the chosen ones is the mode:

    KEEP   their indices and the protected ones'
    EVICT  the indices of the candidates that were not chosen: exactly what keeping the others leaves out
    MARK   a key for every token, for a second selection over all heads: the best there is for a token that has its
           place already, its own for another, and the worst where there is no token

A long row is cut into runs, one program each. Four rounds count a digit of 8 bits, the fifth writes; between rounds all
programs of a row must have come as far. On an NVIDIA GPU that is one cooperative launch with a barrier per row, since
all of its programs run at once; elsewhere, and in the interpreter, where they run one after another, it is a launch per
round. 256 bins, because tl.histogram spends work per warp in proportion to the bins. The first two digits part all but
a few of scores that are spread; these are counted by adding one by one.

Where heads share a selection (heads="shared") a request is one row, and what is loaded are the scores of all heads,
added in head order.

Shapes: scores [B, H, S] float32, last dimension contiguous; out [B, H or 1, n] int64, -1 beyond a row's own count.
Bytes per row: 4·S twice (up to 4,096 tokens of few rows, and in one launch of runs of one tile, once: registers), or
five times, from L2 after the first; 8·n written. Runs add splits² · 256 · 4 bytes of histograms a round, all in L2.
Each histogram has one owner, so the result cannot depend on the order in which programs run.
Launch: 1; for long rows without cooperative launches 5. Adaptive: two selections and 1 more.
"""

import torch
import triton
import triton.language as tl

from .launch_config import cdiv, multiprocessors, select_config
from .primitives import INTERPRETED, count_below, descending_key
from .rows import per_row, row_length

_LENGTH_DEPENDENT = [
    "S", "H", "n", "sink", "recent", "splits", "chunk", "stride_b", "stride_h", "out_stride", "clear_size", "shared",
]  # fmt: skip
_KEEP, _EVICT, _MARK = (tl.constexpr(mode) for mode in range(3))
_BEST, _WORST = tl.constexpr(-0x80000000), tl.constexpr(0x7FFFFFFF)  # no score has the one, NaN has the other
_DIGIT_BINS = tl.constexpr(256)
_WRITE = tl.constexpr(4)  # the round after those of the four digits
_SPARSE = tl.constexpr(2)  # from this round on few candidates compete
_LOADS_AT_ONCE = tl.constexpr(16)
_OPEN = tl.constexpr(0x5D1C0A97E3B6284F)


@triton.jit
def _row_bounds(lengths, keep, b, h, S, n, sink, recent, MODE: tl.constexpr):
    """length, tokens to write, candidates to choose, and the candidates' range [first, last) of one row.

    A row that keeps fewer than sink + recent tokens keeps its first `sink`, then its most recent; EVICT gives up at
    most the unprotected ones.
    """
    length = row_length(lengths, b, h, S)
    if MODE == _EVICT:
        first = tl.minimum(sink, length)
        last = length - tl.minimum(recent, length - first)
        written = tl.minimum(n, last - first)
        need = last - first - written
    else:
        written = tl.minimum(row_length(keep, b, h, n), length)
        first = tl.minimum(sink, written)
        recent = tl.minimum(recent, written - first)
        last = length - recent
        need = written - first - recent
    return length, written, need, first, last


@triton.jit
def _load_keys(row_ptr, shared, stride_h, tokens, end, first, last, held=None):
    """Keys of a tile of tokens, and which of them compete: those in [first, last). The others have the worst key.
    `shared`: None, or the heads over which scores are averaged. `held`: these keys, if they have been loaded before."""
    if held is None:
        keys = tl.load(row_ptr + tokens, mask=tokens < end, other=0)
        if shared is not None:
            for _ in range(1, shared):
                row_ptr += stride_h
                keys += tl.load(row_ptr + tokens, mask=tokens < end, other=0)
            keys = tl.div_rn(keys, shared.to(tl.float32))
        if row_ptr.dtype.element_ty == tl.float32:
            keys = descending_key(keys)
    else:
        keys = held
    competes = (tokens >= first) & (tokens < tl.minimum(last, end))
    return tl.where(competes, keys, _WORST), competes


@triton.jit
def _kth_key(keys, need):
    """A key with at most `need` keys below it, and how many: all of `need`, or the others are ties of that key.

    Bit by bit from the highest, and no further than it takes to part the keys.
    """
    kth = tl.full([], _BEST, tl.int32)
    better = tl.full([], 0, tl.int32)
    bit = tl.full([], 31, tl.int32)
    while (bit >= 0) & (better < need):
        candidate = kth + (1 << bit)  # bit 31 wraps around, from the least int32 to 0
        below = tl.sum((keys < candidate).to(tl.int32), 0)
        kth = tl.where(below <= need, candidate, kth)
        better = tl.where(below <= need, below, better)
        bit -= 1
    return kth, better


@triton.jit
def _write(
    row_ptr, shared, stride_h, held, begin, end, out_ptr, n, length, written, first, last, kth, ties,
    better_before, ties_before,
    BLOCK: tl.constexpr, MODE: tl.constexpr, FROM_END: tl.constexpr,
):  # fmt: skip
    """Write what is asked for of the tokens [begin, end), given how many better and tied candidates lie before them.
    FROM_END: counted back from the row's last token, the last first, so that they ascend as well."""
    for start in range(begin, end, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        keys, competes = _load_keys(row_ptr, shared, stride_h, tokens, end, first, last, held)
        better = competes & (keys < kth)
        tied = competes & (keys == kth)
        packed = better.to(tl.int32) | (tied.to(tl.int32) << 16)  # one prefix sum of both: a tile's tokens fit 16 bits
        before = tl.cumsum(packed, 0) - packed
        tie_rank = ties_before + (before >> 16)
        chosen = better | (tied & (tie_rank < ties))
        rank = better_before + (before & 0xFFFF) + tl.minimum(tie_rank, ties)
        if MODE == _EVICT:
            writes = competes & (chosen == 0)
            slots = tokens - first - rank
        else:
            writes = chosen | (tokens < first) | ((tokens >= last) & (tokens < length))
            slots = rank + tl.minimum(tokens, first) + tl.maximum(tokens - last, 0)
        if MODE == _MARK:
            own = tl.where(competes, tl.minimum(keys, _WORST - 1), _WORST)
            tl.store(out_ptr + tokens, tl.where(writes, _BEST, own), mask=tokens < end)
        else:
            names = tokens
            if FROM_END:
                slots, names = written - 1 - slots, length - 1 - tokens
            tl.store(out_ptr + slots, names.to(tl.int64), mask=writes & (tokens < end))
            if written < n:  # n <= S, so tokens name slots as well: those beyond the row's count are its padding
                padding = tl.full([BLOCK], -1, tl.int64)
                tl.store(out_ptr + tokens, padding, mask=(tokens >= written) & (tokens < tl.minimum(n, end)))
        here = tl.sum(packed, 0)
        better_before += here & 0xFFFF
        ties_before += here >> 16


@triton.jit
def _clear(clear_ptr, clear_size, BLOCK: tl.constexpr):
    """Zeros for the launch that follows: each program fills its share."""
    if clear_ptr is not None:
        for start in range(tl.program_id(0) * BLOCK, clear_size, tl.num_programs(0) * BLOCK):
            offsets = start + tl.arange(0, BLOCK)
            tl.store(clear_ptr + offsets, tl.zeros([BLOCK], tl.int32), mask=offsets < clear_size)


@triton.jit(do_not_specialize=_LENGTH_DEPENDENT)
def select_row_kernel(
    scores_ptr, lengths, keep, out_ptr, clear_ptr, clear_size,
    S, H, n, sink, recent, shared, stride_b, stride_h, out_stride,
    HELD: tl.constexpr, BLOCK: tl.constexpr, MODE: tl.constexpr, FROM_END: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, h = row // H, row % H
    length, written, need, first, last = _row_bounds(lengths, keep, b, h, S, n, sink, recent, MODE)
    row_ptr = scores_ptr + b * stride_b + h * stride_h
    keys, _ = _load_keys(row_ptr, shared, stride_h, tl.arange(0, HELD), S, first, last)
    kth, better = _kth_key(keys, need)
    none = tl.full([], 0, tl.int32)  # nothing lies before the row
    _write(
        row_ptr, shared, stride_h, keys if HELD == BLOCK else None, 0, S, out_ptr + row * out_stride, n, length,
        written, first, last, kth, need - better, none, none, BLOCK, MODE, FROM_END,
    )  # fmt: skip
    _clear(clear_ptr, clear_size, BLOCK)


@triton.jit
def _count_digits(
    row_ptr, shared, stride_h, held, begin, end, first, last, prefix, counts_ptr,
    ROUND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the histogram [256] of a run's ROUND-th byte over the candidates whose more significant bytes are `prefix`.

    Two bytes part all but a few candidates, if scores are spread. From then on those that still compete are added one
    by one to zeros, which takes a third of a dense count's instructions. Ties cost more, but only a run's own wait for
    each other.
    """
    bins = tl.arange(0, _DIGIT_BINS)
    counts = tl.zeros([_DIGIT_BINS], tl.int32)
    for start in range(begin, end, BLOCK):
        keys, competes = _load_keys(row_ptr, shared, stride_h, start + tl.arange(0, BLOCK), end, first, last, held)
        if ROUND == 0:
            digits = (keys >> 24) + 128  # the sign bit makes the first byte signed
        else:
            digits = (keys >> (24 - 8 * ROUND)) & 255
            competes = competes & ((keys >> (32 - 8 * ROUND)) == prefix)
        if ROUND < _SPARSE:
            counts += tl.histogram(digits, _DIGIT_BINS, mask=competes)
        else:
            tl.atomic_add(counts_ptr + digits, 1, mask=competes, sem="relaxed")
    if ROUND < _SPARSE:
        tl.store(counts_ptr + bins, counts)


@triton.jit
def _sum_counts(histograms_ptr, split, splits, ROUND: tl.constexpr):
    """[256] digit counts of a row, and of its runs before `split` alone, from histograms [4, splits, 256] int32."""
    run_ptr = histograms_ptr + ROUND * splits * _DIGIT_BINS + tl.arange(0, _DIGIT_BINS)
    counts = tl.zeros([_DIGIT_BINS], tl.int32)
    before = tl.zeros([_DIGIT_BINS], tl.int32)
    for start in range(0, splits, _LOADS_AT_ONCE):
        for i in tl.static_range(_LOADS_AT_ONCE):
            run = start + i
            count = tl.load(run_ptr + run * _DIGIT_BINS, mask=run < splits, other=0)
            counts += count
            before += tl.where(run < split, count, 0)
    return counts, before


@triton.jit
def _next_digit(counts, prefix, need, ROUND: tl.constexpr):
    """The prefix one byte longer, how many keys with exactly that prefix are still needed, and the bins [256] of keys
    that are better by this byte. None needed: the keys below the prefix are just as many as are needed, and it is
    longer by zeros only."""
    below = tl.cumsum(counts, 0)
    passed = (below <= need) & (tl.arange(0, _DIGIT_BINS) < _DIGIT_BINS - 1) & (need > 0)
    digit_and_taken = tl.sum(tl.where(passed, counts.to(tl.int64) + (1 << 32), 0), 0)  # one sum of both
    digit = (digit_and_taken >> 32).to(tl.int32)
    need -= digit_and_taken.to(tl.int32)
    if ROUND == 0:
        prefix = digit - 128
    else:
        prefix = prefix * 256 + digit
    return prefix, need, passed


@triton.jit
def _meet(meeting_ptr, split, splits, ROUND: tl.constexpr):
    """Wait until all programs of a row have finished the rounds before ROUND. meeting: [rows, 2] int64, not cleared.

    The row's first program sets the count of arrivals to 0 and then opens the meeting with a number that memory holds
    by chance once in 2⁶⁴; when all have come for the first time they have seen it, and it is taken away again, so that
    the next launch, or the replay of a graph, does not find it.
    """
    open_ptr, arrivals_ptr = meeting_ptr, meeting_ptr + 1
    if ROUND == 1:
        if split == 0:
            tl.atomic_xchg(arrivals_ptr, 0, sem="relaxed")
            tl.atomic_xchg(open_ptr, _OPEN, sem="release")
        seen = tl.atomic_add(open_ptr, 0, sem="acquire")
        while seen != _OPEN:
            seen = tl.atomic_add(open_ptr, 0, sem="acquire")
    tl.debug_barrier()  # all threads have written
    tl.atomic_add(arrivals_ptr, 1, sem="release")
    arrived = tl.full([], 0, tl.int64)
    while arrived < ROUND * splits:
        arrived = tl.atomic_add(arrivals_ptr, 0, sem="acquire")
    if ROUND == 1:
        if split == 0:
            tl.atomic_xchg(open_ptr, 0, sem="relaxed")


@triton.jit(do_not_specialize=_LENGTH_DEPENDENT)
def select_runs_kernel(
    scores_ptr, lengths, keep, out_ptr, clear_ptr, clear_size, histograms_ptr, states_ptr, meeting_ptr,
    S, H, n, sink, recent, shared, stride_b, stride_h, out_stride, splits, chunk,
    FIRST: tl.constexpr, LAST: tl.constexpr, HELD: tl.constexpr, BLOCK: tl.constexpr, MODE: tl.constexpr,
    FROM_END: tl.constexpr,
):  # fmt: skip
    """Rounds FIRST to LAST. More than one: all programs of a row run at once, or it has one. HELD: a run is one tile,
    whose keys stay in registers from round to round."""
    program = tl.program_id(0).to(tl.int64)
    row = program // splits
    split = tl.program_id(0) % splits
    b, h = row // H, row % H
    length, written, need, first, last = _row_bounds(lengths, keep, b, h, S, n, sink, recent, MODE)
    row_ptr = scores_ptr + b * stride_b + h * stride_h
    histograms_ptr += row * 4 * splits * _DIGIT_BINS
    begin = split * chunk
    end = tl.minimum(begin + chunk, S)
    if FIRST == 0:
        _clear(clear_ptr, clear_size, BLOCK)
        for ROUND in tl.static_range(_SPARSE, _WRITE):  # long before this run adds to them
            bins = (ROUND * splits + split) * _DIGIT_BINS + tl.arange(0, _DIGIT_BINS)
            tl.store(histograms_ptr + bins, tl.zeros([_DIGIT_BINS], tl.int32))
    held = None
    if HELD:
        held, _ = _load_keys(row_ptr, shared, stride_h, begin + tl.arange(0, BLOCK), end, first, last)

    # Of the k-th key: its first bytes, how many candidates with these are needed; and how many candidates of the runs
    # before this one are better by them.
    prefix, better_before = need * 0, need * 0
    if states_ptr is not None:
        states_ptr += program * 3
    if FIRST > 0:
        prefix, need, better_before = tl.load(states_ptr), tl.load(states_ptr + 1), tl.load(states_ptr + 2)
    counts_before = tl.zeros([_DIGIT_BINS], tl.int32)
    better_bins = tl.zeros([_DIGIT_BINS], tl.int32)
    for ROUND in tl.static_range(FIRST, LAST + 1):
        if ROUND > FIRST:
            if meeting_ptr is None:
                tl.debug_barrier()
            else:
                _meet(meeting_ptr + row * 2, split, splits, ROUND)
        if ROUND > 0:
            counts, counts_before = _sum_counts(histograms_ptr, split, splits, ROUND - 1)
            prefix, need, passed = _next_digit(counts, prefix, need, ROUND - 1)
            better_bins += tl.where(passed, counts_before, 0)
        if ROUND < _WRITE:
            counts_ptr = histograms_ptr + (ROUND * splits + split) * _DIGIT_BINS
            _count_digits(
                row_ptr, shared, stride_h, held, begin, end, first, last, prefix, counts_ptr, ROUND, BLOCK
            )  # fmt: skip
    better_before += tl.sum(better_bins, 0)
    if LAST == _WRITE:
        ties_before = tl.sum(tl.where(tl.arange(0, _DIGIT_BINS) == (prefix & 255), counts_before, 0), 0)
        _write(
            row_ptr, shared, stride_h, held, begin, end, out_ptr + row * out_stride, n, length, written, first, last,
            prefix, need, better_before, ties_before, BLOCK, MODE, FROM_END,
        )  # fmt: skip
    else:
        tl.store(states_ptr, prefix)
        tl.store(states_ptr + 1, need)
        tl.store(states_ptr + 2, better_before)


@triton.jit(do_not_specialize=["S", "H", "total", "m", "blocks"])
def split_heads_kernel(flat_ptr, out_ptr, S, H, total, m, blocks, BLOCK: tl.constexpr):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    slots = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    flat_ptr += row // H * total
    begins_at = row % H * S
    begin = count_below(flat_ptr, total, begins_at)
    end = count_below(flat_ptr, total, begins_at + S)
    tokens = tl.load(flat_ptr + begin + slots, mask=begin + slots < end, other=0) - begins_at
    tl.store(out_ptr + row * m + slots, tl.where(begin + slots < end, tokens, -1), mask=slots < m)


def topk_indices(
    scores: torch.Tensor,
    keep_lengths: torch.Tensor | None,
    sink: int,
    recent: int,
    shared: bool,
    lengths: torch.Tensor | None,
    out: torch.Tensor,
    clear: torch.Tensor | None = None,
    from_end: bool = False,
) -> None:
    """Fill out [B, H, n] (shared: [B, 1, n]) int64 with the kept tokens, ascending; -1 beyond what a row keeps: n, or
    keep_lengths [B] or [B, H], or all of its tokens. clear, int32, is filled with zeros along the way. from_end: count
    them back from each row's last token, as `slots_from_end` does."""
    _select(scores, keep_lengths, out.shape[2], sink, recent, lengths, out, clear, _KEEP, from_end, shared)


def topk_adaptive(
    scores: torch.Tensor,
    n: int,
    keep_lengths: torch.Tensor | None,
    floor: tuple[int, int],
    sink: int,
    recent: int,
    lengths: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Fill out [B, H, m] int64 with the kept tokens, ascending, -1 behind: over its heads a request keeps the sum of
    what each of them may keep (n, or keep_lengths), and each head at least its protected tokens and the share floor
    (numerator, denominator) of its own."""
    B, H, S = scores.shape
    p, q = floor
    least = max(sink + recent, (2 * p * n + q) // (2 * q))
    floors = totals = None
    if lengths is not None or keep_lengths is not None:
        keep = torch.full((B, H), n, device=scores.device) if keep_lengths is None else _per_head(keep_lengths, B, H)
        floors = ((keep * (2 * p) + q) // (2 * q)).clamp(min=sink + recent).minimum(keep)
        totals = keep.sum(1)
        if lengths is not None:
            totals = totals.minimum(_per_head(lengths, B, H).sum(1))
    keys = torch.empty((B, H, S), dtype=torch.int32, device=scores.device)
    _select(scores, floors, least, sink, recent, lengths, keys, None, _MARK)
    flat = torch.empty((B, 1, H * n), dtype=torch.int64, device=scores.device)
    _select(keys.view(B, 1, H * S), totals, H * n, 0, 0, None, flat, None, _KEEP)
    m, BLOCK = out.shape[2], 1024  # 8 indices a thread
    split_heads_kernel[(B * H * cdiv(m, BLOCK),)](flat, out, S, H, H * n, m, cdiv(m, BLOCK), BLOCK=BLOCK)


def _per_head(counts: torch.Tensor, B: int, H: int) -> torch.Tensor:
    return (counts if counts.ndim == 2 else counts[:, None]).long().expand(B, H)


def evict_slots(scores: torch.Tensor, sink: int, recent: int, lengths: torch.Tensor | None, out: torch.Tensor) -> None:
    """Fill out [B, H, n] int64 with the n worst unprotected tokens, ascending; -1 where a row has fewer."""
    _select(scores, None, out.shape[2], sink, recent, lengths, out, None, _EVICT)


def _runs_at_once() -> bool:
    """Whether a launch can be promised that all of its programs run at once."""
    return not INTERPRETED and triton.runtime.driver.active.get_current_target().backend == "cuda"


def _select(
    scores, keep, n: int, sink: int, recent: int, lengths, out, clear, mode: tl.constexpr, from_end: bool = False,
    shared: bool = False,
) -> None:  # fmt: skip
    B, H, S = scores.shape
    averaged = None
    if shared and H > 1:
        averaged, H = H, 1
    rows = B * H
    config = select_config(rows, S, multiprocessors(scores.device))
    arrays = (scores, per_row(lengths), per_row(keep), out, clear, 0 if clear is None else clear.numel())
    sizes = (S, H, n, sink, recent, averaged, *scores.stride()[:2], out.stride(1))
    options = dict(BLOCK=config.block, MODE=mode, FROM_END=from_end, num_warps=config.num_warps)
    if config.held:
        select_row_kernel[(rows,)](*arrays, *sizes, HELD=config.held, **options)
        return

    def workspace(*shape, dtype=torch.int32):
        return torch.empty(shape, dtype=dtype, device=scores.device)

    splits = config.splits
    histograms = workspace(rows, 4, splits, 256)
    grid, sizes = (rows * splits,), (*sizes, splits, config.chunk)
    at_once = dict(FIRST=0, LAST=_WRITE, HELD=config.chunk <= config.block, **options)
    if splits == 1:
        select_runs_kernel[grid](*arrays, histograms, None, None, *sizes, **at_once)
    elif _runs_at_once():
        meeting = workspace(rows, 2, dtype=torch.int64)
        select_runs_kernel[grid](
            *arrays, histograms, None, meeting, *sizes, launch_cooperative_grid=True, maxnreg=128, **at_once
        )
    else:
        states = workspace(rows, splits, 3)
        for ROUND in range(_WRITE.value + 1):
            select_runs_kernel[grid](
                *arrays, histograms, states, None, *sizes, FIRST=ROUND, LAST=ROUND, HELD=False, **options
            )

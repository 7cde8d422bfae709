"""Exact selection in rows that lie on several ranks: each counts digits, the ranks add their counts up, and each writes
which of its own tokens are kept.

    count_digits_kernel  a histogram of one digit, of those candidates that share the digits before it
    kept_slots_kernel    twice: each run's kept tokens, counted, then written

As in select_topk.py a score is a key whose ascending order is the order of selection, and the last key that is kept is
found 8 bits at a time. A rank is one more level of runs, but ranks share no order of tokens from which ties could be
taken: the token's position in the sequence is the key's low end, so that no two tokens have the same number

    (key + 2³¹) · 2^bits + position,    position < 2^bits, bits <= 31

and all that is kept beside the protected tokens is what is not above the last one. Positions of a row ascend, -1 behind
the last token: so which tokens are protected, compete or are no tokens are ranges of slots, found by search once.

state [B, H, 5] int64: the digits that are known of the last number; which of the candidates with these digits it is,
from 1, or 0 if none is needed; and slots: where the first candidate is, where they end, where the tokens end. A launch
reads the state that the last one has left, and the digit's counts over all ranks since; it leaves its own.

Shapes: scores [B, H, L] float32 and positions [B, H, L] int64, last dimension contiguous, any strides else (0, where
heads share them); limits [B, 4] int64: the positions where sinks end, where recent tokens begin and where the request
ends, and how many candidates are needed; counts [B, H, bins] int32; out [B, H, n] int64, -1 beyond a row's own count.
Bytes per row: 4·L of scores a digit and 8·L twice more, in the digits of the position and the last launches positions
of ties alone; 8·n written. Counts of runs are added by integer atomics: in whatever order, they are the same.
Launch: 1 a digit and a clear of its counts, 2 to write; as many programs as are on the device at once.
"""

import torch
import triton
import triton.language as tl

from .launch_config import MAX_RANK_SPLITS, multiprocessors, ranks_config
from .primitives import count_below, descending_key

_VARYING = [
    "L", "H", "n", "stride_b", "stride_h", "place_b", "place_h", "bits", "left", "above", "bins", "bins_before",
    "splits", "chunk",
]  # fmt: skip
_BINS = tl.constexpr(256)
_LEAST = tl.constexpr(-0x80000000)
_STATE = tl.constexpr(5)
_SPLITS = tl.constexpr(MAX_RANK_SPLITS)


@triton.jit
def _narrowed(state_ptr, summed_ptr, bins):
    """The known digits of the last number and one more, and which of the candidates with these it is."""
    prefix, nth = tl.load(state_ptr), tl.load(state_ptr + 1)
    digits = tl.arange(0, _BINS)
    upto = tl.cumsum(tl.load(summed_ptr + digits, mask=digits < bins, other=0), 0).to(tl.int64)
    nth = tl.minimum(nth, tl.max(upto, 0))  # all of them, where there are fewer
    passed = upto < nth
    prefix = prefix * bins + tl.sum(passed.to(tl.int32), 0)
    return prefix, nth - tl.max(tl.where(passed, upto, 0), 0)


@triton.jit
def _order(row_ptr, tokens, inside):
    """int64 from 0 to 2³² - 1: a score's place in the order of selection."""
    return descending_key(tl.load(row_ptr + tokens, mask=inside, other=0.0)).to(tl.int64) - _LEAST


@triton.jit(do_not_specialize=_VARYING)
def count_digits_kernel(
    scores_ptr, positions_ptr, limits_ptr, before_ptr, summed_ptr, after_ptr, counts_ptr,
    L, H, stride_b, stride_h, place_b, place_h, bits, left, above, bins, bins_before, splits, chunk,
    OF_POSITION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The digit above `left` bits and below `above`."""
    row = (tl.program_id(0) // splits).to(tl.int64)
    split = tl.program_id(0) % splits
    b, h = row // H, row % H
    place_ptr = positions_ptr + b * place_b + h * place_h
    if summed_ptr is None:
        limits_ptr += b * 4
        first = count_below(place_ptr, L, tl.load(limits_ptr))
        last = count_below(place_ptr, L, tl.load(limits_ptr + 1))
        held = count_below(place_ptr, L, tl.load(limits_ptr + 2))
        prefix, nth = tl.full([], 0, tl.int64), tl.load(limits_ptr + 3)
    else:
        state_ptr = before_ptr + row * _STATE
        prefix, nth = _narrowed(state_ptr, summed_ptr + row * bins_before, bins_before)
        first, last, held = (tl.load(state_ptr + 2), tl.load(state_ptr + 3), tl.load(state_ptr + 4))
    if split == 0:
        state_ptr = after_ptr + row * _STATE
        tl.store(state_ptr, prefix)
        tl.store(state_ptr + 1, nth)
        tl.store(state_ptr + 2, first.to(tl.int64))
        tl.store(state_ptr + 3, last.to(tl.int64))
        tl.store(state_ptr + 4, held.to(tl.int64))
    row_ptr = scores_ptr + b * stride_b + h * stride_h
    begin = split * chunk
    end = tl.minimum(begin + chunk, L)
    counts = tl.zeros([_BINS], tl.int32)
    for start in range(begin, end, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        competes = (tokens >= first) & (tokens < tl.minimum(last, end))
        order = _order(row_ptr, tokens, competes)
        number = order << bits
        if OF_POSITION:
            competes = competes & (order == (prefix >> (bits - above)))
            number += tl.load(place_ptr + tokens, mask=competes, other=0)
        competes = competes & ((number >> above) == prefix)
        counts += tl.histogram(((number >> left) & (bins - 1)).to(tl.int32), _BINS, mask=competes)
    digits = tl.arange(0, _BINS)
    tl.atomic_add(counts_ptr + row * bins + digits, counts, mask=counts > 0, sem="relaxed")


@triton.jit(do_not_specialize=_VARYING)
def kept_slots_kernel(
    scores_ptr, positions_ptr, before_ptr, summed_ptr, found_ptr, out_ptr, held_ptr,
    L, H, n, stride_b, stride_h, place_b, place_h, bits, bins_before, splits, chunk,
    WRITE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count how many tokens a run keeps, found [rows, splits]; or, when all have, WRITE which."""
    row = (tl.program_id(0) // splits).to(tl.int64)
    split = tl.program_id(0) % splits
    b, h = row // H, row % H
    state_ptr = before_ptr + row * _STATE
    number, nth = _narrowed(state_ptr, summed_ptr + row * bins_before, bins_before)
    first, last, held = tl.load(state_ptr + 2), tl.load(state_ptr + 3), tl.load(state_ptr + 4)
    key, place = number >> bits, number - ((number >> bits) << bits)
    row_ptr = scores_ptr + b * stride_b + h * stride_h
    place_ptr = positions_ptr + b * place_b + h * place_h
    begin = split * chunk
    end = tl.minimum(begin + chunk, L)
    kept = tl.full([], 0, tl.int32)
    total = tl.full([], 0, tl.int32)
    if WRITE:
        runs = tl.arange(0, _SPLITS)
        found = tl.load(found_ptr + row * splits + runs, mask=runs < splits, other=0)
        kept = tl.sum(tl.where(runs < split, found, 0), 0)
        total = tl.minimum(tl.sum(found, 0), n)
        if split == 0:
            tl.store(held_ptr + row, total.to(tl.int64))
    for start in range(begin, end, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        competes = (tokens >= first) & (tokens < tl.minimum(last, end)) & (nth > 0)
        order = _order(row_ptr, tokens, competes)
        tied = competes & (order == key)
        places = tl.load(place_ptr + tokens, mask=tied, other=0)
        chosen = (competes & (order < key)) | (tied & (places <= place))
        chosen = (chosen | (tokens < first) | ((tokens >= last) & (tokens < held))) & (tokens < end)
        here = chosen.to(tl.int32)
        if WRITE:
            slots = kept + tl.cumsum(here, 0) - here
            tl.store(out_ptr + row * n + slots, tokens.to(tl.int64), mask=chosen & (slots < n))
            # n <= L, so tokens name slots as well: those beyond the row's count are its padding.
            padding = tl.full([BLOCK], -1, tl.int64)
            tl.store(out_ptr + row * n + tokens, padding, mask=(tokens >= total) & (tokens < tl.minimum(n, end)))
        kept += tl.sum(here, 0)
    if not WRITE:
        tl.store(found_ptr + row * splits + split, kept)


def _shape(scores: torch.Tensor, positions: torch.Tensor):
    B, H, L = scores.shape
    config = ranks_config(B * H, L, multiprocessors(scores.device))
    strides = (*scores.stride()[:2], *positions.stride()[:2])
    options = dict(BLOCK=config.block, num_warps=config.num_warps)
    return (B * H * config.splits,), (L, H), strides, (config.splits, config.chunk), options


def count_digits(
    scores: torch.Tensor,
    positions: torch.Tensor,
    limits: torch.Tensor,
    before: torch.Tensor | None,
    summed: torch.Tensor | None,
    bits: int,
    left: int,
    after: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    """Fill counts [B, H, 2^width] int32 with how many candidates of this rank have each value of the digit of `width`
    bits above the `left` lowest, of those that have the digits before it in common with the last token that is kept.

    before, after [B, H, 5]: the states. summed [B, H, 2^width]: what the digit before counted on all ranks. Of the
    first digit there are neither.
    """
    grid, sizes, strides, runs, options = _shape(scores, positions)
    bins = counts.shape[2]
    counts.zero_()
    count_digits_kernel[grid](
        scores, positions, limits, before, summed, after, counts, *sizes, *strides, bits, left,
        left + bins.bit_length() - 1, bins, 0 if summed is None else summed.shape[2], *runs, OF_POSITION=left < bits,
        **options,
    )  # fmt: skip


def kept_slots(
    scores: torch.Tensor,
    positions: torch.Tensor,
    before: torch.Tensor,
    summed: torch.Tensor,
    bits: int,
    out: torch.Tensor,
    held: torch.Tensor,
) -> None:
    """Fill out [B, H, n] int64 with the slots of this rank's kept tokens, ascending, -1 behind them, and held [B, H]
    int64 with their number, after the last digit of the position: before, summed as in `count_digits`."""
    grid, sizes, strides, runs, options = _shape(scores, positions)
    found = torch.empty((grid[0],), dtype=torch.int32, device=scores.device)
    for WRITE in (False, True):
        kept_slots_kernel[grid](
            scores, positions, before, summed, found, out, held, *sizes, out.shape[2], *strides, bits, summed.shape[2],
            *runs, WRITE=WRITE, **options,
        )  # fmt: skip

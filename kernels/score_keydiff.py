"""KeyDiff scores: -cos(key, anchor), where the anchor is the mean of a head's keys (arXiv 2504.15364, eq. 4).

    partial_anchor_kernel   [rows, splits, D] float32: each program sums one run of a row's (unit) keys
    keydiff_scores_kernel   [B, H, S] float32: each program adds up the partial sums of its row, divides by the
                            number of keys in them, and scores its own run of keys
    keydiff_row_kernel      both in one launch, a program per row: short rows, or as many rows as the device holds
                            programs

Shapes: keys [B, H, S, D], dense or paged (rows.py); a row is one (batch, head).
Bytes per row, e per element: K is read twice, 2·S·D·e, or once when the caller gives the anchor. The second pass
walks rows, runs and the tokens of a run from the end, where the first pass stopped, so that it finds in L2 what that
left there. Beside K: 4·S of scores, and the partial sums, splits·4D written and splits²·4D read from L2.
Launch: rows × splits programs each, twice; rows programs once where splits is 1. Splits do not depend on values, so the
order of every sum is fixed.

A key with an element that is not finite is in no anchor, and its score is NaN. A key of finite elements whose norm has
no float32 square (beyond 1.8e19) is scored like any other. Neither costs the usual keys anything: a program that meets
one does its run again, with care.
"""

import torch
import triton
import triton.language as tl

from .launch_config import multiprocessors, score_config
from .primitives import row_pointers
from .rows import cache_shape, load_float32, per_row, row_length, rows_at, rows_of

_LENGTH_DEPENDENT = ["S", "H", "splits", "chunk"]


@triton.jit
def _measure(key, CAREFUL: tl.constexpr):
    """Vectors [tokens, BLOCK_D] and the squares of their norms [tokens].

    CAREFUL: a vector whose square is not finite comes back times 2⁻⁷², and now its square is finite if its elements
    are: at most 2¹²⁸ · 2⁻⁷² each. Its direction is the same, and it is far above every epsilon.
    """
    square = tl.sum(key * key, 1)
    if CAREFUL:
        key *= tl.where(square < float("inf"), 1.0, 2.0**-72)[:, None]
        square = tl.sum(key * key, 1)
    return key, square


@triton.jit
def _sum_keys(
    keys, b, h, begin, end, columns,
    BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, STAGES: tl.constexpr, UNIT: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """[BLOCK_D]: the sum of the (unit) keys of tokens [begin, end); and the sum of their squares, for the caller to see
    whether all are finite. CAREFUL: the sum of the finite ones; and their number."""
    total = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    tally = tl.zeros([BLOCK_S], tl.float32)
    for start in tl.range(begin, end, BLOCK_S, num_stages=STAGES):
        tokens = start + tl.arange(0, BLOCK_S)
        here = tokens < end
        key = load_float32(keys, rows_at(keys, b, h, tokens, here), here, columns)
        measured, square = _measure(key, CAREFUL)
        if UNIT:
            key = measured * tl.rsqrt(tl.maximum(square, 1e-24))[:, None]
        if CAREFUL:
            finite = square < float("inf")
            total += tl.where(finite[:, None], key, 0.0)
            tally += (finite & here).to(tl.float32)
        else:
            total += key
            tally += square
    return tl.sum(total, 0), tl.sum(tally, 0)


@triton.jit
def _sum_finite_keys(
    keys, b, h, begin, end, columns,
    BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, STAGES: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """[BLOCK_D] and a number, float32: the sum of the finite (unit) keys of tokens [begin, end), and how many."""
    total, square = _sum_keys(keys, b, h, begin, end, columns, BLOCK_D, BLOCK_S, STAGES, UNIT, CAREFUL=False)
    count = tl.maximum(end - begin, 0).to(tl.float32)
    if not (square < float("inf")):
        total, count = _sum_keys(keys, b, h, begin, end, columns, BLOCK_D, BLOCK_S, 1, UNIT, CAREFUL=True)
    return total, count


@triton.jit
def _write_scores(
    keys, scores_ptr, b, h, begin, end, length, direction, columns,
    BLOCK_S: tl.constexpr, STAGES: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """Write the scores of tokens [begin, end) of a row, the last ones first. Returns the sum of the keys' squares, for
    the caller to see whether all are finite. CAREFUL: scores are right where they are not, too."""
    squares = tl.zeros([BLOCK_S], tl.float32)
    tiles = tl.cdiv(tl.maximum(end - begin, 0), BLOCK_S)
    for tile in tl.range(tiles, num_stages=STAGES):
        tokens = begin + (tiles - 1 - tile) * BLOCK_S + tl.arange(0, BLOCK_S)
        here = tokens < tl.minimum(end, length)
        key = load_float32(keys, rows_at(keys, b, h, tokens, here), here, columns)
        key, square = _measure(key, CAREFUL)
        score = -tl.sum(key * direction[None, :], 1) * tl.rsqrt(tl.maximum(square, 1e-16))
        if CAREFUL:
            score = tl.where(square < float("inf"), score, float("nan"))
        score = tl.where(tokens < length, score, float("-inf"))
        tl.store(scores_ptr + tokens, score, mask=tokens < end)
        squares += square
    return tl.sum(squares, 0)


@triton.jit
def _score_keys(
    keys, scores_ptr, b, h, begin, end, length, anchor, columns, BLOCK_S: tl.constexpr, STAGES: tl.constexpr
):  # fmt: skip
    """Write the scores of tokens [begin, end) of a row with that many valid tokens."""
    anchor, square = _measure(anchor[None, :], CAREFUL=True)
    direction = tl.sum(anchor * tl.rsqrt(tl.maximum(square, 1e-16))[:, None], 0)
    squares = _write_scores(
        keys, scores_ptr, b, h, begin, end, length, direction, columns, BLOCK_S, STAGES, CAREFUL=False
    )
    if not (squares < float("inf")):
        tl.debug_barrier()  # other threads may write these scores again
        _write_scores(keys, scores_ptr, b, h, begin, end, length, direction, columns, BLOCK_S, 1, CAREFUL=True)


@triton.jit(do_not_specialize=["S", "H"])
def keydiff_row_kernel(
    keys, lengths, scores_ptr, S, H,
    BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, STAGES: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    b, h = row // H, row % H
    length = row_length(lengths, b, h, S)
    columns = tl.arange(0, BLOCK_D)
    total, count = _sum_finite_keys(keys, b, h, 0, length, columns, BLOCK_D, BLOCK_S, STAGES, UNIT)
    scores_ptr += row.to(tl.int64) * S
    _score_keys(keys, scores_ptr, b, h, 0, S, length, total / count, columns, BLOCK_S, STAGES)


@triton.jit(do_not_specialize=_LENGTH_DEPENDENT)
def partial_anchor_kernel(
    keys, lengths, sums_ptr, counts_ptr, S, H, splits, chunk,
    BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, STAGES: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row, begin = program // splits, program % splits * chunk
    b, h = row // H, row % H
    end = tl.minimum(begin + chunk, row_length(lengths, b, h, S))
    columns = tl.arange(0, BLOCK_D)
    total, count = _sum_finite_keys(keys, b, h, begin, end, columns, BLOCK_D, BLOCK_S, STAGES, UNIT)
    tl.store(sums_ptr + program.to(tl.int64) * keys.width + columns, total, mask=columns < keys.width)
    tl.store(counts_ptr + program, count)


@triton.jit(do_not_specialize=[*_LENGTH_DEPENDENT, "parts"])
def keydiff_scores_kernel(
    keys, lengths, sums_ptr, counts_ptr, scores_ptr, S, H, splits, chunk, parts,
    BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    row, begin = program // splits, program % splits * chunk
    b, h = row // H, row % H
    columns = tl.arange(0, BLOCK_D)

    total = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    count = tl.zeros([BLOCK_S], tl.float32)
    first = row.to(tl.int64) * parts
    for start in range(0, parts, BLOCK_S):
        part = start + tl.arange(0, BLOCK_S)
        mask = (part < parts)[:, None] & (columns < keys.width)[None, :]
        total += tl.load(row_pointers(sums_ptr + first * keys.width, part, keys.width, columns), mask, 0.0)
        if counts_ptr is not None:
            count += tl.load(counts_ptr + first + part, part < parts, 0.0)
    anchor = tl.sum(total, 0)
    if counts_ptr is not None:
        anchor /= tl.sum(count, 0)
    length = row_length(lengths, b, h, S)
    end = tl.minimum(begin + chunk, S)
    scores_ptr += row.to(tl.int64) * S
    _score_keys(keys, scores_ptr, b, h, begin, end, length, anchor, columns, BLOCK_S, STAGES)


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
    config = score_config(B * H, S, D, keys.element_size(), multiprocessors(keys.device), two_passes=anchor is None)
    options = dict(
        BLOCK_D=config.block_dim, BLOCK_S=config.block_tokens, STAGES=config.stages, num_warps=config.num_warps
    )
    rows, row_lengths = rows_of(keys, table), per_row(lengths)
    if anchor is None and config.splits == 1:
        keydiff_row_kernel[(B * H,)](rows, row_lengths, out, S, H, UNIT=unit, **options)
        return
    grid, split = (B * H * config.splits,), (config.splits, config.chunk)
    if anchor is None:
        sums = torch.empty((B * H, config.splits, D), dtype=torch.float32, device=keys.device)
        counts = torch.empty((B * H, config.splits), dtype=torch.float32, device=keys.device)
        partial_anchor_kernel[grid](rows, row_lengths, sums, counts, S, H, *split, UNIT=unit, **options)
    else:
        sums, counts = anchor.to(torch.float32).reshape(B * H, 1, D).contiguous(), None
    keydiff_scores_kernel[grid](rows, row_lengths, sums, counts, out, S, H, *split, sums.shape[1], **options)

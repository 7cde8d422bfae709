"""KeyDiff scores: -cos(key, anchor), where the anchor is the mean of a head's keys (arXiv 2504.15364, eq. 4).

    partial_anchor_kernel   [rows, 1, D + 1] int64: each program sums one run of a row's unit keys, in units of 2⁻²²,
                            and counts them, and adds both to the row's; of raw keys [rows, splits, D + 1] float32
    keydiff_scores_kernel   [B, H, S] float32: each program divides its row's sum by the number of keys in it, and
                            scores its own run of keys
    keydiff_row_kernel      both in one launch, a program per row: short rows, or as many rows as the device holds
                            programs

Shapes: keys [B, H, S, D], dense or paged (rows.py); a row is one (batch, head).
Bytes per row, e per element: K is read twice, 2·S·D·e, or once when the caller gives the anchor. The second pass
walks rows, runs and the tokens of a run from the end, where the first pass stopped, so that it finds in L2 what that
left there. Beside K: 4·S of scores, and the sums, splits·8D each way; of raw keys splits²·4D read from L2.
Launch: rows × splits programs each, twice, and zeros for the sums before; rows programs once where splits is 1.

Unit keys are added as integers, each component rounded to a multiple of 2⁻²². So their sum depends neither on an order
nor on the splits, and with these on the number of multiprocessors, nor, where a sequence lies on several devices, on
how it is cut. Raw keys have no bound: their sums are float32, in an order that the splits decide, and not the values.

A key with an element that is not finite is in no anchor, and its score is NaN. A key of finite elements whose norm has
no float32 square (beyond 1.8e19) is scored like any other. Neither costs the usual keys anything: a program that meets
one does its run again, with care.
"""

import torch
import triton
import triton.language as tl

from .launch_config import ScoreConfig, multiprocessors, score_config
from .primitives import FIXED_TILES, fixed_squares, mean_of_fixed, over_norm, sum_fixed, to_fixed
from .rows import PerRow, Rows, cache_shape, load_float32, per_row, row_length, rows_at, rows_of

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
    """[BLOCK_D]: the sum of the keys of tokens [begin, end), UNIT: of unit keys, int64 in units of 2⁻²²; and the sum of
    their squares, for the caller to see whether all are finite. CAREFUL: the sum of the finite ones, and their number.
    """
    sums = tl.zeros([BLOCK_D], tl.int64 if UNIT else tl.float32)
    tally = tl.zeros([BLOCK_S], tl.float32)
    for first in range(begin, end, FIXED_TILES * BLOCK_S):
        total = tl.zeros([BLOCK_S, BLOCK_D], tl.int32 if UNIT else tl.float32)
        last = tl.minimum(first + FIXED_TILES * BLOCK_S, end)
        for start in tl.range(first, last, BLOCK_S, num_stages=STAGES):
            tokens = start + tl.arange(0, BLOCK_S)
            here = tokens < end
            key = load_float32(keys, rows_at(keys, b, h, tokens, here), here, columns)
            measured, square = _measure(key, CAREFUL)
            if UNIT:
                key = to_fixed(measured, tl.rsqrt(tl.maximum(square, 1e-24))[:, None])
            if CAREFUL:
                finite = square < float("inf")
                total += tl.where(finite[:, None], key, 0)
                tally += (finite & here).to(tl.float32)
            else:
                total += key
                tally += square
        if UNIT:
            sums += sum_fixed(total)
        else:
            sums += tl.sum(total, 0)
    return sums, tl.sum(tally, 0)


@triton.jit
def _sum_finite_keys(
    keys, b, h, begin, end, columns,
    BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, STAGES: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """[BLOCK_D] and an int32: the sum of the finite keys of tokens [begin, end), see `_sum_keys`, and their number."""
    sums, square = _sum_keys(keys, b, h, begin, end, columns, BLOCK_D, BLOCK_S, STAGES, UNIT, CAREFUL=False)
    count = tl.maximum(end - begin, 0)
    if not (square < float("inf")):
        sums, finite = _sum_keys(keys, b, h, begin, end, columns, BLOCK_D, BLOCK_S, 1, UNIT, CAREFUL=True)
        count = finite.to(tl.int32)
    return sums, count


@triton.jit
def _mean(sums, count):
    """The anchor from a row's sums, as `_sum_keys` gives them."""
    if sums.dtype == tl.int64:
        mean = mean_of_fixed(sums, count)
    else:
        mean = sums / count.to(tl.float32)
    return mean


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
    most = tl.maximum(tl.max(tl.abs(anchor), 0), 1e-37)
    direction = over_norm(anchor, most, fixed_squares(anchor, most))
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
    _score_keys(keys, scores_ptr, b, h, 0, S, length, _mean(total, count), columns, BLOCK_S, STAGES)


@triton.jit(do_not_specialize=_LENGTH_DEPENDENT)
def partial_anchor_kernel(
    keys, lengths, sums_ptr, S, H, splits, chunk,
    BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, STAGES: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row, begin = program // splits, program % splits * chunk
    b, h = row // H, row % H
    end = tl.minimum(begin + chunk, row_length(lengths, b, h, S))
    columns = tl.arange(0, BLOCK_D)
    total, count = _sum_finite_keys(keys, b, h, begin, end, columns, BLOCK_D, BLOCK_S, STAGES, UNIT)
    if UNIT:
        sums_ptr += row.to(tl.int64) * (keys.width + 1)
        tl.atomic_add(sums_ptr + columns, total, columns < keys.width, sem="relaxed")
        tl.atomic_add(sums_ptr + keys.width, count.to(tl.int64), sem="relaxed")
    else:
        sums_ptr += program.to(tl.int64) * (keys.width + 1)
        tl.store(sums_ptr + columns, total, columns < keys.width)
        tl.store(sums_ptr + keys.width, count.to(tl.float32))


@triton.jit(do_not_specialize=[*_LENGTH_DEPENDENT, "parts"])
def keydiff_scores_kernel(
    keys, lengths, sums_ptr, scores_ptr, S, H, splits, chunk, parts,
    BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, STAGES: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """sums [rows, parts, D + 1], the last column a count; COUNTED=False: [rows, 1, D], the anchors."""
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    row, begin = program // splits, program % splits * chunk
    b, h = row // H, row % H
    columns = tl.arange(0, BLOCK_D)

    anchor = tl.zeros([BLOCK_D], sums_ptr.dtype.element_ty)
    count = tl.full([], 0, sums_ptr.dtype.element_ty)
    width = keys.width + 1 if COUNTED else keys.width
    for part in range(0, parts):
        part_ptr = sums_ptr + (row.to(tl.int64) * parts + part) * width
        anchor += tl.load(part_ptr + columns, columns < keys.width, 0)
        if COUNTED:
            count += tl.load(part_ptr + keys.width)
    if COUNTED:
        anchor = _mean(anchor, count)
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
        sums = _anchor_sums(rows, row_lengths, B, H, S, config, unit)
    else:
        sums = anchor.to(torch.float32).reshape(B * H, 1, D).contiguous()
    keydiff_scores_kernel[grid](
        rows, row_lengths, sums, out, S, H, *split, sums.shape[1], COUNTED=anchor is None, **options
    )


def _anchor_sums(
    rows: Rows, lengths: PerRow | None, B: int, H: int, S: int, config: ScoreConfig, unit: bool
) -> torch.Tensor:
    """[B · H, 1, D + 1] int64, of unit keys, or [B · H, splits, D + 1] float32: sums, and how many keys are in them."""
    shape = (B * H, 1 if unit else config.splits, rows.width.value + 1)
    allocate, dtype = (torch.zeros, torch.int64) if unit else (torch.empty, torch.float32)
    sums = allocate(shape, dtype=dtype, device=rows.ptr.device)
    partial_anchor_kernel[(B * H * config.splits,)](
        rows, lengths, sums, S, H, config.splits, config.chunk, BLOCK_D=config.block_dim, BLOCK_S=config.block_tokens,
        STAGES=config.stages, num_warps=config.num_warps, UNIT=unit,
    )  # fmt: skip
    return sums


def anchor_sums(keys: torch.Tensor, lengths: torch.Tensor | None, sums: torch.Tensor, counts: torch.Tensor) -> None:
    """Fill sums [B, H, D] and counts [B, H], int64: of the unit keys that are finite, in units of 2⁻²², and how many
    they are. Those of parts of a sequence add up to those of the whole."""
    B, H, S, D = keys.shape
    config = score_config(B * H, S, D, keys.element_size(), multiprocessors(keys.device), two_passes=False)
    found = _anchor_sums(rows_of(keys), per_row(lengths), B, H, S, config, unit=True).view(B, H, D + 1)
    sums.copy_(found[..., :D])
    counts.copy_(found[..., D])

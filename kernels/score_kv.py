"""Scores from keys before RoPE: KeyDiff on them, and a fitted scorer that reads keys and values.

    rotary_anchor_kernel   [rows, 2 · pairs + 1] int64: each program sums one run of a row's unit keys, turned back, and
                           counts them, and adds both to the row's, as in score_keydiff.py
    kv_scores_kernel       [B, H, S] float32: each program scores one run of tokens:
                               keydiff_i = -cos(k_i, a), a = mean of k_i / ‖k_i‖
                               fitted_i  = w · (k_i, v_i, ln ‖k_i‖, ln ‖v_i‖, cos(k_i, a), 1)

k_i is the cached key i turned back by its position p: of each pair of elements that RoPE turns by the angle p·θ_j. A
turn keeps norms.

Shapes: keys [B, H, S, D], values [B, H, S, Dv], dense or paged (rows.py); a row is one (batch, head). RoPE turns the
first R elements, pair j of them (j, R/2 + j), as Llama does; the others stay, as pairs whose angle is 0.
Bytes per row, e per element: K twice, 2·S·D·e, and V once, S·Dv·e, where there is a fitted score; 4·S of each score
written; positions read twice, where they are given.
Launch: zeros for the sums, then rows × splits programs each, as score_keydiff.py, whose order of tokens the second pass
has as well.

A key or value whose squared norm is not finite in float32 is not in the mean, and its scores are NaN.
"""

import math

import torch
import triton
import triton.language as tl

from .launch_config import multiprocessors, score_config
from .primitives import FIXED_TILES, fixed_squares, mean_of_fixed, over_norm, sum_fixed, to_fixed, to_float32
from .rows import PerRow, cache_shape, load_float32, per_row, row_length, rows_at, rows_of

_LENGTH_DEPENDENT = ["S", "H", "splits", "chunk"]
_PER_TURN = tl.constexpr(2.0**32 / (2 * math.pi))  # angles are counted in 2⁻³² turns, which wrap as int32 does


@triton.jit
def _angles(inv_freq_ptr, PAIRS: tl.constexpr, BLOCK_P: tl.constexpr):
    """[BLOCK_P] int32: by how much a position turns each pair, in 2⁻³² turns; 0 beyond those of RoPE. What this cuts
    off is less than one of them a position: 0.0015 rad after a million."""
    pair = tl.arange(0, BLOCK_P)
    frequency = tl.load(inv_freq_ptr + pair, mask=pair < PAIRS, other=0.0).to(tl.float64)
    return (frequency * _PER_TURN).to(tl.int64).to(tl.int32)


@triton.jit
def _cos_sin(phase):
    """Of an angle in 2⁻³² turns, int32, to 2e-7: the series of its half, which is within ±π/2, and doubled."""
    x = phase.to(tl.float32) * 3.141592653589793 * 2.0**-32
    y = x * x
    sine = x * (1 + y * (-1 / 6 + y * (1 / 120 + y * (-1 / 5040 + y * (1 / 362880 - y * (1 / 39916800))))))
    cosine = 1 + y * (
        -1 / 2 + y * (1 / 24 + y * (-1 / 720 + y * (1 / 40320 + y * (-1 / 3628800 + y * (1 / 479001600)))))
    )
    return 1 - 2 * sine * sine, 2 * sine * cosine


@triton.jit
def _columns(PAIRS: tl.constexpr, WIDTH: tl.constexpr, RUN: tl.constexpr, BLOCK_P: tl.constexpr):
    """[BLOCK_P] twice: where the two elements of each of WIDTH / 2 pairs lie in a row. RUN divides PAIRS and WIDTH / 2:
    so long are the runs whose ends Triton cannot see, where some elements are not turned."""
    pair = tl.arange(0, BLOCK_P)
    if 2 * PAIRS == WIDTH:
        first, second = pair, pair + PAIRS
    else:
        first = tl.where(pair < PAIRS, pair, pair + PAIRS)
        second = tl.where(pair < PAIRS, pair + PAIRS, pair + WIDTH // 2)
        first = tl.max_contiguous(tl.multiple_of(first, RUN), RUN)
        second = tl.max_contiguous(tl.multiple_of(second, RUN), RUN)
    return first, second


@triton.jit
def _load_turned_back(
    keys, b, h, tokens, here, positions, angles, PAIRS: tl.constexpr, RUN: tl.constexpr, BLOCK_P: tl.constexpr
):
    """The two elements of each pair of the keys before RoPE, [tokens, BLOCK_P] float32 each."""
    if positions is None:
        position = tokens.to(tl.int32)
    else:
        row = b.to(tl.int64) * (positions.stride_b >> 1) + h.to(tl.int64) * (positions.stride_h >> 1)
        position = tl.load(positions.ptr + row + tokens, mask=here, other=0).to(tl.int32)
    cosine, sine = _cos_sin(position[:, None] * angles[None, :])
    first, second = _columns(PAIRS, keys.width, RUN, BLOCK_P)
    pointers = rows_at(keys, b, h, tokens, here)[:, None]
    mask = here[:, None] & (tl.arange(0, BLOCK_P) < keys.width // 2)[None, :]
    x = to_float32(tl.load(pointers + first[None, :], mask=mask, other=0.0), keys.e4m3_bytes)
    y = to_float32(tl.load(pointers + second[None, :], mask=mask, other=0.0), keys.e4m3_bytes)
    return x * cosine + y * sine, y * cosine - x * sine


@triton.jit(do_not_specialize=_LENGTH_DEPENDENT)
def rotary_anchor_kernel(
    keys, lengths, positions, inv_freq_ptr, sums_ptr, S, H, splits, chunk,
    PAIRS: tl.constexpr, RUN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row, begin = program // splits, program % splits * chunk
    b, h = row // H, row % H
    end = tl.minimum(begin + chunk, row_length(lengths, b, h, S))
    angles = _angles(inv_freq_ptr, PAIRS, BLOCK_P)
    sums_x, sums_y = tl.zeros([BLOCK_P], tl.int64), tl.zeros([BLOCK_P], tl.int64)
    count = tl.zeros([BLOCK_S], tl.int32)
    for first in range(begin, end, FIXED_TILES * BLOCK_S):
        sum_x, sum_y = tl.zeros([BLOCK_S, BLOCK_P], tl.int32), tl.zeros([BLOCK_S, BLOCK_P], tl.int32)
        for start in range(first, tl.minimum(first + FIXED_TILES * BLOCK_S, end), BLOCK_S):
            tokens = start + tl.arange(0, BLOCK_S)
            here = tokens < end
            x, y = _load_turned_back(keys, b, h, tokens, here, positions, angles, PAIRS, RUN, BLOCK_P)
            square = tl.sum(x * x + y * y, 1)
            counts = here & (square < float("inf"))
            inverse = tl.rsqrt(tl.maximum(square, 1e-24))[:, None]
            sum_x += tl.where(counts[:, None], to_fixed(x, inverse), 0)
            sum_y += tl.where(counts[:, None], to_fixed(y, inverse), 0)
            count += counts.to(tl.int32)
        sums_x += sum_fixed(sum_x)
        sums_y += sum_fixed(sum_y)
    columns = tl.arange(0, BLOCK_P)
    sums_ptr += row.to(tl.int64) * (2 * BLOCK_P + 1)
    tl.atomic_add(sums_ptr + columns, sums_x, sem="relaxed")
    tl.atomic_add(sums_ptr + BLOCK_P + columns, sums_y, sem="relaxed")
    tl.atomic_add(sums_ptr + 2 * BLOCK_P, tl.sum(count, 0).to(tl.int64), sem="relaxed")


@triton.jit
def _direction(sums_ptr, row, BLOCK_P: tl.constexpr):
    """[BLOCK_P] twice: the mean of a row's unit keys over its own norm."""
    columns = tl.arange(0, BLOCK_P)
    sums_ptr += row.to(tl.int64) * (2 * BLOCK_P + 1)
    number = tl.load(sums_ptr + 2 * BLOCK_P)
    x = mean_of_fixed(tl.load(sums_ptr + columns), number)
    y = mean_of_fixed(tl.load(sums_ptr + BLOCK_P + columns), number)
    most = tl.maximum(tl.maximum(tl.max(tl.abs(x), 0), tl.max(tl.abs(y), 0)), 1e-37)
    squares = fixed_squares(x, most) + fixed_squares(y, most)
    return over_norm(x, most, squares), over_norm(y, most, squares)


@triton.jit(do_not_specialize=[*_LENGTH_DEPENDENT, "weights_stride_b"])
def kv_scores_kernel(
    keys, values, lengths, positions, inv_freq_ptr, weights_ptr, weights_stride_b, sums_ptr, fitted_ptr,
    keydiff_ptr, S, H, splits, chunk,
    PAIRS: tl.constexpr, RUN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    row, begin = program // splits, program % splits * chunk
    b, h = row // H, row % H
    angles = _angles(inv_freq_ptr, PAIRS, BLOCK_P)
    mean_x, mean_y = _direction(sums_ptr, row, BLOCK_P)
    first, second = _columns(PAIRS, keys.width, RUN, BLOCK_P)
    value_columns = tl.arange(0, BLOCK_V)
    if weights_ptr is not None:
        weights_ptr += b.to(tl.int64) * weights_stride_b + h.to(tl.int64) * (keys.width + values.width + 4)
        pair_there = tl.arange(0, BLOCK_P) < keys.width // 2
        weight_x = tl.load(weights_ptr + first, mask=pair_there, other=0.0)
        weight_y = tl.load(weights_ptr + second, mask=pair_there, other=0.0)
        weights_ptr += keys.width
        weight_v = tl.load(weights_ptr + value_columns, mask=value_columns < values.width, other=0.0)
        weights_ptr += values.width
    length = row_length(lengths, b, h, S)
    end = tl.minimum(begin + chunk, S)
    row = row.to(tl.int64) * S
    tiles = tl.cdiv(tl.maximum(end - begin, 0), BLOCK_S)
    for tile in range(tiles):
        tokens = begin + (tiles - 1 - tile) * BLOCK_S + tl.arange(0, BLOCK_S)
        here = tokens < tl.minimum(end, length)
        x, y = _load_turned_back(keys, b, h, tokens, here, positions, angles, PAIRS, RUN, BLOCK_P)
        square = tl.sum(x * x + y * y, 1)
        cosine = tl.sum(x * mean_x[None, :] + y * mean_y[None, :], 1) * tl.rsqrt(tl.maximum(square, 1e-16))
        finite = square < float("inf")
        if keydiff_ptr is not None:
            score = tl.where(finite, -cosine, float("nan"))
            score = tl.where(tokens < length, score, float("-inf"))
            tl.store(keydiff_ptr + row + tokens, score, mask=tokens < end)
        if weights_ptr is not None:
            value = load_float32(values, rows_at(values, b, h, tokens, here), here, value_columns)
            value_square = tl.sum(value * value, 1)
            score = tl.sum(x * weight_x[None, :] + y * weight_y[None, :], 1) + tl.sum(value * weight_v[None, :], 1)
            score += tl.load(weights_ptr) * 0.5 * tl.log(tl.maximum(square, 1e-24))
            score += tl.load(weights_ptr + 1) * 0.5 * tl.log(tl.maximum(value_square, 1e-24))
            score += tl.load(weights_ptr + 2) * cosine + tl.load(weights_ptr + 3)
            score = tl.where(finite & (value_square < float("inf")), score, float("nan"))
            score = tl.where(tokens < length, score, float("-inf"))
            tl.store(fitted_ptr + row + tokens, score, mask=tokens < end)


def kv_scores(
    keys: torch.Tensor,
    values: torch.Tensor | None,
    weights: torch.Tensor | None,
    inv_freq: torch.Tensor,
    positions: torch.Tensor | None,
    lengths: torch.Tensor | None,
    fitted: torch.Tensor | None,
    keydiff: torch.Tensor | None,
    table: torch.Tensor | None = None,
) -> None:
    """Fill `fitted` and `keydiff` [B, H, S] float32, where they are given; -inf at and beyond a row's length.

    values and weights [H, D + Dv + 4] or [B, H, ...] float32 are given with `fitted`. inv_freq [R/2] float32: θ of
    each pair. positions [B, S] or [B, H, S] int, None: 0 to S - 1.
    """
    B, H, S, D = cache_shape(keys, table)
    config = score_config(B * H, S, D, keys.element_size(), multiprocessors(keys.device), two_passes=False)
    pairs = inv_freq.shape[0]
    block_pairs = triton.next_power_of_2(D // 2)
    options = dict(
        PAIRS=pairs, RUN=math.gcd(16, pairs, D // 2), BLOCK_P=block_pairs, num_warps=config.num_warps,
        BLOCK_S=max(config.block_tokens // 2, 4),  # beside a tile of keys there are its angles
    )  # fmt: skip
    rows, row_lengths = rows_of(keys, table), per_row(lengths)
    places = None
    if positions is not None:
        # Twice the strides and one, as those of a block table (rows.py): they grow with the length.
        of_heads = 2 * positions.stride(1) + 1 if positions.ndim == 3 else 1
        places = PerRow(positions, 2 * positions.stride(0) + 1, of_heads)
    grid, split = (B * H * config.splits,), (config.splits, config.chunk)
    sums = torch.zeros((B * H, 2 * block_pairs + 1), dtype=torch.int64, device=keys.device)
    rotary_anchor_kernel[grid](rows, row_lengths, places, inv_freq, sums, S, H, *split, **options)
    value_rows = None if values is None else rows_of(values, table)
    of_request = weights.stride(0) if weights is not None and weights.ndim == 3 else 0
    kv_scores_kernel[grid](
        rows, value_rows, row_lengths, places, inv_freq, weights, of_request, sums, fitted, keydiff,
        S, H, *split,
        BLOCK_V=1 if values is None else triton.next_power_of_2(values.shape[3]), **options,
    )  # fmt: skip

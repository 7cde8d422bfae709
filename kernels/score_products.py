"""Scores from products of a token's key or value with a matrix, which never leave the chip.

    quadratic_kernel        [B, Hq, S]: k · (A k + b), with A [D, D] and b [D] of each query head: what a key draws
                            in the mean from queries of known mean and covariance (arXiv 2510.00636)
    projected_norms_kernel  [B, H, S]: ‖W v‖₁, with W [M, Dv] of each query head, mean over the group: what a value can
                            add to the residual stream (arXiv 2502.03805)

Shapes: keys [B, H, S, D], values [B, H, S, Dv], any strides (rows.py); the G = Hq/H query heads of a KV head share its
rows. A comes as a sum of two matrices in the keys' type, so that its products have 16 bits on tensor cores.
Bytes per (batch, KV head): K or V once from memory and again from L1 or L2 for every tile of the matrix; the matrices
of the group from L2 for every block of tokens; 4·S·G (4·S) of scores.
Operations: 2·S·G·D² (twice that in 16 bits), 2·S·G·M·Dv, on tensor cores in 16 bits.
Launch: one program per block of tokens of a row; it walks the group's matrices a tile at a time.
"""

import torch
import triton
import triton.language as tl

from .launch_config import cdiv, product_config
from .primitives import dot_type
from .rows import load_float32, per_row, row_length, rows_at, rows_of
from .score_attention import load_tile, product

_LENGTH_DEPENDENT = ["S", "H"]


@triton.jit(do_not_specialize=_LENGTH_DEPENDENT)
def quadratic_kernel(
    keys, high, low, linear_ptr, lengths, out_ptr, S, H,
    G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(S, BLOCK_S)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = row // H, row % H
    length = row_length(lengths, b, h, S)
    tokens = tl.program_id(0) % blocks * BLOCK_S + tl.arange(0, BLOCK_S)
    inside = tokens < length
    pointers = rows_at(keys, b, h, tokens, inside)
    key = load_tile(keys, pointers, inside, tl.arange(0, BLOCK_D), COMPUTE)
    for g in range(0, G):
        head = h * G + g
        score = tl.zeros([BLOCK_S], tl.float32)
        for first in range(0, keys.width, BLOCK_M):
            m = first + tl.arange(0, BLOCK_M)
            there = m < keys.width
            times = product(
                key, keys, pointers, inside, high, rows_at(high, b, head, m, there), there, BLOCK_D, COMPUTE
            )
            if low is not None:
                times += product(
                    key, keys, pointers, inside, low, rows_at(low, b, head, m, there), there, BLOCK_D, COMPUTE
                )
            times += tl.load(linear_ptr + (b * H * G + head) * keys.width + m, mask=there, other=0.0)[None, :]
            score += tl.sum(times * load_float32(keys, pointers, inside, m), 1)
        score = tl.where(inside, score, float("-inf"))
        tl.store(out_ptr + (b * H * G + head) * S + tokens, score, mask=tokens < S)


@triton.jit(do_not_specialize=_LENGTH_DEPENDENT)
def projected_norms_kernel(
    values, weight, lengths, out_ptr, S, H, M,
    G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(S, BLOCK_S)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = row // H, row % H
    length = row_length(lengths, b, h, S)
    tokens = tl.program_id(0) % blocks * BLOCK_S + tl.arange(0, BLOCK_S)
    inside = tokens < length
    pointers = rows_at(values, b, h, tokens, inside)
    value = load_tile(values, pointers, inside, tl.arange(0, BLOCK_D), COMPUTE)
    norm = tl.zeros([BLOCK_S], tl.float32)
    for g in range(0, G):
        for first in range(0, M, BLOCK_M):
            m = first + tl.arange(0, BLOCK_M)
            there = m < M
            times = product(
                value, values, pointers, inside, weight, rows_at(weight, b, h * G + g, m, there), there,
                BLOCK_D, COMPUTE,
            )  # fmt: skip
            norm += tl.sum(tl.abs(times), 1)
    tl.store(out_ptr + row * S + tokens, tl.where(inside, norm / G, float("-inf")), mask=tokens < S)


def quadratic_scores(
    keys: torch.Tensor,
    linear: torch.Tensor,
    quadratic: torch.Tensor,
    lengths: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Fill out [B, Hq, S] float32 with k · (A k + b); -inf at and beyond a row's length. linear: b [B, Hq, D];
    quadratic: A [B, Hq, D, D], symmetric; both float32, contiguous."""
    B, H, S, D = keys.shape
    G = linear.shape[1] // H
    compute, size = dot_type(keys)
    high, low = quadratic, None
    if keys.element_size() < 4:
        kind = torch.float16 if keys.dtype == torch.float16 else torch.bfloat16
        high = quadratic.to(kind)
        low = (quadratic - high).to(kind)
    config = product_config(D, size, 1 if low is None else 2)
    quadratic_kernel[(B * H * cdiv(S, config.block_tokens),)](
        rows_of(keys), rows_of(high), None if low is None else rows_of(low), linear, per_row(lengths), out, S, H,
        G=G, BLOCK_D=config.block_dim, BLOCK_S=config.block_tokens, BLOCK_M=config.block_rows, COMPUTE=compute,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def projected_norms(
    values: torch.Tensor, weight: torch.Tensor, lengths: torch.Tensor | None, out: torch.Tensor
) -> None:
    """Fill out [B, H, S] float32 with Σ_m |w_m · v|, the mean over the group; -inf at and beyond a row's length.
    weight [M, Hq · Dv], an nn.Linear's, rows contiguous."""
    B, H, S, DV = values.shape
    M, width = weight.shape
    matrices = weight.unflatten(1, (width // DV, DV)).transpose(0, 1).expand(B, -1, -1, -1)  # [B, Hq, M, Dv]
    compute, size = dot_type(values)
    config = product_config(DV, size, 1)
    projected_norms_kernel[(B * H * cdiv(S, config.block_tokens),)](
        rows_of(values), rows_of(matrices), per_row(lengths), out, S, H, M,
        G=width // DV // H, BLOCK_D=config.block_dim, BLOCK_S=config.block_tokens, BLOCK_M=config.block_rows,
        COMPUTE=compute, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip

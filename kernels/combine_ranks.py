"""A weighted sum of scores by rank: of each part, the share of a row's other tokens that score lower, ties halfway.

Shapes: parts and out [B, H, S] float32, contiguous. A score of -inf is no token: it
counts in no row, and is -inf in the sum; NaN is NaN and counts in no row either.
Bytes per row and part: 4·S read once by each block of tokens, from L2 after the first; 4·S written once.
Operations: S²·2 comparisons of a row and part, so many that a row of 1,000 takes as long as reading its keys, where a
sort would be a dozen launches.
Launch: one program per block of 64 tokens of a row, for all parts.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .launch_config import cdiv
from .rows import per_row, row_length


@triton.jit
def _rank(row_ptr, own, length, BLOCK: tl.constexpr):
    """In [0, 1], of scores `own` [BLOCK] among those of their row."""
    below = tl.zeros([BLOCK], tl.int32)
    tied = tl.zeros([BLOCK], tl.int32)
    present = tl.zeros([BLOCK], tl.int32)
    for start in range(0, length, BLOCK):
        others = start + tl.arange(0, BLOCK)
        score = tl.load(row_ptr + others, mask=others < length, other=float("-inf"))
        there = score > float("-inf")  # NaN is not, either
        present += there.to(tl.int32)
        below += tl.sum((there[None, :] & (score[None, :] < own[:, None])).to(tl.int32), 1)
        tied += tl.sum((there[None, :] & (score[None, :] == own[:, None])).to(tl.int32), 1)
    count = tl.maximum(tl.sum(present, 0) - 1, 1)
    return tl.div_rn((2 * below + tied - 1).to(tl.float32), (2 * count).to(tl.float32))


@triton.jit(do_not_specialize=["S", "H", "blocks"])
def combine_ranks_kernel(parts, weights, lengths, out_ptr, S, H, blocks, BLOCK: tl.constexpr):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = row // H, row % H
    tokens = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    length = row_length(lengths, b, h, S)
    total = tl.zeros([BLOCK], tl.float32)
    absent = tl.zeros([BLOCK], tl.int1)
    for i in tl.static_range(len(parts)):
        row_ptr = parts[i] + row * S
        own = tl.load(row_ptr + tokens, mask=tokens < length, other=float("-inf"))
        rank = _rank(row_ptr, own, length, BLOCK)
        total += tl.where(own != own, float("nan"), rank * weights[i])
        absent = absent | (own == float("-inf"))
    tl.store(out_ptr + row * S + tokens, tl.where(absent, float("-inf"), total), mask=tokens < S)


def combine_ranks(
    parts: Sequence[torch.Tensor], weights: Sequence[float], lengths: torch.Tensor | None, out: torch.Tensor
) -> None:
    """Fill out [B, H, S] float32 with Σ weight · rank of the parts [B, H, S]; -inf where one is -inf, and at and
    beyond a row's length, NaN where one is NaN."""
    B, H, S = out.shape
    BLOCK = 64  # 64 · 64 comparisons at a time, 32 a thread
    blocks = cdiv(S, BLOCK)
    # As every scorer gives them; of strides in a tuple Triton would compile a variant for each kind.
    rows = tuple(part.contiguous() for part in parts)
    combine_ranks_kernel[(B * H * blocks,)](
        rows, tuple(map(float, weights)), per_row(lengths), out, S, H, blocks, BLOCK=BLOCK
    )

"""Pooling of scores along the sequence, so that a token's neighbours are kept with it (SnapKV, arXiv 2404.14469).

Shapes: scores and out [B, H, S] float32, last dimension contiguous. A position of score -inf holds no token: it is
padding for its neighbours, as beyond the edges, and stays -inf. So are a row's last `window` tokens.
Bytes per (batch, head): 4·S read (kernel_size times, all but the first from L1) and 4·S written.
Launch: one program per 1,024 positions.
"""

import torch
import triton
import triton.language as tl

from .launch_config import cdiv
from .rows import per_row, row_length


@triton.jit(do_not_specialize=["S", "H", "blocks", "kernel_size", "window", "stride_b", "stride_h"])
def pool_scores_kernel(
    scores_ptr, lengths, out_ptr, S, H, blocks, stride_b, stride_h, kernel_size, window,
    AVERAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = row // H, row % H
    row_ptr = scores_ptr + b * stride_b + h * stride_h
    end = row_length(lengths, b, h, S) - window
    tokens = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    none = float("-inf")
    pooled = tl.full([BLOCK], 0.0 if AVERAGE else none, tl.float32)
    for tap in range(0, kernel_size):
        near = tokens + tap - kernel_size // 2
        score = tl.load(row_ptr + near, mask=(near >= 0) & (near < end), other=none)
        if AVERAGE:
            pooled += tl.where(score == none, 0.0, score)
        else:
            pooled = tl.maximum(pooled, score, propagate_nan=tl.PropagateNan.ALL)
    if AVERAGE:
        pooled = pooled / kernel_size
    own = tl.load(row_ptr + tokens, mask=tokens < end, other=none)
    tl.store(out_ptr + row * S + tokens, tl.where(own == none, none, pooled), mask=tokens < S)


def pool_scores(
    scores: torch.Tensor,
    kernel_size: int,
    average: bool,
    window: int,
    lengths: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Fill out [B, H, S] with the average (padding counts as 0) or maximum over kernel_size neighbours, itself in the
    middle; -inf where scores are -inf. The last `window` tokens of a row are taken for -inf."""
    B, H, S = scores.shape
    BLOCK = 1024  # 8 scores a thread
    blocks = cdiv(S, BLOCK)
    pool_scores_kernel[(B * H * blocks,)](
        scores,
        per_row(lengths),
        out,
        S,
        H,
        blocks,
        *scores.stride()[:2],
        kernel_size,
        window,
        AVERAGE=average,
        BLOCK=BLOCK,
    )

"""KeyNorm scores: -‖key‖ (arXiv 2406.11430).

Shapes: keys [B, H, S, D], any strides with a contiguous last dimension, or paged [blocks, H, block_size, D] under a
block table; scores [B, H, S] float32.
Bytes per (batch, head): K once, S·D·e, and 4·S of scores.
Launch: one program per run of tokens, as many as fill the device.
"""

import torch
import triton
import triton.language as tl

from .launch_config import multiprocessors, score_config
from .primitives import PAGING, cache_shape, paging, plain_bytes, row_length, to_float32, token_pointers


@triton.jit(do_not_specialize=["S", "H", "splits", "chunk", *PAGING])
def key_norm_kernel(
    keys_ptr, table_ptr, lengths_ptr, scores_ptr, S, H, table_stride, block_size,
    stride_b, stride_h, stride_s, splits, chunk,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, DECODE_E4M3: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // splits).to(tl.int64)
    split = tl.program_id(0) % splits
    b, h = row // H, row % H
    length = row_length(lengths_ptr, b, S)
    columns = tl.arange(0, BLOCK_D)
    begin = split * chunk
    end = tl.minimum(begin + chunk, S)
    for start in range(begin, end, BLOCK_S):
        tokens = start + tl.arange(0, BLOCK_S)
        here = tokens < tl.minimum(end, length)
        pointers = token_pointers(
            keys_ptr, table_ptr, table_stride, block_size, b, h, tokens, here, stride_b, stride_h, stride_s, columns
        )
        key = tl.load(pointers, mask=here[:, None] & (columns < D)[None, :], other=0.0)
        key = to_float32(key, DECODE_E4M3)
        score = tl.where(tokens < length, -tl.sqrt_rn(tl.sum(key * key, 1)), float("-inf"))
        tl.store(scores_ptr + row * S + tokens, score, mask=tokens < end)


def key_norm_scores(
    keys: torch.Tensor, lengths: torch.Tensor | None, out: torch.Tensor, table: torch.Tensor | None = None
) -> None:
    """Fill out [B, H, S] float32 with -‖key‖; -inf at and beyond a row's length."""
    B, H, S, D = cache_shape(keys, table)
    config = score_config(B * H, S, D, multiprocessors(keys.device))
    strides = (*paging(keys, table), *keys.stride()[:3])
    keys, decode = plain_bytes(keys)
    key_norm_kernel[(B * H * config.splits,)](
        keys, table, lengths, out, S, H, *strides, config.splits, config.chunk,
        D=D, BLOCK_D=config.block_dim, BLOCK_S=config.block_tokens, DECODE_E4M3=decode, num_warps=config.num_warps,
    )  # fmt: skip

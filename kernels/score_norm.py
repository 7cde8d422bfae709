"""KeyNorm scores: -‖key‖ (arXiv 2406.11430).

Shapes: keys [B, H, S, D], dense or paged (rows.py); scores [B, H, S] float32.
Bytes per (batch, head): K once, S·D·e, and 4·S of scores.
Launch: one program per run of tokens, as many as fill the device.
"""

import torch
import triton
import triton.language as tl

from .launch_config import multiprocessors, score_config
from .rows import cache_shape, load_float32, per_row, row_length, rows_at, rows_of


@triton.jit(do_not_specialize=["S", "H", "splits", "chunk"])
def key_norm_kernel(
    keys, lengths, scores_ptr, S, H, splits, chunk,
    BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    b, h = row // H, row % H
    length = row_length(lengths, b, h, S)
    columns = tl.arange(0, BLOCK_D)
    begin = split * chunk
    scores_ptr += row.to(tl.int64) * S
    end = tl.minimum(begin + chunk, S)
    for start in tl.range(begin, end, BLOCK_S, num_stages=STAGES):
        tokens = start + tl.arange(0, BLOCK_S)
        here = tokens < tl.minimum(end, length)
        key = load_float32(keys, rows_at(keys, b, h, tokens, here), here, columns)
        score = tl.where(tokens < length, -tl.sqrt(tl.sum(key * key, 1)), float("-inf"))
        tl.store(scores_ptr + tokens, score, mask=tokens < end)


def key_norm_scores(
    keys: torch.Tensor, lengths: torch.Tensor | None, out: torch.Tensor, table: torch.Tensor | None = None
) -> None:
    """Fill out [B, H, S] float32 with -‖key‖; -inf at and beyond a row's length."""
    B, H, S, D = cache_shape(keys, table)
    config = score_config(B * H, S, D, keys.element_size(), multiprocessors(keys.device), two_passes=False)
    key_norm_kernel[(B * H * config.splits,)](
        rows_of(keys, table), per_row(lengths), out, S, H, config.splits, config.chunk,
        BLOCK_D=config.block_dim, BLOCK_S=config.block_tokens, STAGES=config.stages, num_warps=config.num_warps,
    )  # fmt: skip

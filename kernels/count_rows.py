"""How many tokens each row keeps, and which blocks hold none any more when they have moved.

Shapes: lengths and keep [B] or [B, H] int32 or int64; kept [B] or [B, H] int64; table, freed [B, columns] or
[B, H, columns] int32. Bytes: each of them once. Launch: one program for counts; one per row of the table.
"""

import torch
import triton
import triton.language as tl

from .rows import per_row, row_length

_WHOLE = tl.constexpr(10**12)  # what shares are counted in
_PART = tl.constexpr(10**6)


@triton.jit(do_not_specialize=["rows", "H", "S", "share", "most"])
def keep_counts_kernel(lengths, keep, kept_ptr, ok_ptr, rows, H, S, share, most, BLOCK: tl.constexpr):
    wrong = tl.zeros([BLOCK], tl.int32)
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        inside = row < rows
        b, h = row // H, row % H
        length = tl.zeros([BLOCK], tl.int64) + S
        if lengths is not None:
            length = tl.load(lengths.ptr + b * lengths.stride_b + h * lengths.stride_h, mask=inside, other=0)
            length = length.to(tl.int64)
        if keep is None:
            # (length · 2 · share + WHOLE) // (2 · WHOLE), in two parts, whose products fit int64 whatever the length.
            twice = 2 * share.to(tl.int64)
            kept = length * (twice // _PART) + (length * (twice % _PART) + _WHOLE) // _PART
            kept = tl.minimum(tl.maximum(kept // (2 * _WHOLE // _PART), 1), most)
        else:
            kept = tl.load(keep.ptr + b * keep.stride_b + h * keep.stride_h, mask=inside, other=1).to(tl.int64)
            wrong |= (inside & (kept < tl.minimum(length, 1))).to(tl.int32)
        tl.store(kept_ptr + row, tl.minimum(kept, length), mask=inside)
    tl.store(ok_ptr, tl.sum(wrong, 0) == 0)


@triton.jit(do_not_specialize=["H", "columns", "block_size", "stride_b", "stride_h"])
def left_blocks_kernel(
    table_ptr, lengths, kept, held_ptr, freed_ptr, H, columns, block_size, stride_b, stride_h,
    FROM_END: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, h = row // H, row % H
    length, held = row_length(lengths, b, h, 0), row_length(kept, b, h, 0)
    tl.store(held_ptr + row, held)
    if FROM_END:
        begin, end = held * 0, (length - held) // block_size
    else:
        begin, end = (held + block_size - 1) // block_size, (length + block_size - 1) // block_size
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        free = (column >= begin) & (column < end)
        block = tl.load(table_ptr + b * stride_b + h * stride_h + column, mask=free & (column < columns), other=-1)
        tl.store(freed_ptr + row * columns + column, block, mask=column < columns)


def keep_counts(
    lengths: torch.Tensor | None,
    S: int,
    keep: torch.Tensor | None,
    share: int,
    most: int,
    kept: torch.Tensor,
    ok: torch.Tensor,
) -> None:
    """Fill kept [B] or [B, H] int64: keep of each row, or its share (in 10⁻¹², rounded half up, at least 1) of the
    row's length (S without lengths) up to `most`; of a row shorter than that, all of it. Fill ok [1] bool: no row with
    a token keeps less than 1."""
    H = kept.shape[1] if kept.ndim == 2 else 1
    BLOCK = 256
    keep_counts_kernel[(1,)](
        per_row(lengths), per_row(keep), kept, ok, kept.numel(), H, S, share, most, BLOCK=BLOCK, num_warps=4
    )


def left_blocks(
    table: torch.Tensor,
    lengths: torch.Tensor,
    kept: torch.Tensor,
    block_size: int,
    from_end: bool,
    held: torch.Tensor,
    freed: torch.Tensor,
) -> None:
    """What is left when a row of `lengths` tokens keeps `kept`, in its first slots or (from_end) its last ones.

    Fill freed, like table, with the blocks that hold no token any more (from_end: those before the kept ones), and -1
    elsewhere; held [B] ([B, H] under a table per head), of the dtype of lengths, with `kept`.
    """
    H = table.shape[1] if table.ndim == 3 else 1
    strides = table.stride(0), table.stride(1) if table.ndim == 3 else 0
    left_blocks_kernel[(table.shape[0] * H,)](
        table, per_row(lengths), per_row(kept), held, freed, H, table.shape[-1], block_size, *strides,
        FROM_END=from_end, BLOCK=256, num_warps=4,
    )  # fmt: skip

"""Whether lengths and a block table are in range: one bool, on the device, so that an op can assert it without a read.

Shapes: lengths [B] or [B, H] int32 or int64; table [B, columns] or [B, H, columns] int32; ok [1] bool.
Bytes: the lengths and the table, once. Launch: one program: a table is checked once, not once per layer.
"""

import torch
import triton
import triton.language as tl

from .rows import per_row


@triton.jit(do_not_specialize=["rows", "columns", "S", "least", "blocks", "block_size", "stride_b", "stride_h"])
def check_rows_kernel(
    lengths, table_ptr, ok_ptr, rows, H, columns, S, least, blocks, block_size, stride_b, stride_h, BLOCK: tl.constexpr
):  # fmt: skip
    wrong = tl.zeros([BLOCK], tl.int32)
    for start in range(0, rows * columns, BLOCK):
        entries = start + tl.arange(0, BLOCK)  # of a table: int32 will do
        inside = entries < rows * columns
        row, column = entries // columns, entries % columns
        b, h = row // H, row % H
        length = tl.load(lengths.ptr + b * lengths.stride_b + h * lengths.stride_h, mask=inside, other=S).to(tl.int64)
        wrong |= (inside & ((length < least) | (length > S))).to(tl.int32)
        if table_ptr is not None:
            used = inside & (column * block_size < length)
            block = tl.load(table_ptr + b * stride_b + h * stride_h + column, mask=used, other=0)
            wrong |= (used & ((block < 0) | (block >= blocks))).to(tl.int32)
    tl.store(ok_ptr, tl.sum(wrong, 0) == 0)


def check_rows(
    lengths: torch.Tensor, S: int, table: torch.Tensor | None, blocks: int, block_size: int, ok: torch.Tensor
) -> None:
    """Fill ok [1] bool: every length is from 1 (0 where heads have their own) to S, and every block of the table that
    holds a token is one of `blocks`."""
    least = 1 if lengths.ndim == 1 else 0
    if table is None:
        H, columns, strides = lengths.shape[1] if lengths.ndim == 2 else 1, 1, (0, 0)
        rows = lengths.numel()
    else:
        H, columns = table.shape[1] if table.ndim == 3 else 1, table.shape[-1]
        rows = table.shape[0] * H
        strides = (table.stride(0), table.stride(1) if table.ndim == 3 else 0)
    check_rows_kernel[(1,)](
        per_row(lengths), table, ok, rows, H, columns, S, least, blocks, block_size, *strides,
        BLOCK=4096, num_warps=8,
    )  # fmt: skip

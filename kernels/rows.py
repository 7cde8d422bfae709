"""A cache as one argument: where the rows of K, V or Q lie, dense or paged. The one place that knows.

On the host `rows_of` describes a tensor as `Rows`, which a kernel takes as one parameter; on the device `rows_at` gives
addresses and `load_rows` a tile. Dense: [B, H, S, D], any strides with a contiguous last dimension. Paged: [blocks, H,
block_size, D], whose first stride is from block to block, under a block table int32: token t lies in block
table[b, t // block_size], or, where each head has a table of its own, table[b, h, t // block_size].

Of an integer Triton can only know that it is divisible by 16, so that a head_dim of 72 would be loaded two bytes at a
time. What the strides and the pointer have in common, up to 16 bytes, is therefore a compile-time number: strides are
counted in units of `align` elements, and addresses are multiples of it. The block size is one too, so that a token's
block and row in it cost a shift and a mask instead of divisions.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .primitives import INTERPRETED, to_float32


class Rows(NamedTuple):
    """Rows of `width` elements, found by batch, head and token."""

    ptr: torch.Tensor
    stride_b: int  # strides in units of `align` elements; paged: from block to block
    stride_h: int
    stride_s: int
    table: torch.Tensor | None
    table_stride_b: int  # twice the stride and one: it grows with the longest request, and for strides of 1 and of
    table_stride_h: int  # multiples of 16 Triton would compile the kernel again
    block_size: tl.constexpr
    width: tl.constexpr
    align: tl.constexpr
    e4m3_bytes: tl.constexpr  # the rows hold the bytes of float8_e4m3fn, on a device without that type


class PerRow(NamedTuple):
    """One number for every (batch, head): lengths, counts."""

    ptr: torch.Tensor
    stride_b: int
    stride_h: int


def rows_of(x: torch.Tensor, table: torch.Tensor | None = None) -> Rows:
    """Describe x [B, H, S, D], or [blocks, H, block_size, D] under a table [B, columns] or [B, H, columns]."""
    x, e4m3_bytes = _plain_bytes(x)
    shape = x.shape
    stride_b, stride_h, stride_s, align = _aligned(shape, x.stride(), x.data_ptr() % 16, x.element_size())
    table_stride_b, table_stride_h, block_size = 1, 1, 1
    if table is not None:
        table_stride_b, block_size = 2 * table.stride(0) + 1, shape[2]
        if table.ndim == 3:  # the head is in the table, and the cache has one
            table_stride_h, stride_h = 2 * table.stride(1) + 1, 0
    return Rows(
        x, stride_b, stride_h, stride_s, table, table_stride_b, table_stride_h,
        _constant(block_size), _constant(shape[3]), _constant(align), _constant(e4m3_bytes),
    )  # fmt: skip


_constant = functools.lru_cache(maxsize=None, typed=True)(tl.constexpr)  # typed: True is not 1


@functools.lru_cache(maxsize=1024)  # a decode step asks the same of every layer
def _aligned(
    shape: tuple[int, ...], strides: tuple[int, ...], address: int, element_size: int
) -> tuple[int, int, int, int]:
    """The first three strides in units of `align`, and `align`: the most elements, up to 16 bytes, of which every row's
    address is a multiple. The stride of a dimension of one never counts: its index is 0."""
    counted = (stride for stride, size in zip(strides[:3], shape[:3], strict=True) if size > 1)
    align = math.gcd(16 // element_size, address // element_size, *counted)
    return strides[0] // align, strides[1] // align, strides[2] // align, align


def per_row(counts: torch.Tensor | None) -> PerRow | None:
    """Describe counts [B], the same for all heads, or [B, H]."""
    if counts is None:
        return None
    return PerRow(counts, counts.stride(0), counts.stride(1) if counts.ndim == 2 else 0)


def cache_shape(keys: torch.Tensor, table: torch.Tensor | None) -> tuple[int, int, int, int]:
    """B, H, S, D of a cache; S is the longest that a request can be. With a table per head a cache has one head."""
    B, H, S, D = keys.shape
    if table is None:
        return B, H, S, D
    return table.shape[0], table.shape[1] if table.ndim == 3 else H, table.shape[-1] * S, D


def _plain_bytes(x: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """x and False; or, where the device lacks float8_e4m3fn and x is of it, x as bytes and True.

    The type is NVIDIA's from compute capability 8.9 on. The interpreter has every type.
    """
    if x.dtype == torch.float8_e4m3fn and not INTERPRETED:
        target = triton.runtime.driver.active.get_current_target()
        if target.backend == "cuda" and target.arch < 89:
            return x.view(torch.uint8), True
    return x, False


@triton.jit
def rows_at(rows, b, h, tokens, inside):
    """Addresses [tokens] of the rows of tokens of batch b, head h (a number, or one for each token). A block table is
    read where `inside` holds. int64 throughout."""
    offsets = h.to(tl.int64) * rows.stride_h
    if rows.table is None:
        offsets += b.to(tl.int64) * rows.stride_b + tokens.to(tl.int64) * rows.stride_s
    else:
        tokens = tokens.to(tl.int32)
        columns = tokens // rows.block_size
        row = b.to(tl.int64) * (rows.table_stride_b >> 1) + h.to(tl.int64) * (rows.table_stride_h >> 1)
        blocks = tl.load(rows.table + row + columns, mask=inside, other=0).to(tl.int64)
        offsets += blocks * rows.stride_b + (tokens % rows.block_size).to(tl.int64) * rows.stride_s
    ALIGN_BYTES: tl.constexpr = rows.align * rows.ptr.dtype.element_ty.primitive_bitwidth // 8
    return tl.multiple_of(rows.ptr + offsets * rows.align, ALIGN_BYTES)


@triton.jit
def load_rows(rows, pointers, inside, columns):
    """[tokens, columns]: the rows at these addresses; 0 where not `inside` and beyond the width."""
    return tl.load(
        pointers[:, None] + columns[None, :], mask=inside[:, None] & (columns < rows.width)[None, :], other=0.0
    )


@triton.jit
def load_float32(rows, pointers, inside, columns):
    """`load_rows` as float32."""
    return to_float32(load_rows(rows, pointers, inside, columns), rows.e4m3_bytes)


@triton.jit
def row_length(counts, b, h, default):
    """int32: what is counted for (b, h); `default` where nothing is given."""
    if counts is None:
        length = default
    else:
        length = tl.load(counts.ptr + b * counts.stride_b + h * counts.stride_h).to(tl.int32)
    return length

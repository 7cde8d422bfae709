"""Helpers with two callers or more: an ordering of floats, a search, the address (dense or paged) and the value of a
key."""

import torch
import triton
import triton.language as tl


@triton.jit
def descending_key(score):
    """float32 -> int32 whose ascending order is the order of selection: the best score has the smallest key.

    -0.0 and +0.0 get one key, so they tie; every NaN gets the largest key, behind -inf. Signed arithmetic
    throughout: the interpreter cannot complement a uint32.
    """
    score = tl.where(score == 0.0, 0.0, score)
    bits = score.to(tl.int32, bitcast=True)
    ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(score != score, 0x7FFFFFFF, -1 - ascending)


@triton.jit
def count_below(indices_ptr, n, value):
    """How many of n ascending indices (-1 padding at the end) are below `value`, by 32-way search.

    A step reads 32 probes with one load of one warp and leaves 1/32 of the range: 4 steps for a million indices,
    256 bytes each, where a binary search would wait for 20 loads in a row.
    """
    FAN: tl.constexpr = 32
    first = n * 0  # tensors, not Python ints: both are carried through the loop
    remaining = n
    while remaining > 0:
        step = (remaining + FAN - 1) // FAN
        offsets = tl.arange(0, FAN) * step
        inside = offsets < remaining
        probes = tl.load(indices_ptr + first + offsets, mask=inside, other=-1)
        below = tl.sum(((probes >= 0) & (probes < value)).to(tl.int32), 0)
        # The last probe below `value` and the first one not below it enclose the answer.
        first_after = first + (below - 1) * step + 1
        remaining_after = tl.minimum(step - 1, first + remaining - first_after)
        first = tl.where(below > 0, first_after, first)
        remaining = tl.where(below > 0, remaining_after, 0)
    return first


@triton.jit
def row_length(lengths_ptr, b, S):
    """Tokens of request b."""
    if lengths_ptr is None:
        length = S
    else:
        length = tl.load(lengths_ptr + b).to(tl.int32)
    return length


@triton.jit
def row_pointers(ptr, rows, stride, columns):
    """Addresses [rows, columns] of a matrix."""
    return ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :]


@triton.jit
def token_pointers(
    cache_ptr, table_ptr, table_stride, block_size, b, h, tokens, inside, stride_b, stride_h, stride_s, columns
):  # fmt: skip
    """Addresses [tokens, columns] of cached rows of one (batch, head). The one place that knows where a token lies.

    Dense: cache [B, H, S, D]. Paged, where there is a block table [B, columns] int32: cache [blocks, H, block_size, D],
    whose first stride is from block to block, and token t lies in block table[b, t // block_size]. The table is read
    where `inside` holds.
    """
    head_ptr = cache_ptr + h * stride_h
    if table_ptr is None:
        pointers = row_pointers(head_ptr + b * stride_b, tokens, stride_s, columns)
    else:
        blocks = tl.load(table_ptr + b * table_stride + tokens // block_size, mask=inside, other=0).to(tl.int64)
        offsets = blocks * stride_b + (tokens % block_size).to(tl.int64) * stride_s
        pointers = head_ptr + offsets[:, None] + columns[None, :]
    return pointers


@triton.jit
def to_float32(x, DECODE_E4M3: tl.constexpr):
    """Keys to float32. DECODE_E4M3: x holds the bytes of float8_e4m3fn, on a device without that type.

    The byte's exponent and mantissa, moved into a float16, are the value over 256 (the biases differ by 8), and
    float16 holds e4m3's subnormals exactly. 0x7f is its only NaN.
    """
    if DECODE_E4M3:
        byte = x.to(tl.int16)
        magnitude = byte & 0x7F
        half = (((byte & 0x80) << 8) | (magnitude << 7)).to(tl.float16, bitcast=True)
        return tl.where(magnitude == 0x7F, float("nan"), half.to(tl.float32) * 256.0)
    return x.to(tl.float32)


_INTERPRETED = not isinstance(to_float32, triton.runtime.jit.JITFunction)


def dot_type(x: torch.Tensor) -> tl.dtype:
    """The type in which tl.dot multiplies x: its own; bfloat16 for float8, which is exact in it.

    The interpreter's tl.dot takes bfloat16 for integers: there float32, which holds every product exactly.
    """
    if x.element_size() == 4 or (_INTERPRETED and x.dtype != torch.float16):
        return tl.float32
    return tl.float16 if x.dtype == torch.float16 else tl.bfloat16


PAGING = ["table_stride", "block_size"]  # arguments of token_pointers that must not compile anew


def cache_shape(keys: torch.Tensor, table: torch.Tensor | None) -> tuple[int, int, int, int]:
    """B, H, S, D of a dense cache, or of a paged one [blocks, H, block_size, D] under a block table [B, columns]."""
    if table is None:
        B, H, S, D = keys.shape
        return B, H, S, D
    _, H, block_size, D = keys.shape
    return table.shape[0], H, table.shape[1] * block_size, D


def paging(keys: torch.Tensor, table: torch.Tensor | None) -> tuple[int, int]:
    """table_stride and block_size for token_pointers."""
    return (0, 1) if table is None else (table.stride(0), keys.shape[2])


def plain_bytes(x: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """x and False; or, where the device lacks float8_e4m3fn and x is of it, x as bytes and True (DECODE_E4M3).

    The type is NVIDIA's from compute capability 8.9 on. The interpreter has every type.
    """
    if x.dtype == torch.float8_e4m3fn and not _INTERPRETED:
        target = triton.runtime.driver.active.get_current_target()
        if target.backend == "cuda" and target.arch < 89:
            return x.view(torch.uint8), True
    return x, False

"""Helpers with two callers or more: an ordering of floats, sums in fixed point, a search, the value of a key."""

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


FIXED_TILES = tl.constexpr(256)  # as many numbers of at most 1 add up in an int32, and twice as many less one


@triton.jit
def to_fixed(x, factor):
    """x · factor, which is at most 1 but for rounding, in units of 2⁻²², the nearest int32.

    The last bit of a float32 from 2 to 4 is worth 2⁻²²: that of 3 + x · factor, rounded once, as every GPU does.
    """
    return tl.fma(x, factor, 3.0).to(tl.int32, bitcast=True) - 0x40400000  # the bits of 3.0


@triton.jit
def sum_fixed(total):
    """[rows, columns] int32 -> [columns] int64: the sums of columns, by way of their upper and lower halves, whose own
    sums are int32."""
    return tl.sum(total >> 16, 0).to(tl.int64) * 65536 + tl.sum(total & 0xFFFF, 0).to(tl.int64)


@triton.jit
def mean_of_fixed(total, count):
    """float32 from int64 sums and the number of their terms; each step rounds in one way only."""
    return tl.div_rn(total.to(tl.float32) * 2.0**-22, count.to(tl.float32))


@triton.jit
def fixed_squares(x, most):
    """int64: Σ (x / most)², |x| ≤ most, in units of 2⁻⁵², each term rounded down; the same in whatever order. At most
    1,024 elements."""
    scaled = tl.div_rn(x, most).to(tl.float64)
    return tl.sum((scaled * scaled * 2.0**52).to(tl.int64), 0)


@triton.jit
def over_norm(x, most, squares):
    """Elements of a vector over its norm, or over 1e-8 where that is less; the same bits in every layout of it.

    most: its largest magnitude, but not 0; squares: `fixed_squares` of all of its elements.
    """
    inverse = 1.0 / tl.sqrt_rn(squares.to(tl.float32) * 2.0**-52)
    return tl.div_rn(x, most) * tl.minimum(inverse, most * 1e8)


@triton.jit
def row_pointers(ptr, rows, stride, columns):
    """Addresses [rows, columns] of a matrix."""
    return ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :]


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


INTERPRETED = not isinstance(to_float32, triton.runtime.jit.JITFunction)


def backend() -> str:
    """What Triton compiles for: "cuda", "hip"; or "interpreter"."""
    return "interpreter" if INTERPRETED else triton.runtime.driver.active.get_current_target().backend


def dot_type(x: torch.Tensor) -> tuple[tl.dtype, int]:
    """The type in which tl.dot multiplies x: its own; bfloat16 for float8, which is exact in it. And the bytes of an
    element that a launch configuration reckons with.

    Before compute capability 8.0 Triton has no tensor cores for 16 bits and multiplies in pieces that spill: there
    float32. So does the interpreter, whose tl.dot takes bfloat16 for integers; float32 holds every product exactly.
    """
    size = x.element_size()
    if size == 4 or _before_tensor_cores():
        return tl.float32, 4
    if x.dtype == torch.float16:
        return tl.float16, size
    return tl.float32 if INTERPRETED else tl.bfloat16, size


def _before_tensor_cores() -> bool:
    if INTERPRETED:
        return False
    target = triton.runtime.driver.active.get_current_target()
    return target.backend == "cuda" and target.arch < 80

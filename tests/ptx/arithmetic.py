"""Arithmetic that numpy lacks, on arrays with one element per thread.

Exact, except: a fused multiply-add goes through float64, so it is rounded twice (and differs in the last bit in about
one case of 2**29); ex2, lg2, rsqrt, rcp and approximate division are rounded correctly, where a GPU is off by up to 2
units in the last place.
"""

import numpy as np
from numpy import float16, float32, float64, int8, int16, int32, int64, uint8, uint16, uint32, uint64

from .report import EmulationError

TYPES = {
    "b8": uint8, "u8": uint8, "s8": int8, "b16": uint16, "u16": uint16, "s16": int16, "b32": uint32, "u32": uint32,
    "s32": int32, "b64": uint64, "u64": uint64, "s64": int64, "f16": float16, "f32": float32, "f64": float64,
}  # fmt: skip
UNSIGNED = {1: uint8, 2: uint16, 4: uint32, 8: uint64}  # by bytes


def numpy_type(kind: str) -> type:
    if kind not in TYPES:
        raise EmulationError(f"type {kind} is not known")
    return TYPES[kind]


def size_of(kind: str) -> int:
    return np.dtype(numpy_type(kind)).itemsize


def bits_of(x: np.ndarray) -> int:
    return x.dtype.itemsize * 8


def widened(x, dtype):
    """The bits of x in a wider unsigned type, with the sign if x has one."""
    if x.dtype.kind == "i":
        return x.astype(np.dtype(dtype).name.removeprefix("u")).view(dtype)
    return x.view(UNSIGNED[x.dtype.itemsize]).astype(dtype)


# Floats


def fused(a, b, c):
    """a·b + c, rounded once (but see above)."""
    return (a.astype(float64) * b.astype(float64) + c.astype(float64)).astype(a.dtype)


def flushed(x):
    """Subnormal float32 to zeros of the same sign."""
    return np.where(np.abs(x) < float32(2.0**-126), np.copysign(float32(0), x), x)


def maximum(a, b):
    """A NaN gives way to the other; +0.0 is above -0.0."""
    unsigned = UNSIGNED[a.dtype.itemsize]
    equal = (a.view(unsigned) & b.view(unsigned)).view(a.dtype)
    return np.where(a == b, equal, np.fmax(a, b))


def minimum(a, b):
    unsigned = UNSIGNED[a.dtype.itemsize]
    equal = (a.view(unsigned) | b.view(unsigned)).view(a.dtype)
    return np.where(a == b, equal, np.fmin(a, b))


def to_integer(x, dtype):
    """Saturating; NaN gives 0. x is whole already."""
    limits = np.iinfo(dtype)
    low, high = float(limits.min), float(limits.max)  # the latter is rounded up to a power of two for 64 bits
    x = np.nan_to_num(x.astype(float64), nan=0.0, posinf=high, neginf=low)
    within = (x >= low) & (x < high)
    return np.where(within, np.where(within, x, 0).astype(dtype), np.where(x < 0, limits.min, limits.max).astype(dtype))


def bfloat16_to_float32(x):
    """Bits to bits."""
    return x.astype(uint32) << uint32(16)


def float32_to_bfloat16(x):
    """Bits, rounded to nearest, ties to even."""
    bits = x.view(uint32)
    rounded = (bits + uint32(0x7FFF) + ((bits >> uint32(16)) & uint32(1))) >> uint32(16)
    return np.where(np.isnan(x), uint32(0x7FFF), rounded).astype(uint16)


def float8_pair_to_float16_pair(x, e4m3: bool):
    """Bits to bits: two bytes of float8_e4m3fn, or of float8_e5m2, per uint16. float16 holds both exactly."""
    byte = x.view(uint8)
    if not e4m3:  # float16 without the low byte of its mantissa
        return (byte.astype(uint16) << uint16(8)).view(uint32)
    magnitude = byte & uint8(0x7F)
    half = (magnitude.astype(uint16) << uint16(7)).view(float16) * float16(256)  # the exponents' biases differ by 8
    half = np.where(magnitude == 0x7F, float16(np.nan), half)
    return np.where(byte & uint8(0x80), -half, half).view(uint32)


# Integers


def shift_left(a, count):
    bits = bits_of(a)
    return np.where(count < bits, a << (count & uint32(bits - 1)).astype(a.dtype), a.dtype.type(0))


def shift_right(a, count):
    """Arithmetic for signed types."""
    bits = bits_of(a)
    if a.dtype.kind == "i":
        return a >> np.minimum(count, bits - 1).astype(a.dtype)
    return np.where(count < bits, a >> (count & uint32(bits - 1)).astype(a.dtype), a.dtype.type(0))


def funnel_shift(mode: str, low, high, count):
    """32 bits out of 64: the upper ones after a shift to the left, the lower ones after one to the right."""
    both, count = low.astype(uint64) | (high.astype(uint64) << uint64(32)), (count & uint32(31)).astype(uint64)
    return ((both << count) >> uint64(32) if mode == "l" else both >> count).astype(uint32)


def divide(a, b):
    """Towards zero, as in C. Division by zero gives all ones."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // safe
    if a.dtype.kind == "i":  # numpy rounds down
        quotient = quotient + ((a - quotient * safe != 0) & ((a < 0) != (safe < 0)))
    ones = a.dtype.type(-1 if a.dtype.kind == "i" else np.iinfo(a.dtype).max)
    return np.where(b == 0, ones, quotient).astype(a.dtype)


def remainder(a, b):
    return a - divide(a, b) * b


def multiply_high(a, b):
    if a.dtype.itemsize == 8:
        return ((a.astype(object) * b.astype(object)) >> 64).astype(a.dtype)  # Python's integers have the room
    wide = int64 if a.dtype.kind == "i" else uint64
    return ((a.astype(wide) * b.astype(wide)) >> wide(32)).astype(a.dtype)


def count_ones(a):
    return np.bitwise_count(a).astype(uint32)


def leading_zeros(a):
    if a.dtype.itemsize == 8:
        upper, lower = leading_zeros((a >> uint64(32)).astype(uint32)), leading_zeros(a.astype(uint32))
        return np.where(upper == 32, uint32(32) + lower, upper)
    return (bits_of(a) - np.frexp(a.astype(float64))[1]).astype(uint32)


def bit_field(a, start: int, length: int):
    """Sign-extended for signed types."""
    bits = bits_of(a)
    length = min(length, bits - start)
    if length <= 0:
        raise EmulationError(f"bit field of {length} bits from {start} on")
    return (a << a.dtype.type(bits - start - length)) >> a.dtype.type(bits - length)


def insert_bit_field(a, b, start: int, length: int):
    """The low bits of a into b."""
    mask = uint32(((1 << length) - 1) << start & 0xFFFFFFFF)
    return (b & ~mask) | ((a << uint32(start)) & mask)


def permute_bytes(a, b, selector):
    """Four bytes out of the eight of a (the lower ones) and b; bit 3 of a selecting nibble spreads the byte's sign."""
    both = np.atleast_1d(a.astype(uint64) | (b.astype(uint64) << uint64(32))).view(uint8).reshape(-1, 8)
    nibbles = (np.asarray(selector)[..., None] >> np.arange(0, 16, 4, dtype=uint32)) & uint32(15)
    chosen = nibbles & uint32(7)
    taken = both[:, chosen] if nibbles.ndim == 1 else np.take_along_axis(both, chosen.astype(int64), 1)
    if (nibbles & uint32(8)).any():
        taken = np.where(nibbles & uint32(8), np.where(taken & uint8(0x80), uint8(0xFF), uint8(0)), taken)
    return np.ascontiguousarray(taken).view(uint32).ravel()


def logic(a, b, c, table: int):
    """Any function of three bits, by its truth table."""
    result = np.zeros_like(a)
    for k in range(8):
        if table >> k & 1:
            result |= (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
    return result


def unpack(a, count: int) -> list[np.ndarray]:
    """A wide register's narrow ones, lowest first."""
    parts = a.view(UNSIGNED[a.dtype.itemsize // count]).reshape(-1, count)
    return [np.ascontiguousarray(parts[:, k]) for k in range(count)]


def pack(*parts) -> np.ndarray:
    return np.stack(parts, 1).reshape(-1).view(UNSIGNED[parts[0].dtype.itemsize * len(parts)])

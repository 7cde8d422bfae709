"""What a warp's 32 threads do together: shuffles, votes, reductions, matrix products."""

import functools

import numpy as np
from numpy import float16, float32, int64, uint16, uint32

_LANE = np.arange(32)


def shuffle(mode: str, a, b, c, threads: int):
    """(values, in range) of shfl.sync; a lane whose source is out of range keeps its own value."""
    constant = np.ndim(b) == 0 and np.ndim(c) == 0
    sources = _constant_sources(mode, int(b), int(c), threads) if constant else _sources(mode, b, c, threads)
    return a[sources[0]], sources[1]


def _sources(mode: str, b, c, threads: int):
    """(thread that each one reads, in range). c holds the mask of a segment in bits 8 to 12 and the last lane."""
    lane, first = np.tile(_LANE, threads // 32), np.arange(threads) & ~31
    b, c = np.asarray(b, int64) & 31, np.asarray(c, int64)
    segment, clamp = c >> 8 & 31, c & 31
    least, most = lane & segment, (lane & segment) | (clamp & ~segment)
    source = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": least | (b & ~segment)}[mode]
    inside = source >= most if mode == "up" else source <= most
    return first + np.where(inside, source, lane), inside


@functools.cache
def _constant_sources(mode: str, b: int, c: int, threads: int):
    return _sources(mode, b, c, threads)


def ballot(predicate, threads: int, active):
    """Each warp's predicates as the bits of a word. active: which threads run, or None for all."""
    bits = np.broadcast_to(predicate, threads) & (True if active is None else active)
    words = np.packbits(bits.reshape(-1, 32), axis=1, bitorder="little").view(uint32)
    return np.repeat(words[:, 0], 32)


def vote(mode: str, predicate, threads: int, active):
    """all or any."""
    running = (np.ones(threads, bool) if active is None else active).reshape(-1, 32)
    values = np.broadcast_to(predicate, threads).reshape(-1, 32)
    return np.repeat((values | ~running).all(1) if mode == "all" else (values & running).any(1), 32)


def reduce(mode: str, a, mask, threads: int):
    """redux.sync over the lanes in mask."""
    members = (np.broadcast_to(mask, threads)[:, None] >> _LANE.astype(uint32)) & uint32(1)
    function = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
                "xor": np.bitwise_xor}[mode]  # fmt: skip
    limits = np.iinfo(a.dtype)
    neutral = {"min": limits.max, "max": limits.min, "and": -1 if limits.min else limits.max}.get(mode, 0)
    values = np.where(members, np.repeat(a.reshape(-1, 32), 32, axis=0), a.dtype.type(neutral))
    return function.reduce(values, axis=1, dtype=a.dtype)


# Matrix products. The layouts of fragments are those of the PTX manual: mma.m16n8k16, mma.m16n8k8, wgmma.m64nNk16.


def widen(bits, kind: str):
    """float32 from the bits of 16-bit floats."""
    return (bits.astype(uint32) << uint32(16)).view(float32) if kind == "bf16" else bits.view(float16).astype(float32)


def fragment_of_a(registers, kind: str):
    """[warps, 16, k]: A of a product from its registers, of which each holds two 16-bit floats or one tf32."""
    x = _elements(registers, kind)
    x = x.reshape(len(registers) // 2, 2, *x.shape[1:])  # k step, row half, warp, group, thread, element
    return x.transpose(2, 1, 3, 0, 4, 5).reshape(x.shape[2], 16, -1)


def _fragment_of_b(registers, kind: str):
    """[warps, k, 8]"""
    x = _elements(registers, kind)
    return x.transpose(1, 0, 3, 4, 2).reshape(x.shape[1], -1, 8)


def _elements(registers, kind: str):
    """[registers, warps, 8, 4, elements] float32"""
    words = np.stack(registers)
    if kind == "tf32":
        x = (words & uint32(0xFFFFE000)).view(float32)  # the low 13 bits are ignored
    else:
        x = widen(words.view(uint16), kind)
    return x.reshape(len(registers), -1, 8, 4, x.shape[1] // words.shape[1])


def matrix_product(kind: str, a, b, c) -> list[np.ndarray]:
    """D = A·B + C of each warp, in float32: 4 registers."""
    sums = np.stack(c).view(float32).reshape(2, 2, -1, 8, 4)  # row half, column of a pair, warp, group, thread
    sums = sums.transpose(2, 0, 3, 4, 1).reshape(-1, 16, 8)
    d = sums + fragment_of_a(a, kind) @ _fragment_of_b(b, kind)
    d = d.reshape(-1, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, -1)
    return [np.ascontiguousarray(x).view(uint32) for x in d]


def wide_matrix_product(kind: str, left, right, sums, accumulate) -> list[np.ndarray]:
    """wgmma: D = A·B + D of each group of 4 warps. left [groups, 64, 16], right [groups, n, 16] float32.

    sums: n / 2 registers; accumulate: per thread, whether they are added to."""
    n = right.shape[1]
    d = (left @ right.swapaxes(1, 2)).reshape(-1, 2, 8, n // 8, 4, 2)  # warp, row half, group, 8 columns, thread, pair
    d = d.transpose(3, 1, 5, 0, 2, 4).reshape(n // 2, -1)
    return [
        np.where(accumulate, c.view(float32) + x, x).astype(float32).view(uint32) for c, x in zip(sums, d, strict=True)
    ]

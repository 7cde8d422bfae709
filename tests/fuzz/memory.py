"""Tensors at random places and strides inside guarded memory, and their elements as plain Python numbers.

An `Allocation` is the memory of one or more tensors with random elements before, between and behind them. It knows
which bytes it must hold: `expect` notes what a call is to write, `wrong` says where the memory is not as noted.
"""

from __future__ import annotations

import functools
import itertools
import math
import struct
from collections.abc import Callable, Sequence
from random import Random

import torch
from conftest import DEVICE

FORMATS = {
    torch.float32: "f",
    torch.float16: "e",
    torch.int32: "i",
    torch.int64: "q",
    torch.int8: "b",
    torch.uint8: "B",
}
ELEMENT_BYTES = {**{dtype: struct.calcsize("=" + code) for dtype, code in FORMATS.items()}, torch.bfloat16: 2}
ELEMENT_BYTES[torch.float8_e4m3fn] = ELEMENT_BYTES[torch.float8_e5m2] = 1
GUARD = 40  # elements on either side


def _float8_e4m3fn(code: int) -> float:
    """1 sign, 4 exponent (bias 7), 3 mantissa bits; no infinity, all ones is NaN."""
    exponent, mantissa = code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    size = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    return -size if code >> 7 else size


FLOAT8 = {
    torch.float8_e4m3fn: [_float8_e4m3fn(code) for code in range(256)],
    torch.float8_e5m2: [struct.unpack("<e", bytes((0, code)))[0] for code in range(256)],  # float16's upper byte
}


def decode(data: bytes, dtype: torch.dtype) -> list:
    """The elements of little-endian memory."""
    if dtype in FLOAT8:
        return [FLOAT8[dtype][code] for code in data]
    count = len(data) // ELEMENT_BYTES[dtype]
    if dtype == torch.bfloat16:
        halves = struct.unpack(f"<{count}H", data)
        return list(struct.unpack(f"<{count}f", struct.pack(f"<{count}I", *(half << 16 for half in halves))))
    return list(struct.unpack(f"<{count}{FORMATS[dtype]}", data))


def encode(values: Sequence, dtype: torch.dtype) -> bytes:
    """Memory of these elements; what a float dtype cannot hold is cut towards zero, or becomes a near number."""
    if dtype in FLOAT8:
        table = FLOAT8[dtype]
        near: dict = {}
        for value in values:
            if value not in near:
                near[value] = min(range(256), key=lambda code: _distance(table[code], value))
        return bytes(near[value] for value in values)
    if dtype == torch.bfloat16:
        words = struct.unpack(f"<{len(values)}I", struct.pack(f"<{len(values)}f", *values))
        return struct.pack(f"<{len(values)}H", *(word >> 16 for word in words))
    return struct.pack(f"<{len(values)}{FORMATS[dtype]}", *values)


def _distance(a: float, b: float) -> float:
    if math.isnan(a) or math.isnan(b):
        return 0.0 if math.isnan(a) and math.isnan(b) else math.inf
    if a == b:
        return 0.0 if math.copysign(1, a) == math.copysign(1, b) else 1e-9
    return abs(a - b)


def elements(tensor: torch.Tensor) -> list:
    """A result as nested lists."""
    return nested(decode(memory_of(tensor), tensor.dtype), tensor.shape, None, 0)


def memory_of(tensor: torch.Tensor) -> bytes:
    """The elements of a result, one behind the other."""
    packed = torch.zeros(math.prod(tensor.shape), dtype=tensor.dtype).view(tensor.shape)
    packed.copy_(tensor.detach())
    return packed.flatten().view(torch.uint8).numpy().tobytes()


def nested(cells: list, shape: Sequence[int], strides: Sequence[int] | None, start: int):
    """Nested lists of a tensor of this shape, whose elements lie in `cells`."""
    if strides is None:
        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    if not shape:
        return cells[start]
    if len(shape) == 1:
        return [cells[start + i * strides[0]] for i in range(shape[0])]
    return [nested(cells, shape[1:], strides[1:], start + i * strides[0]) for i in range(shape[0])]


class Allocation:
    def __init__(self, data: bytes, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.expected = bytearray(data)
        self.cells: list | None = None  # the expected elements, until they change

    @functools.cached_property
    def base(self) -> torch.Tensor:
        """The memory itself, as first expected: made when a tensor of it is asked for."""
        return torch.frombuffer(bytearray(self.expected), dtype=torch.uint8).to(DEVICE).view(self.dtype)

    def expect(self, first: int, data: bytes) -> None:
        """From here on the bytes at `first` are expected to be `data`."""
        self.expected[first : first + len(data)] = data
        self.cells = None

    def now(self) -> bytes:
        return self.base.view(torch.uint8).cpu().numpy().tobytes()

    def wrong(self) -> list[int]:
        """Elements (counted from the start of the memory) that are not what is expected."""
        now, size = self.now(), ELEMENT_BYTES[self.dtype]
        if now == self.expected:
            return []
        return sorted({i // size for i, (a, b) in enumerate(zip(now, self.expected, strict=True)) if a != b})


class Buffer:
    """A tensor inside an allocation."""

    def __init__(self, allocation: Allocation, shape: Sequence[int], strides: Sequence[int], start: int) -> None:
        self.allocation, self.shape, self.strides, self.start = allocation, tuple(shape), tuple(strides), start
        self.dtype = allocation.dtype

    @property
    def tensor(self) -> torch.Tensor:
        return self.allocation.base.as_strided(self.shape, self.strides, self.start)

    def at(self, index: Sequence[int]) -> int:
        return self.start + sum(i * stride for i, stride in zip(index, self.strides, strict=True))

    def lists(self):
        """What it is expected to hold, as nested lists: before a call, what it holds."""
        if self.allocation.cells is None:
            self.allocation.cells = decode(bytes(self.allocation.expected), self.dtype)
        return nested(self.allocation.cells, self.shape, self.strides, self.start)

    def held(self):
        """What it holds now."""
        return nested(decode(self.allocation.now(), self.dtype), self.shape, self.strides, self.start)

    def row(self, index: Sequence[int]) -> bytes:
        """The expected bytes of a row along the last dimension, which is contiguous."""
        size, first = ELEMENT_BYTES[self.dtype], self.at((*index, 0))
        return bytes(self.allocation.expected[first * size : (first + self.shape[-1]) * size])

    def expect(self, index: Sequence[int], data: bytes) -> None:
        """From here on the element or row at `index` is expected to hold `data`."""
        first = self.at(tuple(index) + (0,) * (len(self.shape) - len(index))) * ELEMENT_BYTES[self.dtype]
        self.allocation.expect(first, data)

    def put(self, index: Sequence[int], value) -> None:
        """Change one element, before there is a tensor."""
        assert "base" not in vars(self.allocation)
        self.expect(index, encode([value], self.dtype))

    def rows_contiguous(self) -> bool:
        return self.shape[-1] == 1 or self.strides[-1] == 1

    def overlaps_itself(self) -> bool:
        return any(stride == 0 and size > 1 for stride, size in zip(self.strides, self.shape, strict=True))

    def __repr__(self) -> str:
        values = f" {self.held()}" if math.prod(self.shape) <= 16 else ""
        return f"<{str(self.dtype)[6:]} {self.shape} strides {self.strides} at {self.start}{values}>"


def random_strides(random: Random, shape: Sequence[int], rows: bool, expand: bool) -> list[int]:
    """Strides of a contiguous tensor, a transposed one, a slice, every second element, an expanded one, or all at once.

    rows: the last dimension stays contiguous. expand: a dimension may have stride 0.
    """
    order = list(reversed(range(len(shape))))
    plain = random.random() < 0.4
    if not plain:
        tail = order[1:] if rows else order
        random.shuffle(tail)
        order = order[:1] + tail if rows else tail
    strides, reach = [0] * len(shape), 1
    for place, dimension in enumerate(order):
        if not plain and (place or not rows):
            reach = reach * random.choice((1, 1, 1, 2)) + random.choice((0, 0, 0, 1, 5, 8))
        strides[dimension] = reach
        reach *= shape[dimension]
    if expand and shape and random.random() < 0.15:
        dimension = random.randrange(len(shape) - rows) if len(shape) > rows else 0
        if not (rows and dimension == len(shape) - 1):
            strides[dimension] = 0
    return strides


def reach(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from the first to behind the last one."""
    return 1 + sum(stride * (size - 1) for size, stride in zip(shape, strides, strict=True))


class Memory:
    """The allocations of one case."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.allocations: list[Allocation] = []

    def allocate(self, count: int, dtype: torch.dtype, draw: Callable[[], float] | None) -> Allocation:
        """`draw` gives one element; None is any bytes, the NaNs of the dtype among them."""
        if draw is None:
            data = self.random.randbytes(count * ELEMENT_BYTES[dtype])
        else:
            data = encode([draw() for _ in range(count)], dtype)
        self.allocations.append(Allocation(data, dtype))
        return self.allocations[-1]

    def tensor(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        draw: Callable[[], float] | None = None,
        rows: bool = True,
        expand: bool = False,
    ) -> Buffer:
        """A tensor of elements from `draw`. rows, expand: see `random_strides`."""
        strides = random_strides(self.random, shape, rows, expand)
        start = GUARD + self.random.randrange(9)
        allocation = self.allocate(start + reach(shape, strides) + GUARD, dtype, draw)
        return Buffer(allocation, shape, strides, start)

    def holding(self, values, shape: Sequence[int], dtype: torch.dtype, rows: bool = True) -> Buffer:
        """A tensor of these elements (nested lists)."""
        buffer = self.tensor(shape, dtype, lambda: 0, rows)
        for index in itertools.product(*(range(size) for size in shape)):
            value = values
            for i in index:
                value = value[i]
            buffer.put(index, value)
        return buffer

    def wrong(self) -> list[tuple[int, list[int]]]:
        found = [(number, allocation.wrong()) for number, allocation in enumerate(self.allocations)]
        return [(number, places) for number, places in found if places]

"""Random arguments of the ops: shapes at the borders of tiles, every stride, ragged lengths, numbers that are none."""

from __future__ import annotations

import itertools
import math
from random import Random

import torch

from fuzz.memory import Buffer, Memory, random_strides, reach

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
ROWS = (*FLOATS, torch.int8, torch.uint8)
BORDERS = (1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129)
WIDTHS = (1, 2, 3, 7, 8, 15, 16, 17, 24, 33, 40, 64, 80)
SPECIAL = (0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan)


def per_head(lengths: Buffer | None, B: int, H: int, S: int) -> list[list[int]]:
    """[b][h]: the tokens of each row, of lengths [B], [B, H] or None."""
    if lengths is None:
        return [[S] * H] * B
    return [length if isinstance(length, list) else [length] * H for length in lengths.lists()]


class Draw:
    """What the arguments of one case are drawn with."""

    def __init__(self, random: Random, interpreted: bool = False) -> None:
        """interpreted: Triton's interpreter reads float8's NaN and infinity as large numbers, and is slow."""
        self.interpreted = interpreted
        self.random, self.memory = random, Memory(random)
        self.choice, self.chance = random.choice, lambda p: random.random() < p

    def shape(self, most: int = 8000) -> tuple[int, int, int, int]:
        """B, H, S, D."""
        B, H, D = self.choice((1, 1, 2, 3)), self.choice((1, 1, 2, 3)), self.choice(WIDTHS)
        S = self.choice(BORDERS) if self.chance(0.6) else self.random.randint(1, 150)
        while B * H * S * D > most:
            S = (S + 1) // 2
        return B, H, S, D

    def gauss(self) -> float:
        return self.random.gauss(0.0, 1.0)

    def score(self, tied: bool):
        """One score: any number, or one of few."""
        return lambda: (
            self.choice(SPECIAL) if self.chance(0.15) else self.choice((0.5, 1.0, 2.0)) if tied else self.gauss()
        )

    def scores(self, shape) -> Buffer:
        scores = self.memory.tensor(shape, torch.float32, self.score(self.chance(0.5)), self.chance(0.9), expand=True)
        return scores

    def lengths(self, B: int, H: int, S: int, per_row: bool = False) -> Buffer | None:
        """None, [B], or, per_row, perhaps [B, H] with empty rows."""
        if self.chance(0.4):
            return None
        if per_row and self.chance(0.4):
            return self.integers([[self.length(S, least=0) for _ in range(H)] for _ in range(B)])
        return self.integers([self.length(S) for _ in range(B)])

    def length(self, S: int, least: int = 1) -> int:
        return self.choice((least, S)) if self.chance(0.3) else self.random.randint(least, S)

    def integers(self, values: list) -> Buffer:
        """A tensor [B] or [B, H] of int32 or int64, of any stride."""
        shape = (len(values), len(values[0])) if isinstance(values[0], list) else (len(values),)
        return self.memory.holding(values, shape, self.choice((torch.int32, torch.int64)), rows=False)

    def cache(self, B: int, H: int, S: int, D: int, dtypes=FLOATS, any_bytes=False, expand=False):
        """Keys and values [B, H, S, ...]: apart, side by side or interleaved in one allocation."""
        dtype, DV = self.choice(dtypes), D if self.chance(0.6) else self.choice(WIDTHS)
        draw = None if any_bytes or not dtype.is_floating_point else self.gauss
        if expand or self.chance(0.5):
            return tuple(self.memory.tensor((B, H, S, width), dtype, draw, expand=expand) for width in (D, DV))
        first, widths = self.random.randrange(40, 50), (D, DV)
        if self.chance(0.5):  # a row of keys and one of values follow each other
            strides = random_strides(self.random, (B, H, S, D + DV), rows=True, expand=False)
            starts = (first, first + D) if self.chance(0.5) else (first + DV, first)
        else:
            apart, *strides = random_strides(self.random, (2, B, H, S, max(widths)), rows=True, expand=False)
            starts = (first, first + apart) if self.chance(0.5) else (first + apart, first)
        shapes = [(B, H, S, width) for width in widths]
        end = max(start + reach(shape, strides) for start, shape in zip(starts, shapes, strict=True))
        allocation = self.memory.allocate(end + 40, dtype, draw)
        return tuple(Buffer(allocation, shape, strides, start) for shape, start in zip(shapes, starts, strict=True))

    def spoil_padding(self, buffer: Buffer, lengths: Buffer | None) -> None:
        """Put NaN behind the requests' lengths in [B, H, S, D], so that reading it shows."""
        if lengths is None or buffer.overlaps_itself() or not buffer.dtype.is_floating_point:
            return
        B, H, S, D = buffer.shape
        own = per_head(lengths, B, H, S)
        for b, h in itertools.product(range(B), range(H)):
            for s in range(own[b][h], S):
                buffer.put((b, h, s, self.random.randrange(D)), math.nan)

    def spoil_keys(self, keys: Buffer) -> None:
        """Zero keys, and elements that are no finite number."""
        if not self.chance(0.4) or keys.overlaps_itself():
            return
        no_numbers = (0.0,) if self.interpreted and keys.dtype in FLOATS[3:] else (math.nan, math.inf, -math.inf)
        B, H, S, D = keys.shape
        for _ in range(self.random.randint(1, 3)):
            at = tuple(self.random.randrange(size) for size in (B, H, S))
            if self.chance(0.4):
                for d in range(D):
                    keys.put((*at, d), self.choice((0.0, -0.0)))
            else:
                keys.put((*at, self.random.randrange(D)), self.choice(no_numbers))

    def keep(self, S: int, sink: int, recent: int) -> int | float:
        """An int or a share that keeps at least sink + recent of S tokens."""
        if self.chance(0.5):
            return self.random.randint(max(sink + recent, 1), S)
        least = max((sink + recent) / S, 1e-3)
        share = self.choice(
            (0.1, 0.25, 0.3, 0.145, 0.5, 0.7, 0.9, 1.0, 1 / 3, 0.5000004, 0.499999999999, self.random.random())
        )
        return share if share > least and round(share * S - 0.5) >= sink + recent else 1.0

    def heads(self, lengths: Buffer | None) -> str:
        """Heads of unlike length share no selection."""
        return "each" if lengths and len(lengths.shape) == 2 else self.choice(("each", "shared"))

    def protection(self, S: int) -> tuple[int, int]:
        sink = self.choice((0, 0, 1, 4, self.random.randint(0, S)))
        recent = self.choice((0, 0, 1, 3, self.random.randint(0, S)))
        return (sink, recent) if sink + recent <= S else (0, min(recent, S))

    def indices(self, lengths: list[list[int]], n: int, equal: bool) -> Buffer:
        """[B, H, n] ascending indices below each row's length, padded with -1; equal: as many in every head."""
        rows = []
        for own in lengths:
            most = [min(n, length) for length in own]
            count = min(most) if self.chance(0.5) else self.random.randint(1, min(most)) if min(most) else 0
            counts = [count if equal else self.random.randint(0, x) for x in most]
            picked = [sorted(self.random.sample(range(length), c)) for length, c in zip(own, counts, strict=True)]
            rows.append([row + [-1] * (n - len(row)) for row in picked])
        return self.memory.holding(rows, (len(rows), len(rows[0]), n), torch.int64, rows=False)


class Paged:
    """A paged cache, its block table, and where each token lies.

    per_head: [B, H, columns], every row (b, h) in blocks of its own, of a cache with one head; it may be empty.
    """

    def __init__(self, draw: Draw, dtypes=FLOATS, any_bytes: bool = False, per_head: bool = False) -> None:
        random = draw.random
        self.B, self.H, self.D = draw.choice((1, 2, 3)), draw.choice((1, 1, 2, 3)), draw.choice(WIDTHS[:10])
        self.block_size = draw.choice((1, 2, 3, 5, 8, 16, 17))
        self.columns = random.randint(1, max(60 // self.block_size, 1))
        self.S = self.columns * self.block_size
        self.per_head = per_head
        least, tables = (0, self.B * self.H) if per_head else (1, self.B)
        own = [draw.length(self.S, least) for _ in range(tables)]
        self.blocks = tables * self.columns + random.randint(0, 3)
        order = random.sample(range(self.blocks), tables * self.columns)
        rows = [order[i * self.columns : (i + 1) * self.columns] for i in range(tables)]
        for row, length in zip(rows, own, strict=True):
            for column in range(-(-length // self.block_size), self.columns):  # not to be read
                row[column] = draw.choice((-1, 10**6, -(10**6), row[0]))
        H = self.H
        if per_head:
            self.tables = [rows[b * H : (b + 1) * H] for b in range(self.B)]
            self.held = [own[b * H : (b + 1) * H] for b in range(self.B)]
        else:
            self.tables, self.held = [[row] * H for row in rows], [[length] * H for length in own]
        shape = (self.B, H, self.columns) if per_head else (self.B, self.columns)
        self.table = draw.memory.holding(self.tables if per_head else rows, shape, torch.int32, draw.chance(0.8))
        self.lengths = draw.integers(self.held if per_head else own)
        self.heads_in_cache = 1 if per_head else H
        shape = (self.blocks, self.block_size, self.heads_in_cache)
        dtype, DV = draw.choice(dtypes), draw.choice((self.D, self.D, 5))
        element = None if any_bytes or not dtype.is_floating_point else draw.gauss
        self.keys = draw.memory.tensor((*shape, self.D), dtype, element)
        self.values = draw.memory.tensor((*shape, DV), dtype, element)

    def place(self, b: int, h: int, token: int) -> tuple[int, int, int]:
        """Index of a token's row in the cache [blocks, block_size, H, ...]."""
        return self.tables[b][h][token // self.block_size], token % self.block_size, 0 if self.per_head else h

    def each_head(self) -> list[tuple[int, int]]:
        return list(itertools.product(range(self.B), range(self.H)))

    def arguments(self) -> dict:
        return dict(key_cache=self.keys, block_tables=self.table, lengths=self.lengths)

    def rows(self, cache: Buffer) -> list[list[list[list[float]]]]:
        """[b][h][token]: the rows of each request."""
        lists = cache.lists()

        def row(b: int, h: int, token: int) -> list[float]:
            block, slot, head = self.place(b, h, token)
            return lists[block][slot][head]

        return [[[row(b, h, t) for t in range(self.held[b][h])] for h in range(self.H)] for b in range(self.B)]

    def spoil_unused(self, draw: Draw) -> None:
        """Put NaN in rows that hold no request's token."""
        used = {self.place(b, h, t)[:2] for b, h in self.each_head() for t in range(self.held[b][h])}
        for block, row in itertools.product(range(self.blocks), range(self.block_size)):
            if (block, row) not in used and draw.chance(0.5):
                for head in range(self.heads_in_cache):
                    self.keys.put((block, row, head, 0), math.nan)
                    self.values.put((block, row, head, 0), math.nan)

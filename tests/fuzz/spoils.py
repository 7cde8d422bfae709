"""What no op takes: ways to make one argument of a legal call illegal. Such a call must raise a TypeError or ValueError
that names the argument, and change nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from fuzz.checks import Case
from fuzz.drawing import Draw
from fuzz.memory import Buffer

FLAGS = ("inplace", "preserve_order", "causal", "return_lse", "return_keydiff")
WORDS = ("heads", "reduce", "mode", "to", "normalize")
WRITTEN = {
    "compact": ("keys", "values"),
    "keydiff_compact": ("keys", "values"),
    "attention_compact": ("keys", "values"),
    "decode_attention": ("mass", "last_used"),
    "paged_compact": ("key_cache", "value_cache", "key_scales", "value_scales"),
    "paged_keydiff_compact": ("key_cache", "value_cache", "key_scales", "value_scales"),
    "compact_to_pages": ("key_cache", "value_cache"),
}


def spoil(draw: Draw, op: str, case: Case) -> str:
    """Make an argument of the case illegal; its name."""
    while True:
        name = draw.choice(list(case.arguments))
        ways = list(_ways(draw, op, name, case.arguments[name], case))
        if ways:
            case.arguments[name] = draw.choice(ways)
            return name


def _ways(draw: Draw, op: str, name: str, value, case: Case) -> Iterator[object]:
    if name in FLAGS:
        yield from ("no", 2, None)
    elif name in WORDS or (name == "scale" and op == "combine_scores"):
        yield from ("x", 1, "")
    elif name in ("scale", "decay", "threshold", "floor"):
        yield from (math.nan, math.inf, "1", True, [1])
        if name in ("decay", "floor"):
            yield from (-0.1, 1.5)
    elif name in ("sink", "recent"):
        yield from (-1, 0.5, True, "1", None)
        # evict_slots names `count`; rows that keep counts of their own may protect less.
        if op != "evict_slots" and not isinstance(case.arguments["keep"], Buffer):
            yield case.sizes["S"] + 1
    elif name in ("kernel_size", "pool"):
        yield from (0, 2, -1, 3.0, True, "3")
    elif name == "count":
        yield from (0, -1, 1.0, True, case.sizes["S"] + 1)
    elif name == "min_distance":
        yield from (-1, 1.0, True, "1", None)
    elif name == "columns":
        yield from (0, -1, 1.5, True, "2")
    elif name == "step":
        yield from (-1, 2**31, 1.0, None, True)
    elif name == "keep":
        yield from _keeps(draw, op, case)
    elif name == "anchor":
        yield from ("x", None, 1.0, draw.memory.tensor((1, 1, 1, 1), torch.float32, draw.gauss))
    elif name == "parts":
        scores = value[0][1]
        longer = draw.memory.tensor((*scores.shape[:2], scores.shape[2] + 1), torch.float32, draw.gauss)
        yield from ([], None, [(math.nan, scores)], [("1", scores)], [(1.0, None)], [(1.0, scores), (1.0, longer)])
    if isinstance(value, Buffer):
        yield from _tensors(draw, value)
        if name in WRITTEN.get(op, ()) and case.arguments.get("inplace", True):
            yield from _sharing(value)
        if name in ("keys", "values", "queries", "key_cache", "value_cache", "hidden"):
            yield draw.memory.tensor((*value.shape[:3], 4), value.dtype, lambda: 1).tensor[..., ::2]
        if name == "lengths":
            for wrong in (0, -1, case.sizes["S"] + 1):
                if wrong or len(value.shape) == 1:
                    yield draw.integers(_with(draw, value.lists(), wrong))
        elif name == "indices":
            yield from _indices(draw, value, case)
        elif name == "free":
            yield from _free(draw, value, case)
        elif name == "block_tables":
            yield from _tables(draw, op, value, case)


def _keeps(draw: Draw, op: str, case: Case) -> Iterator[object]:
    yield from (0, -1, 0.0, -0.5, 1.0000001, math.nan, math.inf, True, None, "0.5")
    if op != "paged_keydiff_compact":
        yield case.sizes["S"] + 1
        return
    lengths = case.arguments["lengths"]
    yield draw.integers(_with(draw, lengths.lists(), 0))
    yield draw.integers(_with(draw, lengths.lists(), -3))
    yield draw.integers([*lengths.lists(), lengths.lists()[0]])
    yield draw.memory.tensor(lengths.shape, torch.float32, lambda: 1.0)


def _with(draw: Draw, values: list, wrong) -> list:
    """The (nested) list with one value wrong."""
    place = draw.random.randrange(len(values))
    inner = _with(draw, values[place], wrong) if isinstance(values[place], list) else wrong
    return [inner if i == place else x for i, x in enumerate(values)]


def _tensors(draw: Draw, value: Buffer) -> Iterator[object]:
    """Wrong for any tensor: no tensor, another dtype, another number of dimensions, empty, with grad."""
    yield "a tensor"
    yield [0]
    other = torch.float32 if value.dtype in (torch.int32, torch.int64) else torch.int32
    yield draw.memory.tensor(value.shape, other, lambda: 1)
    yield draw.memory.tensor((*value.shape, 2, 1), value.dtype, lambda: 1)
    if value.shape:
        yield value.tensor[:0]
    if value.dtype in (torch.float32, torch.float16, torch.bfloat16):
        yield value.tensor.detach().requires_grad_()


def _sharing(value: Buffer) -> Iterator[object]:
    """Elements that share memory, where the call writes."""
    for dimension, size in enumerate(value.shape[:3]):
        if size > 1:
            yield value.tensor.narrow(dimension, 0, 1).expand(value.shape)


def _indices(draw: Draw, value: Buffer, case: Case) -> Iterator[object]:
    (B, H, n), cache = value.shape, case.sizes.get("paged")
    b, h = draw.random.randrange(B), draw.random.randrange(H)
    end = cache.held[b][h] if cache else case.sizes["S"]

    def replaced(row: list[int]) -> Buffer:
        rows = value.lists()
        rows[b][h] = row
        return draw.memory.holding(rows, (B, H, n), torch.int64, rows=False)

    row = value.lists()[b][h]
    count = sum(i >= 0 for i in row)
    yield replaced([-2, *row[1:]])
    if count:
        yield replaced([*row[: count - 1], end, *row[count:]])  # behind the last token
        yield replaced([*row[: count - 1], -(2**40), *row[count:]])
    if count > 1:
        yield replaced([row[1], row[0], *row[2:]])
        yield replaced([row[0], *row[:-1]])
        yield replaced([-1, *row[1:]])
        if cache and H > 1 and not cache.per_head:  # fewer in one head than in the others
            yield replaced([*row[: count - 1], *[-1] * (n - count + 1)])


def _free(draw: Draw, value: Buffer, case: Case) -> Iterator[object]:
    taken, blocks, free = case.sizes["taken"], case.sizes["blocks"], value.lists()

    def holding(numbers: list[int]) -> Buffer:
        return draw.memory.holding(numbers, (len(numbers),), torch.int32, rows=False)

    if taken:
        place = draw.random.randrange(taken)
        yield holding(_replaced(free, place, -1))
        yield holding(_replaced(free, place, blocks))
    if taken > 1:
        yield holding(free[: taken - 1])
        yield holding(_replaced(free, taken - 1, free[0]))


def _replaced(numbers: list[int], place: int, number: int) -> list[int]:
    return [*numbers[:place], number, *numbers[place + 1 :]]


def _tables(draw: Draw, op: str, value: Buffer, case: Case) -> Iterator[object]:
    cache = case.sizes["paged"]
    b, h = draw.choice([(b, h) for b, h in cache.each_head() if cache.held[b][h]] or [(0, 0)])
    used = -(-cache.held[b][h] // cache.block_size)
    if not used:
        return

    def replaced(column: int, block: int) -> Buffer:
        rows = value.lists()
        row = rows[b][h] if cache.per_head else rows[b]
        row[column] = block
        return draw.memory.holding(rows, value.shape, torch.int32)

    yield replaced(draw.random.randrange(used), -1)
    yield replaced(used - 1, cache.blocks)
    if op in WRITTEN and used > 1:  # a block twice
        yield replaced(used - 1, cache.tables[b][h][0])

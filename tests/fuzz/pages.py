"""Cases of the ops on a paged cache."""

from __future__ import annotations

import torch

from fuzz import oracle
from fuzz.attention import check_decoded, check_mass, draw_decode, draw_lse, draw_mass_options
from fuzz.checks import Case, opened, same, shaped, tables_per_head
from fuzz.drawing import FLOATS, ROWS, Draw, Paged
from fuzz.memory import Buffer, elements
from fuzz.scores import (
    before_rope,
    check_fitted,
    check_keydiff,
    draw_anchor,
    draw_turn,
    draw_weights,
    head_anchor,
)
from kvevict import paged


def draw_paged(draw: Draw, dtypes=FLOATS, any_bytes: bool = False) -> Paged:
    return Paged(draw, dtypes, any_bytes, per_head=tables_per_head() and draw.chance(0.4))


def paged_scores(draw: Draw) -> Case:
    cache = draw_paged(draw)
    cache.spoil_unused(draw)
    anchor, turn = draw_anchor(draw, cache.B, cache.H, cache.D), {}
    if anchor == "unit" and cache.D % 2 == 0 and draw.chance(0.4):
        turn = draw_turn(draw, cache.B, cache.H, cache.S, cache.D)

    def check(result, _) -> None:
        got, rows = shaped(result, (cache.B, cache.H, cache.S), torch.float32), cache.rows(cache.keys)
        for b, h in cache.each_head():
            before, off = before_rope(rows[b][h], turn, b, h), 2e-5 if turn else 0
            check_keydiff(got[b][h], before, head_anchor(anchor, b, h), cache.S, f"scores[{b}][{h}]", off)

    return Case(dict(**cache.arguments(), anchor=anchor, **turn), check, sizes=dict(S=cache.S, paged=cache))


def paged_kv_scores(draw: Draw) -> Case:
    cache = draw_paged(draw)
    while cache.D % 2:
        cache = draw_paged(draw)
    cache.spoil_unused(draw)
    weights = draw_weights(draw, cache.B, cache.H, cache.D + cache.values.shape[3] + 4)
    turn = draw_turn(draw, cache.B, cache.H, cache.S, cache.D)
    arguments = dict(weights=weights, return_keydiff=draw.chance(0.5), **turn)

    def check(result, _) -> None:
        check_fitted(result, cache.rows(cache.keys), cache.rows(cache.values), arguments, cache.S)

    arguments |= dict(**cache.arguments(), value_cache=cache.values)
    return Case(arguments, check, sizes=dict(S=cache.S, paged=cache))


def paged_queries(draw: Draw, cache: Paged, W: int) -> Buffer:
    dtype = draw.choice(FLOATS) if cache.keys.dtype in FLOATS[3:] else cache.keys.dtype
    return draw.memory.tensor((cache.B, cache.H * draw.choice((1, 2, 3)), W, cache.D), dtype, draw.gauss, expand=True)


def paged_attention_mass(draw: Draw) -> Case:
    cache = draw_paged(draw)
    cache.spoil_unused(draw)
    queries = paged_queries(draw, cache, min(cache.S, draw.choice((1, 2, 5, 17))))
    scale, causal = draw.choice((None, 0.3)), draw.chance(0.7)
    options = draw_mass_options(draw, far=causal)
    factor = cache.D**-0.5 if scale is None else scale

    rows = cache.rows(cache.keys)
    lse = draw_lse(draw, queries, rows, cache.held, cache.H, factor, causal) if draw.chance(0.4) else None

    def check(result, _) -> None:
        got = shaped(result, (cache.B, cache.H, cache.S), torch.float32)
        given = None if lse is None else lse.lists()
        check_mass(got, rows, queries, given, cache.held, cache.S, factor, causal, options)

    arguments = dict(queries=queries, **cache.arguments(), scale=scale, lse=lse, causal=causal, **options)
    return Case(arguments, check, sizes=dict(S=cache.S, paged=cache))


def paged_decode_attention(draw: Draw) -> Case:
    cache = draw_paged(draw)
    cache.spoil_unused(draw)
    W, options = draw_decode(draw, paged.paged_decode_attention, cache.S)
    queries, scale = paged_queries(draw, cache, W), draw.choice((None, 0.3, -1))
    keys, values = cache.rows(cache.keys), cache.rows(cache.values)

    def check(result, _) -> None:
        check_decoded(result, queries, keys, values, cache.values.shape[3], scale, options)

    arguments = dict(queries=queries, **cache.arguments(), value_cache=cache.values, scale=scale, **options)
    return Case(arguments, check, sizes=dict(S=cache.S, paged=cache))


def check_paged(result, cache: Paged, moved: list[Buffer], kept, to: str, ordered: bool) -> None:
    """kept[b][h]: the tokens kept; `moved`: caches and scales. Notes what they must hold."""
    size, counts, free = cache.block_size, [], []
    for b in range(cache.B):
        counts.append([len(tokens) for tokens in kept[b]])
        free.append([])
        for h, tokens in enumerate(kept[b]):
            count, length = counts[b][h], cache.held[b][h]
            first = length - count if to == "tail" else 0
            slots = range(first, first + count)
            if ordered:
                sources = dict(zip(slots, tokens, strict=True))
            else:
                holes = [slot for slot in slots if slot not in tokens]
                others = [token for token in tokens if token not in slots]
                sources = dict(zip(holes, match(cache, moved, b, h, holes, others), strict=True))
            rows = {
                slot: [row_of(buffer, cache.place(b, h, token)) for buffer in moved] for slot, token in sources.items()
            }
            for slot, row in rows.items():
                for buffer, data in zip(moved, row, strict=True):
                    buffer.expect(cache.place(b, h, slot), data)
            used = range(-(-length // size))
            gone = used[: (length - count) // size] if to == "tail" else used[-(-count // size) :]
            free[b].append([cache.tables[b][h][c] if c in gone else -1 for c in range(cache.columns)])
    if not cache.per_head:  # one for all heads of a request
        counts, free = [own[0] for own in counts], [own[0] for own in free]
    same(shaped(result.lengths, cache.lengths.shape, cache.lengths.dtype), counts, "lengths")
    same(shaped(result.freed_blocks, cache.table.shape, torch.int32), free, "freed_blocks")


def row_of(buffer: Buffer, place) -> bytes:
    """The expected bytes of a token's row, or of its scale."""
    data = bytes(buffer.allocation.expected)
    return row_in(data, buffer, place)


def row_in(data: bytes, buffer: Buffer, place) -> bytes:
    index = (*place, 0) if len(buffer.shape) == 4 else place
    size = buffer.tensor.element_size()
    first = buffer.at(index) * size
    return data[first : first + size * (buffer.shape[3] if len(buffer.shape) == 4 else 1)]


def match(cache: Paged, moved: list[Buffer], b: int, h: int, holes: list[int], tokens: list[int]) -> list[int]:
    """Which of the tokens now lies in each hole, its rows and scales together."""
    now = [buffer.allocation.now() for buffer in moved]
    old = {token: [row_of(buffer, cache.place(b, h, token)) for buffer in moved] for token in tokens}
    left, found = list(tokens), []
    for hole in holes:
        held = [row_in(data, buffer, cache.place(b, h, hole)) for data, buffer in zip(now, moved, strict=True)]
        token = next((token for token in left if old[token] == held), None)
        assert token is not None, f"slot {hole} of [{b}][{h}] holds none of the tokens {left}"
        left.remove(token)
        found.append(token)
    return found


def draw_scales(draw: Draw, cache: Paged) -> dict:
    if draw.chance(0.6):
        return {}
    shape, dtype = cache.keys.shape[:3], draw.choice(FLOATS[:3])
    return {
        name: draw.memory.tensor(shape, dtype, draw.random.random, rows=False)
        for name in ("key_scales", "value_scales")
    }


def paged_compact(draw: Draw) -> Case:
    cache = draw_paged(draw, ROWS, any_bytes=True)
    scales, n = draw_scales(draw, cache), draw.random.randint(1, cache.S)
    indices = draw.indices(cache.held, n, equal=not cache.per_head)
    to, ordered = draw.choice(("front", "tail")), draw.chance(0.5)
    caches = dict(**cache.arguments(), value_cache=cache.values)
    arguments = dict(**caches, indices=indices, to=to, preserve_order=ordered, **scales)

    def check(result, _) -> None:
        kept = [[[i for i in row if i >= 0] for row in heads] for heads in indices.lists()]
        check_paged(result, cache, [cache.keys, cache.values, *scales.values()], kept, to, ordered)

    return Case(arguments, check, sizes=dict(S=cache.S, paged=cache))


def paged_keydiff_compact(draw: Draw) -> Case:
    cache = draw_paged(draw)
    draw_keys = draw.chance(0.3)
    if draw_keys:
        cache.spoil_unused(draw)
    scales, anchor = draw_scales(draw, cache), draw_anchor(draw, cache.B, cache.H, cache.D)
    if scales and anchor == "raw":
        anchor = "unit"
    sink, recent = draw.protection(cache.S)
    keep, kept = draw.keep(cache.S, sink, recent), None
    if draw.chance(0.3):
        kept = [[draw.random.randint(1, cache.S + 3)] * cache.H for _ in range(cache.B)]
        if cache.per_head:
            kept = [[draw.random.randint(1, cache.S + 3) for _ in own] for own in kept]
        keep = draw.integers(kept if cache.per_head else [own[0] for own in kept])
    elif isinstance(keep, int) and draw.chance(0.3):
        keep += cache.S  # a request that is shorter stays whole
    heads, to, ordered = draw.heads(cache.lengths), draw.choice(("front", "tail")), draw.chance(0.5)
    options = dict(keep=keep, sink=sink, recent=recent, heads=heads, anchor=anchor, to=to, preserve_order=ordered)
    arguments = dict(**cache.arguments(), value_cache=cache.values, **options, **scales)

    def before():
        return paged.paged_scores(**opened(dict(**cache.arguments(), anchor=anchor)))

    def check(result, scores) -> None:
        rows, chosen = elements(scores), []
        for b, own in enumerate(cache.held):
            counts = [oracle.kept_count(keep if kept is None else kept[b][h], length) for h, length in enumerate(own)]
            scores = [oracle.averaged(rows[b])] * cache.H if heads == "shared" else rows[b]
            triples = zip(scores, own, counts, strict=True)
            chosen.append([oracle.select(row, length, count, sink, recent) for row, length, count in triples])
        check_paged(result, cache, [cache.keys, cache.values, *scales.values()], chosen, to, ordered)

    return Case(arguments, check, before, sizes=dict(S=cache.S, paged=cache))


def compact_to_pages(draw: Draw) -> Case:
    B, H, S, D = draw.shape()
    keys, values = draw.cache(B, H, S, D, ROWS, any_bytes=True, expand=draw.chance(0.3))
    indices = draw.indices([[S] * H] * B, draw.random.randint(1, S), equal=False)
    kept = [[[i for i in row if i >= 0] for row in heads] for heads in indices.lists()]
    size, m = draw.choice((1, 2, 3, 5, 8, 16, 17)), indices.shape[2]
    columns = -(-m // size) + draw.choice((0, 1))
    needed = [[-(-len(tokens) // size) for tokens in own] for own in kept]
    taken = sum(map(sum, needed))
    blocks = max(taken, 1) + draw.random.randint(0, 3)
    order = draw.random.sample(range(blocks), blocks)
    free = [*order[:taken], *draw.choice((order[taken:], [-1, blocks, -1]))] or [0]
    caches = [draw.memory.tensor((blocks, size, 1, x.shape[3]), keys.dtype) for x in (keys, values)]

    def check(result, _) -> None:
        tables, next_free = [], 0
        for b in range(B):
            for h, tokens in enumerate(kept[b]):
                own = order[next_free : next_free + needed[b][h]]
                next_free += needed[b][h]
                tables.append(own + [-1] * (columns - len(own)))
                for slot, token in enumerate(tokens):
                    for rows, cache in zip((keys, values), caches, strict=True):
                        cache.expect((own[slot // size], slot % size, 0), rows.row((b, h, token)))
        tables = [tables[b * H : (b + 1) * H] for b in range(B)]
        same(shaped(result.block_tables, (B, H, columns), torch.int32), tables, "block_tables")
        counts = [[len(tokens) for tokens in own] for own in kept]
        same(shaped(result.lengths, (B, H), torch.int32), counts, "lengths")
        same(shaped(result.taken, (1,), torch.int32), [taken], "taken")

    arguments = dict(
        keys=keys, values=values, indices=indices, key_cache=caches[0], value_cache=caches[1],
        free=draw.memory.holding(free, (len(free),), torch.int32, rows=False),
        columns=draw.choice((None, columns)) if columns == -(-m // size) else columns,
    )  # fmt: skip
    return Case(arguments, check, sizes=dict(S=S, blocks=blocks, taken=taken))

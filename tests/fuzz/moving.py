"""Cases of the ops that move rows of a dense cache."""

from __future__ import annotations

import torch

import kvevict
from fuzz import oracle
from fuzz.attention import draw_mass_options, draw_queries
from fuzz.checks import Case, lengths_per_row, numbers, opened, same, shaped
from fuzz.drawing import ROWS, Draw, per_head
from fuzz.memory import Buffer, elements, memory_of
from fuzz.scores import draw_anchor
from fuzz.selection import selected


def check_compacted(result, keys: Buffer, values: Buffer, kept, n: int, inplace: bool, ordered: bool) -> None:
    """kept[b][h]: the tokens kept. In place: notes what the caches must hold."""
    B, H = keys.shape[:2]
    indices = shaped(result.indices, (B, H, n), torch.int64)
    for cache, moved in ((keys, result.keys), (values, result.values)):
        same((tuple(moved.shape), moved.dtype), ((B, H, n, cache.shape[3]), cache.dtype), "shape and dtype of rows")
        if inplace:
            same(moved.data_ptr(), cache.tensor.data_ptr(), "address of a cache compacted in place")
            same(moved.stride(), cache.tensor[:, :, :n].stride(), "strides of a cache compacted in place")
        width = cache.shape[3] * moved.element_size()
        got = None if inplace else memory_of(moved)
        for b in range(B):
            for h in range(H):
                tokens, slots = kept[b][h], indices[b][h]
                same(slots[len(tokens) :], [-1] * (n - len(tokens)), f"padding of indices[{b}][{h}]")
                slots = slots[: len(tokens)]
                if ordered:
                    same(slots, tokens, f"indices[{b}][{h}]")
                else:
                    assert oracle.fewest_moves(tokens, slots), (
                        f"indices[{b}][{h}] is {slots}: expected few moves of {tokens}"
                    )
                rows = [cache.row((b, h, token)) for token in slots]
                if inplace:
                    for j, row in enumerate(rows):
                        cache.expect((b, h, j), row)
                else:
                    first = (b * H + h) * n * width
                    rows += [bytes(width)] * (n - len(rows))
                    found = got[first : first + n * width]
                    same(numbers(found, cache.dtype), numbers(b"".join(rows), cache.dtype), f"rows of [{b}][{h}]")


def draw_move(draw: Draw) -> dict:
    return dict(inplace=draw.chance(0.7), preserve_order=draw.chance(0.5))


def compact(draw: Draw) -> Case:
    B, H, S, D = draw.shape()
    moves = draw_move(draw)
    expand = not moves["inplace"] and draw.chance(0.3)
    keys, values = draw.cache(B, H, S, D, ROWS, any_bytes=True, expand=expand)
    n = draw.random.randint(1, S)
    indices = draw.indices([[S] * H] * B, n, equal=False)

    def check(result, _) -> None:
        assert result.lengths is None
        kept = [[[i for i in row if i >= 0] for row in heads] for heads in indices.lists()]
        check_compacted(result, keys, values, kept, n, moves["inplace"], moves["preserve_order"])

    return Case(dict(keys=keys, values=values, indices=indices, **moves), check, sizes=dict(S=S))


def draw_selection(draw: Draw, B: int, H: int, S: int) -> dict:
    sink, recent = draw.protection(S)
    lengths = draw.lengths(B, H, S, lengths_per_row())
    return dict(keep=draw.keep(S, sink, recent), sink=sink, recent=recent, heads=draw.heads(lengths), lengths=lengths)


def check_evicted(result, scores, keys, values, selection: dict, moves: dict) -> None:
    """A compaction by these scores (a tensor: the op's own, which have cases of their own)."""
    (B, H, S, _), keep, given = keys.shape, selection["keep"], selection["lengths"]
    lengths = per_head(given, B, H, S)
    protection = (selection["sink"], selection["recent"], selection["heads"])
    kept = selected(elements(scores), keep, *protection, lengths)
    if given is None:
        assert result.lengths is None
    else:
        counts = [[oracle.kept_count(keep, length) for length in own] for own in lengths]
        expected = counts if len(given.shape) == 2 else [own[0] for own in counts]
        same(shaped(result.lengths, given.shape, torch.int64), expected, "lengths")
    n = oracle.kept_count(keep, S)
    check_compacted(result, keys, values, kept, n, moves["inplace"], moves["preserve_order"])


def keydiff_compact(draw: Draw) -> Case:
    B, H, S, D = draw.shape()
    keys, values = draw.cache(B, H, S, D)
    draw.spoil_keys(keys)
    anchor, selection, moves = draw_anchor(draw, B, H, D), draw_selection(draw, B, H, S), draw_move(draw)
    arguments = dict(keys=keys, values=values, anchor=anchor, **selection, **moves)

    def before():
        return kvevict.keydiff_scores(**opened(dict(keys=keys, anchor=anchor, lengths=selection["lengths"])))

    def check(result, scores) -> None:
        check_evicted(result, scores, keys, values, selection, moves)

    return Case(arguments, check, before, sizes=dict(S=S))


def attention_compact(draw: Draw) -> Case:
    B, H, S, D = draw.shape(3000)
    keys, values = draw.cache(B, H, S, D)
    queries = draw_queries(draw, keys, min(S, draw.choice((1, 2, 5, 17))))
    selection, moves, options = draw_selection(draw, B, H, S), draw_move(draw), draw_mass_options(draw)
    pool = draw.choice((None, 1, 3, 7))
    arguments = dict(queries=queries, keys=keys, values=values, pool=pool, **options, **selection, **moves)

    def before():
        lengths = selection["lengths"]
        scores = kvevict.attention_mass(**opened(dict(queries=queries, keys=keys, lengths=lengths, **options)))
        return scores if pool is None else kvevict.pool_scores(scores, pool)

    def check(result, scores) -> None:
        check_evicted(result, scores, keys, values, selection, moves)

    return Case(arguments, check, before, sizes=dict(S=S))

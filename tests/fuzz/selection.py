"""Cases of the ops that choose tokens."""

from __future__ import annotations

import torch

import kvevict
from fuzz import oracle
from fuzz.checks import Case, lengths_per_row, same, shaped, takes
from fuzz.drawing import Draw, per_head
from fuzz.memory import elements


def topk_indices(draw: Draw) -> Case:
    B, H, S, _ = draw.shape()
    if draw.chance(0.02):
        B, H, S = 1, draw.choice((1, 2)), 8192 + draw.random.randint(1, 300)  # several splits
    scores = draw.scores((B, H, S))
    sink, recent = draw.protection(S)
    lengths = draw.lengths(B, H, S, lengths_per_row())
    keep, heads = draw.keep(S, sink, recent), draw.heads(lengths)
    arguments = dict(scores=scores, keep=keep, sink=sink, recent=recent, heads=heads, lengths=lengths)
    if takes(kvevict.topk_indices, "floor") and draw.chance(0.4):
        return adaptive(draw, arguments)

    def check(result, _) -> None:
        check_selected(result, scores.lists(), S, keep, sink, recent, heads, per_head(lengths, B, H, S))

    return Case(arguments, check, sizes=dict(S=S))


def adaptive(draw: Draw, arguments: dict) -> Case:
    """A budget shared by the heads of a request, or counts of each row's own."""
    scores, sink, recent = arguments["scores"], arguments["sink"], arguments["recent"]
    B, H, S = scores.shape
    if draw.chance(0.5):
        counts = [[draw.random.randint(1, S) for _ in range(H)] for _ in range(B)]
        arguments.update(keep=draw.integers(counts), heads="each")
    else:
        counts = None
        floor, lengths = draw.choice((0.0, 0.2, 0.5, 1.0, draw.random.random())), draw.lengths(B, H, S)
        arguments.update(heads="adaptive", floor=floor, lengths=lengths)

    def check(result, _) -> None:
        got, rows, expected = elements(result), scores.lists(), []
        for b, own in enumerate(per_head(arguments["lengths"], B, H, S)):
            if counts is None:
                kept = oracle.kept_count(arguments["keep"], own[0])
                expected.append(oracle.adaptive(rows[b], own[0], kept, sink, recent, floor))
            else:
                each = zip(rows[b], own, counts[b], strict=True)
                expected.append([oracle.select(row, n, min(k, n), sink, recent) for row, n, k in each])
        width = len(got[0][0])  # known on the host, at least what any head keeps
        same((tuple(result.shape), result.dtype), ((B, H, width), torch.int64), "shape and dtype")
        same(got, [[oracle.padded(kept, width) for kept in heads] for heads in expected], "indices")

    return Case(arguments, check, sizes=dict(S=S))


def selected(rows, keep, sink, recent, heads, lengths) -> list[list[list[int]]]:
    """Per request and head, the tokens kept."""
    result = []
    for scores, own in zip(rows, lengths, strict=True):
        if heads == "shared":
            scores = [oracle.averaged(scores)] * len(scores)
        pairs = zip(scores, own, strict=True)
        result.append(
            [oracle.select(row, length, oracle.kept_count(keep, length), sink, recent) for row, length in pairs]
        )
    return result


def check_selected(result, rows, S: int, keep, sink, recent, heads, lengths) -> list[list[list[int]]]:
    """`result` [B, H, n] as `topk_indices` promises; the tokens kept."""
    n = oracle.kept_count(keep, S)
    got = shaped(result, (len(rows), len(rows[0]), n), torch.int64)
    expected = selected(rows, keep, sink, recent, heads, lengths)
    for b, heads_kept in enumerate(expected):
        for h, kept in enumerate(heads_kept):
            same(got[b][h], oracle.padded(kept, n), f"indices[{b}][{h}]")
    return expected


def evict_slots(draw: Draw) -> Case:
    B, H, S, _ = draw.shape()
    scores = draw.scores((B, H, S))
    sink, recent = draw.protection(S - 1)
    count = draw.choice((1, draw.random.randint(1, S - sink - recent)))
    lengths = draw.lengths(B, H, S, lengths_per_row())

    def check(result, _) -> None:
        got, rows = shaped(result, (B, H, count), torch.int64), scores.lists()
        for b, own in enumerate(per_head(lengths, B, H, S)):
            for h, length in enumerate(own):
                slots = oracle.evicted(rows[b][h], length, count, sink, recent)
                same(got[b][h], oracle.padded(slots, count), f"slots[{b}][{h}]")

    arguments = dict(scores=scores, count=count, sink=sink, recent=recent, lengths=lengths)
    return Case(arguments, check, sizes=dict(S=S))

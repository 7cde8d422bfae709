"""Each op: random legal arguments, and whether a result is what the oracle says."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

import kvevict
from fuzz import oracle
from fuzz.drawing import FLOATS, ROWS, Draw, Paged
from fuzz.memory import Buffer, decode, elements, encode, memory_of
from fuzz.oracle import INF
from kvevict import paged

# What a 16- or 8-bit attention may round its weights to before they meet the values, and its result.
ROUNDING = {torch.float32: 4e-6, torch.float16: 2e-3}


@dataclass
class Case:
    """The arguments of a call; `check(result, before)` raises where the result is wrong and notes what memory must
    hold; `before` is called first, on the same backend."""

    arguments: dict
    check: Callable
    before: Callable | None = None
    sizes: dict = field(default_factory=dict)  # S, n, ...: for whoever spoils an argument


def same(got, expected, what: str) -> None:
    assert got == expected, f"{what} is {got}: expected {expected}"


def near(got: float, expected: float, tolerance: float, what: str) -> None:
    if math.isnan(expected) or math.isinf(expected):
        assert got == expected or (math.isnan(got) and math.isnan(expected)), f"{what} is {got}: expected {expected}"
    else:
        assert abs(got - expected) <= tolerance, f"{what} is {got}: expected {expected} within {tolerance}"


def near_row(got, expected, tolerance, what: str) -> None:
    same(len(got), len(expected), f"length of {what}")
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        near(a, b, tolerance[i] if isinstance(tolerance, list) else tolerance, f"{what}[{i}]")


def shaped(result: torch.Tensor, shape, dtype: torch.dtype) -> list:
    same((tuple(result.shape), result.dtype), (tuple(shape), dtype), "shape and dtype")
    return elements(result)


def own_lengths(lengths: Buffer | None, B: int, S: int) -> list[int]:
    return [S] * B if lengths is None else lengths.lists()


# ---- scores


def keydiff_tolerance(keys, anchor_terms: float, anchor: list[float]) -> float:
    """A mean that cancels leaves the rounding of its terms."""
    size = oracle.norm(anchor)
    return INF if size == 0 else 4e-6 + 2e-6 * anchor_terms / size


def check_keydiff(got, keys, anchor, S: int, what: str) -> None:
    """One head's scores against its own keys."""
    good = [key for key in keys if oracle.finite(key)]
    if isinstance(anchor, str):
        unit = anchor == "unit"
        mean = oracle.mean_key(keys, unit)
        terms = 1.0 if unit else max(map(oracle.norm, good), default=0.0)
        tolerance = keydiff_tolerance(good, terms, mean)
    else:
        mean, tolerance = anchor, 4e-6
    expected = oracle.keydiff(keys, mean)
    for i, x in enumerate(expected):
        if tolerance == INF and not math.isnan(x):  # no direction at all: any cosine
            assert -1.001 <= got[i] <= 1.001, f"{what}[{i}] is {got[i]}"
        else:
            near(got[i], x, tolerance, f"{what}[{i}]")
    same(got[len(keys) :], [-INF] * (S - len(keys)), f"{what} beyond its length")


def draw_anchor(draw: Draw, B: int, H: int, D: int):
    if draw.chance(0.7):
        return draw.choice(("unit", "raw"))
    return draw.memory.tensor((B, H, D), draw.choice(FLOATS), lambda: draw.gauss() + 0.5, rows=False, expand=True)


def head_anchor(anchor, b: int, h: int):
    return anchor if isinstance(anchor, str) else anchor.lists()[b][h]


def keydiff_scores(draw: Draw) -> Case:
    B, H, S, D = draw.shape()
    if draw.chance(0.03):
        B, H, S, D = 1, 1, 1025 + draw.random.randrange(8), 2  # several splits
    dtype = draw.choice(FLOATS)
    keys = draw.memory.tensor((B, H, S, D), dtype, draw.gauss, expand=True)
    lengths = draw.lengths(B, S)
    draw.spoil_padding(keys, lengths)
    draw.spoil_keys(keys)
    anchor = draw_anchor(draw, B, H, D)

    def check(result, _) -> None:
        got, rows = shaped(result, (B, H, S), torch.float32), keys.lists()
        for b, length in enumerate(own_lengths(lengths, B, S)):
            for h in range(H):
                check_keydiff(got[b][h], rows[b][h][:length], head_anchor(anchor, b, h), S, f"scores[{b}][{h}]")

    return Case(dict(keys=keys, anchor=anchor, lengths=lengths), check, sizes=dict(S=S))


def key_norm_scores(draw: Draw) -> Case:
    B, H, S, D = draw.shape()
    keys = draw.memory.tensor((B, H, S, D), draw.choice(FLOATS), draw.gauss, expand=True)
    lengths = draw.lengths(B, S)
    draw.spoil_padding(keys, lengths)
    draw.spoil_keys(keys)

    def check(result, _) -> None:
        got, rows = shaped(result, (B, H, S), torch.float32), keys.lists()
        for b, length in enumerate(own_lengths(lengths, B, S)):
            for h in range(H):
                for i, key in enumerate(rows[b][h][:length]):
                    x = got[b][h][i]
                    if oracle.finite(key):
                        near(x, -oracle.norm(key), 1e-6 + 1e-6 * oracle.norm(key), f"scores[{b}][{h}][{i}]")
                    else:  # it ranks last
                        assert math.isnan(x) or x == -INF, f"scores[{b}][{h}][{i}] is {x} for the key {key}"
                same(got[b][h][length:], [-INF] * (S - length), "scores beyond the length")

    return Case(dict(keys=keys, lengths=lengths), check, sizes=dict(S=S))


def mlp_scores(draw: Draw) -> Case:
    B, S = draw.choice((1, 2, 3)), draw.choice((1, 2, 17, 33, 64))
    M, N = draw.choice((1, 3, 16, 17, 40)), draw.choice((1, 2, 16, 31, 33))
    dtype = draw.choice(FLOATS[:3])

    def argument(*shape, rows=False) -> Buffer:
        return draw.memory.tensor(shape, dtype, draw.gauss, rows, expand=True)

    hidden, w1, b1 = argument(B, S, M, rows=True), argument(N, M), argument(N)
    w2 = argument(1, N) if draw.chance(0.5) else argument(N)
    b2 = argument(1) if draw.chance(0.5) else argument()

    def check(result, _) -> None:
        got = shaped(result, (B, S), torch.float32)
        wide, bias = w1.lists(), b1.lists()
        out = w2.lists()[0] if len(w2.shape) == 2 else w2.lists()
        last = b2.lists()[0] if b2.shape else b2.lists()
        for b in range(B):
            for s, row in enumerate(hidden.lists()[b]):
                terms = [
                    sum(abs(x * y) for x, y in zip(w, row, strict=True)) + abs(z)
                    for w, z in zip(wide, bias, strict=True)
                ]
                size = sum(abs(w) * t for w, t in zip(out, terms, strict=True)) + abs(last)
                near(got[b][s], oracle.mlp(row, wide, bias, out, last), 1e-6 + 2e-6 * size, f"scores[{b}][{s}]")

    return Case(dict(hidden=hidden, w1=w1, b1=b1, w2=w2, b2=b2), check)


def pool_scores(draw: Draw) -> Case:
    B, H, S, _ = draw.shape()
    scores = draw.scores((B, H, S))
    size, mode = draw.choice((1, 3, 5, 7, 9, 31)), draw.choice(("avg", "max"))

    def check(result, _) -> None:
        got = shaped(result, (B, H, S), torch.float32)
        for b in range(B):
            for h in range(H):
                row = scores.lists()[b][h]
                near_row(got[b][h], oracle.pool(row, size, mode), 2e-6 if mode == "avg" else 0.0, f"pooled[{b}][{h}]")

    return Case(dict(scores=scores, kernel_size=size, mode=mode), check)


def combine_scores(draw: Draw) -> Case:
    B, H, S, _ = draw.shape()
    scale = draw.choice(("rank", "minmax", "l2"))
    size = draw.choice((1.0, 1.0, 1e20, 1e38, 1e-20))  # no scale overflows or drowns

    def element() -> float:
        return draw.choice((0.0, -0.0, 1.0, -INF, math.nan)) if draw.chance(0.1) else size * draw.random.uniform(-2, 2)

    parts = []
    for _ in range(draw.random.randint(1, 3)):
        scores = draw.memory.tensor((B, H, S), torch.float32, element, draw.chance(0.9), expand=True)
        parts.append((draw.choice((1.0, 0.4, 2, -0.5, 0)), scores))
    best = None
    if len(parts) == 1 and draw.chance(0.3) and not parts[0][1].overlaps_itself():  # +inf stays the best
        best = draw.random.randrange(S)
        parts[0][1].put((0, 0, best), INF)
        parts[0] = (1.0, parts[0][1])

    def check(result, _) -> None:
        got = shaped(result, (B, H, S), torch.float32)
        weights = [weight for weight, _ in parts]
        tolerance = 2e-6 * sum(map(abs, weights))
        for b in range(B):
            for h in range(H):
                rows = [scores.lists()[b][h] for _, scores in parts]
                if best is not None and (b, h) == (0, 0) and scale != "rank":
                    for i, (x, y) in enumerate(zip(rows[0], got[0][0], strict=True)):
                        assert math.isnan(x) == math.isnan(y) and (x == -INF) == (y == -INF), (
                            f"combined[0][0][{i}] is {y} for the score {x}, beside an infinite one"
                        )
                        assert not y > got[0][0][best], f"combined[0][0][{i}] is {y}: above that of the infinite score"
                else:
                    near_row(got[b][h], oracle.combine(rows, weights, scale), tolerance, f"combined[{b}][{h}]")

    return Case(dict(parts=parts, scale=scale), check)


# ---- attention


def draw_queries(draw: Draw, keys: Buffer, W: int) -> Buffer:
    B, H, _, D = keys.shape
    dtype = draw.choice(FLOATS) if keys.dtype in FLOATS[3:] else keys.dtype
    return draw.memory.tensor((B, H * draw.choice((1, 1, 2, 3)), W, D), dtype, draw.gauss, expand=True)


def draw_attention(draw: Draw, most: int = 3000):
    B, H, S, D = draw.shape(most)
    keys = draw.memory.tensor((B, H, S, D), draw.choice(FLOATS), draw.gauss, expand=True)
    lengths = draw.lengths(B, S)
    draw.spoil_padding(keys, lengths)
    W = min(S, draw.choice((1, 2, 5, 16, 17, 33, S)))
    if W * S > 3000:
        W = min(W, 5)
    scale = draw.choice((None, None, 0.3, 1, -0.5, 0.0))
    return keys, draw_queries(draw, keys, W), lengths, scale


def logit_error(queries_row, keys, scale: float) -> float:
    """How far a float32 logit may be off."""
    return 1e-6 + 4e-7 * abs(scale) * max(
        (sum(abs(a * b) for a, b in zip(queries_row, key, strict=True)) for key in keys), default=0.0
    )


def attention_lse(draw: Draw) -> Case:
    keys, queries, lengths, scale = draw_attention(draw)
    (B, H, S, D), (_, HQ, W, _) = keys.shape, queries.shape
    causal = draw.chance(0.6)

    def check(result, _) -> None:
        got = shaped(result, (B, HQ, W), torch.float32)
        factor = D**-0.5 if scale is None else scale
        K, Q = keys.lists(), queries.lists()
        for b, length in enumerate(own_lengths(lengths, B, S)):
            for hq in range(HQ):
                for w in range(W):
                    seen = K[b][hq * H // HQ][: oracle.visible(w, W, length, causal)]
                    expected = oracle.log_sum_exp(oracle.logits(Q[b][hq][w], seen, factor))
                    error = 2e-6 * (1 + abs(expected)) + logit_error(Q[b][hq][w], seen, factor) if seen else 0.0
                    near(got[b][hq][w], expected, error, f"lse[{b}][{hq}][{w}]")

    arguments = dict(queries=queries, keys=keys, scale=scale, causal=causal, lengths=lengths)
    return Case(arguments, check, sizes=dict(S=S))


def check_mass(got, rows, queries, lse, lengths, S: int, factor, causal, reduce, count) -> None:
    """rows[b][h]: the keys of a head, as long as its request; got [B][H][S]."""
    (_, HQ, W, _), H = queries.shape, len(got[0])
    G, Q = HQ // H, queries.lists()
    for b, length in enumerate(lengths):
        for h in range(H):
            keys, weights, error = rows[b][h], [], 0.0
            for g in range(G):
                weights.append([])
                for w in range(W):
                    seen = keys[: oracle.visible(w, W, length, causal)]
                    given = None if lse is None else lse[b][h * G + g][w]
                    if seen:
                        error = max(error, logit_error(Q[b][h * G + g][w], seen, factor))
                        weights[-1].append(oracle.attention_weights(Q[b][h * G + g][w], seen, factor, given))
                    else:
                        weights[-1].append([])
            expected = oracle.mass(weights, length, W, causal, reduce, count)
            tolerance = [2e-6 * max(1.0, abs(x)) + 6 * error * abs(x) for x in expected]
            near_row(got[b][h][:length], expected, tolerance, f"mass[{b}][{h}]")
            same(got[b][h][length:], [-INF] * (S - length), f"mass[{b}][{h}] beyond its length")


def draw_mass_options(draw: Draw) -> dict:
    reduce = draw.choice(("sum", "mean", "max", "square"))
    return dict(reduce=reduce, normalize=draw.choice((None, "count")) if reduce != "max" else None)


def draw_lse(draw: Draw, queries: Buffer, rows, lengths: list[int], H: int, factor: float, causal: bool):
    """The queries' own, or one apart from it by a constant; of padding any number."""
    (B, HQ, W, _), Q, shift = queries.shape, queries.lists(), draw.choice((0.0, 0.5))
    values = []
    for b in range(B):
        values.append([])
        for hq in range(HQ):
            keys = rows[b][hq * H // HQ]
            counts = [oracle.visible(w, W, lengths[b], causal) for w in range(W)]
            values[b].append(
                [
                    oracle.log_sum_exp(oracle.logits(Q[b][hq][w], keys[:seen], factor)) + shift if seen else math.nan
                    for w, seen in enumerate(counts)
                ]
            )
    return draw.memory.holding(values, (B, HQ, W), torch.float32, rows=draw.chance(0.85))


def attention_mass(draw: Draw) -> Case:
    keys, queries, lengths, scale = draw_attention(draw, 2000)
    (B, H, S, D), causal = keys.shape, draw.chance(0.7)
    factor = D**-0.5 if scale is None else scale
    own = own_lengths(lengths, B, S)
    rows = [[row[: own[b]] for row in heads] for b, heads in enumerate(keys.lists())]
    lse = draw_lse(draw, queries, rows, own, H, factor, causal) if draw.chance(0.4) else None
    options = draw_mass_options(draw)

    def check(result, _) -> None:
        got, given = shaped(result, (B, H, S), torch.float32), None if lse is None else lse.lists()
        count = options["normalize"] == "count"
        check_mass(got, rows, queries, given, own, S, factor, causal, options["reduce"], count)

    arguments = dict(queries=queries, keys=keys, scale=scale, lse=lse, causal=causal, lengths=lengths, **options)
    return Case(arguments, check, sizes=dict(S=S))


def check_attended(got, weights, rows, dtype: torch.dtype, error: float, what: str) -> None:
    expected = oracle.weighted_rows(weights, rows)
    sizes = oracle.weighted_rows(weights, [[abs(x) for x in row] for row in rows])
    epsilon = ROUNDING.get(dtype, 1.6e-2)
    tolerance = [epsilon * (size + abs(x)) + 4 * error * size + 1e-7 for size, x in zip(sizes, expected, strict=True)]
    near_row(got, expected, tolerance, what)


def decode_attention(draw: Draw) -> Case:
    B, H, S, D = draw.shape(4000)
    keys, values = draw.cache(B, H, S, D, expand=draw.chance(0.3))
    lengths = draw.lengths(B, S)
    draw.spoil_padding(keys, lengths)
    draw.spoil_padding(values, lengths)
    queries = draw_queries(draw, keys, 1)
    scale = draw.choice((None, None, 0.3, 1, -0.5))
    HQ, DV = queries.shape[1], values.shape[3]
    arguments = dict(queries=queries, keys=keys, values=values, scale=scale, lengths=lengths)
    mass = last_used = None
    if draw.chance(0.6):
        mass = draw.memory.tensor((B, H, S), torch.float32, draw.random.random, draw.chance(0.9))
        arguments.update(mass=mass, decay=draw.choice((1.0, 1, 0.0, 0.5, 0.99)))
    if draw.chance(0.6):
        steps = draw.random.randrange
        last_used = draw.memory.tensor((B, H, S), torch.int32, lambda: steps(-1, 50), draw.chance(0.9))
        threshold = draw.choice((1e-3, 0.0, 1.5, 1 / S))
        arguments.update(last_used=last_used, step=draw.choice((0, 51, 2**31 - 1)), threshold=threshold)

    def check(result, _) -> None:
        dtype = queries.dtype if queries.dtype in FLOATS[:3] else torch.bfloat16
        got = shaped(result, (B, HQ, 1, DV), dtype)
        factor, G = D**-0.5 if scale is None else scale, HQ // H
        K, V, Q = keys.lists(), values.lists(), queries.lists()
        old_mass, old_used = mass and mass.lists(), last_used and last_used.lists()
        new_mass, new_used = mass and mass.held(), last_used and last_used.held()
        for b, length in enumerate(own_lengths(lengths, B, S)):
            for h in range(H):
                heads, error = range(h * G, (h + 1) * G), 0.0
                weights = [oracle.attention_weights(Q[b][hq][0], K[b][h][:length], factor) for hq in heads]
                for hq, row in zip(heads, weights, strict=True):
                    off = logit_error(Q[b][hq][0], K[b][h][:length], factor)
                    error = max(error, off)
                    check_attended(got[b][hq][0], row, V[b][h][:length], dtype, off, f"out[{b}][{hq}]")
                for i in range(length):
                    w = math.fsum(row[i] for row in weights) / G
                    off = 2e-7 + (4 * error + 2e-6) * w
                    if mass:
                        expected = arguments["decay"] * old_mass[b][h][i] + w
                        near(new_mass[b][h][i], expected, off + 4e-7 * abs(expected), f"mass[{b}][{h}][{i}]")
                        mass.expect((b, h, i), encode([new_mass[b][h][i]], mass.dtype))
                    if last_used:
                        step, threshold = arguments["step"], arguments["threshold"]
                        expected = step if w >= threshold else old_used[b][h][i]
                        if abs(w - threshold) > off:
                            same(new_used[b][h][i], expected, f"last_used[{b}][{h}][{i}] at weight {w}")
                        else:
                            assert new_used[b][h][i] in (step, old_used[b][h][i])
                        last_used.expect((b, h, i), encode([new_used[b][h][i]], last_used.dtype))

    return Case(arguments, check, sizes=dict(S=S))


# ---- selection


def topk_indices(draw: Draw) -> Case:
    B, H, S, _ = draw.shape()
    if draw.chance(0.02):
        B, H, S = 1, draw.choice((1, 2)), 8192 + draw.random.randint(1, 300)  # several splits
    scores = draw.scores((B, H, S))
    (sink, recent), lengths = draw.protection(S), draw.lengths(B, S)
    keep, heads = draw.keep(S, sink, recent), draw.choice(("each", "shared"))
    arguments = dict(scores=scores, keep=keep, sink=sink, recent=recent, heads=heads, lengths=lengths)

    def check(result, _) -> None:
        check_selected(result, scores.lists(), S, keep, sink, recent, heads, own_lengths(lengths, B, S))

    return Case(arguments, check, sizes=dict(S=S))


def selected(rows, keep, sink, recent, heads, lengths) -> list[list[list[int]]]:
    """Per request and head, the tokens kept."""
    result = []
    for scores, length in zip(rows, lengths, strict=True):
        if heads == "shared":
            scores = [oracle.averaged(scores)] * len(scores)
        kept = oracle.kept_count(keep, length)
        result.append([oracle.select(row, length, kept, sink, recent) for row in scores])
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
    lengths = draw.lengths(B, S)

    def check(result, _) -> None:
        got, rows = shaped(result, (B, H, count), torch.int64), scores.lists()
        for b, length in enumerate(own_lengths(lengths, B, S)):
            for h in range(H):
                slots = oracle.evicted(rows[b][h], length, count, sink, recent)
                same(got[b][h], oracle.padded(slots, count), f"slots[{b}][{h}]")

    arguments = dict(scores=scores, count=count, sink=sink, recent=recent, lengths=lengths)
    return Case(arguments, check, sizes=dict(S=S))


# ---- compaction


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


def numbers(data: bytes, dtype: torch.dtype) -> list:
    """Elements to compare: out of place a NaN stays one, but which is not promised."""
    return [str(x) for x in decode(data, dtype)]


def draw_move(draw: Draw) -> dict:
    return dict(inplace=draw.chance(0.7), preserve_order=draw.chance(0.5))


def compact(draw: Draw) -> Case:
    B, H, S, D = draw.shape()
    moves = draw_move(draw)
    expand = not moves["inplace"] and draw.chance(0.3)
    keys, values = draw.cache(B, H, S, D, ROWS, any_bytes=True, expand=expand)
    n = draw.random.randint(1, S)
    indices = draw.indices(B, H, [S] * B, n, equal=False)

    def check(result, _) -> None:
        assert result.lengths is None
        kept = [[[i for i in row if i >= 0] for row in heads] for heads in indices.lists()]
        check_compacted(result, keys, values, kept, n, moves["inplace"], moves["preserve_order"])

    return Case(dict(keys=keys, values=values, indices=indices, **moves), check, sizes=dict(S=S))


def draw_selection(draw: Draw, B: int, S: int) -> dict:
    sink, recent = draw.protection(S)
    keep, heads = draw.keep(S, sink, recent), draw.choice(("each", "shared"))
    return dict(keep=keep, sink=sink, recent=recent, heads=heads, lengths=draw.lengths(B, S))


def check_evicted(result, scores, keys, values, selection: dict, moves: dict) -> None:
    """A compaction by these scores (a tensor: the op's own, which have cases of their own)."""
    B, S, keep = keys.shape[0], keys.shape[2], selection["keep"]
    lengths = own_lengths(selection["lengths"], B, S)
    protection = (selection["sink"], selection["recent"], selection["heads"])
    kept = selected(elements(scores), keep, *protection, lengths)
    if selection["lengths"] is None:
        assert result.lengths is None
    else:
        counts = [oracle.kept_count(keep, length) for length in lengths]
        same(shaped(result.lengths, (B,), torch.int64), counts, "lengths")
    n = oracle.kept_count(keep, S)
    check_compacted(result, keys, values, kept, n, moves["inplace"], moves["preserve_order"])


def keydiff_compact(draw: Draw) -> Case:
    B, H, S, D = draw.shape()
    keys, values = draw.cache(B, H, S, D)
    draw.spoil_keys(keys)
    anchor, selection, moves = draw_anchor(draw, B, H, D), draw_selection(draw, B, S), draw_move(draw)
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
    selection, moves, options = draw_selection(draw, B, S), draw_move(draw), draw_mass_options(draw)
    pool = draw.choice((None, 1, 3, 7))
    arguments = dict(queries=queries, keys=keys, values=values, pool=pool, **options, **selection, **moves)

    def before():
        lengths = selection["lengths"]
        scores = kvevict.attention_mass(**opened(dict(queries=queries, keys=keys, lengths=lengths, **options)))
        return scores if pool is None else kvevict.pool_scores(scores, pool)

    def check(result, scores) -> None:
        check_evicted(result, scores, keys, values, selection, moves)

    return Case(arguments, check, before, sizes=dict(S=S))


# ---- paged


def paged_scores(draw: Draw) -> Case:
    cache = Paged(draw)
    cache.spoil_unused(draw)
    anchor = draw_anchor(draw, cache.B, cache.H, cache.D)

    def check(result, _) -> None:
        got, rows = shaped(result, (cache.B, cache.H, cache.S), torch.float32), cache.rows(cache.keys)
        for b in range(cache.B):
            for h in range(cache.H):
                check_keydiff(got[b][h], rows[b][h], head_anchor(anchor, b, h), cache.S, f"scores[{b}][{h}]")

    return Case(dict(**cache.arguments(), anchor=anchor), check, sizes=dict(S=cache.S, paged=cache))


def paged_queries(draw: Draw, cache: Paged, W: int) -> Buffer:
    dtype = draw.choice(FLOATS) if cache.keys.dtype in FLOATS[3:] else cache.keys.dtype
    return draw.memory.tensor((cache.B, cache.H * draw.choice((1, 2, 3)), W, cache.D), dtype, draw.gauss, expand=True)


def paged_attention_mass(draw: Draw) -> Case:
    cache = Paged(draw)
    cache.spoil_unused(draw)
    queries = paged_queries(draw, cache, min(cache.S, draw.choice((1, 2, 5, 17))))
    scale, causal, options = draw.choice((None, 0.3)), draw.chance(0.7), draw_mass_options(draw)
    factor = cache.D**-0.5 if scale is None else scale

    rows = cache.rows(cache.keys)
    lse = draw_lse(draw, queries, rows, cache.held, cache.H, factor, causal) if draw.chance(0.4) else None

    def check(result, _) -> None:
        got = shaped(result, (cache.B, cache.H, cache.S), torch.float32)
        given, count = None if lse is None else lse.lists(), options["normalize"] == "count"
        check_mass(got, rows, queries, given, cache.held, cache.S, factor, causal, options["reduce"], count)

    arguments = dict(queries=queries, **cache.arguments(), scale=scale, lse=lse, causal=causal, **options)
    return Case(arguments, check, sizes=dict(S=cache.S, paged=cache))


def paged_decode_attention(draw: Draw) -> Case:
    cache = Paged(draw)
    cache.spoil_unused(draw)
    queries, scale = paged_queries(draw, cache, 1), draw.choice((None, 0.3, -1))

    def check(result, _) -> None:
        (_, HQ, _, D), DV = queries.shape, cache.values.shape[3]
        dtype = queries.dtype if queries.dtype in FLOATS[:3] else torch.bfloat16
        got, factor = shaped(result, (cache.B, HQ, 1, DV), dtype), D**-0.5 if scale is None else scale
        K, V, Q = cache.rows(cache.keys), cache.rows(cache.values), queries.lists()
        for b in range(cache.B):
            for hq in range(HQ):
                h, query = hq * cache.H // HQ, Q[b][hq][0]
                keys, values = K[b][h], V[b][h]
                weights = oracle.attention_weights(query, keys, factor)
                error = logit_error(query, keys, factor)
                check_attended(got[b][hq][0], weights, values, dtype, error, f"out[{b}][{hq}]")

    arguments = dict(queries=queries, **cache.arguments(), value_cache=cache.values, scale=scale)
    return Case(arguments, check, sizes=dict(S=cache.S, paged=cache))


def check_paged(result, cache: Paged, moved: list[Buffer], kept, to: str, ordered: bool) -> None:
    """kept[b][h]: the tokens kept; `moved`: caches and scales. Notes what they must hold."""
    size, counts, free = cache.block_size, [len(heads[0]) for heads in kept], []
    for b, (count, length) in enumerate(zip(counts, cache.held, strict=True)):
        first = length - count if to == "tail" else 0
        slots = range(first, first + count)
        for h in range(cache.H):
            tokens = kept[b][h]
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
        free.append([cache.table_rows[b][c] if c in gone else -1 for c in range(cache.columns)])
    same(shaped(result.lengths, (cache.B,), cache.lengths.dtype), counts, "lengths")
    same(shaped(result.freed_blocks, (cache.B, cache.columns), torch.int32), free, "freed_blocks")


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
    cache = Paged(draw, ROWS, any_bytes=True)
    scales, n = draw_scales(draw, cache), draw.random.randint(1, cache.S)
    indices = draw.indices(cache.B, cache.H, cache.held, n, equal=True)
    to, ordered = draw.choice(("front", "tail")), draw.chance(0.5)
    caches = dict(**cache.arguments(), value_cache=cache.values)
    arguments = dict(**caches, indices=indices, to=to, preserve_order=ordered, **scales)

    def check(result, _) -> None:
        kept = [[[i for i in row if i >= 0] for row in heads] for heads in indices.lists()]
        check_paged(result, cache, [cache.keys, cache.values, *scales.values()], kept, to, ordered)

    return Case(arguments, check, sizes=dict(S=cache.S, paged=cache))


def paged_keydiff_compact(draw: Draw) -> Case:
    cache = Paged(draw)
    draw_keys = draw.chance(0.3)
    if draw_keys:
        cache.spoil_unused(draw)
    scales, anchor = draw_scales(draw, cache), draw_anchor(draw, cache.B, cache.H, cache.D)
    if scales and anchor == "raw":
        anchor = "unit"
    sink, recent = draw.protection(cache.S)
    keep, kept = draw.keep(cache.S, sink, recent), None
    if draw.chance(0.3):
        kept = [draw.random.randint(1, cache.S + 3) for _ in range(cache.B)]
        keep = draw.integers(kept)
    elif isinstance(keep, int) and draw.chance(0.3):
        keep += cache.S  # a request that is shorter stays whole
    heads, to, ordered = draw.choice(("each", "shared")), draw.choice(("front", "tail")), draw.chance(0.5)
    options = dict(keep=keep, sink=sink, recent=recent, heads=heads, anchor=anchor, to=to, preserve_order=ordered)
    arguments = dict(**cache.arguments(), value_cache=cache.values, **options, **scales)

    def before():
        return paged.paged_scores(**opened(dict(**cache.arguments(), anchor=anchor)))

    def check(result, scores) -> None:
        rows, chosen = elements(scores), []
        for b, length in enumerate(cache.held):
            own = keep if kept is None else kept[b]
            chosen += selected([rows[b]], own, sink, recent, heads, [length])
        check_paged(result, cache, [cache.keys, cache.values, *scales.values()], chosen, to, ordered)

    return Case(arguments, check, before, sizes=dict(S=cache.S, paged=cache))


def opened(value):
    """Arguments with tensors for buffers."""
    if isinstance(value, Buffer):
        return value.tensor
    if isinstance(value, dict):
        return {name: opened(x) for name, x in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(opened(x) for x in value)
    return value


DENSE = (
    keydiff_scores,
    key_norm_scores,
    mlp_scores,
    pool_scores,
    combine_scores,
    attention_lse,
    attention_mass,
    decode_attention,
    topk_indices,
    evict_slots,
    compact,
    keydiff_compact,
    attention_compact,
)
PAGED = (paged_scores, paged_attention_mass, paged_decode_attention, paged_compact, paged_keydiff_compact)
OPS = {case.__name__: (case, getattr(kvevict, case.__name__)) for case in DENSE}
OPS |= {case.__name__: (case, getattr(paged, case.__name__)) for case in PAGED}

"""Cases of the ops that attend: LSE, mass, decoding."""

from __future__ import annotations

import math

import torch

import kvevict
from fuzz import oracle
from fuzz.checks import Case, lengths_per_row, near, near_row, same, shaped, takes
from fuzz.drawing import FLOATS, Draw, per_head
from fuzz.memory import Buffer, encode
from fuzz.oracle import INF

# What a 16- or 8-bit attention may round its weights to before they meet the values, and its result.
ROUNDING = {torch.float32: 4e-6, torch.float16: 2e-3}


def draw_queries(draw: Draw, keys: Buffer, W: int) -> Buffer:
    B, H, _, D = keys.shape
    dtype = draw.choice(FLOATS) if keys.dtype in FLOATS[3:] else keys.dtype
    return draw.memory.tensor((B, H * draw.choice((1, 1, 2, 3)), W, D), dtype, draw.gauss, expand=True)


def draw_attention(draw: Draw, most: int = 3000):
    B, H, S, D = draw.shape(most)
    keys = draw.memory.tensor((B, H, S, D), draw.choice(FLOATS), draw.gauss, expand=True)
    lengths = draw.lengths(B, H, S, lengths_per_row())
    draw.spoil_padding(keys, lengths)
    W = min(S, draw.choice((1, 2, 5, 16, 17, 33, S)))
    if W * S > 3000:
        W = min(W, 5)
    scale = draw.choice((None, None, 0.3, 1, -0.5, 0.0))
    return keys, draw_queries(draw, keys, W), lengths, scale


def cut(rows, lengths: list[list[int]]):
    """[b][h]: as many of a head's rows as it has tokens."""
    return [[row[:n] for row, n in zip(heads, own, strict=True)] for heads, own in zip(rows, lengths, strict=True)]


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
        for b, own in enumerate(per_head(lengths, B, H, S)):
            for hq in range(HQ):
                h = hq * H // HQ
                for w in range(W):
                    seen = K[b][h][: oracle.visible(w, W, own[h], causal)]
                    expected = oracle.log_sum_exp(oracle.logits(Q[b][hq][w], seen, factor))
                    error = 2e-6 * (1 + abs(expected)) + logit_error(Q[b][hq][w], seen, factor) if seen else 0.0
                    near(got[b][hq][w], expected, error, f"lse[{b}][{hq}][{w}]")

    arguments = dict(queries=queries, keys=keys, scale=scale, causal=causal, lengths=lengths)
    return Case(arguments, check, sizes=dict(S=S))


def check_mass(got, rows, queries, lse, lengths, S: int, factor, causal, options: dict) -> None:
    """rows[b][h]: the keys of a head, as long as its request; got [B][H][S]."""
    (_, HQ, W, _), H = queries.shape, len(got[0])
    G, Q = HQ // H, queries.lists()
    for b, own in enumerate(lengths):
        for h, length in enumerate(own):
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
            count, distance = options["normalize"] == "count", options.get("min_distance", 0)
            expected = oracle.mass(weights, length, W, causal, options["reduce"], count, distance)
            tolerance = [2e-6 * max(1.0, abs(x)) + 6 * error * abs(x) for x in expected]
            near_row(got[b][h][:length], expected, tolerance, f"mass[{b}][{h}]")
            same(got[b][h][length:], [-INF] * (S - length), f"mass[{b}][{h}] beyond its length")


def draw_mass_options(draw: Draw, far: bool = False) -> dict:
    reduce = draw.choice(("sum", "mean", "max", "square"))
    options = dict(reduce=reduce, normalize=draw.choice((None, "count")) if reduce != "max" else None)
    return options | (dict(min_distance=draw.choice((0, 1, 2, 17, 5000))) if far else {})


def draw_lse(draw: Draw, queries: Buffer, rows, lengths: list[list[int]], H: int, factor: float, causal: bool):
    """The queries' own, or one apart from it by a constant; of padding any number."""
    (B, HQ, W, _), Q, shift = queries.shape, queries.lists(), draw.choice((0.0, 0.5))
    values = []
    for b in range(B):
        values.append([])
        for hq in range(HQ):
            h = hq * H // HQ
            keys = rows[b][h]
            counts = [oracle.visible(w, W, lengths[b][h], causal) for w in range(W)]
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
    own = per_head(lengths, B, H, S)
    rows = cut(keys.lists(), own)
    lse = draw_lse(draw, queries, rows, own, H, factor, causal) if draw.chance(0.4) else None
    options = draw_mass_options(draw, far=causal)

    def check(result, _) -> None:
        got, given = shaped(result, (B, H, S), torch.float32), None if lse is None else lse.lists()
        check_mass(got, rows, queries, given, own, S, factor, causal, options)

    arguments = dict(queries=queries, keys=keys, scale=scale, lse=lse, causal=causal, lengths=lengths, **options)
    return Case(arguments, check, sizes=dict(S=S))


def attention_peaks(draw: Draw) -> Case:
    keys, queries, lengths, scale = draw_attention(draw, 2000)
    (B, H, S, D), (_, HQ, W, _) = keys.shape, queries.shape
    pool, factor = draw.choice((1, 3, 5, 31)), D**-0.5 if scale is None else scale
    own = per_head(lengths, B, H, S)
    rows = cut(keys.lists(), own)

    def check(result, _) -> None:
        got, Q = shaped(result, (B, H, S), torch.float32), queries.lists()
        for b in range(B):
            for h, length in enumerate(own[b]):
                n, weights, error = max(length - W, 0), [], 0.0
                for hq in range(h * HQ // H, (h + 1) * HQ // H):
                    seen = [rows[b][h][: n + w + 1] for w in range(W)] if n else []
                    weights.append([oracle.attention_weights(Q[b][hq][w], x, factor) for w, x in enumerate(seen)])
                    error = max([error, *(logit_error(Q[b][hq][w], x, factor) for w, x in enumerate(seen))])
                expected = oracle.peaks(weights, n, pool)
                tolerance = [1e-7 + (1e-5 + 12 * error) * x for x in expected]
                near_row(got[b][h][:n], expected, tolerance, f"peaks[{b}][{h}]")
                same(got[b][h][n:], [-INF] * (S - n), f"peaks[{b}][{h}] of the queries' own tokens")

    arguments = dict(queries=queries, keys=keys, pool=pool, scale=scale, lengths=lengths)
    return Case(arguments, check, sizes=dict(S=S))


def check_attended(got, weights, rows, dtype: torch.dtype, error: float, what: str) -> None:
    expected = oracle.weighted_rows(weights, rows)
    sizes = oracle.weighted_rows(weights, [[abs(x) for x in row] for row in rows])
    epsilon = ROUNDING.get(dtype, 1.6e-2)
    tolerance = [epsilon * (size + abs(x)) + 4 * error * size + 1e-7 for size, x in zip(sizes, expected, strict=True)]
    near_row(got, expected, tolerance, what)


def draw_decode(draw: Draw, function, S: int) -> tuple[int, dict]:
    """How many new tokens a step has, and its options: one and none where the op knows no others."""
    if not takes(function, "return_lse"):
        return 1, {}
    return min(S, draw.choice((1, 1, 2, 5, 17))), dict(return_lse=draw.chance(0.5))


def check_decoded(result, queries: Buffer, keys, values, DV: int, scale: float | None, options: dict) -> None:
    """keys, values [b][h]: the rows of each head, as many as its tokens. Queries are the last of them, causal."""
    B, HQ, W, D = queries.shape
    dtype = queries.dtype if queries.dtype in FLOATS[:3] else torch.bfloat16
    out, lse = result if options.get("return_lse") else (result, None)
    got, sums = shaped(out, (B, HQ, W, DV), dtype), lse is not None and shaped(lse, (B, HQ, W), torch.float32)
    factor, Q = D**-0.5 if scale is None else scale, queries.lists()
    for b in range(B):
        for hq in range(HQ):
            h = hq * len(keys[b]) // HQ
            for w in range(W):
                what, query = f"[{b}][{hq}][{w}]", Q[b][hq][w]
                seen = keys[b][h][: oracle.visible(w, W, len(keys[b][h]), True)]
                error = logit_error(query, seen, factor)
                if sums:
                    expected = oracle.log_sum_exp(oracle.logits(query, seen, factor))
                    near(sums[b][hq][w], expected, error + 2e-6 * (1 + abs(expected)) if seen else 0.0, "lse" + what)
                if seen:
                    weights = oracle.attention_weights(query, seen, factor)
                    check_attended(got[b][hq][w], weights, values[b][h][: len(seen)], dtype, error, "out" + what)
                elif not keys[b][h]:  # nothing to attend to
                    same(got[b][hq][w], [0.0] * DV, "out" + what)


def decode_attention(draw: Draw) -> Case:
    B, H, S, D = draw.shape(4000)
    keys, values = draw.cache(B, H, S, D, expand=draw.chance(0.3))
    lengths = draw.lengths(B, H, S, lengths_per_row())
    draw.spoil_padding(keys, lengths)
    draw.spoil_padding(values, lengths)
    W, options = draw_decode(draw, kvevict.decode_attention, S)
    queries = draw_queries(draw, keys, W)
    scale = draw.choice((None, None, 0.3, 1, -0.5))
    arguments = dict(queries=queries, keys=keys, values=values, scale=scale, lengths=lengths, **options)
    if W == 1 and draw.chance(0.6):
        mass = draw.memory.tensor((B, H, S), torch.float32, draw.random.random, draw.chance(0.9))
        arguments.update(mass=mass, decay=draw.choice((1.0, 1, 0.0, 0.5, 0.99)))
    if W == 1 and draw.chance(0.6):
        steps = draw.random.randrange
        last_used = draw.memory.tensor((B, H, S), torch.int32, lambda: steps(-1, 50), draw.chance(0.9))
        threshold = draw.choice((1e-3, 0.0, 1.5, 1 / S))
        arguments.update(last_used=last_used, step=draw.choice((0, 51, 2**31 - 1)), threshold=threshold)

    def check(result, _) -> None:
        own = per_head(lengths, B, H, S)
        K, V = (
            [[row[: own[b][h]] for h, row in enumerate(rows)] for b, rows in enumerate(x.lists())]
            for x in (keys, values)
        )
        check_decoded(result, queries, K, V, values.shape[3], scale, options)
        check_tracked(arguments, K)

    return Case(arguments, check, sizes=dict(S=S))


def check_tracked(arguments: dict, keys) -> None:
    """One query's weights, averaged over the group, in `mass` and `last_used`; notes what these must hold."""
    queries, scale = arguments["queries"], arguments["scale"]
    factor, Q = queries.shape[3] ** -0.5 if scale is None else scale, queries.lists()
    G = queries.shape[1] // len(keys[0])
    tracked = [arguments.get(name) for name in ("mass", "last_used")]
    old, new = [x and x.lists() for x in tracked], [x and x.held() for x in tracked]
    for b, heads in enumerate(keys):
        for h, seen in enumerate(heads):
            group = [row[0] for row in Q[b][h * G : h * G + G]]
            weights = [oracle.attention_weights(query, seen, factor) for query in group]
            error = max(logit_error(query, seen, factor) for query in group)
            for i in range(len(seen)):
                w = math.fsum(row[i] for row in weights) / G
                off = 2e-7 + (4 * error + 2e-6) * w
                if tracked[0]:
                    found, expected = new[0][b][h][i], arguments["decay"] * old[0][b][h][i] + w
                    near(found, expected, off + 4e-7 * abs(expected), f"mass[{b}][{h}][{i}]")
                    tracked[0].expect((b, h, i), encode([found], torch.float32))
                if tracked[1]:
                    found, before, threshold = new[1][b][h][i], old[1][b][h][i], arguments["threshold"]
                    if abs(w - threshold) <= off:  # either is right
                        assert found in (arguments["step"], before), f"last_used[{b}][{h}][{i}] is {found}"
                    else:
                        same(found, arguments["step"] if w >= threshold else before, f"last_used[{b}][{h}][{i}] at {w}")
                    tracked[1].expect((b, h, i), encode([found], torch.int32))

"""Cases of the scorers that read keys, hidden states or other scores."""

from __future__ import annotations

import math

import torch

from fuzz import oracle
from fuzz.checks import Case, lengths_per_row, near, near_row, same, shaped
from fuzz.drawing import FLOATS, Draw, per_head
from fuzz.memory import Buffer
from fuzz.oracle import INF

POSITIONS = 4000  # so many turns are exact enough, in both backends


def keydiff_tolerance(keys, anchor_terms: float, anchor: list[float]) -> float:
    """A mean that cancels leaves the rounding of its terms."""
    size = oracle.norm(anchor)
    return INF if size == 0 else 4e-6 + 2e-6 * anchor_terms / size


def check_keydiff(got, keys, anchor, S: int, what: str, off: float = 0.0) -> None:
    """One head's scores against its own keys. off: how much further than rounding they may be."""
    same(got[len(keys) :], [-INF] * (S - len(keys)), f"{what} beyond its length")
    if not keys:
        return
    good = [key for key in keys if oracle.finite(key)]
    if isinstance(anchor, str):
        unit = anchor == "unit"
        mean = oracle.mean_key(keys, unit)
        terms = 1.0 if unit else max(map(oracle.norm, good), default=0.0)
        tolerance = keydiff_tolerance(good, terms, mean)
    else:
        mean, tolerance = anchor, 4e-6
    tolerance += off
    expected = oracle.keydiff(keys, mean)
    for i, x in enumerate(expected):
        if tolerance == INF and not math.isnan(x):  # no direction at all: any cosine
            assert -1.001 <= got[i] <= 1.001, f"{what}[{i}] is {got[i]}"
        else:
            near(got[i], x, tolerance, f"{what}[{i}]")


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
    lengths = draw.lengths(B, H, S, lengths_per_row())
    draw.spoil_padding(keys, lengths)
    draw.spoil_keys(keys)
    anchor, turn = draw_anchor(draw, B, H, D), {}
    if anchor == "unit" and D % 2 == 0 and draw.chance(0.4):
        turn = draw_turn(draw, B, H, S, D)

    def check(result, _) -> None:
        got, rows = shaped(result, (B, H, S), torch.float32), keys.lists()
        for b, own in enumerate(per_head(lengths, B, H, S)):
            for h, length in enumerate(own):
                before = before_rope(rows[b][h][:length], turn, b, h)
                check_keydiff(got[b][h], before, head_anchor(anchor, b, h), S, f"scores[{b}][{h}]", 2e-5 if turn else 0)

    return Case(dict(keys=keys, anchor=anchor, lengths=lengths, **turn), check, sizes=dict(S=S))


def draw_turn(draw: Draw, B: int, H: int, S: int, D: int) -> dict:
    """RoPE's angles for some of a row's pairs, and positions: none, of each request or of each head."""
    pairs = draw.choice((D // 2, D // 2, draw.random.randint(1, D // 2)))
    angles = draw.memory.tensor((pairs,), torch.float32, lambda: draw.random.random(), rows=False)
    kind, dtype = draw.choice((None, (B, S), (B, H, S))), draw.choice((torch.int32, torch.int64))
    positions = kind and draw.memory.tensor(kind, dtype, lambda: draw.random.randrange(POSITIONS), draw.chance(0.8))
    return dict(inv_freq=angles, positions=positions)


def before_rope(keys, turn: dict, b: int, h: int) -> list[list[float]]:
    """One head's keys before RoPE, or as they are where nothing turned them."""
    if not turn:
        return keys
    places = range(len(keys))
    if turn["positions"]:
        of_request = turn["positions"].lists()[b]
        places = of_request[h] if isinstance(of_request[0], list) else of_request
    angles = turn["inv_freq"].lists()
    return [oracle.turned_back(key, place, angles) for key, place in zip(keys, places, strict=False)]


def draw_weights(draw: Draw, B: int, H: int, width: int) -> Buffer:
    shape = (H, width) if draw.chance(0.6) else (B, H, width)
    return draw.memory.tensor(shape, torch.float32, draw.gauss, rows=False)


def check_fitted(result, keys, values, arguments: dict, S: int) -> None:
    """keys, values [b][h]: the rows of each head, as many as its tokens."""
    B, H, weights = len(keys), len(keys[0]), arguments["weights"].lists()
    fitted, keydiff = result if arguments["return_keydiff"] else (result, None)
    got, differences = (x if x is None else shaped(x, (B, H, S), torch.float32) for x in (fitted, keydiff))
    for b in range(B):
        for h in range(H):
            what, own = f"[{b}][{h}]", weights[b][h] if isinstance(weights[0][0], list) else weights[h]
            before = before_rope(keys[b][h], arguments, b, h)
            if differences:
                check_keydiff(differences[b][h], before, "unit", S, "keydiff" + what, 2e-5)
            same(got[b][h][len(before) :], [-INF] * (S - len(before)), f"fitted{what} beyond its length")
            if not before:
                continue
            mean = oracle.mean_key(before, True)
            off = keydiff_tolerance([], 1.0, mean) + 2e-5
            for i, (key, value, cosine) in enumerate(
                zip(before, values[b][h], oracle.keydiff(before, mean), strict=True)
            ):
                terms = oracle.fitted_terms(key, value, -cosine, own)
                error = 2e-5 * (1 + math.fsum(map(abs, terms))) + min(off, 2.0) * abs(own[-2])
                near(got[b][h][i], math.fsum(terms), error, f"fitted{what}[{i}]")


def kv_scores(draw: Draw) -> Case:
    B, H, S, D = draw.shape(3000)
    D += D % 2
    keys, values = draw.cache(B, H, S, D, expand=draw.chance(0.3))
    lengths = draw.lengths(B, H, S, lengths_per_row())
    for rows in (keys, values):
        draw.spoil_padding(rows, lengths)
        draw.spoil_keys(rows)
    arguments = dict(
        keys=keys, values=values, weights=draw_weights(draw, B, H, D + values.shape[3] + 4), lengths=lengths,
        return_keydiff=draw.chance(0.5), **draw_turn(draw, B, H, S, D),
    )  # fmt: skip

    def check(result, _) -> None:
        own = per_head(lengths, B, H, S)
        K, V = (
            [[row[:n] for row, n in zip(heads, ns, strict=True)] for heads, ns in zip(x.lists(), own, strict=True)]
            for x in (keys, values)
        )
        check_fitted(result, K, V, arguments, S)

    return Case(arguments, check, sizes=dict(S=S))


def key_norm_scores(draw: Draw) -> Case:
    B, H, S, D = draw.shape()
    keys = draw.memory.tensor((B, H, S, D), draw.choice(FLOATS), draw.gauss, expand=True)
    lengths = draw.lengths(B, H, S, lengths_per_row())
    draw.spoil_padding(keys, lengths)
    draw.spoil_keys(keys)

    def check(result, _) -> None:
        got, rows = shaped(result, (B, H, S), torch.float32), keys.lists()
        for b, own in enumerate(per_head(lengths, B, H, S)):
            for h, length in enumerate(own):
                for i, key in enumerate(rows[b][h][:length]):
                    x = got[b][h][i]
                    if oracle.finite(key):
                        near(x, -oracle.norm(key), 1e-6 + 1e-6 * oracle.norm(key), f"scores[{b}][{h}][{i}]")
                    else:  # it ranks last
                        assert math.isnan(x) or x == -INF, f"scores[{b}][{h}][{i}] is {x} for the key {key}"
                same(got[b][h][length:], [-INF] * (S - length), "scores beyond the length")

    return Case(dict(keys=keys, lengths=lengths), check, sizes=dict(S=S))


def quadratic_scores(draw: Draw) -> Case:
    B, H, S, D = draw.shape(1500)
    D = min(D, 24)
    keys = draw.memory.tensor((B, H, S, D), draw.choice(FLOATS), draw.gauss, expand=True)
    lengths = draw.lengths(B, H, S, lengths_per_row())
    draw.spoil_padding(keys, lengths)
    HQ = H * draw.choice((1, 2, 3))
    linear = draw.memory.tensor((B, HQ, D), torch.float32, draw.gauss, rows=False)
    half = [[[[draw.gauss() for _ in range(D)] for _ in range(D)] for _ in range(HQ)] for _ in range(B)]
    symmetric = [
        [[[(m[i][j] + m[j][i]) / 2 for j in range(D)] for i in range(D)] for m in of_request] for of_request in half
    ]
    quadratic = draw.memory.holding(symmetric, (B, HQ, D, D), torch.float32, rows=False)

    def check(result, _) -> None:
        got, rows = shaped(result, (B, HQ, S), torch.float32), keys.lists()
        A, b_ = quadratic.lists(), linear.lists()
        for b, own in enumerate(per_head(lengths, B, H, S)):
            for hq in range(HQ):
                h = hq * H // HQ
                same(got[b][hq][own[h] :], [-INF] * (S - own[h]), "scores beyond the length")
                for i, key in enumerate(rows[b][h][: own[h]]):
                    terms = oracle.quadratic_terms(key, A[b][hq], b_[b][hq])
                    off = 1e-6 + 1e-5 * math.fsum(map(abs, terms))
                    near(got[b][hq][i], math.fsum(terms), off, f"scores[{b}][{hq}][{i}]")

    return Case(dict(keys=keys, linear=linear, quadratic=quadratic, lengths=lengths), check, sizes=dict(S=S))


def projected_norms(draw: Draw) -> Case:
    B, H, S, DV = draw.shape(1500)
    values = draw.memory.tensor((B, H, S, DV), draw.choice(FLOATS), draw.gauss, expand=True)
    lengths = draw.lengths(B, H, S, lengths_per_row())
    draw.spoil_padding(values, lengths)
    G, M = draw.choice((1, 2, 3)), draw.choice((1, 5, 16, 33, 70))
    dtype = values.dtype if values.dtype in FLOATS[:3] else draw.choice((torch.float16, torch.bfloat16))
    weight = draw.memory.tensor((M, H * G * DV), dtype, draw.gauss, rows=False)

    def check(result, _) -> None:
        got, rows, wide = shaped(result, (B, H, S), torch.float32), values.lists(), weight.lists()
        for h in range(H):
            heads = range(h * G, h * G + G)
            matrices = [[row[head * DV : head * DV + DV] for row in wide] for head in heads]
            for b, own in enumerate(per_head(lengths, B, H, S)):
                same(got[b][h][own[h] :], [-INF] * (S - own[h]), "norms beyond the length")
                for i, value in enumerate(rows[b][h][: own[h]]):
                    expected = oracle.projected_norm(value, matrices)
                    size = oracle.projected_norm(
                        [abs(x) for x in value], [[[abs(x) for x in r] for r in m] for m in matrices]
                    )
                    near(got[b][h][i], expected, 1e-6 + 1e-5 * size, f"norms[{b}][{h}][{i}]")

    return Case(dict(values=values, weight=weight, lengths=lengths), check, sizes=dict(S=S))


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
        return (
            draw.choice((0.0, -0.0, 1.0, INF, -INF, math.nan))
            if draw.chance(0.1)
            else size * draw.random.uniform(-2, 2)
        )

    parts = []
    for _ in range(draw.random.randint(1, 3)):
        scores = draw.memory.tensor((B, H, S), torch.float32, element, draw.chance(0.9), expand=True)
        parts.append((draw.choice((1.0, 0.4, 2, -0.5, 0)), scores))
    lengths = draw.lengths(B, H, S, lengths_per_row())

    def check(result, _) -> None:
        got = shaped(result, (B, H, S), torch.float32)
        weights = [weight for weight, _ in parts]
        tolerance = 2e-6 * sum(map(abs, weights))
        for b, own in enumerate(per_head(lengths, B, H, S)):
            for h in range(H):
                rows = [scores.lists()[b][h][: own[h]] + [-INF] * (S - own[h]) for _, scores in parts]
                near_row(got[b][h], oracle.combine(rows, weights, scale), tolerance, f"combined[{b}][{h}]")

    return Case(dict(parts=parts, scale=scale, lengths=lengths), check, sizes=dict(S=S))

"""What the ops promise, in plain Python: nested lists, floats, integers and decimals. Nothing of kvevict, no torch.

Written from the docstrings of kvevict.ops and kvevict.paged, one function a promise, for one request or one row:
`length` is its own number of tokens. Floats are computed in 64 bits; where a result is float32 the caller allows for
it.
"""

from __future__ import annotations

import math
import struct
from decimal import ROUND_FLOOR, Decimal
from operator import mul

Row = list[float]
INF = math.inf


def float32(x: float) -> float:
    """x rounded to float32."""
    try:
        return struct.unpack("<f", struct.pack("<f", x))[0]
    except OverflowError:
        return math.copysign(INF, x)


# ---- how many tokens, and which


def share(keep: float, tokens: int) -> int:
    """`keep` of so many tokens, to the nearest integer, half up: keep is the decimal it was written as."""
    exact = Decimal(f"{keep:.12g}") * tokens + Decimal("0.5")
    return int(exact.to_integral_value(ROUND_FLOOR))


def kept_count(keep: int | float, length: int) -> int:
    """How many tokens a request of `length` keeps: a share of its own, at least 1; or an int, at most all."""
    if length == 0:
        return 0
    return max(share(keep, length), 1) if isinstance(keep, float) else min(keep, length)


def better(scores: Row, i: int, j: int) -> bool:
    """Token i goes before token j: the higher score, NaN below -inf, -0.0 equal to 0.0, ties to the lower index."""
    a, b = scores[i], scores[j]
    if math.isnan(a) or math.isnan(b):
        return (not math.isnan(a), -i) > (not math.isnan(b), -j)
    return (a, -i) > (b, -j)


def best_first(scores: Row, candidates) -> list[int]:
    def key(i: int):
        spoiled = math.isnan(scores[i])
        return (spoiled, 0.0 if spoiled else -scores[i], i)

    return sorted(candidates, key=key)


def protected(length: int, kept: int, sink: int, recent: int) -> set[int]:
    """The first `sink` tokens, then as many of the last `recent` as there is room for."""
    first = min(sink, kept)
    last = min(recent, kept - first)
    return set(range(first)) | set(range(length - last, length))


def select(scores: Row, length: int, kept: int, sink: int, recent: int) -> list[int]:
    """The tokens to keep, ascending."""
    chosen = protected(length, kept, sink, recent)
    for i in best_first(scores, range(length)):
        if len(chosen) >= kept:
            break
        chosen.add(i)
    return sorted(chosen)


def averaged(rows: list[Row]) -> Row:
    """Scores averaged over KV heads, in float32, added in the heads' order."""
    total = rows[0]
    for row in rows[1:]:
        total = [float32(a + b) for a, b in zip(total, row, strict=True)]
    return [float32(x / len(rows)) for x in total]


def adaptive(scores: list[Row], length: int, kept: int, sink: int, recent: int, floor: float) -> list[list[int]]:
    """H · kept tokens over the heads: each head's protected and best tokens up to the floor, then the best of all."""
    chosen = []
    for row in scores:
        keeps = protected(length, kept, sink, recent)
        least = min(max(len(keeps), share(floor, kept)), length)
        for i in best_first(row, range(length)):
            if len(keeps) >= least:
                break
            keeps.add(i)
        chosen.append(keeps)
    flat = [x for row in scores for x in row[:length]]
    left = len(scores) * kept - sum(map(len, chosen))
    rest = [h * length + i for h in range(len(scores)) for i in range(length) if i not in chosen[h]]
    for place in best_first(flat, rest)[: max(left, 0)]:
        chosen[place // length].add(place % length)
    return [sorted(keeps) for keeps in chosen]


def evicted(scores: Row, length: int, count: int, sink: int, recent: int) -> list[int]:
    """The `count` worst unprotected tokens, ascending: what `select` would leave out."""
    free = [i for i in range(length) if sink <= i < length - recent]
    order = best_first(scores, free)
    return sorted(order[max(len(order) - count, 0) :])


def padded(row: list[int], width: int) -> list[int]:
    return row + [-1] * (width - len(row))


# ---- scores


def dot(a: Row, b: Row) -> float:
    return sum(map(mul, a, b))


def norm(a: Row) -> float:
    return math.sqrt(dot(a, a))


def finite(a: Row) -> bool:
    return all(map(math.isfinite, a))


def mean_key(keys: list[Row], unit: bool) -> Row:
    """The mean of the finite keys, or of their directions (a zero key has none)."""
    total, counted = [0.0] * len(keys[0]), 0
    for key in filter(finite, keys):
        size = norm(key) if unit else 1.0
        counted += 1
        if size:
            total = [t + x / size for t, x in zip(total, key, strict=True)]
    return [t / max(counted, 1) for t in total]


def keydiff(keys: list[Row], anchor: Row) -> Row:
    """-cos(k_i, a); a zero key scores 0, one that is not finite NaN."""
    length = norm(anchor)

    def score(key: Row) -> float:
        if not finite(key):
            return math.nan
        size = norm(key)
        return -dot(key, anchor) / (size * length) if size and length else 0.0

    return [score(key) for key in keys]


def turned_back(key: Row, position: int, angles: Row) -> Row:
    """The key before RoPE turned elements j and j + R/2 by position · angles[j]."""
    before, half = list(key), len(angles)
    for j, angle in enumerate(angles):
        x, y, cosine, sine = key[j], key[j + half], math.cos(position * angle), math.sin(position * angle)
        before[j], before[j + half] = x * cosine + y * sine, y * cosine - x * sine
    return before


def fitted_terms(key: Row, value: Row, cosine: float, weights: Row) -> Row:
    """What adds up to a token's fitted score: each feature times its weight. NaN where key or value is not finite."""
    if not finite(key) or not finite(value):
        return [math.nan]
    log_norms = [math.log(max(norm(row), 1e-12)) for row in (key, value)]
    return list(map(mul, [*key, *value, *log_norms, cosine, 1.0], weights))


def quadratic_terms(key: Row, matrix: list[Row], linear: Row) -> Row:
    """What adds up to key · (matrix · key + linear)."""
    return [x * y for x, row, b in zip(key, matrix, linear, strict=True) for y in (*map(mul, row, key), b)]


def projected_norm(value: Row, matrices: list[list[Row]]) -> float:
    """The L1 norm of matrix · value, mean over the matrices of a group."""
    return math.fsum(abs(dot(row, value)) for matrix in matrices for row in matrix) / len(matrices)


def visible(query: int, queries: int, length: int, causal: bool) -> int:
    """How many keys a request's query sees: it is the token max(length - W, 0) + query. 0: the query is padding."""
    valid = min(queries, length)
    if query >= valid:
        return 0
    return length - valid + query + 1 if causal else length


def logits(query: Row, keys: list[Row], scale: float) -> Row:
    return [scale * dot(query, key) for key in keys]


def log_sum_exp(row: Row) -> float:
    if not row:
        return -INF
    top = max(row)
    return top + math.log(math.fsum(math.exp(x - top) for x in row))


def attention_weights(query: Row, keys: list[Row], scale: float, lse: float | None = None) -> Row:
    row = logits(query, keys, scale)
    total = log_sum_exp(row) if lse is None else lse
    return [math.exp(x - total) for x in row]


def mass(
    weights: list[list[Row]], length: int, queries: int, causal: bool, reduce: str, count: bool, distance: int
) -> Row:
    """Column sums of weights[g][w], a row over the keys that the query sees. Causal: the last of these is its own, and
    it counts for those that are at least `distance` before it."""
    group, valid = len(weights), min(queries, length)
    result = []
    for i in range(length):
        column = [row[i] for rows in weights for row in rows if i + distance < len(row)]
        seen = max(sum(1 for w in range(valid) if i + distance < visible(w, queries, length, causal)), 1)
        if reduce == "max":
            value = max(column, default=0.0)
        else:
            value = math.fsum(x * x if reduce == "square" else x for x in column)
            if reduce == "mean":
                value /= group * (seen if count else valid)
            elif count:
                value /= seen
        result.append(value)
    return result


def peaks(weights: list[list[Row]], n: int, size: int) -> Row:
    """Of rows of attention weights[g][w] over the first n tokens: each pooled over `size` neighbours and scaled back to
    its sum, the largest of each token."""
    most = [0.0] * n
    for row in (row[:n] for rows in weights for row in rows):
        pooled = [math.fsum(row[max(i - size // 2, 0) : i + size // 2 + 1]) / size for i in range(n)]
        again = math.fsum(row) / max(math.fsum(pooled), 1e-30)
        most = [max(x, y * again) for x, y in zip(most, pooled, strict=True)]
    return most


def weighted_rows(weights: Row, rows: list[Row]) -> Row:
    return [dot(weights, column) for column in zip(*rows, strict=True)]


def mlp(hidden: Row, w1: list[Row], b1: Row, w2: Row, b2: float) -> float:
    """sigmoid(w2 · relu(W1 · h + b1) + b2)."""
    x = dot(w2, [max(dot(row, hidden) + b, 0.0) for row, b in zip(w1, b1, strict=True)]) + b2
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def pool(row: Row, size: int, mode: str) -> Row:
    """Average (beyond the edges 0) or maximum of `size` neighbours; -inf is no token: it stays, and is padding."""
    result = []
    for i, x in enumerate(row):
        near = [y for y in row[max(i - size // 2, 0) : i + size // 2 + 1] if y != -INF]
        if x == -INF:
            result.append(x)
        elif any(map(math.isnan, near)):
            result.append(math.nan)
        else:
            result.append(math.fsum(near) / size if mode == "avg" else max(near))
    return result


def on_one_scale(row: Row, scale: str) -> Row:
    """A row's scores in one scale; -inf and NaN count in none, and stay. +inf is the best rank; in the other scales it
    is one more of the row's greatest finite scores, or 0 if there is none."""
    present = [x for x in row if x != -INF and not math.isnan(x)]
    if scale == "rank":
        others = max(len(present) - 1, 1)

        def put(x: float) -> float:
            lower, equal = sum(y < x for y in present), sum(y == x for y in present)
            return (lower + (equal - 1) / 2) / others
    else:
        most = max((x for x in present if x != INF), default=0.0)
        present = [min(x, most) for x in present]
        least, length = min(present, default=0.0), norm(present)

        def put(x: float) -> float:
            x = min(x, most)
            if scale == "minmax":
                return (x - least) / (most - least) if most > least else 0.0
            return x / length if length else 0.0

    return [x if math.isnan(x) or x == -INF else put(x) for x in row]


def combine(rows: list[Row], weights: list[float], scale: str) -> Row:
    scaled = [on_one_scale(row, scale) for row in rows]

    def total(i: int) -> float:
        column = [row[i] for row in scaled]
        if -INF in column:
            return -INF
        return (
            math.nan if any(map(math.isnan, column)) else math.fsum(w * x for w, x in zip(weights, column, strict=True))
        )

    return [total(i) for i in range(len(rows[0]))]


# ---- moving rows


def fewest_moves(kept: list[int], slots: list[int]) -> bool:
    """Whether `slots` puts every kept token in a slot, those that lie in the first len(kept) slots where they are."""
    stay = all(slots[i] == i for i in kept if i < len(kept))
    return stay and sorted(slots) == kept

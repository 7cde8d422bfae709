"""The public ops: validate, pick a backend, then score → select → compact.

Each stage is a torch custom op (`torch.ops.kvevict.*`) that only fills or mutates the tensors it is given, so that
torch.compile traces through, CUDA graphs capture, and nothing is read back to the host.

Layout: keys [batch, kv_heads, seq, head_dim] and values [batch, kv_heads, seq, value_dim], any strides with a
contiguous last dimension. A [B, S, H, D] cache is passed as `x.transpose(1, 2)`; in place works on the view. dtypes:
float32, float16, bfloat16, float8_e4m3fn, float8_e5m2; `compact` also moves int8 and uint8 rows. head_dim up to 576,
fastest at multiples of 16.

lengths: int32 or int64 tensor of valid tokens, [batch], at least 1 each; or [batch, kv_heads], one for each head, where
0 is allowed: no scores but -inf, no indices but -1. What lies beyond is not read. Small arguments (indices, lengths, a
scorer's weights) may have any strides; scores and states need contiguous rows.

Queries [batch, query_heads, W, head_dim] are the last W of the sequence (W = S: the whole prompt), of the keys' dtype
(any of the above beside float8 keys); query head h·G + g belongs to KV head h, its GQA group. Where `lengths` are given
and a request is shorter than W, its queries come first and the rest is padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvevict import custom_ops, validate


class _Cache(NamedTuple):
    """What the ops work on, dense or paged, checked but for tensor values."""

    keys: Tensor  # [B, H, S, D], or [blocks, H, block_size, D]
    values: Tensor  # likewise; `keys` again where an op reads no values
    table: Tensor | None  # [B, columns] or [B, H, columns] int32
    lengths: Tensor | None  # [B] or [B, H]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """B, H, S and D."""
        return (*custom_ops.cache_rows(self.keys, self.table), self.keys.shape[3])


class Pages(NamedTuple):
    """A paged cache in the place of keys or values [B, H, S, D], for the ops that say so: `kvevict.paged.pages`."""

    rows: Tensor  # [num_blocks, H, block_size, D]
    table: Tensor  # [B, columns] int32

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """B, H, S = columns · block_size, and D."""
        return (*custom_ops.cache_rows(self.rows, self.table), self.rows.shape[3])

    @property
    def device(self) -> torch.device:
        return self.rows.device


class Compacted(NamedTuple):
    """A compacted cache. With `inplace=True`, keys and values are views of the caller's storage."""

    keys: Tensor  # [B, H, n, D]
    values: Tensor  # [B, H, n, Dv]
    indices: Tensor  # [B, H, n] int64: original position of the token now in each slot; -1 is padding
    lengths: Tensor | None  # int64: kept tokens [B], or [B, H] where heads keep their own number; None: n of every row


def keydiff_scores(
    keys: Tensor | Pages,
    *,
    anchor: str | Tensor = "unit",
    lengths: Tensor | None = None,
    inv_freq: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """KeyDiff scores: how unlike the mean key each key is. Higher means keep.

    score_i = -cos(k_i, a). Park et al., "KeyDiff" (arXiv 2504.15364), equation 4. A zero key scores 0. A key with an
    element that is not finite scores NaN, which ranks last, and is neither in the mean nor in its count; without any
    finite key all scores are NaN. Keys of any finite norm are scored by the formula, with torch's epsilons (1e-12 for
    unit keys, 1e-8 for the cosine). Scores of the same keys in another memory layout agree to 1e-6.

    Components of unit keys are rounded to multiples of 2⁻²² and added as integers, so that "unit" gives the same bits
    whatever the number of a GPU's multiprocessors. With "raw" the last bits of the sum depend on that.

    Args:
        keys: [B, H, S, D], after RoPE, or Pages.
        anchor: "unit", a = mean of k_i / ‖k_i‖ (the paper); "raw", a = mean of k_i; or a tensor [B, H, D].
        lengths: [B] or [B, H], see the module.
        inv_freq, positions: as in `kv_scores`: score the keys as they were before RoPE; with anchor="unit".

    Returns:
        [B, H, S] float32, -inf beyond a request's length.

    Raises:
        TypeError, ValueError: see the module; values of `lengths` on a GPU are asserted on the device.
    """
    return _keydiff(_cache(keys, lengths), anchor, inv_freq, positions)


def anchor_sums(keys: Tensor, *, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What the anchor of `keydiff_scores` is made of, for sequences that lie in parts: the parts' sums add up.

    Args:
        keys, lengths: as there.

    Returns:
        sums [B, H, D] int64 of the finite unit keys k_i / ‖k_i‖, each component rounded to a multiple of 2⁻²² and in
        these units; and their number [B, H] int64. `keydiff_scores(keys, anchor=anchor_mean(sums, counts))` is
        `keydiff_scores(keys)`, bit for bit.

    Raises:
        TypeError, ValueError: see the module.
    """
    cache = _dense(keys, lengths)
    B, H, _, D = cache.shape
    sums = torch.empty((B, H, D), dtype=torch.int64, device=keys.device)
    counts = torch.empty((B, H), dtype=torch.int64, device=keys.device)
    torch.ops.kvevict.anchor_sums(cache.keys, cache.lengths, sums, counts)
    return sums, counts


def anchor_mean(sums: Tensor, counts: Tensor) -> Tensor:
    """The anchor [B, H, D] float32 from what `anchor_sums` gives, or what that adds up to over parts."""
    return sums.float() * 2.0**-22 / counts[..., None].float()


def kv_scores(
    keys: Tensor | Pages,
    values: Tensor | Pages,
    weights: Tensor,
    *,
    inv_freq: Tensor,
    positions: Tensor | None = None,
    lengths: Tensor | None = None,
    return_keydiff: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """A fitted linear score of each token, from its key before RoPE and its value: K is read twice, V once.

    w · (k, v, ln ‖k‖, ln ‖v‖, cos(k, a), 1), where k is the key turned back by its position and a the mean of the
    head's unit keys k / ‖k‖. The features of KVzap (arXiv 2601.07891) come from hidden states; these are all that an
    attention backend sees. Norms below 1e-12 count as that. A key or value that is not finite, or whose squared norm is
    not in float32, scores NaN, which ranks last, and is not in the mean.

    Args:
        keys, values: [B, H, S, D], [B, H, S, Dv], keys after RoPE; or Pages.
        weights: [H, D + Dv + 4] float32, or [B, H, D + Dv + 4]: of k, v, the two logarithms, the cosine, and the
            constant.
        inv_freq: [R/2] float32, R ≤ D: the angle in radians by which a position turns elements j and j + R/2, as in
            `model.model.rotary_emb.inv_freq` of Llama and its kin; what lies beyond R is not turned.
        positions: [B, S] or [B, H, S] int32 or int64, of each cached token; None: 0 to S - 1.
        lengths: [B] or [B, H], see the module.
        return_keydiff: give the KeyDiff scores of the keys before RoPE as well, -cos(k, a), which cost no more reads.

    Returns:
        [B, H, S] float32, -inf beyond a request's length; or (that, the KeyDiff scores likewise).

    Raises:
        TypeError, ValueError: see the module.
    """
    validate.flag("return_keydiff", return_keydiff)
    fitted, keydiff = _kv_scores(_cache(keys, lengths, values), weights, inv_freq, positions, return_keydiff)
    return (fitted, keydiff) if return_keydiff else fitted


def key_norm_scores(keys: Tensor | Pages, *, lengths: Tensor | None = None) -> Tensor:
    """KeyNorm scores -‖k_i‖: keys of small norm draw attention. Devoto et al. (arXiv 2406.11430), section 3.

    Arguments, result and errors as `keydiff_scores`.
    """
    cache = _cache(keys, lengths)
    out = torch.empty(keys.shape[:3], dtype=torch.float32, device=keys.device)
    torch.ops.kvevict.key_norm_scores(cache.keys, cache.lengths, out, cache.table)
    return out


def quadratic_scores(keys: Tensor, linear: Tensor, quadratic: Tensor, *, lengths: Tensor | None = None) -> Tensor:
    """k · (A k + b) of each key for every query head: with the right A and b the logarithm of what it draws in the mean
    from queries of a known mean and covariance (Expected Attention, arXiv 2510.00636, section 3).

    Args:
        keys: [B, H, S, D].
        linear: b [B, Hq, D] float32; query head h·G + g belongs to KV head h.
        quadratic: A [B, Hq, D, D] float32, symmetric: A counts as its own transpose. In 16 bits it is taken as a sum of
            two matrices of the keys' dtype, so float16 keys want elements up to 65,504.
        lengths: [B] or [B, H], see the module.

    Returns:
        [B, Hq, S] float32, -inf beyond a request's length.

    Raises:
        TypeError, ValueError: see the module.
    """
    cache = _dense(keys, lengths)
    B, H, S, D = cache.shape
    linear = validate.tensor("linear", linear, 3, (torch.float32,), keys).contiguous()
    HQ = linear.shape[1]
    if linear.shape != (B, HQ, D) or HQ % H:
        raise ValueError(f"linear has shape {tuple(linear.shape)}: expected ({B}, a multiple of {H}, {D})")
    quadratic = validate.tensor("quadratic", quadratic, 4, (torch.float32,), keys).contiguous()
    if quadratic.shape != (B, HQ, D, D):
        raise ValueError(f"quadratic has shape {tuple(quadratic.shape)}: expected {(B, HQ, D, D)}, as linear has")
    out = torch.empty((B, HQ, S), dtype=torch.float32, device=keys.device)
    torch.ops.kvevict.quadratic_scores(cache.keys, linear, quadratic, cache.lengths, out)
    return out


def projected_norms(values: Tensor, weight: Tensor, *, lengths: Tensor | None = None) -> Tensor:
    """‖W_O v‖₁ of each value, mean over its GQA group: what it can add to the residual stream at most, which CriticalKV
    (arXiv 2502.03805, section 4) weighs attention by. The products of values and W_O are never written to memory.

    Args:
        values: [B, H, S, Dv].
        weight: W_O [M, Hq · Dv], an nn.Linear's, of the values' dtype (of any float dtype beside float8 values); query
            head h·G + g, which belongs to KV head h, has its columns from (h·G + g) · Dv on.
        lengths: [B] or [B, H], see the module.

    Returns:
        [B, H, S] float32, -inf beyond a request's length.

    Raises:
        TypeError, ValueError: see the module.
    """
    values = validate.cache("values", values, validate.FLOAT_DTYPES)
    B, H, S, DV = values.shape
    lengths = None if lengths is None else validate.lengths(lengths, B, H, values)
    dtypes = (values.dtype,) if values.dtype.itemsize > 1 else validate.FLOAT_DTYPES[:3]
    weight = validate.small(validate.tensor("weight", weight, 2, dtypes, values))
    if weight.shape[1] % (H * DV):
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}: expected (model width, a multiple of {H * DV}), KV heads times "
            "value_dim"
        )
    out = torch.empty((B, H, S), dtype=torch.float32, device=values.device)
    torch.ops.kvevict.projected_norms(values, weight, lengths, out)
    return out


def attention_lse(
    queries: Tensor, keys: Tensor, *, scale: float | None = None, causal: bool = True, lengths: Tensor | None = None
) -> Tensor:
    """Log-sum-exp of every query's attention logits, as flash attention returns it.

    Args:
        queries: [B, Hq, W, D], the last W of the sequence.
        keys: [B, H, S, D], after RoPE.
        scale: of the logits; None is 1/√D.
        causal: a query sees no key behind its own token.
        lengths: [B] or [B, H], see the module.

    Returns:
        [B, Hq, W] float32, ln Σ_i exp(scale · q·k_i) over the keys that a query sees; -inf for padding queries.

    Raises:
        TypeError, ValueError: see the module; more queries than keys; `lengths` as in `keydiff_scores`.
    """
    cache = _dense(keys, lengths)
    queries = validate.queries(queries, cache.shape, cache.keys)
    validate.flag("causal", causal)
    return _lse(cache, queries, validate.softmax_scale(scale, keys.shape[3]), causal)


def attention_mass(
    queries: Tensor | Pages,
    keys: Tensor | Pages,
    *,
    scale: float | None = None,
    lse: Tensor | None = None,
    causal: bool = True,
    reduce: str = "mean",
    normalize: str | None = None,
    min_distance: int = 0,
    lengths: Tensor | None = None,
) -> Tensor:
    """How much attention each key draws from the queries of its GQA group, without an S × S matrix.

    The column sums of softmax(scale · QKᵀ): the score of H2O (arXiv 2306.14048, section 4) for the whole prompt, of
    SnapKV and TOVA for its last queries. A NaN key makes the softmax of every query that sees it NaN, as in attention
    itself, and so the scores of its head: what is kept then means nothing.

    Args:
        queries: [B, Hq, W, D], the last W of the sequence; or Pages of blocks of one query, as an engine has those of
            all requests [tokens, 1, Hq, D], under a table [B, W] of which are whose.
        keys: [B, H, S, D], after RoPE, or Pages.
        scale: of the logits; None is 1/√D.
        lse: [B, Hq, W] float32, rows contiguous: what flash attention returned. None computes it in a first pass.
        causal: a query sees no key behind its own token.
        reduce: over the queries and the G heads of the group: "sum"; "mean", the sum over W·G (its own queries, where a
            request is shorter than W); "max"; "square", the sum of squares (KV-Compress, arXiv 2410.00161).
        normalize: "count" takes account of how many queries see a key (under `causal` the last key has one): "mean"
            averages over those alone, "sum" and "square" are divided by their number.
        min_distance: only queries at least so many tokens later count for a key ("far" attention), also where their
            number is taken account of; 0 counts all that see it. The softmax stays that over all keys. A key that no
            such query sees, such as the last `min_distance` ones, draws 0: protect it with `recent`.
        lengths: [B] or [B, H], see the module.

    Returns:
        [B, H, S] float32; -inf beyond a request's length.

    Raises:
        TypeError, ValueError: as `attention_lse`; also normalize="count" with reduce="max", min_distance without
            causal.
    """
    return _mass(_cache(keys, lengths), queries, scale, lse, causal, reduce, normalize, min_distance)


def attention_peaks(
    queries: Tensor,
    keys: Tensor,
    pool: int,
    *,
    scale: float | None = None,
    lse: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """The most attention that any of the last queries gives a token and its neighbours: what it may come to draw, and
    not what it draws in the mean (DefensiveKV, arXiv 2510.13334). Without a W × S matrix.

    Each query's attention to the tokens before the queries' own is averaged over `pool` neighbours, as `pool_scores`
    does, and scaled back to its sum; of W queries and G heads of the group the largest counts.

    Args:
        queries: [B, Hq, W, D], the last W of the sequence.
        keys: [B, H, S, D], after RoPE.
        pool: odd, at most 1,023.
        scale: of the logits; None is 1/√D.
        lse: [B, Hq, W] float32: what `attention_lse` gives of these queries. None computes it in a first pass.
        lengths: [B] or [B, H], see the module.

    Returns:
        [B, H, S] float32; -inf for the queries' own tokens, the last W, and beyond a request's length.

    Raises:
        TypeError, ValueError: as `attention_lse`; `pool` as kernel_size in `pool_scores`.
    """
    cache = _dense(keys, lengths)
    queries = validate.queries(queries, cache.shape, cache.keys)
    scale = validate.softmax_scale(scale, keys.shape[3])
    _check_pool("pool", pool)
    lse = _lse(cache, queries, scale, True) if lse is None else _check_lse(lse, queries).contiguous()
    out = torch.empty(cache.shape[:3], dtype=torch.float32, device=keys.device)
    torch.ops.kvevict.attention_peaks(queries, cache.keys, lse, scale, pool, cache.lengths, out)
    return out


def decode_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float | None = None,
    lengths: Tensor | None = None,
    mass: Tensor | None = None,
    decay: float = 1.0,
    last_used: Tensor | None = None,
    step: int | None = None,
    threshold: float = 1e-3,
    lse: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the last W queries over the cache, which also notes how much each cached token was used.

    W = 1 is a decode step; more are a chunk after an eviction, or speculated tokens, causal among themselves. Let w be
    a query's attention weights, averaged over the GQA group. Of the first `lengths` tokens of a request:

    Args:
        queries: [B, Hq, W, D]. Query w is that of token max(length - W, 0) + w, and sees no later one.
        keys, values: [B, H, S, D], [B, H, S, Dv], the new tokens' among them.
        scale: of the logits; None is 1/√D.
        lengths: [B] or [B, H], see the module.
        mass: [B, H, S] float32, updated in place to decay · mass + Σ w over the queries (H2O's accumulated score).
        decay: in [0, 1]; 1 never forgets.
        last_used: [B, H, S] int32, set in place to `step` where a query has w ≥ threshold (least recently used).
        step: this step's number, required with `last_used`.
        threshold: share of the attention that counts as use.
        lse: [B, Hq, W] float32, contiguous rows: log-sum-exps to weigh by, where the cache holds a part of what the
            queries see; the outputs of the parts then add up.
        return_lse: give the log-sum-exps as well.

    Returns:
        [B, Hq, W, Dv] in the queries' dtype (bfloat16 for float8 queries), as scaled_dot_product_attention gives it; or
        (that, LSE [B, Hq, W] float32, natural logarithm). 0 and -inf for queries beyond a request's last token, and
        where a head has no token.

    Raises:
        TypeError, ValueError: see the module; `mass` or `last_used` whose elements share memory.
    """
    cache = _dense(keys, lengths, values)
    if mass is not None:
        validate.like_scores("mass", mass, torch.float32, cache.shape, keys)
    if last_used is not None:
        validate.like_scores("last_used", last_used, torch.int32, cache.shape, keys)
        if step is None:
            raise ValueError("step is None: expected this step's number, because last_used is given")
    step = 0 if step is None else step
    validate.integer("step", step, 0, 2**31 - 1)
    decay, threshold = validate.number("decay", decay), validate.number("threshold", threshold)
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"decay is {decay}: expected a number from 0 to 1")
    return _decode(cache, queries, scale, lse, return_lse, mass, decay, last_used, step, threshold)


def mlp_scores(hidden: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """A learned score of each token: sigmoid(w2 · relu(W1 · h + b1) + b2); the hidden layer is never written to memory.

    Args:
        hidden: [B, S, M] hidden states, float32, float16 or bfloat16, last dimension contiguous.
        w1, b1, w2, b2: [N, M], [N], [1, N] or [N], [1] or []: those of two nn.Linear, of hidden's dtype.

    Returns:
        [B, S] float32, in [0, 1].

    Raises:
        TypeError, ValueError: wrong types or shapes.
    """
    hidden = validate.tensor("hidden", hidden, 3, validate.FLOAT_DTYPES[:3])
    validate.contiguous_rows("hidden", hidden)
    w1 = validate.tensor("w1", w1, 2, (hidden.dtype,), hidden)
    N, M = w1.shape
    if hidden.shape[2] != M:
        raise ValueError(f"w1 has shape {tuple(w1.shape)}: expected (hidden units, {hidden.shape[2]}), as hidden has")
    flat = {}
    for name, value, shapes in (("b1", b1, ((N,),)), ("w2", w2, ((1, N), (N,))), ("b2", b2, ((1,), ()))):
        value = validate.tensor(name, value, getattr(value, "ndim", 1), (hidden.dtype,), hidden)
        if value.shape not in shapes:
            raise ValueError(f"{name} has shape {tuple(value.shape)}: expected one of {shapes}")
        flat[name] = value.reshape(-1).contiguous()
    out = torch.empty(hidden.shape[:2], dtype=torch.float32, device=hidden.device)
    torch.ops.kvevict.mlp_scores(hidden, w1.contiguous(), flat["b1"], flat["w2"], flat["b2"], out)
    return out


def pool_scores(
    scores: Tensor, kernel_size: int, mode: str = "avg", *, window: int = 0, lengths: Tensor | None = None
) -> Tensor:
    """Pool scores along the sequence, so that a high score's neighbours are kept with it (SnapKV, arXiv 2404.14469).

    Args:
        scores: [B, H, S] float32, last dimension contiguous.
        kernel_size: odd, at most 1,023; the token itself is in the middle.
        mode: "avg", in which the padding beyond the edges counts as 0 (torch's avg_pool1d); or "max".
        window: so many last tokens of each request, whose own queries gave the scores, are left out: as if theirs were
            -inf.
        lengths: [B] or [B, H], see the module.

    Returns:
        [B, H, S] float32. A score of -inf marks a position without a token (see the scorers): it stays -inf, and is
        padding to its neighbours.

    Raises:
        TypeError, ValueError: wrong type or shape; an even kernel_size; an unknown mode.
    """
    scores = validate.scores(scores)
    validate.one_of("mode", mode, ("avg", "max"))
    _check_pool("kernel_size", kernel_size)
    validate.integer("window", window, 0, 2**31 - 1)
    lengths = None if lengths is None else validate.lengths(lengths, scores.shape[0], scores.shape[1], scores)
    return _pool(scores, kernel_size, mode, window, lengths)


def combine_scores(
    parts: Sequence[tuple[float, Tensor]], *, scale: str = "rank", lengths: Tensor | None = None
) -> Tensor:
    """A weighted sum of scores, after putting each on one scale per row: raw sums of unlike scales mean nothing.

    Args:
        parts: (weight, scores [B, H, S] float32) of each scorer.
        scale: "rank": the share of a row's other tokens that score lower, ties halfway, in [0, 1]; "minmax": linear
            from a row's least score, 0, to its greatest, 1; "l2": over the row's Euclidean norm. Only "rank" tells +inf
            from a row's greatest finite score: for the others it is one more of those, so that it flattens nothing.
        lengths: [B] or [B, H], see the module; without them, a score of -inf says that there is no token.

    Returns:
        [B, H, S] float32; -inf where a part is -inf (no token), NaN where one is NaN; neither counts in a row's scale.

    Raises:
        TypeError, ValueError: no parts, unlike shapes or devices, weights that are no finite numbers, unknown scale.
    """
    validate.one_of("scale", scale, (_RANK, *_SCALES))
    if not isinstance(parts, Sequence) or not parts:
        raise ValueError(f"parts is {parts!r}: expected at least one pair (weight, scores)")
    weights, rows = [], []
    for i, part in enumerate(parts):
        if not isinstance(part, Sequence) or len(part) != 2:
            raise TypeError(f"parts[{i}] is {type(part).__name__}: expected a pair (weight, scores)")
        weight, scores = part
        weights.append(validate.number(f"parts[{i}] weight", weight))
        rows.append(validate.scores(scores, f"parts[{i}] scores"))
        if scores.shape != rows[0].shape or scores.device != rows[0].device:
            raise ValueError(
                f"parts[{i}] scores has shape {tuple(scores.shape)} on {scores.device}: expected "
                f"{tuple(rows[0].shape)} on {rows[0].device}, as parts[0] has"
            )
    B, H, S = rows[0].shape
    lengths = None if lengths is None else validate.lengths(lengths, B, H, rows[0])
    if scale == _RANK:
        out = torch.empty((B, H, S), dtype=torch.float32, device=rows[0].device)
        torch.ops.kvevict.combine_ranks(rows, weights, lengths, out)
        return out
    if lengths is not None:
        least = 1 if lengths.ndim == 1 else 0  # a request has a token, one of its heads may have none
        inside = ((lengths >= least) & (lengths <= S)).all()
        validate.require(inside, "lengths", lengths, f"values from {least} to {S}")
        beyond = torch.arange(S, device=lengths.device) >= lengths.view(B, -1, 1)
        rows = [scores.masked_fill(beyond, float("-inf")) for scores in rows]
    total, absent = torch.zeros_like(rows[0]), torch.zeros_like(rows[0], dtype=torch.bool)
    for weight, scores in zip(weights, rows, strict=True):
        no_token = scores == float("-inf")
        spoiled = scores.isnan()
        scaled = _SCALES[scale](scores, ~(no_token | spoiled)).masked_fill(spoiled, float("nan"))
        total, absent = total + scaled * weight, absent | no_token
    return total.masked_fill(absent, float("-inf"))


def _minmax(scores: Tensor, present: Tensor) -> Tensor:
    scores = _without_infinity(scores, present) / 2  # the halves' difference is finite
    least = scores.masked_fill(~present, float("inf")).amin(-1, keepdim=True)
    most = scores.masked_fill(~present, float("-inf")).amax(-1, keepdim=True)
    return torch.where(most > least, (scores - least) / (most - least), 0.0)


def _l2(scores: Tensor, present: Tensor) -> Tensor:
    scores = _without_infinity(scores, present).masked_fill(~present, 0.0)
    most = scores.abs().amax(-1, keepdim=True)
    scores = torch.where(most > 0, scores / most, 0.0)  # squares of what is at most 1 are finite
    return scores / scores.norm(dim=-1, keepdim=True).clamp(min=1.0)


def _without_infinity(scores: Tensor, present: Tensor) -> Tensor:
    """+inf as the greatest finite score of its row, or 0 if none is."""
    infinite = scores == float("inf")
    most = scores.masked_fill(infinite | ~present, float("-inf")).amax(-1, keepdim=True)
    return torch.where(infinite, most.masked_fill(most == float("-inf"), 0.0), scores)


_RANK, _SCALES = "rank", {"minmax": _minmax, "l2": _l2}


def evict_slots(
    scores: Tensor, count: int = 1, *, sink: int = 0, recent: int = 0, lengths: Tensor | None = None
) -> Tensor:
    """The slots to overwrite: the `count` worst tokens of each head, exactly those that `topk_indices` would leave out.

    For the steady state of decoding: a new token's K and V are written over the worst slot, and nothing else moves.

    Args:
        scores: [B, H, S] float32, last dimension contiguous. NaN is the worst, then -inf.
        count: slots per head. Of equal scores the higher index goes first.
        sink, recent: so many first and last slots are never given.
        lengths: [B] or [B, H], see the module.

    Returns:
        [B, H, count] int64, ascending; -1 at the end where a ragged row has fewer unprotected tokens.

    Raises:
        TypeError, ValueError: see the module; fewer than `count` unprotected slots.
    """
    scores = validate.scores(scores)
    B, H, S = scores.shape
    for name, value, least in (("count", count, 1), ("sink", sink, 0), ("recent", recent, 0)):
        validate.integer(name, value, least)
    if count + sink + recent > S:
        raise ValueError(
            f"count is {count}: expected at most {S - sink - recent}, as {sink} + {recent} of {S} slots are protected"
        )
    lengths = None if lengths is None else validate.lengths(lengths, B, H, scores)
    out = torch.empty((B, H, count), dtype=torch.int64, device=scores.device)
    torch.ops.kvevict.evict_slots(scores, sink, recent, lengths, out)
    return out


def topk_indices(
    scores: Tensor,
    keep: int | float | Tensor,
    *,
    sink: int = 0,
    recent: int = 0,
    heads: str = "each",
    floor: float = 0.2,
    lengths: Tensor | None = None,
) -> Tensor:
    """The tokens to keep: the protected ones, then the best scores, ties to the lower index.

    Args:
        scores: [B, H, S] float32, last dimension contiguous. NaN ranks below -inf; -0.0 equals 0.0.
        keep: an int, tokens; or a float in (0, 1], a share of the row, rounded to the nearest integer (half up), at
            least 1. A ragged row takes the share of its own length, or all of it if it is shorter than an int keep.
            Or with heads="each" an int32 or int64 tensor [B, H], tokens of every head, at least 1 (0 where there is no
            token); a head with fewer keeps all of them.
        sink, recent: so many first and last tokens are kept whatever their score. A ragged row that keeps fewer than
            sink + recent tokens keeps its sinks, then its most recent.
        heads: "each" selects per KV head; "shared" averages the scores over KV heads and keeps the same tokens in all;
            "adaptive" (AdaKV, arXiv 2407.11550) keeps n tokens of a head on average: each head its protected tokens
            and its best up to `floor`, then the best scores of all heads, ties to the lower head. Layers may be
            stacked as more heads.
        floor: of heads="adaptive", in [0, 1]: the share of n (rounded half up) that every head keeps at least.
        lengths: [B] or [B, H], see the module. Adaptive, heads shorter than `keep` leave the rest of it to others, and
            a float keep is the share of each head's own length.

    Returns:
        [B, H, m] int64 in ascending order, -1 beyond what a row keeps. m is n, keep of S tokens; S for a tensor;
        adaptive, the most that one head can keep beside the others' floors (beside none where they may be shorter).

    Raises:
        TypeError, ValueError: see the module; values of `lengths` and `keep` on a GPU are asserted on the device.
    """
    scores = validate.scores(scores)
    B, H, S = scores.shape
    lengths = None if lengths is None else validate.lengths(lengths, B, H, scores)
    n, kept = _check_selection((B, H, S), scores, keep, sink, recent, heads, lengths, floor)
    return _topk(scores, n, kept, sink, recent, heads, lengths, trusted=False, floor=floor)


def compact(
    keys: Tensor, values: Tensor, indices: Tensor, *, inplace: bool = True, preserve_order: bool = True
) -> Compacted:
    """Move the rows of the kept tokens to the front of each head.

    Args:
        keys, values: [B, H, S, D], [B, H, S, Dv].
        indices: [B, H, n] int64, strictly ascending; -1 only as padding at the end of a row.
        inplace: write into the caller's storage and return views of it; otherwise the inputs stay as they are.
        preserve_order: keep the tokens in ascending order. False moves the fewest rows: kept tokens that lie in the
            first n slots stay there, the others fill the holes. `indices[b, h, j]` of the result names the token now
            in slot j.

    Returns:
        Compacted. Padding slots hold zeros (out of place) or what was there before (in place).

    Raises:
        TypeError, ValueError: see the module; in place also for keys or values that share memory. Values of `indices`
        on a GPU are asserted on the device.
    """
    cache = _dense(keys, None, values, validate.ROW_DTYPES)
    _check_flags(inplace, preserve_order)
    return _compact(cache, _indices(indices, cache), inplace, preserve_order, None, trusted=False)


def keydiff_compact(
    keys: Tensor,
    values: Tensor,
    *,
    keep: int | float | Tensor,
    sink: int = 0,
    recent: int = 0,
    heads: str = "each",
    floor: float = 0.2,
    anchor: str | Tensor = "unit",
    lengths: Tensor | None = None,
    inplace: bool = True,
    preserve_order: bool = True,
) -> Compacted:
    """KeyDiff eviction: `keydiff_scores`, `topk_indices` and `compact` in one call.

    Arguments, shapes and errors as there. The paper protects nothing; most users want `sink=4`.
    """
    cache = _dense(keys, lengths, values)
    n, kept = _check_selection(cache.shape[:3], keys, keep, sink, recent, heads, cache.lengths, floor)
    _check_flags(inplace, preserve_order)
    return _select_and_compact(
        cache, _scores(cache, anchor), n, kept, sink, recent, heads, floor, inplace, preserve_order
    )


def attention_compact(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    keep: int | float | Tensor,
    lse: Tensor | None = None,
    reduce: str = "mean",
    normalize: str | None = None,
    pool: int | None = None,
    sink: int = 0,
    recent: int = 0,
    heads: str = "each",
    floor: float = 0.2,
    lengths: Tensor | None = None,
    inplace: bool = True,
    preserve_order: bool = True,
) -> Compacted:
    """Eviction by attention mass: `attention_mass`, `pool_scores`, `topk_indices` and `compact` in one call.

    `pool` is the kernel size of an average over neighbours; other arguments, shapes and errors as there. The logits'
    scale is 1/√D and the mask causal. Queries at the end of the prompt favour their own neighbourhood: protect it with
    `recent`.
    """
    cache = _dense(keys, lengths, values)
    n, kept = _check_selection(cache.shape[:3], keys, keep, sink, recent, heads, cache.lengths, floor)
    _check_flags(inplace, preserve_order)
    if pool is not None:
        _check_pool("pool", pool)
    scores = _mass(cache, queries, None, lse, True, reduce, normalize)
    if pool is not None:
        scores = _pool(scores, pool, "avg")
    return _select_and_compact(cache, scores, n, kept, sink, recent, heads, floor, inplace, preserve_order)


def _cache(keys: Tensor | Pages, lengths: Tensor | None, values: Tensor | Pages | None = None) -> _Cache:
    """A dense or paged cache, checked."""
    if not isinstance(keys, Pages):
        return _dense(keys, lengths, values)  # type: ignore[arg-type]
    if values is None:
        values = keys
    elif not isinstance(values, Pages) or values.table is not keys.table:
        raise TypeError(
            f"values is {type(values).__name__}: expected Pages under the table of keys, as these are Pages"
        )
    validate.cache("values", values.rows, validate.FLOAT_DTYPES, keys.rows)
    B, H, _, _ = keys.shape
    return _Cache(keys.rows, values.rows, keys.table, validate.lengths(lengths, B, H, keys.rows))


def _dense(keys: Tensor, lengths: Tensor | None, values: Tensor | None = None, dtypes=validate.FLOAT_DTYPES) -> _Cache:
    """A dense cache, checked."""
    keys = validate.cache("keys", keys, dtypes)
    values = keys if values is None else validate.cache("values", values, dtypes, like=keys)
    if lengths is not None:
        lengths = validate.lengths(lengths, keys.shape[0], keys.shape[1], keys)
    return _Cache(keys, values, None, lengths)


def _indices(indices: Tensor, cache: _Cache) -> Tensor:
    indices = validate.tensor("indices", indices, 3, (torch.int64,), cache.keys)
    B, H, S, _ = cache.shape
    if indices.shape[:2] != (B, H) or indices.shape[2] > S:
        raise ValueError(f"indices has shape {tuple(indices.shape)}: expected ({B}, {H}, n) with n from 1 to {S}")
    return validate.small(indices)


def _check_flags(inplace: bool, preserve_order: bool) -> None:
    validate.flag("inplace", inplace)
    validate.flag("preserve_order", preserve_order)


def _check_mass(queries: Tensor, lse: Tensor | None, reduce: str, normalize: str | None) -> None:
    validate.one_of("reduce", reduce, ("sum", "mean", "max", "square"))
    if normalize is not None:
        validate.one_of("normalize", normalize, ("count",))
        if reduce == "max":
            raise ValueError(
                "normalize is 'count': expected None, because reduce is 'max', which has nothing to divide"
            )
    if lse is not None:
        _check_lse(lse, queries)


def _check_lse(lse: Tensor, queries: Tensor) -> Tensor:
    validate.tensor("lse", lse, 3, (torch.float32,), queries)
    validate.contiguous_rows("lse", lse)
    if lse.shape != queries.shape[:3]:
        raise ValueError(f"lse has shape {tuple(lse.shape)}: expected {tuple(queries.shape[:3])}, one per query")
    return lse


def _check_pool(name: str, value: int) -> None:
    validate.integer(name, value, 1, 1023)  # a kernel walks over them one by one
    if value % 2 == 0:
        raise ValueError(f"{name} is {value}: expected an odd number, a token with as many neighbours on either side")


def _check_anchor(anchor: str | Tensor, cache: _Cache) -> None:
    if isinstance(anchor, Tensor):
        B, H, _, D = cache.shape
        validate.tensor("anchor", anchor, 3, validate.FLOAT_DTYPES, cache.keys)
        if anchor.shape != (B, H, D):
            raise ValueError(f"anchor has shape {tuple(anchor.shape)}: expected ({B}, {H}, {D}), one per KV head")
    else:
        validate.one_of("anchor", anchor, ("unit", "raw"))


def _check_heads(heads: str, floor: float, lengths: Tensor | None) -> None:
    validate.one_of("heads", heads, ("each", "shared", "adaptive"))
    if not 0.0 <= validate.number("floor", floor) <= 1.0:
        raise ValueError(f"floor is {floor}: expected a number from 0 to 1")
    if heads == "shared" and lengths is not None and lengths.ndim == 2:
        raise ValueError("heads is 'shared': expected lengths [B], because all heads then keep the same tokens")


def _check_selection(
    shape: tuple[int, int, int],
    like: Tensor,
    keep: int | float | Tensor,
    sink: int,
    recent: int,
    heads: str,
    lengths: Tensor | None,
    floor: float = 0.2,
) -> tuple[int, Tensor | None]:
    """n, and what each row keeps where it is not n, of a selection from scores [B, H, S] on the device of `like`."""
    B, H, S = shape
    _check_heads(heads, floor, lengths)
    if isinstance(keep, Tensor):
        validate.integer("sink", sink, 0)
        validate.integer("recent", recent, 0)
        keep = validate.counts("keep", keep, B, H, like)
        if heads != "each" or keep.ndim == 1:
            raise ValueError(
                f"keep has shape {tuple(keep.shape)} and heads is {heads!r}: expected ({B}, {H}) and heads='each'"
            )
        return S, _keep_counts(keep, shape, lengths, like)
    n = validate.kept_tokens(keep, S, sink, recent)
    if lengths is None or (heads == "adaptive" and not isinstance(keep, float)):
        return n, None  # adaptive: a head that is shorter than n leaves the rest to others
    return n, _keep_counts(keep, shape, lengths, like)


# From here on inputs are valid, but for tensor values: `trusted` says that an earlier op has checked those.


def _keep_counts(
    keep: int | float | Tensor, shape: tuple[int, int, int], lengths: Tensor | None, like: Tensor
) -> Tensor:
    """int64 [B], or [B, H] where keep or lengths are: what each row keeps."""
    B, H, S = shape
    per_head = any(isinstance(counts, Tensor) and counts.ndim == 2 for counts in (keep, lengths))
    kept = torch.empty((B, H) if per_head else (B,), dtype=torch.int64, device=like.device)
    given, share, most = None, validate.WHOLE, S
    if isinstance(keep, Tensor):
        given = keep
    elif isinstance(keep, float):
        share = validate.share(keep)
    else:
        most = keep
    torch.ops.kvevict.keep_counts(lengths, S, given, share, most, kept)
    return kept


def _scores(cache: _Cache, anchor: str | Tensor) -> Tensor:
    _check_anchor(anchor, cache)
    given = anchor if isinstance(anchor, Tensor) else None
    out = torch.empty(cache.shape[:3], dtype=torch.float32, device=cache.keys.device)
    unit = given is None and anchor == "unit"
    torch.ops.kvevict.keydiff_scores(cache.keys, given, unit, cache.lengths, out, cache.table)
    return out


def _keydiff(cache: _Cache, anchor: str | Tensor, inv_freq: Tensor | None, positions: Tensor | None) -> Tensor:
    if inv_freq is None:
        if positions is not None:
            raise ValueError("inv_freq is None: expected RoPE's frequencies, because positions are given")
        return _scores(cache, anchor)
    if not isinstance(anchor, str) or anchor != "unit":
        what = "a tensor" if isinstance(anchor, Tensor) else repr(anchor)
        raise ValueError(f"anchor is {what}: expected 'unit' with inv_freq, the mean of the keys before RoPE")
    return _kv_scores(cache, None, inv_freq, positions, keydiff=True)[1]


def _kv_scores(cache: _Cache, weights, inv_freq, positions, keydiff: bool) -> tuple[Any, Any]:
    """(fitted, KeyDiff) scores: the former where there are weights, the latter where `keydiff`; None else."""
    B, H, S, D = cache.shape
    inv_freq = validate.tensor("inv_freq", inv_freq, 1, (torch.float32,), cache.keys).contiguous()
    if D % 2 or 2 * inv_freq.shape[0] > D:
        raise ValueError(
            f"inv_freq has {inv_freq.shape[0]} elements: expected at most half the head_dim, {D}, an even one"
        )
    if positions is not None:
        ndim = 3 if isinstance(positions, Tensor) and positions.ndim == 3 else 2
        positions = validate.small(
            validate.tensor("positions", positions, ndim, (torch.int32, torch.int64), cache.keys)
        )
        if positions.shape != ((B, H, S) if ndim == 3 else (B, S)):
            raise ValueError(f"positions has shape {tuple(positions.shape)}: expected ({B}, {S}) or ({B}, {H}, {S})")
    if weights is not None:
        ndim = 3 if isinstance(weights, Tensor) and weights.ndim == 3 else 2
        weights = validate.tensor("weights", weights, ndim, (torch.float32,), cache.keys).contiguous()
        expected = (B, H, D + cache.values.shape[3] + 4)[-ndim:]
        if weights.shape != expected:
            raise ValueError(f"weights has shape {tuple(weights.shape)}: expected {expected}, KV heads by features")
    scores = [torch.empty((B, H, S), dtype=torch.float32, device=cache.keys.device) for _ in range(2)]
    fitted, difference = (
        x if wanted else None for x, wanted in zip(scores, (weights is not None, keydiff), strict=True)
    )
    values = None if weights is None else cache.values
    torch.ops.kvevict.kv_scores(
        cache.keys, values, weights, inv_freq, positions, cache.lengths, fitted, difference, cache.table
    )
    return scores[0], scores[1]


def _lse(cache: _Cache, queries: Tensor, scale: float, causal: bool) -> Tensor:
    out = torch.empty(queries.shape[:3], dtype=torch.float32, device=queries.device)
    torch.ops.kvevict.attention_lse(queries, cache.keys, scale, causal, cache.lengths, out, cache.table)
    return out


def _mass(
    cache: _Cache, queries, scale, lse, causal: bool, reduce: str, normalize: str | None, min_distance: int = 0
) -> Tensor:
    rows, table = queries, None
    if isinstance(queries, Pages):
        rows, table = queries
        if rows.shape[2] != 1:
            raise ValueError(f"queries has blocks of {rows.shape[2]} tokens: expected 1, as its table is of queries")
    rows = validate.queries(rows, cache.shape, cache.keys, given=None if table is None else queries.shape)
    scale = validate.softmax_scale(scale, rows.shape[3])
    validate.flag("causal", causal)
    _check_mass(queries, lse, reduce, normalize)
    validate.integer("min_distance", min_distance, 0)
    if min_distance and not causal:
        raise ValueError(f"min_distance is {min_distance}: expected 0, because causal is False and queries look ahead")
    out = torch.empty(cache.shape[:3], dtype=torch.float32, device=rows.device)
    torch.ops.kvevict.attention_mass(
        rows, cache.keys, lse, scale, causal, reduce, normalize == "count", cache.lengths, out, cache.table,
        min_distance, table,
    )  # fmt: skip
    return out


def _decode(
    cache: _Cache, queries, scale, lse, return_lse, mass=None, decay=1.0, last_used=None, step=0, threshold=0.0
) -> Tensor | tuple[Tensor, Tensor]:
    queries = validate.queries(queries, cache.shape, cache.keys)
    scale = validate.softmax_scale(scale, queries.shape[3])
    validate.flag("return_lse", return_lse)
    if lse is not None:
        lse = _check_lse(lse, queries).contiguous()
    dtype = torch.bfloat16 if queries.dtype.itemsize == 1 else queries.dtype
    out = torch.empty((*queries.shape[:3], cache.values.shape[3]), dtype=dtype, device=queries.device)
    found = torch.empty(queries.shape[:3], dtype=torch.float32, device=queries.device) if return_lse else None
    torch.ops.kvevict.decode_attention(
        queries, cache.keys, cache.values, scale, cache.lengths, mass, decay, last_used, step, threshold, out,
        cache.table, lse, found,
    )  # fmt: skip
    return out if found is None else (out, found)


def _pool(scores: Tensor, kernel_size: int, mode: str, window: int = 0, lengths: Tensor | None = None) -> Tensor:
    out = torch.empty(scores.shape, dtype=torch.float32, device=scores.device)
    torch.ops.kvevict.pool_scores(scores, kernel_size, mode == "avg", window, lengths, out)
    return out


def _topk(
    scores, n: int, keep_lengths, sink: int, recent: int, heads: str, lengths, trusted: bool, floor: float
) -> Tensor:
    B, H, S = scores.shape
    if heads == "adaptive":
        p, q = validate.share(floor), validate.WHOLE
        least = max(sink + recent, (2 * p * n + q) // (2 * q))
        # The most that one head keeps, beside the others' least; which may be nothing where heads have own lengths.
        m = min(S, H * n if lengths is not None and lengths.ndim == 2 else H * n - (H - 1) * least)
        out = torch.empty((B, H, m), dtype=torch.int64, device=scores.device)
        torch.ops.kvevict.topk_adaptive(scores, n, keep_lengths, p, q, sink, recent, lengths, trusted, out)
        return out
    shared = heads == "shared"
    out = torch.empty((B, 1 if shared else H, n), dtype=torch.int64, device=scores.device)
    torch.ops.kvevict.topk_indices(scores, keep_lengths, sink, recent, shared, lengths, trusted, out)
    return out.expand(B, H, n)


def _topk_move(cache: _Cache, scores, n: int, kept, sink: int, recent: int, heads: str, *where) -> Tensor:
    """Select and move in order, in place, in one op: the selection clears the move's flags. where: from_end, scales."""
    B, H, _, _ = cache.shape
    indices = torch.empty((B, 1 if heads == "shared" else H, n), dtype=torch.int64, device=scores.device)
    torch.ops.kvevict.topk_move(
        scores,
        kept,
        sink,
        recent,
        heads == "shared",
        cache.lengths,
        indices,
        cache.keys,
        cache.values,
        cache.table,
        *where,
    )
    return indices.expand(B, H, n)


def _select_and_compact(
    cache: _Cache, scores, n: int, kept, sink: int, recent: int, heads: str, floor: float, inplace, preserve_order
) -> Compacted:
    if inplace and preserve_order and heads != "adaptive":
        indices = _topk_move(cache, scores, n, kept, sink, recent, heads)
        return Compacted(cache.keys[:, :, :n], cache.values[:, :, :n], indices, kept)
    indices = _topk(scores, n, kept, sink, recent, heads, cache.lengths, trusted=True, floor=floor)
    if heads == "adaptive":
        kept = (indices >= 0).sum(-1)
    return _compact(cache, indices, inplace, preserve_order, kept, trusted=True)


def _compact(
    cache: _Cache, indices: Tensor, inplace: bool, preserve_order: bool, lengths: Tensor | None, trusted: bool
) -> Compacted:
    keys, values = cache.keys, cache.values
    n = indices.shape[2]
    slots = None if preserve_order else torch.empty(indices.shape, dtype=torch.int64, device=indices.device)
    if inplace:
        torch.ops.kvevict.move_rows(keys, values, indices, slots, trusted)
        keys, values = keys[:, :, :n], values[:, :, :n]
    else:
        rows = keys, values
        keys, values = (x.new_empty((*indices.shape, x.shape[3])) for x in rows)
        torch.ops.kvevict.copy_rows(*rows, indices, slots, trusted, keys, values)
    return Compacted(keys, values, indices if slots is None else slots, lengths)

"""The definition of every op in plain torch, written to be read. It shares no code with the kernels.

Shapes: keys [B, H, S, D], values [B, H, S, Dv], queries [B, Hq, W, D], scores [B, H, S] float32, indices and slots
[B, H, n] int64 with -1 as padding, lengths [B] (tokens of each request) and keep_lengths [B] (how many of them it
keeps), or None. Selection takes both as [B, H] as well: each head has its own.
"""

import itertools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "anchor_sums",
    "attention_lse",
    "attention_mass",
    "attention_peaks",
    "check_rows",
    "combine_ranks",
    "copy_rows",
    "count_digits",
    "decode_attention",
    "evict_slots",
    "fill_holes",
    "keep_counts",
    "kept_slots",
    "key_norm_scores",
    "keydiff_scores",
    "kv_scores",
    "left_blocks",
    "mlp_scores",
    "move_flags",
    "move_rows",
    "pool_scores",
    "projected_norms",
    "quadratic_scores",
    "slots_from_end",
    "topk_adaptive",
    "topk_indices",
]


def _inside(S: int, lengths: Tensor | None, device: torch.device) -> Tensor:
    """[1, 1, S], [B, 1, S] or [B, H, S] bool: which positions hold a token."""
    ends = torch.tensor([S], device=device) if lengths is None else lengths
    return torch.arange(S, device=device) < ends.view(len(ends), -1, 1)


def _dense(rows: Tensor, table: Tensor | None) -> Tensor:
    """[B, H, S, D]: what a paged cache [blocks, H, block_size, D] holds under a block table [B, columns], or one
    [blocks, 1, block_size, D] under a table of every head, [B, H, columns]."""
    if table is None:
        return rows
    pages = _as_bytes(rows)[table.long().clamp(min=0, max=rows.shape[0] - 1)]  # no block beyond a request's length
    pages = pages.transpose(1, 2) if table.ndim == 2 else pages.squeeze(3)
    return pages.flatten(2, 3).view(rows.dtype)


def _shrunk(x: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors [..., D], those whose norm may have no float32 square times 2⁻⁷²: the direction is the same. And which of
    them are finite [..., 1]."""
    most = x.abs().amax(-1, keepdim=True)  # NaN, where an element is
    return x * torch.where(most > 2.0**58, 2.0**-72, 1.0), most < float("inf")


def check_rows(lengths: Tensor, S: int, table: Tensor | None, blocks: int, block_size: int, ok: Tensor) -> None:
    """Whether every length is from 1 (of a head: from 0) to S, and every block that holds a token one of `blocks`."""
    least = 1 if lengths.ndim == 1 else 0
    ok.fill_(((lengths >= least) & (lengths <= S)).all())
    if table is not None:
        if table.ndim > lengths.ndim + 1:
            lengths = lengths[:, None]
        used = torch.arange(table.shape[-1], device=table.device) * block_size < lengths[..., None]
        ok.logical_and_((((table >= 0) & (table < blocks)) | ~used).all())


def keep_counts(
    lengths: Tensor | None, S: int, keep: Tensor | None, share: int, most: int, kept: Tensor, ok: Tensor
) -> None:
    """Tokens that each row keeps, of its `lengths` (S): keep, or a share of them in 10⁻¹², rounded half up, from 1 to
    `most`; and whether every row with a token keeps one."""

    def like(counts: Tensor) -> Tensor:
        return counts.long() if counts.ndim == kept.ndim else counts.long()[:, None]

    length = torch.full_like(kept, S) if lengths is None else like(lengths)
    if keep is None:
        whole = 10**12
        wanted = ((2 * share * length + whole) // (2 * whole)).clamp(1, most)
    else:
        wanted = like(keep)
    ok.fill_((wanted >= length.clamp(max=1)).all())
    kept.copy_(torch.minimum(wanted, length))


def left_blocks(
    table: Tensor, lengths: Tensor, kept: Tensor, block_size: int, from_end: bool, held: Tensor, freed: Tensor
) -> None:
    """The blocks that hold no token when a row's first `kept` slots hold what is left of its `lengths`; its last slots:
    the blocks that lie before those altogether, so that the next token has its block."""
    held.copy_(kept if kept.ndim == held.ndim else kept[:, None])
    blocks = torch.arange(table.shape[-1] * block_size, device=table.device).view(-1, block_size)  # their slots
    before, after = (x.view(*x.shape, *(1,) * (table.ndim - x.ndim)) for x in (lengths, kept))
    if from_end:
        free = blocks[:, -1] < before - after
    else:
        free = (blocks[:, 0] >= after) & (blocks[:, 0] < before)
    freed.copy_(torch.where(free, table, -1))


def slots_from_end(indices: Tensor, lengths: Tensor, out: Tensor) -> None:
    """Each row's indices counted back from its last token, in ascending order; -1 stays behind."""
    last = lengths.long().view(len(lengths), -1, 1) - 1
    slots = torch.where(indices < 0, torch.iinfo(torch.int64).max, last - indices).sort(-1).values
    out.copy_(torch.where(slots > last, -1, slots))


def _fixed_sum(unit: Tensor) -> Tensor:
    """int64 [B, H, D]: the sum of unit vectors [B, H, S, D] over tokens, each component rounded to a multiple of 2⁻²².
    Sums of whole numbers, below 2⁵³, do not depend on an order, so not on how many runs a sequence is cut into, or
    where these lie."""
    return (unit * 2.0**22).round().sum(2, dtype=torch.float64).long()


def _mean_of_fixed(total: Tensor, count: Tensor) -> Tensor:
    """float32 [B, H, D], from sums [B, H, D] of `_fixed_sum` and the number of their terms [B, H]."""
    return total.float() * 2.0**-22 / count[..., None].float()


def anchor_sums(keys: Tensor, lengths: Tensor | None, sums: Tensor, counts: Tensor) -> None:
    """Sums [B, H, D] int64 of the finite unit keys, each component a multiple of 2⁻²² and in these units; and how many
    they are [B, H]."""
    directions, finite = _shrunk(keys.float())
    finite &= _inside(keys.shape[2], lengths, keys.device)[..., None]
    sums.copy_(_fixed_sum(F.normalize(torch.where(finite, directions, 0.0), dim=-1, eps=1e-12)))
    counts.copy_(finite.sum(2)[..., 0])


def keydiff_scores(
    keys: Tensor,
    anchor: Tensor | None,
    unit: bool,
    lengths: Tensor | None,
    out: Tensor,
    table: Tensor | None = None,
) -> None:
    """-cos(k_i, a), a = mean_i k_i/‖k_i‖ (unit), mean_i k_i, or the caller's [B, H, D]; -inf beyond a row. Keys with
    an element that is not finite are not in the mean, and their score is NaN."""
    keys = _dense(keys, table).float()
    inside = _inside(keys.shape[2], lengths, keys.device)
    directions, finite = _shrunk(keys)
    finite &= inside[..., None]
    directions = torch.where(finite, directions, 0.0)
    if anchor is None and unit:
        anchor = _mean_of_fixed(_fixed_sum(F.normalize(directions, dim=-1, eps=1e-12)), finite.sum(2)[..., 0])
    elif anchor is None:
        anchor = torch.where(finite, keys, 0.0).sum(2) / finite.sum(2)
    scores = -F.cosine_similarity(directions, _shrunk(anchor.float())[0][:, :, None], dim=-1, eps=1e-8)
    out.copy_(scores.masked_fill(~finite[..., 0], float("nan")).masked_fill(~inside, float("-inf")))


def kv_scores(
    keys: Tensor,
    values: Tensor | None,
    weights: Tensor | None,
    inv_freq: Tensor,
    positions: Tensor | None,
    lengths: Tensor | None,
    fitted: Tensor | None,
    keydiff: Tensor | None,
    table: Tensor | None = None,
) -> None:
    """Of k_i, the keys before RoPE: keydiff = -cos(k_i, a), a = mean_i k_i/‖k_i‖; and fitted = w · (k_i, v_i, ln ‖k_i‖,
    ln ‖v_i‖, cos(k_i, a), 1), w [H, D + Dv + 4] or [B, H, ...]; -inf beyond a row. positions [B, S] or [B, H, S];
    None: 0 to S - 1. What is not finite, or has no finite squared norm, is not in the mean, and its scores are NaN."""
    keys = _turned_back(_dense(keys, table).float(), inv_freq, positions)
    inside = _inside(keys.shape[2], lengths, keys.device)
    finite = keys.square().sum(-1).isfinite() & inside
    keys = keys.masked_fill(~finite[..., None], 0.0)
    mean = _mean_of_fixed(_fixed_sum(F.normalize(keys, dim=-1, eps=1e-12)), finite.sum(2))
    cosine = F.cosine_similarity(keys, mean[:, :, None], dim=-1, eps=1e-8)
    if keydiff is not None:
        keydiff.copy_((-cosine).masked_fill(~finite, float("nan")).masked_fill(~inside, float("-inf")))
    if fitted is not None:
        assert values is not None and weights is not None
        values = _dense(values, table).float()
        finite &= values.square().sum(-1).isfinite()
        values = values.masked_fill(~finite[..., None], 0.0)
        log_norms = (x.norm(dim=-1, keepdim=True).clamp(min=1e-12).log() for x in (keys, values))
        one = torch.ones_like(cosine)[..., None]
        features = torch.cat([keys, values, *log_norms, cosine[..., None], one], -1)
        scores = torch.einsum("bhsf,bhf->bhs", features, weights.expand(len(keys), -1, -1))
        fitted.copy_(scores.masked_fill(~finite, float("nan")).masked_fill(~inside, float("-inf")))


def _turned_back(keys: Tensor, inv_freq: Tensor, positions: Tensor | None) -> Tensor:
    """Keys as they were before RoPE turned elements j and j + R/2 of the one at position p by the angle p · θ_j."""
    if positions is None:
        positions = torch.arange(keys.shape[2], device=keys.device)[None]
    angle = positions.view(positions.shape[0], -1, keys.shape[2], 1).double() * inv_freq.double()
    cosine, sine = angle.cos().float(), angle.sin().float()
    pairs = inv_freq.shape[0]
    x, y, still = keys[..., :pairs], keys[..., pairs : 2 * pairs], keys[..., 2 * pairs :]
    return torch.cat([x * cosine + y * sine, y * cosine - x * sine, still], -1)


def key_norm_scores(keys: Tensor, lengths: Tensor | None, out: Tensor, table: Tensor | None = None) -> None:
    """-‖k_i‖; -inf beyond a row."""
    keys = _dense(keys, table)
    inside = _inside(keys.shape[2], lengths, keys.device)
    out.copy_((-keys.float().norm(dim=-1)).masked_fill(~inside, float("-inf")))


def quadratic_scores(keys: Tensor, linear: Tensor, quadratic: Tensor, lengths: Tensor | None, out: Tensor) -> None:
    """k · (A k + b) for every query head's A [B, Hq, D, D] and b [B, Hq, D]; -inf beyond a row."""
    (B, H, S, _), HQ = keys.shape, linear.shape[1]
    inside = _inside(S, lengths, keys.device).expand(B, H, S).repeat_interleave(HQ // H, 1)
    for hq in range(HQ):
        key = keys[:, hq * H // HQ].float()
        out[:, hq] = (key * (key @ quadratic[:, hq] + linear[:, hq, None])).sum(-1)
    out.masked_fill_(~inside, float("-inf"))


def projected_norms(values: Tensor, weight: Tensor, lengths: Tensor | None, out: Tensor) -> None:
    """‖W v‖₁ for the columns W [M, Dv] of each query head in weight [M, Hq · Dv], mean over the group; -inf beyond a
    row."""
    H, DV = values.shape[1], values.shape[3]
    matrices = weight.float().split(DV, dim=1)
    group = len(matrices) // H
    out.zero_()
    for hq, matrix in enumerate(matrices):
        out[:, hq // group] += (values[:, hq // group].float() @ matrix.T).abs().sum(-1) / group
    out.masked_fill_(~_inside(values.shape[2], lengths, values.device), float("-inf"))


def mlp_scores(hidden: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, out: Tensor) -> None:
    """sigmoid(w2 · relu(W1 · h + b1) + b2); hidden [B, S, M], w1 [N, M], b1 [N], w2 [N], b2 [1], out [B, S]."""
    hidden, w1, b1, w2, b2 = (x.float() for x in (hidden, w1, b1, w2, b2))
    out.copy_(torch.sigmoid(F.relu(hidden @ w1.T + b1) @ w2 + b2))


_LOGITS_AT_ONCE = 2**24  # 64 MiB of float32: the whole W × S never exists


def _visible_logits(
    queries: Tensor, keys: Tensor, scale: float, causal: bool, lengths: Tensor | None
) -> Iterator[tuple[int, int, slice, Tensor]]:
    """Request b, KV head h, a run of its queries, and their logits [G, run, length], -inf where a key is not seen; none
    of a head without tokens.

    Query w of a request is its token max(length - W, 0) + w; queries beyond its last token do not appear.
    """
    B, HQ, W, _ = queries.shape
    H, S = keys.shape[1:3]
    G = HQ // H
    for b, h in itertools.product(range(B), range(H)):
        length = S if lengths is None else int(lengths[b] if lengths.ndim == 1 else lengths[b, h])
        offset, valid = max(length - W, 0), min(length, W)
        run = max(_LOGITS_AT_ONCE // (G * max(length, 1)), 1)
        key = keys[b, h, :length].float()
        for begin in range(0, valid, run):
            end = min(begin + run, valid)
            logits = scale * (queries[b, h * G : h * G + G, begin:end].float() @ key.T)
            if causal:
                positions = offset + torch.arange(begin, end, device=keys.device)
                later = torch.arange(length, device=keys.device) > positions[:, None]
                logits = logits.masked_fill(later, float("-inf"))
            yield b, h, slice(begin, end), logits


def attention_lse(
    queries: Tensor,
    keys: Tensor,
    scale: float,
    causal: bool,
    lengths: Tensor | None,
    out: Tensor,
    table: Tensor | None = None,
    query_table: Tensor | None = None,
) -> None:
    """ln Σ_i exp(scale · q·k_i) over the keys that a query sees; -inf for queries that are padding. query_table:
    queries are paged as keys are under a table."""
    queries, keys = _dense(queries, query_table), _dense(keys, table)
    G = queries.shape[1] // keys.shape[1]
    out.fill_(float("-inf"))
    for b, h, run, logits in _visible_logits(queries, keys, scale, causal, lengths):
        out[b, h * G : h * G + G, run] = logits.logsumexp(-1)


def attention_mass(
    queries: Tensor,
    keys: Tensor,
    lse: Tensor | None,
    scale: float,
    causal: bool,
    reduce: str,
    count: bool,
    lengths: Tensor | None,
    out: Tensor,
    table: Tensor | None = None,
    min_distance: int = 0,
    query_table: Tensor | None = None,
) -> None:
    """The weights exp(logit - lse) that each key draws (lse None: what attention_lse gives), reduced over queries and
    group ("square": the sum of their squares); count: over the queries that see the key, instead of all (mean) or as a
    divisor (sum, square). min_distance, if causal: what is nearer to the key than so many tokens neither counts nor is
    counted. query_table: queries are paged as keys are under a table."""
    queries, keys = _dense(queries, query_table), _dense(keys, table)
    (B, HQ, W, _), (H, S) = queries.shape, keys.shape[1:3]
    G = HQ // H
    out.zero_()
    for b, h, run, logits in _visible_logits(queries, keys, scale, causal, lengths):
        of_run = logits.logsumexp(-1) if lse is None else lse[b, h * G : h * G + G, run]
        weights = (logits - of_run[..., None]).exp()
        end = logits.shape[-1]
        if min_distance:
            token = torch.arange(end, device=keys.device)
            own = max(end - W, 0) + token[run]  # the queries' own tokens
            weights = weights.masked_fill(own[:, None] - token < min_distance, 0.0)
        row = out[b, h, :end]
        if reduce == "max":
            row.copy_(torch.maximum(row, weights.amax((0, 1))))
        else:
            row.add_((weights.square() if reduce == "square" else weights).sum((0, 1)))
    length = torch.full((B, 1, 1), S, device=keys.device) if lengths is None else lengths.view(B, -1, 1)
    valid = length.clamp(1, W)  # a head without tokens has no mass to divide
    later = length - min_distance - torch.arange(S, device=keys.device)
    seen_by = later.clamp(min=1).minimum(valid) if causal else valid
    if reduce == "mean":
        out.div_((seen_by if count else valid) * G)
    elif count:
        out.div_(seen_by)
    out.masked_fill_(~_inside(S, lengths, keys.device), float("-inf"))


def attention_peaks(
    queries: Tensor, keys: Tensor, lse: Tensor, scale: float, pool: int, lengths: Tensor | None, out: Tensor
) -> None:
    """Of the tokens before the queries' own: every row of weights exp(logit - lse), averaged over `pool` neighbours
    (none beyond the edges: 0) and scaled back to its sum; the largest of the queries and the group. -inf elsewhere."""
    W, G = queries.shape[2], queries.shape[1] // keys.shape[1]
    out.fill_(float("-inf"))
    for b, h, run, logits in _visible_logits(queries, keys, scale, True, lengths):
        n = logits.shape[-1] - W
        if n > 0:
            weights = (logits[..., :n] - lse[b, h * G : h * G + G, run, None]).exp()
            pooled = F.avg_pool1d(weights, pool, stride=1, padding=pool // 2)
            rescale = weights.sum(-1, keepdim=True) / pooled.sum(-1, keepdim=True).clamp(min=1e-30)
            out[b, h, :n] = torch.maximum(out[b, h, :n], (pooled * rescale).amax((0, 1)))


def decode_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    lengths: Tensor | None,
    mass: Tensor | None,
    decay: float,
    last_used: Tensor | None,
    step: int,
    threshold: float,
    out: Tensor,
    table: Tensor | None = None,
    given_lse: Tensor | None = None,
    out_lse: Tensor | None = None,
) -> None:
    """softmax(scale · q·K) · V for the last W queries of every head, causal among themselves, and their log-sum-exps.
    Weights are exp(logit - lse), with given_lse where there is one. With w their mean over the group:
    mass ← decay · mass + Σ w over the queries, and last_used ← step where a query's w reaches the threshold."""
    keys, values = _dense(keys, table), _dense(values, table)
    G = queries.shape[1] // keys.shape[1]
    lse = torch.full(queries.shape[:3], float("-inf"), device=queries.device)
    drawn, most = (torch.zeros(keys.shape[:3], device=queries.device) for _ in range(2))
    out.zero_()
    for b, h, run, logits in _visible_logits(queries, keys, scale, True, lengths):
        group, length = slice(h * G, h * G + G), logits.shape[-1]
        lse[b, group, run] = logits.logsumexp(-1) if given_lse is None else given_lse[b, group, run]
        weights = (logits - lse[b, group, run, None]).exp()
        out[b, group, run] = (weights @ values[b, h, :length].float()).to(out.dtype)
        weight = weights.mean(0)
        drawn[b, h, :length] += weight.sum(0)
        most[b, h, :length] = torch.maximum(most[b, h, :length], weight.amax(0))
    inside = _inside(keys.shape[2], lengths, keys.device)
    if out_lse is not None:
        out_lse.copy_(lse)
    if mass is not None:
        mass.copy_(torch.where(inside, mass * decay + drawn, mass))
    if last_used is not None:
        last_used.masked_fill_(inside & (most >= threshold), step)


def pool_scores(
    scores: Tensor, kernel_size: int, average: bool, window: int, lengths: Tensor | None, out: Tensor
) -> None:
    """Average or maximum of kernel_size neighbours. Where scores are -inf there is no token: padding, and it stays. So
    are the last `window` tokens of a row."""
    S = scores.shape[2]
    ends = torch.full((1,), S, device=scores.device) if lengths is None else lengths
    padding = (scores == float("-inf")) | ~_inside(S, ends - window, scores.device)
    filled = scores.masked_fill(padding, 0.0 if average else float("-inf"))
    pool = F.avg_pool1d if average else F.max_pool1d
    pooled = pool(filled, kernel_size, stride=1, padding=kernel_size // 2)
    out.copy_(pooled.masked_fill(padding, float("-inf")))


def combine_ranks(parts: Sequence[Tensor], weights: Sequence[float], lengths: Tensor | None, out: Tensor) -> None:
    """Σ weight · rank, the share of a row's other tokens that score lower, ties halfway. -inf and what lies beyond a
    row are no tokens; they and NaN count in no row. Where a part has either so has the sum, -inf before NaN."""
    out.zero_()
    absent = beyond = ~_inside(out.shape[2], lengths, out.device).expand(out.shape)
    for weight, scores in zip(weights, parts, strict=True):
        no_token = beyond | (scores == float("-inf"))
        counts = ~(no_token | scores.isnan())
        absent = absent | no_token
        rows = scores.masked_fill(~counts, float("-inf")).contiguous()
        in_order, others = rows.sort(dim=-1)[0], (counts.sum(-1, keepdim=True) - 1).clamp(min=1)
        without = (~counts).sum(-1, keepdim=True)
        lower, not_higher = (torch.searchsorted(in_order, rows, right=right) - without for right in (False, True))
        rank = (lower + not_higher - 1).float() / (2 * others)
        out.add_(rank.masked_fill(scores.isnan(), float("nan")) * weight)
    out.masked_fill_(absent, float("-inf"))


def _per_head(counts: Tensor | None, default: int, scores: Tensor) -> Tensor:
    """[B, H, 1] int64: counts [B] or [B, H], or the same for all."""
    B, H, _ = scores.shape
    if counts is None:
        counts = torch.tensor([default], device=scores.device)
    return (counts.long() if counts.ndim == 2 else counts.long()[:, None]).expand(B, H)[..., None]


def topk_indices(
    scores: Tensor,
    keep_lengths: Tensor | None,
    sink: int,
    recent: int,
    shared: bool,
    lengths: Tensor | None,
    out: Tensor,
    clear: Tensor | None = None,
    from_end: bool = False,
) -> None:
    """Per row: the protected tokens, then the best scores, ties to the lower index; written in ascending order, or as
    `slots_from_end` counts them. `clear` is zeroed: a kernel does that along the way."""
    if clear is not None:
        clear.zero_()
    if shared:  # added in head order: float32 sums depend on it
        total = scores[:, :1].clone()
        for h in range(1, scores.shape[1]):
            total += scores[:, h : h + 1]
        scores = total / scores.shape[1]
    S, n = scores.shape[2], out.shape[2]
    positions = torch.arange(S, device=scores.device)
    lengths = _per_head(lengths, S, scores)
    kept = _per_head(keep_lengths, n, scores).minimum(lengths)
    sinks = kept.clamp(max=sink)  # a row that cannot keep sink + recent tokens keeps its sinks first
    recents = torch.minimum(kept - sinks, torch.tensor(recent, device=scores.device))

    # 0: protected, 1: a score, 2: NaN, 3: no token. Inside a class the better score first, then the lower index.
    rank = torch.where(scores.isnan(), 2, 1)
    rank = torch.where((positions < sinks) | (positions >= lengths - recents), 0, rank)
    rank = torch.where(positions >= lengths, 3, rank)
    order = scores.masked_fill(scores.isnan(), 0.0).sort(dim=-1, descending=True, stable=True)[1]
    order = order.gather(-1, rank.gather(-1, order).sort(dim=-1, stable=True)[1])

    chosen = order[..., :n].masked_fill(torch.arange(n, device=scores.device) >= kept, S).sort(-1)[0]
    out.copy_(chosen.masked_fill(chosen == S, -1))
    if from_end:
        slots_from_end(out.clone(), lengths[..., 0], out)


def _best_first(row: Tensor) -> Tensor:
    """Indices of a row [S], the best score first, NaN last, ties in order."""
    order = row.masked_fill(row.isnan(), 0.0).sort(descending=True, stable=True)[1]
    return order[row[order].isnan().int().sort(stable=True)[1]]


def topk_adaptive(
    scores: Tensor,
    n: int,
    keep_lengths: Tensor | None,
    floor: tuple[int, int],
    sink: int,
    recent: int,
    lengths: Tensor | None,
    out: Tensor,
) -> None:
    """Per request: every head's protected tokens and its best up to its floor, the share `floor` (numerator,
    denominator) of what it may keep (n, or keep_lengths); then the best of all heads that are left, ties to the lower
    head, until the request keeps what its heads may keep together."""
    B, H, S = scores.shape
    p, q = floor
    out.fill_(-1)
    held, may_keep = _per_head(lengths, S, scores)[..., 0].tolist(), _per_head(keep_lengths, n, scores)[..., 0].tolist()
    for b in range(B):
        kept = torch.zeros(H, S, dtype=torch.bool, device=scores.device)
        left = min(sum(may_keep[b]), sum(held[b]))
        for h, (length, keep) in enumerate(zip(held[b], may_keep[b], strict=True)):
            count = min(max(sink + recent, (2 * p * keep + q) // (2 * q)), keep, length)
            first = min(sink, count)
            last = length - min(recent, count - first)
            kept[h, :first] = kept[h, last:length] = True
            unprotected = count - int(kept[h].sum())
            kept[h, first + _best_first(scores[b, h, first:last])[:unprotected]] = True
            left -= count
        has_token = torch.arange(S, device=scores.device) < torch.tensor(held[b], device=scores.device)[:, None]
        best = _best_first(scores[b].flatten())
        best = best[(has_token & ~kept).flatten()[best]]
        kept.view(-1)[best[:left]] = True
        for h in range(H):
            tokens = kept[h].nonzero()[:, 0]
            out[b, h, : len(tokens)] = tokens


def evict_slots(scores: Tensor, sink: int, recent: int, lengths: Tensor | None, out: Tensor) -> None:
    """Per row: the tokens that keeping the others leaves out; in ascending order, -1 where too few are unprotected."""
    out.fill_(-1)
    for b, of_heads in enumerate(_per_head(lengths, scores.shape[2], scores)[..., 0].tolist()):
        for h, length in enumerate(of_heads):
            first, last = min(sink, length), max(length - recent, min(sink, length))
            count = min(out.shape[2], last - first)
            order = _best_first(scores[b, h, first:last])
            out[b, h, :count] = first + order[len(order) - count :].sort()[0]


def _in_order(scores: Tensor, positions: Tensor, bits: int) -> Tensor:
    """[B, H, L] int64, at least 0: no two tokens of a row, on whichever ranks, have the same number. The best score has
    the smallest, -0.0 is 0.0, NaN is last; of ties the lower position."""
    as_int = scores.masked_fill(scores == 0.0, 0.0).contiguous().view(torch.int32)
    ascending = as_int ^ ((as_int >> 31) & 0x7FFFFFFF)
    best_first = (-1 - ascending).masked_fill(scores.isnan(), 0x7FFFFFFF).long() + 2**31
    return best_first * 2**bits + positions.clamp(min=0)


def _narrowed(before: Tensor, summed: Tensor) -> Tensor:
    """The state with one more digit of the last number: the first value up to which there are enough candidates."""
    prefix, nth = before[..., 0], before[..., 1]
    upto = summed.long().cumsum(-1)
    nth = torch.minimum(nth, upto[..., -1])  # all of them, where there are fewer
    passed = upto < nth[..., None]
    digit, better = passed.sum(-1), upto.masked_fill(~passed, 0).amax(-1)
    return torch.cat([torch.stack([prefix * summed.shape[2] + digit, nth - better], -1), before[..., 2:]], -1)


def count_digits(
    scores: Tensor,
    positions: Tensor,
    limits: Tensor,
    before: Tensor | None,
    summed: Tensor | None,
    bits: int,
    left: int,
    after: Tensor,
    counts: Tensor,
) -> None:
    """One digit of a search over ranks for the last token that is kept: how many candidates here have each value of the
    digit above the `left` lowest bits of their number, of those that share the digits before it.

    limits [B, 4]: the positions where sinks end, recent tokens begin and the request ends; candidates that are needed.
    before, after [B, H, 5]: the digits that are known; which of the candidates with these it is, from 1 (0: none is
    needed); the slots where candidates begin and end, and where tokens end. summed [B, H, bins]: what was counted of
    the digit before, on all ranks. Of the first digit there are neither.
    """
    (B, H, L), bins = scores.shape, counts.shape[2]
    if before is None or summed is None:
        slots = [((positions >= 0) & (positions < limits[:, None, None, i])).sum(-1) for i in range(3)]
        need = limits[:, 3:].expand(B, H)
        after.copy_(torch.stack([torch.zeros_like(need), need, *(x.expand(B, H) for x in slots)], -1))
    else:
        after.copy_(_narrowed(before, summed))
    prefix, first, last = (after[..., i, None] for i in (0, 2, 3))
    numbers, slot = _in_order(scores, positions, bits) >> left, torch.arange(L, device=scores.device)
    competes = (slot >= first) & (slot < last) & (numbers // bins == prefix)
    counts.zero_().scatter_add_(-1, numbers % bins, competes.int())


def kept_slots(
    scores: Tensor, positions: Tensor, before: Tensor, summed: Tensor, bits: int, out: Tensor, held: Tensor
) -> None:
    """The end of that search: which tokens here are kept, ascending, and how many."""
    L, n = scores.shape[2], out.shape[2]
    number, nth, first, last, end = _narrowed(before, summed)[..., None].unbind(-2)
    slot = torch.arange(L, device=scores.device)
    protected = (slot < first) | ((slot >= last) & (slot < end))
    chosen = (slot >= first) & (slot < last) & (_in_order(scores, positions, bits) <= number) & (nth > 0)
    order = torch.where(protected | chosen, slot, L).sort(-1).values[..., :n]
    out.copy_(order.masked_fill(order == L, -1))
    held.copy_((out >= 0).sum(-1))


def fill_holes(indices: Tensor, out: Tensor) -> None:
    """The token of each slot when as few rows as possible move: kept tokens among the first (kept) slots stay, and
    those beyond fill the holes, both in ascending order."""
    B, H, n = indices.shape
    for b in range(B):
        for h in range(H):
            kept = indices[b, h][indices[b, h] >= 0]
            stay = kept[kept < len(kept)]
            is_hole = torch.ones(len(kept), dtype=torch.bool, device=indices.device)
            is_hole[stay] = False
            out[b, h] = -1
            out[b, h, stay] = stay
            out[b, h, : len(kept)][is_hole] = kept[len(stay) :]


def _as_bytes(rows: Tensor) -> Tensor:
    """torch has no gather for float8; its rows move as bytes."""
    return rows.view(torch.uint8) if rows.element_size() == 1 else rows


def _row_index(rows: Tensor, table: Tensor | None, b: Tensor, h: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
    """The index into rows [B, H, S, D] of some tokens, each of request b and head h; or, under a table [B, columns] or
    [B, H, columns], into rows [blocks, H or 1, block_size, D]."""
    if table is None:
        return b, h, tokens
    block_size = rows.shape[2]
    if table.ndim == 3:
        return table[b, h, tokens // block_size].long(), torch.zeros_like(h), tokens % block_size
    return table[b, tokens // block_size].long(), h, tokens % block_size


def move_flags(slots: Tensor, keys: Tensor, values: Tensor) -> int:
    """How many flags `move_rows` takes: nothing waits here."""
    return 0


def move_rows(
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    ordered: bool,
    table: Tensor | None = None,
    ends: Tensor | None = None,
    flags: Tensor | None = None,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> None:
    """In place: slot j of every head gets row slots[j]; -1 leaves the slot as it is. `ordered` and `flags` change
    nothing here.

    table: keys and values are paged. ends [B] or [B, H]: slots and rows are counted back from a request's end.
    key_scales, value_scales: rows of one element that move with the others.
    """
    B, H, n = slots.shape
    source, target = slots, torch.arange(n, device=slots.device).expand(B, H, n)
    moves = (slots >= 0) & (source != target)
    if ends is not None:
        last = ends.long().view(B, -1, 1) - 1
        source, target = last - source, last - target
    b, h, _ = moves.nonzero(as_tuple=True)
    for rows in (keys, values, key_scales, value_scales):
        if rows is not None:
            old, new = (_row_index(rows, table, b, h, tokens[moves]) for tokens in (source, target))
            _as_bytes(rows)[new] = _as_bytes(rows)[old]  # all are read before one is written


def copy_rows(
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    out_keys: Tensor,
    out_values: Tensor,
    table: Tensor | None = None,
    out_table: Tensor | None = None,
) -> None:
    """Slot j of every head of the outputs gets row slots[j]; -1 gets zeros, or where the outputs are paged, nothing."""
    b, h, j = (slots >= 0).nonzero(as_tuple=True)
    for rows, out in ((keys, out_keys), (values, out_values)):
        rows, out = _as_bytes(rows), _as_bytes(out)
        if out_table is None:
            out.zero_()
        out[_row_index(out, out_table, b, h, j)] = rows[_row_index(rows, table, b, h, slots[b, h, j])]

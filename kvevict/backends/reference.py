"""The definition of every op in plain torch, written to be read. It shares no code with the kernels.

Shapes: keys [B, H, S, D], values [B, H, S, Dv], queries [B, Hq, W, D], scores [B, H, S] float32, indices and slots
[B, H, n] int64 with -1 as padding, lengths [B] (tokens of each request) and keep_lengths [B] (how many of them it
keeps), or None. Selection takes both as [B, H] as well: each head has its own.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "attention_lse",
    "attention_mass",
    "copy_rows",
    "decode_attention",
    "evict_slots",
    "fill_holes",
    "key_norm_scores",
    "keydiff_scores",
    "mlp_scores",
    "move_rows",
    "pool_scores",
    "topk_adaptive",
    "topk_indices",
]


def _inside(S: int, lengths: Tensor | None, device: torch.device) -> Tensor:
    """[B, 1, S] (or [1, 1, S]) bool: which positions hold a token."""
    positions = torch.arange(S, device=device)
    ends = torch.tensor([S], device=device) if lengths is None else lengths
    return positions < ends[:, None, None]


def _dense(rows: Tensor, table: Tensor | None) -> Tensor:
    """[B, H, S, D]: what a paged cache [blocks, H, block_size, D] holds under a block table [B, columns]."""
    if table is None:
        return rows
    pages = _as_bytes(rows)[table.long().clamp(min=0, max=rows.shape[0] - 1)]  # no block beyond a request's length
    return pages.transpose(1, 2).flatten(2, 3).view(rows.dtype)


def keydiff_scores(
    keys: Tensor,
    anchor: Tensor | None,
    unit: bool,
    lengths: Tensor | None,
    out: Tensor,
    table: Tensor | None = None,
) -> None:
    """-cos(k_i, a) with a = mean_i k_i/‖k_i‖ (unit), mean_i k_i, or the caller's [B, H, D]; -inf beyond a row."""
    keys = _dense(keys, table)
    inside = _inside(keys.shape[2], lengths, keys.device)
    keys = keys.float().masked_fill(~inside[..., None], 0.0)
    if anchor is None:
        total = (F.normalize(keys, dim=-1, eps=1e-12) if unit else keys).sum(2)
        anchor = total / inside.sum(2, keepdim=True)
    scores = -F.cosine_similarity(keys, anchor.float()[:, :, None], dim=-1, eps=1e-8)
    out.copy_(scores.masked_fill(~inside, float("-inf")))


def key_norm_scores(keys: Tensor, lengths: Tensor | None, out: Tensor, table: Tensor | None = None) -> None:
    """-‖k_i‖; -inf beyond a row."""
    keys = _dense(keys, table)
    inside = _inside(keys.shape[2], lengths, keys.device)
    out.copy_((-keys.float().norm(dim=-1)).masked_fill(~inside, float("-inf")))


def mlp_scores(hidden: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, out: Tensor) -> None:
    """sigmoid(w2 · relu(W1 · h + b1) + b2); hidden [B, S, M], w1 [N, M], b1 [N], w2 [N], b2 [1], out [B, S]."""
    hidden, w1, b1, w2, b2 = (x.float() for x in (hidden, w1, b1, w2, b2))
    out.copy_(torch.sigmoid(F.relu(hidden @ w1.T + b1) @ w2 + b2))


_LOGITS_AT_ONCE = 2**24  # 64 MiB of float32: the whole W × S never exists


def _visible_logits(
    queries: Tensor, keys: Tensor, scale: float, causal: bool, lengths: Tensor | None
) -> Iterator[tuple[int, int, slice, Tensor]]:
    """Request b, KV head h, a run of its queries, and their logits [G, run, length], -inf where a key is not seen.

    Query w of a request is its token max(length - W, 0) + w; queries beyond its last token do not appear.
    """
    B, HQ, W, _ = queries.shape
    H, S = keys.shape[1:3]
    G = HQ // H
    for b in range(B):
        length = S if lengths is None else int(lengths[b])
        offset, valid = max(length - W, 0), min(length, W)
        run = max(_LOGITS_AT_ONCE // (G * length), 1)
        for h in range(H):
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
) -> None:
    """ln Σ_i exp(scale · q·k_i) over the keys that a query sees; -inf for queries that are padding."""
    keys = _dense(keys, table)
    G = queries.shape[1] // keys.shape[1]
    out.fill_(float("-inf"))
    for b, h, run, logits in _visible_logits(queries, keys, scale, causal, lengths):
        out[b, h * G : h * G + G, run] = logits.logsumexp(-1)


def attention_mass(
    queries: Tensor,
    keys: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    reduce: str,
    count: bool,
    lengths: Tensor | None,
    out: Tensor,
    table: Tensor | None = None,
) -> None:
    """The weights exp(logit - lse) that each key draws, reduced over queries and group ("square": the sum of their
    squares); count: over the queries that see the key, instead of all (mean) or as a divisor (sum, square)."""
    keys = _dense(keys, table)
    (B, HQ, W, _), (H, S) = queries.shape, keys.shape[1:3]
    G = HQ // H
    out.zero_()
    for b, h, run, logits in _visible_logits(queries, keys, scale, causal, lengths):
        weights = (logits - lse[b, h * G : h * G + G, run, None]).exp()
        row = out[b, h, : logits.shape[-1]]
        if reduce == "max":
            row.copy_(torch.maximum(row, weights.amax((0, 1))))
        else:
            row.add_((weights.square() if reduce == "square" else weights).sum((0, 1)))
    length = torch.full((B, 1, 1), S, device=keys.device) if lengths is None else lengths[:, None, None]
    valid = length.clamp(max=W)
    seen_by = (length - torch.arange(S, device=keys.device)).clamp(min=1).minimum(valid) if causal else valid
    if reduce == "mean":
        out.div_((seen_by if count else valid) * G)
    elif count:
        out.div_(seen_by)
    out.masked_fill_(~_inside(S, lengths, keys.device), float("-inf"))


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
) -> None:
    """softmax(scale · q·K) · V for one query per head. With w the weights' mean over the group:
    mass ← decay · mass + w, and last_used ← step where w reaches the threshold."""
    keys, values = _dense(keys, table), _dense(values, table)
    G = queries.shape[1] // keys.shape[1]
    for b, h, _, logits in _visible_logits(queries, keys, scale, False, lengths):
        weights = logits[:, 0].softmax(-1)
        length = weights.shape[-1]
        out[b, h * G : h * G + G, 0] = (weights @ values[b, h, :length].float()).to(out.dtype)
        weight = weights.mean(0)
        if mass is not None:
            mass[b, h, :length].mul_(decay).add_(weight)
        if last_used is not None:
            last_used[b, h, :length].masked_fill_(weight >= threshold, step)


def pool_scores(scores: Tensor, kernel_size: int, average: bool, out: Tensor) -> None:
    """Average or maximum of kernel_size neighbours. Where scores are -inf there is no token: padding, and it stays."""
    padding = scores == float("-inf")
    if average:
        filled = scores.masked_fill(padding, 0.0)
        pooled = F.avg_pool1d(filled, kernel_size, stride=1, padding=kernel_size // 2)
    else:
        pooled = F.max_pool1d(scores, kernel_size, stride=1, padding=kernel_size // 2)
    out.copy_(pooled.masked_fill(padding, float("-inf")))


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
) -> None:
    """Per row: the protected tokens, then the best scores, ties to the lower index; written in ascending order.
    `clear` is zeroed: a kernel does that along the way."""
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
    clear: Tensor | None = None,
) -> None:
    """Per request: every head's protected tokens and its best up to its floor, the share `floor` (numerator,
    denominator) of what it may keep (n, or keep_lengths); then the best of all heads that are left, ties to the lower
    head, until the request keeps what its heads may keep together."""
    if clear is not None:
        clear.zero_()
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


def _gather_rows(rows: Tensor, slots: Tensor) -> Tensor:
    """[B, H, n, D]: row slots[j] of every head (row 0 for padding)."""
    return rows.gather(2, slots.clamp(min=0)[..., None].expand(-1, -1, -1, rows.shape[3]))


def _as_bytes(rows: Tensor) -> Tensor:
    """torch has no gather for float8; its rows move as bytes."""
    return rows.view(torch.uint8) if rows.element_size() == 1 else rows


def move_rows(
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    ordered: bool,
    table: Tensor | None = None,
    ends: Tensor | None = None,
) -> None:
    """In place: slot j of every head gets row slots[j]; -1 leaves the slot as it is. `ordered` changes nothing here.

    table: keys and values are paged. ends [B]: slots and rows are counted back from a request's end.
    """
    B, H, n = slots.shape
    block_size = keys.shape[2]
    if table is None:
        table = torch.arange(B, device=slots.device)[:, None]  # one block per request
    source, target = slots.clamp(min=0), torch.arange(n, device=slots.device).expand(B, H, n)
    if ends is not None:
        source, target = (ends.long()[:, None, None] - 1 - x for x in (source, target))
    moves = (slots >= 0) & (source != target)
    request, head, _ = moves.nonzero(as_tuple=True)
    old, new = ((table[request, x[moves] // block_size].long(), head, x[moves] % block_size) for x in (source, target))
    for rows in (_as_bytes(keys), _as_bytes(values)):
        rows[new] = rows[old]  # all are read before one is written


def copy_rows(keys: Tensor, values: Tensor, slots: Tensor, out_keys: Tensor, out_values: Tensor) -> None:
    """Slot j of every head of the outputs gets row slots[j]; -1 gets zeros."""
    for rows, out in ((keys, out_keys), (values, out_values)):
        rows, out = _as_bytes(rows), _as_bytes(out)
        out.copy_(_gather_rows(rows, slots).masked_fill(slots[..., None] < 0, 0))

"""The ops of kvevict.ops on a paged cache: the same kernels, which find a token's row through a block table.

Layout: key_cache [num_blocks, block_size, kv_heads, head_dim] and value_cache [..., value_dim], any strides with a
contiguous last dimension: a view of an engine's cache, whatever its order, and never a copy. block_tables [B,
max_blocks] int32: token t of request b lies in block block_tables[b, t // block_size], row t % block_size, of every KV
head. lengths [B] int32 or int64: tokens of each request, at least 1. What the table says beyond them is not read.

S = max_blocks · block_size is the longest that a request can be: pass a narrower table where requests are shorter.

Every KV head keeps its own tokens, the same number in all heads of a request, so whole blocks are left over.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvevict import ops, validate
from kvevict.custom_ops import cache_rows


class PagedCompacted(NamedTuple):
    """What a paged compaction leaves."""

    lengths: Tensor  # [B], dtype of the given lengths: tokens that each request holds now
    freed_blocks: Tensor  # [B, max_blocks] like block_tables: the blocks that hold no token any more, -1 elsewhere


def _heads_first(name: str, cache: Tensor, dtypes, like: Tensor | None = None) -> Tensor:
    """[num_blocks, kv_heads, block_size, head_dim]: the order in which the kernels take a cache."""
    validate.tensor(name, cache, 4, dtypes)
    return validate.cache(name, cache.transpose(1, 2), dtypes, like)


def _table(block_tables: Tensor, lengths: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
    block_tables = validate.tensor("block_tables", block_tables, 2, (torch.int32,), cache)
    validate.contiguous_rows("block_tables", block_tables)
    return block_tables, validate.lengths(lengths, block_tables)


def _checked(
    key_cache: Tensor, value_cache: Tensor, block_tables: Tensor, lengths: Tensor, dtypes
) -> tuple[Tensor, ...]:
    """keys and values [num_blocks, kv_heads, block_size, ...], block tables and lengths."""
    keys = _heads_first("key_cache", key_cache, dtypes)
    values = _heads_first("value_cache", value_cache, dtypes, keys)
    return keys, values, *_table(block_tables, lengths, keys)


def _kept(keep: int | float | Tensor, lengths: Tensor, S: int, sink: int, recent: int) -> tuple[int, Tensor]:
    """n, the most that any request can keep, and [B] int64, what each one keeps."""
    if isinstance(keep, Tensor):
        keep = validate.tensor("keep", keep, 1, (torch.int32, torch.int64), lengths)
        if keep.shape != lengths.shape:
            raise ValueError(f"keep has shape {tuple(keep.shape)}: expected {tuple(lengths.shape)}, one per request")
        return validate.kept_tokens(S, S, sink, recent), torch.minimum(keep.long(), lengths.long()).clamp(min=1)
    if isinstance(keep, int) and not isinstance(keep, bool):
        keep = min(keep, S)  # every request may be shorter than what it could keep
    return validate.kept_tokens(keep, S, sink, recent), validate.kept_lengths(keep, lengths)


def paged_scores(key_cache: Tensor, block_tables: Tensor, lengths: Tensor, *, anchor: str | Tensor = "unit") -> Tensor:
    """`kvevict.ops.keydiff_scores` on a paged cache.

    Args:
        key_cache, block_tables, lengths: see the module.
        anchor: as there.

    Returns:
        [B, H, S] float32, -inf beyond a request's length.

    Raises:
        TypeError, ValueError: see kvevict.ops; values of the tensors on a GPU are asserted on the device.
    """
    keys = _heads_first("key_cache", key_cache, validate.FLOAT_DTYPES)
    table, lengths = _table(block_tables, lengths, keys)
    ops._check_anchor(anchor, _like(keys, table))
    return ops._scores(keys, anchor, lengths, table)


def paged_attention_mass(
    queries: Tensor,
    key_cache: Tensor,
    block_tables: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    lse: Tensor | None = None,
    causal: bool = True,
    reduce: str = "mean",
    normalize: str | None = None,
) -> Tensor:
    """`kvevict.ops.attention_mass` on a paged cache.

    Args:
        queries: [B, Hq, W, D], the last W of each request; of one shorter than W the first ones, and padding.
        key_cache, block_tables, lengths: see the module.
        scale, lse, causal, reduce, normalize: as there.

    Returns:
        [B, H, S] float32, -inf beyond a request's length.

    Raises:
        TypeError, ValueError: as there.
    """
    keys = _heads_first("key_cache", key_cache, validate.FLOAT_DTYPES)
    table, lengths = _table(block_tables, lengths, keys)
    queries = validate.queries(queries, _like(keys, table))
    ops._check_mass(queries, lse, reduce, normalize)
    scale = validate.softmax_scale(scale, keys.shape[3])
    return ops._mass(queries, keys, scale, lse, causal, reduce, normalize, lengths, table)


def _like(cache: Tensor, table: Tensor) -> Tensor:
    """A tensor without memory, of the shape [B, H, S, D] that the cache would have if it were dense."""
    B, _, S = cache_rows(cache, table)
    return cache[:1, :, :1].expand(B, -1, S, -1)


def paged_decode_attention(
    queries: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
) -> Tensor:
    """`kvevict.ops.decode_attention` on a paged cache: one query per request and head, which sees all of its tokens.

    Args:
        queries: [B, Hq, 1, D].
        key_cache, value_cache, block_tables, lengths: see the module.
        scale: of the logits; None is 1/√D.

    Returns:
        [B, Hq, 1, Dv], dtype of queries (bfloat16 for float8).

    Raises:
        TypeError, ValueError: as there.
    """
    keys, values, table, lengths = _checked(key_cache, value_cache, block_tables, lengths, validate.FLOAT_DTYPES)
    queries = validate.queries(queries, _like(keys, table), W=1)
    scale = validate.softmax_scale(scale, keys.shape[3])
    return ops._decode(queries, keys, values, scale, lengths, None, 1.0, None, 0, 0.0, table)


def paged_compact(
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    lengths: Tensor,
    indices: Tensor,
    *,
    to: str = "front",
    preserve_order: bool = True,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> PagedCompacted:
    """Move the rows of the kept tokens together, in place, to either end of each request.

    Args:
        key_cache, value_cache, block_tables, lengths: see the module. No block may belong to two requests, or twice to
            one: copy shared blocks (prefix caching) first.
        indices: [B, H, n] int64, strictly ascending, -1 only as padding at a row's end; as many in every head.
        to: "front": the kept tokens fill a request's first slots, and its last blocks are free. "tail": they fill the
            last slots before `lengths`, and the first blocks are free, as under a sliding window.
        preserve_order: keep ascending order; False moves the fewest rows.
        key_scales, value_scales: [num_blocks, block_size, kv_heads], scales of float8 rows, which move with them.

    Returns:
        PagedCompacted.

    Raises:
        TypeError, ValueError: see kvevict.ops; values of the tensors on a GPU are asserted on the device.
    """
    keys, values, table, lengths = _checked(key_cache, value_cache, block_tables, lengths, validate.ROW_DTYPES)
    validate.one_of("to", to, ("front", "tail"))
    scales = _check_scales(key_scales, value_scales, keys)
    indices = validate.tensor("indices", indices, 3, (torch.int64,), keys)
    B, H, S = cache_rows(keys, table)
    if indices.shape[:2] != (B, H) or indices.shape[2] > S:
        raise ValueError(f"indices has shape {tuple(indices.shape)}: expected ({B}, {H}, n) with n from 1 to {S}")
    kept = (indices[:, 0] >= 0).sum(-1)
    return _compact(keys, values, table, lengths, indices, kept, to, preserve_order, scales, trusted=False)


def _check_scales(key_scales: Tensor | None, value_scales: Tensor | None, keys: Tensor) -> tuple[Tensor, Tensor] | None:
    """Scales as rows of one element [num_blocks, kv_heads, block_size, 1]."""
    if (key_scales is None) != (value_scales is None):
        raise ValueError("one of key_scales and value_scales is None: expected both, or neither")
    if key_scales is None or value_scales is None:
        return None
    found = []
    for name, scales in (("key_scales", key_scales), ("value_scales", value_scales)):
        validate.tensor(name, scales, 3, (torch.float32, torch.float16, torch.bfloat16), keys)
        rows = scales.transpose(1, 2)[..., None]
        if rows.shape[:3] != keys.shape[:3]:
            blocks, H, block_size = keys.shape[:3]
            raise ValueError(f"{name} has shape {tuple(scales.shape)}: expected {(blocks, block_size, H)}")
        found.append(rows)
    return found[0], found[1]


def _compact(keys, values, table, lengths, indices, kept, to, preserve_order, scales, trusted) -> PagedCompacted:
    """From here on inputs are valid, but for tensor values."""
    S, n = cache_rows(keys, table)[2], indices.shape[2]
    from_end = to == "tail"
    slots = indices
    if from_end:  # counted from the request's end, the last tokens come first: the same move, mirrored
        rank = kept[:, None, None] - 1 - torch.arange(n, device=indices.device)
        mirrored = lengths[:, None, None] - 1 - indices.gather(2, rank.clamp(min=0).expand_as(indices))
        slots = torch.where(rank >= 0, mirrored, -1)
    if not preserve_order:
        holes = torch.empty(slots.shape, dtype=torch.int64, device=slots.device)
        torch.ops.kvevict.fill_holes(slots, S, trusted, holes)
        slots, trusted = holes, True
    torch.ops.kvevict.move_rows(keys, values, slots, preserve_order, trusted, table, lengths, from_end)
    if scales is not None:
        torch.ops.kvevict.move_rows(*scales, slots, preserve_order, True, table, lengths, from_end)

    block_size = keys.shape[2]
    columns = torch.arange(table.shape[1], device=table.device)
    used = (lengths + block_size - 1) // block_size
    if from_end:
        free = columns < ((lengths - kept) // block_size)[:, None]
    else:
        free = (columns >= ((kept + block_size - 1) // block_size)[:, None]) & (columns < used[:, None])
    return PagedCompacted(kept.to(lengths.dtype), torch.where(free, table, -1))


def paged_keydiff_compact(
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    lengths: Tensor,
    *,
    keep: int | float | Tensor,
    sink: int = 0,
    recent: int = 0,
    heads: str = "each",
    anchor: str | Tensor = "unit",
    to: str = "front",
    preserve_order: bool = True,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> PagedCompacted:
    """KeyDiff eviction in a paged cache, in place: `paged_scores`, `kvevict.ops.topk_indices` and `paged_compact`.

    Args:
        keep: an int (tokens), a float (share of each request's length), or an int tensor [B], each request's own. A
            request that is shorter than what it may keep stays whole.
        sink, recent, heads: as in `topk_indices`.
        key_scales, value_scales: as in `paged_compact`. Per-token scales do not change a cosine; anchor="raw" would
            need them, and is refused.
        others: as in the functions it calls.

    Returns:
        PagedCompacted.

    Raises:
        TypeError, ValueError: as there.
    """
    keys, values, table, lengths = _checked(key_cache, value_cache, block_tables, lengths, validate.FLOAT_DTYPES)
    validate.one_of("to", to, ("front", "tail"))
    validate.one_of("heads", heads, ("each", "shared"))
    ops._check_anchor(anchor, _like(keys, table))
    scales = _check_scales(key_scales, value_scales, keys)
    if scales is not None and isinstance(anchor, str) and anchor == "raw":
        raise ValueError("anchor is 'raw': expected 'unit' where there are key_scales")
    n, kept = _kept(keep, lengths, cache_rows(keys, table)[2], sink, recent)
    scores = ops._scores(keys, anchor, lengths, table)
    indices = ops._topk(scores, n, kept, sink, recent, heads, lengths, trusted=True)
    return _compact(keys, values, table, lengths, indices, kept, to, preserve_order, scales, trusted=True)

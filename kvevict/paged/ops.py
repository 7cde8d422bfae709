"""The ops of kvevict.ops on a paged cache: the same kernels, which find a token's row through a block table.

Layout: key_cache [num_blocks, block_size, kv_heads, head_dim] and value_cache [..., value_dim], any strides with a
contiguous last dimension: a view of an engine's cache, whatever its order, and never a copy. block_tables [B,
max_blocks] int32: token t of request b lies in block block_tables[b, t // block_size], row t % block_size, of every KV
head. lengths [B] int32 or int64: tokens of each request, at least 1. What the table says beyond them is not read.

Or a table for each head: block_tables [B, kv_heads, max_blocks], lengths [B] or [B, kv_heads], where 0 is allowed, and
a cache [num_blocks, block_size, 1, head_dim]. Then every (request, head) is a row of its own, of its own length.

S = max_blocks · block_size is the longest that a request can be: pass a narrower table where requests are shorter.

With one table per request every KV head keeps its own tokens, but the same number of them, so whole blocks are left.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvevict import ops, validate


class PagedCompacted(NamedTuple):
    """What a paged compaction leaves."""

    lengths: Tensor  # [B] ([B, H] with a table per head), dtype of the given lengths: tokens that are held now
    freed_blocks: Tensor  # like block_tables: the blocks that hold no token any more, -1 elsewhere


def _heads_first(name: str, cache: Tensor, dtypes, like: Tensor | None = None) -> Tensor:
    """[num_blocks, kv_heads, block_size, head_dim]: the order in which the kernels take a cache."""
    validate.tensor(name, cache, 4, dtypes)
    return validate.cache(name, cache.transpose(1, 2), dtypes, like)


def pages(cache: Tensor, block_tables: Tensor) -> ops.Pages:
    """A paged cache where `kvevict.ops` and the policies take keys or values, for those ops that say so.

    Args:
        cache, block_tables: see the module.

    Raises:
        TypeError, ValueError: wrong types, shapes or strides.
    """
    rows = _heads_first("cache", cache, validate.FLOAT_DTYPES)
    return ops.Pages(rows, validate.block_tables(block_tables, rows.shape[1], rows))


def _paged(
    key_cache: Tensor,
    block_tables: Tensor,
    lengths: Tensor,
    value_cache: Tensor | None = None,
    dtypes=validate.FLOAT_DTYPES,
) -> ops._Cache:
    """A paged cache, checked."""
    keys = _heads_first("key_cache", key_cache, dtypes)
    values = keys if value_cache is None else _heads_first("value_cache", value_cache, dtypes, keys)
    table = validate.block_tables(block_tables, keys.shape[1], keys)
    H = table.shape[1] if table.ndim == 3 else keys.shape[1]
    if table.ndim == 2 and isinstance(lengths, Tensor) and lengths.ndim == 2:
        raise ValueError(
            f"lengths has shape {tuple(lengths.shape)}, one per head: expected a table for each head, block_tables "
            "[B, kv_heads, max_blocks]"
        )
    return ops._Cache(keys, values, table, validate.lengths(lengths, table.shape[0], H, keys))


def _check_selection(
    keep, cache: ops._Cache, sink: int, recent: int, heads: str, floor: float
) -> tuple[int, Tensor | None]:
    """n, the most that any request can keep, and what each one keeps."""
    B, H, S, _ = cache.shape
    lengths = cache.lengths
    assert lengths is not None and cache.table is not None
    if cache.table.ndim == 2:
        expected = (
            "as the heads of a request share their blocks; a table for each head, [B, kv_heads, max_blocks], lifts it"
        )
        if heads == "adaptive":
            raise ValueError(f"heads is 'adaptive': expected 'each' or 'shared', {expected}")
        if isinstance(keep, Tensor) and keep.ndim == 2:
            raise ValueError(f"keep has shape {tuple(keep.shape)}: expected ({B},), {expected}")
    if isinstance(keep, Tensor) and keep.ndim < 2:
        keep = validate.counts("keep", keep, B, H, lengths)
        ops._check_heads(heads, floor, lengths)
        validate.kept_tokens(S, S, sink, recent)  # for sink and recent
        return S, ops._keep_counts(keep, (B, H, S), lengths, lengths)
    if isinstance(keep, int) and not isinstance(keep, bool):
        keep = min(keep, S)  # every request may be shorter than what it could keep
    return ops._check_selection((B, H, S), lengths, keep, sink, recent, heads, lengths, floor)


def paged_scores(
    key_cache: Tensor,
    block_tables: Tensor,
    lengths: Tensor,
    *,
    anchor: str | Tensor = "unit",
    inv_freq: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """`kvevict.ops.keydiff_scores` on a paged cache.

    Args:
        key_cache, block_tables, lengths: see the module.
        anchor: as there.
        inv_freq, positions: as in `paged_kv_scores`.

    Returns:
        [B, H, S] float32, -inf beyond a request's length.

    Raises:
        TypeError, ValueError: see kvevict.ops; values of the tensors on a GPU are asserted on the device.
    """
    return ops._keydiff(_paged(key_cache, block_tables, lengths), anchor, inv_freq, positions)


def paged_kv_scores(
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    lengths: Tensor,
    weights: Tensor,
    *,
    inv_freq: Tensor,
    positions: Tensor | None = None,
    return_keydiff: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`kvevict.ops.kv_scores` on a paged cache.

    Args:
        key_cache, value_cache, block_tables, lengths: see the module.
        weights: [H, D + Dv + 4] float32, the columns as there; [B, H, ...] where the rows of block_tables are heads of
            one cache, of which each has its own.
        inv_freq: as there.
        positions: [B, S] or [B, H, S] int32 or int64: of the token in each slot, in the order of the request's slots.
            None: slots are positions, as long as nothing has been evicted. Positions that lie in pages themselves
            [num_blocks, block_size] are `positions[block_tables].flatten(-2)` with no negative block in the table.
        return_keydiff: as there.

    Returns:
        [B, H, S] float32, -inf beyond a request's length; or (that, the KeyDiff scores likewise).

    Raises:
        TypeError, ValueError: as there.
    """
    validate.flag("return_keydiff", return_keydiff)
    cache = _paged(key_cache, block_tables, lengths, value_cache)
    fitted, keydiff = ops._kv_scores(cache, weights, inv_freq, positions, return_keydiff)
    return (fitted, keydiff) if return_keydiff else fitted


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
    min_distance: int = 0,
) -> Tensor:
    """`kvevict.ops.attention_mass` on a paged cache.

    Args:
        queries: [B, Hq, W, D], the last W of each request; of one shorter than W the first ones, and padding.
        key_cache, block_tables, lengths: see the module.
        scale, lse, causal, reduce, normalize, min_distance: as there.

    Returns:
        [B, H, S] float32, -inf beyond a request's length.

    Raises:
        TypeError, ValueError: as there.
    """
    cache = _paged(key_cache, block_tables, lengths)
    return ops._mass(cache, queries, scale, lse, causal, reduce, normalize, min_distance)


def paged_decode_attention(
    queries: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    lse: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`kvevict.ops.decode_attention` on a paged cache: the last W queries of each request.

    Args:
        queries: [B, Hq, W, D].
        key_cache, value_cache, block_tables, lengths: see the module.
        scale, lse, return_lse: as there.

    Returns:
        [B, Hq, W, Dv], dtype of queries (bfloat16 for float8); or (that, LSE [B, Hq, W] float32).

    Raises:
        TypeError, ValueError: as there.
    """
    return ops._decode(_paged(key_cache, block_tables, lengths, value_cache), queries, scale, lse, return_lse)


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
        indices: [B, H, n] int64, strictly ascending and below the request's length, -1 only as padding at a row's end;
            with one table per request as many in every head.
        to: "front": the kept tokens fill a request's first slots, and its last blocks are free. "tail": they fill the
            last slots before `lengths`, and the first blocks are free, as under a sliding window.
        preserve_order: keep ascending order; False moves the fewest rows.
        key_scales, value_scales: [num_blocks, block_size, kv_heads], scales of float8 rows, which move with them.

    Returns:
        PagedCompacted.

    Raises:
        TypeError, ValueError: see kvevict.ops; values of the tensors on a GPU are asserted on the device.
    """
    cache = _paged(key_cache, block_tables, lengths, value_cache, validate.ROW_DTYPES)
    validate.one_of("to", to, ("front", "tail"))
    validate.flag("preserve_order", preserve_order)
    scales = _check_scales(key_scales, value_scales, cache.keys)
    indices = ops._indices(indices, cache)
    return _compact(cache, indices, None, to, preserve_order, scales, trusted=False)


def _check_scales(
    key_scales: Tensor | None, value_scales: Tensor | None, keys: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Scales as rows of one element [num_blocks, kv_heads, block_size, 1]."""
    if (key_scales is None) != (value_scales is None):
        raise ValueError("one of key_scales and value_scales is None: expected both, or neither")
    if key_scales is None or value_scales is None:
        return None, None
    found = []
    for name, scales in (("key_scales", key_scales), ("value_scales", value_scales)):
        validate.tensor(name, scales, 3, (torch.float32, torch.float16, torch.bfloat16), keys)
        rows = scales.transpose(1, 2)[..., None]
        if rows.shape[:3] != keys.shape[:3]:
            blocks, H, block_size = keys.shape[:3]
            raise ValueError(f"{name} has shape {tuple(scales.shape)}: expected {(blocks, block_size, H)}")
        found.append(rows)
    return found[0], found[1]


def _compact(
    cache: ops._Cache, indices: Tensor, kept: Tensor | None, to: str, preserve_order: bool, scales, trusted: bool
) -> PagedCompacted:
    """From here on inputs are valid, but for tensor values. kept: how many indices each row has, where it is known."""
    slots = None if preserve_order else torch.empty(indices.shape, dtype=torch.int64, device=indices.device)
    torch.ops.kvevict.move_rows(
        cache.keys, cache.values, indices, slots, trusted, cache.table, cache.lengths, to == "tail", *scales
    )
    if kept is None:
        kept = (indices >= 0).sum(-1)
    return _left(cache, kept if cache.table is not None and cache.table.ndim == 3 or kept.ndim == 1 else kept[:, 0], to)


def _left(cache: ops._Cache, kept: Tensor, to: str) -> PagedCompacted:
    """What a move has left of the rows' lengths and blocks."""
    table, lengths = cache.table, cache.lengths
    assert table is not None and lengths is not None
    held = torch.empty(table.shape[:-1], dtype=lengths.dtype, device=table.device)
    freed = torch.empty(table.shape, dtype=torch.int32, device=table.device)
    torch.ops.kvevict.left_blocks(table, lengths, kept, cache.keys.shape[2], to == "tail", held, freed)
    return PagedCompacted(held, freed)


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
    floor: float = 0.2,
    anchor: str | Tensor = "unit",
    to: str = "front",
    preserve_order: bool = True,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> PagedCompacted:
    """KeyDiff eviction in a paged cache, in place: `paged_scores`, `kvevict.ops.topk_indices` and `paged_compact`.

    Args:
        keep: an int (tokens), a float (share of each request's length), or an int tensor of counts, at least 1: [B], or
            [B, H] with a table per head. A request that is shorter than what it may keep stays whole.
        sink, recent, heads, floor: as in `topk_indices`; heads="adaptive" with a table per head.
        key_scales, value_scales: as in `paged_compact`. Per-token scales do not change a cosine; anchor="raw" would
            need them, and is refused.
        others: as in the functions it calls.

    Returns:
        PagedCompacted.

    Raises:
        TypeError, ValueError: as there.
    """
    cache = _paged(key_cache, block_tables, lengths, value_cache)
    validate.one_of("to", to, ("front", "tail"))
    validate.flag("preserve_order", preserve_order)
    ops._check_anchor(anchor, cache)
    scales = _check_scales(key_scales, value_scales, cache.keys)
    if key_scales is not None and isinstance(anchor, str) and anchor == "raw":
        raise ValueError("anchor is 'raw': expected 'unit' where there are key_scales")
    n, kept = _check_selection(keep, cache, sink, recent, heads, floor)
    scores = ops._scores(cache, anchor)
    if preserve_order and heads != "adaptive":
        assert kept is not None  # there are lengths
        ops._topk_move(cache, scores, n, kept, sink, recent, heads, to == "tail", *scales)
        return _left(cache, kept, to)
    indices = ops._topk(scores, n, kept, sink, recent, heads, cache.lengths, trusted=True, floor=floor)
    return _compact(cache, indices, None if heads == "adaptive" else kept, to, preserve_order, scales, trusted=True)

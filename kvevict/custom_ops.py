"""The torch custom ops `torch.ops.kvevict.*`: each stage fills or mutates the tensors it is given and returns nothing,
so that torch.compile traces through and a fake has nothing to do. They run the picked backend on valid inputs; what is
left to check here needs the tensors' values or addresses. `trusted`: an earlier op has checked the values."""

from __future__ import annotations

import weakref
from collections.abc import MutableMapping
from typing import NamedTuple

import torch
from torch.utils.weak import WeakIdKeyDictionary

from kvevict import validate
from kvevict.backends import pick

_library = torch.library.Library("kvevict", "DEF")


def _custom_op(schema: str):
    """Register a function as the op `schema` for every device, with a fake that does nothing: ops return nothing."""

    def register(function):
        _library.define(schema)
        name = schema.partition("(")[0]
        _library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"kvevict::{name}", lambda *args: None, lib=_library)
        return function

    return register


def _run(name: str, device: torch.device, *args) -> None:
    """Call the backend's function with `device` current, on which Triton launches, and without autocast, under which
    torch would round the reference's products."""
    function = getattr(pick(device), name)
    if torch.is_autocast_enabled(device.type):
        with torch.autocast(device.type, enabled=False):
            return function(*args)
    if device.type == "cpu":
        return function(*args)
    module = torch.get_device_module(device)
    if module.current_device() == device.index:
        return function(*args)
    with module.device(device):
        return function(*args)


def cache_rows(keys: torch.Tensor, table: torch.Tensor | None) -> tuple[int, int, int]:
    """B, H and S, the most tokens of a request, of dense keys [B, H, S, D], or of paged ones [blocks, H, block_size, D]
    under a block table [B, columns], or [B, heads, columns] and a cache of one head."""
    B, H, S = keys.shape[:3]
    if table is None:
        return B, H, S
    return table.shape[0], table.shape[1] if table.ndim == 3 else H, table.shape[-1] * S


class _Checked(NamedTuple):
    """What was found in range: for which lengths, versions of lengths and table, and bounds."""

    lengths: weakref.ReferenceType[torch.Tensor]
    stamp: tuple[int, ...]
    written: bool


# By table, or by lengths where there is none: a decode step pays for its table in the first layer, not in all of them.
_checked: MutableMapping[torch.Tensor, _Checked] = WeakIdKeyDictionary()


def _check_lengths(lengths, keys, table, written: bool = False) -> None:
    """Values of lengths and block table, once per version of them, as torch counts writes in place: who writes to them
    from a kernel of his own has to see to the values. written: no block may be there twice."""
    if lengths is None:
        return
    S, (blocks, _, block_size, _) = cache_rows(keys, table)[2], keys.shape
    by = lengths if table is None else table
    versioned = not (lengths.is_inference() or by.is_inference())
    stamp = (lengths._version, by._version, S, blocks, block_size) if versioned else ()
    known = _checked.get(by)
    if versioned and known and known.lengths() is lengths and known.stamp == stamp and known.written >= written:
        return
    ok = torch.empty(1, dtype=torch.bool, device=lengths.device)
    _run("check_rows", lengths.device, lengths, S, table, blocks, block_size, ok)
    validate.rows_in_range(ok, lengths, S, table, blocks, block_size)
    if written:
        validate.blocks_apart(table, lengths, blocks, block_size)
    if versioned:
        _checked[by] = _Checked(weakref.ref(lengths), stamp, written)


# By table of queries: its version and their number.
_checked_queries: MutableMapping[torch.Tensor, tuple[int, int]] = WeakIdKeyDictionary()


def _check_query_table(table, queries) -> None:
    """The values of a table of queries, once per version of it."""
    stamp = None if table.is_inference() else (table._version, queries.shape[0])
    if stamp is not None and _checked_queries.get(table) == stamp:
        return
    expected = f"queries from 0 to {queries.shape[0] - 1}"
    validate.require(((table >= 0) & (table < queries.shape[0])).all(), "the table of queries", table, expected)
    if stamp is not None:
        _checked_queries[table] = stamp


def _check_written(keys, values, table, lengths, key_scales, value_scales) -> None:
    """What is written in place shares no memory, neither by strides nor by blocks."""
    dense = table is None
    named = {("keys" if dense else "key_cache"): keys, ("values" if dense else "value_cache"): values}
    named |= {"key_scales": key_scales, "value_scales": value_scales}
    validate.written_apart({name: rows for name, rows in named.items() if rows is not None})
    if table is not None:
        _check_lengths(lengths, keys, table, written=True)


def _check_indices(indices, keys, table, lengths) -> None:
    """Values of the caller's indices and lengths. What moves within shared blocks must be as many in every head."""
    validate.indices_ascend(indices, cache_rows(keys, table)[2] if lengths is None else lengths)
    if table is not None and table.ndim == 2:
        kept = (indices >= 0).sum(-1)
        expected = "as many tokens in every KV head of a request, whose heads share their blocks"
        validate.require((kept == kept[:, :1]).all(), "indices", indices, expected)


def _from_end(indices, lengths):
    """Slots and the rows they name counted back from the request's end: the last token comes first."""
    slots = torch.empty(indices.shape, dtype=torch.int64, device=indices.device)
    _run("slots_from_end", indices.device, indices, lengths, slots)
    return slots


@_custom_op("keep_counts(Tensor? lengths, SymInt S, Tensor? keep, SymInt share, SymInt most, Tensor(a!) kept) -> ()")
def _keep_counts_op(lengths, S, keep, share, most, kept):
    ok = torch.empty(1, dtype=torch.bool, device=kept.device)
    _run("keep_counts", kept.device, lengths, S, keep, share, most, kept, ok)
    if keep is not None:
        validate.require(ok[0], "keep", keep, "counts of at least 1, or 0 for a head without a token")


@_custom_op(
    "left_blocks(Tensor table, Tensor lengths, Tensor kept, SymInt block_size, bool from_end, Tensor(a!) held, "
    "Tensor(b!) freed) -> ()"
)
def _left_blocks_op(table, lengths, kept, block_size, from_end, held, freed):
    _run("left_blocks", table.device, table, lengths, kept, block_size, from_end, held, freed)


@_custom_op(
    "keydiff_scores(Tensor keys, Tensor? anchor, bool unit, Tensor? lengths, Tensor(a!) out, Tensor? table=None) -> ()"
)
def _keydiff_scores_op(keys, anchor, unit, lengths, out, table=None):
    _check_lengths(lengths, keys, table)
    _run("keydiff_scores", keys.device, keys, anchor, unit, lengths, out, table)


@_custom_op("anchor_sums(Tensor keys, Tensor? lengths, Tensor(a!) sums, Tensor(b!) counts) -> ()")
def _anchor_sums_op(keys, lengths, sums, counts):
    _check_lengths(lengths, keys, None)
    _run("anchor_sums", keys.device, keys, lengths, sums, counts)


@_custom_op(
    "topk_indices(Tensor scores, Tensor? keep_lengths, SymInt sink, SymInt recent, bool shared, Tensor? lengths, "
    "bool trusted, Tensor(a!) out) -> ()"
)
def _topk_indices_op(scores, keep_lengths, sink, recent, shared, lengths, trusted, out):
    if not trusted:
        _check_lengths(lengths, scores[..., None], None)
    _run("topk_indices", scores.device, scores, keep_lengths, sink, recent, shared, lengths, out)


@_custom_op(
    "topk_adaptive(Tensor scores, SymInt n, Tensor? keep_lengths, SymInt floor_p, SymInt floor_q, SymInt sink, "
    "SymInt recent, Tensor? lengths, bool trusted, Tensor(a!) out) -> ()"
)
def _topk_adaptive_op(scores, n, keep_lengths, floor_p, floor_q, sink, recent, lengths, trusted, out):
    if not trusted:
        _check_lengths(lengths, scores[..., None], None)
    floor = (floor_p, floor_q)
    _run("topk_adaptive", scores.device, scores, n, keep_lengths, floor, sink, recent, lengths, out)


@_custom_op(
    "move_rows(Tensor(a!) keys, Tensor(b!) values, Tensor indices, Tensor(c!)? slots, bool trusted, "
    "Tensor? table=None, Tensor? lengths=None, bool from_end=False, Tensor(d!)? key_scales=None, "
    "Tensor(e!)? value_scales=None) -> ()"
)
def _move_rows_op(
    keys, values, indices, slots, trusted, table=None, lengths=None, from_end=False, key_scales=None, value_scales=None
):  # fmt: skip
    """slots: filled with the token that each slot then holds, for the fewest moves; None keeps their order."""
    _check_written(keys, values, table, lengths, key_scales, value_scales)
    if not trusted:
        _check_indices(indices, keys, table, lengths)
    moves = _from_end(indices, lengths) if from_end else indices
    if slots is not None:
        _run("fill_holes", keys.device, moves, slots)
        moves = slots
    ends = lengths if from_end else None
    _run("move_rows", keys.device, keys, values, moves, slots is None, table, ends, None, key_scales, value_scales)


@_custom_op(
    "topk_move(Tensor scores, Tensor? keep_lengths, SymInt sink, SymInt recent, bool shared, Tensor? lengths, "
    "Tensor(a!) indices, Tensor(b!) keys, Tensor(c!) values, Tensor? table=None, bool from_end=False, "
    "Tensor(d!)? key_scales=None, Tensor(e!)? value_scales=None) -> ()"
)
def _topk_move_op(
    scores, keep_lengths, sink, recent, shared, lengths, indices, keys, values, table=None, from_end=False,
    key_scales=None, value_scales=None,
):  # fmt: skip
    """topk_indices, then move_rows in order: the selection clears the flags of the move, which saves it a launch.
    from_end: indices count back from each row's last token."""
    _check_written(keys, values, table, lengths, key_scales, value_scales)
    B, H, _ = cache_rows(keys, table)
    slots = indices.expand(B, H, -1)
    flags = torch.empty(pick(keys.device).move_flags(slots, keys, values), dtype=torch.int32, device=keys.device)
    selection = (scores, keep_lengths, sink, recent, shared, lengths, indices, flags, from_end)
    _run("topk_indices", keys.device, *selection)
    ends = lengths if from_end else None
    _run("move_rows", keys.device, keys, values, slots, True, table, ends, flags, key_scales, value_scales)


@_custom_op(
    "copy_rows(Tensor keys, Tensor values, Tensor indices, Tensor(a!)? slots, bool trusted, Tensor(b!) out_keys, "
    "Tensor(c!) out_values, Tensor? out_table=None) -> ()"
)
def _copy_rows_op(keys, values, indices, slots, trusted, out_keys, out_values, out_table=None):
    """out_table: the outputs are the caller's pages, under a table that allot_blocks has filled for these indices."""
    if out_table is not None:
        pages = {"key_cache": out_keys, "value_cache": out_values}
        validate.written_apart(pages, read={"keys": keys, "values": values})
    if not trusted:
        validate.indices_ascend(indices, keys.shape[2])
    if slots is not None:
        _run("fill_holes", keys.device, indices, slots)
    moves = indices if slots is None else slots
    _run("copy_rows", keys.device, keys, values, moves, out_keys, out_values, None, out_table)


@_custom_op(
    "allot_blocks(Tensor counts, Tensor free, SymInt num_blocks, SymInt block_size, Tensor(a!) out, Tensor(b!) taken) "
    "-> ()"
)
def _allot_blocks_op(counts, free, num_blocks, block_size, out, taken):
    """Plain torch: so few numbers are not worth a kernel."""
    validate.no_internal_overlap("out", out)
    columns = out.shape[2]
    most = columns * block_size
    expected = f"values from 0 to {most}, columns · block_size"
    validate.require(((counts >= 0) & (counts <= most)).all(), "counts", counts, expected)
    needed = (counts.long() + block_size - 1) // block_size
    ends = needed.flatten().cumsum(0).view_as(needed)
    validate.free_blocks(free, ends[-1, -1], num_blocks)

    column = torch.arange(columns, device=counts.device)
    blocks = free[((ends - needed)[..., None] + column).clamp(max=free.shape[0] - 1)]
    out.copy_(torch.where(column < needed[..., None], blocks, -1))
    taken.copy_(ends[-1, -1:])


@_custom_op("key_norm_scores(Tensor keys, Tensor? lengths, Tensor(a!) out, Tensor? table=None) -> ()")
def _key_norm_scores_op(keys, lengths, out, table=None):
    _check_lengths(lengths, keys, table)
    _run("key_norm_scores", keys.device, keys, lengths, out, table)


@_custom_op(
    "kv_scores(Tensor keys, Tensor? values, Tensor? weights, Tensor inv_freq, Tensor? positions, Tensor? lengths, "
    "Tensor(a!)? fitted, Tensor(b!)? keydiff, Tensor? table=None) -> ()"
)
def _kv_scores_op(keys, values, weights, inv_freq, positions, lengths, fitted, keydiff, table=None):
    _check_lengths(lengths, keys, table)
    _run("kv_scores", keys.device, keys, values, weights, inv_freq, positions, lengths, fitted, keydiff, table)


@_custom_op("quadratic_scores(Tensor keys, Tensor linear, Tensor quadratic, Tensor? lengths, Tensor(a!) out) -> ()")
def _quadratic_scores_op(keys, linear, quadratic, lengths, out):
    _check_lengths(lengths, keys, None)
    _run("quadratic_scores", keys.device, keys, linear, quadratic, lengths, out)


@_custom_op("projected_norms(Tensor values, Tensor weight, Tensor? lengths, Tensor(a!) out) -> ()")
def _projected_norms_op(values, weight, lengths, out):
    _check_lengths(lengths, values, None)
    _run("projected_norms", values.device, values, weight, lengths, out)


@_custom_op("mlp_scores(Tensor hidden, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor(a!) out) -> ()")
def _mlp_scores_op(hidden, w1, b1, w2, b2, out):
    _run("mlp_scores", hidden.device, hidden, w1, b1, w2, b2, out)


@_custom_op(
    "attention_lse(Tensor queries, Tensor keys, float scale, bool causal, Tensor? lengths, Tensor(a!) out, "
    "Tensor? table=None) -> ()"
)
def _attention_lse_op(queries, keys, scale, causal, lengths, out, table=None):
    _check_lengths(lengths, keys, table)
    _run("attention_lse", keys.device, queries, keys, scale, causal, lengths, out, table)


@_custom_op(
    "attention_mass(Tensor queries, Tensor keys, Tensor? lse, float scale, bool causal, str reduce, bool count, "
    "Tensor? lengths, Tensor(a!) out, Tensor? table=None, SymInt min_distance=0, Tensor? query_table=None) -> ()"
)
def _attention_mass_op(
    queries, keys, lse, scale, causal, reduce, count, lengths, out, table=None, min_distance=0, query_table=None
):  # fmt: skip
    _check_lengths(lengths, keys, table)
    if query_table is not None:
        _check_query_table(query_table, queries)
    options = (scale, causal, reduce, count)
    _run("attention_mass", keys.device, queries, keys, lse, *options, lengths, out, table, min_distance, query_table)


@_custom_op(
    "attention_peaks(Tensor queries, Tensor keys, Tensor lse, float scale, SymInt pool, Tensor? lengths, "
    "Tensor(a!) out) -> ()"
)
def _attention_peaks_op(queries, keys, lse, scale, pool, lengths, out):
    _check_lengths(lengths, keys, None)
    _run("attention_peaks", keys.device, queries, keys, lse, scale, pool, lengths, out)


@_custom_op(
    "decode_attention(Tensor queries, Tensor keys, Tensor values, float scale, Tensor? lengths, Tensor(a!)? mass, "
    "float decay, Tensor(b!)? last_used, SymInt step, float threshold, Tensor(c!) out, Tensor? table=None, "
    "Tensor? given_lse=None, Tensor(d!)? out_lse=None) -> ()"
)
def _decode_attention_op(
    queries, keys, values, scale, lengths, mass, decay, last_used, step, threshold, out, table=None,
    given_lse=None, out_lse=None,
):  # fmt: skip
    for name, tracked in (("mass", mass), ("last_used", last_used)):
        if tracked is not None:
            validate.no_internal_overlap(name, tracked)
    _check_lengths(lengths, keys, table)
    tracking = (mass, decay, last_used, step, threshold)
    _run(
        "decode_attention",
        keys.device,
        queries,
        keys,
        values,
        scale,
        lengths,
        *tracking,
        out,
        table,
        given_lse,
        out_lse,
    )


@_custom_op(
    "pool_scores(Tensor scores, SymInt kernel_size, bool average, SymInt window, Tensor? lengths, Tensor(a!) out) -> ()"
)
def _pool_scores_op(scores, kernel_size, average, window, lengths, out):
    _check_lengths(lengths, scores[..., None], None)
    _run("pool_scores", scores.device, scores, kernel_size, average, window, lengths, out)


@_custom_op("combine_ranks(Tensor[] parts, float[] weights, Tensor? lengths, Tensor(a!) out) -> ()")
def _combine_ranks_op(parts, weights, lengths, out):
    _check_lengths(lengths, parts[0][..., None], None)
    _run("combine_ranks", out.device, parts, weights, lengths, out)


@_custom_op("evict_slots(Tensor scores, SymInt sink, SymInt recent, Tensor? lengths, Tensor(a!) out) -> ()")
def _evict_slots_op(scores, sink, recent, lengths, out):
    _check_lengths(lengths, scores[..., None], None)
    _run("evict_slots", scores.device, scores, sink, recent, lengths, out)


@_custom_op(
    "count_digits(Tensor scores, Tensor positions, Tensor limits, Tensor? before, Tensor? summed, SymInt bits, "
    "SymInt left, Tensor(a!) after, Tensor(b!) counts) -> ()"
)
def _count_digits_op(scores, positions, limits, before, summed, bits, left, after, counts):
    _run("count_digits", scores.device, scores, positions, limits, before, summed, bits, left, after, counts)


@_custom_op(
    "kept_slots(Tensor scores, Tensor positions, Tensor before, Tensor summed, SymInt bits, Tensor(a!) out, "
    "Tensor(b!) held) -> ()"
)
def _kept_slots_op(scores, positions, before, summed, bits, out, held):
    _run("kept_slots", scores.device, scores, positions, before, summed, bits, out, held)

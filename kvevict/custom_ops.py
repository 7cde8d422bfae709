"""The torch custom ops `torch.ops.kvevict.*`: each stage fills or mutates the tensors it is given and returns nothing,
so that torch.compile traces through and a fake has nothing to do. They run the picked backend on valid inputs; what is
left to check here needs the tensors' values or addresses. `trusted`: an earlier op has checked the values."""

from __future__ import annotations

import torch

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
    """Call the backend's function with `device` current: Triton launches on the current device."""
    function = getattr(pick(device), name)
    if device.type == "cpu":
        return function(*args)
    module = torch.get_device_module(device)
    if module.current_device() == device.index:
        return function(*args)
    with module.device(device):
        return function(*args)


def cache_rows(keys: torch.Tensor, table: torch.Tensor | None) -> tuple[int, int, int]:
    """B, H and S, the most tokens of a request, of dense keys [B, H, S, D], or of paged ones [blocks, H, block_size, D]
    under a block table [B, columns]."""
    B, H, S = keys.shape[:3]
    return (B, H, S) if table is None else (table.shape[0], H, table.shape[1] * S)


def _check_lengths(lengths, keys, table) -> None:
    validate.lengths_within(lengths, cache_rows(keys, table)[2])
    if table is not None:
        validate.blocks_valid(table, lengths, keys, written=False)


@_custom_op(
    "keydiff_scores(Tensor keys, Tensor? anchor, bool unit, Tensor? lengths, Tensor(a!) out, Tensor? table=None) -> ()"
)
def _keydiff_scores_op(keys, anchor, unit, lengths, out, table=None):
    _check_lengths(lengths, keys, table)
    _run("keydiff_scores", keys.device, keys, anchor, unit, lengths, out, table)


@_custom_op(
    "topk_indices(Tensor scores, Tensor? keep_lengths, SymInt sink, SymInt recent, bool shared, Tensor? lengths, "
    "bool trusted, Tensor(a!) out, Tensor(b!)? clear=None) -> ()"
)
def _topk_indices_op(scores, keep_lengths, sink, recent, shared, lengths, trusted, out, clear=None):
    if not trusted:
        validate.lengths_within(lengths, scores.shape[2])
        validate.counts_positive(keep_lengths, lengths)
    _run("topk_indices", scores.device, scores, keep_lengths, sink, recent, shared, lengths, out, clear)


@_custom_op(
    "topk_adaptive(Tensor scores, SymInt n, Tensor? keep_lengths, SymInt floor_p, SymInt floor_q, SymInt sink, "
    "SymInt recent, Tensor? lengths, bool trusted, Tensor(a!) out, Tensor(b!)? clear=None) -> ()"
)
def _topk_adaptive_op(
    scores, n, keep_lengths, floor_p, floor_q, sink, recent, lengths, trusted, out, clear=None
):  # fmt: skip
    if not trusted:
        validate.lengths_within(lengths, scores.shape[2])
    floor = (floor_p, floor_q)
    _run("topk_adaptive", scores.device, scores, n, keep_lengths, floor, sink, recent, lengths, out, clear)


@_custom_op("fill_holes(Tensor indices, SymInt S, bool trusted, Tensor(a!) out) -> ()")
def _fill_holes_op(indices, S, trusted, out):
    if not trusted:
        validate.indices_ascend(indices, S)
    _run("fill_holes", indices.device, indices, out)


@_custom_op(
    "move_rows(Tensor(a!) keys, Tensor(b!) values, Tensor slots, bool ordered, bool trusted, Tensor? table=None, "
    "Tensor? lengths=None, bool from_end=False) -> ()"
)
def _move_rows_op(keys, values, slots, ordered, trusted, table=None, lengths=None, from_end=False):
    validate.no_internal_overlap("keys", keys)
    validate.no_internal_overlap("values", values)
    validate.no_mutual_overlap(keys, values)
    if not trusted:
        S = cache_rows(keys, table)[2]
        validate.indices_ascend(slots, S)
        validate.lengths_within(lengths, S)
    if table is not None:
        validate.blocks_valid(table, lengths, keys, written=True)
    _run("move_rows", keys.device, keys, values, slots, ordered, table, lengths if from_end else None)


@_custom_op(
    "copy_rows(Tensor keys, Tensor values, Tensor slots, bool trusted, Tensor(a!) out_keys, Tensor(b!) out_values) "
    "-> ()"
)
def _copy_rows_op(keys, values, slots, trusted, out_keys, out_values):
    if not trusted:
        validate.indices_ascend(slots, keys.shape[2])
    _run("copy_rows", keys.device, keys, values, slots, out_keys, out_values)


@_custom_op("key_norm_scores(Tensor keys, Tensor? lengths, Tensor(a!) out, Tensor? table=None) -> ()")
def _key_norm_scores_op(keys, lengths, out, table=None):
    _check_lengths(lengths, keys, table)
    _run("key_norm_scores", keys.device, keys, lengths, out, table)


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
    "attention_mass(Tensor queries, Tensor keys, Tensor lse, float scale, bool causal, str reduce, bool count, "
    "Tensor? lengths, bool trusted, Tensor(a!) out, Tensor? table=None) -> ()"
)
def _attention_mass_op(queries, keys, lse, scale, causal, reduce, count, lengths, trusted, out, table=None):
    if not trusted:
        _check_lengths(lengths, keys, table)
    _run("attention_mass", keys.device, queries, keys, lse, scale, causal, reduce, count, lengths, out, table)


@_custom_op(
    "decode_attention(Tensor queries, Tensor keys, Tensor values, float scale, Tensor? lengths, Tensor(a!)? mass, "
    "float decay, Tensor(b!)? last_used, SymInt step, float threshold, Tensor(c!) out, Tensor? table=None) -> ()"
)
def _decode_attention_op(
    queries, keys, values, scale, lengths, mass, decay, last_used, step, threshold, out, table=None
):  # fmt: skip
    for name, tracked in (("mass", mass), ("last_used", last_used)):
        if tracked is not None:
            validate.no_internal_overlap(name, tracked)
    _check_lengths(lengths, keys, table)
    arguments = (queries, keys, values, scale, lengths, mass, decay, last_used, step, threshold, out, table)
    _run("decode_attention", keys.device, *arguments)


@_custom_op("pool_scores(Tensor scores, SymInt kernel_size, bool average, Tensor(a!) out) -> ()")
def _pool_scores_op(scores, kernel_size, average, out):
    _run("pool_scores", scores.device, scores, kernel_size, average, out)


@_custom_op("evict_slots(Tensor scores, SymInt sink, SymInt recent, Tensor? lengths, Tensor(a!) out) -> ()")
def _evict_slots_op(scores, sink, recent, lengths, out):
    validate.lengths_within(lengths, scores.shape[2])
    _run("evict_slots", scores.device, scores, sink, recent, lengths, out)

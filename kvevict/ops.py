"""The public ops: validate, pick a backend, then score → select → compact.

Each stage is a torch custom op (`torch.ops.kvevict.*`) that only fills or mutates the tensors it is given, so that
torch.compile traces through, CUDA graphs capture, and nothing is read back to the host.

Layout: keys [batch, kv_heads, seq, head_dim] and values [batch, kv_heads, seq, value_dim], any strides with a
contiguous last dimension. A [B, S, H, D] cache is passed as `x.transpose(1, 2)`; in place works on the view. dtypes:
float32, float16, bfloat16, float8_e4m3fn, float8_e5m2; `compact` also moves int8 and uint8 rows. head_dim up to 576,
fastest at multiples of 16.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvevict import validate
from kvevict.backends import pick


class Compacted(NamedTuple):
    """A compacted cache. With `inplace=True`, keys and values are views of the caller's storage."""

    keys: Tensor  # [B, H, n, D]
    values: Tensor  # [B, H, n, Dv]
    indices: Tensor  # [B, H, n] int64: original position of the token now in each slot; -1 is padding
    lengths: Tensor | None  # [B] int64: kept tokens of each request when `lengths` was given, else None


def keydiff_scores(keys: Tensor, *, anchor: str | Tensor = "unit", lengths: Tensor | None = None) -> Tensor:
    """KeyDiff scores: how unlike the mean key each key is. Higher means keep.

    score_i = -cos(k_i, a). Park et al., "KeyDiff" (arXiv 2504.15364), equation 4. A zero key scores 0.

    Args:
        keys: [B, H, S, D], after RoPE.
        anchor: "unit", a = mean of k_i / ‖k_i‖ (the paper); "raw", a = mean of k_i; or a tensor [B, H, D].
        lengths: [B] int32 or int64, valid tokens of each request; what lies beyond is not read.

    Returns:
        [B, H, S] float32, -inf beyond a request's length.

    Raises:
        TypeError, ValueError: see the module; values of `lengths` on a GPU are asserted on the device.
    """
    keys = validate.cache("keys", keys, validate.FLOAT_DTYPES)
    _check_anchor(anchor, keys)
    lengths = None if lengths is None else validate.lengths(lengths, keys)
    return _scores(keys, anchor, lengths)


def topk_indices(
    scores: Tensor,
    keep: int | float,
    *,
    sink: int = 0,
    recent: int = 0,
    heads: str = "each",
    lengths: Tensor | None = None,
) -> Tensor:
    """The tokens to keep: the protected ones, then the best scores, ties to the lower index.

    Args:
        scores: [B, H, S] float32, last dimension contiguous. NaN ranks below -inf; -0.0 equals 0.0.
        keep: an int, tokens; or a float in (0, 1], a share of the row, rounded to the nearest integer (half up), at
            least 1. A ragged row takes the share of its own length, or all of it if it is shorter than an int keep.
        sink, recent: so many first and last tokens are kept whatever their score. A ragged row that keeps fewer than
            sink + recent tokens keeps its sinks, then its most recent.
        heads: "each" selects per KV head; "shared" averages the scores over KV heads and keeps the same tokens in all.
        lengths: [B] int32 or int64, valid tokens of each request.

    Returns:
        [B, H, n] int64 in ascending order, n = keep of S tokens; -1 beyond what a ragged row keeps.

    Raises:
        TypeError, ValueError: see the module; values of `lengths` on a GPU are asserted on the device.
    """
    scores = validate.tensor("scores", scores, 3, (torch.float32,))
    validate.contiguous_rows("scores", scores)
    n, lengths, keep_lengths = _check_selection(scores, keep, sink, recent, heads, lengths)
    return _topk(scores, n, keep_lengths, sink, recent, heads, lengths, trusted=False)


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
    keys = validate.cache("keys", keys, validate.ROW_DTYPES)
    values = validate.cache("values", values, validate.ROW_DTYPES, like=keys)
    indices = validate.tensor("indices", indices, 3, (torch.int64,), keys)
    B, H, S = keys.shape[:3]
    if indices.shape[:2] != (B, H) or indices.shape[2] > S:
        raise ValueError(f"indices has shape {tuple(indices.shape)}: expected ({B}, {H}, n) with n from 1 to {S}")
    return _compact(keys, values, indices, inplace, preserve_order, None, trusted=False)


def keydiff_compact(
    keys: Tensor,
    values: Tensor,
    *,
    keep: int | float,
    sink: int = 0,
    recent: int = 0,
    heads: str = "each",
    anchor: str | Tensor = "unit",
    lengths: Tensor | None = None,
    inplace: bool = True,
    preserve_order: bool = True,
) -> Compacted:
    """KeyDiff eviction: `keydiff_scores`, `topk_indices` and `compact` in one call.

    Arguments, shapes and errors as there. The paper protects nothing; most users want `sink=4`.
    """
    keys = validate.cache("keys", keys, validate.FLOAT_DTYPES)
    values = validate.cache("values", values, validate.FLOAT_DTYPES, like=keys)
    _check_anchor(anchor, keys)
    n, lengths, keep_lengths = _check_selection(keys, keep, sink, recent, heads, lengths)
    scores = _scores(keys, anchor, lengths)
    indices = _topk(scores, n, keep_lengths, sink, recent, heads, lengths, trusted=True)
    return _compact(keys, values, indices, inplace, preserve_order, keep_lengths, trusted=True)


def _check_anchor(anchor: str | Tensor, keys: Tensor) -> None:
    if isinstance(anchor, Tensor):
        B, H, _, D = keys.shape
        validate.tensor("anchor", anchor, 3, validate.FLOAT_DTYPES, keys)
        if anchor.shape != (B, H, D):
            raise ValueError(f"anchor has shape {tuple(anchor.shape)}: expected ({B}, {H}, {D}), one per KV head")
    else:
        validate.one_of("anchor", anchor, ("unit", "raw"))


def _check_selection(
    like: Tensor, keep: int | float, sink: int, recent: int, heads: str, lengths: Tensor | None
) -> tuple[int, Tensor | None, Tensor | None]:
    """n, lengths and kept lengths [B] of a selection over `like` [B, H, S, ...]."""
    validate.one_of("heads", heads, ("each", "shared"))
    n = validate.kept_tokens(keep, like.shape[2], sink, recent)
    if lengths is None:
        return n, None, None
    lengths = validate.lengths(lengths, like)
    return n, lengths, validate.kept_lengths(keep, lengths)


# From here on inputs are valid, but for tensor values: `trusted` says that an earlier op has checked those.


def _scores(keys: Tensor, anchor: str | Tensor, lengths: Tensor | None) -> Tensor:
    given = anchor if isinstance(anchor, Tensor) else None
    out = torch.empty(keys.shape[:3], dtype=torch.float32, device=keys.device)
    torch.ops.kvevict.keydiff_scores(keys, given, given is None and anchor == "unit", lengths, out)
    return out


def _topk(scores, n: int, keep_lengths, sink: int, recent: int, heads: str, lengths, trusted: bool) -> Tensor:
    B, H, _ = scores.shape
    shared = heads == "shared"
    out = torch.empty((B, 1 if shared else H, n), dtype=torch.int64, device=scores.device)
    torch.ops.kvevict.topk_indices(scores, keep_lengths, sink, recent, shared, lengths, trusted, out)
    return out.expand(B, H, n)


def _compact(
    keys: Tensor, values: Tensor, indices: Tensor, inplace: bool, preserve_order: bool, lengths, trusted: bool
) -> Compacted:
    n = indices.shape[2]
    slots = indices
    if not preserve_order:
        slots = torch.empty(indices.shape, dtype=torch.int64, device=indices.device)
        torch.ops.kvevict.fill_holes(indices, keys.shape[2], trusted, slots)
        trusted = True
    if inplace:
        torch.ops.kvevict.move_rows(keys, values, slots, preserve_order, trusted)
        return Compacted(keys[:, :, :n], values[:, :, :n], slots, lengths)
    new_keys = keys.new_empty((*slots.shape, keys.shape[3]))
    new_values = values.new_empty((*slots.shape, values.shape[3]))
    torch.ops.kvevict.copy_rows(keys, values, slots, trusted, new_keys, new_values)
    return Compacted(new_keys, new_values, slots, lengths)


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


@_custom_op("keydiff_scores(Tensor keys, Tensor? anchor, bool unit, Tensor? lengths, Tensor(a!) out) -> ()")
def _keydiff_scores_op(keys, anchor, unit, lengths, out):
    validate.lengths_within(lengths, keys.shape[2])
    _run("keydiff_scores", keys.device, keys, anchor, unit, lengths, out)


@_custom_op(
    "topk_indices(Tensor scores, Tensor? keep_lengths, SymInt sink, SymInt recent, bool shared, Tensor? lengths, "
    "bool trusted, Tensor(a!) out) -> ()"
)
def _topk_indices_op(scores, keep_lengths, sink, recent, shared, lengths, trusted, out):
    if not trusted:
        validate.lengths_within(lengths, scores.shape[2])
    _run("topk_indices", scores.device, scores, keep_lengths, sink, recent, shared, lengths, out)


@_custom_op("fill_holes(Tensor indices, SymInt S, bool trusted, Tensor(a!) out) -> ()")
def _fill_holes_op(indices, S, trusted, out):
    if not trusted:
        validate.indices_ascend(indices, S)
    _run("fill_holes", indices.device, indices, out)


@_custom_op("move_rows(Tensor(a!) keys, Tensor(b!) values, Tensor slots, bool ordered, bool trusted) -> ()")
def _move_rows_op(keys, values, slots, ordered, trusted):
    validate.no_internal_overlap("keys", keys)
    validate.no_internal_overlap("values", values)
    validate.no_mutual_overlap(keys, values)
    if not trusted:
        validate.indices_ascend(slots, keys.shape[2])
    _run("move_rows", keys.device, keys, values, slots, ordered)


@_custom_op(
    "copy_rows(Tensor keys, Tensor values, Tensor slots, bool trusted, Tensor(a!) out_keys, Tensor(b!) out_values) "
    "-> ()"
)
def _copy_rows_op(keys, values, slots, trusted, out_keys, out_values):
    if not trusted:
        validate.indices_ascend(slots, keys.shape[2])
    _run("copy_rows", keys.device, keys, values, slots, out_keys, out_values)

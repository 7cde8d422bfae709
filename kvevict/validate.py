"""Input checks of the ops. Each raises a TypeError or ValueError that names the argument, its value and what was
expected. Checks of shapes, dtypes and strides run on the host; checks of tensor values are `require`d."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
ROW_DTYPES = (*FLOAT_DTYPES, torch.int8, torch.uint8)
MAX_HEAD_DIM = 576


def tensor(name: str, value: object, ndim: int, dtypes: tuple[torch.dtype, ...], like: Tensor | None = None) -> Tensor:
    """A non-empty tensor of `ndim` dimensions and one of `dtypes`, without grad, on the device of `like`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {type(value).__name__}: expected a torch.Tensor")
    if value.layout != torch.strided or value.is_nested:
        raise TypeError(f"{name} is a nested or sparse tensor ({value.layout}): expected a dense one, torch.strided")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {value.dtype}: expected one of {dtypes}")
    if value.ndim != ndim:
        raise ValueError(f"{name} has shape {tuple(value.shape)}: expected {ndim} dimensions")
    if 0 in value.shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}: expected every dimension to be at least 1")
    if value.requires_grad:
        raise ValueError(f"{name} requires grad: expected a detached tensor, eviction is not differentiable")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name} is on {value.device}: expected {like.device}, where the other tensors are")
    return value


def contiguous_rows(name: str, value: Tensor) -> None:
    if value.shape[-1] > 1 and value.stride(-1) != 1:
        raise ValueError(f"{name} has strides {value.stride()}: expected a contiguous last dimension (stride 1)")


def cache(name: str, value: object, dtypes: tuple[torch.dtype, ...], like: Tensor | None = None) -> Tensor:
    """Keys or values [B, H, S, D] with contiguous rows; like: keys, whose dtype and [B, H, S] must agree."""
    value = tensor(name, value, 4, dtypes, like)
    contiguous_rows(name, value)
    if value.shape[3] > MAX_HEAD_DIM:
        raise ValueError(f"{name} has head_dim {value.shape[3]}: expected at most {MAX_HEAD_DIM}")
    if like is not None:
        if value.dtype != like.dtype:
            raise TypeError(f"{name} has dtype {value.dtype}: expected {like.dtype}, the dtype of keys")
        if value.shape[:3] != like.shape[:3]:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}: expected {tuple(like.shape[:3])} before head_dim, as keys have"
            )
    return value


def one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}: expected one of {known}")


def flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}: expected a bool")


def counts(name: str, value: object, B: int, H: int, like: Tensor) -> Tensor:
    """An int32 or int64 tensor [B], one per request, or [B, H], one per request and KV head."""
    ndim = 2 if isinstance(value, Tensor) and value.ndim == 2 else 1
    value = tensor(name, value, ndim, (torch.int32, torch.int64), like)
    if value.shape != (B, H)[:ndim]:
        raise ValueError(f"{name} has shape {tuple(value.shape)}: expected ({B},), one per request, or ({B}, {H})")
    return value.contiguous()


def lengths(value: object, B: int, H: int, like: Tensor) -> Tensor:
    """The lengths argument: `counts`. Its values: `lengths_within`."""
    return counts("lengths", value, B, H, like)


def block_tables(value: object, H: int, like: Tensor) -> Tensor:
    """int32 [B, columns], or [B, heads, columns] beside a cache that then has one KV head (H)."""
    ndim = 3 if isinstance(value, Tensor) and value.ndim == 3 else 2
    value = tensor("block_tables", value, ndim, (torch.int32,), like)
    if ndim == 3 and H != 1:
        raise ValueError(
            f"block_tables has shape {tuple(value.shape)}, a table per head: expected a cache [num_blocks, block_size, "
            f"1, head_dim], not one of {H} heads"
        )
    return small(value)


def small(value: Tensor) -> Tensor:
    """Indices, tables, weights: what kernels read as contiguous rows, and what costs little to copy."""
    return value if value.stride(-1) == 1 or value.shape[-1] == 1 else value.contiguous()


def queries(
    value: object,
    shape: tuple[int, int, int, int],
    keys: Tensor,
    W: int | None = None,
    given: tuple[int, ...] | None = None,
) -> Tensor:
    """Queries [B, Hq, W, D] beside keys of shape (B, H, S, D): the last W of the sequence, for whole GQA groups. given:
    their shape, where value has them under a block table."""
    value = tensor("queries", value, 4, FLOAT_DTYPES, keys)
    contiguous_rows("queries", value)
    B, H, S, D = shape
    given = tuple(value.shape) if given is None else given
    if given[0] != B or given[3] != D:
        raise ValueError(f"queries has shape {given}: expected ({B}, query heads, W, {D}), as keys have")
    if given[1] % H:
        raise ValueError(f"queries has {given[1]} heads: expected a multiple of {H}, the KV heads of keys")
    if given[2] > (S if W is None else W):
        most = f"at most {S}, the tokens of keys" if W is None else f"{W}"
        raise ValueError(f"queries has W = {given[2]} queries: expected {most}")
    if value.dtype != keys.dtype and keys.dtype.itemsize > 1:
        raise TypeError(f"queries has dtype {value.dtype}: expected {keys.dtype}, the dtype of keys")
    return value


def softmax_scale(value: object, head_dim: int) -> float:
    """`scale`, or 1/√head_dim for None."""
    return head_dim**-0.5 if value is None else number("scale", value)


def number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r}: expected a number")
    if not -math.inf < value < math.inf:  # NaN is neither; torch.compile cannot trace math.isfinite
        raise ValueError(f"{name} is {value}: expected a finite number")
    return float(value)


def integer(name: str, value: object, least: int, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} is {value!r}: expected an int")
    if value < least:
        raise ValueError(f"{name} is {value}: expected at least {least}")
    if most is not None and value > most:
        raise ValueError(f"{name} is {value}: expected at most {most}")


def scores(value: object, name: str = "scores") -> Tensor:
    value = tensor(name, value, 3, (torch.float32,))
    contiguous_rows(name, value)
    return value


def like_scores(name: str, value: object, dtype: torch.dtype, shape: tuple[int, ...], keys: Tensor) -> Tensor:
    """A tensor [B, H, S] of `dtype` beside keys of shape (B, H, S, D), rows contiguous."""
    value = tensor(name, value, 3, (dtype,), keys)
    contiguous_rows(name, value)
    if value.shape != shape[:3]:
        raise ValueError(f"{name} has shape {tuple(value.shape)}: expected {tuple(shape[:3])}, one per cached key")
    return value


WHOLE = 10**12


def share(keep: float) -> int:
    """A float from 0 to 1 in units of 10⁻¹²: the decimal that it was written as, 0.145 and not 0.14499999999999999.

    Arithmetic alone, so that torch.compile can trace it.
    """
    return int(keep * WHOLE + 0.5)


def kept_tokens(keep: int | float, S: int, sink: int, recent: int) -> int:
    """n: how many of S tokens `keep` keeps. An int counts tokens; a float is a share, rounded half up, at least 1."""
    integer("sink", sink, 0)
    integer("recent", recent, 0)
    if isinstance(keep, bool) or not isinstance(keep, (int, float, torch.SymInt)):
        raise TypeError(f"keep is {keep!r}: expected an int (tokens) or a float in (0, 1] (share)")
    if isinstance(keep, float):
        if not 0.0 < keep <= 1.0:  # NaN is refused, too
            raise ValueError(f"keep is {keep}: expected a float in (0, 1], or an int number of tokens")
        n = max((2 * share(keep) * S + WHOLE) // (2 * WHOLE), 1)
    else:
        if not 1 <= keep <= S:
            raise ValueError(f"keep is {keep}: expected an int from 1 to {S}, the number of tokens")
        n = keep
    if sink + recent > n:
        raise ValueError(f"sink + recent is {sink} + {recent}: expected at most the {n} tokens that are kept")
    return n


def kept_lengths(keep: int | float | Tensor, lengths: Tensor) -> Tensor:
    """int64 like `lengths` [B] or [B, H]: `kept_tokens` of each row's own length, or the caller's count of them. A row
    keeps no more than it has. Integers only, so every device rounds alike."""
    lengths = lengths.long()
    if isinstance(keep, float):
        # (lengths · 2 · share + WHOLE) // (2 · WHOLE), in two parts, whose products fit int64 whatever the length.
        upper, lower = divmod(2 * share(keep), 10**6)
        kept = (lengths * upper + (lengths * lower + WHOLE) // 10**6) // (2 * WHOLE // 10**6)
        return torch.minimum(kept.clamp(min=1), lengths)
    if isinstance(keep, Tensor):
        return torch.minimum(keep.long(), lengths if lengths.ndim == keep.ndim else lengths[:, None])
    return lengths.clamp(max=keep)


def written_apart(tensors: dict[str, Tensor], read: dict[str, Tensor] | None = None) -> None:
    """What a call writes in place: every element at an address of its own, and no byte in two of the tensors, or in
    one that it reads.

    Needs addresses, so it runs inside an op, not while torch.compile traces.
    """
    for name, value in tensors.items():
        no_internal_overlap(name, value)
    for i, one in enumerate(names := list(tensors)):
        for other in names[i + 1 :]:
            _no_mutual_overlap(one, tensors[one], other, tensors[other])
        for other, value in (read or {}).items():
            _no_mutual_overlap(other, value, one, tensors[one])


def no_internal_overlap(name: str, value: Tensor) -> None:
    """Writing needs every element at an address of its own. An expanded dimension has stride 0."""
    reach = 0
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)} and strides {value.stride()}: expected elements that do "
                    "not share memory, because the call writes in place (an expanded tensor cannot be compacted)"
                )
            reach += stride * (size - 1)


def _no_mutual_overlap(name: str, rows: Tensor, other_name: str, other: Tensor) -> None:
    """Rows [B, H, S, width] may lie in one allocation, side by side or interleaved, but no byte may be in both."""
    apart = other.data_ptr() - rows.data_ptr()
    if apart >= _extent(rows) or -apart >= _extent(other):
        return
    strides, other_strides = ([x.element_size() * s for s in x.stride()[:3]] for x in (rows, other))
    if strides == other_strides and rows.shape[:3] == other.shape[:3]:
        # Interleaved: the distance between a row of one and one of the other is `apart` plus some steps along each
        # stride. As neither overlaps itself, only the two step counts around an exact hit can bring rows together.
        distances = {apart}
        for stride, count in sorted(zip(strides, rows.shape[:3], strict=True), reverse=True):
            if count > 1:
                steps = {d: (d // stride, d // stride + 1) for d in distances}
                distances = {d - max(1 - count, min(s, count - 1)) * stride for d, pair in steps.items() for s in pair}
        width, other_width = (x.element_size() * x.shape[3] for x in (rows, other))
        if all(d >= width or -d >= other_width for d in distances):
            return
    raise ValueError(
        f"{other_name} shares memory with {name} (their first elements are {apart} bytes apart): expected separate "
        "memory, because the call writes in place"
    )


def _extent(value: Tensor) -> int:
    """Bytes from the first to behind the last element."""
    return value.element_size() * (1 + sum(s * (n - 1) for s, n in zip(value.stride(), value.shape, strict=True)))


def rows_in_range(ok: Tensor, lengths: Tensor, S: int, table: Tensor | None, blocks: int, block_size: int) -> None:
    """`require` ok [1]; on the CPU the error names what is out of range."""
    if ok.device.type == "cpu" and not ok:
        least = 1 if lengths.ndim == 1 else 0  # a request has a token, one of its heads may have none left
        require(((lengths >= least) & (lengths <= S)).all(), "lengths", lengths, f"values from {least} to {S}")
        assert table is not None
        expected = f"blocks from 0 to {blocks - 1} wherever a request has tokens"
        raise ValueError(f"block_tables is {table.tolist() if table.numel() <= 64 else table}: expected {expected}")
    require(ok[0], "lengths or block_tables", lengths, f"lengths up to {S}, blocks from 0 to {blocks - 1}")


def blocks_apart(table: Tensor, lengths: Tensor, blocks: int, block_size: int) -> None:
    """No block that holds a token is in the table twice."""
    lengths = lengths.view(*lengths.shape, *(1,) * (table.ndim - lengths.ndim))
    used = torch.arange(table.shape[-1], device=table.device) * block_size < lengths
    # Unused entries become numbers that occur once.
    apart = torch.arange(blocks, blocks + table.numel(), device=table.device).view(table.shape)
    order = torch.where(used, table, apart).flatten().sort().values
    expected = "no block twice: shared blocks (prefix caching) are not written; copy them first"
    require((order[1:] != order[:-1]).all(), "block_tables", table, expected)


def free_blocks(free: Tensor, taken: Tensor, num_blocks: int) -> None:
    """The first `taken` of a list of free blocks are there, lie in the cache, and are different ones."""
    F = free.shape[0]
    require(taken <= F, "free", free, f"enough blocks for the kept tokens, more than these {F}")
    place = torch.arange(F, device=free.device)
    used = place < taken
    expected = f"blocks from 0 to {num_blocks - 1}"
    require((~used | ((free >= 0) & (free < num_blocks))).all(), "free", free, expected)
    order = torch.where(used, free, num_blocks + place).sort().values
    require((order[1:] != order[:-1]).all(), "free", free, "no block twice")


def indices_ascend(indices: Tensor, ends: Tensor | int) -> None:
    """Rows [B, H, n] ascend strictly below `ends`, S or the tokens of each request [B] or row [B, H]; -1 comes last."""
    first, then = indices[..., :-1], indices[..., 1:]
    in_order = ((then == -1) | ((then > first) & (first >= 0))).all()
    most = f"{ends - 1}" if isinstance(ends, int) else "its own last token"
    if isinstance(ends, Tensor):
        ends = ends.view(*ends.shape, *(1,) * (3 - ends.ndim))
    in_range = ((indices >= -1) & (indices < ends)).all()
    expected = f"every row to ascend strictly within 0 to {most}, with -1 only as padding at its end"
    require(in_order & in_range, "indices", indices, expected)


def require(condition: Tensor, name: str, value: Tensor, expected: str) -> None:
    """Tensor values must satisfy `condition` (a bool scalar). On the CPU: a ValueError.

    On a GPU reading the answer would stall the host, so it is asserted on the device, in stream order ahead of the
    first write, as torch's own indexing does: the error surfaces at the next synchronisation. So it is where
    torch.compile traces, which has no answer yet.
    """
    if condition.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(condition, f"kvevict: {name} is out of range: expected {expected}")
    elif not condition:
        raise ValueError(f"{name} is {value.tolist() if value.numel() <= 64 else value}: expected {expected}")

"""Input checks of the ops. Each raises a TypeError or ValueError that names the argument, its value and what was
expected. Checks of shapes, dtypes and strides run on the host; checks of tensor values are `require`d."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
ROW_DTYPES = (*FLOAT_DTYPES, torch.int8, torch.uint8)
MAX_HEAD_DIM = 576


def tensor(name: str, value: object, ndim: int, dtypes: tuple[torch.dtype, ...], like: Tensor | None = None) -> Tensor:
    """A non-empty tensor of `ndim` dimensions and one of `dtypes`, without grad, on the device of `like`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {type(value).__name__}: expected a torch.Tensor")
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


def lengths(value: object, like: Tensor) -> Tensor:
    """The lengths argument: an int32 or int64 tensor [B] beside `like` [B, ...]. Its values: `lengths_within`."""
    value = tensor("lengths", value, 1, (torch.int32, torch.int64), like)
    if value.shape[0] != like.shape[0]:
        raise ValueError(f"lengths has shape {tuple(value.shape)}: expected ({like.shape[0]},), one per request")
    return value.contiguous()


def queries(value: object, keys: Tensor, W: int | None = None) -> Tensor:
    """Queries [B, Hq, W, D] beside keys [B, H, S, D]: the last W of the sequence, for whole GQA groups."""
    value = tensor("queries", value, 4, FLOAT_DTYPES, keys)
    contiguous_rows("queries", value)
    B, H, S, D = keys.shape
    if value.shape[0] != B or value.shape[3] != D:
        raise ValueError(f"queries has shape {tuple(value.shape)}: expected ({B}, query heads, W, {D}), as keys have")
    if value.shape[1] % H:
        raise ValueError(f"queries has {value.shape[1]} heads: expected a multiple of {H}, the KV heads of keys")
    if value.shape[2] > (S if W is None else W):
        most = f"at most {S}, the tokens of keys" if W is None else f"{W}"
        raise ValueError(f"queries has W = {value.shape[2]} queries: expected {most}")
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


def integer(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} is {value!r}: expected an int")
    if value < least:
        raise ValueError(f"{name} is {value}: expected at least {least}")


def scores(value: object, name: str = "scores") -> Tensor:
    value = tensor(name, value, 3, (torch.float32,))
    contiguous_rows(name, value)
    return value


def like_scores(name: str, value: object, dtype: torch.dtype, keys: Tensor) -> Tensor:
    """A tensor [B, H, S] of `dtype` beside keys [B, H, S, D], rows contiguous."""
    value = tensor(name, value, 3, (dtype,), keys)
    contiguous_rows(name, value)
    if value.shape != keys.shape[:3]:
        raise ValueError(f"{name} has shape {tuple(value.shape)}: expected {tuple(keys.shape[:3])}, one per cached key")
    return value


@torch.compiler.assume_constant_result
def keep_fraction(keep: float) -> tuple[int, int]:
    """A float keep as the decimal that it was written as: 0.145 is 29/200, not 0.14499999999999999."""
    return Fraction(keep).limit_denominator(1_000_000).as_integer_ratio()


def kept_tokens(keep: int | float, S: int, sink: int, recent: int) -> int:
    """n: how many of S tokens `keep` keeps. An int counts tokens; a float is a share, rounded half up, at least 1."""
    integer("sink", sink, 0)
    integer("recent", recent, 0)
    if isinstance(keep, bool) or not isinstance(keep, (int, float, torch.SymInt)):
        raise TypeError(f"keep is {keep!r}: expected an int (tokens) or a float in (0, 1] (share)")
    if isinstance(keep, float):
        if math.isnan(keep) or not 0.0 < keep <= 1.0:
            raise ValueError(f"keep is {keep}: expected a float in (0, 1], or an int number of tokens")
        p, q = keep_fraction(keep)
        n = max((2 * p * S + q) // (2 * q), 1)
    else:
        if not 1 <= keep <= S:
            raise ValueError(f"keep is {keep}: expected an int from 1 to {S}, the number of tokens")
        n = keep
    if sink + recent > n:
        raise ValueError(f"sink + recent is {sink} + {recent}: expected at most the {n} tokens that are kept")
    return n


def kept_lengths(keep: int | float, lengths: Tensor) -> Tensor:
    """[B] int64: `kept_tokens` of each request's own length. Integers only, so every device rounds alike."""
    lengths = lengths.long()
    if isinstance(keep, float):
        p, q = keep_fraction(keep)
        return ((lengths * (2 * p) + q) // (2 * q)).clamp(min=1)
    return lengths.clamp(max=keep)


def no_internal_overlap(name: str, value: Tensor) -> None:
    """Writing needs every element at an address of its own. An expanded dimension has stride 0.

    Runs inside the op: torch.compile cannot sort symbolic strides.
    """
    reach = 0
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)} and strides {value.stride()}: expected elements that do "
                    "not share memory, because the call writes in place (an expanded tensor cannot be compacted)"
                )
            reach += stride * (size - 1)


def no_mutual_overlap(keys: Tensor, values: Tensor) -> None:
    """Keys and values may lie in one allocation, side by side or interleaved, but no byte may be in both.

    Needs addresses, so it runs inside the op, not while torch.compile traces.
    """
    size = keys.element_size()
    apart = values.data_ptr() - keys.data_ptr()
    if apart >= _extent(keys) or -apart >= _extent(values):
        return
    if keys.stride()[:3] == values.stride()[:3] and apart % size == 0:
        # Interleaved: the distance between a row of values and one of keys is `apart` plus some steps along each
        # stride. As neither overlaps itself, only the two step counts around an exact hit can bring rows together.
        distances = {apart // size}
        for stride, count in sorted(zip(keys.stride()[:3], keys.shape[:3], strict=True), reverse=True):
            if count > 1:
                steps = {d: (d // stride, d // stride + 1) for d in distances}
                distances = {d - max(1 - count, min(s, count - 1)) * stride for d, pair in steps.items() for s in pair}
        if all(d >= keys.shape[3] or -d >= values.shape[3] for d in distances):
            return
    raise ValueError(
        f"values shares memory with keys (their first elements are {apart} bytes apart): expected separate memory, "
        "because the call writes in place"
    )


def _extent(value: Tensor) -> int:
    """Bytes from the first to behind the last element."""
    return value.element_size() * (1 + sum(s * (n - 1) for s, n in zip(value.stride(), value.shape, strict=True)))


def lengths_within(lengths: Tensor | None, S: int) -> None:
    if lengths is not None:
        require(((lengths >= 1) & (lengths <= S)).all(), "lengths", lengths, f"values from 1 to {S}")


def counts_positive(keep: Tensor | None, lengths: Tensor | None) -> None:
    """A caller's counts, keep [B, H], are at least 1, or 0 for a head without a token."""
    if keep is None or keep.ndim == 1:
        return
    least = 1 if lengths is None else (lengths if lengths.ndim == 2 else lengths[:, None]).clamp(max=1)
    require((keep >= least).all(), "keep", keep, "counts of at least 1, or 0 for a head without a token")


def blocks_valid(table: Tensor, lengths: Tensor, cache: Tensor, written: bool) -> None:
    """Every block that holds a token is one of the cache [blocks, H, block_size, D]; written: and of one request."""
    blocks, _, block_size, _ = cache.shape
    used = torch.arange(table.shape[1], device=table.device) * block_size < lengths[:, None]
    inside = ((table >= 0) & (table < blocks)) | ~used
    require(inside.all(), "block_tables", table, f"blocks from 0 to {blocks - 1} wherever a request has tokens")
    if written:
        # Unused entries become numbers that occur once.
        apart = torch.arange(blocks, blocks + table.numel(), device=table.device).view(table.shape)
        order = torch.where(used, table, apart).flatten().sort().values
        expected = "no block twice: shared blocks (prefix caching) are not written; copy them first"
        require((order[1:] != order[:-1]).all(), "block_tables", table, expected)


def indices_ascend(indices: Tensor, S: int) -> None:
    first, then = indices[..., :-1], indices[..., 1:]
    in_order = ((then == -1) | ((then > first) & (first >= 0))).all()
    in_range = ((indices >= -1) & (indices < S)).all()
    expected = f"every row to ascend strictly within 0 to {S - 1}, with -1 only as padding at its end"
    require(in_order & in_range, "indices", indices, expected)


def require(condition: Tensor, name: str, value: Tensor, expected: str) -> None:
    """Tensor values must satisfy `condition` (a bool scalar). On the CPU: a ValueError.

    On a GPU reading the answer would stall the host, so it is asserted on the device, in stream order ahead of the
    first write, as torch's own indexing does: the error surfaces at the next synchronisation.
    """
    if condition.device.type != "cpu":
        torch._assert_async(condition, f"kvevict: {name} is out of range: expected {expected}")
    elif not condition:
        raise ValueError(f"{name} is {value.tolist() if value.numel() <= 64 else value}: expected {expected}")

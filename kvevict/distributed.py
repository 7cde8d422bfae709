"""Eviction from a cache whose sequence is spread over the ranks of a process group (context parallelism).

Every rank holds keys [B, H, L, D] and values [B, H, L, Dv] of some tokens, and `positions` says which: [L], the same
for all heads, or [B, H, L]; int32 or int64; ascending, -1 behind the last token. Ranks may hold unlike numbers of them,
or none. So any layout will do in which a rank's own tokens ascend: those of `positions_of`, and what an earlier
eviction left. Layers that lie in one tensor can go into one call, as more of B: its collectives are those of one layer.

What is kept is what the ops keep of the whole sequence in one process, exactly, on any number of ranks:

    anchor      one all-reduce of [B, H, D + 1] int64: sums of unit keys in fixed point (`ops.anchor_sums`)
    selection   one all-reduce of [B, H, 256] int32 for each digit of 8 bits of (score, position): the last token that
                is kept, exactly; no two tokens have the same pair, so ties go to the lower position
    move        each rank moves its own rows; nothing is sent

Only integers are ever added over ranks, so that nothing depends on an order. No shape depends on a value, and nothing
is read on the host, but in `rebalance`.

Protection and lengths are about positions: the first `sink`, the last `recent` before `tokens` or a request's length. A
float `keep` is a share of that length, too, whatever an earlier eviction left of it.

group: a process group, a DeviceMesh of one dimension, or None, the default group. All ranks of it make the same call,
with the same arguments but for what they hold. Each call begins with an all-reduce of two numbers, which says whether
they do: if not, or where a rank's own arguments are wrong, every rank raises before anything is written (on a GPU the
others assert it on the device). With TORCH_DISTRIBUTED_DEBUG=INFO or DETAIL, positions are checked as well: that they
ascend, and that no two ranks hold the same one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from kvevict import ops, validate

_DIGIT = 8  # bits
_SCORE_BITS = 32
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its name since torch 2.13


class Shard(NamedTuple):
    """What a rank holds after an eviction. Slots beyond `counts` hold no token."""

    keys: Tensor  # [B, H, c, D]
    values: Tensor  # [B, H, c, Dv]
    positions: Tensor  # [B, H, c] int64, ascending, -1 behind the last token
    counts: Tensor  # [B, H] int64: tokens; they differ by head and rank, and may be 0


Group = dist.ProcessGroup | DeviceMesh | None


def positions_of(layout: str, tokens: int, ranks: int, rank: int, block: int = 1) -> Tensor:
    """The tokens that a rank holds when nothing has been evicted yet.

    Args:
        layout: "contiguous": runs of tokens, one a rank. "zigzag": twice as many runs, of which rank r has run r and
            run r from the end, as torch's context_parallel deals them. "striped": blocks of `block` tokens in turn, as
            decode context parallelism of vLLM and SGLang deals them.
        tokens, ranks, rank: of the sequence; of the group; this one's number.
        block: of "striped".

    Returns:
        [L] int64, ascending; empty where there are too few tokens for this rank.

    Raises:
        TypeError, ValueError: an unknown layout, numbers out of range, a block of another layout than "striped".
    """
    validate.one_of("layout", layout, ("contiguous", "zigzag", "striped"))
    for name, value, least in (("tokens", tokens, 1), ("ranks", ranks, 1), ("rank", rank, 0), ("block", block, 1)):
        validate.integer(name, value, least)
    validate.integer("rank", rank, 0, ranks - 1)
    if block > 1 and layout != "striped":
        raise ValueError(f"block is {block}: expected 1, because layout is {layout!r}")
    every = torch.arange(tokens)
    if layout == "striped":
        return every[every // block % ranks == rank]
    runs = ranks if layout == "contiguous" else 2 * ranks
    run = every // -(-tokens // runs)
    own = run == rank
    return every[own if layout == "contiguous" else own | (run == runs - 1 - rank)]


def keydiff_compact(
    keys: Tensor,
    values: Tensor,
    *,
    positions: Tensor,
    tokens: int,
    group: Group,
    keep: int | float,
    sink: int = 0,
    recent: int = 0,
    heads: str = "each",
    anchor: str | Tensor = "unit",
    lengths: Tensor | None = None,
    inplace: bool = False,
) -> Shard:
    """`kvevict.keydiff_compact` of a sequence that is spread over ranks.

    Args:
        keys, values, positions, group: see the module; keys after RoPE.
        tokens: of the whole sequence, the longest request: positions are below it.
        keep, sink, recent, heads: as in `kvevict.topk_indices`, of the whole sequence; "each" or "shared", which takes
            every head's tokens to have the positions of head 0's.
        anchor: "unit", or a tensor [B, H, D], the same on every rank. Sums of raw keys are floats, whose last bits
            would depend on the ranks.
        lengths: [B] int32 or int64, the same on every rank: a request's tokens are those at positions below it.
        inplace: write into the caller's storage and return views of it.

    Returns:
        This rank's part of the kept tokens, min(n, L) slots wide, n being what `keep` keeps of `tokens`. Slots beyond
        counts hold zeros, in place what was there.

    Raises:
        TypeError, ValueError: on every rank, see the module.
    """
    part = _Part(keys, values, positions, tokens, group, lengths)

    def check() -> dict[str, object]:
        facts = part.check() | _check_selection(part, keep, sink, recent, heads, inplace)
        if isinstance(anchor, Tensor):
            B, H, _, D = part.keys.shape
            validate.tensor("anchor", anchor, 3, validate.FLOAT_DTYPES, part.keys)
            if anchor.shape != (B, H, D):
                raise ValueError(f"anchor has shape {tuple(anchor.shape)}: expected ({B}, {H}, {D}), one per KV head")
        elif anchor != "unit":
            raise ValueError(f"anchor is {anchor!r}: expected 'unit' or a tensor, because sums of raw keys are floats")
        return facts | {"anchor": isinstance(anchor, Tensor)}

    _agree(part.group, check)
    part.check_positions()
    held = part.held()
    if not isinstance(anchor, Tensor):
        sums, counts = ops.anchor_sums(part.keys, lengths=held)
        total = _sum(torch.cat([sums, counts[..., None]], -1), part.group)
        anchor = ops.anchor_mean(total[..., :-1], total[..., -1])
    scores = ops.keydiff_scores(part.keys, anchor=anchor, lengths=held)
    return _select_and_compact(part, scores, keep, sink, recent, heads, inplace)


def compact_by_scores(
    scores: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    positions: Tensor,
    tokens: int,
    group: Group,
    keep: int | float,
    sink: int = 0,
    recent: int = 0,
    heads: str = "each",
    lengths: Tensor | None = None,
    inplace: bool = False,
) -> Shard:
    """`kvevict.topk_indices` and `kvevict.compact` of a sequence that is spread over ranks.

    Args:
        scores: [B, H, L] float32 of this rank's tokens, last dimension contiguous; higher is kept, NaN is the worst.
        others: as in `keydiff_compact`; keys and values may be int8 and uint8 as well.

    Returns, raises: as there.
    """
    part = _Part(keys, values, positions, tokens, group, lengths, validate.ROW_DTYPES)

    def check() -> dict[str, object]:
        facts = part.check() | _check_selection(part, keep, sink, recent, heads, inplace)
        if keys.shape[2]:
            validate.like_scores("scores", scores, torch.float32, part.keys.shape, part.keys)
        return facts

    _agree(part.group, check)
    part.check_positions()
    if not keys.shape[2]:
        scores = torch.zeros(part.keys.shape[:3], device=part.keys.device)
    return _select_and_compact(part, scores, keep, sink, recent, heads, inplace)


def attention_mass(
    queries: Tensor,
    keys: Tensor,
    *,
    positions: Tensor,
    tokens: int,
    group: Group,
    scale: float | None = None,
    reduce: str = "mean",
    lengths: Tensor | None = None,
) -> Tensor:
    """`kvevict.attention_mass` of a window, over a sequence that is spread over ranks: scores for `compact_by_scores`.

    One collective: every rank gathers the others' log-sum-exps and adds them in the order of ranks. So all have the
    same softmax, which over another number of ranks differs by rounding.

    Args:
        queries: [B, Hq, W, D], the last W of the whole sequence, the same on every rank. Logits with the last W keys
            are held whole, [B, Hq, W, min(W, L)] float32.
        keys, positions, tokens, group, lengths: as in `keydiff_compact`.
        scale: of the logits; None is 1/√D.
        reduce: "sum", "mean" or "max", over the queries and the heads of the group.

    Returns:
        [B, H, L] float32; -inf where there is no token.

    Raises:
        TypeError, ValueError: on every rank, see the module.
    """
    part = _Part(keys, keys, positions, tokens, group, lengths)

    def check() -> dict[str, object]:
        facts = part.check()
        validate.one_of("reduce", reduce, ("sum", "mean", "max"))
        B, H, _, D = part.keys.shape
        validate.queries(queries, (B, H, tokens, D), part.keys)
        number = validate.softmax_scale(scale, D)
        return facts | {"queries heads": queries.shape[1], "W": queries.shape[2], "scale": number, "reduce": reduce}

    _agree(part.group, check)
    part.check_positions()
    keys, positions, (B, HQ, W, D) = part.keys, part.positions, queries.shape
    H, L = keys.shape[1:3]
    G, near = HQ // H, min(W, L)
    scale = validate.softmax_scale(scale, D)

    # Query w is token first + w. All queries see the keys before `first`: W · G queries of one token each.
    ends = part.ends()[..., 0]  # [B, 1]
    first, seeing = (ends - W).clamp(min=0), ends.clamp(max=W)
    far = ((positions >= 0) & (positions < first[..., None])).sum(-1)
    as_group = queries.reshape(B, HQ * W, 1, D)
    far_lse = ops.attention_lse(as_group, keys, scale=scale, lengths=far).view(B, H, G, W)

    # The others, at most W a rank, lie behind those.
    slots = far[..., None] + torch.arange(near, device=keys.device)
    at = slots.clamp(max=L - 1)
    where = positions.gather(-1, at)
    there = (slots < L) & (where >= 0) & (where < ends[..., None])
    rows = keys.view(torch.uint8) if keys.element_size() == 1 else keys
    near_keys = rows.gather(2, at[..., None].expand(B, H, near, D)).view(keys.dtype).float()
    near_keys = near_keys.masked_fill(~there[..., None], 0.0)
    token = first[..., None] + torch.arange(W, device=keys.device)  # [B, 1, W]
    sees = there[..., None, :] & (where[..., None, :] <= token[..., None])  # [B, H, W, near]
    logits = queries.float().view(B, H, G, W, D) @ near_keys[:, :, None].transpose(-1, -2) * scale
    logits = logits.masked_fill(~sees[:, :, None], float("-inf"))

    lse = _gather(torch.logaddexp(far_lse, logits.logsumexp(-1)), part.group).logsumexp(0)
    is_query = (torch.arange(W, device=keys.device) < seeing[..., None])[:, :, None]  # [B, 1, 1, W]
    lse = lse.masked_fill(~is_query, float("inf"))  # draws nothing
    weights = (logits - lse[..., None]).exp()  # [B, H, G, W, near]
    whole_lse = lse.reshape(B, HQ * W, 1)
    over = "max" if reduce == "max" else "sum"
    mass = ops.attention_mass(as_group, keys, scale=scale, lse=whole_lse, reduce=over, lengths=far)
    drawn = weights.amax((2, 3)) if reduce == "max" else weights.sum((2, 3))
    mass = mass.masked_fill(mass == float("-inf"), 0.0)
    mass = mass.scatter_add(-1, at, drawn.masked_fill(~there, 0.0))  # 0 there so far
    if reduce == "mean":
        mass = mass / (seeing * G)[..., None]
    return mass.masked_fill(~part.present(), float("-inf"))


def decode_attention(queries: Tensor, shard: Shard, *, group: Group, scale: float | None = None) -> Tensor:
    """`kvevict.decode_attention` of one query over the tokens of all ranks.

    One collective: every rank gathers the others' outputs and log-sum-exps, [B, Hq, Dv + 1] float32, and adds them in
    the order of ranks. A rank's own output is of the queries' dtype.

    Args:
        queries: [B, Hq, 1, D], the same on every rank, which sees all tokens of the shards.
        shard: what this rank holds, the new token on one of the ranks.
        scale: of the logits; None is 1/√D.

    Returns:
        [B, Hq, 1, Dv] in the queries' dtype (bfloat16 for float8 queries), the same bits on every rank; 0 where no rank
        has a token of that head.

    Raises:
        TypeError, ValueError: on every rank, see the module.
    """
    group = process_group(group)

    def check() -> dict[str, object]:
        keys, values = _check_shard(shard)
        B, H, _, D = keys.shape
        validate.queries(queries, (B, H, 1, D), keys)
        number = validate.softmax_scale(scale, D)
        return _facts(keys, values) | {"query heads": queries.shape[1], "scale": number}

    _agree(group, check)
    out, lse = ops.decode_attention(
        queries, shard.keys, shard.values, scale=scale, lengths=shard.counts, return_lse=True
    )
    parts = _gather(torch.cat([out.float(), lse[..., None]], -1), group)
    lses = parts[..., -1:]
    largest = lses.amax(0)
    weights = (lses - largest.masked_fill(largest == float("-inf"), 0.0)).exp()
    merged = (parts[..., :-1] * weights).sum(0) / weights.sum(0)
    return merged.masked_fill(largest == float("-inf"), 0.0).to(out.dtype)


def rebalance(shard: Shard, *, group: Group) -> Shard:
    """Even out the counts: of no head does a rank then hold more than one token more than another.

    Only the surplus travels, the highest positions of a rank, K, V and position of a token beside each other, in one
    all_to_all_single. Counts are read on the host, here alone: shapes depend on them.

    Args:
        shard: what this rank holds.

    Returns:
        The same tokens over all ranks, in new tensors, as wide as the longest row of any rank; zeros behind counts.

    Raises:
        TypeError, ValueError: on every rank, see the module.
    """
    group = process_group(group)

    def check() -> dict[str, object]:
        return _facts(*_check_shard(shard))

    _agree(group, check)
    ranks, rank = group.size(), dist.get_rank(group)
    device, (B, H, _, _) = shard.keys.device, shard.keys.shape
    R = B * H
    counts = _gather(shard.counts.flatten(), group).cpu()  # [ranks, R]
    total = counts.sum(0)
    room = total // ranks + (torch.arange(ranks)[:, None] < total % ranks)
    surplus, lack = (counts - room).clamp(min=0), (room - counts).clamp(min=0)
    # Surpluses and lacks lie end to end in the order of ranks: where two overlap, so much goes from one to the other.
    surplus_end, lack_end = surplus.cumsum(0)[:, None], lack.cumsum(0)[None]
    overlap = torch.minimum(surplus_end, lack_end) - torch.maximum(surplus_end - surplus[:, None], lack_end - lack)
    moved = overlap.clamp(min=0)  # [from, to, R]
    stay = counts[rank] - surplus[rank]

    widths = [x.shape[-1] * x.element_size() for x in (shard.keys, shard.values)]
    packed = torch.cat(
        [x.flatten(0, 1).contiguous().view(torch.uint8) for x in (*shard[:2], shard.positions[..., None])], -1
    )
    row, slot = (x.to(device) for x in _rows_and_slots(moved[rank], stay))
    outgoing = packed[row, slot]
    sent, received = moved[rank].sum(-1).tolist(), moved[:, rank].sum(-1).tolist()
    incoming = outgoing.new_empty((sum(received), packed.shape[-1]))
    dist.all_to_all_single(incoming, outgoing, received, sent, group=group)

    capacity = max(int(room.max()), 1)
    held = packed.new_zeros((R, max(capacity, packed.shape[1]), packed.shape[-1]))
    held[:, : packed.shape[1]] = packed
    row, slot = (x.to(device) for x in _rows_and_slots(moved[:, rank], stay))
    held[row, slot] = incoming
    counts = room[rank].to(device)
    none = torch.arange(held.shape[1], device=device) >= counts[:, None]
    where = held[..., sum(widths) :].clone(memory_format=torch.contiguous_format).view(torch.int64)[..., 0]
    order = where.masked_fill(none, torch.iinfo(torch.int64).max).argsort(-1)[:, :capacity]
    held = held.masked_fill(none[..., None], 0).gather(1, order[..., None].expand(-1, -1, held.shape[-1]))
    keys, values = (
        x.clone(memory_format=torch.contiguous_format).view(shard.keys.dtype).view(B, H, capacity, -1)
        for x in held[..., : sum(widths)].split(widths, -1)
    )
    where = where.masked_fill(none, -1).gather(-1, order).view(B, H, capacity)
    return Shard(keys, values, where, counts.view(B, H))


def _rows_and_slots(counts: Tensor, begin: Tensor) -> tuple[Tensor, Tensor]:
    """For counts [others, R] of tokens that go to, or come from, other ranks, in the order of these and then of rows:
    in which row each lies and in which of its slots, from begin [R] on."""
    others, R = counts.shape
    flat = counts.flatten()
    row = torch.arange(R).repeat(others).repeat_interleave(flat)
    first = (begin + counts.cumsum(0) - counts).flatten() - (flat.cumsum(0) - flat)
    return row, first.repeat_interleave(flat) + torch.arange(int(flat.sum()))


class _Part:
    """What a rank holds of a sequence, as the caller gives it; valid once `check` has returned. A rank without tokens
    gets a slot that holds none."""

    def __init__(self, keys, values, positions, tokens, group, lengths, dtypes=validate.FLOAT_DTYPES) -> None:
        self.keys, self.values, self.positions = keys, values, positions
        self.tokens, self.group, self.lengths, self.dtypes = tokens, process_group(group), lengths, dtypes

    def check(self) -> dict[str, object]:
        """What must be the same on all ranks."""
        validate.integer("tokens", self.tokens, 1, 2**31 - 1)  # a position and a score's 32 bits are one int64
        for name in ("keys", "values", "positions"):
            x = getattr(self, name)
            at = -1 if name == "positions" else 2
            if isinstance(x, Tensor) and x.ndim in (1, 3, 4) and x.ndim > at and x.shape[at] == 0:
                shape = list(x.shape)
                shape[at] = 1
                setattr(self, name, x.new_full(shape, -1 if name == "positions" else 0))
        keys = self.keys = validate.cache("keys", self.keys, self.dtypes)
        self.values = validate.cache("values", self.values, self.dtypes, like=keys)
        B, H, L, D = keys.shape
        ndim = 3 if isinstance(self.positions, Tensor) and self.positions.ndim == 3 else 1
        positions = validate.tensor("positions", self.positions, ndim, (torch.int32, torch.int64), keys)
        if positions.shape not in ((L,), (B, H, L)):
            raise ValueError(f"positions has shape {tuple(positions.shape)}: expected ({L},) or ({B}, {H}, {L})")
        self.positions = positions.long().contiguous().expand(B, H, L)
        facts = {"tokens": self.tokens, "lengths": self._check_lengths(B), "positions are checked": self.asked_for()}
        return _facts(keys, self.values) | facts

    def _check_lengths(self, B: int) -> object:
        if self.lengths is None:
            return False
        lengths = self.lengths = validate.tensor("lengths", self.lengths, 1, (torch.int32, torch.int64), self.keys)
        if lengths.shape != (B,):
            raise ValueError(f"lengths has shape {tuple(lengths.shape)}: expected ({B},), one per request")
        inside = ((lengths >= 1) & (lengths <= self.tokens)).all()
        validate.require(inside, "lengths", lengths, f"values from 1 to {self.tokens}")
        return True if lengths.device.type != "cpu" or torch.compiler.is_compiling() else tuple(lengths.tolist())

    def ends(self) -> Tensor:
        """[B, 1, 1] int64: the length of each request."""
        if self.lengths is None:
            return torch.full((self.keys.shape[0], 1, 1), self.tokens, device=self.keys.device)
        return self.lengths.long()[:, None, None]

    def present(self) -> Tensor:
        """[B, H, L] bool: which slots hold a token. As positions ascend, they are the first of a row."""
        return (self.positions >= 0) & (self.positions < self.ends())

    def held(self) -> Tensor:
        """[B, H] int64: how many."""
        return self.present().sum(-1)

    @staticmethod
    def asked_for() -> bool:
        """Whether the values of positions are to be checked, which costs collectives."""
        return not torch.compiler.is_compiling() and dist.get_debug_level() != dist.DebugLevel.OFF

    def check_positions(self) -> None:
        """The values of positions, where that is asked for: over all ranks, so that all raise."""
        if not self.asked_for():
            return
        positions, before = self.positions[..., 1:], self.positions[..., :-1]
        ascend = ((positions == -1) | ((positions > before) & (before >= 0))).all()
        inside = ((self.positions >= -1) & (self.positions < self.tokens)).all()
        _require(ascend & inside, f"to ascend below {self.tokens}, with -1 only behind the last", self.group)
        owners = torch.zeros((*positions.shape[:2], self.tokens), dtype=torch.int32, device=positions.device)
        owners.scatter_add_(-1, self.positions.clamp(min=0), (self.positions >= 0).int())
        _require((_sum(owners, self.group) <= 1).all(), "each to be on one rank only", self.group)


def _facts(keys: Tensor, values: Tensor) -> dict[str, object]:
    B, H, _, D = keys.shape
    return {"device": keys.device.type, "dtype": keys.dtype, "B": B, "H": H, "D": D, "Dv": values.shape[3]}


def _check_selection(part: _Part, keep, sink, recent, heads, inplace) -> dict[str, object]:
    validate.one_of("heads", heads, ("each", "shared"))
    validate.flag("inplace", inplace)
    if isinstance(keep, Tensor):
        raise TypeError("keep is Tensor: expected an int (tokens) or a float in (0, 1] (share)")
    validate.kept_tokens(keep, part.tokens, sink, recent)
    if heads == "shared" and part.positions.stride(1):  # not one list for all heads
        alike = (part.positions == part.positions[:, :1]).all()
        validate.require(alike, "positions", part.positions, "those of all heads alike, as they share tokens")
    if inplace and not torch.compiler.is_compiling():  # which has no addresses; the move checks them
        validate.written_apart({"keys": part.keys, "values": part.values})
    return {"keep": keep, "sink": sink, "recent": recent, "heads": heads, "inplace": inplace}


def _check_shard(shard: Shard) -> tuple[Tensor, Tensor]:
    if not isinstance(shard, Shard):
        raise TypeError(f"shard is {type(shard).__name__}: expected a kvevict.distributed.Shard")
    keys = validate.cache("shard.keys", shard.keys, validate.ROW_DTYPES)
    values = validate.cache("shard.values", shard.values, validate.ROW_DTYPES, like=keys)
    for name, value, shape in (
        ("positions", shard.positions, keys.shape[:3]),
        ("counts", shard.counts, keys.shape[:2]),
    ):
        validate.tensor(f"shard.{name}", value, len(shape), (torch.int64,), keys)
        if value.shape != shape:
            raise ValueError(f"shard.{name} has shape {tuple(value.shape)}: expected {tuple(shape)}")
    if keys.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere the attention asserts it
        inside = ((shard.counts >= 0) & (shard.counts <= keys.shape[2])).all()
        validate.require(inside, "shard.counts", shard.counts, f"values from 0 to {keys.shape[2]}, the slots")
    return keys, values


def _select_and_compact(part: _Part, scores: Tensor, keep, sink: int, recent: int, heads: str, inplace: bool) -> Shard:
    positions, ends = part.positions, part.ends()
    n = validate.kept_tokens(keep, part.tokens, sink, recent)
    kept = validate.kept_lengths(keep, ends) if part.lengths is not None else torch.full_like(ends, n)
    if heads == "shared":
        total = scores[:, :1].clone()
        for h in range(1, scores.shape[1]):  # in head order, as one process adds
            total += scores[:, h : h + 1]
        scores, positions = total / scores.shape[1], positions[:, :1]
    B, H, L = part.keys.shape[:3]
    slots, held = _kept_slots(part, scores, positions, ends, kept, sink, recent, min(n, L))
    slots, held = slots.expand(B, H, -1), held.expand(B, H).contiguous()
    moved = ops.compact(part.keys, part.values, slots, inplace=inplace)
    where = part.positions.gather(-1, slots.clamp(min=0)).masked_fill(slots < 0, -1)
    return Shard(moved.keys, moved.values, where, held)


def _kept_slots(
    part: _Part, scores: Tensor, positions: Tensor, ends: Tensor, kept: Tensor, sink: int, recent: int, most: int
) -> tuple[Tensor, Tensor]:
    """This rank's part of what `topk_indices` keeps: [B, H, most] slots, -1 behind the last, and their number [B, H].
    ends, kept [B, 1, 1]: a request's length, and how many of its tokens stay."""
    B, H, _ = scores.shape
    sinks = kept.clamp(max=sink)
    recents = (kept - sinks).clamp(max=recent)
    limits = torch.cat([sinks, ends - recents, ends, kept - sinks - recents], 1)[..., 0]
    protected = (positions < sinks) | ((positions >= ends - recents) & (positions < ends))
    protected = ((positions >= 0) & protected).sum(-1, dtype=torch.int32)[..., None]
    before = summed = None
    bits = max(part.tokens - 1, 1).bit_length()
    left = _SCORE_BITS + bits  # of a token's number: the score's come before the position's
    while left > 0:
        width = min(_DIGIT, left)
        left -= width
        after = torch.empty((B, H, 5), dtype=torch.int64, device=scores.device)
        counts = torch.empty((B, H, 2**width), dtype=torch.int32, device=scores.device)
        torch.ops.kvevict.count_digits(scores, positions, limits, before, summed, bits, left, after, counts)
        if before is None:  # others take the places of protected tokens that an earlier cut has given up
            summed = _sum(torch.cat([counts, protected], -1), part.group)
            after[..., 1] += (sinks + recents)[..., 0] - summed[..., -1]
            before, summed = after, summed[..., :-1].contiguous()
        else:
            before, summed = after, _sum(counts, part.group)
    slots = torch.empty((B, H, most), dtype=torch.int64, device=scores.device)
    held = torch.empty((B, H), dtype=torch.int64, device=scores.device)
    torch.ops.kvevict.kept_slots(scores, positions, before, summed, bits, slots, held)
    return slots, held


# The group


def process_group(group: Group) -> dist.ProcessGroup:
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"group is a mesh of {group.ndim} dimensions: expected one of them, mesh[its name]")
        return group.get_group()
    group = dist.group.WORLD if group is None else group
    if group is None:
        raise ValueError("group is None: expected a process group, or a call of torch.distributed.init_process_group")
    if not isinstance(group, dist.ProcessGroup):  # new_group gives something else to ranks that are not in it
        raise TypeError(
            f"group is {type(group).__name__}: expected a process group with this rank, a DeviceMesh or None"
        )
    return group


def _sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Integers, in place."""
    dist.all_reduce(x, group=group)
    return x


def _gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[ranks, ...]"""
    out = x.new_empty(group.size() * x.numel())
    _all_gather(out, x.contiguous().view(-1), group=group)
    return out.view(group.size(), *x.shape)


def _agree(group: dist.ProcessGroup, check: Callable[[], dict[str, object]]) -> None:
    """Run a check of this rank's arguments, which gives what has to be the same on all ranks, and raise on all of them
    where it fails on one, or where they differ."""
    error, facts = None, {}
    try:
        facts = check()
    except Exception as found:  # whatever it is, the others wait
        error = found
    number = -1
    if error is None:
        number = 0
        for value in facts.values():
            number = (number * 1_000_003 + _code(value)) % (2**61 - 1)
    device = _device_of(group)
    both = torch.full((2,), number, dtype=torch.int64, device=device)
    both[1].neg_()
    dist.all_reduce(both, dist.ReduceOp.MAX, group=group)
    alike = both[0] == -both[1]
    if error is None and (torch.compiler.is_compiling() or device.type != "cpu"):
        torch._assert_async(alike, "kvevict: ranks of the group have unlike arguments, or wrong ones")
        return
    if device.type == "cpu" and not (alike and number >= 0):
        said: list = [None] * group.size()
        dist.all_gather_object(said, (None if error is None else str(error), facts), group=group)
        if error is None:
            raise ValueError(_difference(said))
    if error is not None:
        raise error


def _difference(said: list[tuple[str | None, dict[str, object]]]) -> str:
    """What the ranks said of their arguments, where not all is well: the first thing that is not."""
    for rank, (error, _) in enumerate(said):
        if error is not None:
            return f"on rank {rank} of the group: {error}"
    first = said[0][1]
    for rank, (_, facts) in enumerate(said):
        for name in {**first, **facts}:
            if facts.get(name) != first.get(name):
                said_here, said_first = facts.get(name), first.get(name)
                return f"{name} is {said_here} on rank {rank} of the group: expected {said_first}, as on rank 0"
    raise AssertionError("ranks that say the same have the same number")


def _code(value: object) -> int:
    if isinstance(value, torch.dtype):
        return validate.ROW_DTYPES.index(value)
    if isinstance(value, tuple):
        return sum(item * 31**i for i, item in enumerate(value))
    if isinstance(value, str):
        return sum(ord(letter) * 31**i for i, letter in enumerate(value))
    return int(value * 2**40) if isinstance(value, float) else int(value)  # type: ignore[call-overload]


def _require(condition: Tensor, expected: str, group: dist.ProcessGroup) -> None:
    """`condition` [] of the positions on every rank, or an error on all of them."""
    wrong = _sum((~condition).int(), group)
    if torch.compiler.is_compiling() or wrong.device.type != "cpu":
        torch._assert_async(wrong == 0, f"kvevict: positions are wrong: expected {expected}")
    elif wrong:
        raise ValueError(f"positions are wrong on {int(wrong)} of {group.size()} ranks: expected {expected}")


def _device_of(group: dist.ProcessGroup) -> torch.device:
    """Where the group's collectives take tensors."""
    if "nccl" not in dist.get_backend_config(group):  # not the backend, which is "undefined" where none was asked for
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())

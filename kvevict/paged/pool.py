"""A small paged cache manager for people without a serving engine: allocate, append, evict by any policy, free."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvevict import validate
from kvevict.paged.ops import paged_compact, paged_decode_attention
from kvevict.policies import Observed, Policy


class PoolExhausted(RuntimeError):
    """There are not as many free blocks as were asked for. Nothing has changed."""


@dataclass(frozen=True)
class PoolStatistics:
    """What a pool holds and has done."""

    blocks: int
    free_blocks: int
    requests: int
    idle_requests: int
    tokens: int  # cached now; with per_head in all layers and heads together
    tokens_seen: int  # by the requests that are there
    tokens_evicted: int  # by `evict`, since the pool was made; counted as `tokens` are
    requests_evicted: int  # by `require`, since the pool was made
    bytes: int  # of the whole pool


@dataclass
class _Request:
    """A row has blocks and a length of its own: one for everything, or per head one for each layer's heads in turn."""

    blocks: list[list[int]]
    lengths: list[int]
    seen: int = 0
    idle: bool = False
    last_use: int = 0


class PagedPool:
    """K and V of many requests in blocks of one allocation.

    Every layer and head of a request uses the same blocks; or, per_head, every head of every layer has blocks of its
    own, as many as its own tokens need.

    Attributes:
        key_cache, value_cache: [layers, num_blocks, block_size, kv_heads, head_dim]; per_head [num_blocks, block_size,
            1, head_dim].
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        layers: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        per_head: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        value_dim = head_dim if value_dim is None else value_dim
        for name, value in (("num_blocks", num_blocks), ("block_size", block_size), ("layers", layers),
                            ("kv_heads", kv_heads), ("head_dim", head_dim), ("value_dim", value_dim)):  # fmt: skip
            validate.integer(name, value, 1)
        if dtype not in validate.FLOAT_DTYPES:
            raise TypeError(f"dtype is {dtype}: expected one of {validate.FLOAT_DTYPES}")
        validate.flag("per_head", per_head)
        self.num_blocks, self.block_size, self.per_head = num_blocks, block_size, per_head
        self._layers, self._kv_heads = layers, kv_heads
        shape = (num_blocks, block_size, 1) if per_head else (layers, num_blocks, block_size, kv_heads)
        self.key_cache = torch.zeros(*shape, head_dim, dtype=dtype, device=device)
        self.value_cache = torch.zeros(*shape, value_dim, dtype=dtype, device=device)
        self._free = list(range(num_blocks - 1, -1, -1))
        self._requests: dict[Hashable, _Request] = {}
        self._clock = itertools.count(1)
        self._tokens_evicted = self._requests_evicted = 0

    def allocate(self, request: Hashable) -> None:
        """A new request without tokens.

        Raises:
            ValueError: it is there already.
        """
        if request in self._requests:
            raise ValueError(f"request is {request!r}: expected one that is not in the pool")
        rows = self._layers * self._kv_heads if self.per_head else 1
        self._requests[request] = _Request([[] for _ in range(rows)], [0] * rows, last_use=next(self._clock))

    def _known(self, request: Hashable) -> _Request:
        if request not in self._requests:
            raise ValueError(f"request is {request!r}: expected one of {list(self._requests)[:8]}")
        return self._requests[request]

    def _used(self, request: Hashable) -> _Request:
        state = self._known(request)
        state.idle, state.last_use = False, next(self._clock)
        return state

    def length(self, request: Hashable) -> int:
        """Tokens that are cached for a request; with per_head those of its longest head."""
        return max(self._known(request).lengths)

    def tokens_seen(self, request: Hashable) -> int:
        """Tokens that were appended to a request, evicted ones among them: the next token's position."""
        return self._known(request).seen

    def append(self, request: Hashable, keys: Tensor, values: Tensor) -> None:
        """Write T new tokens behind the others. Idle requests make room where the pool is full.

        Args:
            keys, values: [layers, kv_heads, T, head_dim], [layers, kv_heads, T, value_dim].

        Raises:
            PoolExhausted: no room; nothing has changed. ValueError, TypeError: unknown request, other shapes or dtype.
        """
        state = self._known(request)
        for name, value, cache in (("keys", keys, self.key_cache), ("values", values, self.value_cache)):
            validate.tensor(name, value, 4, (cache.dtype,), cache)
            expected = (self._layers, self._kv_heads, "T", cache.shape[-1])
            if any(size != e for size, e in zip(value.shape, expected, strict=True) if e != "T"):
                raise ValueError(f"{name} has shape {tuple(value.shape)}: expected {expected}")
        new = keys.shape[2]
        if values.shape[2] != new:
            raise ValueError(f"values has {values.shape[2]} tokens: expected {new}, as keys have")
        rows = list(zip(state.blocks, state.lengths, strict=True))
        missing = [-(-(length + new) // self.block_size) - len(blocks) for blocks, length in rows]
        was_idle, state.idle = state.idle, False  # it is not to make room for itself
        try:
            self.require(sum(missing))
        except PoolExhausted:
            state.idle = was_idle
            raise
        self._used(request)
        for own, count in zip(state.blocks, missing, strict=True):
            own += [self._free.pop() for _ in range(count)]
        table, lengths = self._tables(state.blocks), torch.tensor(state.lengths, device=keys.device)
        slots = lengths[:, None] + torch.arange(new, device=keys.device)
        blocks, slots = table.gather(1, slots // self.block_size), slots % self.block_size
        for value, cache in ((keys, self.key_cache), (values, self.value_cache)):
            value, cache = _as_bytes(value), _as_bytes(cache)
            if self.per_head:
                cache[blocks, slots, 0] = value.flatten(0, 1)
            else:
                cache[:, blocks[0], slots[0]] = value.transpose(1, 2)
        state.lengths = [length + new for length in state.lengths]
        state.seen += new

    def _tables(self, blocks: list[list[int]]) -> Tensor:
        """[rows, most] int64, 0 behind a row's blocks."""
        most = max(map(len, blocks))
        return torch.tensor([row + [0] * (most - len(row)) for row in blocks], device=self.key_cache.device)

    def block_table(self, requests: list[Hashable], layer: int | None = None) -> tuple[Tensor, Tensor]:
        """(block_tables [B, most] int32, lengths [B] int32) of these requests, for the paged ops; with per_head those
        of a layer, [B, kv_heads, most] and [B, kv_heads].

        Raises:
            ValueError: no requests, an unknown one, or one without tokens; no such layer.
        """
        if not requests:
            raise ValueError(f"requests is {requests!r}: expected at least one")
        states = [self._known(request) for request in requests]
        for request, state in zip(requests, states, strict=True):
            if not any(state.lengths):
                raise ValueError(f"request {request!r} has no tokens: expected at least one")
        rows = self._rows(layer)
        shape = [len(requests), self._kv_heads] if self.per_head else [len(requests)]
        table = self._tables([blocks for state in states for blocks in state.blocks[rows]]).int()
        lengths = [length for state in states for length in state.lengths[rows]]
        return table.view(*shape, -1), torch.tensor(lengths, dtype=torch.int32, device=table.device).view(shape)

    def _rows(self, layer: int | None) -> slice:
        """A layer's rows of a request."""
        if not self.per_head:
            return slice(0, 1)
        validate.integer("layer", layer, 0, self._layers - 1)
        assert layer is not None
        return slice(layer * self._kv_heads, (layer + 1) * self._kv_heads)

    def _caches(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values that a layer's block table is of."""
        if self.per_head:
            return self.key_cache, self.value_cache
        return self.key_cache[layer], self.value_cache[layer]

    def gather(self, request: Hashable, layer: int) -> tuple[Tensor, Tensor]:
        """A request's keys and values of a layer as dense copies [1, kv_heads, length, head_dim]; with per_head of its
        longest head's length, zeros behind the others."""
        table, lengths = self.block_table([request], layer)
        tokens = torch.arange(int(lengths.max()), device=table.device)
        blocks = table[..., tokens // self.block_size].long()
        found = []
        for cache in self._caches(layer):
            rows = _as_bytes(cache)[blocks, tokens % self.block_size]
            if self.per_head:  # [1, kv_heads, length, 1, head_dim]
                rows = rows.squeeze(3).masked_fill((tokens >= lengths[..., None])[..., None], 0)
            else:  # [1, length, kv_heads, head_dim]
                rows = rows.transpose(1, 2)
            found.append(rows.view(cache.dtype))
        return found[0], found[1]

    def attend(self, requests: list[Hashable], layer: int, queries: Tensor, *, scale: float | None = None) -> Tensor:
        """One query per request and head over all of its tokens: [B, Hq, 1, D] -> [B, Hq, 1, Dv]."""
        table, lengths = self.block_table(requests, layer)
        for request in requests:
            self._used(request)
        output = paged_decode_attention(queries, *self._caches(layer), table, lengths, scale=scale)
        assert isinstance(output, Tensor)
        return output

    def evict(
        self,
        request: Hashable,
        policy: Policy | Callable[[Tensor], Tensor],
        keep: int | float | Tensor,
        *,
        queries: Tensor | None = None,
    ) -> int:
        """Cut a request down to the tokens that the policy keeps in each layer; how many blocks that frees.

        Args:
            policy: a kvevict.policies.Policy; or a function of the keys [1, kv_heads, length, head_dim] that gives
                scores of the same shape without the last dimension: higher means keep. With per_head also a policy with
                heads="adaptive".
            keep: tokens (int) or share (float), of each head's own where they are unequal; with per_head also int32 or
                int64 counts [layers, kv_heads].
            queries: [layers, 1, Hq, W, head_dim], the last W of the request, for policies that read them.

        Raises:
            ValueError, TypeError: as in `kvevict.policies.Policy.select`; nothing has changed.
        """
        state = self._known(request)
        layers = range(self._layers)
        tables = [self.block_table([request], layer) for layer in layers]
        chooser = policy if isinstance(policy, Policy) else _Scored(score=policy)
        self._check_unequal(chooser, keep)
        if chooser.reads_positions and min(state.lengths) < state.seen:
            raise ValueError(
                f"policy is a {type(chooser).__name__} that reads positions, which no eviction follows: expected a "
                f"request that has kept all of its {state.seen} tokens"
            )
        chosen = []
        for layer in layers:  # all layers are chosen before one is written
            keys, values = self.gather(request, layer)
            own = keep[layer, None] if isinstance(keep, Tensor) else keep
            if isinstance(own, int):
                own = min(own, keys.shape[2])
            lengths = tables[layer][1] if len(set(state.lengths[self._rows(layer)])) > 1 else None
            seen = Observed(
                keys=keys,
                values=values,
                queries=None if queries is None else queries[layer],
                layer=layer,
                lengths=lengths,
            )
            chosen.append(chooser.select(seen, own).contiguous())
        left = [paged_compact(*self._caches(layer), *tables[layer], chosen[layer]).lengths for layer in layers]
        before, rows = sum(state.lengths), len(state.lengths)
        state.lengths = torch.cat(left).flatten().tolist()[:rows]
        self._tokens_evicted += before - sum(state.lengths)
        freed = []
        for blocks, length in zip(state.blocks, state.lengths, strict=True):
            used = -(-length // self.block_size)
            freed += blocks[used:]
            del blocks[used:]
        self._free += reversed(freed)
        return len(freed)

    def _check_unequal(self, policy: Policy, keep: int | float | Tensor) -> None:
        """Heads that keep unequal numbers of tokens need blocks of their own."""
        if not self.per_head and policy.heads == "adaptive":
            raise ValueError("policy has heads='adaptive': expected 'each' or 'shared', or a pool with per_head=True")
        if not isinstance(keep, Tensor):
            return
        if not self.per_head:
            raise ValueError("keep is a tensor: expected an int or a float, or a pool with per_head=True")
        validate.tensor("keep", keep, 2, (torch.int32, torch.int64), self.key_cache)
        if keep.shape != (self._layers, self._kv_heads):
            raise ValueError(f"keep has shape {tuple(keep.shape)}: expected ({self._layers}, {self._kv_heads})")

    def free(self, request: Hashable) -> None:
        """Forget a request and give its blocks back."""
        for blocks in self._known(request).blocks:
            self._free += reversed(blocks)
        del self._requests[request]

    def idle(self, request: Hashable) -> None:
        """Nobody waits for this request: `require` may forget it, until it is appended to or attended over again."""
        self._known(request).idle = True

    def require(self, blocks: int) -> list[Hashable]:
        """See to it that so many blocks are free: forget whole idle requests, the least recently used first.

        Returns:
            The requests that are gone.

        Raises:
            PoolExhausted: not even without all idle requests; then none is forgotten.
        """
        idle = sorted((state.last_use, name) for name, state in self._requests.items() if state.idle) if blocks else []
        free, gone = len(self._free), []
        for _, name in idle:
            if free >= blocks:
                break
            free += sum(map(len, self._requests[name].blocks))
            gone.append(name)
        if free < blocks:
            raise PoolExhausted(
                f"blocks is {blocks}: expected at most {free}; of {self.num_blocks} blocks {len(self._free)} are free "
                f"and {free - len(self._free)} belong to idle requests"
            )
        for name in gone:
            self.free(name)
        self._requests_evicted += len(gone)
        return gone

    def statistics(self) -> PoolStatistics:
        states = self._requests.values()
        return PoolStatistics(
            blocks=self.num_blocks,
            free_blocks=len(self._free),
            requests=len(self._requests),
            idle_requests=sum(state.idle for state in states),
            tokens=sum(sum(state.lengths) for state in states),
            tokens_seen=sum(state.seen for state in states),
            tokens_evicted=self._tokens_evicted,
            requests_evicted=self._requests_evicted,
            bytes=self.key_cache.nbytes + self.value_cache.nbytes,
        )


@dataclass(frozen=True, kw_only=True)
class _Scored(Policy):
    """A function of the keys as a policy that protects nothing."""

    score: Callable[[Tensor], Tensor]
    sink: int = 0
    recent: int = 0

    def scores(self, seen: Observed) -> Tensor:
        scores = self.score(seen.keys)
        if not isinstance(scores, Tensor) or scores.shape != seen.keys.shape[:3]:
            shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(f"policy gave {shape}: expected scores {tuple(seen.keys.shape[:3])}, one per key")
        return scores.float().contiguous()


def _as_bytes(rows: Tensor) -> Tensor:
    """torch neither gathers nor scatters float8; its rows move as bytes."""
    return rows.view(torch.uint8) if rows.element_size() == 1 else rows

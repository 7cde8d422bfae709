"""A small paged cache manager for people without a serving engine: allocate, append, evict by any policy, free."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

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
    tokens: int  # cached now
    tokens_seen: int  # by the requests that are there
    tokens_evicted: int  # by `evict`, since the pool was made
    requests_evicted: int  # by `require`, since the pool was made
    bytes: int  # of the whole pool


@dataclass
class _Request:
    blocks: list[int] = field(default_factory=list)
    length: int = 0
    seen: int = 0
    idle: bool = False
    last_use: int = 0


class PagedPool:
    """K and V of many requests in blocks of one allocation; every layer of a request uses the same blocks.

    Attributes:
        key_cache, value_cache: [layers, num_blocks, block_size, kv_heads, head_dim].
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
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        value_dim = head_dim if value_dim is None else value_dim
        for name, value in (("num_blocks", num_blocks), ("block_size", block_size), ("layers", layers),
                            ("kv_heads", kv_heads), ("head_dim", head_dim), ("value_dim", value_dim)):  # fmt: skip
            validate.integer(name, value, 1)
        if dtype not in validate.FLOAT_DTYPES:
            raise TypeError(f"dtype is {dtype}: expected one of {validate.FLOAT_DTYPES}")
        self.num_blocks, self.block_size = num_blocks, block_size
        self.key_cache = torch.zeros(layers, num_blocks, block_size, kv_heads, head_dim, dtype=dtype, device=device)
        self.value_cache = torch.zeros(layers, num_blocks, block_size, kv_heads, value_dim, dtype=dtype, device=device)
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
        self._requests[request] = _Request(last_use=next(self._clock))

    def _known(self, request: Hashable) -> _Request:
        if request not in self._requests:
            raise ValueError(f"request is {request!r}: expected one of {list(self._requests)[:8]}")
        return self._requests[request]

    def _used(self, request: Hashable) -> _Request:
        state = self._known(request)
        state.idle, state.last_use = False, next(self._clock)
        return state

    def length(self, request: Hashable) -> int:
        """Tokens that are cached for a request."""
        return self._known(request).length

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
            layers, _, _, heads, width = cache.shape
            if (value.shape[0], value.shape[1], value.shape[3]) != (layers, heads, width):
                raise ValueError(f"{name} has shape {tuple(value.shape)}: expected ({layers}, {heads}, T, {width})")
        new = keys.shape[2]
        if values.shape[2] != new:
            raise ValueError(f"values has {values.shape[2]} tokens: expected {new}, as keys have")
        missing = -(-(state.length + new) // self.block_size) - len(state.blocks)
        was_idle, state.idle = state.idle, False  # it is not to make room for itself
        try:
            self.require(missing)
        except PoolExhausted:
            state.idle = was_idle
            raise
        self._used(request)
        state.blocks += [self._free.pop() for _ in range(missing)]
        slots = torch.arange(state.length, state.length + new, device=keys.device)
        blocks = torch.tensor(state.blocks, device=keys.device)[slots // self.block_size]
        for value, cache in ((keys, self.key_cache), (values, self.value_cache)):
            _as_bytes(cache)[:, blocks, slots % self.block_size] = _as_bytes(value).transpose(1, 2)
        state.length += new
        state.seen += new

    def block_table(self, requests: list[Hashable]) -> tuple[Tensor, Tensor]:
        """(block_tables [B, most] int32, lengths [B] int32) of these requests, for the paged ops.

        Raises:
            ValueError: no requests, an unknown one, or one without tokens.
        """
        if not requests:
            raise ValueError(f"requests is {requests!r}: expected at least one")
        states = [self._known(request) for request in requests]
        for request, state in zip(requests, states, strict=True):
            if not state.length:
                raise ValueError(f"request {request!r} has no tokens: expected at least one")
        most = max(len(state.blocks) for state in states)
        table = [state.blocks + [0] * (most - len(state.blocks)) for state in states]
        device = self.key_cache.device
        lengths = torch.tensor([state.length for state in states], dtype=torch.int32, device=device)
        return torch.tensor(table, dtype=torch.int32, device=device), lengths

    def gather(self, request: Hashable, layer: int) -> tuple[Tensor, Tensor]:
        """A request's keys and values of a layer as dense copies [1, kv_heads, length, head_dim]."""
        table, lengths = self.block_table([request])
        found = []
        for cache in (self.key_cache, self.value_cache):
            rows = _as_bytes(cache[layer])[table[0].long()].flatten(0, 1)[: int(lengths[0])]
            found.append(rows.transpose(0, 1)[None].view(cache.dtype))
        return found[0], found[1]

    def attend(self, requests: list[Hashable], layer: int, queries: Tensor, *, scale: float | None = None) -> Tensor:
        """One query per request and head over all of its tokens: [B, Hq, 1, D] -> [B, Hq, 1, Dv]."""
        table, lengths = self.block_table(requests)
        for request in requests:
            self._used(request)
        keys, values = self.key_cache[layer], self.value_cache[layer]
        output = paged_decode_attention(queries, keys, values, table, lengths, scale=scale)
        assert isinstance(output, Tensor)
        return output

    def evict(
        self,
        request: Hashable,
        policy: Policy | Callable[[Tensor], Tensor],
        keep: int | float,
        *,
        queries: Tensor | None = None,
    ) -> int:
        """Cut a request down to the tokens that the policy keeps in each layer; how many blocks that frees.

        Args:
            policy: a kvevict.policies.Policy; or a function of the keys [1, kv_heads, length, head_dim] that gives
                scores of the same shape without the last dimension: higher means keep.
            keep: tokens (int) or share (float).
            queries: [layers, 1, Hq, W, head_dim], the last W of the request, for policies that read them.

        Raises:
            ValueError, TypeError: as in `kvevict.policies.Policy.select`; nothing has changed.
        """
        state = self._known(request)
        table, lengths = self.block_table([request])
        n = validate.kept_tokens(min(keep, state.length) if isinstance(keep, int) else keep, state.length, 0, 0)
        chooser = policy if isinstance(policy, Policy) else _Scored(score=policy)
        chosen = []
        for layer in range(self.key_cache.shape[0]):  # all layers are chosen before one is written
            keys, values = self.gather(request, layer)
            seen = Observed(keys=keys, values=values, queries=None if queries is None else queries[layer], layer=layer)
            chosen.append(chooser.select(seen, n))
        for layer, indices in enumerate(chosen):
            keys, values = self.key_cache[layer], self.value_cache[layer]
            paged_compact(keys, values, table, lengths, indices.contiguous())
        self._tokens_evicted += state.length - n
        state.length = n
        left = -(-n // self.block_size)
        freed = state.blocks[left:]
        self._free += reversed(freed)
        state.blocks = state.blocks[:left]
        return len(freed)

    def free(self, request: Hashable) -> None:
        """Forget a request and give its blocks back."""
        state = self._known(request)
        self._free += reversed(state.blocks)
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
            free += len(self._requests[name].blocks)
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
            tokens=sum(state.length for state in states),
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

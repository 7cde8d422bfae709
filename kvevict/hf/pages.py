"""What a cut leaves of a layer whose heads keep unequal numbers of tokens: pages, with a block table for each head.

A row is one KV head of one request. Nothing is written to pages once they are filled, so requests may share them, and
the next cut makes new ones. The tokens that came since, the tail, lie in ordinary keys and values, as many for each
head; attention over both is two attentions, joined by their log-sum-exps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvevict import ops
from kvevict.paged import compact_to_pages, paged_decode_attention

BLOCK_SIZE = 16  # tokens; half of a row's last block is empty in the mean


class Pages(NamedTuple):
    """The kept tokens of one layer, each row's in order. Beyond them only what a row's last block has left is held."""

    keys: Tensor  # [num_blocks, BLOCK_SIZE, 1, D]
    values: Tensor  # [num_blocks, BLOCK_SIZE, 1, Dv]
    tables: Tensor  # [B, H, columns] int32, -1 behind a row's blocks
    lengths: Tensor  # [B, H] int32, 0 where a head has kept nothing
    longest: int  # tokens of the longest row, at least 1
    most: int  # tokens of all rows of the request that has most

    def select_requests(self, requests: Tensor) -> Pages:
        """Request i becomes what requests[i] was; the pages of those that are gone stay until the next cut."""
        return self._replace(tables=self.tables[requests], lengths=self.lengths[requests])

    def dense(self) -> tuple[Tensor, Tensor, Tensor]:
        """Copies of keys and values [B, H, longest, D], zeros behind a row's last, and the lengths [B, H] int64."""
        lengths = self.lengths.long()
        held = inside(lengths, self.longest)[..., None]
        blocks = self.tables.clamp(min=0).long()
        keys, values = (
            torch.where(held, cache[:, :, 0][blocks].flatten(2, 3)[:, :, : self.longest], 0)
            for cache in (self.keys, self.values)
        )
        return keys, values, lengths

    def followed_by(self, keys: Tensor, values: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """`dense`, with the tail's keys and values [B, H, t, D] behind each row's own.

        Args:
            lengths: [B], tokens of each request's tail; None: t.

        Returns:
            keys, values [B, H, longest + t, D] and how many of a row's slots hold a token, [B, H] int64.
        """
        *before, held = self.dense()
        new = keys.shape[2]
        slots = (held[..., None] + torch.arange(new, device=held.device))[..., None]
        rows = (
            torch.nn.functional.pad(x, (0, 0, 0, new)).scatter_(2, slots.expand_as(tail), tail)
            for x, tail in zip(before, (keys, values), strict=True)
        )
        return next(rows), next(rows), held + (new if lengths is None else lengths[:, None])

    def attend(self, queries: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
        """Each of the queries [B, Hq, W, D] over all of its row: [B, Hq, W, Dv] and log-sum-exps [B, Hq, W] float32."""
        B, Hq, W, D = queries.shape
        # All W are queries of one token's group: the op's own W are causal. A kernel is compiled for each size of a
        # group, so chunks are padded to a few.
        padded = torch.nn.functional.pad(queries, (0, 0, 0, (1 << (W - 1).bit_length()) - W)) if W > 1 else queries
        rows = padded.reshape(B, -1, 1, D)
        found = paged_decode_attention(
            rows, self.keys, self.values, self.tables, self.lengths, scale=scale, return_lse=True
        )
        out, lse = (x.unflatten(1, (Hq, -1))[:, :, :W] for x in found)
        return out.squeeze(3), lse.squeeze(3)


def inside(lengths: Tensor, slots: int) -> Tensor:
    """[B, H, slots] bool: which slots hold a token, where each row has `lengths` [B, H] in front."""
    return torch.arange(slots, device=lengths.device) < lengths[..., None]


def pack(keys: Tensor, values: Tensor, indices: Tensor) -> Pages:
    """The tokens `indices` [B, H, m] (ascending, -1 behind a head's last) of a layer, in as many blocks as they need.

    The host reads the number of blocks, once, so that none is allocated in vain.
    """
    kept = (indices >= 0).sum(-1)
    blocks = ((kept + BLOCK_SIZE - 1) // BLOCK_SIZE).sum()
    num_blocks, longest, most = torch.stack([blocks, kept.max(), kept.sum(-1).max()]).tolist()
    num_blocks, longest = max(num_blocks, 1), max(longest, 1)  # all heads of a layer may have kept nothing
    key_cache, value_cache = (x.new_empty(num_blocks, BLOCK_SIZE, 1, x.shape[3]) for x in (keys, values))
    free = torch.arange(num_blocks, dtype=torch.int32, device=keys.device)
    columns = -(-longest // BLOCK_SIZE)
    indices = indices[:, :, :longest].contiguous()
    rows = compact_to_pages(keys, values, indices, key_cache, value_cache, free, columns=columns)
    return Pages(key_cache, value_cache, rows.block_tables, rows.lengths, longest, most)


def attention(
    pages: Pages,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor | None,
    *,
    scale: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of a layer's last W tokens over its pages and its tail, in which it is causal.

    Args:
        queries: [B, Hq, W, D], padding on the left: the last one is of a request's last token.
        keys, values: [B, H, t, D], [B, H, t, Dv], the tail, the W tokens' among them.
        lengths: [B], tokens of each request in front of its tail's slots, from 0; None: t.
        scale: of the logits; None is 1/√D.
        sinks: [Hq], a logit for each query head that takes its share of the softmax.

    Returns:
        [B, Hq, W, Dv]; anything finite for queries that are padding.
    """
    W = queries.shape[2]
    if lengths is not None:
        # The op has queries in front where a tail is shorter than W.
        missing = (W - lengths).clamp(min=0)[:, None]
        place = torch.arange(W, device=queries.device)
        queries = _moved(queries, (place + missing).clamp(max=W - 1))
    per_head = None if lengths is None else lengths[:, None].expand(keys.shape[:2])  # of which 0 is allowed
    tail = ops.decode_attention(queries, keys, values, scale=scale, lengths=per_head, return_lse=True)
    parts = (pages.attend(queries, scale), tail)
    total = torch.logaddexp(parts[0][1], parts[1][1])
    if sinks is not None:
        total = torch.logaddexp(total, sinks.float()[:, None])
    total = total.masked_fill(total == float("-inf"), 0.0)  # padding may have seen nothing
    shares = [part.float() * (lse - total).exp()[..., None] for part, lse in parts]
    out = (shares[0] + shares[1]).to(queries.dtype)
    return out if lengths is None else _moved(out, (place - missing).clamp(min=0))


def _moved(x: Tensor, places: Tensor) -> Tensor:
    """x [B, Hq, W, D] with what stood at places[b, w] at w."""
    return x.gather(2, places[:, None, :, None].expand_as(x))

"""Where a layer's cached tokens stood in their sequences, once some have been evicted: for policies that read it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Places:
    """What the last eviction kept, by position; all tokens behind it are a request's most recent ones, without a gap.

    Attributes:
        kept: [B, H, n] int64: positions of what it kept; of slots beyond a head's count, nothing.
        counts: [B, H] int64: how many that were.
        seen: [B] int64: tokens of each request so far, evicted ones among them, padding not.
    """

    kept: Tensor
    counts: Tensor
    seen: Tensor

    @classmethod
    def whole(cls, tokens: Tensor) -> Places:
        """Of a cache that has kept everything: tokens [B, H]."""
        none = torch.zeros_like(tokens)
        return cls(none[..., None][..., :0], none, tokens[:, 0])

    def of(self, tokens: Tensor, slots: int) -> Tensor:
        """[B, H, slots] int64: the positions of a cache that holds `tokens` [B, H], each head's in front."""
        slot = torch.arange(slots, device=tokens.device)
        recent = self.seen[:, None, None] - tokens[..., None] + slot
        kept = torch.nn.functional.pad(self.kept[..., :slots], (0, max(slots - self.kept.shape[2], 0)))
        return torch.where(slot < self.counts[..., None], kept, recent)

    def after(self, indices: Tensor, tokens: Tensor, slots: int) -> Places:
        """When of those slots an eviction keeps `indices` [B, H, n], -1 behind each head's own."""
        kept = self.of(tokens, slots).gather(2, indices.clamp(min=0))
        return Places(kept, (indices >= 0).sum(-1), self.seen)

    def advanced(self, count: int | Tensor) -> Places:
        """When so many tokens of every request, or [B] of each, have come; negative: were taken back."""
        return Places(self.kept, self.counts, self.seen + count)

    def select_requests(self, requests: Tensor) -> Places:
        """Request i becomes what requests[i] was."""
        return Places(*(x.index_select(0, requests) for x in (self.kept, self.counts, self.seen)))

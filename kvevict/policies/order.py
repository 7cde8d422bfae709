"""Policies that look at time or at nothing: most recent, least recently used, random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvevict import validate
from kvevict.policies.base import Policy
from kvevict.policies.observed import Observed


@dataclass(frozen=True, kw_only=True)
class Recency(Policy):
    """StreamingLLM: the first tokens and the most recent (arXiv 2309.17453). Keys keep their rotations."""

    def scores(self, seen: Observed) -> Tensor:
        return seen.order()


@dataclass(frozen=True, kw_only=True)
class LRU(Policy):
    """Evict the token whose last use, the last step at which it drew noticeable attention, is longest ago.

    Tokens that were never used go first, the oldest before the others.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"last_used"})

    def scores(self, seen: Observed) -> Tensor:
        used = seen.last_used
        assert used is not None
        return torch.where(used >= 0, used.float(), seen.order() - seen.sequence_length())


@dataclass(frozen=True, kw_only=True)
class Random(Policy):
    """A baseline: any tokens. A token's score follows from the seed, layer, request, head and position alone, so it is
    the same on every device and stays the same from one eviction to the next."""

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        validate.integer("seed", self.seed, 0)

    def scores(self, seen: Observed) -> Tensor:
        B, H, _ = seen.keys.shape[:3]
        rows = torch.arange(B * H, device=seen.keys.device).view(B, H, 1)
        base = (self.seed * 1009 + seen.layer) * 65537 % 0x7FFFFFFF  # a seed may be longer than an int64
        x = (seen.order().long() + (base + rows) * 16777259) % 0x7FFFFFFF
        for _ in range(3):  # xorshift and multiply, in 31 bits
            x = (x ^ (x >> 15)) * 0x2C1B3C6D % 0x7FFFFFFF
        return (x >> 7).float()  # 24 bits: exact in float32

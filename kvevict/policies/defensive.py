"""DefensiveKV: keep what any of the last queries may need, rather than what they need on average."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvevict import ops
from kvevict.policies.observed import Observed
from kvevict.policies.weighing import WeighsValues, windowed

FIRST = 0.9  # of the mean attention: its tokens go before all others
POOL = 5  # neighbours


@dataclass(frozen=True, kw_only=True)
class DefensiveKV(WeighsValues):
    """The most attention that any of the last 32 queries, of any head of the group, gives a token, and for all at least
    the mean of that; times the token's share of ‖W_O v‖₁. Each row of attention over the tokens before these queries is
    averaged over 5 neighbours and scaled back to its sum. Before all others go the tokens that hold the first 90 % of
    the mean attention, what the queries' own tokens draw being a part of it. Feng et al. (arXiv 2510.13334).

    The authors choose over the heads of a layer (heads="adaptive"), or of all layers: with `ModelWide`.

    Attributes:
        value_norms: "output" is the paper's.
    """

    heads: str = "adaptive"
    value_norms: str | None = "output"
    comparable: ClassVar[str] = "model"

    @property
    def window(self) -> int:
        return 32

    @property
    def protected(self) -> tuple[int, int]:
        return self.sink, max(self.recent, self.window)

    def scores(self, seen: Observed) -> Tensor:
        queries, keys = seen.last_queries(self.window), seen.keys
        before = ~windowed(seen, queries).expand(keys.shape[:3])
        lse = ops.attention_lse(queries, keys, lengths=seen.lengths, scale=seen.scale)
        mean = ops.attention_mass(queries, keys, lse=lse, lengths=seen.lengths, scale=seen.scale).masked_fill(
            ~before, 0.0
        )
        most = ops.attention_peaks(queries, keys, POOL, lse=lse, lengths=seen.lengths, scale=seen.scale).masked_fill(
            ~before, 0.0
        )
        scores = torch.maximum(most, most.sum(-1, keepdim=True) / before.sum(-1, keepdim=True).clamp(min=1))
        if self.value_norms is not None:
            norms = self.norms(seen).masked_fill(~before, 0.0)
            scores = scores * norms / norms.sum(-1, keepdim=True)
        # At most 1 so far: what goes first has more, in the order of its mean attention.
        scores = torch.where(self._first(mean), 1.0 + mean, scores)
        return scores.masked_fill(~before, float("-inf"))

    @staticmethod
    def _first(mean: Tensor) -> Tensor:
        """[B, H, S] bool: the tokens before the one at which 90 % are reached, what the window draws being counted."""
        drawn = mean.sum(-1, keepdim=True)
        held, order = mean.sort(dim=-1, descending=True, stable=True)
        reached = (held / drawn.clamp(min=1e-30)).cumsum(-1) >= FIRST - (1.0 - drawn)
        return torch.zeros_like(reached).scatter_(-1, order, ~reached)

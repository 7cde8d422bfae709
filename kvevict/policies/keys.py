"""Policies that look at the keys alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvevict import ops
from kvevict.policies.base import Policy
from kvevict.policies.observed import Observed


@dataclass(frozen=True, kw_only=True)
class KeyDiff(Policy):
    """Keep the keys least like the mean key. Park et al., "KeyDiff" (arXiv 2504.15364).

    Attributes:
        anchor: "unit", the mean of the keys over their norms (the paper's), or "raw", the mean of the keys.
    """

    anchor: str = "unit"
    comparable: ClassVar[str] = "layer"

    def scores(self, seen: Observed) -> Tensor:
        return ops.keydiff_scores(seen.keys, anchor=self.anchor, lengths=seen.lengths)


@dataclass(frozen=True, kw_only=True)
class KeyNorm(Policy):
    """Keep the keys of smallest norm. Devoto et al. (arXiv 2406.11430)."""

    def scores(self, seen: Observed) -> Tensor:
        return ops.key_norm_scores(seen.keys, lengths=seen.lengths)

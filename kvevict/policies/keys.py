"""Policies that look at the keys alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvevict import ops, validate
from kvevict.policies.base import Policy
from kvevict.policies.observed import Observed


@dataclass(frozen=True, kw_only=True)
class KeyDiff(Policy):
    """Keep the keys least like the mean key. Park et al., "KeyDiff" (arXiv 2504.15364).

    Attributes:
        anchor: "unit", the mean of the keys over their norms (the paper's), or "raw", the mean of the keys.
        rotary: RoPE's angles (`kvevict.hf.rotary.inv_freq(model)`): score the keys as they were before it.
    """

    anchor: str = "unit"
    rotary: Sequence[float] | Tensor | None = None
    comparable: ClassVar[str] = "layer"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rotary is not None:
            if self.anchor != "unit":
                raise ValueError(f"anchor is {self.anchor!r}: expected 'unit' with rotary")
            angles = self.rotary.tolist() if isinstance(self.rotary, Tensor) else self.rotary
            object.__setattr__(self, "rotary", tuple(validate.number("rotary", angle) for angle in angles))

    @property
    def reads_positions(self) -> bool:
        return self.rotary is not None

    def scores(self, seen: Observed) -> Tensor:
        if self.rotary is None:
            return ops.keydiff_scores(seen.keys, anchor=self.anchor, lengths=seen.lengths)
        inv_freq = torch.tensor(self.rotary, dtype=torch.float32, device=seen.keys.device)
        return ops.keydiff_scores(seen.keys, lengths=seen.lengths, inv_freq=inv_freq, positions=seen.positions)


@dataclass(frozen=True, kw_only=True)
class KeyNorm(Policy):
    """Keep the keys of smallest norm. Devoto et al. (arXiv 2406.11430)."""

    def scores(self, seen: Observed) -> Tensor:
        return ops.key_norm_scores(seen.keys, lengths=seen.lengths)

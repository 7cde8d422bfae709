"""KVzip: keep what the model needs to repeat its text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvevict.policies.base import Policy
from kvevict.policies.observed import Observed


@dataclass(frozen=True, kw_only=True)
class KVzip(Policy):
    """The most attention that a token draws when the model repeats its text. Kim et al. (arXiv 2505.23416).

    Reads what `EvictingCache.reconstruct` notes, a second reading of the text. Scores compare over the heads and layers
    of the model: with heads="each", keep=0.1 alone means ModelWide(0.1).

    Attributes:
        normalized: KVzip+, as of KVzap (arXiv 2601.07891): each weight times ‖W_O v‖/‖h‖, v the token's value and h
            what enters the layer's attention at the query.
    """

    normalized: bool = False
    needs: ClassVar[frozenset[str]] = frozenset({"repeated"})
    comparable: ClassVar[str] = "model"

    @property
    def spread(self) -> str:
        return "model-wide" if self.heads == "each" else "layers"

    def scores(self, seen: Observed) -> Tensor:
        assert seen.repeated is not None
        absent = torch.as_tensor(seen.padding(), device=seen.repeated.device)
        return seen.repeated.masked_fill(absent, float("-inf"))

"""Attention, weighed by how large a token's value is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvevict import ops, validate
from kvevict.policies.base import Policy
from kvevict.policies.observed import Observed

EPSILON = 1e-4  # CriticalKV's: what draws no attention now is ranked by its value


@dataclass(frozen=True, kw_only=True)
class WeighsValues(Policy):
    """A policy by the queries' attention that may take account of the values.

    Attributes:
        value_norms: None; "l2", times ‖v‖; or "output", (attention + 1e-4) · ‖W_O v‖₁, mean over the group: the second
            stage of CriticalKV (arXiv 2502.03805). Its first, half of the budget by attention alone, is not made,
            because scores do not know the budget.
        output: W_O [M, Hq · Dv] of each layer, by its index, for "output". EvictingCache fills in its model's.
    """

    value_norms: str | None = None
    output: Sequence[Tensor | None] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.value_norms is not None:
            validate.one_of("value_norms", self.value_norms, ("l2", "output"))

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"queries"}) if self.value_norms is None else frozenset({"queries", "values"})

    @property
    def unbound(self) -> frozenset[str]:
        return frozenset({"output"}) if self.value_norms == "output" and self.output is None else frozenset()

    @property
    def by_row(self) -> bool:
        return self.value_norms != "output"

    def norms(self, seen: Observed) -> Tensor:
        """[B, H, S] float32: of the values, as `value_norms` says; -inf beyond a request's length.

        Raises:
            ValueError: W_O is not there, or another model's.
        """
        assert seen.values is not None and seen.queries is not None
        if self.value_norms == "l2":
            return -ops.key_norm_scores(seen.values, lengths=seen.lengths)
        if self.output is None:
            raise ValueError(f"output is None: expected W_O of each layer, which {type(self).__name__} reads")
        weight = self.output[seen.layer] if 0 <= seen.layer < len(self.output) else None
        if weight is None:
            raise ValueError(f"layer is {seen.layer}: expected one of those that output has W_O of")
        width = seen.queries.shape[1] * seen.values.shape[3]
        if weight.shape[1] != width:
            raise ValueError(
                f"output has W_O of shape {tuple(weight.shape)} for layer {seen.layer}: expected (model width, "
                f"{width}), query heads times value_dim"
            )
        return ops.projected_norms(seen.values, weight, lengths=seen.lengths)

    def weighed(self, attention: Tensor, seen: Observed) -> Tensor:
        """attention [B, H, S], -inf where there is no token, by what `value_norms` asks for."""
        if self.value_norms is None:
            return attention
        absent = attention == float("-inf")
        spread = EPSILON if self.value_norms == "output" else 0.0
        return ((attention + spread) * self.norms(seen)).masked_fill(absent, float("-inf"))


def windowed(seen: Observed, queries: Tensor) -> Tensor:
    """[B, 1 or H, S] or [S] bool: the tokens that these queries, each request's last ones, belong to, and padding."""
    slots = torch.arange(seen.keys.shape[2], device=seen.keys.device)
    return slots >= seen.ends() - queries.shape[2]

"""A weighted mixture of policies."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from kvevict import ops, validate
from kvevict.policies.attention import AttentionMass
from kvevict.policies.base import Policy
from kvevict.policies.keys import KeyDiff
from kvevict.policies.observed import Observed
from kvevict.policies.order import Recency


@dataclass(frozen=True, kw_only=True)
class Hybrid(Policy):
    """The weighted sum of other policies' scores, put on one scale per row first.

    Attributes:
        parts: (weight, policy) of each; the default is attention 0.4, recency 0.3, KeyDiff 0.3.
        scale: "rank", "minmax" or "l2", as in `kvevict.ops.combine_scores`.
    """

    parts: tuple[tuple[float, Policy], ...] = ((0.4, AttentionMass()), (0.3, Recency()), (0.3, KeyDiff()))
    scale: str = "rank"

    def __post_init__(self) -> None:
        super().__post_init__()
        validate.one_of("scale", self.scale, ("rank", "minmax", "l2"))
        object.__setattr__(self, "parts", tuple(tuple(part) for part in self.parts))
        if not self.parts:
            raise ValueError(f"parts is {self.parts!r}: expected at least one pair (weight, policy)")
        for weight, policy in self.parts:
            validate.number("weight", weight)
            if not isinstance(policy, Policy):
                raise TypeError(f"parts has {policy!r}: expected a Policy")
        if len(self._noted()) > 1:
            raise ValueError(
                f"parts read mass of several kinds, {sorted(self._noted())}: expected one min_distance and "
                "one reduce, as one mass is noted"
            )

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset().union(*(policy.needs for _, policy in self.parts))

    def _noted(self) -> set[tuple[str, int]]:
        return {policy.noted for _, policy in self.parts if "mass" in policy.needs}

    @property
    def noted(self) -> tuple[str, int]:
        return next(iter(self._noted()), super().noted)

    @property
    def protected(self) -> tuple[int, int]:
        protections = [(self.sink, self.recent), *(policy.protected for _, policy in self.parts)]
        return max(sink for sink, _ in protections), max(recent for _, recent in protections)

    @property
    def reads_positions(self) -> bool:
        return any(policy.reads_positions for _, policy in self.parts)

    @property
    def unbound(self) -> frozenset[str]:
        return frozenset().union(*(policy.unbound for _, policy in self.parts))

    def bound(self, **weights) -> Policy:
        return replace(self, parts=tuple((weight, policy.bound(**weights)) for weight, policy in self.parts))

    @property
    def by_row(self) -> bool:
        return all(policy.by_row for _, policy in self.parts)

    @property
    def window(self) -> int:
        return max(policy.window for _, policy in self.parts)

    def scores(self, seen: Observed) -> Tensor:
        scored = [(weight, policy.scores(seen)) for weight, policy in self.parts]
        return ops.combine_scores(scored, scale=self.scale, lengths=seen.lengths)

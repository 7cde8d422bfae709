"""Policies that look at how much attention a token draws."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvevict import ops, validate
from kvevict.policies.base import Policy
from kvevict.policies.observed import Observed
from kvevict.policies.weighing import WeighsValues


@dataclass(frozen=True, kw_only=True)
class AttentionMass(Policy):
    """H2O's heavy hitters: the tokens that drew most attention, from all queries so far (arXiv 2306.14048, section 4).

    Reads the accumulated `mass` of a Tracker, or computes the prompt's from `queries` if there is none.

    Attributes:
        reduce: "sum" over the queries, mean over the group; or "max" over both, the most that any query gave.
        normalize: "count" divides a token's mass by the number of queries that saw it, without which old tokens win by
            age alone; None is the paper's sum, and goes with "max".
        min_distance: only queries at least so many tokens later count, as in `kvevict.ops.attention_mass`; the last
            `min_distance` tokens, which have none, stay.
        decay: what a Tracker multiplies the mass with at each decode step; plain H2O (1.0) freezes on old tokens.
        grace: a new token is not judged before it has been in the cache for so many tokens.
    """

    reduce: str = "sum"
    normalize: str | None = "count"
    min_distance: int = 0
    decay: float = 1.0
    grace: int = 32
    needs: ClassVar[frozenset[str]] = frozenset({"mass"})
    comparable: ClassVar[str] = "layer"

    def __post_init__(self) -> None:
        super().__post_init__()
        validate.one_of("reduce", self.reduce, ("sum", "max"))
        if self.normalize is not None:
            validate.one_of("normalize", self.normalize, ("count",))
            if self.reduce == "max":
                raise ValueError("normalize is 'count': expected None with reduce='max', which has nothing to divide")
        validate.integer("min_distance", self.min_distance, 0)
        validate.integer("grace", self.grace, 0)
        if not 0.0 <= validate.number("decay", self.decay) <= 1.0:
            raise ValueError(f"decay is {self.decay}: expected a number from 0 to 1")

    @property
    def protected(self) -> tuple[int, int]:
        return self.sink, max(self.recent, self.grace, self.min_distance)

    @property
    def noted(self) -> tuple[str, int]:
        return self.reduce, self.min_distance

    def scores(self, seen: Observed) -> Tensor:
        mass = seen.mass
        assert mass is not None
        if self.normalize is None:
            return mass
        return mass / (seen.sequence_length() - self.min_distance - seen.order()).clamp(min=1.0)


@dataclass(frozen=True, kw_only=True)
class SnapKV(WeighsValues):
    """Attention of the last queries, pooled over neighbours; these queries' own tokens stay (arXiv 2404.14469).

    Attributes:
        variant: "kvpress": 64 queries, average over 5 neighbours; "original", the authors' settings for LongBench: 32
            queries, maximum over 7 neighbours, pooled per query head.
    """

    variant: str = "kvpress"
    comparable: ClassVar[str] = "layer"

    def __post_init__(self) -> None:
        super().__post_init__()
        validate.one_of("variant", self.variant, ("kvpress", "original"))

    @property
    def window(self) -> int:
        """The queries whose attention counts, and whose own tokens stay."""
        return 64 if self.variant == "kvpress" else 32

    @property
    def protected(self) -> tuple[int, int]:
        return self.sink, max(self.recent, self.window)

    def scores(self, seen: Observed) -> Tensor:
        return self.weighed(self._attention(seen), seen)

    def _attention(self, seen: Observed) -> Tensor:
        queries, keys = seen.last_queries(self.window), seen.keys
        options: Any = dict(window=queries.shape[2], lengths=seen.lengths)  # for pooling: no token there
        if self.variant == "kvpress":  # an average over the group commutes with one over neighbours
            mass = ops.attention_mass(queries, keys, lengths=seen.lengths, scale=seen.scale)
            return ops.pool_scores(mass, 5, **options)
        heads = queries.unflatten(1, (keys.shape[1], -1))
        total = torch.zeros(keys.shape[:3], device=keys.device)
        for g in range(heads.shape[2]):  # a maximum does not: each query head is pooled before the mean
            mass = ops.attention_mass(heads[:, :, g], keys, lengths=seen.lengths, scale=seen.scale)
            total = total + ops.pool_scores(mass, 7, "max", **options)
        return total / heads.shape[2]


@dataclass(frozen=True, kw_only=True)
class TOVA(Policy):
    """Attention of the last query, mean over all heads of the layer, one selection for all (arXiv 2401.06104).

    `scores` are each KV head's; heads="shared" takes the mean, as it does of a mixture that TOVA is part of.
    """

    heads: str = "shared"
    needs: ClassVar[frozenset[str]] = frozenset({"queries"})

    @property
    def window(self) -> int:
        return 1

    @property
    def protected(self) -> tuple[int, int]:
        return self.sink, max(self.recent, 1)

    def scores(self, seen: Observed) -> Tensor:
        return ops.attention_mass(seen.last_queries(1), seen.keys, lengths=seen.lengths, scale=seen.scale)

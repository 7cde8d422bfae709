"""What every policy is: needs, scores, protection; and the one way from them to a smaller cache."""

from __future__ import annotations

import abc
from dataclasses import dataclass, fields
from typing import ClassVar

from torch import Tensor

from kvevict import ops, validate
from kvevict.policies.observed import Observed
from kvevict.policies.tracker import Tracker


@dataclass(frozen=True, kw_only=True)
class Policy(abc.ABC):
    """What is worth keeping. Subclasses are frozen dataclasses that give `scores`; state lives in a Tracker.

    Attributes:
        sink: the first tokens, which are always kept. Attention parks its surplus on them (arXiv 2309.17453).
        recent: the last tokens, which are always kept.
        heads: "each" KV head keeps its own tokens, or all share one selection ("shared").
    """

    sink: int = 4
    recent: int = 32
    heads: str = "each"
    needs: ClassVar[frozenset[str]] = frozenset()  # fields of Observed, beside keys

    def __post_init__(self) -> None:
        validate.integer("sink", self.sink, 0)
        validate.integer("recent", self.recent, 0)
        validate.one_of("heads", self.heads, ("each", "shared"))

    @abc.abstractmethod
    def scores(self, seen: Observed) -> Tensor:
        """[B, H, S] float32, higher means keep. Called with everything that `needs` names."""

    @property
    def protected(self) -> tuple[int, int]:
        """(first, last) tokens that are kept whatever their score. A smaller budget keeps the first ones, then the
        most recent."""
        return self.sink, self.recent

    @property
    def window(self) -> int:
        """The most queries, the last ones, that `scores` reads."""
        return 64 if "queries" in self.needs else 0

    def select(self, seen: Observed, keep: int | float) -> Tensor:
        """The tokens to keep: [B, H, n] int64, ascending, -1 beyond what a ragged request keeps.

        Raises:
            TypeError, ValueError: something that the policy needs is missing; `keep` as in `kvevict.ops.topk_indices`.
        """
        if "mass" in self.needs:
            seen = seen.with_prompt_mass()
        for name in sorted(self.needs):
            if getattr(seen, name) is None:
                instead = ", or the queries of the whole prompt" if name == "mass" else ""
                raise ValueError(f"{name} is None: expected a tensor{instead}, because {type(self).__name__} needs it")
        return self.choose(self.scores(seen), keep, seen.lengths)

    def choose(self, scores: Tensor, keep: int | float, lengths: Tensor | None = None) -> Tensor:
        """`select`, given the scores: for several shares of one cache."""
        n = validate.kept_tokens(keep, scores.shape[2], 0, 0)
        sink, recent = self.protected
        sink = min(sink, n)
        recent = min(recent, n - sink)
        return ops.topk_indices(scores, keep, sink=sink, recent=recent, heads=self.heads, lengths=lengths)

    def compact(
        self,
        keys: Tensor,
        values: Tensor,
        *,
        keep: int | float,
        tracker: Tracker | None = None,
        inplace: bool = True,
        preserve_order: bool = True,
        **observed,
    ) -> ops.Compacted:
        """Score, select and compact one layer.

        Args:
            keys, values: [B, H, S, D], [B, H, S, Dv].
            keep: tokens (int) or share (float), as in `kvevict.ops.topk_indices`.
            tracker: where mass, last use and positions are noted; it follows the compaction.
            inplace, preserve_order: as in `kvevict.ops.compact`. A cache whose order was given up cannot protect its
                recent tokens by a later call.
            observed: further fields of `Observed`, such as queries=, hidden=, lengths=, layer=.

        Returns:
            Compacted; its indices count slots of the cache as it was, `tracker.positions` positions in the sequence.
        """
        unknown = observed.keys() - {field.name for field in fields(Observed)}
        if unknown:
            raise TypeError(f"{sorted(unknown)[0]} is no argument: expected fields of Observed")
        observed["values"] = values
        seen = Observed(keys=keys, **observed) if tracker is None else tracker.observed(keys, **observed)
        indices = self.select(seen, keep)
        result = ops.compact(keys, values, indices, inplace=inplace, preserve_order=preserve_order)
        if seen.lengths is not None:
            result = result._replace(lengths=validate.kept_lengths(keep, seen.lengths))
        if tracker is not None:
            tracker.compacted(result)
        return result

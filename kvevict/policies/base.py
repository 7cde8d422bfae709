"""What every policy is: needs, scores, protection; and the one way from them to a smaller cache."""

from __future__ import annotations

import abc
from dataclasses import dataclass, fields, replace
from typing import ClassVar

from torch import Tensor

from kvevict import ops, validate
from kvevict.policies.observed import Observed
from kvevict.policies.tracker import Tracker

ALL_QUERIES = 2**31 - 1  # as a `window`: those of the whole prompt
OVER = ("row", "layer", "model")  # what scores compare over, each within the next


def within(n: int, sink: int, recent: int) -> tuple[int, int]:
    """Protection that fits n tokens: the first ones, then the most recent."""
    sink = min(sink, n)
    return sink, min(recent, n - sink)


@dataclass(frozen=True, kw_only=True)
class Policy(abc.ABC):
    """What is worth keeping. Subclasses are frozen dataclasses that give `scores`; state lives in a Tracker.

    Attributes:
        sink: the first tokens, which are always kept. Attention parks its surplus on them (arXiv 2309.17453).
        recent: the last tokens, which are always kept.
        heads: "each" KV head keeps its own tokens; all share one selection ("shared"); or the layer's best tokens stay,
            whichever head they are of ("adaptive", AdaKV), which needs scores that compare over heads.
        floor: with heads="adaptive", the share of the mean that every head keeps at least; else it is not read.
        comparable: over what the scores mean the same: a "row" (the tokens of one head), a "layer" or the "model".
    """

    sink: int = 4
    recent: int = 32
    heads: str = "each"
    floor: float = 0.2
    needs: ClassVar[frozenset[str]] = frozenset()  # fields of Observed, beside keys
    comparable: ClassVar[str] = "row"

    def __post_init__(self) -> None:
        validate.integer("sink", self.sink, 0)
        validate.integer("recent", self.recent, 0)
        validate.one_of("heads", self.heads, ("each", "shared", "adaptive"))
        if not 0.0 <= validate.number("floor", self.floor) <= 1.0:
            raise ValueError(f"floor is {self.floor}: expected a number from 0 to 1")
        if self.heads == "adaptive":
            self.require_comparable("layer")

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

    @property
    def noted(self) -> tuple[str, int]:
        """What `mass` is to be, where the policy reads it: a Tracker's `reduce` and `min_distance`."""
        return "sum", 0

    @property
    def reads_positions(self) -> bool:
        """Whether `scores` depends on where in the sequence a token was, None in Observed being its slot."""
        return False

    @property
    def unbound(self) -> frozenset[str]:
        """Fields that hold a model's weights or angles, and are still to be filled in: see `bound`."""
        return frozenset()

    def bound(self, **weights) -> Policy:
        """Itself with the fields that `unbound` names filled in: of these, rotary=, output=."""
        return replace(self, **{name: weights[name] for name in self.unbound})

    @property
    def by_row(self) -> bool:
        """Whether a head may be shown as a request of its own, as heads of unequal length are."""
        return True

    @property
    def spread(self) -> str:
        """How a plain number of tokens, or share, falls on a model: the same for all "layers", or "model-wide"."""
        return "layers"

    def require_comparable(self, over: str) -> None:
        """A choice over the heads of a "layer", or of the whole "model", needs scores that mean the same there.

        Raises:
            ValueError: they do not.
        """
        if OVER.index(self.comparable) < OVER.index(over):
            raise ValueError(
                f"scores of {type(self).__name__} compare within a {self.comparable}: expected a policy whose scores "
                f"compare over a {over}, for a choice over all of its heads; kvevict.policies.Fixed gives heads and "
                "layers unequal shares with any scores"
            )

    def select(self, seen: Observed, keep: int | float | Tensor) -> Tensor:
        """The tokens to keep: [B, H, n] int64, ascending, -1 beyond what a ragged request or an unequal head keeps.

        Raises:
            TypeError, ValueError: something that the policy needs is missing; `keep` as in `kvevict.ops.topk_indices`.
        """
        if "mass" in self.needs:
            seen = seen.with_prompt_mass(*self.noted)
        for name in sorted(self.needs):
            if getattr(seen, name) is None:
                instead = ", or the queries of the whole prompt" if name == "mass" else ""
                raise ValueError(f"{name} is None: expected a tensor{instead}, because {type(self).__name__} needs it")
        return self.choose(self.scores(seen), keep, seen.lengths)

    def choose(self, scores: Tensor, keep: int | float | Tensor, lengths: Tensor | None = None) -> Tensor:
        """`select`, given the scores: for several shares of one cache.

        keep: tokens, a share, or an int32 or int64 tensor [B, H]: tokens of each head, which then chooses its own.
        """
        sink, recent = self.protected
        if isinstance(keep, Tensor):
            if self.heads == "shared":
                raise ValueError("keep is a tensor, a count for each head: expected heads='each', not 'shared'")
            return ops.topk_indices(scores, keep, sink=sink, recent=recent, lengths=lengths)
        n = validate.kept_tokens(keep, scores.shape[2], 0, 0)
        sink, recent = within(n, sink, recent)
        return ops.topk_indices(
            scores, keep, sink=sink, recent=recent, heads=self.heads, floor=self.floor, lengths=lengths
        )

    def compact(
        self,
        keys: Tensor,
        values: Tensor,
        *,
        keep: int | float | Tensor,
        tracker: Tracker | None = None,
        inplace: bool = True,
        preserve_order: bool = True,
        **observed,
    ) -> ops.Compacted:
        """Score, select and compact one layer.

        Args:
            keys, values: [B, H, S, D], [B, H, S, Dv].
            keep: tokens (int), share (float) or tokens of each head (tensor [B, H]), as in `kvevict.ops.topk_indices`.
            tracker: where mass, last use and positions are noted; it follows the compaction.
            inplace, preserve_order: as in `kvevict.ops.compact`. A cache whose order was given up cannot protect its
                recent tokens by a later call.
            observed: further fields of `Observed`, such as queries=, hidden=, lengths=, layer=.

        Returns:
            Compacted; its indices count slots of the cache as it was, `tracker.positions` positions in the sequence.
            Its lengths are [B, H] where heads keep unequal numbers.
        """
        unknown = observed.keys() - {field.name for field in fields(Observed)}
        if unknown:
            raise TypeError(f"{sorted(unknown)[0]} is no argument: expected fields of Observed")
        observed["values"] = values
        seen = Observed(keys=keys, **observed) if tracker is None else tracker.observed(keys, **observed)
        indices = self.select(seen, keep)
        result = ops.compact(keys, values, indices, inplace=inplace, preserve_order=preserve_order)
        if self.heads == "adaptive" or isinstance(keep, Tensor):
            result = result._replace(lengths=(indices >= 0).sum(-1))
        elif seen.lengths is not None:
            result = result._replace(lengths=validate.kept_lengths(keep, seen.lengths))
        if tracker is not None:
            tracker.compacted(result)
        return result

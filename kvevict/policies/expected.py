"""Expected Attention: what later queries will attend to, from how the queries so far are distributed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvevict import ops, validate
from kvevict.policies.base import ALL_QUERIES
from kvevict.policies.observed import Observed
from kvevict.policies.rotary import before_rope, turned
from kvevict.policies.weighing import WeighsValues

AT_ONCE = 1024  # queries in float32: a copy of all of them would be larger than the cache


@dataclass(frozen=True, kw_only=True)
class ExpectedAttention(WeighsValues):
    """Queries before RoPE taken as normal, with the mean μ and covariance C of the prompt's, give key k in the mean
    exp(k·Rμ/√D + k·RCRᵀk/(2D)), R the mean rotation of the next positions. The softmax over the tokens of that, mean
    over the group, times ‖v‖. Devoto et al. (arXiv 2510.00636), section 3; the first `sink` tokens count for nothing.

    Needs the queries of the whole prompt, which an EvictingCache holds until the layer is cut.

    Attributes:
        rotary: RoPE's angles (`kvevict.hf.rotary.inv_freq(model)`). EvictingCache fills in its model's.
        future: over how many next positions R is the mean.
        value_norms: "l2" is the paper's.
    """

    rotary: Sequence[float] | Tensor | None = None
    future: int = 512
    value_norms: str | None = "l2"
    comparable: ClassVar[str] = "layer"

    def __post_init__(self) -> None:
        super().__post_init__()
        validate.integer("future", self.future, 1)
        if self.rotary is not None:
            angles = self.rotary.tolist() if isinstance(self.rotary, Tensor) else self.rotary
            object.__setattr__(self, "rotary", tuple(validate.number("rotary", angle) for angle in angles))

    @property
    def unbound(self) -> frozenset[str]:
        return super().unbound | (frozenset({"rotary"}) if self.rotary is None else frozenset())

    @property
    def window(self) -> int:
        return ALL_QUERIES

    @property
    def reads_positions(self) -> bool:
        return True

    def scores(self, seen: Observed) -> Tensor:
        assert seen.queries is not None
        if self.rotary is None:
            raise ValueError("rotary is None: expected RoPE's angles, which ExpectedAttention reads")
        H, S, D = seen.keys.shape[1:]
        mean, covariance = self._of_later_queries(seen, seen.queries)
        logits = ops.quadratic_scores(seen.keys, mean / D**0.5, covariance / (2 * D), lengths=seen.lengths)
        first = torch.arange(S, device=logits.device) < self.sink
        known = logits.isfinite() & ~first  # neither padding nor spoiled
        weights = logits.masked_fill(~known, float("-inf")).softmax(-1).masked_fill(logits.isnan(), float("nan"))
        absent = torch.as_tensor(seen.padding(), device=logits.device)
        attention = weights.unflatten(1, (H, -1)).mean(2).masked_fill(absent, float("-inf"))
        scores = self.weighed(attention, seen)
        best = scores.masked_fill(scores.isnan(), float("-inf")).amax(-1, keepdim=True)
        return torch.where(first & (scores > float("-inf")), best, scores)

    def _of_later_queries(self, seen: Observed, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [B, Hq, D] and covariance [B, Hq, D, D], float32, of queries at the next positions."""
        B, HQ, W, D = queries.shape
        ends, total = (_of_requests(n, B, queries.device) for n in (seen.ends(), seen.sequence_length()))
        inv_freq = torch.tensor(self.rotary, dtype=torch.float32, device=queries.device)
        place = torch.arange(W, device=queries.device)
        valid = ends.clamp(max=W)[:, None]  # a shorter request has its own queries in front
        positions = total[:, None] - valid + place  # [B, W]
        counts = (place < valid) & (positions >= self.sink)
        number = counts.sum(1).clamp(min=1)[:, None, None]

        def parts():  # [B, Hq, so many, D]: before RoPE; what does not count is 0
            for some in (slice(begin, begin + AT_ONCE) for begin in range(0, W, AT_ONCE)):
                before = before_rope(queries[:, :, some].float(), inv_freq, positions[:, None, some])
                yield before, counts[:, None, some, None]

        mean = sum(part.masked_fill(~counted, 0.0).sum(2) for part, counted in parts()) / number
        covariance = torch.zeros(B, HQ, D, D, device=queries.device)
        for part, counted in parts():
            centred = (part - mean[:, :, None]).masked_fill(~counted, 0.0)
            covariance += centred.mT @ centred
        angle = (total[:, None] + torch.arange(self.future, device=queries.device))[..., None] * inv_freq
        cosine, sine = (x.mean(1)[:, None] for x in (angle.cos(), angle.sin()))  # [B, 1, R/2]
        covariance = covariance / number[..., None]
        for _ in range(2):  # the rows, then the columns
            covariance = turned(covariance, cosine[:, None], sine[:, None]).mT
        return turned(mean, cosine, sine), covariance


def _of_requests(count: Tensor | int, B: int, device: torch.device) -> Tensor:
    """[B]: of each request, of its longest head."""
    if isinstance(count, Tensor):
        return count.amax((1, 2))
    return torch.full((B,), count, device=device)

"""What a policy may look at."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvevict import ops


@dataclass(frozen=True, kw_only=True)
class Observed:
    """What is known of one layer's cache. Only `keys` are always there; a policy's `needs` names what it reads beside.

    S cached tokens of B requests, H KV heads, Hq query heads.
    """

    keys: Tensor  # [B, H, S, D], or kvevict.ops.Pages, where those ops that the policy calls take them
    values: Tensor | None = None  # [B, H, S, Dv], likewise
    queries: Tensor | None = None  # [B, Hq, W, D]: the last W of the sequence, as in kvevict.ops; or Pages, likewise
    lse: Tensor | None = None  # [B, Hq, W] float32 of those queries, where attention has left it
    mass: Tensor | None = None  # [B, H, S] float32: attention that each token drew so far, mean over the group
    last_used: Tensor | None = None  # [B, H, S] int32: step at which it was last used, negative for never
    repeated: Tensor | None = None  # [B, H, S] float32: the most attention that the text's repetition drew, as KVzip's
    hidden: Tensor | None = None  # [B, S, M]: the hidden states that entered the layer's attention
    predicted: Tensor | None = None  # [B, H, S] float32: what a Learned said of the hidden states as they passed
    positions: Tensor | None = None  # [B, H, S] int64: position in the sequence; None: 0 to S - 1
    tokens_seen: Tensor | None = None  # [B] int64: length of the sequence so far; None: S
    lengths: Tensor | None = None  # [B]: valid tokens of each request, or [B, H]: of each of its heads
    scale: float | None = None  # of the layer's attention logits; None: 1/√D
    layer: int = 0

    def order(self) -> Tensor:
        """[B, H, S] float32: the tokens' positions; exact up to 2^24."""
        if self.positions is not None:
            return self.positions.float()
        B, H, S = self.keys.shape[:3]
        return torch.arange(S, dtype=torch.float32, device=self.keys.device).expand(B, H, S)

    def sequence_length(self) -> Tensor | int:
        """[B, 1 or H, 1] or an int: tokens seen so far, evicted ones among them."""
        for seen in (self.tokens_seen, self.lengths):
            if seen is not None:
                return seen.view(len(seen), -1, 1)
        return self.keys.shape[2]

    def ends(self) -> Tensor | int:
        """[B, 1 or H, 1] or an int: the slot behind the last token."""
        return self.keys.shape[2] if self.lengths is None else self.lengths.view(len(self.lengths), -1, 1)

    def padding(self) -> Tensor | bool:
        """[B, 1 or H, S] bool: which slots hold no token; False if every slot holds one."""
        if self.lengths is None:
            return False
        return torch.arange(self.keys.shape[2], device=self.keys.device) >= self.ends()

    def with_prompt_mass(self, reduce: str = "sum", min_distance: int = 0) -> Observed:
        """Itself with `mass` filled in from the queries of the whole prompt, where there are any and mass is None.
        reduce, min_distance: as a Tracker takes them."""
        if self.mass is not None or self.queries is None or self.queries.shape[2] < self.keys.shape[2]:
            return self
        mass = ops.attention_mass(
            self.queries, self.keys, lse=self.lse, reduce=reduce, min_distance=min_distance, lengths=self.lengths,
            scale=self.scale,
        )  # fmt: skip
        group = self.queries.shape[1] // self.keys.shape[1] if reduce == "sum" else 1
        return replace(self, mass=mass / group)

    def last_queries(self, count: int) -> Tensor:
        """[B, Hq, ≤ count, D]: each request's last `count` queries; Pages where they are."""
        queries = self.queries
        assert queries is not None
        W = queries.shape[2]
        count = min(count, W, self.keys.shape[2])
        if count == W:
            return queries
        if isinstance(queries, ops.Pages):  # its table is of queries
            return queries._replace(table=self._last(queries.table[:, None, :, None], count)[:, 0, :, 0])
        return self._last(queries, count)

    def _last(self, queries: Tensor, count: int) -> Tensor:
        W = queries.shape[2]
        if self.lengths is None:
            return queries[:, :, W - count :]
        # A request shorter than W has its queries in front; one shorter than `count` keeps padding behind them.
        lengths = self.lengths if self.lengths.ndim == 1 else self.lengths.amax(1)
        first = (lengths.clamp(max=W) - count).clamp(min=0)
        index = first[:, None] + torch.arange(count, device=queries.device)
        return queries.gather(2, index[:, None, :, None].expand(-1, queries.shape[1], -1, queries.shape[3]))

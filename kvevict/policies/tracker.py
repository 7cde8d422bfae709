"""What decoding notes about the tokens of one layer's cache, kept aligned with the cache through every eviction."""

from __future__ import annotations

import torch
from torch import Tensor

from kvevict import ops, validate
from kvevict.policies.observed import Observed


class Tracker:
    """Mass, last use and positions of one layer's cached tokens, in buffers that grow only when told (`reserve`).

    The order of calls follows the cache's: `append` when tokens enter it, `observe` (a prompt or a chunk of one) or
    `attend` (a decode step) when queries read it, `compacted` or `overwrite` when tokens leave it.

    Args:
        reduce: "sum" of the attention over the queries, mean over the GQA group; or "max" over both.
        min_distance: only queries at least so many tokens later count; the tokens between are to be cached still.

    Attributes:
        mass: [B, H, capacity] float32, attention drawn so far.
        last_used: [B, H, capacity] int32, the step of last use, -1 for never.
        positions: [B, H, capacity] int64, position in the sequence, -1 for no token.
        lengths: [B] int64, cached tokens of each request; [B, H] once heads have kept unequal numbers.
        tokens_seen: [B] int64, length of each sequence, evicted tokens among it: the next token's position.
        step: decode steps so far.
    """

    def __init__(
        self,
        batch: int,
        heads: int,
        capacity: int,
        device: torch.device | str = "cpu",
        *,
        reduce: str = "sum",
        min_distance: int = 0,
    ) -> None:
        for name, value in (("batch", batch), ("heads", heads), ("capacity", capacity)):
            validate.integer(name, value, 1)
        validate.one_of("reduce", reduce, ("sum", "max"))
        validate.integer("min_distance", min_distance, 0)
        self.reduce, self.min_distance = reduce, min_distance
        shape = (batch, heads, capacity)
        self.mass = torch.zeros(shape, dtype=torch.float32, device=device)
        self.last_used = torch.full(shape, -1, dtype=torch.int32, device=device)
        self.positions = torch.full(shape, -1, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.tokens_seen = torch.zeros(batch, dtype=torch.int64, device=device)
        self.step = 0
        self._most = 0  # a bound on the longest request, known without asking the device

    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` tokens; buffers that are large enough stay where they are."""
        missing = capacity - self.mass.shape[2]
        if missing > 0:
            self.mass, self.last_used, self.positions = (
                torch.nn.functional.pad(state, (0, missing), value=empty) for state, empty in self._state()
            )

    def select_requests(self, requests: Tensor) -> None:
        """Request i becomes what requests[i] was: beams that are reordered, a batch that is repeated or cut."""
        self.mass, self.last_used, self.positions = (state.index_select(0, requests) for state, _ in self._state())
        self.lengths, self.tokens_seen = self.lengths[requests], self.tokens_seen[requests]

    def drop_last(self, count: int) -> None:
        """The last `count` tokens of every request leave, as if they had never come.

        Raises:
            ValueError: a request has fewer.
        """
        validate.integer("count", count, 0)
        validate.require((self.lengths >= count).all(), "lengths", self.lengths, f"at least count, {count}")
        self.lengths -= count
        self.tokens_seen -= count
        self._most -= count
        for state, empty in self._state():
            state.masked_fill_(self._padding(), empty)

    def _state(self) -> tuple[tuple[Tensor, float | int], ...]:
        """The buffers, and what stands in them where there is no token."""
        return (self.mass, 0.0), (self.last_used, -1), (self.positions, -1)

    def _padding(self) -> Tensor:
        """[B, 1 or H, capacity] bool: the slots without a token."""
        return torch.arange(self.mass.shape[2], device=self.mass.device) >= self._ends()

    def _ends(self) -> Tensor:
        """[B, 1 or H, 1]: the lengths, beside the buffers."""
        return self.lengths.view(len(self.lengths), -1, 1)

    def append(self, count: int | Tensor = 1) -> None:
        """`count` tokens of each request enter behind the others; or a tensor [B] of counts, which the host reads.

        Raises:
            TypeError, ValueError: no count, or more tokens than the capacity.
        """
        if isinstance(count, Tensor):
            validate.tensor("count", count, 1, (torch.int32, torch.int64), self.lengths)
            if count.shape != self.tokens_seen.shape or int(count.min()) < 0:
                raise ValueError(f"count is {count.tolist()}: expected {len(self.lengths)} numbers, none below 0")
            most = int(count.max())
        else:
            validate.integer("count", count, 0)
            most = count
        if self._most + most > self.mass.shape[2]:
            raise ValueError(f"count is {most}: expected at most {self.mass.shape[2] - self._most}, the free capacity")
        slots = torch.arange(self.mass.shape[2], device=self.mass.device)
        position = self.tokens_seen[:, None, None] + slots - self._ends()
        of_heads = count[:, None] if isinstance(count, Tensor) and self.lengths.ndim == 2 else count
        before = self._padding()
        self.lengths += of_heads
        self.positions.copy_(torch.where(before & ~self._padding(), position, self.positions))
        self.tokens_seen += count
        self._most += most

    def observe(self, queries: Tensor, keys: Tensor, *, scale: float | None = None, lse: Tensor | None = None) -> None:
        """Add the attention of a prompt's queries, or of a chunk's, to the mass: the last W of the cached tokens."""
        S, group = keys.shape[2], queries.shape[1] // keys.shape[1]
        lengths = self.lengths.clamp(min=1)  # a request may be empty still
        drawn = ops.attention_mass(
            queries, keys, scale=scale, lse=lse, reduce=self.reduce, min_distance=self.min_distance, lengths=lengths
        ).masked_fill(self._padding()[:, :, :S], 0.0)
        if self.reduce == "max":
            self.mass[:, :, :S] = torch.maximum(self.mass[:, :, :S], drawn)
        else:
            self.mass[:, :, :S] += drawn / group

    def attend(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        scale: float | None = None,
        decay: float = 1.0,
        threshold: float = 1e-3,
    ) -> Tensor:
        """One decode step: the output of `kvevict.ops.decode_attention`, noted in mass and last use."""
        S = keys.shape[2]
        plain = self.reduce == "sum" and not self.min_distance
        output = ops.decode_attention(
            queries, keys, values, scale=scale, lengths=self.lengths, mass=self.mass[:, :, :S] if plain else None,
            decay=decay, last_used=self.last_used[:, :, :S], step=self.step + 1, threshold=threshold,
            return_lse=not plain,
        )  # fmt: skip
        self.step += 1
        if isinstance(output, Tensor):
            return output
        output, lse = output  # the keys are read once more
        self.mass *= decay
        self.observe(queries, keys, scale=scale, lse=lse)
        return output

    def compacted(self, result: ops.Compacted) -> None:
        """Follow a compaction: slot j now holds the token that was in slot result.indices[..., j]."""
        n = result.indices.shape[2]
        padding = result.indices < 0
        source = result.indices.clamp(min=0)
        for state, empty in self._state():
            state[:, :, :n] = state.gather(2, source).masked_fill(padding, empty)
            state[:, :, n:] = empty
        kept = torch.full_like(self.lengths, n) if result.lengths is None else result.lengths
        if kept.ndim != self.lengths.ndim:  # one of them is of heads
            self.lengths, kept = (x if x.ndim == 2 else x[:, None] for x in (self.lengths, kept))
        self.lengths = torch.minimum(self.lengths, kept)
        self._most = n

    def overwrite(self, slots: Tensor) -> None:
        """A new token takes the place of the one in `slots` [B, H, 1] int64 (`kvevict.ops.evict_slots`).

        Raises:
            TypeError, ValueError: no slots of cached tokens; -1, where nothing may be evicted, is none.
        """
        validate.tensor("slots", slots, 3, (torch.int64,), self.mass)
        if slots.shape != (*self.mass.shape[:2], 1):
            raise ValueError(f"slots has shape {tuple(slots.shape)}: expected {(*self.mass.shape[:2], 1)}")
        held = ((slots >= 0) & (slots < self._ends())).all()
        validate.require(held, "slots", slots, "a cached token's in every head")
        self.positions.scatter_(2, slots, self.tokens_seen[:, None, None].expand_as(slots))
        self.mass.scatter_(2, slots, 0.0)
        self.last_used.scatter_(2, slots, -1)
        self.tokens_seen += 1

    def observed(self, keys: Tensor, **more) -> Observed:
        """What a policy may read of the cache with these keys [B, H, S, D]."""
        S = keys.shape[2]
        known = dict(
            mass=self.mass[:, :, :S], last_used=self.last_used[:, :, :S], positions=self.positions[:, :, :S],
            tokens_seen=self.tokens_seen, lengths=self.lengths.clamp(min=1) if self.lengths.ndim == 1 else self.lengths,
        )  # fmt: skip
        return Observed(keys=keys, **(known | more))

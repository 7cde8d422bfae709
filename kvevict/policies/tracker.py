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

    Attributes:
        mass: [B, H, capacity] float32, attention drawn so far, mean over the GQA group.
        last_used: [B, H, capacity] int32, the step of last use, -1 for never.
        positions: [B, H, capacity] int64, position in the sequence, -1 for no token.
        lengths: [B] int64, cached tokens of each request.
        tokens_seen: [B] int64, length of each sequence, evicted tokens among it: the next token's position.
        step: decode steps so far.
    """

    def __init__(self, batch: int, heads: int, capacity: int, device: torch.device | str = "cpu") -> None:
        for name, value in (("batch", batch), ("heads", heads), ("capacity", capacity)):
            validate.integer(name, value, 1)
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
        """The last `count` tokens of every request leave, as if they had never come."""
        slots = torch.arange(self.mass.shape[2], device=self.mass.device)
        self.lengths -= count
        self.tokens_seen -= count
        self._most -= count
        gone = (slots >= self.lengths[:, None])[:, None]
        for state, empty in self._state():
            state.masked_fill_(gone, empty)

    def _state(self) -> tuple[tuple[Tensor, float | int], ...]:
        """The buffers, and what stands in them where there is no token."""
        return (self.mass, 0.0), (self.last_used, -1), (self.positions, -1)

    def append(self, count: int | Tensor = 1) -> None:
        """`count` tokens (of each request; or a tensor [B], at most as many as its largest) enter behind the others.

        Raises:
            ValueError: more tokens than the capacity.
        """
        most = int(count.max()) if isinstance(count, Tensor) else count
        if self._most + most > self.mass.shape[2]:
            raise ValueError(f"count is {most}: expected at most {self.mass.shape[2] - self._most}, the free capacity")
        slots = torch.arange(self.mass.shape[2], device=self.mass.device)
        new = ((slots >= self.lengths[:, None]) & (slots < (self.lengths + count)[:, None]))[:, None]
        position = (self.tokens_seen - self.lengths)[:, None, None] + slots
        self.positions.copy_(torch.where(new, position, self.positions))
        self.mass.masked_fill_(new, 0.0)
        self.last_used.masked_fill_(new, -1)
        self.lengths += count
        self.tokens_seen += count
        self._most += most

    def observe(self, queries: Tensor, keys: Tensor, *, scale: float | None = None, lse: Tensor | None = None) -> None:
        """Add the attention of a prompt's queries, or of a chunk's, to the mass: the last W of the cached tokens."""
        S, group = keys.shape[2], queries.shape[1] // keys.shape[1]
        lengths = self.lengths.clamp(min=1)  # a request may be empty still
        mass = ops.attention_mass(queries, keys, scale=scale, lse=lse, reduce="sum", lengths=lengths)
        self.mass[:, :, :S] += mass.clamp(min=0.0) / group  # -inf beyond a request's length

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
        self.step += 1
        return ops.decode_attention(
            queries, keys, values, scale=scale, lengths=self.lengths, mass=self.mass[:, :, :S], decay=decay,
            last_used=self.last_used[:, :, :S], step=self.step, threshold=threshold,
        )  # fmt: skip

    def compacted(self, result: ops.Compacted) -> None:
        """Follow a compaction: slot j now holds the token that was in slot result.indices[..., j]."""
        n = result.indices.shape[2]
        padding = result.indices < 0
        source = result.indices.clamp(min=0)
        for state, empty in self._state():
            state[:, :, :n] = state.gather(2, source).masked_fill(padding, empty)
            state[:, :, n:] = empty
        kept = torch.full_like(self.lengths, n) if result.lengths is None else result.lengths
        self.lengths = torch.minimum(self.lengths, kept)
        self._most = n

    def overwrite(self, slots: Tensor) -> None:
        """A new token takes the place of the one in `slots` [B, H, 1] (`kvevict.ops.evict_slots`)."""
        self.positions.scatter_(2, slots, self.tokens_seen[:, None, None].expand_as(slots))
        self.mass.scatter_(2, slots, 0.0)
        self.last_used.scatter_(2, slots, -1)
        self.tokens_seen += 1

    def observed(self, keys: Tensor, **more) -> Observed:
        """What a policy may read of the cache with these keys [B, H, S, D]."""
        S = keys.shape[2]
        known = dict(
            mass=self.mass[:, :, :S], last_used=self.last_used[:, :, :S], positions=self.positions[:, :, :S],
            tokens_seen=self.tokens_seen, lengths=self.lengths.clamp(min=1),
        )  # fmt: skip
        return Observed(keys=keys, **(known | more))
